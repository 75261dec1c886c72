"""One connection of the HTTP server: a request, its answer, and the next request."""

from __future__ import annotations

import asyncio
import contextlib
import math
import socket
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from email.utils import formatdate
from http import HTTPStatus
from typing import cast

from ...extras import extra
from .messages import Malformed, Request, read_request
from .protocol import HEALTH_PATH, HEARTBEAT, PATH
from .secret import Secret

with extra("oslo-http"):
    import httptools

READ_SECONDS = 10.0
"""The first message of a connection has to be there so soon, and each next one so soon after its
first byte.  TLS has to be agreed upon as soon."""
IDLE_SECONDS = 75.0
"""A connection that nothing is asked over is closed; clients close theirs long before."""
MOST_HEAD_BYTES = 16 * 1024
"""A client of this driver sends some 200 bytes before the body."""
JSON = "application/json"
ABANDONED = "what executed the message ended without a reply: see the log of the server"
VERSIONS = ("1.0", "1.1")
_KNOWN = {path.encode(): path for path in (PATH, HEALTH_PATH)}


class Exchange:
    """What a listener gets of a request beside its content: the way to its sender.  Every method
    may be called from any thread, and raises nothing."""

    __slots__ = ("_connection", "is_watched")

    def __init__(self, connection: Connection, *, is_watched: bool) -> None:
        self._connection, self.is_watched = connection, is_watched

    def heartbeat(self) -> None:
        """Tell the caller that the call is being executed, if it wants to know."""
        if self.is_watched:
            self._tell(self._connection.beat)

    def finish(self, body: bytes) -> None:
        """Answer with *body*."""
        if self.is_watched or not self._connection.finish_here(self, body):
            self._tell(self._connection.finish, body)

    def abandon(self) -> None:
        """There will be no answer."""
        self._tell(self._connection.abandon)

    def _tell(self, what: Callable[..., None], *words: bytes) -> None:
        self._connection.tell(what, self, *words)


Take = Callable[[Request, Exchange], int]
"""Hand a request to whom it is addressed.  202, or why it was not taken: 404 or 503.  Called on the
server's thread, and must not wait."""


@dataclass(slots=True)
class Rules:
    """What the connections of a server have in common."""

    take: Take
    secret: Secret
    max_body_bytes: int
    ended: Callable[[Connection], None]
    """Called when one is closed."""
    date: str = ""

    def read_clock(self) -> None:
        """Every second: answers say when they were given."""
        self.date = formatdate(usegmt=True)


@dataclass(slots=True)
class _Coming:
    """A request as it comes in."""

    size: int = 0
    """Bytes of it that have come, and perhaps of what follows it."""
    url: bytes = b""
    head_bytes: int = 0
    length: int | None = None
    is_chunked: bool = False
    authorization: str | None = None
    expects: bool = False
    is_head_complete: bool = False
    is_probe: bool = False
    wants_body: bool = True
    """Whether the answer has one."""
    pieces: list[bytes] = field(default_factory=list)
    is_whole: bool = False
    refusal: tuple[int, str] | None = None
    """The status, and why no more of it is read."""


class Connection(asyncio.Protocol):
    """Answers requests one after the other; one that comes before the answer to the one before it
    ends the connection, as HTTP allows.  Everything but `finish_here` and `tell` is called on the
    loop.

    *sock*, without TLS: written to by the thread that executes a call, which saves the loop a turn
    (a tenth of the time of a call).  `closes_at` is when the connection has to be closed, by the
    clock of the loop.
    """

    def __init__(
        self, loop: asyncio.AbstractEventLoop, rules: Rules, sock: socket.socket | None
    ) -> None:
        self._loop, self._rules, self._sock = loop, rules, sock
        self._lock = threading.Lock()
        """Held by who answers an exchange or looks whether there is one: `finish_here` does so on
        other threads."""
        self._sending = threading.Lock()
        """Held by who writes; taken before `_lock` is let go, so that answers keep their order."""
        self._rest = b""
        """What `finish_here` could not write, and the loop has to before anything else."""
        self.closes_at = loop.time() + READ_SECONDS
        self._transport: asyncio.Transport | None = None
        self._parser = httptools.HttpRequestParser(self)
        self._coming = _Coming()
        self._exchange: Exchange | None = None
        """Of the message that is being executed."""
        self._has_begun = False
        """Whether a part of its answer was written."""
        self._is_heard = self._is_probed = False
        """Whether a message has come over it, and a question for the health of this process."""
        self._is_last = False
        """Whether it is closed after the answer."""
        self._has_unsent = False
        """Whether the other side does not read what is written: without TLS, every byte of it."""

    # -- what asyncio calls ------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        if self._sock is not None:
            self._transport.set_write_buffer_limits(0)

    def connection_lost(self, exc: Exception | None) -> None:
        with self._lock, self._sending:  # asyncio closes the socket only then
            self._exchange = self._transport = self._sock = None
        self._rules.ended(self)

    def pause_writing(self) -> None:
        self._has_unsent = True

    def resume_writing(self) -> None:
        self._has_unsent = False

    def data_received(self, data: bytes) -> None:
        with self._lock:
            if self._exchange is not None:
                self._end_after_this()
                return
        if self._transport is None or self._transport.is_closing():
            return
        coming = self._coming
        coming.size += len(data)
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserCallbackError:
            raise  # a defect of this class
        except (httptools.HttpParserError, httptools.HttpParserUpgrade):
            if not coming.is_whole:
                coming.refusal = coming.refusal or (400, "this is not HTTP/1.1")
            self._is_last = True
        if not coming.is_head_complete and coming.size > MOST_HEAD_BYTES:
            coming.refusal = coming.refusal or (431, "the head is too long")
        if coming.refusal is not None:
            self._refuse(*coming.refusal)
        elif coming.is_whole:
            self._heard(coming)

    # -- what the parser calls: for each request in a piece of data -----------------------------

    def on_message_begin(self) -> None:
        if self._coming.is_whole:
            self._end_after_this()
        elif self._is_heard:
            self.closes_at = self._loop.time() + READ_SECONDS

    def on_url(self, piece: bytes) -> None:
        if not self._coming.is_whole:
            self._coming.url += piece

    def on_header(self, name: bytes, value: bytes) -> None:
        coming = self._coming
        if coming.is_whole:
            return
        coming.head_bytes += len(name) + len(value)
        name = name.lower()
        if name == b"content-length":
            digits = value.strip().lstrip(b"0")  # which the parser has seen that they are
            coming.length = int(digits or b"0")  # of too many zeros Python makes no number
        elif name == b"transfer-encoding":
            coming.is_chunked = True
        elif name == b"authorization":
            coming.authorization = value.decode("latin-1")
        elif name == b"expect":
            coming.expects = value.lower() == b"100-continue"

    def on_headers_complete(self) -> None:
        coming = self._coming
        if coming.is_whole:
            return
        coming.is_head_complete = True
        coming.refusal = self._why_not(coming)
        if coming.refusal is None and coming.expects:
            self._write(b"HTTP/1.1 100 Continue\r\n\r\n")

    def on_body(self, piece: bytes) -> None:
        coming = self._coming
        if not coming.is_whole and coming.refusal is None:
            coming.pieces.append(piece)

    def on_message_complete(self) -> None:
        if not self._coming.is_whole:
            self._coming.is_whole = True
            if not self._parser.should_keep_alive() or self._parser.get_http_version() != "1.1":
                self._is_last = True

    # -- requests ----------------------------------------------------------------------------

    def _why_not(self, coming: _Coming) -> tuple[int, str] | None:
        """Judge a request by its head."""
        if self._parser.get_http_version() not in VERSIONS or self._parser.should_upgrade():
            return 400, "this is not HTTP/1.1"
        if coming.head_bytes + len(coming.url) > MOST_HEAD_BYTES:  # it came in one piece
            return 431, "the head is too long"
        if coming.is_chunked:  # after the chunks there may be headers without end
            return 411, "a length is needed"
        method, path = self._parser.get_method(), _path_of(coming.url)
        if path == HEALTH_PATH and method in (b"GET", b"HEAD"):
            if coming.length:
                return 413, "more than 0 bytes"
            coming.is_probe, coming.wants_body = True, method == b"GET"
            return None
        if path != PATH or method != b"POST":
            return 404, "there is nothing here"
        if not self._rules.secret.accepts(coming.authorization):
            return 401, "the secret is wrong, or was not given"
        if coming.length is None:
            return 411, "a length is needed"
        if coming.length > self._rules.max_body_bytes:
            return 413, f"more than {self._rules.max_body_bytes} bytes"
        return None

    def _heard(self, coming: _Coming) -> None:
        """Answer a whole request."""
        if coming.is_probe:
            self._answer_probe(coming)
            return
        self._is_heard = True
        try:
            heard = read_request(b"".join(coming.pieces))
        except Malformed as error:
            self._refuse(400, str(error))
            return
        exchange = Exchange(self, is_watched=heard.wait and heard.monitor is not None)
        self._exchange, self._has_begun, self.closes_at = exchange, False, math.inf
        status = self._rules.take(heard, exchange)
        if status != 202 or not heard.wait:
            self._answer(status)

    def _answer_probe(self, coming: _Coming) -> None:
        """It needs no secret, so it does not count as a message, and the second one is the last of
        its connection: anybody could ask for more, and not read the answers."""
        self._is_last = self._is_last or self._is_probed
        self._is_probed = True
        self._answer(200, b"ok\n", has_body=coming.wants_body)

    def _end_after_this(self) -> None:
        """What comes before the answer was given is not read."""
        self._is_last = True
        if self._transport is not None and not self._transport.is_closing():
            self._transport.pause_reading()

    # -- answers -----------------------------------------------------------------------------

    def tell(self, what: Callable[..., None], *words: object) -> None:
        """Have the loop call *what*; may be called from any thread."""
        with contextlib.suppress(RuntimeError):  # the server was stopped
            self._loop.call_soon_threadsafe(what, *words)

    def finish_here(self, exchange: Exchange, body: bytes) -> bool:
        """Answer a call that is not watched, from any thread; False where the loop has to."""
        with self._lock:
            sock = self._sock
            if sock is None or exchange is not self._exchange or self._is_last:
                return False
            data = self._head(200, JSON, f"Content-Length: {len(body)}") + body
            self._answered()  # first: the loop should not wait for this thread to go on
            self._sending.acquire()
        sent = 0
        try:
            if not self._rest and not self._has_unsent:
                with contextlib.suppress(OSError):  # it takes nothing now, or the loop sees why
                    sent = sock.send(data)
        finally:
            self._rest += data[sent:]
            self._sending.release()
        if sent < len(data):
            self.tell(self._write, b"")
        return True

    def finish(self, exchange: Exchange, body: bytes) -> None:
        with self._lock:
            if exchange is not self._exchange:
                return
            if not self._has_begun:
                self._answer(200, body, JSON)
                return
            self._write(b"%x\r\n%b\r\n0\r\n\r\n" % (len(body), body))
            self._answered()

    def beat(self, exchange: Exchange) -> None:
        """Its caller reads a blank line; the first one comes with the head of the answer."""
        if exchange is not self._exchange or self._has_unsent:
            return
        chunk = b"%x\r\n%b\r\n" % (len(HEARTBEAT), HEARTBEAT)
        if not self._has_begun:
            self._has_begun = True
            chunk = self._head(200, JSON, "Transfer-Encoding: chunked") + chunk
        self._write(chunk)

    def abandon(self, exchange: Exchange) -> None:
        with self._lock:
            if exchange is not self._exchange:
                return
            if self._has_begun:
                self.abort()  # the status was sent: nothing else says so
            else:
                self._answer(500, f"{ABANDONED}\n".encode())

    def close(self) -> None:
        """Now, if nothing is being asked; else after the answer, which may be on its way."""
        with self._lock:
            self._is_last = True
            is_idle = self._exchange is None and not self._coming.size
        if is_idle:
            self._write(b"")
        if self._transport is None:  # what should have opened it was cancelled before it began
            self._rules.ended(self)
        elif is_idle and self._transport.get_write_buffer_size():  # of TLS, only a part is counted
            self._transport.close()
        elif is_idle:
            self.abort()  # without a farewell of TLS, which would be waited for

    def abort(self) -> None:
        if self._transport is not None:
            self._transport.abort()

    def _refuse(self, status: int, why: str) -> None:
        """The rest of what was sent is not read."""
        self._is_last = True
        self._answer(status, f"{why}\n".encode())

    def _answer(
        self, status: int, body: bytes = b"", kind: str = "text/plain", *, has_body: bool = True
    ) -> None:
        head = self._head(status, kind, f"Content-Length: {len(body)}")
        self._write(head + body if has_body else head)
        self._answered()

    def _answered(self) -> None:
        self._exchange, self._coming = None, _Coming()
        if self._is_heard:
            self.closes_at = self._loop.time() + IDLE_SECONDS
        if self._is_last and self._transport is not None:
            self._transport.close()

    def _head(self, status: int, kind: str, framing: str) -> bytes:
        last = "Connection: close\r\n" if self._is_last else ""
        return (
            f"HTTP/1.1 {status} {HTTPStatus(status).phrase}\r\nDate: {self._rules.date}\r\n"
            f"Content-Type: {kind}\r\n{framing}\r\n{last}\r\n"
        ).encode("latin-1")

    def _write(self, data: bytes) -> None:
        """After what is left of the answer before."""
        with self._sending:
            data, self._rest = self._rest + data, b""
        if self._transport is not None:
            self._transport.write(data)


def _path_of(url: bytes) -> str | None:
    """Of a whole URL, as a proxy may send it, too."""
    if (path := _KNOWN.get(url)) is not None:
        return path
    try:
        return _KNOWN.get(httptools.parse_url(url).path)
    except httptools.HttpParserError:
        return None
