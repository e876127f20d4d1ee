"""The engine of a child that runs a model of transformers: what `engine` is to llama.cpp, with the same frames.

    submit ──▶ waiting ──pack, alike in length──▶ a batch in the second thread ──▶ Delta*, Done | …

A batch runs in a thread of its own, so that requests and cancellations are taken meanwhile and the pool hears that this
child is alive. What comes while one runs is the next batch. Batches of answers end with their longest answer. The
module is touched by that thread alone.

A text to classify may be longer than the model reads (64 to 512 tokens are common): it is read in windows, and a label
has the highest score that any window gives it. One to embed is refused: a mean of vectors would say something else.
"""

from __future__ import annotations

import queue
import secrets
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import chain, islice
from pathlib import Path
from typing import Any

import torch

from ..errors import Broken, UserError
from .detokenise import TextStream
from .faults import failed, too_long
from .hf_files import TASKS, check_directory
from .hf_model import HfModel
from .hf_text import HfText
from .hf_write import Row, write
from .padding import pack
from .protocol import (
    Classified,
    Delta,
    Done,
    Embedded,
    Failed,
    GenerateRequest,
    Load,
    Ready,
)
from .states import FromDock, ToDock

PACK_TEXTS, PACK_TOKENS = 32, 4096
"""One batch of texts to embed or classify: tokens are counted with their padding."""
WINDOWS_MAX = 16
"""Of a text to classify: some 30,000 letters for a model of 512 tokens. What comes after is not read."""
BATCH_TOKENS = 16_384
"""Of the prompts of one batch of answers, likewise."""
SUMMARY_TOKENS = 256
"""An answer of a summarizer whose own settings give no length."""
POLL_S = 0.05
"""How long a step waits for something to tell: as long may a new request wait to be taken."""

Labels = tuple[tuple[str, float], ...]
Output = Delta | Done | Embedded | Classified | Failed


@dataclass(slots=True)
class _Job:
    """Texts of one request, each in one window or more; a result a window, in any order."""

    id: int
    counts: Sequence[int]
    """Windows of each text."""
    texts: Sequence[list[int]]
    """All windows."""
    results: dict[int, Any] = field(default_factory=dict)
    cancelled: bool = False

    def whole(self) -> list[list[Any]]:
        """Of each text, the results of its windows."""
        found = iter([self.results[number] for number in range(len(self.texts))])
        return [list(islice(found, count)) for count in self.counts]


class HfEngine:
    """The model in the directory `load.path`. Raises `UserError` where it cannot be loaded."""

    def __init__(self, load: Load) -> None:
        files = check_directory(Path(load.path), load.task)
        self._text = HfText(files)
        self._model = HfModel(files, load.batch_threads)
        self._files = files
        self._slots = load.slots
        self._room = min(load.context, self._model.positions or load.context)
        self._rows: list[Row] = []  # waiting
        self._running: list[Row] = []
        self._texts: list[tuple[_Job, int]] = []  # waiting
        self._jobs: dict[int, _Job] = {}
        self._out: queue.SimpleQueue[Output | None] = queue.SimpleQueue()
        self._thread = ThreadPoolExecutor(1)
        self._working = False

    def close(self) -> None:
        for row in self._running:
            row.cancelled = True
        self._thread.shutdown()

    def ready(self) -> Ready:
        config = self._model.config
        description = f"{config.model_type} {self._files.parameters / 1e6:.0f}M ({self._files.task})"
        return Ready(self._room, self._model.size, description, self._files.directory.name, "", TASKS[self._files.task])

    @property
    def busy(self) -> bool:
        """Whether `step` has anything to do."""
        return self._working or bool(self._rows or self._texts) or not self._out.empty()

    # asking ------------------------------------------------------------------------------------------------------
    def submit(self, request_id: int, request: GenerateRequest) -> None:
        """Queue a completion. Raises `UserError` (prompt too long, or something only llama.cpp's models can do)."""
        _only_plain(request)
        tokens = self._prompt(request)
        room = self._room if self._summarizes else self._room - 1
        if not tokens:
            raise UserError("the prompt is empty", param="messages" if request.messages else "prompt")
        if len(tokens) > room:
            raise too_long(request, len(tokens), self._room, self._room - room, self._model.positions)
        seed = secrets.randbits(32) if request.seed is None else request.seed
        random = torch.Generator().manual_seed(seed)
        limit = self._limit(len(tokens))
        stream, text = self._text.stream(), TextStream(request.stop)
        row = Row(request_id, request, tokens, min(limit, request.max_tokens or limit), stream, text, random)
        row.skip = request.told.chars
        if not self._summarizes:  # a summary is written again from its beginning
            row.take_up(request.told.tokens)
        self._rows.append(row)

    @property
    def _summarizes(self) -> bool:
        return bool(self._model.config.is_encoder_decoder)

    def _prompt(self, request: GenerateRequest) -> list[int]:
        if not request.messages:
            return self._text.encode(request.prompt)
        if self._summarizes and not self._text.has_template:  # it was taught texts, not chats
            return self._text.encode(request.messages[-1].content)
        return self._text.chat(request.messages, request.tools)

    def _limit(self, prompt: int) -> int:
        if not self._summarizes:
            return self._room - prompt
        own = self._model.module.generation_config
        return min(own.max_new_tokens or own.max_length or SUMMARY_TOKENS, self._room) - 1

    def submit_embed(self, request_id: int, texts: tuple[str, ...]) -> None:
        """Queue texts. Raises `UserError` where one is longer than the model reads."""
        self._queue(request_id, [[self._text.encode(text)] for text in texts])

    def submit_classify(self, request_id: int, texts: tuple[str, ...]) -> None:
        """Queue texts of any length. Raises `UserError` where one is empty."""
        found = [self._text.windows(text, self._room) for text in texts]
        for number, windows in enumerate(found):
            if len(windows) > WINDOWS_MAX:
                read = f"the first {WINDOWS_MAX} of its {len(windows)} windows are read"
                sys.stderr.write(f"text {number} of a request is very long: {read}, of {self._room} tokens each\n")
        self._queue(request_id, [windows[:WINDOWS_MAX] for windows in found])

    def _queue(self, request_id: int, texts: Sequence[list[list[int]]]) -> None:
        for number, tokens in ((number, tokens) for number, windows in enumerate(texts) for tokens in windows):
            if not 0 < len(tokens) <= self._room:
                why = f"It has {len(tokens)} tokens; this model takes 1 to {self._room}."
                raise UserError(f"input {number} cannot be read", why, param="input")
        windows = list(chain.from_iterable(texts))
        job = self._jobs[request_id] = _Job(request_id, [len(one) for one in texts], windows)
        self._texts += [(job, number) for number in range(len(windows))]

    def state(self, frame: ToDock) -> FromDock | None:
        raise UserError("this model has no states to give", "Only those of llama.cpp have.")

    def cancel(self, request_id: int) -> None:
        """Stop the request; one that is not here any more is ignored."""
        for row in self._rows:
            if row.id == request_id:
                row.end("cancelled", self._out.put)
        self._rows = [row for row in self._rows if not row.ended]
        for row in self._running:
            row.cancelled = row.cancelled or row.id == request_id
        self._forget(request_id)

    def _forget(self, request_id: int) -> None:
        """Its texts that are not read yet never will be."""
        if job := self._jobs.pop(request_id, None):
            job.cancelled = True
            self._texts = [item for item in self._texts if item[0] is not job]

    # working -----------------------------------------------------------------------------------------------------
    def step(self) -> list[Output]:
        """Begin a batch where none runs; what the running one has produced, after a short wait for it."""
        if not self._working:
            self._begin()
        out: list[Output] = []
        wait = self._working
        while wait or not self._out.empty():
            try:
                item = self._out.get(timeout=POLL_S if wait else 0)
            except queue.Empty:
                break
            wait = False
            if item is None:
                self._working, self._running = False, []
                continue
            if not isinstance(item, Delta | Done):
                self._forget(item.id)
            out.append(item)
        return out

    def _begin(self) -> None:
        if self._rows:
            taken = pack([len(row.prompt) for row in self._rows], self._slots, BATCH_TOKENS)
            self._running = [self._rows[index] for index in taken]
            self._rows = [row for row in self._rows if row not in self._running]
            self._start(self._write, self._running)
        elif self._texts:
            taken = pack([len(job.texts[at]) for job, at in self._texts], PACK_TEXTS, PACK_TOKENS)
            chosen = [self._texts[index] for index in taken]
            left = set(range(len(self._texts))) - set(taken)
            self._texts = [self._texts[index] for index in sorted(left)]
            self._start(self._read, chosen)

    def _start(self, work: Callable[[Any], None], batch: Any) -> None:
        self._working = True

        def run() -> None:
            try:
                work(batch)
            finally:
                self._out.put(None)

        self._thread.submit(run)

    # in the second thread ----------------------------------------------------------------------------------------
    def _write(self, rows: list[Row]) -> None:
        try:
            write(self._model, rows, self._out.put)
        except Exception as fault:  # whatever a stranger's model does: its requests fail, the child goes on
            for row in rows:
                if not row.ended:
                    row.ended = True
                    self._out.put(failed(row.id, _broken(fault)))

    def _read(self, items: list[tuple[_Job, int]]) -> None:
        try:
            texts = [job.texts[at] for job, at in items]
            classify = self._files.task == "text-classification"
            results = self._model.scores(texts) if classify else self._model.vectors(texts)
        except Exception as fault:
            for job in {id(job): job for job, _ in items}.values():
                self._out.put(failed(job.id, _broken(fault)))
            return
        for (job, at), result in zip(items, results, strict=True):
            job.results[at] = result
            if len(job.results) == len(job.texts) and not job.cancelled:
                self._out.put(_classified(job) if classify else _embedded(job))


def _embedded(job: _Job) -> Embedded:
    return Embedded(job.id, tuple(vector for [vector] in job.whole()), sum(map(len, job.texts)))


def _classified(job: _Job) -> Classified:
    return Classified(job.id, tuple(_highest(windows) for windows in job.whole()), sum(map(len, job.texts)))


def _highest(windows: Sequence[Labels]) -> Labels:
    """Each label with the highest of its scores, the best first."""
    best: dict[str, float] = {}
    for label, score in chain.from_iterable(windows):
        best[label] = max(score, best.get(label, score))
    return tuple(sorted(best.items(), key=lambda pair: -pair[1]))


def _only_plain(request: GenerateRequest) -> None:
    beyond = {
        "response_format": request.json_schema,
        "guided_choice": request.choices,
        "logprobs": request.logprobs,
        "logit_bias": request.logit_bias,
    }
    for param, asked in beyond.items():
        if asked:
            raise UserError(f"this model knows no `{param}`", "Only GGUF models do.", "Ask one of those.", param=param)


def _broken(fault: Exception) -> Broken:
    return Broken("transformers failed", f"{type(fault).__name__}: {str(fault)[:300]}")
