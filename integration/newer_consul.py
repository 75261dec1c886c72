"""What newer Consul does differently, in front of a real agent: a strict HTTP proxy, a DNS relay.

Each difference is one that was found in Consul's source, changelogs or documents (facts, G); all
else is what the agent behind says.
"""

from __future__ import annotations

import http.client
import re
import socket
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

import dns.exception
import dns.flags
import dns.message
import dns.name
import dns.query
import dns.rdata
import dns.rdatatype
import dns.rrset

CUT_SECONDS = 30.0
"""1.22.x of January 2026 ended every answer then (GH-22739)."""
IDLE_SECONDS = 120.0
MOST_BODY_BYTES = 512 * 1024
"""2.1.0 Enterprise answers 413 above."""
KEY_ALPHABET = re.compile(r"[a-zA-Z0-9,_./\-?&=~\s]*\Z")
"""Of 1.21.5: other keys are refused (GH-22822)."""
CACHE_SECONDS = 30
"""Kubernetes' CoreDNS in Consul's own documents: ``cache 30``."""


class StrictProxy:
    """The HTTP port of an agent as a newer one has it; a context manager.

    `refuse` says with which status a request is answered instead, None: not at all.
    """

    def __init__(self, agent: str, *, idle_seconds: float = IDLE_SECONDS) -> None:
        self._agent = agent
        self.refuse: Callable[[str, str], int | None] = lambda method, path: None
        self.rewrite: Callable[[str], str] = lambda path: path
        """What is asked of the agent instead."""
        self.cut_seconds = CUT_SECONDS
        self.requests: list[str] = []
        self.longest_seconds = 0.0
        proxy = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            timeout = idle_seconds

            def log_message(self, *args: object) -> None:
                """Nothing."""

            def _serve(self) -> None:
                proxy._serve(self)

            do_GET = do_PUT = do_DELETE = _serve

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.address = f"127.0.0.1:{self._server.server_address[1]}"
        self._thread = threading.Thread(target=self._server.serve_forever)

    def _serve(self, handler: BaseHTTPRequestHandler) -> None:
        length = int(handler.headers.get("Content-Length") or 0)
        body = handler.rfile.read(length)
        path = handler.path
        self.requests.append(f"{handler.command} {path}")
        status = self.refuse(handler.command, path) or self._forbidden(handler.command, path, body)
        if status is not None:
            self._answer(handler, status, b"refused by the proxy", {})
            return
        began = time.monotonic()
        connection = http.client.HTTPConnection(self._agent, timeout=self.cut_seconds)
        try:
            token = handler.headers.get("X-Consul-Token")
            headers = {"X-Consul-Token": token} if token else {}
            connection.request(handler.command, self.rewrite(path), body, headers)
            found = connection.getresponse()
            content = found.read()
        except OSError:  # as a server whose time to write is over
            handler.close_connection = True
            return
        finally:
            connection.close()
            self.longest_seconds = max(self.longest_seconds, time.monotonic() - began)
        kept = {name: value for name, value in found.getheaders() if name.startswith("X-Consul")}
        self._answer(handler, found.status, content, kept)

    @staticmethod
    def _answer(
        handler: BaseHTTPRequestHandler, status: int, content: bytes, headers: dict[str, str]
    ) -> None:
        try:
            handler.send_response(status)
            for name, value in headers.items():
                handler.send_header(name, value)
            handler.send_header("Content-Length", str(len(content)))
            handler.end_headers()
            handler.wfile.write(content)
        except OSError:
            handler.close_connection = True

    @staticmethod
    def _forbidden(method: str, path: str, body: bytes) -> int | None:
        if len(body) > MOST_BODY_BYTES:
            return 413
        parts = urlsplit(path)
        if parts.path.startswith("/v1/kv/") and method == "PUT":
            key = unquote(parts.path.removeprefix("/v1/kv/"))
            if not KEY_ALPHABET.match(key) or ".." in key:
                return 400
        if float(parse_qs(parts.query).get("wait", ["0s"])[0].rstrip("ms") or 0) > 600_000:
            return 400
        return None

    def __enter__(self) -> StrictProxy:
        self._thread.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


Change = Callable[[dns.message.Message], dns.message.Message]
"""What becomes of an agent's reply on its way."""


class DnsRelay:
    """The DNS port of an agent, UDP and TCP, whose replies are changed on their way; a context
    manager."""

    def __init__(self, agent: str, change: Change | None = None) -> None:
        address, _, port = agent.rpartition(":")
        self._agent = address, int(port)
        self._change = change or (lambda reply: reply)
        self.asked = 0
        self._udp, self._tcp = _sockets()
        self.address = f"127.0.0.1:{self._udp.getsockname()[1]}"
        self._is_over = threading.Event()
        self._threads = [
            threading.Thread(target=self._serve_udp),
            threading.Thread(target=self._serve_tcp),
        ]

    def _serve_udp(self) -> None:
        while not self._is_over.is_set():
            try:
                wire, peer = self._udp.recvfrom(65535)
            except TimeoutError:
                continue
            try:
                reply = self.reply(dns.message.from_wire(wire), is_tcp=False)
            except (OSError, dns.exception.DNSException):
                continue
            self._udp.sendto(reply.to_wire(max_size=65535), peer)

    def _serve_tcp(self) -> None:
        while not self._is_over.is_set():
            try:
                connection, _ = self._tcp.accept()
            except TimeoutError:
                continue
            threading.Thread(target=self._serve_connection, args=(connection,), daemon=True).start()

    def _serve_connection(self, connection: socket.socket) -> None:
        with connection:
            connection.settimeout(5)
            try:
                while True:
                    query, _ = dns.query.receive_tcp(connection)
                    dns.query.send_tcp(connection, self.reply(query, is_tcp=True))
            except (OSError, EOFError, dns.exception.DNSException):
                return

    def reply(self, query: dns.message.Message, *, is_tcp: bool) -> dns.message.Message:
        """What the agent says, changed."""
        self.asked += 1
        ask = dns.query.tcp if is_tcp else dns.query.udp
        address, port = self._agent
        return self._change(ask(query, address, timeout=5, port=port))

    def __enter__(self) -> DnsRelay:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._is_over.set()
        for thread in self._threads:
            thread.join()
        self._udp.close()
        self._tcp.close()


class CachingResolver(DnsRelay):
    """As CoreDNS with ``cache 30``: answers and denials are kept, their TTL counting down, and are
    the same until then; RA is set, and AA is not."""

    def __init__(self, agent: str, seconds: int = CACHE_SECONDS) -> None:
        super().__init__(agent)
        self._seconds = seconds
        self._kept: dict[tuple[str, int], tuple[float, dns.message.Message]] = {}
        self._lock = threading.Lock()

    def reply(self, query: dns.message.Message, *, is_tcp: bool) -> dns.message.Message:
        question = query.question[0]
        name = question.name.to_text().lower(), question.rdtype
        with self._lock:
            kept = self._kept.get(name)
            now = time.monotonic()
            if kept is None or now >= kept[0] + self._seconds:
                answer = super().reply(query, is_tcp=True)
                answer.flags |= dns.flags.RA
                answer.flags &= ~dns.flags.AA
                kept = self._kept[name] = now, answer
            asked_at, answer = kept
            copy = dns.message.from_wire(answer.to_wire(max_size=65535))
        copy.id = query.id
        left = self._seconds - int(now - asked_at)
        for section in (copy.answer, copy.authority, copy.additional):
            for rrset in section:
                rrset.ttl = left
        return copy


def without_datacenter(reply: dns.message.Message) -> dns.message.Message:
    """Targets as peers have them: ``0a000001.addr.consul.`` (1.14.2)."""
    return _renamed(reply, lambda name: re.sub(r"\.addr\.[^.]+\.", ".addr.", name))


def in_domain(domain: str) -> Change:
    """Targets come back in the alternative domain that was asked for (1.11, GH-11348)."""
    return lambda reply: _renamed(
        reply, lambda name: re.sub(r"\.(addr|node)\.([^.]+)\.consul\.$", rf".\1.\2.{domain}.", name)
    )


def with_port_0(reply: dns.message.Message) -> dns.message.Message:
    """Beside the others an instance that has named ports only (1.22, GH-23815)."""
    for rrset in reply.answer:
        if rrset.rdtype == dns.rdatatype.SRV and len(rrset):
            rrset.add(dns.rdata.from_text("IN", "SRV", "1 1 0 7f000009.addr.dc1.consul."))
    return reply


def _renamed(reply: dns.message.Message, rename: Callable[[str], str]) -> dns.message.Message:
    for section in (reply.answer, reply.additional):
        for number, rrset in enumerate(section):
            texts = [rename(each.to_text()) for each in rrset]
            name = rename(rrset.name.to_text()) if section is reply.additional else rrset.name
            kind = dns.rdatatype.to_text(rrset.rdtype)
            section[number] = dns.rrset.from_text(name, rrset.ttl, "IN", kind, *texts)
    return reply


def _sockets() -> tuple[socket.socket, socket.socket]:
    """Of one port, for UDP and TCP."""
    while True:
        tcp = socket.create_server(("127.0.0.1", 0))
        udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        try:
            udp.bind(tcp.getsockname())
        except OSError:
            tcp.close()
            udp.close()
            continue
        tcp.settimeout(0.2)
        udp.settimeout(0.2)
        return udp, tcp
