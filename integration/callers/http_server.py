"""A small HTTP server that says what it was sent, in a thread of the test or in a process.

``python -m integration.callers.http_server TOPIC CONSUL_URL [HOST:PORT]`` registers itself too, and
prints the host where it listens, once registered.

GET and the other methods answer with JSON: host (of the server), method, path, headers, body.
``?status=503`` answers with that status, ``?seconds=0.1`` waits before, ``?size=N`` has a body of
N bytes instead, ``?to=URL`` redirects there, ``?cookie=a`` sets that cookie.
"""

from __future__ import annotations

import json
import random
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qsl, urlsplit

from consul_matchmaker import Matchmaker
from consul_matchmaker.model import Host


class HttpServer:
    """Listens on *host* from its making; a context manager that ends it, and its connections."""

    def __init__(self, host: str = "127.0.0.1:0") -> None:
        address, _, port = host.rpartition(":")
        self.fails = 0.0
        """Which part of its requests it answers with 503."""
        self.seconds = 0.0
        """How long each request takes."""
        self.requests: list[dict[str, Any]] = []
        self.connections = 0
        """How many it has accepted."""
        server = self

        class Handler(_Handler):
            owner = server

        self._server = ThreadingHTTPServer((address, int(port)), Handler)
        self._server.daemon_threads = True
        self.open: set[Any] = set()
        self.host = Host(str(self._server.server_address[0]), self._server.server_port)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,))
        self._thread.start()

    def stop(self) -> None:
        """Stop listening and break every connection."""
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()
        for connection in list(self.open):
            connection.close()

    def __enter__(self) -> HttpServer:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.stop()


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
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        said = {
            "host": str(self.owner.host),
            "method": self.command,
            "path": url.path,
            "headers": {name.lower(): value for name, value in self.headers.items()},
            "body": body.decode(),
        }
        self.owner.requests.append(said)
        seconds = self.owner.seconds + float(asked.get("seconds", 0))
        if seconds:
            threading.Event().wait(seconds)
        status = int(asked.get("status", 200))
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
        if self.command != "HEAD":
            self.wfile.write(content)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = do_PATCH = do_OPTIONS = _answer

    def log_message(self, format: str, *args: object) -> None:
        """Nothing: tests print what they need."""


def main(topic: str, url: str, host: str = "127.0.0.1:0") -> None:
    with HttpServer(host) as server, Matchmaker.from_url(url) as matchmaker:
        registration = matchmaker.register(topic, server.host)
        registration.wait_until_published(timeout_seconds=10)
        print(server.host, flush=True)
        sys.stdin.read()


if __name__ == "__main__":
    main(*sys.argv[1:])
