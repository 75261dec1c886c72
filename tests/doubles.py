"""Hand-made stand-ins: a clock that moves when told, a resolver that says what it was told."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from typing import TypeVar

from consul_matchmaker.errors import TimedOut, Unavailable
from consul_matchmaker.model import Host, Instance, Snapshot, Source
from consul_matchmaker.settings import Settings
from consul_matchmaker.worker import Worker

T = TypeVar("T")

DEADLINE_SECONDS = 10.0
"""How long a test waits for another thread before it fails; nothing takes that long."""
LONGEST_SECONDS = 6.0
"""What a `FakeResolver` says a lookup may need."""


class ManualClock:
    """Seconds that pass only by `advance`."""

    def __init__(self, now: float = 1000.0) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now

    def advance(self, seconds: float) -> None:
        self.now += seconds


class FakeResolver:
    """Answers from a table, remembers each question, and can be held up topic by topic."""

    def __init__(self, source: Source = "memory", *, finds_servers: bool = False) -> None:
        self.finds_servers = finds_servers
        self.longest_lookup_seconds = LONGEST_SECONDS
        self.timeouts: list[float] = []
        self._is_closed = False
        self.source = source
        self.asked: list[tuple[str, str | None]] = []
        self._says: dict[tuple[str, str | None], Snapshot | BaseException] = {}
        self._gates: dict[str, threading.Event] = {}
        self._arrivals: dict[str, threading.Event] = {}

    def say(
        self,
        topic: str,
        *hosts: str | Instance,
        server: str | None = None,
        is_complete: bool = True,
        ttl_seconds: float | None = None,
    ) -> None:
        self._says[topic, server] = snapshot(
            topic, hosts, self.source, is_complete=is_complete, ttl_seconds=ttl_seconds
        )

    def fail(self, topic: str, error: BaseException | None = None) -> None:
        self._says[topic, None] = error or Unavailable("Consul is away")

    def hold(self, topic: str) -> None:
        """From now on questions for *topic* wait for `let_go`."""
        self._gates[topic], self._arrivals[topic] = threading.Event(), threading.Event()

    def wait_until_asked(self, topic: str) -> None:
        assert self._arrivals[topic].wait(DEADLINE_SECONDS)

    def stop_holding(self, topic: str) -> threading.Event:
        """From now on questions are answered; those that wait go on when the event is set."""
        return self._gates.pop(topic)

    def let_go(self, topic: str) -> None:
        self.stop_holding(topic).set()

    def count(self, topic: str) -> int:
        return sum(asked == topic for asked, _ in self.asked)

    def lookup(
        self, topic: str, server: str | None = None, *, timeout_seconds: float = LONGEST_SECONDS
    ) -> Snapshot:
        self.asked.append((topic, server))
        self.timeouts.append(timeout_seconds)
        gate = self._gates.get(topic)
        if gate is not None:
            self._arrivals[topic].set()
            if not gate.wait(min(timeout_seconds, DEADLINE_SECONDS)):
                raise TimedOut(f"nothing came within {timeout_seconds:g} s")
            if self._is_closed:
                raise Unavailable("closed meanwhile")
        said = self._says.get((topic, server))
        if isinstance(said, BaseException):
            raise said
        return snapshot(topic, (), self.source) if said is None else said

    def status(self) -> dict[str, object]:
        return {}

    def wire(self) -> dict[str, dict[str, int]]:
        return {}

    def close(self) -> None:
        """As every resolver does: what is under way ends."""
        self._is_closed = True
        for gate in self._gates.values():
            gate.set()


def instance(text: str | Instance) -> Instance:
    """``10.0.0.1:5``, or ``10.0.0.1:5=node1`` with a server name."""
    if isinstance(text, Instance):
        return text
    host, _, server = text.partition("=")
    return Instance(Host.parse(host), server or None)


def snapshot(
    topic: str,
    hosts: Iterable[str | Instance],
    source: Source = "memory",
    *,
    is_complete: bool = True,
    ttl_seconds: float | None = None,
) -> Snapshot:
    return Snapshot(topic, tuple(map(instance, hosts)), source, is_complete, ttl_seconds)


def kv(**values: object) -> Settings:
    return Settings(mode="kv", **values)  # type: ignore[arg-type]


def catalog(**values: object) -> Settings:
    return Settings(mode="catalog", **values)  # type: ignore[arg-type]


def in_thread(call: Callable[[], T]) -> Future[T]:
    """Run *call* on a thread of its own; ``result(DEADLINE_SECONDS)`` waits for it."""
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(call())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return future


NO_TRAFFIC = {
    "queries": 0,
    "retries": 0,
    "replies": 0,
    "error_replies": 0,
    "sent_bytes": 0,
    "received_bytes": 0,
}
"""What a transport's counters begin with."""


class StillWorker(Worker):
    """A worker without a thread: the test runs its step."""

    def start(self) -> None: ...


@contextlib.contextmanager
def no_thread_to_be_had() -> Iterator[None]:
    """Every thread that is started meanwhile asks for more memory than there is addresses."""
    before = threading.stack_size(1 << 46)
    try:
        yield
    finally:
        threading.stack_size(before)
