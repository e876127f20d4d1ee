"""Runs the real client as a child process, as a shell would."""

from __future__ import annotations

import asyncio
import os
import sys
from dataclasses import dataclass

LIMIT_S = 60.0
QUIET = ("PICLUSTER_", "STATE_DIRECTORY", "RUNTIME_DIRECTORY", "CREDENTIALS_DIRECTORY", "NO_COLOR", "FORCE_COLOR")


@dataclass(frozen=True, slots=True)
class Result:
    code: int
    out: str
    err: str


def environment(**changes: str) -> dict[str, str]:
    """This process's, without what would change the client's mind."""
    return {name: text for name, text in os.environ.items() if not name.startswith(QUIET)} | changes


async def picluster(*args: str, stdin: str = "", **environ: str) -> Result:
    child = await asyncio.create_subprocess_exec(
        sys.executable, "-W", "error", "-m", "piclusterd.cli.main", *args,
        stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
        env=environment(**environ),
    )  # fmt: skip
    try:
        async with asyncio.timeout(LIMIT_S):
            out, err = await child.communicate(stdin.encode())
    finally:
        if child.returncode is None:
            child.kill()
            await child.wait()
    return Result(child.returncode or 0, out.decode(), err.decode())
