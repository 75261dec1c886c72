"""Hosts of a topic in this process that can be slow or fail, and a steady load of calls of them.

The calls are `Matchmaker.call` with a client of the standard library, over kept connections.
"""

from __future__ import annotations

import http.client
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from consul_matchmaker import Matchmaker, Settings
from consul_matchmaker.backends.memory import Memory
from consul_matchmaker.model import Host
from integration.callers.http_server import HttpServer
from integration.callers.load import Load

TOPIC = "web"
TIMEOUT_SECONDS = 5.0
LOOK_SECONDS = 0.05
TTL_SECONDS = 0.1
"""Of an answer: a host that comes is noticed soon."""


class Failed(OSError):
    """The host answered with another status than 200."""


@dataclass(frozen=True)
class Call:
    """One that was made: when, how long it took, and who answered it (None: it failed)."""

    at: float
    seconds: float
    host: str | None


class Fleet:
    """So many hosts, and a Matchmaker that knows them; a context manager that ends both."""

    def __init__(self, hosts: int, **settings: Any) -> None:
        self.servers = [HttpServer() for _ in range(hosts)]
        self.calls: list[Call] = []
        self.ejected: dict[str, float] = {}
        """When each host was seen to be ejected first."""
        self.most_ejected = 0
        """At the same time, as far as was seen."""
        self._memory = Memory()
        self._memory.declare(TOPIC, [server.host for server in self.servers])
        self.matchmaker = Matchmaker(
            Settings(mode="kv", ttl_seconds=TTL_SECONDS, **settings), backend=self._memory
        )
        self._kept = threading.local()

    def come(self) -> HttpServer:
        """One host more; returns once the matchmaker knows it."""
        new = HttpServer()
        self.servers.append(new)
        self._memory.declare(TOPIC, [server.host for server in self.servers])
        while new.host not in self.matchmaker.hosts(TOPIC):
            time.sleep(0.01)
        return new

    @contextmanager
    def called(self, per_second: float, attempts: int = 3) -> Iterator[None]:
        """For the time of the block calls are made, so many a second."""

        def ask() -> str:
            began = time.monotonic()
            host = None
            try:
                host = self.matchmaker.call(TOPIC, self._ask, attempts=attempts)
            finally:
                self.calls.append(Call(began, time.monotonic() - began, host))
            return host

        with Load(per_second) as load:
            load.start(ask)
            yield

    def watch(self, seconds: float) -> None:
        """Look meanwhile who is ejected."""
        until = time.monotonic() + seconds
        while (now := time.monotonic()) < until:
            rejected = self.matchmaker.explain(TOPIC)["rejected"]
            assert isinstance(rejected, dict)
            ejected = [host for host, why in rejected.items() if why.startswith("ejected")]
            self.most_ejected = max(self.most_ejected, len(ejected))
            for host in ejected:
                self.ejected.setdefault(host, now)
            time.sleep(LOOK_SECONDS)

    @property
    def made(self) -> int:
        """Calls that ended."""
        return len(self.calls)

    @property
    def sent(self) -> int:
        """Requests that the hosts got, by their own count."""
        return sum(len(server.requests) for server in self.servers)

    @property
    def failed(self) -> int:
        """Calls whose caller got no answer."""
        return sum(call.host is None for call in self.calls)

    def in_flight(self, server: HttpServer) -> int:
        """Calls of *server* that have not ended."""
        told: Any = self.matchmaker.explain(TOPIC)["selection"]
        return int(told[str(server.host)]["in_flight"])

    def share(self, server: HttpServer, since: float = 0.0, until: float = float("inf")) -> float:
        """Which part of the answers of that time *server* gave."""
        answers = Counter(call.host for call in self.calls if since <= call.at < until)
        return answers[str(server.host)] / max(1, answers.total() - answers[None])

    def _ask(self, host: Host) -> str:
        connections = self._kept.__dict__
        connection = connections.get(str(host))
        if connection is None:
            connection = http.client.HTTPConnection(str(host), timeout=TIMEOUT_SECONDS)
            connections[str(host)] = connection
        try:
            connection.request("GET", "/")
            answer = connection.getresponse()
            answer.read()
        except http.client.HTTPException as error:
            connection.close()
            raise Failed(f"{host} answered no HTTP") from error
        if answer.status != 200:
            raise Failed(f"{host} answered with {answer.status}")
        return str(host)

    def __enter__(self) -> Fleet:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.matchmaker.close()
        for server in self.servers:
            server.stop()
