import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from piclusterd.cluster import frames
from piclusterd.cluster.frames import FRAME_BYTES_MAX, STREAM_MAX, Frame, Hello, Kind, Request, is_address
from piclusterd.errors import Broken, NotFound, Overloaded, PiclusterError, Refused, Unavailable, UserError
from piclusterd.ids import NodeId
from piclusterd.wire import MESSAGE_BYTES_MAX, Dropped

ON_A_STREAM = [Kind.OPEN, Kind.DATA, Kind.END, Kind.RESET, Kind.CREDIT]


@pytest.mark.parametrize("kind", list(Kind))
def test_every_kind_reads_back(kind: Kind) -> None:
    frame = Frame(5 if kind in ON_A_STREAM else 0, kind, b"" if kind is Kind.END else b"body")
    assert frames.decode(frames.encode(frame)) == frame


def test_a_control_frame_holds_the_largest_message() -> None:
    frame = Frame(0, Kind.CONTROL, bytes(MESSAGE_BYTES_MAX))
    packed = frames.encode(frame)
    assert len(packed) <= FRAME_BYTES_MAX
    assert frames.decode(packed) == frame


@given(st.binary(max_size=200))
def test_no_bytes_raise(data: bytes) -> None:
    for read in (frames.decode, frames.decode_hello, frames.decode_request, frames.decode_credit):
        read(data)
    assert isinstance(frames.decode_reset(data), PiclusterError)


_values = st.recursive(st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.binary() | st.text(), st.lists)


@given(_values)
def test_no_msgpack_raises(value: object) -> None:
    try:
        data = msgpack.packb(value)
    except UnicodeEncodeError:  # a lone surrogate cannot travel anyway
        return
    for read in (frames.decode, frames.decode_hello, frames.decode_request):
        read(data)
    assert isinstance(frames.decode_reset(data), PiclusterError)


@pytest.mark.parametrize(
    "value",
    [
        [0, int(Kind.END), b""],
        [1, int(Kind.PING), b"12345678"],
        [1, int(Kind.END), b"x"],
        [-1, int(Kind.DATA), b"x"],
        [STREAM_MAX + 1, int(Kind.DATA), b"x"],
        [1, 99, b""],
        [1, int(Kind.DATA), "text"],
        [1, int(Kind.DATA)],
        {"stream": 1},
        [0, int(Kind.PING), b"123456789"],
    ],
)
def test_what_is_no_frame_is_dropped_with_a_reason(value: object) -> None:
    dropped = frames.decode(msgpack.packb(value))
    assert isinstance(dropped, Dropped)
    assert dropped.reason


def test_bodies_read_back() -> None:
    hello = Hello(1, 1, NodeId("a" * 16), "c", "pi-1", ("10.0.0.1:1",))
    assert frames.decode_hello(frames.encode_body(hello)) == hello
    assert frames.decode_request(frames.encode_body(Request("chat", b"{}"))) == Request("chat", b"{}")
    assert frames.decode_credit(frames.encode_credit(70_000)) == 70_000
    assert isinstance(frames.decode_credit(b""), Dropped)


def test_a_hello_may_grow_at_its_end() -> None:
    newer = msgpack.packb([1, 3, "a" * 16, "c", "pi-1", [], 7, True, "something new"])
    hello = frames.decode_hello(newer)
    assert isinstance(hello, Hello)
    assert frames.no_protocol(hello, Hello(1, 1, NodeId("b" * 16), "c", "pi-2")) == ""


@pytest.mark.parametrize(
    "error",
    [
        UserError("w", "y", "f"),
        NotFound("w"),
        Refused("w"),
        Unavailable("w", retry_after_s=7.0),
        Overloaded("w"),
        Broken("w"),
    ],
)
def test_errors_cross_the_link_as_themselves(error: PiclusterError) -> None:
    back = frames.decode_reset(frames.encode_reset(error))
    assert type(back) is type(error)
    assert (back.what, back.why, back.fix) == (error.what, error.why, error.fix)
    if isinstance(back, Unavailable) and isinstance(error, Unavailable):
        assert back.retry_after_s == error.retry_after_s


def test_a_long_error_still_fits() -> None:
    packed = frames.encode_reset(Broken("ä" * 9999, "ö" * 9999, "ü" * 9999))
    assert not isinstance(frames.decode(frames.encode(Frame(1, Kind.RESET, packed))), Dropped)
    assert frames.decode_reset(packed).what.startswith("ää")


@pytest.mark.parametrize(
    ("text", "good"),
    [("pi-1.local:7946", True), ("10.0.0.1:1", True), ("[fe80::1]:80", True), ("::1:80", False), ("a:b", False)],
)
def test_addresses_are_told_from_other_text(text: str, good: bool) -> None:
    assert is_address(text) is good


def test_protocols_that_do_not_meet_are_refused_with_the_side_to_upgrade() -> None:
    def hello(name: str, lowest: int, highest: int) -> Hello:
        return Hello(lowest, highest, NodeId("a" * 16), "c", name)

    assert frames.no_protocol(hello("new", 2, 3), hello("old", 1, 2)) == ""
    assert frames.no_protocol(hello("new", 3, 4), hello("old", 1, 2)).endswith(
        "upgrade this node to a release between the two first"
    )
    assert "upgrade old to a release" in frames.no_protocol(hello("old", 1, 2), hello("new", 3, 4))


def test_a_wish_reads_back() -> None:
    assert isinstance(frames.decode_wish(b""), Dropped)


def test_several_frames_go_in_one_message_and_one_goes_as_ever() -> None:
    sent = [Frame(0, Kind.PING, b"12345678"), Frame(1, Kind.DATA, b"data"), Frame(1, Kind.END)]
    encoded = [frames.encode(frame) for frame in sent]
    assert frames.decode_all(frames.pack(encoded)) == sent
    assert frames.pack(encoded[:1]) == encoded[0]
    assert frames.decode_all(encoded[0]) == sent[:1]


@pytest.mark.parametrize(
    "value",
    [
        [[0, Kind.PING, b"12345678"], 7],
        [[0, Kind.PING, b"12345678"], [0, Kind.DATA, b"on no stream"]],
        [[]],
        [[[0, Kind.PING, b"12345678"]]],
        [[0, Kind.PING, b"12345678"]] * (frames.PACK_FRAMES_MAX + 1),
    ],
)
def test_one_frame_that_is_none_spoils_the_message(value: list[object]) -> None:
    assert isinstance(frames.decode_all(msgpack.packb(value)), Dropped)


def test_where_one_frame_is_due_several_are_none() -> None:
    hello = frames.encode(Frame(0, Kind.HELLO, b""))
    assert isinstance(frames.decode(frames.pack([hello, hello])), Dropped)
