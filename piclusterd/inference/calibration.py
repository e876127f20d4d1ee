"""What this board has measured of itself, kept over restarts: each model's rates, and how fast memory is read.

    Done(rates) ──▶ measured ──moved by a quarter──▶ rates.json ──next start──▶ gossiped before the first request
    decoding reads all weights for each token:   GB/s = tokens/s x file size      roofline = that / memory's own GB/s

A node that was measured is not asked to prove itself again after a restart: routing has its figures at once. The file
is a cache: what cannot be read of it is measured anew, and what cannot be written is only worth a line in the log.
"""

from __future__ import annotations

import logging
from pathlib import Path

import msgspec

from .models import ModelSpec

log = logging.getLogger(__name__)

RATES = "rates.json"
"""In the state directory."""
MOVED = 0.25
"""Averages wander; the card is written where one is off by so much."""
MODELS_MAX = 256
"""Kept; the ones not measured for longest go first."""
WHOLE_TOKENS = 64
"""From so many on, a measurement has its whole weight."""
SMOOTHING = 0.2
"""Weight of the newest measurement in the running averages."""


class Average:
    """Exponentially weighted running average; `value` is 0 until the first measurement."""

    def __init__(self, value: float = 0.0) -> None:
        self.value = value

    def add(self, measured: float, tokens: int) -> None:
        """Measured over so many tokens: a short answer says little of a board."""
        if measured > 0:
            weight = SMOOTHING * min(1.0, tokens / WHOLE_TOKENS)
            self.value += (measured - self.value) * (weight if self.value else 1.0)


class Rate(msgspec.Struct, frozen=True):
    """Tokens per second; 0: not measured."""

    prefill: float = 0.0
    decode: float = 0.0


class Measured(msgspec.Struct):
    bandwidth: float = 0.0
    """Bytes of memory read a second, by as many threads as decode."""
    models: dict[str, Rate] = msgspec.field(default_factory=dict)


class Calibration:
    """Kept in the file at `path`; with None, for this run only."""

    def __init__(self, path: Path | None = None) -> None:
        self._path = path
        self._measured = Measured()
        if path is not None:
            try:
                self._measured = msgspec.json.decode(path.read_bytes(), type=Measured)
            except (OSError, msgspec.MsgspecError):
                pass

    @property
    def bandwidth(self) -> float:
        """Bytes a second; 0: not measured yet."""
        return self._measured.bandwidth

    def of(self, spec: ModelSpec) -> Rate:
        return self._measured.models.get(_key(spec), Rate())

    def measured_bandwidth(self, bandwidth: float) -> None:
        """A child measured it. The best counts: anything else that ran beside made it less."""
        if bandwidth > self._measured.bandwidth:
            self._measured.bandwidth = bandwidth
            self._save()

    def measured(self, spec: ModelSpec, prefill: float, decode: float) -> None:
        """The averages of `spec`'s rates are these now."""
        known = self.of(spec)
        if not _moved(known.prefill, prefill) and not _moved(known.decode, decode):
            return
        models = self._measured.models
        models.pop(_key(spec), None)
        models[_key(spec)] = Rate(round(prefill, 2), round(decode, 2))
        while len(models) > MODELS_MAX:
            del models[next(iter(models))]
        self._save()

    def read_per_s(self, spec: ModelSpec, decode: float) -> float:
        """Bytes a second that decoding at `decode` tokens/s reads."""
        return decode * spec.size

    def roofline(self, spec: ModelSpec, decode: float) -> float:
        """That as a share of what memory gives; 0 where either is not known."""
        return self.read_per_s(spec, decode) / self.bandwidth if self.bandwidth else 0.0

    def _save(self) -> None:
        if self._path is None:
            return
        try:
            draft = self._path.with_suffix(".new")
            draft.write_bytes(msgspec.json.encode(self._measured))
            draft.replace(self._path)
        except OSError as fault:
            log.info("measured rates are not kept: %s", fault)


def _key(spec: ModelSpec) -> str:
    """Another file or another count of threads is another measurement."""
    return f"{spec.name} {spec.size} {spec.threads} {spec.batch_threads}"


def _moved(known: float, now: float) -> bool:
    return now > 0 and abs(now - known) > MOVED * known
