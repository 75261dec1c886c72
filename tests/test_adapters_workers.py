"""One registration for the workers of an application: ASGI's lifespan and gunicorn's hooks."""

from __future__ import annotations

import asyncio
import json
import os
import tempfile
import time
import uuid
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from consul_matchmaker import Matchmaker, Settings
from consul_matchmaker.adapters import asgi, gunicorn
from consul_matchmaker.adapters.one_of_siblings import OneOfSiblings, lock_path
from consul_matchmaker.backends.memory import Memory
from consul_matchmaker.errors import ConfigurationError

from .contract import eventually
from .http_servers import Server, reply

pytestmark = pytest.mark.system
HOST = "10.0.0.1:8080"


class Worker:
    """A worker process, as far as this is concerned: its own matchmaker over the same Consul."""

    def __init__(self, memory: Memory, name: str, registration: Any = None) -> None:
        self.matchmaker = Matchmaker(Settings(mode="service"), backend=memory)
        self.registered = 0
        self._registration = registration
        self.sibling = OneOfSiblings(name, self._register)
        self.sibling.start()

    def _register(self) -> Any:
        self.registered += 1
        return self._registration or self.matchmaker.register("web", HOST)

    def end(self, drain_seconds: float = 0.0) -> None:
        self.sibling.stop(drain_seconds)
        self.matchmaker.close()


@pytest.fixture
def memory() -> Memory:
    return Memory()


@pytest.fixture
def name() -> Iterator[str]:
    name = uuid.uuid4().hex
    yield name
    lock_path(name).unlink(missing_ok=True)


def hosts(memory: Memory) -> list[str]:
    return [str(host) for host in memory.lookup("web", timeout_seconds=5)]


def test_one_registers_and_another_takes_over(memory: Memory, name: str) -> None:
    """Whoever holds the lock; the last one withdraws for the application."""
    one, two = Worker(memory, name), Worker(memory, name)
    eventually(lambda: hosts(memory), lambda found: found == [HOST])
    first, second = (one, two) if one.registered else (two, one)
    assert (first.registered, second.registered) == (1, 0)
    first.end(drain_seconds=60)  # which it does not wait for, as it is not the last
    eventually(lambda: second.registered, lambda count: count == 1)
    eventually(lambda: hosts(memory), lambda found: found == [HOST])
    second.end()
    assert hosts(memory) == []


def test_other_applications_have_other_locks(memory: Memory, name: str) -> None:
    """Both register."""
    one, two = Worker(memory, name), Worker(memory, name + "2")
    eventually(lambda: (one.registered, two.registered), lambda both: both == (1, 1))
    one.end()
    two.end()
    lock_path(name + "2").unlink()


@contextmanager
def forked(first: Callable[[], None] = lambda: None) -> Iterator[None]:
    """A child that does *first* and then lives as long as the context."""
    is_ready, ready = os.pipe()
    is_over, over = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.close(over)
            first()
            os.write(ready, b"x")
            os.read(is_over, 1)
        finally:
            os._exit(0)
    os.close(ready)
    os.close(is_over)
    said = os.read(is_ready, 1)
    try:
        assert said == b"x", "the child failed"
        yield
    finally:
        os.close(over)
        os.close(is_ready)
        os.waitpid(child, 0)


def test_a_child_of_the_one_that_ends_keeps_nobody_from_taking_over(
    memory: Memory, name: str
) -> None:
    """The child has its parent's open files: not this one, so that the lock is free."""
    one = Worker(memory, name)
    eventually(lambda: hosts(memory), lambda found: found == [HOST])
    with forked():
        two = Worker(memory, name)
        one.end()
        eventually(lambda: two.registered, lambda count: count == 1)
        assert hosts(memory) == [HOST]
        two.end()
    assert hosts(memory) == []


def test_the_last_one_drains_though_it_has_a_child(memory: Memory, name: str) -> None:
    """It does not take its own child for a sibling that has taken over."""
    drained: list[float] = []
    one = Worker(memory, name, SimpleNamespace(drain=drained.append))
    eventually(lambda: one.registered, lambda count: count == 1)
    with forked():
        one.end(drain_seconds=3.0)
    assert drained == [3.0]


def test_a_child_of_one_that_crashed_keeps_nobody_from_taking_over(
    memory: Memory, name: str
) -> None:
    """Then nobody unlocks: the file has to be closed in the child."""
    is_over, over = os.pipe()
    crashing = os.fork()
    if crashing == 0:
        try:
            os.close(over)
            one = Worker(memory, name)
            eventually(lambda: one.registered, lambda count: count == 1)
            if os.fork() == 0:
                os.read(is_over, 1)
        finally:
            os._exit(0)
    os.close(is_over)
    os.waitpid(crashing, 0)
    two = Worker(memory, name)
    eventually(lambda: two.registered, lambda count: count == 1)
    two.end()
    os.close(over)


def test_a_child_that_stops_what_its_parent_started_takes_nothing_from_it(
    memory: Memory, name: str
) -> None:
    """Neither the lock, though both have the same open file, nor the registration."""
    one = Worker(memory, name)
    eventually(lambda: one.registered, lambda count: count == 1)
    two = Worker(memory, name)
    with forked(first=lambda: one.end(drain_seconds=60)):
        time.sleep(0.5)
    assert (one.registered, two.registered) == (1, 0)
    assert hosts(memory) == [HOST]
    two.end()
    one.end()


class Agent(Server):
    """An agent that takes every registration, and shows it in its catalog."""

    def __init__(self) -> None:
        self.services: dict[str, Any] = {}
        super().__init__(self._answer)

    def _answer(self, request: Any) -> bytes:
        if request.path == "/v1/agent/service/register":
            service = json.loads(request.body)
            self.services[service["ID"]] = service
        elif request.path.startswith("/v1/agent/service/deregister/"):
            self.services.pop(request.path.rpartition("/")[2], None)
        elif request.path == "/v1/agent/services":
            return reply(body=json.dumps(self.services).encode())
        elif request.path == "/v1/agent/self":
            return reply(body=b'{"Config": {"NodeID": "1"}}')
        elif request.path.startswith("/v1/health/service/"):
            found = json.dumps(list(self.services)).encode()
            return reply(body=found, headers=["X-Consul-Index: 5"])
        return reply()


def test_an_asgi_application_is_registered_while_it_serves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After its own start-up, and until before its own shutdown; its state is passed on."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))  # where the lock is
    said: list[str] = []

    @asynccontextmanager
    async def inner(app: Any) -> AsyncIterator[dict[str, str]]:
        said.append("started")
        yield {"a": "b"}
        said.append(f"shut down with {len(agent.services)}")

    async def serve() -> None:
        topic = f"web-{uuid.uuid4().hex[:8]}"
        url = f"consul+service://{agent.address}"
        wrapped = asgi.lifespan(topic, HOST, tags=["blue"], url=url, drain_seconds=0, inner=inner)
        async with wrapped("app") as state:
            assert state == {"a": "b"}
            for _ in range(500):
                if agent.services:
                    break
                await asyncio.sleep(0.01)
            (service,) = agent.services.values()
            assert (service["Name"], service["Tags"]) == (topic, ["blue"])

    with Agent() as agent:
        asyncio.run(serve())
    assert said == ["started", "shut down with 0"]


def test_what_cannot_be_registered_fails_the_start() -> None:
    """Not later on a thread where nobody sees it."""

    async def serve() -> None:
        async with asgi.lifespan("web", "nonsense", url="consul+service://127.0.0.1:1")("app"):
            raise AssertionError("it started")

    with pytest.raises(ConfigurationError):
        asyncio.run(serve())


class Master:
    """gunicorn's, as far as hooks see it: what it notes is how many services there are."""

    def __init__(self, agent: Agent) -> None:
        self._agent = agent
        self.stopped: list[tuple[bool, int]] = []

    def stop(self, graceful: bool = True) -> None:
        self.stopped.append((graceful, len(self._agent.services)))


@pytest.fixture
def agent() -> Iterator[Agent]:
    with Agent() as agent:
        yield agent


def master_of(agent: Agent, drain_seconds: float) -> tuple[Master, gunicorn.Hook]:
    """A master that has registered; and its on_exit."""
    url = f"consul+service://{agent.address}"
    master = Master(agent)
    when_ready, on_exit = gunicorn.hooks("web", HOST, url=url, drain_seconds=drain_seconds)
    when_ready(master)
    eventually(lambda: len(agent.services), lambda count: count == 1)
    return master, on_exit


def test_gunicorns_master_withdraws_before_it_stops_listening(agent: Agent) -> None:
    """Once, however often it is told to stop."""
    master, on_exit = master_of(agent, drain_seconds=1.0)
    began = time.monotonic()
    master.stop()
    assert time.monotonic() - began >= 1.0
    assert master.stopped == [(True, 0)]
    began = time.monotonic()
    master.stop()
    on_exit(master)
    assert time.monotonic() - began < 1.0
    assert master.stopped == [(True, 0), (True, 0)]


def test_gunicorns_master_that_ends_at_once_does_not_drain(agent: Agent) -> None:
    """SIGINT and SIGQUIT: stop(False), and then again stop()."""
    master, _ = master_of(agent, drain_seconds=60)
    master.stop(False)
    master.stop()
    assert master.stopped == [(False, 0), (True, 0)]


def test_gunicorns_master_withdraws_at_exit_where_it_was_not_stopped(agent: Agent) -> None:
    """Also by the hooks of a configuration that HUP has executed again."""
    master, _ = master_of(agent, drain_seconds=0.01)
    _, on_exit = gunicorn.hooks("web", HOST, url=f"consul+service://{agent.address}")
    on_exit(master)
    assert agent.services == {}
    on_exit(master)


def test_gunicorns_workers_withdraw_nothing(agent: Agent) -> None:
    """Whatever they call of what they have from the master."""
    master, on_exit = master_of(agent, drain_seconds=60)

    def end() -> None:
        master.stop()
        on_exit(master)

    with forked(first=end):
        assert len(agent.services) == 1
    master.stop(False)
    assert master.stopped == [(False, 0)]


def test_gunicorns_master_stops_though_withdrawing_fails(
    agent: Agent, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing keeps it running."""
    master, _ = master_of(agent, drain_seconds=0)
    close = Matchmaker.close

    def failing(matchmaker: Matchmaker, timeout_seconds: float) -> None:
        close(matchmaker, timeout_seconds)
        raise ZeroDivisionError

    monkeypatch.setattr(Matchmaker, "close", failing)
    with pytest.raises(ZeroDivisionError):
        master.stop()
    assert master.stopped == [(True, 0)]
