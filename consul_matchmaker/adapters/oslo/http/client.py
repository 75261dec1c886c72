"""The HTTP client: requests over connections that are kept, and what has become of each request."""

from __future__ import annotations

import logging
import select
import ssl
import threading
import time
from collections import deque
from collections.abc import Callable
from http.client import HTTPException
from typing import TYPE_CHECKING, NamedTuple

from ....backends.host_names import HostNames
from ....backends.http.connection import Wire
from ....model import Host
from ...extras import extra
from .protocol import HEARTBEAT, PATH

if TYPE_CHECKING:
    from .options import Options
    from .secret import Secret

with extra("oslo-http"):
    import httptools

logger = logging.getLogger(__name__)

IDLE_SECONDS = 20.0
"""A connection is kept so long without use: a server closes one only much later, so that no request
meets a connection that is being closed."""
MOST_IDLE = 64
"""Connections to one host that are kept: as many as callers at a time, in an executor of 64."""
MOST_REPLY_BYTES = 128 * 1024 * 1024
PIECE_BYTES = 65536
"""Read at a time."""


class NotTaken(Exception):
    """The server has not got the whole request: it may be sent to another."""


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

        Raises NotTaken and Lost.
        """
        said = self._head(host, len(body)) + body
        while True:
            wire = self._kept(host)
            is_kept = wire is not None
            if wire is None:
                wire = self._connect(host, deadline)
            wire.begin(deadline)
            try:
                wire.sendall(said)
            except OSError as error:
                refused = None if isinstance(error, TimeoutError) else self._refusal(wire)
                wire.sock.close()
                if refused is not None:
                    return refused
                if is_kept and not isinstance(error, TimeoutError):
                    continue  # it was closed: another one, or a new one
                raise NotTaken(f"{error}") from error
            except BaseException:
                wire.sock.close()
                raise
            return self._read(host, wire, monitor)

    def close(self) -> None:
        """Close every connection that is not in use."""
        with self._lock:
            self._is_closed = True
            idle, self._idle = self._idle, {}
        for wires in idle.values():
            for _, wire in wires:
                wire.sock.close()

    # -- one exchange ------------------------------------------------------------------------

    def _head(self, host: Host, size: int) -> bytes:
        lines = [
            f"POST {PATH} HTTP/1.1",
            f"Host: {host}",
            "Content-Type: application/json",
            f"Content-Length: {size}",
            *(f"{name}: {value}" for name, value in self._secret.header().items()),
        ]
        return ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1")

    def _read(self, host: Host, wire: Wire, monitor: float | None) -> Answer | None:
        deadline, reply, is_kept = wire.deadline, _Reply(), False
        try:
            while not reply.is_complete:
                if monitor is not None:
                    wire.deadline = min(deadline, time.monotonic() + monitor)
                reply.feed(wire.receive(PIECE_BYTES))
            is_kept = reply.may_be_kept
            return Answer(reply.status, b"".join(reply.body).lstrip(HEARTBEAT))
        except TimeoutError:
            return None
        except (OSError, HTTPException, httptools.HttpParserError) as error:
            raise Lost(f"{type(error).__name__}: {error}") from error
        finally:
            if is_kept:
                self._keep(host, wire)
            else:
                wire.sock.close()

    def _refusal(self, wire: Wire) -> Answer | None:
        """What the server said before it had the whole request, and closed the connection."""
        reply = _Reply()
        try:
            while not reply.is_complete:
                reply.feed(wire.receive(PIECE_BYTES))
        except (OSError, HTTPException, httptools.HttpParserError):
            return None
        return Answer(reply.status, b"".join(reply.body)) if reply.status >= 400 else None

    # -- connections -------------------------------------------------------------------------

    def _kept(self, host: Host) -> Wire | None:
        """One that was used lately and that the server has not closed."""
        wires = self._idle.get(host)
        while wires:
            try:
                since, wire = wires.pop()
            except IndexError:  # another thread has it
                break
            if self._clock() - since < IDLE_SECONDS and not _has_news(wire):
                return wire
            wire.sock.close()
        return None

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
        """Take out what was not used for too long, and hosts that have none left."""
        found = []
        for host, wires in list(self._idle.items()):
            while wires and now - wires[0][0] >= IDLE_SECONDS:
                try:
                    found.append(wires.popleft())
                except IndexError:  # another thread has it
                    break
            if not wires:
                del self._idle[host]
        return found

    def _connect(self, host: Host, deadline: float) -> Wire:
        if host.port is None:
            raise NotTaken(f"{host} has no port")
        failure: Exception = OSError(f"there is no host of the name {host.address}")
        try:
            addresses = self._names.addresses(host.address, deadline)
        except OSError as error:
            raise NotTaken(f"{error}") from error
        for address in addresses:
            wire = Wire.to(address, MOST_REPLY_BYTES)
            try:
                wire.connect(address, host.port, deadline)
                if self._options.uses_tls:
                    wire.secure(self._context(), host.address)
                    wire.shake_hands(deadline)
            except OSError as error:
                wire.sock.close()
                failure = error
            except BaseException:
                wire.sock.close()
                raise
            else:
                return wire
        raise NotTaken(f"{failure}") from failure

    def _context(self) -> ssl.SSLContext:
        """Made anew for each connection, so that the files may be replaced."""
        options = self._options
        context = ssl.create_default_context(cafile=options.tls_ca)
        if options.tls_cert is not None:
            context.load_cert_chain(options.tls_cert, options.tls_key)
        return context


class _Reply:
    """An answer as it comes in; a parser in C tells of its parts."""

    def __init__(self) -> None:
        self.body: list[bytes] = []
        self.is_complete = False
        self.status = 0
        self._messages = 0
        self._says_keep = False
        self._parser = httptools.HttpResponseParser(self)

    def feed(self, piece: bytes) -> None:
        """Take what was read; raises ConnectionResetError where that was the end."""
        if not piece:
            raise ConnectionResetError("the connection was closed before the answer was complete")
        self._parser.feed_data(piece)

    @property
    def may_be_kept(self) -> bool:
        """Whether the connection serves for another request: nothing else has come over it."""
        return self._messages == 1 and self._says_keep

    def on_message_begin(self) -> None:
        self._messages += 1

    def on_headers_complete(self) -> None:
        self.status = self._parser.get_status_code()

    def on_body(self, piece: bytes) -> None:
        self.body.append(piece)

    def on_message_complete(self) -> None:
        self.is_complete = True
        self._says_keep = bool(self._parser.should_keep_alive())  # which it forgets after this


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
