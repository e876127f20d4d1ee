"""What pruning and urgent runs look at, through a whole node."""

from __future__ import annotations

from random import Random

from piclusterd.cluster.timings import PRESETS
from piclusterd.events import HardState, LinkUp, Received
from piclusterd.forgetting import copy_look
from piclusterd.ids import LogId, NodeId
from piclusterd.node import Node, Setup
from piclusterd.wire import Facts, Gossip, Head, Held, Member, Voters

A, B = NodeId("a" * 16), NodeId("b" * 16)
PLACES = [(LogId(A, 1), 3)]


def test_a_copy_is_outside_once_a_relay_said_so_or_where_there_is_none() -> None:
    node = Node(Setup(A, "home", Facts(), PRESETS["pi"], HardState(voters=Voters(1, 0, (A,)))), Random(1), 0.0)
    look = copy_look(node.membership, node.pruning)
    assert look(PLACES), "no relay is a member"
    node.handle(LinkUp(B), 0.0)
    node.handle(Received(B, Gossip((Member(B, 1, "alive", Facts(version=1, role="relay")),))), 0.0)
    assert not look(PLACES)
    node.handle(Received(B, Held(0, b"theirs", (Head(A, 1, 2),))), 0.0)
    assert not look(PLACES), "it lacks the last"
    node.handle(Received(B, Held(0, b"theirs", (Head(A, 1, 3),))), 0.0)
    assert look(PLACES)


def test_a_relay_that_left_is_not_waited_for() -> None:
    node = Node(Setup(A, "home", Facts(), PRESETS["pi"], HardState(voters=Voters(1, 0, (A,)))), Random(1), 0.0)
    node.handle(LinkUp(B), 0.0)
    node.handle(Received(B, Gossip((Member(B, 1, "alive", Facts(version=1, role="relay")),))), 0.0)
    node.handle(Received(B, Gossip((Member(B, 1, "left", Facts(version=1, role="relay")),))), 0.0)
    assert copy_look(node.membership, node.pruning)(PLACES)
