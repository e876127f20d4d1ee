from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from piclusterd.inference.detokenise import TextStream


def test_a_character_cut_by_a_token_waits_for_its_rest() -> None:
    stream = TextStream()
    euro = "€".encode()
    assert stream.push(b"5 " + euro[:1]) == "5 "
    assert stream.push(euro[1:2]) == ""
    assert stream.push(euro[2:]) == "€"


def test_a_character_that_never_ends_becomes_a_replacement() -> None:
    stream = TextStream()
    assert stream.push("€".encode()[:2]) == ""
    assert stream.finish() == "\N{REPLACEMENT CHARACTER}"


def test_a_stop_string_over_several_tokens_is_never_shown() -> None:
    stream = TextStream(("END.",))
    assert [stream.push(piece) for piece in (b"so E", b"ND", b". more")] == ["so ", "", ""]
    assert stream.stopped
    assert stream.push(b"more") == stream.finish() == ""


def test_what_only_looked_like_a_stop_is_shown() -> None:
    stream = TextStream(("END.",))
    assert stream.push(b"E") == ""
    assert stream.push(b"Nter") == "ENter"
    assert stream.push(b"EN") == ""
    assert stream.finish() == "EN"


def test_the_earliest_of_several_stops_cuts() -> None:
    stream = TextStream(("two", "one"))
    assert stream.push(b"a one two") == "a "


@given(st.text(), st.lists(st.integers(1, 4)), st.sampled_from(["", "ab", "é€", "aaab"]))
def test_however_the_bytes_are_cut_the_text_is_the_same(text: str, cuts: list[int], stop: str) -> None:
    stream = TextStream((stop,) if stop else ())
    data, shown = text.encode("utf-8", "replace"), ""
    for cut in cuts:
        shown += stream.push(data[:cut])
        data = data[cut:]
    shown += stream.push(data) + stream.finish()
    whole = text.encode("utf-8", "replace").decode()
    assert shown == (whole.split(stop)[0] if stop else whole)
