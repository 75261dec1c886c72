"""Notifications reach one listener of each pool that listens now."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Any

import pytest

from consul_matchmaker.adapters.oslo.http.names import service_of
from integration.rpc.conftest import FOUND_SECONDS, matchmaker_of
from integration.rpc.endpoints import Batches, Listener
from integration.waiting import until

Make = Callable[..., Any]


@pytest.fixture
def notify(transport: Make) -> Callable[..., None]:
    """Sends notifications of priority info."""
    import oslo_messaging

    over = transport(notifies=True)

    def send(topic: str, *payloads: Any, listeners: int = 0, retry: int = -1) -> None:
        service = service_of("openstack", f"{topic}.info")
        found = matchmaker_of(over)
        until(lambda: len(found.hosts(service)) == listeners, FOUND_SECONDS, "they are found")
        notifier = oslo_messaging.Notifier(
            over, "publisher", driver="messagingv2", topics=[topic], retry=retry
        )
        for payload in payloads:
            notifier.info({}, "event", payload)

    return send


def test_one_listener_of_each_pool_gets_a_notification(
    listen: Make, notify: Callable[..., None], topic: str
) -> None:
    """Two of no pool and two of another: each pool has every notification once."""
    pools: dict[str | None, list[Listener]] = {}
    for pool in (None, "metering"):
        pools[pool] = [Listener(f"{pool}-{number}") for number in range(2)]
        for listener in pools[pool]:
            listen(topic, listener, pool=pool)
    notify(topic, *range(10), listeners=4)

    def got() -> list[list[int]]:
        return [sorted(n for each in pools[pool] for n in each.got) for pool in pools]

    until(lambda: all(len(each) >= 10 for each in got()), FOUND_SECONDS, "all are there")
    assert got() == [list(range(10))] * 2


def test_without_a_listener_a_notification_is_dropped(
    transport: Make, notify: Callable[..., None], topic: str, caplog: pytest.LogCaptureFixture
) -> None:
    """At once, with a line in the log; nothing is raised."""
    began = time.monotonic()
    with caplog.at_level(logging.WARNING):
        notify(topic, "unheard")
    assert time.monotonic() - began < 5
    assert f"nobody listens for notifications of openstack/{topic}.info" in caplog.text


def test_with_retry_a_notification_that_nobody_hears_is_an_error(
    transport: Make, notify: Callable[..., None], topic: str, caplog: pytest.LogCaptureFixture
) -> None:
    """MessageDeliveryFailure after so many tries, which the notifier writes into the log."""
    import oslo_messaging

    over = transport(notifies=True)
    target = oslo_messaging.Target(topic=f"{topic}.info")
    for retry in (0, 1):
        with pytest.raises(oslo_messaging.MessageDeliveryFailure, match="nobody listens"):
            over._send_notification(target, {}, {"payload": 1}, version=2.0, retry=retry)
    notify(topic, "unheard", retry=0)
    assert f"Could not send notification to {topic}" in caplog.text
    assert "MessageDeliveryFailure" in caplog.text


def test_a_notification_that_is_requeued_comes_again(
    listen: Make, notify: Callable[..., None], topic: str
) -> None:
    """Until it is handled; others are handled meanwhile."""
    listener = Listener("one", requeues=3)
    listen(topic, listener)
    notify(topic, "again", listeners=1)
    until(lambda: len(listener.got) == 4, FOUND_SECONDS, "it is handled")
    notify(topic, "last", listeners=1)
    until(lambda: listener.got[4:] == ["last"], FOUND_SECONDS, "that is handled")
    assert listener.got == ["again"] * 4 + ["last"]


def test_listeners_get_batches(listen: Make, notify: Callable[..., None], topic: str) -> None:
    """Of batch_size as soon as so many are there; of less after batch_timeout."""
    listener = Batches()
    listen(topic, listener, batch=(3, 0.3))
    notify(topic, *range(7), listeners=1)
    until(lambda: sum(map(len, listener.got)) == 7, FOUND_SECONDS, "all are there")
    assert sorted(n for batch in listener.got for n in batch) == list(range(7))
    assert max(map(len, listener.got)) <= 3
    assert len(listener.got[-1]) < 3


def test_a_batch_listener_without_timeout_stops(
    listen: Make, notify: Callable[..., None], topic: str
) -> None:
    """What it has of a batch that is not full is handled then."""
    listener = Batches()
    listening = listen(topic, listener, batch=(3, None))
    notify(topic, *range(4), listeners=1)
    until(lambda: listener.got == [[0, 1, 2]], FOUND_SECONDS, "one batch is full")
    listening.stop()
    listening.wait()
    assert listener.got == [[0, 1, 2], [3]]
