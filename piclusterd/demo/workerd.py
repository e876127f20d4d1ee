"""Runs forwarder/worker.js in real workerd, the runtime of Cloudflare's edge, on this machine and offline.

    find() ──► $PICLUSTERD_WORKERD, or workerd on PATH, or the npm package @cloudflare/workerd-<platform>
    start(port, state_dir, env) ──► state_dir/{worker.js, hub.capnp, do/} ──► workerd serve ──► /health ──► HubProcess
                                    HUB_AI_URL: ai.js beside it stands for the binding `AI` and asks the double there

The version is pinned once, in forwarder/package.json. The platform package carries the binary itself, so the ordinary
npm client is all it takes (npm.py). Secrets reach workerd through its environment (`fromEnvironment`), not through the
config file, so none is written to disk. Storage lives in `state_dir/do` and survives SIGKILL.

Where it cannot run: no npm and no binary, a platform without a package, or a kernel with 39-bit addresses (Raspberry Pi
OS; cloudflare/workerd#5020), where it aborts at once. Then `available()` is None, `find().why` says why, and
piclusterd.demo.hub_double takes its place.
"""

import functools
import json
import os
import platform
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path

from piclusterd.demo.hub_process import HubFailed, HubProcess, spawn
from piclusterd.demo.npm import Found, install

FORWARDER = Path(__file__).resolve().parents[2] / "forwarder"
COMPATIBILITY_DATE = "2026-03-01"  # as in wrangler.jsonc
PROBE_S = 20  # `workerd --version` reads a 160 MB binary from an SD card the first time
_PLATFORMS = {
    ("Linux", "x86_64"): "linux-64",
    ("Linux", "aarch64"): "linux-arm64",
    ("Darwin", "x86_64"): "darwin-64",
    ("Darwin", "arm64"): "darwin-arm64",
}
BINDINGS = (
    *("HUB_TOKEN", "HUB_TOKEN_NEXT"),
    *("LINEAR_SECRET", "LINEAR_SECRET_NEXT"),
    *("GITHUB_SECRET", "GITHUB_SECRET_NEXT"),
    *("NOTION_SECRET", "NOTION_SECRET_NEXT"),
    *("HUB_TTL_DAYS", "HUB_NACK_LIMIT", "HUB_OUTBOX_MAX", "HUB_AI_MODEL", "HUB_AI_AFTER_S"),
)
AI_BINDINGS = ("HUB_AI_URL", "HUB_AI_TOKEN")
"""Of the stand-in for Workers AI."""

_CONFIG = """\
using Workerd = import "/workerd/workerd.capnp";

const config :Workerd.Config = (
  services = [
    (name = "hub", worker = .hub),
    (name = "state", disk = (path = {state}, writable = true)),{ai_services}
  ],
  sockets = [(name = "http", address = "127.0.0.1:{port}", http = (), service = "hub")],
);

const hub :Workerd.Worker = (
  modules = [(name = "worker.js", esModule = embed "worker.js")],
  compatibilityDate = "{date}",
  bindings = [
    (name = "HUB", durableObjectNamespace = "Hub"),
{bindings}
  ],
  durableObjectNamespaces = [(className = "Hub", uniqueKey = "hub", enableSql = true)],
  durableObjectStorage = (localDisk = "state"),
);
"""


_AI_SERVICES = """
    (name = "ai", worker = .ai),
    (name = "internet", network = (allow = ["local"])),"""
_AI_CONFIG = """
const ai :Workerd.Worker = (
  modules = [(name = "ai.js", esModule = embed "ai.js")],
  compatibilityDate = "{date}",
  bindings = [
    (name = "HUB_AI_URL", fromEnvironment = "HUB_AI_URL"),
    (name = "HUB_AI_TOKEN", fromEnvironment = "HUB_AI_TOKEN"),
  ],
);
"""
_AI_SCRIPT = """\
// Stands for the binding `AI` of Workers AI, which runs at Cloudflare only: the same call, asked of its double.
import { WorkerEntrypoint } from "cloudflare:workers";
export class AI extends WorkerEntrypoint {
  async run(model, input) {
    const headers = { authorization: `Bearer ${this.env.HUB_AI_TOKEN}`, "content-type": "application/json" };
    const request = { method: "POST", headers, body: JSON.stringify(input) };
    const answer = await fetch(`${this.env.HUB_AI_URL}/ai/run/${model}`, request);
    const said = await answer.json();
    if (!said.success) throw new Error(said.errors.map(({ code, message }) => `${code}: ${message}`).join("; "));
    return said.result;
  }
}
export default { fetch: () => new Response(null, { status: 404 }) };
"""


def available() -> str | None:
    """The path of a workerd that runs here, or None; `find().why` has the reason."""
    found = find()
    return None if found.path is None else str(found.path)


@functools.cache
def find() -> Found:
    """Look for workerd, installing it into the cache on first use (blocks; once per process)."""
    if not (FORWARDER / "worker.js").is_file():
        return Found(None, f"{FORWARDER}/worker.js is missing: this runs from a source tree only")
    given = os.environ.get("PICLUSTERD_WORKERD") or shutil.which("workerd")
    found = Found(Path(given)) if given else _from_npm()
    return found if found.path is None else _probe(found.path)


def _from_npm() -> Found:
    here = (platform.system(), platform.machine())
    if here not in _PLATFORMS:
        return Found(None, f"workerd has no build for {' '.join(here)}")
    package = f"@cloudflare/workerd-{_PLATFORMS[here]}"
    version = json.loads((FORWARDER / "package.json").read_text())["devDependencies"]["workerd"]
    home = install(package, version)
    if home.path is None:
        return home
    return Found(home.path / "node_modules" / package / "bin" / "workerd")


def _probe(path: Path) -> Found:
    try:
        done = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=PROBE_S)
    except (OSError, subprocess.TimeoutExpired) as error:
        return Found(None, f"{path} does not run: {error}")
    if done.returncode != 0:
        return Found(None, f"{path} aborts here (39-bit addresses? cloudflare/workerd#5020): {done.stderr[-200:]}")
    return Found(path)


async def start(port: int, state_dir: Path, env: Mapping[str, str]) -> HubProcess:
    """worker.js on 127.0.0.1:`port`, its storage below `state_dir`. Raises HubFailed when workerd is not to be had.

    `env` gives the bindings of the Worker (HUB_TOKEN, LINEAR_SECRET, ...); other names are not passed on.
    """
    found = find()
    if found.path is None:
        raise HubFailed(f"no workerd: {found.why}; use piclusterd.demo.hub_double")
    state = state_dir / "do"
    state.mkdir(parents=True, exist_ok=True)
    shutil.copy(FORWARDER / "worker.js", state_dir / "worker.js")  # `embed` reads beside the config only
    given = {name: env[name] for name in BINDINGS if name in env}
    with_ai = {name: env[name] for name in AI_BINDINGS if name in env}
    (state_dir / "ai.js").write_text(_AI_SCRIPT)
    config = state_dir / "hub.capnp"
    config.write_text(_config(port, state, tuple(given), with_ai=bool(with_ai)))
    command = [str(found.path), "serve", str(config)]
    return await spawn("workerd", command, port, given | with_ai, state_dir / "workerd.log")


def _config(port: int, state: Path, names: tuple[str, ...], *, with_ai: bool) -> str:
    lines = [f'    (name = "{name}", fromEnvironment = "{name}"),' for name in names]
    if with_ai:
        lines.append('    (name = "AI", service = (name = "ai", entrypoint = "AI")),')
    text = _CONFIG.format(
        state=json.dumps(str(state)), port=port, date=COMPATIBILITY_DATE, bindings="\n".join(lines),
        ai_services=_AI_SERVICES if with_ai else "",
    )  # fmt: skip
    return text + (_AI_CONFIG.format(date=COMPATIBILITY_DATE) if with_ai else "")
