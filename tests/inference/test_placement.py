from __future__ import annotations

import struct
from dataclasses import replace
from typing import Any

import msgspec

from piclusterd.errors import NotFound, Unavailable
from piclusterd.events import Choice, WhoServes
from piclusterd.ids import NodeId
from piclusterd.inference.placement import UNSEEN_S, Placement
from piclusterd.inference.routing import Load, predict
from piclusterd.inference.shipping import fetching
from piclusterd.wire import Facts, Mark, Member, ModelFacts

PI_1, PI_2, PI_3 = (NodeId(digit * 16) for digit in "123")
NAMES = {PI_1: "pi-1", PI_2: "pi-2", PI_3: "pi-3"}


def serving(**rates: Any) -> ModelFacts:
    return ModelFacts("qwen", **{"prefill_tps": 100.0, "decode_tps": 10.0} | rates)


def member(
    node: NodeId, *models: ModelFacts, state: str = "alive", version: int = 1, flags: tuple[str, ...] = ()
) -> Member:
    return Member(node, 0, state, Facts(version=version, name=NAMES[node], models=models, flags=flags))


def chosen(placement: Placement, model: str = "qwen", exclude: tuple[NodeId, ...] = (), now: float = 0.0) -> Choice:
    choice = placement.choose(WhoServes(0, model, "generate", 100, exclude), now)
    assert isinstance(choice, Choice), choice
    return choice


def placed(*members: Member, links: tuple[NodeId, ...] = (PI_2, PI_3)) -> Placement:
    placement = Placement(PI_1)
    placement.members_changed(members, links)
    return placement


def test_among_equals_this_node_answers_itself() -> None:
    assert chosen(placed(member(PI_2, serving()), member(PI_1, serving()))).node == PI_1


def test_a_faster_node_is_preferred_and_the_reason_says_why() -> None:
    choice = chosen(placed(member(PI_1, serving()), member(PI_2, serving(decode_tps=34.0))))
    assert (choice.node, choice.name, choice.model) == (PI_2, "pi-2", "qwen")
    assert choice.reason == "pi-2: 0 running, 0 queued, 34 tok/s, predicted 4.8 s"


def test_work_that_nobody_waits_for_goes_to_the_droplet_however_busy_and_elsewhere_without_it() -> None:
    droplet = Member(PI_2, 0, "alive", Facts(name="droplet", role="relay", models=(serving(queued=9),)))
    placement = placed(member(PI_1, serving()), droplet)
    asked = WhoServes(0, "qwen", prefer="relay")
    choices = [placement.choose(replace(asked, exclude=exclude), 0.0) for exclude in ((), (PI_2,))]
    assert [choice.node for choice in choices if isinstance(choice, Choice)] == [PI_2, PI_1]
    assert chosen(placement).node == PI_1


def test_a_queue_sends_requests_elsewhere() -> None:
    assert chosen(placed(member(PI_1, serving(queued=1)), member(PI_2, serving()))).node == PI_2


def test_a_long_prompt_goes_where_it_fits_and_is_refused_only_where_it_fits_nowhere() -> None:
    near, far = member(PI_1, serving(context=512)), member(PI_2, serving(context=4096, queued=3))
    asked = WhoServes(0, "qwen", prompt_tokens=1000)
    for members, node in (((near, far), PI_2), ((near,), PI_1), ((near, member(PI_2, serving(queued=3))), PI_2)):
        choice = placed(*members).choose(asked, 0.0)
        assert isinstance(choice, Choice)
        assert choice.node == node
    assert chosen(placed(near, far)).node == PI_1


def test_a_throttled_board_is_avoided_while_another_is_as_fast() -> None:
    hot = member(PI_1, serving(), flags=("throttled",))
    assert chosen(placed(hot, member(PI_2, serving()))).node == PI_2
    assert chosen(placed(hot, member(PI_2, serving(decode_tps=4.0)))).node == PI_1


def test_an_excluded_or_dead_node_is_not_chosen() -> None:
    placement = placed(member(PI_1, serving()), member(PI_2, serving()), member(PI_3, serving(), state="failed"))
    assert chosen(placement, exclude=(PI_1,)).node == PI_2
    fault = placement.choose(WhoServes(0, "qwen", "generate", 0, (PI_1, PI_2)), 0.0)
    assert type(fault) is Unavailable
    assert "pi-1: failed this request, pi-2: failed this request, pi-3: failed." in str(fault)


def test_an_unknown_model_names_those_there_are() -> None:
    fault = placed(member(PI_1, serving()), member(PI_2, ModelFacts("llama"))).choose(WhoServes(0, "gpt-5"), 0.0)
    assert isinstance(fault, NotFound)
    assert "llama, qwen" in str(fault)
    assert fault.param == "model"


def test_no_name_means_the_only_model_and_is_refused_among_several() -> None:
    one = placed(member(PI_2, serving()))
    assert chosen(one, "").model == chosen(one, "default").model == "qwen"
    assert isinstance(placed(member(PI_2, serving(), ModelFacts("llama"))).choose(WhoServes(0, ""), 0.0), NotFound)
    assert isinstance(Placement(PI_1).choose(WhoServes(0, ""), 0.0), NotFound)


def test_who_is_alive_and_not_linked_gets_no_request() -> None:
    fast, slow = member(PI_2, serving(decode_tps=99.0)), member(PI_3, serving(decode_tps=1.0))
    assert chosen(placed(fast, slow)).node == PI_2
    assert chosen(placed(fast, slow, links=(PI_3,))).node == PI_3
    nobody = placed(fast, slow, links=()).choose(WhoServes(0, "qwen", "generate", 10, (PI_3,)), 0.0)
    assert isinstance(nobody, Unavailable)
    assert "pi-2: no link from here, pi-3: failed this request" in str(nobody)
    assert chosen(placed(member(PI_1, serving()), links=())).node == PI_1, "this node needs no link to itself"


def test_embeddings_go_only_to_models_that_give_them() -> None:
    placement = placed(member(PI_1, serving()), member(PI_2, serving(embeddings=True, decode_tps=1.0)))
    choice = placement.choose(WhoServes(0, "qwen", "embed", 10, ()), 0.0)
    assert isinstance(choice, Choice)
    assert choice.node == PI_2


def test_a_burst_is_spread_before_gossip_tells_of_it() -> None:
    placement = placed(member(PI_1, serving()), member(PI_2, serving()))
    assert [chosen(placement).node for _ in range(4)] == [PI_1, PI_2, PI_1, PI_2]


def test_what_was_sent_is_forgotten_with_newer_facts_or_time() -> None:
    placement = placed(member(PI_1, serving()), member(PI_2, serving()))
    chosen(placement)
    placement.members_changed([member(PI_1, serving(), version=2), member(PI_2, serving())], (PI_2,))
    assert chosen(placement).node == PI_1
    assert chosen(placement, now=UNSEEN_S + 1).node == PI_1


def test_the_models_of_alive_nodes_are_listed_with_their_nodes() -> None:
    gone = member(PI_3, ModelFacts("x"), state="left")
    placement = placed(member(PI_1, serving()), member(PI_2, serving(), ModelFacts("llama")), gone)
    assert placement.models() == {"llama": (PI_2,), "qwen": (PI_1, PI_2)}


def seconds(model: ModelFacts, prompt: int = 100, local: bool = True, unseen: int = 0) -> float:
    return predict(model, Facts(), prompt, local, Load.of(model, unseen))


def test_a_longer_prompt_a_slower_board_and_a_hop_all_take_longer() -> None:
    base = seconds(serving())
    assert seconds(serving(), 1000) > base
    assert seconds(serving(prefill_tps=10.0)) > base
    assert base < seconds(serving(busy=1)) < seconds(serving(busy=4, queued=1))
    assert base < seconds(serving(), local=False) < base * 1.01
    assert seconds(ModelFacts("new")) > 0
    assert seconds(serving(load_s=9.0)) == base + 9.0


def test_who_waits_longer_for_a_place_is_done_later() -> None:
    one, four = serving(slots=1, turn_s=7.0), serving(slots=4, turn_s=7.0)
    assert seconds(replace_facts(one, busy=1)) == seconds(one) + 7.0
    assert seconds(replace_facts(one, busy=1, queued=2)) == seconds(one) + 21.0
    assert seconds(one, unseen=2) == seconds(one) + 14.0
    assert seconds(replace_facts(four, busy=4)) == seconds(replace_facts(four, busy=3)) + 7.0 / 4


def replace_facts(facts: ModelFacts, **changes: Any) -> ModelFacts:
    return msgspec.structs.replace(facts, **changes)


PROMPT = tuple(Mark(number, 400 * number) for number in range(1, 11))
"""A prompt of 4000 bytes: ten seconds of reading."""
READ = struct.pack("<I", PROMPT[-2].digest)
LONG = WhoServes(0, "qwen", "generate", 1000, marks=PROMPT)


def answered_by(placement: Placement, asked: WhoServes = LONG, now: float = 0.0) -> Choice:
    choice = placement.choose(asked, now)
    assert isinstance(choice, Choice)
    return choice


def test_a_node_that_has_read_the_beginning_is_preferred_and_says_so() -> None:
    placement = placed(member(PI_1, serving(slots=4)), member(PI_2, serving(slots=4, prefixes=READ)))
    choice = answered_by(placement)
    assert choice.node == PI_2
    assert "knows 3600 bytes of it" in choice.reason
    assert choice.predicted_s < seconds(serving(slots=4), 1000) - 8


def test_a_short_beginning_is_not_worth_a_queue() -> None:
    first = struct.pack("<I", PROMPT[0].digest)
    busy = serving(slots=1, busy=1, turn_s=9.0, prefixes=first)
    assert answered_by(placed(member(PI_1, serving(slots=1)), member(PI_2, busy))).node == PI_1


def test_a_beginning_that_everybody_shares_gets_a_second_home() -> None:
    hot = serving(slots=4, busy=4, queued=2, turn_s=0.5, prefixes=READ)
    assert answered_by(placed(member(PI_1, serving(slots=4)), member(PI_2, hot))).node == PI_1
    both_busy = serving(slots=4, busy=4, queued=1, turn_s=0.5)
    assert answered_by(placed(member(PI_1, both_busy), member(PI_2, hot))).node == PI_2


def test_what_was_sent_just_now_is_being_read_there() -> None:
    placement = placed(member(PI_1, serving(slots=4)), member(PI_2, serving(slots=4)))
    first, second = answered_by(placement), answered_by(placement)
    assert (first.node, second.node) == (PI_1, PI_1)
    assert "knows" not in first.reason
    assert "knows 4000 bytes" in second.reason
    other = replace(LONG, marks=tuple(Mark(number + 100, 400 * number) for number in range(1, 11)))
    assert answered_by(placement, other).node == PI_2


def test_a_model_is_asked_only_for_what_it_says_it_can_do() -> None:
    placement = placed(member(PI_1, serving(tasks=("classify",))))
    assert isinstance(placement.choose(WhoServes(0, "qwen", "classify", 10, ()), 0.0), Choice)
    refused = placement.choose(WhoServes(0, "qwen", "generate", 10, ()), 0.0)
    assert isinstance(refused, NotFound)
    assert "It can classify." in str(refused)
    newer = placed(member(PI_1, serving(tasks=("sing",)))).choose(WhoServes(0, "qwen", "embed", 10, ()), 0.0)
    assert "nothing that this release knows" in str(newer)


def test_a_model_on_a_disk_is_loaded_only_where_the_queue_is_longer_than_the_load() -> None:
    on_disk = ModelFacts("qwen", load_s=20.0)
    assert chosen(placed(member(PI_1, on_disk), member(PI_2, serving()))).node == PI_2
    assert chosen(placed(member(PI_1, on_disk), member(PI_2, serving(queued=9)))).node == PI_1
    assert chosen(placed(member(PI_1, on_disk), member(PI_2, ModelFacts("qwen", load_s=5.0)))).node == PI_2


def test_no_preference_means_what_is_in_memory_and_else_the_only_one_there_is() -> None:
    small = ModelFacts("small", load_s=3.0)
    assert chosen(placed(member(PI_1, small), member(PI_2, serving())), model="").model == "qwen"
    assert chosen(placed(member(PI_1, small)), model="default").model == "small"
    placement = placed(member(PI_1, small, ModelFacts("other", load_s=1.0)))
    assert isinstance(placement.choose(WhoServes(0, "", "generate", 1, ()), 0.0), NotFound)


def test_who_has_not_measured_yet_is_taken_for_as_fast_as_others() -> None:
    new = serving(prefill_tps=0.0, decode_tps=0.0)
    assert chosen(placed(member(PI_1, new), member(PI_2, serving()))).node == PI_1


def test_a_long_prompt_that_nobody_knows_goes_where_least_is_forgotten_for_it() -> None:
    full = serving(slots=4, prefixes=bytes(range(200)))
    assert answered_by(placed(member(PI_1, full), member(PI_2, serving(slots=4)))).node == PI_2
    assert chosen(placed(member(PI_1, full), member(PI_2, serving(slots=4)))).node == PI_1, "a short one stays"


def test_what_is_asked_for_at_most_is_what_an_answer_takes_at_most() -> None:
    model = serving()
    few, many = (predict(model, Facts(), 100, True, Load.of(model, 0), tokens) for tokens in (10, 10_000))
    assert few == 2.0
    assert many == seconds(model)


SHIPS = {"token_bytes": 2048, "states_max": 2**27, "slots": 1}
"""The whole prompt's state has 2 MB: fetched in half a second."""
BUSY = serving(busy=1, turn_s=9.0, prefixes=READ, **SHIPS)
"""Its one place is taken, and what it remembers does not count."""


def test_a_node_that_would_fetch_what_another_has_read_is_not_taken_for_one_that_reads_it() -> None:
    reads = member(PI_1, serving(prefill_tps=130.0, slots=1))
    choice = answered_by(placed(reads, member(PI_2, serving(**SHIPS)), member(PI_3, BUSY)))
    assert choice.node == PI_2
    assert "fetches 900 tokens of it in " in choice.reason
    assert choice.predicted_s == seconds(serving(slots=1), 100, local=False) + fetching(900 * 2048, 0.0, 1)
    assert answered_by(placed(reads, member(PI_2, serving(slots=1)), member(PI_3, BUSY))).node == PI_1


def test_of_a_beginning_what_is_not_here_is_fetched_and_predicted_so() -> None:
    some = serving(prefixes=struct.pack("<I", PROMPT[4].digest), **SHIPS)
    choice = answered_by(placed(member(PI_1, some), member(PI_3, BUSY)))
    assert "knows 2000 bytes of it, fetches 900 tokens" in choice.reason


def test_a_fetch_is_predicted_only_where_it_will_be_made() -> None:
    small = serving(**{**SHIPS, "states_max": 1000})
    slow = serving(states_bps=1e5, **SHIPS)
    keeps = replace_facts(BUSY, token_bytes=0)
    for here, there in ((serving(slots=1), BUSY), (small, BUSY), (slow, BUSY), (serving(**SHIPS), keeps)):
        assert "fetches" not in answered_by(placed(member(PI_1, here), member(PI_3, there))).reason
    unlinked = placed(member(PI_1, serving(**SHIPS)), member(PI_3, BUSY), links=())
    assert "fetches" not in answered_by(unlinked).reason


def test_who_has_far_more_to_do_than_others_is_not_chosen_for_what_it_could_fetch() -> None:
    idle, elsewhere = serving(slots=1, prefill_tps=50.0), replace_facts(BUSY, turn_s=90.0)
    could = serving(busy=1, turn_s=12.0, **SHIPS)
    assert answered_by(placed(*(member(*one) for one in ((PI_1, idle), (PI_2, could), (PI_3, elsewhere))))).node == PI_1
