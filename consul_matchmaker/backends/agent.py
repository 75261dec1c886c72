"""Speak HTTP to Consul agents: one exchange, its deadline, its token, and what its failure means.

Of the ``consul`` package only ``consul.std.HTTPClient`` is used, in what python-consul2 and
py-consul have in common: its addresses and its requests session, that is the transport.  Its
``Consul`` class is not: there the environment wins over explicit arguments, session TTLs below 10
are an assertion error, tokens are lost in transactions, and status codes become texts.

Connections of a process: one to the agent in use for each thread that asks at the same moment (at
rest that is one), and one more while a `poll` waits.  At most IDLE_CONNECTIONS are kept.
"""

from __future__ import annotations

import io
import json
import logging
import queue
import random
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from http.client import HTTPException, HTTPResponse
from http.cookiejar import DefaultCookiePolicy
from pathlib import Path
from typing import Any, cast

import consul.std
import requests
import requests.adapters
import urllib3
from urllib3.connection import HTTPConnection, HTTPSConnection
from urllib3.connectionpool import HTTPConnectionPool, HTTPSConnectionPool

from ..backoff import Backoff
from ..errors import ConfigurationError, Denied, TimedOut, Unavailable
from ..model import Host
from ..settings import Settings
from ..texts import SHOWN_LENGTH, escaped, without_secret
from .traffic import Traffic

logger = logging.getLogger(__name__)

CONNECT_TIMEOUT_SECONDS = 2.0
"""An agent is on this machine or near it; one lost SYN is sent again after 1 s (RFC 6298)."""
IDLE_CONNECTIONS = 10
"""Kept open to an agent, if so many were needed at once.  Consul refuses more than 200 from one IP
address, of all programs there together (fact C5)."""
MAX_ANSWER_BYTES = 64 * 1024 * 1024
"""More is no answer to a question of ours: 100,000 registrations are about 10 MB of keys."""
HOLD_SECONDS = 8.0
"""How much later than its wait a poll may come: Consul holds it for rpc_hold_timeout, 7 s, while
there is no leader (fact C8) ..."""
POLL_JITTER = 1 / 16
"""... and adds up to this share of the wait (fact C2)."""
SHORTEST_PAUSE_SECONDS = 0.001
"""Between two things done while an answer is waited for: a pause of 0 would not wait at all."""
LONGEST_EXAMINED = 10_000
"""Characters of an error's text that are searched for the token."""
FIRST_REPROBE_SECONDS = 1.0
MAX_REPROBE_SECONDS = 15.0

NO_PARAMETERS: Mapping[str, str] = {}

Meanwhile = Callable[[], float]
"""Something short to do while an answer is waited for; returns in how many seconds again."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What an agent said.  The status is 200, or one that the call was told to accept."""

    status: int
    body: bytes
    index: int
    """X-Consul-Index; 0 when it is missing or no number."""
    is_filtered: bool
    """Whether Consul (1.11 or later) says that ACLs removed something from the answer."""
    where: str
    """The exchange in words, for messages."""
    address: Host | None = None
    """The agent that answered."""
    said: str = ""
    """Beginning of the body, fit to be shown, where the status is not 200."""
    asked_at: float = 0.0
    """When the request that it answers was sent, by the agent's clock."""

    def json(self) -> Any:
        """The body, decoded; raises Unavailable when it is not JSON."""
        with suppress(ValueError, RecursionError):  # which would keep the body
            return json.loads(self.body)
        raise self.unexpected()

    def unexpected(self) -> Unavailable:
        """The error to raise when the body is not what Consul would say."""
        return Unavailable(
            f"{self.where}: the answer is not Consul's; is this the HTTP port of a Consul agent?"
        )


class Agent:
    """Consul's HTTP API at the configured addresses.  Thread-safe.

    A call goes to the address that worked last; one that cannot be reached is left alone for a
    while and the next in order takes over, so a dead agent costs one timeout, not one a call.  A
    call ends within ``request_timeout_seconds`` for each address it has to try (resolving a host
    name is not counted: prefer IP addresses).  Every call must be idempotent: one that meets a
    connection closed in the meantime is repeated silently.

    No connection is made before the first call.
    """

    def __init__(
        self,
        settings: Settings,
        *,
        clock: Callable[[], float] = time.monotonic,
        jitter: Callable[[], float] = random.random,
    ) -> None:
        self._settings = settings
        self._clock = clock
        self._has_warned = False
        self._backoff = Backoff(FIRST_REPROBE_SECONDS, MAX_REPROBE_SECONDS, jitter)
        self.forget()

    def forget(self) -> None:
        """In a forked child: drop the parent's connections; it goes on using them."""
        # Dropping closes only our descriptors of them, which the parent does not notice.
        self._lock = threading.Lock()
        self._clients: dict[tuple[int, bool], consul.std.HTTPClient] = {}
        self._current = 0
        self._failures = [0] * len(self._settings.addresses)
        self._shunned_until = [float("-inf")] * len(self._settings.addresses)
        self._polls = _Polls()
        self._waits = threading.local()  # .meanwhile: what this thread does while it waits
        self._traffic = Traffic()
        self._token: str | None = None
        self.token_changes = 0
        """How often another token was met than the one before."""
        self._token_stamp: object = None

    def close(self) -> None:
        """Close every connection; a call in flight on another thread ends by itself, a poll now."""
        self.end_polls()
        with self._lock:
            clients, self._clients = self._clients, {}
        for client in clients.values():
            client.session.close()

    def end_polls(self) -> None:
        """Make every `poll` raise Unavailable at once, now and from now on."""
        self._polls.end()

    def call(
        self,
        method: str,
        path: str,
        params: Mapping[str, str] = NO_PARAMETERS,
        body: bytes = b"",
        *,
        accept: tuple[int, ...] = (),
        at: Host | None = None,
        timeout_seconds: float | None = None,
        meanwhile: Meanwhile | None = None,
    ) -> Answer:
        """Carry out one call.  Returns Consul's answer if its status is 200 or one of *accept*.

        With *at* that agent is asked and no other, and its failure changes nothing for others.
        While an answer is waited for, *meanwhile* is called again and again, on this thread.

        Raises Denied for 401 and 403, TimedOut when no agent answered in time, and Unavailable for
        every other failure.  The texts of Consul's errors are shown, never interpreted.
        """
        if timeout_seconds is None:
            timeout_seconds = self._settings.request_timeout_seconds
        request = _Request(method, path, params, body, accept, timeout_seconds, meanwhile=meanwhile)
        if at is not None:
            answer = self._exchange(self._settings.addresses.index(at), request)
            if answer.status == 429 or answer.status >= 500:
                raise self._useless(answer)
            return self._accepted(request, answer)
        return self._ask(request)

    def poll(
        self, path: str, params: Mapping[str, str], wait_seconds: float, *, accept: tuple[int, ...]
    ) -> Answer:
        """A blocking GET, on a connection of its own; raises as `call` does."""
        params = {**params, "wait": go_duration(wait_seconds)}
        timeout_seconds = self.poll_timeout_seconds(wait_seconds)
        return self._ask(_Request("GET", path, params, b"", accept, timeout_seconds, is_poll=True))

    def poll_timeout_seconds(self, wait_seconds: float) -> float:
        """How long a poll may take at one address before it counts as unanswered."""
        slack_seconds = max(HOLD_SECONDS, self._settings.request_timeout_seconds)
        return wait_seconds * (1 + POLL_JITTER) + slack_seconds

    def status(self) -> dict[str, object]:
        """Which agent is in use, and which are left alone for now."""
        now = self._clock()
        with self._lock:
            shunned = [i for i, until in enumerate(self._shunned_until) if until > now]
            current = self._current
        addresses = self._settings.addresses
        return {
            "agent": str(addresses[current]),
            "agents_away": [str(addresses[i]) for i in shunned],
        }

    def wire(self) -> dict[str, dict[str, int]]:
        """What was said to agents and heard from them, by transport; see `Traffic`."""
        return {"http": self._traffic.counts()}

    def __repr__(self) -> str:
        return f"<Agent {self._settings.addresses[self._current]}>"

    # -- which agent -------------------------------------------------------------------------

    def _ask(self, request: _Request) -> Answer:
        first_error: Unavailable | None = None
        n_useless = 0
        for place in self._places():
            try:
                answer = self._exchange(place, request)
            except Unavailable as error:
                if request.is_poll and self._polls.is_ended:
                    raise
                self._failed(place)
                first_error = first_error or error
                continue
            if answer.status == 429 or answer.status >= 500:
                # It lives, and cannot help: perhaps it alone has lost the servers.  One other
                # opinion is enough, as without a leader all of them say the same.
                first_error = first_error or self._useless(answer)
                n_useless += 1
                if n_useless == 2:
                    break
                continue
            self._worked(place, first_error)
            return self._accepted(request, answer)
        assert first_error is not None
        raise first_error

    def _accepted(self, request: _Request, answer: Answer) -> Answer:
        if answer.status == 200 or answer.status in request.accept:
            return answer
        raise self._refusal(request, answer)

    def _places(self) -> list[int]:
        now = self._clock()
        with self._lock:
            order = [self._current]
            order += [i for i in range(len(self._shunned_until)) if i != self._current]
            ready = [i for i in order if self._shunned_until[i] <= now]
            # All are away: one of them is asked, in turn, so that no call waits for each.
            return ready or [min(order, key=self._shunned_until.__getitem__)]

    def _failed(self, place: int) -> None:
        with self._lock:
            self._failures[place] += 1
            bound = self._backoff.bound_seconds(self._failures[place])
            self._shunned_until[place] = self._clock() + bound

    def _worked(self, place: int, earlier: Unavailable | None) -> None:
        with self._lock:
            is_away = self._shunned_until[self._current] > self._clock()
            self._failures[place] = 0
            self._shunned_until[place] = float("-inf")
            # Not by an answer to an old poll, when the others have moved on meanwhile.
            is_new = place != self._current and (is_away or earlier is not None)
            if is_new:
                self._current = place
        if is_new:
            address = self._settings.addresses[place]
            reason = earlier or "the last one is away"
            logger.warning("asking the Consul agent %s from now on (%s)", address, reason)

    # -- one exchange ------------------------------------------------------------------------

    def _exchange(self, place: int, request: _Request) -> Answer:
        """Ask one agent; whatever status it answers is an answer."""
        address = self._settings.addresses[place]
        where = f"{request.method} {request.path} at {address}"
        request = replace(request, address=address)
        token = self._current_token(where)
        answer = self._send(place, request, where, token)
        if answer.status == 403 and self._settings.token_file:
            fresh = self._current_token(where, is_refused=True)
            if fresh != token:
                answer = self._send(place, request, where, fresh)
        return answer

    def _send(self, place: int, request: _Request, where: str, token: str | None) -> Answer:
        deadline = time.monotonic() + request.timeout_seconds  # sockets know no other clock
        client = self._client(place, request.is_poll)
        try:
            try:
                return self._send_once(client, request, where, token, deadline)
            except requests.ConnectionError as error:
                # A kept connection that the agent has closed meanwhile shows only when used.
                if not _is_closed_connection(error) or self._polls.is_ended:
                    raise
                self._traffic.add(retries=1)
                return self._send_once(client, request, where, token, deadline)
        except (requests.Timeout, urllib3.exceptions.TimeoutError, TimeoutError):
            problem: Unavailable = TimedOut(
                f"{where}: no answer within {request.timeout_seconds:g} s; "
                "check that the agent and its servers are up"
            )
        except (
            requests.RequestException,
            urllib3.exceptions.HTTPError,
            HTTPException,
            OSError,
            ValueError,  # chunk sizes, headers and URLs that are none
        ) as error:
            reason = _shown(_reason(error), token)
            problem = Unavailable(f"{where}: {reason}; {self._remedy()}")
        # Not inside `except`: the foreign error repeats the URL, and may repeat headers.
        raise problem

    def _send_once(
        self,
        client: consul.std.HTTPClient,
        request: _Request,
        where: str,
        token: str | None,
        deadline: float,
    ) -> Answer:
        left = deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError
        with self._doing_meanwhile(request.meanwhile):
            return self._send_and_read(client, request, where, token, left)

    @contextmanager
    def _doing_meanwhile(self, meanwhile: Meanwhile | None) -> Iterator[None]:
        """Have waits of this thread call *meanwhile*; what that asks itself calls nothing."""
        before = getattr(self._waits, "meanwhile", None)
        self._waits.meanwhile = meanwhile
        try:
            yield
        finally:
            self._waits.meanwhile = before

    def _send_and_read(
        self,
        client: consul.std.HTTPClient,
        request: _Request,
        where: str,
        token: str | None,
        left: float,
    ) -> Answer:
        asked_at = self._clock()
        response = client.session.request(
            request.method,
            client.uri(request.path, request.params),
            data=request.body,
            headers={"X-Consul-Token": token} if token else None,
            # `total` makes the read timeout what the connect has left over; _Answering makes that
            # hold for the answer as a whole.
            timeout=urllib3.Timeout(connect=min(CONNECT_TIMEOUT_SECONDS, left), total=left),
            allow_redirects=False,
            stream=True,
        )
        with response:
            body = _read(response, where)
        self._traffic.add(replies=1, error_replies=_is_error(response.status_code))
        index = response.headers.get("X-Consul-Index", "")
        filtered = response.headers.get("X-Consul-Results-Filtered-By-ACLs", "")
        return Answer(
            response.status_code,
            body,
            int(index) if index.isascii() and index.isdecimal() and len(index) < 20 else 0,
            filtered.lower() == "true",
            where,
            request.address,
            "" if response.status_code == 200 else _shown(body.decode("utf-8", "replace"), token),
            asked_at,
        )

    def _client(self, place: int, is_poll: bool) -> consul.std.HTTPClient:
        key = place, is_poll
        client = self._clients.get(key)
        if client is None:
            made = self._new_client(self._settings.addresses[place], is_poll)
            self._warn_once_of_strangers()
            with self._lock:
                client = self._clients.setdefault(key, made)
        return client

    def _warn_once_of_strangers(self) -> None:
        if self._settings.tls and not self._settings.verify and not self._has_warned:
            self._has_warned = True
            logger.warning(
                "verify is false: whoever answers at an agent's address is believed, and is sent "
                "the token; set ca_cert instead"
            )

    def _new_client(self, address: Host, is_poll: bool) -> consul.std.HTTPClient:
        settings = self._settings
        scheme = "https" if settings.tls else "http"
        name = f"[{address.address}]" if ":" in address.address else address.address
        # True checks against the system's CAs (see _Adapter), a text is the file of another.
        verify: bool | str = (settings.ca_cert or True) if settings.verify else False
        cert = (settings.client_cert, settings.client_key) if settings.client_cert else None
        client = consul.std.HTTPClient(name, address.port, scheme, verify, cert)
        session = cast("requests.Session", client.session)
        session.trust_env = False  # no proxies, .netrc or CA bundles by surprise
        session.verify, session.cert = verify, cast("tuple[str, str] | None", cert)
        # Else requests reads the whole of a redirect's body, unpacks it, and takes its URL apart.
        session.get_redirect_target = _no_target  # type: ignore[assignment]
        session.cookies.set_policy(DefaultCookiePolicy(allowed_domains=[]))
        session.headers.clear()
        # Identity: what comes is then bounded by what is read.
        session.headers.update({"User-Agent": "consul-matchmaker", "Accept-Encoding": "identity"})
        polls = self._polls if is_poll else None
        trusts_system = settings.tls and verify is True
        session.mount(f"{scheme}://", _Adapter(polls, self._waits, self._traffic, trusts_system))
        return client

    def _remedy(self) -> str:
        setting = "addresses, tls, ca_cert and verify" if self._settings.tls else "addresses"
        return f"check that a Consul agent listens there, and the setting {setting}"

    def _refusal(self, request: _Request, answer: Answer) -> Unavailable | Denied:
        if answer.status in (401, 403):
            have = "the token" if self._token else "access without a token"
            return Denied(
                f"{self._said(answer)}: Consul refuses {have}; "
                f"set token or token_file to one whose policy has {self._rights(request)}"
            )
        if 300 <= answer.status < 400:
            return Unavailable(
                f"{self._said(answer)}: redirects are not followed; "
                "give the agent itself in addresses"
            )
        return Unavailable(f"{self._said(answer)}: Consul does not accept this call")

    def _rights(self, request: _Request) -> str:
        if request.path.startswith("/v1/session/"):
            return 'session_prefix "" write'
        if request.path.startswith("/v1/agent/"):
            return 'service "consul-matchmaker" write (because of liveness=check)'
        policy = "read" if request.method == "GET" else "write"
        return f'key_prefix "{self._settings.prefix}/" {policy}'

    def _useless(self, answer: Answer) -> Unavailable:
        return Unavailable(f"{self._said(answer)}: the agent cannot help now, try again")

    def _said(self, answer: Answer) -> str:
        said = f", '{answer.said}'" if answer.said else ""
        return f"{answer.where}: status {answer.status}{said}"

    # -- token -------------------------------------------------------------------------------

    def _current_token(self, where: str, *, is_refused: bool = False) -> str | None:
        """The token to send; *is_refused* reads the file again even if it looks unchanged."""
        stamp = self._stamp()
        with self._lock:
            if stamp is not None and stamp == self._token_stamp and not is_refused:
                return self._token
        try:
            token = self._settings.read_token()
        except ConfigurationError as error:
            if self._token is not None:  # half-way through a rotation, the old one is the best bet
                return self._token
            raise Denied(f"{where}: {error}") from None
        with self._lock:
            self.token_changes += token != self._token
            self._token, self._token_stamp = token, stamp
        return token

    def _stamp(self) -> object:
        """What changes when the token may have changed; None when that cannot be said."""
        if self._settings.token_file is None:
            return "it is a setting"
        try:
            found = Path(self._settings.token_file).stat()
        except OSError:
            return None
        return found.st_mtime_ns, found.st_size, found.st_ino


def go_duration(seconds: float) -> str:
    """*seconds* as Consul reads a duration: ``10s``, ``1500ms``."""
    milliseconds = round(seconds * 1000)
    return f"{milliseconds}ms" if milliseconds % 1000 else f"{milliseconds // 1000}s"


@dataclass(frozen=True, slots=True)
class _Request:
    method: str
    path: str
    params: Mapping[str, str]
    body: bytes
    accept: tuple[int, ...]
    timeout_seconds: float
    is_poll: bool = False
    meanwhile: Meanwhile | None = None
    address: Host | None = None


def _read(response: requests.Response, where: str) -> bytes:
    parts: list[bytes] = []
    size = 0
    while part := response.raw.read(65536, decode_content=False):
        parts.append(part)
        size += len(part)
        if size > MAX_ANSWER_BYTES:
            raise Unavailable(f"{where}: the answer exceeds {MAX_ANSWER_BYTES} bytes; not read")
    return b"".join(parts)


def _shown(text: str, token: str | None) -> str:
    """The beginning of *text*, which an agent made; it may repeat what it was sent."""
    # Cut twice: before, as it may be endless; after, so that no cut can hide a part of the token.
    return escaped(without_secret(text[:LONGEST_EXAMINED].strip(), token))[:SHOWN_LENGTH]


def _is_error(status: int) -> bool:
    """Whether the agent refuses, or says that it cannot help."""
    return status in (401, 403, 429) or status >= 500


def _is_closed_connection(error: requests.ConnectionError) -> bool:
    """Whether the agent closed an established connection: not a refused one, not a timeout."""
    return bool(error.args) and isinstance(error.args[0], urllib3.exceptions.ProtocolError)


def _reason(error: BaseException) -> str:
    """The innermost cause in words; the outer ones of requests and urllib3 repeat the URL."""
    for _ in range(10):
        inner = getattr(error, "reason", None)
        if not isinstance(inner, BaseException):
            inner = next((arg for arg in error.args if isinstance(arg, BaseException)), None)
        if inner is None:
            inner = error.__cause__ or error.__context__
        if not isinstance(inner, (OSError, HTTPException, urllib3.exceptions.HTTPError)):
            break
        error = inner
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return str(error).strip() or type(error).__name__


# -- what requests and urllib3 lack: a deadline for a whole answer, and an end for a poll ----------


class _Deadline(io.RawIOBase):
    """A socket's reader, counted, whose every piece has to arrive before one common deadline.

    A plain timeout counts from piece to piece: a server that drips would hold us for ever.
    """

    def __init__(
        self,
        sock: socket.socket,
        reader: io.RawIOBase,
        meanwhile: Meanwhile | None,
        traffic: Traffic,
    ) -> None:
        self._sock, self._reader, self._meanwhile = sock, reader, meanwhile
        self._traffic = traffic
        timeout = sock.gettimeout()
        self._deadline = None if timeout is None else time.monotonic() + timeout

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int | None:
        count = self._readinto(buffer)
        self._traffic.add(received_bytes=count or 0)
        return count

    def _readinto(self, buffer: Any) -> int | None:
        if self._deadline is None:
            return cast("int | None", self._reader.readinto(buffer))
        if self._meanwhile is None:
            self._sock.settimeout(_left_until(self._deadline))
            return cast("int | None", self._reader.readinto(buffer))
        while True:
            # Past the reader, which never reads again after a timeout.
            pause = max(SHORTEST_PAUSE_SECONDS, self._meanwhile())
            self._sock.settimeout(min(pause, _left_until(self._deadline)))
            with suppress(TimeoutError):
                return self._sock.recv_into(buffer)

    def close(self) -> None:
        self._reader.close()
        super().close()


def _left_until(deadline: float) -> float:
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError("timed out")
    return left


class _Answering(HTTPResponse):
    """An answer that is given the socket's timeout as a whole."""

    def __init__(
        self,
        sock: socket.socket,
        *args: Any,
        meanwhile: Meanwhile | None,
        traffic: Traffic,
        **kwargs: Any,
    ) -> None:
        super().__init__(sock, *args, **kwargs)
        self.fp = io.BufferedReader(_Deadline(sock, self.fp.detach(), meanwhile, traffic))

    def begin(self) -> None:
        super().begin()
        # What is no header is no answer of Consul's.  urllib3 would write it to the log.
        self.msg.defects.clear()
        self.msg.set_payload("")


class _Polls:
    """The connections that wait for a poll's answer, so that waiting can be ended."""

    def __init__(self) -> None:
        self.is_ended = False
        self._connections: set[HTTPConnection] = set()

    def end(self) -> None:
        self.is_ended = True
        for connection in list(self._connections):
            sock = cast("socket.socket | None", connection.sock)
            if sock is not None:
                with suppress(OSError):
                    sock.shutdown(socket.SHUT_RDWR)  # wakes the thread that reads; close would not

    @contextmanager
    def waiting(self, connection: HTTPConnection) -> Iterator[None]:
        self._connections.add(connection)
        try:
            if self.is_ended:  # looked at after the add, so that end() misses nobody
                raise ConnectionAbortedError("polling has ended")
            yield
        finally:
            self._connections.discard(connection)


def _no_target(response: object) -> None:
    """Where to go on: nowhere."""


class _Connection:
    """Mixed into urllib3's connections: gives an `_Answering`, counts what is sent, is known to
    *polls* if it is one."""

    response_class: Any = _Answering
    polls: _Polls | None = None
    waits: threading.local
    traffic: Traffic

    def send(self, data: Any) -> None:
        super().send(data)  # type: ignore[misc]
        self.traffic.add(sent_bytes=len(data))

    def getresponse(self) -> Any:
        self.traffic.add(queries=1)  # here it is sent, once and as a whole
        meanwhile = getattr(self.waits, "meanwhile", None)
        self.response_class = partial(_Answering, meanwhile=meanwhile, traffic=self.traffic)
        ask = super().getresponse  # type: ignore[misc]
        if self.polls is None:
            return ask()
        with self.polls.waiting(cast(HTTPConnection, self)):
            return ask()


class _Pool:
    """Mixed into urllib3's pools: closes a connection too many without a word in the log."""

    pool: queue.LifoQueue[Any] | None

    def _put_conn(self, conn: Any) -> None:
        try:
            self.pool.put(conn, block=False)  # type: ignore[union-attr]
        except (AttributeError, queue.Full):  # it was closed, or IDLE_CONNECTIONS are kept
            if conn is not None:
                conn.close()


class _Adapter(requests.adapters.HTTPAdapter):
    """An adapter to one agent, with connections of ours; those of polls are known to *waiting*,
    *thread_waits* knows what a thread does while it waits for an answer, *counted* counts.

    With *trusts_system* it believes the CAs of the system: those of OpenSSL, which the variables
    SSL_CERT_FILE and SSL_CERT_DIR replace.  By itself requests believes those of certifi.
    """

    def __init__(
        self,
        waiting: _Polls | None,
        thread_waits: threading.local,
        counted: Traffic,
        trusts_system: bool,
    ) -> None:
        super().__init__(pool_connections=1, pool_maxsize=IDLE_CONNECTIONS, max_retries=0)
        self._context = ssl.create_default_context() if trusts_system else None

        class Plain(_Connection, HTTPConnection):
            polls = waiting
            waits = thread_waits
            traffic = counted

        class Secure(_Connection, HTTPSConnection):
            polls = waiting
            waits = thread_waits
            traffic = counted
            # urllib3 would warn at each request; we have warned once.
            is_verified = cast(bool, property(lambda self: True, lambda self, value: None))

        class PlainPool(_Pool, HTTPConnectionPool):
            ConnectionCls = Plain

        class SecurePool(_Pool, HTTPSConnectionPool):
            ConnectionCls = Secure

        self.poolmanager.pool_classes_by_scheme = {"http": PlainPool, "https": SecurePool}

    def cert_verify(self, conn: Any, url: Any, verify: Any, cert: Any) -> None:
        super().cert_verify(conn, url, verify, cert)  # type: ignore[no-untyped-call]
        if self._context is not None:
            conn.ca_certs = conn.ca_cert_dir = None
            conn.conn_kw["ssl_context"] = self._context
