"""A double of the part of Cloudflare's API that `picluster hub deploy` speaks. For tests.

    GET /accounts/{a}/workers/scripts · PUT …/scripts/{name} (multipart) · GET …/{name}/settings · PUT …/{name}/secrets
    POST …/{name}/subdomain · GET /accounts/{a}/workers/subdomain

Checks each call against the documentation: the parts of the upload and their content types, the keys of the metadata,
the fields of each type of binding, that a Durable Object's class is exported and has a migration, that a migration
fits the tag that is there (`old_tag`), that secrets survive an upload only with `keep_bindings`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import msgspec
from aiohttp import BodyPartReader, web

from .doubles import Double, Fault

ACCOUNT = "0123456789abcdef0123456789abcdef"
SUBDOMAIN = "demo-home"
BINDINGS: Mapping[str, frozenset[str]] = {
    "plain_text": frozenset({"type", "name", "text"}),
    "secret_text": frozenset({"type", "name", "text"}),
    "durable_object_namespace": frozenset({"type", "name", "class_name"}),
    "ai": frozenset({"type", "name"}),
}
CODES = {400: 10021, 401: 10000, 403: 9109, 404: 10007, 405: 10405, 412: 10079, 429: 971}


class Migrations(msgspec.Struct, forbid_unknown_fields=True):
    new_tag: str
    new_sqlite_classes: list[str]
    old_tag: str | None = None


class Metadata(msgspec.Struct, forbid_unknown_fields=True):
    main_module: str
    compatibility_date: str
    bindings: list[dict[str, str]]
    keep_bindings: list[str] = msgspec.field(default_factory=list)
    migrations: Migrations | None = None
    observability: dict[str, bool] = msgspec.field(default_factory=dict)


class Secret(msgspec.Struct, forbid_unknown_fields=True):
    name: str
    text: str
    type: Literal["secret_text"]


class Enabled(msgspec.Struct, forbid_unknown_fields=True):
    enabled: bool


@dataclass(slots=True)
class Script:
    """One Worker as it stands."""

    module: bytes = b""
    bindings: list[dict[str, str]] = field(default_factory=list)
    secrets: dict[str, str] = field(default_factory=dict)
    migration_tag: str | None = None
    enabled: bool = False
    uploads: int = 0


class CloudflareDouble(Double):
    def __init__(self, key: str = "cf_api_demo") -> None:
        super().__init__(key)
        self.scripts: dict[str, Script] = {}

    def routes(self) -> list[web.RouteDef]:
        base = f"/accounts/{ACCOUNT}/workers"
        return [
            web.get(f"{base}/scripts", self._list),
            web.put(base + "/scripts/{name}", self._upload),
            web.get(base + "/scripts/{name}/settings", self._settings),
            web.put(base + "/scripts/{name}/secrets", self._set_secret),
            web.post(base + "/scripts/{name}/subdomain", self._enable),
            web.get(f"{base}/subdomain", self._subdomain),
        ]

    def limited(self, fault: Fault) -> web.Response:
        body = self.refusal(429, "Please wait and consider throttling your request speed")
        return web.json_response(body, status=429, headers={"Retry-After": f"{fault.seconds:g}"})

    def refusal(self, status: int, why: str) -> Mapping[str, Any]:
        error = {"code": CODES.get(status, 10001), "message": why}
        return {"result": None, "success": False, "errors": [error], "messages": []}

    async def _list(self, _: web.Request) -> web.Response:
        told = [{"id": name, "migration_tag": script.migration_tag} for name, script in self.scripts.items()]
        return _fine(told)

    async def _settings(self, request: web.Request) -> web.Response:
        script = self._find(request)
        hidden = [{"type": "secret_text", "name": name} for name in script.secrets]
        return _fine({"bindings": [*script.bindings, *hidden]})

    async def _set_secret(self, request: web.Request) -> web.Response:
        secret = await self.read(request, Secret)
        self._find(request).secrets[secret.name] = secret.text
        return _fine({"name": secret.name, "type": secret.type})

    async def _enable(self, request: web.Request) -> web.Response:
        self._find(request).enabled = (await self.read(request, Enabled)).enabled
        return _fine({"enabled": True})

    async def _subdomain(self, _: web.Request) -> web.Response:
        return _fine({"subdomain": SUBDOMAIN})

    async def _upload(self, request: web.Request) -> web.Response:
        parts = await self._parts(request)
        told = self._metadata(parts)
        module = parts[told.main_module][1]
        name = request.match_info["name"]
        script = self.scripts.get(name, Script())
        self._check_bindings(told, module)
        tag = self._migrated(told, script)
        kept = script.secrets if "secret_text" in told.keep_bindings else {}
        new = Script(module, told.bindings, kept, tag, script.enabled, script.uploads + 1)
        self.scripts[name] = new
        return _fine({"id": name, "migration_tag": tag})

    async def _parts(self, request: web.Request) -> dict[str, tuple[str, bytes]]:
        if request.content_type != "multipart/form-data":
            raise self.wrong(400, f"multipart/form-data is needed, not {request.content_type}")
        parts: dict[str, tuple[str, bytes]] = {}
        async for part in await request.multipart():
            if not isinstance(part, BodyPartReader):
                raise self.wrong(400, "multipart within multipart")
            parts[str(part.name)] = (part.headers["Content-Type"], bytes(await part.read()))
        return parts

    def _metadata(self, parts: Mapping[str, tuple[str, bytes]]) -> Metadata:
        kind, raw = parts.get("metadata", ("", b""))
        try:
            told = msgspec.json.decode(raw, type=Metadata)
        except msgspec.DecodeError as fault:
            raise self.wrong(400, f"metadata: {fault}") from None
        module = parts.get(told.main_module, ("", b""))[0]
        if (kind, module) != ("application/json", "application/javascript+module") or len(parts) != 2:
            raise self.wrong(400, f"the parts must be metadata and {told.main_module}, with their content types")
        return told

    def _check_bindings(self, told: Metadata, module: bytes) -> None:
        for binding in told.bindings:
            if frozenset(binding) != BINDINGS.get(binding.get("type", "")):
                raise self.wrong(400, f"binding {binding.get('name')!r} has unknown or missing fields")
            wanted = binding.get("class_name", "")
            if wanted and not re.search(rf"export class {wanted}\b".encode(), module):
                raise self.wrong(400, f"the module does not export the Durable Object class {wanted!r}")

    def _migrated(self, told: Metadata, script: Script) -> str | None:
        if told.migrations is None:
            classes = [binding["class_name"] for binding in told.bindings if "class_name" in binding]
            if classes and script.migration_tag is None:
                raise self.wrong(400, f"Cannot create binding for class {classes[0]}: it has no migration")
            return script.migration_tag
        if told.migrations.old_tag != script.migration_tag:
            raise self.wrong(412, f"Migration tag precondition failed; current tag is {script.migration_tag!r}")
        return told.migrations.new_tag

    def _find(self, request: web.Request) -> Script:
        script = self.scripts.get(request.match_info["name"])
        if script is None:
            raise self.wrong(404, "This Worker does not exist on your account.")
        return script


def _fine(result: Any) -> web.Response:
    return web.json_response({"result": result, "success": True, "errors": [], "messages": []})
