import asyncio

from piclusterd.cluster import frames
from piclusterd.cluster.frames import Frame, Kind
from piclusterd.cluster.outbox import BULK_FRAMES_MAX, URGENT_BYTES_MAX, URGENT_FRAMES_MAX, Outbox

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


async def test_bulk_waits_for_room_and_goes_on_in_order() -> None:
    box, _ = outbox()
    sent = [Frame(1, Kind.DATA, bytes([n])) for n in range(3 * BULK_FRAMES_MAX)]

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
    for _ in range(BULK_FRAMES_MAX):
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
