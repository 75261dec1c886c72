"""The HTTP server of a process: one port for all its listeners."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import math
import os
import socket
import ssl
from collections.abc import Coroutine
from concurrent import futures
from typing import Any

from ....errors import ConfigurationError, TimedOut
from ....files import stamp_of
from ....fork import close_after_fork
from .loop import entered, left
from .options import Options
from .secret import Secret
from .server_connection import READ_SECONDS, Connection, Rules, Take

logger = logging.getLogger(__name__)

CLOSING_SECONDS = 5.0
"""How long replies that are on their way may take when the server stops."""
CLOSED_SECONDS = 0.01
"""How often it is seen whether they were given."""
SECONDS_BETWEEN_WARNINGS = 60.0
RETRY_SECONDS = 1.0
"""When the process has no file left for a connection, it may have one then."""
TURNED_AWAY = b"HTTP/1.1 503 Busy\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
BACKLOG = 1024
MOST_ACCEPTED = 256
"""As long as connections come asyncio waits for none: after so many the loop does other work.  More
than one, as the system drops what comes while `BACKLOG` wait, and a client asks again after 1 s."""
LOOK_SECONDS = 30.0
"""How often the files of TLS are looked at: they may have been renewed."""
SPARED_FILES = 32
"""At least so many of a process's open files, and a quarter of them, are not for connections."""


class HttpServer:
    """Listens from `start` to `stop`.  Thread-safe.

    What it hears it gives to *take*; it answers itself what is no request, has no secret, is too
    long, or comes when there are ``max_connections``.
    """

    def __init__(
        self,
        options: Options,
        secret: Secret,
        address: str,
        take: Take,
        *,
        look_seconds: float = LOOK_SECONDS,
    ) -> None:
        self._options, self._look_seconds = options, look_seconds
        self._socket = _listening(options.listen_address or address, options.port_range)
        self.port: int = self._socket.getsockname()[1]
        self._loop: asyncio.AbstractEventLoop | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._connections: set[Connection] = set()
        self._rules = Rules(take, secret, options.max_body_bytes, self._connections.discard)
        self._said_full_at = -math.inf

    def start(self) -> None:
        """Return once requests are answered.  Raises ConfigurationError, OSError (a TLS file) and
        TimedOut."""
        try:
            self._loop = entered()
            opening = asyncio.run_coroutine_threadsafe(self._open(), self._loop)
            opening.result(CLOSING_SECONDS)
        except BaseException as error:
            self.stop()
            if isinstance(error, futures.TimeoutError):
                raise TimedOut(f"no HTTP server within {CLOSING_SECONDS:g} s") from error
            raise

    def stop(self) -> None:
        """Answer what is being executed, for `CLOSING_SECONDS`, and close every connection."""
        loop, self._loop = self._loop, None
        if loop is not None:
            ended = RuntimeError, futures.CancelledError  # the loop, by itself
            with contextlib.suppress(*ended, futures.TimeoutError):
                closing = asyncio.run_coroutine_threadsafe(self._close(), loop)
                closing.result(2 * CLOSING_SECONDS)
            left(loop)
        self._socket.close()

    # -- on the loop -------------------------------------------------------------------------

    async def _open(self) -> None:
        self._most = _most_connections(self._options.max_connections)
        self._context, self._stamps = _context_of(self._options), _stamps_of(self._options)
        for work in (self._accept, self._watch_time, self._watch_files):
            self._start_task(work())

    def _start_task(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)  # asyncio itself may forget it
        task.add_done_callback(self._tasks.discard)

    async def _accept(self) -> None:
        """Take connections; of more than there may be, answer those that come last by 503, so that
        clients know that nothing was taken."""
        loop = asyncio.get_running_loop()
        for number in itertools.count():
            if number % MOST_ACCEPTED == 0:
                await asyncio.sleep(0)
            try:
                sock, _ = await loop.sock_accept(self._socket)
            except ConnectionAbortedError:  # by its client, before it was taken
                continue
            except OSError as error:
                self._say_full(f"no connection can be taken: {error}")
                await asyncio.sleep(RETRY_SECONDS)
                continue
            close_after_fork(sock)  # to a caller the end of its server has to be the connection's
            if len(self._connections) >= self._most:
                self._say_full(f"{self._most} connections are open: further ones are turned away")
                self._turn_away(sock)
                continue
            own = sock if self._context is None else None
            connection = Connection(loop, self._rules, own)
            self._connections.add(connection)
            self._start_task(self._welcome(sock, connection))

    async def _welcome(self, sock: socket.socket, connection: Connection) -> None:
        tls = self._context
        try:
            await asyncio.get_running_loop().connect_accepted_socket(
                lambda: connection,
                sock,
                ssl=tls,
                ssl_handshake_timeout=None if tls is None else READ_SECONDS,
            )
        except BaseException as error:
            self._connections.discard(connection)
            if not isinstance(error, OSError):  # it is closed already, or speaks no TLS
                raise

    def _say_full(self, what: str) -> None:
        now = asyncio.get_running_loop().time()
        if now - self._said_full_at >= SECONDS_BETWEEN_WARNINGS:
            self._said_full_at = now
            logger.warning(
                "%s; see max_connections, and how many files the system allows this process", what
            )

    async def _watch_time(self) -> None:
        """Close the connections whose time is up."""
        loop = asyncio.get_running_loop()
        while True:
            self._rules.read_clock()
            await asyncio.sleep(1)
            now = loop.time()
            for each in [each for each in self._connections if now >= each.closes_at]:
                each.abort()

    async def _watch_files(self) -> None:
        """Use the files of TLS again when they have changed; what is no good changes nothing."""
        while True:
            await asyncio.sleep(self._look_seconds)
            try:
                found = _stamps_of(self._options)
                if found == self._stamps:
                    continue
                self._stamps = found
                self._context = _context_of(self._options)
            except (OSError, ValueError) as error:
                logger.warning("the new files of TLS cannot be used (%s); the old ones stay", error)
            else:
                logger.info("new connections get the new certificate %s", self._options.tls_cert)

    async def _close(self) -> None:
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._refuse_connections()
        for each in list(self._connections):
            each.close()
        until = asyncio.get_running_loop().time() + CLOSING_SECONDS
        while self._connections and asyncio.get_running_loop().time() < until:
            await asyncio.sleep(CLOSED_SECONDS)
        for each in list(self._connections):
            each.abort()

    def _refuse_connections(self) -> None:
        """From now on, and answer those that the system has taken already: whoever has written a
        message there would else not know that nobody took it."""
        with contextlib.suppress(OSError):  # there are no more, or no file is left for one
            for _ in range(BACKLOG):
                self._turn_away(self._socket.accept()[0])
        self._socket.close()

    def _turn_away(self, sock: socket.socket) -> None:
        with sock, contextlib.suppress(OSError):
            sock.setblocking(False)
            if self._context is None:
                sock.send(TURNED_AWAY)


def _context_of(options: Options) -> ssl.SSLContext | None:
    """Of TLS, or None; raises OSError and ConfigurationError."""
    if options.tls_cert is None:
        if options.tls_ca is not None:
            raise ConfigurationError("tls_ca is set: a server needs tls_cert and tls_key, too")
        return None
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH, cafile=options.tls_ca)
    context.load_cert_chain(options.tls_cert, options.tls_key)
    if options.tls_ca is not None:
        context.verify_mode = ssl.CERT_REQUIRED
    return context


def _stamps_of(options: Options) -> list[tuple[int, ...]]:
    """What tells whether the files of TLS were replaced."""
    paths = options.tls_cert, options.tls_key, options.tls_ca
    return [_stamp(path) for path in paths if path is not None]


def _stamp(path: str) -> tuple[int, ...]:
    try:
        return stamp_of(path)
    except OSError:  # that it is gone is said once, too
        return ()


def _most_connections(most: int) -> int:
    """*most*, or as many as the limit of open files allows."""
    try:
        import resource
    except ImportError:  # Windows has no such limit
        return most
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    left = limit - max(SPARED_FILES, limit // 4)
    if limit == resource.RLIM_INFINITY or left >= most:
        return most
    left = max(1, left)
    logger.info(
        "this process may open %d files: it takes %d connections at a time, not the %d of "
        "max_connections; raise the limit (ulimit -n, LimitNOFILE) or lower max_connections",
        *(limit, left, most),
    )
    return left


def _listening(address: str, ports: tuple[int, int] | None) -> socket.socket:
    """A socket that listens there; raises OSError when none can."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    first, last = ports or (0, 0)
    failure: OSError | None = None
    for port in range(first, last + 1):
        sock = socket.socket(family)
        try:
            if os.name == "posix":
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.bind((address, port))
            sock.listen(BACKLOG)
            sock.setblocking(False)  # asyncio needs it so
        except OSError as error:
            failure = error
            sock.close()
        else:
            close_after_fork(sock)
            return sock
    where = f"{address}, port {first} to {last}" if ports else address
    raise OSError(f"cannot listen on {where}: {failure}")
