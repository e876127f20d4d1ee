"""`picluster backup` and `recover` on real state directories."""

from __future__ import annotations

import asyncio
import hashlib
import io
import tarfile
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import msgspec
import pytest

from piclusterd.cluster import hardstate, identity
from piclusterd.errors import Refused, UserError
from piclusterd.events import HardState, Record
from piclusterd.folding import MEANING
from piclusterd.ids import NodeId
from piclusterd.ledger import archive
from piclusterd.ledger.writer import LedgerWriter
from piclusterd.wire import Voters

from .command import Result, picluster

OTHER = NodeId("b" * 16)
VOTED = HardState(6, OTHER, Voters(3, 5, (NodeId("a" * 16), OTHER)), 2)


async def start(state: Path) -> LedgerWriter:
    me = identity.load(state)
    assert me is not None
    return await LedgerWriter.start(state / "ledger.db", me.signer, identity.verify, me.name, lambda: 5000)


async def notes(ledger: LedgerWriter) -> list[object]:
    return [fact.body["text"] for fact in await ledger.replay() if fact.kind == "note"]


@pytest.fixture
def state(tmp_path: Path) -> Path:
    identity.create_cluster(tmp_path / "pi-1", "home", "pi-1")
    hardstate.save(tmp_path / "pi-1" / "votes", VOTED)
    return tmp_path / "pi-1"


@pytest.fixture
async def running(state: Path) -> AsyncIterator[LedgerWriter]:
    ledger = await start(state)
    await ledger.append([Record("note", {"text": "kept"}, 8)])
    yield ledger
    await ledger.close()


@pytest.fixture
async def saved(running: LedgerWriter, state: Path, tmp_path: Path) -> Path:
    """A backup that was made while the ledger was open, and the ledger closed since."""
    result = await picluster("backup", "create", str(tmp_path / "node.tgz"), "--state-dir", str(state))
    assert (result.code, result.err) == (0, "")
    await running.close()
    return tmp_path / "node.tgz"


def mode(path: Path) -> int:
    return path.stat().st_mode & 0o777


async def restore(file: Path, state: Path, *options: str) -> Result:
    return await picluster("backup", "restore", str(file), "--state-dir", str(state), *options)


async def test_a_backup_is_private_whole_and_replaces_nothing(saved: Path, state: Path) -> None:
    assert mode(saved) == 0o600
    again = await picluster("backup", "create", str(saved), "--state-dir", str(state))
    assert again.code == 1
    assert "never replaces" in again.err
    with tarfile.open(saved) as tar:
        names = tar.getnames()
    assert names[:2] == [archive.MANIFEST, "ledger.db"]
    assert {"identity/node.key", "identity/cluster.json", "votes/vote.a"} <= set(names)


async def test_a_restored_node_is_the_same_one_in_a_new_log_and_does_not_vote(saved: Path, tmp_path: Path) -> None:
    new = tmp_path / "new"
    result = await restore(saved, new)
    assert (result.code, result.err) == (0, "")
    was, now = identity.load(tmp_path / "pi-1"), identity.load(new)
    assert was is not None
    assert now is not None
    assert (now.node, now.name) == (was.node, was.name)
    assert hardstate.load(new / "votes") is None
    assert "voted" in (new / archive.VOTES_LOST).read_text()
    assert hardstate.load(new / archive.VOTES_ASIDE) == VOTED
    ledger = await start(new)
    try:
        assert await notes(ledger) == ["kept"]
        assert ledger.log not in {head.log for head in (await ledger.heads()) if head.seq > 1}
        assert "restored" in ledger.lost
    finally:
        await ledger.close()
    assert {path.stat().st_mode & 0o077 for path in new.rglob("*")} == {0}


async def test_a_pruned_ledger_is_saved_and_restored(running: LedgerWriter, state: Path, tmp_path: Path) -> None:
    await running.append([Record("run.result", {"run": "r", "step": "s", "value": {}})] * 5)
    _, (checkpoint,) = await running.add_checkpoint(running.log, 7, 5, MEANING)
    while await running.forget(running.log, checkpoint.seq, "rows"):
        pass
    result = await picluster("backup", "create", str(tmp_path / "node.tgz"), "--state-dir", str(state))
    assert result.code == 0
    assert (await restore(tmp_path / "node.tgz", tmp_path / "new")).code == 0
    ledger = await start(tmp_path / "new")
    assert await notes(ledger) == ["kept"], "by the checkpoint"
    assert (await ledger.verify()).faults == ()
    assert ledger.log != running.log
    await ledger.close()


async def test_a_node_that_is_there_is_not_replaced_without_force(saved: Path, state: Path) -> None:
    refused = await restore(saved, state)
    assert refused.code == 1
    assert "--force" in refused.err
    assert hardstate.load(state / "votes") == VOTED
    assert (await restore(saved, state, "--force")).code == 0
    assert hardstate.load(state / "votes.replaced") == VOTED
    assert hardstate.load(state / "votes") is None
    assert (state / "ledger.db.replaced").exists()


async def test_a_running_node_is_not_restored_over(saved: Path, state: Path) -> None:
    ledger = await start(state)
    try:
        refused = await restore(saved, state, "--force")
        assert refused.code == 1
        assert "in use" in refused.err
    finally:
        await ledger.close()
    assert hardstate.load(state / "votes") == VOTED


# hostile and damaged archives ------------------------------------------------------------------------------------
def packed(members: dict[str, bytes], *, change: Callable[[tarfile.TarInfo], None] = lambda _: None) -> io.BytesIO:
    """An archive whose manifest describes `members` truly; `change` alters each member's header."""
    files = {name: archive.Member(len(data), hashlib.sha256(data).hexdigest()) for name, data in members.items()}
    manifest = msgspec.json.encode(archive.Manifest(1, "0", "n", "c", 0.0, files))
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w:gz") as tar:
        for name, data in {archive.MANIFEST: manifest, **members}.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            if name != archive.MANIFEST:
                change(info)
            tar.addfile(info, io.BytesIO(data))
    out.seek(0)
    return out


def as_link(info: tarfile.TarInfo) -> None:
    info.type, info.linkname, info.size = tarfile.SYMTYPE, "/etc/passwd", 0


def renamed(info: tarfile.TarInfo) -> None:
    info.name = "identity/../../outside"


@pytest.mark.parametrize(
    ("file", "words"),
    [
        (packed({"../outside": b"x"}), "refused"),
        (packed({"/etc/outside": b"x"}), "refused"),
        (packed({"identity/../outside": b"x"}), "refused"),
        (packed({"identity/.ssh/outside": b"x"}), "refused"),
        (packed({"other/file": b"x"}), "refused"),
        (packed({"identity/node.key": b"x"}, change=as_link), "refused"),
        (packed({"identity/node.key": b"x"}, change=renamed), "refused"),
        (packed({"identity/node.key": b"x" * 2_000_000}), "refused"),
        (packed({f"identity/f{n}": b"" for n in range(300)}), "refused"),
        (io.BytesIO(b"not a tar at all"), "cannot|can be read"),
        (io.BytesIO(b""), "backup"),
    ],
)
def test_what_no_backup_of_ours_holds_is_refused_and_nothing_changes(
    tmp_path: Path, file: io.BytesIO, words: str
) -> None:
    file.seek(0)
    with pytest.raises((UserError, Refused), match=words):
        archive.restore(file, tmp_path / "new")
    left = sorted(path.name for path in tmp_path.rglob("*"))
    assert left == ["ledger.db.lock", "new"]


async def test_a_damaged_or_cut_backup_is_refused(saved: Path, tmp_path: Path) -> None:
    whole = await asyncio.to_thread(saved.read_bytes)
    spoiled = bytearray(whole)
    spoiled[len(spoiled) // 2] ^= 1
    for data in (whole[: len(whole) * 2 // 3], bytes(spoiled)):
        with pytest.raises(UserError):
            archive.restore(io.BytesIO(data), tmp_path / "new")
        assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["ledger.db.lock"]


# recover ---------------------------------------------------------------------------------------------------------
async def test_recover_explains_and_changes_nothing_without_force(running: LedgerWriter, state: Path) -> None:
    await running.close()
    result = await picluster("recover", "--state-dir", str(state))
    assert result.code == 1
    assert "two coordinators" in result.out
    assert hardstate.load(state / "votes") == VOTED


async def test_recover_writes_voters_past_the_old_majority(running: LedgerWriter, state: Path) -> None:
    in_use = await picluster("recover", "--force", "--state-dir", str(state))
    assert (in_use.code, "in use" in in_use.err) == (1, True)
    await running.close()
    result = await picluster("recover", "--force", "--voter", OTHER, "--state-dir", str(state))
    assert (result.code, result.err) == (0, "")
    me, now = identity.load(state), hardstate.load(state / "votes")
    assert me is not None
    assert now is not None
    assert now.term == 9, "past the ledger's highest term"
    assert now.voted_for is None
    assert now.voters == Voters(1003, 9, tuple(sorted((me.node, OTHER))))


async def test_recover_makes_a_restored_node_vote_again(saved: Path, tmp_path: Path) -> None:
    new = tmp_path / "new"
    await restore(saved, new)
    assert (await picluster("recover", "--force", "--state-dir", str(new))).code == 0
    now = hardstate.load(new / "votes")
    assert now is not None
    assert (now.voters.version, len(now.voters.voters)) == (1003, 1)
    assert not (new / archive.VOTES_LOST).exists()
    ledger = await start(new)
    assert ledger.lost == ""
    await ledger.close()


async def test_recover_survives_a_vote_record_that_rotted(state: Path) -> None:
    for path in (state / "votes").iterdir():
        path.write_bytes(b"rot")
    assert (await picluster("recover", "--force", "--state-dir", str(state))).code == 0
    assert hardstate.load(state / "votes") is not None


async def test_recover_refuses_what_is_no_node_id(state: Path) -> None:
    result = await picluster("recover", "--force", "--voter", "pi-2", "--state-dir", str(state))
    assert result.code == 1
    assert "not a node id" in result.err
