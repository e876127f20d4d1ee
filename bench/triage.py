"""Triage's quality on labelled issues, before and after people corrected it: real models, no cluster.

    issues ─┬ first: triaged; a person makes each what its label says (a case; a correction where that differs) … 50 ─┐
            └ rest, held out: triaged with what was learnt (after) and without (before) ◀─────────────────────────────┘

For each encoder (none, words, a sentence encoder): agreement by field, calibration error, the share that could be
automatic at 95 % precision. The difference stands beside the lower end of its 95 % interval (bootstrap over issues).

The model is the demo model unless --model names another GGUF; the encoder all-MiniLM-L6-v2 where `make encoder` has put
it. Issues: --issues FILE (JSONL, see `triage_issues`), else those of a made-up team. Nothing here is timed.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import click

from bench.report import Report, main
from bench.triage_issues import Issue, of_cupboard, read
from piclusterd.events import Choice, Fact, WhoServes
from piclusterd.ids import LogId, NodeId
from piclusterd.inference.models import ModelSpec
from piclusterd.inference.pool import Pool
from piclusterd.inference.serving import Serving
from piclusterd.memory import Memory
from piclusterd.workflows.cases import Cases
from piclusterd.workflows.triage_ask import Asker
from piclusterd.workflows.triage_decide import Verdict
from piclusterd.workflows.triage_issue import Issue as Told
from piclusterd.workflows.triage_issue import Team
from piclusterd.workflows.triage_policy import Policy
from piclusterd.workflows.triage_prompt import BODY_BYTES_MAX
from piclusterd.workflows.triage_report import Judged, calibration_error, share_at
from piclusterd.workflows.workflow import AskModel, Call

DEMO = Path(__file__).parents[1] / "piclusterd/inference/demo_model/triage-demo.gguf"
ENCODER = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / (
    "piclusterd/models/all-minilm-l6-v2/all-minilm-l6-v2-f16.gguf"
)
ME = NodeId("b" * 16)
CORRECTIONS = 50
HELD_OUT, HELD_OUT_QUICK = 300, 120
MADE, MADE_QUICK = 500, 260
SEED = 7
RESAMPLES = 2000
CONTEXT = 4096
FIELDS = ("type", "priority")
LOG = LogId(ME, 1)
Found = list[tuple[Verdict, Issue]]


@dataclass(slots=True)
class Bureau:
    """One node with its models, and what it remembers."""

    serving: Serving
    policy: Policy
    cases: Cases

    async def verdict(self, number: int, issue: Issue) -> tuple[Verdict, dict[str, Any]]:
        """As the workflow would decide, and what the memory said on the way."""
        asker, memory = Asker("model", BODY_BYTES_MAX), Memory(lambda: self.cases, self.serving.embed)
        told = Told(id=f"i-{number}", identifier=f"T-{number}", title=issue.title, description=issue.body, team=Team())
        results: dict[str, Mapping[str, Any]] = {"reason": {"failed": "not needed here"}}
        while True:
            step = asker.verdict("", told, self.policy, results)
            match step:
                case Verdict():
                    return step, dict(results.get("similar", {}))
                case AskModel():
                    results[step.name] = await self.serving.complete(step.request, step.prefer)
                case Call():
                    results[step.name] = await memory.perform(step.operation, step.arguments, step.key)
                case _:
                    raise AssertionError(step)

    async def lesson(self, number: int, issue: Issue) -> bool:
        """A person makes the issue what it should be. True where that was not what triage had said."""
        verdict, similar = await self.verdict(number, issue)
        parts: dict[str, Any] = {"team": "", "title": issue.title}
        parts |= {name: similar.get(name, b"") for name in ("encoder", "vector")}
        for name in FIELDS:
            judged = verdict.fields[name]
            parts[f"odds.{name}"] = dict(verdict.odds.get(name, {}))
            parts |= {f"said.{name}": [judged.value, judged.raw, judged.confidence],
                      f"human.{name}": getattr(issue, name)}  # fmt: skip
        for record in self.cases.records({"issue": f"i-{number}", "set": parts}, 1):
            self.cases.grow(Fact(LOG, number + 1, 1, record.kind, record.body, hlc=number))
        return any(verdict.fields[name].value != getattr(issue, name) for name in FIELDS)


@asynccontextmanager
async def serving(model: Path, encoder: Path | None) -> AsyncIterator[Serving]:
    pool = Pool(queue_max=64, load_timeout_s=300)
    threads = max(1, (os.cpu_count() or 2) // 2)
    named = [("model", model), *([("encoder", encoder)] if encoder else [])]
    await pool.start([ModelSpec(name, path, path.stat().st_size, CONTEXT, 1, threads, threads) for name, path in named])
    for name, _ in named:
        assert await pool.settled(name) == "ready", pool.states()

    async def who(ask: WhoServes) -> Choice:
        return Choice(ME, "bench", ask.model, "there is no other")

    def relay(peer: NodeId, name: str, body: bytes) -> Any:
        raise AssertionError("there is no other node")

    try:
        yield Serving(ME, pool, who, relay)
    finally:
        await pool.close()


async def compare(report: Report, issues: list[Issue], held_out: int, model: Path) -> None:
    encoders = {"no history": "", "words": "words"}
    encoder = ENCODER if ENCODER.is_file() else None
    if encoder is not None:
        encoders["all-MiniLM-L6-v2"] = "encoder"
    first, rest = issues[:-held_out], issues[-held_out:]
    async with serving(model, encoder) as house:
        before = await triaged(Bureau(house, Policy(encoder=""), Cases()), rest)
        tell(report, "before", before)
        for name, asked in encoders.items():
            if asked:
                bureau = Bureau(house, Policy(encoder=asked), Cases())
                corrected, seen = await taught(bureau, first)
                after = await triaged(bureau, rest)
                title = f"after {corrected} corrections in {seen} issues, {name}"
                tell(report, title, after)
                gained(report, title, before, after, is_real=asked == "encoder" and corrected >= CORRECTIONS)
    if encoder is None:
        report.add("a sentence encoder is not here: `make encoder` fetches it", 0, "")


async def taught(bureau: Bureau, issues: list[Issue]) -> tuple[int, int]:
    """Lessons until CORRECTIONS of them were corrections: (corrections, issues)."""
    corrected = 0
    for number, issue in enumerate(issues):
        corrected += await bureau.lesson(number, issue)
        if corrected == CORRECTIONS:
            return corrected, number + 1
    return corrected, len(issues)


async def triaged(bureau: Bureau, issues: list[Issue]) -> Found:
    """Nothing is learnt on the way."""
    return [((await bureau.verdict(-1 - number, issue))[0], issue) for number, issue in enumerate(issues)]


def tell(report: Report, title: str, found: Found) -> None:
    for name in FIELDS:
        judged = [_judged(name, verdict, issue) for verdict, issue in found]
        report.add(f"{title}: {name}, agreement", 100 * _share([right for _, right in judged]), "%")
        report.add(f"{title}: {name}, calibration error", 100 * calibration_error(judged), "%")
        report.add(f"{title}: {name}, automatic at 95 % precision", 100 * share_at(judged)[1], "%")
    report.add(f"{title}: both, agreement", 100 * _share([_both(*one) for one in found]), "%")


def gained(report: Report, title: str, before: Found, after: Found, is_real: bool) -> None:
    """What corrections brought, and how much of it is certain."""
    steps = [_both(*new) - _both(*old) for old, new in zip(before, after, strict=True)]
    rng = Random(SEED)
    means = sorted(sum(rng.choices(steps, k=len(steps))) / len(steps) for _ in range(RESAMPLES))
    report.add(f"{title}: both, gain", 100 * sum(steps) / len(steps), "points")
    low = 100 * means[int(0.025 * RESAMPLES)]
    report.add(f"{title}: both, gain, lower end of 95 %", low, "points", at_least=0.0 if is_real else None)
    hand = [step for step, (_, issue) in zip(steps, after, strict=True) if issue in HAND_WRITTEN]
    if hand:
        report.add(f"{title}: both, gain on {len(hand)} written by hand", 100 * sum(hand) / len(hand), "points")


HAND_WRITTEN: set[Issue] = set()


def _judged(name: str, verdict: Verdict, issue: Issue) -> Judged:
    judged = verdict.fields[name]
    return judged.confidence, judged.value == getattr(issue, name)


def _both(verdict: Verdict, issue: Issue) -> bool:
    return all(_judged(name, verdict, issue)[1] for name in FIELDS)


def _share(flags: list[bool]) -> float:
    return sum(flags) / max(len(flags), 1)


def measure(report: Report, quick: bool, issues: Path | None = None, model: Path = DEMO) -> None:
    held_out = HELD_OUT_QUICK if quick else HELD_OUT
    if issues is None:
        from bench.triage_issues import HAND

        HAND_WRITTEN.update(read(HAND))
        labelled = of_cupboard(MADE_QUICK if quick else MADE, SEED)
    else:
        labelled = read(issues)
        held_out = min(held_out, len(labelled) // 2)
    asyncio.run(compare(report, labelled, held_out, model))


OPTIONS = (
    click.option("--issues", type=click.Path(exists=True, path_type=Path), help="labelled issues, JSONL"),
    click.option("--model", type=click.Path(exists=True, path_type=Path), default=DEMO, help="a GGUF that triages"),
)

if __name__ == "__main__":
    main("triage", measure, *OPTIONS)
