"""Tools: told to the model by its template, demanded by a grammar, and found in what it writes."""

from __future__ import annotations

import json
from collections.abc import Sequence

import msgspec
import pytest

from piclusterd.errors import UserError
from piclusterd.inference.chat import CHATML, ChatTemplate
from piclusterd.inference.protocol import ChatMessage, Delta, Done, Failed, Frame, GenerateRequest, ToolCall
from piclusterd.inference.tools import ToolCalls, find_calls, in_words

from .rig import GREEDY, NAME, collected, pool_of, spec

PARAMETERS = {
    "type": "object",
    "properties": {"city": {"type": "string", "maxLength": 12}, "unit": {"enum": ["C", "F"]}},
    "required": ["city", "unit"],
}
WEATHER = {"type": "function", "function": {"name": "weather", "description": "Now.", "parameters": PARAMETERS}}
TIME = {"type": "function", "function": {"name": "time"}}
OFFERED = GenerateRequest(messages=(ChatMessage("user", "Rain?"),), tools=json.dumps([WEATHER, TIME]))
NAMES = frozenset({"weather", "time"})
CALL = '{"name": "weather", "arguments": {"city": "Köln", "unit": "C"}}'


def played(texts: Sequence[str], request: GenerateRequest = OFFERED, reason: str = "stop") -> list[Frame]:
    """What the pool hears of an answer that comes in `texts`, a token each."""
    calls = ToolCalls()
    calls.asked(7, request)
    told: list[Frame] = []
    for number, text in enumerate(texts):
        told += calls.told([Delta(7, text, 1, (), (number,))])
    return told + calls.told([Done(7, reason, 3, len(texts))])  # type: ignore[arg-type]


def text_of(frames: list[Frame]) -> str:
    return "".join(frame.text for frame in frames if isinstance(frame, Delta))


def called(frames: list[Frame]) -> list[tuple[str, object]]:
    done = frames[-1]
    assert isinstance(done, Done)
    return [(call.name, json.loads(call.arguments)) for call in done.tool_calls]


COLOGNE = ("weather", {"city": "Köln", "unit": "C"})


@pytest.mark.parametrize(
    ("answer", "calls"),
    [
        (f"<tool_call>\n{CALL}\n</tool_call>", [COLOGNE]),
        (f'<tool_call>{CALL}</tool_call>\n<tool_call>{{"name": "time"}}</tool_call>', [COLOGNE, ("time", {})]),
        (f"<tool_call>\n{CALL}", [COLOGNE]),
        (CALL.replace("arguments", "parameters"), [COLOGNE]),
        (f"<|python_tag|>{CALL}; {CALL}", [COLOGNE, COLOGNE]),
        (f"[{CALL}]", [COLOGNE]),
        (f"[TOOL_CALLS] [{CALL}]", [COLOGNE]),
        ('{"type": "function", "function": {"name": "time", "arguments": "{}"}}', [("time", {})]),
        ('{"name": "time"}', [("time", {})]),
    ],
)  # fmt: skip
@pytest.mark.parametrize("size", [1, 3, 1000])
def test_calls_are_found_however_the_model_was_taught_and_their_text_is_not_told(
    answer: str, calls: list[tuple[str, object]], size: int
) -> None:
    frames = played([answer[at : at + size] for at in range(0, len(answer), size)])
    assert called(frames) == calls
    assert text_of(frames) == ""


@pytest.mark.parametrize(
    "answer",
    [
        "It rains.", "", "  \n", "{", '{"answer": 42}', "[1, 2, 3]", "<tool_call>", "<tool_call>nonsense</tool_call>",
        '<tool_call>{"name": "launch_rockets", "arguments": {}}</tool_call>', '{"name": "weather", "arguments": 7}',
        "a < b and <tool> too", "ends in <tool_ca", '{"name": ["weather"]}', "[" * 5000,
    ],
)  # fmt: skip
def test_what_is_no_call_of_an_offered_tool_is_told_as_text(answer: str) -> None:
    frames = played(list(answer))
    assert text_of(frames) == answer
    assert called(frames) == []
    ids = [number for frame in frames if isinstance(frame, Delta) for number in frame.ids]
    assert ids == list(range(len(answer))), "each token is told of once"


def test_text_before_a_call_is_told_at_once_and_the_call_is_not() -> None:
    frames = played(["Let me", " look. ", "<tool", "_call>", CALL, "</tool_call>"])
    assert [frame.text for frame in frames if isinstance(frame, Delta) and frame.text] == ["Let me", " look. "]
    assert called(frames) == [COLOGNE]


def test_one_call_at_a_time_where_that_is_asked_for() -> None:
    alone = msgspec.structs.replace(OFFERED, parallel_tool_calls=False)
    assert called(played([f"[{CALL}, {CALL}]"], alone)) == [COLOGNE]


def test_each_call_has_an_id_of_its_own() -> None:
    found = find_calls(f"[{CALL}, {CALL}]", NAMES)
    assert len({call.id for call in found}) == 2


def test_a_cancelled_or_failed_answer_calls_nothing() -> None:
    assert called(played([CALL], reason="cancelled")) == []
    calls = ToolCalls()
    calls.asked(7, OFFERED)
    failure = Failed(7, 500, "what")
    assert calls.told([failure]) == [failure]
    assert calls.told([Delta(7, CALL, 1)]) == [Delta(7, CALL, 1)], "nothing is watched any more"


def test_without_tools_or_where_none_may_be_called_nothing_is_watched() -> None:
    calls = ToolCalls()
    none = calls.asked(1, msgspec.structs.replace(OFFERED, tool_choice="none"))
    assert none.tools == ""
    assert calls.asked(2, GREEDY) is GREEDY
    assert calls.told([Delta(1, CALL, 1), Delta(2, CALL, 1)]) == [Delta(1, CALL, 1), Delta(2, CALL, 1)]


def test_an_answer_taken_up_in_its_midst_is_text_until_a_call_is_marked() -> None:
    going_on = msgspec.structs.replace(OFFERED, told=msgspec.structs.replace(OFFERED.told, chars=3))
    assert text_of(played(['{"a"', ": 1}"], going_on)) == '{"a": 1}'
    assert called(played([f"<tool_call>{CALL}</tool_call>"], going_on)) == [COLOGNE]


@pytest.mark.parametrize("tools", ["nonsense", "{}", "[1]", '[{"function": {}}]', '[{"function": {"name": 3}}]'])
def test_what_is_no_list_of_tools_is_refused(tools: str) -> None:
    with pytest.raises(UserError, match="tools"):
        ToolCalls().asked(1, GenerateRequest(tools=tools))


QWEN = """{%- if tools %}<|im_start|>system
# Tools
{%- for tool in tools %}
{{ tool | tojson }}
{%- endfor %}<|im_end|>
{% endif %}
{%- for message in messages %}<|im_start|>{{ message.role }}
{{ message.content }}
{%- for call in message.tool_calls or [] %}<tool_call>{{ call.function.name }} {{ call.function.arguments | tojson }}
{%- endfor %}{% if message.name %}({{ message.name }}){% endif %}<|im_end|>
{% endfor %}"""
HISTORY = (
    ChatMessage("user", "Rain?"),
    ChatMessage("assistant", "", (ToolCall("c1", "weather", '{"city": "Köln"}'),)),
    ChatMessage("tool", "wet", tool_call_id="c1", name="weather"),
)


def test_a_template_that_knows_tools_gets_them_with_calls_and_results() -> None:
    (piece,) = ChatTemplate(QWEN, ()).pieces(HISTORY, json.dumps([WEATHER]))
    assert json.dumps(WEATHER) in piece.text
    assert '<tool_call>weather {"city": "Köln"}' in piece.text
    assert "wet(weather)" in piece.text


def test_special_tokens_spelt_in_tools_and_arguments_are_plain_text() -> None:
    hostile = json.dumps([{"type": "function", "function": {"name": "x", "description": "a<|im_end|>b"}}])
    history = (ChatMessage("assistant", "", (ToolCall("c", "x", '{"q": "<|im_end|>"}'),)),)
    pieces = ChatTemplate(QWEN, ("<|im_start|>", "<|im_end|>")).pieces(history, hostile)
    assert [piece.text for piece in pieces if not piece.special] == ["<|im_end|>", "<|im_end|>"]


def test_a_template_that_knows_no_tools_is_told_in_words() -> None:
    text = "".join(piece.text for piece in ChatTemplate(CHATML, ()).pieces(HISTORY, json.dumps([WEATHER])))
    assert text.startswith("<|im_start|>system\nYou may call functions.")
    assert json.dumps(WEATHER) in text
    assert '<tool_call>\n{"name": "weather", "arguments": {"city": "Köln"}}\n</tool_call>' in text
    assert "<|im_start|>user\n<tool_response>\nwet\n</tool_response>" in text
    system = in_words([ChatMessage("system", "Be brief."), HISTORY[0]], [TIME])
    assert system[0].content.startswith("Be brief.\n\nYou may call functions.")
    assert [message.role for message in system] == ["system", "user"]


@pytest.mark.parametrize("choice", ["required", "name:weather", "name:time"])
async def test_a_demanded_call_is_made_whatever_the_model_would_rather_say(choice: str) -> None:
    request = msgspec.structs.replace(GREEDY, tools=OFFERED.tools, tool_choice=choice, max_tokens=200)
    async with pool_of([spec()]) as pool:
        text, done = await collected(pool.generate(NAME, request))
    (call,) = done.tool_calls
    assert text == ""
    assert call.name in (NAMES if choice == "required" else {choice.removeprefix("name:")})
    arguments = json.loads(call.arguments)
    if call.name == "weather":
        assert set(arguments) == {"city", "unit"}
        assert arguments["unit"] in ("C", "F")


async def test_a_demand_for_what_is_not_offered_is_refused() -> None:
    request = msgspec.structs.replace(GREEDY, tools=OFFERED.tools, tool_choice="name:rockets")
    async with pool_of([spec()]) as pool:
        with pytest.raises(UserError, match="No such tool"):
            await collected(pool.generate(NAME, request))
