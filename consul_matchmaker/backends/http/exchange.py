"""One HTTP exchange with one Consul agent, with one deadline for all of it.

`Exchange` is a transport of the ``consul`` package, of which only the abstract
``consul.base.HTTPClient`` is used, in what python-consul2 and py-consul have in common: their own
transports know no deadline for an answer as a whole.  ``http.client`` writes the request and reads
the answer, by way of a `Wire`, which keeps the deadline and counts bytes.
"""

from __future__ import annotations

import ssl
import time
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partialmethod
from http.client import HTTPConnection, HTTPException, HTTPMessage, HTTPResponse, IncompleteRead
from typing import Any, NamedTuple

import consul.base

from ..host_names import HostNames
from ..traffic import Traffic
from .connection import CONNECT_TIMEOUT_SECONDS, Wire

IDLE_CONNECTIONS = 10
"""Kept open to an agent, if so many were needed at once.  Consul refuses more than 200 from one IP
address, of all programs there together (fact C5)."""
MAX_ANSWER_BYTES = 64 * 1024 * 1024
"""More is no answer to a question of ours: 100,000 registrations are about 10 MB of keys."""
PIECE_BYTES = 65536
"""Read at a time: so much and no more is set aside for a length that an answer only claims."""
DEFAULT_TIMEOUT_SECONDS = 10.0
"""Of what the ``consul`` package asks by itself: it hands no deadline over."""

_CLOSED = (ConnectionError, ssl.SSLEOFError, ssl.SSLZeroReturnError)


class Response(NamedTuple):
    """An agent's answer, whatever its status."""

    status: int
    headers: HTTPMessage
    body: bytes


class Exchange(consul.base.HTTPClient):  # type: ignore[misc]  # which has no types
    """HTTP with one agent, over connections that are kept.  Thread-safe.

    Every exchange has to be idempotent: where its connection was closed, which a kept one shows
    only when it is used, it is repeated once on a new one.

    *verify* is True (the CAs of the system: OpenSSL's, which the variables SSL_CERT_FILE and
    SSL_CERT_DIR replace), False, or the path of a file of CAs; *cert* the paths of a certificate
    and of its key.  These files are read for each new connection, so they may be replaced.
    """

    def __init__(
        self,
        host: str = "127.0.0.1",
        port: int | None = 8500,
        scheme: str = "http",
        verify: bool | str = True,
        cert: tuple[str, str | None] | None = None,
        *,
        traffic: Traffic | None = None,
        host_names: HostNames | None = None,
    ) -> None:
        super().__init__(host, port, scheme, verify, cert)
        self._traffic = traffic or Traffic()
        self._host_names = host_names or HostNames(ttl_seconds=0, empty_ttl_seconds=0, most=1)
        # No lock guards these: a signal handler may close what its own thread is using.
        self._idle: deque[Wire] = deque()
        self._open: set[Wire] = set()
        self.is_aborted = False

    def request(
        self,
        method: str,
        path: str,
        params: Mapping[str, str],
        body: bytes,
        headers: Mapping[str, str],
        deadline: float,
    ) -> Response:
        """Connect if need be, ask, and read the whole answer before *deadline* (`time.monotonic`).

        Raises TimeoutError, ConnectionError after `abort`, and OSError, HTTPException and
        ValueError (a header that cannot be one) for what else goes wrong.
        """
        target = self.uri(path, params)[len(self.base_uri) :]
        how = {"User-Agent": "consul-matchmaker", **headers}
        ask = method, target, body if body or method != "GET" else None, how
        kept = self._idle.pop() if self._idle else None
        try:
            return self._ask(kept or self._connect(deadline), *ask, deadline)
        except _CLOSED as error:
            if self.is_aborted or isinstance(error, ConnectionRefusedError):
                raise
        if kept is not None:
            self.close()  # the others will have been closed with it
        self._traffic.add(retries=1)
        return self._ask(self._connect(deadline), *ask, deadline)

    def close(self) -> None:
        """Close every connection; one in use when its exchange has ended."""
        idle, self._idle = self._idle, deque()
        for wire in idle:
            self._close(wire)

    def abort(self) -> None:
        """Make every exchange raise ConnectionError at once, now and from now on."""
        self.is_aborted = True
        for wire in tuple(self._open):
            wire.shut_down()
        self.close()

    def __del__(self) -> None:
        for wire in self._open:  # of one that was dropped: no warning
            wire.sock.close()

    # -- connections -------------------------------------------------------------------------

    def _ask(
        self,
        wire: Wire,
        method: str,
        target: str,
        body: bytes | None,
        headers: Mapping[str, str],
        deadline: float,
    ) -> Response:
        idle = self._idle
        wire.begin(deadline)
        connection = HTTPConnection(self.host, self.port)
        connection.sock = wire  # which has all that is used of a socket
        try:
            with suppress(BrokenPipeError):  # the agent may have said why it reads no more
                connection.request(method, target, body, headers)
            self._traffic.add(queries=1, sent_bytes=wire.sent_bytes)
            answer = connection.getresponse()
            response = Response(answer.status, answer.headers, _body_of(answer))
        except BaseException:
            self._traffic.add(received_bytes=wire.received_bytes)
            self._close(wire)
            raise
        is_error = answer.status in (401, 403, 429) or answer.status >= 500
        self._traffic.add(replies=1, error_replies=is_error, received_bytes=wire.received_bytes)
        if answer.will_close or idle is not self._idle:
            self._close(wire)
            return response
        idle.append(wire)
        if len(idle) > IDLE_CONNECTIONS:
            with suppress(IndexError):
                self._close(idle.popleft())
        return response

    def _connect(self, deadline: float) -> Wire:
        first_error: OSError | None = None
        until = min(deadline, time.monotonic() + CONNECT_TIMEOUT_SECONDS)
        for address in self._host_names.addresses(self.host, until):
            wire = Wire.to(address, MAX_ANSWER_BYTES)
            self._open.add(wire)
            try:
                self._raise_if_aborted()
                wire.connect(address, self.port, deadline)
                if self.scheme == "https":
                    wire.secure(self._context(), self.host)
                    self._raise_if_aborted()
                    wire.shake_hands(deadline)
            except BaseException as error:
                self._close(wire)
                if not isinstance(error, OSError):
                    raise
                first_error = first_error or error
            else:
                return wire
        raise first_error or OSError(f"there is no host of the name {self.host}")

    def _context(self) -> ssl.SSLContext:
        own_cas = self.verify if isinstance(self.verify, str) else None
        try:
            context = ssl.create_default_context(cafile=own_cas)
            if not self.verify:
                context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
            if self.cert is not None:
                context.load_cert_chain(*self.cert)
        except OSError as error:
            files = [name for name in (own_cas, *(self.cert or ())) if name]
            raise OSError(f"{error.strerror or error}: {', '.join(files)}") from None
        return context

    def _raise_if_aborted(self) -> None:
        """To be called when `abort` would find the new connection, so that it misses none."""
        if self.is_aborted:
            raise ConnectionAbortedError("the connection was given up")

    def _close(self, wire: Wire) -> None:
        self._open.discard(wire)
        wire.sock.close()

    # -- as the consul package asks ----------------------------------------------------------

    def _called(
        self,
        method: str,
        callback: Callable[[Any], Any],
        path: str,
        params: Any = None,
        data: str | bytes = b"",
        headers: Mapping[str, str] | None = None,
    ) -> Any:
        """What *callback* makes of the answer, as ``consul.base`` wants it."""
        body = data.encode() if isinstance(data, str) else data
        deadline = time.monotonic() + DEFAULT_TIMEOUT_SECONDS
        found = self.request(method, path, params, body, headers or {}, deadline)
        parts = found.status, found.headers, found.body.decode("utf-8", "replace"), found.body
        # python-consul2 has the bytes too.
        return callback(consul.base.Response(*parts[: len(consul.base.Response._fields)]))

    get = partialmethod(_called, "GET")
    put = partialmethod(_called, "PUT")
    delete = partialmethod(_called, "DELETE")
    post = partialmethod(_called, "POST")


def _body_of(answer: HTTPResponse) -> bytes:
    """The whole body; raises HTTPException when it is cut."""
    try:
        pieces = list(iter(lambda: answer.read(PIECE_BYTES), b""))
    except IncompleteRead:
        pieces, is_cut = [], True
    else:
        is_cut = bool(answer.length)  # `read` itself says nothing of what is missing
    if is_cut:
        raise HTTPException("its answer is cut, or is no HTTP")
    return b"".join(pieces)
