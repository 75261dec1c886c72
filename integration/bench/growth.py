"""What must not grow with what a process holds: topics, watches, tasks that watch, registrations.

Processor times are those of single threads, so that a busy machine disturbs them little.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import os
import statistics
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

from consul_matchmaker import Matchmaker, aio
from consul_matchmaker.testing.consul_probe import Node
from consul_matchmaker.testing.local_consul import LocalCluster
from integration.bench.kv import new_prefix, until
from integration.bench.watch import Strangers
from integration.cluster import tell

FEW, MANY = 1_000, 10_000
IN_USE = 20
NEW = 300
UNUSED_SECONDS = 65.0  # after so long without a lookup a topic is not in use any more
MEASURE_SECONDS = 20.0
FLAT = 2.0
"""What ten times as many may cost at most; with a scan of all it is ten times as much."""
WATCHES, CHANGES = 200, 50
WAKES_FOR_NOTHING = 0.01
"""Of a watch, for each change of another topic."""
TASKS = (10, 1_000)
MOST_THREADS = 24
"""What docs/operations.md, "Costs", allows: 7 of the library, 16 that ask, and the main one."""
REGISTRATIONS = (1_000, 2_000)
LINEAR = 2.5
"""What twice as many may take; with the square of them it is 4."""


# -- topics held -----------------------------------------------------------------------------------


def held(url: str, count: int, thread: str) -> dict[str, float]:
    """What a process that holds *count* topics, and has room for no more, uses of a processor: for
    each answer that its *thread* has, and for a topic that is new."""

    def used() -> tuple[int, float]:
        status = matchmaker.status()
        watcher, cache = status["watcher"], status["cache"]
        assert isinstance(cache, dict)
        answers = (
            watcher["answers"] if isinstance(watcher, dict) else cache["questions"]["answered"]
        )
        threads = [each for each in threading.enumerate() if thread in each.name]
        clocks = [time.pthread_getcpuclockid(each.ident or 0) for each in threads]
        return answers, sum(map(time.clock_gettime, clocks))

    def use(seconds: float) -> None:
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            for number in range(IN_USE):
                matchmaker.hosts(f"topic{number}")
            time.sleep(0.1)

    with Matchmaker.from_url(f"{url}&max_topics={count}") as matchmaker:
        for number in range(count):
            matchmaker.hosts(f"topic{number}")
        use(UNUSED_SECONDS)
        answers, cpu = used()
        use(MEASURE_SECONDS)
        answers_now, cpu_now = used()
        new = []
        for number in range(NEW):
            before = time.thread_time()
            matchmaker.hosts(f"new{number}")
            new.append(time.thread_time() - before)
    each = (cpu_now - cpu) / (answers_now - answers)
    return {"each answer": each, "a new topic": statistics.median(new)}


def topics(node: Node) -> bool:
    """The same topics in use, and ten times as many that are only held."""
    prefix = new_prefix()
    url = f"consul+kv://{node.http}/{prefix}?ttl_seconds=1"
    ways = {
        "an unchanged answer of the watch": ("true", "poll"),
        "a refresh": ("false", "refresher"),
    }
    with Strangers(node, prefix, 200), ProcessPoolExecutor(4, get_context("spawn")) as processes:
        costs = {
            (what, count): processes.submit(held, f"{url}&watch={watch}", count, thread)
            for what, (watch, thread) in ways.items()
            for count in (FEW, MANY)
        }
        while not all(each.done() for each in costs.values()):
            tell(node, "PUT", f"/v1/kv/{prefix}/strange", str(time.monotonic()))  # the same keys
            time.sleep(0.1)
    print(f"\n{FEW:,} and {MANY:,} topics held, {IN_USE} of them in use; processor time")
    is_good = True
    for what in ways:
        few, many = (costs[what, count].result() for count in (FEW, MANY))
        for each in few:
            ratio = many[each] / few[each]
            is_good &= ratio <= FLAT
            name = f"{what}: {each}" if "new" in each else what
            print(f"  {name:44}{1e6 * few[each]:6.0f} us {1e6 * many[each]:6.0f} us: {ratio:.2f} x")
    return is_good


# -- many that watch -------------------------------------------------------------------------------


def switches(threads: Sequence[threading.Thread]) -> int:
    """How often these threads went to sleep so far: once each time they were woken."""
    total = 0
    for each in threads:
        lines = Path(f"/proc/self/task/{each.native_id}/status").read_text().splitlines()
        (line,) = (line for line in lines if line.startswith("voluntary_ctxt_switches"))
        total += int(line.split()[1])
    return total


def watches(node: Node) -> bool:
    """Many threads in `watch`, each for a topic of its own, and one topic that changes."""
    prefix, seen = new_prefix(), []
    ready = threading.Semaphore(0)

    def watch(reader: Matchmaker, topic: str) -> None:
        for snapshot in reader.watch(topic):
            if topic == "changing":
                seen.append(snapshot)
            ready.release()

    url = f"consul+kv://{node.http}/{prefix}"
    with Matchmaker.from_url(url) as owner, Matchmaker.from_url(url) as reader:
        names = [*(f"quiet{number}" for number in range(WATCHES)), "changing"]
        threads = [threading.Thread(target=watch, args=(reader, name)) for name in names]
        for each in threads:
            each.start()
        for _ in threads:
            ready.acquire()
        until(lambda: reader.status()["watcher"]["watches"] == 1, 20, "the prefix is watched")  # type: ignore[index]
        time.sleep(5)
        before, first = switches(threads[:-1]), len(seen)
        for number in range(CHANGES):
            owner.register("changing", f"10.0.0.1:{number + 1}")
            until(lambda: len(seen) == first + number + 1, 10, "the change is seen")  # noqa: B023
        woken = switches(threads[:-1]) - before
        reader.close()
        for each in threads:
            each.join()
    share = woken / WATCHES / CHANGES
    print(
        f"\n{WATCHES} watches of other topics, {CHANGES} changes of one: woken {woken} times, "
        f"{share:.4f} a watch and change, of 0 ({WAKES_FOR_NOTHING:g} by chance)"
    )
    return share <= WAKES_FOR_NOTHING


def tasks(node: Node) -> bool:
    """Tasks of one event loop in `watch`, and the threads of the process."""
    found: dict[int, int] = {}

    async def count_threads(count: int) -> None:
        reader, seen = aio.Matchmaker.from_url(f"consul+kv://{node.http}/{new_prefix()}"), 0

        async def watch(topic: str) -> None:
            nonlocal seen
            async for _ in reader.watch(topic):
                seen += 1

        watching = [asyncio.create_task(watch(f"topic{number}")) for number in range(count)]
        while seen < count:
            await asyncio.sleep(0.1)
        await asyncio.sleep(2)  # those that asked have ended
        found[count] = threading.active_count()
        for each in watching:
            each.cancel()
        await reader.close()

    for count in TASKS:
        asyncio.run(count_threads(count))
    few, many = (found[count] for count in TASKS)
    print(f"\n{TASKS[0]} and {TASKS[1]:,} asyncio watches: {few}, {many} threads of {MOST_THREADS}")
    return many <= MOST_THREADS


# -- registrations ---------------------------------------------------------------------------------


def registrations(node: Node) -> bool:
    """Publishing them all, from the first `register` to the last confirmation."""
    used, passed = {}, {}
    for count in REGISTRATIONS:
        gc.collect()
        with Matchmaker.from_url(f"consul+kv://{node.http}/{new_prefix()}") as owner:
            cpu, began = time.process_time(), time.monotonic()
            made = [owner.register("topic", f"10.0.0.1:{port + 1}") for port in range(count)]
            for each in made:
                each.wait_until_published(timeout_seconds=120)
            used[count], passed[count] = time.process_time() - cpu, time.monotonic() - began
    few, many = (used[count] for count in REGISTRATIONS)
    shown = [f"{count:,}: {used[count]:.2f} s ({passed[count]:.1f} s passed)" for count in used]
    print(f"\npublishing, processor time: {', '.join(shown)}: {many / few:.2f} x of {LINEAR:g}")
    return many / few <= LINEAR


PARTS = {each.__name__: each for each in (registrations, tasks, watches, topics)}


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m integration.bench growth", description=__doc__)
    parser.add_argument("only", nargs="*", help=f"{', '.join(PARTS)}; all")
    only, missed = parser.parse_args(arguments).only, []
    with LocalCluster() as cluster:
        for name, part in PARTS.items():
            if only and name not in only:
                continue
            if not part(cluster.nodes["agent1"]):
                missed.append(name)
                print("  -> NOT REACHED")
    print(f"\nload {os.getloadavg()[0]:.1f}; not reached: {', '.join(missed) or 'nothing'}")
    return 1 if missed else 0
