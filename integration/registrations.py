"""For tests of registrations: how soon things are promised, how they are seen and taken away."""

import logging
import time

import pytest

from consul_matchmaker import Matchmaker
from consul_matchmaker.testing.consul_probe import Node, NotReady, request
from integration.cluster import tell
from integration.repeated import Repeated

TTL = 10.0  # the least that Consul accepts by default
INTERVAL = TTL / 3
CRASH_SECONDS = 2 * TTL + 1
SOON = 1.0
SLACK = 0.7  # what requests, and two busy cores, may add to a renewal interval
POLL = 0.02


def hosts(reader: Matchmaker, topic: str) -> list[str]:
    return [str(host) for host in reader.hosts(topic)]


def lease_of(matchmaker: Matchmaker) -> str:
    keeper = matchmaker.status()["keeper"]
    assert isinstance(keeper, dict) and isinstance(keeper["lease"], str)
    return keeper["lease"]


def destroy_session(agent: Node, session: str) -> None:
    tell(agent, "PUT", f"/v1/session/destroy/{session}")


def delete_key(agent: Node, key: str) -> None:
    tell(agent, "DELETE", f"/v1/kv/{key}")


def repairs(caplog: pytest.LogCaptureFixture) -> list[str]:
    """What the keepers said at WARNING or above."""
    return [
        record.getMessage()
        for record in caplog.records
        if record.name == "consul_matchmaker.registrations.keeper"
        and record.levelno >= logging.WARNING
    ]


def answers(node: Node) -> bool:
    """Whether the agent can reach the servers."""
    try:
        return request(node, "GET", "/v1/kv/none?consistent")[0] == 404
    except NotReady:
        return False


class Sampler:
    """Looks through every reader all the time, in one thread, and remembers what it saw."""

    def __init__(self, readers: dict[str, Matchmaker], topic: str) -> None:
        self._readers, self._topic = readers, topic
        self.seen: dict[str, list[tuple[float, frozenset[str]]]] = {name: [] for name in readers}
        self._looks = Repeated("sampler", POLL, self._look)

    def _look(self) -> None:
        for name, reader in self._readers.items():
            at = time.monotonic()
            self.seen[name].append((at, frozenset(hosts(reader, self._topic))))

    def __enter__(self) -> "Sampler":
        self._looks.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._looks.stop()

    def last_with(self, reader: str, host: str) -> float:
        """When *reader* began the last look that saw *host*."""
        return max(at for at, found in self.seen[reader] if host in found)

    def always(self, host: str) -> bool:
        return all(host in found for seen in self.seen.values() for _, found in seen)
