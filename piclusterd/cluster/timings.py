"""The two presets of protocol timings. All in seconds, all on the monotonic clock of one node.

Raft wants broadcast time << election timeout << time between failures (Ongaro §3.9). On SD cards one fsync can stall
for seconds (k3s#2853: 7.45 s), so `pi` waits as Consul does on small machines; `lan` is for SSDs and idle cores.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Timings:
    heartbeat_s: float
    """Leader → everybody. At most a fifth of `election_min_s`, so that lost ones are no reason to campaign."""
    election_min_s: float
    election_max_s: float
    """A follower campaigns after a uniformly random silence in [min, max]; also the leader's window for CheckQuorum."""
    probe_s: float
    """SWIM protocol period: one member is probed each."""
    probe_timeout_s: float
    """Direct answer expected within; then indirect probes until the period ends."""
    suspect_min_s: float
    suspect_max_s: float
    """A suspect is failed after this long unrefuted; confirmations move it from max to min (Lifeguard §IV.B)."""
    push_pull_s: float
    """Comparison of member lists with one random peer; only what differs is sent."""
    sync_s: float
    """Least time between two offers of ledger heads to one peer."""
    gossip_s: float = 0.2
    """Between two rounds of random gossip, while there is news to tell (memberlist's LAN value)."""


PRESETS = {
    "pi": Timings(0.5, 3.0, 6.0, 1.0, 0.5, 4.0, 8.0, 15.0, 1.0),
    "lan": Timings(0.1, 0.5, 1.0, 0.5, 0.2, 1.0, 2.0, 10.0, 0.25),
}
