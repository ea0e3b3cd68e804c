"""The JSON-RPC server, over real sockets."""

from __future__ import annotations

import asyncio
import json
import stat
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from vhostd.api import wire
from vhostd.api.client import Client
from vhostd.api.server import ApiServer, MethodNotFoundError
from vhostd.errors import BusyError, ExistsError, NotFoundError, UnavailableError, VhostdError


async def methods(name: str, params: dict[str, Any]) -> Any:
    if name == "echo":
        return params
    if name == "missing":
        raise NotFoundError("volume a/b does not exist")
    if name == "defect":
        raise ZeroDivisionError("oops")
    raise MethodNotFoundError(name)


def serving(path: Path, body: Callable[[], Awaitable[None]], **options: Any) -> None:
    async def main() -> None:
        server = ApiServer(path, options.pop("call", methods), **options)
        await server.start()
        try:
            async with asyncio.timeout(20):
                await body()
        finally:
            await server.stop()

    asyncio.run(main())
    assert not path.exists()


async def talk(path: Path, *lines: bytes) -> list[Any]:
    """Sends, shuts down, and returns the replies."""
    reader, writer = await asyncio.open_unix_connection(str(path), limit=1 << 24)
    writer.write(b"".join(lines))
    if writer.can_write_eof():
        writer.write_eof()
    replies = [json.loads(line) async for line in reader]
    writer.close()
    return replies


def request(method: str, request_id: Any = 1, **params: Any) -> dict[str, Any]:
    return {"jsonrpc": "2.0", "method": method, "params": params, "id": request_id}


def line(value: Any) -> bytes:
    return json.dumps(value).encode() + b"\n"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "api.sock"


def test_calls_are_answered_in_turn(path: Path) -> None:
    async def body() -> None:
        replies = await talk(path, line(request("echo", 1, a=1)), line(request("echo", "x", b=2)))
        assert replies == [
            {"jsonrpc": "2.0", "result": {"a": 1}, "id": 1},
            {"jsonrpc": "2.0", "result": {"b": 2}, "id": "x"},
        ]

    serving(path, body)


@pytest.mark.parametrize(
    ("sent", "code", "request_id"),
    [
        (b"{nonsense}\n", wire.PARSE_ERROR, None),
        (b"\xff\xff\n", wire.PARSE_ERROR, None),
        (b"[" * 100_000 + b"\n", wire.PARSE_ERROR, None),
        (line(1), wire.INVALID_REQUEST, None),
        (line({"method": "echo", "id": 1}), wire.INVALID_REQUEST, None),
        (line({**request("echo"), "method": 1}), wire.INVALID_REQUEST, None),
        (line({**request("echo"), "params": [1]}), wire.INVALID_REQUEST, None),
        (line({**request("echo"), "id": 1.5}), wire.INVALID_REQUEST, None),
        (line({**request("echo"), "id": True}), wire.INVALID_REQUEST, None),
        (line({**request("echo"), "extra": 1}), wire.INVALID_REQUEST, None),
        (line([]), wire.INVALID_REQUEST, None),
        (line([1] * 101), wire.INVALID_REQUEST, None),
        (line(request("no.such", 5)), wire.METHOD_NOT_FOUND, 5),
        (line(request("missing", 6)), NotFoundError.rpc_code, 6),
        (line(request("defect", 7)), -32603, 7),
    ],
)
def test_bad_request_costs_only_itself(path: Path, sent: bytes, code: int, request_id: Any) -> None:
    async def body() -> None:
        replies = await talk(path, sent, line(request("echo", 9)))
        assert (replies[0]["error"]["code"], replies[0]["id"]) == (code, request_id)
        assert replies[1]["result"] == {}

    serving(path, body)


def test_error_says_its_kind(path: Path) -> None:
    async def body() -> None:
        [reply] = await talk(path, line(request("missing")))
        assert reply["error"]["message"] == "volume a/b does not exist"
        assert reply["error"]["data"] == {"kind": "not-found"}

    serving(path, body)


def test_notification_is_done_and_not_answered(path: Path) -> None:
    done: list[str] = []

    async def call(name: str, params: dict[str, Any]) -> Any:
        done.append(name)

    async def body() -> None:
        assert await talk(path, line({"jsonrpc": "2.0", "method": "echo"})) == []
        assert done == ["echo"]

    serving(path, body, call=call)


def test_batch_is_answered_as_a_batch(path: Path) -> None:
    async def body() -> None:
        batch = [request("echo", 1), {"jsonrpc": "2.0", "method": "echo"}, 7, request("missing", 2)]
        [replies] = await talk(path, line(batch))
        assert [reply["id"] for reply in replies] == [1, None, 2]
        notifications = [{"jsonrpc": "2.0", "method": "echo"}]
        assert await talk(path, line(notifications)) == []

    serving(path, body)


def test_too_long_a_message_ends_the_connection_with_the_reason(path: Path) -> None:
    async def body() -> None:
        longest = line(request("echo", 1, a="x" * (wire.MAX_REQUEST_BYTES - 80)))
        assert len(longest) <= wire.MAX_REQUEST_BYTES
        assert (await talk(path, longest))[0]["id"] == 1
        reader, writer = await asyncio.open_unix_connection(str(path))
        writer.write(b'"' + b"x" * (wire.MAX_REQUEST_BYTES + 100))
        reply = json.loads(await reader.readline())
        assert reply["error"]["code"] == wire.INVALID_REQUEST
        assert "1048576" in reply["error"]["message"]
        writer.close()

    serving(path, body)


def test_half_a_message_and_silence_lose_their_connections(path: Path) -> None:
    async def body() -> None:
        for begun in (b'{"jsonrpc"', b""):
            reader, writer = await asyncio.open_unix_connection(str(path))
            writer.write(begun)
            assert await reader.read() == b""
            writer.close()

    serving(path, body, message_timeout_s=0.05, idle_timeout_s=0.05)


def test_one_client_too_many_is_told_so_and_the_others_go_on(path: Path) -> None:
    async def body() -> None:
        clients = [await asyncio.open_unix_connection(str(path)) for _ in range(2)]
        for reader, writer in clients:
            writer.write(line(request("echo")))
            await reader.readline()
        [refusal] = await talk(path)
        assert refusal["error"]["code"] == BusyError.rpc_code
        for reader, writer in clients:
            writer.write(line(request("echo")))
            assert json.loads(await reader.readline())["result"] == {}
            writer.close()

    serving(path, body, max_clients=2)


def test_socket_is_for_its_owner_only_unless_told_otherwise(path: Path) -> None:
    async def body() -> None:
        status = await asyncio.to_thread(path.stat)
        assert stat.S_IMODE(status.st_mode) == 0o600

    serving(path, body)


def test_second_server_is_refused_and_a_stale_socket_replaced(path: Path) -> None:
    async def body() -> None:
        with pytest.raises(BusyError, match="another process"):
            await ApiServer(path, methods).start()
        assert (await talk(path, line(request("echo"))))[0]["result"] == {}

    import socket

    with socket.socket(socket.AF_UNIX) as stale:
        stale.bind(str(path))
    serving(path, body)


def test_file_in_the_way_is_not_removed(path: Path) -> None:
    path.write_text("mine")
    with pytest.raises(ExistsError, match="not a socket"):
        asyncio.run(ApiServer(path, methods).start())
    assert path.read_text() == "mine"


def test_client_raises_what_the_daemon_reports(path: Path) -> None:
    def use() -> None:
        with Client(path) as client:
            assert client.call("echo", a=[1, "ä\n"]) == {"a": [1, "ä\n"]}
            with pytest.raises(NotFoundError, match="a/b does not exist"):
                client.call("missing")
            with pytest.raises(VhostdError, match="no method"):
                client.call("no.such")
            assert client.call("echo") == {}

    async def body() -> None:
        await asyncio.to_thread(use)

    serving(path, body)


def test_client_without_a_daemon_says_what_to_do(path: Path) -> None:
    with pytest.raises(UnavailableError, match=r"api\.sock.*vhostd serve"):
        Client(path).call("version")
