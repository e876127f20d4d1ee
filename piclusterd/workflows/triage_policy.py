"""What each team wants of triage: one TOML file, read once at the start, the same on every node that may coordinate.

    [default]            what holds for every team
    [teams.LIN]          by the key of a team in Linear; what it leaves out is as in [default]
    [[teams.LIN.rules]]  what is certain without a model (after those of [default])

Every fault is reported at once, as `file:line: teams.LIN.auto: …`. Without a file `[triage]` alone decides. Keys, their
meaning and defaults are those of `Policy` and `Rule`; `config/triage.toml` shows each.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import time
from difflib import get_close_matches
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

import msgspec
from msgspec import Meta

from .. import config
from ..config_file import key_lines
from ..errors import ConfigError
from .triage_prompt import TYPES

Field = Literal["type", "priority", "label", "duplicate"]
Priority = Literal["P0", "P1", "P2", "P3"]
Share = Annotated[float, Meta(ge=0.0, le=1.0)]
Word = Annotated[str, Meta(min_length=1, max_length=100)]
Words = Annotated[tuple[Word, ...], Meta(max_length=64)]
Model = Annotated[str, Meta(max_length=128)]
TEAMS_MAX, RULES_MAX = 64, 64
MORE_LABELS_MAX = 40
"""Of `labels_more`: a model chooses among them in one pass."""
ANYBODY = "*"


class Rule(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Where all that is given of title, text, author and label holds of an issue, the rest is certain.

    A list holds where one of its words does: as words of the title, of title or description, as a name.
    """

    title: Words = ()
    text: Words = ()
    author: Words = ()
    """Id, e-mail address or name of whoever created the issue."""
    label: Words = ()
    type: Word | None = None
    priority: Priority | None = None
    at_least: Priority | None = None
    """The priority is raised to this where it is lower; P0 counts as confirmed."""
    labels: Words = ()


class Policy(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    mode: Literal["off", "shadow", "suggest", "apply"] = "apply"
    """shadow: decide and record; suggest: and comment; apply: and write what is certain enough."""
    fields: tuple[Field, ...] = ("type", "priority", "label", "duplicate")
    """What is decided at all."""
    auto: Share = 0.5
    """From this confidence on a field is written."""
    auto_fields: dict[Field, Share] = {}
    """The same for single fields, where they differ."""
    suggest: Share = 0.3
    """From this on it is suggested in the comment; below it is ignored."""
    labels: Annotated[dict[str, Word], Meta(max_length=32)] = {}
    """Type the model names = label in Linear; as `[triage] labels`."""
    labels_more: Annotated[tuple[Word, ...], Meta(max_length=MORE_LABELS_MAX)] = ()
    """Further labels that may be given, one an issue."""
    synonyms: Annotated[dict[Word, Word], Meta(max_length=128)] = {}
    """Word in an issue = label of `labels_more` that it speaks for."""
    rubric: Annotated[str, Meta(max_length=2000)] = ""
    """What the team's priorities mean, in its own words; the model reads it before each issue."""
    examples: Annotated[int, Meta(ge=0, le=8)] = 0
    """Similar triaged issues shown to the model; 3 is good for instruct models, the demo model needs 0."""
    model: Model = ""
    """Asked first, on the node that has it; empty: inference.default_model."""
    larger_model: Model = ""
    """Asked where the first is not sure or says P0, on the droplet first; empty: none."""
    cloud_provider: Model = ""
    """One of `[[providers]]`, asked where those two are not sure; empty: nothing leaves the house."""
    escalate_below: Share = 0.5
    p0_confidence: Share = 0.5
    """P0 needs this confidence, a rule, or a word like outage; else it is P1."""
    encoder: Model = "words"
    """The model whose vectors tell similar issues; `words`: by common words, without a model; empty: learn nothing."""
    duplicate: Share = 0.8
    """Likeness from which an issue is called a possible duplicate."""
    quiet: Annotated[str, Meta(max_length=11)] = ""
    """Hours without writes but for P0, as 22:00-07:00."""
    timezone: Annotated[str, Meta(max_length=64)] = "UTC"
    skip_labels: Words = ()
    skip_authors: Words = ()
    """Ids, e-mail addresses or names."""
    skip_projects: Words = ()
    skip_below_words: Annotated[int, Meta(ge=0, le=100)] = 0
    """Issues of fewer words are left to people."""
    comment: Literal["always", "when-useful", "never"] = "always"
    commanders: Words = (ANYBODY,)
    """Who may command in comments: ids, e-mail addresses or names; `*`: every member of the workspace."""
    rules: Annotated[tuple[Rule, ...], Meta(max_length=RULES_MAX)] = ()

    def auto_of(self, name: str) -> float:
        return next((share for field, share in self.auto_fields.items() if field == name), self.auto)

    @property
    def types(self) -> tuple[str, ...]:
        return (*TYPES, *(kind for kind in self.labels if kind not in TYPES))

    @property
    def all_labels(self) -> list[str]:
        """Every name that may ever be written."""
        return sorted({*self.labels.values(), *self.labels_more})


@dataclass(frozen=True, slots=True)
class Policies:
    default: Policy
    teams: Mapping[str, Policy]

    def of(self, team: str) -> Policy:
        """By the team's key."""
        return self.teams.get(team, self.default)


def of_config(triage: config.Triage) -> Policies:
    """Where there is no file."""
    return Policies(Policy(mode=triage.mode, labels=triage.labels), {})


def parse(text: str, name: str, triage: config.Triage) -> Policies:
    """The policies in the file `name`. Raises ConfigError with every fault; `triage` gives what it leaves out."""
    reader = _Reader(name, key_lines(text))
    try:
        tables = tomllib.loads(text)
    except tomllib.TOMLDecodeError as fault:
        raise ConfigError([f"{name}: not TOML: {fault}"]) from None
    for key in tables:
        if key not in ("default", "teams"):
            reader.fault((key,), "unknown section; there are [default] and [teams.KEY]")
    ours = {"mode": triage.mode, "labels": dict(triage.labels)}
    default = {**ours, **reader.policy(("default",), tables.get("default", {}))}
    teams = tables.get("teams", {})
    if not isinstance(teams, dict) or len(teams) > TEAMS_MAX:
        reader.fault(("teams",), f"write at most {TEAMS_MAX} sections [teams.KEY]")
        teams = {}
    made = {}
    for key, table in teams.items():
        told = reader.policy(("teams", key), table)
        made[key] = {**default, **told, "rules": (*default.get("rules", ()), *told.get("rules", ()))}
    policies = Policies(Policy(**default), {key: Policy(**values) for key, values in made.items()})
    for where, policy in ((("default",), policies.default), *((("teams", k), p) for k, p in policies.teams.items())):
        reader.check(where, policy)
    if reader.faults:
        raise ConfigError(reader.faults)
    return policies


class _Reader:
    def __init__(self, name: str, lines: Mapping[tuple[str, ...], int]) -> None:
        self._name = name
        self._lines = lines
        self.faults: list[str] = []
        self._types = get_type_hints(Policy, include_extras=True)

    def fault(self, where: tuple[str, ...], what: str) -> None:
        line = next((self._lines[where[:n]] for n in range(len(where), 0, -1) if where[:n] in self._lines), 1)
        said = f"{self._name}:{line}: {'.'.join(where)}: {what}"
        if said not in self.faults:
            self.faults.append(said)

    def policy(self, where: tuple[str, ...], table: object) -> dict[str, Any]:
        """The legal values of one section."""
        if not isinstance(table, dict):
            self.fault(where, "not a table")
            return {}
        told: dict[str, Any] = {}
        for key, raw in table.items():
            if key not in self._types:
                near = get_close_matches(key, self._types, n=1)
                self.fault((*where, key), f"unknown key{f'; did you mean {near[0]}?' if near else ''}")
                continue
            try:
                told[key] = msgspec.convert(raw, self._types[key])
            except msgspec.ValidationError as fault:
                self.fault((*where, key), f"{fault} (legal: {_legal(self._types[key])})")
        return told

    def check(self, where: tuple[str, ...], policy: Policy) -> None:
        """What no single value shows."""
        if policy.suggest > policy.auto:
            self.fault(
                (*where, "suggest"), f"{policy.suggest} is above auto, {policy.auto}: nothing would be suggested"
            )
        for word, label in policy.synonyms.items():
            if label not in policy.labels_more:
                self.fault((*where, "synonyms"), f"{word!r} stands for {label!r}, which is not in labels_more")
        for number, rule in enumerate(policy.rules, start=1):
            self._check_rule((*where, "rules"), f"rule {number}", rule, policy)
        if policy.quiet and quiet_hours(policy.quiet) is None:
            self.fault((*where, "quiet"), f"{policy.quiet!r} is not hours (legal: HH:MM-HH:MM)")
        try:
            ZoneInfo(policy.timezone)
        except (ZoneInfoNotFoundError, ValueError):
            self.fault((*where, "timezone"), f"{policy.timezone!r} is no time zone (legal: as in /usr/share/zoneinfo)")

    def _check_rule(self, where: tuple[str, ...], name: str, rule: Rule, policy: Policy) -> None:
        if not (rule.title or rule.text or rule.author or rule.label):
            self.fault(where, f"{name} would hold of every issue: give title, text, author or label")
        if not (rule.type or rule.priority or rule.at_least or rule.labels):
            self.fault(where, f"{name} says nothing: give type, priority, at_least or labels")
        if rule.type and rule.type not in policy.types:
            self.fault(where, f"{name}: {rule.type!r} is none of the types {', '.join(policy.types)}")
        for label in rule.labels:
            if label not in policy.labels_more:
                self.fault(where, f"{name}: {label!r} is not in labels_more")


def quiet_hours(text: str) -> tuple[time, time] | None:
    """From and until, of `22:00-07:00`; None where it is not that."""
    try:
        begins, ends = (time.fromisoformat(part.strip()) for part in text.split("-"))
    except ValueError:
        return None
    return (begins, ends) if begins != ends else None


def _legal(kind: Any) -> str:
    origin = get_origin(kind)
    if origin is Annotated:
        meta = next((m for m in get_args(kind)[1:] if isinstance(m, Meta) and m.ge is not None), None)
        return f"{meta.ge:g} to {meta.le:g}" if meta else _legal(get_args(kind)[0])
    if origin is Literal:
        return " or ".join(f'"{choice}"' for choice in get_args(kind))
    if origin in (tuple, list):
        return "list of " + _legal(get_args(kind)[0])
    if origin is dict:
        return "table of name = " + _legal(get_args(kind)[1])
    return {str: "text", float: "number", int: "whole number", Rule: "[[rules]] tables"}.get(kind, str(kind))
