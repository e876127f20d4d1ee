"""`python -m piclusterd.upgrade`: changes this node's release, and takes it back where it is not well. Runs as root.

    daemon ──<state>/upgrade/wish.json──▶ piclusterd-upgrade.path ─▶ this ──<prefix>/upgrade.json──▶ daemon

    wish ─▶ building ─▶ switching ─▶ gating ─▶ done          `current` is a symlink that moves in one step
             │ nothing was changed      └─ not ready in gate_s, or not for settle_s ─▶ it moves back ─▶ rolled-back
             └▶ failed

The daemon may not write where programs lie, and this program does not believe it: a wish names a version and a digest,
and only what stands in the configured source with that digest is installed, never one older than what runs. To go back
is to go to the release before, which is there. A wish stays until its end, so that a power cut in the middle is gone on
with at the next boot: what was switched to is gated then.
"""

from __future__ import annotations

import argparse
import fcntl
import http.client
import json
import os
import shlex
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from . import config
from .config_file import load
from .errors import PiclusterError, Refused, UserError
from .upgrade_build import build, version_of
from .upgrade_source import Release, fetch, find, order

WISH, TOLD = "upgrade/wish.json", "upgrade.json"
CURRENT, PREVIOUS, GOOD = "current", "previous", "good"
"""Links: what runs, what ran before, and what this program is run from: the last release that was well."""
WISH_BYTES_MAX = 4096
ASK_S = 3.0
"""One look at a daemon; one that does not answer in that is not well."""
LOOK_S = 0.25
RESTART_S = 180.0
"""systemd gives a start 60 s and a stop 90 s."""
WHY_CHARS_MAX = 300
FINAL = ("done", "failed", "rolled-back")

State = Literal["draining", "asked", "building", "switching", "gating", "done", "failed", "rolled-back"]


class Wish(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`id` names it; the same one again is the same upgrade."""

    id: Annotated[str, Meta(pattern="^[0-9a-f-]{36}$")]
    action: Literal["install", "rollback"] = "install"
    version: Annotated[str, Meta(max_length=32)] = ""
    sha256: Annotated[str, Meta(pattern="^([0-9a-f]{64})?$")] = ""


class Told(msgspec.Struct, frozen=True):
    """How far a wish has come. `release`: the directory in use before it."""

    id: str = ""
    state: State = "asked"
    version: str = ""
    why: str = ""
    before: str = ""


def read_told(prefix: Path) -> Told:
    """What became of the newest wish; an empty one where there was none."""
    try:
        return msgspec.json.decode((prefix / TOLD).read_bytes(), type=Told)
    except (OSError, msgspec.DecodeError):
        return Told()


def write_wish(state: Path, wish: Wish) -> None:
    """For the program to find. Blocking."""
    path = state / WISH
    path.parent.mkdir(mode=0o700, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_bytes(msgspec.json.encode(wish))
    part.replace(path)


def read_wish(state: Path) -> Wish | None:
    """None where there is none, or nothing that is one. The directory is another user's: no link in it is followed."""
    try:
        folder = os.open(state / Path(WISH).parent, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        try:
            file = os.open(Path(WISH).name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=folder)
        finally:
            os.close(folder)
        with os.fdopen(file, "rb") as opened:
            return msgspec.json.decode(opened.read(WISH_BYTES_MAX), type=Wish)
    except (OSError, msgspec.DecodeError):
        return None


def drop_wish(state: Path) -> None:
    try:
        folder = os.open(state / Path(WISH).parent, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        try:
            os.unlink(Path(WISH).name, dir_fd=folder)
        finally:
            os.close(folder)
    except FileNotFoundError:
        pass


@dataclass(frozen=True, slots=True)
class Place:
    """Where all of it is. `restart`: the command that restarts the daemon."""

    prefix: Path
    state: Path
    socket: Path
    restart: tuple[str, ...]

    @property
    def current(self) -> Path:
        return (self.prefix / CURRENT).resolve()


class Upgrader:
    def __init__(self, place: Place, policy: config.Upgrade, clock: Callable[[], float] = time.monotonic) -> None:
        self._place = place
        self._policy = policy
        self._clock = clock
        self._told = read_told(place.prefix)

    def run(self) -> Told:
        """Grant the wish that is there, from wherever an earlier attempt was cut off."""
        wish = read_wish(self._place.state)
        if wish is None:
            drop_wish(self._place.state)
            return self._told
        if self._told.id != wish.id or self._told.state not in FINAL:
            before = self._told.before if self._told.id == wish.id and self._told.before else str(self._place.current)
            self._told = Told(wish.id, "building", wish.version, "", before)
            self._grant(wish)
        drop_wish(self._place.state)
        return self._told

    def _grant(self, wish: Wish) -> None:
        before = Path(self._told.before)
        try:
            self._tell("building")
            target = self._target(wish, before)
            version = version_of(target)
            if not version:
                raise Refused(f"{target.name} does not even say its version")
        except (PiclusterError, OSError) as fault:
            self._tell("failed", str(fault))
            return
        if target == before and self._place.current == before:
            self._tell("done", "it is in use already", version)
            return
        self._tell("switching", version=version)
        why = self._switch(target, version)
        if why:
            self._go_back(before, f"{version} {why}")
            return
        _point(self._place.prefix / PREVIOUS, before)
        _point(self._place.prefix / GOOD, target)
        self._prune({target, before})
        self._tell("done")

    def _target(self, wish: Wish, before: Path) -> Path:
        """The release to switch to. Raises `PiclusterError`; nothing in use is touched."""
        prefix = self._place.prefix
        if wish.action == "rollback":
            target = (prefix / PREVIOUS).resolve()
            if target.parent != prefix / "releases" or not target.is_dir() or target == before:
                raise UserError("there is no release to go back to", fix="Install one with --rolling VERSION.")
            return target
        release = find(self._policy.source, wish.version)
        self._check(release, wish, version_of(before))
        wheel = fetch(self._policy.source, release, prefix / "wheels")
        try:
            return build(prefix / "releases", before, wheel, release)
        finally:
            wheel.unlink(missing_ok=True)

    def _check(self, release: Release, wish: Wish, running: str) -> None:
        if release.sha256 != wish.sha256:
            raise Refused("the source changed since", f"{release.version} has another digest there now", "Ask again.")
        if order(release.version) < order(running):
            raise Refused(f"{release.version} is older than {running}", "a wish never goes back", "Use --rollback.")

    # switching -----------------------------------------------------------------------------------------------
    def _switch(self, target: Path, version: str) -> str:
        """Why it is not well; "" where it is."""
        _point(self._place.prefix / CURRENT, target)
        self._tell("gating", version=version)
        failed = self._restart()
        return failed or self._gate(version)

    def _go_back(self, before: Path, why: str) -> None:
        _point(self._place.prefix / CURRENT, before)
        self._restart()
        version = version_of(before)
        worse = self._gate(version)
        self._tell("rolled-back", f"{why}; {before.name} {f'is back, but {worse}' if worse else 'is back'}", version)

    def _restart(self) -> str:
        try:
            done = subprocess.run(
                self._place.restart, capture_output=True, text=True, errors="replace", timeout=RESTART_S, check=False
            )
        except (OSError, subprocess.TimeoutExpired) as fault:
            return f"was not restarted: {fault}"
        return (
            "" if done.returncode == 0 else f"does not start: {(done.stderr or done.stdout).strip()[-WHY_CHARS_MAX:]}"
        )

    def _gate(self, version: str) -> str:
        """Ready for `settle_s` on end, begun within `gate_s`; else why not. An election may pass in between."""
        ends, since, was, why = self._clock() + self._policy.gate_s, None, False, "it does not answer"
        while since is not None or self._clock() < ends:
            fault = ask(self._place.socket, version)
            now = self._clock()
            if fault:
                since, why = None, fault
            else:
                since, was = now if since is None else since, True
                if now - since >= self._policy.settle_s:
                    return ""
            time.sleep(LOOK_S)
        return f"{'did not stay' if was else 'was not'} ready in {self._policy.gate_s:g} s: {why}"

    # telling -------------------------------------------------------------------------------------------------
    def _tell(self, state: State, why: str = "", version: str | None = None) -> None:
        """On disk before anything follows from it."""
        version = self._told.version if version is None else version
        self._told = Told(self._told.id, state, version, why[:WHY_CHARS_MAX], self._told.before)
        path = self._place.prefix / TOLD
        part = path.with_suffix(".part")
        with part.open("wb") as file:
            file.write(msgspec.json.encode(self._told))
            file.flush()
            os.fsync(file.fileno())
        part.chmod(0o644)
        part.replace(path)
        print(f"upgrade: {state} {version} {self._told.why}".rstrip(), file=sys.stderr)  # noqa: T201

    def _prune(self, kept: set[Path]) -> None:
        for release in (self._place.prefix / "releases").iterdir():
            if release not in kept and release.is_dir():
                shutil.rmtree(release, ignore_errors=True)


def _point(link: Path, target: Path) -> None:
    """In one step."""
    new = link.with_name(f"{link.name}.new")
    new.unlink(missing_ok=True)
    new.symlink_to(target)
    new.replace(link)


class _Local(http.client.HTTPConnection):
    """HTTP over a unix socket."""

    def __init__(self, path: Path) -> None:
        super().__init__("picluster.localhost", timeout=ASK_S)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(ASK_S)
        self.sock.connect(str(self._path))


def ask(path: Path, version: str) -> str:
    """Why the daemon at that socket is not a ready one of `version`; "" where it is."""
    try:
        ready, _ = _get(path, "/readyz")
        if ready != 200:
            return "it is not ready"
        _, body = _get(path, "/status.json")
        view = json.loads(body)
        running = next(one["facts"]["release"] for one in view["members"] if one["node"] == view["me"])
    except (OSError, http.client.HTTPException, ValueError, KeyError, StopIteration, TypeError) as fault:
        return f"it does not answer ({type(fault).__name__})"
    return "" if running == version else f"it is {str(running)[:32]}"


def _get(path: Path, what: str) -> tuple[int, bytes]:
    connection = _Local(path)
    try:
        connection.request("GET", what)
        answer = connection.getresponse()
        return answer.status, answer.read()
    finally:
        connection.close()


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m piclusterd.upgrade", description=__doc__.split("\n", 1)[0])
    parser.add_argument("--prefix", type=Path, default=Path("/opt/piclusterd"))
    parser.add_argument("--state", type=Path, default=Path("/var/lib/piclusterd"))
    parser.add_argument("--config", type=Path, default=Path("/etc/piclusterd/piclusterd.toml"))
    parser.add_argument("--socket", type=Path, default=Path("/run/piclusterd/api.sock"))
    parser.add_argument("--restart", default="systemctl restart piclusterd.service")
    told = parser.parse_args(arguments)
    prefix = told.prefix.resolve()
    with (prefix / "upgrade.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        policy = load(told.config, os.environ).upgrade
        place = Place(prefix, told.state, told.socket, tuple(shlex.split(told.restart)))
        end = Upgrader(place, policy).run()
    return 0 if end.state == "done" else 1


if __name__ == "__main__":
    sys.exit(main())
