"""What the coordinator tells people unasked: runs that were given up, and alarms. Each becomes an event, and so a run.

    LedgerGrew(run.done, failed) ─┐  on the coordinator
    Activated: dead letters there ├─▶ hook "notice:…" ─▶ W ledgers ─▶ a run of `notice` ─▶ webhook, ntfy, Linear
    LedgerAlarm, on any node ─────┘  known by its key: told once, whoever coordinates

An end in the ledger is found again by the next coordinator, so that none is lost with the one that fell before it told.
Notices carry titles made inert and our own words; a run of `notice` that fails is not told of.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
from collections.abc import Awaitable, Callable, Iterable

import msgspec

from .config import Notify
from .errors import PiclusterError
from .events import Activated, Fact, HookTaken, LedgerAlarm, LedgerGrew, Note
from .wire import Hook
from .workflows.journal import Journal, Run
from .workflows.neutral import plain
from .workflows.notice import EVENT, Notices, Words
from .workflows.notifying import TEXT_MAX, TITLE_MAX

log = logging.getLogger("piclusterd")

TRIES = 5
RETRY_S = 3.0
"""Five of them outlast an election."""
TOLD_MAX = 50
"""Dead letters told of at a takeover; more are a flood, and stand in `picluster jobs ls`."""

TakeHook = Callable[[Hook], Awaitable[HookTaken]]


class Crier:
    """`take_hook` as the desk's; `journal()` is the node's fold; `leads()`: this node coordinates."""

    def __init__(
        self,
        policy: Notify,
        name: str,
        take_hook: TakeHook,
        journal: Callable[[], Journal],
        leads: Callable[[], bool],
        retry_s: float = RETRY_S,
    ) -> None:
        self._policy = policy
        self._name = name
        self._take_hook = take_hook
        self._journal = journal
        self._leads = leads
        self._retry_s = retry_s
        self._tasks: set[asyncio.Task[None]] = set()
        self._any = bool(policy.webhook_url_file or policy.ntfy_url_file or policy.linear_team)

    def hear(self, note: Note) -> None:
        """Called for every note of the node; returns at once."""
        for hook in self._hooks(note) if self._any else ():
            task = asyncio.create_task(self._tell(hook), name=f"notice {hook.key}")
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _hooks(self, note: Note) -> Iterable[Hook]:
        match note:
            case LedgerGrew(facts) if self._policy.dead_letters and self._leads():
                return [hook for fact in facts if (hook := self._of_fact(fact)) is not None]
            case Activated() if self._policy.dead_letters:
                dead = [run for run in self._journal().runs.values() if run.state == "failed"]
                dead.sort(key=lambda run: run.hlc, reverse=True)
                return [hook for run in dead[:TOLD_MAX] if (hook := _given_up(run)) is not None]
            case LedgerAlarm(text) if self._policy.alarms:
                return [_alarm(self._name, text)]
            case _:
                return ()

    def _of_fact(self, fact: Fact) -> Hook | None:
        if fact.kind != "run.done" or fact.body.get("outcome") != "failed":
            return None
        run = self._journal().standing(fact.body["run"])
        return None if run is None else _given_up(run)

    async def _tell(self, hook: Hook) -> None:
        for _ in range(TRIES):
            try:
                await self._take_hook(hook)
                return
            except PiclusterError as fault:
                log.info("a notice waits: %s", fault)
            await asyncio.sleep(self._retry_s)
        log.error("a notice was not taken: %s", hook.key)


def _given_up(run: Run) -> Hook | None:
    """Known by the entry that ended it: a run that is given up again is told of again."""
    if run.done is None or run.state != "failed" or run.workflow == Notices.name:
        return None
    (_, log_id, seq), _, detail = run.done
    title = f"given up: {run.workflow}, {run.title}"
    text = f"{plain(detail, TEXT_MAX // 2)}\nTry it again with `picluster jobs retry {run.run[:8]}`."
    words = Words(plain(title, TITLE_MAX), text, 4, ("warning",))
    return Hook("cluster", f"notice:{run.run}:{log_id.origin}:{log_id.epoch}:{seq}", EVENT, msgspec.json.encode(words))


def _alarm(name: str, text: str) -> Hook:
    digest = hashlib.sha256(f"{name}\0{text}".encode()).hexdigest()[:32]
    words = Words(plain(f"alarm on {name}", TITLE_MAX), plain(text, TEXT_MAX), 5, ("rotating_light",))
    return Hook("cluster", f"notice:alarm:{digest}", EVENT, msgspec.json.encode(words))
