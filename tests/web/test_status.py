"""The page: every node without scripts, nothing hostile alive, small, legible, and honest about age."""

from __future__ import annotations

import dataclasses
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from piclusterd.errors import Unavailable
from piclusterd.web import status

from .house import HOSTILE, WALL, Node, member, node, relay, run, serving, view

STATIC = Path(status.__file__).parent / "static"
VOID = {"meta", "link", "img", "input", "br", "hr"}


class Page(HTMLParser):
    """Tags, attributes and words of a page; raises where an element is left open."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words = ""
        self._open: list[str] = []
        self.feed(text)
        self.close()
        assert self._open == [], f"left open: {self._open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words += data

    def values(self, attribute: str) -> list[str]:
        return [attributes[attribute] or "" for _, attributes in self.tags if attribute in attributes]


async def page(cluster: Node, path: str = "/", code: int = 200) -> Page:
    async with serving(cluster.doors()) as client, client.get(path) as answer:
        assert answer.status == code
        assert answer.content_type == "text/html"
        return Page(await answer.text())


async def test_the_page_shows_every_node_without_scripts() -> None:
    shown = await page(Node(view(member(1), member(2, "suspect"), member(3, "failed"), relay())))
    for words in (
        "pi-1",
        "pi-2",
        "pi-3",
        "vps-1",
        "suspect",
        "failed",
        "leader",
        "relay",
        "10.2 tok/s",
        "3.0 of 8.0 GB",
    ):
        assert words in shown.words
    assert "10" in shown.values("content"), "it reloads itself where scripts are off"


async def test_the_verdict_findings_runs_and_ledger_are_told() -> None:
    shown = await page(Node(view(member(1), member(2, temperature_c=84.0), member(3), relay())))
    for words in ("pi-2 is hot", "Give it air", "The door opens twice", "P1, bug", "1 min ago", "9f2c4e1a77b05d31",
                  "117", "https://hub.example"):  # fmt: skip
        assert words in shown.words


async def test_hostile_text_is_inert_wherever_it_comes_from() -> None:
    evil = member(2, name=HOSTILE, board=HOSTILE)
    runs = (run(1, HOSTILE, detail=HOSTILE),)
    cluster = Node(view(member(1), evil, runs=runs, cluster=HOSTILE, digest=HOSTILE))
    cluster.bus.publish("run", {"text": HOSTILE})
    cluster.edge["url"] = "javascript:alert(1)"
    shown = await page(cluster)
    assert [attributes.get("src") for tag, attributes in shown.tags if tag == "script"] == ["/static/status.js"]
    assert [attributes["src"] for tag, attributes in shown.tags if tag == "img"] == ["/static/icon.svg"]
    assert shown.values("onerror") == []
    assert not any(value.startswith("javascript:") for value in shown.values("href"))
    assert shown.words.count(HOSTILE) >= 5, "it is shown as what it is"


async def test_a_fragment_has_the_changing_parts_and_no_page_around_them() -> None:
    shown = await page(Node(), "/?fragment=main")
    assert shown.values("data-part") == ["verdict", "findings", "nodes", "runs", "ledger"]
    assert not any(tag in ("html", "script", "body") for tag, _ in shown.tags)


async def test_nothing_is_inline_and_nothing_comes_from_elsewhere() -> None:
    shown = await page(Node(view(member(1), member(2, "failed"))))
    assert shown.values("style") == []
    assert not any(name.startswith("on") for _, attributes in shown.tags for name in attributes)
    assert all(link.startswith(("/", "#")) for name in ("src", "href") for link in shown.values(name))


async def test_old_data_says_how_old_it_is() -> None:
    quiet = dataclasses.replace(member(2), heard_s=200.0)
    shown = await page(Node(view(member(1), quiet)))
    assert "as of 3 min ago" in shown.words
    assert "stale" in shown.values("class")


async def test_a_node_without_a_picture_still_shows_a_page() -> None:
    cluster = Node()
    cluster.picture = Unavailable("no answer in time", "it is starting", "Wait a moment.")
    assert "it is starting" in (await page(cluster, code=503)).words


async def test_the_snippet_uses_the_address_the_reader_came_by() -> None:
    async with serving(Node().doors()) as client, client.get("/", headers={"Host": "pi-1.local:8746"}) as answer:
        assert "http://pi-1.local:8746/v1/chat/completions" in await answer.text()


async def test_static_files_are_revalidated_by_etag() -> None:
    async with serving(Node().doors()) as client:
        for name, kind in (("status.css", "text/css"), ("status.js", "text/javascript"), ("icon.svg", "image/svg+xml")):
            async with client.get(f"/static/{name}") as answer:
                assert (answer.status, answer.content_type) == (200, kind)
                etag = answer.headers["ETag"]
            async with client.get(f"/static/{name}", headers={"If-None-Match": etag}) as answer:
                assert (answer.status, await answer.read()) == (304, b"")


@pytest.mark.parametrize("path", ["..%2fstatus.py", "%2e%2e/status.py", "nothing", "%2fetc%2fpasswd", "a%00.css"])
async def test_static_serves_nothing_but_its_files(path: str) -> None:
    async with serving(Node().doors()) as client, client.get(f"/static/{path}") as answer:
        assert answer.status == 404


async def test_the_whole_page_stays_below_a_hundred_kilobytes() -> None:
    async with serving(Node().doors()) as client, client.get("/") as answer:
        total = len(await answer.read()) + sum(path.stat().st_size for path in STATIC.iterdir())
    assert total < 100_000


def test_the_picture_is_told_in_words_and_crowns_the_leader() -> None:
    drawn = status.shape(view(member(1), member(2, "suspect"), member(3), relay()), {}, WALL)["drawing"]
    assert drawn["text"] == "pi-1: leader, alive. pi-2: voter, suspect. pi-3: voter, alive. vps-1: relay, alive"
    assert [dot["full"] for dot in drawn["dots"] if dot["leads"]] == ["pi-1"]
    assert len(drawn["lines"]) == 3
    assert all(0 <= x <= status.WIDTH and 0 <= y <= status.HEIGHT for x, y in (dot["at"] for dot in drawn["dots"]))


def test_nodes_are_never_drawn_on_top_of_each_other() -> None:
    drawn = status.shape(view(*(member(number) for number in range(1, status.DRAWN_MAX + 1))), {}, WALL)["drawing"]
    assert len({dot["at"] for dot in drawn["dots"]}) == status.DRAWN_MAX


def test_too_many_nodes_are_left_to_the_table() -> None:
    shown = status.shape(view(*(member(number) for number in range(1, 30))), {}, WALL)
    assert shown["drawing"] is None
    assert len(shown["nodes"]) == 29


def test_a_run_with_an_absurd_clock_is_shown_without_a_time() -> None:
    odd = dataclasses.replace(run(1), hlc=2**80)
    (shown,) = status.shape(view(runs=(odd,)), {}, WALL)["runs"]
    assert shown["iso"] == ""


async def test_numbers_that_are_none_break_nothing() -> None:
    odd = member(2, cpu_percent=float("nan"), temperature_c=float("inf"), memory_used=-1, memory_total=-1)
    cluster = Node(view(member(1), odd))
    assert "pi-2" in (await page(cluster)).words
    async with serving(cluster.doors()) as client:
        for path in ("/status.json", "/health"):
            async with client.get(path) as answer:
                assert not re.search("NaN|Infinity", await answer.text())


def test_without_a_leader_there_are_no_lines() -> None:
    drawn = status.shape(view(leader=None), {}, WALL)["drawing"]
    assert drawn["lines"] == []
    assert status.shape(view(leader=node(9)), {}, WALL)["leader"] == node(9)


def palettes() -> list[dict[str, str]]:
    blocks = re.findall(r":root \{(.*?)\}", (STATIC / "status.css").read_text(), re.DOTALL)
    return [dict(re.findall(r"--([a-z-]+): (#[0-9a-f]{6})", block)) for block in blocks[:2]]


def luminance(colour: str) -> float:
    parts = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    red, green, blue = (part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


@pytest.mark.parametrize("palette", palettes(), ids=["light", "dark"])
def test_text_has_a_contrast_of_four_and_a_half_to_one(palette: dict[str, str]) -> None:
    on = {"card": "ink quiet ok warn bad accent", "paper": "ink quiet", "soft": "ink quiet",
          "warn-soft": "ink warn", "bad-soft": "ink bad"}  # fmt: skip
    for back, fronts in on.items():
        for front in fronts.split():
            light, dark = sorted((luminance(palette[back]), luminance(palette[front])), reverse=True)
            assert (light + 0.05) / (dark + 0.05) >= 4.5, f"{front} on {back}"


async def test_who_asks_for_no_html_is_greeted_as_by_ollama() -> None:
    async with serving(Node().doors()) as client:
        for accept in ("*/*", "application/json"):
            async with client.get("/", headers={"Accept": accept}) as answer:
                assert (answer.status, await answer.text()) == (200, "Ollama is running")
            async with client.head("/", headers={"Accept": accept}) as answer:
                assert answer.status == 200
