"""Readers for tests of answers: what they look up, who serves it, and a load of lookups."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Sequence
from typing import Any

from consul_matchmaker import Host, Matchmaker, Settings, Snapshot, errors
from consul_matchmaker.testing.consul_probe import Node
from integration.cluster import tell
from integration.repeated import Repeated

HOSTS = ("10.0.0.1:5001", "10.0.0.2:5002", "10.0.0.3:5003")
TTL_SECONDS = 1.0
TIMEOUT_SECONDS = 2.0
SCHEDULER_SECONDS = 1.0
"""So long a busy machine may stop any thread or process."""


def matchmaker(mode: str, address: str, **values: object) -> Matchmaker:
    settings = {
        "mode": mode,
        "addresses": (Host.parse(address),),
        "ttl_seconds": TTL_SECONDS,
        "request_timeout_seconds": TIMEOUT_SECONDS,
        **values,
    }
    return Matchmaker(Settings(**settings))  # type: ignore[arg-type]


def published(
    stack: contextlib.ExitStack, agent: Node, prefix: str, topic: str, hosts: Sequence[str] = HOSTS
) -> None:
    """*hosts* serve *topic* in kv mode until *stack* ends."""
    owner = stack.enter_context(matchmaker("kv", agent.http, prefix=prefix))
    for host in hosts:
        owner.register(topic, host).wait_until_published(timeout_seconds=10)


class Operators:
    """What operators define: one service, an instance for each of `HOSTS`, with a check."""

    def __init__(self, agent: Node, topic: str) -> None:
        self._agent, self._topic = agent, topic

    def __enter__(self) -> Operators:
        for host in HOSTS:
            address, _, port = host.rpartition(":")
            definition = {
                "ID": self.id_of(host),
                "Name": self._topic,
                "Address": address,
                "Port": int(port),
                "Check": {"CheckID": self.id_of(host), "TTL": "10m", "Status": "passing"},
            }
            tell(self._agent, "PUT", "/v1/agent/service/register", json.dumps(definition))
        return self

    def __exit__(self, *exc_info: object) -> None:
        for host in HOSTS:
            tell(self._agent, "PUT", f"/v1/agent/service/deregister/{self.id_of(host)}")

    def id_of(self, host: str) -> str:
        return f"{self._topic}-{host.rpartition(':')[2]}"

    def set_health(self, host: str, status: str) -> None:
        tell(self._agent, "PUT", f"/v1/agent/check/{status}/{self.id_of(host)}")


class Load:
    """Four threads that look up all the time, and note what they got and how long it took."""

    def __init__(self, reader: Matchmaker, topic: str) -> None:
        self._reader, self._topic = reader, topic
        self.failures: list[BaseException | Snapshot] = []
        self.seconds: list[float] = []
        self._n_seen = 0
        self._threads = [Repeated(f"load-{number}", 0.002, self._look) for number in range(4)]

    def __enter__(self) -> Load:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        for thread in self._threads:
            thread.stop()

    def p99(self) -> float:
        """Of the lookups since the last call; in seconds."""
        seconds = sorted(self.seconds[self._n_seen :])
        self._n_seen += len(seconds)
        return seconds[int(len(seconds) * 0.99)]

    @property
    def longest(self) -> float:
        """Seconds that the slowest lookup took."""
        return max(self.seconds)

    @property
    def waited(self) -> int:
        """How many lookups of the reader, these and others, had no answer and waited for Consul."""
        cache: Any = self._reader.status()["cache"]
        return int(cache["lookups_that_found"]["asked"])

    def _look(self) -> None:
        began = time.perf_counter()
        try:
            found = self._reader.hosts(self._topic)
            if tuple(map(str, found)) != HOSTS:
                self.failures.append(found)
            self._reader.pick(self._topic)
        except errors.MatchmakerError as error:
            self.failures.append(error)
        self.seconds.append(time.perf_counter() - began)
