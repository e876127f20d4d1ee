"""Files on several nodes: three shelves on real disks, and a wire between them that is function calls."""

from __future__ import annotations

import hashlib
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from piclusterd import shelf
from piclusterd.errors import NotFound, Unavailable, UserError
from piclusterd.ids import NodeId
from piclusterd.shelf import Company, Gone, Record, Shelf

NOW = 1_800_000_000


class House:
    """`up` are the nodes within reach of each other."""

    def __init__(self, root: Path, size: int = 3) -> None:
        self.nodes = [NodeId(f"{number:016x}") for number in range(size)]
        self.up = set(self.nodes)
        self.wall = float(NOW)
        self.root, self.copies = root, 2
        self.shelves = {node: self.started(node) for node in self.nodes}

    def started(self, node: NodeId) -> Shelf:
        async def company() -> Company:
            return Company([one for one in self.nodes if one != node and one in self.up], self.copies)

        async def request(peer: NodeId, name: str, body: bytes, timeout: float) -> AsyncGenerator[bytes, None]:
            if peer not in self.up:
                raise Unavailable(f"no link to {peer}")
            async for chunk in self.shelves[peer].serve_peer(node, name, body):
                yield chunk

        return Shelf(self.root / node, request, company, lambda: self.wall)

    def __getitem__(self, number: int) -> Shelf:
        return self.shelves[self.nodes[number]]

    def restart(self, number: int) -> None:
        self.shelves[self.nodes[number]] = self.started(self.nodes[number])

    def blobs(self, number: int) -> list[str]:
        return sorted(path.name for path in (self.root / self.nodes[number] / "blobs").glob("*"))


@pytest.fixture
def house(tmp_path: Path) -> House:
    return House(tmp_path)


async def stream(*chunks: bytes) -> AsyncGenerator[bytes, None]:
    for chunk in chunks:
        yield chunk


async def put(on: Shelf, id: str = "file-1", data: bytes = b"one\ntwo\n", **more: Any) -> Record:
    sha256, size = await on.receive(stream(data[:3], data[3:]))
    told: dict[str, Any] = {"purpose": "batch", "created_at": NOW, "expires_at": NOW + 1000, **more}
    record = Record(id=id, sha256=sha256, bytes=size, **told)
    await on.keep(record)
    return record


async def test_a_file_is_on_every_worker_and_opened_on_any(house: House) -> None:
    record = await put(house[0])
    assert record.sha256 == hashlib.sha256(b"one\ntwo\n").hexdigest()
    for number in range(3):
        assert await house[number].find("file-1") == record
        assert (await house[number].open(record)).read_bytes() == b"one\ntwo\n"
        assert house.blobs(number) == [record.sha256]
        house.restart(number)
        assert await house[number].find("file-1") == record


async def test_files_and_directories_are_their_owners_alone(house: House, tmp_path: Path) -> None:
    record = await put(house[0])
    path = await house[0].open(record)
    assert path.stat().st_mode & 0o777 == 0o600
    assert path.parent.stat().st_mode & 0o777 == 0o700


async def test_a_file_that_too_few_workers_took_is_not_promised(house: House) -> None:
    async def refuses(peer: NodeId, name: str, body: bytes) -> AsyncGenerator[bytes, None]:
        if body:
            raise Unavailable("the disk is full")
        yield b""

    for number in (1, 2):
        house[number].serve_peer = refuses  # type: ignore[method-assign]
    with pytest.raises(Unavailable, match="on 1 of the 2 disks"):
        await put(house[0])
    house.up = {house.nodes[0]}
    with pytest.raises(Unavailable, match="on 1 of the 2 disks"):
        await put(house[0])  # nobody is within reach
    house.copies = 1
    await put(house[0])  # alone in the house: there is nobody else


async def test_a_node_that_was_away_finds_what_came_meanwhile(house: House) -> None:
    house.up.discard(house.nodes[2])
    record = await put(house[0])
    house.up.add(house.nodes[2])
    assert await house[2].find("file-1") == record
    assert (await house[2].open(record)).read_bytes() == b"one\ntwo\n"
    assert await house[2].all("batch") == [record]


async def test_bytes_out_of_reach_are_unavailable_and_other_bytes_are_not_taken(house: House) -> None:
    house.up.discard(house.nodes[2])
    record = await put(house[0])
    for number in (0, 1):
        (house[number]._blobs / record.sha256).write_bytes(b"rotten")
    house.up.add(house.nodes[2])
    with pytest.raises(Unavailable, match="out of reach"):
        await house[2].open(record)
    house.up = {house.nodes[2]}
    with pytest.raises(Unavailable, match="out of reach"):
        await house[2].open(record)
    with pytest.raises(NotFound):
        await house[2].find("file-1")


async def test_what_was_deleted_stays_deleted_also_where_a_node_was_away(house: House) -> None:
    record = await put(house[0])
    house.up.discard(house.nodes[2])
    await house[0].remove(record)
    assert house.blobs(0) == house.blobs(1) == []
    house.up.add(house.nodes[2])
    for number in range(2):
        with pytest.raises(Gone):
            await house[number].find("file-1")
        assert await house[number].all("batch") == []
    with pytest.raises(Gone):
        await house[2].find("file-1", everywhere=True)
    house.up = {house.nodes[2]}
    with pytest.raises(Gone):
        await house[2].find("file-1")  # it has been told
    assert (await house[2].all("batch"), house.blobs(2)) == ([], [])


async def test_the_higher_version_stands_whatever_the_order(house: House) -> None:
    record = await put(house[0])
    newer = msgspec.structs.replace(record, version=2, told={"a": 1})
    await house[1].keep(newer)
    await house[0].keep(record)
    for number in range(3):
        assert (await house[number].find("file-1")).told == {"a": 1}


async def test_two_records_may_share_their_bytes(house: House) -> None:
    one = await put(house[0], "file-1")
    await put(house[0], "file-2")
    await house[0].forget(["file-1", "file-3"])
    for number in range(3):
        assert house.blobs(number) == [one.sha256]
    await house[0].forget(["file-2"])
    for number in range(3):
        assert house.blobs(number) == []


async def test_a_day_later_what_expired_is_swept_and_what_a_stop_left(house: House) -> None:
    record = await put(house[0], expires_at=NOW + 200_000)
    await put(house[0], "file-2", b"short-lived", expires_at=NOW + 5)
    (house[0]._blobs / ".left.part").write_bytes(b"x")
    (house[0]._blobs / ("0" * 64)).write_bytes(b"x")
    house.wall += 90_000
    with pytest.raises(NotFound):
        await house[0].find("file-2")
    assert await house[0].all("batch") == [record]
    await house[0].sweep()
    assert house.blobs(0) == [record.sha256]


async def test_limits_are_kept(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shelf, "FILE_BYTES_MAX", 5)
    with pytest.raises(UserError, match="too large"):
        await put(house[0], data=b"123456")
    assert house.blobs(0) == []
    monkeypatch.setattr(shelf, "RECORDS_MAX", 1)
    await put(house[0], data=b"12345")
    with pytest.raises(Unavailable, match="too many"):
        await put(house[0], "file-2", data=b"12345")
    monkeypatch.setattr(shelf, "SHELF_BYTES_MAX", 4)
    with pytest.raises(Unavailable, match="share"):
        await put(house[0], "file-3", data=b"1")
    monkeypatch.setattr(shelf, "SHELF_BYTES_MAX", 400)
    monkeypatch.setattr(shelf, "FREE_BYTES_MIN", 2**60)
    with pytest.raises(Unavailable, match="too full"):
        await put(house[0], "file-3", data=b"1")


@pytest.mark.parametrize(
    ("name", "body"),
    [
        ("shelf-take", b"{"),
        ("shelf-take", b'{"id": "../../etc/passwd", "purpose": "x", "created_at": 1, "expires_at": 1}'),
        ("shelf-take", b'{"id": "x", "purpose": "x", "created_at": 1, "expires_at": 1, "sha256": "../x"}'),
        ("shelf-find", b"[]"),
        ("shelf-forget", b"{}"),
        ("shelf-give", b"../records/file-1.json"),
        ("shelf-give", b"\xff"),
        ("shelf-give", b"0" * 64),
    ],
)
async def test_a_peers_junk_is_refused_and_reaches_no_other_file(house: House, name: str, body: bytes) -> None:
    await put(house[0])
    with pytest.raises(UserError):
        async for _ in house[0].serve_peer(house.nodes[1], name, body):
            pass
