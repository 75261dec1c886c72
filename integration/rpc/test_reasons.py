"""What a message that nobody took says: the reason that helps, not that the time is over."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable
from typing import Any

import pytest

from consul_matchmaker.adapters.oslo.http.names import service_of
from integration.access_rules import guarded_cluster
from integration.rpc.conftest import FOUND_SECONDS, Served, wait_for_hosts
from integration.rpc.peers import Peer, answer
from integration.waiting import until

Make = Callable[..., Any]
SOON = 0.5
"""The timeout of calls that cannot succeed."""
CONSUL_IS_AWAY = "check that a Consul agent listens there"


def test_a_call_that_found_no_room_says_so(
    serve: Callable[..., Served], client: Make, topic: str
) -> None:
    """Not what its last try met, for which no time was left."""
    import oslo_messaging

    full = serve(topic, "full", max_messages=1)
    caller = client(topic)
    wait_for_hosts(caller, 1)
    caller.cast({}, "hold", what="held")
    until(lambda: full.endpoint.got, FOUND_SECONDS, "it is full")
    with pytest.raises(oslo_messaging.MessagingTimeout, match="it has too much to do"):
        caller.prepare(timeout=SOON).call({}, "who")


def test_where_consul_cannot_be_asked_the_error_says_so(
    client: Make, url_of: Callable[..., str], refusing_port: int, topic: str
) -> None:
    """Not that nobody listens, which nobody knows."""
    import oslo_messaging

    caller = client(topic, url=url_of(f"127.0.0.1:{refusing_port}"))
    with pytest.raises(oslo_messaging.MessagingTimeout, match=CONSUL_IS_AWAY):
        caller.prepare(timeout=SOON).call({}, "who")
    with pytest.raises(oslo_messaging.MessageDeliveryFailure, match=CONSUL_IS_AWAY):
        caller.prepare(retry=0).cast({}, "note", what="x")


def test_a_mandatory_message_says_that_consul_cannot_be_asked(
    client: Make, url_of: Callable[..., str], refusing_port: int, topic: str
) -> None:
    """It is undeliverable all the same: nobody has it."""
    import oslo_messaging

    options = oslo_messaging.TransportOptions(at_least_once=True)
    url = url_of(f"127.0.0.1:{refusing_port}")
    caller = client(topic, url=url, transport_options=options)
    with pytest.raises(oslo_messaging.MessageUndeliverable) as caught:
        caller.prepare(timeout=SOON).call({}, "who")
    assert CONSUL_IS_AWAY in str(caught.value.exception)


def test_the_clock_is_no_reason_where_there_is_another(
    client: Make, operator: Callable[..., str], topic: str
) -> None:
    """A last round that the timeout ends does not replace what the one before it has found."""
    import oslo_messaging

    ended = threading.Event()

    def has_no_room_and_stops_reading(sock: socket.socket, body: bytes) -> None:
        sock.sendall(answer(503))
        ended.wait(FOUND_SECONDS)

    with Peer(has_no_room_and_stops_reading) as peer:
        operator(service_of("openstack", topic), peer.port)
        caller = client(topic)
        wait_for_hosts(caller, 1)
        with pytest.raises(oslo_messaging.MessagingTimeout, match="it has too much to do"):
            caller.prepare(timeout=2).call({}, "note", what="x" * (8 * 1024 * 1024))
        ended.set()
        assert len(peer.ids) == 1


def test_a_datacenter_that_cannot_be_asked_is_named_where_nobody_was_found(
    client: Make, topic: str
) -> None:
    """Whether somebody listens there nobody knows."""
    import oslo_messaging

    caller = client(topic, datacenters="dc1,elsewhere")
    with pytest.raises(oslo_messaging.MessagingTimeout, match="Consul cannot be asked") as caught:
        caller.prepare(timeout=SOON).call({}, "who")
    assert "elsewhere" in str(caught.value)


def test_a_datacenter_that_cannot_be_asked_stands_beside_the_hosts_that_failed(
    client: Make, operator: Callable[..., str], refusing_port: int, topic: str
) -> None:
    """Both are told: others may be there."""
    import oslo_messaging

    dead = operator(service_of("openstack", topic), refusing_port)
    caller = client(topic, datacenters="dc1,elsewhere")
    wait_for_hosts(caller, 1)
    with pytest.raises(oslo_messaging.MessageDeliveryFailure, match="Consul cannot be") as caught:
        caller.prepare(retry=0).cast({}, "note", what="x")
    assert f"{dead}: " in str(caught.value)


def test_a_token_that_consul_refuses_is_told(client: Make, topic: str) -> None:
    """Not that nobody listens: this client is shown nobody."""
    import oslo_messaging

    with guarded_cluster() as cluster:
        caller = client(topic, agent_address=cluster.nodes["server1"].http)
        with pytest.raises(oslo_messaging.MessageDeliveryFailure, match="oken") as caught:
            caller.prepare(retry=0).cast({}, "note", what="x")
    assert "Consul cannot be asked who listens" in str(caught.value)
