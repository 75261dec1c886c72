"""Requests that no client of ours sends, and what a server says to them."""

from __future__ import annotations

import contextlib
import gzip
import json
import random
import re
import socket
from collections.abc import Callable
from typing import Any

ANSWER_SECONDS = 15.0
"""A server gives up a request that is not whole after 10 s."""
MOST_ANSWER_BYTES = 1024 * 1024


def connected(port: int, seconds: float = ANSWER_SECONDS) -> socket.socket:
    return socket.create_connection(("127.0.0.1", port), timeout=seconds)


def told(sock: socket.socket) -> bytes:
    """All that is said over it until it is closed; empty where it is broken."""
    said = b""
    with contextlib.suppress(ConnectionError):
        while len(said) < MOST_ANSWER_BYTES and (piece := sock.recv(65536)):
            said += piece
    return said


def answer_to(port: int, data: bytes, patience: float = 5.0) -> bytes:
    """What is said to *data*; when nothing is for so many seconds we end the connection.  Raises
    TimeoutError where the other side then does not."""
    with connected(port) as sock:
        with contextlib.suppress(ConnectionError):  # it may be refused before all was sent
            sock.sendall(data)
        said = b""
        sock.settimeout(patience)
        try:
            while piece := sock.recv(65536):
                said += piece
        except ConnectionError:
            return said
        except TimeoutError:
            sock.settimeout(ANSWER_SECONDS)
            with contextlib.suppress(ConnectionError):
                sock.shutdown(socket.SHUT_WR)
            said += told(sock)
        return said


def statuses(said: bytes) -> set[int]:
    """The statuses of all answers in it."""
    return {int(found) for found in re.findall(rb"^HTTP/1\.[01] (\d{3})", said, re.MULTILINE)}


def request(
    body: bytes = b"",
    *headers: str,
    token: str | None = None,
    first: str = "POST /rpc HTTP/1.1",
    length: object = None,
) -> bytes:
    """One request, in which the length is right unless it is given; `False`: without one."""
    size = len(body) if length is None else length
    lines = [first, "Host: 127.0.0.1", *([] if size is False else [f"Content-Length: {size}"])]
    lines += [] if token is None else [f"Authorization: Bearer {token}"]
    return "\r\n".join([*lines, *headers]).encode("latin-1") + b"\r\n\r\n" + body


def content(to: str, **other: Any) -> dict[str, Any]:
    """What a call of `record` to the topic *to* says, which a server would execute."""
    message = {"method": "record", "args": {"number": -1}, "version": "1.0"}
    said = {"exchange": "openstack", "topic": to, "ctxt": {}, "message": message, "wait": True}
    return {**said, **other}


class Malformed:
    """Makes requests of which none may be executed, by *seed* always the same ones.

    Some show the *token*, so that what comes behind it is reached, too.
    """

    def __init__(self, topic: str, token: str, seed: int) -> None:
        self._topic, self._token = topic, token
        self._random = random.Random(seed)
        self.kinds: dict[str, Callable[[], bytes]] = {
            "random bytes": self._bytes,
            "a broken head": self._broken_head,
            "a wrong length": self._wrong_length,
            "a large head": self._large_head,
            "half a request": self._half,
            "no JSON": self._no_json,
            "JSON that is large or deep": self._bomb,
            "another type": self._other_type,
            "a name too much or too little": self._other_names,
            "chunks": self._chunks,
            "compressed": self._compressed,
            "another method or path": self._other_method,
            "another protocol": self._other_protocol,
            "no secret": self._no_secret,
        }

    def next(self, number: int) -> tuple[str, bytes]:
        """A request of each kind in turn; every tenth is several at once."""
        names = list(self.kinds)
        name = names[number % len(names)]
        if number % 10 == 9 and name != "half a request":  # halves may make a whole one
            return f"pipelined, {name}", b"".join(self.kinds[name]() for _ in range(5))
        return name, self.kinds[name]()

    def _said(self, **other: Any) -> bytes:
        return json.dumps(content(self._topic, **other)).encode()

    def _with(self, body: bytes, *headers: str, **words: Any) -> bytes:
        return request(body, *headers, token=self._token, **words)

    def _bytes(self) -> bytes:
        return self._random.randbytes(self._random.choice((1, 10, 100, 4000)))

    def _broken_head(self) -> bytes:
        first = self._random.choice(
            ("POST /rpc", "POST  /rpc HTTP/9.9", "post", "POST /rpc HTTP/1.1 x", "\0 /rpc HTTP/1.1")
        )
        header = self._random.choice(
            ("no colon", ": no name", "A\x00B: c", "A: b\x00c", "A B: c", "A: b\rc", " folded: x")
        )
        return self._random.choice(
            (self._with(self._said(), first=first), self._with(b"{}", header), b"\r\n" * 50)
        )

    def _wrong_length(self) -> bytes:
        body = self._said()
        wrong = ("-1", "abc", "1e3", "+5", "0x10", "", "9" * 40, "5, 6", len(body) // 2, 10**9)
        if self._random.random() < 0.2:
            return self._with(body, "Content-Length: 3")
        return self._with(body, length=self._random.choice(wrong))

    def _large_head(self) -> bytes:
        return self._random.choice(
            (
                lambda: self._with(self._said(), "A: " + "x" * 100_000),
                lambda: self._with(b"{}", *(f"A{number}: x" for number in range(5000))),
                lambda: self._with(self._said(), first=f"POST /{'x' * 100_000} HTTP/1.1"),
                lambda: request(self._said(), token="x" * 20_000),
            )
        )()

    def _half(self) -> bytes:
        whole = self._with(self._said())
        return whole[: self._random.randrange(1, len(whole) - 1)]

    def _no_json(self) -> bytes:
        return self._with(
            self._random.choice(
                (
                    b"",
                    b"{",
                    b"\xff\xfe\xfd",
                    b"null",
                    b"[]",
                    b'"text"',
                    b"1" * 20,
                    self._random.randbytes(500),
                    self._said()[:-1],
                    self._said() + b"{}",
                )
            )
        )

    def _bomb(self) -> bytes:
        body = self._random.choice(
            (
                lambda: b"[" * 100_000,
                lambda: b'{"exchange":' * 50_000,
                lambda: b"1" * 100_000,
                lambda: b'{"exchange": "' + b"\\u0000" * 30_000,
                lambda: b'{"message": ' + b"[" * 5000 + b"]" * 5000 + b"}",
                lambda: self._said(message=["x" * 100_000]),
            )
        )()
        return self._with(body)

    def _other_type(self) -> bytes:
        wrong = {
            "exchange": (None, 1, [], {}),
            "topic": (None, 1.5, ["a"], False),
            "ctxt": (None, [], "a", 1),
            "message": (None, [], "record", 7),
            "server": (1, [], {}),
            "fanout": (0, 1, "yes", None),
            "pool": (1, []),
            "wait": (0, 1, "yes", None),
            "monitor": ("1", True, [], -1, float("nan"), float("inf"), 1e300),
            "id": (1, [], {}),
        }
        name = self._random.choice(list(wrong))
        return self._with(self._said(**{name: self._random.choice(wrong[name])}))

    def _other_names(self) -> bytes:
        said = content(self._topic)
        if self._random.random() < 0.5:
            said["method"] = "record"
        else:
            del said[self._random.choice(("exchange", "topic", "ctxt", "message"))]
        return self._with(json.dumps(said).encode())

    def _chunks(self) -> bytes:
        body = self._said()
        sizes = (f"{len(body):x}", "-1", "zz", "f" * 20, f"{len(body) + 50:x}", "")
        size = self._random.choice(sizes).encode()
        also = self._random.choice(([], ["Content-Length: 10"], ["Transfer-Encoding: gzip"]))
        chunks = size + b"\r\n" + body + b"\r\n0\r\n\r\n"
        return self._with(chunks, "Transfer-Encoding: chunked", *also, length=False)

    def _compressed(self) -> bytes:
        coding = self._random.choice(("gzip", "deflate", "br"))
        body = gzip.compress(b" " * 2_000_000 + self._said())
        return self._with(body, f"Content-Encoding: {coding}")

    def _other_method(self) -> bytes:
        method = self._random.choice(
            ("GET", "PUT", "DELETE", "OPTIONS", "BREW", "CONNECT", "TRACE")
        )
        path = self._random.choice(("/rpc", "/", "/../rpc", "*", "//rpc/", "http://a/b", "/rpc/x"))
        return self._with(self._said(), first=f"{method} {path} HTTP/1.1")

    def _other_protocol(self) -> bytes:
        return self._random.choice(
            (
                b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
                b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + self._random.randbytes(500),
                b"AMQP\x00\x00\x09\x01",
                request(
                    b"", "Upgrade: websocket", "Connection: Upgrade", first="GET /rpc HTTP/1.1"
                ),
                request(self._said(), "Upgrade: h2c", "Connection: Upgrade"),
                b"SSH-2.0-OpenSSH_9.2\r\n",
            )
        )

    def _no_secret(self) -> bytes:
        wrong = self._random.choice(("", "x", self._token[:-1], self._token + "x", "\xe4\xff"))
        return self._random.choice(
            (
                request(self._said()),
                request(self._said(), token=wrong),
                request(self._said(), f"Authorization: Basic {self._token}"),
                request(self._said(), f"Authorization: {self._token}"),
                request(self._said(), f"Cookie: token={self._token}"),
                request(self._said(), "Authorization: Bearer x", token="y"),
            )
        )
