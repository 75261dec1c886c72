"""DNS servers on real sockets for tests: one that does what it is told, one that is like Consul."""

from __future__ import annotations

import contextlib
import random
import selectors
import socket
import struct
import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from types import TracebackType

import dns.flags
import dns.message
import dns.name
import dns.rcode
import dns.rdata
import dns.rdataclass
import dns.rdatatype
import dns.rrset

DOMAIN = "consul."


@dataclass(frozen=True)
class Asked:
    """A query as a server saw it."""

    wire: bytes
    is_tcp: bool
    source: tuple[str, int]

    @property
    def message(self) -> dns.message.Message:
        return dns.message.from_wire(self.wire)

    @property
    def name(self) -> str:
        return self.message.question[0].name.to_text().lower()

    @property
    def kind(self) -> str:
        return dns.rdatatype.to_text(self.message.question[0].rdtype)


Answer = Callable[[Asked], Iterable[bytes]]


class DnsServer:
    """Answers on one loopback port, UDP and TCP, with whatever messages *answer* returns.

    *serve_tcp*, if given, has each TCP connection to itself; with *tcp* or *udp* False nothing
    listens there.  A context manager that ends its threads; `asked` is every query in order.
    """

    def __init__(
        self,
        answer: Answer,
        *,
        address: str = "127.0.0.1",
        udp: bool = True,
        tcp: bool = True,
        serve_tcp: Callable[[DnsServer, socket.socket], None] | None = None,
    ) -> None:
        self.answer = answer
        self.asked: list[Asked] = []
        self.connections = 0
        self.closing = threading.Event()
        self._serve_tcp = serve_tcp or DnsServer._serve_queries
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        self._udp, self._tcp, port = _bound(family, address)
        self.address = f"[{address}]:{port}" if ":" in address else f"{address}:{port}"
        self.port = port
        self._threads: list[threading.Thread] = []
        self._streams: list[socket.socket] = []
        if udp:
            self._start(self._run_udp)
        else:
            self._udp.close()
        if tcp:
            self._tcp.listen(16)
            self._start(self._run_tcp)
        else:
            self._tcp.close()

    def _start(self, run: Callable[[], None]) -> None:
        thread = threading.Thread(target=run, daemon=True)
        thread.start()
        self._threads.append(thread)

    def __enter__(self) -> DnsServer:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        self.closing.set()
        for each in (self._udp, self._tcp, *self._streams):
            _end(each)
        for thread in self._threads:
            thread.join(5)
            assert not thread.is_alive()

    def names(self) -> list[str]:
        """What was asked for, in order."""
        return [asked.name for asked in self.asked]

    def _run_udp(self) -> None:
        while not self.closing.is_set():
            if not _readable(self._udp):
                continue
            try:
                wire, source = self._udp.recvfrom(65_535)
                if source is None:  # shut down
                    return
                asked = Asked(wire, False, source[:2])
                self.asked.append(asked)
                for reply in self.answer(asked):
                    self._udp.sendto(reply, source)
            except OSError:
                continue

    def _run_tcp(self) -> None:
        while not self.closing.is_set():
            if not _readable(self._tcp):
                continue
            try:
                stream, _ = self._tcp.accept()
            except OSError:
                continue
            self.connections += 1
            self._streams.append(stream)
            self._start(lambda stream=stream: self._run_stream(stream))

    def _run_stream(self, stream: socket.socket) -> None:
        try:
            self._serve_tcp(self, stream)
        except OSError:
            pass
        finally:
            _end(stream)

    def receive(self, stream: socket.socket) -> Asked | None:
        """The next query of a TCP connection; None at its end."""
        head = _exactly(stream, 2)
        wire = _exactly(stream, int.from_bytes(head, "big")) if head else b""
        if not wire:
            return None
        asked = Asked(wire, True, stream.getpeername()[:2])
        self.asked.append(asked)
        return asked

    def _serve_queries(self, stream: socket.socket) -> None:
        while (asked := self.receive(stream)) is not None:
            for reply in self.answer(asked):
                stream.sendall(len(reply).to_bytes(2, "big") + reply)


def _bound(family: socket.AddressFamily, address: str) -> tuple[socket.socket, socket.socket, int]:
    """A UDP and a TCP socket on one free port."""
    while True:
        tcp = socket.socket(family, socket.SOCK_STREAM)
        udp = socket.socket(family, socket.SOCK_DGRAM)
        tcp.bind((address, 0))
        try:
            udp.bind(tcp.getsockname()[:2])
        except OSError:
            tcp.close()
            udp.close()
            continue
        return udp, tcp, tcp.getsockname()[1]


def _readable(each: socket.socket) -> bool:
    with selectors.DefaultSelector() as selector:
        try:
            selector.register(each, selectors.EVENT_READ)
        except (ValueError, OSError):
            return False
        return bool(selector.select(0.05))


def _end(each: socket.socket) -> None:
    with contextlib.suppress(OSError):
        each.shutdown(socket.SHUT_RDWR)
    each.close()


def _exactly(stream: socket.socket, count: int) -> bytes:
    data = b""
    while len(data) < count:
        part = stream.recv(count - len(data))
        if not part:
            return b""
        data += part
    return data


# -- messages


def reply_to(
    asked: Asked,
    answers: Sequence[str] = (),
    additional: Sequence[str] = (),
    authority: Sequence[str] = (),
    *,
    rcode: str = "NOERROR",
    truncated: bool = False,
    owner: str | None = None,
) -> bytes:
    """A reply by dnspython.  Records are ``TYPE DATA`` for the name asked, or for *owner*, and
    ``NAME TYPE DATA`` in the other sections; the TTL is 0, or stands before the type."""
    message = dns.message.make_response(asked.message)
    message.set_rcode(dns.rcode.from_text(rcode))
    if truncated:
        message.flags |= dns.flags.TC
    name = owner or message.question[0].name.to_text()
    message.answer = [rrset(f"{name} {record}") for record in answers]
    message.additional = [rrset(record) for record in additional]
    message.authority = [rrset(record) for record in authority]
    return message.to_wire(max_size=65_535)


def rrset(text: str) -> dns.rrset.RRset:
    name, first, rest = text.split(" ", 2)
    ttl = 0
    if first.isdecimal():
        ttl = int(first)
        first, rest = rest.split(" ", 1)
    return dns.rrset.from_text(dns.name.from_text(name), ttl, "IN", first, rest)


NOTHING: tuple[bytes, ...] = ()


# -- Consul


@dataclass
class FakeInstance:
    """A service instance: *address* as in ``.addr.``, or a node's name with its address."""

    address: str
    port: int
    node: str | None = None
    tags: tuple[str, ...] = ()
    text: str = ""


@dataclass
class FakeConsul:
    """Answers as Consul does (facts A1-A6): shuffled, and cut without a word.

    `services` by name and datacenter; `additional` False leaves out what it normally adds.
    """

    services: dict[tuple[str, str], list[FakeInstance]] = field(default_factory=dict)
    udp_limit: int | None = None
    is_shuffled: bool = True
    additional: bool = True
    ttl: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        self._random = random.Random(self.seed)
        self._rendered: dict[tuple[int, str], tuple[bytes, bytes]] = {}
        for (_, dc), instances in self.services.items():
            for each in instances:
                self._answer(each, dc or "dc1")

    def __call__(self, asked: Asked) -> list[bytes]:
        question = asked.message.question[0]
        labels = question.name.to_text().lower().removesuffix("." + DOMAIN).split(".")
        if asked.kind != "SRV":
            return [self._address(asked, labels)]
        dc = ""
        if labels[-1] not in ("service", "query"):
            dc = labels.pop()
        if labels[-1] == "query":
            found = self.services.get((".".join(labels), dc), [])
        elif len(labels) == 3 and labels[0][:1] == labels[1][:1] == "_":
            tag = labels[1][1:]
            found = [
                each
                for each in self.services.get((labels[0][1:], dc), [])
                if tag == "tcp" or tag in each.tags
            ]
        else:
            found = []
        if not found:
            return [reply_to(asked, rcode="NXDOMAIN")]
        found = list(found)
        if self.is_shuffled:
            self._random.shuffle(found)
        return [self._cut(asked, found, dc or "dc1")]

    def _address(self, asked: Asked, labels: list[str]) -> bytes:
        node = ".".join(labels).partition(".node")[0]
        for instances in self.services.values():
            for each in instances:
                if each.node == node:
                    kind = "AAAA" if ":" in each.address else "A"
                    return reply_to(asked, [f"{kind} {each.address}"] * (kind == asked.kind))
        return reply_to(asked, rcode="NXDOMAIN")

    def _cut(self, asked: Asked, found: list[FakeInstance], dc: str) -> bytes:
        if asked.is_tcp:
            found, limit = found[:1_024], 65_523
        else:
            limit = max(512, asked.message.payload)
            limit = min(limit, self.udp_limit or limit)
        question = asked.wire[12 : 12 + asked.wire[12:].index(b"\0") + 5]
        answers = [self._answer(each, dc) for each in found]
        text = [_text_record(each.node or "n", each.text, dc) for each in found if each.text]
        base = 12 + len(question)
        sizes = [len(srv) + len(address) for srv, address in answers]
        total = base + sum(sizes) + sum(map(len, text))
        kept = len(answers)
        if total > limit:
            # Texts count until the first instance goes, and then all of them go (see METADATA).
            if total - limit <= 100:
                kept -= 1
            text, total = [], base + sum(sizes[:kept])
            while total > limit:
                kept -= 1
                total -= sizes[kept]
        answers = answers[:kept]
        additional = [address for _, address in answers if address] + text
        head = asked.wire[:2] + struct.pack("!BBHHHH", 0x85, 0, 1, len(answers), 0, len(additional))
        return head + question + b"".join(srv for srv, _ in answers) + b"".join(additional)

    def _answer(self, each: FakeInstance, dc: str) -> tuple[bytes, bytes]:
        if (id(each), dc) not in self._rendered:
            self._rendered[id(each), dc] = self._render(each, dc)
        return self._rendered[id(each), dc]

    def _render(self, each: FakeInstance, dc: str) -> tuple[bytes, bytes]:
        packed = _packed(each.address)
        if packed is None:
            target, record = dns.name.from_text(each.address).to_wire(), b""
        else:
            name = f"{each.node}.node" if each.node else f"{packed.hex()}.addr"
            target = dns.name.from_text(f"{name}.{dc}.{DOMAIN}").to_wire()
            kind = 1 if len(packed) == 4 else 28
            record = target + struct.pack("!HHIH", kind, 1, self.ttl, len(packed)) + packed
        assert target is not None
        data = struct.pack("!HHH", 1, 1, each.port) + target
        srv = b"\xc0\x0c" + struct.pack("!HHIH", 33, 1, self.ttl, len(data)) + data
        return srv, record if self.additional else b""


def _packed(address: str) -> bytes | None:
    for family in (socket.AF_INET, socket.AF_INET6):
        try:
            return socket.inet_pton(family, address)
        except OSError:
            pass
    return None


def _text_record(node: str, text: str, dc: str) -> bytes:
    name = dns.name.from_text(f"{node}.node.{dc}.{DOMAIN}").to_wire()
    assert name is not None
    data = bytes([len(text)]) + text.encode()
    return name + struct.pack("!HHIH", 16, 1, 0, len(data)) + data


# -- a bad network


class LossyRelay:
    """Carries UDP between clients and *server*, and loses each packet with *loss*, either way."""

    def __init__(self, server: DnsServer, loss: float, seed: int) -> None:
        self.lost = 0
        self._random = random.Random(seed)
        self._loss = loss
        self._upstream: dict[tuple[str, int], socket.socket] = {}
        self._server = ("127.0.0.1", server.port)
        self._front = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self._front.bind(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._front.getsockname()[1]}"
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def __enter__(self) -> LossyRelay:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._closing.set()
        self._thread.join(5)
        for each in (self._front, *self._upstream.values()):
            each.close()

    def _run(self) -> None:
        with selectors.DefaultSelector() as selector:
            selector.register(self._front, selectors.EVENT_READ, None)
            while not self._closing.is_set():
                for key, _ in selector.select(0.05):
                    self._carry(selector, key.data)

    def _carry(self, selector: selectors.BaseSelector, client: tuple[str, int] | None) -> None:
        if client is not None:
            wire = self._upstream[client].recv(65_535)
            if not self._is_lost():
                self._front.sendto(wire, client)
            return
        wire, client = self._front.recvfrom(65_535)
        if self._is_lost():
            return
        if client not in self._upstream:
            upstream = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
            upstream.connect(self._server)
            self._upstream[client] = upstream
            selector.register(upstream, selectors.EVENT_READ, client)
        self._upstream[client].send(wire)

    def _is_lost(self) -> bool:
        is_lost = self._random.random() < self._loss
        self.lost += is_lost
        return is_lost
