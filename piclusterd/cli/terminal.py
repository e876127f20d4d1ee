"""What reaches the terminal: text made harmless, tables, and faults as what / why / fix.

Names, titles, model output and error texts come from other machines and from strangers. `clean` makes every control
character visible, so that none of them moves the cursor, sets the title or hides text (CWE-150).
Tables and colours only on a terminal; elsewhere plain aligned columns. NO_COLOR is honoured by rich.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from ..errors import PiclusterError, Unavailable

if TYPE_CHECKING:
    from rich.console import Console

CELL_CHARACTERS_MAX = 80
"""Of one table cell: a longer name would push everything else off the screen."""
STYLES = {"alive": "green", "suspect": "yellow", "failed": "red", "left": "dim", "ok": "green", "degraded": "yellow"}
STYLES |= {"down": "red", "fault": "red", "warning": "yellow", "note": "dim"}

_HARMFUL = {
    code: f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"
    for start, end in ((0x00, 0x20), (0x7F, 0xA0), (0x200E, 0x2010), (0x2028, 0x202F), (0x2066, 0x206A))
    for code in range(start, end)
}
"""C0, DEL, C1, and Unicode's line separators and direction overrides."""
_HARMFUL_IN_PROSE = {code: shown for code, shown in _HARMFUL.items() if chr(code) not in "\n\t"}


class Unreachable(Unavailable):
    """The daemon does not answer at all."""


def clean(text: object, *, prose: bool = False) -> str:
    """`text` with control characters made visible; `prose` keeps line breaks and tabs."""
    return str(text).translate(_HARMFUL_IN_PROSE if prose else _HARMFUL)


def cell(text: object) -> str:
    shown = clean(text) or "-"
    return shown if len(shown) <= CELL_CHARACTERS_MAX else shown[: CELL_CHARACTERS_MAX - 1] + "…"


def console() -> Console:
    """stdout without rich's own ideas: no markup, no highlighting, no emoji names in other people's text."""
    from rich.console import Console

    return Console(markup=False, highlight=False, emoji=False, soft_wrap=True)


def columns(out: Console, titles: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """One table. A cell that is a word of `STYLES` gets its colour on a terminal."""
    shown = [[cell(value) for value in row] for row in rows]
    if not out.is_terminal:
        widths = [max(len(line[i]) for line in (titles, *shown)) for i in range(len(titles))]
        for line in (titles, *shown):
            out.print("  ".join(value.ljust(width) for value, width in zip(line, widths, strict=True)).rstrip())
        return
    from rich.table import Table
    from rich.text import Text

    table = Table(*titles, box=None, pad_edge=False, header_style="bold")
    for row in shown:
        table.add_row(*(Text(value, style=STYLES.get(value, "")) for value in row))
    out.print(table)


def show_fault(fault: PiclusterError) -> None:
    """what / why / fix on stderr, a line each."""
    for label, text in (("error", fault.what), ("why", fault.why), ("fix", fault.fix)):
        if text:
            print(f"{label + ':':<7}{clean(text, prose=True)}", file=sys.stderr)


def size(count: int) -> str:
    """Bytes in GB as boards are sold: 8 GB is 8 * 2**30."""
    return f"{count / 2**30:.1f}G"


def ago(seconds: float | None) -> str:
    """Age in one unit: 0.4s, 9s, 12m, 3h, 4d."""
    if seconds is None:
        return "now"
    if seconds < 1:
        return f"{seconds:.1f}s"
    for unit, length in (("d", 86400), ("h", 3600), ("m", 60)):
        if seconds >= length:
            return f"{seconds / length:.0f}{unit}"
    return f"{seconds:.0f}s"


def plural(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"
