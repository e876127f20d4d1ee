"""Tools in request bodies: what a child gets of them, and what is refused."""

from __future__ import annotations

import json
from typing import Any

import pytest

from piclusterd.errors import UserError
from piclusterd.inference.openai_body import ChatBody, chat_request, parse
from piclusterd.inference.protocol import GenerateRequest, decode, encode

LIGHT = {"type": "function", "function": {"name": "turn_on", "description": "A lamp", "parameters": {"type": "object"}}}
ASK = {"role": "user", "content": "Light, please."}


def request(**body: Any) -> GenerateRequest:
    return chat_request(parse({"messages": [ASK], **body}, ChatBody))


def test_tools_reach_the_child_as_openai_words_them() -> None:
    asked = request(tools=[LIGHT], tool_choice="required", parallel_tool_calls=False)
    assert json.loads(asked.tools) == [LIGHT]
    assert (asked.tool_choice, asked.parallel_tool_calls) == ("required", False)
    assert decode(encode(asked), GenerateRequest) == asked
    assert asked.text_length > len(asked.tools)


def test_no_tools_is_no_text_and_the_defaults() -> None:
    asked = request(tools=[], tool_choice="auto")
    assert (asked.tools, asked.tool_choice, asked.parallel_tool_calls) == ("", "auto", True)


def test_one_function_can_be_demanded() -> None:
    named = {"type": "function", "function": {"name": "turn_on"}}
    assert request(tools=[LIGHT], tool_choice=named).tool_choice == "name:turn_on"


def test_calls_and_their_results_are_turns_of_the_chat() -> None:
    call = {"id": "call_7", "type": "function", "function": {"name": "turn_on", "arguments": '{"lamp": 1}'}}
    turns = [ASK, {"role": "assistant", "content": None, "tool_calls": [call]},
             {"role": "tool", "tool_call_id": "call_7", "content": "done"}]  # fmt: skip
    asked = chat_request(parse({"messages": turns}, ChatBody))
    made = asked.messages[1].tool_calls[0]
    assert (made.id, made.name, json.loads(made.arguments)) == ("call_7", "turn_on", {"lamp": 1})
    assert (asked.messages[2].role, asked.messages[2].tool_call_id) == ("tool", "call_7")


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"tools": [{"type": "function", "function": {"name": "no blanks"}}]}, "tools[0].function.name"),
        ({"tools": [LIGHT] * 129}, "tools"),
        ({"tools": [{"type": "retrieval", "function": {"name": "x"}}]}, "tools[0].type"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": [LIGHT], "tool_choice": {"type": "function", "function": {"name": "other"}}}, "tool_choice"),
        ({"tools": [LIGHT], "tool_choice": "perhaps"}, "tool_choice"),
    ],
)
def test_what_cannot_be_a_tool_is_refused_by_its_field(body: dict[str, Any], param: str) -> None:
    with pytest.raises(UserError) as caught:
        request(**body)
    assert (caught.value.param or "").replace("[...]", "[0]") == param
