"""Send what `requests` asks of a service's name to a host that serves it; needs the extra
``requests``.

    session = requests.Session()
    session.mount("http://web.service.consul", MatchmakerAdapter(mm))
    session.get("http://web.service.consul/orders/7")
"""

from __future__ import annotations

import copy
import ssl
import weakref
from collections.abc import Callable
from typing import Any
from urllib.parse import urlsplit

from ..calls import ATTEMPTS, Attempt, checked_attempts
from ..errors import ConfigurationError, MatchmakerError, TimedOut
from ..matchmaker import Matchmaker
from ..model import Host, Snapshot
from .extras import extra
from .http_rules import FAILED_STATUSES, checked_suffix, may_repeat, topic_of
from .tracing import name_host

with extra("requests", "requests 2.32.3"):
    from requests import PreparedRequest, Response
    from requests.adapters import HTTPAdapter
    from requests.exceptions import (
        ChunkedEncodingError,
        ConnectionError,
        ConnectTimeout,
        InvalidProxyURL,
        InvalidURL,
        ProxyError,
        RequestException,
        Timeout,
        UnrewindableBodyError,
    )
    from requests.structures import CaseInsensitiveDict
    from requests.utils import rewind_body
    from urllib3.exceptions import (
        ClosedPoolError,
        MaxRetryError,
        NewConnectionError,
        SSLError,
    )
    from urllib3.util.ssl_match_hostname import CertificateError

    if not hasattr(HTTPAdapter, "build_connection_pool_key_attributes"):
        raise ImportError("this release of requests lets no adapter choose its host")

FAILURES = (
    ConnectionError,
    Timeout,
    ChunkedEncodingError,  # the body breaks off
    InvalidURL,  # of the host's address
)
OF_PROXIES = (ProxyError, InvalidProxyURL)
POOLS = 100
"""The connections of so many hosts are kept: those of others are closed, least recently used first.
requests' own 10 would close connections at each request to a service of more hosts."""
HOST = "_consul_matchmaker_host"
"""The attribute of a copied request that says where it goes."""


class MatchmakerAdapter(HTTPAdapter):
    """Mounted for ``http://``, ``https://``, or the URL of one service: requests to a name of a
    service go to one of its hosts, and elsewhere when that one fails.  Thread-safe.  Other schemes
    do not work: of ``consul://`` requests leaves out the params, and follows no relative redirect.

    The URL's host is the topic and *suffix* (None: ``.service.consul``, with the domain of the
    settings); any other URL goes where it always went.  A port in the URL is sent in the Host
    header, and chooses nothing: each host has its own.  Responses, history, cookies and redirects
    have the name; TLS verifies it.

    A host fails by an error of the connection, a timeout, or status 502, 503 or 504.  Up to
    *attempts* hosts are asked, within the topic's retry budget, if twice is as once (GET, HEAD,
    OPTIONS, TRACE, PUT, DELETE) and the body can be sent again, or if nothing was sent.  Then the
    last answer is returned, or the last failure raised, as requests does.  Without ``stream=True``
    the body is read here: an answer that breaks off is a failure too, and `Response.elapsed`
    includes its body.  Each attempt has the request's *timeout*.

    No host for the topic, or no Consul, is a ``requests.ConnectionError``, caused by the
    MatchmakerError.  Proxies, also those of the environment, are passed by: a name of a service
    says an address of this network.  With *via_proxy* the proxy that requests chooses, if any, is
    asked to pass the request to the host.

    Connections to a host that left its topic are kept until the topic's next request; what runs on
    one ends first.  `close` closes connections, and never *matchmaker*.
    """

    def __init__(
        self,
        matchmaker: Matchmaker,
        *,
        suffix: str | None = None,
        attempts: int = ATTEMPTS,
        via_proxy: bool = False,
        pool_connections: int = POOLS,
        pool_maxsize: int = 10,
        pool_block: bool = False,
    ) -> None:
        """*pool_...*: as of `requests.adapters.HTTPAdapter`.  Raises ConfigurationError."""
        if not isinstance(matchmaker, Matchmaker):
            raise ConfigurationError("MatchmakerAdapter takes a Matchmaker, and no aio.Matchmaker")
        self._matchmaker = matchmaker
        self._suffix = checked_suffix(suffix, matchmaker.settings)
        self._attempts = checked_attempts(attempts)
        self._via_proxy = via_proxy
        self._seen: dict[str, Snapshot] = {}
        super().__init__(pool_connections, pool_maxsize, pool_block=pool_block)

    def send(
        self,
        request: PreparedRequest,
        stream: bool = False,
        timeout: Any = None,
        verify: Any = True,
        cert: Any = None,
        proxies: Any = None,
    ) -> Response:
        """What requests calls.  Raises what `HTTPAdapter.send` raises."""
        url = urlsplit(str(request.url))
        topic = topic_of(url.hostname or "", self._suffix)
        if topic is None or url.scheme not in ("http", "https"):
            return super().send(request, stream, timeout, verify, cert, proxies)
        how = stream, timeout, verify, cert, proxies if self._via_proxy else None
        outcome: Response | RequestException | None = None
        try:
            tries = self._matchmaker.attempts(topic, attempts=self._attempts)
            while True:
                attempt = tries.begin(self._hosts(topic, _seconds_to_connect(timeout)))
                if isinstance(outcome, Response):
                    outcome.close()
                outcome = self._outcome(attempt, request, *how)
                if not (_may_repeat(request, outcome) and tries.may_retry()):
                    break
        except MatchmakerError as error:
            if outcome is None:
                raise _translated(error, request) from error
        if isinstance(outcome, Response):
            return outcome
        try:
            raise outcome
        finally:
            del outcome  # which refers to this frame

    def _outcome(
        self, attempt: Attempt, request: PreparedRequest, stream: bool, *how: Any
    ) -> Response | RequestException:
        """The answer of the attempt's host, or its failure; either is judged."""
        name_host(attempt.host)
        try:
            answer = super().send(_to(attempt.host, request), stream, *how)
            answer.request = request
            if not stream:
                _ = answer.content
        except FAILURES as error:
            error.request = request
            # Nor does it say anything of the host that we have closed the pool.
            if not isinstance(error, OF_PROXIES) and not isinstance(
                _reason(error), ClosedPoolError
            ):
                attempt.judge(is_good=False)
            attempt.end()
            return error
        except BaseException:
            attempt.end()
            raise
        attempt.judge(is_good=answer.status_code not in FAILED_STATUSES)
        if stream:
            _when_released(answer, attempt.end)
        else:
            attempt.end()
        return answer

    def build_connection_pool_key_attributes(
        self, request: PreparedRequest, verify: Any, cert: Any = None
    ) -> Any:
        """What requests calls: where to connect, and which name TLS has to verify."""
        where: Any
        how: Any
        where, how = super().build_connection_pool_key_attributes(request, verify, cert)
        host: Host | None = getattr(request, HOST, None)
        if host is not None:
            if where["scheme"] == "https":
                how = {**how, "server_hostname": where["host"].rstrip(".")}
            where = {**where, "host": host.address, "port": host.port}
        return where, how

    def request_url(self, request: PreparedRequest, proxies: Any) -> str:
        """What requests calls: the target of the request, to a proxy with the host."""
        target = str(super().request_url(request, proxies))
        host: Host | None = getattr(request, HOST, None)
        if host is None or target.startswith("/"):
            return target
        return urlsplit(target)._replace(netloc=str(host)).geturl()

    def __getstate__(self) -> dict[str, Any]:
        raise TypeError("a MatchmakerAdapter has no copy: mount a new one on the copied session")

    def _hosts(self, topic: str, timeout_seconds: float | None) -> Snapshot:
        """The hosts of *topic*; the idle connections to those that have left it are closed."""
        found = self._matchmaker.hosts(topic, timeout_seconds=timeout_seconds)
        before = self._seen.get(topic)
        if before is not found:
            if found:
                self._seen[topic] = found
            else:  # so a name that nobody serves leaves nothing here
                self._seen.pop(topic, None)
            if before is not None and (left := set(before.hosts) - set(found.hosts)):
                gone = {(host.address, host.port) for host in left}
                pools = self.poolmanager.pools
                for key in pools.keys():  # noqa: SIM118  # it cannot be iterated
                    if (key.key_host, key.key_port) in gone:
                        pools.pop(key, None)  # who uses one still has it
        return found


def _to(host: Host, request: PreparedRequest) -> PreparedRequest:
    """A copy of *request* for *host*, of the same URL; it says in its Host header what the original
    would have said."""
    sent = copy.copy(request)
    sent.headers = CaseInsensitiveDict(request.headers)
    sent.headers.setdefault("Host", urlsplit(str(request.url)).netloc.rpartition("@")[2])
    setattr(sent, HOST, host)
    return sent


def _may_repeat(request: PreparedRequest, outcome: Response | RequestException) -> bool:
    """Whether *request*, of which *outcome* came, may and can go to another host."""
    if isinstance(outcome, Response):
        if outcome.status_code not in FAILED_STATUSES:
            return False
        was_sent = True
    elif isinstance(outcome, OF_PROXIES):
        return False
    else:
        was_sent = _was_sent(outcome)
    is_kept = not was_sent or _is_rewound(request)
    return may_repeat(str(request.method), was_sent=was_sent, is_kept=is_kept)


def _was_sent(error: RequestException) -> bool:
    """False where the host surely got nothing of the request."""
    reason = _reason(error)
    if isinstance(reason, SSLError) and reason.args:
        return not isinstance(reason.args[0], (ssl.SSLCertVerificationError, CertificateError))
    return not isinstance(error, (ConnectTimeout, InvalidURL)) and not isinstance(
        reason, (NewConnectionError, ClosedPoolError)
    )


def _reason(error: RequestException) -> object:
    """What urllib3 raised, in place of which requests raised *error*."""
    cause = error.args[0] if error.args else None
    return cause.reason if isinstance(cause, MaxRetryError) else cause


def _is_rewound(request: PreparedRequest) -> bool:
    """Whether the body is there to be sent once more: a file is set back to where it was."""
    if request.body is None or isinstance(request.body, (bytes, str)):
        return True
    try:
        rewind_body(request)
    except UnrewindableBodyError:
        return False
    return True


def _when_released(answer: Response, end: Callable[[], None]) -> None:
    """Have *end* called when the connection of *answer* is given back, by reading all of the body,
    by closing or by forgetting it."""
    raw: Any = answer.raw
    weakref.finalize(raw, end).atexit = False
    release = type(raw).release_conn
    this = weakref.ref(raw)  # no cycle: who forgets it gives back its connection at once

    def release_conn() -> None:
        end()
        held = this()
        if held is not None:
            release(held)

    raw.release_conn = release_conn


def _seconds_to_connect(timeout: Any) -> float | None:
    """How long *timeout*, as of requests, lets a connection take; None: no limit."""
    if isinstance(timeout, tuple):
        timeout = timeout[0] if timeout else None
    seconds = getattr(timeout, "connect_timeout", timeout)
    return seconds if isinstance(seconds, (int, float)) else None


def _translated(error: MatchmakerError, request: PreparedRequest) -> RequestException:
    """What users of requests catch where no host could be found."""
    kind: type[RequestException] = ConnectionError
    if isinstance(error, TimedOut):
        kind = ConnectTimeout
    elif isinstance(error, ConfigurationError):
        kind = InvalidURL
    return kind(str(error), request=request)
