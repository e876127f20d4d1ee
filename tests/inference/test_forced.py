from __future__ import annotations

import json

import pytest

from piclusterd.inference.forced import FORCED_MAX, GRAMMAR_CHARS_MAX, STACKS_MAX, Follower, Grammar


def follower(text: str) -> Follower:
    return Follower(Grammar(text))


def forced_after(grammar: str, text: str) -> str:
    one = follower(grammar)
    one.feed(text)
    assert not one.lost
    return one.forced()


def test_literals_and_rules_are_forced_to_the_first_choice() -> None:
    grammar = 'root ::= "{" kind "}"\nkind ::= "\\"type\\": " ("\\"bug\\"" | "\\"chore\\"")'
    assert forced_after(grammar, "") == '{"type": "'
    assert forced_after(grammar, '{"type": "b') == 'ug"}'
    assert forced_after(grammar, '{"type": "chore') == '"}'


def test_asking_changes_nothing() -> None:
    one = follower('root ::= "abc" [x-z]')
    assert one.forced() == one.forced() == "abc"
    one.feed("ab")
    assert one.forced() == "c"


def test_an_answer_that_is_whole_has_ended_and_one_that_may_go_on_has_not() -> None:
    one = follower('root ::= "ab"')
    one.feed("a")
    assert (one.ended, one.forced()) == (False, "b")
    one.feed("b")
    assert (one.ended, one.forced()) == (True, "")
    open_ended = follower('root ::= "ab" "c"?')
    open_ended.feed("ab")
    assert not open_ended.ended
    assert open_ended.forced() == ""  # the end is a choice too


@pytest.mark.parametrize(
    ("grammar", "text", "forced"),
    [
        ('root ::= "a"* "b"', "aa", ""),
        ('root ::= "a"+ "b"', "", "a"),
        ('root ::= ("a" | "b")? "cd"', "c", "d"),
        ('root ::= [0-9] ([0-9] ([0-9])?)? "."', "123", "."),
        ('root ::= [^"\\\\] "x"', "y", "x"),
        ('root ::= "\\n\\t\\x41\\u00e9" "." [ab]', "", "\n\tA\u00e9."),
        ('root ::= "" "ab"', "a", "b"),
        ('root ::= x x\nx ::= "a" | "ab"', "aa", ""),
        ("root ::= [-+] [a-c-] [ab]", "-", ""),
        ('root ::= x | x\nx ::= "ab"', "", "ab"),
    ],
)
def test_the_forms_the_converter_writes(grammar: str, text: str, forced: str) -> None:
    assert forced_after(grammar, text) == forced


def test_what_the_grammar_forbids_loses_it() -> None:
    one = follower('root ::= "ab"')
    one.feed("x")
    assert one.lost
    assert one.forced() == ""
    assert not one.ended


def test_forced_text_is_bounded() -> None:
    assert forced_after('root ::= "' + "a" * 1000 + '"', "") == "a" * FORCED_MAX
    assert forced_after('root ::= x\nx ::= "a" x', "") == "a" * FORCED_MAX


def test_too_many_ways_lose_it() -> None:
    many = " | ".join(f'"a{number}"' for number in range(STACKS_MAX + 1))
    assert follower(f"root ::= {many}").lost


@pytest.mark.parametrize("text", ["root", "root ::= )", 'root ::= ("a"', "root ::= *", "root ::= %", "x" * 70_000])
def test_what_the_converter_does_not_write_is_refused(text: str) -> None:
    assert len("x" * 70_000) > GRAMMAR_CHARS_MAX
    with pytest.raises(ValueError, match=r"."):
        Grammar(text)


def test_a_schemas_frame_is_forced() -> None:
    grammar = pytest.importorskip("piclusterd.inference.grammar")
    schema = {
        "type": "object",
        "properties": {
            "type": {"enum": ["bug", "chore"]},
            "note": {"type": "string", "maxLength": 200},
            "tags": {"type": "array", "items": {"type": "boolean"}, "maxItems": 3},
        },
        "required": ["type", "note", "tags"],
        "additionalProperties": False,
    }
    text = grammar.compile_schema(json.dumps(schema)).decode()
    answer = json.dumps({"type": "chore", "note": 'a "b" c' * 20, "tags": [True, False]})
    one = follower(text)
    free = 0
    at = 0
    while not one.ended:
        forced = one.forced()
        assert answer.startswith(forced, at)
        one.feed(forced)
        at += len(forced)
        if not one.ended:
            one.feed(answer[at])
            at, free = at + 1, free + 1
        assert not one.lost
    assert at == len(answer)
    assert free <= 1 + len('a \\"b\\" c' * 20) + 1 + 6 + 20
