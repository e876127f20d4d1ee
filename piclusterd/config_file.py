"""Loads the configuration: one TOML file, then the environment. Every fault is reported, not only the first.

    file ──tomllib──▶ tables ─┐                           ┌─▶ Config, names resolved
                              ├─▶ each value on its own ──┤
    PICLUSTER_<SECTION>_<KEY> ┘    against its type       └─▶ ConfigError(faults), nothing is started

A fault reads `file:line: section.key: what is wrong (legal: …)`; one from the environment has the variable's name in
place of file and line. A value of a key that does not exist is never shown: it might be a secret in the wrong place.
Empty names are resolved here, once: state directory and socket by what systemd passes ($STATE_DIRECTORY,
$RUNTIME_DIRECTORY), relative file names by $CREDENTIALS_DIRECTORY, then beside the configuration file.
"""

from __future__ import annotations

import os
import re
import tomllib
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, dataclass, field, replace
from datetime import datetime
from difflib import get_close_matches
from pathlib import Path
from typing import Any, get_origin, get_type_hints
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

import msgspec
from cronsim import CronSim, CronSimError

from .config import Config
from .config_keys import LISTS, MODELS, PROVIDERS, SCHEDULE, Key, sections
from .config_rules import flow_faults
from .errors import ConfigError

LISTED_FILES = ((SCHEDULE, "post_url_file"), (PROVIDERS, "key_file"))  # keys of tables that name a secret's file
DEFAULT_PATH = Path("/etc/piclusterd/piclusterd.toml")
STATE_DIR = "/var/lib/piclusterd"
PREFIX = "PICLUSTER_"
CLIENT_VARIABLES = frozenset({"PICLUSTER_HOST", "PICLUSTER_SOCKET", "PICLUSTER_STATE_DIR", "PICLUSTER_KEY_FILE"})
"""The client's own options; not keys of the configuration."""
BUILTIN = "builtin:"
NEAR = 0.75
"""Likeness (difflib's ratio) from which an unknown section in the environment counts as a misspelt one of ours."""
SHOWN_MAX = 60
"""Characters of a wrong value that a fault repeats: enough to recognise it."""

_HOST_PORT = re.compile(r"^(\[[0-9A-Fa-f:.%]+\]|[^\s:\[\]/]+):(\d{1,5})$")
_AT_LINE = re.compile(r"\s*\(at line (\d+), column \d+\)$")
_HEADER = re.compile(r"^\s*(\[\[?)\s*([^\]#]+?)\s*\]")
_ASSIGNMENT = re.compile(
    r"^\s*((?:[A-Za-z0-9_-]+|\"[^\"]*\"|'[^']*')(?:\s*\.\s*(?:[A-Za-z0-9_-]+|\"[^\"]*\"|'[^']*'))*)\s*="
)

Where = tuple[str, ...]
"""A key's place: ("api", "port"), or ("models", "0", "name") for the first `[[models]]`."""


def load(path: Path | None, environ: Mapping[str, str], *, files: bool = True) -> Config:
    """The configuration in force, with its file names resolved. `path` None: defaults and environment only.

    `files` False does not look whether the files it names are there: systemd's credentials exist in the service only.
    Raises ConfigError with every fault of the file, the environment and their combination.
    """
    sheet = _Sheet(path)
    if path is not None:
        _take_file(sheet, path)
    _take_environment(sheet, environ)
    config = _resolve(_build(sheet), path, environ)
    if files:
        _check_files(sheet, config)
    _cross_check(sheet, config)
    if sheet.faults:
        raise ConfigError(sheet.faults)
    return config


def read_secret(path: str | Path, environ: Mapping[str, str]) -> tuple[str, ...]:
    """The non-empty lines of a secret's file, stripped. A relative name is looked up in $CREDENTIALS_DIRECTORY first.

    Raises ConfigError when the file cannot be read or holds nothing.
    """
    file = Path(_locate(str(path), Path(), environ))
    try:
        lines = tuple(line.strip() for line in file.read_text(encoding="utf-8").splitlines() if line.strip())
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError([f"{file}: cannot be read as a secret: {_reason(error)}"]) from None
    if not lines:
        raise ConfigError([f"{file}: holds no secret: it is empty"])
    return lines


@dataclass(slots=True)
class _Sheet:
    """What was gathered so far: legal values and where each stands, and the faults."""

    path: Path | None
    values: dict[Where, Any] = field(default_factory=dict)
    places: dict[Where, str] = field(default_factory=dict)
    faults: list[str] = field(default_factory=list)
    tables: Counter[str] = field(default_factory=Counter)
    """Section of `LISTS` → how many tables of it there are."""

    def place(self, where: Where) -> str:
        """`file:line` of the key, or of the nearest table round it."""
        for size in range(len(where), 0, -1):
            if where[:size] in self.places:
                return self.places[where[:size]]
        return str(self.path or "defaults")

    def fault(self, where: Where, what: str) -> None:
        self.faults.append(f"{self.place(where)}: {_dotted(where)}: {what}")

    def take(self, where: Where, key: Key, raw: object, *, strict: bool) -> None:
        try:
            self.values[where] = msgspec.convert(raw, key.type, strict=strict)
        except msgspec.ValidationError:
            self.fault(where, f"{_shown(raw)} is not legal here (legal: {key.legal})")


# the file --------------------------------------------------------------------------------------------------------
def _take_file(sheet: _Sheet, path: Path) -> None:
    try:
        text = path.read_text(encoding="utf-8")
        tables = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        at = _AT_LINE.search(str(error))
        line = at.group(1) if at else str(text.count("\n") + 1)
        sheet.faults.append(f"{path}:{line}: not TOML: {_AT_LINE.sub('', str(error))}")
        return
    except (OSError, UnicodeDecodeError) as error:
        sheet.faults.append(f"{path}: cannot be read: {_reason(error)}")
        return
    sheet.places = {where: f"{path}:{line}" for where, line in key_lines(text).items()}
    known = sections()
    for section, table in tables.items():
        if section not in known:
            sheet.fault((section,), f"unknown section{_did_you_mean(section, known)}")
        elif section in LISTS:
            _take_list(sheet, section, table, known[section])
        else:
            _take_table(sheet, (section,), table, known[section])


def _take_list(sheet: _Sheet, section: str, tables: object, keys: Mapping[str, Key]) -> None:
    if not isinstance(tables, list):
        sheet.fault((section,), f"not a list of tables (write it as [[{section}]], once for each)")
        return
    sheet.tables[section] = len(tables)
    for number, table in enumerate(tables):
        where = (section, str(number))
        _take_table(sheet, where, table, keys)
        for name, key in keys.items():
            if key.default is MISSING and isinstance(table, dict) and name not in table:
                sheet.fault((*where, name), f"missing (legal: {key.legal})")


def _take_table(sheet: _Sheet, where: Where, table: object, keys: Mapping[str, Key]) -> None:
    if not isinstance(table, dict):
        sheet.fault(where, f"{_shown(table)} is not a table (write it as [{where[0]}])")
        return
    for name, raw in table.items():
        if name in keys:
            sheet.take((*where, name), keys[name], raw, strict=True)
        else:
            sheet.fault((*where, name), f"unknown key{_did_you_mean(name, keys)}")


def key_lines(text: str) -> dict[Where, int]:
    """The line of every table and key. A scan, not a parser: the text is known to be TOML; first of equals wins."""
    found: dict[Where, int] = {}
    table: Where = ()
    count: Counter[str] = Counter()
    for number, line in enumerate(text.splitlines(), start=1):
        if header := _HEADER.match(line):
            table = _parts(header.group(2))
            if header.group(1) == "[[":
                table = (*table, str(count[table[0]]))
                count[table[0]] += 1
            found.setdefault(table, number)
        elif assignment := _ASSIGNMENT.match(line):
            found.setdefault((*table, *_parts(assignment.group(1))), number)
    return found


def _parts(dotted: str) -> Where:
    return tuple(part.strip().strip("\"'") for part in dotted.split("."))


# the environment -------------------------------------------------------------------------------------------------
def _take_environment(sheet: _Sheet, environ: Mapping[str, str]) -> None:
    known = {name: keys for name, keys in sections().items() if name not in LISTS}
    for variable in sorted(environ):
        section, _, name = variable.removeprefix(PREFIX).lower().partition("_")
        if not variable.startswith(PREFIX) or variable in CLIENT_VARIABLES:
            continue
        where = (section, name)
        sheet.places[where] = f"${variable}"
        if section not in known:
            # Somebody else's variable, unless it looks like a slip of the pen.
            if get_close_matches(section, known, n=1, cutoff=NEAR):
                sheet.faults.append(f"${variable}: {section}: unknown section{_did_you_mean(section, known)}")
        elif key := known[section].get(name):
            text = environ[variable]
            sheet.take(where, key, _from_text(key, text), strict=False)
        else:
            sheet.fault(where, f"unknown key{_did_you_mean(name, known[section])}")


def _from_text(key: Key, text: str) -> object:
    """Lists are `a,b`; tables are `a=b,c=d`; everything else is left to msgspec's lax conversion."""
    kind = get_origin(getattr(key.type, "__origin__", key.type))
    items = [item.strip() for item in text.split(",") if item.strip()]
    if kind is tuple:
        return items
    if kind is dict:
        return {name.strip(): value.strip() for name, _, value in (item.partition("=") for item in items)}
    return text


# the whole -------------------------------------------------------------------------------------------------------
def _build(sheet: _Sheet) -> Config:
    """The tree of the legal values; where one was not legal its default stands in until the faults are raised."""
    made: dict[str, Any] = {
        name: cls(**{w[1]: value for w, value in sheet.values.items() if w[0] == name})
        for name, cls in get_type_hints(Config).items()
        if name not in LISTS
    }
    for section, cls in LISTS.items():
        missing: dict[str, Any] = {name: "" for name, key in sections()[section].items() if key.default is MISSING}
        rows = (
            {w[2]: value for w, value in sheet.values.items() if w[:2] == (section, str(number))}
            for number in range(sheet.tables[section])
        )
        made[section] = tuple(cls(**{**missing, **row}) for row in rows)
    return Config(**made)


def _resolve(config: Config, path: Path | None, environ: Mapping[str, str]) -> Config:
    beside = path.parent if path is not None else Path()
    state = config.node.state_dir or _first(environ.get("STATE_DIRECTORY", "")) or STATE_DIR
    runtime = _first(environ.get("RUNTIME_DIRECTORY", "")) or state
    changed: dict[str, Any] = {
        "node": replace(config.node, state_dir=state),
        "api": replace(config.api, socket=config.api.socket or str(Path(runtime) / "api.sock")),
        "models": tuple(replace(m, path=_locate_model(m.path, beside)) for m in config.models),
    }
    for section, name in _file_keys():
        part = changed.get(section, getattr(config, section))
        changed[section] = replace(part, **{name: _locate(getattr(part, name), beside, environ)})
    for section, name in LISTED_FILES:
        rows = getattr(config, section)
        changed[section] = tuple(replace(row, **{name: _locate(getattr(row, name), beside, environ)}) for row in rows)
    return replace(config, **changed)


def _first(directories: str) -> str:
    """systemd separates several directories by colons; ours is the first."""
    return directories.split(":")[0]


def _file_keys() -> Iterator[tuple[str, str]]:
    """The keys of plain sections that name a file with secrets."""
    for section, keys in sections().items():
        for name in keys:
            if name.endswith("_file") and section not in LISTS:
                yield section, name


def _locate(name: str, beside: Path, environ: Mapping[str, str]) -> str:
    if not name or Path(name).is_absolute():
        return name
    if credentials := environ.get("CREDENTIALS_DIRECTORY"):
        credential = Path(credentials) / name
        if credential.exists():
            return str(credential)
    return str(beside / name)


def _locate_model(name: str, beside: Path) -> str:
    return name if not name or name.startswith(BUILTIN) else str(beside / name)


def _check_files(sheet: _Sheet, config: Config) -> None:
    for section, name in _file_keys():
        if file := getattr(getattr(config, section), name):
            _check_readable(sheet, (section, name), file)
    for number, model in enumerate(config.models):
        if model.path and not model.path.startswith(BUILTIN):
            _check_readable(sheet, (MODELS, str(number), "path"), model.path, directory=True)
    for section, name in LISTED_FILES:
        for number, row in enumerate(getattr(config, section)):
            if file := getattr(row, name):
                _check_readable(sheet, (section, str(number), name), file)


def _cross_check(sheet: _Sheet, config: Config) -> None:
    """What no single value shows: pairs that belong together, names that must differ."""
    if config.hub.url and not config.hub.url.startswith(("https://", "http://")):
        sheet.fault(("hub", "url"), f"{_shown(config.hub.url)} is not a URL (legal: https://… of the forwarder)")
    if config.hub.url and not config.hub.token_file:
        sheet.fault(("hub", "url"), "needs hub.token_file: the hub answers nobody without its bearer token")
    if config.peers.port == config.api.port != 0:
        sheet.fault(("api", "port"), f"{config.api.port} is also peers.port: the two listeners need a port each")
    if config.github.token_file and not config.github.hook:
        sheet.fault(("github", "token_file"), "needs github.hook: the webhook that the token is for")
    for where, why in flow_faults(config):
        sheet.fault(where, why)
    _check_endpoints(sheet, config)
    _check_model_names(sheet, config)
    _check_schedule(sheet, config)
    _check_providers(sheet, config)


def _check_providers(sheet: _Sheet, config: Config) -> None:
    for number, one in enumerate(config.providers):
        needs = {"openai": ("url", one.url.startswith("http")), "workers-ai": ("account", one.account or one.url)}
        if not (need := needs.get(one.kind, ("", True)))[1]:
            sheet.fault((PROVIDERS, str(number), need[0]), f"must be given for {one.kind} (a URL ends in /v1)")
        if one.name in [other.name for other in config.providers[:number]]:
            sheet.fault((PROVIDERS, str(number), "name"), f'"{one.name}" is another provider\'s')


def _check_readable(sheet: _Sheet, where: Where, file: str, *, directory: bool = False) -> None:
    """`directory`: one will do as well; what kind of model it holds is seen when it is loaded."""
    path = Path(file)
    try:
        there = path.is_file() or (directory and path.is_dir())
    except PermissionError:  # of a directory above it
        there = True
    if not there:
        sheet.fault(where, f"there is no file {file}")
    elif not os.access(file, os.R_OK):
        sheet.fault(where, f"{file} may not be read by this user")


def _check_endpoints(sheet: _Sheet, config: Config) -> None:
    for seed in config.peers.seeds:
        match = _HOST_PORT.match(seed)
        if match is None or not 0 < int(match.group(2)) <= 65535:
            sheet.fault(("peers", "seeds"), f"{_shown(seed)} is not an address (legal: host:port or [ipv6]:port)")


def _check_model_names(sheet: _Sheet, config: Config) -> None:
    seen: dict[str, int] = {}
    for number, model in enumerate(config.models):
        for name, key in ((model.name, "name"), *((alias, "aliases") for alias in model.aliases)):
            if name and name in seen:
                sheet.fault((MODELS, str(number), key), f'"{name}" already names model {seen[name] + 1}')
            seen.setdefault(name, number)


def _check_schedule(sheet: _Sheet, config: Config) -> None:
    seen: dict[str, int] = {}
    for number, line in enumerate(config.schedule):
        where = (SCHEDULE, str(number))
        if line.name and line.name in seen:
            sheet.fault((*where, "name"), f'"{line.name}" already names line {seen[line.name] + 1}')
        seen.setdefault(line.name, number)
        if line.what == "prompt" and not line.prompt:
            sheet.fault((*where, "prompt"), "missing: it is what the model is asked")
        if line.what == "batch" and not line.prompts:
            sheet.fault((*where, "prompts"), "missing: they are what the model is asked")
        try:
            CronSim(line.cron, datetime(2026, 1, 1, tzinfo=ZoneInfo(line.timezone)))
        except CronSimError as error:
            if line.cron:
                sheet.fault((*where, "cron"), f"{_shown(line.cron)} is not a cron line: {error}")
        except (ZoneInfoNotFoundError, ValueError):
            sheet.fault((*where, "timezone"), f"{_shown(line.timezone)} is not a time zone here (legal: Europe/Berlin)")


def _dotted(where: Where) -> str:
    return ".".join(f"[{int(part) + 1}]" if part.isdigit() else part for part in where).replace(".[", "[")


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= SHOWN_MAX else text[: SHOWN_MAX - 1] + "…"


def _did_you_mean(name: str, known: Mapping[str, object]) -> str:
    close = get_close_matches(name, list(known), n=1)
    return f"; did you mean {close[0]}?" if close else f" (known: {', '.join(known)})"


def _reason(error: Exception) -> str:
    return error.strerror or str(error) if isinstance(error, OSError) else "it is not UTF-8 text"
