"""How close to the wire our DNS lookup is, and how complete, beside what else there is.

All ways are measured in turn, round by round, in one run against one agent, so that a busy machine
slows all of them alike.  What counts are the ratios.
"""

from __future__ import annotations

import argparse
import socket
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import consul
import dns.message
import dns.resolver

from consul_matchmaker.backends.dns.resolver import DnsSrv
from consul_matchmaker.model import Host
from consul_matchmaker.settings import Settings
from consul_matchmaker.testing.consul_probe import Node
from consul_matchmaker.testing.local_consul import LocalCluster
from integration.catalog import METADATA, instances, register

HOSTS = (3, 10, 50, 200, 1_000, 2_000)
# The small ones more often: their times are near what a machine's other work adds.
ROUNDS = {3: 300, 10: 200, 50: 100, 200: 40, 1_000: 15, 2_000: 7}

BARE_UDP, BARE_TCP, OURS, DNSPYTHON, HTTP = (
    "bare UDP exchange",
    "bare TCP exchange",
    "consul-matchmaker, uncached",
    "dnspython's resolver",
    "python-consul2 health query",
)
TARGETS = (  # design, section 7: hosts, at most so many times, that, the one alone
    (3, 3.0, BARE_UDP),
    (200, 2.0, BARE_TCP),
    (1_000, 10.0, BARE_TCP),
)


@dataclass
class Measured:
    """One way to ask, for one topic: every time it took, and how many hosts it found last."""

    seconds: list[float] = field(default_factory=list)
    found: int | None = None

    @property
    def milliseconds(self) -> float:
        return statistics.median(self.seconds) * 1000


Results = dict[tuple[str, int, str], Measured]


def bare_udp(place: tuple[str, int], query: bytes) -> bytes:
    """What nobody can be faster than: a socket and the same bytes."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as udp:
        udp.settimeout(5)
        udp.connect(place)
        udp.send(query)
        return udp.recv(65_535)


def bare_tcp(place: tuple[str, int], query: bytes) -> bytes:
    with socket.create_connection(place, timeout=5) as tcp:
        tcp.sendall(len(query).to_bytes(2, "big") + query)
        with tcp.makefile("rb") as stream:
            return stream.read(int.from_bytes(stream.read(2), "big"))


def by_dnspython(resolver: dns.resolver.Resolver, name: str, tcp: bool) -> int:
    """Hosts by dnspython alone: its resolver, and the addresses of the additional section."""
    answer = resolver.resolve(name, "SRV", tcp=tcp)
    addresses: dict[object, list[str]] = {}
    for rrset in answer.response.additional:
        if rrset.rdtype in (1, 28):
            addresses.setdefault(rrset.name, []).extend(record.address for record in rrset)
    return len(
        {
            Host(address, record.port)
            for record in answer
            for address in addresses.get(record.target, ())
        }
    )


def by_http(client: consul.Consul, service: str) -> int:
    _, entries = client.health.service(service)
    return len(
        {
            Host(each["Service"]["Address"] or each["Node"]["Address"], each["Service"]["Port"])
            for each in entries
        }
    )


def ways(agent: Node, service: str, count: int) -> dict[str, Callable[[], int | None]]:
    """Every way to ask for *service*, each returning how many hosts it found, if it counts."""
    address, _, port = agent.dns.rpartition(":")
    place = address, int(port)
    http_address, _, http_port = agent.http.rpartition(":")
    name = f"_{service}._tcp.service.consul."
    ours = DnsSrv(Settings(mode="catalog", addresses=(Host(*place),)))
    query = dns.message.make_query(name, "SRV", payload=65_000).to_wire()
    resolver = dns.resolver.Resolver(configure=False)
    resolver.nameservers, resolver.port = [address], int(port)
    client = consul.Consul(http_address, int(http_port))

    def exchange(bare: Callable[[tuple[str, int], bytes], bytes]) -> None:
        bare(place, query)

    return {
        BARE_UDP: lambda: exchange(bare_udp),
        BARE_TCP: lambda: exchange(bare_tcp),
        OURS: lambda: len(ours.lookup(service)),
        # Its UDP answer would hold 3 hosts.
        DNSPYTHON: lambda: by_dnspython(resolver, name, tcp=count > 3),
        HTTP: lambda: by_http(client, service),
    }


def measure(agent: Node, forms: Sequence[str], hosts: Sequence[int], share: float) -> Results:
    results: Results = {}
    for form in forms:
        for count in hosts:
            service = f"{form}{count}"
            all_ways = ways(agent, service, count)
            for call in all_ways.values():  # the first one connects, and fills what may be filled
                call()
            for _ in range(max(3, round(ROUNDS[count] * share))):
                for way, call in all_ways.items():
                    measured = results.setdefault((form, count, way), Measured())
                    started = time.perf_counter()
                    measured.found = call()
                    measured.seconds.append(time.perf_counter() - started)
    return results


def report(results: Results, forms: Sequence[str], hosts: Sequence[int]) -> None:
    for form in forms:
        print(f"\n{FORMS[form]}: medians in milliseconds (hosts found)\n")
        header = "".join(f"{way:>29}" for way in (BARE_UDP, BARE_TCP, OURS, DNSPYTHON, HTTP))
        print(f"{'hosts':>6}{header}{'x UDP':>8}{'x TCP':>8}")
        for count in hosts:
            cells = ""
            for way in (BARE_UDP, BARE_TCP, OURS, DNSPYTHON, HTTP):
                measured = results[form, count, way]
                found = "" if measured.found is None else f" ({measured.found})"
                cells += f"{measured.milliseconds:.2f}{found}".rjust(29)
            ours = results[form, count, OURS].milliseconds
            for bare in (BARE_UDP, BARE_TCP):
                cells += f"{ours / results[form, count, bare].milliseconds:8.2f}"
            print(f"{count:6}{cells}")
    print("\nto reach (design, section 7)\n")
    for form in forms:
        for count, most, bare in TARGETS:
            if count in hosts:
                ratio = (
                    results[form, count, OURS].milliseconds
                    / results[form, count, bare].milliseconds
                )
                verdict = "reached" if ratio <= most else "MISSED"
                print(
                    f"  {FORMS[form]}, {count} hosts: {ratio:.2f} x {bare}, at most {most:g}: "
                    f"{verdict}"
                )
        missing = {n: results[form, n, OURS].found for n in hosts}
        complete = all(found == count for count, found in missing.items())
        print(f"  {FORMS[form]}, hosts found by us: {'all' if complete else missing}")


def plot(results: Results, forms: Sequence[str], hosts: Sequence[int], path: Path) -> None:
    import matplotlib  # an extra: only who plots needs it

    matplotlib.use("Agg")
    import matplotlib.pyplot as pyplot

    figure, panels = pyplot.subplots(
        1, len(forms), figsize=(6.4 * len(forms), 4.8), sharey=True, squeeze=False
    )
    styles = {
        BARE_UDP: ("#999999", ":", "."),
        BARE_TCP: ("#999999", "--", "."),
        OURS: ("#d6004c", "-", "o"),
        DNSPYTHON: ("#3572a5", "-", "s"),
        HTTP: ("#2e8b57", "-", "^"),
    }
    for panel, form in zip(panels[0], forms, strict=True):
        for way, (color, line, marker) in styles.items():
            times = [results[form, count, way].milliseconds for count in hosts]
            panel.plot(hosts, times, color=color, linestyle=line, marker=marker, label=way)
            for count, milliseconds in zip(hosts, times, strict=True):
                found = results[form, count, way].found
                if found is not None and found < count:
                    panel.annotate(
                        f"finds {found}",
                        (count, milliseconds),
                        xytext=(0, 7),
                        textcoords="offset points",
                        ha="center",
                        fontsize=8,
                        color=color,
                    )
        panel.set(xscale="log", yscale="log", xlabel="hosts of the topic", title=FORMS[form])
        panel.set_xticks(hosts, [f"{count:,}" for count in hosts])
        panel.minorticks_off()
        panel.grid(alpha=0.3)
    panels[0][0].set_ylabel("milliseconds for one lookup (median)")
    panels[0][0].legend(fontsize=9)
    figure.tight_layout()
    figure.savefig(path, dpi=150)


FORMS = {"ip": "service addresses", "node": "node names"}


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m integration.bench dns", description="A cluster of its own, on loopback."
    )
    parser.add_argument("--hosts", type=int, nargs="+", choices=HOSTS, default=list(HOSTS))
    parser.add_argument("--rounds", type=float, default=1.0, help="a factor on how often")
    parser.add_argument("--plot", type=Path, default=Path("dns-lookup.png"), metavar="PNG")
    options = parser.parse_args(arguments)
    with LocalCluster(servers=3, clients=1) as cluster:
        agent = cluster.nodes["agent1"]
        for form in FORMS:
            for count in options.hosts:
                made = instances(f"{form}{count}", count, by_node=form == "node")
                register(agent, made, metadata=METADATA)
        cluster.wait_ready()
        results = measure(agent, list(FORMS), options.hosts, options.rounds)
    report(results, list(FORMS), options.hosts)
    try:
        plot(results, list(FORMS), options.hosts, options.plot)
    except ImportError:
        print("\nno plot: install the extra `bench` (matplotlib)")
    else:
        print(f"\nplot: {options.plot}")
    return 0
