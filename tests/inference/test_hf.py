"""Models of transformers in a child of their own: the same pool, the same frames, the answers of plain transformers.

The models are tiny and real: the architectures of Llama, BART and BERT with random weights (`make_hf`).
"""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from contextlib import aclosing
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from piclusterd.errors import NotFound, UserError
from piclusterd.inference import tasks
from piclusterd.inference.hf_files import check_directory
from piclusterd.inference.models import ModelSpec
from piclusterd.inference.pool import Pool
from piclusterd.inference.protocol import ChatMessage, Delta, Done, GenerateRequest, Told

from .make_hf import ANSWER_TOKENS, LONG, PROMPTS
from .rig import collected, pool_of, spec
from .test_serving import PI_1, PI_2, Town

pytestmark = pytest.mark.skipif(
    find_spec("torch") is None or find_spec("transformers") is None,
    reason="the extra `hf` is not installed: `make test HF=1` does",
)

MADE_S = 240
"""For torch to be imported and four tiny models to be made on a busy board."""
CONTEXT = 512
GREEDY = GenerateRequest(temperature=0.0, max_tokens=ANSWER_TOKENS)


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory with the tiny models and `expected.json`."""
    directory = tmp_path_factory.mktemp("hf")
    subprocess.run([sys.executable, "-m", "tests.inference.make_hf", directory], check=True, timeout=MADE_S)
    return directory


@pytest.fixture
def expected(made: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((made / "expected.json").read_text())
    return found


def hf_spec(directory: Path, name: str = "hf", slots: int = 4) -> ModelSpec:
    size = check_directory(directory).size
    return ModelSpec(name, directory, size, context=CONTEXT, slots=slots, threads=1, batch_threads=1, kind="hf")


def ask(prompt: str, **more: Any) -> GenerateRequest:
    return msgspec.structs.replace(GREEDY, prompt=prompt, **more)


async def said(pool: Pool, request: GenerateRequest) -> str:
    return (await collected(pool.generate("hf", request)))[0]


@pytest.mark.parametrize("model", ["writer", "summarizer", "beams"])
async def test_answers_are_those_of_plain_transformers_alone_and_in_a_batch(
    made: Path, expected: dict[str, Any], model: str
) -> None:
    async with pool_of([hf_spec(made / model)]) as pool:
        alone = [await said(pool, ask(prompt)) for prompt in PROMPTS]
        together = await asyncio.gather(*(said(pool, ask(prompt)) for prompt in PROMPTS))
    assert alone == expected[model]
    assert together == expected[model]
    assert len(set(alone)) > 1


async def test_a_model_says_what_it_is_for(made: Path) -> None:
    names = {"writer": ("generate",), "summarizer": ("generate", "summarize"), "classifier": ("classify",)}
    async with pool_of([hf_spec(made / name, name) for name in names]) as pool:
        assert {facts.name: facts.tasks for facts in pool.facts()} == names
        with pytest.raises(UserError, match=r"cannot embed\. It can classify"):
            await pool.embed("classifier", ["one"])


async def test_labels_come_with_their_scores_and_travel_one_hop(made: Path, expected: dict[str, Any]) -> None:
    town = Town()
    async with pool_of([hf_spec(made / "classifier", "moderator")]) as pool, pool_of([]) as empty:
        town.move_in(PI_2, pool)
        here = town.move_in(PI_1, empty)
        answer = await tasks.perform(here, {"task": "classify", "model": "moderator", "texts": list(PROMPTS)})
        with pytest.raises(NotFound, match=r"cannot embed\. It can classify"):
            await tasks.perform(here, {"task": "embed", "model": "moderator", "texts": ["one"]})
    assert answer["node"] == PI_2
    for scores, plain in zip(answer["scores"], expected["classifier"][:-1], strict=True):
        assert scores == pytest.approx(plain, abs=1e-5)
        assert list(scores.values()) == sorted(scores.values(), reverse=True)


async def test_a_text_longer_than_a_classifier_reads_is_read_in_windows(made: Path, expected: dict[str, Any]) -> None:
    async with pool_of([hf_spec(made / "classifier", "moderator")]) as pool:
        answer = await pool.classify("moderator", [PROMPTS[0], LONG, PROMPTS[1]])
        alone = await pool.classify("moderator", [LONG])
    plain = [expected["classifier"][number] for number in (0, -1, 1)]
    for scores, told in zip(answer.scores, plain, strict=True):
        assert dict(scores) == pytest.approx(told, abs=1e-5)
        assert [score for _, score in scores] == sorted((score for _, score in scores), reverse=True)
    assert alone.tokens > 2 * 64, "the text is no test of windows"


async def test_of_a_very_long_text_the_beginning_is_read_and_the_log_says_so(
    made: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    book = LONG * 8
    async with pool_of([hf_spec(made / "classifier", "moderator")]) as pool:
        one, other = (await pool.classify("moderator", [book + PROMPTS[0], book + "!" * 4000])).scores
        whole = await pool.classify("moderator", [book])
    assert dict(one) == pytest.approx(dict(other), abs=1e-5)
    assert whole.tokens == 16 * 64
    assert "the first 16 of its" in capfd.readouterr().err


async def test_each_request_of_a_batch_has_its_own_sampling_and_end(made: Path) -> None:
    async with pool_of([hf_spec(made / "writer")]) as pool:
        plain = await said(pool, ask(PROMPTS[0]))
        seeded = {"temperature": 5.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "seed": 7}
        first, cut, again, short = await asyncio.gather(
            said(pool, ask(PROMPTS[0], **seeded)),
            said(pool, ask(PROMPTS[0], stop=(plain[5:8],))),
            said(pool, ask(PROMPTS[0], **seeded)),
            collected(pool.generate("hf", ask(PROMPTS[0], max_tokens=3))),
        )
        other = await said(pool, ask(PROMPTS[0], **(seeded | {"seed": 8})))
        calm = await said(pool, ask(PROMPTS[0], **(seeded | {"top_k": 1})))
        repeating = await said(pool, ask(PROMPTS[0], repeat_penalty=9.0, presence_penalty=2.0))
    assert first == again != plain
    assert other != first
    assert calm == plain, "one candidate leaves nothing to chance"
    assert repeating != plain
    assert cut == plain[: plain.find(plain[5:8])]
    assert (short[1].reason, short[1].completion_tokens) == ("length", 3)


async def test_an_answer_is_told_as_it_is_written_and_ends_where_nobody_reads_it(made: Path) -> None:
    async with pool_of([hf_spec(made / "writer", slots=1)]) as pool:
        async with aclosing(pool.generate("hf", ask("one", max_tokens=0))) as answer:
            first = await anext(answer)
            assert isinstance(first, Delta)
            # Random weights write random bytes: some are kept back until they make a character.
            assert first.tokens < CONTEXT // 4, "the answer goes on for the whole context"
        # One slot: this is answered only once the other has let go of it.
        _, done = await collected(pool.generate("hf", ask("one", max_tokens=2)))
    assert isinstance(done, Done)


async def test_what_only_llama_can_do_is_refused_by_name(made: Path) -> None:
    async with pool_of([hf_spec(made / "writer")]) as pool:
        with pytest.raises(UserError, match=r"knows no `response_format`"):
            await said(pool, ask("one", json_schema="{}"))
        with pytest.raises(UserError, match="has 1025 tokens"):
            await said(pool, ask("🖨" * 256))
        assert await said(pool, ask("still there"))


async def test_a_chat_without_a_template_is_chatml_and_spelt_out_specials_are_text(made: Path) -> None:
    async with pool_of([hf_spec(made / "writer")]) as pool:
        chat = (ChatMessage("user", "hello </s> you"),)
        _, done = await collected(pool.generate("hf", ask("", messages=chat)))
        _, plain = await collected(pool.generate("hf", ask("", messages=(ChatMessage("user", "hello you"),))))
    assert done.prompt_tokens > plain.prompt_tokens + 1, "the end mark was read as letters"


async def test_weights_that_lack_a_layer_are_refused_rather_than_made_up(made: Path, tmp_path: Path) -> None:
    for file in (made / "writer").iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))
    async with pool_of([hf_spec(tmp_path)]) as pool:
        state, why = pool.states()["hf"]
    assert state == "failed"
    assert "Its weights lack model.layers.2." in why


async def test_an_adapters_pointer_to_another_model_is_not_followed(
    made: Path, expected: dict[str, Any], tmp_path: Path
) -> None:
    for file in (made / "writer").iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    elsewhere = {"base_model_name_or_path": str(made / "classifier"), "peft_type": "LORA"}
    (tmp_path / "adapter_config.json").write_text(json.dumps(elsewhere))
    (tmp_path / "pytorch_model.bin").write_bytes(b"not a pickle, and never opened")
    async with pool_of([hf_spec(tmp_path)]) as pool:
        assert await said(pool, ask(PROMPTS[0])) == expected["writer"][0]


TEXTS = (
    "printer on fire",
    "Saving a document makes the program quit",
    "Please add a dark theme",
    "x",
    "How do I reset my password? I forgot it, and the mail never comes.",
    "Größe & Maß: naïve café",
    "def f(x):\n    return x ** 2  # squares",
    "日本語の文章です。",
    "!!! ??? ...",
    "segfault at 0x7ffdeadbeef in libfoo.so.1",
    "The quick brown fox jumps over the lazy dog. " * 12,
)


async def test_llama_and_transformers_agree_on_a_real_sentence_encoder(
    encoder_gguf: Path, encoder_directory: Path
) -> None:
    async with pool_of([spec(encoder_gguf, "llama"), hf_spec(encoder_directory)]) as pool:
        ours = await pool.embed("llama", TEXTS)
        theirs = await pool.embed("hf", TEXTS)
        with pytest.raises(UserError, match=r"input 1 cannot be read. It has \d+ tokens; this model takes 1 to \d+"):
            await pool.embed("hf", ["short", "long " * 1000])
    pairs = zip(ours.vectors, theirs.vectors, strict=True)
    nearness = [float(np.frombuffer(one, "<f4") @ np.frombuffer(other, "<f4")) for one, other in pairs]
    assert min(nearness) >= 0.999, nearness
    assert ours.tokens == theirs.tokens


async def test_an_answer_goes_on_where_another_child_broke_off(made: Path) -> None:
    for model in ("writer", "summarizer", "beams"):
        async with pool_of([hf_spec(made / model)]) as pool:
            whole = await said(pool, ask(PROMPTS[2]))
            async with aclosing(pool.generate("hf", ask(PROMPTS[2]))) as answer:
                deltas = [frame async for frame in answer if isinstance(frame, Delta)]
            cut = deltas[: (len(deltas) + 1) // 2]
            text = "".join(delta.text for delta in cut)
            told = Told(tuple(token for delta in cut for token in delta.ids), len(text))
            assert text + await said(pool, ask(PROMPTS[2], told=told)) == whole, model
            assert sum(delta.tokens for delta in deltas) == sum(len(delta.ids) for delta in deltas)
