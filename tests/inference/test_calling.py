"""Calls as they form: name first, arguments in pieces, and the same call whoever goes on with it."""

from __future__ import annotations

import msgspec
import pytest

from piclusterd.inference.calling import HEAD_CHARS_MAX, Calling, Reader
from piclusterd.inference.protocol import CallPart, Delta, Done, Frame, Told, ToolCall
from piclusterd.inference.serving import Progress
from piclusterd.inference.tools import ToolCalls

from .test_tools import CALL, NAMES, OFFERED

ARGUMENTS = '{"city": "Köln }\\"{\\\\", "unit": {"of": ["C"]}}'
HARD = f'{{"name": "weather", "arguments": {ARGUMENTS}}}'
TWO = f'<tool_call>{HARD}</tool_call>\n<tool_call>\n{{"name": "time", "arguments": {{}}}}\n</tool_call>'


def fed(text: str, size: int, reader: Reader) -> list[CallPart]:
    return [part for at in range(0, len(text), size) for part in reader.feed(text[at : at + size])]


@pytest.mark.parametrize("size", [1, 2, 7, 1000])
@pytest.mark.parametrize(
    "text",
    [
        TWO, f"[{HARD}, {{\"name\": \"time\", \"parameters\": {{}}}}]",
        f'<|python_tag|>{HARD}; {{"name":"time","arguments":{{}}}}',
        f'[TOOL_CALLS] [{HARD}] {{"type": "function", "function": {{"name": "time", "arguments": {{}}}}}}',
    ],
)  # fmt: skip
def test_the_pieces_make_the_calls_however_the_text_comes(text: str, size: int) -> None:
    reader, calling = Reader(NAMES), Calling()
    parts = fed(text, size, reader)
    calling.add(parts)
    assert calling.calls == reader.calls
    assert [(call.name, call.arguments) for call in reader.calls] == [("weather", ARGUMENTS), ("time", "{}")]
    assert reader.whole
    assert [(part.index, part.name) for part in parts if part.name] == [(0, "weather"), (1, "time")]
    assert [part.index for part in parts if part.last] == [0, 1]


def test_the_name_is_told_before_the_arguments_are_there() -> None:
    reader = Reader(NAMES)
    assert fed('{"name": "weather", "arguments": ', 1, reader) == []
    first, second = reader.feed('{"ci')
    assert (first.name, first.arguments, first.last) == ("weather", "", False)
    assert (second.name, second.arguments, second.last) == ("", '{"ci', False)
    assert not reader.whole


@pytest.mark.parametrize(
    "text",
    ['{"name": "rockets", "arguments": {}}', '{"name": "weather", "arguments": 7}', '{"answer": {"name": "weather"}}'],
)
def test_nothing_is_told_of_what_may_be_no_call(text: str) -> None:
    reader = Reader(NAMES)
    assert fed(text, 1, reader) == []
    assert reader.calls == ()


def test_a_name_that_does_not_come_is_not_waited_for_for_ever() -> None:
    reader = Reader(NAMES)
    assert reader.feed("[" * (HEAD_CHARS_MAX + 1)) == []
    assert reader.feed(CALL) == []


def test_no_more_calls_are_told_than_are_wanted() -> None:
    reader = Reader(NAMES, most=1)
    assert {part.index for part in fed(TWO, 3, reader)} == {0}
    assert [call.name for call in reader.calls] == ["weather"]


def test_what_was_told_is_completed_by_the_end() -> None:
    calling = Calling()
    calling.add([CallPart(0, '{"a"', "c1", "weather")])
    done = Done(0, "stop", 1, 1, tool_calls=(ToolCall("c9", "weather", '{"a": 1}'), ToolCall("c2", "time", "{}")))
    assert calling.rest(done) == [CallPart(0, ": 1}", last=True), CallPart(1, "{}", "c2", "time", True)]
    calling.add(calling.rest(done))
    assert calling.calls == (ToolCall("c1", "weather", '{"a": 1}'), ToolCall("c2", "time", "{}"))
    assert calling.rest(done) == []


@pytest.mark.parametrize("text", [TWO, f"Look. {TWO}", f"[{HARD}]"])
def test_broken_off_anywhere_a_call_goes_on_elsewhere_as_if_nothing_had_been(text: str) -> None:
    """Each character is a token; the next child is given the tokens told and reads them again."""
    unbroken = _watched(text, Told())
    for cut in range(len(text)):
        calls, progress, calling = ToolCalls(), Progress(), Calling()
        calls.asked(7, OFFERED)
        content = ""
        for number, char in enumerate(text[:cut]):
            for frame in calls.told([Delta(7, char, 1, (), (number,))]):
                assert isinstance(frame, Delta)
                progress.add(frame)
                calling.add(frame.calls)
                content += frame.text
        told = progress.rest(OFFERED).told
        frames = _watched(text, told)
        for frame in frames:
            if isinstance(frame, Delta):
                calling.add(frame.calls)
                content += frame.text
        done = frames[-1]
        assert isinstance(done, Done)
        assert calling.rest(done) == []
        assert calling.calls == done.tool_calls
        assert content == "".join(frame.text for frame in unbroken if isinstance(frame, Delta))
        assert calling.calls[0].name == "weather"
        assert calling.calls[0].arguments == ARGUMENTS


def _watched(text: str, told: Told) -> list[Frame]:
    """What the pool hears of an engine that writes `text` and has been told so much."""
    calls = ToolCalls()
    calls.asked(7, msgspec.structs.replace(OFFERED, told=told))
    frames: list[Frame] = []
    for number, char in enumerate(text):
        if number >= told.chars:
            known = number < len(told.tokens)
            frames += calls.told([Delta(7, char, 0 if known else 1, (), () if known else (number,))])
    return frames + calls.told([Done(7, "stop", 3, len(text))])


def test_an_answer_cut_in_its_call_says_so() -> None:
    calls = ToolCalls()
    calls.asked(7, OFFERED)
    calls.told([Delta(7, CALL[:-6], 1, (), (1,))])
    (done,) = calls.told([Done(7, "length", 3, 1)])
    assert isinstance(done, Done)
    assert done.reason == "length"
    assert done.tool_calls[0].arguments == CALL[CALL.index("{", 2) : -6]
