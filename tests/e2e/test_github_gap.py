"""What GitHub could not deliver while no node was up is asked for again by the coordinator that comes after."""

from __future__ import annotations

import asyncio
from contextlib import closing
from pathlib import Path

import pytest

from piclusterd.demo.github_double import HOOK_ID, REPOSITORY, GitHubDouble
from piclusterd.ledger import database, store

from .rig import Rig, running

pytestmark = [pytest.mark.e2e]

SECRET = "github-secret"
MADE_UP_S = 60.0


def pushes(rig: Rig) -> list[str]:
    """The bodies of GitHub's events in the ledger of the first node."""
    with closing(database.open_reader(rig.member.state / "ledger.db")) as conn:
        hooks = [fact.body for fact in store.facts(conn) if fact.kind == "hook"]
    return [str(hook["body"]) for hook in hooks if hook["source"] == "github"]


async def test_deliveries_that_failed_during_an_outage_come_once_after_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "secret").write_text(SECRET)
    (tmp_path / "token").write_text("ghp_demo")
    monkeypatch.setenv("PICLUSTER_WEBHOOKS_GITHUB_SECRET_FILE", str(tmp_path / "secret"))
    monkeypatch.setenv("PICLUSTER_GITHUB_TOKEN_FILE", str(tmp_path / "token"))
    monkeypatch.setenv("PICLUSTER_GITHUB_HOOK", f"{REPOSITORY}/{HOOK_ID}")
    async with GitHubDouble("ghp_demo", SECRET) as github:
        monkeypatch.setenv("PICLUSTER_GITHUB_URL", github.url)
        async with running(tmp_path, with_model=()) as rig:
            github.hook_url = f"{rig.member.url}/hooks/github"
            assert (await github.deliver("push", {"n": 1})).status_code == 200
            await asyncio.gather(*map(rig.cluster.stop, rig.cluster.members))
            lost = [(await github.deliver("push", {"n": n})).status_code for n in (2, 3)]
            assert lost == [502, 502]
            await asyncio.gather(*map(rig.cluster.start, rig.cluster.members))

            async def all_there() -> bool:
                return len(pushes(rig)) == 3

            await rig.cluster.until(all_there, "what was lost is in the ledger", MADE_UP_S)
            await rig.cluster.until_equal()
        assert github.violations == []
        assert len(pushes(rig)) == 3, "each once"
