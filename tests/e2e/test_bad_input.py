"""What must be refused, by real daemons: forged webhooks, faulty files, taken ports, strangers."""

from __future__ import annotations

import io
import socket
from collections.abc import AsyncIterator
from pathlib import Path

import aiohttp
import pytest
import pytest_asyncio

from piclusterd.demo.cluster import LOOPBACK, MODEL, Cluster, Member
from piclusterd.demo.signing import sign
from tests.cli.command import Result, picluster

from .rig import Rig, alarm, daemon, running

pytestmark = [pytest.mark.e2e, pytest.mark.asyncio(loop_scope="module")]

EX_CONFIG = 78
OTHER_SECRET = "not-the-one-of-the-hub"


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def rig(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Rig]:
    """One node whose secret for Linear is not the hub's, and one of whose two models is no GGUF at all."""
    root = Path(tmp_path_factory.mktemp("bad"))
    corrupt = root / "corrupt.gguf"
    corrupt.write_bytes(b"GGUF" + b"\xff" * 4096)
    extra = f'[[models]]\nname = "corrupt"\npath = "{corrupt}"\n'
    async with running(root, secret=OTHER_SECRET, size=1, extra=extra) as made:
        yield made


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def idle(tmp_path_factory: pytest.TempPathFactory) -> Member:
    """A founded node whose daemon does not run."""
    cluster = Cluster(Path(tmp_path_factory.mktemp("idle")), size=1)
    (member,) = cluster.prepare()
    await cluster.picluster(member, "init", "--cluster", "alone", "--name", member.name, "--expect", "1")
    return member


# webhooks --------------------------------------------------------------------------------------------------------
async def test_the_hub_answers_401_to_a_wrong_signature(rig: Rig) -> None:
    assert rig.world.hub is not None
    _, body = rig.world.new_issue("Forged", "by a stranger")
    headers = sign("linear", body, "a guess")
    async with rig.cluster.http.post(f"{rig.world.hub.url}/hooks/linear", data=body, headers=headers) as answer:
        assert answer.status == 401


async def test_the_cluster_trusts_no_hub_and_refuses_what_the_provider_did_not_sign(rig: Rig) -> None:
    _, body = rig.world.new_issue("Forged by the hub", "")
    assert await rig.world.post(rig.cluster.http, body), "the hub has it"

    told = await alarm(rig.cluster, rig.member, "of the hub refused")
    assert "signature" in told
    view = await rig.cluster.status(rig.member)
    assert view is not None
    assert view["hooks"] == 0
    assert view["runs"] == []


async def test_a_node_answers_401_to_a_wrong_signature(rig: Rig) -> None:
    _, body = rig.world.new_issue("Forged", "straight to the node")
    headers = sign("linear", body, "a guess")
    async with rig.cluster.http.post(f"{rig.member.url}/hooks/linear", data=body, headers=headers) as answer:
        assert answer.status == 401
        assert (await answer.json())["error"]["code"] == "invalid_signature"


async def test_a_body_over_a_mebibyte_is_refused(rig: Rig) -> None:
    big = io.BytesIO(b"x" * (1024 * 1024 + 1))
    async with rig.cluster.http.post(f"{rig.member.url}/hooks/linear", data=big) as answer:
        assert answer.status == 413


# models ----------------------------------------------------------------------------------------------------------
async def test_a_corrupt_model_is_told_and_the_rest_works(rig: Rig) -> None:
    async with rig.cluster.http.get(f"{rig.member.url}/livez") as answer:
        assert answer.status == 200
    log = (rig.member.home / "piclusterd.log").read_text()
    assert "corrupt" in log
    async with rig.cluster.http.post(f"{rig.member.url}/v1/chat/completions", json=chat(MODEL)) as answer:
        assert answer.status == 200
    corrupt, patient = chat("corrupt"), aiohttp.ClientTimeout(total=30)  # a young node says of nothing that it is not
    async with rig.cluster.http.post(f"{rig.member.url}/v1/chat/completions", json=corrupt, timeout=patient) as answer:
        assert answer.status in (404, 503)
        assert "corrupt" in (await answer.json())["error"]["message"]


def chat(model: str) -> dict[str, object]:
    return {"model": model, "messages": [{"role": "user", "content": "hello"}], "max_tokens": 4}


# the command line ------------------------------------------------------------------------------------------------
async def test_three_faults_of_a_configuration_are_all_told_with_file_and_line(tmp_path: Path) -> None:
    config = tmp_path / "faulty.toml"
    config.write_text('[node]\nname = "pi 1"\n\n[api]\nport = 99999\n\n[cluster]\npresett = "lan"\n')
    ended = await daemon(config)
    assert ended.code == EX_CONFIG
    for line, key in ((2, "node.name"), (5, "api.port"), (8, "cluster.presett")):
        assert f"{config}:{line}: {key}" in ended.err
    assert_readable(ended)


async def test_a_daemon_without_identity_says_how_to_get_one(tmp_path: Path) -> None:
    config = tmp_path / "piclusterd.toml"
    config.write_text(f'[node]\nstate_dir = "{tmp_path / "state"}"\n')
    ended = await daemon(config)
    assert ended.code == EX_CONFIG
    assert "belongs to no cluster" in ended.err
    assert "picluster init" in ended.err
    assert_readable(ended)


@pytest.mark.parametrize("section", ["peers", "api"])
async def test_a_port_that_is_taken_ends_the_daemon_with_the_port_named(idle: Member, section: str) -> None:
    port = idle.peer_port if section == "peers" else idle.api_port
    with socket.create_server((LOOPBACK, port)):
        ended = await daemon(idle.config)
    assert ended.code == EX_CONFIG
    assert f"cannot listen on {LOOPBACK}:{port}" in ended.err
    assert f"[{section}]" in ended.err
    assert_readable(ended)


async def test_a_second_daemon_on_one_state_directory_is_refused_and_the_first_goes_on(rig: Rig) -> None:
    ended = await daemon(rig.member.config)
    assert ended.code == EX_CONFIG
    assert "another piclusterd runs on" in ended.err
    assert_readable(ended)
    assert await rig.cluster.status(rig.member) is not None


@pytest.mark.parametrize("wrong", ["secret", "pin"])
async def test_a_join_with_a_wrong_token_is_refused_and_leaves_no_identity(
    rig: Rig, tmp_path: Path, wrong: str
) -> None:
    parts = (await rig.cluster.token()).split(".")
    place = 1 if wrong == "pin" else 3
    parts[place] = flipped(parts[place])
    state = tmp_path / "stranger"
    server = f"{LOOPBACK}:{rig.member.peer_port}"
    ended = await picluster("join", ".".join(parts), "--server", server, "--name", "x", "--state-dir", str(state))
    assert ended.code == 1, ended
    assert "Traceback" not in ended.err
    assert parts[3] not in ended.out + ended.err, "a secret is not repeated"
    assert not (state / "identity" / "joined.json").exists()
    view = await rig.cluster.status(rig.member)
    assert view is not None
    assert len(view["members"]) == 1


def flipped(text: str) -> str:
    """Another text of the same alphabet and length."""
    middle = len(text) // 2
    return text[:middle] + ("a" if text[middle] != "a" else "b") + text[middle + 1 :]


def assert_readable(ended: Result) -> None:
    assert "Traceback" not in ended.err
    assert ended.out == ""
