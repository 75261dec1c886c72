"""The classic API, Folsom to Kilo, without any oslo: the data is upstream's own example."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator

import pytest

from consul_matchmaker import Matchmaker, errors
from consul_matchmaker.adapters import matchmaker_consul
from consul_matchmaker.adapters.oslo.zmq.classic import (
    MatchMakerConsul,
    MatchMakerException,
)
from consul_matchmaker.backends.memory import Memory

from .contract import eventually
from .doubles import catalog, kv

pytestmark = pytest.mark.system

CONDUCTORS = ["controller1", "node1", "node2", "node3"]


@pytest.fixture
def memory() -> Memory:
    return Memory()


@pytest.fixture
def own(memory: Memory) -> Iterator[Matchmaker]:
    with Matchmaker(kv(empty_ttl_seconds=0, ttl_seconds=0), backend=memory) as matchmaker:
        yield matchmaker


@pytest.fixture
def matcher(own: Matchmaker) -> MatchMakerConsul:
    matcher = MatchMakerConsul(own)
    for host in CONDUCTORS:
        matcher.register("conductor", host)
    matcher.register("cert", "controller1")
    eventually(lambda: len(matcher.queues("fanout~conductor")) == 4, bool)
    eventually(lambda: len(matcher.queues("fanout~cert")) == 1, bool)
    return matcher


def test_queues(matcher: MatchMakerConsul) -> None:
    """``topic`` is one host after the other, ``fanout~topic`` all, ``topic.host`` that one."""
    everybody = [(f"conductor.{host}", host) for host in CONDUCTORS]
    assert matcher.queues("fanout~conductor") == everybody
    assert sorted(matcher.queues("conductor")[0] for _ in range(4)) == everybody
    assert matcher.queues("cert.controller1") == [("cert.controller1", "controller1")]
    assert matcher.queues("l3_agent.node1.example") == [("l3_agent.node1.example", "node1.example")]
    assert matcher.queues("nobody") == matcher.queues("fanout~nobody") == []


def test_unregister_takes_one_host_off_one_topic(matcher: MatchMakerConsul) -> None:
    """Other topics of the host, and other hosts of the topic, stay."""
    matcher.unregister("conductor", "controller1")
    eventually(lambda: len(matcher.queues("fanout~conductor")) == 3, bool)
    assert matcher.queues("cert") == [("cert.controller1", "controller1")]
    assert ("conductor", "controller1") not in matcher.host_topic
    assert "controller1" in matcher.hosts


def test_is_alive(matcher: MatchMakerConsul) -> None:
    """By host, or as upstream's Redis says it, by topic and host."""
    assert matcher.is_alive("conductor", "node1")
    assert matcher.is_alive("conductor", "conductor.node1")
    assert not matcher.is_alive("conductor", "conductor.controller2")


def test_acknowledging_registers_whom_nobody_did(matcher: MatchMakerConsul) -> None:
    """As upstream's tests demand; acknowledging those who are registered changes nothing."""
    matcher.ack_alive("conductor", "node1")
    matcher.send_heartbeats()
    assert len(matcher.hosts) == 4
    matcher.ack_alive("network", "stranger")
    eventually(lambda: matcher.is_alive("network", "stranger"), bool)


def test_an_expired_host_that_lives_returns(matcher: MatchMakerConsul) -> None:
    """Its owner finds out at the next renewal, and here at once."""
    matcher.expire("cert", "cert.controller1")
    matcher.ack_alive("cert", "controller1")
    eventually(lambda: matcher.is_alive("cert", "controller1"), bool)


def test_heartbeat(matcher: MatchMakerConsul, memory: Memory, own: Matchmaker) -> None:
    """It runs from the first registration; stopped, all leave; started again, all are back; and
    with nothing registered there is nothing to start."""
    matcher.start_heartbeat()
    matcher.stop_heartbeat()
    eventually(
        lambda: (
            not memory.lookup("conductor", timeout_seconds=5)
            and not memory.lookup("cert", timeout_seconds=5)
        ),
        bool,
    )
    matcher.start_heartbeat()
    eventually(
        lambda: (
            len(memory.lookup("conductor", timeout_seconds=5)) == 4
            and len(memory.lookup("cert", timeout_seconds=5)) == 1
        ),
        bool,
    )
    with pytest.raises(MatchMakerException, match="Register"):
        MatchMakerConsul(own).start_heartbeat()


def test_bindings_are_tried_in_order(matcher: MatchMakerConsul) -> None:
    """The first that fits answers, alone when it is the last."""

    class All:
        def test(self, key: str) -> bool:
            return True

        def run(self, key: str) -> list[tuple[str, str | None]]:
            return [(key, None)]

    matcher.add_binding(All(), All())
    assert matcher.queues("cert") == [("cert.controller1", "controller1")]
    matcher.bindings.clear()
    matcher.add_binding(All(), All(), last=False)
    matcher.add_binding(All(), All())
    assert matcher.queues("cert") == [("cert", None), ("cert", None)]


def test_catalog_mode_is_a_plain_matchmaker(memory: Memory) -> None:
    """Hosts without ports, as this API has no place for them; registering and the heartbeat are
    accepted and do nothing."""
    memory.declare("scheduler", ["10.0.0.1:9501", "10.0.0.2:9501"])
    with Matchmaker(catalog(), backend=memory) as own:
        matcher = MatchMakerConsul(own)
        matcher.start_heartbeat()
        matcher.register("scheduler", "node9")
        matcher.send_heartbeats()
        matcher.expire("scheduler", "node9")
        matcher.stop_heartbeat()
        found = [(f"scheduler.{host}", host) for host in ("10.0.0.1", "10.0.0.2")]
        assert matcher.queues("fanout~scheduler") == found
        assert matcher.is_alive("scheduler", "10.0.0.1")
        matcher.unregister("scheduler", "node9")


def test_an_outage_is_not_an_empty_answer(matcher: MatchMakerConsul, memory: Memory) -> None:
    """Known topics are answered from memory, an unknown one raises."""
    memory.is_available = False
    assert len(matcher.queues("fanout~conductor")) == 4
    with pytest.raises(errors.Unavailable):
        matcher.queues("unknown")


def test_it_has_the_name_that_users_were_told() -> None:
    """Configuration files name it, so it stays where it was."""
    assert matchmaker_consul.MatchMakerConsul is MatchMakerConsul
    assert matchmaker_consul.MatchMakerException is MatchMakerException


def test_constructed_without_arguments() -> None:
    """As upstream does: without oslo.config it is told by the environment."""
    program = """
import sys
sys.modules["oslo_config"] = None  # any import of it fails
from consul_matchmaker.adapters.oslo.entry_point import matchmaker
assert matchmaker().hosts == set()
"""
    environment = {**os.environ, "CONSUL_MATCHMAKER_URL": "consul+kv://127.0.0.1:1/prefix"}
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60, env=environment)
