"""Calls, casts and fanouts: whom they reach, what comes back, and when they fail."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from consul_matchmaker.testing.consul_probe import Node
from integration.cluster import ask
from integration.rpc.conftest import FOUND_SECONDS, Served, wait_for_hosts
from integration.rpc.endpoints import Oops
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


# -- whom they reach -------------------------------------------------------------------------------


def test_a_call_returns_what_the_method_did(serve: Serve, client: Make, topic: str) -> None:
    """Whatever JSON can say, to the server and back."""
    serve(topic, "one")
    said = {
        "text": "ä\n\0",
        "list": [1, -2.5, None, True],
        "nested": {"a": {}},
        "long": "x" * 99999,
    }
    assert client(topic).call({"user": "me"}, "echo", what=said) == said


def test_calls_go_to_each_server_in_turn(serve: Serve, client: Make, topic: str) -> None:
    """Of two servers each answers half of the calls of one client."""
    for name in ("one", "two"):
        serve(topic, name)
    caller = client(topic)
    wait_for_hosts(caller, 2)
    answers = [caller.call({}, "who") for _ in range(10)]
    assert sorted(answers) == ["one"] * 5 + ["two"] * 5


def test_a_cast_is_taken_by_one_server_once(serve: Serve, client: Make, topic: str) -> None:
    """Of two servers one gets it; nothing comes back."""
    served = [serve(topic, name) for name in ("one", "two")]
    caller = client(topic)
    wait_for_hosts(caller, 2)
    for number in range(10):
        assert caller.cast({}, "note", what=number) is None

    def got() -> list[int]:
        return sorted(number for each in served for number in each.endpoint.got)

    until(lambda: len(got()) >= 10, FOUND_SECONDS, "the casts are executed")
    assert got() == list(range(10))


def test_a_fanout_reaches_every_listener_of_every_process_once(
    serve: Serve, client: Make, transport: Make, process: Process, topic: str
) -> None:
    """Two processes, one of which has two servers of the topic, and one on a port of its own."""
    far = process()
    for name in ("far one", "far two"):
        far.ask("serve", topic=topic, server=name)
    near = serve(topic, "near")
    caller = client(topic)
    wait_for_hosts(caller, 2)
    for number in range(5):
        caller.prepare(fanout=True).cast({}, "note", what=number)

    def got() -> list[list[int]]:
        return [
            sorted(each) for each in (*(far.ask("got", server=f"far {n}") for n in ("one", "two")),)
        ] + [sorted(near.endpoint.got)]

    until(lambda: all(len(each) >= 5 for each in got()), FOUND_SECONDS, "everybody has them")
    assert got() == [list(range(5))] * 3


def test_a_call_to_a_server_reaches_that_one_alone(
    serve: Serve, client: Make, transport: Make, topic: str
) -> None:
    """Also where two of them share a process, and a port."""
    shared = transport()
    for name in ("one", "two"):
        serve(topic, name, over=shared)
    serve(topic, "three")
    caller = client(topic)
    for name in ("one", "two", "three"):
        assert [caller.prepare(server=name).call({}, "who") for _ in range(5)] == [name] * 5


def test_a_server_of_two_that_share_a_port_goes_on_when_the_other_stops(
    serve: Serve, client: Make, transport: Make, topic: str
) -> None:
    """It is found still, and the other one is not."""
    shared = transport()
    one, _ = (serve(topic, name, over=shared) for name in ("one", "two"))
    caller = client(topic)
    one.stop()
    assert [caller.call({}, "who") for _ in range(3)] == ["two"] * 3
    assert caller.prepare(server="two").call({}, "who") == "two"
    with pytest.raises(_messaging().MessagingTimeout):
        caller.prepare(server="one", timeout=1).call({}, "who")


def test_two_servers_of_one_name_both_serve(
    serve: Serve, client: Make, transport: Make, topic: str
) -> None:
    """In one process, with everything the same: when one stops, the other one is still found."""
    shared = transport()
    first, second = (serve(topic, "same", over=shared) for _ in range(2))
    caller = client(topic)
    assert caller.call({}, "who") == "same"
    first.stop()
    for _ in range(3):
        caller.prepare(server="same").call({}, "note", what="second")
    assert second.endpoint.got[-3:] == ["second"] * 3


def test_two_exchanges_have_each_their_own_topic(serve: Serve, client: Make, topic: str) -> None:
    """A topic of one name in another exchange is another topic, also in one process."""
    for exchange in ("one", "two"):
        serve(topic, f"of {exchange}", exchange=exchange)
    for exchange in ("one", "two"):
        caller = client(topic, exchange=exchange)
        assert {caller.call({}, "who") for _ in range(4)} == {f"of {exchange}"}


def test_no_two_names_collide(
    serve: Serve, client: Make, agent: Node, transport: Make, topic: str
) -> None:
    """Names that Consul cannot carry, of up to 200 characters, are each a service of their own with
    one instance, and a call reaches the server of its own name."""
    from consul_matchmaker.adapters.oslo.http.names import service_of

    long = topic + "x" * (199 - len(topic))
    names = [
        *(("e", f"{topic}{tail}") for tail in (".a", "_a", "-a", "-A", ".A", ". a", "-ä")),
        *(("e", long + last) for last in "ab"),
        *((f"e-{topic}", "a"), ("e", f"{topic}-a.b"), ("E", f"{topic}-a")),
    ]
    for number, (exchange, name) in enumerate(names):
        serve(name, f"server{number}", exchange=exchange)
    over = transport()
    for number, (exchange, name) in enumerate(names):
        assert client(name, exchange=exchange, over=over).call({}, "who") == f"server{number}"
    services = [service_of(exchange, name) for exchange, name in names]
    assert len(set(services)) == len(names)
    assert max(map(len, services)) <= 63
    found = [ask(agent, f"/v1/health/service/{service}?passing") for service in services]
    assert [len(each) for each in found] == [1] * len(names)


def test_consul_shows_who_serves_what(serve: Serve, agent: Node, topic: str) -> None:
    """Exchange, topic and the target's version are in the metadata, the server's name in a tag, and
    its health check is an HTTP check that passes."""
    from consul_matchmaker.adapters.oslo.http.names import service_of

    serve(topic, "one", exchange="nova", version="1.3")
    service = service_of("nova", topic)

    def kinds() -> set[tuple[str, str]]:
        (found,) = ask(agent, f"/v1/health/service/{service}")
        return {(each["Type"], each["Status"]) for each in found["Checks"] if each["ServiceID"]}

    (found,) = ask(agent, f"/v1/health/service/{service}")
    meta = {"exchange": "nova", "topic": topic, "version": "1.3"}
    assert found["Service"]["Meta"].items() >= meta.items()
    assert {"oslo-rpc", "one"} <= set(found["Service"]["Tags"])
    until(lambda: kinds() == {("http", "passing"), ("ttl", "passing")}, FOUND_SECONDS, "probed")


# -- what comes back -------------------------------------------------------------------------------


def test_an_exception_of_an_allowed_module_is_raised_as_itself(
    serve: Serve, client: Make, topic: str
) -> None:
    """The client's transport says of which modules exceptions are made anew."""
    serve(topic, "one")
    caller = client(topic, remote_modules=["integration.rpc.endpoints"])
    with pytest.raises(Oops, match="no such thing"):
        caller.call({}, "oops", text="no such thing")


def test_any_other_exception_is_a_remote_error(serve: Serve, client: Make, topic: str) -> None:
    """It says of which type the exception was, and its text."""
    serve(topic, "one")
    with pytest.raises(_messaging().RemoteError, match="no such thing") as raised:
        client(topic).call({}, "oops", text="no such thing")
    assert raised.value.exc_type == "Oops"


def test_an_unknown_method_is_a_remote_error(serve: Serve, client: Make, topic: str) -> None:
    """And says so at once."""
    serve(topic, "one")
    with pytest.raises(_messaging().RemoteError) as raised:
        client(topic).call({}, "no_such_method")
    assert raised.value.exc_type == "NoSuchMethod"


def test_a_reply_that_json_cannot_say_is_an_exception(
    serve: Serve, client: Make, topic: str
) -> None:
    """At once, and the server goes on."""
    serve(topic, "one")
    caller = client(topic)
    with pytest.raises((ValueError, TypeError)):
        caller.call({}, "unsayable")
    assert caller.call({}, "who") == "one"


# -- for how long ----------------------------------------------------------------------------------


def test_a_call_that_nobody_answers_times_out(serve: Serve, client: Make, topic: str) -> None:
    """Whether nobody listens or the method takes too long."""
    caller = client(topic, timeout=0.5)
    began = time.monotonic()
    with pytest.raises(_messaging().MessagingTimeout, match="nobody listens"):
        caller.call({}, "who")
    assert time.monotonic() - began >= 0.5
    serve(topic, "one")
    with pytest.raises(_messaging().MessagingTimeout, match="has not answered"):
        caller.call({}, "hold", what=1)


def test_a_call_waits_for_a_server_to_come(
    serve: Serve, client: Make, threads: ThreadPoolExecutor, topic: str
) -> None:
    """Who calls before anybody listens is answered once somebody does."""
    caller = client(topic)
    waiting = threads.submit(caller.call, {}, "who")
    with pytest.raises(_messaging().MessagingTimeout):
        client(topic, timeout=0.1).call({}, "who")
    serve(topic, "one")
    assert waiting.result(FOUND_SECONDS) == "one"


def test_a_reply_after_the_timeout_goes_to_nobody(serve: Serve, client: Make, topic: str) -> None:
    """The next calls of that client get replies of their own."""
    served = serve(topic, "one")
    caller = client(topic)
    with pytest.raises(_messaging().MessagingTimeout):
        caller.prepare(timeout=0.3).call({}, "hold", what="late")
    served.endpoint.let_go.set()
    assert [caller.call({}, "echo", what=number) for number in range(10)] == list(range(10))


def test_heartbeats_keep_a_call_alive_that_takes_longer_than_its_monitor(
    serve: Serve, client: Make, topic: str
) -> None:
    """Two calls of 4 s, of which a sign of life is asked for every 2 s, at a time; the second over
    the same connection that others used."""
    serve(topic, "one")
    caller = client(topic, call_monitor_timeout=2)
    assert caller.call({}, "who") == "one"
    assert caller.call({}, "hold", what="done", seconds=4) == "done"
    assert caller.call({}, "who") == "one"


def test_a_server_that_hangs_is_noticed_by_its_missing_heartbeats(
    process: Process, client: Make, threads: ThreadPoolExecutor, topic: str
) -> None:
    """A call to a stopped process fails after the 2 s of its monitor, and not after its timeout."""
    with_server = process()
    with_server.ask("serve", topic=topic, server="one")
    caller = client(topic, call_monitor_timeout=2)
    assert caller.call({}, "who") == "one"
    call = threads.submit(caller.call, {}, "hold", what="x")
    until(lambda: with_server.ask("got", server="one") == ["x"], FOUND_SECONDS, "it is executed")
    with_server.pause()
    began = time.monotonic()
    with pytest.raises(_messaging().MessagingTimeout):
        call.result(CALL_LIMIT_SECONDS)
    took = time.monotonic() - began
    with_server.resume()
    assert 0.5 < took < 2 + SLACK_SECONDS


@pytest.mark.parametrize("monitor", [None, 2])
def test_a_server_that_is_killed_fails_its_calls_at_once(
    monitor: int | None, process: Process, client: Make, threads: ThreadPoolExecutor, topic: str
) -> None:
    """They are ReplyLost, long before their timeout, whether they are watched or not."""
    from consul_matchmaker.adapters.oslo.http.delivery import ReplyLost

    with_server = process()
    with_server.ask("serve", topic=topic, server="one")
    call = threads.submit(client(topic, call_monitor_timeout=monitor).call, {}, "hold", what="x")
    until(lambda: with_server.ask("got", server="one") == ["x"], FOUND_SECONDS, "it is executed")
    with_server.kill()
    with pytest.raises(ReplyLost, match="it may have been executed"):
        call.result(CALL_LIMIT_SECONDS)


CALL_LIMIT_SECONDS = 15.0
SLACK_SECONDS = 3.0
"""Of a busy machine; far below the timeout of the call."""


# -- retry and at_least_once -----------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["cast", "call"])
def test_retry_says_how_often_a_delivery_is_tried_again(
    kind: str, client: Make, topic: str
) -> None:
    """0: once; more: so often; then MessageDeliveryFailure, before the time is up."""
    caller = client(topic)
    caller.prepare(retry=0)
    for retry in (0, 2):
        began = time.monotonic()
        with pytest.raises(_messaging().MessageDeliveryFailure, match="nobody listens"):
            getattr(caller.prepare(retry=retry), kind)({}, "who")
        assert time.monotonic() - began < CALL_LIMIT_SECONDS


@pytest.mark.parametrize("retry", [None, -1])
def test_without_retry_a_cast_is_tried_until_its_time_is_up(
    retry: int | None,
    serve: Serve,
    client: Make,
    threads: ThreadPoolExecutor,
    topic: str,
) -> None:
    """It is delivered when a server comes within delivery_timeout, else it fails then."""
    began = time.monotonic()
    with pytest.raises(_messaging().MessageDeliveryFailure):
        client(topic, retry=retry, delivery_timeout=0.7).cast({}, "note", what="early")
    assert time.monotonic() - began >= 0.7
    cast = threads.submit(client(topic, retry=retry).cast, {}, "note", what="patient")
    served = serve(topic, "one")
    assert cast.result(FOUND_SECONDS) is None
    until(lambda: served.endpoint.got == ["patient"], FOUND_SECONDS, "it is executed")


def test_at_least_once_says_when_nobody_took_it(serve: Serve, client: Make, topic: str) -> None:
    """Call, cast and fanout to nobody are MessageUndeliverable at once; without it a fanout to
    nobody is none.  With a server they are delivered."""
    messaging = _messaging()
    options = messaging.TransportOptions(at_least_once=True)
    caller = client(topic, transport_options=options)
    began = time.monotonic()
    with pytest.raises(messaging.MessageUndeliverable):
        caller.call({}, "who")
    with pytest.raises(messaging.MessageUndeliverable):
        caller.cast({}, "who")
    with pytest.raises(messaging.MessageUndeliverable):
        caller.prepare(fanout=True).cast({}, "who")
    assert time.monotonic() - began < CALL_LIMIT_SECONDS
    client(topic).prepare(fanout=True).cast({}, "who")
    served = serve(topic, "one")
    wait_for_hosts(caller, 1)
    assert caller.call({}, "who") == "one"
    caller.cast({}, "note", what="cast")
    caller.prepare(fanout=True).cast({}, "note", what="fanout")
    until(lambda: len(served.endpoint.got) == 2, FOUND_SECONDS, "both are executed")


def test_many_threads_call_over_one_transport(
    serve: Serve, client: Make, threads: ThreadPoolExecutor, topic: str
) -> None:
    """Each gets the reply to its own call."""
    for name in ("one", "two"):
        serve(topic, name)
    caller = client(topic)

    def call(first: int) -> list[int]:
        return [caller.call({}, "echo", what=number) for number in range(first, first + 50)]

    firsts = range(0, 400, 50)
    assert [each.result(60) for each in [threads.submit(call, n) for n in firsts]] == [
        list(range(first, first + 50)) for first in firsts
    ]


def _messaging() -> Any:
    """Not imported with this module, which is read where there is none."""
    import oslo_messaging

    return oslo_messaging
