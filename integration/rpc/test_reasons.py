"""What a message that nobody took says: the reason that helps, not that the time is over."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from integration.rpc.conftest import FOUND_SECONDS, Served, wait_for_hosts
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
