"""A process that serves HTTP, gRPC and ZeroMQ: every question is answered with the host's name.

It costs little beside the client that is measured or tested: one event loop, and answers that are
made once.  It is told what to serve on standard input; `EchoProcess` is the handle on one.
"""

from __future__ import annotations

import asyncio
import logging
import sys
import threading
from collections.abc import Coroutine
from contextlib import suppress
from typing import Any

from consul_matchmaker import Matchmaker
from integration.told import ToldProcess, obey

HOST = "/echo.Echo/Host"
"""The gRPC method of one answer."""
HOSTS = "/echo.Echo/Hosts"
"""The one that answers each message of a stream."""
READY_SECONDS = 10.0


class EchoProcess(ToldProcess):
    """Starts one; a context manager that kills what is still running."""

    def __init__(self, url: str = "") -> None:
        """*url*: of the Consul where it registers what it serves."""
        super().__init__("integration.callers.echo_process", url)

    def serve(self, kind: str, topic: str | None = None) -> str:
        """Have it serve *kind* (http, grpc, zmq), registered as *topic*; returns where."""
        return str(self.ask("serve", kind=kind, topic=topic))


class Program:
    """Does what it is told."""

    def __init__(self, url: str) -> None:
        self._matchmaker = Matchmaker.from_url(url) if url else None
        self._loop = asyncio.new_event_loop()
        self._kept: list[object] = []
        threading.Thread(target=self._loop.run_forever, daemon=True).start()

    def serve(self, kind: str, topic: str | None) -> str:
        start = {"http": self._http, "grpc": self._grpc, "zmq": self._zmq}[kind]
        making: Coroutine[Any, Any, str] = start()
        host = asyncio.run_coroutine_threadsafe(making, self._loop).result(READY_SECONDS)
        if topic is not None:
            assert self._matchmaker is not None
            registration = self._matchmaker.register(topic, host)
            registration.wait_until_published(timeout_seconds=READY_SECONDS)
        return host

    async def _http(self) -> str:
        server = await self._loop.create_server(_Http, "127.0.0.1", 0, backlog=128)
        self._kept.append(server)
        address, port = server.sockets[0].getsockname()
        return f"{address}:{port}"

    async def _grpc(self) -> str:
        import grpc

        async def one(request: bytes, context: Any) -> bytes:
            return host.encode()

        async def each(requests: Any, context: Any) -> Any:
            async for _ in requests:
                yield host.encode()

        server = grpc.aio.server()
        handlers = {
            "Host": grpc.unary_unary_rpc_method_handler(one),
            "Hosts": grpc.stream_stream_rpc_method_handler(each),
        }
        server.add_generic_rpc_handlers(
            (grpc.method_handlers_generic_handler("echo.Echo", handlers),)
        )
        host = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
        await server.start()
        self._kept.append(server)
        return host

    async def _zmq(self) -> str:
        import zmq
        import zmq.asyncio

        socket = zmq.asyncio.Context.instance().socket(zmq.ROUTER)
        host = f"127.0.0.1:{socket.bind_to_random_port('tcp://127.0.0.1')}"

        async def answer() -> None:
            while True:
                *route, _ = await socket.recv_multipart()
                await socket.send_multipart([*route, host.encode()])

        self._kept.append(self._loop.create_task(answer()))
        return host


class _Http(asyncio.Protocol):
    """HTTP/1.1 of requests without a body."""

    def connection_made(self, transport: Any) -> None:
        self._transport = transport
        address, port = transport.get_extra_info("sockname")
        body = f"{address}:{port}"
        head = f"HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\nContent-Length: {len(body)}\r\n\r\n"
        self._answer = (head + body).encode()
        self._read = b""

    def data_received(self, data: bytes) -> None:
        self._read += data
        *requests, self._read = self._read.split(b"\r\n\r\n")
        self._transport.write(self._answer * len(requests))


if __name__ == "__main__":
    logging.basicConfig(level=logging.ERROR)  # not that a host is on loopback
    with suppress(KeyboardInterrupt):
        obey(Program(sys.argv[1]))
