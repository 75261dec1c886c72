"""Transports for httpx: the host of a URL may be a topic, as in ``http://web.service.consul/``.

    with httpx.Client(transport=MatchmakerTransport(mm)) as client:
        client.get("http://web.service.consul/users")
    # or beside a transport of one's own, or the proxies of the environment:
    httpx.Client(mounts={"all://*.service.consul": MatchmakerTransport(mm)})
    httpx.AsyncClient(transport=AsyncMatchmakerTransport(amm))  # of an aio.Matchmaker

Needs the extra ``httpx``.  No thread is started; on an event loop nothing blocks it.
"""

from __future__ import annotations

import threading
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from functools import partial
from typing import Any, Generic, NoReturn, TypeVar

from .. import aio
from ..calls import ATTEMPTS, Attempt, checked_attempts
from ..errors import ConfigurationError, MatchmakerError, TimedOut
from ..fork import call_after_fork
from ..matchmaker import Matchmaker
from ..model import Host, Snapshot
from ..texts import SHOWN_LENGTH, escaped_word
from .extras import extra
from .http_rules import FAILED_STATUSES, checked_suffix, may_repeat, topic_of
from .tracing import name_host

with extra("httpx"):
    import httpx

T = TypeVar("T")

HOST_FAILURES = (httpx.NetworkError, httpx.RemoteProtocolError, httpx.TimeoutException)
"""After these another host may do better; any other exception is for the caller at once."""
ARE_URLS_KNOWN = list(vars(httpx.URL("http://a"))) == ["_uri_reference"] and hasattr(
    httpx.URL("http://a")._uri_reference, "_replace"
)
"""Whether a URL of this release is what it is of 0.25 to 0.28, which is no public word."""
NOT_SENT = (httpx.ConnectError, httpx.ConnectTimeout, httpx.PoolTimeout)


class MatchmakerTransport(httpx.BaseTransport):
    """Sends a request for a topic to one of its hosts, and any other as it is.  Thread-safe.

    The host of the URL is a topic where it ends with *suffix* (``.service.consul``; in full,
    ``.service.`` and the setting ``domain``).  A port in the URL is not used: Consul knows it.  The
    Host header and the name that TLS verifies stay those of the URL.

    A host that cannot be reached, breaks the connection, takes longer than the client's timeouts,
    or answers 502, 503 or 504 has failed.  The request then goes to another one, up to *attempts*
    times in all and within the topic's retry budget, if it was not sent yet, or if its method is
    idempotent; not if its body was read from an iterator or a file.  The last answer or exception
    is the caller's.  After the head of an answer nothing is repeated.  Where no host can be found
    the client raises ConnectError (ConnectTimeout if Consul took longer than the connect timeout),
    with the exception of this library as its cause.

    *transport* makes a transport, one for each host of a topic and one for all ordinary URLs, for
    what `httpx.HTTPTransport` does not do by default:
    ``lambda: httpx.HTTPTransport(verify=context, http2=True)``.  One that is shared by several
    names would let a connection which was verified for one of them serve another.

    Closing it closes the connections, and not the matchmaker.  Those to a host that left the topic
    are closed by the next request for the topic, but what is being answered is answered.
    """

    def __init__(
        self,
        matchmaker: Matchmaker,
        *,
        suffix: str | None = None,
        attempts: int = ATTEMPTS,
        transport: Callable[[], httpx.BaseTransport] | None = None,
    ) -> None:
        """Raises ConfigurationError."""
        if not isinstance(matchmaker, Matchmaker):
            raise ConfigurationError(
                "MatchmakerTransport takes a Matchmaker; AsyncMatchmakerTransport an aio.Matchmaker"
            )
        if transport is None:
            context = httpx.create_ssl_context()  # takes too long to be made for each host
            transport = partial(httpx.HTTPTransport, verify=context)
        self._matchmaker = matchmaker
        self._calls = _Calls(matchmaker, suffix, attempts, transport)
        self._ordinary = transport()

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        call = self._calls.call_of(request)
        if call is None:
            return self._ordinary.handle_request(request)
        while True:
            use = self._begin(call)
            try:
                name_host(use.host)
                response = use.transport.handle_request(call.request_to(use))
                if not call.is_repeated_after_answer(use.attempt, response.status_code):
                    return self._handed_out(response, use)
                response.close()
            except BaseException as error:
                if not call.is_repeated_after_error(use.attempt, error):
                    raise
            finally:
                if not use.is_handed_out:
                    _close(use.end())

    def _begin(self, call: _Call) -> _Use[httpx.BaseTransport]:
        try:
            hosts = self._matchmaker.hosts(call.topic, timeout_seconds=call.seconds_to_connect)
            _close(self._calls.left(hosts))
            return self._calls.begin(call, hosts)
        except MatchmakerError as error:
            call.raise_that_nobody_is_left(error)

    def _handed_out(
        self, response: httpx.Response, use: _Use[httpx.BaseTransport]
    ) -> httpx.Response:
        if not response.is_closed:  # else it has been read already
            assert isinstance(response.stream, httpx.SyncByteStream)
            response.stream = _Answer(response.stream, use)
            use.is_handed_out = True
        return response

    def close(self) -> None:
        _close([*self._calls.forget(), self._ordinary])


class AsyncMatchmakerTransport(httpx.AsyncBaseTransport):
    """As `MatchmakerTransport`, for `httpx.AsyncClient` on asyncio; for one event loop."""

    def __init__(
        self,
        matchmaker: aio.Matchmaker,
        *,
        suffix: str | None = None,
        attempts: int = ATTEMPTS,
        transport: Callable[[], httpx.AsyncBaseTransport] | None = None,
    ) -> None:
        """Raises ConfigurationError."""
        if not isinstance(matchmaker, aio.Matchmaker):
            raise ConfigurationError(
                "AsyncMatchmakerTransport takes an aio.Matchmaker; MatchmakerTransport a Matchmaker"
            )
        if transport is None:
            context = httpx.create_ssl_context()
            transport = partial(httpx.AsyncHTTPTransport, verify=context)
        self._matchmaker = matchmaker
        self._calls = _Calls(matchmaker.sync, suffix, attempts, transport)
        self._ordinary = transport()

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        call = self._calls.call_of(request)
        if call is None:
            return await self._ordinary.handle_async_request(request)
        while True:
            use = await self._begin(call)
            try:
                name_host(use.host)
                response = await use.transport.handle_async_request(call.request_to(use))
                if not call.is_repeated_after_answer(use.attempt, response.status_code):
                    return self._handed_out(response, use)
                await response.aclose()
            except BaseException as error:
                if not call.is_repeated_after_error(use.attempt, error):
                    raise
            finally:
                if not use.is_handed_out:
                    await _aclose(use.end())

    async def _begin(self, call: _Call) -> _Use[httpx.AsyncBaseTransport]:
        try:
            hosts = await self._matchmaker.hosts(
                call.topic, timeout_seconds=call.seconds_to_connect
            )
            await _aclose(self._calls.left(hosts))
            return self._calls.begin(call, hosts)
        except MatchmakerError as error:
            call.raise_that_nobody_is_left(error)

    def _handed_out(
        self, response: httpx.Response, use: _Use[httpx.AsyncBaseTransport]
    ) -> httpx.Response:
        if not response.is_closed:
            assert isinstance(response.stream, httpx.AsyncByteStream)
            response.stream = _AwaitedAnswer(response.stream, use)
            use.is_handed_out = True
        return response

    async def aclose(self) -> None:
        await _aclose([*self._calls.forget(), self._ordinary])


def _close(transports: Sequence[httpx.BaseTransport]) -> None:
    for transport in transports:
        transport.close()


async def _aclose(transports: Sequence[httpx.AsyncBaseTransport]) -> None:
    for transport in transports:
        await transport.aclose()


class _Call:
    """One request for a topic: what was made of it, and whether another host gets it.

    Sends nothing itself.
    """

    def __init__(
        self, matchmaker: Matchmaker, topic: str, request: httpx.Request, attempts: int
    ) -> None:
        self.topic = topic
        self._request = request
        self.tries = matchmaker.attempts(topic, attempts=attempts)
        self._body = None if isinstance(request.stream, httpx.ByteStream) else _Body(request.stream)
        self._failure: BaseException | None = None

    @property
    def seconds_to_connect(self) -> float | None:
        """The client's timeout for it, which asking Consul has to keep as well."""
        seconds: float | None = self._request.extensions.get("timeout", {}).get("connect")
        return seconds

    def request_to(self, use: _Use[Any]) -> httpx.Request:
        """A copy that goes to the host of *use*; what the caller sees of its own stays as it was.

        Raises ConnectError for a host that no URL can have.
        """
        request = self._request
        if use.host.port is None:
            raise self._no_url_of(use.host)
        try:
            url = use.url_for(request.url)
        except httpx.InvalidURL as error:
            raise self._no_url_of(use.host) from error
        name = request.url.raw_host.decode("ascii").rstrip(".")
        return httpx.Request(
            request.method,
            url,
            headers=request.headers,
            stream=self._body or request.stream,
            extensions={"sni_hostname": name, **request.extensions},
        )

    def _no_url_of(self, host: Host) -> httpx.ConnectError:
        shown = escaped_word(str(host)[:SHOWN_LENGTH])
        return httpx.ConnectError(f"{self.topic}: {shown} is no host of a URL")

    def is_repeated_after_answer(self, attempt: Attempt, status: int) -> bool:
        """Judge the host by the status of its answer; say whether another one is asked."""
        is_good = status not in FAILED_STATUSES
        attempt.judge(is_good=is_good)
        return not is_good and self._is_repeated(was_sent=True)

    def is_repeated_after_error(self, attempt: Attempt, error: BaseException) -> bool:
        """Judge the host by what was raised; say whether another one is asked."""
        if not isinstance(error, HOST_FAILURES) or (self._body and self._body.has_failed):
            return False
        if not isinstance(error, httpx.PoolTimeout):  # that says nothing of the host
            attempt.judge(is_good=False)
        self._failure = error
        return self._is_repeated(was_sent=not isinstance(error, NOT_SENT))

    def _is_repeated(self, *, was_sent: bool) -> bool:
        is_kept = self._body is None or not self._body.is_begun
        is_allowed = may_repeat(self._request.method, was_sent=was_sent, is_kept=is_kept)
        return is_allowed and self.tries.may_retry()

    def raise_that_nobody_is_left(self, error: MatchmakerError) -> NoReturn:
        """Raise what the host before failed with, if there was one, as that says more."""
        if self._failure is not None:
            raise self._failure from self._failure.__cause__
        kind = httpx.ConnectTimeout if isinstance(error, TimedOut) else httpx.ConnectError
        raise kind(f"{self.topic}: {error}") from error


class _Body(httpx.SyncByteStream, httpx.AsyncByteStream):
    """The body of a request which can be read once; knows whether it was, and if that failed."""

    def __init__(self, stream: httpx.SyncByteStream | httpx.AsyncByteStream) -> None:
        self._stream = stream
        self.is_begun = self.has_failed = False

    def __iter__(self) -> Iterator[bytes]:
        assert isinstance(self._stream, httpx.SyncByteStream)
        self.is_begun = True
        try:
            yield from self._stream
        except Exception:
            self.has_failed = True
            raise

    async def __aiter__(self) -> AsyncIterator[bytes]:
        assert isinstance(self._stream, httpx.AsyncByteStream)
        self.is_begun = True
        try:
            async for part in self._stream:
                yield part
        except Exception:
            self.has_failed = True
            raise


class _Answer(httpx.SyncByteStream):
    """The body of an answer; once it is read or closed the host is not busy any more."""

    def __init__(self, stream: httpx.SyncByteStream, use: _Use[httpx.BaseTransport]) -> None:
        self._stream, self._use = stream, use

    def __iter__(self) -> Iterator[bytes]:
        try:
            yield from self._stream
        except BaseException:  # also where its reader leaves it
            self.close()
            raise
        self.close()

    def close(self) -> None:
        try:
            self._stream.close()
        finally:
            _close(self._use.end())


class _AwaitedAnswer(httpx.AsyncByteStream):
    """As `_Answer`."""

    def __init__(self, stream: httpx.AsyncByteStream, use: _Use[httpx.AsyncBaseTransport]) -> None:
        self._stream, self._use = stream, use

    async def __aiter__(self) -> AsyncIterator[bytes]:
        try:
            async for part in self._stream:
                yield part
        except BaseException:
            await self.aclose()
            raise
        await self.aclose()

    async def aclose(self) -> None:
        try:
            await self._stream.aclose()
        finally:
            await _aclose(self._use.end())


class _Calls(Generic[T]):
    """The calls of one client, and the transport to each host that they use.  Thread-safe.

    A host has a transport of its own for each topic: so its connections can be closed when it
    leaves, and one that TLS verified for the name of one topic never serves another.  Closes
    nothing itself: its methods return what is to be closed.
    """

    def __init__(
        self, matchmaker: Matchmaker, suffix: str | None, attempts: int, make: Callable[[], T]
    ) -> None:
        if not callable(make):
            raise ConfigurationError(
                "transport is a function that makes one: lambda: httpx.HTTPTransport(http2=True)"
            )
        self._matchmaker = matchmaker
        self._suffix = checked_suffix(suffix, matchmaker.settings)
        self._attempts = checked_attempts(attempts)
        self._make = make
        self.after_fork()
        call_after_fork(self)

    def after_fork(self) -> None:
        """In a forked child: its parent's connections are not its own."""
        self._lock = threading.Lock()
        self._hosts: dict[str, tuple[Host, ...]] = {}
        self._pools: dict[str, dict[Host, _Pool[T]]] = {}

    def call_of(self, request: httpx.Request) -> _Call | None:
        """None for an ordinary URL."""
        topic = topic_of(request.url.host, self._suffix)
        if topic is None:
            return None
        return _Call(self._matchmaker, topic, request, self._attempts)

    def begin(self, call: _Call, snapshot: Snapshot) -> _Use[T]:
        """Use a host of *snapshot* for *call*.  Raises NoLiveHosts."""
        attempt = call.tries.begin(snapshot)
        try:
            with self._lock:
                pools = self._pools.setdefault(call.topic, {})
                pool = pools.get(attempt.host)
                if pool is None:
                    pool = pools[attempt.host] = _Pool(attempt.host, self._make())
                pool.users += 1
        except BaseException:
            attempt.end()
            raise
        return _Use(self, attempt, pool)

    def left(self, snapshot: Snapshot) -> list[T]:
        """The transports to hosts that are not in *snapshot* any more, and not in use."""
        topic, hosts = snapshot.topic, snapshot.hosts
        known = self._hosts.get(topic, ())
        if known is hosts or known == hosts:  # so a name that nobody serves leaves nothing here
            return []
        with self._lock:
            pools = self._pools.get(topic, {})
            gone = [pools.pop(host) for host in pools.keys() - set(hosts)]
            self._hosts[topic] = hosts
            for pool in gone:
                pool.has_left = True
            return [pool.transport for pool in gone if not pool.users]

    def end(self, pool: _Pool[T]) -> list[T]:
        """One use of *pool* is over."""
        with self._lock:
            pool.users -= 1
            return [pool.transport] if pool.has_left and not pool.users else []

    def forget(self) -> list[T]:
        """Every transport there is."""
        with self._lock:
            found = [pool.transport for pools in self._pools.values() for pool in pools.values()]
            self._hosts, self._pools = {}, {}
        return found


class _Pool(Generic[T]):
    """The transport to one host, and how many use it."""

    __slots__ = ("_places", "has_left", "host", "transport", "users")

    def __init__(self, host: Host, transport: T) -> None:
        self.host = host
        self.transport = transport
        self.users = 0
        self.has_left = False
        self._places: dict[str, dict[str, Any]] = {}
        """What a URL of each scheme has for this host."""

    def url_for(self, url: httpx.URL) -> httpx.URL:
        """*url* with this host.  Raises httpx.InvalidURL."""
        place = self._places.get(url.scheme)
        if place is None:
            moved = url.copy_with(host=self.host.address, port=self.host.port)
            if ARE_URLS_KNOWN:
                parts = moved._uri_reference
                self._places[url.scheme] = {"host": parts.host, "port": parts.port}
            return moved
        # As copy_with, which takes all of it apart and checks it: half of what we cost.
        moved = object.__new__(httpx.URL)
        moved._uri_reference = url._uri_reference._replace(**place)
        return moved


class _Use(Generic[T]):
    """One attempt over one transport."""

    __slots__ = ("_calls", "_is_over", "_pool", "attempt", "is_handed_out")

    def __init__(self, calls: _Calls[T], attempt: Attempt, pool: _Pool[T]) -> None:
        self._calls, self.attempt, self._pool = calls, attempt, pool
        self._is_over = False
        self.is_handed_out = False
        """Whether who reads the answer's body ends it."""

    @property
    def host(self) -> Host:
        return self.attempt.host

    @property
    def transport(self) -> T:
        return self._pool.transport

    def url_for(self, url: httpx.URL) -> httpx.URL:
        return self._pool.url_for(url)

    def end(self) -> list[T]:
        """The host is not busy with it any more; what is to be closed now.  Idempotent."""
        if self._is_over:
            return []
        self._is_over = True
        self.attempt.end()
        return self._calls.end(self._pool)
