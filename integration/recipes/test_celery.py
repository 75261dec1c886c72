"""docs/recipes/celery.md: its program, on a real Redis that is killed, and comes back demoted."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import redis

from integration.cluster import free_ports
from integration.command_line import running, said
from integration.oslo.redis_server import Redis
from integration.recipes.pages import LONG_SECONDS, Running
from integration.waiting import until

SEND = """\
import itertools, time
from tasks import add
for number in itertools.count():
    try:
        add.delay(number, 0)
    except add.app.connection().connection_errors + (add.OperationalError,) as error:
        print("failed", type(error).__name__, flush=True)
    else:
        print("sent", number, flush=True)
    time.sleep(0.2)
"""


class Broker:
    """A Redis server, which some process registers while it is the primary."""

    def __init__(self, folder: Path, stack: contextlib.ExitStack) -> None:
        folder.mkdir()
        (port,) = free_ports(1)
        self.server = stack.enter_context(Redis(folder, port))
        self.client = redis.Redis(port=port, socket_timeout=LONG_SECONDS)
        self.client.config_set("repl-diskless-sync-delay", 0)
        self.port = port
        self._stack = stack

    def register(self, url: str) -> None:
        words = ["register", "broker", self.server.address, "--tag", "primary", "--url", url]
        self._beside = self._stack.enter_context(running(*words))
        said(self._beside, "registered")

    def kill(self) -> None:
        """As its machine would die: nobody is left to withdraw it."""
        self.server.kill()
        self._beside.kill()

    def is_done(self) -> bool:
        """Whether no task waits, and none is in a worker's hands."""
        return not self.client.exists("celery", "unacked")

    def follow(self, primary: Broker) -> None:
        self.client.replicaof("127.0.0.1", primary.port)
        until(
            lambda: self.client.info("replication")["master_link_status"] == "up",
            LONG_SECONDS,
            "replicated",
        )


@pytest.fixture
def brokers(tmp_path: Path) -> Iterator[tuple[Broker, Broker]]:
    with contextlib.ExitStack() as stack:
        yield Broker(tmp_path / "first", stack), Broker(tmp_path / "second", stack)


def executed(worker: Running) -> int:
    return worker.said().count("succeeded in")


def test_worker_and_client_move_to_the_new_broker(
    start: Callable[..., Running], url: str, brokers: tuple[Broker, Broker]
) -> None:
    """And stay there when the old one is back, as a replica that takes no tasks."""
    first, second = brokers
    second.follow(first)
    first.register(url)
    variables = {"CONSUL_MATCHMAKER_URL": f"{url}?tag=primary"}
    words = ["celery", "-A", "tasks", "worker", "--concurrency", "1", "--loglevel", "INFO"]
    worker = start("celery.md", *words, **variables)
    client = start("celery.md", "python", "-c", SEND, **variables)
    worker.until(lambda: executed(worker) > 2, "tasks are executed")
    # While it has no task in its hands: that can end a worker, as the page says.
    client.process.send_signal(signal.SIGSTOP)
    worker.until(first.is_done, "every task is executed and acknowledged")
    first.kill()
    client.process.send_signal(signal.SIGCONT)
    before = client.wait_for("failed")
    second.client.replicaof("NO", "ONE")
    second.register(url)
    client.wait_for("sent", after=before)
    count = executed(worker)
    worker.until(lambda: executed(worker) > count + 2, "tasks are executed again")
    first.server.start()
    first.follow(second)
    second.client.client_kill_filter(_type="normal")
    count = executed(worker)
    worker.until(lambda: executed(worker) > count + 2, "and after connections broke")
