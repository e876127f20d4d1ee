"""The hub for machines without workerd: the protocol of forwarder/worker.js on aiohttp and sqlite3.

It is no mock. It verifies, stores, pushes and fences as the Worker does, and one contract suite
(tests/integrations/test_hub_contract.py) holds both to the same behaviour. workerd does not run on Raspberry Pi OS
(39-bit addresses), so there the demo and the tests use this one. It lacks what Cloudflare adds: hibernation, a public
address, somebody else's disk.

    provider ── POST /hooks/{source} ──► verify HMAC ─► insert, fsync ─► 200
    coordinator ── GET /connect ──► hello {proto:1, node, term, acked, hub?}
                        ◄── welcome {proto:1, pending, window, hub}   or  refused {why, term} + close 4001
                        ◄── hook {seq, source, delivery, received_ms, stale, headers, body: base64}
         ack {seq} ──►  rows <= seq leave          nack {seq, retry_after_s, why} ──►  again later, at last dead
                        ◄── dead {seq}             "ping" ──► ◄── "pong"
    GET /pull, POST /ack, POST /nack: the same outbox over plain HTTP, behind the same term fence
    GET /health · GET /dead · POST /dead/{seq}/replay · DELETE /dead/{seq} · GET, DELETE /notion/token
    POST /sources/{source}/pause, .../resume

The invariants are listed at the head of forwarder/worker.js; those about rows are kept by hub_outbox.py, those about
the one socket and the terms by hub_socket.py; hub_checks.py says what may enter. Change both hubs together.

    python -m piclusterd.demo.hub_double --port 8799 --db hub.sqlite      secrets: environment, named as the Worker's
"""

import argparse
import asyncio
import hashlib
import hmac
import logging
import os
import signal
from collections.abc import Awaitable, Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from aiohttp import web

from piclusterd.demo.hub_checks import (
    Refusal,
    digits,
    is_handshake,
    is_stale,
    kept_headers,
    read_body,
    reason_of,
    require_claim,
    require_fresh_enough,
)
from piclusterd.demo.hub_hints import Hints
from piclusterd.demo.hub_outbox import OUTBOX_MAX, WINDOW, Arrival, Outbox
from piclusterd.demo.hub_socket import CLOSE_WAIT_S, SWEEP_MS, Clock, Sockets
from piclusterd.integrations.signatures import (
    PROVIDERS,
    body_object,
    dedupe_key,
    delivery_id,
    selftest_secret,
    verify,
)

TTL_DAYS = 14  # as in the Worker: longer than any outage that nobody notices
NACK_LIMIT = 20
QUOTA_MAX = 100_000  # requests, and rows written, a day: Cloudflare's free plan, told here for the same picture

log = logging.getLogger("piclusterd.demo.hub")
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class Hub:
    """The hub's routes. One event loop; the outbox commits synchronously."""

    def __init__(self, outbox: Outbox, env: Mapping[str, str], clock: Clock | None = None) -> None:
        self._outbox = outbox
        self._env = env
        self._clock = clock or Clock()
        self._requests = 0
        self._outbox_max = min(int(env.get("HUB_OUTBOX_MAX") or OUTBOX_MAX), OUTBOX_MAX)
        ttl_ms = int(float(env.get("HUB_TTL_DAYS") or TTL_DAYS) * 86_400_000)
        self._sockets = Sockets(outbox, ttl_ms, self._clock, Hints(outbox, env))

    def app(self) -> web.Application:
        """The aiohttp application."""
        app = web.Application(middlewares=[self._guard])
        app.add_routes(
            [
                web.post("/hooks/{source}", self.take_hook),
                web.get("/health", self.health, allow_head=False),
                web.get("/connect", self.connect, allow_head=False),
                web.get("/pull", self.pull, allow_head=False),
                web.post("/ack", self.http_ack),
                web.post("/nack", self.http_nack),
                web.get("/dead", self.list_dead, allow_head=False),
                web.post(r"/dead/{seq:\d{1,15}}/replay", self.replay_dead),
                web.delete(r"/dead/{seq:\d{1,15}}", self.drop_dead),
                web.post("/sources/{source}/pause", self.pause),
                web.post("/sources/{source}/resume", self.resume),
                web.get("/notion/token", self.show_token, allow_head=False),
                web.delete("/notion/token", self.drop_token),
            ]
        )
        app.on_startup.append(self._start)
        app.on_shutdown.append(self._stop)
        return app

    async def _start(self, _: web.Application) -> None:
        self._sockets.start()

    async def _stop(self, _: web.Application) -> None:
        self._sockets.stop()

    # --- who is asking?

    @web.middleware
    async def _guard(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        try:
            if request.match_info.http_exception is None and not self._is_open(request):
                self._require_bearer(request)
            self._requests += 1
            return await handler(request)
        except Refusal as refusal:
            return web.json_response(refusal.body, status=refusal.status)
        except web.HTTPException as error:
            wrong = Refusal(error.status, error.reason, f"{request.method} {request.path}", "see forwarder/worker.js")
            return web.json_response(wrong.body, status=error.status)
        except Exception:
            log.exception("%s %s failed", request.method, request.path)
            failed = Refusal(500, "the hub failed", "an internal error; nothing was promised", "try again; see the log")
            return web.json_response(failed.body, status=500)

    @staticmethod
    def _is_open(request: web.Request) -> bool:
        return request.path == "/health" or request.path.startswith("/hooks/")

    def _configured(self, *names: str) -> list[str]:
        return [self._env[name] for name in names if self._env.get(name)]

    def _require_bearer(self, request: web.Request) -> None:
        tokens = self._configured("HUB_TOKEN", "HUB_TOKEN_NEXT")
        if not tokens:
            raise Refusal(503, "the hub has no token", "HUB_TOKEN is not set", "set HUB_TOKEN in its environment")
        given = _sha256(request.headers.get("Authorization", ""))
        matches = [hmac.compare_digest(given, _sha256(f"Bearer {token}")) for token in tokens]
        if not any(matches):
            fix = "send `Authorization: Bearer <HUB_TOKEN>`"
            raise Refusal(401, "not authorised", "the bearer token is missing or wrong", fix)

    # --- ingest

    async def take_hook(self, request: web.Request) -> web.Response:
        """POST /hooks/{source}: verify over raw bytes, store, then 200."""
        source = _known_source(request)
        body = await read_body(request)
        data = body_object(body)
        secrets = self._secrets_of(source)
        if source == "notion" and is_handshake(request, data):
            return self._handshake(data["verification_token"], configured=bool(secrets))
        if source == "notion" and not secrets:
            secrets = [self._outbox.meta("notion_token") or ""]
        self._require_signature(source, request, body, secrets)
        now = self._clock.now_ms()
        require_fresh_enough(source, data, now)
        hook = Arrival(
            source=source,
            delivery=delivery_id(source, request.headers, body),
            dedupe=dedupe_key(source, request.headers, body),
            received_ms=now,
            stale=is_stale(source, data, now),
            headers=kept_headers(source, request.headers),
            body=body,
        )
        return self._ingest(hook)

    def _secrets_of(self, source: str) -> list[str]:
        if source == "selftest":
            return [selftest_secret(token) for token in self._configured("HUB_TOKEN", "HUB_TOKEN_NEXT")]
        return self._configured(f"{source.upper()}_SECRET", f"{source.upper()}_SECRET_NEXT")

    @staticmethod
    def _require_signature(source: str, request: web.Request, body: bytes, secrets: list[str]) -> None:
        name = "HUB_TOKEN" if source == "selftest" else f"{source.upper()}_SECRET"
        if not any(secrets):
            why = f"no secret for {source} is set, so nothing can be verified"
            raise Refusal(503, "source not configured", why, f"set {name} in the hub's environment")
        verdict = verify(source, request.headers, body, secrets)
        if not verdict.ok:
            fix = f"compare {name} with the provider's settings"
            raise Refusal(401, "signature refused", verdict.value, fix)

    def _handshake(self, token: str, *, configured: bool) -> web.Response:
        if configured or self._outbox.meta("notion_token"):
            held = "a token is already held; an unsigned request may not replace it"
            why = "NOTION_SECRET is set" if configured else held
            fix = "remove the old one first (DELETE /notion/token) if you made a new subscription"
            raise Refusal(409, "handshake refused", why, fix)
        self._outbox.set_meta("notion_token", token)
        return web.json_response({"stored": True})

    def _ingest(self, hook: Arrival) -> web.Response:
        old = self._outbox.known(hook.dedupe)
        if old is not None:
            return web.json_response({"seq": old, "duplicate": True})
        if self._outbox.depth() + self._outbox.parked_count() >= self._outbox_max:
            full = Refusal(503, "the outbox is full", f"{self._outbox_max} hooks wait", "bring the coordinator back")
            return web.json_response(full.body, status=503, headers={"Retry-After": "60"})
        seq = self._outbox.insert(hook)
        self._sockets.wake_by(self._clock.now_ms() + SWEEP_MS)
        self._sockets.push()
        self._sockets.wake_for_hints()
        return web.json_response({"seq": seq, "duplicate": False})

    # --- the socket

    async def connect(self, request: web.Request) -> web.StreamResponse:
        """GET /connect: the coordinator's WebSocket."""
        if request.headers.get("Upgrade", "").lower() != "websocket":
            fix = "dial with a WebSocket client, or use GET /pull"
            raise Refusal(426, "upgrade required", "/connect speaks WebSocket only", fix)
        return await self._sockets.serve(request)

    # --- the same outbox over plain HTTP

    async def pull(self, request: web.Request) -> web.Response:
        """GET /pull?max=&term=&node=: the first unacked rows."""
        query = request.query
        fields: dict[str, Any] = {"term": digits(query.get("term")), "node": query.get("node")}
        require_claim(fields, max=digits(query.get("max", str(WINDOW))))
        self._sockets.fence(fields["term"])
        self._sockets.note_here()
        limit = min(max(int(query.get("max", WINDOW)), 1), WINDOW)
        hooks = self._outbox.frames(above=0, limit=limit)
        if hooks and hooks[-1]["seq"] > self._outbox.pulled:
            self._outbox.set_meta("pulled", hooks[-1]["seq"])
        counts = {"pending": self._outbox.depth(), "term": self._outbox.term, "hub": self._outbox.hub_id}
        return web.json_response({"hooks": hooks, **counts})

    async def http_ack(self, request: web.Request) -> web.Response:
        """POST /ack {seq, term, node}: cumulative."""
        fields = body_object(await read_body(request))
        require_claim(fields, seq=fields.get("seq"))
        self._sockets.fence(fields["term"])
        if fields["seq"] > self._outbox.pulled:
            why = f"seq {fields['seq']} was never handed out by /pull"
            raise Refusal(400, "ack refused", why, "ack only what you were given")
        self._sockets.acked(fields["seq"])
        return web.json_response({"acked": fields["seq"]})

    async def http_nack(self, request: web.Request) -> web.Response:
        """POST /nack {seq, term, node, why?}: counts one failure; the next pull offers the row again."""
        fields = body_object(await read_body(request))
        require_claim(fields, seq=fields.get("seq"))
        self._sockets.fence(fields["term"])
        seq: int = fields["seq"]
        handed_out = seq <= self._outbox.pulled
        outcome = self._outbox.nack(seq, reason_of(fields.get("why")), self._clock.now_ms()) if handed_out else None
        if outcome is None:
            raise Refusal(404, "nack refused", f"seq {seq} is not in the outbox", "pull again")
        if outcome.dead:
            self._sockets.tell_dead([seq])
        return web.json_response({"nacks": outcome.nacks, "dead": outcome.dead})

    async def health(self, _: web.Request) -> web.Response:
        """GET /health: no secrets, so no token."""
        oldest, link = self._outbox.oldest_ms(), self._sockets.current()
        return web.json_response(
            {
                "ok": True,
                "depth": self._outbox.depth(),
                "oldest_unacked_s": None if oldest is None else max(0.0, (self._clock.now_ms() - oldest) / 1000),
                "connected": None if link is None else link.node,
                "term": self._outbox.term,
                "last": self._outbox.last(),
                "dead": self._outbox.dead_count(),
                "parked": self._outbox.parked_count(),
                "paused": self._outbox.paused(),
                "quota": self._quota(),
            }
        )

    def _quota(self) -> dict[str, Any]:
        """Since this process started; the Worker counts a day."""
        day = datetime.fromtimestamp(self._clock.now_ms() / 1000, UTC).date().isoformat()
        used = {"requests": self._requests, "rows_written": self._outbox.rows_written}
        return {"day": day, **used, "requests_max": QUOTA_MAX, "rows_max": QUOTA_MAX}

    # --- for the operator

    async def pause(self, request: web.Request) -> web.Response:
        """POST /sources/{source}/pause: its hooks are stored and kept back."""
        source, link = _known_source(request), self._sockets.current()
        moved = self._outbox.pause(source, 0 if link is None else link.cursor, self._clock.now_ms())
        return web.json_response({"source": source, "paused": True, "moved": moved})

    async def resume(self, request: web.Request) -> web.Response:
        """POST /sources/{source}/resume: they go out, in order."""
        source = _known_source(request)
        moved = self._outbox.resume(source)
        self._sockets.push()
        return web.json_response({"source": source, "paused": False, "moved": moved})

    async def list_dead(self, request: web.Request) -> web.Response:
        """GET /dead?after=: without bodies."""
        after = digits(request.query.get("after")) or 0
        return web.json_response({"dead": self._outbox.list_dead(after), "total": self._outbox.dead_count()})

    async def replay_dead(self, request: web.Request) -> web.Response:
        """POST /dead/{seq}/replay: back into the outbox under a new seq."""
        seq = int(request.match_info["seq"])
        fresh = self._outbox.replay(seq, self._clock.now_ms())
        if fresh is None:
            raise Refusal(404, "no such dead letter", f"seq {seq} is not there", "GET /dead lists them")
        self._sockets.push()
        return web.json_response({"seq": fresh, "replayed": seq})

    async def drop_dead(self, request: web.Request) -> web.Response:
        """DELETE /dead/{seq}."""
        seq = int(request.match_info["seq"])
        if not self._outbox.drop_dead(seq, self._clock.now_ms()):
            raise Refusal(404, "no such dead letter", f"seq {seq} is not there", "GET /dead lists them")
        return web.json_response({"dropped": seq})

    async def show_token(self, _: web.Request) -> web.Response:
        """GET /notion/token: for the operator to paste into Notion's settings."""
        return web.json_response({"token": self._outbox.meta("notion_token")})

    async def drop_token(self, _: web.Request) -> web.Response:
        """DELETE /notion/token: lets the next handshake in."""
        return web.json_response({"dropped": self._outbox.drop_meta("notion_token")})


def _known_source(request: web.Request) -> str:
    source = request.match_info["source"]
    if source not in PROVIDERS:
        known = ", ".join(PROVIDERS)
        raise Refusal(404, "unknown source", f'"{source}" is none of {known}', "correct the webhook's URL")
    return source


def _sha256(text: str) -> bytes:
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).digest()


async def serve(host: str, port: int, db: Path, env: Mapping[str, str]) -> None:
    """Run until SIGTERM or SIGINT. Port 0 takes a free one; the line printed names it."""
    stop = asyncio.Event()
    for name in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(name, stop.set)
    outbox = Outbox(db, nack_limit=int(env.get("HUB_NACK_LIMIT") or NACK_LIMIT))
    runner = web.AppRunner(Hub(outbox, env).app(), access_log=None, shutdown_timeout=2 * CLOSE_WAIT_S)
    try:
        await runner.setup()
        site = web.TCPSite(runner, host, port)
        await site.start()
        print(f"hub (python) listening on {site.name}, outbox in {db}", flush=True)
        await stop.wait()
    finally:
        await runner.cleanup()
        outbox.close()


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="hub_double", description="The hub for machines without workerd.")
    parser.add_argument("--port", type=int, required=True, help="0 takes a free one")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--db", type=Path, required=True, help="the outbox; made when missing")
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    asyncio.run(serve(options.host, options.port, options.db, os.environ))


if __name__ == "__main__":
    main()
