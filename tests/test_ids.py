"""Names: functions of what they name, and nothing else."""

from __future__ import annotations

import hashlib
import uuid

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from piclusterd.ids import is_node_id, node_id, run_id, uuid4_of


@settings(deadline=None)
@given(st.binary(min_size=32, max_size=32))
def test_a_node_is_named_by_the_first_eight_bytes_of_its_keys_hash(key: bytes) -> None:
    assert node_id(key) == hashlib.sha256(key).digest()[:8].hex()
    assert is_node_id(node_id(key))


@pytest.mark.parametrize("text", ["", "0" * 15, "0" * 17, "A" * 16, "g" * 16, "0" * 15 + "\n", "٠" * 16])
def test_what_is_not_sixteen_lower_case_hex_digits_is_no_node_id(text: str) -> None:
    assert not is_node_id(text)


def test_the_run_of_an_event_has_one_id_on_every_node() -> None:
    assert run_id("triage", "linear:1") == run_id("triage", "linear:1")
    assert len(run_id("triage", "linear:1")) == 32
    assert len({run_id("triage", "a"), run_id("triage", "b"), run_id("spec", "a")}) == 3


@settings(deadline=None)
@given(st.lists(st.text(max_size=8), min_size=1, max_size=4))
def test_an_effects_id_is_a_uuid_of_version_4_and_always_the_same(parts: list[str]) -> None:
    made = uuid.UUID(uuid4_of(*parts))
    assert (made.version, made.variant) == (4, uuid.RFC_4122)
    assert uuid4_of(*parts) == str(made)


def test_two_effects_of_one_run_have_two_ids() -> None:
    assert uuid4_of("run", "comment") != uuid4_of("run", "update")
    assert uuid4_of("run", "comment") != uuid4_of("runcomment")
