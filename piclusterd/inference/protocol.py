"""What the pool and a model's child process say to each other, and what nodes relay of it.

    pool ──Load──▶ child ──Ready | LoadFailed──▶ pool
    pool ──Generate(id)──▶ child ──Delta(id)*, Done(id) | Failed(id)──▶ pool        pool ──Cancel(id)──▶ child
    pool ──Embed(id)──▶ child ──Embedded(id) | Failed(id)──▶ pool        child, busy and silent ──Beat──▶ pool
    pool ──Classify(id)──▶ child ──Classified(id) | Failed(id)──▶ pool

On the Unix socket each frame is a little-endian uint32 length and a msgpack array `[tag, field, ...]`; peers get the
same arrays as the messages of a stream (`GenerateRequest`, `EmbedRequest` or `ClassifyRequest` there, the answers of
the child back).
The child handles hostile model files and hostile prompts, so the pool decodes what it says under caps and validates it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from ..wire import ENCODER, Dropped, Shipped, unpack

FRAME_BYTES_MAX = 8 * 1024 * 1024
"""A request (the API takes 1 MiB bodies) or 64 embeddings of 8192 numbers (2 MiB), with room to spare."""
PROMPT_CHARS_MAX = 1024 * 1024
"""Longer than any context a Pi can hold; past it, tokenising alone would stall the other requests."""
MESSAGES_MAX = 1024
"""Of one chat: far more turns than fit any context here."""
STOPS_MAX = 16
"""OpenAI allows 4, llama.cpp's clients use a few more; each is searched for at every token."""
BIASES_MAX = 300
"""Tokens whose logits one request may move: OpenAI's own limit."""
TOP_LOGPROBS_MAX = 20
"""Alternatives told of each token; OpenAI's limit."""
FIELDS_MAX, OPTIONS_MAX, OPTION_CHARS_MAX = 16, 64, 128
"""Of `choices`: each option is a few tokens in one batch, and a field is a pass."""
TOOLS_MAX = 128
"""Functions offered to a chat, and calls in one turn: OpenAI's limit."""
TOOL_NAME_MAX = 64
"""Characters of a function's name; OpenAI's limit."""
TENANT_CHARS_MAX, REQUEST_ID_CHARS_MAX = 64, 64
"""Of who asks (a digest of a key, or an address), and of the id that clients see as `X-Request-Id`."""
EMBED_BATCH_MAX = 64
"""Texts in one frame; the pool splits longer lists, so that generation gets its turn in between."""

LENGTH_BYTES = 4
"""Bytes of the length before each frame."""

Fraction = Annotated[float, Meta(ge=0.0, le=1.0)]
Penalty = Annotated[float, Meta(ge=-2.0, le=2.0)]
Bias = tuple[Annotated[int, Meta(ge=0, le=2**31 - 1)], Annotated[float, Meta(ge=-100.0, le=100.0)]]


Kind = Literal["llama", "hf", "part"]
"""Who runs it; "part": layers of a model split over boards."""
Task = Literal["generate", "embed", "classify", "summarize"]
"""What a model can do; `wire.TASKS`."""


class Frame(msgspec.Struct, frozen=True, array_like=True):
    """Base of everything below. Field order is the wire format: append only, with a default."""


class ToolCall(Frame, frozen=True):
    """A call that the model wants made, by who asked and never by us: `arguments` is the JSON text of an object."""

    id: Annotated[str, Meta(max_length=256)]
    name: Annotated[str, Meta(max_length=TOOL_NAME_MAX)]
    arguments: str


class ChatMessage(Frame, frozen=True):
    """`tool_calls` are an assistant's, `tool_call_id` and `name` say what a tool's result answers."""

    role: Literal["system", "user", "assistant", "tool"]
    content: str
    tool_calls: Annotated[tuple[ToolCall, ...], Meta(max_length=TOOLS_MAX)] = ()
    tool_call_id: Annotated[str, Meta(max_length=256)] = ""
    name: Annotated[str, Meta(max_length=256)] = ""


class Field(Frame, frozen=True):
    """Options of which the most probable is the answer; with a `name`, the value of that key of a JSON object."""

    name: Annotated[str, Meta(max_length=OPTION_CHARS_MAX)]
    options: Annotated[
        tuple[Annotated[str, Meta(min_length=1, max_length=OPTION_CHARS_MAX)], ...],
        Meta(min_length=1, max_length=OPTIONS_MAX),
    ]


Priority = Literal["interactive", "workflow", "batch"]
"""Who goes first: somebody waits; a run waits; nobody waits."""
Tenant = Annotated[str, Meta(max_length=TENANT_CHARS_MAX)]
RequestId = Annotated[str, Meta(max_length=REQUEST_ID_CHARS_MAX)]
KeepAlive = Annotated[float, Meta(ge=-1.0)] | None
"""Seconds that the model stays in memory after this answer; -1: until the room is needed; None: as it was."""
Cache = Literal["", "hit", "joined", "miss"]
"""Where an answer came from (`echoes`): remembered, another's in flight, the model. Empty: it was not looked for."""


class Told(Frame, frozen=True):
    """What of an answer its reader has: these tokens, the first `chars` characters of their text, and `calls`."""

    tokens: tuple[Annotated[int, Meta(ge=0, le=2**31 - 1)], ...] = ()
    chars: Annotated[int, Meta(ge=0)] = 0
    calls: Annotated[tuple[ToolCall, ...], Meta(max_length=TOOLS_MAX)] = ()
    """The last with the arguments that there are yet."""


class GenerateRequest(Frame, frozen=True):
    """One completion: of a chat where `messages` is not empty, else of the raw text `prompt`.

    `max_tokens` 0 means: until the context is full. `temperature` 0 is greedy. `json_schema` is JSON text; when set,
    the answer is JSON that conforms to it (within what grammars can express). With `choices`, nothing is sampled: of
    each field the most probable option is taken, and `Done.choices` tells the probabilities (`choosing`).
    `tools` is the JSON text of OpenAI's list of tools, for the chat template; `tool_choice` is "auto", "none",
    "required" or "name:" and the one function to call. What was called is in `Done.tool_calls`.
    `logit_bias` is pairs of token and what is added to its logit; `top_logprobs` counts the alternatives told of each
    token where `logprobs` is set. `told` is what another child has answered already: the answer goes on after it, as
    that one would have gone on. `tenant` shares the queue fairly with others; `id` is the client's request.
    With `only_loads` nothing is asked: the model comes into memory, or leaves it where `keep_alive_s` is 0.
    """

    model: Annotated[str, Meta(max_length=256)] = ""
    messages: Annotated[tuple[ChatMessage, ...], Meta(max_length=MESSAGES_MAX)] = ()
    prompt: Annotated[str, Meta(max_length=PROMPT_CHARS_MAX)] = ""
    max_tokens: Annotated[int, Meta(ge=0, le=2**31 - 1)] = 0
    temperature: Annotated[float, Meta(ge=0.0, le=10.0)] = 0.8
    top_k: Annotated[int, Meta(ge=0, le=2**31 - 1)] = 40
    top_p: Fraction = 0.95
    min_p: Fraction = 0.05
    repeat_penalty: Annotated[float, Meta(gt=0.0, le=10.0)] = 1.0
    frequency_penalty: Penalty = 0.0
    presence_penalty: Penalty = 0.0
    seed: Annotated[int, Meta(ge=0, lt=2**32)] | None = None
    stop: Annotated[tuple[Annotated[str, Meta(min_length=1, max_length=256)], ...], Meta(max_length=STOPS_MAX)] = ()
    json_schema: str = ""
    logit_bias: Annotated[tuple[Bias, ...], Meta(max_length=BIASES_MAX)] = ()
    logprobs: bool = False
    top_logprobs: Annotated[int, Meta(ge=0, le=TOP_LOGPROBS_MAX)] = 0
    choices: Annotated[tuple[Field, ...], Meta(max_length=FIELDS_MAX)] = ()
    tools: Annotated[str, Meta(max_length=PROMPT_CHARS_MAX)] = ""
    tool_choice: Annotated[str, Meta(max_length=5 + TOOL_NAME_MAX)] = "auto"
    parallel_tool_calls: bool = True
    told: Told = Told()
    tenant: Tenant = ""
    priority: Priority = "interactive"
    id: RequestId = ""
    keep_alive_s: KeepAlive = None
    only_loads: bool = False

    @property
    def text_length(self) -> int:
        """Characters of the prompt, whatever its form."""
        return len(self.prompt) + len(self.tools) + sum(len(message.content) for message in self.messages)


class EmbedRequest(Frame, frozen=True):
    model: Annotated[str, Meta(max_length=256)]
    texts: Annotated[tuple[str, ...], Meta(min_length=1, max_length=2048)]
    tenant: Tenant = ""
    priority: Priority = "interactive"
    id: RequestId = ""
    keep_alive_s: KeepAlive = None


class ClassifyRequest(Frame, frozen=True):
    model: Annotated[str, Meta(max_length=256)]
    texts: Annotated[tuple[str, ...], Meta(min_length=1, max_length=2048)]


# pool → child ----------------------------------------------------------------------------------------------------
class Load(Frame, frozen=True, tag="load"):
    """`context` tokens over all `slots`; `threads` decode, `batch_threads` read prompts. `others`: bytes of the weights
    that this node's other models have mapped. `kind`: whose model `path` is; `task`: what a model of transformers is
    for, where that is not to be told by its architecture."""

    path: str
    context: int
    slots: int
    threads: int
    batch_threads: int
    others: int = 0
    kind: Kind = "llama"
    task: str = ""
    measure: bool = False
    """Also measure how fast memory is read."""
    adapter: str = ""
    """A LoRA adapter's file, and how strongly it acts."""
    scale: float = 1.0
    drafts: int = 0
    """Tokens guessed at a time; 0: none."""
    shares: tuple[int, ...] = ()
    """Layers on other boards, whose sockets come along; `apart`: bytes there, or, of a part, what it may take."""
    apart: int = 0


class Generate(Frame, frozen=True, tag="generate"):
    id: int
    request: GenerateRequest


class Cancel(Frame, frozen=True, tag="cancel"):
    id: int


class Embed(Frame, frozen=True, tag="embed"):
    id: int
    texts: Annotated[tuple[str, ...], Meta(max_length=EMBED_BATCH_MAX)]


class Classify(Frame, frozen=True, tag="classify"):
    id: int
    texts: Annotated[tuple[str, ...], Meta(max_length=EMBED_BATCH_MAX)]


# child → pool ----------------------------------------------------------------------------------------------------
class Ready(Frame, frozen=True, tag="ready"):
    """The model is loaded. `context` is the longest prompt plus answer of one request, in tokens."""

    context: int
    embedding_size: int
    description: str
    name: str
    template_sha256: str
    """Of the file's chat template; empty where it has none and ChatML is used."""
    tasks: tuple[Task, ...] = ("generate",)
    bandwidth: float = 0.0
    """Bytes of memory read a second, where that was to be measured."""
    state_key: str = ""
    """Build and settings that saved states depend on; empty: none can be given to another node."""
    tools: bool = False
    """Whether its chat template has a place for tools."""


class LoadFailed(Frame, frozen=True, tag="load-failed"):
    why: str


class TokenLogprob(Frame, frozen=True):
    """A token's bytes and the logarithm of its probability before sampling; `top`: the same of the likeliest."""

    text: bytes
    logprob: float
    top: tuple[tuple[bytes, float], ...] = ()


class CallPart(Frame, frozen=True):
    """The next piece of the arguments of call `index`; `id` and `name` come with its first, `last` ends it (a
    provider's may come without)."""

    index: Annotated[int, Meta(ge=0, lt=TOOLS_MAX)]
    arguments: str
    id: Annotated[str, Meta(max_length=256)] = ""
    name: Annotated[str, Meta(max_length=TOOL_NAME_MAX)] = ""
    last: bool = False


class Delta(Frame, frozen=True, tag="delta"):
    """`tokens` counts those since the last Delta, whether their text is out yet or not; `ids` and `logprobs` are
    theirs. `calls`: what has come of tool calls, after `text`."""

    id: int
    text: str
    tokens: int
    logprobs: tuple[TokenLogprob, ...] = ()
    ids: tuple[int, ...] = ()
    calls: tuple[CallPart, ...] = ()


class Done(Frame, frozen=True, tag="done"):
    """The end of an answer. Rates are of this request, tokens per second; 0 where too short to tell.

    `choices`: of each field asked for, the probability of each option, given that the answer is one of them.
    `tool_calls`: all that the model wants called, be it told in Deltas (`calls`) or not.
    """

    id: int
    reason: Literal["stop", "length", "cancelled"]
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int = 0
    prefill_tps: float = 0.0
    decode_tps: float = 0.0
    choices: tuple[tuple[float, ...], ...] = ()
    tool_calls: Annotated[tuple[ToolCall, ...], Meta(max_length=TOOLS_MAX)] = ()
    waited_s: float = 0.0
    """In the queue of the node that answered."""
    cache: Cache = ""
    shipped: Shipped | None = None
    drafted: int = 0
    accepted: int = 0
    """Of the tokens that were guessed (`drafts`), those that were right."""


class Beat(Frame, frozen=True, tag="beat"):
    """At work, with nothing to tell yet: a long prompt is being read."""


class Embedded(Frame, frozen=True, tag="embedded"):
    """One vector a text, in order: little-endian float32, of length 1. `tokens` counts those of all texts."""

    id: int
    vectors: tuple[bytes, ...]
    tokens: int
    cache: Cache = ""

    @property
    def count(self) -> int:
        return len(self.vectors)

    def parts(self) -> Iterator[Embedded]:
        """One a text."""
        for vector, tokens in zip(self.vectors, _shares(self.tokens, self.count), strict=True):
            yield Embedded(self.id, (vector,), tokens, self.cache)


class Classified(Frame, frozen=True, tag="classified"):
    """Of each text, in order, every label of the model with its score (0 to 1), the best first."""

    id: int
    scores: tuple[tuple[tuple[str, float], ...], ...]
    tokens: int

    @property
    def count(self) -> int:
        return len(self.scores)

    def parts(self) -> Iterator[Classified]:
        """One a text."""
        for scores, tokens in zip(self.scores, _shares(self.tokens, self.count), strict=True):
            yield Classified(self.id, (scores,), tokens)


class Failed(Frame, frozen=True, tag="failed"):
    """A `PiclusterError` on its way to the caller (`faults`)."""

    id: int
    status: int
    what: str
    why: str = ""
    fix: str = ""
    param: str | None = None
    retry_after_s: float = 0.0
    code: str = ""


ToChild = Load | Generate | Cancel | Embed | Classify
FromChild = Ready | LoadFailed | Beat | Delta | Done | Embedded | Classified | Failed
Answer = Delta | Done | Embedded | Classified | Failed
"""What a peer sends back for a relayed request."""


def encode(frame: Frame) -> bytes:
    """`frame` as msgpack, without the length."""
    return ENCODER.encode(frame)


def decode(data: bytes, kind: Any) -> Any | Dropped:
    """`data` as one of the frames in `kind` (a struct or a union of tagged ones), or why it is none. Never raises."""
    raw = unpack(data, FRAME_BYTES_MAX)
    if isinstance(raw, Dropped):
        return raw
    try:
        frame = msgspec.convert(raw, kind, strict=True)
    except msgspec.ValidationError as fault:
        return Dropped(f"not a frame: {fault}")
    request = frame.request if isinstance(frame, Generate) else frame
    if isinstance(request, GenerateRequest) and not _finite(request):
        return Dropped("not a frame: a sampling parameter is not a finite number")
    return frame


def framed(frame: Frame) -> bytes:
    """`frame` as it goes on the socket."""
    body = encode(frame)
    return len(body).to_bytes(LENGTH_BYTES, "little") + body


def _shares(tokens: int, count: int) -> list[int]:
    share, rest = divmod(tokens, max(1, count))
    return [share + (rest if number == 0 else 0) for number in range(count)]


def _finite(request: GenerateRequest) -> bool:
    # NaN passes every `ge` and `le`: comparisons with it are false.
    return all(
        math.isfinite(value)
        for value in (
            request.temperature, request.top_p, request.min_p,
            request.repeat_penalty, request.frequency_penalty, request.presence_penalty,
            *(bias for _, bias in request.logit_bias),
        )
    )  # fmt: skip
