"""From token bytes to text that may be shown: whole characters only, and never a part of a stop string.

A token may end inside a UTF-8 character, and a stop string may be spread over several tokens; both are held back until
they are decided. Pure.
"""

from __future__ import annotations

import codecs


class TextStream:
    """The text of one answer. After a stop string has been seen, `stopped` is true and nothing follows."""

    def __init__(self, stops: tuple[str, ...] = ()) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._stops = stops
        self._held = ""
        self.stopped = False

    def push(self, piece: bytes) -> str:
        """The text that `piece` (the bytes of one token) makes certain."""
        self._held += self._decoder.decode(piece)
        return self._release()

    def finish(self) -> str:
        """What was held back, once no more tokens follow."""
        self._held += self._decoder.decode(b"", final=True)
        text = self._release()
        rest, self._held = self._held, ""
        return text if self.stopped else text + rest

    def _release(self) -> str:
        if self.stopped:
            return ""
        hits = [at for stop in self._stops if (at := self._held.find(stop)) >= 0]
        if hits:
            self.stopped = True
            text, self._held = self._held[: min(hits)], ""
            return text
        keep = max((_overlap(self._held, stop) for stop in self._stops), default=0)
        cut = len(self._held) - keep
        text, self._held = self._held[:cut], self._held[cut:]
        return text


def _overlap(text: str, stop: str) -> int:
    """Length of the longest proper prefix of `stop` that `text` ends with."""
    for length in range(min(len(stop) - 1, len(text)), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0
