from __future__ import annotations

import random
from collections import Counter

from piclusterd.inference import fair
from piclusterd.inference.fair import AGE_S, Fair, Waiting


def pushed(queue: Fair, tenant: str, priority: str = "interactive", cost: float = 10.0, now: float = 0.0) -> Waiting:
    one, victim = queue.push(tenant, priority, cost, now)
    assert victim is None
    return one


def order(queue: Fair, now: float = 0.0) -> list[str]:
    gone = []
    while (one := queue.pop(now)) is not None:
        gone.append(one.tenant)
    return gone


def test_of_one_tenant_who_came_first_goes_first() -> None:
    queue = Fair(9)
    came = [pushed(queue, "a") for _ in range(3)]
    assert [queue.pop(0.0) for _ in range(3)] == came
    assert queue.pop(0.0) is None


def test_who_floods_waits_for_himself() -> None:
    queue = Fair(99)
    for _ in range(20):
        pushed(queue, "flood")
    pushed(queue, "b")
    pushed(queue, "c")
    assert order(queue)[:4] == ["flood", "b", "c", "flood"]


def test_tokens_are_shared_not_requests() -> None:
    queue = Fair(99)
    for _ in range(20):
        pushed(queue, "long", cost=40.0)
        pushed(queue, "short", cost=10.0)
    counts = Counter(order(queue)[:20])
    assert counts["short"] == 16
    assert counts["long"] == 4


def test_what_was_guessed_wrong_is_put_right() -> None:
    queue = Fair(99)
    for tenant in ("a", "b"):
        queue.enter(tenant, 10.0)
    queue.settle("a", 500.0)
    queue.settle("nobody", 500.0)
    pushed(queue, "a")
    pushed(queue, "b")
    pushed(queue, "b")
    assert order(queue) == ["b", "b", "a"]


def test_what_was_used_while_nobody_waited_is_not_held_against_anyone() -> None:
    queue = Fair(99)
    for _ in range(50):
        queue.enter("a", 10.0)
    for tenant in ("b", "b", "b", "a"):
        pushed(queue, tenant)
    assert "a" in order(queue)[:3]


def test_chats_go_before_runs_and_runs_before_batches() -> None:
    queue = Fair(9)
    for priority in ("batch", "workflow", "interactive"):
        pushed(queue, priority, priority)
    assert order(queue) == ["interactive", "workflow", "batch"]


def test_a_batch_moves_up_with_time() -> None:
    queue = Fair(9)
    pushed(queue, "old batch", "batch", now=0.0)
    pushed(queue, "chat", now=2 * AGE_S)
    pushed(queue, "chat", now=2 * AGE_S)
    assert order(queue, now=2 * AGE_S)[1] == "old batch" or order(queue) == []


def test_where_the_queue_is_full_the_newcomer_is_refused_if_he_would_go_last() -> None:
    queue = Fair(2)
    pushed(queue, "a")
    pushed(queue, "b")
    one, victim = queue.push("c", "interactive", 10.0, 0.0)
    assert one is victim
    assert order(queue) == ["a", "b"]


def test_where_the_queue_is_full_of_one_his_youngest_gives_way() -> None:
    queue = Fair(3)
    came = [pushed(queue, "flood") for _ in range(3)]
    one, victim = queue.push("b", "interactive", 10.0, 0.0)
    assert victim == came[-1]
    assert one.tenant == "b"
    assert queue.push("flood", "interactive", 10.0, 0.0)[1] is not None
    assert order(queue) == ["flood", "b", "flood"]


def test_a_batch_gives_way_to_a_chat_and_never_the_other_way_round() -> None:
    queue = Fair(1)
    batch = pushed(queue, "a", "batch")
    assert queue.push("a", "interactive", 10.0, 0.0)[1] == batch
    one, victim = queue.push("b", "batch", 10.0, 0.0)
    assert one is victim


def test_who_leaves_pays_nothing() -> None:
    queue = Fair(9)
    gone = pushed(queue, "a", cost=1000.0)
    queue.remove(gone)
    queue.remove(gone)
    pushed(queue, "a")
    pushed(queue, "b")
    assert queue.cost == 20.0
    assert len(queue) == 2
    assert order(queue) == ["a", "b"]


def test_no_tenant_is_remembered_for_ever() -> None:
    queue = Fair(9)
    for number in range(fair.TENANTS_MAX + 10):
        queue.enter(str(number), 10.0)
        queue.enter("a", 10.0)
    assert len(queue._ends) <= fair.TENANTS_MAX + 1


def test_shares_are_even_whatever_is_asked() -> None:
    """Jain's index over 200 tenants, half of which ask ten times as often."""
    rng, queue, served = random.Random(5), Fair(64), Counter[str]()
    for _ in range(20_000):
        number = rng.randrange(1100)
        tenant = f"greedy {number % 100}" if number >= 100 else f"modest {number}"
        queue.push(tenant, "interactive", 10.0, 0.0)
        if rng.random() < 0.2 and (one := queue.pop(0.0)):
            served[one.tenant] += 1
    got = list(served.values())
    assert len(got) == 200
    assert sum(got) ** 2 / (len(got) * sum(one * one for one in got)) > 0.85, "0.61 where who comes first goes first"
