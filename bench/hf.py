"""The child of transformers beside a plain loop over transformers: same models, same threads, same texts.

    texts ──8 clients──▶ pool ──▶ child: batches by length        texts ──for each──▶ tokenizer, model, answer

The plain loop is what a small server does that takes one request after the other. Models have random weights and real
shapes: an encoder like MiniLM-L6 (vectors and labels), a writer like SmolLM-135M cut to 4 layers. Where torch is not
installed, the bench makes an environment of its own for both sides (`.ci/setup`, extra hf).
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from bench.inference_sides import CACHE, READY_S
from bench.report import ROOT, Report, main
from piclusterd.inference.hf_files import check_directory
from piclusterd.inference.models import ModelSpec
from piclusterd.inference.pool import Pool
from piclusterd.inference.protocol import Done, GenerateRequest

CLIENTS = 8
THREADS = max(1, (os.cpu_count() or 1) // 2)
"""As the pool gives a model; also so that clients and clocks have a core of their own."""
TEXTS, PROMPTS, ANSWER_TOKENS = 512, 32, 32
QUICK = 4
"""A quick run has this part of the texts and prompts."""
WORDS = [
    "the",
    "app",
    "crashes",
    "when",
    "a",
    "file",
    "is",
    "saved",
    "twice",
    "and",
    "nobody",
    "knows",
    "why",
    "it",
    "does",
    "so",
    "on",
    "mondays",
]
ENCODER, LABELLER, WRITER = "encoder", "labeller", "writer"


def texts(count: int) -> list[str]:
    """Of 4 to 60 words: issues, not essays."""
    draw = random.Random(1)
    return [" ".join(draw.choices(WORDS, k=draw.randint(4, 60))) for _ in range(count)]


def measure(report: Report, quick: bool) -> None:
    part = QUICK if quick else 1
    with tempfile.TemporaryDirectory(prefix="bench-hf-") as room:
        plain = _plain(Path(room), TEXTS // part, PROMPTS // part)
        ours = asyncio.run(_ours(Path(room), TEXTS // part, PROMPTS // part))
    names = {
        "vectors": ("texts embedded, 8 clients, one text a request", "texts/s"),
        "many": ("texts embedded, 1 client, 64 texts a request", "texts/s"),
        "labels": ("texts classified, 8 clients, one text a request", "texts/s"),
        "answers": (f"answers of {ANSWER_TOKENS} tokens, 8 clients", "tokens/s"),
        "alone": (f"answers of {ANSWER_TOKENS} tokens, 1 client", "tokens/s"),
    }
    for key, (what, unit) in names.items():
        least = 1.0 if "8 clients" in what else None
        rate = {"peer": "plain transformers loop", "peer_value": plain[key], "larger_is_better": True}
        report.add(what, ours[key], unit, **rate, ratio_at_least=least)  # type: ignore[arg-type]


def _plain(room: Path, count: int, prompts: int) -> dict[str, float]:
    command = [sys.executable, "-m", "bench.hf", "--plain", str(room), str(count), str(prompts)]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, check=True)
    rates: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return rates


async def _ours(room: Path, count: int, prompts: int) -> dict[str, float]:
    pool = Pool(queue_max=4 * CLIENTS, load_timeout_s=READY_S)
    await pool.start([_spec(room, name) for name in (ENCODER, LABELLER, WRITER)])
    try:
        for name in pool.names:
            assert await pool.settled(name) == "ready", pool.states()
        lines = texts(count)
        await pool.embed(ENCODER, lines[:8])
        await pool.classify(LABELLER, lines[:8])

        async def answer(prompt: str) -> None:
            asked = GenerateRequest(prompt=prompt, temperature=0.0, max_tokens=ANSWER_TOKENS)
            ends = [frame async for frame in pool.generate(WRITER, asked) if isinstance(frame, Done)]
            assert ends[0].completion_tokens == ANSWER_TOKENS

        return {
            "vectors": await _rate(lines, lambda text: pool.embed(ENCODER, [text]), CLIENTS),
            "many": await _rate([lines], lambda all_: pool.embed(ENCODER, all_), 1) * count,
            "labels": await _rate(lines, lambda text: pool.classify(LABELLER, [text]), CLIENTS),
            "answers": await _rate(lines[:prompts], answer, CLIENTS) * ANSWER_TOKENS,
            "alone": await _rate(lines[: prompts // 2], answer, 1) * ANSWER_TOKENS,
        }
    finally:
        await pool.close()


async def _rate(items: Sequence[Any], ask: Callable[[Any], Awaitable[object]], clients: int) -> float:
    """Items a second, by so many clients."""
    rest = iter(items)

    async def client() -> None:
        for item in rest:
            await ask(item)

    began = time.perf_counter()
    async with asyncio.TaskGroup() as group:
        for _ in range(clients):
            group.create_task(client())
    return len(items) / (time.perf_counter() - began)


def _spec(room: Path, name: str) -> ModelSpec:
    size = check_directory(room / name).size
    return ModelSpec(name, room / name, size, 512, CLIENTS, THREADS, THREADS, kind="hf")


# the other side, in a process of its own -------------------------------------------------------------------------
def plain(room: Path, count: int, prompts: int) -> None:
    """Make the models, loop over them, print the rates as JSON."""
    import torch

    torch.set_num_threads(THREADS)
    torch.manual_seed(1)
    tokenizer, models = _made(room)

    def tokens(text: str) -> Any:
        return torch.tensor([tokenizer.encode(text).ids])

    def read(model: Any) -> Callable[[str], object]:
        return lambda text: model(input_ids=tokens(text))

    def write(text: str) -> None:
        options = {"max_new_tokens": ANSWER_TOKENS, "min_new_tokens": ANSWER_TOKENS, "do_sample": False}
        models[WRITER].generate(input_ids=tokens(text), pad_token_id=0, **options)

    lines = texts(count)
    with torch.inference_mode():
        for name in (ENCODER, LABELLER):
            _timed(lines[:8], read(models[name]))
        rates = {
            "vectors": _timed(lines, read(models[ENCODER])),
            "labels": _timed(lines, read(models[LABELLER])),
            "answers": _timed(lines[:prompts], write) * ANSWER_TOKENS,
        }
    print(json.dumps(rates | {"many": rates["vectors"], "alone": rates["answers"]}))


def _timed(items: Sequence[str], work: Callable[[str], object]) -> float:
    began = time.perf_counter()
    for item in items:
        work(item)
    return len(items) / (time.perf_counter() - began)


def _made(room: Path) -> tuple[Any, dict[str, Any]]:
    import transformers as lib
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(WORDS, trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet))
    bert = lib.BertConfig(hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536)
    llama = lib.LlamaConfig(
        vocab_size=8192, hidden_size=576, intermediate_size=1536, num_hidden_layers=4, num_attention_heads=9,
        num_key_value_heads=3, max_position_embeddings=512, bos_token_id=None, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    made = {
        ENCODER: lib.BertModel(bert),
        LABELLER: lib.BertForSequenceClassification(bert),
        WRITER: lib.LlamaForCausalLM(llama),
    }
    for name, model in made.items():
        model.eval().save_pretrained(room / name)
        tokenizer.save(str(room / name / "tokenizer.json"))
    return tokenizer, made


def with_torch() -> None:
    """Go on in an environment that has it."""
    if find_spec("torch") is not None and find_spec("transformers") is not None:
        return
    home = CACHE / "hf-venv"
    print(f"torch is not installed here; making {home}", file=sys.stderr)
    wanted = os.environ | {"VENV": str(home), "EXTRAS": "hf,dev"}
    subprocess.run([ROOT / ".ci" / "setup"], cwd=ROOT, env=wanted, stdout=sys.stderr, check=True)
    python = str(home / "bin" / "python")
    os.execv(python, [python, "-m", "bench.hf", *sys.argv[1:]])


if __name__ == "__main__":
    os.environ["PYTHONPATH"] = str(ROOT)
    if sys.argv[1:2] == ["--plain"]:
        plain(Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))
    else:
        with_torch()
        main("hf", measure)
