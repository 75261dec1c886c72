"""What service mode costs and how soon it shows what happens, beside what users write by hand.

Every part runs against one local cluster of three servers and an agent.  Absolute times are this
machine's; what counts are the ratios, and the bounds that are promised.
"""

from __future__ import annotations

import argparse
import http.client
import json
import statistics
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from typing import Any

import consul

from consul_matchmaker import Matchmaker
from consul_matchmaker.testing.consul_probe import Node, request
from consul_matchmaker.testing.local_consul import LocalCluster
from integration.bench.kv import percentile, until
from integration.bench.outside import CountingRelay, raft_index
from integration.registering_process import RegisteringProcess

CHECK_TTL = 3.0
SEEN_SECONDS = 0.05
"""At most so long until a watching reader knows of a change, for 99 of 100."""
BARE = 3.0
"""A lookup of thousands at most so many times the bare exchange with its JSON taken apart."""


def new_topic() -> str:
    return f"bench-{uuid.uuid4().hex[:8]}"


def url_of(node: Node, query: str = "") -> str:
    return f"consul+service://{node.http}?{query}"


# -- at rest ---------------------------------------------------------------------------------------


def rest(cluster: LocalCluster, n: int, seconds: float) -> bool:
    """Raft entries beyond those of the cluster itself, with *n* services of one process."""
    print(f"\n{n} idle services of one process, for {seconds:g} s")
    node, topic = cluster.nodes["agent1"], new_topic()
    began = raft_index(cluster)
    time.sleep(seconds)
    idle = raft_index(cluster) - began
    with Matchmaker.from_url(url_of(node)) as owner:
        registrations = [owner.register(topic, f"10.0.0.1:{port}") for port in range(1, n + 1)]
        for registration in registrations:
            registration.wait_until_published(timeout_seconds=30)
        time.sleep(2)
        began = raft_index(cluster)
        before = owner.status()["wire"]["http"]["queries"]  # type: ignore[index]
        time.sleep(seconds)
        entries = raft_index(cluster) - began
        queries = owner.status()["wire"]["http"]["queries"] - before  # type: ignore[index]
    print(f"  Raft entries: {idle} without, {entries} with them")
    print(f"  {queries / seconds:.0f} requests/s to the agent: {n} beats each 0.9 s, a renewal")
    return entries <= idle


# -- a change --------------------------------------------------------------------------------------


class BareReader:
    """Blocking queries and nothing else, one after another: the soonest that anybody can know."""

    def __init__(self, node: Node, topic: str) -> None:
        self.seen: dict[int, float] = {}
        self._path = f"/v1/health/service/{topic}?passing&wait=10s&index="
        self._connection = http.client.HTTPConnection(node.http)
        self._is_over = False
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> BareReader:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._is_over = True
        self._thread.join()

    def _run(self) -> None:
        index = "0"
        while not self._is_over:
            self._connection.request("GET", self._path + index)
            answer = self._connection.getresponse()
            ports = [each["Service"]["Port"] for each in json.loads(answer.read())]
            now, index = time.monotonic(), answer.headers["X-Consul-Index"]
            self.seen.update({port: now for port in ports if port not in self.seen})
        self._connection.close()


def spread(seconds: Sequence[float]) -> str:
    p50, p99 = percentile(seconds, 50), percentile(seconds, 99)
    return f"p50 {p50 * 1000:.1f} p99 {p99 * 1000:.1f} ms"


def seen(cluster: LocalCluster, n: int) -> bool:
    """From a request that changes one service, at the catalog or at an agent, which tells the
    catalog, to a watching reader's answer."""
    print(f"\na service's port is changed, {n} times: from the request until a reader knows")
    node, topic = cluster.nodes["agent1"], new_topic()
    by_agent = {"ID": topic, "Name": topic, "Address": "10.0.0.1"}
    by_catalog = {"ID": topic, "Service": topic, "Address": "10.0.0.1"}
    is_kept = True
    with ExitStack() as stack:
        reader = stack.enter_context(Matchmaker.from_url(url_of(node)))
        bare = stack.enter_context(BareReader(node, topic))
        reader.hosts(topic)
        until(lambda: reader.status()["watcher"]["is_watching"], 5, "watched")  # type: ignore[index]
        for where, first in (("catalog", 1), ("agent", 1001)):
            ours: list[float] = []
            others: list[float] = []
            for port in range(first, first + n):
                if where == "agent":
                    path, body = "/v1/agent/service/register", {**by_agent, "Port": port}
                else:
                    path = "/v1/catalog/register"
                    body = {"Node": "bench", "Address": "10.0.0.9", "SkipNodeUpdate": port > 1}
                    body["Service"] = {**by_catalog, "Port": port}
                time.sleep(0.2)
                began = time.monotonic()
                request(node, "PUT", path, json.dumps(body))
                is_seen = lambda: any(host.port == port for host in reader.hosts(topic))  # noqa: B023, E731
                until(is_seen, 5, "seen")
                ours.append(time.monotonic() - began)
                until(lambda: port in bare.seen, 5, "seen by the bare reader")  # noqa: B023
                others.append(bare.seen[port] - began)
            if where == "catalog":
                body = {"Node": "bench"}
                request(node, "PUT", "/v1/catalog/deregister", json.dumps(body))
            bound = f"(bound {SEEN_SECONDS * 1000:g})"
            print(f"  {where:8} ours {spread(ours)} {bound}; bare blocking query {spread(others)}")
            is_kept = is_kept and percentile(ours, 99) <= SEEN_SECONDS
        request(node, "PUT", f"/v1/agent/service/deregister/{topic}")
    return is_kept


# -- many instances --------------------------------------------------------------------------------


def many(cluster: LocalCluster, n: int, rounds: int) -> bool:
    """A lookup of *n* instances, which DNS cannot carry, beside HTTP bare."""
    print(f"\na lookup of {n} instances, in turn with the bare request and `json.loads`")
    node, topic = cluster.nodes["agent1"], new_topic()
    for number in range(n):
        node_name = f"n{number % 100}"
        entry = {
            "Node": node_name,
            "Address": f"10.1.0.{number % 100}",
            "SkipNodeUpdate": number >= 100,
            "Service": {
                "ID": f"{topic}-{number}",
                "Service": topic,
                "Address": f"10.2.{number // 250}.{number % 250}",
                "Port": 8080,
                "Tags": ["blue"],
            },
        }
        request(node, "PUT", "/v1/catalog/register", json.dumps(entry))
    ours: list[float] = []
    bare: list[float] = []
    with Matchmaker.from_url(url_of(node, "watch=off&ttl_seconds=0")) as reader:
        connection = http.client.HTTPConnection(node.http)
        for _ in range(rounds):
            began = time.perf_counter()
            connection.request("GET", f"/v1/health/service/{topic}?passing")
            json.loads(connection.getresponse().read())
            bare.append(time.perf_counter() - began)
            began = time.perf_counter()
            found = reader._resolver.lookup(topic, timeout_seconds=10)
            ours.append(time.perf_counter() - began)
            assert len(found) == n and found.is_complete
        connection.close()
    for number in range(100):
        request(node, "PUT", "/v1/catalog/deregister", json.dumps({"Node": f"n{number}"}))
    ratio = statistics.median(ours) / statistics.median(bare)
    milliseconds = statistics.median(bare) * 1000
    print(f"  complete in one answer; bare {milliseconds:.0f} ms, ours {ratio:.2f} x")
    return ratio <= BARE


# -- against what users do -------------------------------------------------------------------------


class EachTime:
    """python-consul2's `health.service`, asked at each call."""

    def __init__(self, address: str) -> None:
        host, _, port = address.rpartition(":")
        self._consul = consul.Consul(host, int(port))

    def hosts(self, topic: str) -> set[str]:
        _, entries = self._consul.health.service(topic, passing=True)
        return {f"{each['Service']['Address']}:{each['Service']['Port']}" for each in entries}


class ByHand(EachTime):
    """The same with a dict in front: as long as five seconds have not passed, what it has."""

    TTL_SECONDS = 5.0

    def __init__(self, address: str) -> None:
        super().__init__(address)
        self._kept: dict[str, tuple[float, set[str]]] = {}

    def hosts(self, topic: str) -> set[str]:
        kept = self._kept.get(topic)
        if kept is None or time.monotonic() - kept[0] > self.TTL_SECONDS:
            kept = self._kept[topic] = time.monotonic(), super().hosts(topic)
        return kept[1]


class Ours:
    def __init__(self, address: str) -> None:
        self.matchmaker = Matchmaker.from_url(f"consul+service://{address}")

    def hosts(self, topic: str) -> set[str]:
        return set(map(str, self.matchmaker.hosts(topic)))


def users(cluster: LocalCluster, n: int) -> bool:
    """Time per lookup, seconds until a killed host is gone, requests/s at the agent: three ways."""
    print(f"\na program that looks up 100 times a second; {n} of its hosts are killed, one by one")
    node, topic = cluster.nodes["agent1"], new_topic()
    rows: dict[str, tuple[float, float, float]] = {}
    ways: tuple[tuple[str, Callable[[str], Any]], ...] = (
        ("python-consul2", EachTime),
        ("a dict in front", ByHand),
        ("ours", Ours),
    )
    for name, make in ways:
        with ExitStack() as stack:
            relay = stack.enter_context(CountingRelay(node.http))
            processes = [
                stack.enter_context(RegisteringProcess(url_of(node))) for _ in range(n + 1)
            ]
            for port, process in enumerate(processes, 9001):
                process.register(topic, f"10.0.0.1:{port}")
            reader = make(relay.address)
            if isinstance(reader, Ours):
                stack.enter_context(reader.matchmaker)
            reader.hosts(topic)
            lookups: list[float] = []
            gone: list[float] = []
            before, began = relay.requests, time.monotonic()
            for port, process in enumerate(processes[:-1], 9001):
                time.sleep(1)
                process.kill()
                killed = time.monotonic()
                while f"10.0.0.1:{port}" in _timed(reader, topic, lookups):
                    time.sleep(0.01)
                gone.append(time.monotonic() - killed)
            rate = (relay.requests - before) / (time.monotonic() - began)
        rows[name] = statistics.median(lookups), statistics.median(gone), rate
        print(
            f"  {name:16} {rows[name][0] * 1e6:8.1f} us a lookup, a killed host is gone after "
            f"{rows[name][1]:5.2f} s, {rate:6.1f} requests/s"
        )
    each, hand, ours = rows.values()
    print(
        f"  ours: {each[0] / ours[0]:.0f} x faster than asking each time, with "
        f"{ours[2] / each[2]:.3f} of its requests;"
    )
    print(f"  a killed host is gone {hand[1] - ours[1]:.1f} s sooner than by hand")
    return ours[0] < each[0] / 10 and ours[1] <= CHECK_TTL + 1


def _timed(reader: Any, topic: str, lookups: list[float]) -> Any:
    began = time.perf_counter()
    found = reader.hosts(topic)
    lookups.append(time.perf_counter() - began)
    return found


def parts(arguments: argparse.Namespace) -> Iterator[tuple[str, Callable[[LocalCluster], bool]]]:
    yield "rest", lambda cluster: rest(cluster, 100, arguments.seconds)
    yield "seen", lambda cluster: seen(cluster, 200)
    yield "many", lambda cluster: many(cluster, arguments.instances, 20)
    yield "users", lambda cluster: users(cluster, 5)


def main(argv: Sequence[str]) -> int:
    """Run the parts that are named, else all; exit 1 when a bound was missed."""
    parser = argparse.ArgumentParser(prog="integration.bench service", description=__doc__)
    parser.add_argument("parts", nargs="*", metavar="PART", help="rest, seen, many, users")
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--instances", type=int, default=3_000)
    arguments = parser.parse_args(argv)
    missed = []
    # Coordinates write to Raft by themselves, a few times a minute, as gossip has them change.
    with LocalCluster(servers=3, clients=1, config={"disable_coordinates": True}) as cluster:
        for name, run in parts(arguments):
            if (not arguments.parts or name in arguments.parts) and not run(cluster):
                missed.append(name)
    print(f"\nmissed: {', '.join(missed)}" if missed else "\nevery bound was kept")
    return 1 if missed else 0
