"""What must hold. I1–I5, I7 and I11 are looked at after every step, the rest when the world has come to rest.

I1  at most one node is elected, and at most one becomes active, in a term
I2  the term, the voters' version and the incarnation never go back on one identity, nor does a vote change in a term
I3  nothing is called taken by a coordinator that a newer active one has superseded
I4  one entry per (origin, epoch, seq), the same on every disk; each disk's logs grow without a gap; where two cards
    wrote one log (`images`) an alarm was raised, and nobody writes it any more (that the
    shorter branch reaches every disk is not asked for yet: heads tell of the longest only)
I5  a webhook is called taken only when W voters have it on disk at that instant (one that lost its disk had it, and
    whoever holds the checkpoint that let it go, closed, has it)
I6  every coordinator that becomes active in the newest term holds every webhook ever called taken; at rest, every
    ledger does
I7  a step of a run has one idempotency key, whoever acts; nobody appends a webhook that a checkpoint on its own disk
    let go; at rest every taken webhook's run is done, its effect there
I8  at rest all ledgers are equal, one of them verifies whole, and they give equal journals
I9  a node forgets nothing that a member lacks which it has heard within the lapse; a checkpoint lets no webhook go
    whose run nobody has ended
I10 every node that is up answers a snapshot
I11 what a node keeps for others is bounded: held-back messages, unacknowledged appends, waiting webhooks, wants, links
I12 at rest there is one active coordinator and the hub's outbox is empty; a leader whom no majority hears steps down;
    a leader whom a majority hears is not deposed by a node that comes back (theme `return`); a node that was up and
    heard is not called failed (theme `stall`)
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..cluster.voter_config import config_id
from ..events import Fact, Forget, HardState, MemberDown
from ..ids import LogId, NodeId, RunId, Term
from ..ledger import rows, store
from ..ledger.checkpoint import kept_facts
from ..ledger.entry import CHECKPOINT
from ..ledger.replicate import UNACKED_MAX, copies_needed
from ..node import HELD_BACK_MAX, Node
from ..wire import ConfigId, Head, Voters
from ..workflows.intake import WAITING_MAX
from ..workflows.journal import subject
from .disk import STALL_MAX_S
from .images import forks
from .network import CLOG_MAX_S
from .rest import config_is_settled, hold, ledgers_agree

if TYPE_CHECKING:
    from .world import Actor, World

PEERS_MAX = 16
"""More than any rehearsed cluster has: whatever is kept per peer stays below."""
SETTLE_S = 3.0
"""Time that messages under way and timers of a step may take beyond the rule's own times."""


class Checks:
    def __init__(self, world: World) -> None:
        self._world = world
        self.configs: dict[ConfigId, Voters] = {config_id(world.voters): world.voters}
        """Every config of voters that a leader ever made."""
        self._elected: dict[Term, NodeId] = {}
        self._active: dict[Term, NodeId] = {}
        self._elected_at = 0.0
        self._begun: dict[Term, float] = {}
        """When a term was first on a disk."""
        self._on_disk: dict[str, dict[NodeId, None]] = {}
        self._keys: dict[tuple[RunId, str], str] = {}
        self._hard: dict[NodeId, HardState] = {}
        self._entries: dict[tuple[LogId, int], Fact] = {}
        self._ends: dict[tuple[NodeId, LogId], int] = {}
        self._most: dict[tuple[NodeId, LogId], int] = {}
        """As `_ends`, and also what an image that was put back forgot: its node has told that it holds it."""
        self._hooks: dict[LogId, dict[int, tuple[str, str]]] = {}
        """Log → seq of each webhook, its key and its run ("": none)."""
        self._replaced: dict[tuple[LogId, int, int], dict[int, tuple[str, str]]] = {}
        """Checkpoint → the webhooks that stood before it; its clock tells two of one number apart."""
        self._runs: dict[str, str] = {}
        """Run → its webhook's key, of whatever was on some disk."""
        self._ended: dict[str, None] = {}
        """Runs whose end was on some disk."""
        self._let_go: dict[NodeId, dict[str, float]] = {}
        """Node → webhooks that a checkpoint on its disk let go, and since when."""
        self._cloned: dict[LogId, int] = {}
        self._fork_alarms = 0
        self.durable: dict[LogId, int] = {}
        """Log → the highest number that its coordinator called durable."""
        self._unheard_since: dict[int, float] = {}
        """Leader's actor number → since when no majority can reach it."""
        self._booted: dict[NodeId, float] = {}
        self._met: dict[NodeId, float] = {}
        self.taken: dict[str, None] = {}
        """Webhook keys that a coordinator called taken."""

    # I1, I2, I6 ----------------------------------------------------------------------------------------------
    def elected(self, node: NodeId, term: Term) -> None:
        self._single(self._elected, term, node, "I1 elected")
        self._elected_at = self._world.now

    def activated(self, actor: Actor, term: Term) -> None:
        node = actor.disk.node
        self._single(self._active, term, node, "I1 active")
        if term < max(self._elected):
            return  # woken into a later term: what it calls taken is I3's and I5's business
        missing = [key for key in self.taken if node not in self._on_disk.get(key, {})]
        hold(not missing, f"I6 {node} is active in term {term} without {missing[:3]}")
        unknown = [key for key in self.taken if actor.node and actor.node.journal.known(key) is None]
        hold(not unknown, f"I6 {node} is active in term {term}, and its journal does not know {unknown[:3]}")

    def _single(self, book: dict[Term, NodeId], term: Term, node: NodeId, what: str) -> None:
        known = book.setdefault(term, node)
        hold(known == node, f"{what}: both {known} and {node} in term {term}")

    def booted(self, actor: Actor) -> None:
        """What the disk remembers is not older than what it remembered."""
        self._booted[actor.disk.node] = self._world.now
        self._met.setdefault(actor.disk.node, self._world.now)
        self._never_back(actor.disk.node, actor.disk.hard)

    def _never_back(self, node: NodeId, now: HardState) -> None:
        before = self._hard.get(node)
        self._hard[node] = now
        self._begun.setdefault(now.term, self._world.now)
        if before is None or before is now:
            return
        places = [(s.term, (s.voters.term, s.voters.version), s.incarnation) for s in (before, now)]
        went_back = any(b < a for a, b in zip(*places, strict=True))
        hold(not went_back, f"I2 {node} went back from {places[0]} to {places[1]}")
        changed = before.term == now.term and before.voted_for not in (None, now.voted_for)
        hold(not changed, f"I2 {node} changed its vote in term {now.term}")

    def forgot_votes(self, node: NodeId) -> None:
        """The node's vote record is gone: I2 begins anew, and I1 says whether it voted all the same."""
        self._hard.pop(node, None)

    # I4 ------------------------------------------------------------------------------------------------------
    def landed(self, node: NodeId, fact: Fact) -> None:
        """`node` has the entry on disk from now on."""
        self._most[node, fact.log] = max(fact.seq, self._most.get((node, fact.log), 0))
        if fact.kind == "hook":
            self._hook(node, fact)
        elif fact.kind == "run.done":
            self._ended[str(fact.body["run"])] = None
        if fact.seq >= self._cloned.get(fact.log, fact.seq + 1):  # its branches are compared at rest
            if fact.kind == CHECKPOINT:
                self._checkpoint(node, fact, resets=True)
            return
        known = self._entries.setdefault((fact.log, fact.seq), fact)
        if known is not fact and known != fact:
            hold(False, f"I4 {fact.log} seq {fact.seq} says two things")
        opened = (
            fact.log.origin == node and fact.kind != "log.open"
        )  # its own comes from a peer after a `put_back` only
        last = self._ends.get((node, fact.log), int(opened))
        if fact.kind == CHECKPOINT:
            self._checkpoint(node, fact, fact.seq > last + 1)
        elif fact.seq != last + 1:
            hold(False, f"I4 {node} stored seq {fact.seq} of {fact.log} after {last}")
        self._ends[node, fact.log] = fact.seq

    def _hook(self, node: NodeId, fact: Fact) -> None:
        key, run = str(fact.body["key"]), subject(fact) or ""
        since = self._let_go.get(node, {}).get(key, self._world.now)
        stood = self._hooks.get(fact.log, {}).get(fact.seq) == (key, run)  # its own log comes back to an older image
        again = fact.log.origin == node and not stood and self._world.now - since > STALL_MAX_S + SETTLE_S
        hold(not again, f"I7 {node} takes {key} once more, which a checkpoint let go")
        self._on_disk.setdefault(key, {})[node] = None
        self._hooks.setdefault(fact.log, {})[fact.seq] = (key, run)
        self._runs[run] = key

    # I9 ------------------------------------------------------------------------------------------------------
    def _checkpoint(self, node: NodeId, checkpoint: Fact, resets: bool) -> None:
        """What it let go is closed, so who holds the checkpoint has it; one that resets a log brings what it kept."""
        kept = {fact.seq: fact for fact in kept_facts(checkpoint)}
        for seq, (key, run) in self._before(checkpoint).items():
            if seq in kept and not resets:
                continue
            self._on_disk[key][node] = None
            if seq not in kept:
                hold(
                    not run or run in self._ended, f"I9 {checkpoint.log} at {checkpoint.seq} lets {key} go, still open"
                )
                self._let_go.setdefault(node, {}).setdefault(key, self._world.now)

    def _before(self, checkpoint: Fact) -> dict[int, tuple[str, str]]:
        """The webhooks that stood before it, in its own branch; its origin's disk is the first that it lands on."""
        log, end = checkpoint.log, checkpoint.seq
        first = min(end, self._cloned.get(log, end))
        place = (log, end, checkpoint.hlc)
        if place not in self._replaced:
            found = {seq: hook for seq, hook in self._hooks.get(log, {}).items() if seq < first}
            for fact in store.facts(self._world.by_id[log.origin].disk.conn) if first < end else ():
                if fact.log == log and fact.seq < end and fact.kind == CHECKPOINT:
                    found |= self._replaced.get((log, fact.seq, fact.hlc), {})
                elif fact.log == log and fact.seq < end and fact.kind == "hook":
                    found[fact.seq] = (str(fact.body["key"]), subject(fact) or "")
            self._replaced[place] = found
        return self._replaced[place]

    def forgets(self, actor: Actor, forget: Forget) -> None:
        """`actor` is about to forget what a checkpoint replaced: who else would miss it?"""
        world, conn = self._world, actor.disk.conn
        if rows.begins(conn, rows.logs(conn)[forget.log]) >= forget.checkpoint:
            return  # it has begun: another slice takes nothing from anybody
        for other in world.actors:
            head = self._most.get((other.disk.node, forget.log), 0)
            if other is actor or head >= forget.checkpoint or actor.node is None:
                continue
            peer = actor.node.membership.peers.get(other.disk.node)
            met = self._met.get(other.disk.node, world.now)
            is_voter = other.disk.node in actor.node.election.voters.voters
            if not is_voter and (peer is None or world.now - met < SETTLE_S):
                continue  # a new card in an old board: nobody waits for whom he does not know
            heard = self._booted.get(actor.disk.node, 0.0) if peer is None else peer.heard
            hold(
                world.now - heard >= world.retention.lapse_s - SETTLE_S,
                f"I9 {actor.disk.node} forgets what {other.disk.node} lacks, heard {world.now - heard:.1f} s ago",
            )

    def cloned(self, log: LogId, first: int) -> None:
        """From entry `first` on two cards may have written this log, and nobody could have told them."""
        self._cloned[log] = min(first, self._cloned.get(log, first))

    def was_written(self, log: LogId, seq: int) -> bool:
        """Was it ever on a disk?"""
        return (log, seq) in self._entries

    def is_cloned(self, log: LogId) -> bool:
        return log in self._cloned

    def called_durable(self, facts: tuple[Fact, ...]) -> None:
        for fact in facts:
            self.durable[fact.log] = max(fact.seq, self.durable.get(fact.log, 0))

    def alarmed(self, text: str) -> None:
        self._fork_alarms += text.startswith("fork:") or "two branches" in text

    def put_back(self, node: NodeId, heads: tuple[Head, ...]) -> None:
        """The node's ledger ends at `heads` again: what it had beyond may land a second time."""
        self._ends = {place: end for place, end in self._ends.items() if place[0] != node}
        self._ends.update({(node, head.log): head.seq for head in heads})
        self._let_go.pop(node, None)

    # I3, I5, I7 ----------------------------------------------------------------------------------------------
    def config_made(self, config: Voters) -> None:
        """A leader has a new config, and has told nobody: do enough of its voters hold what was taken so far?"""
        before = max(self.configs)
        changed = config_id(config) not in self.configs and config.version > self.configs[before].version
        self.configs.setdefault(config_id(config), config)
        if changed and config_id(config) > before:
            for key in self.taken:
                self._is_held(key, config, f"stands in config {config.version} of term {config.term}")

    def _is_held(self, hook_key: str, config: Voters, how: str) -> None:
        holders, wanted = self._on_disk.get(hook_key, {}), copies_needed(len(config.voters))
        copies = sum(voter in holders for voter in config.voters)
        hold(copies >= wanted, f"I5 {hook_key} {how} with {copies} of {wanted} copies")

    def called_taken(self, hook_key: str, config: Voters) -> None:
        """A node that has this config promises it."""
        holders = self._on_disk.get(hook_key, {})
        self._is_held(hook_key, config, "called taken")
        term, newest = self._newest_coordinator()
        held = not newest or newest in holders or term < config.term  # no newer one: an older one that sleeps
        hold(held, f"I3 {hook_key} called taken by a superseded coordinator: {newest} does not hold it")
        self.taken[hook_key] = None

    def _newest_coordinator(self) -> tuple[Term, NodeId]:
        active = [(a.node.election.term, a.disk.node) for a in self._world.actors if a.node and a.node.replicate.active]
        return max(active, default=(Term(0), NodeId("")))

    def acted(self, run: RunId, operation: str, key: str) -> None:
        known = self._keys.setdefault((run, operation), key)
        hold(known == key, f"I7 {operation} of run {run} was tried with keys {known} and {key}")

    # I11 -----------------------------------------------------------------------------------------------------
    def stepped(self, actor: Actor, node: Node) -> None:
        """After every event of a node."""
        disk = actor.disk
        if disk.hard is not actor.seen:
            actor.seen = disk.hard
            self._never_back(disk.node, disk.hard)
        wants, held_back = node.reconcile.waiting, node.held_back
        if wants > PEERS_MAX or held_back > HELD_BACK_MAX:
            hold(False, f"I11 {node.me} keeps {wants} wants, {held_back} held-back messages")
        if node.replicate.phase != "idle":
            unacked, hooks = node.replicate.waiting, node.intake.waiting
            hold(unacked <= UNACKED_MAX and hooks <= WAITING_MAX, "I11 a coordinator keeps too much")

    # I10, I12 while it goes on -------------------------------------------------------------------------------
    def tick(self) -> None:
        """Now and then: does a leader that nobody hears know it?"""
        for actor in self._world.actors:
            node = actor.node
            stopped = node is None or actor.stalled_until > self._world.now or actor.inbox
            if stopped or node is None or node.election.role != "leader" or self._is_heard(actor):
                self._unheard_since.pop(actor.number, None)
                continue
            since = self._unheard_since.setdefault(actor.number, self._world.now)
            alone = self._world.now - since
            hold(alone <= self._patience(), f"I12 {node.me} leads though no majority was heard for {alone:.1f} s")

    def _is_heard(self, leader: Actor) -> bool:
        world = self._world
        assert leader.node is not None
        voters = leader.node.election.voters.voters
        heard = sum(
            world.by_id[v] is leader
            or (
                world.by_id[v].node is not None
                and world.by_id[v].disk.node == v
                and world.links.reach(leader, world.by_id[v])
            )
            for v in voters
        )
        return heard > len(voters) // 2

    def _patience(self) -> float:
        """CheckQuorum's window, and what may still have been under way when the last path closed."""
        longest = self._world.network.weather.longest_s + CLOG_MAX_S
        return self._world.timings.election_max_s + longest + SETTLE_S

    def member_down(self, actor: Actor, note: MemberDown) -> None:
        """Theme `stall`: nobody who was up and heard is called failed by a node's own judgement."""
        if self._world.theme != "stall" or note.state != "failed" or "not refuted in" not in note.why:
            return
        accused = self._world.by_id[note.node]
        window = self._world.timings.suspect_max_s
        awake = self._world.now - accused.stalled_until
        well = accused.node is not None and accused.disk.node == note.node and awake > window
        hold(not well, f"I12 {actor.disk.node} calls {note.node} failed, which has been up for {awake:.1f} s")

    def deposed(self, actor: Actor, why: str) -> None:
        """Theme `return`: whoever comes back follows the leader that the others kept (rivals of its own race apart)."""
        begun = self._begun.get(actor.node.election.term, self._world.now) if actor.node else self._world.now
        racing = begun - self._elected_at < 2 * self._world.timings.election_max_s
        quiet = self._world.theme != "return" or actor.node is None or "no majority" in why
        hold(quiet or racing, f"I12 {actor.disk.node} was deposed by a node that came back: {why}")

    # at rest -------------------------------------------------------------------------------------------------
    def at_rest(self) -> None:
        world = self._world
        nodes = [actor.node for actor in world.actors if actor.node is not None]
        hold(len(nodes) == len(world.actors), "I12 a node is not up")
        hold(sum(node.replicate.active for node in nodes) == 1, "I12 no single active coordinator")
        hold(not world.hub.outbox, f"I12 {len(world.hub.outbox)} webhooks are still at the hub")
        config_is_settled(nodes)
        ledgers_agree(world, nodes, forked=bool(self._cloned))
        self._forks_are_kept()
        for node in nodes:
            missing = [key for key in self.taken if node.journal.known(key) is None]
            hold(not missing, f"I6 {node.me} lacks {missing[:3]}")
            hold(node.view(world.now).me == node.me, f"I10 {node.me} does not answer")
        self._runs_are_done(next(node for node in nodes if node.replicate.active))

    def _forks_are_kept(self) -> None:
        """The owner was told, and nobody goes on in a log that has two branches."""
        world = self._world
        forked = forks(world)
        if not forked:
            return
        world.struck("fork seen")
        hold(self._fork_alarms > 0, "I4 nobody was told of a fork")
        writing = [actor.disk.node for actor in world.actors if actor.disk.log in forked]
        hold(not writing, f"I4 {writing} go on in a log that forked")

    def _runs_are_done(self, node: Node) -> None:
        """As the coordinator's ledger tells: what nobody called taken may stand in a short branch elsewhere."""
        effects = self._world.service.effects()
        runs = node.journal.views(most=1_000_000)
        still_open = [run.run for run in runs if run.state == "open"]
        hold(not still_open, f"I12 runs still open: {still_open[:3]}")
        wanted = {run: key for run, key in self._runs.items() if run and key in self.taken}
        lost = [key for run, key in wanted.items() if effects.get(run, 0) != 1]
        hold(not lost, f"I7 webhooks without exactly one effect: {lost[:3]}")
        undone = [run.run for run in runs if run.state == "done" and effects.get(run.run, 0) != 1]
        hold(not undone, f"I7 runs without exactly one effect: {undone[:3]}")
