"""What `picluster selftest` sends through: one step outside the node's own head, and the end.

    hook (source selftest, signed with a key of the hub's token) ─▶ Call("echo") ─▶ Finish

It takes the way of every run (intent, act, result, each on W ledgers) and touches nothing that anybody would see.
"""

from __future__ import annotations

from ..ids import RunId
from ..integrations.signatures import delivery_id
from ..wire import Hook
from .workflow import Call, Finish, Results, Step

SOURCE = "selftest"


class Selftest:
    name = "selftest"

    def wants(self, hook: Hook) -> str | None:
        if hook.source != SOURCE:
            return None
        return f"selftest {delivery_id(SOURCE, {}, hook.body)}".rstrip()

    def next(self, run: RunId, hook: Hook, results: Results) -> Step:
        if "echo" not in results:
            return Call("echo", SOURCE, "echo", {}, f"{run}:echo")
        return Finish("done", f"echoed by {results['echo']['node']}")
