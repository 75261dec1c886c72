"""The only host of a topic is replaced again and again, while gRPC streams run and begin."""

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
TTL_SECONDS = 0.01
"""Of an answer; it is asked for anew 0.1 s later at the earliest, so 1,000 swaps take 100 s."""


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

            def repeat() -> None:
                while not self.is_over:
                    try:
                        self.hosts.update(answer.decode() for answer in method(messages()))
                        self.outcomes["OK"] += 1
                    except grpc.RpcError as error:
                        self.outcomes[error.code().name] += 1

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
                            async for answer in method(awaited_messages()):
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
        for name, run in (("gRPC", Streams.run), ("gRPC, asyncio", Streams.run_awaited)):
            is_kept &= one_swapped(name, run, hosts, count)
    return is_kept


def one_swapped(
    name: str, run: Callable[[Streams, Matchmaker], None], hosts: Sequence[str], count: int
) -> bool:
    memory, streams = Memory(), Streams()
    memory.declare(TOPIC, hosts[:1])
    settings = Settings(mode="kv", ttl_seconds=TTL_SECONDS)
    with Matchmaker(settings, backend=memory) as mm:
        thread = threading.Thread(target=run, args=(streams, mm))
        thread.start()
        began = time.monotonic()
        for number in range(1, count + 1):
            only = hosts[number % len(hosts)]
            memory.declare(TOPIC, [only])
            while list(map(str, mm.hosts(TOPIC))) != [only]:
                time.sleep(0.001)
        seconds = time.monotonic() - began
        streams.is_over = True
        thread.join()
    failed = {code: n for code, n in streams.outcomes.items() if code != "OK"}
    is_reached = not failed and len(streams.hosts) == len(hosts)
    print(
        f"  {name:14} {count:,} swaps in {seconds:.1f} s: {streams.outcomes['OK']} streams ended "
        f"well, {streams.hosts.total()} messages, {failed or 'none failed'}: {said(is_reached)}"
    )
    return is_reached
