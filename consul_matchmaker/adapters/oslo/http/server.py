"""The HTTP server of a process: one thread, one port, for all its listeners."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
import ssl
import threading
from collections.abc import Callable, Coroutine
from typing import Any, Protocol

from ....errors import ConfigurationError, TimedOut
from ....fork import close_after_fork
from ...extras import extra
from .messages import Malformed, Request, read_request
from .options import Options
from .protocol import HEALTH_PATH, HEARTBEAT, PATH
from .secret import Secret

with extra("oslo-http"):
    from aiohttp import HttpVersion10, HttpVersion11, web

logger = logging.getLogger(__name__)

READ_SECONDS = 10.0
"""A request that begins has to be there as a whole so soon; TLS has to be agreed upon as soon."""
IDLE_SECONDS = 75.0
"""A connection that nothing is asked over is closed; clients close theirs long before."""
SECONDS_BETWEEN_WARNINGS = 60.0
CLOSING_SECONDS = 5.0
"""How long replies that are on their way may take when the server stops."""
BACKLOG = 1024
ACCEPTED_AT_A_TIME = 4
"""Before asyncio does anything else, as closing those that are too many."""
JSON = "application/json"


class Exchange(Protocol):
    """What a listener gets of a request beside its content; every method may be called from any
    thread, and raises nothing."""

    def heartbeat(self) -> None:
        """Tell the caller that the call is being executed."""

    def finish(self, body: bytes) -> None:
        """Answer with *body*."""


Take = Callable[[Request, "Exchange"], int]
"""Hand a request to whom it is addressed.  202, or why it was not taken: 404 or 503.  Called on the
server's thread, and must not wait."""


class HttpServer:
    """Listens from `start` to `stop`.  Thread-safe.

    What it hears it gives to *take*; it answers itself what is no request, has no secret, is too
    long, or comes when there are ``max_connections``.
    """

    def __init__(self, options: Options, secret: Secret, address: str, take: Take) -> None:
        self._options, self._secret, self._take = options, secret, take
        self._socket = _listening(options.listen_address or address, options.port_range)
        self.port: int = self._socket.getsockname()[1]
        self._thread = threading.Thread(
            target=self._run, name="consul-matchmaker-http", daemon=True
        )
        self._is_ready = threading.Event()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stopping: asyncio.Event | None = None
        self._failure: BaseException | None = None
        self._tls: ssl.SSLContext | None = None

    def start(self) -> None:
        """Return once requests are answered.  Raises OSError (a TLS file) and TimedOut."""
        self._tls = self._context()
        self._thread.start()
        if not self._is_ready.wait(CLOSING_SECONDS):
            raise TimedOut(f"the HTTP server did not start within {CLOSING_SECONDS:g} s")
        if self._failure is not None:
            raise self._failure

    def stop(self) -> None:
        """Answer what is being executed, for `CLOSING_SECONDS`, and close every connection."""
        loop, stopping = self._loop, self._stopping
        if loop is None or stopping is None:
            self._socket.close()
            return
        with contextlib.suppress(RuntimeError):  # it has ended by itself
            loop.call_soon_threadsafe(stopping.set)
        self._thread.join(2 * CLOSING_SECONDS)

    # -- on the server's thread --------------------------------------------------------------

    def _run(self) -> None:
        try:
            asyncio.run(self._serve())
        except BaseException as error:
            self._failure = error
            logger.exception("the HTTP server has ended")
        finally:
            self._is_ready.set()

    async def _serve(self) -> None:
        loop = self._loop = asyncio.get_running_loop()
        stopping = self._stopping = asyncio.Event()
        connections = _Connections(
            self._answer,
            _most_connections(self._options.max_connections),
            access_log=None,
            keepalive_timeout=IDLE_SECONDS,
            lingering_time=0.0,
            auto_decompress=False,  # no client of ours packs, and a little would become a lot
            logger=_quiet,
        )
        self._connections = connections
        patience = None if self._tls is None else READ_SECONDS
        server = await loop.create_server(
            connections,
            sock=self._socket,
            ssl=self._tls,
            ssl_handshake_timeout=patience,
            backlog=ACCEPTED_AT_A_TIME,
        )
        self._socket.listen(BACKLOG)  # which asyncio has made as small as that
        self._is_ready.set()
        await stopping.wait()
        server.close()
        connections.pre_shutdown()  # closes those that wait for a request, as kept ones do
        await connections.shutdown(CLOSING_SECONDS)

    async def _answer(self, request: web.BaseRequest) -> web.StreamResponse:
        self._connections.heard(request.protocol)
        if request.version not in (HttpVersion10, HttpVersion11):
            return _closing(400, "this is not HTTP/1.1")
        if request.path == HEALTH_PATH and request.method in ("GET", "HEAD"):
            return _closing(200, "ok")
        if request.path != PATH or request.method != "POST":
            return _closing(404, "there is nothing here")
        if not self._secret.accepts(request.headers.get("Authorization")):
            return _closing(401, "the secret is wrong, or was not given")
        size = request.content_length
        if size is None:
            return _closing(411, "a length is needed")
        if size > self._options.max_body_bytes:
            return _closing(413, f"more than {self._options.max_body_bytes} bytes")
        try:
            body = await _body_of(request, size)
            heard = read_request(body)
        except Malformed as error:
            return _closing(400, str(error))
        if heard.wait and heard.monitor is not None:
            return await self._watched(request, heard)
        call = _Call(asyncio.get_running_loop())
        status = self._take(heard, call)
        if status != 202:
            return web.Response(status=status)
        if not heard.wait:
            return web.Response(status=202)
        return web.Response(body=await call.reply, content_type=JSON)

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
            await response.write(piece)
            await response.write_eof()
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
        self._said_full_at = -SECONDS_BETWEEN_WARNINGS
        self._silent: dict[Any, asyncio.TimerHandle] = {}
        """Those over which no request has come yet, and when their time is up."""

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

    def heard(self, handler: Any) -> None:
        """A request has come over it."""
        if (timer := self._silent.pop(handler, None)) is not None:
            timer.cancel()

    def connection_lost(self, handler: Any, exc: BaseException | None = None) -> None:
        super().connection_lost(handler, exc)
        self._open -= 1
        self.heard(handler)


def _most_connections(configured: int) -> int:
    """As many as leave a quarter of the files that the system allows: who has none left cannot
    speak to Consul any more."""
    try:
        import resource
    except ImportError:  # not a Unix
        return configured
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return configured if files == resource.RLIM_INFINITY else min(configured, files * 3 // 4)


def _turn_away(transport: asyncio.Transport) -> None:
    transport.write(b"HTTP/1.1 503 Busy\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
    transport.close()


class _Call:
    """The reply of a call, or nothing of a cast, from the thread that executes it."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self.reply: asyncio.Future[bytes] = loop.create_future()

    def heartbeat(self) -> None:
        """Nobody watches it."""

    def finish(self, body: bytes) -> None:
        with contextlib.suppress(RuntimeError):  # the server was stopped
            self._loop.call_soon_threadsafe(self._finish, body)

    def _finish(self, body: bytes) -> None:
        if not self.reply.done():
            self.reply.set_result(body)


class _WatchedCall:
    """Heartbeats and the reply of a call, from the threads that execute and watch it."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self.pieces: asyncio.Queue[bytes] = asyncio.Queue()

    def heartbeat(self) -> None:
        self.finish(HEARTBEAT)

    def finish(self, body: bytes) -> None:
        with contextlib.suppress(RuntimeError):  # the server was stopped
            self._loop.call_soon_threadsafe(self.pieces.put_nowait, body)


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


def _closing(status: int, text: str) -> web.Response:
    """The last answer of a connection: whatever else was sent over it is not read."""
    response = web.Response(status=status, text=f"{text}\n")
    response.force_close()
    return response


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
        except OSError as error:
            failure = error
            sock.close()
        else:
            close_after_fork(sock)
            return sock
    where = f"{address}, port {first} to {last}" if ports else address
    raise OSError(f"cannot listen on {where}: {failure}")
