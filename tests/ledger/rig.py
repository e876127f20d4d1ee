"""Ledgers in memory for the tests of `branches`, `scrub`, `prune`: what two disks and a pretend wire need."""

from __future__ import annotations

import sqlite3

from piclusterd.events import Record
from piclusterd.ids import LogId
from piclusterd.ledger import rows, store
from piclusterd.wire import Entry, Span

from .keys import Key, verify

KEY = Key()
LOG = KEY.log()


def fresh(key: Key | None = None, epoch: int = 1) -> sqlite3.Connection:
    """An empty ledger in memory, with `key`'s log opened."""
    conn = store.open_database(":memory:")
    if key:
        store.open_log(conn, key, "pi", epoch, 1000)
    return conn


def add(conn: sqlite3.Connection, *texts: object, key: Key = KEY, epoch: int = 1) -> tuple[Entry, ...]:
    """One commit group of notes."""
    return store.append(conn, key.log(epoch), [Record("note", {"text": text}) for text in texts], key, 1000)[0]


def image(conn: sqlite3.Connection) -> sqlite3.Connection:
    """A copy of the disk as it is now."""
    copy = store.open_database(":memory:")
    conn.backup(copy)
    return copy


def everything(conn: sqlite3.Connection) -> tuple[Entry, ...]:
    return store.read(conn, [Span(*head.log, 1, head.seq) for head in store.heads(conn)], 2**30, 2**30)


def give(giver: sqlite3.Connection, taker: sqlite3.Connection, *spans: Span, resets: bool = True) -> store.Applied:
    """What `giver` reads of `spans` (all it has, without any), applied by `taker`."""
    wanted = spans or [Span(*head.log, 1, head.seq) for head in store.heads(giver)]
    return store.apply(taker, store.read(giver, wanted, 2**30, 2**30), verify, resets)


def texts(conn: sqlite3.Connection) -> list[object]:
    return sorted(fact.body["text"] for fact in store.facts(conn) if fact.kind == "note")


def reasons(applied: store.Applied) -> list[str]:
    return [dropped.reason.split(":")[0] for dropped in applied.dropped]


def spoil(conn: sqlite3.Connection, seq: int, column: str, log: LogId = LOG) -> None:
    """Flip one bit in the middle of a column of an entry, under SQLite's feet."""
    place = rows.logs(conn)[log].first + seq
    data = bytearray(conn.execute(f"SELECT {column} FROM entries WHERE id = ?", (place,)).fetchone()[0])
    data[len(data) // 2] ^= 0x10
    conn.execute(f"UPDATE entries SET {column} = ? WHERE id = ?", (bytes(data), place))
