from __future__ import annotations

from collections import Counter

from piclusterd.inference.budget import HEADROOM_MIN, HEADROOM_PART
from piclusterd.inference.catalogue import GB, catalogue, named, proposed
from piclusterd.inference.store import NAME
from piclusterd.integrations.model_hub import Reference, looks_like_reference, parse


def test_names_are_told_apart_from_references_and_from_each_other() -> None:
    names = [one.name for one in catalogue()]
    assert Counter(names).most_common(1)[0][1] == 1
    assert all(NAME.fullmatch(name) and not looks_like_reference(name) for name in names)
    assert named(names[0]) == catalogue()[0]
    assert named("gpt-9") is None


def test_each_entry_is_a_reference_to_a_gguf_that_fits_the_board_it_is_meant_for() -> None:
    for one in catalogue():
        assert parse(f"hf:{one.repo}/{one.file}") == Reference(one.repo, "", one.file) == one.reference
        assert one.file.endswith(".gguf")
        assert one.quant.lower() in one.file.lower()
        room = one.ram_gb * GB - max(HEADROOM_MIN, int(one.ram_gb * GB * HEADROOM_PART))
        assert one.bytes < 0.75 * room, one.name
        assert 0.4 < one.bytes / (one.params_b * 1e9) < 1.2, one.name


def test_a_board_is_proposed_the_largest_it_runs_and_an_encoder_last() -> None:
    assert [one.name for one in proposed(0)] == []
    for ram_gb, best in ((0.95, "smollm2:360m"), (3.8, "llama3.2:3b"), (7.8, "qwen3:4b"), (15.6, "qwen3:8b")):
        found = proposed(int(ram_gb * GB))
        assert (found[0].name, found[-1].does) == (best, "embed")
