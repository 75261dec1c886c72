"""Older oslo.messaging releases whose ZeroMQ driver today's Python still imports, hosts in Consul.

Each asked its matchmaker in another way (facts/oslo-messaging.md).  Between 5.17 and 8.0 the driver
has names that are keywords since Python 3.7.
"""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from consul_matchmaker.testing.consul_probe import Node
from integration.oslo.calls import answers
from integration.oslo.rpc_process import RpcProcess
from integration.waiting import until

INSTALL_SECONDS = 300
# What they have by default: 5.10 the latter two, 2.6 the first.
NO_PROXY = {"zmq_use_broker": False, "use_router_proxy": False, "use_pub_sub": False}


@pytest.mark.parametrize("version", ["2.6.1", "4.6.1", "5.10.0", "5.17.1"])
def test_call_cast_fanout_direct(
    version: str,
    agent: Node,
    prefix: str,
    topic: str,
    tmp_path: Path,
    start: Callable[..., RpcProcess],
) -> None:
    """Each reaches whom it should, by every way to name our matchmaker; who stops is gone."""
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps"]
    names = [f"oslo.messaging=={version}", "retrying"]
    subprocess.run(
        [*pip, "--target", str(tmp_path / "release"), *names], check=True, timeout=INSTALL_SECONDS
    )
    environment = {
        "PYTHONPATH": str(tmp_path / "release"),
        "CONSUL_MATCHMAKER_ADDRESSES": agent.http,
        "CONSUL_MATCHMAKER_PREFIX": prefix,
    }
    named = {**NO_PROXY, "rpc_zmq_matchmaker": "consul"}
    client = start("zmq://", "eventlet", environment, **named)
    if version == "2.6.1":  # it has no other way
        server, other = (start("zmq://", "eventlet", environment, **named) for _ in range(2))
    else:
        place = f"{agent.http}/{prefix}"
        server = start(f"zmq+consul://{place}", "eventlet", environment, **NO_PROXY)
        other = start(f"consul+zmq://{place}", "eventlet", environment, **NO_PROXY)
    for process in (server, other, client):
        assert process.ask("release").startswith(environment["PYTHONPATH"])
    server.ask("serve", topic=topic, server="server0")
    other.ask("serve", topic=topic, server="server1")
    assert len(client.ask("hosts", topic=topic)) == 2
    assert set(answers(client.ask("calls", topic=topic, count=20))) == {"server0", "server1"}
    direct = client.ask("calls", topic=topic, server="server1", count=5)
    assert set(answers(direct)) == {"server1"}
    client.ask("cast", topic=topic, text="all", fanout=True)
    until(lambda: server.ask("got") == ["server0:all"], 10, "a fanout here")
    until(lambda: other.ask("got") == ["server1:all"], 10, "a fanout there")
    server.ask("stop", server="server0")
    until(lambda: len(client.ask("hosts", topic=topic)) == 1, 10, "one is left")
