"""Model files of a HuggingFace hub: which file a reference means, and its bytes from any offset on.

    owner/repo[@revision][:QUANT | /file.gguf] ─▶ GET /api/models/…?blobs=true ─▶ HubFile(commit, sha256, size)
    HubFile ─▶ GET /…/resolve/{commit}/{file}, Range ─▶ 302 ─▶ the CDN, without our token ─▶ bytes

The revision is a commit from here on, and the SHA-256 is the one that the hub's LFS metadata tells: its own client does
not check it, the store does. It refuses redirects that leave https or lead to private addresses, unless the hub itself
is there; the token goes to the hub alone.
"""

from __future__ import annotations

import asyncio
import ipaddress
import re
import socket
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from contextlib import asynccontextmanager
from urllib.parse import quote, urljoin, urlsplit

import aiohttp
import msgspec
from aiohttp.abc import AbstractResolver, ResolveResult
from aiohttp.resolver import ThreadedResolver

from ..errors import NotFound, PiclusterError, Refused, Unavailable, UserError

CONNECT_S, SILENCE_S = 10.0, 30.0
METADATA_BYTES_MAX = 8 * 1024 * 1024
"""Of a repository's list of files; the largest have some thousands."""
REDIRECTS_MAX = 5
CHUNK_BYTES = 256 * 1024
RETRY_AFTER_MAX_S = 3600.0
LIMITED_S = 60.0
"""Of a 429 that does not say how long; the hub's windows are five minutes."""
COMMIT, SHA256 = re.compile(r"[0-9a-f]{40}"), re.compile(r"[0-9a-f]{64}")
PREFIXES = ("hf:", "hf.co/", "huggingface.co/")
REFERENCE = re.compile(
    r"(?P<repo>[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95})(?:@(?P<revision>[\w.-]{1,100}))?"
    r"(?:/(?P<file>[\w./ +-]{1,200})|:(?P<quant>[A-Za-z0-9_]{1,16}))?"
)
GGUF = re.compile(r"(?!.*mmproj).*\.gguf", re.IGNORECASE)
"""A model; `mmproj` files are eyes for one."""
PART = re.compile(r"-\d{5}-of-\d{5}\.gguf$", re.IGNORECASE)
PREFERRED = ("Q4_K_M", "Q4_0", "Q5_K_M", "Q8_0", "Q6_K", "Q3_K_M", "F16")
"""Which quantisation is meant where none is named: small enough for a board, and still good."""


class Reference(msgspec.Struct, frozen=True):
    """What a person asked for; empty parts are left to us."""

    repo: str
    revision: str = ""
    file: str = ""
    quant: str = ""


class HubFile(msgspec.Struct, frozen=True):
    """One file, pinned: `commit` names the revision, `sha256` its bytes."""

    repo: str
    commit: str
    file: str
    sha256: str
    size: int


class _Lfs(msgspec.Struct):
    sha256: str
    size: int


class _Sibling(msgspec.Struct):
    rfilename: str
    size: int = 0
    lfs: _Lfs | None = None


class _Repository(msgspec.Struct):
    sha: str
    siblings: list[_Sibling] = []


def parse(text: str) -> Reference:
    """Raises `UserError` where `text` is not a reference to the hub."""
    bare = text.removeprefix("https://")
    bare = next((bare.removeprefix(prefix) for prefix in PREFIXES if bare.startswith(prefix)), bare)
    url = re.fullmatch(r"([^/]+/[^/]+)/(?:resolve|blob)/([^/]+)/([^?]+)(\?.*)?", bare)
    bare = f"{url[1]}@{url[2]}/{url[3]}" if url else bare
    match = REFERENCE.fullmatch(bare)
    if match is None or ".." in bare:
        fix = "Write owner/repo, owner/repo:Q4_K_M or hf:owner/repo/file.gguf."
        raise UserError(f"{text[:200]!r} is no model of the hub", "", fix)
    return Reference(**{key: value or "" for key, value in match.groupdict().items()})


def looks_like_reference(text: str) -> bool:
    """Is it written as one of the hub, and no short name of the catalogue?"""
    return text.startswith((*PREFIXES, "https://")) or text.count("/") >= 1


class Hub:
    """One hub. `token`: sent to it, and nowhere else; empty: none."""

    def __init__(self, url: str, token: str = "") -> None:
        self._url = url.rstrip("/")
        self._host = urlsplit(self._url)
        self._token = token
        self._session: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> Hub:
        private = _is_private(self._host.hostname or "")
        resolver = None if private else _PublicResolver()
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(resolver=resolver, limit=4),
            timeout=aiohttp.ClientTimeout(total=None, connect=CONNECT_S, sock_read=SILENCE_S),
            auto_decompress=False,
            trust_env=False,
            headers={"User-Agent": "piclusterd", "Accept-Encoding": "identity"},
        )
        return self

    async def __aexit__(self, *exc: object) -> None:
        assert self._session is not None
        await self._session.close()

    async def find(self, reference: Reference) -> HubFile:
        """The file that is meant. Raises `NotFound`, `Refused`, `UserError` or `Unavailable`."""
        at = f"/revision/{quote(reference.revision, safe='')}" if reference.revision else ""
        url = f"{self._url}/api/models/{reference.repo}{at}?blobs=true"
        async with self._get(url, {}, reference.repo) as response:
            body = await _capped(response)
        try:
            told = msgspec.json.decode(body, type=_Repository)
        except msgspec.DecodeError as fault:
            raise Unavailable("the hub's answer is not understood", f"{fault}.", "Is [store] hub_url right?") from None
        if not COMMIT.fullmatch(told.sha):
            raise Unavailable("the hub told no commit", "A model is pinned to one.", "Is [store] hub_url right?")
        chosen = choose(told.siblings, reference)
        if chosen.lfs is None or not SHA256.fullmatch(chosen.lfs.sha256) or chosen.lfs.size <= 0:
            raise Refused(f"the hub tells no SHA-256 of {chosen.rfilename}", "It could not be verified.")
        return HubFile(reference.repo, told.sha, chosen.rfilename, chosen.lfs.sha256, chosen.lfs.size)

    async def read(self, file: HubFile, offset: int) -> AsyncGenerator[bytes, None]:
        """Its bytes from `offset` on; the first item is empty bytes where the server began at 0 instead.

        Raises `Unavailable` where the connection breaks: go on from where it did.
        """
        url = f"{self._url}/{file.repo}/resolve/{file.commit}/{quote(file.file)}"
        headers = {"Range": f"bytes={offset}-"} if offset else {}
        async with self._get(url, headers, file.repo) as response:
            if offset and response.status != 206:
                yield b""
            elif offset:
                _check_range(response.headers.get("Content-Range", ""), offset, file.size)
            try:
                async for chunk in response.content.iter_chunked(CHUNK_BYTES):
                    yield chunk
            except (aiohttp.ClientError, OSError) as fault:
                raise Unavailable("the download was cut off", f"{fault or type(fault).__name__}.") from None

    @asynccontextmanager
    async def _get(self, url: str, headers: Mapping[str, str], repo: str) -> AsyncIterator[aiohttp.ClientResponse]:
        """The answer behind all redirects, with status 200 or 206."""
        assert self._session is not None
        try:
            for _ in range(REDIRECTS_MAX):
                sent = {**headers, **self._credentials(url)}
                async with self._session.get(url, headers=sent, allow_redirects=False) as response:
                    if response.status in (301, 302, 303, 307, 308):
                        url = self._redirected(url, response.headers.get("Location", ""))
                        continue
                    if response.status not in (200, 206):
                        raise _fault(response, repo, bool(self._token))
                    yield response
                    return
        except (aiohttp.ClientError, OSError) as fault:
            why = f"{fault or type(fault).__name__}."
            raise Unavailable(f"cannot reach {urlsplit(url).netloc}", why, "Is this node online?") from None
        raise Unavailable("the hub redirects in a circle", f"{REDIRECTS_MAX} redirects.")

    def _credentials(self, url: str) -> dict[str, str]:
        at = urlsplit(url)
        ours = (at.scheme, at.netloc) == (self._host.scheme, self._host.netloc)
        return {"Authorization": f"Bearer {self._token}"} if self._token and ours else {}

    def _redirected(self, url: str, location: str) -> str:
        to = urljoin(url, location)
        at = urlsplit(to)
        outside = not _is_private(self._host.hostname or "")
        if at.scheme not in ("https", self._host.scheme) or (outside and _is_private(at.hostname or "localhost")):
            raise Refused(f"the hub redirects to {at.scheme}://{at.netloc}", "A model is not fetched from there.")
        return to


def choose(siblings: list[_Sibling], reference: Reference) -> _Sibling:
    """The file of the repository that is meant. Raises `NotFound` or `Refused`, naming what there is."""
    ggufs = [one for one in siblings if GGUF.fullmatch(one.rfilename)]
    if reference.file:
        found = [one for one in siblings if one.rfilename == reference.file]
        if found and found[0] not in ggufs:
            raise Refused(f"{reference.file} is no GGUF file", "Only GGUF files are pulled: others may hold programs.")
    else:
        wanted = (reference.quant,) if reference.quant else PREFERRED
        found = [one for quant in wanted for one in ggufs if _is_quant(one.rfilename, quant)]
        found = found or ([] if reference.quant else ggufs)
    if not ggufs:
        there = ", ".join(sorted({one.rfilename.rpartition(".")[2] for one in siblings})[:8]) or "nothing"
        raise Refused(f"{reference.repo} has no GGUF file", f"It has files of kind {there}.", "Seek its GGUF twin.")
    if not found:
        there = ", ".join(sorted(one.rfilename for one in ggufs)[:12])
        what = reference.file or reference.quant
        raise NotFound(f"{reference.repo} has no {what}", f"It has: {there}.", "Name one of these.")
    if PART.search(found[0].rfilename):
        raise Refused(f"{found[0].rfilename} is one of several parts", "", "Join them with llama-gguf-split --merge.")
    return found[0]


async def _capped(response: aiohttp.ClientResponse) -> bytes:
    body = bytearray()
    async for chunk in response.content.iter_any():
        body += chunk
        if len(body) > METADATA_BYTES_MAX:
            raise Unavailable("the hub's list of files is too long", f"It has over {METADATA_BYTES_MAX} bytes.")
    return bytes(body)


def _is_quant(file: str, quant: str) -> bool:
    """Real names deviate in case and marks: `-Q4_K_M.gguf`, `.q4_k_m.gguf`."""
    return re.search(rf"(^|[-._/]){re.escape(quant)}(-\d{{5}}-of-\d{{5}})?\.gguf$", file, re.IGNORECASE) is not None


def _check_range(told: str, offset: int, size: int) -> None:
    match = re.fullmatch(r"bytes (\d+)-\d+/(\d+)", told)
    if match is None or int(match[1]) != offset or int(match[2]) != size:
        raise Unavailable("the hub sent another part of the file", f"Asked from byte {offset} of {size}, got {told!r}.")


def _fault(response: aiohttp.ClientResponse, repo: str, with_token: bool) -> PiclusterError:
    token = "The token in [store] token_file may not read it." if with_token else "Give a token in [store] token_file."
    match response.status:
        case 401:
            return Refused(f"the hub does not show {repo}", "It does not exist, or it is private.", token)
        case 403:
            return Refused(f"{repo} is gated", "Its owner wants terms accepted.", f"Accept them on its page. {token}")
        case 404:
            return NotFound(
                f"the hub has no such file or revision of {repo}", f"There is no {response.url.path[:200]}."
            )
        case 416:
            return Unavailable("the hub has less of the file than it told", "It answered 416.")
        case 429:
            after = _retry_after(response.headers)
            why = f"It asks to come again in {after:.0f} s."
            return Unavailable("the hub limits this address", why, "A token has a larger limit.", after)
        case status:
            return Unavailable(f"the hub answered {status}", "It is in trouble, or is no hub.")


def _retry_after(headers: Mapping[str, str]) -> float:
    told = headers.get("Retry-After", "")
    window = re.search(r"t=(\d+(\.\d+)?)", headers.get("RateLimit", ""))
    try:
        return min(float(told or (window[1] if window else LIMITED_S)), RETRY_AFTER_MAX_S)
    except ValueError:
        return LIMITED_S


def _is_private(host: str) -> bool:
    """An address that no hub on the internet has. Names are looked at when they are resolved."""
    if host == "localhost":
        return True
    try:
        return not ipaddress.ip_address(host).is_global
    except ValueError:
        return False


class _PublicResolver(AbstractResolver):
    """Names that point into the house are not followed: a redirect must not make us ask the router things."""

    def __init__(self) -> None:
        self._resolver = ThreadedResolver(loop=asyncio.get_running_loop())

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_INET
    ) -> list[ResolveResult]:
        found = [one for one in await self._resolver.resolve(host, port, family) if not _is_private(one["host"])]
        if not found:
            raise OSError(None, f"{host} has no public address")
        return found

    async def close(self) -> None:
        await self._resolver.close()
