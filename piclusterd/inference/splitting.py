"""Which boards hold which layers of a model that is too big for one, and what that will be worth. Pure.

    layer 0 … n on the head ─▶ n … m on the fastest other ─▶ … ─▶ back to the head: output, sampling
    token = each board's bytes / what it reads a second + each way there and back

Layers run one after the other: splitting makes a model possible, never faster. So one board that suffices is better,
and as few as possible are best. The head keeps the embeddings, the output and as many layers as fit it: there is no way
between them. The figures are a prediction, of the memory's bandwidth and the link's round trip as they were measured.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .budget import MIB, Need

READ_PART = 0.6
"""Of the memory's bandwidth that decoding makes use of: the rest is arithmetic, attention, and threads that wait."""
BANDWIDTH = 4e9
"""Bytes read a second where that was not measured yet: a Pi 4's."""
TRIPS = 2
"""Round trips a token and board: its inputs go out, the graph is run, its outputs come back; some are asked for."""
HOP_S = 0.002
"""What a round trip takes beside the network's own: four processes, TLS twice, frames in Python."""
LINK_BYTES_S = 30e6
"""Through a link, TLS and frames: what a Pi 4 does in Python."""
DISK_BYTES_S = 80e6
"""An A2 card."""
START_S = 2.0
FLOAT_BYTES = 4
FIX = "Take a smaller model or quantisation, or less [store] `context`."


@dataclass(frozen=True, slots=True)
class Layers:
    """Bytes of each layer's weights, and of all that is in none (embeddings, output)."""

    each: tuple[int, ...]
    rest: int


@dataclass(frozen=True, slots=True)
class Board:
    """`free`: bytes that a model may take there; `bandwidth`: bytes of memory read a second, 0 where not measured;
    `rtt_s`: of the link from the head to it."""

    node: str
    name: str
    free: int
    bandwidth: float = 0.0
    rtt_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Share:
    """`bytes` it takes of that board's memory, `layers_bytes` of them the layers' weights and KV memory."""

    node: str
    name: str
    layers: int
    bytes: int
    layers_bytes: int
    seconds: float
    """Of a token, the way there included."""


@dataclass(frozen=True, slots=True)
class Plan:
    """Predicted. The head's share comes first; `guessed`: boards whose bandwidth is not known."""

    shares: tuple[Share, ...]
    tokens_s: float
    load_s: float
    guessed: tuple[str, ...] = ()

    @property
    def apart(self) -> int:
        """Bytes of weights and KV memory that are not the head's."""
        return sum(share.layers_bytes for share in self.shares[1:])


@dataclass(frozen=True, slots=True)
class Refusal:
    what: str
    why: str
    fix: str


def plan(name: str, layers: Layers, width: int, asked: Need, head: Board, others: Sequence[Board]) -> Plan | Refusal:
    """`asked`: what the whole model would need of one board; `width`: numbers in a token's activations."""
    if asked.total <= head.free:
        why = f"It needs {_mib(asked.total)}, and {head.name} has {_mib(head.free)}. Split, it would be slower."
        return Refusal(f"{name} fits one board", why, f"Run `picluster load {name}`.")
    for one in others:
        if asked.total <= one.free:
            why = f"It needs {_mib(asked.total)}, and {one.name} has {_mib(one.free)}. Split, it would be slower."
            return Refusal(f"{name} fits one board", why, f"Run `picluster load {name} --node {one.name}`.")
    if not others:
        why = f"It needs {_mib(asked.total)}, and {head.name} has {_mib(head.free)}; no other board offers any."
        return Refusal(f"{name} fits no board", why, "Set [inference] split = true on other nodes. " + FIX)
    return _divided(
        name, layers, width, asked, head, sorted(others, key=lambda one: (-_reads(one), one.rtt_s, one.node))
    )


def _divided(
    name: str, layers: Layers, width: int, asked: Need, head: Board, others: Sequence[Board]
) -> Plan | Refusal:
    kv = -(-asked.kv // max(1, len(layers.each)))
    rest = asked.weights - sum(layers.each)
    own = rest + asked.compute + asked.swap
    taken, at = [_share(layers, 0, kv, own, head, rest / _reads(head))], 0
    for one in others:
        at += taken[-1].layers
        if at == len(layers.each):
            break
        taken.append(_share(layers, at, kv, asked.compute, one, _hop_s(one, width)))
    missing = len(layers.each) - sum(share.layers for share in taken)
    if missing or own > head.free:
        return _too_big(name, layers, asked, own, missing, head, others)
    shares = tuple(share for share in taken if share.layers or share.node == head.node)
    apart = sum(share.layers_bytes for share in shares[1:])
    known = {one.node: one.bandwidth for one in (head, *others)}
    return Plan(
        shares,
        round(1 / sum(share.seconds for share in shares), 2),
        round(START_S + asked.weights / DISK_BYTES_S + apart / LINK_BYTES_S, 1),
        tuple(share.name for share in shares if not known[share.node]),
    )


def _share(layers: Layers, at: int, kv: int, beside: int, board: Board, beside_s: float) -> Share:
    """As many layers from `at` on as fit `board` beside the bytes and the time that it takes anyway."""
    count, weights, free = 0, 0, board.free - beside
    for size in layers.each[at:]:
        if weights + size + (count + 1) * kv > free:
            break
        weights, count = weights + size, count + 1
    taken = weights + count * kv
    return Share(board.node, board.name, count, taken + beside, taken, weights / _reads(board) + beside_s)


def _too_big(
    name: str, layers: Layers, asked: Need, own: int, missing: int, head: Board, others: Sequence[Board]
) -> Refusal:
    has = ", ".join(f"{one.name} {_mib(one.free)}" for one in (head, *others))
    if own > head.free:
        why = f"Whoever asks holds embeddings, output and buffers, {_mib(own)}; {head.name} has {_mib(head.free)} free."
        return Refusal(f"{name} cannot be split from here", why, "Load it from another node (--node). " + FIX)
    beside = _mib(asked.compute)
    why = (
        f"It needs {_mib(asked.total)} and {beside} of buffers on each further board; free are: {has}."
        f" {missing} of its {len(layers.each)} layers find no place."
    )
    return Refusal(f"{name} does not fit all boards together", why, FIX)


def _reads(board: Board) -> float:
    return READ_PART * (board.bandwidth or BANDWIDTH)


def _hop_s(board: Board, width: int) -> float:
    return TRIPS * (board.rtt_s + HOP_S) + 2 * FLOAT_BYTES * width / LINK_BYTES_S


def _mib(count: int) -> str:
    return f"{count / MIB:,.0f} MiB"
