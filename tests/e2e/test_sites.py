"""Clusters as they stand in houses: three Pis behind a NAT and a droplet that cannot dial them; two sites, two NATs."""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest
import pytest_asyncio

from piclusterd.demo.sites import PEER_PORT, WITH_DROPLET, Place

from .village import Village, ask, states, village

pytestmark = [pytest.mark.e2e, pytest.mark.asyncio(loop_scope="module")]

TWO_SITES = (Place("pi-1", 0), Place("pi-2", 0), Place("pi-3", 1), Place("droplet", None))
HEALED_S = 10.0
CUT_S = 5.0
"""Longer than a link's silence is borne (`cluster.link.TIMINGS`): all links between the sites end."""


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def home(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Village]:
    async with village(Path(tmp_path_factory.mktemp("home")), WITH_DROPLET, with_model=(0,)) as made:
        yield made


async def test_three_pis_behind_a_nat_and_a_droplet_that_cannot_dial_them_form_one_cluster(home: Village) -> None:
    with home.net.inside("droplet"):
        dialling = socket.socket()
    dialling.setblocking(False)
    with dialling, pytest.raises((TimeoutError, ConnectionError, OSError), match=r"^$|unreachable"):
        async with asyncio.timeout(1.0):
            await asyncio.get_running_loop().sock_connect(dialling, (home.net.hosts["pi-1"].address, PEER_PORT))
    for member in home.cluster.members:
        assert await states(home, member.name) == {p.name: "alive" for p in WITH_DROPLET}
    assert (await home.picture("droplet"))["role"] == "learner"
    assert len((await home.picture("pi-1"))["voters"]) == 3


async def test_the_droplet_sends_work_to_a_pi(home: Village) -> None:
    assert await home.chat("droplet") == "pi-1"


async def test_a_webhook_at_either_end_is_triaged_once(home: Village) -> None:
    await home.promise("droplet")
    await home.promise()
    assert await home.audited() == ()


async def relayed(village: Village) -> int:
    """Links of others that the droplet relays, by its own count."""
    async with village.cluster.http.get(f"{village.member('droplet').url}/metrics") as answer:
        lines = (await answer.text()).splitlines()
    return int(float(next(line for line in lines if line.startswith("piclusterd_relayed_links ")).split()[1]))


async def test_two_sites_behind_two_nats_work_over_the_relay_and_bear_a_cut(
    tmp_path: Path, record_testsuite_property: Callable[[str, object], None]
) -> None:
    async with village(tmp_path, TWO_SITES, with_model=(0, 2)) as made:

        async def both() -> bool:
            return await relayed(made) == 2

        await made.cluster.until(both, "pi-3 is linked with pi-1 and pi-2 through the droplet", 30)
        for name in ("pi-1", "pi-2", "pi-3"):
            assert set((await states(made, name)).values()) == {"alive"}
        assert (await made.picture("pi-3"))["quorum"] >= 2
        await made.promise("pi-3")
        await made.settle()

        made.net.unplug("pi-3", wan=True)
        cut = time.monotonic()
        async with made.webhooks():
            answers = []
            while time.monotonic() < cut + CUT_S:
                for name in ("pi-1", "pi-3"):
                    answers.append(await ask(made, name))
                    await made.picture(name)
                await asyncio.sleep(0.1)
            assert set(answers) == {(200, "pi-1"), (200, "pi-3")}, "inference and reads go on on both sides"
            assert len(made.promised) > 1, "the side with the majority goes on to take webhooks"
        made.net.replug("pi-3", wan=True)
        healed = time.monotonic()
        await made.cluster.until_equal()
        took = time.monotonic() - healed
        record_testsuite_property("ledgers equal after the heal, s", round(took, 1))
        assert took < HEALED_S, f"ledgers equal {took:.1f} s after the cable was back"
        await made.cluster.until(both, "the relayed links are back", 30)
        assert await made.audited() == ()
