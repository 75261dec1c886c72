"""Carries out the schedule: what is done to members, to nodes and to what is written in Consul."""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections.abc import Callable, Sequence
from typing import ClassVar

from consul_matchmaker.backends.kv.keys import Key
from consul_matchmaker.testing.consul_probe import Node, NotReady, request
from consul_matchmaker.testing.local_consul import ClusterError
from integration.cluster import Cluster, DockerCluster, join_again, keys, tell

from .bounds import LATE_INVALIDATIONS, MACHINE_SECONDS
from .ledger import Ledger
from .members import Member
from .schedule import SERVICES, Event

Note = Callable[[str], None]
CATALOG_PORT = 9000
WRITE_ATTEMPTS = 5
RESUMED_SECONDS = 1.0
"""From the first frozen server that goes on to the last: two signals, or two docker commands."""


class Hand(threading.Thread):
    """Carries out some of the events, each at its time or as soon as the one before is done."""

    def __init__(
        self,
        name: str,
        events: Sequence[Event],
        began_at: float,
        carry_out: Callable[[Event], None],
        failures: list[str],
        stopping: threading.Event,
    ) -> None:
        super().__init__(name=name, daemon=True)
        self._events = events
        self._began_at = began_at
        self._carry_out = carry_out
        self._failures = failures
        self._stopping = stopping
        self.done: list[str] = []
        """The names of the events that were carried out."""

    def run(self) -> None:
        for event in self._events:
            if self._stopping.wait(max(0.0, self._began_at + event.at - time.monotonic())):
                return
            try:
                self._carry_out(event)
            except Exception as error:  # the soak goes on, and says so at its end
                self._failures.append(f"{event.kind} {event.target}: {error!r}")
            else:
                self.done.append(event.name)


class MemberFaults:
    """What the processes that register go through."""

    KINDS = frozenset(
        ("kill", "kill command", "end", "start", "suspend", "resume", "fork", "withdraw", "publish")
    )

    def __init__(self, members: dict[str, Member], note: Note) -> None:
        self._members = members
        self._note = note

    def __call__(self, event: Event) -> None:
        member = self._members[event.target]
        self._note(f"{event.kind} {event.target} ({member.plan.topic}, {member.host})")
        getattr(member, event.kind.replace(" ", "_"))()


class ClusterFaults:
    """What agents and servers go through; each is over when the whole cluster is ready again."""

    KINDS = frozenset(("kill", "stop", "pause", "lose quorum"))
    ENDED: ClassVar = {"kill": "killed", "stop": "left", "pause": "paused"}

    def __init__(
        self,
        cluster: Cluster,
        ledger: Ledger,
        note: Note,
        stopping: threading.Event,
        writing: threading.Lock,
    ) -> None:
        self._cluster = cluster
        self._ledger = ledger
        self._note = note
        self._stopping = stopping
        self._writing = writing

    def __call__(self, event: Event) -> None:
        if event.kind == "lose quorum":
            self._lose_quorum(event)
            return
        name = self._named(event.target)
        # A write that hangs in a frozen server would be done much later, behind the ledger's back.
        with self._writing:
            begun_at = time.monotonic()
            self._note(f"{event.kind} {name} ({event.target})")
            getattr(self._cluster, event.kind)(name)
            if event.target == "leader":
                with contextlib.suppress(ClusterError):  # it is known later, when all is ready
                    self._ledger.disturbed("no leader", begun_at, self._new_leader())
        self._stopping.wait(max(0.0, begun_at + event.hold - time.monotonic()))
        try:
            self._bring_back([name], paused=event.kind == "pause")
        finally:  # a cluster that is not ready in time is one fault, not many
            if name in self._servers():
                self._ledger.disturbed("server back", begun_at, time.monotonic())
                if event.kind == "pause":
                    self._ledger.disturbed("server paused", begun_at, time.monotonic())
                elif isinstance(self._cluster, DockerCluster):  # its address is gone with it
                    self._ledger.disturbed("server gone", begun_at, time.monotonic())
            else:
                kind = f"agent {self.ENDED[event.kind]}"
                self._ledger.disturbed(kind, begun_at, time.monotonic(), name)

    def _lose_quorum(self, event: Event) -> None:
        leader = self._cluster.leader()
        frozen = [leader, next(name for name in self._servers() if name != leader)]
        with self._writing:
            begun_at = time.monotonic()
            self._note(f"lose quorum: pause {' and '.join(frozen)}")
            for name in frozen:
                self._cluster.pause(name)
            self._stopping.wait(event.hold)
            going_on_at = time.monotonic()
            try:
                self._bring_back(frozen, paused=True)
            finally:
                for kind in ("no leader", "server back"):
                    self._ledger.disturbed(kind, begun_at, time.monotonic())
                for seconds in LATE_INVALIDATIONS:
                    self._ledger.disturbed(
                        "late invalidation",
                        going_on_at + seconds,
                        going_on_at + seconds + RESUMED_SECONDS + MACHINE_SECONDS,
                    )

    def _bring_back(self, names: Sequence[str], *, paused: bool) -> None:
        """Until the whole cluster is ready."""
        self._note(f"{'resume' if paused else 'start'} {' and '.join(names)}")
        for name in names:
            (self._cluster.resume if paused else self._cluster.start)(name)
        if paused:  # the others took them for dead
            for name in names:
                join_again(self._cluster, name)
        self._cluster.wait_ready()
        self._note("the cluster is ready")

    def _servers(self) -> list[str]:
        return [name for name, node in self._cluster.nodes.items() if node.is_server]

    def _named(self, target: str) -> str:
        if target == "leader":
            return self._cluster.leader()
        if target == "follower":
            leader = self._cluster.leader()
            return next(name for name in self._servers() if name != leader)
        return target

    def _new_leader(self) -> float:
        name = self._cluster.leader()
        self._note(f"{name} leads")
        return time.monotonic()


class Writes:
    """Sessions destroyed and keys deleted behind the owners' backs; checks that fail and pass."""

    KINDS = frozenset(("destroy session", "delete key", "fail", "pass"))

    def __init__(
        self,
        nodes: Sequence[Node],
        prefix: str,
        members: dict[str, Member],
        ledger: Ledger,
        note: Note,
        writing: threading.Lock,
    ) -> None:
        self._nodes = nodes
        self._prefix = prefix
        self._members = members
        self._ledger = ledger
        self._note = note
        self._writing = writing

    def __call__(self, event: Event) -> None:
        with self._writing:
            if event.kind in ("fail", "pass"):
                self.check(event.target, "critical" if event.kind == "fail" else "passing")
            else:
                self._take_away(event)

    def _take_away(self, event: Event) -> None:
        member = self._members[event.target]
        node = answering(self._nodes)[0]
        self._note(f"{event.kind} of {event.target} ({member.plan.topic}, {member.host})")
        begun_at = time.monotonic()
        for text in keys(node, self._prefix):
            try:
                key = Key.parse(self._prefix, text)
            except ValueError:
                continue  # no registration: it is reported as an orphan
            if str(key.host) == member.host and event.kind == "destroy session":
                tell(node, "PUT", f"/v1/session/destroy/{key.lease_id}")
            elif str(key.host) == member.host:
                tell(node, "DELETE", f"/v1/kv/{text}")
        what = "session destroyed" if event.kind == "destroy session" else "key deleted"
        self._ledger.disturbed(what, begun_at, time.monotonic(), member.host)

    def check(self, target: str, status: str, *, is_first: bool = False) -> None:
        """Have the catalog say so of this instance of a service."""
        service, _, number = target.partition("/")
        host = catalog_host(target)
        if not is_first:
            self._note(f"{target} ({host}) is {status}")
        body = {
            "Node": f"soak-{service}-{number}",
            "Address": host.partition(":")[0],
            "Service": {"ID": target, "Service": service, "Port": CATALOG_PORT},
            "Check": {
                "Name": "of the soak",
                "CheckID": f"soak-{service}-{number}",
                "ServiceID": target,
                "Status": status,
            },
        }
        begun_at = time.monotonic()
        if status == "passing":
            self._ledger.up(host, begun_at, "passed", extra_seconds=60.0)
        self._write(json.dumps(body))
        if status == "passing":
            self._ledger.due(host, time.monotonic(), "passed")
        else:
            self._ledger.down(host, begun_at, time.monotonic(), "failed")

    def _write(self, body: str) -> None:
        """Whatever happens to the servers meanwhile: the ledger has to know that it was done."""
        for _ in range(WRITE_ATTEMPTS):
            with contextlib.suppress(TimeoutError):
                tell(answering(self._nodes)[0], "PUT", "/v1/catalog/register", body)
                return
        raise TimeoutError("the catalog takes no write")


def catalog_host(target: str) -> str:
    service, _, number = target.partition("/")
    place = list(SERVICES).index(service)
    return f"10.20.{place}.{int(number) + 1}:{CATALOG_PORT}"


def answering(nodes: Sequence[Node]) -> list[Node]:
    """Servers that answer at this moment and know a leader; all nodes if there are none."""
    found = []
    for node in nodes:
        with contextlib.suppress(NotReady):
            status, text = request(node, "GET", "/v1/status/leader")
            if node.is_server and status == 200 and text.strip('"\n '):
                found.append(node)
    return found or list(nodes)
