"""What an answer's headers say of the node that gave it."""

from __future__ import annotations

import re

from ..events import Choice


def node_headers(choice: Choice) -> dict[str, str]:
    why = re.sub(r"[^\x20-\x7e]", "?", choice.reason)  # a peer's name is in it: no header may be injected
    return {"X-Picluster-Node": re.sub(r"[^\x21-\x7e]", "?", choice.name or choice.node), "X-Picluster-Why": why}
