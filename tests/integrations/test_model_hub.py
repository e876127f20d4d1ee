"""The hub's client against the hub's double and its CDN, on real sockets."""

from __future__ import annotations

from contextlib import aclosing

import pytest

from piclusterd.demo.doubles import Fault
from piclusterd.demo.huggingface_double import COMMIT
from piclusterd.errors import NotFound, PiclusterError, Refused, Unavailable, UserError
from piclusterd.integrations.model_hub import Hub, HubFile, Reference, _PublicResolver, looks_like_reference, parse
from tests.inference.hub_rig import BODY, FILE, REPO, SHA256, hub_with_cdn

TREE = {FILE: BODY, "demo-q8_0.gguf": b"GGUF8", "demo-mmproj-f16.gguf": b"GGUFm", "README.md": b"#"}


async def found(url: str, text: str, token: str = "") -> HubFile:
    async with Hub(url, token) as hub:
        return await hub.find(parse(text))


async def read(url: str, file: HubFile, offset: int = 0, token: str = "") -> list[bytes]:
    async with Hub(url, token) as hub, aclosing(hub.read(file, offset)) as chunks:
        return [chunk async for chunk in chunks]


@pytest.mark.parametrize(
    ("text", "reference"),
    [
        ("Qwen/Qwen3-0.6B-GGUF", Reference("Qwen/Qwen3-0.6B-GGUF")),
        ("Qwen/Qwen3-0.6B-GGUF:Q8_0", Reference("Qwen/Qwen3-0.6B-GGUF", quant="Q8_0")),
        ("hf:o/r@v1/dir/a b.gguf", Reference("o/r", "v1", "dir/a b.gguf")),
        ("hf.co/o/r:q4_0", Reference("o/r", quant="q4_0")),
        ("https://huggingface.co/o/r/resolve/main/x.gguf?download=true", Reference("o/r", "main", "x.gguf")),
        ("https://huggingface.co/o/r", Reference("o/r")),
    ],
)
def test_a_model_is_named_as_people_write_it(text: str, reference: Reference) -> None:
    assert looks_like_reference(text)
    assert parse(text) == reference


@pytest.mark.parametrize(
    "text",
    ["", "demo", "o/r/../../etc/passwd", "o/r@../x", "http://127.0.0.1/o/r", "hf:-o/r", "o/r\n", "o/" + "r" * 200],
)
def test_what_is_no_name_is_refused(text: str) -> None:
    with pytest.raises(UserError, match="no model of the hub"):
        parse(text)


async def test_a_file_is_pinned_to_a_commit_and_its_digest() -> None:
    async with hub_with_cdn() as (hub, _):
        hub.files[REPO] = TREE
        pinned = HubFile(REPO, COMMIT, FILE, SHA256, len(BODY))
        for text in (REPO, f"{REPO}:Q4_K_M", f"hf:{REPO}/{FILE}", f"{REPO}@{COMMIT}:q4_k_m"):
            assert await found(hub.url, text) == pinned
        assert (await found(hub.url, f"{REPO}:Q8_0")).file == "demo-q8_0.gguf"
        assert not hub.violations


async def test_bytes_come_from_the_cdn_and_the_token_does_not_go_there() -> None:
    async with hub_with_cdn() as (hub, cdn):
        hub.private.add(REPO)
        file = await found(hub.url, REPO, hub.key)
        assert b"".join(await read(hub.url, file, 0, hub.key)) == BODY
        assert b"".join(await read(hub.url, file, 1000, hub.key)) == BODY[1000:]
        assert cdn.requests == 2
        assert not cdn.violations


async def test_a_server_that_does_not_resume_is_noticed() -> None:
    async with hub_with_cdn() as (hub, _):
        hub.resumes = False
        first, *rest = await read(hub.url, await found(hub.url, REPO), 1000)
        assert first == b""
        assert b"".join(rest) == BODY


@pytest.mark.parametrize(
    ("text", "fault", "says"),
    [
        ("o/none", Refused, "It does not exist, or it is private. Give a token in"),
        (f"{REPO}@nowhere", NotFound, "no such file or revision"),
        (f"{REPO}:Q2_K", NotFound, "It has: demo-q4_k_m.gguf, demo-q8_0.gguf."),
        (f"hf:{REPO}/other.gguf", NotFound, "has no other.gguf"),
        (f"hf:{REPO}/README.md", Refused, "no GGUF file"),
        ("o/pickled", Refused, "It has files of kind bin, json, py."),
        ("o/split", Refused, "one of several parts"),
        ("o/gated", Refused, "Accept them on its page"),
    ],
)
async def test_what_the_hub_refuses_is_told_with_a_way_out(text: str, fault: type[PiclusterError], says: str) -> None:
    async with hub_with_cdn() as (hub, _):
        hub.files |= {REPO: TREE, "o/split": {"m-q4_k_m-00001-of-00002.gguf": b"GGUF"}, "o/gated": {FILE: BODY}}
        hub.files["o/pickled"] = {"pytorch_model.bin": b"\x80", "config.json": b'{"auto_map": {}}', "modeling.py": b""}
        hub.gated.add("o/gated")
        with pytest.raises(fault) as caught:
            await found(hub.url, text)
        assert says in str(caught.value)


async def test_a_limit_says_when_to_come_again_and_trouble_is_trouble() -> None:
    async with hub_with_cdn() as (hub, _):
        hub.faults.extend([Fault("ratelimited", 240), Fault("unavailable"), Fault("malformed")])
        told = []
        for _ in range(3):
            with pytest.raises(Unavailable) as caught:
                await found(hub.url, REPO)
            told.append((caught.value.retry_after_s, str(caught.value)))
        assert told[0][0] == 240
        assert "240 s" in told[0][1]
        assert "503" in told[1][1]
        assert "not understood" in told[2][1]
    with pytest.raises(Unavailable, match="Is this node online"):
        await found("http://127.0.0.1:9", REPO)


@pytest.mark.parametrize(
    "location",
    ["http://evil.example/x", "https://127.0.0.1/x", "https://169.254.169.254/latest", "file:///etc/passwd",
     "https://localhost/x", "https://[::1]/x", "https://10.0.0.1/x"],
)  # fmt: skip
async def test_a_redirect_into_the_house_or_off_https_is_refused(location: str) -> None:
    async with Hub("https://huggingface.co", "hf_secret") as hub:
        with pytest.raises(Refused, match="not fetched from there"):
            hub._redirected("https://huggingface.co/o/r/resolve/main/x", location)
        assert hub._credentials("https://huggingface.co/api/models/o/r")
        assert not hub._credentials("https://cdn-lfs.huggingface.co/x")
        assert not hub._credentials("https://huggingface.co:8443/x")


async def test_a_name_that_points_into_the_house_is_not_followed() -> None:
    resolver = _PublicResolver()
    with pytest.raises(OSError, match="no public address"):
        await resolver.resolve("localhost", 443)
    await resolver.close()
