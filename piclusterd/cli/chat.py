"""`picluster chat`: one answer, or a conversation, from the cluster's own models.

    POST /v1/chat/completions {stream: true} ──SSE──▶ data: {choices: [{delta: {content}}]} … data: [DONE]

What the model writes is a stranger's text: control characters are made visible before they reach the terminal.
Ctrl-C ends the answer, not the conversation; Ctrl-D ends that.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

import click
import msgspec

from ..errors import NotFound, Unavailable
from .client import Client, Target, connect
from .terminal import clean

PROMPT_CHARACTERS_MAX = 256 * 1024
"""Beyond any context a board can hold; refused here rather than after a long upload."""
STDIN = "-"

Messages = list[dict[str, str]]


@click.command()
@click.argument("prompt", required=False)
@click.option("--model", "-m", help="The model's name; default: the first the cluster serves.")
@click.option("--system", help="Instructions that go before the conversation.")
@click.option("--max-tokens", type=click.IntRange(min=1), help="Longest answer, in tokens.")
@click.pass_obj
def chat(options: Any, prompt: str | None, model: str | None, system: str | None, max_tokens: int | None) -> None:
    """Ask a model. PROMPT is one question, `-` reads it from stdin; without it a conversation starts."""
    if prompt is None and not sys.stdin.isatty():
        prompt = STDIN
    if prompt == STDIN:
        prompt = sys.stdin.read(PROMPT_CHARACTERS_MAX + 1)
    if prompt is not None and not 0 < len(prompt.strip()) <= PROMPT_CHARACTERS_MAX:
        raise click.UsageError(f"a prompt has 1 to {PROMPT_CHARACTERS_MAX} characters")
    messages: Messages = [{"role": "system", "content": system}] if system else []
    extra = {"max_tokens": max_tokens} if max_tokens else {}
    model = model or asyncio.run(_first_model(options.target))
    if prompt is not None:
        asyncio.run(_turn(options.target, model, messages, prompt, extra))
    else:
        _converse(options.target, model, messages, extra)


def _converse(where: Target, model: str, messages: Messages, extra: dict[str, Any]) -> None:
    print(f"{clean(model)} answers. Ctrl-D ends the conversation.")
    while True:
        try:
            prompt = input("> ").strip()
        except (EOFError, KeyboardInterrupt):
            print()
            return
        if not prompt:
            continue
        try:
            asyncio.run(_turn(where, model, messages, prompt, extra))
        except KeyboardInterrupt:
            print("\n(stopped)")


async def _first_model(where: Target) -> str:
    async with connect(where) as client:
        body = await client.get("/v1/models")
    try:
        listed = [str(model["id"]) for model in msgspec.json.decode(body)["data"]]
    except (msgspec.DecodeError, LookupError, TypeError):
        raise Unavailable("the answer is not a list of models", "", "Is this a piclusterd node?") from None
    if not listed:
        raise NotFound("the cluster serves no model", "", "Name one in [[models]] of a node's configuration.")
    return listed[0]


async def _turn(where: Target, model: str, messages: Messages, prompt: str, extra: dict[str, Any]) -> None:
    """Ask and print; `messages` grows by question and answer, unless the answer fails."""
    question = {"role": "user", "content": prompt}
    body = {"model": model, "messages": [*messages, question], "stream": True, **extra}
    said: list[str] = []
    async with connect(where) as client, aclosing(_pieces(client, body)) as pieces:
        async for piece in pieces:
            said.append(piece)
            print(clean(piece, prose=True), end="", flush=True)
    print()
    messages += [question, {"role": "assistant", "content": "".join(said)}]


async def _pieces(client: Client, body: dict[str, Any]) -> AsyncGenerator[str, None]:
    """The text of an answer as it comes. Raises `Unavailable` when it breaks off or the stream carries an error."""
    async with aclosing(client.lines("POST", "/v1/chat/completions", body)) as lines:
        async for line in lines:
            if not line.startswith(b"data:"):
                continue  # comments keep the connection alive while the prompt is read
            data = line.removeprefix(b"data:").strip()
            if data == b"[DONE]":
                return
            yield _text_of(data)
    raise Unavailable("the answer broke off", "the stream ended without its end mark", "Ask again.")


def _text_of(data: bytes) -> str:
    try:
        event = msgspec.json.decode(data)
        if told := event.get("error"):
            raise Unavailable(str(told.get("what") or told.get("message")), str(told.get("why") or ""))
        return "".join(str(choice["delta"].get("content") or "") for choice in event["choices"])
    except (msgspec.DecodeError, LookupError, TypeError, AttributeError):
        raise Unavailable("the answer cannot be read", "a piece of the stream is not an OpenAI chunk") from None
