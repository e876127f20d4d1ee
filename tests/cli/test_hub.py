"""`picluster hub` against a real hub, and its deploy against a double that checks every call."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from pathlib import Path

import aiohttp
import pytest

from piclusterd.demo.cloudflare_double import ACCOUNT, CloudflareDouble
from piclusterd.demo.doubles import Fault
from piclusterd.integrations.cloudflare import VARIABLES, Cloudflare, worker_source
from tests.integrations.rig import TOKEN, Rig, fresh

from .command import Result, picluster

NAME = "piclusterd-hub"


@pytest.fixture
async def hub(tmp_path: Path) -> AsyncIterator[Rig]:
    async with aiohttp.ClientSession() as http:
        rig = Rig("python", tmp_path, http)
        await rig.start(HUB_NACK_LIMIT="1")
        yield rig
        assert rig.hub is not None
        await rig.hub.kill()


def config_of(home: Path, url: str) -> str:
    (home / "hub.token").write_text(TOKEN + "\nnext-token\n")
    (home / "linear.secret").write_text("lin-secret\n")
    path = home / "piclusterd.toml"
    path.write_text(
        f'[hub]\nurl = "{url}"\ntoken_file = "hub.token"\n[webhooks]\nlinear_secret_file = "linear.secret"\n'
    )
    return str(path)


async def bury(hub: Rig, count: int) -> None:
    """`count` dead letters, seq 1 on."""
    await hub.accept(count)
    line = await hub.dial()
    await line.seqs(count)
    for seq in range(1, count + 1):
        await line.send(type="nack", seq=seq, retry_after_s=0, why="\x1b]0;evil")
        assert (await line.receive())["type"] == "dead"
    await line.ws.close()
    await hub.until(connected=None)


async def test_health_says_what_waits_and_what_it_cost(hub: Rig, tmp_path: Path) -> None:
    await hub.accept(2)
    await hub.call("POST", "/sources/github/pause")
    said = await picluster("hub", "health", "--config", config_of(tmp_path, hub.url))
    assert said.code == 0, said.err
    lines = dict(line.split(":", 1) for line in said.out.splitlines())
    assert lines["waiting"].strip().startswith("2 webhooks, the oldest for")
    assert lines["paused"].strip() == "github, 0 kept back"
    assert "of 100000 rows" in lines["quota"]


async def test_dead_letters_are_listed_replayed_and_purged(hub: Rig, tmp_path: Path) -> None:
    config = config_of(tmp_path, hub.url)
    await bury(hub, 3)
    listed = await picluster("hub", "dead", "--config", config)
    assert [line.split()[0] for line in listed.out.splitlines()] == ["SEQ", "1", "2", "3"]
    assert "\x1b" not in listed.out
    replayed = await picluster("hub", "replay", "2", "--config", config)
    assert replayed.out == "2 goes out again as 4.\n"
    assert (await picluster("hub", "purge", "2", "--yes", "--config", config)).code == 1
    kept = await picluster("hub", "purge", "--all", "--config", config, stdin="n\n")
    assert kept.code == 130
    assert (await hub.health())["dead"] == 2
    purged = await picluster("hub", "purge", "--all", "--yes", "--config", config)
    assert purged.out == "2 dead letters thrown away.\n"
    assert (await hub.health())["dead"] == 0
    assert (await picluster("hub", "replay", "--config", config)).code == 64


async def test_a_source_is_paused_and_resumed(hub: Rig, tmp_path: Path) -> None:
    config = config_of(tmp_path, hub.url)
    assert (
        await picluster("hub", "pause", "linear", "--config", config)
    ).out == "linear is paused; 0 webhooks moved.\n"
    await hub.post("linear", fresh())
    resumed = await picluster("hub", "resume", "linear", "--config", config)
    assert resumed.out == "linear is no longer paused; 1 webhook moved.\n"


async def test_no_hub_and_a_hub_that_is_away_are_told(tmp_path: Path) -> None:
    (tmp_path / "empty.toml").write_text("")
    nowhere = await picluster("hub", "health", "--config", str(tmp_path / "empty.toml"))
    assert (nowhere.code, "no hub is configured" in nowhere.err) == (1, True)
    away = await picluster("hub", "health", "--config", config_of(tmp_path, "http://127.0.0.1:9"))
    assert away.code == 3


# --- deploy


@pytest.fixture
async def cloudflare() -> AsyncIterator[CloudflareDouble]:
    async with CloudflareDouble() as double:
        yield double


async def deploy(double: CloudflareDouble, *words: str, key: str = "") -> Result:
    environ = {"PICLUSTER_CLOUDFLARE_URL": double.url, "CLOUDFLARE_API_TOKEN": key or double.key}
    return await picluster("hub", "deploy", "--account", ACCOUNT, *words, **environ)


async def test_a_first_deploy_uploads_migrates_and_says_the_address(
    cloudflare: CloudflareDouble, tmp_path: Path
) -> None:
    said = await deploy(cloudflare, "--secrets", "--config", config_of(tmp_path, "https://hub.example"))
    assert (said.code, said.err) == (0, "")
    script = cloudflare.scripts[NAME]
    assert script.module == worker_source()
    assert (script.migration_tag, script.enabled, script.uploads) == ("v1", True, 1)
    assert script.secrets == {"HUB_TOKEN": TOKEN, "HUB_TOKEN_NEXT": "next-token", "LINEAR_SECRET": "lin-secret"}
    assert said.out.endswith('[hub] url = "https://piclusterd-hub.demo-home.workers.dev"\n')
    assert not any(secret in said.out for secret in script.secrets.values())
    assert cloudflare.violations == []


async def test_what_is_unchanged_is_not_uploaded_and_a_change_keeps_secrets_and_storage(
    cloudflare: CloudflareDouble, tmp_path: Path
) -> None:
    await deploy(cloudflare, "--secrets", "--config", config_of(tmp_path, "https://hub.example"))
    again = await deploy(cloudflare)
    assert "unchanged" in again.out
    script = cloudflare.scripts[NAME]
    assert script.uploads == 1
    changed = await deploy(cloudflare, "--ai-model", "@cf/meta/llama-3.1-8b-instruct-fast")
    assert changed.code == 0, changed.err
    script = cloudflare.scripts[NAME]
    assert (script.uploads, script.migration_tag, len(script.secrets)) == (2, "v1", 3)
    assert {"type": "ai", "name": "AI"} in script.bindings
    assert cloudflare.violations == []


async def test_a_dry_run_changes_nothing(cloudflare: CloudflareDouble) -> None:
    said = await deploy(cloudflare, "--dry-run")
    assert "would be uploaded" in said.out
    assert cloudflare.scripts == {}


async def test_a_strangers_worker_is_left_alone(cloudflare: CloudflareDouble) -> None:
    async with aiohttp.ClientSession() as http:
        api = Cloudflare(http, ACCOUNT, cloudflare.key, cloudflare.url)
        await api.upload(await api.plan(worker_source(), VARIABLES, NAME), worker_source(), VARIABLES)
    cloudflare.scripts[NAME].migration_tag = None
    said = await deploy(cloudflare)
    assert said.code == 1
    assert "that is not this hub" in said.err


async def test_faults_of_cloudflare_are_told_with_their_cure(cloudflare: CloudflareDouble) -> None:
    wrong = await deploy(cloudflare, key="another")
    assert (wrong.code, "Workers Scripts: Edit" in wrong.err) == (1, True)
    for fault, words in (
        (Fault("ratelimited", 60), "Try again in 60 s"),
        (Fault("unavailable"), "and no JSON"),
        (Fault("malformed"), "and no JSON"),
        (Fault("internal"), "and no JSON"),
    ):
        cloudflare.faults.append(fault)
        said = await deploy(cloudflare)
        assert said.code == 1
        assert words in said.err
        assert cloudflare.key not in said.err
    assert cloudflare.scripts == {}


def test_the_deploy_sends_what_wrangler_would() -> None:
    text = (Path(__file__).parents[2] / "forwarder/wrangler.jsonc").read_text()
    told = json.loads("\n".join(line for line in text.splitlines() if not line.strip().startswith("//")))
    from piclusterd.integrations import cloudflare as ours

    assert (told["name"], told["main"], told["compatibility_date"]) == (
        ours.SCRIPT,
        ours.MODULE,
        ours.COMPATIBILITY_DATE,
    )
    assert told["migrations"] == [{"tag": ours.TAG, "new_sqlite_classes": [ours.CLASS]}]
    assert told["vars"] == dict(VARIABLES)
