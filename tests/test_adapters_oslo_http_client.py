"""The client of consul+http over real connections: what becomes of a request, and what is kept."""

from __future__ import annotations

import itertools
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import pytest

from consul_matchmaker.adapters.oslo.http.client import (
    FAIR_SECONDS,
    IDLE_SECONDS,
    MOST_IDLE,
    Answer,
    Client,
    Lost,
    NotTaken,
    NotTried,
)
from consul_matchmaker.adapters.oslo.http.secret import Secret
from consul_matchmaker.backends.http.connection import Wire
from consul_matchmaker.model import Host

from .contract import eventually
from .doubles import DEADLINE_SECONDS
from .http_servers import Server, reply

pytestmark = pytest.mark.system

PLAIN = SimpleNamespace(uses_tls=False, tls_ca=None, tls_cert=None, tls_key=None)
SHORT_SECONDS = 0.3
"""The deadline of what is to fail by it."""
ROUNDS = 30
"""Enough to find a race that is there."""


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def client(clock: Clock) -> Iterator[Client]:
    made = Client(PLAIN, Secret(None, None), clock=clock)  # type: ignore[arg-type]
    yield made
    made.close()


def post(
    client: Client,
    server: Any,
    body: bytes = b"{}",
    seconds: float = DEADLINE_SECONDS,
    monitor: float | None = None,
) -> Answer | None:
    port = getattr(server, "port", server)
    return client.post(Host("127.0.0.1", port), body, time.monotonic() + seconds, monitor=monitor)


def test_it_needs_no_oslo() -> None:
    """Neither oslo.messaging nor what comes with it is imported, nor is the server."""
    code = (
        "import sys, consul_matchmaker.adapters.oslo.http.client;"
        "print([name for name in sys.modules if name.startswith(('oslo', 'asyncio'))])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


# -- one request -----------------------------------------------------------------------------------


def test_a_request_is_one_post_with_the_secret(client: Client) -> None:
    """Its answer has status and body, whatever the status is."""
    with Server(lambda request: reply(503, b"full")) as server:
        told = Client(PLAIN, Secret("word", None))  # type: ignore[arg-type]
        assert post(told, server, b'{"a": 1}') == Answer(503, b"full")
        told.close()
        (request,) = server.requests
    assert (request.method, request.target, request.body) == ("POST", "/rpc", b'{"a": 1}')
    assert request.headers["authorization"] == "Bearer word"
    assert request.headers["content-type"] == "application/json"


def test_a_request_is_written_at_once(client: Client) -> None:
    """Head and body of a small one come with the first read: no packet waits for another one."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        firsts: list[bytes] = []

        def serve() -> None:
            sock, _ = listener.accept()
            with sock:
                firsts.append(sock.recv(65536))
                sock.sendall(reply(202, b""))

        thread = threading.Thread(target=serve)
        thread.start()
        assert post(client, listener.getsockname()[1], b"body") == Answer(202, b"")
        thread.join()
    assert firsts[0].endswith(b"\r\n\r\nbody")


def test_a_refused_connection_has_taken_nothing(client: Client) -> None:
    """Nor has a host without a port, or one whose name nobody knows."""
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        with pytest.raises(NotTaken, match="refused"):
            post(client, bound.getsockname()[1])
    deadline = time.monotonic() + DEADLINE_SECONDS
    with pytest.raises(NotTaken, match="no port"):
        client.post(Host("127.0.0.1", None), b"", deadline)
    with pytest.raises(NotTaken):
        client.post(Host("nobody.invalid", 1), b"", deadline)


def test_who_does_not_read_all_has_not_taken_it(client: Client) -> None:
    """Whether the connection breaks while the request is written, or the deadline ends that."""
    large = bytes(2**24)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        with pytest.raises(NotTaken):
            post(client, port, large, SHORT_SECONDS)

        def serve() -> None:
            for _ in range(2):  # the first is that of above
                sock, _ = listener.accept()
                sock.recv(1000)
                sock.close()

        thread = threading.Thread(target=serve)
        thread.start()
        with pytest.raises(NotTaken):
            post(client, port, large)
        thread.join()


def test_a_host_is_not_to_blame_where_no_time_was_left(client: Client) -> None:
    """Before it is connected to, and before anything is written."""
    with Server() as server:
        for _ in range(2):  # over a new connection, and over one that was kept
            with pytest.raises(NotTried, match="no time was left"):
                post(client, server, seconds=-1)
            post(client, server)
        assert len(server.requests) == 2


def test_a_host_is_to_blame_that_had_time(client: Client) -> None:
    """It has not read the request for longer than a busy one needs."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        with pytest.raises(NotTaken) as caught:
            post(client, listener.getsockname()[1], bytes(2**24), FAIR_SECONDS + SHORT_SECONDS)
        assert not isinstance(caught.value, NotTried)


def test_a_host_is_not_to_blame_for_files_of_ours() -> None:
    """The error names them; nobody is connected to."""
    options = SimpleNamespace(uses_tls=True, tls_ca="/missing.pem", tls_cert=None, tls_key=None)
    with Server() as server:
        with pytest.raises(NotTried, match=r"/missing\.pem"):
            post(Client(options, Secret(None, None)), server)  # type: ignore[arg-type]
        assert server.connections == 0


def test_a_host_is_not_to_blame_where_we_have_too_many_files_open() -> None:
    """Nothing was sent to it."""
    code = f"""if True:
        import resource, sys, time
        from types import SimpleNamespace
        from {__name__.partition(".")[0]}.test_adapters_oslo_http_client import *
        client = Client(PLAIN, Secret(None, None))
        with Server() as server:
            most = resource.getrlimit(resource.RLIMIT_NOFILE)
            resource.setrlimit(resource.RLIMIT_NOFILE, (3, most[1]))
            try:
                post(client, server)
            except NotTried as error:
                print(error)
            resource.setrlimit(resource.RLIMIT_NOFILE, most)
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "Too many open files" in done.stdout


def answers_early(listener: socket.socket, answer: bytes, *, after: int = 0) -> threading.Thread:
    """Says *answer* to a large request, of which it has read little, and closes the connection;
    *after* so many requests that are answered as usual."""

    def serve() -> None:
        sock, _ = listener.accept()
        with sock:
            for _ in range(after):
                sock.recv(65536)
                sock.sendall(reply())
            sock.recv(1000)
            sock.sendall(answer)

    thread = threading.Thread(target=serve)
    thread.start()
    return thread


@pytest.mark.parametrize("after", [0, 1], ids=["new", "kept"])
def test_an_answer_that_came_while_the_request_was_written_is_its_answer(
    client: Client, after: int
) -> None:
    """The server that refuses a large request does not read it; it is not asked again."""
    said = reply(401, b"unknown", headers=["Connection: close"])
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        serving = answers_early(listener, said, after=after)
        for _ in range(after):
            assert post(client, port) == Answer(200, b"true")
        assert post(client, port, bytes(2**24)) == Answer(401, b"unknown")
        serving.join()


def test_part_of_an_answer_that_came_early_says_that_nothing_was_taken(client: Client) -> None:
    """What was refused may be sent to another."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        serving = answers_early(listener, b"HTTP/1.1 401 No\r\nContent-Length: 9\r\n\r\nunk")
        with pytest.raises(NotTaken):
            post(client, listener.getsockname()[1], bytes(2**24))
        serving.join()


@pytest.mark.parametrize("monitor", [None, 5.0])
@pytest.mark.parametrize(
    "said",
    [
        b"HTTP/1.1 100 Continue\r\n\r\n",
        b"HTTP/1.1 102 Processing\r\n\r\nHTTP/1.1 103 Early\r\nLink: x\r\n\r\n",
    ],
)
def test_what_precedes_an_answer_is_none(
    client: Client, said: bytes, monitor: float | None
) -> None:
    """A status of 1xx is followed by the answer, which is waited for."""

    def behave(request: Any) -> Any:
        def answer(sock: socket.socket) -> None:
            sock.sendall(said)
            threading.Event().wait(SHORT_SECONDS / 10)
            sock.sendall(reply(200, b"late"))

        return answer

    with Server(behave) as server:
        assert post(client, server, monitor=monitor) == Answer(200, b"late")
    with Server(lambda request: lambda sock: sock.sendall(said)) as server, pytest.raises(Lost):
        post(client, server, monitor=monitor)
    with Server(lambda request: said + reply(200, b"at once")) as server:
        assert post(client, server, monitor=monitor) == Answer(200, b"at once")


@pytest.mark.parametrize(
    "more", [reply(500, b"other"), b"HTTP/1.1 2", b"rubbish\r\n\r\n"], ids=["whole", "part", "none"]
)
@pytest.mark.parametrize("headers", [[], ["Connection: close"]], ids=["open", "closing"])
def test_what_follows_an_answer_is_no_part_of_it(
    client: Client, more: bytes, headers: list[str]
) -> None:
    """The answer holds; the connection is not used again."""
    with Server(lambda request: reply(200, b"first", headers) + more) as server:
        for _ in range(2):
            assert post(client, server) == Answer(200, b"first")
        assert server.connections == 2


@pytest.mark.parametrize("monitor", [None, 5.0])
@pytest.mark.parametrize(
    "said",
    [
        b"",
        b"HTTP/1.1 200",
        b"rubbish\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nshort",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nsh",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nno number\r\n",
        b"HTTP/1.1 200 OK\r\n\r\nwithout an end",
        b"HTTP/1.1 200 OK\r\nContent-Length: 999999999999\r\n\r\nshort",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nffffffffff\r\nshort",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n1\r\n\n\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n1\r\n\n\r\n2\r\n{}\r\n",
    ],
)
def test_what_breaks_after_the_request_is_lost(
    client: Client, said: bytes, monitor: float | None
) -> None:
    """Whatever was said of an answer until then; it is asked once."""
    with Server(lambda request: lambda sock: sock.sendall(said)) as server:
        with pytest.raises(Lost):
            post(client, server, monitor=monitor)
        assert len(server.requests) == 1


# -- deadlines -------------------------------------------------------------------------------------


def drips(piece: bytes, *, after: bytes = b"") -> Callable[[Any], Any]:
    """Sends *after*, and then a small piece every now and then, without an end."""

    def behave(request: Any) -> Any:
        def drip(sock: socket.socket) -> None:
            sock.sendall(after)
            while True:
                sock.sendall(piece)
                threading.Event().wait(SHORT_SECONDS / 10)

        return drip

    return behave


HEAD = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"


@pytest.mark.parametrize(
    "behave",
    [
        lambda request: lambda sock: sock.recv(1),
        drips(b"O", after=b"HTTP/1.1 200 "),
        drips(b"X: y\r\n", after=b"HTTP/1.1 200 OK\r\n"),
        drips(b"1\r\nx\r\n", after=HEAD),
        drips(b"x", after=b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n"),
        drips(b"1\r\n\n\r\n", after=HEAD),
    ],
    ids=["silence", "status", "headers", "chunks", "body", "heartbeats"],
)
@pytest.mark.parametrize("monitor", [None, 5.0], ids=["plain", "watched"])
def test_the_deadline_holds(
    client: Client, behave: Callable[[Any], Any], monitor: float | None
) -> None:
    """Also against a server that always says a little; then the answer is none, and the connection
    is not kept."""
    with Server(behave) as server:
        began = time.monotonic()
        assert post(client, server, seconds=SHORT_SECONDS, monitor=monitor) is None
        took = time.monotonic() - began
        assert SHORT_SECONDS * 0.9 < took < SHORT_SECONDS + 3
        eventually(lambda: not server.is_connected, bool)


def test_a_monitor_gives_up_when_nothing_is_heard(client: Client) -> None:
    """After heartbeats that came in time, and long before the deadline."""

    def behave(request: Any) -> Any:
        def beat(sock: socket.socket) -> None:
            sock.sendall(HEAD)
            for _ in range(5):
                sock.sendall(b"1\r\n\n\r\n")
                threading.Event().wait(SHORT_SECONDS / 2)
            sock.recv(1)

        return beat

    with Server(behave) as server:
        began = time.monotonic()
        assert post(client, server, monitor=SHORT_SECONDS) is None
        assert SHORT_SECONDS * 3 < time.monotonic() - began < DEADLINE_SECONDS


def test_heartbeats_are_white_space_before_the_answer(client: Client) -> None:
    """They are left out of it, and the connection is kept after it."""
    body = b'{"result": "a"}'
    said = HEAD + b"1\r\n\n\r\n" * 3 + b"%x\r\n%s\r\n0\r\n\r\n" % (len(body), body)
    with Server(lambda request: said) as server:
        for _ in range(3):
            assert post(client, server, monitor=5.0) == Answer(200, body)
        assert server.connections == 1


# -- kept connections ------------------------------------------------------------------------------


def test_a_connection_is_kept(client: Client) -> None:
    """One for each request that is under way at a time."""
    with Server() as server:
        for _ in range(5):
            post(client, server)
        assert server.connections == 1


def test_connections_are_not_kept_where_the_server_says_so(client: Client) -> None:
    """`Connection: close` is heeded."""
    with Server(lambda request: reply(headers=["Connection: close"])) as server:
        for _ in range(3):
            post(client, server)
        assert server.connections == 3


def test_one_that_was_closed_while_idle_is_not_used(client: Client) -> None:
    """The next request comes over a new one, and once."""
    with Server() as server:
        post(client, server)
        server.close_connections()
        assert post(client, server) == Answer(200, b"true")
        assert (server.connections, len(server.requests)) == (2, 2)


def test_one_that_is_closed_as_it_is_written_to_is_replaced(client: Client) -> None:
    """Nothing of the request was taken, so that it is sent over a new one."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        with ThreadPoolExecutor(1) as pool:
            for _ in range(2):
                answer = pool.submit(post, client, port)
                sock, _ = listener.accept()
                sock.recv(65536)
                sock.sendall(reply())
                assert answer.result(DEADLINE_SECONDS) == Answer(200, b"true")
                ((_, wire),) = client._idle[Host("127.0.0.1", port)]
                wire.sock.shutdown(socket.SHUT_WR)  # no news of the server, and no way to it


def test_one_that_says_something_while_idle_is_not_used(client: Client) -> None:
    """What it said would be taken for the answer to the next request."""
    answers = iter([reply(200, b"first"), reply(200, b"second")])
    with Server(lambda request: next(answers)) as server:
        assert post(client, server) == Answer(200, b"first")
        (sock,) = server._open
        sock.sendall(reply(200, b"not asked for"))
        assert post(client, server) == Answer(200, b"second")
        assert server.connections == 2


def test_an_answer_of_many_pieces_may_take_longer_than_the_monitor(client: Client) -> None:
    """As long as something of it is heard."""

    def behave(request: Any) -> Any:
        def trickle(sock: socket.socket) -> None:
            sock.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 6\r\n\r\n")
            for _ in range(6):
                threading.Event().wait(SHORT_SECONDS / 2)
                sock.sendall(b"x")

        return trickle

    with Server(behave) as server:
        assert post(client, server, monitor=SHORT_SECONDS) == Answer(200, b"x" * 6)


def test_one_that_was_idle_for_long_is_not_used(client: Client, clock: Clock) -> None:
    """The server is about to close it."""
    with Server() as server:
        post(client, server)
        clock.now += IDLE_SECONDS - 1
        post(client, server)
        assert server.connections == 1
        clock.now += IDLE_SECONDS
        post(client, server)
        assert server.connections == 2


def test_idle_connections_of_others_are_closed(client: Client, clock: Clock) -> None:
    """Whoever is asked, those that were not used for long are closed, of hosts too that nobody asks
    any more."""
    with Server() as gone, Server() as used:
        post(client, gone)
        post(client, used)
        clock.now += IDLE_SECONDS / 2
        post(client, used)
        assert gone.is_connected
        clock.now += IDLE_SECONDS / 2 + 1
        post(client, used)
        eventually(lambda: not gone.is_connected, bool)
        assert used.connections == 1
        assert list(client._idle) == [Host("127.0.0.1", used.port)]


def test_not_more_connections_are_kept_than_are_of_use(client: Client) -> None:
    """After more requests at a time than that, the surplus is closed."""
    many = MOST_IDLE + 5
    together = threading.Barrier(many)

    def behave(request: Any) -> bytes:
        together.wait(DEADLINE_SECONDS)
        return reply()

    with Server(behave) as server:
        threads = [threading.Thread(target=post, args=(client, server)) for _ in range(many)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert server.connections == many
        eventually(lambda: len(server._open) == MOST_IDLE, bool)


def test_closing_closes_what_is_kept(client: Client) -> None:
    """And what is used at that time, after its use."""
    with Server() as server:
        post(client, server)
        client.close()
        eventually(lambda: not server.is_connected, bool)
        assert post(client, server) == Answer(200, b"true")
        eventually(lambda: not server.is_connected, bool)


def test_closing_is_safe_while_others_use_it() -> None:
    """Each connection is closed by whoever has it; nobody meets one that another has taken."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    host = Host("127.0.0.1", 1)
    now = itertools.count()
    try:
        for _ in range(ROUNDS):
            made = Client(PLAIN, Secret(None, None), clock=lambda: next(now))  # type: ignore[arg-type]
            pairs = [socket.socketpair() for _ in range(MOST_IDLE)]
            for one, _ in pairs:
                made._keep(host, Wire(one, 1))
            with ThreadPoolExecutor(4) as pool:

                def use(client: Client = made) -> None:
                    while (wire := client._kept(host)) is not None:
                        client._keep(host, wire)
                        wire = client._kept(host)
                        if wire is not None:
                            wire.sock.close()

                used = [pool.submit(use) for _ in range(3)]
                made.close()
                for each in used:
                    each.result(DEADLINE_SECONDS)
            assert all(one.fileno() == -1 for one, _ in pairs)
            for _, other in pairs:
                other.close()
    finally:
        sys.setswitchinterval(interval)
