"""The safety rules by name; `events` offers them to whoever asks deciders to go without one (`sim.ablations`)."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Rules:
    """Safety rules, each behind a switch so that the simulator can show that its absence would be caught."""

    term_fencing: bool = True
    """A replica answers `Held` only to the newest term it knows, and the coordinator counts only its own term's."""
    recovery_barrier: bool = True
    """A new coordinator serves only after it holds what a majority of the voters held in its term."""
    enough_copies: bool = True
    """W = max(2, N - E + 1) voters hold what is called durable; without: the coordinator alone will do."""
    pre_vote: bool = True
    """Who heard no leader first asks whether a majority would vote, and keeps its term until then."""
    check_quorum: bool = True
    """A leader that heard no majority for an election timeout steps down."""
    config_in_term: bool = True
    """E voters store a leader's config in its own term before it counts on any, or changes any."""
    catch_up: bool = True
    """A new voter, and W voters of every next config, hold what was acknowledged before."""
    epoch_bump: bool = True
    """A disk that was put back goes on in a new log."""
    lag_discard: bool = True
    """A node that was itself stalled takes what it did not hear meanwhile for no evidence."""
    prune_lapse: bool = True
    """Pruning waits for every member that has not lapsed, however silent it is."""
