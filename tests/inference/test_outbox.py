from __future__ import annotations

import socket

from piclusterd.inference.outbox import Outbox, merged
from piclusterd.inference.protocol import Beat, Delta, Done, Failed, FromChild, TokenLogprob, decode, framed


def read(sock: socket.socket) -> list[object]:
    """All frames until the other end closes."""
    data, found = b"", list[object]()
    while more := sock.recv(65536):
        data += more
    while data:
        end = 4 + int.from_bytes(data[:4], "little")
        found.append(decode(data[4:end], FromChild))
        data = data[end:]
    return found


def test_deltas_of_one_answer_become_one_and_ends_stay_behind_them() -> None:
    chance = TokenLogprob(b"a", -0.5)
    done, fault = Done(1, "stop", 3, 2), Failed(3, 400, "no")
    frames = [
        Delta(1, "a", 1, (chance,), (7,)), Delta(2, "x", 1), Delta(1, "", 1, (), (8,)), fault, Delta(1, "b", 2), done,
    ]  # fmt: skip
    assert merged(frames) == [Delta(1, "ab", 4, (chance,), (7, 8)), Delta(2, "x", 1), fault, done]
    assert merged([Beat()]) == [Beat()]


def test_all_that_was_put_has_been_sent_when_it_is_closed() -> None:
    ours, theirs = socket.socketpair()
    outbox = Outbox(ours)
    for number in range(20):
        outbox.put(Delta(1, f"{number} ", 1))
    outbox.put(Done(1, "stop", 3, 20))
    outbox.close()
    ours.close()
    with theirs:
        *deltas, done = read(theirs)
    assert "".join(delta.text for delta in deltas if isinstance(delta, Delta)).split() == [str(n) for n in range(20)]
    assert done == Done(1, "stop", 3, 20)


def test_a_reader_that_is_gone_stops_nothing() -> None:
    ours, theirs = socket.socketpair()
    theirs.close()
    outbox = Outbox(ours)
    for number in range(200):  # more than it would hold
        outbox.put(Delta(number, "a", 1))
    outbox.close()
    ours.close()


def test_it_waits_for_a_reader_that_is_slow() -> None:
    ours, theirs = socket.socketpair()
    outbox = Outbox(ours)
    text = "a" * 100_000
    for number in range(30):
        outbox.put(Delta(number, text, 1))
        assert framed(Delta(number, text, 1)) == _exactly(theirs, len(framed(Delta(number, text, 1))))
    outbox.close()
    ours.close()
    theirs.close()


def _exactly(sock: socket.socket, count: int) -> bytes:
    data = b""
    while len(data) < count:
        data += sock.recv(count - len(data))
    return data
