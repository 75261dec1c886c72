"""What reviews of the driver found, each as users meet it."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import oslo_messaging
import pytest

from consul_matchmaker.adapters.oslo.http.names import Place
from consul_matchmaker.adapters.oslo.http.secret import Secret
from consul_matchmaker.model import Snapshot
from integration.rpc.conftest import wait_for_hosts
from integration.rpc.endpoints import Listener
from integration.waiting import until

SECONDS = 10.0
"""What takes milliseconds has so long on a busy machine."""


class Batches:
    """Remembers the payloads of notifications."""

    def __init__(self) -> None:
        self.heard: list[Any] = []

    def info(self, batch: list[dict[str, Any]]) -> None:
        self.heard += [each["payload"] for each in batch]


def test_a_batch_listener_without_a_timeout_stops_and_gives_what_it_has(
    transport: Callable[..., Any], topic: str
) -> None:
    """It waits for a full batch as long as that takes, but not when it is stopped."""
    through, endpoint = transport(notifies=True), Batches()
    listener = oslo_messaging.get_batch_notification_listener(
        through,
        [oslo_messaging.Target(topic=topic)],
        [endpoint],
        executor="threading",
        batch_size=5,
    )
    listener.start()
    notifier = oslo_messaging.Notifier(through, "here", driver="messaging", topics=[topic])
    notifier.info({}, "event", 1)
    ending = threading.Thread(target=lambda: (listener.stop(), listener.wait()), daemon=True)
    ending.start()
    ending.join(SECONDS)
    assert not ending.is_alive()
    assert endpoint.heard == [1]


def test_a_pool_that_has_left_is_waited_for_without_a_busy_loop(
    transport: Callable[..., Any], listen: Callable[..., Any], topic: str
) -> None:
    """Where another pool listens, Consul's answer is looked at a few times a second."""
    listen(topic, Listener("a"), pool="a")
    through = transport(notifies=True)
    looks = []

    def among(found: Snapshot) -> Snapshot:
        looks.append(found)
        return found.with_instances(())

    with pytest.raises(oslo_messaging.MessageDeliveryFailure):
        through._driver._delivery.send(
            Place("openstack", f"{topic}.info"), b"{}", time.monotonic() + 2, among=among
        )
    assert len(looks) < 100


def test_a_server_with_too_many_connections_leaves_calls_to_others(
    serve: Callable[..., Any],
    client: Callable[..., Any],
    topic: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """It says that it has not taken them, and writes no errors, by which strangers fill a log."""
    # Without a probe by Consul, which for its moment would have the one connection.
    served = serve(topic, "full", max_connections=1, health_check=False)
    full = served.server.listener._serving.host
    serve(topic, "other")
    caller = client(topic)
    wait_for_hosts(caller, 2)
    with socket.create_connection((full.address, full.port)):
        assert {caller.call({}, "who") for _ in range(6)} == {"other"}
    assert not [each for each in caplog.records if each.levelname == "ERROR"]


def test_listeners_without_a_pool_are_found_on_any_node(
    transport: Callable[..., Any], listen: Callable[..., Any], cluster: Any, topic: str
) -> None:
    """Also on one whose name in Consul looks as the name of a pool does."""
    agent, endpoint = cluster.add_agent("pool-1"), Listener("a")
    try:
        through = transport(
            f"consul+http://{agent.http}/?host=127.0.0.1&drain_seconds=0", notifies=True
        )
        listener = oslo_messaging.get_notification_listener(
            through, [oslo_messaging.Target(topic=topic)], [endpoint], executor="threading"
        )
        listener.start()
        oslo_messaging.Notifier(through, "here", driver="messaging", topics=[topic], retry=0).info(
            {}, "event", 1
        )
        listener.stop()
        listener.wait()
    finally:
        cluster.stop("pool-1")
    assert endpoint.got == [1]


def test_a_token_file_that_is_gone_is_reported_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Requests, which anybody may send, do not fill the log; the secret stays the one it held."""
    file = tmp_path / "token"
    file.write_text("abc\n")
    secret = Secret(None, str(file))
    file.unlink()
    for _ in range(3):
        assert not secret.accepts("Bearer wrong")
    assert secret.accepts("Bearer abc")
    assert len(caplog.records) == 1


class Context:
    """As oslo.context's: no dict, but says itself as one."""

    def to_dict(self) -> dict[str, str]:
        return {"user": "u"}


@pytest.mark.parametrize(
    ("given", "expected"), [(Context(), {"user": "u"}), (None, {}), ({"a": 1}, {"a": 1})]
)
def test_a_context_need_not_be_a_dict(
    given: Any,
    expected: dict[str, Any],
    serve: Callable[..., Any],
    client: Callable[..., Any],
    topic: str,
) -> None:
    """What has to_dict is sent as that says, as by RabbitMQ's driver, and None as an empty one."""
    served = serve(topic, "one")
    heard: list[dict[str, Any]] = []
    served.endpoint.context = lambda ctxt: dict(ctxt)
    served.endpoint.hear = lambda ctxt: heard.append(dict(ctxt))
    caller = client(topic)
    assert caller.call(given, "context") == expected
    caller.prepare(fanout=True).cast(given, "hear")
    until(lambda: heard, SECONDS, "the fanout is there")
    assert heard == [expected]


def test_a_notification_has_a_context_that_is_no_dict(
    transport: Callable[..., Any], listen: Callable[..., Any], topic: str
) -> None:
    """It reaches its listener."""
    endpoint = Listener("a")
    listen(topic, endpoint)
    through = transport(notifies=True)
    through._send_notification(
        oslo_messaging.Target(topic=f"{topic}.info"),
        Context(),
        {"payload": 1, "event_type": "e", "publisher_id": "p", "priority": "INFO"},
        version=2.0,
        retry=0,
    )
    until(lambda: endpoint.got, SECONDS, "it is there")
    assert endpoint.got == [1]
