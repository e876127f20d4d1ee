"""One log's share of an `apply`: follow the chain from the stored tip and say what may be kept, and what it proves.

    entry hangs on the tip ───────────────▶ sound, once a signature covers it
    differs from what is held ──┬ ours does not verify ─▶ ours is rotten: quarantined (`scrub`)
                                ├ signed by the origin ─▶ a fork: the branch is kept beside (`branches`)
                                └ else ─────────────────▶ forged
    a checkpoint beyond a gap ── `resets` ▶ the log begins there: what was before it is replaced

It reads rows and decides, inside `store.apply`'s transaction, which writes what was decided.
"""

from __future__ import annotations

import sqlite3

from ..events import Fact
from ..ids import LogId
from ..wire import Dropped, Entry, Span
from . import branches, rows, scrub
from .entry import CHECKPOINT, EMPTY, Header, Tip, Verify, entry_hash, extend, is_signed
from .rows import Log, Run


class Taking:
    """`signed`: the new tip; `sound`, `facts`: what is to be stored and told; `branch`: what belongs to a fork."""

    def __init__(
        self, conn: sqlite3.Connection, log: LogId, row: Log | None, verify: Verify, resets: bool, blemished: bool
    ) -> None:
        self._conn, self._log, self._row, self._verify, self._resets = conn, log, row, verify, resets
        self.signed = EMPTY if row is None else rows.tip(conn, row)
        self.sound: Run = []
        self.facts: list[Fact] = []
        self.branch: Run = []
        self.forked_at = 0
        """The first seq that exists twice, or the first beyond our end that hangs on another branch."""
        self.begins: int | None = None
        """The seq of a checkpoint that replaces everything before it."""
        self._tip = self.signed
        self._unsigned: list[tuple[Header, Entry, Fact]] = []
        self._seen: dict[int, bytes] = {}
        self._damaged = rows.damaged_seqs(conn, row) if row and blemished else frozenset[int]()
        self.frozen = row is not None and blemished and branches.is_frozen(conn, row)

    def take(self, run: Run) -> Dropped | None:
        """Follow `run`; the reason it stopped early, if it did."""
        for index, (header, entry) in enumerate(run):
            if header.seq <= self._tip.seq and self._is_held(header, entry):
                continue
            if self.frozen:
                self.branch = run[index:]
                return None
            if self._differs(header):
                return self._diverged(run[index:])
            if self._tip.seq in self._damaged:
                return Dropped(f"damaged: {self._place(self._tip.seq)} must be mended before more can follow it")
            link = extend(self._base(header), header, entry, self._verify)
            if isinstance(link, Dropped):
                return link
            if header.seq > self._tip.seq + 1:
                self._unsigned, self.begins = [], header.seq
            self._seen[header.seq] = entry.header
            self._unsigned.append((header, entry, link.fact))
            self._tip = link.tip
            if entry.signature:
                self._settle()
        return None

    def _base(self, header: Header) -> Tip:
        """What `header` must follow: the tip; for a checkpoint we are sent in place of what we lack, its own word."""
        beyond = header.kind == CHECKPOINT and header.seq > self._tip.seq + 1
        return Tip(self._tip.key, header.seq - 1, header.prev) if beyond and self._resets else self._tip

    def _settle(self) -> None:
        self.signed = self._tip
        self.sound += [(header, entry) for header, entry, _ in self._unsigned]
        self.facts += [fact for _, _, fact in self._unsigned]
        self._unsigned.clear()

    def _is_held(self, header: Header, entry: Entry) -> bool:
        """Nothing to do: held as it is, in quarantine (`scrub.repair` had its look), or replaced by a checkpoint."""
        held = self._seen.get(header.seq)
        if held is None and self._row is not None:
            held = rows.header_at(self._conn, self._row, header.seq)
        return held == entry.header or header.seq in self._damaged or (held is None and self._row is not None)

    def _differs(self, header: Header) -> bool:
        follows = header.seq == self._tip.seq + 1 and self._tip.seq not in self._damaged
        return header.seq <= self._tip.seq or (follows and header.prev != self._tip.hash)

    def _diverged(self, branch: Run) -> Dropped:
        """`branch` is not the one followed. A fork is proven where the origin signed both; anyone can forge."""
        header = branch[0][0]
        place = self._place(header.seq)
        beyond = header.seq == self.signed.seq + 1 and header.prev != self.signed.hash
        if not (header.seq <= self.signed.seq or beyond) or not self._is_signed(branch):
            return Dropped(f"forged: {place} exists twice, and nothing proves that its origin wrote both")
        ours = min(header.seq, self._stored())
        if self._row and ours and scrub.inspect(self._conn, self._log, self._row, ours, self._verify):
            return Dropped(f"damaged: our copy of {self._place(ours)} is rotten and is fetched again")
        self.branch, self.forked_at = branch, header.seq
        return Dropped(f"fork: {place} exists twice, both signed by its origin; both are kept, the log is closed")

    def _stored(self) -> int:
        return rows.tip(self._conn, self._row).seq if self._row else 0

    def _is_signed(self, branch: Run) -> bool:
        """Does a signature of the origin's cover the first entry of `branch`?"""
        hashed = branch[0][0].prev
        for header, entry in branch:
            if header.prev == hashed:
                hashed = entry_hash(entry.header)
                if entry.signature and is_signed(self.signed.key, hashed, entry.signature, self._verify):
                    return True
        return False

    def ours(self) -> tuple[Span, ...]:
        """Our copy of what the fork contradicts, in spans of a batch each, for whoever sent the other branch."""
        end = self._stored()
        first = max(self.forked_at - branches.LOOK_BACK, 1) if self.forked_at > end else self.forked_at
        step = branches.LOOK_BACK
        return tuple(Span(*self._log, at, min(at + step - 1, end)) for at in range(first, end + 1, step))

    def _place(self, seq: int) -> str:
        return f"{self._log.origin}/{self._log.epoch} seq {seq}"
