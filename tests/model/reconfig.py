"""Every state of a small cluster: election, W copies, recovery barrier and change of voters, explored exhaustively.

The parts are published (Raft's election; flexible quorums; MongoRaftReconfig, arXiv 2102.11960), their combination is
ours, so it is checked here: breadth first over all interleavings within the bounds, and with each rule switched off in
turn, which must end in a counterexample or the model proves nothing.

    campaign ─▶ grant … ─▶ lead (re-stamps the config with its term) ─▶ report × E ─▶ activate ─▶ append ─▶ ack
                                                                     heads, config          └────▶ change voters

A message exchange is one atomic step; loss and delay are steps not taken, or taken late: what a coordinator was told it
remembers in `book` and may act on at any later time, however outdated. A crash is a node that takes no more steps: all
that is modelled is durable but for the books and the counted votes, and nothing forces anybody to use those.

Left out: PreVote, stickiness, CheckQuorum (liveness only: any voter may campaign at any time); the "term" entry (its
copies are an append like others); contiguity of logs (entries travel in any order: more behaviours, not fewer). A
coordinator pulls what a voter reports in the same step: before it did, it could only have waited longer at its barrier.

Checked in every state: one leader a term; a coordinator that becomes active holds all that was acknowledged in older
terms; what an old coordinator acknowledges late is held by the newer active ones; and, one election ahead of the bound,
no node that could win now could pass its barrier without an acknowledged entry.

    python -m tests.model.reconfig --nodes 4 --voters 3 --terms 3 --entries 2 --changes 1 [--without order]
"""

from __future__ import annotations

import argparse
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from itertools import permutations
from typing import Any, NamedTuple

FOLLOWER, CANDIDATE, LEADER, ACTIVE = range(4)
UNHEARD = -1
"""In a book: this node has not reported in the coordinator's term."""


@dataclass(frozen=True)
class Rules:
    """Each may be switched off; each must then be missed."""

    order: bool = True
    """A config replaces an older one only; (term, version), term first, is its age."""
    term_first: bool = True
    """Off: configs are ordered by (version, term)."""
    voter_compares: bool = True
    """A voter refuses a candidate whose config is older than its own."""
    restamp: bool = True
    """A new leader makes its config one of its own term, so that older terms' changes lose against it."""
    config_stored: bool = True
    """(a) The config is changed only when E of its voters reported, in this term, to store it."""
    config_in_term: bool = True
    """Off: (a) counts who stores these voters in this version, whatever term they are in (the bug of Raft's thesis)."""
    entries_carried: bool = True
    """(b) … and when W voters of the new config hold what may have been acknowledged."""
    acks_wait: bool = True
    """Nothing is acknowledged before E voters store the config that W is counted in."""
    one_at_a_time: bool = True
    fencing: bool = True
    barrier: bool = True
    enough_copies: bool = True
    """Off: W is one less than it should be."""
    one_vote: bool = True
    leader_yields: bool = True
    """A leader that adopts another's config stops leading."""
    canvass_anew: bool = True
    """A candidate that adopts another's config forgets the votes it has."""


@dataclass(frozen=True)
class Bounds:
    nodes: int = 4
    voters: int = 3
    """The first so many nodes vote at the start."""
    terms: int = 3
    entries: int = 1
    changes: int = 1
    gossip: bool = False
    """Entries also travel between any two nodes, not only from and to a coordinator."""


class Node(NamedTuple):
    term: int
    role: int
    voted: bool
    config: tuple[int, int, int]
    """(term, version, voters as a bit mask)."""
    log: int
    base: int
    """Of an active coordinator: what it held at its activation, and what it acknowledged since."""
    book: tuple[int, ...]
    """Of a leader: node → what it reported (log, and a bit above it if it stores the leader's config). Of a candidate:
    node → 1 if it voted for us. Else empty."""


class State(NamedTuple):
    nodes: tuple[Node, ...]
    acked: tuple[int, ...]
    """Entry → the earliest term it was acknowledged in, 0 if it was not."""
    entries: int
    led: int
    """Bit t: term t had a leader."""
    changes: int


Step = tuple[str, State]


class Violation(Exception):
    """An invariant does not hold. The step that broke it is `label`."""

    def __init__(self, label: str, what: str) -> None:
        super().__init__(f"{label}: {what}")


def quorum(voters: int) -> int:
    return voters // 2 + 1


def copies_needed(voters: int) -> int:
    return 1 if voters <= 1 else max(2, voters - quorum(voters) + 1)


class Model:
    def __init__(self, bounds: Bounds, rules: Rules) -> None:
        self.bounds, self.rules = bounds, rules
        self.everyone = range(bounds.nodes)
        self.config_bit = 1 << bounds.entries
        self.log_mask = self.config_bit - 1
        self._moved: dict[tuple[int, ...], list[int]] = {
            order: [
                sum(1 << order.index(i) for i in self.everyone if mask >> i & 1) for mask in range(1 << bounds.nodes)
            ]
            for order in permutations(self.everyone)
        }

    def start(self) -> State:
        """Term 1 has an active coordinator, node 0, and all know its term: clusters get there, or serve nobody."""
        config = (1, 1, (1 << self.bounds.voters) - 1)
        follower = Node(1, FOLLOWER, True, config, 0, 0, ())
        leader = Node(1, ACTIVE, True, config, 0, 0, (0,) * self.bounds.nodes)
        acked = (0,) * self.bounds.entries
        return State((leader, *(follower for _ in range(1, self.bounds.nodes))), acked, 0, 1 << 1, 0)

    # what may happen -----------------------------------------------------------------------------------------
    def steps(self, state: State) -> Iterator[Step]:
        for i, node in enumerate(state.nodes):
            if node.config[2] >> i & 1:
                yield from self._campaign(state, i, node)
            if node.role == CANDIDATE:
                yield from self._canvass(state, i, node)
            if node.role >= LEADER:
                yield from self._lead(state, i, node)
            if node.role == ACTIVE:
                yield from self._serve(state, i, node)
            yield from self._tell_config(state, i, node)
            if self.bounds.gossip:
                yield from self._gossip(state, i, node)

    def _campaign(self, state: State, i: int, node: Node) -> Iterator[Step]:
        """In any newer term that nobody leads yet: whoever hears of a term may campaign in the one after it."""
        votes = tuple(int(j == i) for j in self.everyone)
        for term in range(node.term + 1, self.bounds.terms + 1):
            if not state.led >> term & 1 or not self.rules.one_vote:
                candidate = Node(term, CANDIDATE, True, node.config, node.log, 0, votes)
                yield f"{i} campaigns in term {term}", put(state, i, candidate)

    def _canvass(self, state: State, c: int, node: Node) -> Iterator[Step]:
        voters = node.config[2]
        for v, voter in enumerate(state.nodes):
            if v != c and voters >> v & 1 and not node.book[v] and self._would_vote(voter, node):
                granted = Node(node.term, FOLLOWER, True, voter.config, voter.log, 0, ())
                counted = node._replace(book=swap(node.book, v, 1))
                yield f"{v} votes for {c} in term {node.term}", put(put(state, v, granted), c, counted)
        if sum(vote for v, vote in enumerate(node.book) if voters >> v & 1) >= quorum(voters.bit_count()):
            label = f"{c} leads term {node.term} with config {show(node.config)}"
            if state.led >> node.term & 1:
                raise Violation(label, f"term {node.term} has a second leader")
            config = (node.term, *node.config[1:]) if self.rules.restamp else node.config
            leads = node._replace(role=LEADER, config=config, book=(UNHEARD,) * len(state.nodes))
            yield label, put(state, c, leads)._replace(led=state.led | 1 << node.term)

    def _would_vote(self, voter: Node, candidate: Node) -> bool:
        free = voter.term < candidate.term or (
            voter.term == candidate.term and voter.role == FOLLOWER and not (voter.voted and self.rules.one_vote)
        )
        return free and (not self.rules.voter_compares or self._age(candidate.config) >= self._age(voter.config))

    def _lead(self, state: State, n: int, node: Node) -> Iterator[Step]:
        for f, other in enumerate(state.nodes):
            if f != n and (other.term <= node.term or not self.rules.fencing):
                yield from self._report(state, n, node, f, other, store=0)
                if node.log & ~other.log:
                    yield from self._report(state, n, node, f, other, store=node.log)
        if node.role == LEADER and (not self.rules.barrier or self._count(n, node, self._heard) >= self._quorum(node)):
            label = f"{n} is active in term {node.term}, holding {bits(node.log)}"
            for e, acked in enumerate(state.acked):
                if 0 < acked < node.term and not node.log >> e & 1:
                    raise Violation(label, f"it lacks e{e}, acknowledged in term {acked}")
            yield label, put(state, n, node._replace(role=ACTIVE, base=node.log))

    def _report(self, state: State, n: int, node: Node, f: int, other: Node, store: int) -> Iterator[Step]:
        """`f` adopts the term, stores what it is sent, and says what it holds; the coordinator pulls what it lacks."""
        log = other.log | store
        if other.term < node.term or (other.term == node.term and other.role == CANDIDATE):
            voted = other.voted and other.term == node.term
            other = Node(node.term, FOLLOWER, voted, other.config, log, 0, ())
        else:
            other = other._replace(log=log)
        says = log | (self.config_bit if other.config == node.config else 0)
        knows = node._replace(log=node.log | log, book=swap(node.book, f, says))
        after = put(put(state, f, other), n, knows)
        if after != state:
            yield f"{f} {'stores and ' if store else ''}reports {bits(log)} to {n} in term {node.term}", after

    def _serve(self, state: State, n: int, node: Node) -> Iterator[Step]:
        if state.entries < self.bounds.entries:
            entry = 1 << state.entries
            grown = put(state, n, node._replace(log=node.log | entry))._replace(entries=state.entries + 1)
            yield f"{n} appends {bits(entry)} in term {node.term}", grown
        for e in range(self.bounds.entries):
            news = not state.acked[e] or state.acked[e] > node.term or not node.base >> e & 1
            if node.log >> e & 1 and news and self._durable(n, node, 1 << e):
                yield self._ack(state, n, node, e)
        if state.changes < self.bounds.changes and self._config_known(state, n, node):
            for voters in self._neighbours(node.config[2]):
                if not self.rules.entries_carried or self._carried(n, node, voters):
                    config = (node.config[0], node.config[1] + 1, voters)
                    book = tuple(says if says == UNHEARD else says & self.log_mask for says in node.book)
                    changed = put(state, n, node._replace(config=config, book=book))
                    yield f"{n} changes config to {show(config)}", changed._replace(changes=state.changes + 1)

    def _ack(self, state: State, n: int, node: Node, e: int) -> Step:
        label = f"{n} acknowledges e{e} in term {node.term}, config {show(node.config)}"
        for m, other in enumerate(state.nodes):
            if other.role == ACTIVE and other.term > node.term and not other.log >> e & 1:
                raise Violation(label, f"{m} is already active in term {other.term} without it")
        acked = swap(state.acked, e, min(state.acked[e] or node.term, node.term))
        return label, put(state, n, node._replace(base=node.base | 1 << e))._replace(acked=acked)

    def _tell_config(self, state: State, i: int, node: Node) -> Iterator[Step]:
        for j, other in enumerate(state.nodes):
            if j == i or other.config == node.config:
                continue
            if self.rules.order and self._age(node.config) <= self._age(other.config):
                continue
            keeps = (other.role >= LEADER and not self.rules.leader_yields) or (
                other.role == CANDIDATE and not self.rules.canvass_anew
            )
            adopted = other if keeps else other._replace(role=FOLLOWER, base=0, book=())
            yield f"{j} adopts config {show(node.config)} of {i}", put(state, j, adopted._replace(config=node.config))

    def _gossip(self, state: State, i: int, node: Node) -> Iterator[Step]:
        for j, other in enumerate(state.nodes):
            for e in range(self.bounds.entries):
                if (node.log & ~other.log) >> e & 1:
                    yield f"{j} pulls {bits(1 << e)} of {i}", put(state, j, other._replace(log=other.log | 1 << e))

    # the rules in numbers ------------------------------------------------------------------------------------
    def _age(self, config: tuple[int, int, int]) -> tuple[int, int]:
        term, version, _ = config
        return (term, version) if self.rules.term_first else (version, term)

    def _quorum(self, node: Node) -> int:
        return quorum(node.config[2].bit_count())

    def _copies(self, voters: int) -> int:
        return copies_needed(voters.bit_count()) - (not self.rules.enough_copies)

    @staticmethod
    def _count(n: int, node: Node, says_so: Callable[[int], bool], voters: int | None = None) -> int:
        """Voters that said so, the coordinator included if it votes."""
        mask = node.config[2] if voters is None else voters
        return sum(mask >> j & 1 and (j == n or says_so(says)) for j, says in enumerate(node.book))

    @staticmethod
    def _heard(says: int) -> bool:
        return says != UNHEARD

    def _stores_config(self, says: int) -> bool:
        return says != UNHEARD and bool(says & self.config_bit)

    def _config_stored(self, n: int, node: Node) -> bool:
        return self._count(n, node, self._stores_config) >= self._quorum(node)

    def _config_known(self, state: State, n: int, node: Node) -> bool:
        if not self.rules.config_stored:
            return True
        if self.rules.config_in_term:
            return self._config_stored(n, node)
        voters = node.config[2]
        same = sum(voters >> j & 1 and o.config[1:] == node.config[1:] for j, o in enumerate(state.nodes))
        return same >= self._quorum(node)

    def _durable(self, n: int, node: Node, entry: int) -> bool:
        if self.rules.acks_wait and not self._config_stored(n, node):
            return False
        copies = self._count(n, node, lambda says: says != UNHEARD and not entry & ~says)
        return copies >= self._copies(node.config[2])

    def _carried(self, n: int, node: Node, voters: int) -> bool:
        copies = self._count(n, node, lambda says: says != UNHEARD and not node.base & ~says, voters)
        return copies >= self._copies(voters)

    def _neighbours(self, voters: int) -> Iterator[int]:
        for j in self.everyone:
            if voters != 1 << j:
                yield voters ^ 1 << j
        if not self.rules.one_at_a_time:
            for j in self.everyone:
                for k in range(j):
                    if voters & ~(1 << j | 1 << k):
                        yield voters ^ 1 << j ^ 1 << k

    # what must hold ------------------------------------------------------------------------------------------
    def check(self, label: str, state: State) -> None:
        """One election ahead: whoever could win now could not pass its barrier without an acknowledged entry."""
        for c, node in enumerate(state.nodes):
            voters = node.config[2]
            missing = [e for e, acked in enumerate(state.acked) if acked and not node.log >> e & 1]
            if not missing or not voters >> c & 1:
                continue
            electors = [o for v, o in enumerate(state.nodes) if voters >> v & 1]
            needed = quorum(len(electors))
            if self.rules.voter_compares and (
                sum(self._age(o.config) <= self._age(node.config) for o in electors) < needed
            ):
                continue
            for e in missing:
                if not self.rules.barrier or sum(not o.log >> e & 1 for o in electors) >= needed:
                    raise Violation(label, f"{c} could now lead and be active without e{e}, acknowledged before")

    # one of many equal states --------------------------------------------------------------------------------
    def canonical(self, state: State) -> State:
        """Node numbers mean nothing: sort by what distinguishes nodes cheaply. Equal keys stay as they are, which only
        costs reduction, not soundness."""
        state = self.forget(state)
        nodes = state.nodes
        books = [n.book for n in nodes if n.book]
        keys = [
            (n[:3], n.config[:2], n.log, n.base, n.config[2] >> i & 1, sum(o.config[2] >> i & 1 for o in nodes),
             sum(book[i] for book in books))
            for i, n in enumerate(nodes)
        ]  # fmt: skip
        order = tuple(sorted(self.everyone, key=keys.__getitem__))
        if all(a == b for a, b in zip(order, self.everyone, strict=True)):
            return state
        moved = self._moved[order]
        return State(tuple([self._rename(nodes[i], order, moved) for i in order]), *state[1:])

    def forget(self, state: State) -> State:
        """Drop what can make no difference any more: votes of a term that is decided, reports that are no news."""
        if not self.rules.one_vote:
            return state
        nodes = list(state.nodes)
        for i, node in enumerate(nodes):
            if node.role == ACTIVE:
                if UNHEARD in node.book:
                    nodes[i] = node._replace(book=tuple([max(says, 0) for says in node.book]))
            elif node.role < LEADER and state.led >> node.term & 1 and (node.role or not node.voted):
                nodes[i] = Node(node.term, FOLLOWER, True, node.config, node.log, 0, ())
        return State(tuple(nodes), *state[1:])

    @staticmethod
    def _rename(node: Node, order: tuple[int, ...], moved: list[int]) -> Node:
        term, version, voters = node.config
        book = tuple([node.book[i] for i in order]) if node.book else ()
        return Node(*node[:3], (term, version, moved[voters]), node.log, node.base, book)


def put(state: State, i: int, node: Node) -> State:
    nodes = state.nodes
    return State((*nodes[:i], node, *nodes[i + 1 :]), *state[1:])


def swap(book: tuple[int, ...], i: int, value: int) -> tuple[int, ...]:
    return (*book[:i], value, *book[i + 1 :])


def bits(mask: int) -> str:
    return "{" + ",".join(f"e{i}" for i in range(mask.bit_length()) if mask >> i & 1) + "}"


def show(config: tuple[int, int, int]) -> str:
    term, version, voters = config
    return f"v{version}@{term}{[i for i in range(voters.bit_length()) if voters >> i & 1]}"


# the search ----------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Outcome:
    states: int
    complete: bool
    """Every state within the bounds was seen."""
    violation: str | None = None
    trace: tuple[str, ...] = ()


def explore(
    bounds: Bounds, rules: Rules | None = None, states_max: int = 50_000_000, opening: tuple[str, ...] = ()
) -> Outcome:
    """Breadth first, so that a counterexample is a shortest one. `opening`: labels of the first steps, where the whole
    space is not the question."""
    model = Model(bounds, rules or Rules())
    first = play(model, opening)
    start = model.canonical(first)
    parents: dict[State, State | None] = {start: None}
    queue = deque([start])
    while queue:
        state = queue.popleft()
        try:
            for label, after in model.steps(state):
                model.check(label, after)
                seen = model.canonical(after)
                if seen not in parents:
                    parents[seen] = state
                    queue.append(seen)
        except Violation:
            trace, what = replay(model, first, lineage(parents, state))
            return Outcome(len(parents), False, what, opening + trace)
        if len(parents) > states_max:
            return Outcome(len(parents), False)
    return Outcome(len(parents), True)


def play(model: Model, labels: tuple[str, ...]) -> State:
    """The state after exactly these steps."""
    state = model.start()
    for wanted in labels:
        state = model.forget(dict(model.steps(state))[wanted])
    return state


def lineage(parents: dict[State, State | None], state: State | None) -> list[State]:
    path = []
    while state is not None:
        path.append(state)
        state = parents[state]
    return path[::-1]


def replay(model: Model, first: State, path: list[State]) -> tuple[tuple[str, ...], str]:
    """The same path with nodes that keep their numbers; its last state has a step that breaks an invariant."""
    state, labels = first, []
    for wanted in path[1:]:
        label, after = next(step for step in model.steps(state) if same(model, step[1], wanted))
        state = model.forget(after)
        labels.append(label)
    try:
        for label, after in model.steps(state):
            model.check(label, after)
    except Violation as violation:
        return tuple(labels), str(violation)
    raise AssertionError("the replayed path breaks nothing")


def same(model: Model, state: State, wanted: State) -> bool:
    """Equal up to the numbers of nodes? (`canonical` alone may differ where its keys tie.)"""
    if model.canonical(state) == wanted:
        return True
    state = model.forget(state)
    return any(
        State(tuple(model._rename(state.nodes[i], order, moved) for i in order), *state[1:]) == wanted
        for order, moved in model._moved.items()
    )


def parse(argv: list[str] | None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(
        description="Explore every state of election, copies, barrier and change of voters."
    )
    for bound in fields(Bounds):
        if bound.name != "gossip":
            parser.add_argument(f"--{bound.name}", type=int, default=bound.default)
    parser.add_argument("--gossip", action="store_true")
    parser.add_argument("--without", action="append", default=[], choices=[rule.name for rule in fields(Rules)])
    parser.add_argument("--states-max", type=int, default=50_000_000)
    return vars(parser.parse_args(argv))


def main(argv: list[str] | None = None) -> int:
    asked = parse(argv)
    rules = replace(Rules(), **dict.fromkeys(asked.pop("without"), False))
    states_max = asked.pop("states_max")
    began = time.monotonic()
    outcome = explore(Bounds(**asked), rules, states_max)
    print(f"{outcome.states} states in {time.monotonic() - began:.1f} s, complete: {outcome.complete}")  # noqa: T201
    for number, label in enumerate((*outcome.trace, *([outcome.violation] if outcome.violation else [])), 1):
        print(f"{number:4d}  {label}")  # noqa: T201
    return 1 if outcome.violation else 0


if __name__ == "__main__":
    raise SystemExit(main())
