"""Who is asked for sound copies: one peer after the other, one request at a time."""

from __future__ import annotations

from piclusterd.ids import NodeId
from piclusterd.ledger.mending import ASK_AGAIN_S, SPANS_MAX, Mending
from piclusterd.wire import Span

A, B, ME = NodeId("a" * 16), NodeId("b" * 16), NodeId("c" * 16)
ROT = (Span(A, 1, 3, 5),)


def test_a_sound_ledger_asks_nobody() -> None:
    mending = Mending()
    mending.link_up(A)
    assert mending.may_stand(ME, (ME, A, B), 2, 0.0)
    assert mending.deadline() == float("inf")
    assert mending.ask(0.0) is None


def test_damage_waits_for_a_peer() -> None:
    mending = Mending(ROT)
    assert not mending.may_stand(ME, (ME, A, B), 2, 99.0)
    assert mending.ask(0.0) is None
    mending.link_up(A)
    assert mending.ask(0.0) == (A, ROT)


def test_peers_take_turns_until_it_is_mended() -> None:
    mending = Mending()
    for peer in (B, A, A):
        mending.link_up(peer)
    mending.found(ROT, 1.0)
    asked = []
    for turn in range(3):
        now = 1.0 + turn * ASK_AGAIN_S
        assert mending.ask(now - 0.1) is None
        asked.append(mending.ask(now))
    assert asked == [(A, ROT), (B, ROT), (A, ROT)]
    mending.found((), 40.0)
    assert mending.may_stand(ME, (ME, A, B), 2, 40.0)
    assert mending.ask(100.0) is None


def test_what_is_left_is_asked_for_at_once_and_what_is_unchanged_is_not() -> None:
    mending = Mending(ROT)
    mending.link_up(A)
    mending.ask(0.0)
    mending.found(ROT, 1.0)
    assert mending.ask(1.0) is None
    mending.found((Span(A, 1, 3, 3),), 1.0)
    assert mending.ask(1.0) == (A, (Span(A, 1, 3, 3),))


def test_a_peer_that_went_away_is_not_asked() -> None:
    mending = Mending(ROT)
    mending.link_up(A)
    mending.link_down(A)
    mending.link_down(B)
    assert mending.ask(0.0) is None


def test_a_request_is_bounded() -> None:
    mending = Mending([Span(A, 1, seq, seq) for seq in range(1, 400, 2)])
    mending.link_up(A)
    asked = mending.ask(0.0)
    assert asked is not None
    assert len(asked[1]) == SPANS_MAX


def test_what_no_other_voter_has_was_never_acknowledged_and_keeps_nobody_from_leading() -> None:
    mending = Mending(ROT)
    assert mending.may_stand(ME, (ME,), 1, 0.0)
    mending.link_up(A)
    mending.link_up(B)
    mending.ask(0.0)
    assert not mending.may_stand(ME, (ME, A, B), 2, ASK_AGAIN_S)
    mending.ask(ASK_AGAIN_S)
    assert not mending.may_stand(ME, (ME, A, B), 2, ASK_AGAIN_S)
    assert mending.may_stand(ME, (ME, A, B), 2, 2 * ASK_AGAIN_S)
    mending.link_down(A)
    assert not mending.may_stand(ME, (ME, A, B), 2, 2 * ASK_AGAIN_S)
