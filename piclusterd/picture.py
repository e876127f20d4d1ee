"""One picture of a node for pages, CLI, /health and /metrics: what its deciders know, read at one moment.

    Snapshot ─▶ node.view(now) ─▶ picture ─▶ View

Changes nothing and decides nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from .views import View

if TYPE_CHECKING:
    from .cluster.election import Election
    from .node import Node

RUNS_SHOWN = 50


def picture(node: Node, now: float) -> View:
    election, fitness = node.election, node.handover.fitness
    voters = election.voters.voters
    members = node.membership.views(voters, now)
    heads = node.reconcile.heads()
    runs, copying = node.journal.runs.values(), node.runs.copying_s(now)
    alive = sum(m.voter and m.state == "alive" for m in members)
    return View(
        me=node.me,
        name=node.membership.mine.facts.name,
        cluster=node.cluster,
        role=_role(election, node.replicate.active),
        term=election.term,
        leader=election.leader,
        voters=voters,
        quorum=election.heard_voters(now) if election.role == "leader" else alive,
        members=members,
        heads=heads,
        digest=node.reconcile.digest.hex(),
        entries=sum(head.seq for head in heads),
        runs=node.journal.views(RUNS_SHOWN),
        hooks=len(node.journal.hooks),
        handovers=node.handover.count,
        slowest_write_s=fitness.slowest_s(now),
        stretch=fitness.stretch(now),
        dead=sum(run.state == "failed" and run.hook is not None for run in runs),
        asking=sum(run.asks != "" for run in runs),
        services=node.runs.services(now),
        copying=len(copying),
        copying_s=max(copying, default=0.0),
        clockless=node.schedule.clockless,
    )


def _role(election: Election, active: bool) -> str:
    if election.role == "leader":
        return "leader" if active else "recovering"
    if election.role in ("pre", "candidate"):
        return "candidate"
    return "follower" if election.votes_here else "learner"
