"""Restored images, and when a node that forgot may vote again."""

from __future__ import annotations

import sqlite3
from contextlib import closing

import pytest

from piclusterd.events import Fact
from piclusterd.ids import LogId, NodeId
from piclusterd.ledger import store
from piclusterd.ledger.rewind import Rewind, recovered
from piclusterd.wire import Head

from .rig import KEY, LOG, add, fresh, give, image, texts

OTHER = NodeId("b" * 16)
A, B, C, D, E = (NodeId(letter * 16) for letter in "abcde")


def held(conn: sqlite3.Connection) -> dict[LogId, int]:
    return {head.log: head.seq for head in store.heads(conn)}


def test_a_head_of_ours_that_we_do_not_hold_means_that_the_disk_was_put_back() -> None:
    rewind = Rewind(KEY.node, LOG)
    assert rewind.on_heads([Head(*LOG, 5), Head(OTHER, 1, 99)], {LOG: 5}) == ""
    assert "older state" in rewind.on_heads([Head(*LOG, 6)], {LOG: 5})
    assert rewind.on_heads([Head(*LOG, 6)], {LOG: 5}) == "", "once"
    assert rewind.suspended


def test_a_new_log_ends_the_suspension_and_old_logs_are_no_alarm() -> None:
    rewind = Rewind(KEY.node, LOG)
    rewind.on_heads([Head(*LOG, 6)], {LOG: 5})
    new = LogId(KEY.node, 7)
    rewind.on_appended([])
    rewind.on_appended([Fact(new, 1, 0, "log.open", {})])
    assert (rewind.current, rewind.suspended) == (new, False)
    assert rewind.on_heads([Head(*LOG, 9)], {LOG: 5, new: 1}) == ""
    rewind.on_appended([Fact(new, 2, 0, "note", {})])
    assert "older state" in rewind.on_heads([Head(*new, 3)], {LOG: 5, new: 2})


def test_a_node_without_a_log_of_its_own_cannot_be_rewound() -> None:
    assert Rewind(KEY.node, None).on_heads([Head(*LOG, 5)], {}) == ""


def test_a_restored_image_gets_its_own_tail_back_and_goes_on_in_a_new_log_without_a_fork() -> None:
    with closing(fresh(KEY)) as ours, closing(fresh()) as peer:
        add(ours, "a")
        with closing(image(ours)) as restored:
            add(ours, "acknowledged")
            give(ours, peer)
            rewind = Rewind(KEY.node, store.current_log(restored, KEY.node))
            assert rewind.on_heads(store.heads(peer), held(restored))
            new = store.open_log(restored, KEY, "pi", 2, 2000)
            assert give(peer, restored).dropped == ()
            add(restored, "later", epoch=2)
            assert store.current_log(restored, KEY.node) == new
            assert give(restored, peer).dropped == ()
            assert texts(restored) == texts(peer) == ["a", "acknowledged", "later"]


@pytest.mark.parametrize(
    ("voters", "copies", "told", "expected"),
    [
        ((A,), 1, {}, True),
        ((A, B), 2, {}, False),
        ((A, B), 2, {B: 5}, True),
        ((A, B, C), 2, {B: 5}, False),
        ((A, B, C), 2, {B: 5, C: 0}, True),
        ((A, B, C), 2, {B: 5, C: 6}, False),
        ((A, B, C), 3, {B: 5}, True),
        ((A, B, C, D, E), 3, {B: 5, C: 5}, False),
        ((A, B, C, D, E), 3, {B: 5, C: 5, D: 1}, True),
    ],
)
def test_who_forgot_votes_again_once_every_copy_must_have_been_seen(
    voters: tuple[NodeId, ...], copies: int, told: dict[NodeId, int], expected: bool
) -> None:
    heads = {voter: {LOG: seq} for voter, seq in told.items()}
    assert recovered(A, voters, copies, heads, {LOG: 5}) is expected


def test_a_fork_of_the_log_we_append_to_asks_for_a_new_one_once() -> None:
    rewind = Rewind(KEY.node, LOG)
    assert rewind.on_fork([LogId(OTHER, 1)]) == "", "somebody else's"
    assert "two branches" in rewind.on_fork([LOG])
    assert rewind.on_fork([LOG]) == "", "once"
    assert rewind.suspended
    assert Rewind(KEY.node, None).on_fork([LOG]) == ""
