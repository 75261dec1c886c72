"""Servers with several workers are one registration, whatever happens to the workers."""

from __future__ import annotations

import http.client
import os
import signal
import subprocess
import sysconfig
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from consul_matchmaker.testing.consul_probe import Node
from integration.cluster import ask, free_ports
from integration.waiting import until

WORKERS = 4
START_SECONDS = 20.0  # four interpreters on a busy machine
CHECK_TTL = 3.0
UVICORN = ["uvicorn", "integration.web:app", "--workers", str(WORKERS), "--log-level", "warning"]
GUNICORN = ["gunicorn", "integration.web:wsgi", "-w", str(WORKERS), "-c", "integration/web.py"]


@pytest.fixture(autouse=True)
def programs() -> None:
    """What these tests start; not at import, as the module is collected for others as well."""
    for name in ("gunicorn", "starlette", "uvicorn"):
        pytest.importorskip(name)


def instances(agent: Node, topic: str) -> int:
    return len(ask(agent, f"/v1/health/service/{topic}?passing"))


@contextmanager
def server(
    command: list[str], agent: Node, topic: str
) -> Iterator[tuple[subprocess.Popen[bytes], int]]:
    (port,) = free_ports(1)
    host = f"127.0.0.1:{port}"
    where = ["--port", str(port)] if command is UVICORN else ["-b", host]
    process = subprocess.Popen(
        # Not `python -m gunicorn`, which USR2 cannot start again.
        [Path(sysconfig.get_path("scripts"), command[0]), *command[1:], *where],
        env={
            **os.environ,
            "PYTHONPATH": str(Path(__file__).parent.parent),
            "WEB_HOST": host,
            "WEB_TOPIC": topic,
            "CONSUL_MATCHMAKER_URL": f"consul+service://{agent.http}",
        },
        start_new_session=True,
    )
    try:
        yield process, port
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def answered(port: int) -> int:
    """The worker's process id.  Asks again, as proxies do, where the connection was closed without
    a byte of an answer: uvicorn alone does so to 2 of 83,278 requests in 8 rolling restarts, as a
    worker that is told to end has accepted them and not read them yet."""
    with suppress(ConnectionResetError):
        return _answered(port)
    return _answered(port)


def _answered(port: int) -> int:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
    try:
        connection.request("GET", "/")
        return int(connection.getresponse().read())
    finally:
        connection.close()


class Load:
    """Four clients that ask all the time, each request over a connection of its own."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._is_over = threading.Event()
        self._outcomes: list[bool] = []
        self._threads = [threading.Thread(target=self._run) for _ in range(4)]

    @property
    def asked(self) -> int:
        return len(self._outcomes)

    @property
    def failed(self) -> int:
        return self._outcomes.count(False)

    def _run(self) -> None:
        while not self._is_over.wait(0.005):
            try:
                answered(self._port)
            except (OSError, http.client.HTTPException):
                self._outcomes.append(False)
            else:
                self._outcomes.append(True)

    def __enter__(self) -> Load:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._is_over.set()
        for thread in self._threads:
            thread.join()


@pytest.mark.parametrize("command", [UVICORN, GUNICORN], ids=["uvicorn", "gunicorn"])
def test_four_workers_are_one_instance(command: list[str], agent: Node, topic: str) -> None:
    """Also while workers are killed; withdrawn at the end, once nobody is sent there any more."""
    with server(command, agent, topic) as (process, port):
        until(lambda: instances(agent, topic) == 1, START_SECONDS, "registered")
        time.sleep(2)
        assert instances(agent, topic) == 1
        workers = {answered(port) for _ in range(200)}
        assert len(workers) > 1
        seen: set[int] = set()
        for worker in workers:
            os.kill(worker, signal.SIGKILL)
            for _ in range(10):
                seen.add(instances(agent, topic))
                time.sleep(0.05)
        assert 0 not in seen, "it was never missing"
        until(lambda: instances(agent, topic) == 1, CHECK_TTL + 2, "one again")
        process.send_signal(signal.SIGTERM)
        until(lambda: instances(agent, topic) == 0, 10, "withdrawn")
        assert process.wait(10) in (0, -signal.SIGTERM)


@pytest.mark.parametrize("command", [UVICORN, GUNICORN], ids=["uvicorn", "gunicorn"])
def test_a_rolling_restart_fails_no_request(command: list[str], agent: Node, topic: str) -> None:
    """HUP replaces the workers: the application is registered all the time."""
    with server(command, agent, topic) as (process, port):
        until(lambda: instances(agent, topic) == 1, START_SECONDS, "registered")
        before = {answered(port) for _ in range(100)}
        counts: set[int] = set()

        def is_replaced() -> bool:
            counts.add(instances(agent, topic))
            return not before & {answered(port) for _ in range(50)}

        with Load(port) as load:
            process.send_signal(signal.SIGHUP)
            until(is_replaced, 2 * START_SECONDS, "replaced")
            until(lambda: load.asked >= 500, START_SECONDS, "load enough")
        assert 0 not in counts
        until(lambda: instances(agent, topic) == 1, CHECK_TTL + 1, "one")
        print(f"{load.failed} of {load.asked} requests failed")
        assert load.failed == 0


def hang_up(process: subprocess.Popen[bytes], port: int) -> None:
    """HUP, and wait until every worker is another."""
    before = {answered(port) for _ in range(100)}
    process.send_signal(signal.SIGHUP)
    until(lambda: not before & {answered(port) for _ in range(50)}, 2 * START_SECONDS, "replaced")


@pytest.mark.parametrize("is_reloaded", [False, True], ids=["at once", "after HUP"])
def test_gunicorn_serves_until_nobody_finds_it(is_reloaded: bool, agent: Node, topic: str) -> None:
    """It withdraws, drains, and only then stops listening."""
    with server(GUNICORN, agent, topic) as (process, port):
        until(lambda: instances(agent, topic) == 1, START_SECONDS, "registered")
        if is_reloaded:
            hang_up(process, port)
        with Load(port) as load:
            until(lambda: load.asked >= 50, START_SECONDS, "load")
            process.send_signal(signal.SIGTERM)
            took = until(lambda: instances(agent, topic) == 0, 10, "withdrawn")
            answered(port)
        print(f"withdrawn after {took:.2f} s; {load.failed} of {load.asked} requests failed")
        assert load.failed == 0
        assert process.wait(10) == 0
        assert ask(agent, f"/v1/health/service/{topic}") == [], "nothing is left for the TTL"


def test_a_new_master_takes_over_from_the_old_one(agent: Node, topic: str) -> None:
    """USR2: the new master is a forked child of the old one, which withdraws itself alone."""
    with server(GUNICORN, agent, topic) as (process, port):
        until(lambda: instances(agent, topic) == 1, START_SECONDS, "registered")
        process.send_signal(signal.SIGUSR2)
        until(lambda: instances(agent, topic) == 2, START_SECONDS, "both registered")
        counts: set[int] = set()

        def has_ended() -> bool:
            counts.add(instances(agent, topic))
            return process.poll() is not None

        process.send_signal(signal.SIGTERM)
        until(has_ended, START_SECONDS, "ended")
        time.sleep(CHECK_TTL)
        assert 0 not in counts
        assert instances(agent, topic) == 1
        answered(port)
