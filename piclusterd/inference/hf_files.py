"""A directory as transformers' models come in: what may be read of it, what is refused, and what the model is for.

    config.json ──▶ nothing that names code or places elsewhere ──▶ architecture ──▶ task
    *.safetensors ──▶ headers ──▶ count of weights            everything not in `READ` is not even shown to transformers

Such directories are programs in disguise: `auto_map` and `custom_pipelines` name Python files, pickled weights run what
they like, `adapter_config.json` sends the loader to another model, and keys ending in `_internal` have named code to be
fetched although `trust_remote_code` was false (CVE-2026-4372). So configuration is refused by key and by value, and the
child loads from a view of the directory that holds the files in `READ` and nothing else. No import of any model
library: the daemon turns bad directories away with this, and the child looks again.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ..errors import UserError
from .protocol import Task

HfTask = Literal["text-generation", "summarization", "text-classification", "feature-extraction"]

CONFIG, TOKENIZER, WEIGHTS, INDEX = "config.json", "tokenizer.json", "model.safetensors", "model.safetensors.index.json"
READ = (
    CONFIG, TOKENIZER, INDEX, "generation_config.json", "tokenizer_config.json", "special_tokens_map.json",
    "chat_template.jinja", "modules.json", "sentence_bert_config.json", "1_Pooling/config.json",
)  # fmt: skip
"""Beside the weights. Tokenizers written in Python, their pickles and their own file formats are not read at all."""
CHECKED = (CONFIG, "generation_config.json")
"""What transformers itself reads; the rest is read by us, a few known keys each."""
PICKLES = ("*.bin", "*.pt", "*.pth", "*.pkl", "*.ckpt")
DENIED_KEYS = {
    "auto_map": "it names Python code to be run",
    "custom_pipelines": "it names Python code to be run",
    "custom_generate": "it names Python code to be run",
    "trust_remote_code": "it asks for Python code to be run",
    "attn_implementation": "it may name code to be fetched",
    "_attn_implementation": "it may name code to be fetched",
    "kernel_config": "it may name code to be fetched",
    "quantization_config": "no library for it is installed here",
}
ORIGIN_KEYS = {"_name_or_path", "name_or_path"}
"""Where the model came from. Often an absolute path of its author's machine; nothing is loaded by them."""
ELSEWHERE = re.compile(r"^[/~\\]|^[A-Za-z]:\\|://|(^|[/\\])\.\.([/\\]|$)")
SHARD = re.compile(r"^[A-Za-z0-9][A-Za-z0-9._-]{0,127}\.safetensors$")
JSON_BYTES_MAX = 4 * 1024 * 1024
"""Label lists and shard indices of large models reach some hundred KB."""
HEADER_BYTES_MAX = 16 * 1024 * 1024
"""Of a safetensors file; some 100,000 tensors."""
SHARDS_MAX = 64
DEPTH_MAX = 16

TASKS: dict[HfTask, tuple[Task, ...]] = {
    "text-generation": ("generate",),
    "summarization": ("generate", "summarize"),
    "text-classification": ("classify",),
    "feature-extraction": ("embed",),
}
BY_SUFFIX: tuple[tuple[str, HfTask], ...] = (
    ("ForSequenceClassification", "text-classification"),
    ("ForConditionalGeneration", "summarization"),
    ("ForCausalLM", "text-generation"),
    ("LMHeadModel", "text-generation"),
    ("ForMaskedLM", "feature-extraction"),
    ("Model", "feature-extraction"),
)


@dataclass(frozen=True, slots=True)
class HfFiles:
    """A directory that may be loaded."""

    directory: Path
    task: HfTask
    config: Mapping[str, Any]
    shards: tuple[str, ...]
    size: int
    """Bytes of the weights' files."""
    parameters: int

    def read(self, name: str) -> Mapping[str, Any]:
        """The JSON object in the file `name` of the directory; empty where there is none."""
        return _object(self.directory / name) if (self.directory / name).is_file() else {}

    def modules(self) -> tuple[str, ...]:
        """The last names of the classes that sentence-transformers would chain; empty where it is not for that."""
        path = self.directory / "modules.json"
        listed = _json(path) if path.is_file() else []
        if not isinstance(listed, list) or not all(isinstance(one, dict) for one in listed):
            raise UserError(f"{path} cannot be read", "It is no list of modules.")
        return tuple(str(one.get("type")).rpartition(".")[2] for one in listed)


def check_directory(directory: Path, task: str = "") -> HfFiles:
    """What `directory` holds; `task` overrides what its architecture is for. Raises `UserError` saying what is
    wrong."""
    if not (directory / CONFIG).is_file():
        raise UserError(f"{directory} is no model of transformers", f"It has no {CONFIG}.")
    for name in CHECKED:
        if (directory / name).is_file():
            _deny(_object(directory / name), f"{directory.name}/{name}")
    if not (directory / TOKENIZER).is_file():
        why = f"It has no {TOKENIZER}; tokenizers that are Python code are not run."
        raise UserError(f"{directory} cannot be used", why, "Save it with a fast tokenizer (`save_pretrained`).")
    config = _object(directory / CONFIG)
    shards = _shards(directory)
    return HfFiles(
        directory,
        _task(config, task),
        config,
        shards,
        sum((directory / shard).stat().st_size for shard in shards),
        sum(_parameters(directory / shard) for shard in shards),
    )


def _object(path: Path) -> Mapping[str, Any]:
    value = _json(path)
    if not isinstance(value, dict):
        raise UserError(f"{path} cannot be read", "It is no JSON object.")
    return value


def _json(path: Path) -> Any:
    try:
        if path.stat().st_size > JSON_BYTES_MAX:
            raise UserError(f"{path} is too large", f"It has over {JSON_BYTES_MAX // 2**20} MiB.")
        return json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as fault:
        raise UserError(f"{path} cannot be read", f"{fault}.") from None


def _deny(value: Any, where: str, depth: int = 0) -> None:
    """Raise where anything in `value` names code or a place outside the directory."""
    if depth > DEPTH_MAX:
        raise UserError(f"{where} is refused", f"It is nested deeper than {DEPTH_MAX}.")
    if isinstance(value, list):
        for item in value:
            _deny(item, where, depth + 1)
    elif isinstance(value, dict):
        for key, item in value.items():
            why = DENIED_KEYS.get(key) or ("it is not for files to set" if key.endswith("_internal") else "")
            if why and item not in (None, False):
                raise UserError(f"{where} is refused", f"`{key}`: {why}.", "Take a model that needs no code.")
            if key not in ORIGIN_KEYS:
                _deny(item, where, depth + 1)
    elif isinstance(value, str) and ELSEWHERE.search(value):
        raise UserError(f"{where} is refused", f"It names a place outside its directory: {value[:80]!r}.")


def _shards(directory: Path) -> tuple[str, ...]:
    names = [WEIGHTS] if (directory / WEIGHTS).is_file() else []
    if not names and (directory / INDEX).is_file():
        named = _object(directory / INDEX).get("weight_map")
        names = sorted(set(named.values())) if isinstance(named, dict) else []
    if not names:
        pickles = sorted(path.name for pattern in PICKLES for path in directory.glob(pattern))
        if pickles:
            why = f"Its weights are pickled ({pickles[0]}): loading them runs whatever code is in them."
            raise UserError(f"{directory} is refused", why, "Take the model as safetensors.")
        raise UserError(f"{directory} has no weights", f"There is neither {WEIGHTS} nor {INDEX}.")
    if len(names) > SHARDS_MAX or not all(isinstance(name, str) and SHARD.match(name) for name in names):
        raise UserError(f"{directory} is refused", f"{INDEX} names files that are no shards of it.")
    for name in names:
        if not (directory / name).is_file():
            raise UserError(f"{directory} is incomplete", f"{name} is not there.", "Fetch it again.")
    return tuple(names)


def _parameters(path: Path) -> int:
    """How many numbers the safetensors file at `path` holds, by its header."""
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if not 0 < length <= HEADER_BYTES_MAX:
                raise ValueError(f"its header claims {length} bytes")
            header = json.loads(file.read(length))
            return sum(_elements(header))
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as fault:
        raise UserError(f"{path} is damaged", f"{fault}.", "Fetch it again.") from None


def _elements(header: Mapping[str, Any]) -> Iterator[int]:
    for name, tensor in header.items():
        if name != "__metadata__":
            yield math.prod(int(size) for size in tensor["shape"])


def _task(config: Mapping[str, Any], asked: str) -> HfTask:
    if asked:
        return next(task for task in TASKS if task == asked)
    architectures = config.get("architectures")
    name = str(architectures[0]) if isinstance(architectures, list) and architectures else ""
    for suffix, task in BY_SUFFIX:
        if name.endswith(suffix):
            return task
    why = f"{CONFIG} says its architecture is {name!r}." if name else f"{CONFIG} names no architecture."
    raise UserError("it is not known what this model is for", why, f"Set its `task` to {' or '.join(TASKS)}.")
