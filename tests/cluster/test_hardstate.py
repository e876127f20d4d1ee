from pathlib import Path

import pytest

from piclusterd.cluster import hardstate
from piclusterd.errors import Broken
from piclusterd.events import HardState
from piclusterd.ids import NodeId
from piclusterd.wire import Voters

A = NodeId("a" * 16)


def state(term: int) -> HardState:
    return HardState(term=term, voted_for=A if term % 2 else None, voters=Voters(1, 0, (A,)), incarnation=7)


def test_nothing_saved_is_none(tmp_path: Path) -> None:
    assert hardstate.load(tmp_path) is None
    assert hardstate.load(tmp_path / "absent") is None


def test_the_last_state_saved_is_loaded(tmp_path: Path) -> None:
    for term in range(1, 6):
        hardstate.save(tmp_path / "vote", state(term))
        assert hardstate.load(tmp_path / "vote") == state(term)


def test_copies_take_turns_and_are_private(tmp_path: Path) -> None:
    hardstate.save(tmp_path, state(1))
    assert [p.name for p in tmp_path.iterdir()] == ["vote.a"]
    hardstate.save(tmp_path, state(2))
    first = (tmp_path / "vote.a").read_bytes()
    hardstate.save(tmp_path, state(3))
    assert (tmp_path / "vote.a").read_bytes() != first
    assert {p.stat().st_mode & 0o777 for p in tmp_path.iterdir()} == {0o600}


@pytest.mark.parametrize("damaged", hardstate.COPIES)
@pytest.mark.parametrize("cut", [0, 1, 31, 32, 40])
def test_one_torn_copy_leaves_the_other(tmp_path: Path, damaged: str, cut: int) -> None:
    hardstate.save(tmp_path, state(1))
    hardstate.save(tmp_path, state(2))
    path = tmp_path / damaged
    path.write_bytes(path.read_bytes()[:cut])
    assert hardstate.load(tmp_path) == state(2 if damaged == "vote.a" else 1)


@pytest.mark.parametrize("damaged", hardstate.COPIES)
def test_a_save_after_damage_never_overwrites_the_good_copy(tmp_path: Path, damaged: str) -> None:
    hardstate.save(tmp_path, state(1))
    hardstate.save(tmp_path, state(2))
    (tmp_path / damaged).write_bytes(b"torn")
    hardstate.save(tmp_path, state(9))
    assert hardstate.load(tmp_path) == state(9)
    other = next(name for name in hardstate.COPIES if name != damaged)
    (tmp_path / damaged).write_bytes(b"torn again")
    assert (tmp_path / other).exists()
    assert hardstate.load(tmp_path) == state(2 if damaged == "vote.a" else 1)


def test_a_write_cut_short_before_the_rename_changes_nothing(tmp_path: Path) -> None:
    hardstate.save(tmp_path, state(1))
    (tmp_path / "vote.b.new").write_bytes(b"half")
    assert hardstate.load(tmp_path) == state(1)
    hardstate.save(tmp_path, state(2))
    assert hardstate.load(tmp_path) == state(2)


def test_every_flipped_bit_is_noticed(tmp_path: Path) -> None:
    hardstate.save(tmp_path, state(1))
    path = tmp_path / "vote.a"
    good = path.read_bytes()
    for place in range(len(good)):
        path.write_bytes(good[:place] + bytes([good[place] ^ 1]) + good[place + 1 :])
        with pytest.raises(Broken):
            hardstate.load(tmp_path)


def test_a_lost_record_is_broken_and_cannot_be_papered_over(tmp_path: Path) -> None:
    hardstate.save(tmp_path, state(1))
    hardstate.save(tmp_path, state(2))
    for name in hardstate.COPIES:
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(Broken, match="lost vote record"):
        hardstate.load(tmp_path)
    with pytest.raises(Broken, match="lost vote record"):
        hardstate.save(tmp_path, state(3))


def test_that_there_was_a_record_is_known_of_the_node_it_was_of(tmp_path: Path) -> None:
    assert not hardstate.has_voted(tmp_path, A)
    hardstate.note_voted(tmp_path, A)
    hardstate.note_voted(tmp_path, A)
    assert hardstate.has_voted(tmp_path, A)
    assert not hardstate.has_voted(tmp_path, NodeId("b" * 16)), "another identity in the same place"
    assert [p.name for p in tmp_path.iterdir()] == [hardstate.VOTED]
