"""What a person reads of a fault."""

from __future__ import annotations

import pytest

from piclusterd.errors import ConfigError, Unavailable, UserError


@pytest.mark.parametrize(
    ("what", "why", "fix", "read"),
    [
        ("the file cannot be read", "It has no end", "Pull it again.",
         "the file cannot be read. It has no end. Pull it again."),
        ("the file cannot be read.", "It has no end.", "", "the file cannot be read. It has no end."),
        ("it cannot be removed", "nobody would tell", "Ask there.",
         "it cannot be removed: nobody would tell. Ask there."),
        ("there is no model", "'x' is none", "", "there is no model. 'x' is none"),
        ("it is left alone", "", "Wait.", "it is left alone. Wait."),
        ("overloaded", "", "", "overloaded"),
    ],
)  # fmt: skip
def test_what_why_and_fix_read_as_sentences(what: str, why: str, fix: str, read: str) -> None:
    assert str(UserError(what, why, fix)) == str(Unavailable(what, why, fix)) == read


def test_the_faults_of_a_configuration_stand_one_a_line() -> None:
    assert str(ConfigError(["a.toml:1: x", "a.toml:2: y"])).splitlines()[1:] == ["  a.toml:1: x", "  a.toml:2: y"]
