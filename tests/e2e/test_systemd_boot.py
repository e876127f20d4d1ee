"""The service on a real systemd: installed, started, stopped dead, restarted under load, rebooted, upgraded, removed.

One container for all of it, in the order of a node's life: each test goes on where the one before left off.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import pytest_asyncio

from . import box as boxes
from .box import Box

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.slow_lane,
    pytest.mark.asyncio(loop_scope="module"),
    pytest.mark.timeout(1200),
    pytest.mark.skipif(os.environ.get("PICLUSTER_E2E") != "all", reason="a slow lane: PICLUSTER_E2E=all runs it"),
]

INSTALL = "/src/systemd/install"
INSTALLED = "/opt/piclusterd/systemd/install"
WATCHDOG_S = 4
TWO_ALIVE = 'test $(picluster status --json | grep -o \'"state": "alive"\' | wc -l) = 2'
BUILT = sorted((boxes.CACHE / "wheels").glob("*/llama_cpp_python-*.whl"))
EXTRAS = [] if BUILT else ["--relay"]
CONFIG = """
[peers]
advertise = ["127.0.0.1"]
[cluster]
preset = "lan"
"""
MODEL = """
[[models]]
name = "triage-demo"
path = "/var/lib/piclusterd/models/demo.gguf"
"""
NEIGHBOUR = """
[node]
name = "pi-2"
state_dir = "/srv/two"
[peers]
port = 7947
advertise = ["127.0.0.1"]
seeds = ["127.0.0.1:7946"]
[api]
port = 8747
socket = "/srv/two/api.sock"
[discovery]
enabled = false
[cluster]
preset = "lan"
"""
NEIGHBOUR_UNIT = """
[Service]
Type=notify
ExecStart=/opt/piclusterd/current/bin/piclusterd --config /srv/two.toml
[Install]
WantedBy=multi-user.target
"""
CLIENT = """
import http.client, json, os, time
done, faults = 0, []
while not os.path.exists("/run/enough"):
    try:
        connection = http.client.HTTPConnection("127.0.0.1", 8746, timeout=60)
        connection.request("GET", "/livez")
        if connection.getresponse().status != 200:
            faults.append("status")
        connection.close()
    except Exception as fault:
        faults.append(repr(fault))
    done += 1
    time.sleep(0.01)
print(json.dumps([done, faults[:5]]))
"""


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def box(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Box]:
    boxes.require()
    await asyncio.to_thread(boxes.prepare)
    made = Box("pi-1", Path(tmp_path_factory.mktemp("box")))
    try:
        await boot(made)
        yield made
    finally:
        await made.close()


async def boot(box: Box) -> None:
    binds = [f"{boxes.CHECKOUT}:/src", f"{boxes.WHEELS}:/wheels"]
    if BUILT:
        binds.append(f"{boxes.CACHE}/wheels:/cache/piclusterd/wheels")
    await box.up(*binds)


async def show(box: Box, unit: str, what: str) -> str:
    return (await box.run("systemctl", "show", "-p", what, "--value", unit)).strip()


async def until(box: Box, script: str, within_s: float = 60) -> str:
    """What `script` says, once it succeeds; the journal, if it does not."""
    for _ in range(int(within_s / 0.3)):
        said = await box.run("sh", "-c", f"({script}) && echo OK", check=False)
        if said.endswith("OK\n"):
            return said.removesuffix("OK\n")
        await asyncio.sleep(0.3)
    raise AssertionError(f"not in {within_s} s: {script}\n" + await box.run("journalctl", "-n", "60", "--no-pager"))


async def status(box: Box) -> dict[str, object]:
    told = await until(box, 'picluster status --json 2>/dev/null | grep \'"leader": "\'')
    picture: dict[str, object] = json.loads(told)
    return picture


def members(picture: dict[str, object]) -> set[str]:
    listed = picture["members"]
    assert isinstance(listed, list)
    return {member["node"] for member in listed}


@asynccontextmanager
async def clients(box: Box, count: int = 3) -> AsyncIterator[None]:
    """Clients that open a connection a request, from before to after; none of them may be refused."""
    await box.run("rm", "-f", "/run/enough")
    running = [asyncio.create_task(box.run("python3", "-c", CLIENT)) for _ in range(count)]
    await asyncio.sleep(1)
    yield
    await asyncio.sleep(1)
    await box.run("touch", "/run/enough")
    for told in [json.loads(await one) for one in running]:
        done, faults = told
        assert faults == []
        assert done > 20


async def listing(box: Box) -> set[str]:
    """Every file of the system but logs, caches of the package manager and what other services keep."""
    found = await box.run("find", "/", "-xdev", "-not", "-path", "/proc/*", "-not", "-path", "/tmp/*")
    passing = re.compile(
        r"^/(var/(log|tmp|lib/systemd)|run|tmp|root|cache|src|wheels|etc/\.|etc/(passwd|group|shadow|gshadow|subuid|subgid)-)"
    )
    return {line for line in found.splitlines() if not passing.match(line)}


async def test_installed_it_starts_and_is_ready(box: Box) -> None:
    (box.root / "root/before").write_text("\n".join(await listing(box)))
    await box.run(INSTALL, *EXTRAS)
    with (box.root / "etc/piclusterd/piclusterd.toml").open("w") as file:
        file.write(CONFIG + (MODEL if BUILT else ""))
    await box.run("cp", "/src/piclusterd/inference/demo_model/triage-demo.gguf", "/var/lib/piclusterd/models/demo.gguf")
    await box.run("picluster", "init", "--cluster", "home", "--expect", "1")
    await box.run("systemctl", "enable", "--now", "piclusterd")
    assert await show(box, "piclusterd", "ActiveState") == "active"
    assert (await show(box, "piclusterd", "StatusText")).startswith("node pi-1")
    confined = await box.run("cat", f"/proc/{await show(box, 'piclusterd', 'MainPID')}/status")
    assert re.search(r"^NoNewPrivs:\t1$", confined, re.M)
    assert re.search(r"^CapBnd:\t0+$", confined, re.M)
    assert re.search(r"^Seccomp:\t2$", confined, re.M)
    assert (await status(box))["cluster"] == "home"


async def test_another_node_joins_it(box: Box) -> None:
    """A second daemon in the same box; only where it lives differs from one on another board."""
    (box.root / "srv/two.toml").write_text(NEIGHBOUR)
    (box.root / "etc/systemd/system/neighbour.service").write_text(NEIGHBOUR_UNIT)
    token = next(word for word in (await box.run("picluster", "token", "create")).split() if word.startswith("pcl1."))
    await box.run("picluster", "join", token, "--server", "127.0.0.1:7946", "--config", "/srv/two.toml")
    await box.run("systemctl", "daemon-reload")
    await box.run("systemctl", "enable", "--now", "neighbour")
    await until(box, TWO_ALIVE)


@pytest.mark.skipif(not BUILT, reason="llama-cpp-python was never built on this machine (make setup)")
async def test_the_model_runs_in_a_worker_of_its_own_without_network_and_secrets(box: Box) -> None:
    await until(box, "picluster models | grep triage-demo")
    units = await box.run("systemctl", "list-units", "--plain", "--no-legend", "piclusterd-worker@*")
    unit = units.split()[0]
    pid = await show(box, unit, "MainPID")
    assert (await box.run("ps", "-o", "user=", "-p", pid)).strip().startswith("piclust")
    assert await show(box, unit, "User") == "piclusterd-worker"
    assert len((await box.run("cat", f"/proc/{pid}/net/dev")).splitlines()) == 3, "two lines of header, and lo"
    for closed in (
        "/var/lib/piclusterd/identity/node.key",
        "/etc/piclusterd/piclusterd.toml",
        "/run/piclusterd/api.sock",
    ):
        said = await box.run("ls", f"/proc/{pid}/root{closed}", check=False)
        assert "No such file" in said or "Permission" in said or "Not a directory" in said, said
    assert await box.run("picluster", "chat", "Title: printer on fire", "--max-tokens", "8")


async def test_what_systemd_says_of_the_running_service_is_within_the_thresholds(box: Box) -> None:
    await box.run("systemd-analyze", "security", "--threshold=15", "piclusterd.service")
    await box.run("systemd-analyze", "security", "--threshold=5", "piclusterd-worker@1.service")


async def test_a_secret_reaches_the_daemon_and_nobody_else(box: Box) -> None:
    secret = box.root / "etc/piclusterd/secrets/api-keys"
    secret.write_text("opensesame\n")
    secret.chmod(0o600)
    with (box.root / "etc/piclusterd/piclusterd.toml").open("a") as file:
        file.write('\n[api]\nkeys_file = "secret_api-keys"\n')
    await box.run("systemctl", "restart", "piclusterd")
    ask = (
        "import http.client as h, sys; c = h.HTTPConnection('127.0.0.1', 8746); c.request('GET', '/v1/models', headers="
    )
    for headers, code in (("{}", "401"), ("{'Authorization': 'Bearer opensesame'}", "200")):
        said = await box.run("python3", "-c", f"{ask}{headers}); print(c.getresponse().status)")
        assert said.strip() == code
    for user in ("piclusterd", "piclusterd-worker"):
        said = await box.run(
            "setpriv", f"--reuid={user}", "--clear-groups", "cat", f"/{secret.relative_to(box.root)}", check=False
        )
        assert "Permission denied" in said


async def test_a_restart_refuses_no_client(box: Box) -> None:
    before = await show(box, "piclusterd", "MainPID")
    async with clients(box):
        for _ in range(3):
            await box.run("systemctl", "restart", "piclusterd")
    assert await show(box, "piclusterd", "MainPID") != before


async def test_a_stopped_daemon_is_ended_by_the_watchdog_and_started_again(box: Box) -> None:
    await box.run("mkdir", "-p", "/etc/systemd/system/piclusterd.service.d")
    drop_in = box.root / "etc/systemd/system/piclusterd.service.d/watchdog.conf"
    drop_in.write_text(f"[Service]\nWatchdogSec={WATCHDOG_S}\n")
    await box.run("systemctl", "daemon-reload")
    await box.run("systemctl", "restart", "piclusterd")
    before = await show(box, "piclusterd", "MainPID")
    await asyncio.sleep(2 * WATCHDOG_S)
    assert await show(box, "piclusterd", "MainPID") == before, "an idle daemon strokes it"
    await box.run("kill", "-STOP", before)
    await until(
        box, f"test $(systemctl show -p MainPID --value piclusterd) != {before} && systemctl is-active piclusterd"
    )
    assert int(await show(box, "piclusterd", "NRestarts")) == 1
    assert "Watchdog timeout" in await box.run("journalctl", "-u", "piclusterd", "--no-pager")
    assert (await status(box))["cluster"] == "home"
    drop_in.unlink()
    drop_in.parent.rmdir()
    await box.run("systemctl", "daemon-reload")


async def test_a_reboot_keeps_identity_ledger_and_membership(box: Box) -> None:
    before = await status(box)
    await box.down()
    await boot(box)
    await until(box, "systemctl is-active piclusterd")
    after = await status(box)
    assert (after["me"], after["cluster"], after["voters"]) == (before["me"], before["cluster"], before["voters"])
    assert isinstance(after["entries"], int)
    assert after["entries"] >= int(str(before["entries"])) > 0
    await until(box, TWO_ALIVE)
    assert members(await status(box)) == members(before)
    await box.run("picluster", "ledger", "verify")


async def test_an_upgrade_and_the_way_back_refuse_no_client(box: Box) -> None:
    first = (await box.run("readlink", "/opt/piclusterd/current")).strip()
    async with clients(box):
        await box.run(INSTALL, *EXTRAS)
    second = (await box.run("readlink", "/opt/piclusterd/current")).strip()
    assert first != second
    assert second in await box.run("cat", f"/proc/{await show(box, 'piclusterd', 'MainPID')}/cmdline")
    async with clients(box):
        await box.run(INSTALLED, "rollback")
    assert (await box.run("readlink", "/opt/piclusterd/current")).strip() == first
    assert (await status(box))["cluster"] == "home"


async def test_an_upgrade_that_does_not_start_is_taken_back(box: Box) -> None:
    before = (await box.run("readlink", "/opt/piclusterd/current")).strip()
    copied = "mkdir /srv/broken && tar -C /src -c --exclude=./.venv --exclude=./.git . | tar -C /srv/broken -x"
    await box.run("sh", "-c", copied)
    with (box.root / "srv/broken/piclusterd/daemon.py").open("a") as file:
        file.write("\n\ndef main() -> None:\n    sys.exit('--version' not in sys.argv)\n")
    said = await box.run("/srv/broken/systemd/install", *EXTRAS, check=False)
    assert "does not start" in said
    assert (await box.run("readlink", "/opt/piclusterd/current")).strip() == before
    await until(box, "systemctl is-active piclusterd")
    await box.run("rm", "-r", "/srv/broken")


async def test_uninstalled_nothing_is_left_but_what_the_node_knows(box: Box) -> None:
    before = set((box.root / "root/before").read_text().splitlines())
    await box.run("systemctl", "disable", "--now", "neighbour")
    await box.run("rm", "-r", "/srv/two", "/srv/two.toml", "/etc/systemd/system/neighbour.service")
    await box.run(INSTALLED, "uninstall")
    left = {
        path for path in await listing(box) - before if not path.startswith(("/var/lib/piclusterd", "/etc/piclusterd"))
    }
    assert left == set()
    assert await box.run("ls", "/var/lib/piclusterd/identity/node.key")
    assert "piclusterd" not in await box.run(
        "systemctl", "list-units", "--all", "--plain", "--no-legend", "piclusterd*"
    )
    await box.run(INSTALL, "--relay")
    await box.run(INSTALLED, "uninstall", "--purge")
    assert await listing(box) - before == set()
    assert "piclusterd" not in await box.run("cat", "/etc/passwd", "/etc/group")
