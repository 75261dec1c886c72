"""Keep TTL checks on an agent passing, so that Consul sees soon that this process is gone."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from ..errors import Denied, TimedOut, Unavailable
from ..model import Host
from ..worker import MakeWorker, Worker, seconds_since_boot
from . import OnDoubt
from .http.api import ConsulApi, go_duration

logger = logging.getLogger(__name__)

BEAT_EVERY = 0.3
"""Of the checks' TTL: two beats may be late, as a busy machine keeps a live process from its
processor now and then.  They never leave the agent, and write nothing to Raft (fact F)."""
BEAT_TIMEOUT = 0.5
"""Of the checks' TTL: then another beat is tried before it ends."""
DEREGISTER_AFTER = "1m"
"""The least that Consul takes: what a killed process leaves in the catalog is gone after this."""
REGISTER_PATH = "/v1/agent/service/register"
END_SECONDS = 0.5
"""How long `close` waits for the thread: it is in no call by then that takes longer."""


def ttl_check(check_id: str, ttl_seconds: float) -> dict[str, object]:
    """The check that `Beats` keeps passing, as a service's definition has it."""
    return {
        "CheckID": check_id,
        "Name": "beaten by the process itself",
        "TTL": go_duration(ttl_seconds),
        "Status": "passing",
        "DeregisterCriticalServiceAfter": DEREGISTER_AFTER,
    }


@dataclass(slots=True)
class _Check:
    service: bytes
    """The definition that it was registered with."""
    beaten_at: float
    token_changes: int


class Beats:
    """TTL checks on one agent, which a thread keeps passing.  Thread-safe.

    The thread does nothing else, over a connection of its own, so that nothing else that this
    process waits for holds a beat up.
    """

    def __init__(
        self,
        api: ConsulApi,
        ttl_seconds: float,
        *,
        clock: Callable[[], float] = seconds_since_boot,
        make_worker: MakeWorker = Worker,
    ) -> None:
        self._api = api
        self._ttl_seconds = ttl_seconds
        self._beat_seconds = BEAT_EVERY * ttl_seconds
        self._clock = clock
        self._worker = make_worker("consul-matchmaker-liveness", self.step)
        self._line = api.line()
        self._lock = threading.Lock()
        self._agent: Host | None = None
        self._checks: dict[str, _Check] = {}
        self._unknown: dict[str, str] = {}
        self._on_doubt: OnDoubt | None = None
        self._is_in_doubt = False
        self._due_at = 0.0

    def begin(self, agent: Host, on_doubt: OnDoubt | None) -> None:
        """Beat at *agent* from now on, of what `keep` will name.

        When a beat fails, or comes so late that its check has ended, *on_doubt* is called with the
        reason, and with None when all beats succeed again; on the thread that beats, so it has to
        return at once.
        """
        with self._lock:
            self._agent, self._on_doubt, self._is_in_doubt = agent, on_doubt, False

    def keep(self, check_id: str, service: bytes, beaten_at: float, token_changes: int) -> None:
        """Keep the check passing that was registered with the definition *service*, passing since
        *beaten_at* by `clock`, and with the token of *token_changes*.  Raises Unavailable when the
        process cannot have the thread."""
        with self._lock:
            is_first = not self._checks
            self._checks[check_id] = _Check(service, beaten_at, token_changes)
            self._unknown.pop(check_id, None)
            if is_first:
                self._due_at = beaten_at + self._beat_seconds
        self._worker.start()
        self._worker.wake()

    def drop(self, check_id: str) -> None:
        """Let it go."""
        with self._lock:
            self._checks.pop(check_id, None)
            self._unknown.pop(check_id, None)

    def outdated(self, check_id: str) -> bytes | None:
        """The definition of its service, where that was registered with another token than the
        one of now: with that one the agent tells the servers of it, and of its end."""
        token_changes = self._api.look_at_token()
        with self._lock:
            check = self._checks.get(check_id)
        is_old = check is not None and check.token_changes != token_changes
        return check.service if is_old and check is not None else None

    @property
    def unknown(self) -> Mapping[str, str]:
        """The checks that the agent did not take the last beat of, and why."""
        with self._lock:
            return dict(self._unknown)

    def now(self) -> float:
        """The moment by the clock of the beats."""
        return self._clock()

    def close(self) -> None:
        """End the thread, also while the agent does not answer; the checks are left alone."""
        self._line.close()
        if not self._worker.stop(END_SECONDS):
            logger.debug("%r has not ended yet", self._worker)

    def step(self) -> float | None:
        """Beat if it is time; return in how many seconds to come again, None: when one is kept."""
        now = self._clock()
        with self._lock:
            agent, checks = self._agent, list(self._checks.items())
            if agent is None or not checks:
                return None
            if now < self._due_at:
                return self._due_at - now
            self._due_at = now + self._beat_seconds
        problem = None
        for check_id, check in checks:
            try:
                problem = self._beat(agent, check_id, check) or problem
            except Denied as error:  # the token may still beat for other services
                problem = str(error)
                self._not_taken(check_id, "the token may not beat for it")
            except Unavailable as error:
                problem = str(error)
                if isinstance(error, TimedOut):  # the others would take as long
                    break
            if self._worker.is_stopping:
                break
        with self._lock:
            if self._agent is not agent:
                return None
            is_news = self._is_in_doubt != (problem is not None)
            self._is_in_doubt = problem is not None
            on_doubt, pause = self._on_doubt, max(0.0, self._due_at - self._clock())
        if is_news and on_doubt is not None:
            on_doubt(problem)
        return pause

    def _not_taken(self, check_id: str, why: str) -> None:
        with self._lock:
            if check_id in self._checks:
                self._unknown[check_id] = why

    def _beat(self, agent: Host, check_id: str, check: _Check) -> str | None:
        """Say that this process lives; return what is wrong all the same.  Raises Unavailable and
        Denied."""
        path, body = f"/v1/agent/check/pass/{check_id}", b""
        token_changes = self._api.token_changes
        if token_changes != check.token_changes:
            # The agent tells the servers of this check with the token that registered it: once that
            # one is revoked they would never hear that we are gone.
            path, body = REGISTER_PATH, check.service
        now = self._clock()
        # An agent says 500 of a check that it does not know, and newer ones 404 (fact G17).
        answer = self._api.call(
            "PUT",
            path,
            body=body,
            accept=(404, 500),
            at=agent,
            timeout_seconds=BEAT_TIMEOUT * self._ttl_seconds,
            line=self._line,
        )
        late_by = now - check.beaten_at - self._ttl_seconds
        with self._lock:
            if check_id not in self._checks:
                return None
            if answer.status != 200:
                self._unknown[check_id] = "its check was removed"
                return f"{answer.where}: status {answer.status}, '{answer.said}'"
            self._unknown.pop(check_id, None)
            check.beaten_at, check.token_changes = now, token_changes
        if late_by > 0:  # suspended, or kept from the processor
            return f"the beat of check {check_id} was {late_by:.1f} s late"
        return None
