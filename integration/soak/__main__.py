"""Run a soak: its arguments, what happens one after the other, and the verdict, exit 0 or 1."""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import shutil
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path

from consul_matchmaker.testing.consul_probe import NotReady, request
from integration.cluster import Cluster, keys, tell
from integration.repeated import Repeated

from . import bounds, clusters, schedule
from .faults import ClusterFaults, Hand, MemberFaults, Writes, answering, catalog_host
from .ledger import Ledger, Place, Violation, bad_lines, growth, joined, wrong_answers
from .members import Member
from .readers import Reader
from .report import Answers, print_summary, print_violations, read_answers, timed_lines
from .schedule import AGENTS, SERVICES, TOPICS, Event
from .witness import (
    KEYS_SECONDS,
    LEADER_SECONDS,
    SAMPLE_SECONDS,
    Holdings,
    KeyWitness,
    LeaderWitness,
    Stalls,
)

STAGGER_SECONDS = 0.3
SETTLE_SECONDS = 12.0
GONE_SECONDS = 2 * bounds.SESSION_TTL_SECONDS + bounds.MACHINE_SECONDS + 2
THREADS = 4
RATE = 30.0
"""Lookups a second and thread; all readers together then make about 600."""
PLANTS = ("understate", "leak", "phantom", "traceback", "silent", "orphan")


class Soak:
    """One run: what it started, what it saw, and what it makes of it."""

    def __init__(self, cluster: Cluster, folder: Path, plant: Sequence[str]) -> None:
        self._cluster = cluster
        self._folder = folder
        self._plant = plant
        self._prefix = f"soak-{uuid.uuid4().hex[:8]}"
        self._ledger = Ledger()
        self._notes: list[tuple[float, str]] = []
        self._failures: list[str] = []
        self._began_at = time.monotonic()
        self._nodes = list(cluster.nodes.values())
        self._servers = [node for node in self._nodes if node.is_server]
        self._members = self._made_members()
        self._readers: list[Reader] = []
        self._keys = KeyWitness(self._servers, self._prefix, list(TOPICS))
        self._leaders = LeaderWitness(self._servers, self._ledger, self._note)
        self._stalls = Stalls(self._ledger, self._note)
        self._holdings = Holdings(self._pids)
        self._writing = threading.Lock()
        self._writes = Writes(
            self._nodes, self._prefix, self._members, self._ledger, self._note, self._writing
        )
        self._done: list[str] = []
        self._ended_at = 0.0
        self._orphans: list[Violation] = []

    def run(self, events: Sequence[Event]) -> bool:
        """Whether every promise was kept."""
        witnesses = [
            Repeated("keys", KEYS_SECONDS, self._keys.look),
            Repeated("leaders", LEADER_SECONDS, self._leaders.look),
            Repeated("stalls", Stalls.PAUSE_SECONDS, self._stalls.look),
            Repeated("holdings", SAMPLE_SECONDS, self._holdings.look),
        ]
        try:
            for witness in witnesses:
                witness.start()
            self._start()
            self._disturb(events)
            self._note("all is as it was; waiting for what comes later")
            threading.Event().wait(SETTLE_SECONDS)
            self._end_members()
        finally:
            for witness in witnesses:
                witness.stop()
            codes = {reader.name: reader.end() for reader in self._readers}
            for member in self._members.values():
                member.abandon()
        self._failures += [f"{name} ended with {code}" for name, code in codes.items() if code]
        return self._verdict()

    # --- how it goes

    def _made_members(self) -> dict[str, Member]:
        network = f"127.{random.randint(1, 254)}.{random.randint(1, 254)}"
        members = {}
        for number, plan in enumerate(schedule.members()):
            host = f"{network}.{number + 1}:9501"
            self._ledger.know(Place(plan.topic, host, plan.liveness, plan.agent))
            url = f"consul+kv://{self._cluster.nodes[plan.agent].http}/{self._prefix}"
            url += f"?session_ttl_seconds={bounds.SESSION_TTL_SECONDS:g}"
            log = self._folder / f"{plan.name}.log"
            plant = tuple(self._plant) if number in (0, 5) and not plan.by_command else ()
            members[plan.name] = Member(plan, url, host, self._ledger, log, plant=plant)
        for target in schedule.instances():
            self._ledger.know(Place(target.partition("/")[0], catalog_host(target), "catalog"))
        return members

    def _start(self) -> None:
        self._note("starting")
        for target in schedule.instances():
            self._writes.check(target, "passing", is_first=True)
        pause = threading.Event()
        for member in self._members.values():
            member.start()
            pause.wait(STAGGER_SECONDS)
        http = [self._cluster.nodes[name].http for name in AGENTS]
        dns = [self._cluster.nodes[name].dns for name in AGENTS]
        common = f"ttl_seconds={bounds.TTL_SECONDS:g}"
        for name, mode, url in (
            ("watch", "kv", f"consul+kv://{http[0]},{http[1]}/{self._prefix}?{common}"),
            ("watch-3", "kv", f"consul+kv://{http[2]}/{self._prefix}?{common}"),
            (
                "direct",
                "kv, no watch",
                f"consul+kv://{http[1]}/{self._prefix}?{common}&watch=false",
            ),
            (
                "stale",
                "kv, stale",
                f"consul+kv://{http[2]},{http[0]}/{self._prefix}?{common}&consistency=stale",
            ),
            ("asyncio", "asyncio", f"consul+kv://{http[1]}/{self._prefix}?{common}"),
            ("dns", "catalog", f"consul+catalog://{dns[0]},{dns[1]}?{common}"),
        ):
            topics = list(SERVICES if mode == "catalog" else TOPICS)
            self._readers.append(
                Reader(
                    name,
                    mode,
                    url,
                    topics,
                    self._folder,
                    threads=THREADS,
                    rate=RATE,
                    plant=list(self._plant),
                )
            )
            pause.wait(STAGGER_SECONDS)
        if "orphan" in self._plant:
            tell(self._nodes[0], "PUT", f"/v1/kv/{self._prefix}/of/no/session", "planted")
        pause.wait(bounds.START_SECONDS)

    def _disturb(self, events: Sequence[Event]) -> None:
        self._began_at = time.monotonic()
        self._note("chaos begins")
        stopping = threading.Event()
        by_hand: dict[str, list[Event]] = {"members": [], "cluster": [], "writes": []}
        for event in events:
            if event.kind in Writes.KINDS:
                by_hand["writes"].append(event)
            elif event.target in self._members:
                by_hand["members"].append(event)
            else:
                by_hand["cluster"].append(event)
        carry_out: dict[str, Callable[[Event], None]] = {
            "members": MemberFaults(self._members, self._note),
            "cluster": ClusterFaults(
                self._cluster, self._ledger, self._note, stopping, self._writing
            ),
            "writes": self._writes,
        }
        hands = [
            Hand(name, of_hand, self._began_at, carry_out[name], self._failures, stopping)
            for name, of_hand in by_hand.items()
        ]
        for hand in hands:
            hand.start()
        try:
            for hand in hands:
                hand.join()
        finally:
            stopping.set()
        self._done = [kind for hand in hands for kind in hand.done]
        if self._cluster.is_disturbed:
            self._cluster.mend()

    def _end_members(self) -> None:
        """Half of them are killed, half end; then nothing of them is left, after a while."""
        self._note("every member ends")
        self._ended_at = time.monotonic()
        running = [member for member in self._members.values() if member.pid is not None]
        for number, member in enumerate(running):
            (member.kill if number % 2 else member.end)()
        deadline = time.monotonic() + GONE_SECONDS
        node = answering(self._servers)[0]
        while (left := keys(node, self._prefix)) and time.monotonic() < deadline:
            threading.Event().wait(KEYS_SECONDS)
        now = time.monotonic()
        self._orphans = [Violation("no orphan", "Consul", key, now, now) for key in left]
        with contextlib.suppress(NotReady):
            request(node, "DELETE", f"/v1/kv/{self._prefix}/?recurse")

    # --- what it makes of it

    def _verdict(self) -> bool:
        truth = self._ledger.judged()
        violations = [*self._orphans, *wrong_answers(truth, self._keys.sightings)]
        answers: dict[str, Answers] = {}
        for reader in self._readers:
            answers[reader.name] = found = read_answers(reader.name, reader.mode, reader.answers)
            violations += wrong_answers(truth, found.sightings)
            violations += found.slow
        for name, log in self._logs().items():
            violations += bad_lines(name, timed_lines(log))
        long_lived = 0
        for (name, pid), samples in self._holdings.samples.items():
            long_lived += samples[-1].at - samples[0].at > 2 * bounds.WARM_UP_SECONDS
            violations += growth(f"{name} (process {pid})", samples, bounds.WARM_UP_SECONDS)
        now = time.monotonic()
        failures = [f"{m.plan.name} {text}" for m in self._members.values() for text in m.failures]
        violations += [
            Violation("the soak itself", "", text, now, now)
            for text in [*self._failures, *failures]
        ]
        found_all = joined(violations)
        print_violations(found_all, self._notes, self._began_at)
        must, must_not = truth.judged_shares(self._began_at, self._ended_at)
        details = [
            f"judged: of all hosts' time {must:.0%} had to be listed, {must_not:.0%} must not be",
            f"witness: {len(self._keys.sightings) // len(TOPICS)} lists of keys",
            f"leaders: changed {self._leaders.changes} times",
            f"machine: stalled {self._stalls.count} times",
            f"growth: judged for {long_lived} processes",
        ]
        print_summary(self._done, answers, found_all, details, self._began_at)
        return not found_all

    def _logs(self) -> dict[str, Path]:
        logs = {member.plan.name: member.log for member in self._members.values()}
        return logs | {reader.name: reader.log for reader in self._readers}

    def _pids(self) -> dict[str, int]:
        everybody = [(m.plan.name, m.pid) for m in self._members.values()]
        everybody += [(reader.name, reader.pid) for reader in self._readers]
        return {name: pid for name, pid in everybody if pid is not None}

    def _note(self, text: str) -> None:
        self._notes.append((time.monotonic(), text))
        if os.environ.get("SOAK_VERBOSE"):
            print(f"{time.monotonic() - self._began_at:8.2f}  {text}", flush=True)


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m integration.soak", description=__doc__)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--minutes", type=float, default=2.0, help="of chaos; about one is added")
    parser.add_argument("--cluster", choices=("docker", "local"), default="local")
    parser.add_argument("--schedule", action="store_true", help="print the events, run nothing")
    parser.add_argument("--keep", action="store_true", help="keep the logs and answers")
    parser.add_argument(
        "--plant", choices=PLANTS, action="append", default=[], help=argparse.SUPPRESS
    )
    arguments = parser.parse_args(argv)
    events = schedule.plan(arguments.seed, 60 * arguments.minutes)
    if arguments.schedule:
        print(*events, sep="\n")
        return 0
    print(f"soak: seed {arguments.seed}, {arguments.minutes:g} minutes, {arguments.cluster}")
    folder = Path(tempfile.mkdtemp(prefix="consul-matchmaker-soak-"))
    is_good = False
    try:
        with clusters.started(arguments.cluster) as cluster:
            is_good = Soak(cluster, folder, arguments.plant).run(events)
    finally:
        if is_good and not arguments.keep:
            shutil.rmtree(folder, ignore_errors=True)
        else:
            print(f"logs and answers: {folder}")
    return 0 if is_good else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
