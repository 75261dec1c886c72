"""From a host to an answered call: what the adapters cost, and what callers see when hosts fail.

Beside each figure stands what it is compared with: the same client without the adapter, the setting
that is the default, the program without a budget.  Turns alternate within one run.  Absolute times
are this machine's, which must be quiet; what counts are the differences, and the bounds.
"""

from __future__ import annotations

import argparse
import asyncio
import importlib.util
import math
import random
import statistics
import threading
import time
import uuid
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

from consul_matchmaker import Matchmaker, Settings, aio
from consul_matchmaker.backends.memory import Memory
from consul_matchmaker.testing.local_consul import LocalCluster
from integration.bench import calls_selection
from integration.bench.calls_selection import said
from integration.bench.kv import until
from integration.bench.service import ByHand
from integration.callers.echo_process import EchoProcess
from integration.callers.load import Load

CLIENTS = ("httpx", "aiohttp", "requests", "grpc")
ADDED_SECONDS = 50e-6
"""At most so much longer a request may take than with the plain client, p50."""
TOPIC = "bench"
BLOCK = 25
"""So many requests one way, then as many the next way."""
PER_SECOND = 500.0
HOSTS = 3
EVEN = 0.05
"""A host may have so much more or less than an even share."""
KILLED_AFTER = 0.4
"""The part of the time that is over when a host is killed."""


# -- what it costs ---------------------------------------------------------------------------------


def overhead(rounds: int) -> bool:
    """Time of a request with the plain client, with ours, and with ours by least_loaded."""
    from integration.bench.calls_clients import CLIENTS

    print(
        f"\none request after another to one server, {rounds} x {BLOCK} each way by turns:\n"
        "p50, and CPU time of this process"
    )
    is_kept = True
    with EchoProcess() as server:
        hosts = {kind: server.serve(kind) for kind in ("http", "grpc")}
        for client in CLIENTS:
            host = hosts[client.kind]
            with ExitStack() as stack:
                loop = stack.enter_context(event_loop())
                mm = stack.enter_context(matchmaker_of(host))
                loaded = stack.enter_context(matchmaker_of(host, selection="least_loaded"))
                ways = [client.plain(lambda host=host: host)]
                ways += [ours_of(client, each, TOPIC) for each in (mm, loaded)]
                blocks = [stack.enter_context(block_of(way, loop)) for way in ways]
                found = by_turns(blocks, rounds)
            plain, ours, by_load = found
            added = plain.more(ours)
            is_reached = added.seconds <= ADDED_SECONDS
            is_kept &= is_reached
            print(
                f"  {client.name:14} plain{plain.p50.seconds * 1e6:5.0f} us; ours {added} "
                f"(bound {ADDED_SECONDS * 1e6:g}, {said(is_reached)}); "
                f"least_loaded {plain.more(by_load)}"
            )
    return is_kept


@contextmanager
def matchmaker_of(host: str, **settings: Any) -> Iterator[Matchmaker]:
    """One that knows *host* from memory, and never asks again."""
    memory = Memory()
    memory.declare(TOPIC, [host])
    with Matchmaker(Settings(mode="kv", ttl_seconds=86_400, **settings), backend=memory) as mm:
        mm.hosts(TOPIC)
        yield mm


def ours_of(client: Any, mm: Matchmaker, topic: str) -> Any:
    """A context of *client* with the adapter."""
    return client.ours(aio.Matchmaker(mm) if client.is_awaited else mm, topic)


@contextmanager
def event_loop() -> Iterator[asyncio.AbstractEventLoop]:
    loop = asyncio.new_event_loop()
    yield loop
    loop.close()


@dataclass(frozen=True)
class Taken:
    """Of one request: its seconds, and the CPU seconds of this process."""

    seconds: float
    cpu: float

    def __str__(self) -> str:
        return f"{self.seconds * 1e6:+4.0f} us, CPU {self.cpu * 1e6:+4.0f}"


class Blocks:
    """What each block of one way took, by turns with those of the others."""

    def __init__(self) -> None:
        self.taken: list[Taken] = []

    @property
    def p50(self) -> Taken:
        return middle(self.taken)

    def more(self, other: Blocks) -> Taken:
        """What *other* took more."""
        pairs = zip(self.taken, other.taken, strict=True)
        return middle([Taken(b.seconds - a.seconds, b.cpu - a.cpu) for a, b in pairs])


def middle(taken: Sequence[Taken]) -> Taken:
    """The medians of both."""
    return Taken(
        statistics.median(each.seconds for each in taken),
        statistics.median(each.cpu for each in taken),
    )


@contextmanager
def block_of(way: Any, loop: asyncio.AbstractEventLoop) -> Iterator[Callable[[], Taken]]:
    """A function that makes `BLOCK` requests one way; its p50, and its CPU time a request."""
    if hasattr(way, "__enter__"):
        with way as ask:
            yield lambda: timed_block(ask)
        return
    awaited_ask = loop.run_until_complete(way.__aenter__())
    yield lambda: loop.run_until_complete(timed_awaited_block(awaited_ask))
    loop.run_until_complete(way.__aexit__(None, None, None))


def timed_block(ask: Callable[[], object]) -> Taken:
    taken, cpu = [], time.process_time()
    for _ in range(BLOCK):
        began = time.perf_counter()
        ask()
        taken.append(time.perf_counter() - began)
    return Taken(statistics.median(taken), (time.process_time() - cpu) / BLOCK)


async def timed_awaited_block(ask: Callable[[], Awaitable[object]]) -> Taken:
    taken, cpu = [], time.process_time()
    for _ in range(BLOCK):
        began = time.perf_counter()
        await ask()
        taken.append(time.perf_counter() - began)
    return Taken(statistics.median(taken), (time.process_time() - cpu) / BLOCK)


def by_turns(blocks: Sequence[Callable[[], Taken]], rounds: int) -> list[Blocks]:
    """What each of *blocks* returned in each round; each round begins with another one."""
    found = [Blocks() for _ in blocks]
    for turn in range(rounds + 1):
        for place in range(len(blocks)):
            way = (turn + place) % len(blocks)
            taken = blocks[way]()
            if turn:  # the first connects
                found[way].taken.append(taken)
    return found


# -- a host is killed ------------------------------------------------------------------------------


def killed(seconds: float) -> bool:
    """SIGKILL of one of three servers under load: failed requests, retries, who had how many."""
    from integration.bench.calls_clients import CLIENTS

    print(
        f"\none of {HOSTS} servers is killed under {PER_SECOND:g} requests/s, "
        f"{seconds * KILLED_AFTER:g} of {seconds:g} s after the start"
    )
    is_kept = True
    with LocalCluster(servers=1, clients=1) as cluster:
        address = cluster.nodes["agent1"].http
        for client in CLIENTS:
            for way in ("plain", "ours"):
                is_reached = one_killed(client, way, address, seconds)
                is_kept &= is_reached or way == "plain"
    return is_kept


def one_killed(client: Any, way: str, address: str, seconds: float) -> bool:
    """One client, one way; prints its line."""
    url, topic = f"consul+service://{address}", f"bench-{uuid.uuid4().hex[:8]}"
    with ExitStack() as stack:
        servers = [stack.enter_context(EchoProcess(url)) for _ in range(HOSTS)]
        names = [server.serve(client.kind, topic) for server in servers]
        mm = stack.enter_context(Matchmaker.from_url(url))
        until(lambda: len(mm.hosts(topic)) == HOSTS, 10, "all servers are known")
        by_hand = ByHand(address)
        by_hand.hosts(topic)
        choose = lambda: random.choice(sorted(by_hand.hosts(topic)))  # noqa: E731
        load = stack.enter_context(Load(PER_SECOND))
        stack.enter_context(asking(client, way, load, mm, topic, choose))
        time.sleep(seconds * KILLED_AFTER)
        before = Counter(load.answers)
        servers[0].kill()
        time.sleep(seconds * (1 - KILLED_AFTER))
        load.stop()
        retries = mm.status()["retries"]
    after = load.answers - before
    uneven = unevenness(before, names), unevenness(after, names[1:])
    line = f"{len(load.failures)} of {load.asked} failed"
    line += f"; uneven by {uneven[0]:.1%} before, {uneven[1]:.1%} after"
    if way == "plain":
        print(f"  {client.name:14} by hand, 5 s cached, at random: {line}")
        return True
    is_reached = not load.failures and max(uneven) <= EVEN
    assert isinstance(retries, Mapping)
    print(f"  {client.name:14} ours: {line}; {retries['allowed']} retries; {said(is_reached)}")
    for failure in sorted(set(load.failures)):
        print(f"    {failure}")
    return is_reached


@contextmanager
def asking(
    client: Any, way: str, load: Load, mm: Matchmaker, topic: str, choose: Callable[[], str]
) -> Iterator[None]:
    """For the time of the block *client* is asked as *load* says."""
    made = client.plain(choose) if way == "plain" else ours_of(client, mm, topic)
    if not client.is_awaited:
        with made as ask:
            load.start(ask)
            yield
            load.stop()
        return

    async def run() -> None:
        async with made as ask:
            await load.run_awaited(ask)

    thread = threading.Thread(target=asyncio.run, args=(run(),))
    thread.start()
    yield
    load.stop()
    thread.join()


def unevenness(answers: Mapping[str, int], hosts: Sequence[str]) -> float:
    """How far the host that has most or least is from an even share of the answers of *hosts*."""
    counts = [answers.get(host, 0) for host in hosts]
    mean = statistics.mean(counts)
    return max(abs(count - mean) for count in counts) / mean if mean else math.inf


# -- hosts come and go under streams ---------------------------------------------------------------


def swaps(count: int) -> bool:
    """Each swap replaces the host of the topic, while streams run and begin."""
    from integration.bench.calls_swaps import swapped

    print(f"\n{count:,} times the only host of a topic is replaced, under gRPC streams")
    return swapped(count)


def parts(arguments: argparse.Namespace) -> dict[str, Callable[[], bool]]:
    seconds = arguments.seconds
    return {
        "overhead": lambda: overhead(arguments.rounds),
        "killed": lambda: killed(seconds),
        "slow": lambda: calls_selection.slow(seconds),
        "new": calls_selection.new,
        "failing": lambda: calls_selection.failing(2 * seconds),
        "sick": lambda: calls_selection.sick(seconds),
        "swaps": lambda: swaps(arguments.swaps),
    }


def main(argv: Sequence[str]) -> int:
    """Run the parts that are named, else all; exit 1 when a bound was missed."""
    parser = argparse.ArgumentParser(prog="integration.bench calls", description=__doc__)
    names = "overhead, killed, slow, new, failing, sick, swaps"
    parser.add_argument("parts", nargs="*", metavar="PART", help=names)
    parser.add_argument("--seconds", type=float, default=10.0, help="of each load")
    parser.add_argument("--rounds", type=int, default=200, help="of the overhead")
    parser.add_argument("--swaps", type=int, default=1_000)
    arguments = parser.parse_args(argv)
    missing = [name for name in CLIENTS if importlib.util.find_spec(name) is None]
    if missing:
        print(f"needs pip install '.[{','.join(CLIENTS)}]': {', '.join(missing)} is not there")
        return 2
    runs = parts(arguments)
    if unknown := set(arguments.parts) - set(runs):
        parser.error(f"no part is named {', '.join(sorted(unknown))}")
    chosen = [name for name in runs if not arguments.parts or name in arguments.parts]
    missed = [name for name in chosen if not runs[name]()]
    print(f"\nNOT REACHED: {', '.join(missed)}" if missed else "\nevery bound was kept")
    return 1 if missed else 0
