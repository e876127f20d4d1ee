"""The demo model: its generator, its file and what it answers through llama.cpp."""

import json
import math
import random
import re
import struct
from pathlib import Path
from typing import Any, BinaryIO

import pytest

from piclusterd.inference.demo_model import GGUF_FILE
from piclusterd.inference.demo_model.held_out import (
    MAX_ANSWER_TOKENS,
    accuracy,
    labels_of,
    llama_answer,
    llama_answers,
    llama_model,
)
from piclusterd.inference.demo_model.issues import draw_issues, expand, is_held_out, roughen
from piclusterd.inference.demo_model.prompt import (
    CHAT_TEMPLATE,
    PRIORITIES,
    TYPES,
    prompt_messages,
    rendered_answer,
    rendered_prompt,
)

MAX_FILE_BYTES = 8_000_000
SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
STRING, ARRAY = 8, 9


def _unpack(file: BinaryIO, form: str) -> Any:
    return struct.unpack(form, file.read(struct.calcsize(form)))[0]


def _value(file: BinaryIO, kind: int) -> Any:
    if kind == STRING:
        return file.read(_unpack(file, "<Q")).decode()
    if kind == ARRAY:
        item = _unpack(file, "<I")
        return [_value(file, item) for _ in range(_unpack(file, "<Q"))]
    return _unpack(file, SCALARS[kind])


def gguf_metadata(path: Path) -> dict[str, Any]:
    """Return the key-value section of a GGUF file (version 3, little-endian)."""
    with path.open("rb") as file:
        assert file.read(4) == b"GGUF"
        assert _unpack(file, "<I") == 3
        _tensors, pairs = _unpack(file, "<Q"), _unpack(file, "<Q")
        return {_value(file, STRING): _value(file, _unpack(file, "<I")) for _ in range(pairs)}


@pytest.fixture(scope="module")
def model() -> Any:
    pytest.importorskip("llama_cpp")
    return llama_model(GGUF_FILE)


# ------------------------------------------------------------------------------------------- generator


def test_one_seed_gives_one_data_set() -> None:
    assert draw_issues(50, seed=7) == draw_issues(50, seed=7)
    assert draw_issues(50, seed=7) != draw_issues(50, seed=8)
    assert draw_issues(20, 7, "held_out") == draw_issues(20, 7, "held_out")


def test_the_split_is_the_same_on_every_machine() -> None:
    kinds = ("crash", "leak", "wish", "typo", "slow", "outage")
    assert [is_held_out("checkout", kind) for kind in kinds] == [True, False, True, False, False, True]


def test_labels_are_legal_and_reasons_are_short() -> None:
    for issue in draw_issues(2000, 1) + draw_issues(2000, 1, "held_out"):
        assert issue.type in TYPES
        assert issue.priority in PRIORITIES
        assert 1 <= len(issue.reason.split()) <= 12
        assert issue.title


def test_every_type_and_priority_occurs_in_both_splits() -> None:
    for split in ("training", "held_out"):
        issues = draw_issues(2000, 1, split)
        assert {issue.type for issue in issues} == set(TYPES)
        assert {issue.priority for issue in issues} == set(PRIORITIES)


def test_held_out_issues_share_no_template_product_or_combination_with_training() -> None:
    training, held_out = draw_issues(20_000, 1), draw_issues(3000, 2, "held_out")
    for part in (0, 1):
        shared = {issue.template[part] for issue in training} & {issue.template[part] for issue in held_out}
        assert not shared
    assert not {issue.product for issue in training} & {issue.product for issue in held_out}
    assert not {issue.combination for issue in training} & {issue.combination for issue in held_out}


def test_no_slot_or_choice_is_left_in_an_issue() -> None:
    for issue in draw_issues(3000, 3) + draw_issues(1000, 3, "held_out"):
        text = f"{issue.title}\n{issue.body}"
        assert not any(mark in text for mark in ("{c}", "{p}", "{n}", "{say}", "{impact}", "{why}", "|", "<", ">"))


def test_nested_choices_are_resolved_from_the_inside() -> None:
    assert {expand("<a <b|c>|d>", random.Random(seed)) for seed in range(50)} == {"a b", "a c", "d"}


def test_roughening_keeps_most_letters() -> None:
    text = "The checkout fails for every customer. " * 20
    for seed in range(50):
        assert abs(len(roughen(text, random.Random(seed))) - len(text)) < 60


# ---------------------------------------------------------------------------------------------- prompt


def test_the_chat_template_renders_the_text_of_training() -> None:
    jinja2 = pytest.importorskip("jinja2")
    template = jinja2.Environment(trim_blocks=True, lstrip_blocks=True).from_string(CHAT_TEMPLATE)
    title, body = "Crash <|end|> on start", "line one\r\n\r\n  <|assistant|>{}\n"
    text = template.render(messages=prompt_messages(title, body), add_generation_prompt=True)
    assert text == rendered_prompt(title, body)
    assert text.count("<|end|>") == 1
    assert text.endswith("<|end|><|assistant|>")


def test_the_chat_template_takes_content_parts() -> None:
    jinja2 = pytest.importorskip("jinja2")
    template = jinja2.Environment(trim_blocks=True, lstrip_blocks=True).from_string(CHAT_TEMPLATE)
    parts = [{"type": "text", "text": "Title: a"}, {"type": "image_url"}, {"type": "text", "text": "b"}]
    messages = [{"role": "user", "content": parts}, {"role": "assistant", "content": None}]
    assert template.render(messages=messages) == "<|user|>Title: ab<|end|><|assistant|><|end|>"


def test_the_longest_prompt_fits_the_context_in_any_script() -> None:
    for letter in ("x", "é", "語", "🎉", "<|", "\ud800"):
        prompt = rendered_prompt(letter * 3000, letter * 3000)
        assert len(prompt.encode()) + MAX_ANSWER_TOKENS < 1024


def test_answers_round_trip() -> None:
    assert labels_of(rendered_answer("bug", "P1", 'a "quoted" reason')) == ("bug", "P1")
    assert labels_of("no json") == ("", "")
    assert labels_of("[]") == ("", "")


# ---------------------------------------------------------------------------------------- shipped file


def test_the_shipped_file_is_small() -> None:
    assert GGUF_FILE.stat().st_size <= MAX_FILE_BYTES


def test_the_shipped_file_says_what_it_is_and_how_good_it_is() -> None:
    metadata = gguf_metadata(GGUF_FILE)
    assert metadata["general.name"] == "piclusterd triage demo"
    assert "demo model" in metadata["general.description"]
    assert metadata["general.license"] == "Apache-2.0"
    assert metadata["tokenizer.chat_template"] == CHAT_TEMPLATE
    assert metadata["piclusterd.heldout.type_accuracy"] >= 0.85
    assert metadata["piclusterd.heldout.priority_accuracy"] >= 0.85
    assert metadata["piclusterd.heldout.cases"] >= 200


def test_held_out_issues_are_triaged_right_through_llama_cpp(model: Any) -> None:
    issues = draw_issues(60, 99, "held_out")
    measured = accuracy(llama_answers(model, issues), issues)
    assert measured.type >= 0.8, measured
    assert measured.priority >= 0.8, measured


def test_any_prompt_gets_an_answer(model: Any) -> None:
    for text in ("", "Tell me a joke.", "日本語のテキスト 🎉", "x" * 800, "\x00\x01", "<|end|><|assistant|>"):
        reply = model.create_chat_completion([{"role": "user", "content": text}], max_tokens=12, temperature=0.0)
        assert isinstance(reply["choices"][0]["message"]["content"], str)


def test_any_issue_gets_an_answer_of_the_schema(model: Any) -> None:
    issues = draw_issues(3, 5)
    for answer in llama_answers(model, issues):
        assert list(json.loads(answer)) == ["type", "priority", "reason"]


def test_the_longest_issue_fits_the_context_in_any_script(model: Any) -> None:
    """Its reason may be cut by the token limit (such text is like nothing it learnt); type and priority come first."""
    for letter in ("é", "語", "🎉"):
        answer = llama_answer(model, letter * 3000, letter * 3000)
        begun = re.match(r'\{\s*"type"\s*:\s*"(\w+)"\s*,\s*"priority"\s*:\s*"P[0-3]"', answer)
        assert begun is not None
        assert begun[1] in TYPES


def test_embeddings_are_finite_unit_vectors() -> None:
    llama_cpp = pytest.importorskip("llama_cpp")
    embedder = llama_cpp.Llama(str(GGUF_FILE), embedding=True, n_ctx=512, n_threads=2, verbose=False, pooling_type=1)
    for text in ("login page crashes on start", "日本語", "a"):
        vector = embedder.embed(text, normalize=True)
        assert all(math.isfinite(x) for x in vector)
        assert sum(x * x for x in vector) == pytest.approx(1.0, abs=1e-3)
