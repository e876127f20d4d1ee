"""Batches: many requests in a file, answered in order however many coordinators it takes. Pure.

    lines from 0 ─▶ lines from 37 ─▶ … ─▶ lines from the last ─▶ finish: output and error file ─▶ Finish(done)

Each step works through as many lines as its time allows and says where the next begins, so another coordinator goes on
at the first line without an answer. The answers themselves are files (`shelf`); the ledger holds how many there are and
where. What was answered in a step that no result tells of is answered again; of each line one answer counts. A model
that nobody has is waited for until the batch expires, which the service tells.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import msgspec

from .. import ids
from ..ids import RunId
from ..wire import Hook
from .workflow import Call, Finish, Results, Step

NAME = "batch"
FINISH = "finish"


class Wish(msgspec.Struct, frozen=True):
    """What is to be answered: the body of the event. Times in Unix seconds."""

    id: str
    endpoint: str
    file: str
    total: int
    created_at: int
    expires_at: int
    owner: str = ""
    keep_s: int = 30 * 86400
    """How long its output is kept."""


@dataclass(frozen=True, slots=True)
class Progress:
    """What the results of a run say: the first line without an answer, and the files of those with one."""

    next: int = 0
    completed: int = 0
    failed: int = 0
    parts: tuple[str, ...] = ()
    expired: bool = False


def hook_of(wish: Wish) -> Hook:
    """The event that begins it. Its id is its key: the same batch begins once."""
    return Hook(NAME, wish.id, "created", msgspec.json.encode(wish))


def wish_of(hook: Hook) -> Wish | None:
    if hook.source != NAME:
        return None
    try:
        return msgspec.json.decode(hook.body, type=Wish)
    except msgspec.DecodeError:
        return None


def step_of(line: int) -> str:
    return f"lines-{line}"


def progress(results: Mapping[str, Mapping[str, Any]]) -> Progress:
    """The steps are followed from line 0, so that what belongs to no chain does not count."""
    at = Progress()
    while not at.expired and (value := results.get(step_of(at.next))) is not None:
        expired = bool(value.get("expired"))
        at = Progress(
            int(value["next"]) if expired else max(int(value["next"]), at.next + 1),
            at.completed + int(value["completed"]),
            at.failed + int(value["failed"]),
            (*at.parts, *([str(value["part"])] if value.get("part") else ())),
            expired,
        )
    return at


class Batch:
    name = NAME

    def wants(self, hook: Hook) -> str | None:
        wish = wish_of(hook)
        return None if wish is None else f"{wish.id}: {wish.total} × {wish.endpoint}"

    def next(self, run: RunId, hook: Hook, results: Results) -> Step:
        wish = wish_of(hook)
        if wish is None:
            return Finish("failed", "this is no batch")
        at = progress(results)
        if FINISH in results:
            return Finish("done", f"{at.completed} answered, {at.failed} failed, of {wish.total}")
        told = {**msgspec.to_builtins(wish), "next": at.next}
        if at.next < wish.total and not at.expired:
            return self._call(run, step_of(at.next), "lines", told)
        counted = {"parts": list(at.parts), "completed": at.completed, "failed": at.failed, "expired": at.expired}
        return self._call(run, FINISH, FINISH, {**told, **counted})

    def _call(self, run: RunId, step: str, operation: str, arguments: Mapping[str, Any]) -> Call:
        return Call(step, NAME, operation, arguments, ids.uuid4_of(run, step), patient=True)
