"""Fixtures for the hub: `rig` (Python, started) and `any_rig` (both kinds, not started yet)."""

from collections.abc import AsyncIterator
from pathlib import Path

import aiohttp
import pytest

from piclusterd.demo import workerd
from tests.integrations.rig import Rig


async def _rig(kind: str, home: Path) -> AsyncIterator[Rig]:
    async with aiohttp.ClientSession() as http:
        rig = Rig(kind, home, http)
        try:
            yield rig
        finally:
            if rig.hub is not None:
                await rig.hub.kill()


@pytest.fixture(params=["python", "workerd"])
async def any_rig(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Rig]:
    """A hub of each kind in turn, to be started by the test."""
    if request.param == "workerd" and workerd.available() is None:
        pytest.skip(f"no workerd here: {workerd.find().why}")
    async for rig in _rig(request.param, tmp_path):
        yield rig


@pytest.fixture
async def hub(any_rig: Rig) -> Rig:
    """A hub of each kind in turn, started with a token and a secret for each source."""
    await any_rig.start()
    return any_rig


@pytest.fixture
async def python_hub(tmp_path: Path) -> AsyncIterator[Rig]:
    """The Python hub, started."""
    async for rig in _rig("python", tmp_path):
        await rig.start()
        yield rig
