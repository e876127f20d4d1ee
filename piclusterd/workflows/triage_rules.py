"""What is certain of an issue without a model: a team's rules, the words that speak for a label, whom triage passes by.

Rules look at words and names as people wrote them; they are the owner's, so what they say has confidence 1. Of two
rules the later one wins; a raise (`at_least`) is made after everything else, the model included.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from .triage_issue import Issue
from .triage_policy import Policy, Rule

URGENT_WORDS = (
    "outage", "down", "data loss", "lost data", "security", "breach", "leaked", "vulnerability", "all customers",
    "every customer", "everyone", "nobody can", "no one can",
)  # fmt: skip
"""In an issue that a model calls P0 they confirm it, whatever its confidence."""


@dataclass(frozen=True, slots=True)
class Certain:
    """What the rules say; "" where they say nothing. `why` names the rules that held, for people."""

    type: str = ""
    priority: str = ""
    at_least: str = ""
    labels: tuple[str, ...] = ()
    confirms_p0: bool = False
    why: tuple[str, ...] = ()


def certain(policy: Policy, issue: Issue) -> Certain:
    kind = priority = least = ""
    labels: dict[str, None] = {}
    why: list[str] = []
    for number, rule in enumerate(policy.rules, start=1):
        words = _holds(rule, issue)
        if words is None:
            continue
        kind, priority = rule.type or kind, rule.priority or priority
        least = min(filter(None, (least, rule.at_least or "")), default="")
        labels |= dict.fromkeys(rule.labels)
        why.append(f"rule {number} ({words})")
    for word, label in policy.synonyms.items():
        if _speaks_of(issue, word):
            labels |= {label: None}
            why.append(f"{word!r} stands for {label}")
    confirms = "P0" in (priority, least) or any(_speaks_of(issue, word) for word in URGENT_WORDS)
    return Certain(kind, priority, least, tuple(labels), confirms, tuple(why))


def passed_by(policy: Policy, issue: Issue) -> str:
    """Why triage leaves `issue` to people; "" where it does not."""
    label = next((name for name in policy.skip_labels if issue.named(name)), "")
    if label:
        return f"the team's triage skips issues with the label {label}"
    if issue.creator.among(policy.skip_authors):
        return "the team's triage skips its author"
    if issue.project.casefold() in {name.casefold() for name in policy.skip_projects} - {""}:
        return f"the team's triage skips the project {issue.project}"
    if len(f"{issue.title} {issue.description}".split()) < policy.skip_below_words:
        return f"it has fewer than {policy.skip_below_words} words"
    return ""


def _holds(rule: Rule, issue: Issue) -> str | None:
    """What of `issue` made the rule hold, in words; None where it does not."""
    found = []
    for words, text in ((rule.title, issue.title), (rule.text, f"{issue.title}\n{issue.description}")):
        word = next((word for word in words if _in(word, text)), None)
        if words and word is None:
            return None
        found += [repr(word)] if word is not None else []
    if rule.author and not issue.creator.among(rule.author):
        return None
    label = next((name for name in rule.label if issue.named(name)), None)
    if rule.label and label is None:
        return None
    return ", ".join([*found, *(["author"] if rule.author else []), *([f"label {label}"] if label else [])])


def _speaks_of(issue: Issue, word: str) -> bool:
    return _in(word, f"{issue.title}\n{issue.description}")


def _in(words: str, text: str) -> bool:
    """`words` as whole words, without case."""
    return re.search(rf"(?<!\w){re.escape(words)}(?!\w)", text, re.IGNORECASE) is not None
