"""piclusterd: private AI on a home cluster.

Rooms round a hall: each sub-package is a room (its docstring says what it owns), `node` is the hall where they meet.
"""

__version__ = "0.1.0"
