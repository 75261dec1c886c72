"""The HTTP server of a process: one port for all its listeners."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
import ssl
from collections.abc import Callable, Coroutine
from concurrent import futures
from typing import Any, Protocol

from ....errors import ConfigurationError, TimedOut
from ....files import stamp_of
from ....fork import close_after_fork
from ...extras import extra
from .loop import entered, left
from .messages import Malformed, Request, read_request
from .options import Options
from .protocol import HEALTH_PATH, HEARTBEAT, PATH
from .secret import Secret

with extra("oslo-http"):
    from aiohttp import HttpVersion10, HttpVersion11, web
    from yarl import URL

logger = logging.getLogger(__name__)

READ_SECONDS = 10.0
"""The first message of a connection has to begin so soon, and a body that begins has to be there as
a whole; TLS has to be agreed upon as soon."""
IDLE_SECONDS = 75.0
"""A connection that nothing is asked over is closed; clients close theirs long before."""
CLOSING_SECONDS = 5.0
"""How long replies that are on their way may take when the server stops."""
SECONDS_BETWEEN_WARNINGS = 60.0
BACKLOG = 1024
ACCEPTS = 4
"""Connections taken in one round of the loop, of which it needs some to close one: few, that those
beyond ``max_connections`` are closed before they use up what `_spared_files` leaves."""
LOOK_SECONDS = 30.0
"""How often the files of TLS are looked at: they may have been renewed."""
SPARED_FILES = 32
"""At least so many of a process's open files, and a quarter of them, are not for connections."""
JSON = "application/json"
ABANDONED = "what executed the message ended without a reply: see the log of the server"


class Exchange(Protocol):
    """What a listener gets of a request beside its content; every method may be called from any
    thread, and raises nothing."""

    def heartbeat(self) -> None:
        """Tell the caller that the call is being executed."""

    def finish(self, body: bytes) -> None:
        """Answer with *body*."""

    def abandon(self) -> None:
        """There will be no answer."""


Take = Callable[[Request, "Exchange"], int]
"""Hand a request to whom it is addressed.  202, or why it was not taken: 404 or 503.  Called on the
server's thread, and must not wait."""


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
        self._options, self._secret, self._take = options, secret, take
        self._look_seconds = look_seconds
        self._socket = _listening(options.listen_address or address, options.port_range)
        self.port: int = self._socket.getsockname()[1]
        self._loop: asyncio.AbstractEventLoop | None = None
        self._server: asyncio.AbstractServer | None = None
        self._looking: asyncio.Task[None] | None = None

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
        self._connections = _Connections(
            self._answer,
            _most_connections(self._options.max_connections),
            access_log=None,
            keepalive_timeout=IDLE_SECONDS,
            lingering_time=0.0,
            request_factory=_request,
            auto_decompress=False,  # no client of ours packs, and a little would become a lot
            logger=_quiet,
        )
        stamps = self._stamps()
        await self._listen()
        if self._options.tls_cert is not None:
            self._looking = asyncio.create_task(self._look(stamps))

    async def _listen(self) -> None:
        """Take connections with what the files of TLS say now; those that there are stay."""
        tls = self._context()
        sock = self._socket.dup()  # the queue of connections is one
        close_after_fork(sock)
        before, self._server = (
            self._server,
            await asyncio.get_running_loop().create_server(
                self._connections,
                sock=sock,
                ssl=tls,
                ssl_handshake_timeout=None if tls is None else READ_SECONDS,
                backlog=ACCEPTS,
            ),
        )
        self._socket.listen(BACKLOG)  # to asyncio it is the same as how many it takes at a time
        if before is not None:
            before.close()

    async def _look(self, stamps: list[tuple[int, ...]]) -> None:
        """Use the files of TLS again when they have changed; what is no good changes nothing."""
        while True:
            await asyncio.sleep(self._look_seconds)
            try:
                found = self._stamps()
                if found == stamps:
                    continue
                stamps = found
                await self._listen()
            except (OSError, ValueError) as error:
                logger.warning("the new files of TLS cannot be used (%s); the old ones stay", error)
            else:
                logger.info("new connections get the new certificate %s", self._options.tls_cert)

    def _stamps(self) -> list[tuple[int, ...]]:
        options = self._options
        paths = options.tls_cert, options.tls_key, options.tls_ca
        return [_stamp(path) for path in paths if path is not None]

    async def _close(self) -> None:
        if self._looking is not None:
            self._looking.cancel()
        if self._server is None:
            return
        self._server.close()
        self._connections.pre_shutdown()  # closes those that wait for a request, as kept ones do
        await self._connections.shutdown(CLOSING_SECONDS)

    async def _answer(self, request: web.BaseRequest) -> web.StreamResponse:
        if request.version not in (HttpVersion10, HttpVersion11):
            return _refused(400, "this is not HTTP/1.1")
        if request.path == HEALTH_PATH and request.method in ("GET", "HEAD"):
            return self._health(request)
        self._connections.heard(request.protocol)
        if request.path != PATH or request.method != "POST":
            return _refused(404, "there is nothing here")
        if not self._secret.accepts(request.headers.get("Authorization")):
            return _refused(401, "the secret is wrong, or was not given")
        size = request.content_length
        if size is None:
            return _refused(411, "a length is needed")
        if size > self._options.max_body_bytes:
            return _refused(413, f"more than {self._options.max_body_bytes} bytes")
        try:
            body = await _body_of(request, size)
            heard = read_request(body)
        except Malformed as error:
            return _refused(400, str(error))
        if heard.wait and heard.monitor is not None:
            return await self._watched(request, heard)
        call = _Call(asyncio.get_running_loop())
        status = self._take(heard, call)
        if status != 202:
            return web.Response(status=status)
        if not heard.wait:
            return web.Response(status=202)
        reply = await call.reply
        if reply is None:
            return web.Response(status=500, text=f"{ABANDONED}\n")
        return web.Response(body=reply, content_type=JSON)

    def _health(self, request: web.BaseRequest) -> web.Response:
        """It needs no secret, so it does not count as a message, and the second one is the last of
        its connection: anybody could ask for more, and not read the answers."""
        response = web.Response(text="ok\n")
        if not self._connections.is_first_probe(request.protocol):
            response.force_close()
        return response

    async def _watched(self, request: web.BaseRequest, heard: Request) -> web.StreamResponse:
        """A reply that heartbeats precede."""
        call = _WatchedCall(asyncio.get_running_loop())
        status = self._take(heard, call)
        if status != 202:
            return web.Response(status=status)
        response = web.StreamResponse(headers={"Content-Type": JSON})
        with contextlib.suppress(ConnectionError):  # the caller has given up
            await response.prepare(request)
            while (piece := await call.pieces.get()) == HEARTBEAT:
                await response.write(piece)
            if piece is not None:
                await response.write(piece)
                await response.write_eof()
            elif request.transport is not None:
                request.transport.abort()  # its status was sent: nothing else says so
        return response

    def _context(self) -> ssl.SSLContext | None:
        options = self._options
        if options.tls_cert is None:
            if options.tls_ca is not None:
                raise ConfigurationError("tls_ca is set: a server needs tls_cert and tls_key, too")
            return None
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH, cafile=options.tls_ca)
        context.load_cert_chain(options.tls_cert, options.tls_key)
        if options.tls_ca is not None:
            context.verify_mode = ssl.CERT_REQUIRED
        return context


class _Connections(web.Server):
    """The connections of a server; of more than *most* it answers those that come last by 503, so
    that clients know that nothing was taken, and closes them."""

    def __init__(
        self,
        answer: Callable[[web.BaseRequest], Coroutine[Any, Any, web.StreamResponse]],
        most: int,
        **options: Any,
    ) -> None:
        super().__init__(answer, **options)
        self._most = most
        self._open = 0
        self._silent: dict[Any, asyncio.TimerHandle] = {}
        """Those over which no message has come yet, and when their time is up."""
        self._probed: set[Any] = set()
        self._said_full_at = -SECONDS_BETWEEN_WARNINGS

    def connection_made(self, handler: Any, transport: asyncio.Transport) -> None:
        super().connection_made(handler, transport)
        self._open += 1
        loop = asyncio.get_running_loop()
        if self._open > self._most:
            self._say_full(loop.time())
            loop.call_soon(_turn_away, transport)  # aiohttp does not bear it before it has begun
            return
        self._silent[handler] = loop.call_later(READ_SECONDS, transport.abort)

    def _say_full(self, now: float) -> None:
        if now - self._said_full_at >= SECONDS_BETWEEN_WARNINGS:
            self._said_full_at = now
            logger.warning(
                "%d connections are open: further ones are turned away; see max_connections, and "
                "how many files the system allows this process",
                self._most,
            )

    def is_first_probe(self, handler: Any) -> bool:
        """Whether nobody has asked for the health of this process over it before."""
        is_first = handler not in self._probed
        self._probed.add(handler)
        return is_first

    def heard(self, handler: Any) -> None:
        """A message has come over it."""
        if (timer := self._silent.pop(handler, None)) is not None:
            timer.cancel()

    def connection_lost(self, handler: Any, exc: BaseException | None = None) -> None:
        super().connection_lost(handler, exc)
        self._open -= 1
        self._probed.discard(handler)
        self.heard(handler)


def _request(message: Any, payload: Any, protocol: Any, writer: Any, task: Any) -> web.BaseRequest:
    """As aiohttp makes one, where some releases fail for a port that is no number, with a
    traceback; such a request has an address that nothing is at."""
    loop = asyncio.get_running_loop()
    try:
        return web.BaseRequest(message, payload, protocol, writer, task, loop)
    except ValueError:
        message = message._replace(url=URL("/"))
        return web.BaseRequest(message, payload, protocol, writer, task, loop)


def _turn_away(transport: asyncio.Transport) -> None:
    transport.write(b"HTTP/1.1 503 Busy\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
    transport.close()


class _Call:
    """The reply of a call, or nothing of a cast, from the thread that executes it."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self.reply: asyncio.Future[bytes | None] = loop.create_future()

    def heartbeat(self) -> None:
        """Nobody watches it."""

    def finish(self, body: bytes) -> None:
        with contextlib.suppress(RuntimeError):  # the server was stopped
            self._loop.call_soon_threadsafe(self._finish, body)

    def abandon(self) -> None:
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self._finish, None)

    def _finish(self, body: bytes | None) -> None:
        if not self.reply.done():
            self.reply.set_result(body)


class _WatchedCall:
    """Heartbeats and the reply of a call, from the threads that execute and watch it."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self.pieces: asyncio.Queue[bytes | None] = asyncio.Queue()

    def heartbeat(self) -> None:
        self.finish(HEARTBEAT)

    def finish(self, body: bytes) -> None:
        with contextlib.suppress(RuntimeError):  # the server was stopped
            self._loop.call_soon_threadsafe(self.pieces.put_nowait, body)

    def abandon(self) -> None:
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self.pieces.put_nowait, None)


_quiet = logging.getLogger(f"{__name__}.requests")
"""aiohttp's complaints about what others send: a warning for each would let them fill the disk."""
_quiet.setLevel(logging.CRITICAL)


async def _body_of(request: web.BaseRequest, size: int) -> bytes:
    """The whole body; raises Malformed."""
    content = request.content
    if content.is_eof():  # almost always: it came with the head
        return content.read_nowait()
    try:
        return await asyncio.wait_for(content.readexactly(size), READ_SECONDS)
    except (asyncio.TimeoutError, asyncio.IncompleteReadError, OSError, web.RequestPayloadError):
        raise Malformed("the body is not as long as was said") from None


def _refused(status: int, why: str) -> web.Response:
    response = web.Response(status=status, text=f"{why}\n")
    response.force_close()  # the rest of what was sent is not read
    return response


def _stamp(path: str) -> tuple[int, ...]:
    try:
        return stamp_of(path)
    except OSError:  # that it is gone is said once, too
        return ()


class _Listening(socket.socket):
    """One whose connections, too, are closed in a forked child: to a caller its server's end would
    else not be the end of the connection."""

    def accept(self) -> tuple[socket.socket, Any]:
        sock, peer = super().accept()
        close_after_fork(sock)
        return sock, peer


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
        sock = _Listening(family)
        try:
            if os.name == "posix":
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.bind((address, port))
            sock.listen(BACKLOG)
        except OSError as error:
            failure = error
            sock.close()
        else:
            close_after_fork(sock)
            return sock
    where = f"{address}, port {first} to {last}" if ports else address
    raise OSError(f"cannot listen on {where}: {failure}")
