"""When no node can answer, somebody else may: providers in the order of the configuration, round whatever answers.

    request ──▶ nodes ──answer──▶ client
                  └─ NotFound, Unavailable, Overloaded for long, before the first part ─▶ provider 1 ─▶ provider 2 …
                     none can either ─▶ the nodes' own fault

Owns what each provider was used for today and which are left alone (`standby`). Refuses to send anywhere what the
configuration keeps in the house: providers outside are asked only where `[inference] outside` allows it, one `at_home`
always; for workflows, only the one that a policy names. Embeddings are not asked of others, for vectors of two models
do not compare; neither is what only our engine can do (choices, biases of tokens, log probabilities, raw text).
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, cast

from ..config import Provider as Table
from ..errors import NotFound, Overloaded, PiclusterError, Unavailable
from ..events import Choice
from ..ids import NodeId
from ..integrations import huggingface, openai_compatible, workers_ai
from ..integrations.openai_compatible import Dialect, OpenAICompatible, ProviderFailed, as_object
from .answering import Answering, Item
from .calling import Calling
from .openai_body import ChatBody, chat_request, parse
from .protocol import (
    TOOLS_MAX,
    CallPart,
    ChatMessage,
    Classified,
    ClassifyRequest,
    Delta,
    Done,
    Embedded,
    EmbedRequest,
    GenerateRequest,
    ToolCall,
)
from .serving import Started
from .spending import Spending
from .standby import Budget, Standby, Used
from .tools_body import NAMED

log = logging.getLogger(__name__)

QUEUE_S = 10.0
"""A queue that is shorter than this is waited for by the client (429); a provider is asked where it is longer."""
CHARS_PER_TOKEN = 4
"""Where a provider tells no usage."""

Json = dict[str, Any]


Neurons = Callable[[str, int, int], float]
"""(model, tokens read, tokens written) → what it costs."""


def _free(model: str, read: int, written: int) -> float:
    return 0.0


@dataclass(frozen=True, slots=True)
class Provider:
    name: str
    kind: str
    model: str
    """What it is called there."""
    client: OpenAICompatible
    standby: Standby
    models: tuple[str, ...] = ("*",)
    """Patterns of the names that clients ask for."""
    at_home: bool = False
    neurons: Neurons = _free

    def stands_in_for(self, model: str) -> bool:
        return any(fnmatchcase(model, pattern) for pattern in self.models)


def made(tables: Sequence[Table], secret: Callable[[str], tuple[str, ...]]) -> list[Provider]:
    """Those that the configuration names, in its order. `secret(file)`: its lines."""
    return [_made(table, secret(table.key_file)[0] if table.key_file else "") for table in tables]


def _made(table: Table, key: str) -> Provider:
    dialect: Dialect = openai_compatible.openai
    url, neurons = table.url, cast(Neurons, _free)
    match table.kind:
        case "huggingface":
            dialect, url = huggingface.dialect, url or huggingface.URL
        case "workers-ai":
            dialect, neurons = workers_ai.dialect, workers_ai.neurons
            url = url or workers_ai.url_of(table.account)
        case "openai":
            pass  # its URL is given
    budget = Budget(table.requests_per_day, table.tokens_per_day, table.neurons_per_day)
    client = OpenAICompatible(url, key, table.timeout_s, dialect)
    return Provider(
        table.name, table.kind, table.model, client, Standby(budget), table.models, table.at_home, neurons
    )  # fmt: skip


class Fallback:
    """`outside`: requests of clients may leave the house. `spending`: where each day's use is kept."""

    def __init__(
        self,
        inner: Answering,
        providers: Sequence[Provider],
        outside: bool,
        wall: Callable[[], float] = time.time,
        spending: Spending | None = None,
    ) -> None:
        self._inner, self._wall = inner, wall
        self._all = tuple(providers)
        self._providers = tuple(one for one in providers if one.at_home or outside)
        self._spending = spending or Spending()
        before = self._spending.read()
        for one in providers:
            one.standby.resume(before.get(one.name, Used()), wall())

    async def generate(self, request: GenerateRequest, prefer: str = "") -> AsyncGenerator[Item, None]:
        begun = False
        try:
            async with aclosing(self._inner.generate(request, prefer)) as items:
                async for item in items:
                    begun = True
                    yield item
            return
        except (NotFound, Unavailable) as fault:
            if begun or not _helps(fault, request):
                raise
            missing = fault
        async for item in self._elsewhere(request, missing):
            yield item

    async def embed(self, request: EmbedRequest) -> tuple[Choice, Embedded]:
        return await self._inner.embed(request)

    async def classify(self, request: ClassifyRequest) -> tuple[Choice, Classified]:
        return await self._inner.classify(request)

    async def complete_at(self, name: str, body: Mapping[str, Any]) -> Json:
        """The answer of the provider `name` to an OpenAI chat `body`, as `Serving.complete` gives it.

        Whatever `outside` says: that is about clients, and whoever names a provider allows it. Raises `NotFound` and
        `Unavailable`.
        """
        provider = next((one for one in self._all if one.name == name), None)
        if provider is None:
            raise NotFound(f"there is no provider {name!r}", "none of [[providers]] has that name")
        if (wait_s := provider.standby.wait_s(self._wall())) > 0:
            raise Unavailable(f"{name} is left alone", f"for {wait_s:.0f} s", retry_after_s=wait_s)
        text = ""
        request = chat_request(parse(body, ChatBody))
        try:
            async with aclosing(self._asked(provider, request, NotFound("a policy names it"))) as items:
                async for item in items:
                    text += item.text if isinstance(item, Delta) else ""
        except ProviderFailed as fault:
            self._judge(provider, fault)
            raise Unavailable(f"{name} did not answer", str(fault)) from None
        return {"text": text, "model": provider.model, "node": name, "name": name}

    def told(self) -> list[Json]:
        """Each provider, for /health."""
        return [
            {"name": one.name, "kind": one.kind, "model": one.model, "at_home": one.at_home,
             "allowed": one in self._providers, **one.standby.told(self._wall())}
            for one in self._all
        ]  # fmt: skip

    async def close(self) -> None:
        for provider in self._all:
            await provider.client.close()

    async def _elsewhere(self, request: GenerateRequest, missing: PiclusterError) -> AsyncGenerator[Item, None]:
        for provider in self._providers:
            if not provider.stands_in_for(request.model) or provider.standby.wait_s(self._wall()) > 0:
                continue
            begun = False
            try:
                async with aclosing(self._asked(provider, request, missing)) as items:
                    async for item in items:
                        begun = True
                        yield item
                return
            except ProviderFailed as fault:
                self._judge(provider, fault)
                if begun:
                    raise Unavailable(f"{provider.name} stopped in the middle of its answer", str(fault)) from None
        raise missing

    def _keep(self) -> None:
        self._spending.write({one.name: one.standby.used for one in self._all})

    def _judge(self, provider: Provider, fault: ProviderFailed) -> None:
        log.warning("provider %s: %s", provider.name, fault)
        wall, standby = self._wall(), provider.standby
        match fault.kind:
            case "rate":
                standby.limited(fault.retry_after_s, str(fault), wall)
            case "quota":
                standby.spent(str(fault), wall)
            case "broken":
                standby.failed(str(fault), wall)
            case "asked":
                pass  # the provider is well; another may take it

    async def _asked(
        self, provider: Provider, request: GenerateRequest, missing: PiclusterError
    ) -> AsyncGenerator[Item, None]:
        provider.standby.asked(self._wall())
        self._keep()
        answer = _Answer(request)
        reason = f"{provider.name}: no node could: {missing.what}"
        async with aclosing(provider.client.chat(ask_of(request, provider.model))) as chunks:
            async for chunk in chunks:
                text, parts = answer.take(chunk)
                if not answer.begun:
                    answer.begun = True
                    yield Started(Choice(NodeId(""), provider.name, provider.model, reason))
                if text or parts:
                    yield Delta(0, text, 1, calls=parts)
        if not answer.begun:
            raise ProviderFailed("broken", "the answer is empty")
        done = answer.done()
        neurons = provider.neurons(provider.model, done.prompt_tokens, done.completion_tokens)
        provider.standby.answered(done.prompt_tokens + done.completion_tokens, neurons, self._wall())
        self._keep()
        yield done


def _helps(fault: PiclusterError, request: GenerateRequest) -> bool:
    """Can a provider do better, and do what is asked?"""
    if isinstance(fault, Overloaded) and fault.retry_after_s < QUEUE_S:
        return False
    return bool(request.messages) and not (request.choices or request.logit_bias or request.logprobs)


def ask_of(request: GenerateRequest, model: str) -> Json:
    """The body of OpenAI's API that asks for the same."""
    body: Json = {"model": model, "messages": [_message(one) for one in request.messages]}
    body |= {"temperature": min(request.temperature, 2.0), "top_p": request.top_p}
    body |= {"stream_options": {"include_usage": True}}
    if request.max_tokens:
        body["max_tokens"] = request.max_tokens
    if request.seed is not None:
        body["seed"] = request.seed
    if request.stop:
        body["stop"] = list(request.stop[:4])  # OpenAI takes no more; the rest is searched for by nobody
    for name in ("frequency_penalty", "presence_penalty"):
        if value := getattr(request, name):
            body[name] = value
    if request.json_schema:
        schema = {"name": "answer", "schema": _loaded(request.json_schema)}
        body["response_format"] = {"type": "json_schema", "json_schema": schema}
    if request.tools:
        body |= {"tools": _loaded(request.tools), "tool_choice": _tool_choice(request.tool_choice)}
        body["parallel_tool_calls"] = request.parallel_tool_calls
    return body


def _loaded(text: str) -> Any:
    return json.loads(text)


def _tool_choice(choice: str) -> Any:
    if choice.startswith(NAMED):
        return {"type": "function", "function": {"name": choice.removeprefix(NAMED)}}
    return choice


def _message(message: ChatMessage) -> Json:
    told: Json = {"role": message.role, "content": message.content}
    if message.tool_calls:
        told["tool_calls"] = [
            {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
            for call in message.tool_calls
        ]
    if message.tool_call_id:
        told["tool_call_id"] = message.tool_call_id
    return told


class _Answer:
    """What has come of a provider's answer. Raises `ProviderFailed` for what is no answer."""

    def __init__(self, request: GenerateRequest) -> None:
        self.begun = False
        self._asked_chars, self._chars = request.text_length, 0
        self._reason = "stop"
        self._usage: Json = {}
        self._calling = Calling()
        self._places: dict[int, int] = {}
        """Of calls, by the provider's numbers."""

    def take(self, chunk: Mapping[str, Any]) -> tuple[str, tuple[CallPart, ...]]:
        """The text in one chunk, and the pieces of calls."""
        self._usage = as_object(chunk.get("usage")) or self._usage
        choices = chunk.get("choices")
        if not isinstance(choices, list):
            raise ProviderFailed("broken", "the answer is no completion")
        if not choices:
            return "", ()
        choice = as_object(choices[0])
        delta = as_object(choice.get("delta"))
        self._reason = str(choice.get("finish_reason") or self._reason)
        calls = delta.get("tool_calls")
        listed = enumerate(calls if isinstance(calls, list) else ())
        parts = tuple(self._part(number, as_object(call)) for number, call in listed)
        self._calling.add(parts)
        text = delta.get("content")
        text = text if isinstance(text, str) else ""
        self._chars += len(text)
        return text, parts

    def _part(self, number: int, call: Json) -> CallPart:
        index, function = call.get("index", number), as_object(call.get("function"))
        if not isinstance(index, int) or not 0 <= index < TOOLS_MAX:
            raise ProviderFailed("broken", "a tool call has no place")
        arguments = str(function.get("arguments") or "")
        if index in self._places:
            return CallPart(self._places[index], arguments)
        place = self._places[index] = len(self._places)
        id, name = str(call.get("id") or f"call_{index}"), str(function.get("name") or "")
        if not name:
            raise ProviderFailed("broken", "a tool call has no name")
        return CallPart(place, arguments, id, name)

    def done(self) -> Done:
        calls = tuple(ToolCall(call.id, call.name, call.arguments or "{}") for call in self._calling.calls)
        return Done(
            0,
            "length" if self._reason == "length" else "stop",
            _count(self._usage.get("prompt_tokens"), self._asked_chars),
            _count(self._usage.get("completion_tokens"), self._chars),
            tool_calls=calls,
        )


def _count(told: Any, chars: int) -> int:
    return told if isinstance(told, int) and told >= 0 else chars // CHARS_PER_TOKEN
