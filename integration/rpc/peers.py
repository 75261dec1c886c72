"""Peers that are no servers of ours: they take connections, and do with requests what they like."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
from collections.abc import Callable
from types import TracebackType

SMALL_BUFFER_BYTES = 4096
"""So much waits unread in a peer's socket: of a large request the rest is still with the client."""


def answer(status: int, body: bytes = b"", *headers: str) -> bytes:
    """A whole HTTP answer, after which the connection is kept."""
    lines = [f"HTTP/1.1 {status} Said", f"Content-Length: {len(body)}", *headers]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


Behave = Callable[[socket.socket, bytes], bytes | None]
"""What a peer does when it has read a request: the bytes to send, or None to close."""


class Peer:
    """Reads requests, and behaves as told; a context manager.

    `ids` has those of the messages that it has read as a whole, `connections` how many came.  With
    *reads_bytes* it reads so many of a connection, and closes it.
    """

    def __init__(self, behave: Behave, *, reads_bytes: int | None = None) -> None:
        self._behave, self._reads_bytes = behave, reads_bytes
        self.ids: list[str | None] = []
        self.bodies: list[bytes] = []
        self.connections = 0
        self._open: set[socket.socket] = set()
        self._listener = socket.socket()
        if reads_bytes is not None:
            self._listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, SMALL_BUFFER_BYTES)
        self._listener.bind(("127.0.0.1", 0))
        self._listener.listen(64)
        self.port: int = self._listener.getsockname()[1]
        self._thread = threading.Thread(target=self._accept, daemon=True)
        self._thread.start()

    def __enter__(self) -> Peer:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        with contextlib.suppress(OSError):  # closing alone would leave accept() waiting
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._thread.join()
        self.close_connections()

    def close_connections(self) -> None:
        for sock in list(self._open):
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)

    @property
    def open_connections(self) -> int:
        return len(self._open)

    def _accept(self) -> None:
        while True:
            try:
                sock, _ = self._listener.accept()
            except OSError:
                return
            self.connections += 1
            self._open.add(sock)
            threading.Thread(target=self._serve, args=(sock,), daemon=True).start()

    def _serve(self, sock: socket.socket) -> None:
        with contextlib.suppress(OSError), sock:
            if self._reads_bytes is not None:
                sock.recv(self._reads_bytes)
            else:
                while self._serve_one(sock):
                    pass
        self._open.discard(sock)

    def _serve_one(self, sock: socket.socket) -> bool:
        body = _request_from(sock)
        if body is None:
            return False
        self.bodies.append(body)
        with contextlib.suppress(ValueError):
            self.ids.append(json.loads(body).get("id"))
        said = self._behave(sock, body)
        if said is None:
            return False
        sock.sendall(said)
        return True


def _request_from(sock: socket.socket) -> bytes | None:
    """The body of the next request; None at the end of the connection."""
    read = b""
    while b"\r\n\r\n" not in read:
        piece = sock.recv(65536)
        if not piece:
            return None
        read += piece
    head, _, body = read.partition(b"\r\n\r\n")
    lines = head.decode("latin-1").lower().split("\r\n")
    (size,) = (int(line[15:]) for line in lines if line.startswith("content-length:"))
    while len(body) < size:
        piece = sock.recv(65536)
        if not piece:
            return None
        body += piece
    return body
