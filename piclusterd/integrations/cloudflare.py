"""Puts the hub's Worker at Cloudflare over its REST API: one module, its Durable Object, its secrets. No Node.

    plan:  GET  /accounts/{a}/workers/scripts                     is it there, and at which migration?
           GET  …/scripts/{name}/settings                         which build? (HUB_BUILD, a hash of all we would send)
    apply: PUT  …/scripts/{name}                                  multipart: metadata + worker.js; secrets are kept
           POST …/scripts/{name}/subdomain {enabled}              the first time
           PUT  …/scripts/{name}/secrets                          each secret that is to be set

Each upload drops every socket of the object, so what is there already is not sent again. A migration is sent once: the
one that makes `Hub` a class with SQLite storage; a script at that tag gets none. Refuses to guess: a script that is
there without our tag belongs to somebody else. Secrets never leave in metadata, errors or logs.

Source: developers.cloudflare.com, multipart upload metadata and the Workers scripts API.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import msgspec

from ..errors import PiclusterError, Refused, Unavailable, UserError

API_URL = "https://api.cloudflare.com/client/v4"
SCRIPT = "piclusterd-hub"
MODULE = "worker.js"
CLASS = "Hub"
TAG = "v1"
"""Of the one migration, as in wrangler.jsonc."""
COMPATIBILITY_DATE = "2026-03-01"
"""Also as there: not newer than the oldest runtime of the tests."""
VARIABLES: Mapping[str, str] = {"HUB_TTL_DAYS": "14", "HUB_NACK_LIMIT": "20"}
BUILD = "HUB_BUILD"
ANSWER_S = 60.0
"""An upload is checked and spread before it is answered."""
ANSWER_BYTES_MAX = 4 * 1024 * 1024
"""The list of an account's scripts, at most 500 of them."""


class _Fault(msgspec.Struct):
    code: int = 0
    message: str = ""


class _Answer(msgspec.Struct):
    success: bool
    result: Any = None
    errors: list[_Fault] = msgspec.field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Plan:
    """What a deploy would do."""

    name: str
    build: str
    exists: bool
    upload: bool
    migrate: bool


def worker_source() -> bytes:
    """worker.js of the source tree, or of the installed package. Raises `UserError`."""
    here = Path(__file__).resolve().parents[1]
    for path in (here.parent / "forwarder" / MODULE, here / "forwarder" / MODULE):
        if path.is_file():
            return path.read_bytes()
    raise UserError("the hub's worker.js is not in this installation", fix="Deploy from a checkout of the project.")


class Cloudflare:
    """One account. `http` stays the caller's to close. Every method raises `PiclusterError`."""

    def __init__(self, http: aiohttp.ClientSession, account: str, token: str, url: str = API_URL) -> None:
        self._http = http
        self._workers = f"{url.rstrip('/')}/accounts/{account}/workers"
        self._headers = {"Authorization": f"Bearer {token}"}

    async def plan(self, source: bytes, variables: Mapping[str, str], name: str = SCRIPT) -> Plan:
        """Look what is there; nothing is changed."""
        build = _build_of(source, variables)
        scripts = await self._call("GET", "/scripts")
        found = next((script for script in scripts if script["id"] == name), None)
        if found is None:
            return Plan(name, build, exists=False, upload=True, migrate=True)
        if found.get("migration_tag") != TAG:
            raise UserError(
                f"a Worker {name!r} is there that is not this hub", f"its migration is {found.get('migration_tag')!r}",
                "Give the hub another name with --name, or delete that Worker.",
            )  # fmt: skip
        settings = await self._call("GET", f"/scripts/{name}/settings")
        there = next((binding.get("text") for binding in settings["bindings"] if binding["name"] == BUILD), None)
        return Plan(name, build, exists=True, upload=there != build, migrate=False)

    async def upload(self, plan: Plan, source: bytes, variables: Mapping[str, str]) -> None:
        """The module and its bindings; secrets that are set already are kept."""
        metadata = _metadata(variables) | {"bindings": [*_bindings(variables), _text(BUILD, plan.build)]}
        if plan.migrate:
            metadata["migrations"] = {"new_tag": TAG, "new_sqlite_classes": [CLASS]}
        form = aiohttp.FormData(default_to_multipart=True)
        form.add_field("metadata", json.dumps(metadata), content_type="application/json")
        form.add_field(MODULE, source, filename=MODULE, content_type="application/javascript+module")
        await self._call("PUT", f"/scripts/{plan.name}", data=form)
        if not plan.exists:
            await self._call("POST", f"/scripts/{plan.name}/subdomain", json={"enabled": True})

    async def set_secret(self, name: str, secret: str, text: str) -> None:
        """Set or replace one; takes effect at once."""
        body = {"name": secret, "text": text, "type": "secret_text"}
        await self._call("PUT", f"/scripts/{name}/secrets", json=body)

    async def address(self, name: str) -> str:
        """The Worker's URL on workers.dev."""
        told = await self._call("GET", "/subdomain")
        return f"https://{name}.{told['subdomain']}.workers.dev"

    async def _call(self, method: str, path: str, **options: Any) -> Any:
        limits = aiohttp.ClientTimeout(total=ANSWER_S)
        try:
            async with self._http.request(
                method, self._workers + path, headers=self._headers, timeout=limits, allow_redirects=False, **options
            ) as answer:
                body = await answer.content.read(ANSWER_BYTES_MAX)
                return _result_of(answer.status, answer.headers, body, f"{method} {path}")
        except (aiohttp.ClientError, OSError) as fault:
            raise Unavailable("Cloudflare does not answer", str(fault) or type(fault).__name__, "Try again.") from fault


def _build_of(source: bytes, variables: Mapping[str, str]) -> str:
    told = json.dumps([_metadata(variables), _bindings(variables)], sort_keys=True)
    return hashlib.sha256(told.encode() + b"\0" + source).hexdigest()


def _metadata(variables: Mapping[str, str]) -> dict[str, Any]:
    keep = {"keep_bindings": ["secret_text"], "observability": {"enabled": True}}
    return {"main_module": MODULE, "compatibility_date": COMPATIBILITY_DATE, **keep}


def _bindings(variables: Mapping[str, str]) -> list[dict[str, str]]:
    hub = {"type": "durable_object_namespace", "name": "HUB", "class_name": CLASS}
    model = [{"type": "ai", "name": "AI"}] if variables.get("HUB_AI_MODEL") else []
    return [hub, *model, *(_text(name, text) for name, text in sorted(variables.items()))]


def _text(name: str, text: str) -> dict[str, str]:
    return {"type": "plain_text", "name": name, "text": text}


def _result_of(status: int, headers: Mapping[str, str], body: bytes, call: str) -> Any:
    """The result of a call that succeeded; else its fault, in words a person can act on."""
    try:
        answer = msgspec.json.decode(body, type=_Answer)
    except msgspec.DecodeError:
        raise Unavailable(f"Cloudflare answered {call} with status {status} and no JSON", fix="Try again.") from None
    if answer.success and status < 300:
        return answer.result
    why = "; ".join(f"{fault.message} ({fault.code})" for fault in answer.errors) or f"status {status}"
    if status in (401, 403):
        fix = "Make a token with the permission `Workers Scripts: Edit` for this very account."
        raise Refused("Cloudflare refuses the API token", why, fix)
    if status == 429:
        wait_s = headers.get("Retry-After", "")
        pause_s = float(wait_s) if wait_s.isdigit() else 300.0
        raise Unavailable("Cloudflare's API wants fewer calls", why, f"Try again in {pause_s:g} s.", pause_s)
    if status >= 500:
        raise Unavailable("Cloudflare failed", why, "Try again; see cloudflarestatus.com.")
    raise PiclusterError(
        f"Cloudflare refuses {call}", why, "Is the account id right? Nothing was changed by this call."
    )
