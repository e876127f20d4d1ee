"""What the hub and its client say to each other, and how far an acknowledgement may reach. Pure.

    text ──parse──► Welcome | Refused | HookFrame | Dead | Complaint, or None for junk

Why the ack may be cumulative although seqs have gaps: on each link the hub offers rows in seq order from the first
unacked one and skips none, so "all offered so far below N are delivered" means all below N. Each link therefore starts
with an empty `Prefix`. `acked` in hello is only a courtesy; it names the outbox it is about (`hub`), since a recreated
outbox counts from 1 again.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import msgspec


@dataclass(frozen=True, slots=True)
class HubHook:
    """One webhook as the hub stored it. `headers` are lower case; `body` is the provider's raw bytes."""

    seq: int
    source: str
    delivery: str
    received_ms: int
    stale: bool
    headers: Mapping[str, str]
    body: bytes
    hint: str = ""
    """What a model at the edge made of it while the cluster was away. Nobody's word: unsigned, and never acted on."""


class Prefix:
    """Which offered rows are delivered, and how far an ack may reach. Pure."""

    def __init__(self) -> None:
        self._done: dict[int, bool] = {}  # in seq order: the hub offers them so

    def offer(self, seq: int) -> None:
        """The hub has sent this row; sending it again changes nothing."""
        self._done.setdefault(seq, False)

    def delivered(self, seq: int) -> int | None:
        """This row is durable. Returns the seq to acknowledge, or None when an earlier row still stands before it."""
        if seq in self._done:
            self._done[seq] = True
        return self._advance()

    def dropped(self, seq: int) -> int | None:
        """This row is a dead letter: nobody waits for it. Returns as `delivered`."""
        self._done.pop(seq, None)
        return self._advance()

    def _advance(self) -> int | None:
        reached = None
        while self._done and self._done[first := next(iter(self._done))]:
            del self._done[first]
            reached = first
        return reached


class Welcome(msgspec.Struct, tag="welcome", tag_field="type"):
    """The hub takes this coordinator; `hub` names the outbox."""

    pending: int
    hub: str = ""


class Refused(msgspec.Struct, tag="refused", tag_field="type"):
    """It does not; `term` is the highest it has seen."""

    why: str
    term: int


class HookFrame(msgspec.Struct, tag="hook", tag_field="type"):
    """One stored webhook."""

    seq: int
    source: str
    delivery: str
    received_ms: int
    stale: bool
    headers: dict[str, str]
    body: bytes  # msgspec reads base64
    hint: str = ""

    def hook(self) -> HubHook:
        """The same, for everybody else."""
        plain = (self.seq, self.source, self.delivery, self.received_ms, self.stale)
        return HubHook(*plain, headers=self.headers, body=self.body, hint=self.hint)


class Dead(msgspec.Struct, tag="dead", tag_field="type"):
    """This row has become a dead letter."""

    seq: int


class Complaint(msgspec.Struct, tag="error", tag_field="type"):
    """The hub ignored a message of ours."""

    error: dict[str, str]


class Pulled(msgspec.Struct):
    """The answer of /pull, as far as we need it."""

    hooks: list[HookFrame]


class Fenced(msgspec.Struct):
    """The 409 of a stale term."""

    term: int


Frame = Welcome | Refused | HookFrame | Dead | Complaint
_decode: Callable[[str], Frame] = msgspec.json.Decoder(Frame).decode


def parse(text: str) -> Frame | None:
    """A message of the hub, or None for anything else."""
    try:
        return _decode(text)
    except msgspec.MsgspecError:
        return None
