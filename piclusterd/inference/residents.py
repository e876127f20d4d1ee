"""What the KV memory holds: a sequence number ("seat") for each answer, and for prompts read before.

    prompt ──seat with the longest common beginning──▶ shared (copies nothing) ──▶ a free seat ──▶ the rest is read
    seat left ──▶ idle, its tokens stay ──▶ shared with a later prompt, or emptied: when memory runs out, or when short
    seat of an answer that must wait ──swap_out──▶ its state in RAM ──swap_in──▶ any seat, and on it goes
    beginning that another node asks for ──lend──▶ its state in RAM        another node's state ──adopt──▶ idle

Invariant: `Seat.tokens` is exactly what the memory holds of that sequence. Sequences that begin alike share the cells
of their beginning (unified memory), so together they form a prefix tree, which is kept as what it is: at most some
hundred lists, compared by slices. One thread owns it. Runs only in the child.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from .llama import Context, Weights

SWAP_BYTES_MAX = 256 * 1024 * 1024
"""States kept in RAM together. An answer whose state does not fit is read again when its turn comes."""

IDLE_WEIGHTS = 2500
"""Weights for each idle cell and head: attention passes over every cell in use, and so idle ones cost a step at most
about a hundredth of itself. A busy model would carry those of all its last answers along."""
REREAD_WEIGHTS = 128_000_000_000
"""Weights times tokens that are quickly read again (0.4 s on two x86 cores): longer idle ends stay, whatever they cost
a step."""


SHORT_PART = 0.25
"""Of a beginning: where a resident goes on by less, that is forgotten rather than all of another one."""


@dataclass(slots=True)
class Seat:
    number: int
    tokens: list[int] = field(default_factory=list)
    taken: bool = False
    used: int = 0
    """When it was last used; a count, not a time."""


class Residents:
    """`seats` sequences of `context`, whose numbers start at 0."""

    def __init__(self, context: Context, seats: int, weights: Weights) -> None:
        self._context = context
        self._reusable = weights.prefix_reusable
        self._short = REREAD_WEIGHTS // weights.parameters
        self._idle_max = weights.parameters // (IDLE_WEIGHTS * weights.heads)
        self._seats = [Seat(number) for number in range(seats)]
        self._clock = 0
        self._swapped = 0
        """Bytes of states in RAM."""

    def place(self, tokens: list[int]) -> Seat:
        """A seat that holds as much of the beginning of `tokens` as any does, but never their last.

        There must be a seat that is not taken.
        """
        best = max(self._seats, key=lambda seat: (common(seat.tokens, tokens), not seat.taken, seat.used))
        keep = min(common(best.tokens, tokens), len(tokens) - 1) if self._reusable else 0
        tail = len(best.tokens) - keep
        short = tail <= keep * SHORT_PART and all(seat.tokens for seat in self._seats)
        whole = not best.taken and (tail <= 1 or short)
        seat = best if whole and best.tokens else self._free(best)
        if seat is best or not keep:
            self.cut(seat, keep)
        else:
            self.empty(seat)
            self._context.share(best.number, seat.number, keep)
            seat.tokens = best.tokens[:keep]
        seat.taken = True
        self.touch(seat)
        return seat

    def _free(self, best: Seat) -> Seat:
        """An empty seat, else the one unused for longest; `best` only where there is no other."""
        free = [seat for seat in self._seats if not seat.taken]
        return min(free, key=lambda seat: (bool(seat.tokens), seat is best, seat.used))

    def held(self, tokens: list[int], taken_only: bool = False) -> int:
        """How many of the first of `tokens` are in the memory."""
        if not self._reusable:
            return 0
        seats = [seat for seat in self._seats if seat.taken or not taken_only]
        return max((common(seat.tokens, tokens) for seat in seats), default=0)

    def fits(self, wanted: int) -> bool:
        """Whether the memory has `wanted` cells left."""
        size = self._context.size
        if sum(len(seat.tokens) for seat in self._seats) + wanted <= size:
            return True
        return distinct(seat.tokens for seat in self._seats) + wanted <= size

    @property
    def cells(self) -> int:
        """Cells of memory that taken seats hold, each counted once."""
        return distinct(seat.tokens for seat in self._seats if seat.taken)

    def touch(self, seat: Seat) -> None:
        self._clock += 1
        seat.used = self._clock

    def cut(self, seat: Seat, length: int) -> None:
        """Keep the first `length` tokens of `seat`; fewer (none) where its kind cannot be cut."""
        if length == len(seat.tokens):
            return
        if not self._context.keep(seat.number, length):
            self._context.keep(seat.number, 0)
            length = 0
        del seat.tokens[length:]

    def empty(self, seat: Seat) -> None:
        if seat.tokens:
            self._context.keep(seat.number, 0)
        seat.tokens = []

    def drop_idle(self) -> bool:
        """Empty the seat that has been idle for longest; False where none is."""
        idle = [seat for seat in self._seats if not seat.taken and seat.tokens]
        if idle:
            self.empty(min(idle, key=lambda seat: seat.used))
        return bool(idle)

    def trim(self) -> None:
        """Empty idle seats that hold little beyond what others do, the longest unused first, but for the latest."""
        idle = sorted((seat for seat in self._seats if seat.tokens and not seat.taken), key=lambda seat: -seat.used)
        kept, cells = [seat.tokens for seat in self._seats if seat.taken], 0
        for seat in idle:
            own = len(seat.tokens) - max((common(seat.tokens, other) for other in kept), default=0)
            if seat is not idle[0] and own <= self._short:
                if cells + own > self._idle_max:
                    self.empty(seat)
                    continue
                cells += own
            kept.append(seat.tokens)

    def swap_out(self, seat: Seat) -> bytes:
        """Empty `seat` and give it up. Its state, for `swap_in`; empty where it is to be read again."""
        state = self._context.save(seat.number, SWAP_BYTES_MAX - self._swapped)
        self._swapped += len(state)
        self.empty(seat)
        seat.taken = False
        return state

    def swap_in(self, state: bytes, tokens: list[int]) -> Seat | None:
        """A seat with what `swap_out` took from one that held `tokens`; None where the memory has no room."""
        self.free(len(state))
        seat = self._restored(state, tokens)
        if seat is not None:
            seat.taken = True
        return seat

    def _restored(self, state: bytes, tokens: list[int]) -> Seat | None:
        seat = self._free(self._seats[0])
        self.empty(seat)
        while not self.fits(len(tokens)) and self.drop_idle():
            pass
        if not self._context.restore(seat.number, state):
            return None
        seat.tokens = list(tokens)
        self.touch(seat)
        return seat

    def lend(self, tokens: list[int], least: int, fork: int, bytes_max: int) -> tuple[int, bytes]:
        """How many of the first of `tokens` are in the memory, and their state, which stays in RAM until it is freed:
        empty where they are fewer than `least`, or have over `bytes_max`. `fork`: a sequence that is empty."""
        best = max(self._seats, key=lambda seat: common(seat.tokens, tokens))
        count = common(best.tokens, tokens) if self._reusable else 0
        if count < max(1, least):
            return count, b""
        self._context.share(best.number, fork, count)
        state = self._context.save(fork, min(bytes_max, SWAP_BYTES_MAX - self._swapped))
        self._context.keep(fork, 0)
        self._swapped += len(state)
        self.touch(best)
        return count, state

    def adopt(self, tokens: list[int], state: bytes) -> bool:
        """Keep `state` as what `tokens` are, for the next prompt that begins so; False where there is no room for it
        beside the answers under way, or it is not one of this memory's."""
        if not self._reusable or self.cells + len(tokens) > self._context.size:
            return False
        return self._restored(state, tokens) is not None

    def reserve(self, size: int) -> bool:
        """So many bytes of RAM for a state; False where they are not to be had."""
        if self._swapped + size > SWAP_BYTES_MAX:
            return False
        self._swapped += size
        return True

    def free(self, size: int) -> None:
        """A state of so many bytes is not needed any more."""
        self._swapped -= size

    def clear(self) -> None:
        """The memory is in an unknown state: nothing is in it from now on."""
        self._context.clear()
        for seat in self._seats:
            seat.tokens, seat.taken = [], False


def common(left: Sequence[int], right: Sequence[int]) -> int:
    """Length of the common beginning, by bisection over slices (which compare at the speed of C)."""
    low, high = 0, min(len(left), len(right))
    if high == 0 or left[0] != right[0]:
        return 0
    while low < high:
        middle = (low + high + 1) // 2
        if left[low:middle] == right[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low


def distinct(lists: Iterable[list[int]]) -> int:
    """Nodes of the prefix tree of `lists`: tokens, with common beginnings counted once."""
    total, before = 0, list[int]()
    for tokens in sorted(lists):
        total += len(tokens) - common(before, tokens)
        before = tokens
    return total
