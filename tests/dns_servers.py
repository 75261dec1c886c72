"""DNS servers on real sockets for tests: one that does what it is told, one that is like Consul."""

from __future__ import annotations

import contextlib
import errno
import ipaddress
import itertools
import random
import socket
import struct
import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

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
        self._udp, self._tcp, self.port = _bound(address)
        self.address = f"[{address}]:{self.port}" if ":" in address else f"{address}:{self.port}"
        self._threads: list[threading.Thread] = []
        self._streams: list[socket.socket] = []
        if udp:
            self._start(self._repeat, self._answer_udp)
        else:
            self._udp.close()
        if tcp:
            self._tcp.listen(16)
            self._start(self._repeat, self._accept)
        else:
            self._tcp.close()

    def _start(self, run: Callable[..., None], *args: object) -> None:
        self._threads.append(threading.Thread(target=run, args=args, daemon=True))
        self._threads[-1].start()

    def __enter__(self) -> DnsServer:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def close(self) -> None:
        self.closing.set()
        for stream in self._streams:
            with contextlib.suppress(OSError):
                stream.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join(5)
            assert not thread.is_alive()
        for each in (self._udp, self._tcp, *self._streams):
            each.close()

    def names(self) -> list[str]:
        """What was asked for, in order."""
        return [asked.name for asked in self.asked]

    def _repeat(self, serve_one: Callable[[], None]) -> None:
        while not self.closing.is_set():
            with contextlib.suppress(OSError):  # nothing came for a while, or who asked has gone
                serve_one()

    def _answer_udp(self) -> None:
        wire, source = self._udp.recvfrom(65_535)
        self.asked.append(Asked(wire, False, source[:2]))
        for reply in self.answer(self.asked[-1]):
            self._udp.sendto(reply, source)

    def _accept(self) -> None:
        stream, _ = self._tcp.accept()
        self.connections += 1
        self._streams.append(stream)
        self._start(self._run_stream, stream)

    def _run_stream(self, stream: socket.socket) -> None:
        with contextlib.suppress(OSError), stream:
            self._serve_tcp(self, stream)

    def receive(self, stream: socket.socket) -> Asked | None:
        """The next query of a TCP connection; None at its end."""
        head = stream.recv(2, socket.MSG_WAITALL)
        wire = stream.recv(int.from_bytes(head, "big"), socket.MSG_WAITALL) if head else b""
        if not wire:
            return None
        asked = Asked(wire, True, stream.getpeername()[:2])
        self.asked.append(asked)
        return asked

    def reply(self, stream: socket.socket, asked: Asked) -> None:
        for reply in self.answer(asked):
            stream.sendall(len(reply).to_bytes(2, "big") + reply)

    def _serve_queries(self, stream: socket.socket) -> None:
        while (asked := self.receive(stream)) is not None:
            self.reply(stream, asked)


def _bound(address: str) -> tuple[socket.socket, socket.socket, int]:
    """A UDP and a TCP socket on one free port, of which nobody waits long."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    while True:
        udp, tcp = (socket.socket(family, kind) for kind in (socket.SOCK_DGRAM, socket.SOCK_STREAM))
        for each in (udp, tcp):
            each.settimeout(0.05)
        try:
            tcp.bind((address, 0))
            udp.bind(tcp.getsockname()[:2])
        except OSError as error:
            tcp.close()
            udp.close()
            if error.errno != errno.EADDRINUSE:
                raise
            continue
        return udp, tcp, tcp.getsockname()[1]


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


ASKED = b"\xc0\x0c"  # a pointer to the name in the question


def header(asked: Asked, answers: int, additional: int = 0) -> bytes:
    """A reply's header and question."""
    question = asked.wire[12 : 12 + asked.wire[12:].index(b"\0") + 5]
    return asked.wire[:2] + struct.pack("!BBHHHH", 0x84, 0, 1, answers, 0, additional) + question


def record(name: bytes, kind: int, data: bytes, ttl: int = 0) -> bytes:
    return name + struct.pack("!HHIH", kind, 1, ttl, len(data)) + data


def name_bytes(name: str) -> bytes:
    wire = dns.name.from_text(name).to_wire()
    assert wire is not None
    return wire


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
    is_shuffled: bool = True
    additional: bool = True
    ttl: int = 0

    def __post_init__(self) -> None:
        self._random = random.Random(0)
        self._rendered: dict[tuple[int, str], tuple[bytes, bytes, bytes]] = {}

    def __call__(self, asked: Asked) -> list[bytes]:
        """``_<service>._<tag or tcp>.service[.<datacenter>]`` and ``<node>.node.<datacenter>``."""
        labels = asked.name.removesuffix("." + DOMAIN).split(".")
        if asked.kind != "SRV":
            return [self._address(asked, ".".join(labels).partition(".node")[0])]
        dc = "" if labels[-1] == "service" else labels.pop()
        service, tag = labels[0][1:], labels[1][1:]
        found = [
            each
            for each in self.services.get((service, dc), [])
            if tag == "tcp" or tag in each.tags
        ]
        if not found:
            return [reply_to(asked, rcode="NXDOMAIN")]
        if self.is_shuffled:
            self._random.shuffle(found)
        return [self._cut(asked, [self._answer(each, dc or "dc1") for each in found])]

    def _address(self, asked: Asked, node: str) -> bytes:
        for each in itertools.chain.from_iterable(self.services.values()):
            if each.node == node:
                kind = "AAAA" if ":" in each.address else "A"
                return reply_to(asked, [f"{kind} {each.address}"] * (kind == asked.kind))
        return reply_to(asked, rcode="NXDOMAIN")

    def _cut(self, asked: Asked, found: list[tuple[bytes, bytes, bytes]]) -> bytes:
        if asked.is_tcp:
            found, limit = found[:1_024], 65_523
        else:
            limit = max(512, asked.message.payload)
        base = len(header(asked, 0))
        texts = [text for _, _, text in found]
        sizes = [len(srv) + len(address) for srv, address, _ in found]
        over = base + sum(sizes) + sum(map(len, texts)) - limit
        kept = len(found)
        if over > 0:
            # Texts count until the first instance goes, and then all of them go (see METADATA).
            texts = []
            kept -= over <= 100
            while base + sum(sizes[:kept]) > limit:
                kept -= 1
        additional = [address for _, address, _ in found[:kept] if address] + list(
            filter(None, texts)
        )
        answers = [srv for srv, _, _ in found[:kept]]
        return header(asked, kept, len(additional)) + b"".join(answers + additional)

    def _answer(self, each: FakeInstance, dc: str) -> tuple[bytes, bytes, bytes]:
        """Its SRV record, its address record and its node's TXT record, the last two perhaps
        empty."""
        if (id(each), dc) not in self._rendered:
            self._rendered[id(each), dc] = self._render(each, dc)
        return self._rendered[id(each), dc]

    def _render(self, each: FakeInstance, dc: str) -> tuple[bytes, bytes, bytes]:
        address = text = b""
        try:
            packed = ipaddress.ip_address(each.address).packed
        except ValueError:  # a host name
            target = name_bytes(each.address)
        else:
            name = f"{each.node}.node" if each.node else f"{packed.hex()}.addr"
            target = name_bytes(f"{name}.{dc}.{DOMAIN}")
            if self.additional:
                address = record(target, 1 if len(packed) == 4 else 28, packed, self.ttl)
        if each.text:
            data = bytes([len(each.text)]) + each.text.encode()
            text = record(name_bytes(f"{each.node or 'n'}.node.{dc}.{DOMAIN}"), 16, data)
        return (
            record(ASKED, 33, struct.pack("!HHH", 1, 1, each.port) + target, self.ttl),
            address,
            text,
        )
