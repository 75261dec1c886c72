"""Watches from outside: what Consul lists, who leads, what processes hold, how the machine is."""

from __future__ import annotations

import contextlib
import http.client
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from consul_matchmaker.backends.kv.keys import SENTINEL, Key
from consul_matchmaker.testing.consul_probe import Node

from .ledger import Ledger, Sample, Sighting

KEYS_SECONDS = 0.25
LEADER_SECONDS = 1.0
SAMPLE_SECONDS = 3.0
STARVED_SECONDS = 0.5
REQUEST_SECONDS = 5.0


class KeyWitness:
    """Asks Consul for the keys, with every server's consent, and writes down what they say."""

    def __init__(self, nodes: Sequence[Node], prefix: str, topics: Sequence[str]) -> None:
        self._nodes = list(nodes)
        self._prefix = prefix
        self._topics = topics
        self._connection: http.client.HTTPConnection | None = None
        self.sightings: list[Sighting] = []
        self.unknown: set[str] = set()
        """Keys under the prefix that are not ours."""

    def look(self) -> None:
        asked_at = time.monotonic()
        texts = self._keys()
        if texts is None:
            self._nodes.append(self._nodes.pop(0))  # the next one, next time
            return
        answered_at = time.monotonic()
        hosts: dict[str, set[str]] = {topic: set() for topic in self._topics}
        for text in texts:
            try:
                key = Key.parse(self._prefix, text)
            except ValueError:
                if text != f"{self._prefix}/{SENTINEL}":
                    self.unknown.add(text)
            else:
                hosts.setdefault(key.topic, set()).add(str(key.host))
        for topic, found in hosts.items():
            self.sightings.append(
                Sighting(
                    "witness", "consul", topic, frozenset(found), asked_at, answered_at, asked_at
                )
            )

    def _keys(self) -> list[str] | None:
        """Every key, or None when this node cannot say."""
        connection = self._connection or http.client.HTTPConnection(
            self._nodes[0].http, timeout=REQUEST_SECONDS
        )
        self._connection = None
        try:
            connection.request("GET", f"/v1/kv/{self._prefix}/?keys&consistent")
            response = connection.getresponse()
            text = response.read()
        except (OSError, http.client.HTTPException):
            connection.close()
            return None
        if response.status not in (200, 404):
            connection.close()
            return None
        self._connection = connection
        found: list[str] = json.loads(text) if response.status == 200 else []
        return found


class LeaderWitness:
    """Notes every change of the leader, also one that nobody asked for."""

    def __init__(self, nodes: Sequence[Node], ledger: Ledger, note: Callable[[str], None]) -> None:
        self._nodes = nodes
        self._ledger = ledger
        self._note = note
        self._leader = ""
        self._seen_at = 0.0
        self.changes = 0

    def look(self) -> None:
        leaders = {self._ask(node) for node in self._nodes} - {""}
        if len(leaders) != 1:
            return
        (leader,) = leaders
        now = time.monotonic()
        if self._leader and leader != self._leader:
            self.changes += 1
            self._note(f"the leader is {leader} now")
            self._ledger.disturbed("no leader", self._seen_at, now)
        self._leader, self._seen_at = leader, now

    @staticmethod
    def _ask(node: Node) -> str:
        connection = http.client.HTTPConnection(node.http, timeout=0.5)
        try:
            connection.request("GET", "/v1/status/leader")
            response = connection.getresponse()
            text = response.read()
            return str(json.loads(text)) if response.status == 200 else ""
        except (OSError, ValueError, http.client.HTTPException):
            return ""
        finally:
            connection.close()


class Stalls:
    """Notes when the machine gave us no processor for long: then it starved others, too."""

    PAUSE_SECONDS = 0.05

    def __init__(self, ledger: Ledger, note: Callable[[str], None]) -> None:
        self._ledger = ledger
        self._note = note
        self._last_at = time.monotonic()
        self.count = 0

    def look(self) -> None:
        now = time.monotonic()
        if now - self._last_at > STARVED_SECONDS:
            self.count += 1
            self._note(f"the machine gave us no processor for {now - self._last_at:.2f} s")
            self._ledger.disturbed("machine starved", self._last_at, now)
        self._last_at = now


class Holdings:
    """What processes hold: memory, threads and descriptors, out of /proc."""

    def __init__(self, pids: Callable[[], dict[str, int]]) -> None:
        self._pids = pids
        self.samples: dict[tuple[str, int], list[Sample]] = {}

    def look(self) -> None:
        for name, pid in self._pids().items():
            with contextlib.suppress(OSError, KeyError):  # it has just ended
                self.samples.setdefault((name, pid), []).append(_sample(pid))


def _sample(pid: int) -> Sample:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    values = dict(line.split(":", 1) for line in lines)
    return Sample(
        time.monotonic(),
        int(values["VmRSS"].split()[0]),
        int(values["Threads"]),
        len(list(Path(f"/proc/{pid}/fd").iterdir())),
    )
