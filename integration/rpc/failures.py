"""What calls and casts meet while something fails: one fault at a time, under constant load.

    python -m integration.rpc.failures [--case NAME ...] [--transport consul|rabbitmq]

Three processes serve, and a client calls from eight threads and casts from two.  A row a case says
how many failed and why, how many were lost (taken from the client, recorded by no server), came
twice, or took long.  Exits 1 when a call that was answered was lost.
"""

from __future__ import annotations

import argparse
import tempfile
import time
import uuid
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from consul_matchmaker.errors import MatchmakerError
from integration.rpc import firewall
from integration.rpc.client_process import ClientProcess
from integration.rpc.rabbitmq import NoRabbitMQ, RabbitMQ
from integration.rpc.record import Record
from integration.rpc.service_process import ServiceProcess
from integration.rpc.transports import Brokerless, Transport

SERVERS = 3
CALL_THREADS, CAST_THREADS = 8, 2
PAUSE_SECONDS = 0.05  # between two messages of a thread: 200 a second, which either serves easily
TIMEOUT_SECONDS = 5.0
SLOW_SECONDS = 0.5
BEFORE_SECONDS = 6.0
"""Of load before the fault."""
LOAD_SECONDS = 20.0
HANG_SECONDS = 10.0
AWAY_SECONDS = 60.0
DRAIN_SECONDS = 30.0


class Stage:
    """A transport whose servers run, and which can have its parts taken away; a context manager."""

    transport: Transport

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.topic = f"failures-{uuid.uuid4().hex[:8]}"
        self.record = Record(folder / "record")
        self.services: list[ServiceProcess] = []
        self._open = ExitStack()

    def __enter__(self) -> Stage:
        with ExitStack() as stack:
            self._log = stack.enter_context((self._folder / "log").open("w"))
            self._open_transport(stack)
            self._services = stack.enter_context(ExitStack())
            self.services = [self.serve(f"server{number}") for number in range(SERVERS)]
            self.client = stack.enter_context(ClientProcess(self.transport, self._log))
            self._open = stack.pop_all()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._open.close()

    def serve(self, name: str) -> ServiceProcess:
        """Start one more, and return it once it serves."""
        service = ServiceProcess(
            self.transport, self.topic, name, record=self.record.path, log=self._log
        )
        self._services.enter_context(service).wait_ready()
        return service

    def _open_transport(self, stack: ExitStack) -> None:
        raise NotImplementedError


class ConsulStage(Stage):
    def _open_transport(self, stack: ExitStack) -> None:
        brokerless = stack.enter_context(Brokerless(self._folder / "brokerless"))
        self.cluster, self.transport = brokerless.cluster, brokerless.transport()


class RabbitStage(Stage):
    def _open_transport(self, stack: ExitStack) -> None:
        self.node = stack.enter_context(RabbitMQ(self._folder / "node"))
        self.transport = Transport("RabbitMQ", self.node.url)


# --- faults of the servers ------------------------------------------------------------------------


def server_killed(stage: Stage) -> None:
    stage.services[0].kill()


def server_hangs(stage: Stage) -> None:
    stage.services[0].pause()
    time.sleep(HANG_SECONDS)
    stage.services[0].resume()


def server_cut_off(stage: Stage) -> None:
    """From clients, and from Consul or the broker as far as it was connected."""
    with firewall.dropped(firewall.sockets(stage.services[0].pid)):
        time.sleep(HANG_SECONDS)


def server_unreachable(stage: Stage) -> None:
    """From clients; it does reach Consul, which takes it for healthy."""
    listening = [each for each in firewall.sockets(stage.services[0].pid) if each.is_listening]
    with firewall.dropped(listening):
        time.sleep(HANG_SECONDS)


def rolling_restart(stage: Stage) -> None:
    for service in stage.services:
        status = service.stop()
        if status != 0:
            raise RuntimeError(f"{service.name} ended with {status} at SIGTERM")
        stage.serve(service.name)


# --- faults of Consul -----------------------------------------------------------------------------


def agent_killed(stage: ConsulStage) -> None:
    stage.cluster.kill("agent1")
    time.sleep(HANG_SECONDS)
    stage.cluster.start("agent1")


def leader_killed(stage: ConsulStage) -> None:
    leader = stage.cluster.leader()
    stage.cluster.kill(leader)
    time.sleep(HANG_SECONDS)
    stage.cluster.start(leader)


def consul_killed(stage: ConsulStage) -> None:
    for name in stage.cluster.nodes:
        stage.cluster.kill(name)
    time.sleep(AWAY_SECONDS)
    for name in stage.cluster.nodes:
        stage.cluster.start(name)
    stage.cluster.wait_ready()


def consul_hangs(stage: ConsulStage) -> None:
    for name in stage.cluster.nodes:
        stage.cluster.pause(name)
    time.sleep(AWAY_SECONDS)
    for name in stage.cluster.nodes:
        stage.cluster.resume(name)
    stage.cluster.wait_ready()


# --- faults of RabbitMQ ---------------------------------------------------------------------------


def broker_restarted(stage: RabbitStage) -> None:
    stage.node.kill()
    stage.node.start()


def broker_killed(stage: RabbitStage) -> None:
    stage.node.kill()
    time.sleep(AWAY_SECONDS)
    stage.node.start()


def broker_hangs(stage: RabbitStage) -> None:
    stage.node.pause()
    time.sleep(HANG_SECONDS)
    stage.node.resume()


@dataclass(frozen=True)
class Case:
    """One fault, on one kind of transport, and how long the load takes around it."""

    fault: Callable[[Any], None]
    seconds: float = LOAD_SECONDS

    @property
    def name(self) -> str:
        return self.fault.__name__.replace("_", "-")


LONG = AWAY_SECONDS + LOAD_SECONDS
OF_SERVERS = (
    Case(server_killed),
    Case(server_hangs),
    Case(server_cut_off),
    Case(rolling_restart),
)
CUTTING = (server_cut_off, server_unreachable)
CASES: dict[str, tuple[type[Stage], tuple[Case, ...]]] = {
    "consul": (
        ConsulStage,
        (
            *OF_SERVERS,
            Case(server_unreachable),
            Case(agent_killed),
            Case(leader_killed),
            Case(consul_killed, LONG),
            Case(consul_hangs, LONG),
        ),
    ),
    "rabbitmq": (
        RabbitStage,
        (*OF_SERVERS, Case(broker_restarted), Case(broker_hangs), Case(broker_killed, LONG)),
    ),
}


# --- what came of it ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Message:
    """One call or cast, as its client saw it."""

    number: int
    is_call: bool
    began: float
    seconds: float
    error: str
    """The class of the exception; empty where there was none."""

    @property
    def is_undisturbed(self) -> bool:
        return not self.error and self.seconds <= SLOW_SECONDS


@dataclass(frozen=True)
class Outcome:
    """Of all calls, or of all casts, of one case."""

    sent: int
    errors: Counter[str]
    done_all_the_same: int
    """Failed for the client, and recorded."""
    lost: int
    twice: int
    slow: int
    slowest_seconds: float

    @classmethod
    def of(cls, messages: list[Message], recorded: Counter[int]) -> Outcome:
        failed = [each for each in messages if each.error]
        return cls(
            len(messages),
            Counter(each.error for each in failed),
            sum(each.number in recorded for each in failed),
            sum(each.number not in recorded for each in messages if not each.error),
            sum(recorded[each.number] > 1 for each in messages),
            sum(each.seconds > SLOW_SECONDS for each in messages),
            max((each.seconds for each in messages), default=0.0),
        )

    def __str__(self) -> str:
        causes = ", ".join(f"{count} {name}" for name, count in sorted(self.errors.items()))
        failed = f"{self.errors.total():6}{self.done_all_the_same:6}"
        return (
            f"{self.sent:7}{failed}{self.lost:6}{self.twice:7}{self.slow:7}"
            f"{self.slowest_seconds:9.2f}  {causes}"
        ).rstrip()


HEADER = (
    f"{'':10}{'case':20}{'':7}{'sent':>7}{'failed':>6}{'done':>6}{'lost':>6}{'twice':>7}"
    f"{'slow':>7}{'slowest':>9}  errors"
)


def run(kind: type[Stage], case: Case, name: str) -> bool:
    """Print the rows of a case; whether every call that was answered was recorded once."""
    with tempfile.TemporaryDirectory() as folder, kind(Path(folder)) as stage:
        words = {"call_threads": CALL_THREADS, "cast_threads": CAST_THREADS}
        stage.client.tell(
            "load",
            topic=stage.topic,
            seconds=case.seconds,
            pause=PAUSE_SECONDS,
            timeout=TIMEOUT_SECONDS,
            **words,
        )
        time.sleep(BEFORE_SECONDS)
        fault_at = time.monotonic()
        case.fault(stage)
        messages = [Message(*each) for each in stage.client.answer()]
        taken = {each.number for each in messages if not each.error}
        deadline = time.monotonic() + DRAIN_SECONDS
        while taken - set(stage.record.counts()) and time.monotonic() < deadline:
            time.sleep(0.1)
        recorded = stage.record.counts()
    outcomes = {
        "calls": Outcome.of([each for each in messages if each.is_call], recorded),
        "casts": Outcome.of([each for each in messages if not each.is_call], recorded),
    }
    for what, outcome in outcomes.items():
        is_first = what == "calls"
        print(
            f"{name if is_first else '':10}{case.name if is_first else '':20}{what:7}{outcome}",
            flush=True,
        )
    disturbed = [each for each in messages if not each.is_undisturbed]
    if disturbed:
        since = min(each.began for each in disturbed) - fault_at
        until = max(each.began + each.seconds for each in disturbed) - fault_at
        print(f"{'':37}disturbed from {since:.1f} s to {until:.1f} s after the fault", flush=True)
    return not (outcomes["calls"].lost or outcomes["calls"].twice)


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m integration.rpc.failures", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--case", nargs="+", help="those of these names; --list names them")
    parser.add_argument("--transport", choices=CASES, help="cases of this one only")
    parser.add_argument("--list", action="store_true", help="name the cases and run none")
    options = parser.parse_args()
    chosen = [
        (name, kind, case)
        for name, (kind, cases) in CASES.items()
        for case in cases
        if options.transport in (None, name) and (not options.case or case.name in options.case)
    ]
    if options.list or not chosen:
        for name, _, case in chosen or [(n, k, c) for n, (k, cs) in CASES.items() for c in cs]:
            print(f"{name:10}{case.name}")
        return 0 if options.list else 2
    print(HEADER)
    bad = []
    try:
        for name, kind, case in chosen:
            if case.fault in CUTTING and not firewall.is_usable():
                print(f"{name:10}{case.name:20}left out: it needs iptables, and root")
            elif not run(kind, case, name):
                bad.append(f"{name} {case.name}")
    except (NoRabbitMQ, MatchmakerError) as error:
        print(error)
        return 2
    print(f"\nanswered, and lost or twice: {'; '.join(bad) or 'no call'}")
    return 1 if bad else 0


if __name__ == "__main__":
    raise SystemExit(main())
