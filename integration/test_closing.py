"""The end of a Matchmaker and of its process while Consul hangs: in time, and nothing is left."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from consul_matchmaker.registrations.keeper import EXIT_SECONDS
from consul_matchmaker.testing.consul_probe import Node
from integration.cluster import Cluster
from integration.readers import SCHEDULER_SECONDS, Operators, matchmaker
from integration.waiting import threads_since, until

CLOSE_SECONDS = 2.0


@pytest.mark.parametrize("mode", ["catalog", "kv"])
def test_close_leaves_no_thread_while_consul_hangs(
    cluster: Cluster, agent: Node, prefix: str, topic: str, tmp_path: Path, mode: str
) -> None:
    """Whatever its threads wait for: polls, beats, renewals, lookups; and in time."""
    before = set(threading.enumerate())
    if mode == "kv":
        values = {"prefix": prefix, "liveness": "check", "session_ttl_seconds": 10}
        mm = matchmaker("kv", agent.http, state_path=str(tmp_path), **values)
        mm.register(topic, "10.0.0.1:5001").wait_until_published(timeout_seconds=10)
    else:
        mm = matchmaker("catalog", agent.dns, state_path=str(tmp_path))
    with Operators(agent, topic) if mode == "catalog" else contextlib.nullcontext():
        until(lambda: len(mm.hosts(topic)), 10)
        cluster.pause("agent1")
        until(lambda: mm.hosts(topic).is_stale, 10)
        assert threads_since(before)
        began = time.monotonic()
        mm.close(CLOSE_SECONDS)
        assert time.monotonic() - began < CLOSE_SECONDS + SCHEDULER_SECONDS
        until(lambda: not threads_since(before), SCHEDULER_SECONDS, "no thread is left")
        cluster.resume("agent1")


def test_a_process_ends_in_time_while_consul_hangs(
    cluster: Cluster, agent: Node, prefix: str
) -> None:
    """Without close(): it tries to leave, for as long as it says and no longer."""
    program = f"""
import sys
from consul_matchmaker import Matchmaker
mm = Matchmaker.from_url("consul+kv://{agent.http}/{prefix}?liveness=check&session_ttl_seconds=10")
mm.register("scheduler", "10.0.0.1:5001").wait_until_published(timeout_seconds=10)
mm.hosts("scheduler")
print("ready", flush=True)
sys.stdin.readline()
"""
    with subprocess.Popen(
        [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdin is not None and process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        cluster.pause("agent1")
        began = time.monotonic()
        process.stdin.write("\n")
        process.stdin.flush()
        assert process.wait(30) == 0
        assert time.monotonic() - began < EXIT_SECONDS + 2 * SCHEDULER_SECONDS
        cluster.resume("agent1")
