"""Moderation by a real text classifier: a daemon serves it, and it answers a quick look and `/v1/moderations`.

The classifier is the tiny BERT of `make_hf`: its weights are random, so what it makes of a text is looked up first and
the thresholds are laid between two texts.
"""

from __future__ import annotations

import asyncio
import json
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from piclusterd.demo.linear_flows_double import LinearFlowsDouble
from tests.inference.make_hf import PROMPTS

from .rig import Rig, running
from .test_moderation import listening, shown

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.skipif(
        find_spec("torch") is None or find_spec("transformers") is None,
        reason="the extra `hf` is not installed: `make test HF=1` does",
    ),
]

MADE_S = 240
"""For torch to be imported and the tiny models to be made on a busy board."""
LOADED_S = 120.0
BAD = ("spam", "insult")
MODEL = "moderator"


async def made(directory: Path) -> list[dict[str, float]]:
    """The models, in `directory`: what plain transformers makes of each of `PROMPTS`."""
    child = await asyncio.create_subprocess_exec(sys.executable, "-m", "tests.inference.make_hf", str(directory))
    async with asyncio.timeout(MADE_S):
        assert await child.wait() == 0
    told: list[dict[str, float]] = json.loads((directory / "expected.json").read_text())["classifier"]
    return told


async def classifier_is_there(rig: Rig) -> bool:
    views = await rig.cluster.views()
    return any(facts["name"] == MODEL for view in views for one in view["members"] for facts in one["facts"]["models"])


async def moderated(rig: Rig, text: str, model: str) -> dict[str, Any]:
    async with rig.cluster.http.post(
        f"{rig.member.url}/v1/moderations", json={"input": text, "model": model}
    ) as answer:
        told: dict[str, Any] = await answer.json()
        assert answer.status == 200, told
        return told


async def test_a_classifier_answers_the_quick_look_and_the_moderations_api(tmp_path: Path) -> None:
    expected = await made(tmp_path / "models")
    scores = [max(one[label] for label in BAD) for one in expected]
    order = sorted(range(len(PROMPTS)), key=scores.__getitem__)
    calm, rude = order[0], order[-1]
    between = (scores[calm] + scores[rude]) / 2
    assert scores[rude] - scores[calm] > 0.01, scores
    linear = LinearFlowsDouble()
    async with listening() as (url, got):
        (tmp_path / "url").write_text(url)
        extra = (
            f'[[models]]\nname = "{MODEL}"\npath = "{tmp_path / "models" / "classifier"}"\ncontext = 512\n'
            f'[moderation]\nmode = "on"\nhow = "classify"\nmodel = "{MODEL}"\nlabels = {json.dumps(BAD)}\n'
            f"clean_below = {between}\nflagged_from = {between}\n"
            f'[notify]\nwebhook_url_file = "{tmp_path / "url"}"\n[triage]\nmode = "off"\n'
        )
        async with running(tmp_path, size=1, with_model=(), linear=linear, extra=extra) as rig:
            await rig.cluster.until(lambda: classifier_is_there(rig), "the classifier", LOADED_S)
            for at, verdict in ((calm, "clean (none"), (rude, "flagged (other")):
                issue = linear.create_issue(f"Crash {at}", "It crashes.")["data"]["identifier"]
                await rig.world.post(rig.cluster.http, json.dumps(linear.say(issue, PROMPTS[at])).encode())
                run = await shown(rig, f"{issue}: comment by", state="done")
                assert run["detail"] == f"{verdict}, {scores[at]:.2f}) by {MODEL}"
            assert [one["title"] for one in got] == [f"{issue}: comment flagged"]
            for at in (calm, rude):
                told = await moderated(rig, PROMPTS[at], "omni-moderation-latest")
                (result,) = told["results"]
                insult = expected[at]["insult"]
                assert (told["model"], result["flagged"]) == (MODEL, insult >= 0.5)
                assert result["category_scores"]["harassment"] == pytest.approx(insult, abs=1e-4)
