"""The age of a record of voters: what election compares and `reconfigure` makes.

A config is named and ordered by (term, version), term first (MongoRaftReconfig, arXiv 2102.11960): a new leader stamps
its own config with its term, so that a config which an older leader made while it was cut off loses against it,
whatever its version. By (version, term) the older one would win, and elect a coordinator that lacks acknowledged
entries. `tests/model` has the trace.
"""

from __future__ import annotations

from ..ids import Term
from ..wire import ConfigId, Voters


def config_id(config: Voters) -> ConfigId:
    return ConfigId(config.term, config.version)


def is_newer(config: Voters, than: Voters) -> bool:
    return (config.term, config.version) > (than.term, than.version)


def restamped(config: Voters, term: Term) -> Voters:
    """The same voters as a config of `term`: what its new leader stores before anything else."""
    return Voters(config.version, term, config.voters)
