"""Errands: what a line of the schedule does. Pure; the line's words are in the event that began the run.

    hub-health     look (hub /health) ─┐
    triage-report  count (the runs)    ├─▶ [post] ─▶ Finish(done, what was found out)
    prompt         ask (a model)       │
    batch          ask, ask, …        ─┘

Of a batch each question is a step of its own, so another coordinator goes on where one fell; nobody waits for it, so
the droplet is asked first and the Pis where it cannot.

Where the line has a `post_url` the text goes there as JSON; the address stays in the configuration, since it may hold a
secret, and the ledger knows the line's name only. The post carries the run's id as `Idempotency-Key`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Literal

import msgspec

from .. import ids
from ..ids import RunId
from ..views import RunView
from ..wire import Hook
from .workflow import AskModel, Call, Finish, Results, Step

ANSWER_TOKENS_MAX = 1024
TEXT_CHARS_MAX = 8000
"""Of what is found out; more does not fit a chat message anyway."""


class _Errand(msgspec.Struct, frozen=True):
    name: str
    what: Literal["hub-health", "triage-report", "prompt", "batch"]
    prompt: str = ""
    prompts: tuple[str, ...] = ()
    post: bool = False


class Errands:
    name = "errand"

    def __init__(self, model: str) -> None:
        self._model = model

    def wants(self, hook: Hook) -> str | None:
        errand = _errand(hook)
        return None if errand is None else f"{errand.name}: {errand.what}"

    def next(self, run: RunId, hook: Hook, results: Results) -> Step:
        errand = _errand(hook)
        if errand is None:
            return Finish("failed", "this is no line of a schedule")
        asked = (
            [f"find-{number}" for number in range(1, len(errand.prompts) + 1)] if errand.what == "batch" else ["find"]
        )
        open_ = [number for number, step in enumerate(asked) if step not in results]
        if open_:
            return (
                self._find(run, errand) if asked == ["find"] else self._ask(errand.prompts[open_[0]], asked[open_[0]])
            )
        text = "\n\n".join(str(results[step].get("text", "")) for step in asked)[:TEXT_CHARS_MAX]
        if errand.post and "post" not in results:
            return Call("post", "post", "text", {"line": errand.name, "text": text}, ids.uuid4_of(run, "post"))
        return Finish("done", text)

    def _find(self, run: RunId, errand: _Errand) -> Step:
        match errand.what:
            case "hub-health":
                return Call("find", "hub", "health", {}, ids.uuid4_of(run, "find"))
            case "triage-report":
                return Call("find", "cluster", "triage_report", {}, ids.uuid4_of(run, "find"))
            case _:
                return self._ask(errand.prompt, "find", prefer="")

    def _ask(self, prompt: str, step: str, prefer: str = "relay") -> Step:
        messages = [{"role": "user", "content": prompt}]
        body = {"model": self._model, "messages": messages, "max_tokens": ANSWER_TOKENS_MAX}
        return AskModel(step, body, prefer)


def _errand(hook: Hook) -> _Errand | None:
    if hook.source != "schedule":
        return None
    try:
        return msgspec.json.decode(hook.body, type=_Errand)
    except msgspec.DecodeError:
        return None


def triage_report(runs: Iterable[RunView]) -> str:
    """One paragraph on the runs of triage: how many ended how, what they were called, what waits for a person."""
    triaged = [run for run in runs if run.workflow == "triage"]
    states = Counter(run.state for run in triaged)
    verdicts = Counter(run.detail.split(":")[0] for run in triaged if run.state == "done")
    counted = ", ".join(f"{count} {state}" for state, count in sorted(states.items())) or "none"
    called = ", ".join(f"{count} × {verdict}" for verdict, count in verdicts.most_common())
    dead = [f"{run.title}: {run.detail}" for run in triaged if run.state == "failed"]
    lines = [f"Runs of triage: {counted}.", f"Verdicts: {called}." if called else "", *dead]
    return "\n".join(line for line in lines if line)[:TEXT_CHARS_MAX]
