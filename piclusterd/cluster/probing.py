"""The probe of the period, the helpers asked when it fails, the probes made for others (SWIM §3.1, Lifeguard §IV.A).

    start ──Ping──▶        acked(seq): well          (health - 1)
    timeout x stretch      ask ──PingReq──▶ up to INDIRECT helpers, each answers Ack or, just in time, Nack
    period x stretch       end: no Ack               (health + helpers that did not even nack, + 1 if there were none)

Targets of a large cluster go round a shuffled list, so that every member is probed within 2N - 1 periods (SWIM §4.3);
in a small one `membership` takes whom it has not met for longest: N - 1 periods, and fewer as each is pinged by the
others too. A relayed probe
keeps (asker, its seq) under our own seq; it answers once, with an Ack or a Nack. Owns no list and sends nothing itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

from ..ids import NodeId
from .suspicion import Guards, LocalHealth
from .timings import Timings

INDIRECT = 3
"""Helpers asked when a direct probe fails (memberlist's default)."""
NACK_PART = 0.8
"""Of the probe timeout after which a helper nacks: early enough for the asker's period (Lifeguard §IV.A)."""
RELAYS_MAX = 64
"""Probes under way for others; more askers get no answer, and count that against themselves."""


@dataclass(slots=True)
class Probe:
    target: NodeId
    seq: int
    ask_at: float
    """When helpers are asked; infinite once they were."""
    helpers: int = 0
    nacks: int = 0


@dataclass(frozen=True, slots=True)
class Relay:
    """A probe made for `asker`, who knows it as `seq`."""

    asker: NodeId
    seq: int
    nack_at: float


class Prober:
    def __init__(self, timings: Timings, rng: Random, guards: Guards, now: float) -> None:
        self.health = LocalHealth(guards.lifeguard)
        self.probe: Probe | None = None
        self.next_at = now + timings.probe_s
        self._timings = timings
        self._rng = rng
        self._nacks = guards.lifeguard
        self._round: list[NodeId] = []
        self._relays: dict[int, Relay] = {}
        self._last_seq = 0

    def deadline(self) -> float:
        ask_at = self.probe.ask_at if self.probe else float("inf")
        nack_at = next(iter(self._relays.values())).nack_at if self._relays else float("inf")  # the oldest is first
        return min(self.next_at, ask_at, nack_at)

    # our own probe -------------------------------------------------------------------------------------------
    def target(self, here: Sequence[NodeId]) -> NodeId | None:
        """Whom to probe next, of those that are `here`."""
        wanted = frozenset(here)
        for _ in range(2):
            while self._round:
                node = self._round.pop()
                if node in wanted:
                    return node
            self._round = list(here)
            self._rng.shuffle(self._round)
        return None

    def start(self, target: NodeId, now: float) -> int:
        """The seq of the Ping to send to `target`."""
        self._last_seq += 1
        self.probe = Probe(target, self._last_seq, now + self._timings.probe_timeout_s * self.health.stretch)
        return self._last_seq

    def overdue(self, now: float) -> Probe | None:
        """The probe for which helpers are to be asked now."""
        return self.probe if self.probe and self.probe.ask_at <= now else None

    def ask(self, probe: Probe, able: Sequence[NodeId]) -> list[NodeId]:
        """Helpers for `probe`, a few of those `able`."""
        helpers = self._rng.sample(able, min(INDIRECT, len(able)))
        probe.ask_at, probe.helpers = float("inf"), len(helpers)
        return helpers

    def nacked(self, seq: int) -> None:
        if self.probe and seq == self.probe.seq:
            self.probe.nacks = min(self.probe.helpers, self.probe.nacks + 1)

    def end(self, now: float) -> Probe | None:
        """The period is over: the probe that was not answered, if so. The next period begins."""
        probe, self.probe = self.probe, None
        if probe is not None:
            silent = probe.helpers - probe.nacks
            self.health.add(silent if probe.helpers else 1)
        self.next_at = now + self._timings.probe_s * self.health.stretch
        return probe

    def acked(self, seq: int) -> NodeId | Relay | None:
        """Whose answer it is: our probe's target, or the asker to be told; None where nobody waits for it."""
        if seq in self._relays:
            return self._relays.pop(seq)
        if self.probe is None or seq != self.probe.seq:
            return None
        target, self.probe = self.probe.target, None
        self.health.add(-1)
        return target

    def stalled(self) -> None:
        """We did not run: an answer may lie unread."""
        self.probe = None
        self.health.add(1)

    # for others ----------------------------------------------------------------------------------------------
    def relay(self, asker: NodeId, seq: int, now: float) -> int | None:
        """Our seq of the probe made for `asker`; None where too many are under way."""
        if len(self._relays) >= RELAYS_MAX:
            return None
        self._last_seq += 1
        self._relays[self._last_seq] = Relay(asker, seq, now + self._timings.probe_timeout_s * NACK_PART)
        return self._last_seq

    def nacks_due(self, now: float) -> list[Relay]:
        """Askers to be told that their target has not answered us either."""
        late = [seq for seq, relay in self._relays.items() if relay.nack_at <= now]
        relays = [self._relays.pop(seq) for seq in late]
        return relays if self._nacks else []
