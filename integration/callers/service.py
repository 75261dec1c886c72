"""A service of a test: HTTP servers in this process, and a matchmaker that finds them."""

from __future__ import annotations

import http.server
import socket
import ssl
import subprocess
import threading
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from consul_matchmaker import Matchmaker, Settings
from consul_matchmaker.backends.memory import Memory
from consul_matchmaker.errors import Unavailable
from consul_matchmaker.model import Host, Snapshot
from integration.callers.http_server import HttpServer
from integration.callers.noted import NotingMatchmaker
from integration.waiting import until

TOPIC = "web"
URL = "http://web.service.consul"
QUICK = Settings(mode="kv", ttl_seconds=0.1, confirm_empty_seconds=0)
FAILURES = ["stops", "drops", "hangs", "502", "503", "504"]
"""How a server can fail; see `break_`."""
SECONDS = 30.0
"""The timeout of requests that are to succeed."""
HANGS_SECONDS = 2.0
"""After it a client gives up a host that hangs.  One that does not, on a machine that stops for a
while, answers before."""


class Service:
    """*count* servers of the topic `TOPIC`; a context manager that ends them."""

    def __init__(self, count: int = 2, *, tls: ssl.SSLContext | None = None) -> None:
        self.servers = [HttpServer(tls=tls) for _ in range(count)]
        self.memory = Memory()
        self.memory.declare(TOPIC, self.hosts)
        self.matchmaker = NotingMatchmaker(QUICK, backend=self.memory)

    @property
    def hosts(self) -> list[Host]:
        return [server.host for server in self.servers]

    @property
    def asked(self) -> list[int]:
        """How many requests each server got."""
        return [len(server.requests) for server in self.servers]

    @property
    def next(self) -> HttpServer:
        """The server that is picked next, by round robin."""
        found = self.matchmaker.pick(TOPIC)
        for _ in range(len(self.servers) - 1):
            self.matchmaker.pick(TOPIC)
        return next(server for server in self.servers if server.host == found)

    def leave(self, server: HttpServer) -> None:
        """Have *server* leave the topic, while it serves on; returns once that is known."""
        rest = [host for host in self.hosts if host != server.host]
        self.memory.declare(TOPIC, rest)
        until(lambda: server.host not in self.matchmaker.hosts(TOPIC), 30, "left")

    def __enter__(self) -> Service:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.matchmaker.close()
        for server in self.servers:
            server.stop()


def break_(server: HttpServer, failure: str) -> None:
    """Have the next requests to *server* fail so: ``stops``, ``drops``, ``hangs`` or a status."""
    if failure == "stops":
        server.stop()
    elif failure == "drops":
        server.drops = 100
    elif failure == "hangs":
        server.seconds = 60.0
    else:
        server.status = int(failure)


def certified(folder: Path, *names: str) -> tuple[str, ssl.SSLContext]:
    """A new authority, which is the certificate of a server with these *names* itself."""
    key, certificate = folder / "key.pem", folder / "certificate.pem"
    alternatives = ",".join(f"DNS:{name}" for name in names)
    subprocess.run(
        [
            *("openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt"),
            *("ec_paramgen_curve:prime256v1", "-nodes", "-days", "2", "-subj", "/CN=test"),
            *("-addext", f"subjectAltName={alternatives}"),
            *("-keyout", str(key), "-out", str(certificate)),
        ],
        capture_output=True,
        check=True,
    )
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    return str(certificate), context


def deaf_host(stack: ExitStack) -> str:
    """Where somebody listens who accepts nobody."""
    deaf = stack.enter_context(socket.create_server(("127.0.0.1", 0), backlog=0))
    port = deaf.getsockname()[1]
    first, other = (stack.enter_context(socket.socket()) for _ in range(2))
    first.connect(("127.0.0.1", port))
    other.setblocking(False)
    other.connect_ex(("127.0.0.1", port))  # now its queue is full
    return f"127.0.0.1:{port}"


class Proxy:
    """An HTTP proxy that answers by itself; a context manager that ends it."""

    def __init__(self) -> None:
        self.targets: list[str] = []
        """Of the requests that it got: for a proxy, whole URLs."""
        targets = self.targets

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                targets.append(self.path)
                self.send_response(200)
                self.send_header("Content-Length", "0")
                self.end_headers()

            def log_message(self, format: str, *args: object) -> None:
                """Nothing."""

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.host = Host("127.0.0.1", self._server.server_port)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,))
        self._thread.start()

    def stop(self) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def __enter__(self) -> Proxy:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.stop()


def left_alone(service: Service) -> Matchmaker:
    """One whose Consul answers once, with the servers of *service*, and then is away."""

    class Leaving(Memory):
        asked = 0

        def lookup(self, *args: Any, **words: Any) -> Snapshot:
            self.asked += 1
            if self.asked > 1:
                raise Unavailable("gone")
            return service.memory.lookup(*args, **words)

    settings = Settings(mode="kv", ttl_seconds=0, max_stale_seconds=0)
    return Matchmaker(settings, backend=Leaving())
