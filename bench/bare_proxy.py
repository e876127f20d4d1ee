"""The least that a proxy written with aiohttp can do: read a body, post it elsewhere, give back what comes.

    client ─▶ bare_proxy ─▶ the node        python -m bench.bare_proxy PORT TARGET

No routing, no keys, no metrics, one kept connection, no TLS: what it costs is the library's price of a hop.
"""

from __future__ import annotations

import sys
from collections.abc import AsyncIterator

import aiohttp
from aiohttp import web

PASSED = ("Content-Type", "Authorization")


def make_app(target: str) -> web.Application:
    app = web.Application()

    async def client(_app: web.Application) -> AsyncIterator[None]:
        async with aiohttp.ClientSession() as app[HTTP]:
            yield

    async def forward(request: web.Request) -> web.Response:
        headers = {name: request.headers[name] for name in PASSED if name in request.headers}
        async with request.app[HTTP].post(target + request.path, data=await request.read(), headers=headers) as answer:
            return web.Response(status=answer.status, body=await answer.read(), content_type=answer.content_type)

    app.cleanup_ctx.append(client)
    app.router.add_post("/{path:.*}", forward)
    app.router.add_get("/health/liveliness", lambda _: _alive())
    return app


HTTP = web.AppKey("http", aiohttp.ClientSession)


async def _alive() -> web.Response:
    return web.Response()


if __name__ == "__main__":
    web.run_app(make_app(sys.argv[2]), host="127.0.0.1", port=int(sys.argv[1]), access_log=None, print=None)
