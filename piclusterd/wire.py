"""What nodes say to each other: every peer message, its encoding, and the limits of both.

A message is a msgpack array `[tag, field, ...]`. Decoding has two stages: msgpack with hard caps on every declared
length, then `msgspec.convert` into the frozen struct named by the tag. Whatever does not fit is *returned* as
`Dropped(reason)`; nothing a peer sends can raise past `decode` (see the bombs in the tests).

    membership   Ping → Ack | PingReq → (Ping → Ack) → Ack | Nack      Gossip (push)   PushPull ⇄ PushPull
    election     RequestVote → Vote        Heartbeat → Held             TimeoutNow
    ledger       Push → Held               Held → Want → Batch
    webhooks     ForwardHook → HookStored

Sources: SWIM (Das et al., DSN 2002), Raft (Ongaro 2014, §3, §6.4, §9.6), Corrosion's heads-and-needs sync state.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import msgpack
import msgspec

from .ids import LogId, NodeId, RunId, Term

PROTOCOL = 1
"""The newest version this release speaks."""
PROTOCOLS = (1, PROTOCOL)
"""The oldest and the newest. A release keeps the one before its own, so that neighbours in age form one cluster; a link
is refused where the two ranges do not meet."""

HOOK_BYTES_MAX = 1024 * 1024
"""One webhook's body; larger ones are refused at the edge."""
PAYLOAD_BYTES_MAX = HOOK_BYTES_MAX + 16 * 1024
"""One ledger entry's payload: the largest webhook and what is noted beside it."""
BATCH_BYTES_MAX = 256 * 1024
"""Soft cap of a Push or Batch: it closes at the first signed entry that passes it, so that a ping never waits long."""
MESSAGE_BYTES_MAX = 2 * PAYLOAD_BYTES_MAX
"""One peer message: a batch just under its soft cap, then one commit group with the largest entry."""
BATCH_ENTRIES_MAX = 256
HEADS_MAX = 4096
MEMBERS_MAX = 4096
DIGEST_BYTES = 8
"""Of the ledger's version vector: enough to notice a difference; equality is confirmed by the next exchange."""


class Head(NamedTuple):
    """`seq` entries of this log are durable, counted from 1 without a gap."""

    origin: NodeId
    epoch: int
    seq: int

    @property
    def log(self) -> LogId:
        return LogId(self.origin, self.epoch)


class Span(NamedTuple):
    """Entries first..last (both included) of one log."""

    origin: NodeId
    epoch: int
    first: int
    last: int

    @property
    def log(self) -> LogId:
        return LogId(self.origin, self.epoch)


class ConfigId(NamedTuple):
    """Names one record of voters (a term has one leader) and orders them: term first."""

    term: Term
    version: int


class Mark(NamedTuple):
    """A beginning of a prompt: what names it, and its length in bytes (`inference.prefix`)."""

    digest: int
    length: int


class Shipped(NamedTuple):
    """What an answer was spared: `tokens` of its prompt came from `peer` as a state of so many bytes (`shipping`)."""

    peer: str
    tokens: int
    bytes: int
    ms: int


class Message(msgspec.Struct, frozen=True, array_like=True):
    """Base of everything below. Field order is the wire format: append only, with a default."""


class Entry(Message, frozen=True):
    """A ledger entry as it travels: the very bytes that were hashed and signed (`ledger.entry` reads them)."""

    header: bytes
    payload: bytes
    signature: bytes = b""


class Voters(Message, frozen=True):
    """Who votes. One (version, term) record outside any log (MongoRaftReconfig, arXiv 2102.11960)."""

    version: int = 0
    term: Term = 0
    voters: tuple[NodeId, ...] = ()


TASKS = ("generate", "embed", "classify", "summarize")


class ModelFacts(Message, frozen=True):
    """What a node can say of one model it serves. Rates are measured on that board, in tokens per second."""

    name: str
    embeddings: bool = False
    busy: int = 0
    queued: int = 0
    prefill_tps: float = 0.0
    decode_tps: float = 0.0
    context: int = 0
    tasks: tuple[str, ...] = ()
    """What it can do: generate, embed, classify, summarize. Empty, as from older releases: see `does`."""
    load_s: float = 0.0
    """Seconds to load it first: it is on the node's disk only. 0: it is in memory."""
    slots: int = 0
    """Requests it answers side by side; 0: an older release, which does not say."""
    turn_s: float = 0.0
    """How long a request holds one of those places, on average; 0: not measured."""
    prefixes: bytes = b""
    """Digests of prompts it has read and most likely still holds (`inference.prefix`)."""
    gb_s: float = 0.0
    """What decoding reads, gigabytes a second: all weights, for each token of an answer."""
    roofline: float = 0.0
    """That as a share of what the board's memory gives; 0: not measured."""
    tools: bool = False
    """Whether its chat template has a place for tools."""
    token_bytes: int = 0
    """Of states that it gives to other nodes and takes from them, for each token; 0: of none."""
    states_max: int = 0
    """Bytes of the largest."""
    states_bps: float = 0.0
    """Bytes a second at which they came; 0: not measured."""

    def does(self, task: str) -> bool:
        if self.tasks:
            return task in self.tasks
        return task == "generate" or (task == "embed" and self.embeddings)


DRAINING = "draining"
"""Flag of a node that is about to restart: it is asked last (`inference.placement`)."""


class Facts(Message, frozen=True):
    """What a node says of itself; replaced as a whole by the higher `version`. Guides scheduling, decides nothing."""

    version: int = 0
    name: str = ""
    addresses: tuple[str, ...] = ()
    """`host:port` of the peer listener."""
    api: str = ""
    """Base URL of the client listener."""
    release: str = ""
    role: str = "worker"
    board: str = ""
    cpu_percent: float = 0.0
    memory_used: int = 0
    memory_total: int = 0
    temperature_c: float | None = None
    flags: tuple[str, ...] = ()
    models: tuple[ModelFacts, ...] = ()
    ledger_entries: int = 0
    trouble: str = ""
    """What ails its disk: it neither campaigns nor takes over leadership."""
    handed_over: str = ""
    """Why it gave up leadership of its own accord, lately."""


class Member(Message, frozen=True):
    """A line of the member list. `state`: alive, suspect, failed, left or removed; `incarnation`: the subject's own.

    Facts of version 0 say nothing: news of a state travels without them. `accuser` is who itself found a suspect silent
    (not who passes it on), so that confirmations are independent (Lifeguard §IV.B).
    """

    node: NodeId
    incarnation: int
    state: str
    facts: Facts
    accuser: NodeId = NodeId("")


class Line(NamedTuple):
    """A member without its facts: enough to see which of two lists is newer. `rank` is the state's precedence."""

    node: NodeId
    incarnation: int
    rank: int
    version: int


# membership ------------------------------------------------------------------------------------------------------
class Ping(Message, frozen=True, tag="ping"):
    """`digest` is of the ledger's heads, `listed` of the member list; empty where the cluster is too large to agree."""

    seq: int
    digest: bytes
    members: tuple[Member, ...] = ()
    listed: bytes = b""


class Ack(Message, frozen=True, tag="ack"):
    seq: int
    digest: bytes
    members: tuple[Member, ...] = ()
    listed: bytes = b""


class PingReq(Message, frozen=True, tag="ping-req"):
    seq: int
    target: NodeId


class Nack(Message, frozen=True, tag="nack"):
    """`PingReq` arrived and the target has not answered yet: the asker itself is not the slow one (Lifeguard §IV.A)."""

    seq: int


class Gossip(Message, frozen=True, tag="gossip"):
    members: tuple[Member, ...]


class PushPull(Message, frozen=True, tag="push-pull"):
    """Anti-entropy of member lists, digests first. `reply`: an answer is expected where the lists differ.

    `digests` of the sender's list, one a bucket; `lines` of the buckets that differed; `members` that the other lacks
    or has older; `want`: those to be sent back. `reply` without digests asks for everything.
    """

    members: tuple[Member, ...]
    reply: bool
    digests: tuple[bytes, ...] = ()
    lines: tuple[Line, ...] | None = None
    want: tuple[NodeId, ...] = ()


class Twin(Message, frozen=True, tag="twin"):
    """Another machine with the receiver's key asked for a link (`path`: from where) and was refused."""

    path: str


# election --------------------------------------------------------------------------------------------------------
class RequestVote(Message, frozen=True, tag="request-vote"):
    """`pre` asks if a vote would be given and changes nothing (PreVote, §9.6). `transfer` overrides stickiness."""

    term: Term
    pre: bool
    voters: Voters
    transfer: bool = False


class Vote(Message, frozen=True, tag="vote"):
    term: Term
    pre: bool
    granted: bool
    voters: Voters | None = None
    """Newer ones than the asker's: they may stand on no voter's disk yet, and then nobody else would tell it."""


class Heartbeat(Message, frozen=True, tag="heartbeat"):
    """The leader of `term` is here; `digest` is of its ledger's heads. No voters: those that you said you hold."""

    term: Term
    digest: bytes
    voters: Voters


class TimeoutNow(Message, frozen=True, tag="timeout-now"):
    """Leadership transfer: the receiver campaigns at once (Ongaro §3.10)."""

    term: Term


# ledger ----------------------------------------------------------------------------------------------------------
class Held(Message, frozen=True, tag="held"):
    """In `term`, my durable heads digest to `digest`. `heads` is left out where the asker's digest was the same.

    It is a promise: whoever sends it has made `term` durable and takes nothing from an older term as acknowledged.
    In term 0 it promises nothing (a node that may have forgotten); without heads it then asks for the other's.
    """

    term: Term
    digest: bytes
    heads: tuple[Head, ...] | None = None
    config: ConfigId | None = None
    """Of the voters on the sender's disk; None from a release that does not say."""
    life: int = 0
    """The sender's boot counter: what it said in an earlier life it may have forgotten since (a disk put back)."""


class Push(Message, frozen=True, tag="push"):
    """New entries of the coordinator of `term`, to be made durable and answered by `Held`."""

    term: Term
    entries: tuple[Entry, ...]


class Want(Message, frozen=True, tag="want"):
    spans: tuple[Span, ...]


class Batch(Message, frozen=True, tag="batch"):
    entries: tuple[Entry, ...]


# webhooks --------------------------------------------------------------------------------------------------------
class Hook(Message, frozen=True):
    """A provider's event whose signature has been verified. `key` is made of signed content only."""

    source: str
    key: str
    event: str
    body: bytes


class ForwardHook(Message, frozen=True, tag="forward-hook"):
    ticket: int
    hook: Hook


class HookStored(Message, frozen=True, tag="hook-stored"):
    """The coordinator's answer to `ForwardHook`: durable (`run` is set where a workflow took it up), or why not.

    `key`: the webhook's; a node whose boot counter was lost with its vote record gives tickets out once more.
    """

    ticket: int
    stored: bool
    run: RunId | None = None
    why: str = ""
    key: str = ""


PeerMessage = (
    Ping | Ack | PingReq | Nack | Gossip | PushPull | Twin | RequestVote | Vote | Heartbeat | TimeoutNow
    | Held | Push | Want | Batch | ForwardHook | HookStored
)  # fmt: skip


class Dropped(NamedTuple):
    """What a decoder returns instead of raising: the peer sent something that is not a message."""

    reason: str


ENCODER = msgspec.msgpack.Encoder()
"""Kept: making one costs more than most messages."""


def encode(message: PeerMessage) -> bytes:
    return ENCODER.encode(message)


def decode(data: bytes) -> PeerMessage | Dropped:
    """The message in `data`, or why there is none. Never raises."""
    raw = unpack(data, MESSAGE_BYTES_MAX)
    if isinstance(raw, Dropped):
        return raw
    try:
        message: PeerMessage = msgspec.convert(raw, PeerMessage, strict=True)
    except msgspec.ValidationError as fault:
        return Dropped(f"not a message: {fault}")
    return message


def unpack(data: bytes, bytes_max: int) -> Any | Dropped:
    """`data` as plain msgpack values under the caps every untrusted buffer gets."""
    if len(data) > bytes_max:
        return Dropped(f"{len(data)} bytes, over the cap of {bytes_max}")
    try:
        return msgpack.unpackb(
            data,
            max_str_len=bytes_max,
            max_bin_len=bytes_max,
            max_array_len=max(HEADS_MAX, MEMBERS_MAX),
            max_map_len=1024,
            max_ext_len=0,
            strict_map_key=True,
        )
    except Exception as fault:  # msgpack raises ValueError, StackError, OverflowError and more on hostile input
        return Dropped(f"not msgpack: {type(fault).__name__}")
