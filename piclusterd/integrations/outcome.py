"""How a call of an outside service fails: what a run needs to know is whether, and when, to try again.

Every client in this room raises `CallFailed` and nothing else for what the service or the network did.
"""

from __future__ import annotations

from ..errors import PiclusterError


class CallFailed(PiclusterError):
    """A service outside did not do what was asked.

    `retryable`: the same call may succeed later; whether this one took effect is then unknown, so it must be repeated
    with the same key. `retry_after_s`: what the service asked for, in seconds; None where it said nothing.
    """

    status = 502

    def __init__(
        self, what: str, why: str = "", fix: str = "", *, retryable: bool, retry_after_s: float | None = None
    ) -> None:
        super().__init__(what, why, fix)
        self.retryable = retryable
        self.retry_after_s = retry_after_s
