"""A node's own upgrade, step by step on a real disk: what is refused, what goes back, and what a power cut leaves."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import stat
import subprocess
import sys
import threading
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from socketserver import ThreadingUnixStreamServer
from typing import Any

import pytest

from piclusterd import config
from piclusterd.errors import PiclusterError, Refused, UserError
from piclusterd.upgrade import Place, Told, Upgrader, Wish, read_told, read_wish, write_wish
from piclusterd.upgrade_build import build, site_packages, unpack, version_of
from piclusterd.upgrade_source import Release, fetch, find, listing, order

ID = "0b7c5a4e-0000-4000-8000-000000000001"
POLICY = config.Upgrade(gate_s=2.0, settle_s=0.2)
DAEMON = 'def main():\n    print("piclusterd, version {version}")\n'
ENTRY = "[console_scripts]\npiclusterd = piclusterd.daemon:main\npicluster = piclusterd.daemon:main\n"


def digest(body: bytes) -> str:
    return "sha256=" + base64.urlsafe_b64encode(hashlib.sha256(body).digest()).rstrip(b"=").decode()


def wheel(source: Path, version: str, more: dict[str, str] | None = None, says: str = "", record: bool = True) -> Path:
    """A tiny wheel of ours; `more`: further files. `says`: the version its daemon tells."""
    info = f"piclusterd-{version}.dist-info"
    files = {
        "piclusterd/__init__.py": "",
        "piclusterd/daemon.py": DAEMON.format(version=says or version),
        f"{info}/METADATA": f"Metadata-Version: 2.4\nName: piclusterd\nVersion: {version}\n\ntext\n",
        f"{info}/entry_points.txt": ENTRY,
        **(more or {}),
    }
    rows = "".join(f"{name},{digest(text.encode())},{len(text)}\n" for name, text in files.items()) if record else ""
    source.mkdir(exist_ok=True)
    path = source / f"piclusterd-{version}-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for name, text in files.items():
            archive.writestr(name, text)
        archive.writestr(f"{info}/RECORD", rows + f"{info}/RECORD,,\n")
    publish(source)
    return path


def publish(source: Path) -> None:
    lines = [f"{hashlib.sha256(p.read_bytes()).hexdigest()}  {p.name}" for p in sorted(source.glob("*.whl"))]
    (source / "SHA256SUMS").write_text("\n".join([*lines, "junk", "0" * 64 + "  ../evil.whl"]) + "\n")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An environment with one package in it, and none of ours."""
    path = tmp_path_factory.mktemp("base") / "env"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(path)], check=True)
    (site_packages(path) / "other").mkdir()
    (site_packages(path) / "other" / "__init__.py").write_text("here = True\n")
    return path


class Board:
    """A prefix with release 0.1.0 in use and a source with more; `health(version)`: what its daemon answers then."""

    def __init__(self, root: Path, base: Path) -> None:
        self.source, self.prefix, self.state = root / "source", root / "opt", root / "state"
        self.prefix.mkdir()
        self.state.mkdir()
        wheel(self.source, "0.1.0")
        self.first = self.release("0.1.0", base)
        (self.prefix / "current").symlink_to(self.first)
        self.restarts = root / "restarts"
        self.place = Place(self.prefix, self.state, root / "api.sock", (str(self._command(root)),))
        self.health: Callable[[str], int] = lambda version: 200

    def _command(self, root: Path) -> Path:
        command = root / "restart"
        command.write_text(f'#!/bin/sh\necho "$(readlink {self.prefix}/current)" >> {self.restarts}\n')
        command.chmod(0o755)
        return command

    def release(self, version: str, current: Path) -> Path:
        release = find(str(self.source), version)
        return build(self.prefix / "releases", current, fetch(str(self.source), release, self.prefix / "w"), release)

    @property
    def current(self) -> str:
        return (self.prefix / "current").resolve().name.split("-")[0]

    def wish(self, version: str = "0.2.0", number: int = 1, **changes: Any) -> Wish:
        sha = next((one.sha256 for one in listing(str(self.source)) if one.version == version), "")
        told = {"id": f"{ID[:-1]}{number}", "version": version, "sha256": sha, **changes}
        wish = Wish(**told)
        write_wish(self.state, wish)
        return wish

    def upgrade(self, **policy: Any) -> Told:
        told = {"source": str(self.source), "gate_s": 2.0, "settle_s": 0.2, **policy}
        return Upgrader(self.place, config.Upgrade(**told)).run()


@contextmanager
def daemon(board: Board) -> Iterator[None]:
    """Answers on the socket as a daemon of the current release that is as well as `health` says."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            version = board.current
            status = board.health(version) if self.path == "/readyz" else 200
            body = json.dumps({"me": "a", "members": [{"node": "a", "facts": {"release": version}}]}).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *words: Any) -> None: ...

        def address_string(self) -> str:
            return ""

    class Server(ThreadingUnixStreamServer):
        daemon_threads = True

        def get_request(self) -> tuple[Any, Any]:
            request, _ = super().get_request()
            return request, ("", 0)

    with Server(str(board.place.socket), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        try:
            yield
        finally:
            server.shutdown()
            thread.join()


@pytest.fixture
def board(tmp_path: Path, base: Path) -> Iterator[Board]:
    board = Board(tmp_path, base)
    with daemon(board):
        yield board


# the whole way -------------------------------------------------------------------------------------------------------
def test_a_release_is_built_switched_to_and_kept_where_it_is_well(board: Board) -> None:
    wheel(board.source, "0.2.0")
    wish = board.wish()
    told = board.upgrade()
    assert (told.state, told.version, told.id) == ("done", "0.2.0", wish.id)
    assert board.current == "0.2.0"
    assert read_told(board.prefix) == told
    assert read_wish(board.state) is None
    assert version_of(board.prefix / "current") == "0.2.0"
    assert (site_packages(board.prefix / "current") / "other" / "__init__.py").exists()
    assert sorted(p.name[:5] for p in (board.prefix / "releases").iterdir()) == ["0.1.0", "0.2.0"]
    assert board.upgrade() == told, "no wish, nothing to do"


def test_a_release_that_is_not_ready_goes_back_by_itself(board: Board) -> None:
    wheel(board.source, "0.2.0")
    board.health = lambda version: 503 if version == "0.2.0" else 200
    board.wish()
    told = board.upgrade(gate_s=1.0)
    assert (told.state, told.version, board.current) == ("rolled-back", "0.1.0", "0.1.0")
    assert "not ready" in told.why
    assert len(board.restarts.read_text().splitlines()) == 2


def test_a_release_that_is_well_only_at_first_goes_back_too(board: Board) -> None:
    wheel(board.source, "0.2.0")
    looks = iter([200, 503])
    board.health = lambda version: next(looks, 503) if version == "0.2.0" else 200
    board.wish()
    told = board.upgrade(settle_s=1.0)
    assert told.state == "rolled-back"
    assert "did not stay ready" in told.why


def test_an_election_in_between_is_no_reason_to_go_back(board: Board) -> None:
    wheel(board.source, "0.2.0")
    looks = iter([503, 200, 503])
    board.health = lambda version: next(looks, 200)
    board.wish()
    assert board.upgrade(settle_s=0.6).state == "done"


def test_a_restart_that_fails_goes_back_at_once(board: Board) -> None:
    wheel(board.source, "0.2.0")
    Path(board.place.restart[0]).write_text(
        f'#!/bin/sh\ncase "$(readlink {board.prefix}/current)" in *0.2.0*) echo no such unit >&2; exit 1;; esac\n'
    )
    board.wish()
    told = board.upgrade()
    assert (told.state, board.current) == ("rolled-back", "0.1.0")
    assert "no such unit" in told.why


def test_back_to_the_release_before_and_again(board: Board) -> None:
    wheel(board.source, "0.2.0")
    board.wish()
    board.upgrade()
    board.wish("", 2, action="rollback")
    assert board.upgrade().state == "done"
    assert board.current == "0.1.0"
    board.wish("", 3, action="rollback")
    assert board.upgrade().state == "done"
    assert board.current == "0.2.0"


def test_without_a_release_before_there_is_no_way_back(board: Board) -> None:
    board.wish("", action="rollback")
    told = board.upgrade()
    assert (told.state, "no release to go back to" in told.why) == ("failed", True)


@pytest.mark.parametrize("state", ["building", "switching", "gating"])
@pytest.mark.parametrize("well", [True, False])
def test_cut_off_anywhere_the_next_boot_goes_on_with_it(board: Board, state: Any, well: bool) -> None:
    wheel(board.source, "0.2.0")
    wish = board.wish()
    if state != "building":
        target = board.release("0.2.0", board.first)
        board.prefix.joinpath("current").unlink()
        board.prefix.joinpath("current").symlink_to(target)
    told = Told(wish.id, state, "0.2.0", "", str(board.first))
    board.prefix.joinpath("upgrade.json").write_text(
        json.dumps({name: getattr(told, name) for name in told.__struct_fields__})
    )
    board.health = lambda version: 200 if well or version == "0.1.0" else 503
    told = board.upgrade(gate_s=1.0)
    assert (told.state, board.current) == (("done", "0.2.0") if well else ("rolled-back", "0.1.0"))


def test_the_release_in_use_is_not_restarted(board: Board) -> None:
    board.wish("0.1.0")
    assert board.upgrade().state == "done"
    assert not board.restarts.exists()


# what is refused -----------------------------------------------------------------------------------------------------
def refused(board: Board, about: str) -> None:
    told = board.upgrade()
    assert told.state == "failed"
    assert about in told.why
    assert board.current == "0.1.0"
    assert not board.restarts.exists()


def test_a_wish_for_another_digest_than_the_source_has_is_refused(board: Board) -> None:
    wheel(board.source, "0.2.0")
    board.wish(sha256="f" * 64)
    refused(board, "the source changed")


def test_a_wheel_that_is_not_what_the_sums_say_is_refused(board: Board) -> None:
    path = wheel(board.source, "0.2.0")
    board.wish()
    path.write_bytes(path.read_bytes() + b"x")
    refused(board, "is not what SHA256SUMS says")


def test_a_version_that_is_not_there_or_older_is_refused(board: Board) -> None:
    board.wish("0.9.0")
    refused(board, "no release 0.9.0")
    wheel(board.source, "0.0.9")
    board.wish("0.0.9", 2)
    refused(board, "is older than 0.1.0")


def test_a_release_that_calls_itself_something_else_is_refused_and_leaves_nothing(board: Board) -> None:
    wheel(board.source, "0.2.0", says="0.7.0")
    board.wish()
    refused(board, "calls itself")
    assert [p.name[:5] for p in (board.prefix / "releases").iterdir()] == ["0.1.0"]


@pytest.mark.parametrize(
    "name",
    ["../evil.py", "/etc/cron.d/evil", "piclusterd/../../evil.py", "other/__init__.py", "evil.pth", "piclusterd\\evil",
     "piclusterd-0.3.0.dist-info/METADATA"],
)  # fmt: skip
def test_a_wheel_with_files_outside_its_place_is_refused_whole(tmp_path: Path, name: str) -> None:
    path = wheel(tmp_path / "source", "0.2.0", {name: "evil"})
    site = tmp_path / "site"
    with pytest.raises(Refused, match="not ours"):
        unpack(path, site, "0.2.0")
    assert not site.exists()


def test_links_and_changed_files_in_a_wheel_are_refused(tmp_path: Path) -> None:
    path = wheel(tmp_path / "source", "0.2.0")
    link = zipfile.ZipInfo("piclusterd/link")
    link.external_attr = (stat.S_IFLNK | 0o777) << 16
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr(link, "/etc/passwd")
    with pytest.raises(Refused, match="no plain file"):
        unpack(path, tmp_path / "site", "0.2.0")
    path = wheel(tmp_path / "source", "0.2.0", record=False)
    with pytest.raises(Refused, match="RECORD"):
        unpack(path, tmp_path / "site", "0.2.0")
    path.write_bytes(b"no zip")
    with pytest.raises(Refused, match="no wheel"):
        unpack(path, tmp_path / "site", "0.2.0")


def test_a_command_that_is_no_name_is_refused(board: Board) -> None:
    info = "piclusterd-0.2.0.dist-info/entry_points.txt"
    wheel(board.source, "0.2.0", {info: "[console_scripts]\n../../evil = piclusterd.daemon:main\n"})
    board.wish()
    refused(board, "is no name")


def test_a_wish_that_is_a_link_or_junk_is_none_and_is_cleared_away(tmp_path: Path, board: Board) -> None:
    secret = tmp_path / "secret"
    secret.write_text(json.dumps({"id": ID, "version": "0.2.0"}))
    folder = board.state / "upgrade"
    folder.mkdir()
    (folder / "wish.json").symlink_to(secret)
    assert read_wish(board.state) is None
    board.upgrade()
    assert not (folder / "wish.json").is_symlink()
    assert secret.exists()
    for junk in (b"{", b'{"id": "../x"}', os.urandom(9000)):
        (folder / "wish.json").write_bytes(junk)
        assert board.upgrade() == Told()
        assert not (folder / "wish.json").exists()


# the source ----------------------------------------------------------------------------------------------------------
def test_versions_compare_as_versions() -> None:
    mixed = ["0.10.0", "0.2.0", "1.0.0", "0.2.0rc2", "junk", "0.2.0rc1", "0.1.0", "0.2.0a1"]
    ordered = ["junk", "0.1.0", "0.2.0a1", "0.2.0rc1", "0.2.0rc2", "0.2.0", "0.10.0", "1.0.0"]
    assert sorted(mixed, key=order) == ordered


def test_only_what_is_on_the_list_exists(tmp_path: Path) -> None:
    wheel(tmp_path, "0.1.0")
    wheel(tmp_path, "0.10.0")
    assert [release.version for release in listing(str(tmp_path))] == ["0.10.0", "0.1.0"]
    assert find(str(tmp_path), "").version == "0.10.0"


@pytest.mark.parametrize("source", ["", "http://releases.example", "file:///etc", "/nowhere", "https://127.0.0.1:9"])
def test_other_sources_are_refused_with_what_to_change(source: str) -> None:
    with pytest.raises(PiclusterError) as caught:
        listing(source)
    assert isinstance(caught.value, UserError) or "source" in str(caught.value)


def test_a_list_without_end_is_not_read(tmp_path: Path) -> None:
    (tmp_path / "SHA256SUMS").write_bytes(b"x" * 300_000)
    with pytest.raises(PiclusterError, match="over"):
        listing(str(tmp_path))
    assert Release("0.1.0", "0" * 64, "f").version == "0.1.0"
