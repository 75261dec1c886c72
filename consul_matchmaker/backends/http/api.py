"""Ask Consul's HTTP API: which agent, with which token, and what its failure means.

Connections of a process: one to the agent in use for each thread that asks at the same moment (at
rest that is one), and one for each `Line` that somebody made.
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
from typing import Any, NamedTuple

from ...errors import ConfigurationError, Denied, TimedOut, Unavailable
from ...files import stamp_of
from ...model import Host
from ...settings import Settings
from ...texts import SHOWN_LENGTH, escaped, without_secret
from ..agents import Agents
from ..host_names import HostNames, resolve_by_system
from ..traffic import Traffic
from .connection import AnswerTooLarge
from .exchange import Exchange

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
    age_seconds: float = 0.0
    """How old it was then already, as it is from the agent's cache."""

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
    timeout_seconds: float
    """For each agent."""
    until: float
    """When it is over for all of them, by `time.monotonic`: sockets know no other clock."""
    line: Line
    needs: str
    """The rights that the token needs for it; "" where the path says so."""

    def at(self, address: Host) -> str:
        """The call in words, for messages."""
        return f"{self.method} {self.path} at {address}"


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
        self._agents = Agents(
            settings.addresses,
            "the Consul agent",
            settings.request_timeout_seconds,
            clock=clock,
            jitter=jitter,
        )
        self._traffic = Traffic()
        self._line = Line(self._new_exchange, is_shared=True)
        self._lock = threading.Lock()
        self._token: str | None = None
        self._token_stamp: object = None
        self.token_changes = 0
        """How often another token was met than the one before."""
        if settings.tls and not settings.verify:
            logger.warning(
                "verify is false: whoever answers at an agent's address is believed, and is sent "
                "the token; set ca_cert instead"
            )

    def close(self) -> None:
        """Close every connection but those of lines, for ever: a call under way, or later, raises
        Unavailable at once."""
        self._line.close()

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
        wait_seconds: float | None = None,
        line: Line | None = None,
        needs: str = "",
    ) -> Answer:
        """Carry out one call.  Returns Consul's answer if its status is 200 or one of *accept*.

        It ends within *timeout_seconds*, however many agents are tried; by default within
        ``request_timeout_seconds`` for each.  Where it had less time than that, an agent that did
        not answer is not taken to be away.  With *at* that agent is asked and no other, and its
        failure changes nothing for others.

        With *wait_seconds* it is a blocking query, which ends within `poll_timeout_seconds` for
        each agent.  With *line* it goes over that connection, whose owner can interrupt it.

        Raises Denied for 401 and 403, TimedOut when no agent answered in time, and Unavailable for
        every other failure.  The texts of Consul's errors are shown, never interpreted.
        """
        each_seconds = self._settings.request_timeout_seconds
        if wait_seconds is not None:
            params = {**params, "wait": go_duration(wait_seconds)}
            each_seconds = self.poll_timeout_seconds(wait_seconds)
        until = math.inf if timeout_seconds is None else time.monotonic() + timeout_seconds
        call = _Call(method, path, params, body, each_seconds, until, line or self._line, needs)
        answer = self._ask_in_turn(call) if at is None else self._ask(at, call)
        if answer.status == 200 or answer.status in accept:
            return answer
        raise (
            self._server_error(answer) if _is_server_error(answer) else self._refusal(call, answer)
        )

    def look_at_token(self) -> int:
        """`token_changes`, once the token's file was looked at."""
        with suppress(Denied):
            self._current_token("the token")
        return self.token_changes

    def line(self) -> Line:
        """A connection of its own, to be handed to `call`."""
        return Line(self._new_exchange)

    def poll_timeout_seconds(self, wait_seconds: float) -> float:
        """How long a blocking query may take at one address before it counts as unanswered."""
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

    def _ask_in_turn(self, call: _Call) -> Answer:
        """The first answer of an agent that can help; else raise what the first one failed by."""
        first_error: Unavailable | None = None
        server_errors = 0
        for candidate in self._agents.candidates():
            if candidate.is_resting and first_error is not None:
                break  # where all rest one is asked, in turn, so that no call waits for each
            began = time.monotonic()
            try:
                answer = self._ask(candidate.address, call)
            except TimedOut as error:
                first_error = first_error or error
                candidate.timed_out(str(error), min(call.timeout_seconds, call.until - began))
                if time.monotonic() >= call.until:
                    break
                continue
            except Unavailable as error:
                if isinstance(error, _GivenUp):
                    candidate.was_not_asked()
                    raise
                first_error = first_error or error
                candidate.failed(str(error))
                continue
            except BaseException:
                candidate.was_not_asked()
                raise
            if not _is_server_error(answer):
                candidate.worked()
                return answer
            # It lives, and cannot help: perhaps it alone has lost the servers.  One other opinion
            # is enough, as without a leader all of them say the same.
            problem = self._server_error(answer)
            candidate.could_not_help(str(problem))
            first_error = first_error or problem
            server_errors += 1
            if server_errors == 2:
                break
        assert first_error is not None
        raise first_error

    # -- one exchange ------------------------------------------------------------------------

    def _ask(self, address: Host, call: _Call) -> Answer:
        """Ask one agent; whatever status it answers is an answer."""
        token = self._current_token(call.at(address))
        exchange = call.line.exchange_with(address)
        deadline = min(time.monotonic() + call.timeout_seconds, call.until)
        try:
            answer = self._send(exchange, address, call, token, deadline)
            if answer.status == 403 and self._settings.token_file:
                fresh = self._current_token(call.at(address), is_refused=True)
                if fresh != token:
                    answer = self._send(exchange, address, call, fresh, deadline)
        except Unavailable:
            call.line.raise_if_interrupted()
            raise
        return answer

    def _send(
        self, exchange: Exchange, address: Host, call: _Call, token: str | None, deadline: float
    ) -> Answer:
        where = call.at(address)
        headers = {"X-Consul-Token": token} if token else {}
        asked_at, left_seconds = self._clock(), deadline - time.monotonic()
        try:
            found = exchange.request(
                call.method, call.path, call.params, call.body, headers, deadline
            )
        except TimeoutError:
            problem: Unavailable = TimedOut(
                f"{where}: no answer within {max(0.0, left_seconds):.3g} s; "
                "check that the agent and its servers are up"
            )
        except (OSError, HTTPException, ValueError) as error:
            reason = _shown(getattr(error, "strerror", None) or str(error), token)
            kind = TooLarge if isinstance(error, AnswerTooLarge) else Unavailable
            problem = kind(f"{where}: {reason}; {self._remedy()}")
        else:
            index = found.headers.get("X-Consul-Index", "")
            filtered = found.headers.get("X-Consul-Results-Filtered-By-ACLs", "")
            age = found.headers.get("Age", "")
            return Answer(
                found.status,
                found.body,
                int(index) if index.isascii() and index.isdecimal() and len(index) < 20 else 0,
                filtered.lower() == "true",
                where,
                address,
                "" if found.status == 200 else _shown(found.body.decode("utf-8", "replace"), token),
                asked_at,
                float(age) if age.isascii() and age.isdecimal() and len(age) < 10 else 0.0,
            )
        # Not inside `except`: the foreign error may repeat what it was sent.
        raise problem

    def _new_exchange(self, address: Host) -> Exchange:
        settings = self._settings
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
        if call.needs:
            return call.needs
        policy = "read" if call.method == "GET" else "write"
        if self._settings.mode == "service":
            return f"service {policy} for the services of its topics"
        if call.path.startswith("/v1/session/"):
            return 'session_prefix "" write'
        if call.path.startswith("/v1/agent/"):
            return 'service "consul-matchmaker" write (because of liveness=check)'
        return f'key_prefix "{self._settings.prefix}/" {policy}'

    def _server_error(self, answer: Answer) -> Unavailable:
        kind = Overloaded if answer.status == 429 else Unavailable
        return kind(f"{self._said(answer)}: the agent cannot help now, try again")

    def _said(self, answer: Answer) -> str:
        said = f", '{answer.said}'" if answer.said else ""
        return f"{answer.where}: status {answer.status}{said}"

    # -- token -------------------------------------------------------------------------------

    def _current_token(self, what_for: str, *, is_refused: bool = False) -> str | None:
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
            raise Denied(f"{what_for}: {error}") from None
        with self._lock:
            self.token_changes += token != self._token
            self._token, self._token_stamp = token, stamp
        return token

    def _stamp(self) -> object:
        """What changes when the token may have changed; None when that cannot be said."""
        if self._settings.token_file is None:
            return "it is a setting"
        try:
            return stamp_of(self._settings.token_file)
        except OSError:
            return None


class Line:
    """Connections that whoever made it can close: one, or those that all callers share.

    Its own is to whichever agent is asked, for one call after another.  Calls over it come from one
    thread at a time; `interrupt` and `close` may come from any, also from a signal handler.
    """

    def __init__(
        self, new_exchange: Callable[[Host], Exchange], *, is_shared: bool = False
    ) -> None:
        self._new_exchange = new_exchange
        self._is_shared = is_shared
        self._exchanges: dict[Host, Exchange] = {}
        self._is_interrupted = self._is_closed = False

    def interrupt(self) -> None:
        """Make the call that is under way, or else the next one, raise Unavailable at once."""
        self._is_interrupted = True
        for exchange in tuple(self._exchanges.values()):
            exchange.abort()

    def close(self) -> None:
        """Interrupt, and have every later call raise Unavailable too."""
        self._is_closed = True
        self.interrupt()

    def exchange_with(self, address: Host) -> Exchange:
        """The connections to *address*; the one to another agent is closed, unless shared."""
        exchange = self._exchanges.get(address)
        if exchange is None:
            if not self._is_shared:
                for other in self._exchanges.values():
                    other.close()
                self._exchanges.clear()
            exchange = self._exchanges.setdefault(address, self._new_exchange(address))
        self.raise_if_interrupted()  # now that `interrupt` finds what to end
        return exchange

    def raise_if_interrupted(self) -> None:
        """Raise Unavailable once for an interrupt, or for several."""
        exchanges = tuple(self._exchanges.values())
        if self._is_interrupted or any(exchange.is_aborted for exchange in exchanges):
            self._exchanges.clear()
            self._is_interrupted = self._is_closed
            how = "closed: make a new matchmaker" if self._is_closed else "given up by its owner"
            raise _GivenUp(f"the connection to Consul was {how}")


def timeout_until(until: float) -> float | None:
    """The seconds until then, by `time.monotonic`; None: as many as a call takes by default."""
    return None if until == math.inf else until - time.monotonic()


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
