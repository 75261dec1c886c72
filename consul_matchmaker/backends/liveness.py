"""Keep a TTL check on an agent passing, so that Consul sees soon that we are gone."""

from __future__ import annotations

import json
import logging
import threading
import uuid
from collections.abc import Callable

from ..errors import Denied, Unavailable
from ..model import Host
from ..worker import seconds_since_boot
from .http.api import ConsulApi, go_duration

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


class ServiceCheck:
    """A service with a TTL check on one agent: there while this process beats.  Thread-safe.

    The check lives on the agent that was asked, so a session bound to it has to be made there.
    """

    def __init__(
        self,
        api: ConsulApi,
        ttl_seconds: float,
        *,
        clock: Callable[[], float] = seconds_since_boot,
    ) -> None:
        self._api = api
        self._ttl_seconds = ttl_seconds
        self._beat_seconds = BEAT_EVERY * ttl_seconds
        self._clock = clock
        self.forget()

    def forget(self) -> None:
        """In a forked child: the check is the parent's."""
        self._lock = threading.Lock()
        self.id = f"{SERVICE}-{uuid.uuid4().hex}"
        self._place: Host | None = None
        self._token_changes = 0
        self._due_at = self._beaten_at = 0.0
        self._error: Unavailable | Denied | None = None

    def register(self) -> Host:
        """Register the service, its check passing; return the agent that has it.  Idempotent."""
        sent_at = self._clock()
        place = self._register(None, None)
        with self._lock:
            self._place, self._error = place, None
            self._beaten_at, self._due_at = sent_at, sent_at + self._beat_seconds
        return place

    def _register(self, at: Host | None, timeout_seconds: float | None) -> Host:
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
        answer = self._api.call("PUT", path, body=body, at=at, timeout_seconds=timeout_seconds)
        assert answer.address is not None
        self._token_changes = self._api.token_changes
        return answer.address

    def beat(self) -> float | None:
        """Beat if it is time; return in how many seconds to come again, None: never.

        Raises Unavailable and Denied when the last beat failed or was too late, so that the lease
        may have ended.
        """
        pause = self._beat_if_due()
        error = self._error
        if error is not None:  # another object each time: a raised one collects tracebacks
            raise type(error)(*error.args)
        return pause

    def beat_meanwhile(self) -> float:
        """Beat if it is time, while something else is waited for; `beat` will raise its error."""
        pause = self._beat_if_due()
        return self._beat_seconds if pause is None else pause

    def deregister(self) -> None:
        """Take the service out of the catalog; when that fails, Consul does it by itself."""
        with self._lock:
            place, self._place, self._error = self._place, None, None
        if place is None:
            return
        try:
            self._api.call("PUT", f"/v1/agent/service/deregister/{self.id}", at=place)
        except (Unavailable, Denied) as error:
            logger.debug("service %s stays for %s: %s", self.id, DEREGISTER_AFTER, error)

    def _beat_if_due(self) -> float | None:
        now = self._clock()
        with self._lock:
            place = self._place
            if place is None:
                return None
            if now < self._due_at:
                return self._due_at - now
            self._due_at = now + self._beat_seconds
            late_by = now - self._beaten_at - self._ttl_seconds
        timeout_seconds = BEAT_TIMEOUT * self._ttl_seconds
        error: Unavailable | Denied | None = None
        has_beaten = False
        try:
            if self._api.token_changes != self._token_changes:
                # The agent tells the servers of this check with the token that registered it: once
                # that one is revoked they would never hear that we are gone.
                self._register(place, timeout_seconds)
            else:
                path = f"/v1/agent/check/pass/{self.id}"
                self._api.call("PUT", path, at=place, timeout_seconds=timeout_seconds)
        except (Unavailable, Denied) as failure:
            error = failure
        else:
            has_beaten = True
            if late_by > 0:  # suspended, or kept from the processor
                error = Unavailable(f"the beat of check {self.id} was {late_by:.1f} s late")
        with self._lock:
            if has_beaten:
                self._beaten_at = now
            if self._place is not None:
                self._error = error
        return self._beat_seconds
