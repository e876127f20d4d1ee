"""How long a request would take on a node: queue + prompt / measured prefill + answer / measured decode. Pure.

Requests decoded together share the memory bandwidth, not the weights' traffic: one more answer in the batch slows the
others by far less than its own length, which is what `SHARE` stands for. Heat and power are penalties on the measured
rates, since a board that throttles now was measured when it did not.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..wire import Facts, ModelFacts

ANSWER_TOKENS = 128
"""What an answer is taken to need: longer than a triage, shorter than an essay. Only differences matter."""
PREFILL_TPS, DECODE_TPS = 50.0, 8.0
"""Rates of a node that has not measured yet: a Pi 5 with a 3B model at 4 bits. Fast boards soon show that they are."""
SHARE = 0.35
"""How much of its own time each running request adds to a new one beside it."""
UNTOLD_SLOTS = 4
"""Places of a model that does not tell them: the default."""
CROWDED, CROWDED_RATIO = 1.0, 1.5
"""All places taken, and half as much again as elsewhere (LocalAI's guard: 1.5 and two requests)."""
HOP_S = 0.002
"""A relayed request crosses the LAN twice."""
SLOW_FLAGS = {"throttled": 2.0, "undervolt": 1.5, "hot": 1.3}
"""A flag that begins so multiplies the time: throttling halves the clock of a Pi; the others announce it."""


@dataclass(frozen=True, slots=True)
class Load:
    """What keeps a model busy: requests with it, requests waiting, and those sent there that gossip does not show."""

    busy: int
    queued: int
    unseen: int
    slots: int

    @classmethod
    def of(cls, model: ModelFacts, unseen: int) -> Load:
        """An older release does not tell its places: what waits there tells that they are taken."""
        return cls(model.busy, model.queued, unseen, model.slots or (model.busy if model.queued else UNTOLD_SLOTS) or 1)

    @property
    def waiting(self) -> int:
        """Requests that go before a new one and have no place yet, it included where it gets none."""
        return max(0, self.busy + self.queued + self.unseen - self.slots + 1)

    @property
    def beside(self) -> int:
        """Requests that are answered beside a new one."""
        return min(self.busy + self.unseen, self.slots - 1)

    @property
    def part(self) -> float:
        """Of its places, how many are asked for."""
        return (self.busy + self.queued + self.unseen) / self.slots


def predict(
    model: ModelFacts, facts: Facts, prompt_tokens: int, local: bool, load: Load, answer_tokens: int = 0
) -> float:
    """Seconds until `model` on the node with `facts` has answered a request, of which `prompt_tokens` must be read.

    `answer_tokens`: what the answer may have at most; 0: not known.
    """
    answer = min(answer_tokens or ANSWER_TOKENS, ANSWER_TOKENS)
    alone = prompt_tokens / (model.prefill_tps or PREFILL_TPS) + answer / (model.decode_tps or DECODE_TPS)
    wait = load.waiting * (model.turn_s or alone) / load.slots
    seconds = model.load_s + (wait + alone * (1 + SHARE * load.beside)) * penalty(facts.flags)
    return seconds if local else seconds + HOP_S


def crowded(load: Load, idlest: float) -> bool:
    """Whether a model has so much more to do than the idlest that can answer, that what it remembers must not count:
    a beginning that everybody shares gets a second home."""
    return load.part >= CROWDED and load.part >= CROWDED_RATIO * idlest


def penalty(flags: tuple[str, ...]) -> float:
    """The factor by which a board with `flags` is slower than it measured."""
    return max((factor for name, factor in SLOW_FLAGS.items() for flag in flags if flag.startswith(name)), default=1.0)
