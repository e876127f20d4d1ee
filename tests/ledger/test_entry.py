"""What one ledger entry is: made, chained, signed, and refused."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgpack
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from piclusterd.errors import UserError
from piclusterd.events import Record
from piclusterd.ids import NodeId
from piclusterd.ledger import entry as e
from piclusterd.wire import BATCH_BYTES_MAX, BATCH_ENTRIES_MAX, PAYLOAD_BYTES_MAX, Dropped, Entry, Head

from .keys import Key, verify

KEY = Key()


def log_of(*bodies: Mapping[str, Any], key: Key = KEY) -> list[Entry]:
    """A whole log: opened and signed, then one group of `bodies`."""
    first = e.chain(key.log(), e.EMPTY, [e.draft_open(key, "pi")], key, 0, 1000)
    tip = e.Tip(key.public_key, 1, e.entry_hash(first[0].header))
    drafts = [e.draft(Record("note", body, term=3)) for body in bodies]
    return [*first, *e.chain(key.log(), tip, drafts, key, 0, 1000)]


def header_of(entry: Entry) -> e.Header:
    header = e.decode_header(entry.header)
    assert isinstance(header, e.Header)
    return header


def follow(entries: list[Entry]) -> e.Tip | Dropped:
    tip = e.EMPTY
    for item in entries:
        link = e.extend(tip, header_of(item), item, verify)
        if isinstance(link, Dropped):
            return link
        tip = link.tip
    return tip


def refusal(entries: list[Entry]) -> str:
    outcome = follow(entries)
    assert isinstance(outcome, Dropped)
    return outcome.reason


def test_a_log_reads_back_as_it_was_written() -> None:
    entries = log_of({"a": 1}, {"b": b"\x00\xff", "c": [1, "x", None]})
    tip = follow(entries)
    assert isinstance(tip, e.Tip)
    assert (tip.seq, tip.key) == (3, KEY.public_key)
    fact = e.decode_fact(entries[2])
    assert not isinstance(fact, Dropped)
    assert (fact.log, fact.seq, fact.kind, fact.term) == (KEY.log(), 3, "note", 3)
    assert fact.body == {"b": b"\x00\xff", "c": [1, "x", None]}


def test_only_the_last_of_a_group_is_signed() -> None:
    assert [bool(item.signature) for item in log_of({}, {}, {})] == [True, False, False, True]


def test_a_group_closes_where_a_wire_batch_is_full() -> None:
    half = {"x": bytes(BATCH_BYTES_MAX // 2)}
    assert [bool(item.signature) for item in log_of(half, half, half)[1:]] == [True, True, True]
    many = log_of(*[{}] * (BATCH_ENTRIES_MAX + 1))[1:]
    assert [index for index, item in enumerate(many) if item.signature] == [BATCH_ENTRIES_MAX - 1, BATCH_ENTRIES_MAX]


def test_a_tampered_payload_is_refused() -> None:
    entries = log_of({"a": 1})
    entries[1] = Entry(entries[1].header, e.draft(Record("note", {"a": 2})).payload, entries[1].signature)
    assert refusal(entries).startswith("payload")


def test_a_tampered_header_is_refused() -> None:
    entries = log_of({"a": 1})
    later = header_of(entries[1])._replace(term=99)
    entries[1] = Entry(msgpack.packb(later), entries[1].payload, entries[1].signature)
    assert refusal(entries).startswith("forged")


def test_the_same_header_in_another_encoding_is_another_entry() -> None:
    entries = log_of({"a": 1})
    fields = list(header_of(entries[1]))
    packer = msgpack.Packer()
    longer = packer.pack_array_header(len(fields)) + b"\xcc\x01" + b"".join(packer.pack(field) for field in fields[1:])
    assert e.decode_header(longer) == header_of(entries[1])
    assert refusal([entries[0], Entry(longer, entries[1].payload, entries[1].signature)]).startswith("forged")


def test_a_missing_entry_is_a_gap() -> None:
    entries = log_of({}, {})
    assert refusal([entries[0], entries[2]]).startswith("gap")


def test_an_entry_of_another_branch_breaks_the_chain() -> None:
    assert refusal([*log_of({"a": 1}, {})[:2], log_of({"a": 2}, {})[2]]).startswith("broken chain")


def test_a_log_opened_with_another_key_than_its_origin_is_forged() -> None:
    other = Key(2)
    (opening,) = e.chain(KEY.log(), e.EMPTY, [e.draft_open(other, "evil")], other, 0, 1000)
    assert refusal([opening]).startswith("forged")


def test_a_signature_by_another_key_is_forged() -> None:
    entries = log_of({})
    hashed = e.entry_hash(entries[1].header)
    entries[1] = Entry(entries[1].header, entries[1].payload, Key(2).sign(e.HEAD_PREFIX + hashed))
    assert refusal(entries).startswith("forged")


def test_a_signature_of_the_bare_hash_is_forged() -> None:
    entries = log_of({})
    entries[1] = Entry(entries[1].header, entries[1].payload, KEY.sign(e.entry_hash(entries[1].header)))
    assert refusal(entries).startswith("forged")


@pytest.mark.parametrize(
    "change",
    [
        {"version": 2}, {"version": True}, {"origin": "nobody"}, {"origin": "G" * 16}, {"epoch": -1}, {"epoch": 2**63},
        {"seq": 0}, {"seq": 1}, {"seq": e.SEQ_MAX + 1}, {"seq": 2.0}, {"prev": b""}, {"prev": e.ZERO_HASH},
        {"kind": ""}, {"kind": "k" * 65}, {"kind": "a\nb"}, {"kind": b"note"}, {"kind": e.OPEN}, {"term": -1},
        {"term": None}, {"hlc": 2**63}, {"payload_hash": bytes(31)}, {"size": 0}, {"size": PAYLOAD_BYTES_MAX + 1},
    ],
)  # fmt: skip
def test_a_header_out_of_range_is_junk(change: dict[str, Any]) -> None:
    header = header_of(log_of({})[1])._replace(**change)
    outcome = e.decode_header(msgpack.packb(header))
    assert isinstance(outcome, Dropped)
    assert outcome.reason.startswith("junk")


def test_what_is_longer_than_any_header_is_junk() -> None:
    outcome = e.decode_header(bytes(e.HEADER_BYTES_MAX + 1))
    assert isinstance(outcome, Dropped)
    assert outcome.reason.startswith("junk")


def test_the_largest_header_fits_its_cap() -> None:
    header = e.Header(
        e.VERSION, NodeId("f" * 16), e.INT_MAX, e.SEQ_MAX, b"\1" * 32, "k" * e.KIND_CHARS_MAX, e.INT_MAX, e.INT_MAX,
        bytes(32), PAYLOAD_BYTES_MAX,
    )  # fmt: skip
    assert e.decode_header(msgpack.packb(header)) == header


@settings(deadline=None)
@given(st.binary(max_size=300))
def test_junk_bytes_never_raise(data: bytes) -> None:
    assert isinstance(e.decode_header(data), Dropped)
    assert isinstance(e.decode_body(data), dict | Dropped)
    assert isinstance(e.decode_fact(Entry(data, data)), Dropped)


@settings(deadline=None)
@given(st.integers(0, 250), st.integers(0, 255))
def test_a_header_with_one_byte_changed_is_never_accepted(place: int, value: int) -> None:
    entries = log_of({"a": 1})
    data = bytearray(entries[1].header)
    data[place % len(data)] = value
    header = e.decode_header(bytes(data))
    if bytes(data) == entries[1].header or isinstance(header, Dropped):
        return
    tip = e.Tip(KEY.public_key, 1, e.entry_hash(entries[0].header))
    link = e.extend(tip, header, Entry(bytes(data), entries[1].payload, entries[1].signature), verify)
    assert isinstance(link, Dropped)


@pytest.mark.parametrize(
    "record",
    [
        Record(e.OPEN, {}),
        Record("", {}),
        Record("note", {}, term=-1),
        Record("note", {"x": object()}),
        Record("note", {"x": 2**64}),
        Record("note", {"x": "\ud800"}),
        Record("note", {"x": bytes(PAYLOAD_BYTES_MAX)}),
        Record("note", {"x": {1: 2}}),
        Record("note", {"x": list(range(5000))}),
    ],
    ids=lambda record: f"{record.kind}:{str(record.body)[:20]}",
)
def test_a_record_another_node_would_refuse_is_refused_here(record: Record) -> None:
    with pytest.raises(UserError):
        e.draft(record)


def test_the_hybrid_clock_never_goes_back_and_follows_the_wall() -> None:
    assert e.next_hlc(0, 5) == 5 << 16
    assert e.next_hlc(5 << 16, 5) == (5 << 16) + 1
    assert e.next_hlc(5 << 16, 3) == (5 << 16) + 1, "a clock that went back is not refused"
    assert e.next_hlc(e.INT_MAX, 5) == e.INT_MAX


@settings(deadline=None)
@given(st.lists(st.integers(0, 2**50), max_size=20))
def test_the_hybrid_clock_is_monotone_and_legal_under_any_wall_clock(walls: list[int]) -> None:
    last = 0
    for wall in walls:
        following = e.next_hlc(last, wall)
        assert last < following <= e.INT_MAX or following == e.INT_MAX
        last = following


def test_the_digest_depends_on_the_heads_and_not_on_their_order() -> None:
    one, two = Head(NodeId("a" * 16), 1, 5), Head(NodeId("b" * 16), 1, 5)
    assert e.digest([one, two]) == e.digest([two, one])
    assert e.digest([one, two]) != e.digest([one, two._replace(seq=6)])
    assert len(e.digest([])) == 8


def test_a_chain_whose_bodies_were_pruned_still_verifies_and_shows_tampering() -> None:
    entries = [Entry(entry.header, b"", entry.signature) for entry in log_of({"n": 1}, {"n": 2})]

    def follow_pruned(pruned: list[Entry]) -> e.Tip | Dropped:
        tip: e.Tip | Dropped = e.Tip(KEY.public_key, 0, e.ZERO_HASH)
        for item in pruned:
            assert isinstance(tip, e.Tip)
            tip = e.extend_pruned(tip, header_of(item), item, verify)
            if isinstance(tip, Dropped):
                break
        return tip

    end = follow_pruned(entries)
    assert isinstance(end, e.Tip)
    assert end.seq == 3
    gap = follow_pruned([entries[0], entries[2]])
    assert isinstance(gap, Dropped)
    assert gap.reason.startswith("broken chain")
    forged = follow_pruned([*entries[:2], Entry(entries[2].header, b"", entries[0].signature)])
    assert isinstance(forged, Dropped)
    assert forged.reason.startswith("forged")


def test_a_payload_that_is_no_mapping_is_refused_though_its_hash_fits() -> None:
    item = e.Draft("note", 1, msgpack.packb([1]), {})
    tip = follow(log_of())
    assert isinstance(tip, e.Tip)
    (bad,) = e.chain(KEY.log(), tip, [item], KEY, 0, 1000)
    assert "not a mapping" in refusal([*log_of(), bad])


def test_no_drafts_make_no_entries() -> None:
    assert e.chain(KEY.log(), e.EMPTY, [], KEY, 0, 1000) == ()


@pytest.mark.parametrize("body", [{"key": 7, "name": "pi"}, {"key": b"short", "name": "pi"}, {"key": KEY.public_key}])
def test_an_opening_without_a_key_and_a_name_is_forged(body: dict[str, Any]) -> None:
    (first,) = e.chain(KEY.log(), e.EMPTY, [e.Draft(e.OPEN, 0, msgpack.packb(body), body)], KEY, 0, 1000)
    assert "does not hold the key" in refusal([first])
