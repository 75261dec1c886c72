"""Connect a ZeroMQ socket to the hosts of a topic, or register where one is bound; extra ``zmq``.

    socket.bind("tcp://*:*")
    registration = advertise(mm, "jobs", socket)    # the server

    follower = follow(mm, "jobs", socket)           # the client
    poller.register(follower, zmq.POLLIN)           # readable when the hosts changed:
    follower.update()                               # on the thread of the socket

With asyncio: ``async with following(amm, "jobs", socket): ...``.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import socket as sockets
import threading
from collections.abc import AsyncIterator
from contextlib import ExitStack, asynccontextmanager, suppress
from typing import Any, NamedTuple

from .. import aio
from ..errors import Closed, ConfigurationError, Denied, Unavailable
from ..fork import call_after_fork, close_after_fork
from ..matchmaker import ASK_AGAIN_SECONDS, Matchmaker
from ..model import Host, Registration, Snapshot
from ..registrations.wanted import own_address
from .extras import extra

with extra("zmq"):
    import zmq

logger = logging.getLogger(__name__)

EVERYWHERE = ("0.0.0.0", "::")


def advertise(
    mm: Matchmaker,
    topic: str,
    socket: zmq.Socket[Any],
    *,
    server: str | None = None,
    address: str | None = None,
    **options: Any,
) -> Registration:
    """Register that *topic* is served where *socket* was bound last, with *options* as
    `Matchmaker.register` has them.

    Call it right after ``bind``: ``connect`` changes what the socket calls its last endpoint.  A
    socket that listens on every address is registered with *address*, or else with the address of
    this machine that others can reach.  The registration outlives the socket: `drain` it, or
    unregister, before the socket is closed.  Raises what `Matchmaker.register` does, and
    ConfigurationError for a socket that is not bound, or not to TCP.
    """
    bound = _bound_host(socket)
    if address is not None:
        where = _host(address, bound)
    elif bound.address in EVERYWHERE:
        found = own_address(mm.settings.addresses[0])
        if ":" in found and ":" not in bound.address:
            raise ConfigurationError(
                f"the address of this machine is {found}, and the socket listens on IPv4 only: "
                "set socket.ipv6 before bind, or give an address"
            )
        where = _host(found, bound)
    else:
        where = bound
    return mm.register(topic, where, server, **options)


def _bound_host(socket: zmq.Socket[Any]) -> Host:
    endpoint = socket.getsockopt_string(zmq.LAST_ENDPOINT)
    if not endpoint:
        raise ConfigurationError("the socket is not bound: call socket.bind('tcp://*:*') before")
    if not endpoint.startswith("tcp://"):
        raise ConfigurationError(
            f"the socket is bound to {endpoint}, which other machines cannot reach: bind to tcp://"
        )
    return Host.parse(endpoint.removeprefix("tcp://"))


def _host(address: str, bound: Host) -> Host:
    return Host.parse(str(Host(address, bound.port)))


class Changes(NamedTuple):
    """The hosts that a socket was connected to and disconnected from; false where there are
    none."""

    connected: tuple[Host, ...] = ()
    disconnected: tuple[Host, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.connected or self.disconnected)


class Connections:
    """Those of one socket to the hosts of one topic.  For the thread of the socket."""

    def __init__(self, socket: zmq.Socket[Any]) -> None:
        self._socket = socket
        self._connected: set[Host] = set()
        self._skipped: set[Host] = set()
        """Those that cannot be connected to, of the last answer: said once."""

    @property
    def hosts(self) -> tuple[Host, ...]:
        """What the socket is connected to by this, sorted."""
        return tuple(sorted(self._connected))

    def become(self, snapshot: Snapshot) -> Changes:
        """Connect to the hosts of *snapshot* that are new, then disconnect from those gone."""
        wanted = set(snapshot.hosts)
        self._skipped &= wanted
        new = wanted - self._connected - self._skipped
        connected = tuple(host for host in sorted(new) if self._connect(snapshot.topic, host))
        gone = tuple(sorted(self._connected - wanted))
        for host in gone:
            self._disconnect(host)
        return Changes(connected, gone)

    def _connect(self, topic: str, host: Host) -> bool:
        if host.port is None:
            self._skip(topic, host, "it has no port")
            return False
        # Without it ZeroMQ takes an IPv6 address, and never connects to it.
        had_ipv6 = self._socket.getsockopt(zmq.IPV6)
        self._socket.setsockopt(zmq.IPV6, had_ipv6 or ":" in host.address)
        try:
            self._socket.connect(_endpoint(host))
        except zmq.ZMQError as error:
            if error.errno != errno.EINVAL:
                raise
            self._skip(topic, host, str(error))
            return False
        finally:
            self._socket.setsockopt(zmq.IPV6, had_ipv6)
        self._connected.add(host)
        return True

    def _disconnect(self, host: Host) -> None:
        try:
            self._socket.disconnect(_endpoint(host))
        except zmq.ZMQError as error:
            if error.errno != errno.ENOENT:  # the application was faster
                raise
        self._connected.discard(host)

    def _skip(self, topic: str, host: Host, why: str) -> None:
        logger.warning("topic %s: no ZeroMQ socket can connect to %s: %s", topic, host, why)
        self._skipped.add(host)


def _endpoint(host: Host) -> str:
    return f"tcp://{host}"


class Follower:
    """Keeps a socket connected to the live hosts of a topic, whenever `update` is called.

    It belongs to the thread of the socket, but for `close`.  A forked child has neither: make a
    socket there, and follow again.
    """

    def __init__(
        self, mm: Matchmaker, topic: str, socket: zmq.Socket[Any], server: str | None = None
    ) -> None:
        """See `follow`."""
        self.topic, self.server = topic, server
        self._matchmaker = mm
        self._connections = Connections(socket)
        mm.hosts(topic, server)  # in memory from now on
        with ExitStack() as opened:
            self._bell = _Bell()
            opened.callback(self._bell.close)
            opened.enter_context(mm.telling(topic, self._bell.ring, server))
            self._bell.ring()
            self.update()
            self._opened = opened.pop_all()

    @property
    def hosts(self) -> tuple[Host, ...]:
        """What the socket is connected to by this, sorted."""
        return self._connections.hosts

    def update(self) -> Changes:
        """Connect to the hosts that are new and disconnect from those gone; return which.

        Costs nothing where nothing changed, and changes nothing while Consul cannot be asked.
        Raises zmq.ZMQError where the socket is closed, and Closed after `close`, in a forked child,
        and once when the matchmaker is closed.
        """
        if not self._bell.hush():
            return Changes()
        try:
            # From memory; a topic that was forgotten is asked for in the background.
            now = self._matchmaker.hosts(self.topic, self.server, timeout_seconds=0.0)
        except (Unavailable, Denied):  # the log has it; it rings again when there is an answer
            return Changes()
        return self._connections.become(now)

    def fileno(self) -> int:
        """A descriptor for ``zmq.Poller``, ``select`` and event loops: readable from the moment
        that the hosts may be others, or the matchmaker is closed, until `update`."""
        return self._bell.fileno()

    def close(self) -> None:
        """Follow no longer.  The socket keeps the connections that it has until it is closed.
        Idempotent; for any thread."""
        self._opened.close()

    def __enter__(self) -> Follower:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<Follower of {self.topic}, connected to {len(self.hosts)} hosts>"


def follow(
    mm: Matchmaker, topic: str, socket: zmq.Socket[Any], *, server: str | None = None
) -> Follower:
    """Connect *socket* (DEALER, PUSH, SUB or REQ) to the live hosts of *topic*, with *server* to
    that of this name, and from then on at every `Follower.update`.

    A host without a port, or that ZeroMQ cannot parse, is skipped, with a line in the log.  Raises
    what `Matchmaker.hosts` does; that there is no host is no error.

    What ZeroMQ does with messages of a host that is disconnected: those sent to it, and not on the
    network yet, are kept for the socket's ``linger`` (by default for ever, and then the context
    does not end as long as a host with such messages is down: set it); no other host gets them.
    Those that came from it, and were not received yet, are lost, and so are answers that it would
    still send: receive what is there before `update`, and, with REQ and DEALER, call it while no
    answer is awaited.  With ``socket.immediate = True`` nothing is queued for a host before it is
    connected.
    """
    return Follower(mm, topic, socket, server)


@asynccontextmanager
async def following(
    amm: aio.Matchmaker, topic: str, socket: zmq.Socket[Any], *, server: str | None = None
) -> AsyncIterator[Connections]:
    """As `follow`, for asyncio: during the block *socket*, one of the event loop's thread such as
    those of ``zmq.asyncio``, is kept connected to the live hosts as they change."""
    connections = Connections(socket)
    connections.become(await amm.hosts(topic, server))
    task = asyncio.ensure_future(_keep(connections, amm, topic, socket, server))
    try:
        yield connections
    finally:
        task.cancel()
        await asyncio.wait([task])
        if not task.cancelled():
            task.result()  # raises what ended it


async def _keep(
    connections: Connections,
    amm: aio.Matchmaker,
    topic: str,
    socket: zmq.Socket[Any],
    server: str | None,
) -> None:
    with suppress(Closed):
        while True:
            try:
                async for snapshot in amm.watch(topic, server):
                    if socket.closed:
                        return
                    connections.become(snapshot)
                return  # as the matchmaker was closed
            except (Unavailable, Denied):  # the log has it, and what is connected stays
                await asyncio.sleep(ASK_AGAIN_SECONDS)


class _Bell:
    """A descriptor that is readable from `ring` until `hush`.  Thread-safe.

    In a forked child it is closed, which the parent does not notice.
    """

    def __init__(self) -> None:
        self._reader, self._writer = sockets.socketpair()
        for end in (self._reader, self._writer):
            end.setblocking(False)
            close_after_fork(end)
        self.after_fork()
        call_after_fork(self)

    def after_fork(self) -> None:
        self._lock = threading.RLock()  # a signal handler may look up on top of a lookup
        self._rings = False

    def ring(self) -> None:
        """Nothing where it rings already, or is closed."""
        with self._lock:
            if not self._rings and self.fileno() != -1:
                self._rings = True
                self._writer.send(b"!")

    def hush(self) -> bool:
        """Whether it rang.  Raises Closed."""
        if not self._rings and self.fileno() != -1:
            return False
        with self._lock:
            if self.fileno() == -1:
                raise Closed("this follower was closed, or its process forked: follow again")
            self._reader.recv(1)
            self._rings = False
        return True

    def fileno(self) -> int:
        """-1 where it is closed."""
        return self._reader.fileno()

    def close(self) -> None:
        """Idempotent."""
        with self._lock:
            self._reader.close()
            self._writer.close()
