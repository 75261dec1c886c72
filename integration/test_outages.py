"""Consul away for a minute under load, in every way it can be away: answers get old, never fail."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping

import pytest

from consul_matchmaker import Matchmaker, errors
from consul_matchmaker.testing.consul_probe import Node, NotReady, check_dns, request
from integration.cluster import Cluster
from integration.readers import (
    SCHEDULER_SECONDS,
    TIMEOUT_SECONDS,
    Load,
    Operators,
    matchmaker,
    published,
)
from integration.waiting import until

OUTAGE_SECONDS = 60.0
MAX_STALE_SECONDS = 30.0
TTL_SECONDS = 5.0
"""The default.  With less, what may be lost of an HTTP attempt is more than 0.3 of it (`cache`)."""
STALE_SECONDS = TTL_SECONDS * (1 + 1 / 16) + 3 + SCHEDULER_SECONDS
"""A watched answer: its poll and 1/16, and 3 s; the others are faster."""
FRESH_SECONDS = TTL_SECONDS + SCHEDULER_SECONDS
BACK_SECONDS = 20.0


@contextlib.contextmanager
def paused(cluster: Cluster) -> Iterator[None]:
    """It accepts, and says nothing."""
    cluster.pause("agent1")
    yield
    cluster.resume("agent1")


@contextlib.contextmanager
def killed(cluster: Cluster) -> Iterator[None]:
    """Connections are refused."""
    cluster.kill("agent1")
    yield
    cluster.start("agent1")
    cluster.wait_ready()


@contextlib.contextmanager
def firewalled(cluster: Cluster) -> Iterator[None]:
    """Packets from and to it are dropped, those of open connections too."""
    if os.geteuid() != 0 or shutil.which("iptables") is None:
        pytest.skip("a firewall between us and the agent needs Linux, root and iptables")
    node = cluster.nodes["agent1"]
    ports = [("tcp", node.http), ("tcp", node.dns), ("udp", node.dns)]
    rules = [
        ["INPUT", "-i", "lo", "-p", protocol, side, address.rpartition(":")[2], "-j", "DROP"]
        + (["-d", address.rpartition(":")[0]] if side == "--dport" else [])
        + (["-s", address.rpartition(":")[0]] if side == "--sport" else [])
        for protocol, address in ports
        for side in ("--dport", "--sport")
    ]
    with contextlib.ExitStack() as stack:
        for rule in rules:
            subprocess.run(["iptables", "-w", "-I", *rule], check=True)
            stack.callback(subprocess.run, ["iptables", "-w", "-D", *rule], check=True)
        yield


@pytest.fixture
def readers(
    cluster: Cluster, agent: Node, prefix: str, topic: str
) -> Iterator[Mapping[str, Matchmaker]]:
    """One in each mode, and one of each that gives up early."""
    with contextlib.ExitStack() as stack:
        # Not at the agent that goes away: its minute would end their leases and checks, and Consul
        # would rightly say, when it is back, that nobody is there.
        home = cluster.nodes["server1"]
        stack.enter_context(Operators(home, topic))
        published(stack, home, prefix, topic)
        found = {}
        for name, max_stale_seconds in (("", 3600.0), (", impatient", MAX_STALE_SECONDS)):
            for mode, address, values in (
                ("catalog", agent.dns, {}),
                ("kv", agent.http, {"prefix": prefix}),
                ("kv, no watch", agent.http, {"prefix": prefix, "watch": False}),
            ):
                found[mode + name] = stack.enter_context(
                    matchmaker(
                        mode.partition(",")[0],
                        address,
                        ttl_seconds=TTL_SECONDS,
                        max_stale_seconds=max_stale_seconds,
                        **values,  # type: ignore[arg-type]
                    )
                )
        for reader in found.values():
            until(lambda reader=reader: len(reader.hosts(topic)) == 3, 10)  # type: ignore[misc]
        yield found
        if cluster.is_disturbed:
            cluster.mend()


@pytest.mark.long
@pytest.mark.parametrize("outage", [paused, killed, firewalled])
def test_a_minute_without_consul(
    cluster: Cluster,
    readers: Mapping[str, Matchmaker],
    topic: str,
    outage: Callable[[Cluster], contextlib.AbstractContextManager[None]],
) -> None:
    """No failed lookup of a known topic and none that waits, every answer stale, older and older;
    Unavailable after max_stale_seconds; fresh within one TTL after Consul answers again."""
    patient = {name: one for name, one in readers.items() if "impatient" not in name}
    impatient = [one for name, one in readers.items() if "impatient" in name]
    with contextlib.ExitStack() as stack:
        loads = {name: stack.enter_context(Load(one, topic)) for name, one in patient.items()}
        time.sleep(5)
        before = {name: load.p99() for name, load in loads.items()}
        waited = {name: load.waited for name, load in loads.items()}
        with outage(cluster):
            began = time.monotonic()
            stale = {
                name: until(lambda one=one: one.hosts(topic).is_stale, STALE_SECONDS)  # type: ignore[misc]
                for name, one in patient.items()
            }
            ages: dict[str, list[float]] = {name: [] for name in patient}
            looked_at = 0.0
            while time.monotonic() - began < OUTAGE_SECONDS:
                looked_at = time.monotonic() - began
                for name, one in patient.items():
                    held = one.hosts(topic)
                    assert held.is_stale
                    ages[name].append(held.age_seconds)
                    # Nothing new can have come since; the last answer may have been on its way.
                    assert held.age_seconds > looked_at - TIMEOUT_SECONDS
                for one in impatient:
                    with contextlib.suppress(errors.Unavailable):
                        one.hosts(topic)
                        assert time.monotonic() - began < MAX_STALE_SECONDS + STALE_SECONDS
                time.sleep(0.5)
            during = {name: load.p99() for name, load in loads.items()}
            assert {name: load.waited for name, load in loads.items()} == waited
        until(lambda: _answers(cluster.nodes["agent1"]), BACK_SECONDS)
        back_at = time.monotonic()
        fresh = {}
        for name, one in readers.items():
            remaining = back_at + FRESH_SECONDS - time.monotonic()
            until(lambda one=one: not _stale(one, topic), remaining)  # type: ignore[misc]
            fresh[name] = time.monotonic() - back_at
    print(f"{outage.__name__}: all fresh {max(fresh.values()):.2f} s after the return")
    for name, load in loads.items():
        print(
            f"{outage.__name__}, {name}: stale after {stale[name]:.1f} s, "
            f"age {ages[name][0]:.0f} to {ages[name][-1]:.0f} s, "
            f"p99 {before[name] * 1e6:.0f} us before, {during[name] * 1e6:.0f} us during"
        )
        assert load.failures == []
        assert ages[name] == sorted(ages[name])
        # An impatient reader's question, which is waited for, may take the end of the outage.
        assert looked_at > OUTAGE_SECONDS / 2
        assert load.longest < TIMEOUT_SECONDS, "as long as a question that hangs"


def _answers(node: Node) -> bool:
    try:
        check_dns(node)
        status, _ = request(node, "GET", "/v1/kv/nothing-here")
    except NotReady:
        return False
    return status == 404


def _stale(reader: Matchmaker, topic: str) -> bool:
    try:
        return reader.hosts(topic).is_stale
    except errors.Unavailable:
        return True
