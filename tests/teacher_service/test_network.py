"""What strangers on the network can do: too large, too many, too slow, too often. Others go on meanwhile."""

import asyncio
import contextlib
import socket
import struct
import threading
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from edge_agent.teacher import open_channel
from protos.mekd.v1 import teacher_inference_pb2 as wire
from protos.mekd.v1.teacher_inference_pb2_grpc import TeacherInferenceStub
from teacher_service import server as server_module
from teacher_service.config import ServerConfig
from teacher_service.server import _channel_options

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
SETTINGS, PING = 4, 6


def frame(kind: int, payload: bytes = b"", *, flags: int = 0, stream: int = 0) -> bytes:
    """One HTTP/2 frame."""
    return struct.pack(">I", len(payload))[1:] + bytes((kind, flags)) + struct.pack(">I", stream) + payload


def received(connection: socket.socket, seconds: float = 10.0) -> tuple[bytes, bool]:
    """What comes until the other side closes or the time is over, and whether it closed."""
    connection.settimeout(seconds)
    found = b""
    try:
        while data := connection.recv(2**16):
            found += data
    except TimeoutError:
        return found, False
    except ConnectionError:
        pass
    return found, True


@contextlib.asynccontextmanager
async def echoing(**settings: Any) -> AsyncIterator[tuple[int, grpc.aio.Channel]]:
    """A bare server with this service's own channel options: the port, and a well-behaved client."""

    async def once(request: bytes, _context: Any) -> bytes:
        return request

    async def each(requests: Any, _context: Any) -> AsyncIterator[bytes]:
        async for request in requests:
            yield request

    handlers = {
        "Once": grpc.unary_unary_rpc_method_handler(once),
        "Each": grpc.stream_stream_rpc_method_handler(each),
    }
    server = grpc.aio.server(options=_channel_options(ServerConfig(**settings)))
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("test.Echo", handlers),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}", [("grpc.enable_http_proxy", 0)]) as channel:
            yield port, channel
    finally:
        await server.stop(0)


async def refused(call: Any) -> grpc.StatusCode:
    with pytest.raises(grpc.aio.AioRpcError) as ended:
        await call
    return ended.value.code()


async def test_messages_and_metadata_beyond_their_size_are_refused_and_smaller_ones_go_on() -> None:
    async with echoing(max_message_bytes=10_000) as (_, channel):
        once = channel.unary_unary("/test.Echo/Once")
        assert await refused(once(b"x" * 10_001)) is grpc.StatusCode.RESOURCE_EXHAUSTED
        large = (("authorization", "x" * 17_000),)
        assert await refused(once(b"", metadata=large)) is grpc.StatusCode.RESOURCE_EXHAUSTED
        many = tuple((f"name-{index}", "x" * 500) for index in range(40))
        assert await refused(once(b"", metadata=many)) is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert await once(b"x" * 9000, metadata=(("authorization", "x" * 200),)) == b"x" * 9000


async def test_calls_beyond_a_connections_share_wait_and_others_do_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_module, "MAX_CALLS_OF_A_CONNECTION", 3)
    async with echoing() as (port, channel):
        each = channel.stream_stream("/test.Echo/Each")
        open_streams = [each() for _ in range(3)]
        for stream in open_streams:
            await stream.write(b"x")
            assert await stream.read() == b"x"
        once = channel.unary_unary("/test.Echo/Once")
        assert await refused(once(b"", timeout=0.5)) is grpc.StatusCode.DEADLINE_EXCEEDED
        own = [("grpc.enable_http_proxy", 0), ("grpc.use_local_subchannel_pool", 1)]
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}", own) as other:
            assert await other.unary_unary("/test.Echo/Once")(b"x", timeout=10) == b"x"
        open_streams[0].cancel()
        assert await once(b"x", timeout=10) == b"x"


async def test_a_flood_of_pings_is_cut_off_and_others_go_on() -> None:
    async with echoing() as (port, channel):
        each = channel.stream_stream("/test.Echo/Each")()
        await each.write(b"before")
        assert await each.read() == b"before"

        def flood() -> tuple[bytes, bool]:
            with socket.create_connection(("127.0.0.1", port)) as connection:
                connection.sendall(PREFACE + frame(SETTINGS) + frame(PING, b"12345678") * 10)
                return received(connection)

        said, closed = await asyncio.to_thread(flood)
        assert closed and b"too_many_pings" in said
        await each.write(b"after")
        assert await each.read() == b"after"


async def test_who_connects_and_says_nothing_is_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    assert server_module.HANDSHAKE_TIMEOUT_MS == 10_000
    monkeypatch.setattr(server_module, "HANDSHAKE_TIMEOUT_MS", 500)
    async with echoing() as (port, channel):

        def silent() -> tuple[bytes, bool]:
            with socket.create_connection(("127.0.0.1", port)) as connection:
                return received(connection)

        started = time.monotonic()
        outcomes = await asyncio.gather(*(asyncio.to_thread(silent) for _ in range(5)))
        assert all(closed for _, closed in outcomes) and time.monotonic() - started < 5
        assert await channel.unary_unary("/test.Echo/Once")(b"x") == b"x"


async def test_a_connection_without_a_call_gives_its_place_back(monkeypatch: pytest.MonkeyPatch) -> None:
    assert server_module.MAX_CONNECTION_IDLE_MS == 60_000
    monkeypatch.setattr(server_module, "MAX_CONNECTION_IDLE_MS", 500)
    async with echoing() as (port, channel):
        each = channel.stream_stream("/test.Echo/Each")()
        await each.write(b"before")
        assert await each.read() == b"before"

        def idle() -> tuple[bytes, bool]:
            with socket.create_connection(("127.0.0.1", port)) as connection:
                connection.sendall(PREFACE + frame(SETTINGS))
                return received(connection)

        _, closed = await asyncio.to_thread(idle)
        assert closed
        await each.write(b"after")  # a stream is a call, also while nothing is said
        assert await each.read() == b"after"


async def test_who_answers_no_ping_gives_its_streams_place_back(monkeypatch: pytest.MonkeyPatch) -> None:
    assert (server_module.KEEPALIVE_MS, server_module.KEEPALIVE_TIMEOUT_MS) == (60_000, 20_000)
    monkeypatch.setattr(server_module, "KEEPALIVE_MS", 1000)
    monkeypatch.setattr(server_module, "KEEPALIVE_TIMEOUT_MS", 500)
    ended = asyncio.Event()

    async def wait_for_ever(requests: Any, _context: Any) -> AsyncIterator[bytes]:
        try:
            async for request in requests:
                yield request
        finally:
            ended.set()

    def vanish(port: int) -> tuple[bytes, bool]:
        # HPACK: :method POST, :scheme http, :path /test.Echo/Hang, :authority x, te trailers, content-type
        path, kind = b"/test.Echo/Hang", b"application/grpc"
        headers = b"\x83\x86\x04" + bytes([len(path)]) + path + b"\x01\x01x"
        headers += b"\x00\x02te\x08trailers" + b"\x0f\x10" + bytes([len(kind)]) + kind
        with socket.create_connection(("127.0.0.1", port)) as connection:
            message = frame(0, b"\0" + struct.pack(">I", 1) + b"x", stream=1)
            connection.sendall(PREFACE + frame(SETTINGS) + frame(1, headers, flags=4, stream=1) + message)
            return received(connection, 20.0)

    server = grpc.aio.server(options=_channel_options(ServerConfig()))
    handler = grpc.stream_stream_rpc_method_handler(wait_for_ever)
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("test.Echo", {"Hang": handler}),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        said, closed = await asyncio.to_thread(vanish, port)
        assert closed and b"ping_timeout" in said
        await asyncio.wait_for(ended.wait(), 10)
    finally:
        await server.stop(0)


def test_an_agent_notices_that_its_server_has_vanished(monkeypatch: pytest.MonkeyPatch) -> None:
    """The settings of the test above, shorter: gRPC's own floor for the first of them is ten seconds."""
    real = grpc.insecure_channel

    def hurried(address: str, options: list[tuple[str, int]]) -> grpc.Channel:
        shorter = {"grpc.keepalive_time_ms": 10_000, "grpc.http2.ping_timeout_ms": 1000}
        return real(address, list((dict(options) | shorter).items()))

    monkeypatch.setattr(grpc, "insecure_channel", hurried)
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def silent() -> None:
            connection, _ = listener.accept()
            with connection:
                connection.sendall(frame(SETTINGS))
                received(connection, 30.0)

        server = threading.Thread(target=silent)
        server.start()
        channel = open_channel(f"127.0.0.1:{listener.getsockname()[1]}", tls=False)
        started = time.monotonic()
        with pytest.raises(grpc.RpcError) as ended:
            TeacherInferenceStub(channel).Describe(wire.DescribeRequest(), timeout=40)
        assert ended.value.code() is grpc.StatusCode.UNAVAILABLE and time.monotonic() - started < 20
        channel.close()
        server.join(30)


async def test_connections_beyond_the_servers_share_are_closed_and_others_go_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(server_module, "SPARE_CONNECTIONS", 2)
    async with echoing(max_streams=3) as (port, channel):
        once = channel.unary_unary("/test.Echo/Once")
        assert await once(b"x") == b"x"

        def crowd() -> list[bool]:
            with contextlib.ExitStack() as stack:
                crowd = [stack.enter_context(socket.create_connection(("127.0.0.1", port))) for _ in range(8)]
                for connection in crowd:
                    with contextlib.suppress(OSError):
                        connection.sendall(PREFACE + frame(SETTINGS))
                return [received(connection, 0.5)[1] for connection in crowd]

        assert sorted(await asyncio.to_thread(crowd)) == [False] * 4 + [True] * 4  # 5 with the one from before
        assert await once(b"x") == b"x"


def test_an_agent_pings_as_often_as_the_server_permits_and_also_while_nothing_is_said(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ours = dict(_channel_options(ServerConfig()))
    seen: dict[str, int] = {}

    def insecure_channel(address: str, options: list[tuple[str, int]]) -> None:
        seen.update(options)

    monkeypatch.setattr(grpc, "insecure_channel", insecure_channel)
    open_channel("127.0.0.1:1", tls=False)
    assert seen["grpc.keepalive_time_ms"] == 30_000
    assert seen["grpc.keepalive_timeout_ms"] == seen["grpc.http2.ping_timeout_ms"] == 10_000
    assert seen["grpc.keepalive_permit_without_calls"] == ours["grpc.keepalive_permit_without_calls"] == 1
    assert seen["grpc.http2.max_pings_without_data"] == 0  # the default stops after two
    assert ours["grpc.http2.min_ping_interval_without_data_ms"] == 10_000 < seen["grpc.keepalive_time_ms"]
    assert ours["grpc.http2.max_ping_strikes"] > 0  # or floods would be endless


# --- over a server process ---


def test_a_teacher_survives_strangers_of_every_kind(start_server: Any) -> None:
    server = start_server()
    key = server.create_account()
    host, _, port = server.address.rpartition(":")
    noises = (
        b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00",  # the begin of a TLS handshake
        PREFACE + b"\xff" * 500,
        PREFACE + frame(SETTINGS) + frame(PING, b"12345678") * 1000,
        PREFACE + frame(SETTINGS) + frame(1, b"\x82" * 100, flags=4, stream=1),
    )
    with contextlib.ExitStack() as stack:
        for noise in noises * 3:
            connection = stack.enter_context(socket.create_connection((host, int(port))))
            with contextlib.suppress(OSError):
                connection.sendall(noise)
        with grpc.insecure_channel(server.address, [("grpc.enable_http_proxy", 0)]) as channel:
            metadata = (("authorization", f"Bearer {key}"),)
            described = TeacherInferenceStub(channel).Describe(wire.DescribeRequest(), metadata=metadata, timeout=20)
            assert described.channels == 1
    assert server.stop() == 0
    assert "Traceback" not in server.log()
    assert Path(server.log_file).stat().st_size < 100_000
