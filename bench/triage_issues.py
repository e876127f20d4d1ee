"""Labelled issues for the triage bench: read from a file, or made up for a team with ways of its own.

A file is JSONL, an issue a line: {"title": str, "body": str, "type": str, "priority": "P0".."P3", "labels": [str]}.

The made-up team is called Cupboard. Its issues are those that the demo model is measured on (its held-out split: other
wordings, products and combinations than it was trained on), relabelled by the team's guide, which no model has read:

    money   checkout, payments, invoices, billing, subscriptions: one step more urgent than elsewhere
    print   printing, paper, scanners, kiosks: being phased out, so P3 whatever it is
    docs    documentation, help, newsletter, landing page: a chore whatever it is called
    login   sign-in, SSO, two-factor, passwords: P1 at least

So the twist is made by rules, and favours what compares issues by what they are about; how much is learnt here says
that corrections do get through, not how well triage does in anybody's house. `triage_hand.jsonl` are 60 issues in other
words, written and labelled by hand by the same guide. For your own house bring your own file.
"""

from __future__ import annotations

from pathlib import Path
from random import Random
from typing import Annotated

import msgspec

from piclusterd.inference.demo_model.issues import Issue as MadeUp
from piclusterd.inference.demo_model.issues import draw_issues

HAND = Path(__file__).with_name("triage_hand.jsonl")
AREAS = {
    "money": ("checkout", "shopping cart", "invoice", "billing", "payment", "subscription", "order history"),
    "print": ("printer", "PDF export", "camera view", "kiosk", "report page"),
    "docs": ("docs site", "help page", "newsletter", "landing page", "footer", "onboarding"),
    "login": ("login", "sign-in", "password", "two-factor", "SSO", "OAuth", "session"),
}
"""Area → what components of it are called."""


class Issue(msgspec.Struct, frozen=True):
    title: str
    body: str
    type: str
    priority: Annotated[str, msgspec.Meta(pattern="^P[0-3]$")]
    labels: tuple[str, ...] = ()


def read(path: Path) -> list[Issue]:
    """Raises ValueError, naming the line."""
    issues = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if line.strip():
            try:
                issues.append(msgspec.json.decode(line, type=Issue))
            except msgspec.DecodeError as fault:
                raise ValueError(f"{path}:{number}: {fault}") from None
    return issues


def of_cupboard(count: int, seed: int) -> list[Issue]:
    """`count` issues of the made-up team, mixed with those written by hand; the same for the same seed.

    Half of them lie in one of the areas, so that a few hundred issues show the guide often enough to be measured.
    """
    rng = Random(seed)
    drawn = draw_issues(20 * count, seed, "held_out")
    inside = [issue for issue in drawn if area_of(issue.component)]
    outside = [issue for issue in drawn if not area_of(issue.component)]
    hand = read(HAND)
    half = max(count - len(hand), 0) // 2
    made = [_by_the_guide(issue) for issue in (*inside[:half], *outside[: count - len(hand) - half])]
    mixed = [*made, *hand][:count]
    rng.shuffle(mixed)
    return mixed


def area_of(component: str) -> str:
    return next((area for area, words in AREAS.items() if any(word in component for word in words)), "")


def _by_the_guide(issue: MadeUp) -> Issue:
    area, kind, priority = area_of(issue.component), issue.type, issue.priority
    match area:
        case "money":
            priority = f"P{max(int(priority[1]) - 1, 0)}"
        case "print":
            priority = "P3"
        case "docs":
            kind = "chore"
        case "login":
            priority = min(priority, "P1")
        case _:
            pass
    return Issue(issue.title, issue.body, kind, priority, (area,) if area else ())
