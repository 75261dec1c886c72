"""What a fleet of readers and registrations costs its agents and the leader, while hosts change.

The readers ask one agent and the registrations another, through relays that count what is sent and
received.  With ``--before`` the same fleet runs with the package of another checkout first.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import time
import uuid
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from consul_matchmaker.testing.consul_probe import Node, read_json
from consul_matchmaker.testing.local_consul import LocalCluster
from integration.bench.outside import CountingRelay, Process, pid_of, raft_index
from integration.fleet_process import FleetProcess

NOW = Path(__file__).resolve().parents[2]
TOPICS = 200
SETTLE_SECONDS = 15.0
METRICS_SECONDS = 10.0  # the intervals in which Consul counts
READERS, REGISTRATIONS = "readers' agent", "registrations' agent"
AGENTS = {READERS: "agent1", REGISTRATIONS: "agent2"}

Relays = Mapping[str, CountingRelay]
Costs = dict[str, float]
"""By what is printed; a second, or a share of a processor."""


class Fleet:
    """Readers and registrations in a few processes, with the package of *checkout*."""

    def __init__(self, relays: Relays, checkout: Path, processes: int, query: str) -> None:
        prefix = f"fleet-{uuid.uuid4().hex[:8]}?{query}"
        self._stack = contextlib.ExitStack()
        self._reading, self._registering = (
            [
                self._stack.enter_context(
                    FleetProcess(f"consul+kv://{relays[agent].address}/{prefix}", checkout)
                )
                for _ in range(processes)
            ]
            for agent in (READERS, REGISTRATIONS)
        )
        self._present: list[tuple[FleetProcess, str, str]] = []
        self._gone: list[tuple[FleetProcess, str, str]] = []
        self._count = 0
        self._asked: list[str] = []

    def __enter__(self) -> Fleet:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._stack.close()

    def start(self, readers: int, in_use: int, registrations: int) -> None:
        for number in range(registrations):
            owner = self._registering[number % len(self._registering)]
            self._register(owner, f"topic{number % TOPICS}")
        for owner in self._registering:
            owner.said()  # all is published
        for number in range(readers):
            first = number * in_use
            topics = [f"topic{(first + each) % TOPICS}" for each in range(in_use)]
            self._reading[number % len(self._reading)].tell("read", *topics)
            self._asked += topics
        self.wire()

    def change(self) -> None:
        """A registration goes, or another one of its topic comes, by turns: one write of a key."""
        if self._gone:
            owner, topic, _ = self._gone.pop()
            self._register(owner, topic)
        else:
            gone = self._present.pop(random.randrange(len(self._present)))
            gone[0].tell("withdraw", *gone[1:])
            self._gone.append(gone)

    def _register(self, owner: FleetProcess, topic: str) -> None:
        self._count += 1
        host = f"10.{self._count >> 16}.{self._count >> 8 & 255}.{self._count & 255}:9501"
        owner.tell("register", topic, host)
        self._present.append((owner, topic, host))

    def wire(self) -> Counter[str]:
        """What the readers' own counters say."""
        return sum((Counter(each.said()["wire"]) for each in self._reading), Counter())

    def cpu_seconds(self) -> float:
        """What the readers' processes have used."""
        return sum(Process.look(each.pid).cpu_seconds for each in self._reading)

    def verdict(self) -> str:
        """Whether the readers know what is registered."""
        said = [each.said() for each in self._reading]
        true = Counter(topic for _, topic, _ in self._present)
        known, all_of_them = (
            sum(each["hosts"] for each in said),
            sum(true[each] for each in self._asked),
        )
        failures = sum(each["failures"] for each in said)
        return f"the readers know {known} hosts of {all_of_them}, {failures} lookups failed"


class LeaderRequests:
    """How many RPCs a second the leader has counted, by whole intervals of its own."""

    def __init__(self, leader: Node) -> None:
        self._leader = leader
        self._counts: dict[str, int] = {}
        self.look()
        self._before = set(self._counts)

    def look(self) -> None:
        metrics = read_json(self._leader, "/v1/agent/metrics")
        counters = {each["Name"]: each["Count"] for each in metrics["Counters"]}
        self._counts[metrics["Timestamp"]] = counters.get("consul.rpc.request", 0)

    @property
    def per_second(self) -> float:
        counted = [count for at, count in self._counts.items() if at not in self._before][1:]
        return sum(counted) / len(counted) / METRICS_SECONDS


def phase(
    cluster: LocalCluster, relays: Relays, fleet: Fleet, rate: float, seconds: float
) -> Costs:
    """What all of it costs while *rate* keys change a second."""
    leader = cluster.leader()
    pids = {what: pid_of(cluster, name) for what, name in AGENTS.items()}
    pids["leader"] = pid_of(cluster, leader)
    rpcs, entries = LeaderRequests(cluster.nodes[leader]), raft_index(cluster)
    counts = {agent: relay.counts for agent, relay in relays.items()}
    wire, cpu = fleet.wire(), fleet.cpu_seconds()
    before = {what: Process.look(pid) for what, pid in pids.items()}
    began, changes = time.monotonic(), 0
    while (passed := time.monotonic() - began) < seconds:
        while changes < passed * rate:
            fleet.change()
            changes += 1
        rpcs.look()
        time.sleep(min(1.0, 0.5 / rate if rate else 1.0))
    used = {what: Process.look(pid) - before[what] for what, pid in pids.items()}
    costs: Costs = {}
    for agent, relay in relays.items():
        moved = [now - then for now, then in zip(relay.counts, counts[agent], strict=True)]
        costs[f"{agent}: requests/s"] = moved[0] / passed
        costs[f"{agent}: kB/s in"] = moved[1] / passed / 1000
        costs[f"{agent}: kB/s out"] = moved[2] / passed / 1000
        costs[f"{agent}: % of a processor"] = used[agent].cpu_seconds / passed * 100
        costs[f"{agent}: MB of memory"] = Process.look(pids[agent]).memory_bytes / 1e6
        costs[f"{agent}: connections"] = relay.connections
    costs["leader: requests/s"] = rpcs.per_second
    costs["leader: kB/s in"] = used["leader"].read_bytes / passed / 1000
    costs["leader: kB/s out"] = used["leader"].written_bytes / passed / 1000
    costs["leader: % of a processor"] = used["leader"].cpu_seconds / passed * 100
    costs["leader: MB of memory"] = Process.look(pids["leader"]).memory_bytes / 1e6
    costs["leader: Raft entries/s"] = (raft_index(cluster) - entries) / passed
    wire_now = fleet.wire()
    costs["readers' status()['wire']: queries/s"] = (wire_now - wire)["queries"] / passed
    costs["readers' status()['wire']: kB/s out"] = (wire_now - wire)["sent_bytes"] / passed / 1000
    received = (wire_now - wire)["received_bytes"]
    costs["readers' status()['wire']: kB/s in"] = received / passed / 1000
    costs["readers: % of a processor, all"] = (fleet.cpu_seconds() - cpu) / passed * 100
    return costs


def run(
    cluster: LocalCluster, options: argparse.Namespace, checkout: Path, readers: int
) -> dict[float, Costs]:
    """The costs at each rate."""
    found: dict[float, Costs] = {}
    with contextlib.ExitStack() as stack:
        relays = {
            what: stack.enter_context(CountingRelay(cluster.nodes[name].http))
            for what, name in AGENTS.items()
        }
        fleet = stack.enter_context(Fleet(relays, checkout, options.processes, options.query))
        fleet.start(readers, options.in_use, options.registrations)
        for rate in options.rates:
            time.sleep(SETTLE_SECONDS)
            found[rate] = phase(cluster, relays, fleet, rate, options.seconds)
            time.sleep(SETTLE_SECONDS)
            load = ", ".join(f"{each:.1f}" for each in os.getloadavg()[:2])
            print(f"{checkout}: {rate:g}/s: {fleet.verdict()}; load {load}", flush=True)
    return found


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m integration.bench fleet", description=__doc__)
    parser.add_argument("--readers", type=int, default=200)
    parser.add_argument("--registrations", type=int, default=2_000)
    parser.add_argument("--in-use", type=int, default=3, help="topics in use of each reader")
    parser.add_argument("--query", default="", help="settings, as after the ? of a URL")
    parser.add_argument("--processes", type=int, default=4, help="of readers, and of registrations")
    parser.add_argument("--seconds", type=float, default=60.0, help="of each rate; 30 at least")
    parser.add_argument("--rates", default="0,1,10", help="keys that change a second")
    parser.add_argument("--before", type=Path, help="a checkout with the package to compare with")
    parser.add_argument("--before-readers", type=int, help="fewer, where the machine needs it")
    options = parser.parse_args(arguments)
    options.rates = [float(rate) for rate in options.rates.split(",")]
    columns = [(NOW, options.readers)]
    if options.before:
        columns.insert(0, (options.before, options.before_readers or options.readers))
    limits = {"http_max_conns_per_client": 10_000}  # all come from one address here
    with LocalCluster(clients=2, config={"limits": limits}) as cluster:
        found = [run(cluster, options, checkout, readers) for checkout, readers in columns]
    for rate in options.rates:
        print(f"\n{options.registrations} registrations, {rate:g} keys change a second; readers:")
        print("".join(f"{text:>12}" for text in [f"{'':40}", *(str(n) for _, n in columns)]))
        for what in found[0][rate]:
            values = [costs[rate][what] for costs in found]
            text = f"{what:40}" + "".join(f"{value:12.2f}" for value in values)
            if len(values) == 2 and values[1]:
                text += f"{values[0] / values[1]:10.1f} x"
            print(text)
    return 0
