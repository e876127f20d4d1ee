"""Whether a model fits this board's memory, and which quantisation of it would. Pure.

    need = weights + KV memory + compute buffers + swapped answers        room = available - others' weights - headroom

Pages of a mapped model count as "available" to the kernel, so those of the other models are subtracted: a model whose
pages are thrown out and read again from a card answers with one token in seconds, which is worse than a refusal.
Sizes of buffers are estimates of llama.cpp's, on the high side.
"""

from __future__ import annotations

from dataclasses import dataclass

MIB = 1024 * 1024
HEADROOM_MIN, HEADROOM_PART = 256 * MIB, 0.1
"""Left for the daemon, the ledger and everything else: so much, or this part of all memory."""
FORKS = 16
"""Options of `choices` in one batch: each is a sequence, and llama.cpp keeps a row of logits for each."""
ROWS = 512
"""Tokens that go through the network together."""
MASK_BYTES = 6
"""Of each of them and each token of the context: who may look at whom, in two precisions."""
COMPUTE_MIN = 48 * MIB
ACTIVATIONS = 24
"""Rows of the embedding's width that a token of the batch takes in compute buffers at once, 4 bytes each."""
SWAP_MAX = 256 * MIB
QUANTS = (
    ("F32", 0, 32.0), ("F16", 1, 16.0), ("Q8_0", 7, 8.5), ("Q6_K", 18, 6.56), ("Q5_K_M", 17, 5.69),
    ("Q4_K_M", 15, 4.85), ("Q4_0", 2, 4.55), ("Q3_K_M", 12, 3.91), ("Q2_K", 10, 3.0),
)  # fmt: skip
"""Name, `general.file_type`, bits a weight (llama.cpp's `quantize` README). Largest first."""


@dataclass(frozen=True, slots=True)
class Shape:
    """What of a model decides about memory. Zero where the file does not say."""

    layers: int = 0
    width: int = 0
    """Numbers in an embedding."""
    kv_width: int = 0
    """Numbers kept a token and layer, keys and values together."""
    vocabulary: int = 0
    file_type: int = -1


@dataclass(frozen=True, slots=True)
class Need:
    """Bytes."""

    weights: int
    kv: int
    compute: int
    swap: int

    @property
    def total(self) -> int:
        return self.weights + self.kv + self.compute + self.swap

    def without(self, apart: int) -> Need:
        """Where so many bytes of weights and KV memory are on other boards."""
        weights = min(self.weights, apart)
        return Need(self.weights - weights, max(0, self.kv - (apart - weights)), self.compute, self.swap)


@dataclass(frozen=True, slots=True)
class Room:
    """Bytes: what the board has, what the kernel calls available, and weights of other models among that."""

    total: int
    available: int
    others: int = 0

    @property
    def free(self) -> int:
        return max(0, self.available - self.others - max(HEADROOM_MIN, int(self.total * HEADROOM_PART)))


def sequences(slots: int) -> int:
    """Sequences of a model with `slots`: as many beginnings are remembered as answers are under way."""
    return 2 * slots + FORKS


def need(shape: Shape, weights: int, context: int, rows: int) -> Need:
    """Of a model whose file has `weights` bytes, with `context` tokens and `rows` sequences (each keeps logits)."""
    kv = 2 * context * shape.layers * shape.kv_width
    attention = MASK_BYTES * ROWS * context
    compute = max(COMPUTE_MIN, 4 * ROWS * ACTIVATIONS * shape.width) + attention + 4 * rows * shape.vocabulary
    return Need(weights, kv, compute, min(SWAP_MAX, kv))


def refusal(shape: Shape, asked: Need, room: Room) -> tuple[str, str]:
    """Why the model does not fit, with the numbers, and what would; empty where it does."""
    if asked.total <= room.free:
        return "", ""
    why = (
        f"It needs {_mib(asked.total)} (weights {_mib(asked.weights)}, KV {_mib(asked.kv)}, buffers"
        f" {_mib(asked.compute)}, swapped answers {_mib(asked.swap)}); {_mib(room.free)} are free for it"
        f" ({_mib(room.available)} available, {_mib(room.others)} of them other models', the rest headroom)."
    )
    smaller = smaller_quant(shape, asked, room)
    if smaller:
        return why, f"Its {smaller} would fit."
    if asked.total - asked.kv // 2 - asked.swap // 2 <= room.free:
        return why, "It would fit with half the `context`."
    return why, "Take a smaller model, or less `context`."


def smaller_quant(shape: Shape, asked: Need, room: Room) -> str:
    """The largest quantisation below the file's own that would fit; empty where none would, or the own is not known."""
    own = next((bits for _, number, bits in QUANTS if number == shape.file_type), 0.0)
    rest = asked.total - asked.weights
    return next(
        (name for name, _, bits in QUANTS if bits < own and asked.weights * bits / own + rest <= room.free),
        "",
    )  # fmt: skip


def _mib(count: int) -> str:
    return f"{count / MIB:,.0f} MiB"
