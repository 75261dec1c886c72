"""Send what `aiohttp` asks of a service's name to a host that serves it; needs the extra
``aiohttp``.

    async with aio.Matchmaker.from_env() as amm:
        middlewares = (matchmaker_middleware(amm),)
        async with aiohttp.ClientSession(middlewares=middlewares) as session:
            await session.get("http://web.service.consul/orders/7")
"""

from __future__ import annotations

import asyncio
import copy
import weakref
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, cast

from .. import aio
from ..calls import ATTEMPTS, Attempt, checked_attempts
from ..errors import ConfigurationError, MatchmakerError
from ..model import Host
from .extras import extra
from .http_rules import FAILED_STATUSES, checked_suffix, may_repeat, topic_of
from .tracing import name_host

with extra("aiohttp", "aiohttp 3.12, the first with client middlewares,"):
    from aiohttp import (
        BytesPayload,
        ClientConnectionError,
        ClientConnectorError,
        ClientHandlerType,
        ClientHttpProxyError,
        ClientMiddlewareType,
        ClientOSError,
        ClientProxyConnectionError,
        ClientRequest,
        ClientResponse,
        ClientResponseError,
        ConnectionTimeoutError,
        InvalidURL,
        RequestInfo,
        ServerDisconnectedError,
        ServerFingerprintMismatch,
    )
    from aiohttp.client_reqrep import ConnectionKey
    from multidict import CIMultiDict
    from yarl import URL

FAILURES = (
    ClientConnectionError,
    ClientResponseError,  # of an answer that is no HTTP
    InvalidURL,  # of the host's address
    OSError,
    asyncio.TimeoutError,  # which is none of OSError in Python 3.10
)
NOT_SENT = (ClientConnectorError, ConnectionTimeoutError, InvalidURL, ServerFingerprintMismatch)
"""The host surely got nothing of the request."""
OF_PROXIES = (ClientHttpProxyError, ClientProxyConnectionError)
REPEATED_BY_AIOHTTP = (ClientOSError, ServerDisconnectedError)
IS_NAME_IN_KEY = "server_hostname" in ConnectionKey._fields
"""Whether aiohttp keeps TLS connections of different names apart; since 3.14."""


def matchmaker_middleware(
    matchmaker: aio.Matchmaker, *, suffix: str | None = None, attempts: int = ATTEMPTS
) -> ClientMiddlewareType:
    """A middleware for ``aiohttp.ClientSession(middlewares=...)``, the last of several: requests to
    a name of a service go to one of its hosts, and elsewhere when that one fails.

    The URL's host is the topic and *suffix* (None: ``.service.consul``, with the domain of the
    settings); any other URL goes where it always went.  A port in the URL is sent in the Host
    header, and chooses nothing: each host has its own.  Responses, history, cookies, redirects and
    `raise_for_status` have the name; TLS verifies it.  Of a trace, what is sent to one host
    (``on_request_headers_sent``, ``on_request_chunk_sent``) has the URL of that host.

    A host fails by an error of the connection, a timeout, or status 502, 503 or 504.  Up to
    *attempts* hosts are asked, within the topic's retry budget, if twice is as once (GET, HEAD,
    OPTIONS, TRACE, PUT, DELETE) and the body can be sent again, or if nothing was sent.  Then the
    last answer is returned, or the last failure raised, as aiohttp does; aiohttp's own repetition
    is left out.  ``ClientTimeout(total=...)`` is for all attempts: what lets a host that hangs fail
    early enough for another one is ``sock_connect`` and ``sock_read``.  An answer that breaks off
    in its body raises where it is read.

    No host for the topic, or no Consul, is an ``aiohttp.ClientConnectionError``, caused by the
    MatchmakerError.  Where the session uses a proxy (``proxy=``, or ``trust_env=True``), that is
    asked to pass the request to the host.  The session closes its connections, those to hosts that
    left the topic as soon as they are idle for its connector's ``keepalive_timeout``.  Raises
    ConfigurationError.
    """
    if not isinstance(matchmaker, aio.Matchmaker):
        raise ConfigurationError("matchmaker_middleware takes an aio.Matchmaker")
    ending = checked_suffix(suffix, matchmaker.settings)
    checked_attempts(attempts)

    async def middleware(request: ClientRequest, handler: ClientHandlerType) -> ClientResponse:
        topic = topic_of(request.url.raw_host or "", ending)
        if topic is None:
            return await handler(request)
        _raise_if_repeated(request)
        call = _Call(request, handler)
        outcome: ClientResponse | Exception | None = None
        try:
            tries = matchmaker.sync.attempts(topic, attempts=attempts)
            while True:
                attempt = tries.begin(await matchmaker.hosts(topic))
                if outcome is not None:
                    await call.clear(outcome)
                outcome = await call.outcome(attempt)
                if not (call.may_repeat(outcome) and tries.may_retry()):
                    break
        except MatchmakerError as error:
            if outcome is None:
                raise _translated(error, request) from error
        if isinstance(outcome, ClientResponse):
            return outcome
        try:
            _remember(request, outcome)
            raise outcome
        finally:
            del outcome  # which refers to this frame

    return middleware


class _Call:
    """One request, as often as it is sent."""

    def __init__(self, request: ClientRequest, handler: ClientHandlerType) -> None:
        self._request, self._handler = request, handler
        self._named = request.url
        self._info = request.request_info
        if request.is_ssl():
            name = (request.url.raw_host or "").rstrip(".")
            request.server_hostname = request.server_hostname or name
            if not IS_NAME_IN_KEY and request.proxy is None:
                # Without a proxy they are sent to nobody, but are a part of the key.
                request.proxy_headers = CIMultiDict({"Host": request.server_hostname})

    async def outcome(self, attempt: Attempt) -> ClientResponse | Exception:
        """The answer of the attempt's host, or its failure; either is judged.  Raises what is no
        failure of a host."""
        request = self._request
        response_class = request.response_class
        name_host(attempt.host)
        try:
            request.url = _at(attempt.host, self._named)
            request.response_class = cast(
                "type[ClientResponse]", _with_info(response_class, self._info)
            )
            answer = await self._handler(request)
        except FAILURES as error:
            if _is_of_host(error):
                attempt.judge(is_good=False)
            attempt.end()
            return error
        except asyncio.CancelledError:
            if _is_over(request):  # aiohttp's total timeout, while it connects
                attempt.judge(is_good=False)
            attempt.end()
            raise
        except BaseException:
            attempt.end()
            raise
        finally:
            request.url, request.response_class = self._named, response_class
        attempt.judge(is_good=answer.status not in FAILED_STATUSES)
        if answer.connection is None:  # all of it was read
            attempt.end()
        else:
            answer.connection.add_callback(attempt.end)
        return answer

    def may_repeat(self, outcome: ClientResponse | Exception) -> bool:
        """Whether the request, of which *outcome* came, may and can go to another host."""
        request = self._request
        if _is_over(request):
            return False
        if isinstance(outcome, ClientResponse):
            if outcome.status not in FAILED_STATUSES:
                return False
            was_sent = True
        elif not _is_of_host(outcome):
            return False
        else:
            was_sent = not isinstance(outcome, NOT_SENT)
        is_kept = not was_sent or _is_kept(request.body)
        return may_repeat(request.method, was_sent=was_sent, is_kept=is_kept)

    async def clear(self, outcome: ClientResponse | Exception) -> None:
        """Have done with *outcome*, before the request is sent again."""
        if isinstance(outcome, ClientResponse):
            if self._request.body:  # which may not have been sent to its end
                outcome.close()
            else:
                outcome.release()
        await self._request.close()  # no task writes its body any more
        self._request.update_expect_continue()  # another host has to say 100 as well


@dataclass(frozen=True)
class _Failure:
    """What the last request of a task raised."""

    timer: object
    request: weakref.ref[ClientRequest]
    error: Exception


_last_failure: ContextVar[_Failure | None] = ContextVar("consul_matchmaker_last_failure")


def _remember(request: ClientRequest, error: Exception) -> None:
    """Note that *error* is raised for *request*, if aiohttp would send that once more."""
    if isinstance(error, REPEATED_BY_AIOHTTP) and not isinstance(error, NOT_SENT):
        kept = copy.copy(error)  # without a traceback, which keeps everything alive
        _last_failure.set(_Failure(_timer(request), weakref.ref(request), kept))


def _raise_if_repeated(request: ClientRequest) -> None:
    """Raise what was raised before if *request* is aiohttp's own repetition: another request of the
    same call of the session, which has one timer."""
    last = _last_failure.get(None)
    if last is None:
        return
    timer = _timer(request)
    if timer is not None and timer is last.timer and last.request() is not request:
        raise last.error
    _last_failure.set(None)


def _timer(request: ClientRequest) -> Any:
    """What cancels the call of the session; no public attribute has it."""
    return getattr(request, "_timer", None)


def _is_over(request: ClientRequest) -> bool:
    """Whether the total timeout of the call has passed."""
    try:
        if hasattr(timer := _timer(request), "assert_timeout"):
            timer.assert_timeout()
    except asyncio.TimeoutError:
        return True
    return False


def _is_of_host(error: Exception) -> bool:
    """Whether *error* is a failure of the host, and none of a proxy or of this side: a bare
    ClientConnectionError is of a closed connector, or of what makes the body."""
    return not isinstance(error, OF_PROXIES) and type(error) is not ClientConnectionError


def _is_kept(body: Any) -> bool:
    """Whether *body* is there to be sent once more, as aiohttp says since 3.12.1."""
    if not body or isinstance(body, (bytes, tuple, BytesPayload)):
        return True
    return getattr(body, "consumed", True) is False


def _at(host: Host, url: URL) -> URL:
    """*url* with *host*'s address and port.  Raises InvalidURL for an address that is none."""
    try:
        return url.with_host(host.address).with_port(host.port)
    except ValueError as error:
        raise InvalidURL(str(host), str(error)) from error


def _with_info(
    response_class: type[ClientResponse], info: RequestInfo
) -> Callable[..., ClientResponse]:
    """*response_class*, whose responses say *info* of their request."""

    def response(*args: Any, **kwargs: Any) -> ClientResponse:
        return response_class(*args, **{**kwargs, "request_info": info})

    return response


def _translated(error: MatchmakerError, request: ClientRequest) -> Exception:
    """What users of aiohttp catch where no host could be found."""
    failure: Exception = ClientConnectionError(str(error))
    if isinstance(error, ConfigurationError):
        failure = InvalidURL(request.url, str(error))
    return failure
