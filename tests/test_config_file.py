"""The loader: defaults, file, environment, and every fault at once with its place."""

from __future__ import annotations

import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest

from piclusterd.config import Config
from piclusterd.config_file import load, read_secret
from piclusterd.config_keys import LISTS, render_default, sections
from piclusterd.errors import ConfigError

SHIPPED = Path(__file__).parents[1] / "config" / "piclusterd.toml"


Write = Callable[[str], Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def write(text: str) -> Path:
        path = tmp_path / "piclusterd.toml"
        path.write_text(text, encoding="utf-8")
        return path

    return write


def faults(path: Path | None, environ: dict[str, str] | None = None) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load(path, environ or {})
    return list(caught.value.faults)


def test_shipped_file_is_the_rendered_defaults_byte_for_byte() -> None:
    assert SHIPPED.read_bytes() == render_default().encode(), (
        "regenerate: write piclusterd.config_keys.render_default() into it"
    )


def test_shipped_file_loads_to_the_defaults() -> None:
    assert load(SHIPPED, {}) == load(None, {})


def test_shipped_file_holds_every_key() -> None:
    tables = tomllib.loads(render_default())
    plain = {name: set(keys) for name, keys in sections().items() if name not in LISTS}
    assert {name: set(table) for name, table in tables.items()} == plain
    for section in LISTS:
        listed = render_default().partition(f"# [[{section}]]")[2]
        assert [name for name in sections()[section] if f"# {name} = " not in listed] == []


def test_every_key_has_a_text() -> None:
    assert [key.dotted for keys in sections().values() for key in keys.values() if not key.doc] == []


def test_defaults_stand_without_file_and_environment() -> None:
    config = load(None, {})
    assert config.peers == Config().peers
    assert config.state_dir == Path("/var/lib/piclusterd")
    assert config.api.socket == "/var/lib/piclusterd/api.sock"


def test_environment_wins_over_the_file(write: Write) -> None:
    path = write('[api]\nport = 1000\nhost = "127.0.0.1"\n')
    config = load(path, {"PICLUSTER_API_PORT": "2000", "PICLUSTER_DISCOVERY_ENABLED": "false"})
    assert (config.api.port, config.api.host, config.discovery.enabled) == (2000, "127.0.0.1", False)


def test_environment_gives_lists_tables_and_floats() -> None:
    config = load(
        None,
        {
            "PICLUSTER_PEERS_SEEDS": "a:1, [::1]:2",
            "PICLUSTER_TRIAGE_LABELS": "bug=Defect,chore=Task",
            "PICLUSTER_LEDGER_COMMIT_DELAY_S": "0.5",
            "PICLUSTER_NODE_STATE_DIR": "/srv/p",
        },
    )
    assert config.peers.seeds == ("a:1", "[::1]:2")
    assert config.triage.labels == {"bug": "Defect", "chore": "Task"}
    assert config.ledger.commit_delay_s == 0.5
    assert config.state_dir == Path("/srv/p")


def test_models_are_tables(write: Write) -> None:
    path = write('[[models]]\nname = "a"\npath = "builtin:triage-demo"\n[[models]]\nname = "b"\npath = "b.gguf"\n')
    (path.parent / "b.gguf").write_bytes(b"")
    first, second = load(path, {}).models
    assert (first.name, first.path, first.slots) == ("a", "builtin:triage-demo", 4)
    assert second.path == str(path.parent / "b.gguf")


def test_all_faults_are_reported_at_once_with_file_and_line(write: Write) -> None:
    path = write(
        '[api]\nport = 99999\nprot = 1\n\n[peers]\nport = "7946"\n[hubb]\n[cluster]\npreset = "fast"\n'
        '[[models]]\nname = "a"\npath = "builtin:x"\n[[models]]\nname = "a"\nslots = 0\n'
    )
    assert faults(path, {"PICLUSTER_TRIAGE_MODE": "loud"}) == [
        f"{path}:2: api.port: 99999 is not legal here (legal: whole number, 0 to 65535)",
        f"{path}:3: api.prot: unknown key; did you mean port?",
        f"{path}:6: peers.port: '7946' is not legal here (legal: whole number, 0 to 65535)",
        f"{path}:7: hubb: unknown section; did you mean hub?",
        f'{path}:9: cluster.preset: \'fast\' is not legal here (legal: "pi" or "lan")',
        f"{path}:15: models[2].slots: 0 is not legal here (legal: whole number, 1 to 64)",
        f"{path}:13: models[2].path: missing (legal: text, not empty)",
        "$PICLUSTER_TRIAGE_MODE: triage.mode: 'loud' is not legal here"
        ' (legal: "off" or "shadow" or "suggest" or "apply")',
        f'{path}:14: models[2].name: "a" already names model 1',
    ]


def test_a_syntax_error_names_its_line(write: Write) -> None:
    path = write("[api]\nport = \n")
    (fault,) = faults(path)
    assert fault.startswith(f"{path}:2: not TOML: ")
    assert "at line" not in fault


def test_a_file_that_was_named_must_be_there(tmp_path: Path) -> None:
    assert faults(tmp_path / "none.toml") == [f"{tmp_path}/none.toml: cannot be read: No such file or directory"]


def test_bytes_that_are_no_text_are_a_fault(tmp_path: Path) -> None:
    path = tmp_path / "p.toml"
    path.write_bytes(b"\xff\xfe")
    assert faults(path) == [f"{path}: cannot be read: it is not UTF-8 text"]


@pytest.mark.parametrize("text", ["api = 3", "models = 3", "[models]\nname = 'x'", "[[api]]\nport = 3", "models = [3]"])
def test_tables_of_the_wrong_shape_are_faults(write: Write, text: str) -> None:
    assert faults(write(text))


def test_the_value_of_an_unknown_key_is_not_shown(write: Write) -> None:
    path = write('[hub]\ntoken = "s3cret"\n')
    found = faults(path, {"PICLUSTER_LINEAR_TOKEN": "s3cret"})
    assert len(found) == 2
    assert "s3cret" not in str(found)


def test_misspelt_sections_in_the_environment_are_faults_and_strangers_are_not() -> None:
    assert faults(None, {"PICLUSTER_LEGDER_COMMIT_DELAY_S": "1", "PICLUSTER_HOST": "http://x", "PICLUSTER_CI_ID": "3"})[
        0
    ].startswith("$PICLUSTER_LEGDER_COMMIT_DELAY_S: legder: unknown section; did you mean ledger?")
    load(None, {"PICLUSTER_HOST": "http://x", "PICLUSTER_CI_ID": "3"})


def test_settings_that_belong_together_are_checked_together(write: Write) -> None:
    path = write(
        '[api]\nport = 7946\nkeys_file = "keys"\n[peers]\nseeds = ["pi-2", "a:0"]\n[hub]\nurl = "https://hub.example"\n'
    )
    assert faults(path) == [
        f"{path}:3: api.keys_file: there is no file {path.parent}/keys",
        f"{path}:7: hub.url: needs hub.token_file: the hub answers nobody without its bearer token",
        f"{path}:2: api.port: 7946 is also peers.port: the two listeners need a port each",
        f"{path}:5: peers.seeds: 'pi-2' is not an address (legal: host:port or [ipv6]:port)",
        f"{path}:5: peers.seeds: 'a:0' is not an address (legal: host:port or [ipv6]:port)",
    ]


def test_a_model_may_be_a_directory_and_a_secret_may_not(write: Write) -> None:
    path = write('[api]\nkeys_file = "it"\n[[models]]\nname = "a"\npath = "it"\n[[models]]\nname = "b"\npath = "no"\n')
    (path.parent / "it").mkdir()
    assert faults(path) == [
        f"{path}:2: api.keys_file: there is no file {path.parent}/it",
        f"{path}:8: models[2].path: there is no file {path.parent}/no",
    ]


def test_two_ephemeral_ports_do_not_clash() -> None:
    assert load(None, {"PICLUSTER_API_PORT": "0", "PICLUSTER_PEERS_PORT": "0"}).api.port == 0


def test_systemd_names_the_directories(tmp_path: Path) -> None:
    environ = {"STATE_DIRECTORY": "/var/lib/p:/var/lib/q", "RUNTIME_DIRECTORY": "/run/p"}
    config = load(None, environ)
    assert (config.state_dir, config.api.socket) == (Path("/var/lib/p"), "/run/p/api.sock")


def test_relative_secrets_come_from_the_credentials_directory_then_from_beside_the_file(write: Write) -> None:
    path = write('[hub]\nurl = "https://hub.example"\ntoken_file = "hub"\n[linear]\ntoken_file = "linear"\n')
    credentials = path.parent / "credentials"
    credentials.mkdir()
    (credentials / "hub").write_text("a\n")
    (path.parent / "linear").write_text("b\n")
    environ = {"CREDENTIALS_DIRECTORY": str(credentials)}
    config = load(path, environ)
    assert read_secret(config.hub.token_file, environ) == ("a",)
    assert read_secret(config.linear.token_file, environ) == ("b",)


def test_a_secret_file_may_hold_two_secrets(tmp_path: Path) -> None:
    (tmp_path / "two").write_text("old \n\n new\n")
    assert read_secret("two", {"CREDENTIALS_DIRECTORY": str(tmp_path)}) == ("old", "new")


@pytest.mark.parametrize("content", [b"", b"\n \n", b"\xff", None])
def test_a_secret_that_is_not_there_is_a_fault(tmp_path: Path, content: bytes | None) -> None:
    if content is not None:
        (tmp_path / "s").write_bytes(content)
    with pytest.raises(ConfigError):
        read_secret(tmp_path / "s", {})


def test_dotted_keys_sub_tables_and_inline_tables_keep_their_lines(write: Write) -> None:
    path = write('api.port = -1\nledger = { commit_delay_s = 9 }\n[triage.labels]\nbug = 3\n["linear"]\n"url" = 3\n')
    places = [fault.partition(": ")[0] for fault in faults(path)]
    assert places == [f"{path}:{line}" for line in (1, 2, 3, 6)]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('[spec]\nmode = "on"\n', "spec.mode: needs notion.token_file"),
        ('[deploy]\nmode = "ask"\n', "deploy.mode: needs deploy.repository"),
        ('[moderation]\nmode = "on"\ndelete = "ask"\n', "moderation.mode: needs linear.token_file"),
        ("[moderation]\nclean_below = 0.9\nflagged_from = 0.5\n", "moderation.clean_below: is above flagged_from"),
        ('[notify]\nlinear_team = "0b7c"\n', "notify.linear_team: needs linear.token_file"),
        (f'[deploy]\ncloudflare_account = "{"0" * 32}"\n', "needs deploy.cloudflare_token_file"),
    ],
)
def test_a_workflow_that_lacks_what_it_needs_is_told(tmp_path: Path, text: str, says: str) -> None:
    path = tmp_path / "piclusterd.toml"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load(path, {})
    assert says in str(caught.value)
