"""Targets and hosts of oslo.messaging, there and back."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from consul_matchmaker.adapters.oslo.zmq.names import (
    addresses_of,
    host_of,
    key_of,
    name_of,
    publisher_of,
    read_key,
    server_of,
    topic_of,
)
from consul_matchmaker.backends.kv.keys import Key, checked_registration
from consul_matchmaker.model import Host


def target(topic: str, server: str | None = None, fanout: bool = False) -> SimpleNamespace:
    return SimpleNamespace(topic=topic, server=server, fanout=fanout)


@given(st.one_of(st.text(st.characters(exclude_categories=["Cs"]), min_size=1), st.binary()))
def test_hosts_come_back_as_they_were(name: str | bytes) -> None:
    """Whatever the text or the bytes, in the same type, also by way of a KV key."""
    host = host_of(name)
    found = name_of(host)
    assert found == name
    assert type(found) is type(name)
    from consul_matchmaker.model import Registration

    lease_id = "00000000-0000-0000-0000-000000000000"
    registration = checked_registration(Registration("t", host))
    key = Key.of(registration, lease_id).under("p")
    assert Key.parse("p", key).host == host


def test_addresses_stay_addresses() -> None:
    """Where a server listens is a host with a port, as the command line shows it."""
    assert host_of("10.0.0.5:9501") == Host("10.0.0.5", 9501)
    assert name_of(Host("10.0.0.5", 9501)) == "10.0.0.5:9501"
    assert host_of("node_7:9501").port == 9501
    assert host_of("::1:9501").port is None  # upstream puts no brackets: kept as it is


@pytest.mark.parametrize("text", ["plain", "b:\u20ac"])
def test_opaque_hosts_of_others_are_texts(text: str) -> None:
    """What another program registered is handed on, also when it only looks like our bytes."""
    assert name_of(Host.opaque(text)) == text


def test_two_listeners_never_share_a_topic() -> None:
    """The topic of a direct listener is its own name; all others differ from every such name."""
    pairs = [("sched", "ROUTER"), ("sched", "DEALER"), ("DEALER/sched", "ROUTER")]
    topics = [topic_of(*pair) for pair in pairs]
    assert topics == ["sched", "DEALER/sched", "ROUTER/DEALER/sched"]


@pytest.mark.parametrize(
    ("asked", "key", "server"),
    [
        (target("sched"), "ROUTER/sched", None),
        (target("sched", "node7"), "ROUTER/sched/node7", "node7"),
        (target("sched", "node7@lvm"), "ROUTER/sched/node7", "node7"),
        (target("sched", "node7", fanout=True), "ROUTER/sched", None),
    ],
)
def test_keys_are_those_of_upstream(asked: SimpleNamespace, key: str, server: str | None) -> None:
    """What its routing table asks for is what the target was registered and looked up under."""
    assert key_of(asked, "ROUTER") == key
    assert server_of(asked) == server
    assert read_key(key) == ("sched", server)


def test_publishers_are_pairs() -> None:
    """A proxy's two addresses come back as a tuple."""
    pair = ("10.0.0.1:5001", "10.0.0.1:5002")
    assert addresses_of(publisher_of(pair)) == pair
