"""One HTTP exchange with one Consul agent, with one deadline for all of it.

`Exchange` is a transport of the ``consul`` package, of which only the abstract
``consul.base.HTTPClient`` is used, in what python-consul2 and py-consul have in common: their own
transports know no deadline for an answer as a whole.  The answer is read here: ``http.client`` has
a deadline for each piece only, takes a malformed length for none, and spends more time on the
headers than all the rest takes.
"""

from __future__ import annotations

import re
import socket
import ssl
import time
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import suppress
from http.client import BadStatusLine, HTTPException, RemoteDisconnected
from typing import Any, NamedTuple

import consul.base

from ...fork import close_after_fork
from ..host_names import HostNames
from ..traffic import Traffic

CONNECT_TIMEOUT_SECONDS = 2.0
"""An agent is on this machine or near it; one lost SYN is sent again after 1 s (RFC 6298)."""
IDLE_CONNECTIONS = 10
"""Kept open to an agent, if so many were needed at once.  Consul refuses more than 200 from one IP
address, of all programs there together (fact C5)."""
MAX_ANSWER_BYTES = 64 * 1024 * 1024
"""More is no answer to a question of ours: 100,000 registrations are about 10 MB of keys."""
MAX_HEAD_BYTES = 65536
"""Of all headers together, and of the line before a chunk."""
PIECE_BYTES = 65536
DEFAULT_TIMEOUT_SECONDS = 10.0
"""Of what the ``consul`` package asks by itself: it hands no deadline over."""

_STATUS_LINE = re.compile(r"HTTP/1\.([01]) ([0-9]{3})(?: .*)?")
_LENGTH = re.compile(r"[0-9]{1,12}")
_CHUNK_LENGTH = re.compile(rb"([0-9A-Fa-f]{1,8})[ \t]*(?:;.*)?")
_CLOSED = (ConnectionError, ssl.SSLEOFError, ssl.SSLZeroReturnError)


class Response(NamedTuple):
    """An agent's answer, whatever its status."""

    status: int
    headers: Mapping[str, str]
    """By names in small letters; several of one name are joined by commas."""
    body: bytes


class AnswerTooLarge(HTTPException):
    """The answer exceeds MAX_ANSWER_BYTES."""


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
        super().__init__(f"[{host}]" if ":" in host else host, port, scheme, verify, cert)
        self._name = host
        self._head = (
            f" HTTP/1.1\r\nHost: {self.host}:{port}\r\n"
            "User-Agent: consul-matchmaker\r\nAccept-Encoding: identity\r\n"
        )
        self._traffic = traffic or Traffic()
        self._host_names = host_names or HostNames(ttl_seconds=0, empty_ttl_seconds=0, most=1)
        # No lock guards these: a signal handler may close what its own thread is using.
        self._idle: deque[socket.socket] = deque()
        self._open: set[socket.socket] = set()
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
        head = [method, " ", self.uri(path, params)[len(self.base_uri) :], self._head]
        for name, value in headers.items():
            if "\r" in value or "\n" in value:
                raise ValueError(f"the header {name} has more than one line")
            head += name, ": ", value, "\r\n"
        if body or method != "GET":
            head.append(f"Content-Length: {len(body)}\r\n")
        message = "".join([*head, "\r\n"]).encode("latin-1") + body
        kept = self._take_idle()
        try:
            return self._ask(kept or self._connect(deadline), message, deadline)
        except _CLOSED as error:
            if self.is_aborted or isinstance(error, ConnectionRefusedError):
                raise
        if kept is not None:
            self.close()  # the others will have been closed with it
        self._traffic.add(retries=1)
        return self._ask(self._connect(deadline), message, deadline)

    def close(self) -> None:
        """Close every connection; one in use when its exchange has ended."""
        idle, self._idle = self._idle, deque()
        for sock in idle:
            self._close(sock)

    def abort(self) -> None:
        """Make every exchange raise ConnectionError at once, now and from now on."""
        self.is_aborted = True
        for sock in tuple(self._open):
            # This wakes the thread that waits there; closing would not.  SSLSocket.shutdown has to
            # be passed by: after it, a thread about to send would send without encryption.
            plain: Any = super(ssl.SSLSocket, sock) if isinstance(sock, ssl.SSLSocket) else sock
            with suppress(OSError):
                plain.shutdown(socket.SHUT_RDWR)
        self.close()

    def __del__(self) -> None:
        for sock in self._open:  # of one that was dropped: no warning
            sock.close()

    # -- connections -------------------------------------------------------------------------

    def _take_idle(self) -> socket.socket | None:
        try:
            return self._idle.pop()
        except IndexError:
            return None

    def _ask(self, sock: socket.socket, message: bytes, deadline: float) -> Response:
        idle = self._idle
        reader = _Reader(sock, deadline)
        try:
            sock.settimeout(_left_until(deadline))
            with suppress(BrokenPipeError):  # it may have said why it reads no more
                sock.sendall(message)
            self._traffic.add(queries=1, sent_bytes=len(message))
            response = reader.response()
        except BaseException:
            self._traffic.add(received_bytes=reader.count)
            self._close(sock)
            raise
        status = response.status
        is_error = status in (401, 403, 429) or status >= 500
        self._traffic.add(replies=1, error_replies=is_error, received_bytes=reader.count)
        if not reader.may_go_on or idle is not self._idle:
            self._close(sock)
            return response
        idle.append(sock)
        if len(idle) > IDLE_CONNECTIONS:
            with suppress(IndexError):
                self._close(idle.popleft())
        return response

    def _connect(self, deadline: float) -> socket.socket:
        first_error: OSError | None = None
        until = min(deadline, time.monotonic() + CONNECT_TIMEOUT_SECONDS)
        for address in self._host_names.addresses(self._name, until):
            sock = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET)
            try:
                self._opened(sock)
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                sock.settimeout(min(CONNECT_TIMEOUT_SECONDS, _left_until(deadline)))
                sock.connect((address, self.port))
                return self._secured(sock, deadline) if self.scheme == "https" else sock
            except OSError as error:
                first_error = first_error or error
                self._close(sock)
            except BaseException:
                self._close(sock)
                raise
        raise first_error or OSError(f"there is no host of the name {self._name}")

    def _secured(self, sock: socket.socket, deadline: float) -> socket.socket:
        secure = self._context().wrap_socket(
            sock, server_hostname=self._name, do_handshake_on_connect=False
        )
        self._open.discard(sock)
        try:
            self._opened(secure)
            secure.settimeout(_left_until(deadline))
            secure.do_handshake()
        except BaseException:
            self._close(secure)
            raise
        return secure

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

    def _opened(self, sock: socket.socket) -> None:
        self._open.add(sock)
        close_after_fork(sock)
        if self.is_aborted:  # looked at after the add, so that `abort` misses none
            raise ConnectionAbortedError("the connection was given up")

    def _close(self, sock: socket.socket) -> None:
        self._open.discard(sock)
        sock.close()

    # -- as the consul package asks ----------------------------------------------------------

    def get(self, callback: Callable[[Any], Any], path: str, params: Any = None, **how: Any) -> Any:
        """What *callback* makes of the answer, as ``consul.base`` wants it."""
        return self._called("GET", callback, path, params, **how)

    def put(self, callback: Callable[[Any], Any], path: str, params: Any = None, **how: Any) -> Any:
        """As `get`."""
        return self._called("PUT", callback, path, params, **how)

    def delete(
        self, callback: Callable[[Any], Any], path: str, params: Any = None, **how: Any
    ) -> Any:
        """As `get`."""
        return self._called("DELETE", callback, path, params, **how)

    def post(
        self, callback: Callable[[Any], Any], path: str, params: Any = None, **how: Any
    ) -> Any:
        """As `get`."""
        return self._called("POST", callback, path, params, **how)

    def _called(
        self,
        method: str,
        callback: Callable[[Any], Any],
        path: str,
        params: Any = None,
        data: str | bytes = b"",
        headers: Mapping[str, str] | None = None,
    ) -> Any:
        body = data.encode() if isinstance(data, str) else data
        deadline = time.monotonic() + DEFAULT_TIMEOUT_SECONDS
        found = self.request(method, path, params, body, headers or {}, deadline)
        parts = found.status, found.headers, found.body.decode("utf-8", "replace"), found.body
        # python-consul2 has the bytes too.
        return callback(consul.base.Response(*parts[: len(consul.base.Response._fields)]))


class _Reader:
    """Reads one answer from a socket, as strictly as HTTP/1.1 is written."""

    def __init__(self, sock: socket.socket, deadline: float) -> None:
        self._sock, self._deadline = sock, deadline
        self._ahead = bytearray()  # received, and not taken yet
        self.count = 0
        """Bytes received."""
        self.may_go_on = False
        """Whether the connection can carry another exchange after this answer."""

    def response(self) -> Response:
        version, status, headers = self._head()
        while 100 <= status < 200:  # "go on", "early hints": the answer is yet to come
            version, status, headers = self._head()
        body, has_end = self._body(status, headers)
        is_last = version == "0" or "close" in headers.get("connection", "").lower()
        self.may_go_on = has_end and not is_last and not self._ahead
        return Response(status, headers, body)

    def _head(self) -> tuple[str, int, dict[str, str]]:
        first, *lines = self._until(b"\r\n\r\n").decode("latin-1").split("\r\n")
        found = _STATUS_LINE.fullmatch(first)
        if found is None:
            raise BadStatusLine(first)
        headers: dict[str, str] = {}
        for line in lines:
            name, colon, value = line.partition(":")
            if not colon or not name or name != name.strip():
                raise HTTPException("a header of its answer is none")
            name, value = name.lower(), value.strip()
            headers[name] = f"{headers[name]}, {value}" if name in headers else value
        return found[1], int(found[2]), headers

    def _body(self, status: int, headers: Mapping[str, str]) -> tuple[bytes, bool]:
        """The body, and whether the answer itself said where it ends."""
        if status in (204, 304):
            return b"", True
        coding, length = headers.get("transfer-encoding"), headers.get("content-length")
        if coding is not None:
            if coding.lower() != "chunked":
                raise HTTPException("the coding of its answer is not known")
            return self._chunks(), True
        if length is None:
            return self._rest(), False
        if not _LENGTH.fullmatch(length):
            raise HTTPException("the length of its answer is no number")
        return self._take(int(length)), True

    def _chunks(self) -> bytes:
        body = bytearray()
        while True:
            found = _CHUNK_LENGTH.fullmatch(self._until(b"\r\n"))
            if found is None:
                raise HTTPException("the length of a chunk of its answer is no number")
            if not (size := int(found[1], 16)):
                break
            body += self._take(size)
            if self._take(2) != b"\r\n":
                raise HTTPException("a chunk of its answer is longer than it says")
        while self._until(b"\r\n"):  # trailers
            pass
        return bytes(body)

    def _rest(self) -> bytes:
        while self._receive():
            pass
        return bytes(self._ahead)

    def _until(self, mark: bytes) -> bytes:
        while (end := self._ahead.find(mark)) < 0:
            if len(self._ahead) > MAX_HEAD_BYTES:
                raise HTTPException(f"its headers exceed {MAX_HEAD_BYTES} bytes")
            self._receive_more()
        found = bytes(self._ahead[:end])
        del self._ahead[: end + len(mark)]
        return found

    def _take(self, size: int) -> bytes:
        if size > MAX_ANSWER_BYTES:
            raise AnswerTooLarge(f"the answer exceeds {MAX_ANSWER_BYTES} bytes; not read")
        while len(self._ahead) < size:
            self._receive_more()
        taken = bytes(self._ahead[:size])
        del self._ahead[:size]
        return taken

    def _receive_more(self) -> None:
        if not self._receive():
            if not self.count:
                raise RemoteDisconnected("Remote end closed connection without response")
            raise HTTPException("the connection was closed in the middle of the answer")

    def _receive(self) -> int:
        self._sock.settimeout(_left_until(self._deadline))
        piece = self._sock.recv(PIECE_BYTES)
        self.count += len(piece)
        if self.count > MAX_ANSWER_BYTES:
            raise AnswerTooLarge(f"the answer exceeds {MAX_ANSWER_BYTES} bytes; not read")
        self._ahead += piece
        return len(piece)


def _left_until(deadline: float) -> float:
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError("timed out")
    return left
