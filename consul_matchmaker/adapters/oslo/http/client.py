"""The HTTP client: requests over connections that are kept, and what has become of each request."""

from __future__ import annotations

import select
import ssl
import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from http.client import HTTPException
from typing import TYPE_CHECKING, NamedTuple

from ....backends.host_names import HostNames
from ....backends.http.connection import CONNECT_TIMEOUT_SECONDS, Wire
from ....model import Host
from ...extras import extra
from .protocol import HEALTH_PATH, HEARTBEAT, PATH

if TYPE_CHECKING:
    from .options import Options
    from .secret import Secret

with extra("oslo-http"):
    import httptools

BROKEN = (OSError, HTTPException, httptools.HttpParserError)
"""What a connection that fails raises."""

IDLE_SECONDS = 20.0
"""A connection is kept so long without use: a server closes one only much later, so that no request
meets a connection that is being closed."""
MOST_IDLE = 64
"""Connections to one host that are kept: as many as callers at a time, in an executor of 64."""
MOST_REPLY_BYTES = 128 * 1024 * 1024
PIECE_BYTES = 65536
"""Read at a time."""
TLS_SECONDS = 5.0
"""So soon a new connection has to be encrypted and accepted: a busy server needs some ms of CPU for
each that comes."""
EARLY_SECONDS = 1.0
"""An answer that was given before the request was written has come with the end of the connection:
there is nothing to wait for but a busy machine."""
FAIR_SECONDS = 0.5
"""A host that let so much time pass is to blame for it; one that had less was asked too late."""


class NotTaken(Exception):
    """The server has not got the whole request: it may be sent to another."""


class NotTried(NotTaken):
    """Nor is that the host's fault: it was asked too late, or something here is wrong."""


class Lost(Exception):
    """The server has the request, and the connection broke before its reply: what became of it is
    unknown, and it must not be sent again."""


class Answer(NamedTuple):
    status: int
    body: bytes


class Client:
    """Thread-safe.  A forked child has to make its own.

    *clock* says how long a connection was not used; deadlines are those of `time.monotonic`.
    """

    def __init__(
        self,
        options: Options,
        secret: Secret,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._options, self._secret, self._clock = options, secret, clock
        self._names = HostNames(ttl_seconds=30, empty_ttl_seconds=1, most=1000)
        self._idle: dict[Host, deque[tuple[float, Wire]]] = {}
        self._lock = threading.Lock()
        self._swept_at = clock()
        self._is_closed = False

    def post(
        self, host: Host, body: bytes, deadline: float, *, monitor: float | None = None
    ) -> Answer | None:
        """The answer of *host*; None when there is none at *deadline* (`time.monotonic`), or when
        *monitor* is given and nothing was heard for so many seconds.

        Raises NotTaken, NotTried and Lost.
        """
        said = self._head(host, len(body)) + body
        while True:
            wire = self._kept(host)
            is_kept = wire is not None
            if wire is None:
                wire = self._connect(host, deadline)
            wire.begin(deadline)
            began = time.monotonic()
            try:
                wire.sendall(said)
            except BaseException as error:
                is_closed = is_kept and not wire.sent_bytes  # before it: it was idle for too long
                answer = None if is_closed else _early_answer(wire, error)
                wire.sock.close()
                if answer is not None:
                    return answer
                if not isinstance(error, OSError):
                    raise
                if isinstance(error, TimeoutError) or not is_kept:
                    raise _not_taken(error, began) from error
                # It was closed: another one that was kept, or a new one.
            else:
                return self._read(host, wire, monitor)

    def close(self) -> None:
        """Close every connection that is not in use."""
        with self._lock:
            self._is_closed = True
            kept = [wire for wires in self._idle.values() for _, wire in wires]
            self._idle.clear()
        for wire in kept:
            wire.sock.close()

    # -- one exchange ------------------------------------------------------------------------

    def _head(self, host: Host, size: int) -> bytes:
        secret = "".join(f"{name}: {value}\r\n" for name, value in self._secret.header().items())
        return (
            f"POST {PATH} HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
            f"Content-Length: {size}\r\n{secret}\r\n"
        ).encode("latin-1")

    def _read(self, host: Host, wire: Wire, monitor: float | None) -> Answer | None:
        is_kept = False
        try:
            reply = _reply_over(wire, monitor)
            is_kept = reply.may_be_kept
            return reply.answer
        except TimeoutError:
            return None
        except BROKEN as error:
            raise Lost(f"{type(error).__name__}: {error}") from error
        finally:
            if is_kept:
                self._keep(host, wire)
            else:
                wire.sock.close()

    # -- connections -------------------------------------------------------------------------

    def _kept(self, host: Host) -> Wire | None:
        """One that was used lately and that the server has not closed."""
        while True:
            with self._lock:
                wires = self._idle.get(host)
                if not wires:
                    return None
                since, wire = wires.pop()
            if self._clock() - since < IDLE_SECONDS and not _has_news(wire):
                return wire
            wire.sock.close()

    def _keep(self, host: Host, wire: Wire) -> None:
        now = self._clock()
        with self._lock:
            wires = self._idle.setdefault(host, deque())
            wires.append((now, wire))
            surplus = [wires.popleft()] if len(wires) > MOST_IDLE or self._is_closed else []
            if now - self._swept_at > IDLE_SECONDS:
                self._swept_at = now
                surplus += self._outdated(now)
        for _, old in surplus:
            old.sock.close()

    def _outdated(self, now: float) -> list[tuple[float, Wire]]:
        """Take out what was not used for too long, and hosts that have none left; with the lock."""
        found = []
        for host, wires in list(self._idle.items()):
            while wires and now - wires[0][0] >= IDLE_SECONDS:
                found.append(wires.popleft())
            if not wires:
                del self._idle[host]
        return found

    def _connect(self, host: Host, deadline: float) -> Wire:
        began = time.monotonic()
        if host.port is None:
            raise NotTaken(f"{host} has no port")
        context = self._context() if self._options.uses_tls else None
        try:
            until = min(deadline, began + CONNECT_TIMEOUT_SECONDS)
            addresses = self._names.addresses(host.address, until)
        except OSError as error:
            raise _not_taken(error, began) from error
        failures: list[NotTaken] = []
        for address in addresses:
            try:
                wire = Wire.to(address, MOST_REPLY_BYTES)
            except OSError as error:  # this process has too many files open, for one
                failures.append(NotTried(f"{error}"))
                continue
            try:
                wire.connect(address, host.port, deadline)
                if context is not None:
                    _secure(wire, host, context, deadline)
            except BaseException as error:
                wire.sock.close()
                if not isinstance(error, BROKEN):
                    raise
                failures.append(_not_taken(error, began))
            else:
                return wire
        raise failures[0] if failures else NotTaken(f"there is no host of the name {host.address}")

    def _context(self) -> ssl.SSLContext:
        """Made anew for each connection, so that the files may be replaced.  Raises NotTried."""
        options = self._options
        try:
            context = ssl.create_default_context(cafile=options.tls_ca)
            if options.tls_cert is not None:
                context.load_cert_chain(options.tls_cert, options.tls_key)
        except OSError as error:
            files = [name for name in (options.tls_ca, options.tls_cert, options.tls_key) if name]
            raise NotTried(f"{error.strerror or error}: {', '.join(files)}") from error
        return context


class _Reply:
    """The answer to one request as it comes in; a parser in C tells of its parts.

    What is said before it (1xx) and after it is no part of it.
    """

    def __init__(self) -> None:
        self.is_complete = False
        self.may_be_kept = False
        """Whether the connection serves for another request: nothing else has come over it."""
        self._status = 0
        self._pieces: list[bytes] = []
        self._parser = httptools.HttpResponseParser(self)

    @property
    def answer(self) -> Answer:
        return Answer(self._status, b"".join(self._pieces).lstrip(HEARTBEAT))

    def feed(self, piece: bytes) -> None:
        """Take what was read; raises ConnectionResetError where that was the end."""
        if not piece:
            raise ConnectionResetError("the connection was closed before the answer was complete")
        try:
            self._parser.feed_data(piece)
        except httptools.HttpParserError:
            if not self.is_complete:
                raise

    def on_message_begin(self) -> None:
        self.may_be_kept = False

    def on_body(self, piece: bytes) -> None:
        if not self.is_complete:
            self._pieces.append(piece)

    def on_message_complete(self) -> None:
        if not self.is_complete and (status := self._parser.get_status_code()) >= 200:
            self._status, self.is_complete = status, True
            self.may_be_kept = bool(self._parser.should_keep_alive())  # later it says no
            del self._parser  # which refers to us: the body would stay until garbage is collected


def _reply_over(wire: Wire, monitor: float | None = None) -> _Reply:
    """What comes until the deadline of *wire*; raises TimeoutError and the rest of `BROKEN`."""
    deadline, reply = wire.deadline, _Reply()
    while not reply.is_complete:
        if monitor is not None:
            wire.deadline = min(deadline, time.monotonic() + monitor)
        reply.feed(wire.receive(PIECE_BYTES))
    return reply


def _early_answer(wire: Wire, failure: BaseException) -> Answer | None:
    """What the server said before it closed the connection, which is how writing failed: that it
    knows no such secret, or that the request is too long."""
    if not isinstance(failure, (ConnectionError, ssl.SSLEOFError)):
        return None
    wire.deadline = min(wire.deadline, time.monotonic() + EARLY_SECONDS)
    with suppress(*BROKEN):
        return _reply_over(wire).answer
    return None


def _secure(wire: Wire, host: Host, context: ssl.SSLContext, deadline: float) -> None:
    """Go on with TLS, and see that the server accepts us; raises one of `BROKEN`.

    By TLS 1.3 a server looks at the client's certificate when the client has the connection
    already: only an answer shows that it was not refused, and that of a request that is to be
    executed at most once would come too late.
    """
    until = min(deadline, time.monotonic() + TLS_SECONDS)
    wire.secure(context, host.address)
    wire.shake_hands(until)
    wire.begin(until)
    wire.sendall(f"GET {HEALTH_PATH} HTTP/1.1\r\nHost: {host}\r\n\r\n".encode("latin-1"))
    reply = _reply_over(wire)
    if reply.answer.status != 200 or not reply.may_be_kept:
        raise ConnectionError(f"GET {HEALTH_PATH}: status {reply.answer.status}")


def _not_taken(error: Exception, began: float) -> NotTaken:
    is_late = isinstance(error, TimeoutError) and time.monotonic() - began < FAIR_SECONDS
    return (NotTried if is_late else NotTaken)(f"{error}")


def _has_news(wire: Wire) -> bool:
    """Whether there is something to read where nothing was asked: its end, mostly."""
    try:
        if hasattr(select, "poll"):  # select takes no file descriptor above 1,023
            quiet = select.poll()
            quiet.register(wire.sock, select.POLLIN)
            return bool(quiet.poll(0))
        return bool(select.select([wire.sock], [], [], 0)[0])  # eventlet has this one only
    except (OSError, ValueError):  # it was closed
        return True
