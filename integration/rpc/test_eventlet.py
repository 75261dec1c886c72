"""In a process that eventlet has patched, servers and clients work by green threads."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from consul_matchmaker.testing.consul_probe import Node
from integration.rpc.conftest import FOUND_SECONDS
from integration.rpc.green_process import AT_A_TIME, MONITOR_SECONDS
from integration.rpc.service_process import ServiceProcess
from integration.rpc.test_prefork import registered
from integration.rpc.transports import Transport
from integration.waiting import until

RUN_SECONDS = 60.0


def ran(url: str, topic: str, *words: str) -> dict[str, Any]:
    """What came of `green_process`."""
    module = ["integration.rpc.patched", "integration.rpc.green_process"]
    command = [sys.executable, "-W", "ignore", "-m", *module, url, topic, *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=RUN_SECONDS, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("Traceback") <= 2, done.stderr  # of the method that fails as asked
    found = json.loads(done.stdout)
    assert isinstance(found, dict)
    print(found)
    return found


def check(found: dict[str, Any]) -> None:
    """What holds whoever serves."""
    assert found["echo"] == "said"
    assert found["at a time"] == [0.5] * AT_A_TIME
    assert found["at a time, seconds"] < 0.5 * AT_A_TIME / 2, "one does not wait for another"
    assert found["monitored"] == 2 * MONITOR_SECONDS
    assert found["ticks"] > 50, "others run while a call waits"
    assert found["failed"] == "as asked"


def test_servers_and_clients_in_one_process(
    url_of: Callable[..., str], agent: Node, topic: str
) -> None:
    """Calls, also several at a time and one with heartbeats, a cast to one, a fanout to both; and
    it ends without a registration left."""
    found = ran(url_of(), topic, "--serve")
    check(found)
    assert found["got"] == [[1, 2], [2]]
    assert registered(agent, topic) == []


def test_a_client_of_a_server_with_threads(
    url_of: Callable[..., str], tmp_path: Path, topic: str
) -> None:
    """The same calls; what is cast and fanned out is executed by a process without eventlet."""
    record = tmp_path / "record"
    with ServiceProcess(Transport("consul", url_of()), topic, record=record) as service:
        service.wait_ready()
        check(ran(url_of(), topic))

        def got() -> list[str]:
            return sorted(line.split()[0] for line in record.read_text().splitlines())

        until(lambda: len(got()) >= 2, FOUND_SECONDS, "both are executed")
        assert got() == ["1", "2"]


def test_a_client_with_threads_of_a_server_under_eventlet(
    url_of: Callable[..., str], client: Callable[..., Any], tmp_path: Path, topic: str
) -> None:
    """Calls, one with heartbeats, casts; SIGTERM ends the server with 0."""
    record = tmp_path / "record"
    over = Transport("consul", url_of())
    with ServiceProcess(over, topic, record=record, executor="eventlet") as service:
        service.wait_ready()
        caller = client(topic)
        assert [caller.call({}, "echo", text=str(number)) for number in range(20)] == [
            str(number) for number in range(20)
        ]
        monitored = caller.prepare(call_monitor_timeout=MONITOR_SECONDS)
        assert monitored.call({}, "slow", seconds=2 * MONITOR_SECONDS) == 2 * MONITOR_SECONDS
        for number in range(20):
            caller.cast({}, "record", number=number)
        until(lambda: len(record.read_text().splitlines()) >= 20, FOUND_SECONDS, "all are executed")
        assert service.stop() == 0
