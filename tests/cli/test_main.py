"""The client as a whole: help, versions, wrong usage, and what it loads."""

from __future__ import annotations

import asyncio
import sys

import pytest

from piclusterd import __version__
from piclusterd.cli.main import COMMANDS
from piclusterd.cli.terminal import ago, cell, clean

from .command import environment, picluster


async def test_help_names_every_command() -> None:
    result = await picluster("--help")
    assert result.code == 0
    assert [name for name in (*COMMANDS, "version") if f"\n  {name} " not in result.out] == []


async def test_version() -> None:
    assert (await picluster("version")).out == f"picluster {__version__}\n"


@pytest.mark.parametrize("args", [("nosuch",), ("init",), ("chat", "--max-tokens", "0", "x")])
async def test_wrong_usage_is_64_since_2_means_no_quorum(args: tuple[str, ...]) -> None:
    assert (await picluster(*args)).code == 64


async def test_a_host_that_is_no_url_is_told() -> None:
    result = await picluster("--host", "ftp://x", "status")
    assert (result.code, result.err.splitlines()[0]) == (1, "error: 'ftp://x' is not the URL of a node")


async def test_debug_shows_the_traceback() -> None:
    assert "Traceback" in (await picluster("--debug", "--host", "ftp://x", "status")).err


async def test_help_loads_none_of_the_heavy_libraries() -> None:
    code = (
        "import sys\nfrom piclusterd.cli import main\ntry:\n    main.main(['--help'])\nexcept SystemExit:\n    pass\n"
        "print({'aiohttp', 'rich', 'cryptography', 'zeroconf', 'psutil'} & set(sys.modules))"
    )
    child = await asyncio.create_subprocess_exec(
        sys.executable, "-c", code, stdout=asyncio.subprocess.PIPE, env=environment()
    )
    out, _ = await child.communicate()
    assert out.decode().splitlines()[-1] == "set()"


def test_control_characters_become_visible() -> None:
    hostile = "".join(map(chr, range(0x20))) + "\x7f\x9b\u202e\u2028"
    assert clean(hostile).isprintable()
    assert clean("a\tb\n\x1b", prose=True) == "a\tb\n\\x1b"
    assert clean("père 日本 ✓") == "père 日本 ✓"


def test_cells_are_short_and_never_empty() -> None:
    assert (cell(""), len(cell("x" * 500))) == ("-", 80)


@pytest.mark.parametrize(
    ("seconds", "text"), [(None, "now"), (0.4, "0.4s"), (9, "9s"), (720, "12m"), (7200, "2h"), (345600, "4d")]
)
def test_ages_have_one_unit(seconds: float | None, text: str) -> None:
    assert ago(seconds) == text
