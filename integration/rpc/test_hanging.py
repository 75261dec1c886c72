"""What a server that hangs costs its clients: it takes connections and answers nothing."""

from __future__ import annotations

import contextlib
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from consul_matchmaker.adapters.oslo.http.client import FAIR_SECONDS
from consul_matchmaker.adapters.oslo.http.delivery import FANOUT_SECONDS
from consul_matchmaker.adapters.oslo.http.names import service_of
from consul_matchmaker.model import Host
from integration.rpc.certificates import make
from integration.rpc.conftest import CALL_SECONDS, FOUND_SECONDS, matchmaker_of, wait_for_hosts
from integration.waiting import until

Make = Callable[..., Any]
LONG_AVOIDED = {"quarantine_seconds": 60, "quarantine_max_seconds": 60}
SOON = 1.0
"""In seconds: the timeout of what cannot succeed."""


@pytest.fixture
def hanging(operator: Callable[..., str]) -> Iterator[Callable[[str], str]]:
    """Makes hosts of a service that hang: the system takes their connections, and nobody reads."""
    with contextlib.ExitStack() as stack:

        def make(service: str) -> str:
            listener = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
            return operator(service, listener.getsockname()[1])

        yield make


def avoided(transport: Any) -> Any:
    return matchmaker_of(transport).status()["quarantine"]


@pytest.mark.parametrize("kind", ["cast", "fanout", "watched call"])
def test_a_host_that_is_silent_when_it_has_to_speak_is_quarantined(
    kind: str, client: Make, hanging: Callable[[str], str], topic: str
) -> None:
    """A 202 was due at once, or a heartbeat was missed."""
    import oslo_messaging

    service = service_of("openstack", topic)
    host = hanging(service)
    caller = client(topic, delivery_timeout=SOON, call_monitor_timeout=2, **LONG_AVOIDED)
    wait_for_hosts(caller, 1)
    if kind == "fanout":
        caller.prepare(fanout=True).cast({}, "note", what="x")
    elif kind == "cast":
        with pytest.raises(oslo_messaging.MessageDeliveryFailure, match="was not sent again"):
            caller.cast({}, "note", what="x")
    else:
        with pytest.raises(oslo_messaging.MessagingTimeout, match="has not answered"):
            caller.call({}, "note", what="x")
    assert avoided(caller.transport) == {service: [host]}


def test_a_listener_that_hangs_is_quarantined(
    transport: Make, hanging: Callable[[str], str], topic: str
) -> None:
    """A notification has its 202 at once, as a cast."""
    import oslo_messaging

    service = service_of("openstack", f"{topic}.info")
    host = hanging(service)
    over = transport(notifies=True, delivery_timeout=SOON, **LONG_AVOIDED)
    found = matchmaker_of(over)
    until(lambda: len(found.hosts(service)) == 1, FOUND_SECONDS, "it is found")
    target = oslo_messaging.Target(topic=f"{topic}.info")
    with pytest.raises(oslo_messaging.MessageDeliveryFailure, match="was not sent again"):
        over._send_notification(target, {}, {"payload": 1}, version=2.0)
    assert avoided(over) == {service: [host]}


@pytest.mark.parametrize("is_rejected", [False, True])
def test_a_call_without_a_reply_in_time_says_nothing_of_its_host(
    is_rejected: bool, client: Make, hanging: Callable[[str], str], topic: str
) -> None:
    """The method may be slow: the host is not quarantined, and a quarantine is not lifted."""
    import oslo_messaging

    service = service_of("openstack", topic)
    host = hanging(service)
    caller = client(topic, timeout=SOON, **LONG_AVOIDED)
    wait_for_hosts(caller, 1)
    if is_rejected:
        matchmaker_of(caller.transport).reject(service, Host.parse(host))
    with pytest.raises(oslo_messaging.MessagingTimeout):
        caller.call({}, "note", what="x")
    assert avoided(caller.transport) == ({service: [host]} if is_rejected else {})


def test_a_watched_call_that_takes_too_long_says_nothing_of_its_host(
    serve: Make, client: Make, topic: str
) -> None:
    """Its heartbeats came."""
    import oslo_messaging

    serve(topic, "one")
    caller = client(topic, timeout=3, call_monitor_timeout=2, **LONG_AVOIDED)
    with pytest.raises(oslo_messaging.MessagingTimeout):
        caller.call({}, "hold", what="x")
    assert avoided(caller.transport) == {}


def test_a_cast_waits_for_one_host_for_a_part_of_its_time(
    client: Make, hanging: Callable[[str], str], topic: str
) -> None:
    """FANOUT_SECONDS, where delivery_timeout is longer; it may have been taken, and is not sent
    to another."""
    import oslo_messaging

    hanging(service_of("openstack", topic))
    caller = client(topic)
    wait_for_hosts(caller, 1)
    began = time.monotonic()
    with pytest.raises(oslo_messaging.MessageDeliveryFailure, match="it may have the message"):
        caller.cast({}, "note", what="x")
    assert FANOUT_SECONDS <= time.monotonic() - began < CALL_SECONDS - 2


def test_a_fanout_ends_with_its_time(
    client: Make, hanging: Callable[[str], str], topic: str, caplog: pytest.LogCaptureFixture
) -> None:
    """The hosts for which none was left stand in the log as not reached."""
    hosts = {hanging(service_of("openstack", topic)) for _ in range(3)}
    caller = client(topic, delivery_timeout=SOON, fanout_connections=1)
    wait_for_hosts(caller, 3)
    began = time.monotonic()
    caller.prepare(fanout=True).cast({}, "note", what="x")
    assert time.monotonic() - began < FANOUT_SECONDS
    lines = [each.getMessage() for each in caplog.records if "has not got" in each.getMessage()]
    assert {line.partition(" ")[0] for line in lines} == hosts
    assert len([line for line in lines if "it was not reached" in line]) == 2


@pytest.mark.parametrize("kind", ["call", "cast"])
def test_a_host_for_which_no_time_was_left_is_not_quarantined(
    kind: str, client: Make, hanging: Callable[[str], str], topic: str
) -> None:
    """Nobody asked it, or it had less than a fair time for its 202."""
    import oslo_messaging

    hanging(service_of("openstack", topic))
    caller = client(topic, delivery_timeout=FAIR_SECONDS / 5, **LONG_AVOIDED)
    wait_for_hosts(caller, 1)
    with pytest.raises(oslo_messaging.MessagingException):
        if kind == "cast":
            caller.cast({}, "note", what="x")
        else:
            caller.prepare(timeout=0).call({}, "note", what="x")
    assert avoided(caller.transport) == {}


def test_a_file_of_the_client_that_is_gone_is_no_fault_of_the_host(
    client: Make, hanging: Callable[[str], str], topic: str, tmp_path: Path
) -> None:
    """The error names the file, and the host is not quarantined."""
    import oslo_messaging

    hanging(service_of("openstack", topic))
    authority = make(tmp_path).authority
    caller = client(topic, tls_ca=authority, **LONG_AVOIDED)
    wait_for_hosts(caller, 1)
    authority.unlink()
    with pytest.raises(oslo_messaging.MessageDeliveryFailure, match=authority.name):
        caller.prepare(retry=0).cast({}, "note", what="x")
    assert avoided(caller.transport) == {}
