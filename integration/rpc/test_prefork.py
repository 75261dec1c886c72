"""A service that makes its transport and then forks: each worker is a server of its own."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from consul_matchmaker.adapters.oslo.http.names import service_of
from consul_matchmaker.testing.consul_probe import Node
from integration.cluster import ask
from integration.rpc.conftest import FOUND_SECONDS, Served, wait_for_hosts
from integration.rpc.prefork_process import PreforkProcess
from integration.waiting import until

Make = Callable[..., Any]
Serve = Callable[..., Served]
Start = Callable[..., PreforkProcess]

WORKERS = 4
CHECK_TTL = 5
END_SECONDS = 6.0
"""A worker drains for 0.1 s, and upstream's executor ends its threads within a second or two."""


@pytest.fixture
def start(
    tmp_path: Path, url_of: Callable[..., str], topic: str
) -> Iterator[Callable[..., PreforkProcess]]:
    """Starts services of 4 workers; their log is tmp_path/log."""
    with contextlib.ExitStack() as stack:
        log = stack.enter_context((tmp_path / "log").open("w"))

        def start_one(call: str | None = None, **options: Any) -> PreforkProcess:
            url = url_of(**{"check_ttl_seconds": CHECK_TTL, **options})
            process = PreforkProcess(url, topic, WORKERS, call=call, log=log)
            return stack.enter_context(process)

        yield start_one


def registered(agent: Node, topic: str) -> list[dict[str, Any]]:
    """What Consul has of *topic*, whether it is up or not."""
    return [
        each["Service"]
        for each in ask(agent, f"/v1/health/service/{service_of('openstack', topic)}")
    ]


def all_registered(agent: Node, topic: str) -> list[dict[str, Any]]:
    """When it is one of each worker."""
    until(lambda: len(registered(agent, topic)) == WORKERS, FOUND_SECONDS, "each is registered")
    return registered(agent, topic)


def answered(caller: Any, count: int = 5 * WORKERS) -> set[int]:
    """The process ids of those that answered."""
    return {caller.call({}, "who")[0] for _ in range(count)}


@pytest.mark.parametrize("calls_first", [False, True], ids=["made", "used"])
def test_each_worker_serves_on_a_port_of_its_own(
    calls_first: bool, start: Start, serve: Serve, client: Make, agent: Node, topic: str
) -> None:
    """Four registrations with four ports and four names, and calls reach all workers, each by its
    name, too; also where the parent has called over its transport before it forked."""
    asked = f"{topic}-asked"
    if calls_first:
        serve(asked, "one")
    process = start(asked if calls_first else None)
    found = all_registered(agent, topic)
    assert len({each["Port"] for each in found}) == WORKERS
    assert len({each["ID"] for each in found}) == WORKERS
    caller = client(topic)
    wait_for_hosts(caller, WORKERS)
    assert answered(caller) == set(process.workers)
    for number, pid in enumerate(process.workers):
        assert answered(caller.prepare(server=f"worker{number}"), 3) == {pid}


def free_range(count: int) -> int:
    """The first of so many ports in a row that nobody has, outside the system's own choice."""
    while True:
        first = random.randrange(20_000, 30_000)
        with contextlib.ExitStack() as stack:
            try:
                for port in range(first, first + count):
                    stack.enter_context(socket.socket()).bind(("127.0.0.1", port))
            except OSError:
                continue
            return first


def test_a_range_of_as_many_ports_as_workers_is_enough(
    start: Start, client: Make, agent: Node, topic: str
) -> None:
    """Each worker takes another one, though they start at the same time."""
    first = free_range(WORKERS)
    process = start(port_range=f"{first}-{first + WORKERS - 1}")
    ports = {each["Port"] for each in all_registered(agent, topic)}
    assert ports == set(range(first, first + WORKERS))
    caller = client(topic)
    wait_for_hosts(caller, WORKERS)
    assert answered(caller) == set(process.workers)


def test_sigterm_ends_it_cleanly(
    start: Start, client: Make, agent: Node, tmp_path: Path, topic: str
) -> None:
    """Within seconds every process ends with 0, no registration is left, no process of it, and
    nothing was logged but that 127.0.0.1 is an odd address."""
    process = start()
    all_registered(agent, topic)
    caller = client(topic)
    wait_for_hosts(caller, WORKERS)
    assert answered(caller) == set(process.workers)
    began = time.monotonic()
    statuses = process.stop()
    took = time.monotonic() - began
    print(f"ended after {took:.1f} s")
    assert statuses == [0] * (1 + WORKERS)
    assert took < END_SECONDS
    assert registered(agent, topic) == []
    assert process.processes() == []
    lines = (tmp_path / "log").read_text().splitlines()
    assert [line for line in lines if "leads everybody to their own machine" not in line] == []


def has_ended(pid: int) -> bool:
    """Whether nothing that it had open is open any more: it is a zombie, whose parent has not asked
    for its status yet, and has no other thread.  With others it may listen for some ms more: then
    the system takes a connection and a whole request, and resets them when the last one ends."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    said = dict(line.split(":\t", 1) for line in lines)
    return said["State"].startswith("Z") and said["Threads"] == "1"


@pytest.mark.parametrize("is_probed", [True, False], ids=["probed", "beats alone"])
def test_a_worker_that_is_killed(
    is_probed: bool, start: Start, client: Make, agent: Node, topic: str
) -> None:
    """It is found no more within its TTL, and no call fails meanwhile: its port refuses connections
    and its siblings answer."""
    import oslo_messaging

    process = start(health_check=is_probed)
    all_registered(agent, topic)
    caller = client(topic, timeout=3)
    wait_for_hosts(caller, WORKERS)
    killed, *others = process.workers
    service = service_of("openstack", topic)
    os.kill(killed, signal.SIGKILL)
    until(lambda: has_ended(killed), FOUND_SECONDS, "it is dead, and can be handed no call")
    failed, served, gone_after = [], set(), None
    began = time.monotonic()
    while time.monotonic() - began < CHECK_TTL + 3:
        try:
            served.add(caller.call({}, "who")[0])
        except oslo_messaging.MessagingTimeout as error:
            failed.append(str(error))
        passing = ask(agent, f"/v1/health/service/{service}?passing")
        if gone_after is None and len(passing) == WORKERS - 1:
            gone_after = time.monotonic() - began
    print(f"gone after {gone_after} s")
    assert gone_after is not None and gone_after < CHECK_TTL + 1
    assert failed == []
    assert served == set(others)
    wait_for_hosts(caller, WORKERS - 1)
    assert process.stop()[1:] == [-signal.SIGKILL, 0, 0, 0]
