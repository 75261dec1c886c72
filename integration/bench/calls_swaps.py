"""The only host of a topic is replaced again and again, while gRPC streams run and begin.

`integration/callers/test_grpc.py` has the same, where the servers that have left are stopped too.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import ExitStack

import grpc

from consul_matchmaker import Matchmaker, Settings, aio
from consul_matchmaker.adapters.grpc import aio_channel, channel
from consul_matchmaker.backends.memory import Memory
from integration.bench.calls_selection import said
from integration.callers.echo_process import HOSTS, EchoProcess

TOPIC = "bench"
SERVERS = 4
STREAMS, MESSAGES, PAUSE_SECONDS = 8, 20, 0.005
"""So many streams at a time, each of so many messages, so far apart."""
GRACE_SECONDS = 0.5
"""Shorter than the run: connections to hosts that left are closed many times."""
TIMEOUT_SECONDS = 10.0
"""Of a stream, which takes 0.1 s: one that hangs fails."""
SWAP_SECONDS = 0.01
"""So long a host stays at least."""

Method = Callable[..., Iterator[bytes]]


class Streams:
    """What became of the streams, on threads or on an event loop."""

    def __init__(self) -> None:
        self.is_over = False
        self.outcomes: Counter[str] = Counter()
        """How many streams, by code."""
        self.hosts: Counter[str] = Counter()
        """How many messages, by who answered."""

    def run(self, mm: Matchmaker) -> None:
        """On threads, until it is over."""
        with channel(mm, TOPIC, grace_seconds=GRACE_SECONDS) as to_topic:
            method = to_topic.stream_stream(HOSTS)
            self._repeat(lambda: method)

    def run_by_hand(self, mm: Matchmaker) -> None:
        """The same with a channel that is closed, and made anew, when the host is another one."""
        lock, known = threading.Lock(), ""
        to_host: grpc.Channel | None = None

        def method() -> Method:
            nonlocal known, to_host
            with lock:
                host = str(mm.pick(TOPIC))
                if to_host is None or host != known:
                    if to_host is not None:
                        to_host.close()
                    known, to_host = host, grpc.insecure_channel(host)
                found: Method = to_host.stream_stream(HOSTS)
                return found

        self._repeat(method)

    def _repeat(self, method: Callable[[], Method]) -> None:
        def repeat() -> None:
            while not self.is_over:
                try:
                    for answer in method()(messages(), timeout=TIMEOUT_SECONDS):
                        self.hosts[answer.decode()] += 1
                    self.outcomes["OK"] += 1
                except grpc.RpcError as error:
                    self.outcomes[error.code().name] += 1
                except ValueError:  # what gRPC raises for a channel that is closed
                    self.outcomes["closed"] += 1

        threads = [threading.Thread(target=repeat) for _ in range(STREAMS)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    def run_awaited(self, mm: Matchmaker) -> None:
        """On an event loop, until it is over."""

        async def run() -> None:
            made = aio_channel(aio.Matchmaker(mm), TOPIC, grace_seconds=GRACE_SECONDS)
            async with made as to_topic:
                method = to_topic.stream_stream(HOSTS)

                async def repeat() -> None:
                    while not self.is_over:
                        try:
                            answers = method(awaited_messages(), timeout=TIMEOUT_SECONDS)
                            async for answer in answers:
                                self.hosts[answer.decode()] += 1
                            self.outcomes["OK"] += 1
                        except grpc.RpcError as error:
                            self.outcomes[error.code().name] += 1

                await asyncio.gather(*(repeat() for _ in range(STREAMS)))

        asyncio.run(run())


def messages() -> Iterator[bytes]:
    for _ in range(MESSAGES):
        yield b""
        time.sleep(PAUSE_SECONDS)


async def awaited_messages() -> AsyncIterator[bytes]:
    for _ in range(MESSAGES):
        yield b""
        await asyncio.sleep(PAUSE_SECONDS)


def swapped(count: int) -> bool:
    """Print and judge what *count* swaps did to the streams of both kinds of channel."""
    is_kept = True
    with ExitStack() as stack:
        servers = [stack.enter_context(EchoProcess()) for _ in range(SERVERS)]
        hosts = [server.serve("grpc") for server in servers]
        one_swapped("closed by hand", Streams.run_by_hand, hosts, count)
        for name, run in (("gRPC", Streams.run), ("gRPC, asyncio", Streams.run_awaited)):
            is_kept &= one_swapped(name, run, hosts, count)
    return is_kept


def one_swapped(
    name: str, run: Callable[[Streams, Matchmaker], None], hosts: Sequence[str], count: int
) -> bool:
    memory, streams = Memory(), Streams()
    memory.declare(TOPIC, hosts[:1])
    with Matchmaker(Settings(mode="kv", ttl_seconds=86_400), backend=memory) as mm:
        mm.hosts(TOPIC)
        thread = threading.Thread(target=run, args=(streams, mm))
        thread.start()
        began = time.monotonic()
        for number in range(1, count + 1):
            only = hosts[number % len(hosts)]
            memory.declare(TOPIC, [only])
            mm.expire(TOPIC, hosts[(number - 1) % len(hosts)])  # by which it asks again at once
            assert list(map(str, mm.hosts(TOPIC))) == [only]
            time.sleep(SWAP_SECONDS)
        seconds = time.monotonic() - began
        streams.is_over = True
        thread.join()
    failed = {code: n for code, n in streams.outcomes.items() if code != "OK"}
    is_reached = not failed and len(streams.hosts) == len(hosts)
    verdict = "" if run is Streams.run_by_hand else f": {said(is_reached)}"
    print(
        f"  {name:14} {count:,} swaps in {seconds:.1f} s: {streams.outcomes['OK']} streams ended "
        f"well, {streams.hosts.total()} messages, {failed or 'none failed'}{verdict}"
    )
    return is_reached
