"""Any node answers: a request goes to the node that would be done first, and to another if that one fails.

    generate ──who?──▶ Choice ──me──▶ pool ─┐
        ▲                └──peer──▶ relay ──┴──▶ first frame ──▶ Started, Delta*, Done
        └──── failed, whenever: another node goes on after what is told (`attempts`) ────┘

    peer ──TASK──▶ answer_peer ──▶ pool only (one hop: a relayed request is never relayed again)

An answer that breaks off goes on elsewhere: the tokens told go along (`Told`), and the next node continues after them
as the first would have. Faults of the request itself (400) are not retried: another node would say the same.
A node that stops gives its answers away first (`drain`).
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import msgspec

from ..errors import Broken, PiclusterError, Refused, Unavailable, UserError
from ..events import Choice, WhoServes
from ..ids import NodeId
from ..wire import Dropped
from .attempts import PATIENCE_S, Attempts, Who, elsewhere
from .calling import Calling
from .decisions import Decisions
from .echoes import Echoes
from .faults import failed, raised
from .openai_body import ChatBody, chat_request, parse
from .placement import ANY_MODEL
from .pool import Pool
from .prefix import marks
from .protocol import (
    Answer,
    Classified,
    ClassifyRequest,
    Delta,
    Done,
    Embedded,
    EmbedRequest,
    Failed,
    Field,
    GenerateRequest,
    Told,
    decode,
    encode,
)
from .turns import CHARS_PER_TOKEN, Asked, asked_by

PROBABILITY_DIGITS = 4
"""Of an option, as a workflow records it."""

Relay = Callable[[NodeId, str, bytes], AsyncGenerator[bytes, None]]
"""(peer, task, body) → the messages of its answer. Raises `Unavailable` or `OSError` where the way breaks.
Closing the generator cancels the request over there."""

REQUESTS = {"generate": GenerateRequest, "embed": EmbedRequest, "classify": ClassifyRequest}

Whole = TypeVar("Whole", Embedded, Classified)


class Progress:
    """What of an answer its reader has."""

    def __init__(self) -> None:
        self._tokens: list[int] = []
        self._chars = 0
        self._calling = Calling()

    def add(self, frame: Delta | Done) -> None:
        if isinstance(frame, Delta):
            self._tokens += frame.ids
            self._chars += len(frame.text)
            self._calling.add(frame.calls)

    def rest(self, request: GenerateRequest) -> GenerateRequest:
        """What is to be asked of the node that goes on."""
        if not self._chars and not self._tokens:
            return request
        return msgspec.structs.replace(request, told=Told(tuple(self._tokens), self._chars, self._calling.calls))


@dataclass(frozen=True, slots=True)
class Started:
    """The first item of an answer: who gives it, and why."""

    choice: Choice


class Serving:
    """`default_model` is for requests that name no model; empty: the pool's first, else the cluster's only one."""

    def __init__(
        self,
        me: NodeId,
        pool: Pool,
        who: Who,
        relay: Relay,
        default_model: str = "",
        patience_s: float = PATIENCE_S,
        echoes: Echoes | None = None,
    ) -> None:
        self._me = me
        self._pool = pool
        self._who = who
        self._relay = relay
        self._default = default_model
        self._patience_s = patience_s
        self.decisions = Decisions()
        self._models: Echoes | Pool = echoes or pool

    async def generate(
        self, request: GenerateRequest, prefer: str = ""
    ) -> AsyncGenerator[Started | Delta | Done, None]:
        """`Started`, then the answer, from a node of the role `prefer` where one can.

        Closing the generator cancels it wherever it runs.
        Raises `UserError` (the request), `NotFound` (the model), `Overloaded` or `Unavailable` (no node can now, or the
        one that answered is gone).
        """
        tokens = request.text_length // CHARS_PER_TOKEN
        task = "" if request.only_loads else "generate"
        asked = WhoServes(0, self._named(request.model), task, tokens, (), prefer, marks(request), request.max_tokens)
        attempts = Attempts(self._who, asked, self._patience_s)
        with self.decisions.noted(request.id, "generate", asked.model, request.priority) as decision:
            decision.hops = attempts.hops
            ends = request.only_loads and request.keep_alive_s == 0
            answer = self._let_go(request, asked) if ends else self._unbroken(request, attempts)
            async with aclosing(answer) as items:
                async for item in items:
                    if isinstance(item, Done):
                        decision.done = item
                    yield item

    async def _unbroken(
        self, request: GenerateRequest, attempts: Attempts
    ) -> AsyncGenerator[Started | Delta | Done, None]:
        """The answer, by as many nodes as it takes."""
        told, started = Progress(), False
        while True:
            choice = await attempts.next()
            try:
                async with aclosing(self._answers(choice, told.rest(request))) as answers:
                    async for frame in answers:
                        if not started:
                            started = True
                            yield Started(choice)
                        attempts.progressed()
                        told.add(frame)
                        yield frame
                return
            except (PiclusterError, OSError, TimeoutError) as fault:
                if not elsewhere(fault):
                    raise
                attempts.failed(choice, fault)

    async def _let_go(self, request: GenerateRequest, asked: WhoServes) -> AsyncGenerator[Started | Delta | Done, None]:
        """Out of the memory of every node. Raises `Refused`, once all were asked, where one keeps it all the same."""
        choice, refused = await self._who(asked), list[Refused]()
        yield Started(choice)
        while True:
            asked = replace(asked, exclude=(*asked.exclude, choice.node))
            try:
                async with aclosing(self._answers(choice, request)) as answers:
                    last = [frame async for frame in answers]
            except Refused as fault:
                refused.append(fault)
            try:
                choice = await self._who(asked)
            except Unavailable:
                break
        if refused:
            raise refused[0]
        for frame in last:
            yield frame

    async def embed(self, request: EmbedRequest) -> tuple[Choice, Embedded]:
        """One vector a text, and who made them. Raises as `generate` does."""
        choice, parts = await self._whole("embed", request, Embedded, self._models.embed)
        vectors = tuple(vector for part in parts for vector in part.vectors)
        return choice, Embedded(0, vectors, sum(part.tokens for part in parts), parts[0].cache)

    async def classify(self, request: ClassifyRequest) -> tuple[Choice, Classified]:
        """Labels and scores of each text, and who gave them. Raises as `generate` does."""
        choice, parts = await self._whole("classify", request, Classified, self._pool.classify)
        scores = tuple(one for part in parts for one in part.scores)
        return choice, Classified(0, scores, sum(part.tokens for part in parts))

    async def _whole(
        self,
        task: str,
        request: EmbedRequest | ClassifyRequest,
        kind: type[Whole],
        here: Callable[[str, tuple[str, ...], Asked], Awaitable[Whole]],
    ) -> tuple[Choice, list[Whole]]:
        tokens = sum(map(len, request.texts)) // CHARS_PER_TOKEN
        asked = WhoServes(0, self._named(request.model), task, tokens)
        attempts = Attempts(self._who, asked, self._patience_s)
        with self.decisions.noted(getattr(request, "id", ""), task, asked.model) as decision:
            decision.hops = attempts.hops
            while True:
                choice = await attempts.next()
                try:
                    if choice.node == self._me:
                        return choice, [await here(choice.model, request.texts, asked_by(request))]
                    return choice, await self._parts(choice, task, request, kind)
                except (PiclusterError, OSError, TimeoutError) as fault:
                    if not elsewhere(fault):
                        raise
                    attempts.failed(choice, fault)

    async def complete(self, body: Mapping[str, Any], prefer: str = "") -> dict[str, Any]:
        """The answer to an OpenAI chat `body` as `{"text", "model", "node", "name"}` (a workflow's `AskModel`).

        With `guided_choice` also `choices`: field → option → its probability.
        """
        text, told = "", dict[str, dict[str, float]]()
        choice: Choice | None = None
        request = msgspec.structs.replace(chat_request(parse(body, ChatBody)), priority="workflow", tenant="workflows")
        async with aclosing(self.generate(request, prefer)) as answer:
            async for item in answer:
                match item:
                    case Started(choice=choice):
                        pass
                    case Delta(text=part):
                        text += part
                    case Done(choices=choices) if choices:
                        told = _told(request.choices, choices)
                    case Done():
                        pass
        assert choice is not None, "an answer starts with Started"
        said = {"text": text, "model": choice.model, "node": choice.node, "name": choice.name}
        return {**said, "choices": told} if told else said

    async def drain(self) -> None:
        """Give up the models that others serve too: what they are answering goes on there, for our own clients and for
        peers alike. Those that nobody else has answer to the end."""
        for model in self._pool.names:
            with contextlib.suppress(PiclusterError):
                await self._who(WhoServes(0, model, exclude=(self._me,)))
                await self._pool.give_up(model)

    async def answer_peer(self, peer: NodeId, name: str, body: bytes) -> AsyncGenerator[bytes, None]:
        """The messages that answer `peer`'s relayed request; a `PiclusterError` is the last of them, never raised."""
        try:
            async with aclosing(self._answer_locally(peer, name, body)) as answers:
                async for frame in answers:
                    yield encode(frame)
        except PiclusterError as fault:
            yield encode(failed(0, fault))

    async def _answer_locally(
        self, peer: NodeId, name: str, body: bytes
    ) -> AsyncGenerator[Delta | Done | Embedded | Classified, None]:
        kind = REQUESTS.get(name)
        request = Dropped(f"unknown request {name!r}") if kind is None else decode(body, kind)
        match request:
            case Dropped(reason=reason):
                raise UserError("the relayed request is not valid", reason)
            case GenerateRequest():
                with self.decisions.noted(request.id, name, request.model, request.priority, peer) as decision:
                    async with aclosing(self._models.generate(request.model, request)) as answers:
                        async for frame in answers:
                            if isinstance(frame, Done):
                                decision.done = frame
                            yield frame
            case EmbedRequest():
                for part in (await self._models.embed(request.model, request.texts, asked_by(request))).parts():
                    yield part  # one text a message: they stay small
            case _:
                for one in (await self._pool.classify(request.model, request.texts, asked_by(request))).parts():
                    yield one

    def _named(self, model: str) -> str:
        if model not in ANY_MODEL:
            return model
        return self._default or next(iter(self._pool.names), model)

    async def _answers(self, choice: Choice, request: GenerateRequest) -> AsyncGenerator[Delta | Done, None]:
        named = msgspec.structs.replace(request, model=choice.model)
        if choice.node == self._me:
            async with aclosing(self._models.generate(choice.model, named)) as frames:
                async for frame in frames:
                    yield frame
            return
        async with aclosing(self._relayed(choice, "generate", encode(named))) as answers:
            async for answer in answers:
                if not isinstance(answer, Delta | Done):
                    raise Broken(f"{choice.name} answered a completion with something else")
                yield answer
                if isinstance(answer, Done):
                    return
        raise Unavailable(f"{choice.name} stopped in the middle of its answer")

    async def _parts(
        self, choice: Choice, task: str, request: EmbedRequest | ClassifyRequest, kind: type[Whole]
    ) -> list[Whole]:
        """One part for each text, as `choice` answers."""
        parts: list[Whole] = []
        body = encode(msgspec.structs.replace(request, model=choice.model))
        async with aclosing(self._relayed(choice, task, body)) as answers:
            async for answer in answers:
                if not isinstance(answer, kind):
                    raise Broken(f"{choice.name} answered {task} with something else")
                parts.append(answer)
        if sum(part.count for part in parts) != len(request.texts):
            raise Unavailable(f"{choice.name} stopped in the middle of its answer")
        return parts

    async def _relayed(self, choice: Choice, name: str, body: bytes) -> AsyncGenerator[Answer, None]:
        async with aclosing(self._relay(choice.node, name, body)) as messages:
            async for message in messages:
                frame: Answer | Dropped = decode(message, Answer)
                if isinstance(frame, Dropped):
                    raise Broken(f"{choice.name} answered nonsense", frame.reason)
                if isinstance(frame, Failed):
                    raise raised(frame)
                yield frame


def _told(fields: Sequence[Field], shares: Sequence[Sequence[float]]) -> dict[str, dict[str, float]]:
    return {
        field.name: {option: round(share, PROBABILITY_DIGITS) for option, share in zip(field.options, of, strict=False)}
        for field, of in zip(fields, shares, strict=False)
    }
