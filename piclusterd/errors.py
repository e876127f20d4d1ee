"""The one tree of errors. Each says whose fault it is, whether state changed, and the HTTP status it becomes.

    PiclusterError
    ├── UserError        400  the caller's fault; nothing changed
    │   ├── ConfigError   –   the operator's file; the daemon does not start
    │   ├── NotFound     404
    │   ├── TooLong      400  more than the model can read
    │   └── Refused      403  identity, token or signature does not allow it
    ├── Unavailable      503  nobody's fault; try again after `retry_after_s`; nothing changed
    │   └── Overloaded   429
    └── Broken           500  ours, or the disk's; state may be partly changed, the text says how

Junk from a peer is *returned* as `wire.Dropped`, never raised past the decoder. Programmer errors assert.
"""

from __future__ import annotations


class PiclusterError(Exception):
    """`what` happened, `why`, and the `fix` a person can apply; all three are shown to the user."""

    status = 500

    def __init__(self, what: str, why: str = "", fix: str = "") -> None:
        super().__init__(what)
        self.what, self.why, self.fix = what, why, fix

    def __str__(self) -> str:
        joint = ":" if self.why[:1].islower() else "."
        return _joined(_joined(self.what, joint, self.why), ".", self.fix)


def _joined(first: str, joint: str, second: str) -> str:
    """As sentences: with `joint` where both say something and the first ends with no mark of its own."""
    if not first or not second:
        return first or second
    return f"{first} {second}" if first[-1] in ".!?:;" else f"{first}{joint} {second}"


class UserError(PiclusterError):
    """The request cannot be right as it stands. Nothing changed."""

    status = 400

    def __init__(self, what: str, why: str = "", fix: str = "", param: str | None = None) -> None:
        super().__init__(what, why, fix)
        self.param = param


class NotFound(UserError):
    status = 404


class Refused(UserError):
    """The caller is known not to be allowed, or cannot show who it is. Nothing changed."""

    status = 403


class TooLong(UserError):
    """What is asked does not fit the model's context. Clients look at `code`: it is OpenAI's."""

    code = "context_length_exceeded"


class ConfigError(UserError):
    """Every fault of a configuration at once, one `file:line: key: fault` a line in `faults`."""

    def __init__(self, faults: list[str]) -> None:
        super().__init__("the configuration has faults:\n  " + "\n  ".join(faults))
        self.faults = faults


class Unavailable(PiclusterError):
    """It would work at another time or on another node. Nothing changed."""

    status = 503

    def __init__(self, what: str, why: str = "", fix: str = "", retry_after_s: float = 2.0) -> None:
        super().__init__(what, why, fix)
        self.retry_after_s = retry_after_s


class Overloaded(Unavailable):
    status = 429


class Broken(PiclusterError):
    """Our fault or the machine's; the text says what may have changed."""
