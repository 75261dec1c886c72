"""A connection as ``http.client`` uses a socket: whatever it waits for, it has one deadline."""

from __future__ import annotations

import io
import socket
import ssl
from contextlib import suppress
from http.client import HTTPException
from typing import TYPE_CHECKING, Any

from ...fork import close_after_fork
from .. import seconds_left

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer, WriteableBuffer

CONNECT_TIMEOUT_SECONDS = 2.0
"""Whom we call is on this machine or near it; one lost SYN is sent again after 1 s (RFC 6298)."""


SLACK_SECONDS = 0.001
"""A wait may end so much after its deadline: the next one, and the next exchange, can do with the
timeout that the socket has.  To set one is a system call, which lets other threads go first."""


class AnswerTooLarge(HTTPException):
    """The answer has more bytes than is allowed."""


class Wire(io.RawIOBase):
    """One connection, and the deadline of what is being exchanged over it.  Not thread-safe, but
    for `shut_down`.

    A forked child closes its copy.
    """

    sock: Any

    def __init__(self, sock: socket.socket, most_bytes: int) -> None:
        self.use(sock)
        self._most_bytes = most_bytes

    @classmethod
    def to(cls, address: str, most_bytes: int) -> Wire:
        """One to be connected to *address*, an IP address; an answer may have *most_bytes*."""
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        return cls(socket.socket(family), most_bytes)

    def use(self, sock: socket.socket) -> None:
        self.sock = sock
        close_after_fork(sock)

    def connect(self, address: str, port: int, deadline: float) -> None:
        """Raises OSError, which TimeoutError is."""
        self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.sock.settimeout(min(CONNECT_TIMEOUT_SECONDS, seconds_left(deadline)))
        self.sock.connect((address, port))

    def secure(self, context: ssl.SSLContext, name: str) -> None:
        """Go on with TLS, the certificate being one of *name*; `shake_hands` comes next."""
        self.use(
            context.wrap_socket(self.sock, server_hostname=name, do_handshake_on_connect=False)
        )

    def shake_hands(self, deadline: float) -> None:
        """Raises OSError, which ssl.SSLError is."""
        self.sock.settimeout(seconds_left(deadline))
        self.sock.do_handshake()

    def begin(self, deadline: float) -> None:
        """Let another exchange begin, which ends before *deadline* (`time.monotonic`)."""
        self.deadline = deadline
        self.sent_bytes = self.received_bytes = 0

    def sendall(self, data: ReadableBuffer) -> None:
        rest = memoryview(data)
        while rest:
            self._limit()
            size = self.sock.send(rest)
            self.sent_bytes += size
            rest = rest[size:]

    def _limit(self) -> None:
        """Have the next wait end with the deadline.  Raises TimeoutError when that is over."""
        left = seconds_left(self.deadline)
        limit = self.sock.gettimeout()
        if limit is None or not left <= limit <= left + 2 * SLACK_SECONDS:
            self.sock.settimeout(left + SLACK_SECONDS)

    def makefile(self, mode: str) -> io.BufferedReader:
        return io.BufferedReader(self)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: WriteableBuffer) -> int:
        self._limit()
        size: int = self.sock.recv_into(buffer)
        self._count(size)
        return size

    def _count(self, size: int) -> None:
        self.received_bytes += size
        if self.received_bytes > self._most_bytes:
            raise AnswerTooLarge(f"the answer exceeds {self._most_bytes} bytes; not read")

    def receive(self, most: int) -> bytes:
        """What comes next, at most *most* bytes; nothing at the end."""
        self._limit()
        piece: bytes = self.sock.recv(most)
        self._count(len(piece))
        return piece

    def close(self) -> None:
        """Leave the socket open: ``http.client`` closes whatever it has read to its end."""

    def shut_down(self) -> None:
        """Wake the thread that waits here; closing would not."""
        # SSLSocket.shutdown has to be passed by: after it, a thread about to send would send
        # without encryption.
        is_secure = isinstance(self.sock, ssl.SSLSocket)
        plain: Any = super(ssl.SSLSocket, self.sock) if is_secure else self.sock
        with suppress(OSError):
            plain.shutdown(socket.SHUT_RDWR)
