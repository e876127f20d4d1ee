"""A double of Linear: a `Workspace` behind the GraphQL API that the client speaks, for tests and the demo.

    client ──POST /graphql──▶ key? ─▶ planned fault? ─▶ valid for the public schema? ─▶ resolve ─▶ effects
    demo   ──POST /issues───▶ a new issue; the answer is the webhook that Linear would send
           ──GET  /effects──▶ what was really changed, in order

Where graphql-core and Linear's public schema are at hand (`PICLUSTER_LINEAR_SCHEMA`, or beside the checkout), requests
are parsed, validated, coerced and executed against that schema; what it forbids is refused and kept in `violations`.
Without them the operations that the client is known to send are found by name and answered with every field.

Faults are planned in `faults` and used up one a request. It is no model of Linear's permissions, history or quota.

    python -m piclusterd.demo.linear_double --port 8090      one JSON line for each effect
"""

from __future__ import annotations

import argparse
import asyncio
import functools
import json
import os
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from aiohttp import web

from .doubles import Fault as Fault
from .doubles import FaultKind as FaultKind
from .doubles import Faults
from .linear_workspace import Refusal, Workspace

try:  # a development dependency: the demo runs without it
    import graphql
except ImportError:  # pragma: no cover
    graphql = None  # type: ignore[assignment]

SCHEMA_VARIABLE = "PICLUSTER_LINEAR_SCHEMA"
SCHEMA_NEAR_CHECKOUT = Path(__file__).parents[2].parent / "shared/fixtures/linear/schema.graphql"
ANOTHER = "00000000-0000-4000-8000-00000000dead"
"""The id of something else."""
DEMO_KEY = "lin_api_demo"
OPERATIONS = (
    "issueUpdate", "commentCreate", "issueLabels", "issues", "issue", "comment", "attachmentCreate", "commentDelete",
    "issueCreate", "commentUpdate",
)  # fmt: skip
"""Root fields that are resolved."""
AFTERWARDS = ("lost", "partial", "quota-spent", "slow", "unsuccessful", "wrong-id")
"""Faults of a request that was performed."""
QUOTA = {
    "x-ratelimit-requests-limit": "2500",
    "x-ratelimit-requests-remaining": "2499",
    "x-ratelimit-complexity-limit": "3000000",
    "x-ratelimit-complexity-remaining": "2999000",
}


class LinearDouble(Workspace):
    """`async with LinearDouble() as double:` then `double.url`; `key` is the Authorization header it asks for."""

    def __init__(self, key: str = DEMO_KEY, labels: Sequence[str] = ("Bug", "Feature", "Question", "Chore")) -> None:
        super().__init__(labels)
        self.key = key
        self.url = ""
        self.violations: list[str] = []
        self.faults = Faults()
        self.requests = 0
        self._schema = public_schema()
        self._stopping = asyncio.Event()
        self._runner: web.AppRunner | None = None

    # the service ---------------------------------------------------------------------------------------------------
    async def start(self, port: int = 0, host: str = "127.0.0.1") -> str:
        """Listen; the URL of the GraphQL endpoint."""
        app = web.Application()
        app.router.add_post("/graphql", self._graphql)
        app.router.add_post("/issues", self._post_issue)
        app.router.add_get("/effects", self._get_effects)
        self._runner = web.AppRunner(app, shutdown_timeout=1.0)
        await self._runner.setup()
        await web.TCPSite(self._runner, host, port).start()
        bound = self._runner.addresses[0][1]
        self.url = f"http://{host}:{bound}/graphql"
        return self.url

    async def stop(self) -> None:
        self._stopping.set()
        if self._runner is not None:
            await self._runner.cleanup()

    async def __aenter__(self) -> LinearDouble:
        await self.start()
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.stop()

    async def _graphql(self, request: web.Request) -> web.StreamResponse:
        self.requests += 1
        if request.headers.get("Authorization") != self.key:
            refusal = Refusal(
                "Authentication required, not authenticated", "", "AUTHENTICATION_ERROR", "authentication error"
            )
            return web.json_response({"errors": [_error(refusal)]}, status=401, headers=QUOTA)
        body = await request.json()
        document, variables = body["query"], body.get("variables") or {}
        fault = self.faults.take()
        if fault is not None and fault.kind not in AFTERWARDS:
            return await self._fail(fault)
        status, answer = self.answer(document, variables)
        if fault is None:
            return web.json_response(answer, status=status, headers=QUOTA)
        if fault.kind == "slow":
            await self._wait(fault.seconds)
        return self._spoil(fault, status, answer, request)

    async def _fail(self, fault: Fault) -> web.StreamResponse:
        """A fault that comes before anything is performed."""
        match fault.kind:
            case "ratelimited":
                refusal = Refusal("Rate limit exceeded", "", "RATELIMITED", "ratelimited")
                return web.json_response({"errors": [_error(refusal)]}, status=400, headers=_spent(fault.seconds))
            case "spent":  # what a proxy before Linear says; Linear itself answers 400
                return web.Response(status=429, text="Too Many Requests", headers={"Retry-After": f"{fault.seconds:g}"})
            case "internal":
                return web.Response(status=500, text="Internal Server Error")
            case "unavailable":
                return web.Response(status=503, text="upstream connect error")
            case "malformed":
                return web.Response(text='{"data": {"issue": ', content_type="application/json")
            case "oversized":
                return web.json_response({"data": {"issue": {"description": "x" * 2_000_000}}})
            case _:
                await self._stopping.wait()
                return web.Response(status=503)

    async def _wait(self, seconds: float) -> None:
        try:
            async with asyncio.timeout(seconds):
                await self._stopping.wait()
        except TimeoutError:
            pass

    def _spoil(self, fault: Fault, status: int, answer: dict[str, Any], request: web.Request) -> web.StreamResponse:
        """A fault that comes after the request was performed."""
        if fault.kind == "lost":
            assert request.transport is not None
            request.transport.abort()
        elif fault.kind == "partial":
            trouble = {
                "message": "Internal error",
                "extensions": {"type": "internal error", "code": "INTERNAL_SERVER_ERROR"},
            }
            answer = {**answer, "errors": [trouble]}
        elif fault.kind in ("unsuccessful", "wrong-id"):
            answer = _lie(fault.kind, answer)
        headers = _spent(fault.seconds) if fault.kind == "quota-spent" else QUOTA
        return web.json_response(answer, status=status, headers=headers)

    async def _post_issue(self, request: web.Request) -> web.Response:
        body = await request.json()
        return web.json_response(self.create_issue(**body), status=201)

    async def _get_effects(self, request: web.Request) -> web.Response:
        return web.json_response([asdict(effect) for effect in self.effects])

    # GraphQL -------------------------------------------------------------------------------------------------------
    def answer(self, document: str, variables: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        """HTTP status and body of the answer to one request."""
        if self._schema is None:
            return self._by_name(document, variables)
        try:
            parsed = graphql.parse(document)
        except graphql.GraphQLError as fault:
            return self._violation(str(fault), "GRAPHQL_PARSE_FAILED")
        if faults := graphql.validate(self._schema, parsed):
            return self._violation("; ".join(fault.message for fault in faults), "GRAPHQL_VALIDATION_FAILED")
        operation = graphql.get_operation_ast(parsed)
        assert operation is not None
        coerced = graphql.get_variable_values(self._schema, operation.variable_definitions or (), variables)
        if isinstance(coerced, list):
            return self._violation("; ".join(fault.message for fault in coerced), "BAD_USER_INPUT")
        result = graphql.execute_sync(self._schema, parsed, root_value=self.roots(), variable_values=variables)
        answer: dict[str, Any] = {"data": result.data}
        if result.errors:
            answer["errors"] = [fault.formatted for fault in result.errors]
        return 200, answer

    def _violation(self, text: str, code: str) -> tuple[int, dict[str, Any]]:
        self.violations.append(text)
        return 400, {"errors": [_error(Refusal(text, "", code, "graphql error"))]}

    def _by_name(self, document: str, variables: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        """Without a schema: root fields are found by name, their arguments are the variables of the same name."""
        data: dict[str, Any] = {}
        roots = self.roots()
        for name in OPERATIONS:
            # two blanks: a root field, as the client writes its documents; deeper ones stand further right
            if re.search(rf"^  {name}\(", document, re.MULTILINE):
                arguments = ("id", "input", "first", "after") if name != "issueLabels" else ()
                told = {k: variables[k] for k in arguments if k in variables}
                if name == "issues":
                    told["filter"] = {"createdAt": {"gte": variables["since"]}}
                try:
                    found = roots[name](None, **told)
                    data[name] = _plain(found, variables.get("team"))
                except Refusal as refusal:
                    return 200, {"data": None, "errors": [_error(refusal)]}
        if not data:
            return self._violation("no operation that is known", "GRAPHQL_VALIDATION_FAILED")
        return 200, {"data": data}


@functools.cache
def _schema_at(path: Path) -> Any:
    return graphql.build_schema(path.read_text("utf-8"), assume_valid=True)


def schema_path() -> Path | None:
    """Where Linear's public schema lies on this machine, or None."""
    named = os.environ.get(SCHEMA_VARIABLE)
    path = Path(named) if named else SCHEMA_NEAR_CHECKOUT
    return path if path.is_file() else None


def public_schema() -> Any | None:
    """Linear's public schema as a `graphql.GraphQLSchema`, or None where it or graphql-core is absent."""
    path = schema_path()
    return None if path is None or graphql is None else _schema_at(path)


def _plain(value: Any, labels: Mapping[str, Any] | None) -> Any:
    """`value` with its fields that take arguments resolved; `labels` is the filter of the team's."""
    if callable(value):
        return _plain(value(None, filter=labels), labels)
    if isinstance(value, Mapping):
        return {key: _plain(inner, labels) for key, inner in value.items()}
    return [_plain(inner, labels) for inner in value] if isinstance(value, list) else value


def _lie(kind: str, answer: Any) -> Any:
    """The answer, told of something else, or as if it had not succeeded."""
    if not isinstance(answer, dict):
        return [_lie(kind, inner) for inner in answer] if isinstance(answer, list) else answer
    told = {key: _lie(kind, inner) for key, inner in answer.items()}
    if kind == "wrong-id":
        return told | {key: ANOTHER for key in ("id", "identifier") if key in told}
    return told | ({"success": False} if "success" in told else {})


def _error(refusal: Refusal) -> dict[str, Any]:
    return {"message": str(refusal), "extensions": refusal.extensions}


def _spent(seconds: float) -> dict[str, str]:
    reset_ms = time.time_ns() // 1_000_000 + int(seconds * 1000)
    return {**QUOTA, "x-ratelimit-requests-remaining": "0", "x-ratelimit-requests-reset": str(reset_ms)}


async def _serve(port: int) -> None:
    double = LinearDouble()
    double.on_effect = lambda effect: print(json.dumps(asdict(effect)), flush=True)
    print(json.dumps({"listening": await double.start(port), "key": double.key}), flush=True)
    try:
        await asyncio.Event().wait()
    finally:
        await double.stop()


def main() -> None:
    parser = argparse.ArgumentParser(description="a double of Linear's GraphQL API, for tests and the demo")
    parser.add_argument("--port", type=int, default=8090, help="TCP port on 127.0.0.1; 0 picks a free one")
    try:
        asyncio.run(_serve(parser.parse_args().port))
    except KeyboardInterrupt:
        pass  # how a demo ends


if __name__ == "__main__":
    main()
