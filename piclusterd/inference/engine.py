"""Continuous batching: many answers side by side through one context, a bounded step at a time.

    submit ──▶ waiting ──admit: a place and room──▶ active ──step: one batch──▶ Delta*, Done
                  ▲                                   │
                  └─ preempted, its state in RAM ◀────┘ memory is full and nothing idle is left in it

A step is one decode: the pending token of every answer first, then a chunk of the prompts still being read, and the
options of `choices`. Who advances, comes in or goes is `schedule`'s to say; what the memory holds is `residents`'.
This does it: it fills the batch, takes what the logits say and tells it.

Invariant: the last token of an active sequence is never in the memory before a step (its logits are what is wanted).
When memory runs out, idle beginnings are dropped, then the youngest answer waits with its state in RAM: slower, never
failed. A request alone always fits, since it is clamped to the context. What a grammar leaves no choice about is
appended as it is and read in one batch (`forced`). One thread owns an engine. Runs only in the child.
"""

from __future__ import annotations

import time
from collections.abc import Iterator

from ..errors import Broken, PiclusterError, UserError
from . import schedule
from .asking import sequence_of
from .budget import FORKS, sequences
from .choosing import Choosing
from .dock import Dock
from .drafts import alone
from .embedder import Embeddings
from .faults import failed
from .gguf import names_tools
from .llama import BATCH_TOKENS, Context, KvFull, Weights
from .prompts import Prompts
from .protocol import Delta, Done, Embedded, Failed, GenerateRequest, Load, Ready, Task, Told
from .residents import Residents, common
from .sequence import Counts, Pace, Reason, Rows, Sequence, log_probabilities
from .states import FromDock, ToDock

Output = Delta | Done | Embedded | Failed


class Engine:
    """One model and its context. Raises `UserError` where the file cannot be loaded."""

    def __init__(self, load: Load) -> None:
        self._weights = Weights(load.path, load.shares)
        self._adapted = bool(load.adapter)  # vectors are the plain model's to make
        self._places = load.slots
        self._drafts = load.drafts
        total = sequences(load.slots)
        seats = total - FORKS
        self._context = Context(self._weights, load.context, total, load.threads, load.batch_threads)
        if load.adapter:
            self._context.adapt(self._weights, load.adapter, load.scale)
        self._residents = Residents(self._context, seats, self._weights)
        self._forks = range(seats, total)
        self._prompts = Prompts(self._weights)
        self._dock = Dock(self._residents, seats, self.prompt_tokens)
        self._embeddings = Embeddings(self._weights, load.batch_threads)
        self._active: list[Sequence] = []  # in the order of admission
        self._waiting: list[Sequence] = []
        self._out: list[Output] = []
        self._pace = Pace()
        self.counts = Counts()
        self.context = min(self._context.size, self._weights.context_trained)

    def close(self) -> None:
        for sequence in (*self._active, *self._waiting):
            sequence.close()
        self._embeddings.close()
        self._context.close()
        self._weights.close()

    def ready(self) -> Ready:
        weights = self._weights
        name = weights.metadata("general.name")
        tasks: list[Task] = ["generate"] if self._context.writes else []
        if weights.embedding_size > 0 and not self._adapted:
            tasks.append("embed")
        return Ready(
            self.context, weights.embedding_size, weights.description, name, weights.template_sha256, tuple(tasks),
            state_key=weights.state_key if self._context.writes else "",
            tools="generate" in tasks and names_tools(weights.chat_template),
        )  # fmt: skip

    @property
    def busy(self) -> bool:
        """Whether `step` has anything to do."""
        return bool(self._active or self._waiting or self._embeddings.busy or self._out)

    # asking ------------------------------------------------------------------------------------------------------
    def submit(self, request_id: int, request: GenerateRequest) -> None:
        """Queue a completion. Raises `UserError` (prompt too long, schema refused, template refused the chat)."""
        tokens = self.prompt_tokens(request)
        forks = len(self._forks)
        sequence = sequence_of(request_id, request, tokens, self._weights, self.context, forks, self._drafts)
        choosing = sequence.choosing
        self._waiting.append(sequence)
        if choosing is not None and choosing.done:
            self._chosen(sequence, choosing)  # one option each: there is nothing to look at
        elif not self._told(sequence, request.told):
            self._force(sequence)

    def _told(self, sequence: Sequence, told: Told) -> bool:
        """Put `sequence` where the child was that told so much; True where there is nothing to go on with."""
        sequence.skip = told.chars
        if sequence.sampler is None:
            return False  # what is chosen is written in one go
        for token in told.tokens:
            if token >= self._weights.size or not sequence.sampler.take(token):
                self._leave(sequence)
                raise UserError(
                    "the answer cannot go on here", "What was told of it is not this model's.", param="told"
                )
            sequence.tokens.append(token)
            self._out += sequence.delta(sequence.text.push(self._weights.piece(token)))
        sequence.unreported = 0
        return self._full(sequence)

    def prompt_tokens(self, request: GenerateRequest) -> list[int]:
        """The prompt as the model will read it. Raises `UserError` where template or request make none."""
        return self._prompts.tokens(request)

    def submit_embed(self, request_id: int, texts: tuple[str, ...]) -> None:
        """Queue texts to embed. Raises `UserError` where one is empty or longer than the model can pool."""
        self._embeddings.submit(request_id, texts)

    def submit_classify(self, request_id: int, texts: tuple[str, ...]) -> None:
        raise UserError("this model cannot classify", "Only models of transformers can.", param="model")

    def cancel(self, request_id: int) -> None:
        """Stop the request; its place is free at once. One that is not here any more is ignored."""
        for sequence in (*self._active, *self._waiting):
            if sequence.id == request_id:
                self._finish(sequence, "cancelled")
        self._embeddings.cancel(request_id)
        self._dock.drop(request_id)

    def state(self, frame: ToDock) -> FromDock | None:
        """Of a beginning: given to another node, or taken from it. Raises `PiclusterError`."""
        return self._dock.answer(frame)

    # working -----------------------------------------------------------------------------------------------------
    def step(self) -> list[Output]:
        """One decode and one pack of embeddings at most; what they produced, in order."""
        self.counts.steps += 1
        self._admit()
        self._decode()
        self._out += self._embeddings.step()
        out, self._out = self._out, []
        return out

    def _admit(self) -> None:
        while self._waiting:
            growth = sum(sequence.expected - sequence.past for sequence in self._active)
            promised = self._residents.cells + growth if self._active else 0
            queue = [self._queued(sequence) for sequence in self._waiting]
            index = schedule.admit(queue, len(self._active), self._places, promised, self._context.size)
            if index is None:
                return
            for sequence in self._waiting[:index]:
                sequence.overtaken += 1
            self._seat(self._waiting.pop(index))

    def _queued(self, sequence: Sequence) -> schedule.Waiting:
        shared = self._residents.held(sequence.tokens, taken_only=True)
        coming = max((common(other.tokens, sequence.tokens) for other in self._reading()), default=0)
        held = coming - self._residents.held(sequence.tokens) >= schedule.SHARED_MIN
        return schedule.Waiting(sequence.expected - shared, held, sequence.overtaken)

    def _reading(self) -> list[Sequence]:
        """Those whose prompts are not in the memory yet (and can be shared once they are)."""
        if not self._weights.prefix_reusable:
            return []
        return [sequence for sequence in self._active if sequence.past < sequence.prompt_length - 1]

    def _seat(self, sequence: Sequence) -> None:
        state, sequence.state = sequence.state, b""
        if state and self._residents.held(sequence.tokens) < sequence.state_tokens:
            sequence.seat = self._residents.swap_in(state, sequence.tokens[: sequence.state_tokens])
            self.counts.restored += sequence.seat is not None
        elif state:
            self._residents.free(len(state))
        if sequence.seat is None:
            sequence.seat = self._residents.place(sequence.tokens)
        self._residents.trim()
        if not sequence.started:
            sequence.cached, sequence.started = min(sequence.past, sequence.prompt_length), time.perf_counter()
        self._active.append(sequence)

    def _decode(self) -> None:
        while self._active:
            pending = [sequence.pending for sequence in self._active]
            shares = schedule.plan(pending, self._pace.tokens_per_s, BATCH_TOKENS, len(self._forks))
            trees = sum(pending[share.index].tree for share in shares if share.tree)
            wanted = sum(share.count for share in shares) + trees
            try:
                if not self._residents.fits(wanted):
                    raise KvFull("the KV memory is full")
                self._run(shares, self._guess(pending, wanted))
                return
            except KvFull:
                if not self._residents.drop_idle() and not self._preempt():
                    self._finish(self._active[0], "length")
            except Broken as fault:
                self._fail_all(fault)

    def _guess(self, pending: list[schedule.Pending], wanted: int) -> list[int]:
        """Tokens that may follow, to be read with the only pending one."""
        sequence, first = self._active[0], pending[0]
        if sequence.drafts is None or not alone(len(pending), len(self._waiting), first.remaining, first.answering):
            return []
        guess = sequence.drafts.guess(sequence.tokens, sequence.limit - sequence.generated - 1)
        return guess if self._residents.fits(wanted + len(guess)) else []

    def _run(self, shares: list[schedule.Share], guess: list[int]) -> None:
        self._context.clear_batch()
        forks = iter(self._forks)
        rows = [self._fill(self._active[share.index], share, forks, guess) for share in shares]
        began = time.perf_counter()
        try:
            self._context.decode()
        finally:
            for fork in self._forks[: len(self._forks) - len(list(forks))]:
                self._context.keep(fork, 0)
        self._pace.add([share.count for share in shares], time.perf_counter() - began)
        for share, row in zip(shares, rows, strict=True):
            sequence, seat = row.sequence, row.sequence.seat
            assert seat is not None, "an active sequence has a seat"
            before = len(seat.tokens)
            seat.tokens += sequence.tokens[before : before + share.count] + guess
            self.counts.prompt_tokens += max(0, min(len(seat.tokens), sequence.prompt_length) - before)
            self._residents.touch(seat)
        for row in rows:
            self._take(row)

    def _fill(self, sequence: Sequence, share: schedule.Share, forks: Iterator[int], guess: list[int]) -> Rows:
        """Put the share into the batch, and what is guessed to follow. Options' sequences hold what the sequence itself
        holds, and their own path."""
        seat, choosing = sequence.seat, sequence.choosing
        assert seat is not None, "an active sequence has a seat"
        own = [next(forks) for _ in choosing.group] if share.tree and choosing is not None else []
        for fork in own:
            self._context.share(seat.number, fork, sequence.past)
        last, past = -1, sequence.past
        for position in range(past, past + share.count):
            wanted = position == len(sequence.tokens) - 1
            row = self._context.add(sequence.tokens[position], position, (seat.number, *own), wanted)
            last = row if wanted else -1
        for at, token in enumerate(guess, len(sequence.tokens)):
            self._context.add(token, at, (seat.number,), True)
        if guess:
            return Rows(sequence, last, guess=guess)
        if choosing is None or (choosing.inner and not share.tree):
            return Rows(sequence, last)
        nodes = {}
        for number in choosing.inner:
            node = choosing.nodes[number]
            sequences = tuple(own[option] for option in node.options)
            nodes[number] = self._context.add(node.token, len(sequence.tokens) + node.depth, sequences, True)
        return Rows(sequence, last, nodes)

    # what the logits say -----------------------------------------------------------------------------------------
    def _take(self, rows: Rows) -> None:
        sequence = rows.sequence
        if rows.last < 0:
            return
        if rows.nodes is not None:
            self._score(sequence, rows)
        elif rows.guess:
            self._check(sequence, rows)
        else:
            self._sample(sequence, rows.last)

    def _sample(self, sequence: Sequence, row: int) -> bool:
        """The next token of `sequence`, by the logits in `row`; False where it ends the answer."""
        assert sequence.sampler is not None, "it is not chosen between options"
        sequence.first = sequence.first or time.perf_counter()
        told = None if sequence.top_logprobs is None else log_probabilities(self._context.logits(row))
        token = sequence.sampler.sample(self._context, row)
        if self._weights.ends(token):
            self._finish(sequence, "stop")
            return False
        if told is not None:
            sequence.note(told, token, self._weights.piece)
        return self._append(sequence, [token]) and self._force(sequence)

    def _check(self, sequence: Sequence, rows: Rows) -> None:
        """Sample after each token guessed, for as long as it is what stands there; cut off the rest."""
        assert sequence.seat is not None
        assert sequence.drafts is not None
        seat, before, more = sequence.seat, len(sequence.tokens), True
        right = 0
        while more and right <= len(rows.guess) and sequence.tokens[before:] == rows.guess[:right]:
            more = self._sample(sequence, rows.last + right)
            right = len(sequence.tokens) - before
        right = common(sequence.tokens[before:], rows.guess)
        sequence.drafts.judged(len(rows.guess), right, len(sequence.tokens))
        sequence.drafted += len(rows.guess)
        sequence.accepted += right
        self._residents.cut(seat, min(before + right, len(sequence.tokens) - more))

    def _append(self, sequence: Sequence, tokens: list[int]) -> bool:
        """`tokens` are the next of `sequence`; False where they end it.

        They are told together, so that no answer is ever taken up in the midst of what was forced.
        """
        text = ""
        for token in tokens:
            sequence.tokens.append(token)
            sequence.unreported += 1
            self.counts.answer_tokens += 1
            text += sequence.text.push(self._weights.piece(token))
            if sequence.text.stopped or sequence.generated >= sequence.limit:
                break
        self._out += sequence.delta(text)
        return not self._full(sequence)

    def _full(self, sequence: Sequence) -> bool:
        """Whether the answer ends here, by a stop string or its limit; then it is ended."""
        if sequence.text.stopped:
            self._finish(sequence, "stop")
        elif sequence.generated >= sequence.limit:
            self._finish(sequence, "length")
        else:
            return False
        return True

    def _force(self, sequence: Sequence) -> bool:
        """Append what the grammar leaves no choice about; False where that ends the answer."""
        if sequence.sampler is None:
            return True
        while tokens := sequence.sampler.forced():
            self.counts.forced_tokens += len(tokens)
            if not self._append(sequence, tokens):
                return False
        if sequence.sampler.ended:
            self._finish(sequence, "stop")
        return not sequence.sampler.ended

    def _score(self, sequence: Sequence, rows: Rows) -> None:
        choosing, seat = sequence.choosing, sequence.seat
        assert choosing is not None
        assert seat is not None
        assert rows.nodes is not None
        places = {-1: rows.last, **rows.nodes}
        logs = {node: log_probabilities(self._context.logits(row)) for node, row in places.items()}
        choosing.scored(logs)
        sequence.first = sequence.first or time.perf_counter()
        if choosing.done:
            self._chosen(sequence, choosing)
            return
        sequence.tokens[sequence.prompt_length :] = choosing.common
        self._residents.cut(seat, min(common(seat.tokens, sequence.tokens), len(sequence.tokens) - 1))

    def _chosen(self, sequence: Sequence, choosing: Choosing) -> None:
        sequence.tokens[sequence.prompt_length :] = choosing.path
        sequence.unreported = sequence.generated
        self._out += sequence.delta(choosing.text)
        self._finish(sequence, "stop")

    def _finish(self, sequence: Sequence, reason: Reason) -> None:
        self._leave(sequence)
        if reason != "cancelled":
            self._out += sequence.delta(sequence.text.finish(), last=True)
        self._out.append(sequence.end(reason))

    def _leave(self, sequence: Sequence) -> None:
        """Out of queue or seat. What is resident stays, for the next prompt that begins alike."""
        sequence.close()
        if sequence.seat is None:
            self._residents.free(len(sequence.state))
            self._waiting.remove(sequence)
            return
        self._active.remove(sequence)
        sequence.seat.taken = False

    # when there is no room ---------------------------------------------------------------------------------------
    def _preempt(self) -> bool:
        """Put the youngest of several answers back into the queue; False where there is only one."""
        if len(self._active) < 2:
            return False
        youngest = self._active.pop()
        assert youngest.seat is not None
        youngest.state_tokens = youngest.past
        youngest.state = self._residents.swap_out(youngest.seat)
        youngest.seat = None
        self.counts.preempted += 1
        self._waiting.insert(0, youngest)
        return True

    def _fail_all(self, fault: PiclusterError) -> None:
        """The memory is in an unknown state: everything in it is given up."""
        for sequence in list(self._active):
            self._leave(sequence)
            self._out.append(failed(sequence.id, fault))
        self._residents.clear()
