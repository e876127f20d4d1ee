"""The wire: every message survives the journey, and nothing a peer sends raises or swells."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable
from functools import cache
from typing import Any, get_args, get_origin, get_type_hints

import msgpack
import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from piclusterd import wire
from piclusterd.ids import LogId, NodeId
from piclusterd.wire import Dropped, PeerMessage, decode, encode

KINDS = get_args(PeerMessage)

SCALARS: dict[Any, st.SearchStrategy[Any]] = {
    type(None): st.none(),
    bool: st.booleans(),
    int: st.integers(-(2**63), 2**64 - 1),  # msgpack's
    float: st.floats(allow_nan=False),
    str: st.text(st.characters(exclude_categories=["Cs"]), max_size=20),  # lone surrogates are no UTF-8
    bytes: st.binary(max_size=50),
}


@cache
def values(kind: Any) -> st.SearchStrategy[Any]:
    """Whatever fits a field of type `kind`."""
    if kind in SCALARS:
        return SCALARS[kind]
    if hasattr(kind, "__supertype__"):
        return values(kind.__supertype__)
    if get_origin(kind) is tuple:
        return st.lists(values(get_args(kind)[0]), max_size=3).map(tuple)
    if get_args(kind):
        return st.one_of(*map(values, get_args(kind)))
    if issubclass(kind, wire.Message):
        return st.builds(kind, **{field.name: values(field.type) for field in msgspec.structs.fields(kind)})
    return st.builds(kind, *map(values, get_type_hints(kind).values()))


MESSAGES = values(PeerMessage)


def packed(value: Any) -> bytes:
    data: bytes = msgpack.packb(value)
    return data


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
@settings(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_a_message_arrives_as_it_was_sent(kind: type[PeerMessage], data: st.DataObject) -> None:
    message = data.draw(values(kind))
    assert decode(encode(message)) == message


def test_every_kind_of_message_has_its_own_tag() -> None:
    tags = [kind.__struct_config__.tag for kind in KINDS]
    assert len(set(tags)) == len(KINDS)


def test_the_wire_format_is_a_tagged_array() -> None:
    """Golden bytes: a release that changes these cannot talk to its neighbours."""
    assert encode(wire.TimeoutNow(7)) == packed(["timeout-now", 7])
    vote = wire.RequestVote(3, True, wire.Voters(1, 2, (NodeId("a" * 16),)))
    assert encode(vote) == packed(["request-vote", 3, True, [1, 2, ["a" * 16]], False])
    assert encode(wire.Held(1, b"\0" * 8, (wire.Head(NodeId("b" * 16), 1, 9),))) == packed(
        ["held", 1, b"\0" * 8, [["b" * 16, 1, 9]], None, 0]
    )


@settings(deadline=None, max_examples=300)
@given(st.binary(max_size=200))
def test_noise_is_returned_as_dropped_and_never_raised(data: bytes) -> None:
    assert isinstance(decode(data), Dropped | wire.Message)


@settings(deadline=None, max_examples=100, suppress_health_check=[HealthCheck.too_slow])
@given(MESSAGES, st.data())
def test_a_damaged_message_never_raises(message: PeerMessage, data: st.DataObject) -> None:
    whole = bytearray(encode(message))
    at = data.draw(st.integers(0, len(whole) - 1))
    whole[at] ^= data.draw(st.integers(1, 255))
    assert isinstance(decode(bytes(whole)), Dropped | wire.Message)
    assert isinstance(decode(bytes(whole[:at])), Dropped | wire.Message)


JSON_LIKE = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats()
    | st.text(max_size=5)
    | st.binary(max_size=5),
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=20,
)


@settings(deadline=None, max_examples=300)
@given(st.sampled_from([kind.__struct_config__.tag for kind in KINDS]), st.lists(JSON_LIKE, max_size=6))
def test_a_tag_with_the_wrong_fields_is_dropped_or_read_but_never_raises(tag: str, fields: list[Any]) -> None:
    assert isinstance(decode(msgpack.packb([tag, *fields], unicode_errors="surrogatepass")), Dropped | wire.Message)


@pytest.mark.parametrize(
    "raw",
    [
        None,
        7,
        [],
        ["no-such-tag", 1],
        {"type": "ping"},
        ["ping"],
        ["ping", "one", b""],
        ["ping", 1, "text for bytes"],
        ["ping", 1.5, b""],
        ["ping", True, b""],
        ["held", 1, b"", [["origin", 1]]],
        ["held", 1, b"", [["origin", 1, 2, 3]]],
        ["gossip", [["node", 1, "alive"]]],
    ],
    ids=repr,
)
def test_values_of_the_wrong_shape_are_dropped(raw: Any) -> None:
    dropped = decode(packed(raw))
    assert isinstance(dropped, Dropped)
    assert dropped.reason.startswith("not a message")


def test_fields_that_a_newer_peer_appends_are_ignored() -> None:
    assert decode(packed(["timeout-now", 7, "new", {"more": 1}])) == wire.TimeoutNow(7)
    older = wire.Vote(1, pre=True, granted=False)
    assert decode(packed(["vote", 1, True, False, None, [1, 2]])) == older
    head = [["a" * 16, 1, "alive", [3, "pi", [], "", "0.9"], "appended"]]
    gossip = decode(packed(["gossip", head, 5]))
    assert isinstance(gossip, wire.Gossip)
    assert gossip.members[0].facts == wire.Facts(3, "pi", release="0.9")


def test_fields_that_an_older_peer_does_not_know_take_their_defaults() -> None:
    assert decode(packed(["request-vote", 1, False, [1, 1, []]])) == wire.RequestVote(1, False, wire.Voters(1, 1))
    assert decode(packed(["hook-stored", 1, True])) == wire.HookStored(1, True)
    assert decode(packed(["held", 1, b"x"])) == wire.Held(1, b"x")
    assert decode(packed(["batch", [[b"h", b"p"]]])) == wire.Batch((wire.Entry(b"h", b"p"),))


# bombs -----------------------------------------------------------------------------------------------------------
ARRAY_OF_ALL = b"\xdd" + wire.MESSAGE_BYTES_MAX.to_bytes(4, "big")

BOMBS: dict[str, Callable[[], bytes]] = {
    "nested arrays of sixteen megabytes": lambda: b"\x91" * (16 * 2**20),
    "arrays nested as deep as the cap allows": lambda: b"\x91" * wire.MESSAGE_BYTES_MAX,
    "maps nested as deep as the cap allows": lambda: b"\x81\xa1a" * (wire.MESSAGE_BYTES_MAX // 3),
    "an array that declares two million": lambda: ARRAY_OF_ALL + b"\xc0" * 100,
    "four billion elements": lambda: b"\xdd\xff\xff\xff\xff",
    "four billion pairs": lambda: b"\xdf\xff\xff\xff\xff",
    "a string of four gigabytes": lambda: b"\xdb\xff\xff\xff\xff",
    "bytes of four gigabytes": lambda: b"\xc6\xff\xff\xff\xff",
    "an extension": lambda: b"\xc7\x05\x01abcde",
    "a timestamp no calendar holds": lambda: b"\xc7\x0c\xff" + b"\xff" * 12,
    "a map with an array for a key": lambda: b"\x81\x90\x01",
    "text that is not UTF-8": lambda: b"\x92\xa2\xff\xfe\x01",
    "two values": lambda: b"\x01\x02",
    "nothing": lambda: b"",
}


@pytest.mark.parametrize("name", BOMBS)
def test_a_bomb_is_dropped_without_swelling(name: str) -> None:
    """G1 of the threat model; how long it takes is told by `bench`, not asserted on a busy machine."""
    bomb = BOMBS[name]()
    tracemalloc.start()
    try:
        assert isinstance(decode(bomb), Dropped)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 10 * 2**20


def test_the_widest_array_of_arrays_stays_below_the_bound_of_its_bytes() -> None:
    """Empty arrays cost 56 bytes for one on the wire; the caps keep the whole within a Pi's reach."""
    full: list[Any] = [[[]] * wire.HEADS_MAX] * (wire.MESSAGE_BYTES_MAX // (wire.HEADS_MAX + 3))
    bomb = packed(["gossip", full])
    assert len(bomb) <= wire.MESSAGE_BYTES_MAX
    tracemalloc.start()
    try:
        assert isinstance(decode(bomb), Dropped)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 100 * len(bomb)


def test_a_message_over_the_cap_is_not_even_looked_at() -> None:
    dropped = decode(bytes(wire.MESSAGE_BYTES_MAX + 1))
    assert dropped == Dropped(f"{wire.MESSAGE_BYTES_MAX + 1} bytes, over the cap of {wire.MESSAGE_BYTES_MAX}")


def test_the_largest_batch_that_a_store_makes_fits_into_one_message() -> None:
    """Just under the soft cap, then one group with the largest entry (`BATCH_BYTES_MAX`, `MESSAGE_BYTES_MAX`)."""
    small = wire.Entry(bytes(200), bytes(wire.BATCH_BYTES_MAX - 200), bytes(64))
    large = wire.Entry(bytes(200), bytes(wire.PAYLOAD_BYTES_MAX), bytes(64))
    batch = wire.Batch((small, large))
    assert decode(encode(batch)) == batch


def test_heads_and_spans_name_their_log() -> None:
    node = NodeId("c" * 16)
    assert wire.Head(node, 2, 9).log == wire.Span(node, 2, 1, 9).log == LogId(node, 2)


def test_a_model_does_what_it_names_and_one_that_names_nothing_generates() -> None:
    named = wire.ModelFacts("m", tasks=("embed",))
    assert (named.does("embed"), named.does("generate")) == (True, False)
    older, embedder = wire.ModelFacts("m"), wire.ModelFacts("m", embeddings=True)
    assert [older.does(task) for task in ("generate", "embed", "classify")] == [True, False, False]
    assert [embedder.does(task) for task in ("generate", "embed", "classify")] == [True, True, False]
