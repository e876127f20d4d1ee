from __future__ import annotations

import struct

import msgspec

from piclusterd.inference.prefix import DIGESTS_MAX, Cached, held, marks
from piclusterd.inference.protocol import ChatMessage, GenerateRequest

SYSTEM = ChatMessage("system", "You triage issues. " * 60)


def chat(*said: str) -> GenerateRequest:
    roles = ("user", "assistant")
    turns = [ChatMessage(roles[number % 2], text) for number, text in enumerate(said)]  # type: ignore[arg-type]
    return GenerateRequest(messages=(SYSTEM, *turns))


def known(*read: GenerateRequest, prompts: int = 8, length: int = 10**6) -> bytes:
    cached = Cached(prompts, length)
    for request in read:
        cached.add(marks(request))
    return cached.digests()


def test_a_shared_system_prompt_is_known_to_its_last_byte() -> None:
    shared = len("system\0") + len(SYSTEM.content) + 1
    assert held(known(chat("a crash")), marks(chat("something else"))) == shared


def test_a_conversation_is_known_up_to_where_it_was() -> None:
    before, after = chat("one", "two", "three"), chat("one", "two", "three", "four", "five")
    assert held(known(before), marks(after)) == marks(before)[-1].length
    assert held(known(before), marks(before)) == marks(before)[-1].length


def test_a_long_text_is_known_by_most_of_what_it_shares() -> None:
    shared = "lorem ipsum " * 1000
    first, second = GenerateRequest(prompt=shared + "a" * 400), GenerateRequest(prompt=shared + "b" * 400)
    assert 0.8 * len(shared) <= held(known(first), marks(second)) <= len(shared)


def test_other_beginnings_other_tools_and_nothing_share_nothing() -> None:
    request = chat("a crash")
    assert held(known(request), marks(GenerateRequest(prompt="x" * 2000))) == 0
    assert held(known(request), marks(msgspec.structs.replace(request, tools="[{}]"))) == 0
    assert held(b"", marks(request)) == 0
    assert held(known(request), ()) == 0
    assert known(GenerateRequest()) == b""
    assert held(b"odd", marks(request)) == 0, "what a peer says may be cut short"


def test_the_longest_prompt_has_few_marks() -> None:
    assert len(marks(GenerateRequest(prompt="x" * 1024 * 1024))) < 50
    assert len(marks(GenerateRequest(messages=(ChatMessage("user", "x"),) * 1000))) < 50


def test_only_the_newest_prompts_are_told_and_few_digests() -> None:
    first, *others = (chat(f"number {number} " * 400) for number in range(9))
    assert held(known(first, *others, prompts=8), marks(first)) < marks(first)[-1].length
    assert held(known(first, *others, prompts=9), marks(first)) == marks(first)[-1].length
    assert held(known(first, others[0], length=marks(first)[-1].length), marks(first)) < marks(first)[-1].length
    many = [GenerateRequest(prompt=f"{number} " * 4000) for number in range(8)]
    assert len(known(*many)) == 4 * DIGESTS_MAX
    assert held(known(*many), marks(many[-1])) == marks(many[-1])[-1].length


def test_a_prompt_that_is_much_like_another_takes_its_place_as_it_does_in_the_child() -> None:
    cached = Cached(2, 10**6)
    for request in (GenerateRequest(prompt="other " * 400), *(chat(f"a crash, number {n}") for n in range(5))):
        cached.add(marks(request))
    assert held(cached.digests(), marks(GenerateRequest(prompt="other " * 400))) == 2400


def test_a_prompt_that_goes_on_takes_the_place_of_the_shorter_one() -> None:
    cached = Cached(2, 10**6)
    other = GenerateRequest(prompt="other " * 400)
    for request in (other, chat("one"), chat("one", "two"), chat("one", "two", "three")):
        cached.add(marks(request))
    assert held(cached.digests(), marks(other)) == marks(other)[-1].length
    cached.clear()
    assert cached.digests() == b""


def test_digests_are_told_once() -> None:
    told = known(chat("one"), chat("two"))
    numbers = [number for (number,) in struct.iter_unpack("<I", told)]
    assert len(numbers) == len(set(numbers))
