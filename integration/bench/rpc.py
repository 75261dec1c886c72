"""What RPC without a broker costs, beside RabbitMQ: the same program on either, by turns.

Clients and servers are processes of their own that use oslo.messaging's public interface.  Each
round measures one transport and then the other.  Absolute figures are this machine's; what counts
are the ratios, and that nothing is lost and nothing comes twice.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import statistics
import tempfile
import time
import urllib.request
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path

from consul_matchmaker import Matchmaker
from consul_matchmaker.errors import MatchmakerError
from consul_matchmaker.testing.consul_probe import Node
from integration.bench.kv import percentile
from integration.rpc.certificates import NoOpenssl
from integration.rpc.client_process import ClientProcess
from integration.rpc.rabbitmq import NoRabbitMQ
from integration.rpc.record import Record
from integration.rpc.service_process import ServiceProcess
from integration.rpc.transports import Brokerless, Transport, named

THREADS = (1, 8)
FANOUTS = (20, 200)
SERVERS_PER_PROCESS = 50
FANOUTS_PER_ROUND = 5
LISTENERS = 1_000
NUMBERED, NUMBERED_THREADS = 20_000, 8
LOG_TAIL_LINES = 5
DRAIN_SECONDS = 60.0
"""At most so long until all that was taken is recorded; longer is lost."""


class DoesNotServe(Exception):
    """The servers or the client did not start; the message has the end of their log."""


class Side:
    """One transport, with a client and with servers of one topic; a context manager."""

    def __init__(self, transport: Transport, folder: Path, servers: int = 1) -> None:
        self.name, self.topic = transport.name, f"bench-{uuid.uuid4().hex[:8]}"
        self.record = Record(folder / self.topic)
        self._transport, self._servers = transport, servers
        self._log = folder / f"{self.topic}.log"
        self.processes = -(-servers // SERVERS_PER_PROCESS)
        self._open = ExitStack()

    def __enter__(self) -> Side:
        with ExitStack() as stack:
            log = stack.enter_context(self._log.open("w"))
            services = []
            for first in range(0, self._servers, SERVERS_PER_PROCESS):
                count = min(SERVERS_PER_PROCESS, self._servers - first)
                service = ServiceProcess(
                    self._transport,
                    self.topic,
                    f"server{first}",
                    servers=count,
                    record=self.record.path,
                    log=log,
                )
                services.append(stack.enter_context(service))
            try:
                for service in services:
                    service.wait_ready()
                self.client = stack.enter_context(ClientProcess(self._transport, log))
                self.client.ask("calls", topic=self.topic, threads=1, seconds=0)  # it connects
            except RuntimeError as error:
                tail = self._log.read_text().splitlines()[-LOG_TAIL_LINES:]
                raise DoesNotServe("\n  ".join([f"{self.name}: {error}", *tail])) from None
            self._open = stack.pop_all()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._open.close()


Rows = dict[str, dict[str, list[float]]]
"""Figures by what is measured and by side, one a round."""


def note(rows: Rows, what: str, side: Side, figure: float) -> None:
    rows.setdefault(what, {}).setdefault(side.name, []).append(figure)


def print_rows(rows: Rows) -> None:
    """The least and the most of the rounds, and how many times better the second side is."""
    names = [*next(iter(rows.values()))]
    print(f"{'':46}{names[0]:>19}{names[1]:>19}{'ratio':>9}")
    for what, by_side in rows.items():
        one, other = by_side.values()
        medians = statistics.median(one), statistics.median(other)
        better = medians[1] / medians[0] if what.endswith("/s") else medians[0] / medians[1]
        print(f"  {what:44}{_range(one):>19}{_range(other):>19}{better:9.2f}")


def _range(figures: Sequence[float]) -> str:
    low, high = (f"{each:,.0f}" if each >= 100 else f"{each:.1f}" for each in _ends(figures))
    return f"{low} - {high}"


def _ends(figures: Sequence[float]) -> tuple[float, float]:
    return min(figures), max(figures)


Sides = Sequence[Transport]


@contextlib.contextmanager
def opened(transports: Sides, servers: int = 1) -> Iterator[list[Side]]:
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        yield [stack.enter_context(Side(each, folder, servers)) for each in transports]


def calls(transports: Sides, rounds: int, seconds: float) -> bool:
    """Echoes of 250 characters by one client process, with one thread and with several."""
    rows: Rows = {}
    with opened(transports) as sides:
        for threads in THREADS:
            of = f"{threads} thread{'s' if threads > 1 else ''}"
            for _ in range(rounds):
                for side in sides:
                    made = side.client.ask(
                        "calls", topic=side.topic, threads=threads, seconds=seconds
                    )
                    took = made["took"]
                    note(rows, f"{of}: calls/s", side, len(took) / made["seconds"])
                    note(rows, f"{of}: p99, ms", side, percentile(took, 99) * 1000)
    print_rows(rows)
    return True


def casts(transports: Sides, rounds: int, seconds: float) -> bool:
    """Casts of one thread: taken from it, and recorded by the server."""
    rows: Rows = {}
    is_complete = True
    with opened(transports) as sides:
        for _ in range(rounds):
            for side in sides:
                before = len(side.record.entries)
                made = side.client.ask("casts", topic=side.topic, first=before, seconds=seconds)
                if not side.record.wait_for(before + made["count"], DRAIN_SECONDS):
                    missing = before + made["count"] - len(side.record.entries)
                    print(f"  {side.name}: {missing} of {made['count']} casts were not recorded")
                    is_complete = False
                new = side.record.entries[before:]
                took = max((entry.at for entry in new), default=time.monotonic()) - made["began"]
                note(rows, "casts taken/s", side, made["count"] / made["seconds"])
                note(rows, "casts recorded/s", side, len(new) / took)
    print_rows(rows)
    return is_complete


def fanout(transports: Sides, rounds: int, servers: int) -> bool:
    """One cast to all servers of a topic: until each has recorded it, and until it returns."""
    rows: Rows = {}
    is_complete = True
    with opened(transports, servers) as sides:
        for _ in range(rounds):
            for side in sides:
                reached, returned = [], []
                for _ in range(FANOUTS_PER_ROUND):
                    before = len(side.record.entries)
                    made = side.client.ask("fanout", topic=side.topic, number=before)
                    side.record.wait_for(before + servers, DRAIN_SECONDS)
                    new = side.record.read()[before:]
                    who = {entry.server for entry in new}
                    if (len(who), len(new)) != (servers, servers):
                        print(f"  {side.name}: {len(who)} of {servers} got it, {len(new)} times")
                        is_complete = False
                    last = max((entry.at for entry in new), default=time.monotonic())
                    reached.append(last - made["began"])
                    returned.append(made["seconds"])
                to = f"fanout to {servers}:"
                note(rows, f"{to} all have it, ms", side, statistics.median(reached) * 1000)
                note(rows, f"{to} the cast returns, ms", side, statistics.median(returned) * 1000)
    print_rows(rows)
    return is_complete


def numbered(transports: Sides, count: int) -> bool:
    """Numbered calls and casts, half and half, of eight threads: nothing is lost or comes twice."""
    is_complete = True
    with opened(transports) as sides:
        for side in sides:
            made = side.client.ask(
                "numbered", topic=side.topic, count=count, threads=NUMBERED_THREADS
            )
            failed = {number for number, _ in made["failed"]}
            side.record.wait_for(count - len(failed), DRAIN_SECONDS)
            time.sleep(1)  # what comes twice may come late
            counts = side.record.counts()
            lost = sum(number not in counts for number in set(range(count)) - failed)
            twice = sum(times > 1 for times in counts.values())
            print(
                f"  {side.name:12} {count:,} in {made['seconds']:.1f} s: "
                f"{len(failed)} failed, {lost} lost, {twice} twice"
            )
            is_complete = is_complete and not (failed or lost or twice)
    return is_complete


def listeners(count: int, seconds: float, check_ttl_seconds: float) -> bool:
    """*count* listeners of one topic on this machine, of several processes: what they cost Consul,
    what a client's first lookup and its next ones take, and a fanout to all."""
    is_complete = True
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        brokerless = stack.enter_context(Brokerless(folder / "consul"))
        began = time.monotonic()
        transport = brokerless.transport(query=f"?check_ttl_seconds={check_ttl_seconds:g}")
        side = stack.enter_context(Side(transport, folder, count))
        print(
            f"  {count:,} listeners of {side.processes} processes: {time.monotonic() - began:.0f} s"
        )
        agent = brokerless.cluster.nodes["agent1"]
        print(f"  requests/s at their agent: {requests_per_second(agent, seconds):,.0f}")
        from consul_matchmaker.adapters.oslo.http.names import service_of

        service = service_of("openstack", side.topic)
        with Matchmaker.from_url(f"consul+service://{agent.http}") as matchmaker:
            first = timed(lambda: matchmaker.hosts(service))
            found = matchmaker.hosts(service)
            instances, hosts = len(found.instances), len(found)
            again = timed(lambda: [matchmaker.hosts(service) for _ in range(1000)]) / 1000
        print(f"  a lookup: {instances:,} of {hosts} hosts; first {first * 1000:.1f} ms")
        print(f"  from memory {again * 1e6:.1f} us")
        is_complete = instances == count
        for _ in range(FANOUTS_PER_ROUND):
            before = len(side.record.entries)
            made = side.client.ask("fanout", topic=side.topic, number=before)
            side.record.wait_for(before + count, DRAIN_SECONDS)
            new = side.record.read()[before:]
            who = {entry.server for entry in new}
            is_complete = is_complete and (len(who), len(new)) == (count, count)
            last = max((entry.at for entry in new), default=time.monotonic()) - made["began"]
            print(
                f"  fanout: {len(who):,} have it, {len(new):,} times, after {last * 1000:.0f} ms; "
                f"the cast returns after {made['seconds'] * 1000:.0f} ms"
            )
    return is_complete


def requests_per_second(agent: Node, seconds: float) -> float:
    """What *agent* answered, by its own count, which it keeps in intervals of 10 s."""
    time.sleep(max(seconds, 12.0))
    with urllib.request.urlopen(f"http://{agent.http}/v1/agent/metrics", timeout=10) as answer:
        samples = json.load(answer)["Samples"]
    http = [each for each in samples if ".http." in each["Name"]]
    return float(sum(each["Count"] for each in http)) / 10


def timed(function: Callable[[], object]) -> float:
    began = time.monotonic()
    function()
    return time.monotonic() - began


def parts(arguments: argparse.Namespace) -> dict[str, Callable[[Sides], bool]]:
    rounds, seconds = arguments.rounds, arguments.seconds
    return {
        "calls": lambda transports: calls(transports, rounds, seconds),
        "casts": lambda transports: casts(transports, rounds, seconds),
        **{
            f"fanout{n}": lambda transports, n=n: fanout(transports, rounds, n)  # type: ignore[misc]
            for n in FANOUTS
        },
        "numbered": lambda transports: numbered(transports, arguments.count),
    }


def main(argv: Sequence[str]) -> int:
    """Run the parts that are named, else all; exit 1 when anything was lost or came twice."""
    parser = argparse.ArgumentParser(prog="integration.bench rpc", description=__doc__)
    parser.add_argument(
        "parts",
        nargs="*",
        metavar="PART",
        help="calls, casts, fanout20, fanout200, numbered; or listeners, without RabbitMQ",
    )
    parser.add_argument("--listeners", type=int, default=LISTENERS)
    parser.add_argument(
        "--check-ttl-seconds", type=float, default=15, help="of each of the listeners"
    )
    parser.add_argument(
        "--other", default="consul", help="beside RabbitMQ: consul, rabbitmq or a URL"
    )
    parser.add_argument("--tls", choices=("no", "yes", "both"), default="both")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=3.0, help="of each measurement")
    parser.add_argument("--count", type=int, default=NUMBERED, help="of the numbered part")
    arguments = parser.parse_args(argv)
    if importlib.util.find_spec("oslo_messaging") is None:
        print("needs oslo.messaging: pip install oslo.messaging")
        return 2
    if arguments.parts == ["listeners"]:
        is_complete = listeners(arguments.listeners, arguments.seconds, arguments.check_ttl_seconds)
        return 0 if is_complete else 1
    runs = parts(arguments)
    if unknown := set(arguments.parts) - set(runs):
        parser.error(f"no part is named {', '.join(sorted(unknown))}")
    failed = []
    try:
        with named("rabbitmq") as one, named(arguments.other) as other:
            for with_tls in {"no": (False,), "yes": (True,), "both": (False, True)}[arguments.tls]:
                if with_tls not in other:
                    print(f"\nnot with TLS: {arguments.other} has one transport only")
                    continue
                for name, run in runs.items():
                    if arguments.parts and name not in arguments.parts:
                        continue
                    print(f"\n{name}, {'with' if with_tls else 'without'} TLS")
                    pair = [one[with_tls], _renamed(other[with_tls], one[with_tls])]
                    if not run(pair):
                        failed.append(f"{name} {'with' if with_tls else 'without'} TLS")
    except (NoRabbitMQ, NoOpenssl, MatchmakerError, DoesNotServe) as error:
        print(error)
        return 2
    print(f"\nnot complete: {'; '.join(failed)}" if failed else "\nnothing was lost or came twice")
    return 1 if failed else 0


def _renamed(transport: Transport, beside: Transport) -> Transport:
    """So that RabbitMQ can be measured beside itself."""
    if transport.name != beside.name:
        return transport
    return Transport(f"{transport.name} too", transport.url, transport.config_file)
