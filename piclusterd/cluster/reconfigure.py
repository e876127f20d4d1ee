"""Who votes from now on: the record of voters, changed one voter at a time by the active coordinator.

Owns who said, in the term led here, that it stores the current config, and the one change under way. Refuses to choose
for the owner what the owner chose by hand, to change two voters at once, and to change anything it could not undo.

    propose(add D) ─▶ waits ─▶ may_change? ─▶ NewVoters(v+1) ─▶ election adopts, saves, sends it with its heartbeats
                        ▲            │ why not yet                    Held(term, …, config) ─▶ on_held ─▶ stored
                        └────────────┘                                                  Answer, Retire if not a voter

A config is (term, version, voters), outside any log (MongoRaftReconfig, arXiv 2102.11960). Its age is (term, version),
term first: a new leader makes its own config one of its term (`restamped`), so what an older leader changed while it
was cut off loses against it. Voters refuse candidates whose config is older than theirs. A config is changed only when

  (a) E of its voters reported, in this term, to store it: older configs can elect nobody any more;
  (b) W voters of the *next* config hold all that may have been acknowledged (its coordinator's heads when it became
      active, and its own log as far as it was called durable): every later election under the next config meets it;
  (c) the coordinator is active, and it is one voter more or one less: majorities of neighbours overlap.

And one rule that Raft does not need, since its W is a majority: nothing is acknowledged while `stored` is False. With
W=2 of four voters, two copies would not meet the majority of the three that still may elect under the config before.

`tests/model/reconfig.py` explores these rules exhaustively, and shows what each is for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal

from ..errors import PiclusterError, Unavailable, UserError
from ..events import Answer, Rules, Ticket
from ..ids import NodeId, Term
from ..wire import ConfigId, Voters
from .election import ALL_RULES, majority
from .voter_config import config_id

VOTERS_MAX = 5
"""More voters make every acknowledgement dearer and survive little more (Consul, dqlite and etcd advise the same)."""
VOTERS_MIN_BY_ITSELF = 3
"""The cluster itself never shrinks below what survives the loss of one (autopilot's MinQuorum, consul#15940)."""
CHANGE_PATIENCE_S = 60.0
"""A change that did not become possible within this long is answered with what it waited for."""
DEMOTE_AFTER_S = 14 * 86400.0
"""A voter that failed this long ago lies in a drawer: the next best takes its place, or its seat goes."""


@dataclass(frozen=True, slots=True)
class Change:
    what: Literal["add", "remove"]
    node: NodeId

    def of(self, config: Voters, term: Term) -> Voters:
        rest = [v for v in config.voters if v != self.node]
        voters = (*rest, self.node) if self.what == "add" else rest
        return Voters(config.version + 1, term, tuple(sorted(voters)))


@dataclass(frozen=True, slots=True)
class NewVoters:
    """The next config: election adopts it, saves it and tells everybody."""

    voters: Voters


@dataclass(frozen=True, slots=True)
class Retire:
    """The config without this node is stored: hand leadership over."""

    why: str


Decision = NewVoters | Retire | Answer


@dataclass(frozen=True, slots=True)
class Standing:
    """What membership knows of a node: alive, suspect, failed or left, and since when (seconds)."""

    node: NodeId
    state: str
    since_s: float
    eligible: bool
    """May vote: not a relay, and not kept a learner by its owner."""


@dataclass(frozen=True, slots=True)
class Looks:
    """What this decider asks others. All speak of what was reported in the term that is led here."""

    carries: Callable[[NodeId], bool]
    """Does this node hold all that may have been acknowledged?"""
    carried: Callable[[tuple[NodeId, ...]], bool]
    """Do W of these voters?"""
    heard: Callable[[NodeId, float], bool]
    """Was it heard within the window of CheckQuorum?"""
    saved: Callable[[], bool]
    """Has our own disk the config we have?"""


@dataclass(frozen=True, slots=True)
class _Wish:
    ticket: Ticket | None
    change: Change
    until: float


class Reconfigure:
    def __init__(self, me: NodeId, looks: Looks, rules: Rules = ALL_RULES) -> None:
        self.me = me
        self._rules = rules
        self.config = Voters()
        self._looks = looks
        self._term: Term | None = None
        self._active = False
        self._stored: dict[NodeId, None] = {}
        self._wish: _Wish | None = None
        self._made: _Wish | None = None
        """The wish whose config is out and not yet stored."""

    # looks ---------------------------------------------------------------------------------------------------
    @property
    def stored(self) -> bool:
        """E voters of the config store it, in the term led here. Until then nothing may be acknowledged."""
        said = sum(self._looks.saved() if v == self.me else v in self._stored for v in self.config.voters)
        return self._term is not None and said >= majority(len(self.config.voters))

    def knows(self, node: NodeId) -> bool:
        """Is what `node` stores of no more interest, for now?"""
        return node in self._stored and self.under_way is None

    @property
    def under_way(self) -> Change | None:
        wish = self._made or self._wish
        return wish.change if wish else None

    def deadline(self) -> float:
        return self._wish.until if self._wish else float("inf")

    def impossible(self, change: Change) -> UserError | None:
        """Why `change` cannot be right whatever happens; None if it can."""
        voters, adds = self.config.voters, change.what == "add"
        if adds == (change.node in voters):
            is_one = "is a voter already" if adds else "is no voter"
            return UserError(f"node {change.node} {is_one}", fix="See who votes: picluster status.")
        if adds and len(voters) >= VOTERS_MAX:
            return UserError(f"there are {VOTERS_MAX} voters, which is the most", fix="Remove one first.")
        if not adds and len(voters) == 1:
            return UserError("the last voter cannot be removed", fix="Add another voter first.")
        return None

    def may_change(self, change: Change, now: float) -> str | None:
        """What `change` still waits for; None when it may be made now."""
        following = change.of(self.config, 0).voters
        if not self._active:
            return "this node is not the active coordinator"
        if not self.stored:
            return "the voters have not yet confirmed the present config"
        if change.what == "add" and not self._looks.heard(change.node, now):
            return f"{change.node} is not heard"
        if change.what == "add" and self._rules.catch_up and not self._looks.carries(change.node):
            return f"{change.node} has not caught up with the ledger"
        if sum(v == self.me or self._looks.heard(v, now) for v in following) < majority(len(following)):
            return "too few of the new voters are heard: the cluster would stop"
        if self._rules.catch_up and not self._looks.carried(following):
            return "too few of the new voters hold what was acknowledged"
        return None

    def advise(self, members: Iterable[Standing], now: float) -> Change | None:
        """What the cluster should change by itself: a long-failed voter makes room. One step at a time, the seat's
        successor first, so that nothing is lost on the way."""
        if not self._active or self.under_way is not None:
            return None
        nodes = sorted(members, key=lambda m: m.node)
        voters = self.config.voters
        gone = [
            m.node for m in nodes if m.node in voters and m.state in ("failed", "left") and m.since_s >= DEMOTE_AFTER_S
        ]
        if not gone:
            return None
        heirs = [m for m in nodes if m.node not in voters and m.state == "alive" and m.eligible]
        ready = [m.node for m in heirs if self.may_change(Change("add", m.node), now) is None]
        if ready and len(voters) < VOTERS_MAX and len(voters) - len(gone) < VOTERS_MIN_BY_ITSELF:
            return Change("add", ready[0])
        return Change("remove", gone[0]) if len(voters) > VOTERS_MIN_BY_ITSELF else None

    # what happens --------------------------------------------------------------------------------------------
    def elected(self, term: Term, config: Voters) -> None:
        """This node leads `term`; `config` is its own, re-stamped with the term. Nobody is known to store it yet."""
        assert config.term == term, "a leader re-stamps its config before anything else"
        self._term, self.config, self._active, self._stored = term, config, False, {}
        if not self._rules.config_in_term:
            self._stored = dict.fromkeys(config.voters)

    def activated(self) -> None:
        self._active = True

    def deposed(self) -> list[Decision]:
        """Whatever was under way is the next coordinator's to make, or to have been made."""
        left = [wish for wish in (self._made, self._wish) if wish is not None]
        self._term, self._active, self._stored = None, False, {}
        self._made = self._wish = None
        why = "this node no longer coordinates"
        unsure = "The change may or may not last."
        refusal = Unavailable("the voters were not changed", why, unsure)
        return [out for wish in left for out in self._refuse(wish, refusal)]

    def on_held(self, sender: NodeId, term: Term, config: ConfigId | None) -> None:
        """A node said, in `term`, which config it has on its disk (None: an older release, which does not say)."""
        mine = config_id(self.config)
        same = config == mine if self._rules.config_in_term else config is not None and config.version == mine.version
        if term == self._term and sender not in self._stored and same:
            self._stored[sender] = None

    def propose(self, ticket: Ticket | None, change: Change, now: float) -> list[Decision]:
        """Answered with the `Voters` once E of them store them, or with why not. Without a ticket nobody waits."""
        wish = _Wish(ticket, change, now + CHANGE_PATIENCE_S)
        if not self._active:
            why = "only the active coordinator changes voters"
            return self._refuse(wish, Unavailable("the voters were not changed", why, "Ask again in a moment."))
        if self.under_way is not None:
            why = f"another change ({self.under_way.what} {self.under_way.node}) is under way"
            return self._refuse(wish, Unavailable("the voters were not changed", why, "Ask again in a moment."))
        if (fault := self.impossible(change)) is not None:
            return self._refuse(wish, fault)
        self._wish = wish
        return self.progress(now)

    def progress(self, now: float) -> list[Decision]:
        """Whatever became possible. Comes last in every event, when the ledger too has seen it."""
        if self._made is not None:
            return self._confirm(self._made) if self.stored else []
        wish = self._wish
        if wish is None:
            return []
        why = self.may_change(wish.change, now)
        if why is None:
            return self._make(wish)
        if now < wish.until:
            return []
        self._wish = None
        return self._refuse(wish, Unavailable("the voters were not changed", why, "Ask again when that has changed."))

    def _make(self, wish: _Wish) -> list[Decision]:
        assert self._term is not None
        self.config = wish.change.of(self.config, self._term)
        self._stored, self._wish, self._made = {}, None, wish
        return [NewVoters(self.config)]

    def _confirm(self, made: _Wish) -> list[Decision]:
        self._made = None
        out: list[Decision] = [] if made.ticket is None else [Answer(made.ticket, self.config)]
        return out if self.me in self.config.voters else [*out, Retire("this node is no voter any more")]

    @staticmethod
    def _refuse(wish: _Wish, why: PiclusterError) -> list[Decision]:
        return [] if wish.ticket is None else [Answer(wish.ticket, why)]
