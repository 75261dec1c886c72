"""A small HTTP server that says what it was sent, in a thread of the test or in a process.

``python -m integration.callers.http_server TOPIC CONSUL_URL [HOST:PORT]`` registers itself too, and
prints the host where it listens, once registered.

GET and the other methods answer with JSON: host (of the server), method, path, query, headers,
body.  ``?status=503`` answers with that status, ``?seconds=0.1`` waits before, ``?size=N`` has a
body of N bytes instead, ``?to=URL`` redirects there, ``?cookie=a`` sets that cookie.

`HttpServer` is the test's handle on one in this process, `ServerProcess` on one that can be killed.
"""

from __future__ import annotations

import json
import random
import socket
import ssl
import subprocess
import sys
import threading
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qsl, urlsplit

from consul_matchmaker import Matchmaker
from consul_matchmaker.model import Host


class HttpServer:
    """Listens on *host* from its making; a context manager that ends it, and its connections.

    With *tls* it speaks TLS only.
    """

    def __init__(self, host: str = "127.0.0.1:0", *, tls: ssl.SSLContext | None = None) -> None:
        address, _, port = host.rpartition(":")
        self.status = 200
        """With what it answers where the request does not say."""
        self.drops = 0
        """So many requests it reads, and closes the connection without an answer."""
        self.cuts = 0
        """So many answers it begins, and closes the connection in the middle of the body."""
        self.fails = 0.0
        """Which part of its requests it answers with 503."""
        self.seconds = 0.0
        """How long each request takes, at most until the server ends."""
        self.is_over = threading.Event()
        self.requests: list[dict[str, Any]] = []
        self.connections = 0
        """How many it has accepted."""
        server = self

        class Handler(_Handler):
            owner = server

        self._server = _Server((address, int(port)), Handler)
        if tls is not None:
            self._server.socket = tls.wrap_socket(
                self._server.socket, server_side=True, do_handshake_on_connect=False
            )
        self.open: set[Any] = set()
        self.host = Host(str(self._server.server_address[0]), self._server.server_port)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,))
        self._thread.start()

    def stop(self) -> None:
        """Stop listening and break every connection; idempotent."""
        self.is_over.set()
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()
        self.hang_up()

    def hang_up(self) -> None:
        """Break every connection."""
        for connection in list(self.open):
            with suppress(OSError):  # it was closed meanwhile
                connection.shutdown(socket.SHUT_RDWR)

    def __enter__(self) -> HttpServer:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.stop()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    request_queue_size = 128

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Nothing: clients that go away, and handshakes that fail, are part of the tests."""


class _Handler(BaseHTTPRequestHandler):
    owner: HttpServer
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    wbufsize = -1  # one segment an answer

    def setup(self) -> None:
        super().setup()
        self.owner.connections += 1
        self.owner.open.add(self.connection)

    def finish(self) -> None:
        self.owner.open.discard(self.connection)
        super().finish()

    def _answer(self) -> None:
        url = urlsplit(self.path)
        asked = dict(parse_qsl(url.query))
        body = self._body()
        said = {
            "host": str(self.owner.host),
            "method": self.command,
            "path": url.path,
            "query": url.query,
            "headers": {name.lower(): value for name, value in self.headers.items()},
            "body": body.decode(),
        }
        self.owner.requests.append(said)
        seconds = self.owner.seconds + float(asked.get("seconds", 0))
        if seconds:
            self.owner.is_over.wait(seconds)
        if self.owner.drops > 0:
            self.owner.drops -= 1
            self.close_connection = True
            return
        status = int(asked.get("status", self.owner.status))
        if random.random() < self.owner.fails:
            status = 503
        content = json.dumps(said).encode()
        if "size" in asked:
            content = b"x" * int(asked["size"])
        self.send_response(307 if "to" in asked else status)
        if "to" in asked:
            self.send_header("Location", asked["to"])
        if "cookie" in asked:
            self.send_header("Set-Cookie", f"{asked['cookie']}=1; Path=/")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.owner.cuts > 0:
            self.owner.cuts -= 1
            self.close_connection = True
            content = content[: len(content) // 2]
        if self.command != "HEAD":
            self.wfile.write(content)

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = do_PATCH = do_OPTIONS = _answer

    def log_message(self, format: str, *args: object) -> None:
        """Nothing: tests print what they need."""


class ServerProcess:
    """One in a process of its own, registered as *topic*; a context manager that kills it."""

    def __init__(self, topic: str, url: str) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "integration.callers.http_server", topic, url],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def wait_until_registered(self) -> Host:
        """Returns where it listens.  Raises AssertionError where it ended instead."""
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        assert line, f"the server ended with {self._process.wait()}"
        return Host.parse(line.strip())

    def kill(self) -> None:
        """SIGKILL; returns when it is gone."""
        self._process.kill()
        self._process.wait()

    def __enter__(self) -> ServerProcess:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.kill()
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            pipe.close()


def main(topic: str, url: str, host: str = "127.0.0.1:0") -> None:
    with HttpServer(host) as server, Matchmaker.from_url(url) as matchmaker:
        registration = matchmaker.register(topic, server.host)
        registration.wait_until_published(timeout_seconds=10)
        print(server.host, flush=True)
        sys.stdin.read()


if __name__ == "__main__":
    main(*sys.argv[1:])
