"""Directories of transformers that are programs in disguise, cut short or nonsense: refused before they are loaded."""

from __future__ import annotations

import json
import random
import struct
from pathlib import Path
from typing import Any

import pytest

from piclusterd.config import Model
from piclusterd.errors import UserError
from piclusterd.inference.hf_files import check_directory
from piclusterd.inference.models import resolve

CONFIG = {"model_type": "bert", "architectures": ["BertModel"], "hidden_size": 32, "vocab_size": 100}


def safetensors(**tensors: list[int]) -> bytes:
    header = json.dumps({name: {"dtype": "F32", "shape": shape} for name, shape in tensors.items()}).encode()
    return struct.pack("<Q", len(header)) + header


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    (tmp_path / "tokenizer.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(safetensors(a=[2, 3], b=[4]))
    return tmp_path


def configured(directory: Path, **keys: Any) -> Path:
    (directory / "config.json").write_text(json.dumps(CONFIG | keys))
    return directory


def test_a_directory_tells_its_task_and_its_size(directory: Path) -> None:
    files = check_directory(directory)
    assert (files.task, files.parameters, files.shards) == ("feature-extraction", 10, ("model.safetensors",))
    assert files.size == (directory / "model.safetensors").stat().st_size


@pytest.mark.parametrize(
    ("architecture", "task"),
    [
        ("LlamaForCausalLM", "text-generation"),
        ("GPT2LMHeadModel", "text-generation"),
        ("BartForConditionalGeneration", "summarization"),
        ("RobertaForSequenceClassification", "text-classification"),
        ("BertForMaskedLM", "feature-extraction"),
    ],
)
def test_the_architecture_tells_the_task(directory: Path, architecture: str, task: str) -> None:
    assert check_directory(configured(directory, architectures=[architecture])).task == task


def test_the_configuration_overrides_the_architecture_and_names_what_is_unknown(directory: Path) -> None:
    configured(directory, architectures=["BertForTokenClassification"])
    assert check_directory(directory, "feature-extraction").task == "feature-extraction"
    with pytest.raises(UserError, match="Set its `task` to text-generation or"):
        check_directory(directory)
    with pytest.raises(UserError, match="names no architecture"):
        check_directory(configured(directory, architectures=[]))


def test_a_configured_path_to_a_directory_is_a_model_of_transformers(directory: Path) -> None:
    spec = resolve(Model("minilm", str(directory)))
    assert (spec.kind, spec.task) == ("hf", "")
    with pytest.raises(UserError, match="cannot read the model file"):
        resolve(Model("minilm", str(directory), kind="llama"))


@pytest.mark.parametrize(
    ("keys", "why"),
    [
        ({"auto_map": {"AutoModel": "evil.Evil"}}, "names Python code"),
        ({"text_config": {"auto_map": {"AutoModel": "evil.Evil"}}}, "names Python code"),
        ({"custom_pipelines": {"x": {}}}, "names Python code"),
        ({"_attn_implementation_internal": "evil/kernel"}, "not for files to set"),
        ({"_experts_implementation_internal": "evil/kernel"}, "not for files to set"),
        ({"attn_implementation": "evil/kernel"}, "code to be fetched"),
        ({"quantization_config": {"quant_method": "awq"}}, "no library"),
        ({"backbone": "/etc/passwd"}, "outside its directory"),
        ({"backbone": ["ok", "https://example.com/model"]}, "outside its directory"),
        ({"backbone": "../../secret"}, "outside its directory"),
        ({"backbone": "C:\\models"}, "outside its directory"),
    ],
)
def test_configuration_that_names_code_or_places_elsewhere_is_refused(
    directory: Path, keys: dict[str, Any], why: str
) -> None:
    with pytest.raises(UserError, match=why):
        check_directory(configured(directory, **keys))


def test_settings_of_generation_are_looked_at_too(directory: Path) -> None:
    (directory / "generation_config.json").write_text('{"custom_generate": "evil"}')
    with pytest.raises(UserError, match="names Python code"):
        check_directory(directory)


def test_where_a_model_came_from_and_what_is_off_does_no_harm(directory: Path) -> None:
    assert check_directory(
        configured(directory, _name_or_path="/opt/train/out", auto_map=None, trust_remote_code=False)
    )


def test_pickles_alone_are_refused_and_beside_safetensors_ignored(directory: Path) -> None:
    (directory / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'true'\ntR.")
    assert check_directory(directory).shards == ("model.safetensors",)
    (directory / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"pickled \(pytorch_model\.bin\): loading them runs whatever code"):
        check_directory(directory)


def test_what_is_missing_is_named(directory: Path) -> None:
    wanted = {"model.safetensors": "has no weights", "tokenizer.json": "no tokenizer.json", "config.json": "no config"}
    for name, why in wanted.items():
        (directory / name).unlink()
        with pytest.raises(UserError, match=why):
            check_directory(directory)


@pytest.mark.parametrize("shard", ["../model.safetensors", "/etc/passwd", "model.bin", ".safetensors", 7])
def test_an_index_names_only_shards_in_the_directory(directory: Path, shard: object) -> None:
    (directory / "model.safetensors").unlink()
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": shard}}, default=str))
    with pytest.raises(UserError, match="no shards of it"):
        check_directory(directory)


def test_shards_are_counted_together_and_a_missing_one_is_named(directory: Path) -> None:
    (directory / "model.safetensors").rename(directory / "m-1.safetensors")
    (directory / "m-2.safetensors").write_bytes(safetensors(c=[5]))
    index = {"weight_map": {"a": "m-1.safetensors", "b": "m-1.safetensors", "c": "m-2.safetensors"}}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    assert check_directory(directory).parameters == 15
    (directory / "m-2.safetensors").unlink()
    with pytest.raises(UserError, match=r"m-2\.safetensors is not there"):
        check_directory(directory)


@pytest.mark.parametrize(
    "config",
    [b"", b"[]", b"nonsense", b"\xff\xfe", b"[" * 100_000, b'{"a": ' + b"[" * 18 + b"1" + b"]" * 18 + b"}"],
)  # fmt: skip
def test_nonsense_is_refused_with_a_text(directory: Path, config: bytes) -> None:
    (directory / "config.json").write_bytes(config)
    with pytest.raises(UserError):
        check_directory(directory)


def test_hundreds_of_damaged_headers_are_refused_or_harmless(directory: Path) -> None:
    whole, rng = (directory / "model.safetensors").read_bytes(), random.Random(5)
    refused = 0
    for _ in range(400):
        damaged = bytearray(whole)
        for _ in range(rng.randint(1, 6)):
            damaged[rng.randrange(len(damaged))] = rng.randrange(256)
        (directory / "model.safetensors").write_bytes(damaged[: rng.randint(0, len(damaged))])
        try:
            check_directory(directory)
        except UserError:
            refused += 1
    assert refused > 300
