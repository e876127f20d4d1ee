"""What every door shares: ids, errors, guards, headers, listeners, and the owner's doors on the unix socket."""

from __future__ import annotations

import asyncio
import io
import socket
import stat
from pathlib import Path

import aiohttp
import pytest
from aiohttp import web

from piclusterd.board.logs import request_id
from piclusterd.errors import Broken, NotFound, Overloaded, Unavailable, UserError
from piclusterd.web.app import BODY_BYTES_MAX, host_allowed, make_app
from piclusterd.web.listener import serve

from .house import Node, node, ring, serving

KEY = {"Authorization": "Bearer key-of-mine"}


async def _ok(_request: web.Request) -> web.Response:
    return web.Response(text=request_id.get())


@pytest.mark.parametrize(
    ("host", "allowed"),
    [
        ("192.168.1.11:8746", True),
        ("[fd00::1]:8746", True),
        ("[fd00::1]", True),
        ("localhost:8746", True),
        ("pi-1", True),
        ("PI-1.:8746", True),
        ("pi-9.local", True),
        ("cluster.example:443", True),
        ("", False),
        (".local", False),
        ("evil.example", False),
        ("pi-1.evil.example", False),
        ("local", False),
        ("127.0.0.1.evil.example:80", False),
    ],
)
def test_only_our_own_names_are_accepted_as_host(host: str, allowed: bool) -> None:
    assert host_allowed(host, frozenset({"pi-1", "localhost", "cluster.example"})) is allowed


async def test_a_foreign_host_header_is_misdirected_everywhere() -> None:
    async with serving(Node().doors()) as client:
        for path in ("/", "/status.json", "/livez", "/nowhere"):
            async with client.get(path, headers={"Host": "evil.example"}) as answer:
                assert answer.status == 421
                assert (await answer.json())["error"]["code"] == "unknown_host"


async def test_a_write_from_another_sites_page_is_refused_and_gets_no_cors_header() -> None:
    async with serving(Node().doors(extra_routes=[web.post("/v1/x", _ok)])) as client:
        async with client.post("/v1/x", headers={"Origin": "http://evil.example"}) as answer:
            assert answer.status == 403
            assert "Access-Control-Allow-Origin" not in answer.headers
        async with client.post("/v1/x", headers={"Origin": "null"}) as answer:
            assert answer.status == 403
        own = f"http://{answer.url.host}:{answer.url.port}"
        async with client.post("/v1/x", headers={"Origin": own}) as answer:
            assert answer.status == 200


async def test_a_sane_request_id_is_kept_and_any_other_replaced() -> None:
    async with serving(Node().doors(extra_routes=[web.get("/v1/x", _ok)])) as client:
        async with client.get("/v1/x", headers={"X-Request-Id": "trace-1.2_3"}) as answer:
            assert answer.headers["X-Request-Id"] == await answer.text() == "trace-1.2_3"
        for odd in ("a b", "x" * 65, "<script>"):
            async with client.get("/v1/x", headers={"X-Request-Id": odd}) as answer:
                assert answer.headers["X-Request-Id"] == await answer.text() != odd
                assert len(answer.headers["X-Request-Id"]) == 16


async def test_keys_guard_the_apis_and_nothing_else() -> None:
    routes = [web.get("/v1/models", _ok), web.get("/api/tags", _ok)]
    async with serving(Node().doors(keys=ring("key-of-mine", "other"), extra_routes=routes)) as client:
        for path in ("/v1/models", "/api/tags", "/%761/models"):
            for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "Basic key-of-mine"}):
                async with client.get(path, headers=headers) as answer:
                    assert answer.status == 401
                    assert answer.headers["WWW-Authenticate"] == "Bearer"
                    told = (await answer.json())["error"]
                    assert "no valid API key" in told if path == "/api/tags" else told["code"] == "invalid_api_key"
            async with client.get(path, headers=KEY) as answer:
                assert answer.status == 200
        for path in ("/", "/livez", "/status.json"):
            async with client.get(path) as answer:
                assert answer.status == 200


async def test_a_key_that_is_not_text_is_refused_like_any_other() -> None:
    doors = Node().doors(keys=ring("key"), extra_routes=[web.get("/v1/models", _ok)])
    served = await serve(make_app(doors), "127.0.0.1", 0)
    try:
        reader, writer = await asyncio.open_connection("127.0.0.1", served.port)
        writer.write(b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer \xff\xfe\r\n\r\n")
        async with asyncio.timeout(10):
            assert b" 401 " in await reader.readline()
        writer.close()
        await writer.wait_closed()
    finally:
        await served.close()


async def test_without_keys_the_apis_are_open() -> None:
    async with (
        serving(Node().doors(extra_routes=[web.get("/v1/models", _ok)])) as client,
        client.get("/v1/models") as answer,
    ):
        assert answer.status == 200


@pytest.mark.parametrize(
    ("fault", "status", "kind", "retry"),
    [
        (UserError("no such option", "why", "fix it", param="n"), 400, "invalid_request_error", None),
        (NotFound("no such model"), 404, "not_found_error", None),
        (Overloaded("busy", retry_after_s=7.4), 429, "rate_limit_error", "8"),
        (Unavailable("not now", retry_after_s=0.1), 503, "server_error", "1"),
        (Broken("disk"), 500, "server_error", None),
        (RuntimeError("secret detail"), 500, "server_error", None),
    ],
)
async def test_every_fault_becomes_its_status_and_the_error_object(
    fault: Exception, status: int, kind: str, retry: str | None
) -> None:
    async def fail(_request: web.Request) -> web.Response:
        raise fault

    async with (
        serving(Node().doors(extra_routes=[web.get("/v1/fail", fail)])) as client,
        client.get("/v1/fail") as answer,
    ):
        error = (await answer.json())["error"]
        assert (answer.status, error["type"], answer.headers.get("Retry-After")) == (status, kind, retry)
        assert set(error) == {"message", "what", "why", "fix", "type", "param", "code"}
        assert "secret detail" not in str(error)
        if isinstance(fault, UserError) and fault.param:
            assert (error["param"], error["message"]) == ("n", "no such option: why. fix it")


async def test_a_fault_after_the_first_byte_breaks_the_connection_off() -> None:
    async def half(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        await response.write(b"half")
        raise RuntimeError("lost")

    async with (
        serving(Node().doors(extra_routes=[web.get("/v1/half", half)])) as client,
        client.get("/v1/half") as answer,
    ):
        with pytest.raises(aiohttp.ClientPayloadError):
            await answer.read()


async def test_unknown_paths_methods_and_sizes_answer_in_json() -> None:
    async def read(request: web.Request) -> web.Response:
        return web.Response(body=await request.read())

    async with serving(Node().doors(extra_routes=[web.post("/v1/read", read)])) as client:
        async with client.get("/nowhere") as answer:
            assert (answer.status, (await answer.json())["error"]["code"]) == (404, "not_found")
        async with client.delete("/livez") as answer:
            assert (answer.status, answer.headers["Allow"]) == (405, "GET,HEAD")
        async with client.post("/v1/read", data=io.BytesIO(b"x" * (BODY_BYTES_MAX + 1))) as answer:
            assert (answer.status, (await answer.json())["error"]["code"]) == (413, "too_large")


async def test_every_answer_carries_the_security_headers() -> None:
    async with serving(Node().doors()) as client:
        for path in ("/", "/nowhere", "/static/status.js", "/health"):
            async with client.get(path) as answer:
                assert answer.headers["Content-Security-Policy"].startswith("default-src 'none'; script-src 'self';")
                assert answer.headers["X-Content-Type-Options"] == "nosniff"
                assert answer.headers["Referrer-Policy"] == "no-referrer"
                assert answer.headers["Server"] == "piclusterd"


async def test_a_compressed_body_is_never_inflated() -> None:
    async def read(request: web.Request) -> web.Response:
        return web.Response(body=await request.read())

    async with (
        serving(Node().doors(extra_routes=[web.post("/v1/read", read)])) as client,
        client.post("/v1/read", data=b"\x1f\x8b raw", headers={"Content-Encoding": "gzip"}) as answer,
    ):
        assert await answer.read() == b"\x1f\x8b raw"


async def test_a_client_that_leaves_cancels_its_handler() -> None:
    begun, cancelled = asyncio.Event(), asyncio.Event()

    async def long(_request: web.Request) -> web.Response:
        begun.set()
        try:
            await asyncio.Future()
        except asyncio.CancelledError:
            cancelled.set()
            raise
        return web.Response()

    async with serving(Node().doors(extra_routes=[web.get("/v1/long", long)])) as client:
        asking = asyncio.ensure_future(client.get("/v1/long"))
        async with asyncio.timeout(10):
            await begun.wait()
            asking.cancel()
            await cancelled.wait()
        with pytest.raises(asyncio.CancelledError):
            await asking


async def test_a_port_that_is_taken_is_told_with_its_address() -> None:
    served = await serve(make_app(Node().doors()), "127.0.0.1", 0)
    try:
        with pytest.raises(UserError, match=rf"cannot listen on 127\.0\.0\.1:{served.port}"):
            await serve(make_app(Node().doors()), "127.0.0.1", served.port)
    finally:
        await served.close()


async def test_the_unix_socket_is_for_its_owner_and_group_and_leaves_nothing_behind(tmp_path: Path) -> None:
    path = tmp_path / "api.sock"
    for _ in range(2):
        served = await serve(make_app(Node().doors()), "127.0.0.1", 0, path)
        assert stat.S_IMODE(path.stat().st_mode) == 0o660
        await served.close()
        assert not path.exists()


async def test_a_socket_left_by_a_killed_process_is_replaced_but_a_file_is_not(tmp_path: Path) -> None:
    path = tmp_path / "api.sock"
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(str(path))
    async with serving(Node().doors(), path) as client, client.get("/livez") as answer:
        assert answer.status == 200
    path.write_text("something of somebody")
    with pytest.raises(UserError, match="cannot listen on"):
        await serve(make_app(Node().doors()), "127.0.0.1", 0, path)
    assert path.read_text() == "something of somebody"


async def test_the_owners_doors_are_shut_over_tcp() -> None:
    async with serving(Node().doors()) as client:
        for method, path in (("GET", "view"), ("POST", "tokens"), ("GET", "tokens"), ("DELETE", "tokens/k7f2")):
            async with client.request(method, f"/admin/{path}") as answer:
                assert answer.status == 403


async def test_the_owner_sees_the_view_and_makes_lists_and_revokes_tokens(tmp_path: Path) -> None:
    cluster = Node()
    keys = ring("k")
    routes = [web.get("/v1/models", _ok)]
    async with serving(cluster.doors(keys=keys, extra_routes=routes), tmp_path / "api.sock") as client:
        async with client.get("/admin/view") as answer:
            assert (await answer.json())["leader"] == node(1)
        async with client.post("/admin/tokens", json={"ttl_s": 600, "uses": 2}) as answer:
            assert answer.status == 201
            assert (await answer.json()) == {
                "token": "pcl1.ca.new.secret", "id": "new", "server": "192.168.1.11:7946", "expires_s": 600,
            }  # fmt: skip
        async with client.get("/admin/tokens") as answer:
            listed = (await answer.json())["tokens"]
            assert {"id": "new", "expires_s": 600, "uses": 2, "role": ""} in listed
            assert "secret" not in str(listed)
        async with client.delete("/admin/tokens/new") as answer:
            assert answer.status == 204
        async with client.delete("/admin/tokens/new") as answer:
            assert answer.status == 404
        async with client.get("/v1/models") as answer:
            assert answer.status == 200, "the socket's mode is its key"


@pytest.mark.parametrize("body", ['{"ttl_s": 1}', '{"uses": 0}', '{"uses": 1e9}', '{"admin": true}', "[", "[]"])
async def test_a_wish_for_a_token_outside_the_limits_is_refused(tmp_path: Path, body: str) -> None:
    cluster = Node()
    async with (
        serving(cluster.doors(), tmp_path / "api.sock") as client,
        client.post("/admin/tokens", data=body) as answer,
    ):
        assert answer.status == 400
    assert "new" not in cluster.tokens


async def test_the_view_is_read_by_anybody_as_objects_with_named_fields() -> None:
    async with serving(Node().doors()) as client, client.get("/status.json") as answer:
        body = await answer.json()
    assert body["members"][0]["facts"]["models"][0]["name"] == "qwen2.5-1.5b"
    assert body["heads"][0] == {"origin": node(1), "epoch": 1, "seq": 18_000}
    assert (body["status"], body["release"], body["uptime_s"]) == ("ok", "0.1.0", 90.0)
    assert body["edge"]["connected"] is True


async def test_a_join_token_opens_no_api() -> None:
    """A9 of the threat model; the other way round is in `tests/cluster/test_attacks.py`."""
    routes = [web.get("/v1/models", _ok)]
    async with serving(Node().doors(keys=ring("key"), extra_routes=routes)) as client:
        shown = {"Authorization": "Bearer pcl1.AAAA.id.secret"}
        async with client.get("/v1/models", headers=shown) as answer:
            assert answer.status == 403
            assert "secret" not in await answer.text()


# sockets that systemd holds ---------------------------------------------------------------------------------------
async def test_passed_sockets_are_served_and_outlive_the_server(tmp_path: Path) -> None:
    path = tmp_path / "api.sock"
    with socket.create_server(("127.0.0.1", 0)) as tcp, socket.socket(socket.AF_UNIX) as local:
        local.bind(str(path))
        local.listen()
        port = tcp.getsockname()[1]
        for _ in range(2):  # one daemon after another
            passed = {socket.AF_INET: tcp.dup(), socket.AF_UNIX: local.dup()}
            served = await serve(make_app(Node().doors()), "127.0.0.1", port, path, passed)
            assert served.port == port
            async with aiohttp.ClientSession() as client, client.get(f"http://127.0.0.1:{port}/livez") as answer:
                assert answer.status == 200
            async with aiohttp.ClientSession(connector=aiohttp.UnixConnector(str(path))) as client:
                assert (await client.get("http://x/livez")).status == 200
            await served.close()
        assert path.exists()


async def test_a_passed_socket_on_another_address_than_configured_is_refused() -> None:
    with socket.create_server(("127.0.0.1", 0)) as tcp:
        port = tcp.getsockname()[1]
        with pytest.raises(UserError, match=r"\[api\] says 192\.0\.2\.1"):
            await serve(make_app(Node().doors()), "192.0.2.1", port, passed={socket.AF_INET: tcp})


async def test_no_client_is_refused_or_dropped_while_one_server_follows_another() -> None:
    """Each client makes a new connection for each request, so that some fall on every moment of the change."""
    with socket.create_server(("127.0.0.1", 0), backlog=128) as tcp:
        port = tcp.getsockname()[1]
        over = asyncio.Event()
        counts: list[int] = []

        async def client() -> None:
            done = 0
            async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(force_close=True)) as session:
                while not over.is_set():
                    async with session.get(f"http://127.0.0.1:{port}/livez") as answer:
                        assert answer.status == 200
                        done += 1
            counts.append(done)

        async with asyncio.timeout(30), asyncio.TaskGroup() as group:
            clients = [group.create_task(client()) for _ in range(4)]
            for _ in range(5):
                served = await serve(make_app(Node().doors()), "127.0.0.1", port, passed={socket.AF_INET: tcp.dup()})
                async with aiohttp.ClientSession() as session, session.get(f"http://127.0.0.1:{port}/livez"):
                    pass
                await served.close()
            served = await serve(make_app(Node().doors()), "127.0.0.1", port, passed={socket.AF_INET: tcp.dup()})
            over.set()
            await asyncio.gather(*clients)
            await served.close()
        assert min(counts) > 5


async def test_a_door_that_is_not_there_says_so_in_the_words_of_its_api() -> None:
    async with serving(Node().doors(extra_routes=[web.get("/api/tags", _ok)])) as client:
        for method, path, status in (("GET", "/api/nowhere", 404), ("POST", "/api/tags", 405)):
            async with client.request(method, path) as answer:
                assert (answer.status, type((await answer.json())["error"])) == (status, str)
        async with client.get("/v1/nowhere") as answer:
            assert (await answer.json())["error"]["code"] == "not_found"
