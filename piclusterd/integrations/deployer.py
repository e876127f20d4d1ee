"""Puts the hub's Worker of this release at Cloudflare, for a workflow. What is unchanged is left alone.

CallOut ──perform──▶ hub   plan (content hash) ─▶ upload, where it differs      `integrations.cloudflare`
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import aiohttp

from ..errors import PiclusterError, Unavailable
from .cloudflare import SCRIPT, VARIABLES, Cloudflare, worker_source
from .outcome import CallFailed


class Deployer:
    """One account; `token` may edit its Workers' scripts."""

    def __init__(self, account: str, token: str, url: str) -> None:
        self._account, self._token, self._url = account, token, url

    async def perform(self, operation: str, arguments: Mapping[str, Any], key: str) -> Mapping[str, Any]:
        """`{"uploaded": bool, "build": hash}`. `key` is not needed: an upload of the same build is none."""
        if operation != "hub":
            raise CallFailed(f"nothing called {operation!r} is deployed", retryable=False)
        try:
            async with aiohttp.ClientSession(cookie_jar=aiohttp.DummyCookieJar()) as http:
                api = Cloudflare(http, self._account, self._token, self._url)
                source = worker_source()
                plan = await api.plan(source, VARIABLES, SCRIPT)
                if plan.upload:
                    await api.upload(plan, source, VARIABLES)
                return {"uploaded": plan.upload, "build": plan.build}
        except PiclusterError as fault:
            passes, pause = isinstance(fault, Unavailable), getattr(fault, "retry_after_s", None)
            raise CallFailed(fault.what, fault.why, fault.fix, retryable=passes, retry_after_s=pause) from fault
