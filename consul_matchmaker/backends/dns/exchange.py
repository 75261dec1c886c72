"""Carry DNS queries to one agent and its replies back: UDP, and TCP connections that are kept.

Nothing here knows what is asked.  Every call ends at its *until*, an instant of `time.monotonic`
(what a socket waits for is real time), and raises OSError (TimeoutError) or BadReply; Unavailable
once its channel was closed.
"""

from __future__ import annotations

import ipaddress
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress

from ...errors import Unavailable
from ...fork import close_after_fork
from ...model import Host
from ..host_names import HostNames
from ..traffic import Traffic
from .coverage import UDP_LIMIT_LOCAL, UDP_LIMIT_REMOTE
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
"""A kept connection rests no longer than this: Consul ends it after 8 s (fact A10)."""
QUERIES_PER_CONNECTION = 120
"""Consul ends a connection after 128 queries (fact A10)."""
KEPT_CONNECTIONS = 2
"""To one agent; more lookups at a time open connections of their own and close them."""
TCP_FIRST_SECONDS = 60.0
"""How long an agent that answered TCP and not UDP (a firewall) is not asked by UDP first."""

CONNECT_SHARE = 0.35
"""Of the time there is, this much may go by until a TCP connection stands."""
LENGTH_BYTES = 2
"""Before each message on a TCP connection (RFC 1035, section 4.2.2)."""

_Place = tuple[socket.AddressFamily, tuple[object, ...]]


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


_Opening = Callable[[socket.socket], AbstractContextManager[None]]


class NotConnected(ConnectionError):
    """No TCP connection to the agent came about: refused, or too slow.  UDP is what is left."""


class Channel:
    """One agent's DNS, over both transports, counted in *udp* and *tcp*; *names* resolves its
    address where that is a host name.  Thread-safe; opens nothing when made."""

    def __init__(self, agent: Host, names: HostNames, udp: Traffic, tcp: Traffic) -> None:
        self.agent = agent
        self._names = names
        self.udp, self.tcp = udp, tcp
        self._lock = threading.Lock()
        self._kept: list[_Connection] = []
        self._place: _Place | None = None
        self._is_local: bool | None = None
        self._useless_places = 0
        self._tcp_first_until = 0.0
        self._open: set[socket.socket] = set()
        self._is_closed = False

    def close(self) -> None:
        """Close every connection, and have every call raise Unavailable: one under way at once."""
        self._is_closed = True
        for sock in tuple(self._open):
            with suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)  # wakes who waits there; closing would not
        with self._lock:
            kept, self._kept = self._kept, []
        for connection in kept:
            connection.close()

    @contextmanager
    def opening(self, sock: socket.socket) -> Iterator[None]:
        """Have `close` end what is done with *sock*."""
        self._open.add(sock)
        try:
            self.raise_if_closed()  # after the add, so that `close` misses none
            yield
            self.raise_if_closed()
        except OSError:
            self.raise_if_closed()
            raise
        finally:
            self._open.discard(sock)

    def raise_if_closed(self) -> None:
        """Raise Unavailable after `close`."""
        if self._is_closed:
            raise Unavailable("this way to Consul was closed meanwhile: make a new matchmaker")

    def udp_limit(self, until: float) -> int:
        """The EDNS size to ask for; resolves the agent's name if it has one."""
        is_local = self._is_local
        if is_local is None:
            is_local = self._is_local = self._find_whether_local(until)
        return UDP_LIMIT_LOCAL if is_local else UDP_LIMIT_REMOTE

    def ask(
        self, query: bytes, timeout_seconds: float, until: float, *, tcp_first: bool = False
    ) -> tuple[Reply, bool]:
        """What the agent says to *query*, and whether it said it by TCP: a denial is an answer too,
        an error is an ErrorReply.  Each try has *timeout_seconds* at most."""
        for tries_left in range(SERVFAIL_TRIES - 1, -1, -1):
            reply, is_tcp = self._exchange(query, timeout_seconds, until, tcp_first)
            if reply.rcode in (NOERROR, NXDOMAIN):
                break
            if reply.rcode != SERVFAIL or not tries_left:
                raise ErrorReply(reply.rcode)
        return reply, is_tcp

    def _exchange(
        self, query: bytes, timeout_seconds: float, until: float, tcp_first: bool
    ) -> tuple[Reply, bool]:
        now = time.monotonic()
        until = min(now + timeout_seconds, until)
        tcp_first = tcp_first or now < self._tcp_first_until
        if not tcp_first:
            try:
                udp_until = min(now + timeout_seconds * UDP_SHARE, until)
                return self.ask_udp(query, timeout_seconds, udp_until), False
            except OSError:  # lost, or kept out by a firewall
                if time.monotonic() >= until:
                    raise
        try:
            reply = self.ask_tcp(query, until)
        except TimeoutError:
            raise
        except OSError:  # nothing listens there, or nothing gets through
            return self.ask_udp(query, timeout_seconds, until), False
        if not tcp_first:
            self.udp_is_silent()
        return reply, True

    def udp_is_silent(self) -> None:
        """UDP got no answer where TCP did: ask by TCP first for a while."""
        self._tcp_first_until = time.monotonic() + TCP_FIRST_SECONDS

    def ask_udp(self, query: bytes, timeout_seconds: float, until: float) -> Reply:
        """The reply to *query*, which is sent again after each tenth of *timeout_seconds*.

        A socket of its own each time, connected, so that the kernel picks a random port and keeps
        out whatever does not come from the agent; what still does not fit is not listened to."""
        query = os.urandom(2) + query[2:]
        resend_seconds = timeout_seconds / RESENDS_PER_TIMEOUT
        family, place = self._resolved(until)
        with socket.socket(family, socket.SOCK_DGRAM) as udp, self.opening(udp):
            close_after_fork(udp)
            udp.connect(place)
            now = time.monotonic()
            is_retry = False
            while now < until:
                udp.send(query)
                self.udp.add(queries=1, retries=is_retry, sent_bytes=len(query))
                is_retry = True
                resend_at = min(now + resend_seconds, until)
                while now < resend_at:
                    udp.settimeout(resend_at - now)
                    try:
                        return _read(udp.recv(65_535), query, self.udp)
                    except (TimeoutError, NotOurs):
                        self.raise_if_closed()
                        now = time.monotonic()
        raise TimeoutError("no answer by UDP")

    def ask_tcp(self, query: bytes, until: float) -> Reply:
        """The reply to *query* over a kept connection, quietly opened again when it was closed."""
        with Stream(self, until) as stream:
            stream.send(query)
            return stream.receive()

    def _resolved(self, until: float) -> _Place:
        place = self._place  # another thread may forget it meanwhile
        if place is None:
            address, port = self.agent.address, self.agent.port
            # IPv4 first, where Consul listens by default, though `localhost` is IPv6 as well.
            found = self._names.addresses(address, until)
            if not found:
                raise OSError(f"there is no host of the name {address}")
            address = found[self._useless_places % len(found)]
            family = socket.AF_INET6 if ":" in address else socket.AF_INET
            place = self._place = (family, (address, port))
        return place

    def unreachable(self) -> None:
        """Nothing came from the agent: resolve its name anew, and take its next address."""
        self._useless_places += 1
        self._place = self._is_local = None

    def _find_whether_local(self, until: float) -> bool:
        family, place = self._resolved(until)
        address = ipaddress.ip_address(str(place[0]).partition("%")[0])
        if address.is_loopback:
            return True
        # To an address of this machine the kernel sends from that very address.
        with socket.socket(family, socket.SOCK_DGRAM) as udp:
            udp.connect(place)
            return bool(udp.getsockname()[0] == place[0])

    def _take(self) -> _Connection | None:
        """A kept connection that Consul has not closed yet, by all we know."""
        now = time.monotonic()
        with self._lock:
            while self._kept:
                connection = self._kept.pop()
                if connection.is_usable(now):
                    return connection
                connection.close()
        return None

    def _connect(self, until: float) -> _Connection:
        place, now = self._resolved(until), time.monotonic()
        try:
            return _Connection(place, now + CONNECT_SHARE * (until - now), self.opening)
        except OSError as error:
            raise NotConnected(error.errno, f"no TCP connection: {error}") from error

    def _give_back(self, connection: _Connection) -> None:
        connection.last_used_at = time.monotonic()
        with self._lock:
            if connection.is_usable(connection.last_used_at) and len(self._kept) < KEPT_CONNECTIONS:
                self._kept.append(connection)
                return
        connection.close()

    def __repr__(self) -> str:
        return f"<Channel {self.agent}, {len(self._kept)} connections kept>"


class Stream:
    """Queries over one TCP connection, several at a time, answered in the order they were sent.

    A context manager: leaving it keeps the connection when nothing is outstanding, else closes it.
    Consul ends connections that were idle or used up.  So when one ends that was kept, or that has
    brought a reply, everything outstanding is sent once more on a new one.
    """

    def __init__(self, channel: Channel, until: float) -> None:
        self._channel = channel
        self._until = until
        self._outstanding: list[bytes] = []
        self._connection = channel._take()
        self._may_reopen = self._connection is not None

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *exc_info: object) -> None:
        connection, self._connection = self._connection, None
        if connection is None:
            return
        if self._outstanding or exc_info[0] is not None:
            connection.close()
        else:
            self._channel._give_back(connection)

    def send(self, query: bytes) -> None:
        query = os.urandom(2) + query[2:]
        self._outstanding.append(query)
        try:
            if self._connection is None:
                self._connection = self._channel._connect(self._until)
            self._send(query)
        except TimeoutError:
            raise
        except OSError:
            self._reopen()

    def receive(self) -> Reply:
        """The reply to the oldest query that was not answered yet."""
        assert self._connection is not None
        try:
            wire = self._connection.receive(self._until)
        except TimeoutError:
            raise
        except OSError:
            self._reopen()
            wire = self._connection.receive(self._until)
        self._may_reopen = True
        return _read(wire, self._outstanding.pop(0), self._channel.tcp, LENGTH_BYTES)

    def _send(self, query: bytes, *, is_retry: bool = False) -> None:
        assert self._connection is not None
        self._connection.send(query, self._until)
        self._channel.tcp.add(queries=1, retries=is_retry, sent_bytes=LENGTH_BYTES + len(query))

    def _reopen(self) -> None:
        """Send everything outstanding on a new connection; raises what it came from otherwise."""
        if not self._may_reopen:
            raise
        self._may_reopen = False
        if self._connection is not None:
            self._connection.close()
        self._connection = self._channel._connect(self._until)
        for query in self._outstanding:
            self._send(query, is_retry=True)


class _Connection:
    """A TCP connection to an agent, with DNS's two bytes of length before each message."""

    def __init__(self, place: _Place, until: float, opening: _Opening) -> None:
        family, address = place
        self._opening = opening
        self._socket = socket.socket(family, socket.SOCK_STREAM)
        close_after_fork(self._socket)
        try:
            self._wait_no_longer_than(until)
            with opening(self._socket):
                self._socket.connect(address)
            self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        except BaseException:
            self._socket.close()
            raise
        self._queries = 0
        self.last_used_at = time.monotonic()

    def is_usable(self, now: float) -> bool:
        return self._queries < QUERIES_PER_CONNECTION and now < self.last_used_at + IDLE_SECONDS

    def send(self, query: bytes, until: float) -> None:
        self._wait_no_longer_than(until)
        self._queries += 1
        with self._opening(self._socket):
            self._socket.sendall(len(query).to_bytes(LENGTH_BYTES, "big") + query)

    def receive(self, until: float) -> bytes:
        length = int.from_bytes(self._receive(LENGTH_BYTES, until), "big")
        if not length:
            raise BadReply("a message of no length")
        return self._receive(length, until)

    def _receive(self, length: int, until: float) -> bytes:
        """Exactly *length* bytes, at most 65,535, however slowly they drip, until the deadline."""
        parts = bytearray(length)
        view, filled = memoryview(parts), 0
        while filled < length:
            self._wait_no_longer_than(until)
            with self._opening(self._socket):
                count = self._socket.recv_into(view[filled:])
            if not count:
                raise ConnectionResetError("the agent closed the connection")
            filled += count
        return bytes(parts)

    def _wait_no_longer_than(self, until: float) -> None:
        left = until - time.monotonic()
        if left <= 0:
            raise TimeoutError("no answer by TCP")
        self._socket.settimeout(left)

    def close(self) -> None:
        self._socket.close()
