"""The house rules that no other tool holds: sizes, names, headers, and that nothing tells where it was written."""

from __future__ import annotations

import ast
import re
import subprocess
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "piclusterd"
FUNCTION_LINES_MAX = 70
MODULE_LINES_MAX = 400
CATALOGUES = {"piclusterd/events.py": 480, "piclusterd/wire.py": 480}
"""Lists of types without logic, which are easier to read in one place. The figures only ever shrink."""
BANNED_NAMES = {"utils", "util", "helpers", "helper", "manager", "base", "core", "common", "misc"}
# Put together from pieces, so that this file passes its own tests.
MARKERS = re.compile(r"\b(" + "|".join(("TO" + "DO", "FIX" + "ME", "X" + "XX")) + r")\b")
HOST_PATHS = re.compile(r"(?:(?<![\w.~$}{/])|file://)/(?:" + "|".join(("ho" + "me", "ro" + "ot", "wo" + "rk")) + r")/")
REGISTRY_HOSTS = re.compile("|".join((r"pypi\." + "org", r"files\.python" + "hosted", r"registry\.npm" + "js")))
TEXT_BYTES_MAX = 1024 * 1024
"""Larger files are data; they are not searched."""

Function = ast.FunctionDef | ast.AsyncFunctionDef


@cache
def tracked() -> tuple[Path, ...]:
    """Every file that is, or would be, in the repository."""
    command = ["git", "ls-files", "-co", "--exclude-standard", "-z"]
    try:
        listed = subprocess.run(command, cwd=ROOT, capture_output=True, check=True).stdout.decode()
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"this is not a git work tree: {error}")
    return tuple(path for name in sorted(listed.split("\0")) if name and (path := ROOT / name).is_file())


@cache
def texts() -> dict[Path, str]:
    found = {}
    for path in tracked():
        raw = path.read_bytes()
        if len(raw) <= TEXT_BYTES_MAX and b"\0" not in raw:
            found[path] = raw.decode(errors="replace")
    return found


@cache
def modules() -> dict[Path, ast.Module]:
    return {path: ast.parse(text, filename=str(path)) for path, text in texts().items() if path.suffix == ".py"}


def named(path: Path, line: int | None = None) -> str:
    return str(path.relative_to(ROOT)) + (f":{line}" if line else "")


def public(path: Path) -> bool:
    return path.is_relative_to(PACKAGE) and (path.name == "__init__.py" or not path.name.startswith("_"))


def lines_of(function: Function) -> int:
    """Its lines without the docstring."""
    first = function.body[0]
    is_docstring = isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant) and first.value.value
    docstring = (first.end_lineno or 0) - first.lineno + 1 if isinstance(is_docstring, str) else 0
    return (function.end_lineno or 0) - function.lineno + 1 - docstring


def found_in(pattern: re.Pattern[str], wanted: Callable[[Path], bool] = lambda _: True) -> list[str]:
    """`file:line` of every match in the tracked texts."""
    return [
        f"{named(path, number)}: {line.strip()[:100]}"
        for path, text in texts().items()
        if wanted(path)
        for number, line in enumerate(text.splitlines(), start=1)
        if pattern.search(line)
    ]


def sleeps(tree: ast.Module) -> Iterator[int]:
    """Lines that call `….sleep(`, or `sleep(` imported from asyncio or time."""
    bare = {
        alias.asname or alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.module in ("asyncio", "time")
        for alias in node.names
        if alias.name == "sleep"
    }
    for node in ast.walk(tree):
        match node:
            case ast.Call(func=ast.Attribute(value=ast.Name(id="asyncio" | "time"), attr="sleep")):
                yield node.lineno
            case ast.Call(func=ast.Name(id=name)) if name in bare:
                yield node.lineno


def test_functions_are_short() -> None:
    long = [
        f"{named(path, node.lineno)}: {node.name} has {lines_of(node)} lines"
        for path, tree in modules().items()
        for node in ast.walk(tree)
        if isinstance(node, Function) and lines_of(node) > FUNCTION_LINES_MAX
    ]
    assert long == []


def test_modules_are_of_readable_length() -> None:
    sizes = {path: texts()[path].count("\n") for path in modules() if path.is_relative_to(PACKAGE)}
    caps = {path: CATALOGUES.get(named(path), MODULE_LINES_MAX) for path in sizes}
    assert [f"{named(path)}: {size} lines" for path, size in sizes.items() if size > caps[path]] == []


def test_nothing_is_left_to_do_in_the_code() -> None:
    assert found_in(MARKERS, lambda path: path.suffix == ".py") == []


def test_modules_have_names_that_mean_something() -> None:
    parts = {path: {path.stem, *path.relative_to(ROOT).parts[:-1]} for path in modules()}
    assert [named(path) for path, names in parts.items() if names & BANNED_NAMES] == []


def test_tests_wait_for_events_not_for_time() -> None:
    here = [
        named(path, line)
        for path, tree in modules().items()
        if path.is_relative_to(ROOT / "tests") and not path.is_relative_to(ROOT / "tests" / "e2e")
        for line in sleeps(tree)
    ]
    assert here == []


def test_public_modules_and_rooms_say_what_they_are() -> None:
    assert [named(path) for path, tree in modules().items() if public(path) and not ast.get_docstring(tree)] == []


def test_the_readme_names_every_room() -> None:
    readme = ROOT / "README.md"
    if not readme.is_file():
        pytest.skip("there is no README.md")
    text = readme.read_text()
    rooms = {path.parent.name for path in modules() if path.name == "__init__.py" and path.parent.parent == PACKAGE}
    assert [room for room in sorted(rooms) if not re.search(rf"\b{room}\b", text)] == []


def test_no_file_names_a_directory_of_the_machine_it_was_written_on() -> None:
    assert found_in(HOST_PATHS) == []


def test_no_file_names_a_package_registry() -> None:
    assert found_in(REGISTRY_HOSTS) == []


@pytest.mark.parametrize(
    ("code", "lines"),
    [
        ("import time\ntime.sleep(1)", [2]),
        ("async def f():\n    await asyncio.sleep(0)", [2]),
        ("from asyncio import sleep as nap\nnap(0)", [2]),
        ("clock.sleep(1)\nsleep(1)", []),
    ],
)
def test_the_search_for_sleeps_finds_them(code: str, lines: list[int]) -> None:
    assert list(sleeps(ast.parse(code))) == lines


def test_the_docstring_does_not_count_towards_a_functions_length() -> None:
    (function,) = ast.parse('def f():\n    """One\n    two."""\n    return 1\n').body
    assert isinstance(function, Function)
    assert lines_of(function) == 2


@pytest.mark.parametrize(
    ("text", "bad"),
    [
        ("cd /{}/x", True),
        ("https://a.example/{}/x", False),
        ("spiffe://{}/x", False),
        ("file:///{}/x", True),
        ("${{X}}/{}/", False),
    ],
)
def test_the_search_for_paths_knows_paths_from_urls(text: str, bad: bool) -> None:
    assert bool(HOST_PATHS.search(text.format("ho" + "me"))) is bad
