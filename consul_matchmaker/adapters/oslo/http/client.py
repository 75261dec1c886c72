"""The HTTP client: requests over connections that are kept, and what has become of each request."""

from __future__ import annotations

import logging
import select
import ssl
import threading
import time
from collections import deque
from collections.abc import Callable
from http.client import HTTPConnection, HTTPException, HTTPResponse, IncompleteRead
from typing import TYPE_CHECKING, Any, NamedTuple

from ....backends.host_names import HostNames
from ....backends.http.connection import Wire
from ....model import Host
from .protocol import HEARTBEAT, PATH

if TYPE_CHECKING:
    from .options import Options
    from .secret import Secret

logger = logging.getLogger(__name__)

IDLE_SECONDS = 20.0
"""A connection is kept so long without use: a server closes one only much later, so that no request
meets a connection that is being closed."""
MOST_IDLE = 64
"""Connections to one host that are kept: as many as callers at a time, in an executor of 64."""
MOST_REPLY_BYTES = 128 * 1024 * 1024
PIECE_BYTES = 64 * 1024
LONGEST_WAIT_SECONDS = 10 * 365 * 86400.0


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
        headers = {"Content-Type": "application/json", **self._secret.header()}
        while True:
            wire = self._kept(host)
            is_kept = wire is not None
            if wire is None:
                wire = self._connect(host, deadline)
            connection = _Connection(host.address, host.port)
            connection.sock = wire
            wire.begin(deadline)
            try:
                connection.request("POST", PATH, body, headers)
                connection.flush()
            except OSError as error:
                wire.sock.close()
                if is_kept and not isinstance(error, TimeoutError):
                    continue  # it was closed: another one, or a new one
                raise NotTaken(f"{error}") from error
            except BaseException:
                wire.sock.close()
                raise
            return self._read(host, wire, connection, monitor)

    def close(self) -> None:
        """Close every connection that is not in use."""
        with self._lock:
            self._is_closed = True
            idle, self._idle = self._idle, {}
        for wires in idle.values():
            for _, wire in wires:
                wire.sock.close()

    # -- one exchange ------------------------------------------------------------------------

    def _read(
        self, host: Host, wire: Wire, connection: _Connection, monitor: float | None
    ) -> Answer | None:
        is_kept = False
        try:
            answer, body = self._answer_of(connection, wire, monitor)
            is_kept = not answer.will_close
            return Answer(answer.status, body)
        except TimeoutError:
            return None
        except (OSError, HTTPException) as error:
            raise Lost(f"{type(error).__name__}: {error}") from error
        finally:
            if is_kept:
                self._keep(host, wire)
            else:
                wire.sock.close()

    def _answer_of(
        self, connection: _Connection, wire: Wire, monitor: float | None
    ) -> tuple[HTTPResponse, bytes]:
        """Raises HTTPException for an answer that breaks off or does not say where it ends."""
        deadline = wire.deadline
        if monitor is not None:
            wire.deadline = min(deadline, time.monotonic() + monitor)
        answer = connection.getresponse()
        if answer.length is None and not answer.chunked:
            raise HTTPException("the answer does not say where it ends")
        pieces = []
        # Not read(), which makes room for as much as the answer says that it has, nor readline(),
        # to which the end of a connection is the end of the answer.
        while answer.length != 0 and (piece := answer.read1(PIECE_BYTES)):
            pieces.append(piece)
            if monitor is not None:
                wire.deadline = min(deadline, time.monotonic() + monitor)
        if answer.length:
            raise IncompleteRead(b"", answer.length)
        return answer, b"".join(pieces).lstrip(HEARTBEAT)

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


class _Connection(HTTPConnection):
    """Writes a request at once, head and body, when it is told to: until then nothing was sent."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._unsent: list[Any] = []

    def send(self, data: Any) -> None:
        self._unsent.append(data)

    def flush(self) -> None:
        assert self.sock is not None
        self.sock.sendall(b"".join(self._unsent))


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
