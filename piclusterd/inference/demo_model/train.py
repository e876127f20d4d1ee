"""Trains the demo model from scratch and writes `triage-demo.gguf`. Development only (extra `train`).

    python -m piclusterd.inference.demo_model.train --out triage-demo.gguf [--steps N] [--seed N]
    python -m piclusterd.inference.demo_model.train --eval-gguf triage-demo.gguf

Theory. The task is reading comprehension over a small world, so a small decoder does: 4 layers of width 160
(network.py), 1.5 million weights, minutes on two cores, 1.7 MB as Q8_0. It answers in JSON like any chat
model, so the daemon needs no special path for it.

Tokenizer: byte-level BPE (Sennrich et al., 1508.07909; bytes as in GPT-2) over 1536 tokens. Bytes are the
alphabet, so any Unicode text has a tokenization and none is unknown; a small vocabulary keeps the embedding
small and makes rare words share pieces with known ones; llama.cpp knows the scheme by the name `gpt2` and
needs no custom code.

Loss: cross-entropy of the answer, plus `TEXT_WEIGHT` times that of the issue's own text, which makes the
hidden states carry the words (the embeddings are their mean). Against learning by heart: an endless stream
of fresh issues, dropped and unknown words, and BPE-dropout (Provilkov et al., 1910.13267), which shows the same word in
different pieces, as typos and unknown words do.
"""

import argparse
import json
import random
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn import functional

from piclusterd.inference.demo_model import GGUF_FILE
from piclusterd.inference.demo_model.gguf_export import export_gguf
from piclusterd.inference.demo_model.held_out import (
    MAX_ANSWER_TOKENS,
    Accuracy,
    accuracy,
    llama_answers,
    llama_model,
)
from piclusterd.inference.demo_model.issues import Issue, draw_issue, draw_issues, pseudo_word
from piclusterd.inference.demo_model.network import Network, Shape
from piclusterd.inference.demo_model.prompt import (
    END_MARK,
    SPECIAL_TOKENS,
    rendered_answer,
    rendered_prompt,
)

VOCABULARY: Final = 1536  # tokens, 256 bytes and 3 marks included
TOKENIZER_ISSUES: Final = 20_000
BATCH: Final = 32  # issues a step
POOL: Final = 32  # batches sorted by length together, so that a batch wastes little on padding
PEAK_RATE: Final = 2e-3
WARM_UP: Final = 100  # steps
WEIGHT_DECAY: Final = 0.1
TEXT_WEIGHT: Final = 0.15
BPE_DROPOUT: Final = 0.1
WORD_DROP: Final = 0.05
WORD_UNKNOWN: Final = 0.04
MAX_TOKENS: Final = 512  # of a training sequence
HELD_OUT_CASES: Final = 600
HELD_OUT_SEED: Final = 20_240
TORCH_CASES: Final = 150  # the network before quantization is only cross-checked; it decodes without a cache
IGNORED: Final = -100  # label of padding for the loss

Example = tuple[list[int], list[int]]
"""Token ids of (prompt, answer)."""


def train_tokenizer(issues: Sequence[Issue]) -> tuple[Any, list[str]]:
    """Return (byte-level BPE tokenizer, its merges as "a b", best first) learnt from issues and answers."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = (f"Title: {i.title}\n\n{i.body}\n" + rendered_answer(i.type, i.priority, i.reason) for i in issues)
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer, merges_of(tokenizer)


def merges_of(tokenizer: Any) -> list[str]:
    """Return the merges from the tokenizer's own JSON, whichever of its two notations it uses."""
    merges = json.loads(tokenizer.to_str())["model"]["merges"]
    return [merge if isinstance(merge, str) else " ".join(merge) for merge in merges]


def blur_words(text: str, rng: random.Random) -> str:
    """Return `text` with a few words left out and a few replaced by unknown ones (training only)."""
    if rng.random() < 0.5:
        return text
    kept = [word for word in text.split(" ") if rng.random() >= WORD_DROP]
    return " ".join(pseudo_word(rng) if rng.random() < WORD_UNKNOWN else word for word in kept)


def example(tokenizer: Any, issue: Issue, rng: random.Random) -> Example:
    """Return the token ids of one augmented training example."""
    tokenizer.model.dropout = BPE_DROPOUT if rng.random() < 0.5 else None
    prompt = rendered_prompt(blur_words(issue.title, rng), blur_words(issue.body, rng))
    prompt_ids = tokenizer.encode(prompt).ids
    tokenizer.model.dropout = None
    answer = rendered_answer(issue.type, issue.priority, issue.reason) + END_MARK
    return prompt_ids[:MAX_TOKENS], tokenizer.encode(answer).ids


def batches(tokenizer: Any, rng: random.Random) -> Iterator[list[Example]]:
    """Yield batches of fresh examples for ever, each of similar lengths."""
    while True:
        pool = [example(tokenizer, draw_issue(rng), rng) for _ in range(BATCH * POOL)]
        pool.sort(key=lambda pair: len(pair[0]) + len(pair[1]))
        cut = [pool[i : i + BATCH] for i in range(0, len(pool), BATCH)]
        rng.shuffle(cut)
        yield from cut


def tensors(batch: Sequence[Example]) -> tuple[Any, Any, Any]:
    """Return (ids, text targets, answer targets), each (batch, time), right-padded; target = the next token."""
    length = max(len(prompt) + len(answer) for prompt, answer in batch)
    ids = torch.zeros(len(batch), length, dtype=torch.long)
    text, answers = torch.full_like(ids, IGNORED), torch.full_like(ids, IGNORED)
    for row, (prompt, answer) in enumerate(batch):
        start, stop = len(prompt), len(prompt) + len(answer)
        ids[row, :stop] = torch.tensor(prompt + answer)
        text[row, : start - 1] = ids[row, 1:start]
        answers[row, start - 1 : stop - 1] = ids[row, start:stop]
    return ids, text, answers


def loss_of(network: Network, batch: Sequence[Example]) -> tuple[Any, float]:
    """Return (loss to minimise, mean cross-entropy of the answer alone in nats a token)."""
    ids, text, answers = tensors(batch)
    logits = network(ids).flatten(0, 1)
    of_answer = functional.cross_entropy(logits, answers.flatten(), ignore_index=IGNORED)
    of_text = functional.cross_entropy(logits, text.flatten(), ignore_index=IGNORED)
    return of_answer + TEXT_WEIGHT * of_text, float(of_answer.detach())


def optimizer_of(network: Network, steps: int) -> tuple[Any, Any]:
    """Return (AdamW, schedule): linear warm-up, then a cosine to a twentieth of the peak."""
    matrices = [p for p in network.parameters() if p.ndim == 2]
    vectors = [p for p in network.parameters() if p.ndim < 2]
    groups = [
        {"params": matrices, "weight_decay": WEIGHT_DECAY},
        {"params": vectors, "weight_decay": 0.0},
    ]
    adam = torch.optim.AdamW(groups, lr=PEAK_RATE, betas=(0.9, 0.98))
    warm = torch.optim.lr_scheduler.LinearLR(adam, start_factor=0.01, total_iters=WARM_UP)
    cool = torch.optim.lr_scheduler.CosineAnnealingLR(adam, max(1, steps - WARM_UP), eta_min=PEAK_RATE / 20)
    return adam, torch.optim.lr_scheduler.SequentialLR(adam, [warm, cool], milestones=[WARM_UP])


def train(network: Network, tokenizer: Any, steps: int, rng: random.Random) -> None:
    """Train in place for `steps` steps of `BATCH` fresh issues."""
    adam, schedule = optimizer_of(network, steps)
    network.train()
    began, smooth = time.monotonic(), 0.0
    for step, batch in zip(range(1, steps + 1), batches(tokenizer, rng), strict=False):
        loss, of_answer = loss_of(network, batch)
        adam.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        adam.step()
        schedule.step()
        smooth = of_answer if step == 1 else 0.97 * smooth + 0.03 * of_answer
        if step % 100 == 0:
            seconds = time.monotonic() - began
            print(f"step {step:5d}  answer loss {smooth:.4f}  {seconds:6.0f} s", flush=True)
    network.eval()


@torch.no_grad()  # type: ignore[untyped-decorator]
def torch_answers(network: Network, tokenizer: Any, issues: Sequence[Issue]) -> list[str]:
    """Return the greedy, unconstrained answers, decoded for all issues at once."""
    prompts = [tokenizer.encode(rendered_prompt(issue.title, issue.body)).ids for issue in issues]
    starts = torch.tensor([len(prompt) for prompt in prompts])
    ids = torch.zeros(len(prompts), int(starts.max()) + MAX_ANSWER_TOKENS, dtype=torch.long)
    for row, prompt in enumerate(prompts):
        ids[row, : len(prompt)] = torch.tensor(prompt)
    rows, end = torch.arange(len(prompts)), tokenizer.token_to_id(END_MARK)
    ended = torch.zeros(len(prompts), dtype=torch.bool)
    for ahead in range(MAX_ANSWER_TOKENS):
        hidden = network.stream(ids[:, : int(starts.max()) + ahead])
        ids[rows, starts + ahead] = network.logits(hidden[rows, starts + ahead - 1]).argmax(-1)
        ended |= ids[rows, starts + ahead] == end
        if ended.all():
            break
    answers = [ids[row, start : start + MAX_ANSWER_TOKENS].tolist() for row, start in enumerate(starts.tolist())]
    return [tokenizer.decode(a, skip_special_tokens=False).split(END_MARK)[0] for a in answers]


def torch_accuracy(network: Network, tokenizer: Any, issues: Sequence[Issue]) -> Accuracy:
    """Return the held-out accuracy of the unquantized network, in chunks of similar length to save padding."""
    ordered = sorted(issues, key=lambda issue: len(issue.title) + len(issue.body))
    answers: list[str] = []
    for start in range(0, len(ordered), 50):
        answers += torch_answers(network, tokenizer, ordered[start : start + 50])
    return accuracy(answers, ordered)


def metadata(measured: Accuracy, seed: int, steps: int) -> dict[str, str | int | float]:
    """Return the GGUF keys that say how good the model is and how it came to be."""
    return {
        "piclusterd.heldout.type_accuracy": measured.type,
        "piclusterd.heldout.priority_accuracy": measured.priority,
        "piclusterd.heldout.joint_accuracy": measured.joint,
        "piclusterd.heldout.cases": measured.cases,
        "piclusterd.heldout.seed": HELD_OUT_SEED,
        "piclusterd.heldout.measured_with": "llama.cpp, this Q8_0 file, greedy, JSON schema grammar",
        "piclusterd.training.seed": seed,
        "piclusterd.training.steps": steps,
        "piclusterd.training.issues": steps * BATCH,
    }


def measure_gguf(file: Path) -> Accuracy:
    """Return the held-out accuracy of a GGUF file in llama.cpp. Raises ImportError without llama-cpp-python."""
    issues = draw_issues(HELD_OUT_CASES, HELD_OUT_SEED, "held_out")
    return accuracy(llama_answers(llama_model(file), issues), issues)


def build(out: Path, steps: int, seed: int) -> None:
    """Train, measure in torch and in llama.cpp, and write `out` with the latter figures."""
    torch.manual_seed(seed)
    began = time.monotonic()
    tokenizer, merges = train_tokenizer(draw_issues(TOKENIZER_ISSUES, seed))
    network = Network(Shape(vocabulary=tokenizer.get_vocab_size()))
    print(f"{sum(p.numel() for p in network.parameters()):,} weights, {tokenizer.get_vocab_size()} tokens")
    train(network, tokenizer, steps, random.Random(seed + 1))
    print(f"trained in {time.monotonic() - began:.0f} s")
    held_out = draw_issues(HELD_OUT_CASES, HELD_OUT_SEED, "held_out")
    print(f"held out, torch F32:      {torch_accuracy(network, tokenizer, held_out[:TORCH_CASES])}")
    with tempfile.TemporaryDirectory() as folder:
        draft = Path(folder) / "draft.gguf"
        export_gguf(draft, network, tokenizer, merges, {})
        measured = measure_gguf(draft)
    print(f"held out, llama.cpp Q8_0: {measured}")
    export_gguf(out, network, tokenizer, merges, metadata(measured, seed, steps))
    print(f"wrote {out}, {out.stat().st_size:,} bytes")


def main() -> None:
    """Parse the command line and train or measure."""
    parser = argparse.ArgumentParser(description="Train or measure the demo triage model.")
    parser.add_argument("--out", type=Path, default=GGUF_FILE, help="GGUF file to write (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=1100, help="training steps (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=1, help="seed of data and weights (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads (default: %(default)s)")
    parser.add_argument("--eval-gguf", type=Path, help="only measure this GGUF on the held-out issues")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.eval_gguf:
        print(f"held out, llama.cpp: {measure_gguf(options.eval_gguf)}")
    else:
        build(options.out, options.steps, options.seed)


if __name__ == "__main__":
    main()
