import asyncio

from piclusterd.cluster import frames
from piclusterd.cluster.frames import Frame, Kind
from piclusterd.cluster.outbox import SLOW_FRAMES_MAX, URGENT_BYTES_MAX, URGENT_FRAMES_MAX, Lane, Outbox, lane_of
from piclusterd.wire import Batch, Nack, Push

PING = Frame(0, Kind.PING, b"12345678")
DATA = Frame(1, Kind.DATA, b"data")


def outbox() -> tuple[Outbox, list[str]]:
    overflows: list[str] = []
    return Outbox(lambda: overflows.append("over")), overflows


async def test_urgent_frames_overtake_bulk() -> None:
    box, _ = outbox()
    await box.put(DATA)
    await box.put(DATA)
    box.urge(PING)
    out = [frames.decode(await box.next()) for _ in range(3)]
    assert out == [PING, DATA, DATA]


async def test_urgent_lanes_go_in_their_order() -> None:
    box, _ = outbox()
    frames_in = {lane: Frame(0, Kind.CONTROL, bytes([lane])) for lane in (Lane.SYNC, Lane.REPLICATE, Lane.CONTROL)}
    for lane, frame in frames_in.items():
        box.urge(frame, lane)
    out = [frames.decode(await box.next()) for _ in frames_in]
    assert out == [frames_in[Lane.CONTROL], frames_in[Lane.REPLICATE], frames_in[Lane.SYNC]]


async def test_pipes_of_relayed_links_and_bulk_take_turns() -> None:
    box, _ = outbox()
    pipe = Frame(3, Kind.DATA, b"pipe")
    for _ in range(3):
        await box.put(DATA)
    for _ in range(2):
        await box.put(pipe, Lane.RELAYED)
    assert [frames.decode(await box.next()) for _ in range(5)] == [pipe, DATA, pipe, DATA, DATA]


def test_history_waits_for_what_is_happening() -> None:
    assert lane_of(Nack(1)) < lane_of(Push(1, ())) < lane_of(Batch(()))


async def test_bulk_waits_for_room_and_goes_on_in_order() -> None:
    box, _ = outbox()
    sent = [Frame(1, Kind.DATA, bytes([n])) for n in range(3 * SLOW_FRAMES_MAX)]

    async def make() -> None:
        for frame in sent:
            await box.put(frame)

    maker = asyncio.create_task(make())
    async with asyncio.timeout(10):
        out = [frames.decode(await box.next()) for _ in sent]
        await maker
    assert out == sent


async def test_a_full_bulk_queue_holds_its_maker() -> None:
    box, _ = outbox()
    for _ in range(SLOW_FRAMES_MAX):
        await box.put(DATA)
    late = asyncio.ensure_future(box.put(DATA))
    done, waiting = await asyncio.wait([late], timeout=0)
    assert (done, waiting) == (set(), {late})
    await box.next()
    async with asyncio.timeout(10):
        await late


async def test_a_queue_nobody_reads_overflows_instead_of_growing() -> None:
    box, overflows = outbox()
    for _ in range(URGENT_FRAMES_MAX):
        assert box.urge(PING)
    assert not overflows
    assert not box.urge(PING)
    assert overflows == ["over"]


async def test_requests_leave_half_of_the_queue_to_control() -> None:
    box, _ = outbox()
    assert box.has_room_for(URGENT_BYTES_MAX // 2)
    box.urge(PING)
    assert not box.has_room_for(URGENT_BYTES_MAX // 2)


async def test_a_shut_outbox_takes_nothing() -> None:
    box, overflows = outbox()
    box.shut()
    assert not box.urge(PING)
    assert overflows == []


async def test_more_is_taken_in_the_same_order_as_far_as_there_is_room() -> None:
    box, _ = outbox()
    for _ in range(2):
        await box.put(DATA)
    box.urge(PING)
    size = len(frames.encode(DATA))
    assert frames.decode(await box.next()) == PING
    assert box.more(size - 1) == []
    assert box.more(2 * size - 1) == [frames.encode(DATA)]
    assert box.more(2 * size) == [frames.encode(DATA)]
    assert box.more(2 * size) == []


async def test_no_more_is_taken_than_one_message_may_hold() -> None:
    box, overflows = outbox()
    for _ in range(URGENT_FRAMES_MAX):
        box.urge(PING)
    first, more = await box.next(), box.more(frames.PACK_BYTES_MAX)
    packed = frames.decode_all(frames.pack([first, *more]))
    assert packed == [PING] * frames.PACK_FRAMES_MAX
    for _ in range(frames.PACK_FRAMES_MAX):
        assert box.urge(PING), "what was taken left room"
    assert not overflows
