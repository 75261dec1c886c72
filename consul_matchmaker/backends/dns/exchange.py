"""Carry DNS queries to one agent and its replies back: UDP, and TCP connections that are kept.

Nothing here knows what is asked.  Every call ends at its *until*, an instant of `time.monotonic`
(what a socket waits for is real time), and raises OSError (TimeoutError) or BadReply; Unavailable
once its channel was closed.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from ...errors import Unavailable
from ...fork import close_after_fork
from ...model import Host
from .. import seconds_left
from ..host_names import HostNames
from ..traffic import Traffic
from .wire import NOERROR, NXDOMAIN, SERVFAIL, BadReply, ErrorReply, NotOurs, Reply, read

UDP_SHARE = 0.2
RESENDS_PER_TIMEOUT = 10
"""A query goes out by UDP twice, a tenth of the timeout apart, and after a fifth of it by TCP,
which repairs losses by itself.  More would make Consul answer a topic of thousands, which takes it
0.3 s, several times at once.  Where there is no TCP, UDP goes on every tenth: when a fifth of all
packets is lost, 0.36 of all exchanges fail, and ten of them in a row once in 27,000."""
SERVFAIL_TRIES = 3
"""While Consul elects a leader single queries fail, and the next one works (fact A9)."""
IDLE_SECONDS = 6.0
"""A kept connection rests no longer than this: Consul ends it after 8 s (fact A10), and a firewall
forgets it a minute later, and then says nothing at all."""
KEPT_CONNECTIONS = 2
"""To one agent; more lookups at a time open connections of their own and close them."""
TCP_FIRST_SECONDS = 60.0
"""How long an agent that answered TCP and not UDP (a firewall) is not asked by UDP first."""
CONNECT_SHARE = 0.35
"""Of the time there is, this much may go by until a TCP connection stands."""
LENGTH_BYTES = 2
"""Before each message on a TCP connection (RFC 1035, section 4.2.2)."""


_SocketAddress = tuple[socket.AddressFamily, tuple[object, ...]]


class Channel:
    """One agent's DNS, over both transports, counted in *udp* and *tcp*; *names* resolves its
    address where that is a host name.  Each try has *timeout_seconds* at most.  Thread-safe, and
    without a lock, so that a signal handler may close it; opens nothing when made."""

    def __init__(
        self, agent: Host, names: HostNames, timeout_seconds: float, udp: Traffic, tcp: Traffic
    ) -> None:
        self.agent = agent
        self.udp, self.tcp = udp, tcp
        self._names = names
        self._timeout_seconds = timeout_seconds
        self._socket_address: _SocketAddress | None = None
        self._failed_addresses = 0
        self._tcp_first_until = 0.0
        self._open: set[socket.socket] = set()
        self._kept: list[Stream] = []
        self._is_closed = False

    def close(self) -> None:
        """Close every connection, and have every call raise Unavailable: one under way at once."""
        self._is_closed = True
        for sock in tuple(self._open):
            with suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)  # wakes who waits there; closing would not
        while (stream := self._take()) is not None:
            stream.close()

    def raise_if_closed(self) -> None:
        """Raise Unavailable after `close`."""
        if self._is_closed:
            raise Unavailable("this way to Consul was closed meanwhile: make a new matchmaker")

    def ask(self, query: bytes, until: float, *, tcp_first: bool = False) -> tuple[Reply, bool]:
        """What the agent says to *query*, and whether it said it by TCP: a denial is an answer too,
        an error is an ErrorReply."""
        for _ in range(SERVFAIL_TRIES):
            reply, is_tcp = self._exchange(query, until, tcp_first)
            if reply.rcode in (NOERROR, NXDOMAIN):
                return reply, is_tcp
            if reply.rcode != SERVFAIL:
                break
        raise ErrorReply(reply.rcode)

    def _exchange(self, query: bytes, until: float, tcp_first: bool) -> tuple[Reply, bool]:
        now = time.monotonic()
        until = min(now + self._timeout_seconds, until)
        tcp_first = tcp_first or now < self._tcp_first_until
        if not tcp_first:
            try:
                udp_until = min(now + self._timeout_seconds * UDP_SHARE, until)
                return self.ask_udp(query, udp_until), False
            except OSError:  # lost, or kept out by a firewall
                if time.monotonic() >= until:
                    raise
        try:
            reply = self.ask_tcp(query, until)
        except TimeoutError:
            raise
        except OSError:  # nothing listens there, or nothing gets through
            return self.ask_udp(query, until), False
        if not tcp_first:
            self.udp_is_silent()
        return reply, True

    def udp_is_silent(self) -> None:
        """UDP got no answer where TCP did: ask by TCP first for a while."""
        self._tcp_first_until = time.monotonic() + TCP_FIRST_SECONDS

    def ask_udp(self, query: bytes, until: float) -> Reply:
        """The reply to *query*, which is sent again after each tenth of the timeout.

        A socket of its own each time, connected, so that the kernel picks a random port and keeps
        out whatever does not come from the agent; what still does not fit is not listened to."""
        query = _with_new_id(query)
        udp = self.connect(socket.SOCK_DGRAM, until)
        try:
            is_retry = False
            while (now := time.monotonic()) < until:
                udp.send(query)
                self.udp.add(queries=1, retries=is_retry, sent_bytes=len(query))
                is_retry = True
                resend_at = min(now + self._timeout_seconds / RESENDS_PER_TIMEOUT, until)
                while now < resend_at:
                    udp.settimeout(resend_at - now)
                    try:
                        return _read(udp.recv(65_535), query, self.udp)
                    except (TimeoutError, NotOurs):
                        self.raise_if_closed()
                        now = time.monotonic()
        finally:
            self.disconnect(udp)
        raise TimeoutError("no answer by UDP")

    def ask_tcp(self, query: bytes, until: float) -> Reply:
        """The reply to *query* over a kept connection, quietly opened again when it was closed."""
        with self.stream(until) as stream:
            stream.send(query)
            return stream.receive()

    @contextmanager
    def stream(self, until: float) -> Iterator[Stream]:
        """A kept connection, or a new one; kept afterwards unless it failed."""
        idle_since = time.monotonic() - IDLE_SECONDS
        while (stream := self._take()) is not None and stream.last_used_at < idle_since:
            stream.close()
        stream = stream or Stream(self)
        stream.until = until
        try:
            yield stream
        except BaseException:
            stream.close()
            raise
        if stream.is_ready and len(self._kept) < KEPT_CONNECTIONS:
            stream.last_used_at = time.monotonic()
            self._kept.append(stream)
            if self._is_closed:
                self.close()
        else:
            stream.close()

    def _take(self) -> Stream | None:
        with suppress(IndexError):
            return self._kept.pop()
        return None

    def connect(self, kind: socket.SocketKind, until: float) -> socket.socket:
        """A socket connected to the agent, which `close` ends; for `disconnect` afterwards."""
        family, address = self._resolved(until)
        sock = socket.socket(family, kind)
        self._open.add(sock)
        close_after_fork(sock)
        try:
            self.raise_if_closed()  # after the add, so that `close` misses none
            sock.settimeout(seconds_left(until))
            sock.connect(address)
        except BaseException:
            self.disconnect(sock)
            raise
        return sock

    def disconnect(self, sock: socket.socket) -> None:
        self._open.discard(sock)
        sock.close()

    def _resolved(self, until: float) -> _SocketAddress:
        known = self._socket_address  # another thread may forget it meanwhile
        if known is None:
            # IPv4 first, where Consul listens by default, though `localhost` is IPv6 as well.
            found = self._names.addresses(self.agent.address, until)
            if not found:
                raise OSError(f"there is no host of the name {self.agent.address}")
            address = found[self._failed_addresses % len(found)]
            family = socket.AF_INET6 if ":" in address else socket.AF_INET
            known = self._socket_address = (family, (address, self.agent.port))
        return known

    def unreachable(self) -> None:
        """Nothing came from the agent: resolve its name anew, and take its next address."""
        self._failed_addresses += 1
        self._socket_address = None

    def __repr__(self) -> str:
        return f"<Channel {self.agent}, {len(self._kept)} connections kept>"


class Stream:
    """Queries over one TCP connection to *channel*'s agent, answered in the order they were sent.

    Consul ends connections that were idle or used up (fact A10).  So when one ends that has brought
    a reply, everything outstanding is sent once more on a new one.
    """

    def __init__(self, channel: Channel) -> None:
        self.until = 0.0
        self.last_used_at = 0.0
        self._channel = channel
        self._socket: socket.socket | None = None
        self._has_answered = False
        self._outstanding: list[bytes] = []

    @property
    def is_ready(self) -> bool:
        """Whether the connection stands, and nothing is outstanding on it."""
        return self._socket is not None and not self._outstanding

    def send(self, query: bytes) -> None:
        self._outstanding.append(_with_new_id(query))
        if self._socket is None:
            self._connect()
        self._send(self._outstanding[-1])

    def receive(self) -> Reply:
        """The reply to the oldest query that was not answered yet."""
        try:
            wire = self._receive()
        except ConnectionError:
            if not self._has_answered:
                raise
            self._connect()
            for query in self._outstanding:
                self._send(query, is_retry=True)
            wire = self._receive()
        self._has_answered = True
        return _read(wire, self._outstanding.pop(0), self._channel.tcp, LENGTH_BYTES)

    def close(self) -> None:
        if self._socket is not None:
            self._channel.disconnect(self._socket)
            self._socket = None

    def _connect(self) -> None:
        self.close()
        self._has_answered = False
        now = time.monotonic()
        try:
            connect_until = now + CONNECT_SHARE * (self.until - now)
            self._socket = self._channel.connect(socket.SOCK_STREAM, connect_until)
        except OSError as error:  # too slow is as bad as refused: UDP is what is left
            raise ConnectionError(error.errno, f"no TCP connection: {error}") from error
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def _send(self, query: bytes, *, is_retry: bool = False) -> None:
        assert self._socket is not None
        self._socket.settimeout(seconds_left(self.until))
        try:
            self._socket.sendall(len(query).to_bytes(LENGTH_BYTES, "big") + query)
        except OSError:
            return  # it has ended, as `receive` will find
        sent_bytes = LENGTH_BYTES + len(query)
        self._channel.tcp.add(queries=1, retries=is_retry, sent_bytes=sent_bytes)

    def _receive(self) -> bytes:
        length = int.from_bytes(self._receive_exactly(LENGTH_BYTES), "big")
        if not length:
            raise BadReply("a message of no length")
        return self._receive_exactly(length)

    def _receive_exactly(self, length: int) -> bytes:
        """*length* bytes, at most 65,535, however slowly they drip, until the deadline."""
        assert self._socket is not None
        parts = bytearray(length)
        view, filled = memoryview(parts), 0
        while filled < length:
            self._socket.settimeout(seconds_left(self.until))
            count = self._socket.recv_into(view[filled:])
            if not count:
                raise ConnectionResetError("the agent closed the connection")
            filled += count
        return bytes(parts)


def _with_new_id(query: bytes) -> bytes:
    return os.urandom(2) + query[2:]


def _read(wire: bytes, query: bytes, traffic: Traffic, extra_bytes: int = 0) -> Reply:
    """*wire* as the reply to *query*, counted; raises BadReply."""
    size = len(wire) + extra_bytes
    try:
        reply = read(wire, query)
    except BadReply:
        traffic.add(received_bytes=size)
        raise
    is_error = reply.rcode not in (NOERROR, NXDOMAIN)
    traffic.add(received_bytes=size, replies=1, error_replies=is_error)
    return reply
