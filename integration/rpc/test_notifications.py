"""Notifications reach one listener of each pool that listens now."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Any

import pytest

from consul_matchmaker.adapters.oslo.http.fanout import MOST_DROPPED
from consul_matchmaker.adapters.oslo.http.names import Place, service_of
from integration.rpc.conftest import FOUND_SECONDS, matchmaker_of
from integration.rpc.endpoints import Batches, Listener
from integration.rpc.peers import Peer, answer
from integration.waiting import until

Make = Callable[..., Any]
MESSAGE = {"payload": 1, "event_type": "e", "publisher_id": "p", "priority": "INFO"}


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
    listen(topic, listener, batch=(3, 1.0))  # between two of them a busy machine takes less
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


@pytest.mark.parametrize("retry", [-1, 0, 1])
def test_a_pool_that_takes_nothing_keeps_nothing_from_the_others(
    retry: int, transport: Make, listen: Make, topic: str
) -> None:
    """Each of them has the notification once; then one error names the pool that has not."""
    import oslo_messaging

    over = transport(notifies=True, delivery_timeout=2)
    found, service = matchmaker_of(over), service_of("openstack", f"{topic}.info")
    taking = [Listener("b"), Listener("c")]
    for listener in taking:
        listen(topic, listener, pool=listener.name)
    with Peer(lambda sock, body: answer(503)) as full:
        found.register(service, f"127.0.0.1:{full.port}", "pool-a", is_up=True)
        until(lambda: len(found.hosts(service)) == 3, FOUND_SECONDS, "they are found")
        target, message = oslo_messaging.Target(topic=f"{topic}.info"), MESSAGE
        with pytest.raises(oslo_messaging.MessageDeliveryFailure, match="pool a: ") as caught:
            over._send_notification(target, {}, message, version=2.0, retry=retry)
        assert "too much to do" in str(caught.value)
        assert "pool b" not in str(caught.value)
        tries = len(full.bodies)
    until(lambda: all(listener.got for listener in taking), FOUND_SECONDS, "the others have it")
    assert [listener.got for listener in taking] == [[1], [1]]
    assert tries == retry + 1 if retry >= 0 else tries > 2


def test_every_pool_that_takes_nothing_is_named(transport: Make, topic: str) -> None:
    """One that may have taken it, too."""
    import oslo_messaging

    over = transport(notifies=True)
    found, service = matchmaker_of(over), service_of("openstack", f"{topic}.info")
    with Peer(lambda sock, body: answer(503)) as full, Peer(lambda sock, body: None) as lost:
        found.register(service, f"127.0.0.1:{full.port}", "pool-full", is_up=True)
        found.register(service, f"127.0.0.1:{lost.port}", "pool-lost", is_up=True)
        until(lambda: len(found.hosts(service)) == 2, FOUND_SECONDS, "they are found")
        target = oslo_messaging.Target(topic=f"{topic}.info")
        with pytest.raises(oslo_messaging.MessageDeliveryFailure) as caught:
            over._send_notification(target, {}, MESSAGE, version=2.0, retry=2)
        assert "pool full: " in str(caught.value)
        assert "pool lost: " in str(caught.value)
        assert "may have been taken" in str(caught.value)
        assert (len(full.bodies), len(lost.bodies)) == (3, 1)


def test_dropped_notifications_do_not_fill_the_log(
    notify: Callable[..., None], topic: str, caplog: pytest.LogCaptureFixture
) -> None:
    """One warning for a topic and a minute; the others are for debugging."""
    with caplog.at_level(logging.DEBUG):
        notify(topic, *range(3))
        notify(f"{topic}-other", "unheard")
    lines = [(r.levelname, r.getMessage()) for r in caplog.records if "dropped" in r.getMessage()]
    said = "nobody listens for notifications of openstack/{}.info: dropped"
    first, other = said.format(topic), said.format(f"{topic}-other")
    assert lines == [
        ("WARNING", first),
        ("DEBUG", first),
        ("DEBUG", first),
        ("WARNING", other),
    ]


def test_the_topics_of_dropped_notifications_are_forgotten(transport: Make) -> None:
    """Beyond the last thousand, so that they take no more memory."""
    fanout = transport(notifies=True)._driver._fanout
    places = [Place("openstack", f"topic{number}") for number in range(MOST_DROPPED + 1)]
    assert all(fanout._is_news(place) for place in places)
    assert not fanout._is_news(places[-1])
    assert fanout._is_news(places[0])
    assert len(fanout._warned_at) == MOST_DROPPED
