"""Keep a TTL check on an agent passing, so that Consul sees soon that this process is gone."""

from __future__ import annotations

import json
import logging
import threading
import uuid
from collections.abc import Callable

from ..errors import Denied, Unavailable
from ..model import Host
from ..worker import MakeWorker, Worker, seconds_since_boot
from . import OnDoubt
from .http.api import ConsulApi, Line, go_duration

logger = logging.getLogger(__name__)

SERVICE = "consul-matchmaker"
"""What it is called in Consul's catalog; a token needs ``service`` write for it."""
BEAT_EVERY = 0.3
"""Of the check's TTL: two beats may be late, as a busy machine keeps a live process from its
processor now and then.  They never leave the agent, and write nothing to Raft (fact F)."""
BEAT_TIMEOUT = 0.5
"""Of the check's TTL: then another beat is tried before it ends."""
DEREGISTER_AFTER = "1m"
"""The least that Consul takes: what a killed process leaves in the catalog is gone after this."""
END_SECONDS = 0.5
"""How long `close` waits for the thread: it is in no call by then that takes longer."""


class Liveness:
    """A service with a TTL check on one agent, which a thread keeps passing.  Thread-safe.

    The thread does nothing else, over a connection of its own, so that nothing else that this
    process waits for holds a beat up.  The check lives on the agent that was asked, so a session
    bound to it has to be made there.
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
        self._lock = threading.Lock()
        self._line = self._api.line()
        self.id = f"{SERVICE}-{uuid.uuid4().hex}"
        self._place: Host | None = None
        self._on_doubt: OnDoubt | None = None
        self._is_in_doubt = False
        self._token_changes = 0
        self._due_at = self._beaten_at = 0.0

    def register(self, on_doubt: OnDoubt | None = None) -> Host:
        """Register the service, its check passing, and keep it so; return the agent that has it.

        Idempotent.  When a beat fails, or comes so late that the check has ended, *on_doubt* is
        called with the reason, and with None when beats succeed again; on the thread that beats, so
        it has to return at once.
        """
        sent_at = self._clock()
        place = self._register(self._api, None, None)
        with self._lock:
            self._place, self._on_doubt, self._is_in_doubt = place, on_doubt, False
            self._beaten_at, self._due_at = sent_at, sent_at + self._beat_seconds
        self._worker.start()
        self._worker.wake()
        return place

    def _register(
        self, way: ConsulApi | Line, at: Host | None, timeout_seconds: float | None
    ) -> Host:
        service = {
            "ID": self.id,
            "Name": SERVICE,
            "Check": {
                "CheckID": self.id,
                "Name": "beaten by the process itself",
                "TTL": go_duration(self._ttl_seconds),
                "Status": "passing",
                "DeregisterCriticalServiceAfter": DEREGISTER_AFTER,
            },
        }
        body = json.dumps(service).encode("ascii")
        path = "/v1/agent/service/register"
        answer = way.call("PUT", path, body=body, at=at, timeout_seconds=timeout_seconds)
        assert answer.address is not None
        self._token_changes = self._api.token_changes
        return answer.address

    def deregister(self) -> None:
        """Take the service out of the catalog; when that fails, Consul does it by itself."""
        with self._lock:
            place, self._place = self._place, None
        if place is None:
            return
        try:
            self._api.call("PUT", f"/v1/agent/service/deregister/{self.id}", at=place)
        except (Unavailable, Denied) as error:
            logger.debug("service %s stays for %s: %s", self.id, DEREGISTER_AFTER, error)

    def close(self) -> None:
        """End the thread, also while the agent does not answer; the service is left alone."""
        self._line.close()
        if not self._worker.stop(END_SECONDS):
            logger.debug("%r has not ended yet", self._worker)

    def step(self) -> float | None:
        """Beat if it is time; return in how many seconds to come again, None: when registered."""
        now = self._clock()
        with self._lock:
            place = self._place
            if place is None:
                return None
            if now < self._due_at:
                return self._due_at - now
            self._due_at = now + self._beat_seconds
            late_by = now - self._beaten_at - self._ttl_seconds
        problem = self._beat(place)
        has_beaten = problem is None
        if has_beaten and late_by > 0:  # suspended, or kept from the processor
            problem = f"the beat of check {self.id} was {late_by:.1f} s late"
        with self._lock:
            if self._place is None:  # deregistered meanwhile
                return None
            if has_beaten:
                self._beaten_at = now
            is_news = self._is_in_doubt != (problem is not None)
            self._is_in_doubt = problem is not None
            on_doubt, pause = self._on_doubt, max(0.0, self._due_at - self._clock())
        if is_news and on_doubt is not None:
            on_doubt(problem)
        return pause

    def _beat(self, place: Host) -> str | None:
        """Say that this process lives; return why that failed."""
        timeout_seconds = BEAT_TIMEOUT * self._ttl_seconds
        try:
            if self._api.token_changes != self._token_changes:
                # The agent tells the servers of this check with the token that registered it: once
                # that one is revoked they would never hear that we are gone.
                self._register(self._line, place, timeout_seconds)
            else:
                path = f"/v1/agent/check/pass/{self.id}"
                self._line.call("PUT", path, at=place, timeout_seconds=timeout_seconds)
        except (Unavailable, Denied) as error:
            return str(error)
        return None
