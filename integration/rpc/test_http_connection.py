"""One connection of the HTTP server: what may be asked over it, and how it ends."""

from __future__ import annotations

import contextlib
import json
import queue
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from consul_matchmaker.adapters.oslo.http import server_connection
from consul_matchmaker.adapters.oslo.http.messages import Request
from consul_matchmaker.adapters.oslo.http.options import Options
from consul_matchmaker.adapters.oslo.http.secret import Secret
from consul_matchmaker.adapters.oslo.http.server import CLOSING_SECONDS, MOST_ACCEPTED, HttpServer
from consul_matchmaker.adapters.oslo.http.server_connection import Exchange
from integration.rpc import certificates, hostile
from integration.waiting import until

SECONDS = 10.0
"""What takes milliseconds has so long on a busy machine."""
MONITOR = 60.0
Start = Callable[..., "Heard"]


class Heard:
    """A server, and the requests that it has taken, which the test answers."""

    def __init__(self, **options: Any) -> None:
        self.requests: queue.Queue[tuple[Request, Exchange]] = queue.Queue()
        self.server = HttpServer(Options(**options), Secret(None, None), "127.0.0.1", self._take)
        self.server.start()

    def _take(self, request: Request, exchange: Exchange) -> int:
        self.requests.put((request, exchange))
        return 202

    def next(self) -> tuple[Request, Exchange]:
        return self.requests.get(timeout=SECONDS)

    def connect(self) -> socket.socket:
        return hostile.connected(self.server.port)


@pytest.fixture
def start() -> Iterator[Callable[..., Heard]]:
    with contextlib.ExitStack() as stack:

        def start_one(**options: Any) -> Heard:
            heard = Heard(**options)
            stack.callback(heard.server.stop)
            return heard

        yield start_one


def call(topic: str = "t", *headers: str, **said: Any) -> bytes:
    """A request for one."""
    return hostile.request(json.dumps(hostile.content(topic, **said)).encode(), *headers)


def read_until(sock: socket.socket, end: bytes) -> bytes:
    said = b""
    while not said.endswith(end):
        piece = sock.recv(65536)
        assert piece, said
        said += piece
    return said


HEALTH = hostile.request(first="GET /health HTTP/1.1")


def test_requests_one_after_the_other(start: Start) -> None:
    """Each is answered over the same connection, with a date, and without the name of a program."""
    heard = start()
    with heard.connect() as sock:
        for number in range(3):
            sock.sendall(call(f"topic{number}"))
            request, exchange = heard.next()
            assert request.topic == f"topic{number}"
            exchange.finish(b'{"result": 1}')
            said = read_until(sock, b'{"result": 1}')
            head, _, body = said.partition(b"\r\n\r\n")
            assert head.startswith(b"HTTP/1.1 200 OK\r\nDate: ")
            assert b" GMT\r\n" in head and b"Content-Length: %d" % len(body) in head
            assert b"Server:" not in head and b"Connection:" not in head


def test_a_request_in_pieces(start: Start) -> None:
    """However it is cut."""
    heard = start()
    with heard.connect() as sock:
        whole = call("in-pieces", "X-Other: " + "x" * 100)
        for number in range(len(whole)):
            sock.sendall(whole[number : number + 1])
        request, exchange = heard.next()
        assert request.topic == "in-pieces"
        exchange.finish(b"{}")
        assert hostile.statuses(read_until(sock, b"{}")) == {200}


@pytest.mark.parametrize("comes", ["with it", "while it is executed"])
def test_a_request_before_the_answer_to_another_is_not_executed(comes: str, start: Start) -> None:
    """The other one is answered, and then the connection is closed, so that the sender knows."""
    heard = start()
    with heard.connect() as sock:
        if comes == "with it":
            sock.sendall(call("first") + call("second"))
        else:
            sock.sendall(call("first"))
        request, exchange = heard.next()
        assert request.topic == "first"
        if comes != "with it":
            sock.sendall(call("second"))
            until(lambda: not unread_by(heard, sock), SECONDS, "the second one was read")
        exchange.finish(b"{}")
        said = hostile.told(sock)
    assert said.count(b"HTTP/1.1 200") == said.count(b"HTTP/1.1") == 1
    assert said.endswith(b"{}") and b"Connection: close\r\n" in said
    assert heard.requests.empty()


def unread_by(heard: Heard, sock: socket.socket) -> int:
    """How many bytes that *sock* sent are in the kernel for the server."""
    local, peer = sock.getsockname()[1], heard.server.port
    for line in Path("/proc/net/tcp").read_text().splitlines()[1:]:
        words = line.split()
        if words[1].endswith(f":{peer:04X}") and words[2].endswith(f":{local:04X}"):
            return int(words[4].partition(":")[2], 16)
    return 0


def test_the_other_ways_to_ask(start: Start) -> None:
    """HEAD has no body, a whole URL means its path, and HTTP/1.0 and `Connection: close` end the
    connection with the answer."""
    heard = start()
    for first, headers, is_closed, body in (
        ("HEAD /health HTTP/1.1", ["Connection: close"], True, b""),
        ("GET http://a:x/health HTTP/1.1", [], False, b"there is nothing here\n"),
        ("GET http://a/health HTTP/1.1", ["Connection: close"], True, b"ok\n"),
        ("GET /health?a=b HTTP/1.1", ["Connection: close"], True, b"ok\n"),
        ("GET /health HTTP/1.0", [], True, b"ok\n"),
        ("GET /health HTTP/1.0", ["Connection: keep-alive"], True, b"ok\n"),
    ):
        with heard.connect() as sock:
            sock.sendall(hostile.request(b"", *headers, first=first, length=False))
            said = hostile.told(sock) if is_closed else sock.recv(1000)
            assert said.endswith(b"\r\n\r\n" + body), (first, said)


def test_who_waits_to_be_asked_for_the_body_is_asked(start: Start) -> None:
    """As curl does for large ones; and where it would be refused, it is at once."""
    heard = start(max_body_bytes=1000)
    head, _, body = call("t", "Expect: 100-continue").partition(b"\r\n\r\n")
    with heard.connect() as sock:
        sock.sendall(head + b"\r\n\r\n")
        assert read_until(sock, b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
        sock.sendall(body)
        heard.next()[1].finish(b"{}")
        assert read_until(sock, b"{}").startswith(b"HTTP/1.1 200 OK")
    with heard.connect() as sock:
        sock.sendall(hostile.request(b"", "Expect: 100-continue", length=2000))
        assert hostile.statuses(hostile.told(sock)) == {413}


@pytest.mark.parametrize("is_watched", [False, True])
def test_a_long_answer_that_is_read_slowly_comes_whole(is_watched: bool, start: Start) -> None:
    """More than the system takes at a time; and the next request is answered, too."""
    heard = start()
    body = bytes(range(256)) * 32 * 1024
    with heard.connect() as sock:
        for _ in range(2):
            sock.sendall(call(monitor=MONITOR if is_watched else None))
            _, exchange = heard.next()
            if is_watched:
                exchange.heartbeat()
                assert read_until(sock, b"1\r\n\n\r\n").startswith(b"HTTP/1.1 200")
            exchange.finish(body)
            until(lambda: unsent_to(heard, sock), SECONDS, "a part is on its way")
            said = read_until(sock, b"\r\n0\r\n\r\n" if is_watched else body[-1000:])
            assert body in said


def test_an_answer_comes_behind_the_one_before_it(start: Start) -> None:
    """Also when its caller asked before it had read that, of which the loop has a part still."""
    heard = start()
    body = b"x" * 8_000_000
    with heard.connect() as sock:
        for _ in range(20):
            sock.sendall(call())
            heard.next()[1].finish(body)
            until(lambda: unsent_to(heard, sock), SECONDS, "a part is on its way")
            sock.sendall(call())
            _, exchange = heard.next()
            answering = threading.Thread(target=exchange.finish, args=[b"<second>"])
            said = sock.recv(1_000_000)
            answering.start()
            while not said.endswith(b"<second>") and len(said) < len(body) + 1000:
                said += sock.recv(1_000_000)
            answering.join()
            assert body + b"HTTP/1.1 200" in said


def unsent_to(heard: Heard, sock: socket.socket) -> bool:
    """Whether something is in the kernel for the client."""
    sock.recv(1, socket.MSG_PEEK)
    return True


def test_answers_from_several_threads_are_given_once(start: Start) -> None:
    """The first one counts, and each connection has its own."""
    heard = start()
    with contextlib.ExitStack() as stack:
        socks = [stack.enter_context(heard.connect()) for _ in range(20)]
        for number, sock in enumerate(socks):
            sock.sendall(call(id=f"<{number}>"))
        taken = [heard.next() for _ in socks]
        began = threading.Barrier(8)

        def answer() -> None:
            began.wait(SECONDS)
            for request, exchange in taken:
                exchange.finish(str(request.id).encode())

        threads = [threading.Thread(target=answer) for _ in range(8)]
        for each in threads:
            each.start()
        for number, sock in enumerate(socks):
            assert read_until(sock, b">").endswith(f"\r\n\r\n<{number}>".encode())
        for each in threads:
            each.join()
        for number, sock in enumerate(socks):
            sock.sendall(call(id=f"<again {number}>"))
            request, exchange = heard.next()
            exchange.finish(str(request.id).encode())
            assert read_until(sock, b">").count(b"HTTP/1.1") == 1


def test_a_long_answer_from_several_threads_is_given_once(start: Start) -> None:
    """Also when the caller reads while they write, so that each could write a part."""
    heard = start()
    body = b"x" * 6_000_000 + b">"
    with heard.connect() as sock:
        for _ in range(30):
            sock.sendall(call())
            _, exchange = heard.next()
            threads = [threading.Thread(target=exchange.finish, args=[body]) for _ in range(3)]
            for each in threads:
                each.start()
            said = read_until(sock, b">")
            for each in threads:
                each.join()
            assert said.partition(b"\r\n\r\n")[2] == body
        sock.sendall(HEALTH)
        assert read_until(sock, b"ok\n").count(b"HTTP/1.1") == 1, "nothing is left of the others"


def test_an_answer_for_a_caller_that_is_gone_goes_nowhere(start: Start) -> None:
    """Neither to who is connected by the same number of a file afterwards."""
    heard = start()
    for _ in range(50):
        gone = heard.connect()
        gone.sendall(call())
        _, exchange = heard.next()
        gone.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        gone.close()
        with heard.connect() as sock:
            sock.sendall(HEALTH)
            exchange.finish(b"of the other")
            exchange.heartbeat()
            exchange.abandon()
            assert read_until(sock, b"ok\n").count(b"HTTP/1.1") == 1
    assert heard.requests.empty()


def test_heartbeats_come_before_the_reply(start: Start) -> None:
    """As blank lines, and none when the reply is there at once."""
    heard = start()
    with heard.connect() as sock:
        sock.sendall(call(monitor=MONITOR))
        _, exchange = heard.next()
        for _ in range(3):
            exchange.heartbeat()
        exchange.finish(b"{}")
        said = read_until(sock, b"0\r\n\r\n")
        assert said.partition(b"\r\n\r\n")[2] == b"1\r\n\n\r\n" * 3 + b"2\r\n{}\r\n0\r\n\r\n"
        sock.sendall(call(monitor=MONITOR))
        heard.next()[1].finish(b"{}")
        assert b"Content-Length: 2\r\n" in read_until(sock, b"{}")


@pytest.mark.parametrize("has_begun", [False, True])
def test_a_call_that_will_have_no_reply(has_begun: bool, start: Start) -> None:
    """Its caller is told by the status, or where that was sent, by the end of the connection."""
    heard = start()
    with heard.connect() as sock:
        sock.sendall(call(monitor=MONITOR))
        _, exchange = heard.next()
        if has_begun:
            exchange.heartbeat()
            read_until(sock, b"\n\r\n")
        exchange.abandon()
        if has_begun:
            assert hostile.told(sock) == b""
        else:
            assert b"HTTP/1.1 500 " in read_until(sock, b"server\n")


def test_what_nobody_asks_over_any_more_is_closed(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some time after its last answer; a call that is being executed keeps it open."""
    monkeypatch.setattr(server_connection, "IDLE_SECONDS", 0.1)
    heard = start()
    with heard.connect() as used, heard.connect() as idle:
        used.sendall(call("long"))
        _, exchange = heard.next()
        idle.sendall(call("short"))
        heard.next()[1].finish(b"{}")
        read_until(idle, b"{}")
        assert idle.recv(1) == b""
        exchange.finish(b"{}")
        assert read_until(used, b"{}")
        assert used.recv(1) == b""


def test_a_length_of_many_digits_is_a_length(
    start: Start, caplog: pytest.LogCaptureFixture
) -> None:
    """Python makes no number of more than 4,300: anybody could have the server log a traceback."""
    heard = start()
    body = json.dumps(hostile.content("zeros")).encode()
    for length in ("0" * 5000 + str(len(body)), f"{len(body)} ", "0" * 5000, "0"):
        with heard.connect() as sock:
            is_right = length.strip("0 ") != ""
            sock.sendall(hostile.request(body if is_right else b"", length=length))
            if is_right:
                heard.next()[1].finish(b"{}")
            else:
                assert hostile.statuses(hostile.told(sock)) == {400}, "no JSON"
    assert not caplog.records


@pytest.mark.parametrize(
    ("header", "status"), [("Transfer-Encoding: chunked", 411), ("Content-Length: 1000000", 413)]
)
@pytest.mark.parametrize("first", ["GET /health HTTP/1.1", "HEAD /health HTTP/1.1"])
def test_a_question_for_the_health_has_no_body(
    first: str, header: str, status: int, start: Start
) -> None:
    """It is refused by its head: who has no secret could else send for 10 s what the server has to
    read, and a header behind chunks, which the parser joins, kept it from all else."""
    heard = start()
    with heard.connect() as sock:
        sock.sendall(hostile.request(b"", header, first=first, length=False))
        assert hostile.statuses(hostile.told(sock)) == {status}


# -- the end of a server ---------------------------------------------------------------------------


def test_a_request_that_has_begun_is_answered_when_the_server_stops(start: Start) -> None:
    """Its sender would else not know whether it was executed; idle connections are closed."""
    heard = start()
    with heard.connect() as idle, heard.connect() as half, heard.connect() as executed:
        whole = call("half")
        for sock in (idle, executed):
            sock.sendall(call("whole"))
            _, exchange = heard.next()
            if sock is idle:
                exchange.finish(b"{}")
                read_until(sock, b"{}")
        half.sendall(whole[:-10])
        until(lambda: not unread_by(heard, half), SECONDS, "it is read")
        stopping = threading.Thread(target=heard.server.stop)
        stopping.start()
        assert idle.recv(1) == b""
        half.sendall(whole[-10:])
        heard.next()[1].finish(b"{}")
        exchange.finish(b"{}")
        for sock in (half, executed):
            said = hostile.told(sock)
            assert hostile.statuses(said) == {200} and b"Connection: close" in said
        stopping.join(SECONDS)
        assert not stopping.is_alive()


def test_an_answer_that_is_on_its_way_comes_whole_when_the_server_stops(start: Start) -> None:
    """More than the system takes at a time, to a caller that reads it only then."""
    heard = start()
    body = b"x" * 20_000_000
    with heard.connect() as sock, heard.connect() as idle:
        idle.sendall(HEALTH)
        read_until(idle, b"ok\n")
        sock.sendall(call())
        heard.next()[1].finish(body)
        pieces = [sock.recv(100)]
        stopping = threading.Thread(target=heard.server.stop)
        stopping.start()
        assert idle.recv(1) == b"", "the server closes its connections"
        while piece := sock.recv(65536):
            pieces.append(piece)
        assert b"".join(pieces).partition(b"\r\n\r\n")[2] == body
        stopping.join(SECONDS)
        assert not stopping.is_alive()


@pytest.mark.parametrize("uses_tls", [False, True])
def test_connections_that_nobody_uses_do_not_hold_up_the_end(
    uses_tls: bool, start: Start, tmp_path: Path
) -> None:
    """Nor do those in a handshake."""
    files = certificates.make(tmp_path / "tls")
    options = {"tls_cert": str(files.certificate), "tls_key": str(files.key)} if uses_tls else {}
    heard = start(**options)
    trusting = ssl.create_default_context(cafile=str(files.authority))
    with contextlib.ExitStack() as stack:
        for _ in range(3):
            sock = stack.enter_context(heard.connect())
            if uses_tls:
                stack.enter_context(heard.connect()).sendall(b"\x16\x03\x01")
                sock = stack.enter_context(trusting.wrap_socket(sock, server_hostname="127.0.0.1"))
            sock.sendall(call())
            heard.next()[1].finish(b"{}")
            read_until(sock, b"{}")
        began = time.monotonic()
        heard.server.stop()
        assert time.monotonic() - began < CLOSING_SECONDS / 2


def test_connections_that_come_while_the_server_stops_do_not_hold_it_up() -> None:
    """Some it has taken, and is about to open when it stops."""
    asked: queue.Queue[threading.Event] = queue.Queue()

    def take(request: Request, exchange: Exchange) -> int:
        """Keep the loop from going on until the test says so."""
        go_on = threading.Event()
        asked.put(go_on)
        go_on.wait(SECONDS)
        return 404

    server = HttpServer(Options(), Secret(None, None), "127.0.0.1", take)
    server.start()
    stopping = threading.Thread(target=server.stop)
    with contextlib.ExitStack() as stack:
        first, second = (stack.enter_context(hostile.connected(server.port)) for _ in range(2))
        for sock in (first, second):
            sock.sendall(HEALTH)
            read_until(sock, b"ok\n")
        first.sendall(call())
        go_on = asked.get(timeout=SECONDS)
        for _ in range(MOST_ACCEPTED + 100):
            stack.enter_context(hostile.connected(server.port))
        second.sendall(call())
        go_on.set()
        go_on = asked.get(timeout=SECONDS)
        stopping.start()
        until(lambda: server._loop is None, SECONDS, "it stops")
        go_on.set()
        stopping.join(CLOSING_SECONDS / 2)
        assert not stopping.is_alive()
        assert not server._connections


def test_handshakes_count_as_connections(start: Start, tmp_path: Path) -> None:
    """Who has no certificate, and sends nothing, cannot take more than ``max_connections``."""
    files = certificates.make(tmp_path / "tls")
    most = 4
    heard = start(tls_cert=str(files.certificate), tls_key=str(files.key), max_connections=most)
    trusting = ssl.create_default_context(cafile=str(files.authority))

    def health() -> bytes:
        with (
            contextlib.suppress(OSError),
            heard.connect() as plain,
            trusting.wrap_socket(plain, server_hostname="127.0.0.1") as sock,
        ):
            sock.sendall(HEALTH)
            return sock.recv(1000)
        return b""

    with contextlib.ExitStack() as stack:
        silent = [stack.enter_context(heard.connect()) for _ in range(most)]
        assert health() == b""
        silent[0].close()
        until(lambda: health().startswith(b"HTTP/1.1 200"), SECONDS, "there is room again")


def test_who_comes_while_a_server_stops_is_refused(start: Start) -> None:
    """Though it waits for the call that it has: a connection that the system would take, and nobody
    read, would leave its sender not knowing that nobody took the message."""
    heard = start()
    with heard.connect() as sock:
        sock.sendall(call())
        _, exchange = heard.next()
        stopping = threading.Thread(target=heard.server.stop)
        stopping.start()

        def is_refused() -> bool:
            try:
                heard.connect().close()  # it may not have begun to stop
                return False
            except ConnectionRefusedError:
                return True

        until(is_refused, SECONDS, "connections are refused")
        assert stopping.is_alive()
        exchange.finish(b"{}")
        assert hostile.statuses(hostile.told(sock)) == {200}
        stopping.join(SECONDS)
    assert heard.requests.empty()
