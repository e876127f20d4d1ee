"""Every safety rule, switched off: the checks must see its absence within so many seeds, or they check nothing.

`rule` is a field of `events.Rules`, `lie` a lie told below the deciders (`sim.disk`, `sim.outside`). With the rule
on, the same seed is clean.

The fourteen of `research` (distributed peers, §4), in its order, and what each is here:

    vote fsync            vote-fsync        a lie of the disk: votes are answered before they are durable
    ack fsync             ack-fsync         the same, of appends and of what replicas store
    term fencing          term-fencing      replicas answer older terms, and say nothing of newer ones
    recovery barrier      recovery-barrier  a new coordinator serves at once
    W < N-E+1             enough-copies     one copy will do (of five voters)
    PreVote               pre-vote          whoever comes back campaigns at once
    CheckQuorum           check-quorum      a leader that nobody hears leads on
    epoch bump            epoch-bump        a disk that was put back goes on in its old log (decider and disk)
    idempotency           idempotency       the service outside does not look at keys
    contiguity check      contiguity        a store reports a log's highest entry as its end, gap or no gap
    config in-term rule   config-in-term    E voters need not store a leader's config in its own term
    catch-up before voter catch-up          neither a new voter nor W of the next ones hold what was acknowledged
    prune lapse rule      prune-lapse       pruning waits for nobody who is silent
    loop-lag discard      loop-lag          a stalled node accuses others of its own silence

Two of them are wider here than there, as one half alone breaks nothing. In-term: a coordinator acknowledges nothing
before its config is stored (DECISIONS 10), so it is never active before it is; the rule guards both. Catch-up: entries
of W voters of the old config meet every majority of a config with one more, caught up or not; what it costs comes when
the next one leaves, so the rule is that W voters of *every* next config hold them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

from .rest import Violation
from .world import Plan, World


@dataclass(frozen=True, slots=True)
class Ablation:
    name: str
    invariants: tuple[str, ...]
    """What breaks without the rule: one of these."""
    seeds: int
    """The budget: so many seeds, from 0, find it."""
    rule: str = ""
    lie: str = ""
    theme: str = "swarm"
    voters: int = 3

    def of(self, plan: Plan) -> Plan:
        """`plan` without the rule."""
        lies = (*plan.lies, self.lie) if self.lie else plan.lies
        rules = replace(plan.rules, **{self.rule: False}) if self.rule else plan.rules
        return replace(plan, lies=lies, rules=rules)


ABLATIONS = {
    ablation.name: ablation
    for ablation in (
        Ablation("vote-fsync", ("I1", "I2"), 20, lie="vote-fsync"),
        Ablation("ack-fsync", ("I5",), 10, lie="ack-fsync"),
        Ablation("term-fencing", ("I3", "I6"), 50, rule="term_fencing", theme="heirs"),
        Ablation("recovery-barrier", ("I6",), 50, rule="recovery_barrier", theme="heirs"),
        Ablation("enough-copies", ("I5",), 10, rule="enough_copies", voters=5),
        Ablation("pre-vote", ("I12",), 20, rule="pre_vote", theme="return"),
        Ablation("check-quorum", ("I12",), 20, rule="check_quorum", theme="exile"),
        Ablation("idempotency", ("I7",), 20, lie="idempotency"),
        Ablation("contiguity", ("I5", "I6", "I8"), 50, lie="contiguity"),
        Ablation("config-in-term", ("I3", "I6"), 50, rule="config_in_term", theme="minds", voters=4),
        Ablation("catch-up", ("I5", "I6"), 20, rule="catch_up", theme="change"),
        Ablation("epoch-bump", ("I4",), 20, rule="epoch_bump", lie="epoch-bump", theme="restore"),
        Ablation("loop-lag", ("I12",), 50, rule="lag_discard", theme="stall"),
        Ablation("prune-lapse", ("I9",), 20, rule="prune_lapse"),
    )
}


def ablated(plan: Plan, name: str | None) -> Plan:
    """`plan` without the rule called `name`; None: as it is."""
    return plan if name is None else ABLATIONS[name].of(plan)


class Played(NamedTuple):
    """`digest`: of the trace."""

    digest: str
    events: int
    virtual_s: float


def play(plan: Plan, row: Callable[[str], None] | None = None) -> Played:
    """`plan` from beginning to end. Raises `Violation`."""
    world = World(plan, row)
    try:
        return Played(world.run(), world.events, world.now)
    finally:
        world.close()


def first_failure(plan: Plan, seeds: range) -> tuple[int, Violation] | None:
    for seed in seeds:
        try:
            play(replace(plan, seed=seed))
        except Violation as violation:
            return seed, violation
    return None


def hunt(ablation: Ablation, minutes: float, first: int = 0) -> tuple[int, Violation] | None:
    """The first seed within the budget that shows the rule's absence: clean with the rule, and broken without."""
    plan = Plan(0, minutes, ablation.voters, theme=ablation.theme)
    end = first + ablation.seeds
    while found := first_failure(ablation.of(plan), range(first, end)):
        seed, violation = found
        broken = str(violation).split()[0] in ablation.invariants
        if broken and first_failure(plan, range(seed, seed + 1)) is None:
            return found
        first = seed + 1
    return None


def table(minutes: float) -> Iterator[str]:
    """One row an ablation: its name, the seed that caught it, what broke."""
    yield f"{'without':<18}{'seed':>6}  {'budget':>6}  {'expected':<10}what broke"
    for ablation in ABLATIONS.values():
        found = hunt(ablation, minutes)
        seed, what = (str(found[0]), str(found[1])) if found else ("—", "NOT CAUGHT")
        yield f"{ablation.name:<18}{seed:>6}  {ablation.seeds:>6}  {'|'.join(ablation.invariants):<10}{what}"
