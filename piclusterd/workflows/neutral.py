"""Words that a stranger or a model chose, made safe to show: `plain` for a line of text, `neutral` for Markdown.

A reader's renderer is the target: hidden or reordered characters, HTML, images that call home, links, mentions that
notify people, references that link issues. Such things are removed and nothing is escaped, because renderers differ in
what they unescape. Sources: Unicode TR 36 §3 (bidirectional and invisible characters), CommonMark 0.31, GFM autolinks.
"""

from __future__ import annotations

import re
import unicodedata

LINE_CHARS_MAX = 4096
"""Taken of any input before the patterns run, so that their cost is bounded."""


def plain(text: str, chars_max: int) -> str:
    """`text` on one line of at most `chars_max`, without control, bidirectional, zero-width or surrogate characters."""
    kept = ("" if unicodedata.category(c)[0] == "C" and not c.isspace() else c for c in text)
    return " ".join("".join(kept).split())[:chars_max].rstrip()


_NEUTRALISE: tuple[tuple[re.Pattern[str], str], ...] = (
    (re.compile(r"<[^<>]{0,500}>"), " "),  # HTML; autolinks
    (re.compile(r"!?\[([^\[\]]{0,500})\]\([^()]{0,500}\)"), r" \1 "),  # links and images: the text stays
    (re.compile(r"[<>\[\]@#`*~|\\!]"), ""),  # markup, mentions, references; before the URLs, lest they join one up
    (re.compile(r"\b(?:[a-z][a-z0-9+.-]{1,20}://|(?:mailto|tel|data|file|javascript):)\S{0,500}", re.I), " "),
    (re.compile(r"\b(?:[\w-]{1,63}\.){1,8}[a-z]{2,24}/\S{0,500}", re.I), " "),  # host/path without a scheme
    (re.compile(r"://"), " "),
    (re.compile(r"(?<=\w)\.(?=[A-Za-z]{2})"), "\u2024"),  # bare hosts are linked by eager renderers; looks the same
    (re.compile(r"\b([A-Z][A-Z0-9]{0,9})-(?=\d)"), "\\1\u2011"),  # LIN-12 would become a reference; non-breaking hyphen
)
"""Applied in this order; each repetition is bounded."""


def neutral(text: str, chars_max: int) -> str:
    """`text` made inert for Markdown on one line: no markup, link, image, mention or reference; at most `chars_max`."""
    line = plain(unicodedata.normalize("NFKC", text[:LINE_CHARS_MAX]), LINE_CHARS_MAX)  # fullwidth signs are signs too
    for pattern, replacement in _NEUTRALISE:
        line = pattern.sub(replacement, line)
    return " ".join(line.split())[:chars_max].rstrip()
