"""What becomes of a message when a connection is refused, breaks, or is answered with nonsense."""

from __future__ import annotations

import socket
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import pytest

from consul_matchmaker.adapters.oslo.http.names import service_of
from integration.rpc.conftest import FOUND_SECONDS, Served, matchmaker_of, wait_for_hosts
from integration.rpc.peers import Peer, answer
from integration.waiting import until

Make = Callable[..., Any]
Serve = Callable[..., Served]
Operator = Callable[..., str]

LARGE = "x" * (8 * 1024 * 1024)
"""More than the system keeps for a peer that does not read."""
TRIES = 6
"""Of two hosts, each is next in turn within so many calls."""


def service(topic: str) -> str:
    return service_of("openstack", topic)


def quarantined(client: Any) -> Any:
    return matchmaker_of(client.transport).status()["quarantine"]


# -- not taken: another host gets it ---------------------------------------------------------------


@pytest.mark.parametrize("kind", ["call", "cast"])
def test_a_refused_connection_leads_to_another_host(
    kind: str, serve: Serve, client: Make, operator: Operator, refusing_port: int, topic: str
) -> None:
    """Every message is delivered, also with retry=0, and the host that refused is quarantined."""
    served = serve(topic, "one")
    dead = operator(service(topic), refusing_port)
    caller = client(topic, retry=0, quarantine_seconds=60, quarantine_max_seconds=60)
    wait_for_hosts(caller, 2)
    for number in range(TRIES):
        getattr(caller, kind)({}, "note", what=number)
    until(lambda: len(served.endpoint.got) == TRIES, FOUND_SECONDS, "all are executed")
    assert sorted(served.endpoint.got) == list(range(TRIES))
    assert quarantined(caller) == {service(topic): [dead]}


def test_a_fanout_is_not_held_up_by_a_host_that_refuses(
    serve: Serve, client: Make, operator: Operator, refusing_port: int, topic: str
) -> None:
    """The others get it once, nothing is raised, and who missed it is quarantined."""
    served = [serve(topic, name) for name in ("one", "two")]
    dead = operator(service(topic), refusing_port)
    caller = client(topic, quarantine_seconds=60, quarantine_max_seconds=60)
    wait_for_hosts(caller, 3)
    caller.prepare(fanout=True).cast({}, "note", what="all")
    until(lambda: all(each.endpoint.got for each in served), FOUND_SECONDS, "everybody has it")
    assert [each.endpoint.got for each in served] == [["all"], ["all"]]
    assert quarantined(caller) == {service(topic): [dead]}


@pytest.mark.parametrize("kind", ["call", "cast"])
def test_a_connection_that_breaks_before_all_was_sent_leads_to_another_host(
    kind: str, serve: Serve, client: Make, operator: Operator, topic: str
) -> None:
    """A peer that reads a part of a large request and closes has not taken it."""
    served = serve(topic, "one")
    with Peer(lambda sock, body: None, reads_bytes=1000) as peer:
        operator(service(topic), peer.port)
        caller = client(topic, quarantine_seconds=60, quarantine_max_seconds=60)
        wait_for_hosts(caller, 2)
        for _ in range(2):
            getattr(caller, kind)({}, "note", what=LARGE)
        until(lambda: len(served.endpoint.got) == 2, FOUND_SECONDS, "both are executed")
        assert peer.connections == 1
        assert list(quarantined(caller)) == [service(topic)]


@pytest.mark.parametrize("status", [404, 503, 401])
def test_a_host_that_refuses_a_message_is_followed_by_another(
    status: int, serve: Serve, client: Make, operator: Operator, topic: str
) -> None:
    """It said that it has not taken it; each message is executed once."""
    served = serve(topic, "one")
    with Peer(lambda sock, body: answer(status)) as peer:
        operator(service(topic), peer.port)
        caller = client(topic, retry=0)
        wait_for_hosts(caller, 2)
        for number in range(TRIES):
            assert caller.call({}, "note", what=number) == "one"
        assert served.endpoint.got == list(range(TRIES))
        assert len(peer.ids) >= TRIES // 2 - 1


def test_where_every_host_refuses_the_failure_names_them(
    client: Make, operator: Operator, refusing_port: int, topic: str
) -> None:
    """And says why each has not taken it."""
    import oslo_messaging

    with Peer(lambda sock, body: answer(503)) as peer:
        busy = operator(service(topic), peer.port)
        dead = operator(service(topic), refusing_port)
        caller = client(topic, retry=0)
        wait_for_hosts(caller, 2)
        with pytest.raises(oslo_messaging.MessageDeliveryFailure) as raised:
            caller.cast({}, "note", what=1)
        assert f"{busy}: it has too much to do" in str(raised.value)
        assert f"{dead}: " in str(raised.value)
        assert len(peer.ids) == 1


def test_a_wrong_secret_is_not_tried_again(client: Make, operator: Operator, topic: str) -> None:
    """Where every host refuses the secret, waiting helps nobody."""
    import oslo_messaging

    with Peer(lambda sock, body: answer(401)) as peer:
        operator(service(topic), peer.port)
        caller = client(topic)
        wait_for_hosts(caller, 1)
        with pytest.raises(oslo_messaging.MessageDeliveryFailure, match="the secret was refused"):
            caller.call({}, "who")
        assert len(peer.ids) == 1


# -- perhaps taken: nobody else gets it ------------------------------------------------------------


def closes(sock: socket.socket, body: bytes) -> None:
    """Without a word."""


def resets(sock: socket.socket, body: bytes) -> None:
    """Without a word, and as a process does that ends before it has read everything."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")


def rubbish(sock: socket.socket, body: bytes) -> bytes:
    return b"rubbish\r\n" * 10


def half(sock: socket.socket, body: bytes) -> None:
    """A part of an answer, and then the end."""
    sock.sendall(b'HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n{"result": "pa')


def dies(sock: socket.socket, body: bytes) -> None:
    """While it executes a call that is watched: after a heartbeat."""
    sock.sendall(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n1\r\n\n\r\n")


@pytest.mark.parametrize("behave", [closes, resets, rubbish, half, dies])
@pytest.mark.parametrize("kind", ["call", "watched call", "cast"])
def test_what_was_sent_as_a_whole_is_not_sent_again(
    kind: str,
    behave: Callable[[socket.socket, bytes], bytes | None],
    serve: Serve,
    client: Make,
    operator: Operator,
    topic: str,
) -> None:
    """A call whose peer took it and gave no reply is ReplyLost, a cast MessageDeliveryFailure; no
    message is executed twice, and the peer is quarantined."""
    import oslo_messaging

    from consul_matchmaker.adapters.oslo.http.delivery import ReplyLost

    served = serve(topic, "one")
    with ExitStack() as stack:
        peer = stack.enter_context(Peer(behave))
        operator(service(topic), peer.port)
        words = {"quarantine_seconds": 60, "quarantine_max_seconds": 60}
        caller = client(topic, call_monitor_timeout=2 if kind == "watched call" else None, **words)
        wait_for_hosts(caller, 2)
        send = caller.cast if kind == "cast" else caller.call
        failed = []
        for number in range(TRIES):
            try:
                send({}, "note", what=number)
            except (ReplyLost, oslo_messaging.MessageDeliveryFailure) as error:
                failed.append((number, type(error)))
        kinds = oslo_messaging.MessageDeliveryFailure if kind == "cast" else ReplyLost
        ((lost, how),) = failed
        assert how is kinds
        until(lambda: len(served.endpoint.got) == TRIES - 1, FOUND_SECONDS, "the others")
        assert sorted(served.endpoint.got) == [n for n in range(TRIES) if n != lost]
        assert len(peer.bodies) == 1
        assert list(quarantined(caller)) == [service(topic)]


@pytest.mark.parametrize("body", [b"", b"[]", b'"text"', b"no JSON", b"[" * 100_000])
def test_a_reply_that_no_server_of_ours_gives_is_a_lost_one(
    body: bytes, client: Make, operator: Operator, topic: str
) -> None:
    """An answer 200 whose body makes no sense fails the call at once: it may have been executed,
    and is not sent again."""
    from consul_matchmaker.adapters.oslo.http.delivery import ReplyLost

    with Peer(lambda sock, request: answer(200, body)) as peer:
        operator(service(topic), peer.port)
        caller = client(topic)
        wait_for_hosts(caller, 1)
        with pytest.raises(ReplyLost, match=f"{topic}: .*not what a server .*executed"):
            caller.call({}, "who")
        assert len(peer.ids) == 1


@pytest.mark.parametrize("kind", ["call", "cast"])
def test_an_answer_of_another_status_is_a_delivery_failure(
    kind: str, client: Make, operator: Operator, topic: str
) -> None:
    """It is not tried elsewhere, and the error has the status and what was said."""
    import oslo_messaging

    with Peer(lambda sock, body: answer(400, b"out of order")) as peer:
        operator(service(topic), peer.port)
        caller = client(topic)
        wait_for_hosts(caller, 1)
        with pytest.raises(oslo_messaging.MessageDeliveryFailure, match="400, 'out of order'"):
            getattr(caller, kind)({}, "who")
        assert len(peer.ids) == 1


@pytest.mark.parametrize(
    ("kind", "error"), [("call", "ReplyLost"), ("cast", "MessageDeliveryFailure")]
)
def test_after_status_500_a_message_may_have_been_executed(
    kind: str, error: str, client: Make, operator: Operator, topic: str
) -> None:
    """The error says so, and has what was said; the message is not sent again."""
    with Peer(lambda sock, body: answer(500, b"out of order")) as peer:
        operator(service(topic), peer.port)
        caller = client(topic)
        wait_for_hosts(caller, 1)
        with pytest.raises(Exception, match=r"out of order.*may have been") as caught:
            getattr(caller, kind)({}, "who")
        assert type(caught.value).__name__ == error
        assert len(peer.ids) == 1


def test_a_cast_that_was_answered_with_a_reply_is_taken(
    client: Make, operator: Operator, topic: str
) -> None:
    """200 says that it was taken as well as 202."""
    with Peer(lambda sock, body: answer(200, b"{}")) as peer:
        operator(service(topic), peer.port)
        caller = client(topic)
        wait_for_hosts(caller, 1)
        caller.cast({}, "who")
        assert len(peer.ids) == 1


# -- kept connections ------------------------------------------------------------------------------


def test_a_kept_connection_that_the_server_closed_is_not_used(
    client: Make, operator: Operator, topic: str
) -> None:
    """The next call comes over a new one, and is executed once."""
    with Peer(lambda sock, body: answer(200, b'{"result": 1}')) as peer:
        operator(service(topic), peer.port)
        caller = client(topic)
        wait_for_hosts(caller, 1)
        assert [caller.call({}, "who") for _ in range(3)] == [1, 1, 1]
        assert peer.connections == 1
        peer.close_connections()
        until(lambda: peer.open_connections == 0, FOUND_SECONDS, "it is closed")
        assert caller.call({}, "who") == 1
        assert (peer.connections, len(peer.ids)) == (2, 4)
