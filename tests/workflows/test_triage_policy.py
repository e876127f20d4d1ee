"""The file of the teams' policies: every fault at once, what a team leaves out is as in the default."""

from __future__ import annotations

from datetime import time
from pathlib import Path

import pytest

from piclusterd import config
from piclusterd.errors import ConfigError
from piclusterd.workflows.triage_policy import Policy, Rule, of_config, parse, quiet_hours

TRIAGE = config.Triage(mode="shadow", labels={"bug": "Fehler"})
SHIPPED = Path(__file__).parents[2] / "config" / "triage.toml"


def faults(text: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        parse(text, "triage.toml", TRIAGE)
    return list(caught.value.faults)


def test_without_a_file_the_configuration_decides() -> None:
    assert of_config(TRIAGE).of("LIN") == Policy(mode="shadow", labels={"bug": "Fehler"})


def test_a_team_has_what_the_default_has_but_for_what_it_says() -> None:
    text = """
[default]
auto = 0.8
labels_more = ["web"]
[[default.rules]]
title = ["outage"]
at_least = "P1"
[teams.LIN]
mode = "apply"
[[teams.LIN.rules]]
label = ["web"]
type = "chore"
"""
    policies = parse(text, "f", TRIAGE)
    lin, other = policies.of("LIN"), policies.of("OPS")
    assert (lin.mode, lin.auto, lin.labels) == ("apply", 0.8, {"bug": "Fehler"})
    assert lin.rules == (Rule(title=("outage",), at_least="P1"), Rule(label=("web",), type="chore"))
    assert (other.mode, other.rules) == ("shadow", lin.rules[:1])


def test_every_fault_is_told_at_once_with_its_line() -> None:
    text = """[default]
mode = "loud"
auto = 2
sugest = 0.1
[teams.LIN]
suggest = 0.9
quiet = "late"
timezone = "Mars/North"
labels_more = ["web"]
synonyms = { "frontend" = "ui" }
[[teams.LIN.rules]]
priority = "P0"
[[teams.LIN.rules]]
title = ["x"]
[[teams.LIN.rules]]
title = ["x"]
type = "epic"
labels = ["secret"]
[other]
"""
    told = faults(text)
    expected = [
        "triage.toml:2: default.mode:", "triage.toml:3: default.auto:", "triage.toml:4: default.sugest: unknown key",
        "triage.toml:6: teams.LIN.suggest: 0.9 is above auto", "triage.toml:7: teams.LIN.quiet:",
        "triage.toml:8: teams.LIN.timezone:", "triage.toml:10: teams.LIN.synonyms: 'frontend' stands for 'ui'",
        "rule 1 would hold of every issue", "rule 2 says nothing", "rule 3: 'epic' is none of the types",
        "rule 3: 'secret' is not in labels_more", "triage.toml:19: other: unknown section",
    ]  # fmt: skip
    for part in expected:
        assert any(part in fault for fault in told), (part, told)
    assert "did you mean suggest?" in next(fault for fault in told if "sugest" in fault)
    assert 'legal: "off" or "shadow" or "suggest" or "apply"' in next(fault for fault in told if "loud" in fault or
                                                                       "default.mode" in fault)  # fmt: skip
    assert "legal: 0 to 1" in next(fault for fault in told if "default.auto" in fault)
    assert len(told) == len(expected)


@pytest.mark.parametrize("text", ["a = ", "default = 3", "teams = 3", "[teams]\nLIN = 3", '[default]\nrules = "x"'])
def test_what_is_no_policy_is_told_and_never_raises_anything_else(text: str) -> None:
    assert faults(text)


def test_the_same_fault_is_told_once_and_a_table_is_asked_for_by_its_name() -> None:
    (twice,) = faults('[default]\n[[default.rules]]\ntitle = ["x"]\nlabels = ["y", "y"]\n')
    assert "'y' is not in labels_more" in twice
    (table,) = faults("[default]\nlabels = 3\n")
    assert "legal: table of name = text" in table


def test_the_shipped_file_shows_every_key_and_is_legal() -> None:
    text = SHIPPED.read_text()
    assert all(f"{name} = " in text or f".{name}]]" in text for name in Policy.__struct_fields__)
    assert all(f"{name} = " in text for name in Rule.__struct_fields__)
    shown = parse(text, "config/triage.toml", config.Triage())
    default = Policy(labels=config.Triage().labels)
    for name in Policy.__struct_fields__:
        assert getattr(shown.default, name) == getattr(default, name), f"{name} at its default"
    lines: list[str] = []
    for line in text.splitlines():
        example = line.removeprefix("#: ")
        if example != line and lines and lines[-1].split(" = ")[0] == example.split(" = ")[0]:
            lines.pop()  # the example takes the place of the default above it
        lines.append(example)
    examples = parse("\n".join(lines), "config/triage.toml", config.Triage())
    assert examples.of("WEB").mode == "suggest"


def test_quiet_hours_are_two_times_of_day() -> None:
    assert quiet_hours("22:00-07:30") == (time(22), time(7, 30))
    assert [quiet_hours(text) for text in ("", "22-", "7:00-8:00-9:00", "07:00-07:00", "x-y")] == [None] * 5
