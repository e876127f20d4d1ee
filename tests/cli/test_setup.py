"""`init`, `join`, `token`, `config` on real state directories; the admitting node's desk is the real one."""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import msgspec
import pytest
from aiohttp import web

from piclusterd.cluster import identity, tokens
from piclusterd.cluster.discovery import Advert, Discovery
from piclusterd.cluster.join import Founding, JoinDesk
from piclusterd.config_file import load
from piclusterd.wire import Voters

from .command import picluster

TOKEN = re.compile(r"sudo picluster join (pcl1\.\S+)")


@pytest.fixture
def first(tmp_path: Path) -> Path:
    return tmp_path / "pi-1"


@pytest.fixture
async def founded(first: Path) -> str:
    """A cluster founded by the command; its output."""
    result = await picluster("init", "--cluster", "home", "--name", "pi-1", "--expect", "2", "--state-dir", str(first))
    assert (result.code, result.err) == (0, "")
    return result.out


@pytest.fixture
async def desk(founded: str, first: Path) -> AsyncIterator[str]:
    """`host:port` of the first node's peer listener."""
    me = identity.load(first)
    assert me is not None

    async def sealed(_: Voters) -> None:
        pass

    book = tokens.Tokens(me.directory, me.ca_pin)
    app = web.Application()
    app.add_routes(JoinDesk(me, book, Founding(me.directory), lambda: ["192.0.2.1:7946"], sealed, tuple).routes())
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0, ssl_context=me.server_context()).start()
    yield f"127.0.0.1:{runner.addresses[0][1]}"
    await runner.cleanup()


def mode(path: Path) -> int:
    return path.stat().st_mode & 0o777


def secret_in(text: str) -> str:
    match = TOKEN.search(text)
    assert match is not None
    return match.group(1)


@pytest.fixture
def open_directory() -> Iterator[Path]:
    """One that other users may enter; pytest closes its own to them."""
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o755)
        yield Path(name)


async def test_init_makes_an_identity_and_prints_how_to_join(founded: str, first: Path) -> None:
    me = identity.load(first)
    assert me is not None
    assert (me.name, me.cluster, me.can_issue) == ("pi-1", "home", True)
    assert tokens.parse(secret_in(founded)).ca_pin == me.ca_pin
    assert (mode(first), mode(me.directory), mode(me.directory / "ca.key")) == (0o700, 0o700, 0o600)


async def test_a_second_init_is_refused_and_changes_nothing(founded: str, first: Path) -> None:
    before = (first / "identity" / "ca.pem").read_bytes()
    result = await picluster("init", "--cluster", "other", "--state-dir", str(first))
    assert result.code == 1
    assert result.err.startswith("error: this node already belongs to a cluster\n")
    assert (first / "identity" / "ca.pem").read_bytes() == before


async def test_join_makes_a_member_and_remembers_its_peers(founded: str, desk: str, tmp_path: Path) -> None:
    second = tmp_path / "pi-2"
    result = await picluster("join", secret_in(founded), "--server", desk, "--name", "pi-2", "--state-dir", str(second))
    assert (result.code, result.err) == (0, "")
    me = identity.load(second)
    assert me is not None
    assert (me.name, me.cluster) == ("pi-2", "home")
    told = msgspec.json.decode((me.directory / "joined.json").read_bytes())
    assert told["peers"] == ["192.0.2.1:7946"]
    assert msgspec.convert(told["voters"], Voters).version == 1


async def test_without_a_server_the_cluster_is_found_over_mdns(
    founded: str, desk: str, first: Path, tmp_path: Path
) -> None:
    me = identity.load(first)
    assert me is not None
    advert = Advert(me.node, me.cluster_id, me.name, int(desk.rpartition(":")[2]), admits=True)
    discovery = Discovery(advert, lambda _: None, ("127.0.0.1",))
    discovery.start()
    try:
        result = await picluster(
            "join", secret_in(founded), "--name", "pi-2", "--state-dir", str(tmp_path / "pi-2"),
            PICLUSTER_DISCOVERY_INTERFACES="127.0.0.1",
        )  # fmt: skip
    finally:
        await discovery.close()
    assert (result.code, result.err) == (0, "")


async def test_a_used_token_is_refused_in_words(founded: str, desk: str, tmp_path: Path) -> None:
    codes = []
    for name in ("pi-2", "pi-3"):
        result = await picluster(
            "join", secret_in(founded), "--server", desk, "--name", name, "--state-dir", str(tmp_path / name)
        )
        codes.append(result.code)
    assert codes == [0, 1]
    assert result.err.startswith("error: the join token is used\n")
    assert identity.load(tmp_path / "pi-3") is None


async def test_a_token_that_is_none_is_refused_without_being_repeated(tmp_path: Path) -> None:
    result = await picluster("join", "pcl1.not-a-token", "--server", "127.0.0.1:1", "--state-dir", str(tmp_path))
    assert result.code == 1
    assert "not-a-token" not in result.err


async def test_a_node_that_is_not_there_is_told(founded: str, tmp_path: Path) -> None:
    result = await picluster(
        "join", secret_in(founded), "--server", "127.0.0.1:1", "--name", "x", "--state-dir", str(tmp_path / "x")
    )
    assert result.code == 1
    assert result.err.startswith("error: cannot reach 127.0.0.1:1\n")


async def test_tokens_are_made_listed_and_revoked(founded: str, first: Path) -> None:
    state = ("--state-dir", str(first))
    made = await picluster("token", "create", "--ttl", "30m", "--uses", "2", *state)
    assert "valid 30m, 2 uses" in made.out
    made_id = tokens.parse(secret_in(made.out)).id
    assert (await picluster("token", "revoke", made_id, *state)).code == 0
    listed = await picluster("token", "ls", *state)
    assert f"{made_id}  revoked" in listed.out
    assert secret_in(made.out).rsplit(".", 1)[1] not in listed.out
    assert (await picluster("token", "revoke", "nosuch", *state)).code == 1


@pytest.mark.parametrize("ttl", ["1", "h", "-1h", "1w", "1h30m"])
async def test_a_life_that_is_none_is_refused(founded: str, first: Path, ttl: str) -> None:
    result = await picluster("token", "create", f"--ttl={ttl}", "--state-dir", str(first))
    assert result.code == 1
    assert "is not a duration" in result.err


async def test_tokens_need_a_node_that_admits(tmp_path: Path) -> None:
    result = await picluster("token", "create", "--state-dir", str(tmp_path))
    assert result.code == 1
    assert result.err.startswith(f"error: no node lives in {tmp_path}\n")


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can act for another user")
async def test_as_root_the_files_belong_to_the_owner_of_the_state_directory(open_directory: Path) -> None:
    daemon = 65534
    state = open_directory / "state"
    state.mkdir()
    os.chown(state, daemon, daemon)
    result = await picluster("init", "--cluster", "home", "--name", "a", "--state-dir", str(state))
    assert (result.code, result.err) == (0, "")
    assert {path.stat().st_uid for path in state.rglob("*")} == {daemon}


async def test_config_check_reads_the_policies_of_triage_too(tmp_path: Path) -> None:
    path, policy = tmp_path / "c.toml", tmp_path / "triage.toml"
    path.write_text('[triage]\npolicy_file = "triage.toml"\n')
    policy.write_text("[default]\nauto = 3\n[teams.LIN]\nquiet = 7\n")
    result = await picluster("config", "check", "--config", str(path))
    assert result.code == 1
    assert f"{policy}:2: default.auto:" in result.err
    assert f"{policy}:4: teams.LIN.quiet:" in result.err
    policy.write_text('[teams.LIN]\nmode = "suggest"\n')
    assert (await picluster("config", "check", "--config", str(path))).out == "The configuration is sound.\n"


async def test_config_check_reports_all_faults(tmp_path: Path) -> None:
    path = tmp_path / "p.toml"
    path.write_text("[api]\nport = -1\nprot = 1\n")
    result = await picluster("config", "check", "--config", str(path))
    assert result.code == 1
    assert f"{path}:2: api.port" in result.err
    assert f"{path}:3: api.prot" in result.err
    path.write_text("")
    assert (await picluster("config", "check", "--config", str(path))).out == "The configuration is sound.\n"


async def test_secrets_that_only_the_service_sees_do_not_stop_the_operator(first: Path, tmp_path: Path) -> None:
    path = tmp_path / "p.toml"
    path.write_text(f'[node]\nstate_dir = "{first}"\nname = "pi-9"\n[linear]\ntoken_file = "credential"\n')
    config = ("--config", str(path))
    assert (await picluster("config", "check", *config)).code == 1
    assert (await picluster("config", "check", "--no-files", *config)).code == 0
    assert (await picluster("init", "--cluster", "home", "--expect", "1", *config)).code == 0
    me = identity.load(first)
    assert me is not None
    assert me.name == "pi-9"


async def test_config_show_prints_a_file_that_means_the_same(tmp_path: Path) -> None:
    path = tmp_path / "p.toml"
    path.write_text('[triage]\nlabels = { bug = "It\'s \\"bad\\"" }\n[[models]]\nname = "a"\npath = "builtin:x"\n')
    shown = tmp_path / "shown.toml"
    shown.write_text((await picluster("config", "show", "--config", str(path), PICLUSTER_API_PORT="9")).out)
    assert load(shown, {}) == load(path, {"PICLUSTER_API_PORT": "9"})


async def test_config_show_default_is_the_shipped_file() -> None:
    shipped = Path(__file__).parents[2] / "config" / "piclusterd.toml"
    assert (await picluster("config", "show", "--default")).out == shipped.read_text()
