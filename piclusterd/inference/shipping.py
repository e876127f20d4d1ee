"""Whether the beginning of a prompt is fetched from a node that has read it, or read here: the cheaper one. Pure.

    marks of the prompt ─▶ held here? held by whom (gossip)? ─▶ seconds to fetch < seconds to read? ─▶ Plan | None

    fetch   the peer's step, the state's bytes over the link, both hashes         (the whole beginning travels)
    read    the tokens that are not here, at the speed this board has measured    (what is here already is free)

A small model on a fast board reads faster than a link carries; a large one on a Pi reads 15 tokens a second and moves
a thousand. Gossip only guesses what is held, so a plan is made twice: with its figures, and with what the peer offers.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from ..ids import NodeId
from ..wire import Facts, Mark
from .prefix import held
from .routing import PREFILL_TPS, penalty

LINK_BYTES_S = 10e6
"""Of a link that has carried none yet: twice a Pi's Wi-Fi, a tenth of its port. The first fetch measures it."""
HASH_BYTES_S = 200e6
"""SHA-256 on a Pi 4, which has no instruction for it; done at both ends."""
ASKING_S = 0.02
"""Questions to both children and across the LAN, where nobody is busy."""
STEP_S = 0.5
"""A busy child looks up between two steps (`schedule.READING_S`)."""
MARGIN = 1.5
"""Reading must be so much dearer: the figures are guesses, and a fetch takes another node's time as well."""
SAVED_MIN_S = 0.1
"""Below, nobody notices."""


@dataclass(frozen=True, slots=True)
class Here:
    """This node's side. `tokens`: of the whole prompt; `own`: bytes of its beginning that the child has read."""

    tokens: int
    marks: Sequence[Mark]
    own: int
    busy: int
    prefill_tps: float
    """0: not measured."""
    token_bytes: int
    """What the state of one token takes."""
    bytes_max: int


@dataclass(frozen=True, slots=True)
class Plan:
    """Fetch the first `tokens` of the prompt from `node`. Both times in seconds."""

    node: NodeId
    mark: Mark
    """How far its memory is taken to reach."""
    tokens: int
    fetch_s: float
    read_s: float


def plan(here: Here, model: str, others: Iterable[tuple[NodeId, Facts]], rates: dict[NodeId, float]) -> Plan | None:
    """The cheapest fetch of those from `others`; None where reading is cheaper. `rates`: of links, bytes/s measured."""
    if not here.marks or here.token_bytes <= 0:
        return None
    whole, plans = here.marks[-1].length, []
    own = here.tokens * here.own // whole
    for node, facts in others:
        for served in facts.models:
            known = held(served.prefixes, here.marks) if served.name == model and not served.load_s else 0
            tokens = min(here.tokens * known // whole, here.bytes_max // here.token_bytes)
            if known <= here.own or tokens <= own:
                continue
            busy = here.busy + (served.busy + served.queued) * penalty(facts.flags)
            fetch_s = fetching(tokens * here.token_bytes, rates.get(node, 0.0), busy)
            mark = next(mark for mark in here.marks if mark.length == known)
            plans.append(Plan(node, mark, tokens, fetch_s, reading(tokens - own, here.prefill_tps)))
    best = min(plans, key=lambda one: (one.fetch_s - one.read_s, one.node), default=None)
    return best if best is not None and pays(best.fetch_s, best.read_s) else None


def fetching(size: int, rate: float, busy: float) -> float:
    """Seconds until `size` bytes are here, over a link of `rate` bytes a second (0: not measured)."""
    return ASKING_S + STEP_S * min(2.0, busy) + size / (rate or LINK_BYTES_S) + 2 * size / HASH_BYTES_S


def reading(tokens: int, prefill_tps: float) -> float:
    """Seconds to read so many tokens here."""
    return tokens / (prefill_tps or PREFILL_TPS)


def pays(fetch_s: float, read_s: float) -> bool:
    return read_s >= fetch_s * MARGIN and read_s - fetch_s >= SAVED_MIN_S
