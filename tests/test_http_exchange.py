"""One exchange, also as the transport of the ``consul`` package, whichever of the two it is."""

import os
import socket
import time

import consul.base
import pytest

from consul_matchmaker.backends.http.exchange import Exchange

from .doubles import DEADLINE_SECONDS
from .http_servers import Server, reply

pytestmark = pytest.mark.system


@pytest.mark.parametrize(
    ("verb", "more", "body"),
    [
        ("get", {}, b""),
        ("put", {"data": "text"}, b"text"),
        ("post", {"data": b"bytes"}, b"bytes"),
        ("delete", {}, b""),
    ],
)
def test_the_consul_package_can_ask_by_it(verb, more, body):
    """It hands over what is asked, and makes what it likes of the answer."""
    with Server(lambda request: reply(404, b"\xc3\xa4", ["X-Consul-Index: 7"])) as server:
        exchange = Exchange("127.0.0.1", server.port)
        assert isinstance(exchange, consul.base.HTTPClient)
        headers = {"X-Consul-Token": "secret"}
        how = {"params": [("keys", ""), ("dc", "a b")], "headers": headers, **more}
        answer = getattr(exchange, verb)(lambda answer: answer, "/v1/kv/a b", **how)
        exchange.close()
        (request,) = server.requests
    assert (answer.code, answer.headers["x-consul-index"], answer.body) == (404, "7", "ä")
    assert (request.method, request.target) == (verb.upper(), "/v1/kv/a%20b?keys=&dc=a+b")
    assert (request.token, request.body) == ("secret", body)


def test_no_header_is_two():
    """What would end a header line is refused, and nothing is asked."""
    with Server() as server:
        exchange = Exchange("127.0.0.1", server.port)
        headers = {"X-Consul-Token": "a\r\nB: c"}
        with pytest.raises(ValueError, match="Invalid header value"):
            exchange.get(lambda answer: answer, "/v1/kv/a", headers=headers)
        exchange.close()
        assert server.requests == []


def ask(exchange, body=b"", seconds=DEADLINE_SECONDS):
    return exchange.request("PUT", "/v1/kv/a", {}, body, {}, time.monotonic() + seconds)


@pytest.mark.parametrize(
    ("raw", "body", "connections"),
    [
        (reply(), b"true", 1),
        (
            b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
            b"2\r\nab\r\n1;x\r\nc\r\n0\r\n\r\n",
            b"abc",
            1,
        ),
        (b"HTTP/1.1 100 Continue\r\n\r\n" + reply(), b"true", 1),
        (b"HTTP/1.1 204 No Content\r\n\r\n", b"", 1),
        (reply(headers=["Connection: close"]), b"true", 2),
        (reply().replace(b"1.1", b"1.0"), b"true", 2),
    ],
    ids=["length", "chunks", "go on", "no body", "last", "old"],
)
def test_a_connection_is_kept_where_the_answer_says_its_end(raw, body, connections):
    """Whichever way it says so, unless the agent means to close it."""
    with Server(lambda request: raw) as server:
        exchange = Exchange("127.0.0.1", server.port)
        assert [ask(exchange).body for _ in range(2)] == [body] * 2
        exchange.close()
        assert server.connections == connections


def test_sending_is_within_the_deadline():
    """An agent that reads nothing is no longer waited for than one that says nothing."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        exchange = Exchange("127.0.0.1", listener.getsockname()[1])
        with pytest.raises(TimeoutError):
            ask(exchange, bytes(2**24), seconds=0.3)


def test_a_forked_child_closes_its_copies_of_connections():
    """The parent goes on with its own."""
    with Server() as server:
        exchange = Exchange("127.0.0.1", server.port)
        ask(exchange)
        child = os.fork()
        if child == 0:
            os._exit(0 if [wire.sock.fileno() for wire in exchange._open] == [-1] else 1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        ask(exchange)
        exchange.close()
        assert server.connections == 1
