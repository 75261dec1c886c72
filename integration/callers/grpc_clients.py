"""A gRPC channel to a topic, for threads or for asyncio, behind one set of methods for tests."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Callable, Iterable
from typing import Any

import grpc

from consul_matchmaker import Matchmaker, aio
from consul_matchmaker.adapters.grpc import aio_channel, channel
from integration.callers.grpc_server import ANSWERS, BOTH, REQUESTS, UNARY
from integration.waiting import until

Said = dict[str, Any]


def encoded(request: Said) -> bytes:
    return json.dumps(request).encode()


class Blocking:
    """Calls wait; what they raise is what gRPC raises.  A context manager that closes it."""

    def __init__(self, matchmaker: Matchmaker, topic: str, **given: Any) -> None:
        self.channel: Any = channel(matchmaker, topic, **given)
        how = encoded, json.loads
        self._unary = self.channel.unary_unary(UNARY, *how)
        self._answers = self.channel.unary_stream(ANSWERS, *how)
        self._requests = self.channel.stream_unary(REQUESTS, *how)
        self._both = self.channel.stream_stream(BOTH, *how)

    def unary(self, timeout: float | None = 60, how: Said | None = None, **request: Any) -> Said:
        """*how*: what else gRPC takes, such as metadata."""
        said: Said = self._unary(request, timeout=timeout, **(how or {}))
        return said

    def answers(self, received: list[Said], timeout: float | None = 60, **request: Any) -> None:
        """Puts each answer into *received* as it comes."""
        for answer in self._answers(request, timeout=timeout):
            received.append(answer)

    def requests(self, requests: Iterable[Said]) -> Said:
        said: Said = self._requests(iter(list(requests)), timeout=60)
        return said

    def both(self, requests: Iterable[Said], timeout: float | None = 60) -> list[Said]:
        return list(self._both(iter(list(requests)), timeout=timeout))

    def begin_and_cancel(self, has_begun: Callable[[], bool], **request: Any) -> None:
        """Begin a call, and cancel it once it *has_begun*."""
        call = self._unary.future(request, timeout=60)
        until(has_begun, 60, "it has begun")
        assert call.cancel()
        assert call.cancelled() and call.done()

    def begin_and_drop(self, **request: Any) -> Said:
        """Begin a stream of answers, and drop it after the first one, which is returned."""
        call = self._answers(request)
        said: Said = next(call)
        return said

    def close(self) -> None:
        self.channel.close()

    def __enter__(self) -> Any:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()


class Awaited:
    """The same with an event loop on a thread of its own."""

    def __init__(self, matchmaker: Matchmaker, topic: str, **given: Any) -> None:
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self.loop.run_forever)
        self._thread.start()
        self.matchmaker = aio.Matchmaker(matchmaker)
        self.channel: Any = aio_channel(self.matchmaker, topic, **given)
        how = encoded, json.loads
        self._unary = self.channel.unary_unary(UNARY, *how)
        self._answers = self.channel.unary_stream(ANSWERS, *how)
        self._requests = self.channel.stream_unary(REQUESTS, *how)
        self._both = self.channel.stream_stream(BOTH, *how)

    def run(self, awaited: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(awaited, self.loop).result(120)

    def unary(self, timeout: float | None = 60, how: Said | None = None, **request: Any) -> Said:
        async def call() -> Any:
            return await self._unary(request, timeout=timeout, **(how or {}))

        said: Said = self.run(call())
        return said

    def answers(self, received: list[Said], timeout: float | None = 60, **request: Any) -> None:
        async def call() -> None:
            async for answer in self._answers(request, timeout=timeout):
                received.append(answer)

        self.run(call())

    def requests(self, requests: Iterable[Said]) -> Said:
        async def call() -> Any:
            return await self._requests(iter(list(requests)), timeout=60)

        said: Said = self.run(call())
        return said

    def both(self, requests: Iterable[Said], timeout: float | None = 60) -> list[Said]:
        async def call() -> list[Said]:
            call = self._both(timeout=timeout)
            said = []
            for request in requests:  # the other style: written and read one by one
                await call.write(request)
                said.append(await call.read())
            await call.done_writing()
            assert await call.read() is grpc.aio.EOF
            return said

        return list(self.run(call()))

    def begin_and_cancel(self, has_begun: Callable[[], bool], **request: Any) -> None:
        async def call() -> None:
            call = self._unary(request, timeout=60)
            await asyncio.to_thread(until, has_begun, 60, "it has begun")
            assert call.cancel()
            assert call.cancelled() and call.done()

        self.run(call())

    def begin_and_drop(self, **request: Any) -> Said:
        async def call() -> Any:
            return await self._answers(request).read()

        said: Said = self.run(call())
        return said

    def close(self) -> None:
        self.run(self.channel.close())

    def __enter__(self) -> Any:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join()
        self.loop.close()
