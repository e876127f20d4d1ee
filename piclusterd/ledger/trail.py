"""Everything in the ledger that speaks of one thing, without reading the rest: for people who ask how it came to be.

A payload is msgpack, where a text stands as its plain bytes; SQLite looks for those, and what it finds is decoded and
told to the caller, who knows whether it really is about the thing. Blocking: for a thread, with a reader of its own.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

from ..events import Fact
from ..wire import Dropped, Entry
from .checkpoint import kept_facts
from .database import broken, open_reader
from .entry import CHECKPOINT, decode_fact

ROWS_MAX = 10_000
"""No run has so many steps; a word that is everywhere must not load the ledger into memory."""


def speaking_of(path: Path, words: tuple[str, ...]) -> list[Fact]:
    """Facts whose entry holds one of `words`, oldest first, each once. Raises Broken."""
    try:
        with closing(open_reader(path)) as conn:
            found = {(fact.log, fact.seq): fact for word in words for fact in _holding(conn, word)}
    except sqlite3.Error as fault:
        raise broken(fault, path) from fault
    return sorted(found.values(), key=lambda fact: (fact.hlc, fact.order))


def of_kinds(path: Path, kinds: tuple[str, ...]) -> list[Fact]:
    """Facts of these kinds, oldest first, each once, those that a checkpoint carries on among them. Raises Broken."""
    try:
        with closing(open_reader(path)) as conn:
            told = {(fact.log, fact.seq): fact for kind in (*kinds, CHECKPOINT) for fact in _named(conn, kind)}
    except sqlite3.Error as fault:
        raise broken(fault, path) from fault
    return sorted((f for f in told.values() if f.kind in kinds), key=lambda fact: (fact.hlc, fact.order))


def _named(conn: sqlite3.Connection, kind: str) -> Iterator[Fact]:
    sql = "SELECT header, payload, signature FROM entries WHERE instr(header, ?)"
    for row in conn.execute(sql, (kind.encode(),)):
        fact = decode_fact(Entry(*row))
        if not isinstance(fact, Dropped):
            yield fact
            yield from kept_facts(fact)


def _holding(conn: sqlite3.Connection, word: str) -> Iterator[Fact]:
    sql = "SELECT header, payload, signature FROM entries WHERE instr(payload, ?) LIMIT ?"
    for row in conn.execute(sql, (word.encode(), ROWS_MAX)):
        fact = decode_fact(Entry(*row))
        if not isinstance(fact, Dropped):
            yield fact
            yield from kept_facts(fact)
