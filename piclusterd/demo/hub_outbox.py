"""The outbox of the hub for machines without workerd: the SQL half, synchronous, on one file.

Owns the rows (`outbox`, `dead`, `seen`, `meta`) and every rule about them; knows no socket. The schema and the
invariants are those at the head of forwarder/worker.js:

    insert ──► outbox ── ack_to ──► seen (7 days, so that a redelivery is known)
                 │ ▲ pause, resume: parked ──► outbox under NEW seqs
                 │ nacked N times, or older than the TTL
                 └────► dead ── replay ──► outbox under a NEW seq        dead ── drop ──► seen

Each method is one transaction, committed with synchronous=FULL before it returns: what the caller then tells anyone
is durable (SIGKILL and power cuts included). Times are milliseconds since the epoch, given by the caller.
"""

import base64
import json
import sqlite3
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any

OUTBOX_MAX = 8000  # rows; the Worker's limit, there the object's 10 GB
FLIGHT_MAX = 8 * 1024 * 1024  # bytes of bodies in flight or in one pull; the Worker's limit, there its 128 MB of memory
WINDOW = 32  # rows in flight, and at most in one pull
SEEN_MS = 7 * 86_400_000  # longer than any sender retries (GitHub by hand: 3 days)
DEAD_PAGE = 100  # rows of one listing
TEXT_MAX = 200  # characters of a stored reason

_COLUMNS = "source TEXT NOT NULL, delivery TEXT NOT NULL, dedupe TEXT NOT NULL UNIQUE, received_ms INTEGER NOT NULL, \
stale INTEGER NOT NULL, headers TEXT NOT NULL, body BLOB NOT NULL, nacks INTEGER NOT NULL DEFAULT 0"
_SCHEMA = f"""
CREATE TABLE IF NOT EXISTS outbox (seq INTEGER PRIMARY KEY AUTOINCREMENT, {_COLUMNS}, retry_ms INTEGER);
CREATE TABLE IF NOT EXISTS dead (seq INTEGER PRIMARY KEY, {_COLUMNS}, dead_ms INTEGER NOT NULL, why TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS parked (seq INTEGER PRIMARY KEY, {_COLUMNS});
CREATE TABLE IF NOT EXISTS hints (seq INTEGER PRIMARY KEY, hint TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS seen (dedupe TEXT PRIMARY KEY, seq INTEGER NOT NULL, forget_ms INTEGER NOT NULL)
  WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS meta (key TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
"""
_HOOK = "source, delivery, dedupe, received_ms, stale, headers, body"
_ROWS = "SELECT outbox.*, hint FROM outbox LEFT JOIN hints USING (seq)"


@dataclass(frozen=True, slots=True)
class Arrival:
    """One verified webhook on its way in. `headers` are the kept ones, lower case."""

    source: str
    delivery: str
    dedupe: str
    received_ms: int
    stale: bool
    headers: dict[str, str]
    body: bytes


@dataclass(frozen=True, slots=True)
class Nacked:
    """What a nack came to: how many this row has had, and whether that was one too many."""

    nacks: int
    dead: bool


class Outbox:
    """The rows, on the file `path`. One process at a time; not thread-safe."""

    def __init__(self, path: Path, *, nack_limit: int) -> None:
        self._db = sqlite3.connect(path, isolation_level=None)
        self._db.row_factory = sqlite3.Row
        self._db.execute("PRAGMA journal_mode = WAL")
        self._db.execute("PRAGMA synchronous = FULL")
        self._db.executescript(_SCHEMA)
        self._nack_limit = nack_limit
        if self.meta("hub") is None:
            self.set_meta("hub", str(uuid.uuid4()))

    def close(self) -> None:
        """Close the file; nothing is lost without it."""
        self._db.close()

    # --- small state

    def meta(self, key: str) -> str | None:
        """One remembered value."""
        row = self._one("SELECT value FROM meta WHERE key = ?", key)
        return None if row is None else str(row["value"])

    def set_meta(self, key: str, value: object) -> None:
        """Remember a value."""
        self._db.execute("INSERT OR REPLACE INTO meta VALUES (?, ?)", (key, str(value)))

    def drop_meta(self, key: str) -> bool:
        """Forget a value; True when there was one."""
        return self._db.execute("DELETE FROM meta WHERE key = ?", (key,)).rowcount > 0

    @property
    def hub_id(self) -> str:
        """Names this very outbox: a recreated one counts from 1 again, and old cursors mean nothing to it."""
        return self.meta("hub") or ""

    @property
    def term(self) -> int:
        """The highest term ever seen."""
        return int(self.meta("term") or 0)

    @property
    def pulled(self) -> int:
        """The highest seq handed out by /pull: no HTTP ack may pass it."""
        return int(self.meta("pulled") or 0)

    # --- in

    def known(self, dedupe: str) -> int | None:
        """The seq under which this event was already stored, if it was."""
        for table in ("outbox", "parked", "dead", "seen"):
            row = self._one(f"SELECT seq FROM {table} WHERE dedupe = ?", dedupe)
            if row is not None:
                return int(row["seq"])
        return None

    def insert(self, hook: Arrival) -> int:
        """Store it; returns its seq. Durable on return."""
        with self._transaction():
            seq = self._insert(hook)
            self.set_meta(f"last:{hook.source}", hook.received_ms)
            if hook.source in self.paused():
                self._park("seq = ?", (seq,))
        return seq

    def _insert(self, hook: Arrival) -> int:
        values = (hook.source, hook.delivery, hook.dedupe, hook.received_ms, int(hook.stale), json.dumps(hook.headers))
        query = f"INSERT INTO outbox ({_HOOK}) VALUES (?, ?, ?, ?, ?, ?, ?)"
        return int(self._db.execute(query, (*values, hook.body)).lastrowid or 0)

    # --- pause

    def paused(self) -> list[str]:
        """Sources whose hooks are kept back."""
        rows = self._db.execute("SELECT key FROM meta WHERE key LIKE 'paused:%' ORDER BY key")
        return [str(row["key"]).removeprefix("paused:") for row in rows]

    def pause(self, source: str, above: int, now_ms: int) -> int:
        """Keep back its hooks, also those above `above`, the highest seq handed out. Returns how many moved."""
        with self._transaction():
            self.set_meta(f"paused:{source}", now_ms)
            return self._park("source = ? AND seq > ?", (source, above))

    def resume(self, source: str) -> int:
        """Its hooks go back into the outbox under new seqs, in order. Returns how many."""
        with self._transaction():
            self.drop_meta(f"paused:{source}")
            query = f"INSERT INTO outbox ({_HOOK}) SELECT {_HOOK} FROM parked WHERE source = ? ORDER BY seq"
            self._db.execute(query, (source,))
            return self._db.execute("DELETE FROM parked WHERE source = ?", (source,)).rowcount

    def _park(self, where: str, arguments: tuple[object, ...]) -> int:
        self._db.execute(f"INSERT INTO parked SELECT seq, {_HOOK}, nacks FROM outbox WHERE {where}", arguments)
        return self._db.execute(f"DELETE FROM outbox WHERE {where}", arguments).rowcount

    # --- hints of the model at the edge

    def unhinted(self, limit: int) -> list[tuple[int, bytes]]:
        """(seq, body) of Linear's rows that no model has looked at, the oldest first."""
        query = f"{_ROWS} WHERE hint IS NULL AND source = 'linear' ORDER BY seq LIMIT ?"
        return [(int(row["seq"]), bytes(row["body"])) for row in self._db.execute(query, (limit,))]

    def hint(self, seq: int, text: str) -> None:
        """Keep what the model said of a row that is still here."""
        query = "INSERT OR REPLACE INTO hints SELECT seq, ? FROM outbox WHERE seq = ?"
        self._db.execute(query, (text[:TEXT_MAX], seq))

    # --- out

    def frames(self, *, above: int, limit: int = WINDOW, room: int = FLIGHT_MAX) -> list[dict[str, Any]]:
        """`hook` messages for rows above a cursor, in seq order. At least one if `room` (bytes) is still whole."""
        found: list[dict[str, Any]] = []
        bytes_left = room
        for row in self._db.execute(f"{_ROWS} WHERE seq > ? ORDER BY seq LIMIT ?", (above, limit)):
            bytes_left -= len(row["body"])
            if bytes_left < 0 and (found or room < FLIGHT_MAX):
                break
            found.append(_frame(row))
        return found

    def in_flight(self, cursor: int) -> tuple[int, int]:
        """Unacked rows up to a cursor, and the bytes of their bodies. A nacked row keeps its place in the window."""
        row = self._db.execute(
            "SELECT COUNT(*), COALESCE(SUM(LENGTH(body)), 0) FROM outbox WHERE seq <= ?", (cursor,)
        ).fetchone()
        return int(row[0]), int(row[1])

    def ack_to(self, seq: int, now_ms: int) -> None:
        """Everything up to `seq` is durable elsewhere: forget the rows, remember the keys."""
        with self._transaction():
            query = "INSERT OR REPLACE INTO seen SELECT dedupe, seq, ? FROM outbox WHERE seq <= ?"
            self._db.execute(query, (now_ms + SEEN_MS, seq))
            self._db.execute("DELETE FROM outbox WHERE seq <= ?", (seq,))
            self._db.execute("DELETE FROM hints WHERE seq <= ?", (seq,))

    def nack(self, seq: int, why: str, now_ms: int) -> Nacked | None:
        """Count one failed delivery; None when the row is gone. At the limit the row is dead."""
        with self._transaction():
            row = self._one("UPDATE outbox SET nacks = nacks + 1 WHERE seq = ? RETURNING nacks", seq)
            if row is None:
                return None
            outcome = Nacked(int(row["nacks"]), int(row["nacks"]) >= self._nack_limit)
            if outcome.dead:
                self._bury(seq, why, now_ms)
        return outcome

    def _bury(self, seq: int, why: str, now_ms: int) -> None:
        query = f"INSERT INTO dead SELECT seq, {_HOOK}, nacks, ?, ? FROM outbox WHERE seq = ?"
        self._db.execute(query, (now_ms, why[:TEXT_MAX], seq))
        self._db.execute("DELETE FROM outbox WHERE seq = ?", (seq,))

    # --- retries

    def waits(self, seq: int) -> bool:
        """True for a row that was nacked and not sent again yet: one sending counts one nack."""
        row = self._one("SELECT 1 FROM outbox WHERE seq = ? AND retry_ms IS NOT NULL", seq)
        return row is not None

    def retry_at(self, seq: int, ms: int) -> None:
        """Send this row again at `ms`."""
        self._db.execute("UPDATE outbox SET retry_ms = ? WHERE seq = ?", (ms, seq))

    def next_retry(self) -> int | None:
        """When the next nacked row is due, ms."""
        found = self._db.execute("SELECT MIN(retry_ms) FROM outbox").fetchone()[0]
        return None if found is None else int(found)

    def take_due(self, now_ms: int) -> list[dict[str, Any]]:
        """`hook` messages for rows whose retry is due; they no longer wait."""
        with self._transaction():
            rows = self._db.execute(f"{_ROWS} WHERE retry_ms <= ? ORDER BY seq", (now_ms,)).fetchall()
            self._db.execute("UPDATE outbox SET retry_ms = NULL WHERE retry_ms <= ?", (now_ms,))
        return [_frame(row) for row in rows]

    def clear_retries(self) -> None:
        """On hello every row goes out in order, so none may wait."""
        self._db.execute("UPDATE outbox SET retry_ms = NULL WHERE retry_ms IS NOT NULL")

    # --- dead letters and age

    def list_dead(self, after: int) -> list[dict[str, Any]]:
        """Dead letters above a seq, without their bodies, a page at a time."""
        columns = "seq, source, delivery, received_ms, dead_ms, nacks, why, LENGTH(body) AS bytes"
        query = f"SELECT {columns} FROM dead WHERE seq > ? ORDER BY seq LIMIT ?"
        return [dict(row) for row in self._db.execute(query, (after, DEAD_PAGE))]

    def replay(self, seq: int, now_ms: int) -> int | None:
        """Back into the outbox under a new seq, its days to live starting again; None when there is no such row."""
        with self._transaction():
            row = self._one(f"DELETE FROM dead WHERE seq = ? RETURNING {_HOOK}", seq)
            if row is None:
                return None
            headers = json.loads(row["headers"])
            stale = bool(row["stale"])
            again = Arrival(row["source"], row["delivery"], row["dedupe"], now_ms, stale, headers, row["body"])
            return self._insert(again)

    def drop_dead(self, seq: int, now_ms: int) -> bool:
        """Delete one dead letter, keeping its key."""
        return self._forget("seq = ?", seq, now_ms) > 0

    def _forget(self, where: str, argument: int, now_ms: int) -> int:
        with self._transaction():
            query = f"INSERT OR REPLACE INTO seen SELECT dedupe, seq, ? FROM dead WHERE {where}"
            self._db.execute(query, (now_ms + SEEN_MS, argument))
            return self._db.execute(f"DELETE FROM dead WHERE {where}", (argument,)).rowcount

    def sweep(self, now_ms: int, ttl_ms: int) -> list[int]:
        """Outbox rows past the TTL die, dead ones past it go, old keys are forgotten. Returns the newly dead."""
        query = "SELECT seq FROM outbox WHERE received_ms < ? ORDER BY seq"
        old = [int(row["seq"]) for row in self._db.execute(query, (now_ms - ttl_ms,))]
        with self._transaction():
            for seq in old:
                self._bury(seq, "expired: nobody fetched it within HUB_TTL_DAYS", now_ms)
            late = "expired: its source was paused for HUB_TTL_DAYS"
            parked = f"INSERT INTO dead SELECT seq, {_HOOK}, nacks, ?, ? FROM parked WHERE received_ms < ?"
            self._db.execute(parked, (now_ms, late, now_ms - ttl_ms))
            self._db.execute("DELETE FROM parked WHERE received_ms < ?", (now_ms - ttl_ms,))
        self._forget("dead_ms < ?", now_ms - ttl_ms, now_ms)
        self._db.execute("DELETE FROM seen WHERE forget_ms <= ?", (now_ms,))
        return old

    # --- counts

    def depth(self) -> int:
        """Rows waiting for an ack."""
        return int(self._db.execute("SELECT COUNT(*) FROM outbox").fetchone()[0])

    def parked_count(self) -> int:
        """Rows of paused sources."""
        return int(self._db.execute("SELECT COUNT(*) FROM parked").fetchone()[0])

    @property
    def rows_written(self) -> int:
        """Since this process opened the file."""
        return self._db.total_changes

    def dead_count(self) -> int:
        """Dead letters."""
        return int(self._db.execute("SELECT COUNT(*) FROM dead").fetchone()[0])

    def oldest_ms(self) -> int | None:
        """When the oldest unacked row arrived."""
        row = self._db.execute("SELECT received_ms FROM outbox ORDER BY seq LIMIT 1").fetchone()
        return None if row is None else int(row[0])

    def last(self) -> dict[str, int]:
        """source -> ms of its latest hook."""
        rows = self._db.execute("SELECT key, value FROM meta WHERE key LIKE 'last:%' ORDER BY key")
        return {str(row["key"]).removeprefix("last:"): int(row["value"]) for row in rows}

    # --- sqlite

    def _one(self, query: str, argument: object) -> sqlite3.Row | None:
        # fetchall, not fetchone: a RETURNING statement that is not read to its end is not finished, and blocks COMMIT
        rows: list[sqlite3.Row] = self._db.execute(query, (argument,)).fetchall()
        return rows[0] if rows else None

    def _transaction(self) -> "_Transaction":
        return _Transaction(self._db)


class _Transaction:
    """BEGIN IMMEDIATE ... COMMIT, or ROLLBACK on any exception."""

    def __init__(self, db: sqlite3.Connection) -> None:
        self._db = db

    def __enter__(self) -> None:
        self._db.execute("BEGIN IMMEDIATE")

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        self._db.execute("COMMIT" if kind is None else "ROLLBACK")


def _frame(row: sqlite3.Row) -> dict[str, Any]:
    body = base64.b64encode(row["body"]).decode()
    plain = {name: row[name] for name in ("seq", "source", "delivery", "received_ms")}
    hook = {"type": "hook", **plain, "stale": bool(row["stale"]), "headers": json.loads(row["headers"]), "body": body}
    return hook | ({"hint": row["hint"]} if row["hint"] else {})
