"""How long a request would take on a node: queue + prompt / measured prefill + answer / measured decode. Pure.

Requests decoded together share the memory bandwidth, not the weights' traffic: one more answer in the batch slows the
others by far less than its own length, which is what `SHARE` stands for. Heat and power are penalties on the measured
rates, since a board that throttles now was measured when it did not.
"""

from __future__ import annotations

from ..wire import Facts, ModelFacts

ANSWER_TOKENS = 128
"""What an answer is taken to need: longer than a triage, shorter than an essay. Only differences matter."""
PREFILL_TPS, DECODE_TPS = 50.0, 8.0
"""Rates of a node that has not measured yet: a Pi 5 with a 3B model at 4 bits. Fast boards soon show that they are."""
SHARE = 0.35
"""How much of its own time each running request adds to a new one beside it."""
HOP_S = 0.002
"""A relayed request crosses the LAN twice."""
SLOW_FLAGS = {"throttled": 2.0, "undervolt": 1.5, "hot": 1.3}
"""A flag that begins so multiplies the time: throttling halves the clock of a Pi; the others announce it."""


def predict(model: ModelFacts, facts: Facts, prompt_tokens: int, local: bool, unseen: int = 0) -> float:
    """Seconds until `model` on the node with `facts` has answered a prompt of `prompt_tokens`.

    `unseen` requests were sent there since those facts were told.
    """
    alone = prompt_tokens / (model.prefill_tps or PREFILL_TPS) + ANSWER_TOKENS / (model.decode_tps or DECODE_TPS)
    running = model.busy + (unseen if not model.queued else 0)
    waiting = model.queued + (unseen if model.queued else 0)
    seconds = model.load_s + alone * (1 + SHARE * running + waiting) * penalty(facts.flags)
    return seconds if local else seconds + HOP_S


def penalty(flags: tuple[str, ...]) -> float:
    """The factor by which a board with `flags` is slower than it measured."""
    return max((factor for name, factor in SLOW_FLAGS.items() for flag in flags if flag.startswith(name)), default=1.0)
