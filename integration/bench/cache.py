"""What an answer from memory costs, beside what else Python has for keeping one.

All ways are measured in turn, round by round, in one run, so that a busy machine slows all of them
alike.  What counts are the ratios to a bare `cachetools.TTLCache` read.  The second part is
`cache_datacenters`.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import sys
import threading
import time
import tracemalloc
from collections.abc import Callable, Sequence

import cachetools

from consul_matchmaker import Matchmaker, Settings, Snapshot
from consul_matchmaker.backends.memory import Memory
from integration.bench import cache_datacenters

TOPIC = "scheduler"
HOSTS = ("10.0.0.1:5001", "10.0.0.2:5002", "10.0.0.3:5003")
TTL_SECONDS = 86_400.0

TTL_CACHE, DICT, LRU_CACHE = "cachetools.TTLCache", "dict", "functools.lru_cache"
OURS_HOSTS, OURS_PICK = "hosts()", "pick()"
TARGETS = ((OURS_HOSTS, 0.7), (OURS_PICK, 3.0))  # at most so many TTLCache reads
GROWTH_BYTES = 1_000
"""What 100,000 lookups may leave behind: the measuring itself takes some hundred bytes."""


def ways(mm: Matchmaker) -> dict[str, Callable[[], object]]:
    """Each way to read one held answer, called as an application calls it."""
    held = mm.hosts(TOPIC)
    ttl_cache: cachetools.TTLCache[str, Snapshot] = cachetools.TTLCache(10_000, TTL_SECONDS)
    ttl_cache[TOPIC] = held
    plain = {TOPIC: held}
    memoized = functools.lru_cache(10_000)(lambda topic: held)
    return {
        TTL_CACHE: lambda: ttl_cache[TOPIC],
        DICT: lambda: plain[TOPIC],
        LRU_CACHE: lambda: memoized(TOPIC),
        OURS_HOSTS: lambda: mm.hosts(TOPIC),
        OURS_PICK: lambda: mm.pick(TOPIC),
    }


def seconds_per_call(call: Callable[[], object], threads: int, calls: int) -> float:
    """Time on the wall that one call takes of the interpreter, *threads* of them sharing it."""

    def run(ready: threading.Barrier) -> None:
        ready.wait()
        for _ in range(calls):
            call()

    if threads == 1:
        began = time.perf_counter()
        for _ in range(calls):
            call()
        return (time.perf_counter() - began) / calls
    ready = threading.Barrier(threads + 1)
    workers = [threading.Thread(target=run, args=(ready,)) for _ in range(threads)]
    for worker in workers:
        worker.start()
    ready.wait()
    began = time.perf_counter()
    for worker in workers:
        worker.join()
    return (time.perf_counter() - began) / (threads * calls)


def measure(mm: Matchmaker, threads: int, rounds: int, calls: int) -> dict[str, float]:
    """The median of each way, in seconds."""
    times: dict[str, list[float]] = {}
    for _ in range(rounds):
        for way, call in ways(mm).items():
            times.setdefault(way, []).append(seconds_per_call(call, threads, calls // threads))
    return {way: statistics.median(found) for way, found in times.items()}


def growth_bytes(call: Callable[[], object], calls: int) -> int:
    """What *calls* calls leave behind."""
    for _ in range(1_000):
        call()
    tracemalloc.start()
    try:
        before, _ = tracemalloc.get_traced_memory()
        for _ in range(calls):
            call()
        after, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    return after - before


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m integration.bench cache",
        description="The first part needs no Consul: answers from memory ask nobody.",
    )
    parser.add_argument("--part", choices=("memory", "datacenters", "all"), default="all")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--calls", type=int, default=100_000, help="of each way in each round")
    parser.add_argument("--phases", type=int, default=9, help="with and without bad topics")
    parser.add_argument("--seconds", type=float, default=4.0, help="of each phase")
    options = parser.parse_args(arguments)
    is_good = True
    if options.part != "datacenters":
        is_good &= from_memory(options.rounds, options.calls)
    if options.part != "memory":
        is_good &= cache_datacenters.run(options.phases, options.seconds)
    return 0 if is_good else 1


def from_memory(rounds: int, calls: int) -> bool:
    """Print and judge what an answer costs; whether the bounds were kept."""
    memory = Memory()
    memory.declare(TOPIC, HOSTS)
    is_good = True
    with Matchmaker(Settings(mode="kv", ttl_seconds=TTL_SECONDS), backend=memory) as mm:
        print(f"Python {sys.version.split()[0]}, medians of {rounds} rounds\n")
        for threads in (1, 8):
            found = measure(mm, threads, rounds, calls)
            print(f"{threads} thread{'s' if threads > 1 else ''}:")
            for way, seconds in found.items():
                ratio = seconds / found[TTL_CACHE]
                print(f"  {way:22}{seconds * 1e9:8.0f} ns {ratio:6.2f} x TTLCache")
            for way, most in TARGETS:
                is_reached = found[way] <= most * found[TTL_CACHE]
                is_good &= is_reached
                print(f"  {way} at most {most:g} x: {'reached' if is_reached else 'MISSED'}")
        for way in (OURS_HOSTS, OURS_PICK):
            grown = growth_bytes(ways(mm)[way], calls)
            is_good &= grown <= GROWTH_BYTES
            verdict = "reached" if grown <= GROWTH_BYTES else "MISSED"
            print(f"{calls:,} {way} leave {grown} bytes behind: {verdict}")
    return is_good
