"""The door of a node that is made up; a test file says which (`house`)."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from piclusterd.web.app import make_app
from piclusterd.web.listener import serve
from tests.web.house import Node


@pytest.fixture
async def path(house: Node, tmp_path: Path) -> AsyncIterator[str]:
    """The socket at which `house` listens."""
    listener = await serve(make_app(house.doors()), "127.0.0.1", 0, tmp_path / "api.sock")
    yield str(tmp_path / "api.sock")
    await listener.close()
