"""Tools in request bodies, OpenAI's or Ollama's, checked, as a child's chat template takes them. Pure.

The two differ in one thing: a call's arguments are JSON text with OpenAI and an object with Ollama. Either is taken.
Nothing here calls anything: a call that the model wants goes back to who asked.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from ..errors import UserError
from .protocol import TOOL_NAME_MAX, TOOLS_MAX, ToolCall

NAMED = "name:"
"""Begins a `tool_choice` that demands one function."""

ToolName = Annotated[str, Meta(min_length=1, max_length=TOOL_NAME_MAX, pattern=r"^[A-Za-z0-9_.-]+$")]


class FunctionBody(msgspec.Struct):
    name: ToolName
    description: str | None = None
    parameters: dict[str, Any] | None = None


class ToolBody(msgspec.Struct):
    function: FunctionBody
    type: Literal["function"] = "function"


class CalledBody(msgspec.Struct):
    name: ToolName
    arguments: str | dict[str, Any] = "{}"


class CallBody(msgspec.Struct):
    function: CalledBody
    id: str | None = None


class NamedBody(msgspec.Struct):
    name: ToolName


class NamedChoice(msgspec.Struct):
    function: NamedBody
    type: Literal["function"] = "function"


Tools = Annotated[list[ToolBody], Meta(max_length=TOOLS_MAX)]
Calls = Annotated[list[CallBody], Meta(max_length=TOOLS_MAX)]
ToolChoice = Literal["none", "auto", "required"] | NamedChoice


def tools_text(tools: Sequence[ToolBody] | None) -> str:
    """OpenAI's list as JSON text; "" where no tool is offered. Raises `UserError` where one is nested too deep."""
    offered = [{"type": "function", "function": _told(tool.function)} for tool in tools or ()]
    try:
        return json.dumps(offered, ensure_ascii=False) if offered else ""
    except RecursionError:
        raise UserError("a tool's parameters are nested too deep", param="tools") from None


def _told(function: FunctionBody) -> dict[str, Any]:
    told = {"name": function.name, "description": function.description, "parameters": function.parameters}
    return {key: value for key, value in told.items() if value is not None}


def choice_text(choice: ToolChoice | None, tools: Sequence[ToolBody] | None) -> str:
    """`GenerateRequest.tool_choice`. Raises `UserError` where it demands what is not offered."""
    if choice is None:
        return "auto"
    names = [tool.function.name for tool in tools or ()]
    if isinstance(choice, NamedChoice):
        if choice.function.name not in names:
            raise UserError(
                f"tool_choice names {choice.function.name!r}", "No such tool is offered.", param="tool_choice"
            )
        return NAMED + choice.function.name
    if choice == "required" and not names:
        raise UserError("tool_choice requires a call", "No tool is offered.", param="tool_choice")
    return choice


def calls(bodies: Sequence[CallBody] | None) -> tuple[ToolCall, ...]:
    """What an assistant called in an earlier turn."""
    return tuple(
        ToolCall((body.id or f"call_{number}")[:256], body.function.name, _text(body.function.arguments))
        for number, body in enumerate(bodies or ())
    )


def _text(arguments: str | dict[str, Any]) -> str:
    return arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
