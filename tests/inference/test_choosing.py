from __future__ import annotations

import json
import math
from collections.abc import Mapping

import pytest

from piclusterd.inference.choosing import TREE_TOKENS_MAX, Choosing, Node, shared, tree
from piclusterd.inference.protocol import Field

END = 0
EVEN = math.log(0.5)


def tokenise(text: str) -> list[int]:
    return [ord(char) for char in text]


def choosing(*fields: Field, forks: int = 16) -> Choosing:
    return Choosing(fields, tokenise, END, forks)


class Towards:
    """Log-probabilities of a model that writes `text`: what leads there is likely, the rest is not."""

    def __init__(self, text: str) -> None:
        self._tokens = [*tokenise(text), END]

    def __call__(self, asked: Choosing) -> Mapping[int, Mapping[int, float]]:
        logs: dict[int, dict[int, float]] = {}
        for node in asked.nodes:
            at = len(asked.common) + node.depth
            wanted = self._tokens[at] if at < len(self._tokens) else END
            logs.setdefault(node.parent, {})[node.token] = math.log(0.9 if node.token == wanted else 0.05)
        return logs


def answered(asked: Choosing, towards: Towards) -> tuple[str, int]:
    """The answer and how many passes it took."""
    passes = 0
    while not asked.done:
        asked.scored(towards(asked))
        passes += 1
    return asked.text, passes


def test_the_most_probable_option_is_the_answer() -> None:
    asked = choosing(Field("", ("bug", "feature", "chore")))
    assert answered(asked, Towards("feature")) == ("feature", 1)
    [probabilities] = asked.probabilities
    assert sum(probabilities) == pytest.approx(1.0)
    assert max(probabilities) == probabilities[1]
    assert asked.path == [*tokenise("feature"), END]


def test_an_option_that_begins_another_is_not_favoured_for_being_short() -> None:
    for wanted in ("P1", "P10"):
        asked = choosing(Field("", ("P1", "P10")))
        assert asked.common == tokenise("P1")
        assert answered(asked, Towards(wanted))[0] == wanted


def test_an_options_score_is_the_sum_along_its_path() -> None:
    asked = choosing(Field("", ("a", "bcd")))
    asked.scored({node.parent: {ord("a"): EVEN, ord("b"): EVEN, ord("c"): EVEN, ord("d"): EVEN, END: EVEN}
                  for node in asked.nodes})  # fmt: skip
    assert asked.probabilities[0] == pytest.approx((4 / 5, 1 / 5))  # 2**-2 and 2**-4


def test_fields_are_chosen_one_after_another_and_make_json() -> None:
    asked = choosing(Field("type", ("bug", 'say "x"\\')), Field("priority", ("P0", "P1")))
    wanted = json.dumps({"type": 'say "x"\\', "priority": "P1"})
    assert answered(asked, Towards(wanted)) == (wanted, 2)
    assert [len(each) for each in asked.probabilities] == [2, 2]
    assert asked.path == tokenise(wanted)


def test_what_nothing_follows_is_not_read() -> None:
    asked = choosing(Field("", ("P1", "P10", "Q")))
    last = [number for number, node in enumerate(asked.nodes) if node.token == END]
    assert len(last) == 3
    assert sorted([*asked.inner, *last]) == list(range(len(asked.nodes)))


def test_where_no_option_begins_another_what_ends_them_is_not_asked_for() -> None:
    asked = choosing(Field("", ("P1", "P2")))
    assert ([node.token for node in asked.nodes], asked.inner) == (tokenise("12"), [])
    assert answered(asked, Towards("P2"))[0] == "P2"
    assert asked.path == [*tokenise("P2"), END]
    named = choosing(Field("type", ("bug", "chore")))
    assert [node.token for node in named.nodes] == tokenise("bug" + "chore")
    assert answered(named, Towards('{"type": "chore"}'))[0] == '{"type": "chore"}'
    assert named.path == tokenise('{"type": "chore"}')


def test_an_option_that_shares_a_token_with_its_end_is_read_to_that() -> None:
    def merging(text: str) -> list[int]:
        return [ord(char) for char in text.replace('x"', "\N{DELETE}")]

    asked = Choosing((Field("a", ("x", "y")),), merging, END, 16)
    assert [node.token for node in asked.nodes] == [0x7F, *tokenise('}y"}')]


def test_a_single_option_needs_no_pass() -> None:
    assert choosing(Field("a", ("x",)), Field("b", ("y",))).text == '{"a": "x", "b": "y"}'
    asked = choosing(Field("a", ("x",)), Field("b", ("y", "z")))
    assert answered(asked, Towards('{"a": "x", "b": "z"}')) == ('{"a": "x", "b": "z"}', 1)
    assert asked.probabilities[0] == (1.0,)


def test_more_options_than_forks_take_more_passes_and_end_the_same() -> None:
    options = tuple(f"option {number}" for number in range(10))
    wide, narrow = choosing(Field("", options)), choosing(Field("", options), forks=3)
    assert answered(wide, Towards("option 7")) == ("option 7", 1)
    assert answered(narrow, Towards("option 7")) == ("option 7", 4)
    assert narrow.probabilities[0] == pytest.approx(wide.probabilities[0])


def test_a_pass_holds_no_more_tokens_than_a_batch_has_room_for() -> None:
    asked = choosing(Field("", tuple(chr(97 + number) * 128 for number in range(8))))
    while not asked.done:
        assert 0 < len(asked.nodes) <= TREE_TOKENS_MAX
        asked.scored(Towards("c" * 128)(asked))
    assert asked.text == "c" * 128


def test_the_longest_answer_is_not_underestimated() -> None:
    asked = choosing(Field("type", ("bug", "feature")), Field("priority", ("P0", "P1")))
    assert asked.longest >= len('{"type": "feature", "priority": "P1"}')
    assert choosing(Field("", ("a", "bcd"))).longest == 4


def test_a_tree_folds_common_beginnings() -> None:
    assert tree([[1, 2, 3], [1, 2, 4], [5]]) == [
        Node(1, 0, (0, 1), -1), Node(2, 1, (0, 1), 0), Node(3, 2, (0,), 1), Node(4, 2, (1,), 1), Node(5, 0, (2,), -1),
    ]  # fmt: skip
    assert tree([]) == []
    assert (shared([[1, 2, 3], [1, 2, 4]]), shared([[1], [1, 2]]), shared([[7, 8]])) == (2, 1, 2)
