"""Ask Consul's HTTP API: which agent, with which token, and what its failure means.

Connections of a process: one to the agent in use for each thread that asks at the same moment (at
rest that is one), and one for each `Line`.
"""

from __future__ import annotations

import json
import logging
import math
import random
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from typing import Any, NamedTuple

from ...errors import ConfigurationError, Denied, TimedOut, Unavailable
from ...model import Host
from ...settings import Settings
from ...texts import SHOWN_LENGTH, escaped, without_secret
from ..agents import Agents
from ..host_names import HostNames, resolve_by_system
from ..traffic import Traffic
from .exchange import AnswerTooLarge, Exchange

logger = logging.getLogger(__name__)

HOLD_SECONDS = 8.0
"""How much later than its wait a poll may come: Consul holds it for rpc_hold_timeout, 7 s, while
there is no leader (fact C8) ..."""
POLL_JITTER = 1 / 16
"""... and adds up to this share of the wait (fact C2)."""
LONGEST_EXAMINED = 10_000
"""Characters of an error's text that are searched for the token."""

NO_PARAMETERS: Mapping[str, str] = {}


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


class Overloaded(Unavailable):
    """The agent has too many connections or requests (status 429): ask it less."""


class TooLarge(Unavailable):
    """The answer exceeds what is read of one; `exchange.MAX_ANSWER_BYTES` of it were received."""


class _GivenUp(Unavailable):
    """The caller itself has ended the call, which says nothing of the agent."""


class _Call(NamedTuple):
    """What is asked, of whichever agent."""

    method: str
    path: str
    params: Mapping[str, str]
    body: bytes
    accept: tuple[int, ...]
    timeout_seconds: float
    """For each agent."""
    until: float
    """When it is over for all of them, by `time.monotonic`: sockets know no other clock."""


class ConsulApi:
    """Consul's HTTP API at the configured addresses.  Thread-safe.

    A call goes to the agent that worked last; one that cannot be reached is left alone for a while
    and the next in order takes over, so a dead agent costs one timeout, not one a call.  Every call
    must be idempotent: one that meets a connection closed in the meantime is repeated silently.
    Host names are resolved by the system's resolver (*resolve*) beside the caller's thread.

    No connection is made before the first call.
    """

    def __init__(
        self,
        settings: Settings,
        *,
        clock: Callable[[], float] = time.monotonic,
        jitter: Callable[[], float] = random.random,
        resolve: Callable[[str], list[str]] = resolve_by_system,
    ) -> None:
        self._settings = settings
        self._clock = clock
        self._host_names = HostNames(
            ttl_seconds=settings.ttl_seconds,
            empty_ttl_seconds=settings.empty_ttl_seconds,
            most=len(settings.addresses),
            clock=clock,
            resolve=resolve,
        )
        self._has_warned = False
        self._agents = Agents(
            settings.addresses,
            "the Consul agent",
            settings.request_timeout_seconds,
            clock=clock,
            jitter=jitter,
        )
        self._lock = threading.Lock()
        self._exchanges: dict[Host, Exchange] = {}
        self._is_closed = False
        self._traffic = Traffic()
        self._token: str | None = None
        self.token_changes = 0
        """How often another token was met than the one before."""
        self._token_stamp: object = None

    def close(self) -> None:
        """Close every connection but those of lines, for ever: a call under way, or later, raises
        Unavailable at once."""
        self._is_closed = True
        for exchange in tuple(self._exchanges.values()):
            exchange.abort()

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
    ) -> Answer:
        """Carry out one call.  Returns Consul's answer if its status is 200 or one of *accept*.

        It ends within *timeout_seconds*, however many agents are tried; by default within
        ``request_timeout_seconds`` for each.  Where it had less time than that, an agent that did
        not answer is not taken to be away.  With *at* that agent is asked and no other, and its
        failure changes nothing for others.

        Raises Denied for 401 and 403, TimedOut when no agent answered in time, and Unavailable for
        every other failure.  The texts of Consul's errors are shown, never interpreted.
        """
        return self._ask(self._call(method, path, params, body, accept, timeout_seconds), at)

    def line(self) -> Line:
        """A connection of its own, for one call after another, also such as wait."""
        return Line(self)

    def poll_timeout_seconds(self, wait_seconds: float) -> float:
        """How long a poll may take at one address before it counts as unanswered."""
        slack_seconds = max(HOLD_SECONDS, self._settings.request_timeout_seconds)
        return wait_seconds * (1 + POLL_JITTER) + slack_seconds

    def status(self) -> dict[str, object]:
        """Which agent is asked first, and which are left alone for now."""
        return self._agents.status()

    def wire(self) -> dict[str, dict[str, int]]:
        """What was said to agents and heard from them, by transport; see `Traffic`."""
        return {"http": self._traffic.counts()}

    def __repr__(self) -> str:
        return f"<ConsulApi {self._agents}>"

    # -- which agent -------------------------------------------------------------------------

    def _call(
        self,
        method: str,
        path: str,
        params: Mapping[str, str],
        body: bytes,
        accept: tuple[int, ...],
        timeout_seconds: float | None,
    ) -> _Call:
        until = math.inf if timeout_seconds is None else time.monotonic() + timeout_seconds
        each = self._settings.request_timeout_seconds
        return _Call(method, path, params, body, accept, each, until)

    def _ask(self, call: _Call, at: Host | None, line: Line | None = None) -> Answer:
        if at is not None:
            answer = self._answer(at, call, line)
            if _is_server_error(answer):
                raise self._server_error(answer)
            return self._accepted(call, answer)
        first_error: Unavailable | None = None
        server_errors = 0
        for candidate in self._agents.candidates():
            if candidate.is_resting and first_error is not None:
                break  # where all rest one is asked, in turn, so that no call waits for each
            began = time.monotonic()
            try:
                answer = self._answer(candidate.address, call, line)
            except TimedOut as error:
                first_error = first_error or error
                candidate.timed_out(str(error), min(call.timeout_seconds, call.until - began))
                if time.monotonic() >= call.until:
                    break
            except _GivenUp:
                candidate.was_not_asked()
                raise
            except Unavailable as error:
                first_error = first_error or error
                candidate.failed(str(error))
            except BaseException:
                candidate.was_not_asked()
                raise
            else:
                if not _is_server_error(answer):
                    candidate.worked()
                    return self._accepted(call, answer)
                # It lives, and cannot help: perhaps it alone has lost the servers.  One other
                # opinion is enough, as without a leader all of them say the same.
                problem = self._server_error(answer)
                candidate.could_not_help(str(problem))
                first_error = first_error or problem
                server_errors += 1
                if server_errors == 2:
                    break
        assert first_error is not None
        raise first_error

    def _accepted(self, call: _Call, answer: Answer) -> Answer:
        if answer.status == 200 or answer.status in call.accept:
            return answer
        raise self._refusal(call, answer)

    # -- one exchange ------------------------------------------------------------------------

    def _answer(self, address: Host, call: _Call, line: Line | None) -> Answer:
        """Ask one agent; whatever status it answers is an answer."""
        where = f"{call.method} {call.path} at {address}"
        token = self._current_token(where)
        if line is not None:
            exchange = line.exchange_with(address)
        else:
            exchange = self._exchanges.get(address) or self._exchanges.setdefault(
                address, self.new_exchange(address)
            )
            self._raise_if_closed()  # now that `close` finds what to end
        deadline = min(time.monotonic() + call.timeout_seconds, call.until)
        try:
            answer = self._send(exchange, address, call, where, token, deadline)
            if answer.status == 403 and self._settings.token_file:
                fresh = self._current_token(where, is_refused=True)
                if fresh != token:
                    answer = self._send(exchange, address, call, where, fresh, deadline)
        except Unavailable:
            if line is not None:
                line.raise_if_interrupted()
            else:
                self._raise_if_closed()
            raise
        return answer

    def _raise_if_closed(self) -> None:
        if self._is_closed:
            raise _GivenUp("the way to Consul was closed: make a new matchmaker")

    def _send(
        self,
        exchange: Exchange,
        address: Host,
        call: _Call,
        where: str,
        token: str | None,
        deadline: float,
    ) -> Answer:
        headers = {"X-Consul-Token": token} if token else {}
        asked_at, left = self._clock(), deadline - time.monotonic()
        try:
            found = exchange.request(
                call.method, call.path, call.params, call.body, headers, deadline
            )
        except TimeoutError:
            problem: Unavailable = TimedOut(
                f"{where}: no answer within {max(0.0, left):.3g} s; "
                "check that the agent and its servers are up"
            )
        except (OSError, HTTPException, ValueError) as error:
            reason = _shown(getattr(error, "strerror", None) or str(error), token)
            kind = TooLarge if isinstance(error, AnswerTooLarge) else Unavailable
            problem = kind(f"{where}: {reason}; {self._remedy()}")
        else:
            index = found.headers.get("x-consul-index", "")
            filtered = found.headers.get("x-consul-results-filtered-by-acls", "")
            return Answer(
                found.status,
                found.body,
                int(index) if index.isascii() and index.isdecimal() and len(index) < 20 else 0,
                filtered.lower() == "true",
                where,
                address,
                "" if found.status == 200 else _shown(found.body.decode("utf-8", "replace"), token),
                asked_at,
            )
        # Not inside `except`: the foreign error may repeat what it was sent.
        raise problem

    def new_exchange(self, address: Host) -> Exchange:
        """Connections to one agent, for a caller that needs its own."""
        settings = self._settings
        if settings.tls and not settings.verify and not self._has_warned:
            self._has_warned = True
            logger.warning(
                "verify is false: whoever answers at an agent's address is believed, and is sent "
                "the token; set ca_cert instead"
            )
        return Exchange(
            address.address,
            address.port,
            "https" if settings.tls else "http",
            (settings.ca_cert or True) if settings.verify else False,
            (settings.client_cert, settings.client_key) if settings.client_cert else None,
            traffic=self._traffic,
            host_names=self._host_names,
        )

    def _remedy(self) -> str:
        setting = "addresses, tls, ca_cert and verify" if self._settings.tls else "addresses"
        return f"check that a Consul agent listens there, and the setting {setting}"

    def _refusal(self, call: _Call, answer: Answer) -> Unavailable | Denied:
        if answer.status in (401, 403):
            have = "the token" if self._token else "access without a token"
            return Denied(
                f"{self._said(answer)}: Consul refuses {have}; "
                f"set token or token_file to one whose policy has {self._rights(call)}"
            )
        if 300 <= answer.status < 400:
            return Unavailable(
                f"{self._said(answer)}: redirects are not followed; "
                "give the agent itself in addresses"
            )
        return Unavailable(f"{self._said(answer)}: Consul does not accept this call")

    def _rights(self, call: _Call) -> str:
        if call.path.startswith("/v1/session/"):
            return 'session_prefix "" write'
        if call.path.startswith("/v1/agent/"):
            return 'service "consul-matchmaker" write (because of liveness=check)'
        policy = "read" if call.method == "GET" else "write"
        return f'key_prefix "{self._settings.prefix}/" {policy}'

    def _server_error(self, answer: Answer) -> Unavailable:
        kind = Overloaded if answer.status == 429 else Unavailable
        return kind(f"{self._said(answer)}: the agent cannot help now, try again")

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


class Line:
    """A connection of its own to whichever agent is asked, for one call after another.

    Calls come from one thread at a time; `interrupt` and `close` may come from any, also from a
    signal handler.  In a forked child it is dropped, and another one made.
    """

    def __init__(self, api: ConsulApi) -> None:
        self._api = api
        self._address: Host | None = None
        self._exchange: Exchange | None = None
        self._is_interrupted = self._is_closed = False

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
    ) -> Answer:
        """As `ConsulApi.call`; raises Unavailable too when it is interrupted."""
        api = self._api
        return api._ask(api._call(method, path, params, body, accept, timeout_seconds), at, self)

    def poll(
        self,
        path: str,
        params: Mapping[str, str],
        wait_seconds: float,
        *,
        accept: tuple[int, ...] = (),
        at: Host | None = None,
    ) -> Answer:
        """A blocking GET, which ends within `poll_timeout_seconds` for each agent it has to try;
        raises as `call` does."""
        params = {**params, "wait": go_duration(wait_seconds)}
        timeout_seconds = self._api.poll_timeout_seconds(wait_seconds)
        call = _Call("GET", path, params, b"", accept, timeout_seconds, math.inf)
        return self._api._ask(call, at, self)

    def interrupt(self) -> None:
        """Make the call that is under way, or else the next one, raise Unavailable at once."""
        self._is_interrupted = True
        if (exchange := self._exchange) is not None:
            exchange.abort()

    def close(self) -> None:
        """Interrupt, and have every later call raise Unavailable too."""
        self._is_closed = True
        self.interrupt()

    def exchange_with(self, address: Host) -> Exchange:
        """The connection to *address*; one to another agent is closed."""
        exchange = self._exchange
        if exchange is None or address != self._address:
            if exchange is not None:
                exchange.close()
            self._address = address
            exchange = self._exchange = self._api.new_exchange(address)
        self.raise_if_interrupted()  # now that `interrupt` finds what to end
        return exchange

    def raise_if_interrupted(self) -> None:
        """Raise Unavailable once for an interrupt, or for several."""
        exchange = self._exchange
        if self._is_interrupted or (exchange is not None and exchange.is_aborted):
            self._exchange = None
            self._is_interrupted = self._is_closed
            raise _GivenUp("the connection to Consul was given up by its owner")


def go_duration(seconds: float) -> str:
    """*seconds* as Consul reads a duration: ``10s``, ``1500ms``."""
    milliseconds = round(seconds * 1000)
    return f"{milliseconds}ms" if milliseconds % 1000 else f"{milliseconds // 1000}s"


def _shown(text: str, token: str | None) -> str:
    """The beginning of *text*, which an agent made; it may repeat what it was sent."""
    # Cut twice: before, as it may be endless; after, so that no cut can hide a part of the token.
    return escaped(without_secret(text[:LONGEST_EXAMINED].strip(), token))[:SHOWN_LENGTH]


def _is_server_error(answer: Answer) -> bool:
    """Whether the agent says that it cannot help now."""
    return answer.status == 429 or answer.status >= 500
