"""Servers: how much they take at a time, and how they stop."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from consul_matchmaker.adapters.oslo.http.names import service_of
from consul_matchmaker.testing.consul_probe import Node
from integration.cluster import ask
from integration.rpc.conftest import FOUND_SECONDS, Served, matchmaker_of, wait_for_hosts
from integration.rpc.endpoints import Endpoint
from integration.rpc.server_process import ServerProcess
from integration.waiting import until

Make = Callable[..., Any]
Serve = Callable[..., Served]
Process = Callable[..., ServerProcess]


@pytest.fixture
def threads() -> Iterator[ThreadPoolExecutor]:
    """For calls that wait while the test does something else."""
    with ThreadPoolExecutor(16) as pool:
        yield pool


def held(served: Served) -> int:
    return len(served.endpoint.got)


# -- how much they take ----------------------------------------------------------------------------


def test_a_full_server_leaves_messages_to_others(
    serve: Serve, client: Make, threads: ThreadPoolExecutor, topic: str
) -> None:
    """One that may have one message at a time, and has it, refuses more, which go elsewhere, also
    with retry=0; it is not quarantined for that, and serves again when it is done."""
    full, other = (serve(topic, name, max_messages=1) for name in ("full", "other"))
    caller = client(topic, retry=0)
    wait_for_hosts(caller, 2)
    holding = threads.submit(caller.prepare(server="full").call, {}, "hold", what="held")
    until(lambda: held(full) == 1, FOUND_SECONDS, "it is full")
    assert [caller.call({}, "who") for _ in range(6)] == ["other"] * 6
    assert matchmaker_of(caller.transport).status()["quarantine"] == {}
    full.endpoint.let_go.set()
    assert holding.result(FOUND_SECONDS) == "held"
    assert {caller.call({}, "who") for _ in range(6)} == {"full", "other"}
    assert other.endpoint.got == []


@pytest.mark.parametrize("kind", ["call", "cast"])
def test_where_all_are_full_a_message_waits_for_room(
    kind: str, serve: Serve, client: Make, threads: ThreadPoolExecutor, topic: str
) -> None:
    """It is delivered once one of them is done; with retry=0 it fails at once instead."""
    import oslo_messaging

    served = [serve(topic, name, max_messages=1) for name in ("one", "two")]
    caller = client(topic)
    wait_for_hosts(caller, 2)
    holding = [threads.submit(caller.call, {}, "hold", what="held") for _ in served]
    until(lambda: all(held(each) == 1 for each in served), FOUND_SECONDS, "both are full")
    with pytest.raises(oslo_messaging.MessageDeliveryFailure, match="too much to do"):
        getattr(caller.prepare(retry=0), kind)({}, "note", what="never")
    waiting = threads.submit(getattr(caller, kind), {}, "note", what="waited")
    with pytest.raises(oslo_messaging.MessagingTimeout):
        caller.prepare(timeout=0.3).call({}, "note", what="never")
    assert not waiting.done()
    served[1].endpoint.let_go.set()
    assert waiting.result(FOUND_SECONDS) == ("two" if kind == "call" else None)
    until(lambda: served[1].endpoint.got[1:] == ["waited"], FOUND_SECONDS, "it is executed")
    served[0].endpoint.let_go.set()
    assert [each.result(FOUND_SECONDS) for each in holding] == ["held"] * 2
    assert served[0].endpoint.got == ["held"]


def test_a_server_takes_as_many_messages_as_it_is_told(
    serve: Serve, client: Make, topic: str
) -> None:
    """Casts that nobody executes yet: so many are taken, and no more."""
    import oslo_messaging

    served = serve(topic, "one", max_messages=3, workers=1)
    caller = client(topic, retry=0)
    wait_for_hosts(caller, 1)
    for number in range(3):
        caller.cast({}, "hold", what=number)
    with pytest.raises(oslo_messaging.MessageDeliveryFailure):
        caller.cast({}, "hold", what=3)
    served.endpoint.let_go.set()
    until(lambda: served.endpoint.got == [0, 1, 2], FOUND_SECONDS, "those are executed, in order")


def test_one_caller_never_meets_itself_in_a_server_that_takes_one_message(
    serve: Serve, client: Make, topic: str
) -> None:
    """When a reply is there, its server has room for the next call."""
    serve(topic, "one", max_messages=1)
    caller = client(topic, retry=0)
    wait_for_hosts(caller, 1)
    assert [caller.call({}, "echo", what=n) for n in range(500)] == list(range(500))


def test_room_is_made_before_the_reply_is_sent() -> None:
    """Who hears it may send the next message at once."""
    from consul_matchmaker.adapters.oslo.http.listeners import HttpListener
    from consul_matchmaker.adapters.oslo.http.messages import Request

    taken: list[Any] = []
    listener = HttpListener(Idle(), [], 1, None, most=1)
    listener.start(taken.extend)
    request = Request("e", "t", {}, {}, wait=True)

    class Next:
        """Takes the next message as soon as the reply to the last one is sent."""

        def heartbeat(self) -> None: ...

        def finish(self, body: bytes) -> None:
            assert listener.take(request, Next())

        def abandon(self) -> None: ...

    assert listener.take(request, Next())
    assert not listener.take(request, Next())
    taken[0].reply("reply")
    assert len(taken) == 2


class Idle:
    """Makes no listener known."""

    def publish(self, listener: Any) -> None: ...

    def withdraw(self, listener: Any) -> None: ...

    def close(self) -> None: ...


@pytest.mark.parametrize("size", [2000, 2_000_000])
def test_a_message_that_is_too_long_is_refused(
    size: int, serve: Serve, client: Make, topic: str
) -> None:
    """By the client, where it knows; else by the server.  It is a delivery failure at once, the
    server goes on, and what is short enough is taken."""
    import oslo_messaging

    served = serve(topic, "one", max_body_bytes=1500)
    for_both = {"timeout": 10.0, "retry": None}
    for options, words in (({"max_body_bytes": 1500}, "max_body_bytes"), ({}, "413")):
        caller = client(topic, **options, **for_both)
        wait_for_hosts(caller, 1)
        began = time.monotonic()
        with pytest.raises(oslo_messaging.MessageDeliveryFailure, match=words):
            caller.call({}, "note", what="x" * size)
        with pytest.raises(oslo_messaging.MessageDeliveryFailure, match=words):
            caller.cast({}, "note", what="x" * size)
        assert time.monotonic() - began < 5
        assert caller.call({}, "note", what="short") == "one"
    assert served.endpoint.got == ["short"] * 2


# -- stopping --------------------------------------------------------------------------------------


def test_a_server_stops_at_once_although_clients_keep_connections(
    serve: Serve, client: Make, topic: str
) -> None:
    """It closes those that nothing is asked over, and waits for none of them."""
    served = serve(topic, "one")
    caller = client(topic)
    assert caller.call({}, "who") == "one"
    began = time.monotonic()
    served.stop()
    assert time.monotonic() - began < 4, "an exchange that is under way may have 5 s"


def test_a_server_that_stops_ends_the_calls_that_it_has(
    serve: Serve, client: Make, threads: ThreadPoolExecutor, agent: Node, topic: str
) -> None:
    """They are answered; it is not found any more meanwhile."""
    served = serve(topic, "one")
    caller = client(topic)
    call = threads.submit(caller.call, {}, "hold", what="held")
    watched = threads.submit(
        caller.prepare(call_monitor_timeout=5).call, {}, "hold", what="watched"
    )
    until(lambda: held(served) == 2, FOUND_SECONDS, "they are executed")
    served.server.stop()
    service = service_of("openstack", topic)
    assert ask(agent, f"/v1/health/service/{service}") == []
    ending = threads.submit(served.server.wait)
    assert not ending.done()
    served.endpoint.let_go.set()
    assert call.result(FOUND_SECONDS) == "held"
    assert watched.result(FOUND_SECONDS) == "watched"
    ending.result(FOUND_SECONDS)


def test_servers_are_stopped_and_started_in_turn_and_no_call_fails(
    process: Process, client: Make, topic: str
) -> None:
    """Two processes under 4 threads that call without pause, with the default drain_seconds."""
    names = ("one", "two")
    servers = {name: process(drain_seconds=1) for name in names}
    for name in names:
        servers[name].ask("serve", topic=topic, server=name)
    caller = client(topic)
    wait_for_hosts(caller, 2)
    is_over = threading.Event()
    answers: list[str] = []

    def call() -> None:
        while not is_over.is_set():
            try:
                answers.append(caller.call({}, "who"))
            except Exception as error:
                answers.append(f"{type(error).__name__}: {error}")

    callers = [threading.Thread(target=call) for _ in range(4)]
    for thread in callers:
        thread.start()
    try:
        for name in (*names, names[0]):
            servers[name].ask("stop", server=name)
            begun = len(answers)
            until(lambda begun=begun: len(answers) > begun + 20, FOUND_SECONDS, "the other serves")  # type: ignore[misc]
            servers[name].ask("serve", topic=topic, server=name)
            until(lambda name=name: name in answers[-20:], FOUND_SECONDS, "it serves again")  # type: ignore[misc]
    finally:
        is_over.set()
        for thread in callers:
            thread.join()
    assert [each for each in answers if each not in names] == []
    assert len(answers) > 200
    assert [servers[name].end() for name in names] == [0, 0]


def test_a_server_can_be_started_again(serve: Serve, client: Make, topic: str) -> None:
    """On the same object, as upstream allows it."""
    served = serve(topic, "one")
    caller = client(topic)
    assert caller.call({}, "who") == "one"
    served.server.stop()
    served.server.wait()
    served.server.start()
    assert caller.call({}, "who") == "one"


def test_messages_wait_in_no_server_that_was_stopped(
    client: Make, transport: Make, topic: str
) -> None:
    """Servers of one process that share a port: who was stopped gets nothing more."""
    import oslo_messaging

    over = transport()
    endpoint = Endpoint("one")
    target = oslo_messaging.Target(topic=topic, server="one")
    server = oslo_messaging.get_rpc_server(over, target, [endpoint], executor="threading")
    server.start()
    caller = client(topic, over=over)
    caller.call({}, "note", what=1)
    server.stop()
    with pytest.raises(oslo_messaging.MessagingTimeout):
        caller.prepare(timeout=0.5).call({}, "note", what=2)
    server.wait()
    assert endpoint.got == [1]
