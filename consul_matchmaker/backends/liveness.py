"""A service with a TTL check, which a session of kv mode hangs on (``liveness=check``)."""

from __future__ import annotations

import json
import logging
import uuid
from collections.abc import Callable

from ..errors import Denied, Unavailable
from ..model import Host
from ..worker import MakeWorker, Worker, seconds_since_boot
from . import OnDoubt
from .beats import DEREGISTER_AFTER, REGISTER_PATH, Beats, ttl_check
from .http.api import ConsulApi

logger = logging.getLogger(__name__)

SERVICE = "consul-matchmaker"
"""What it is called in Consul's catalog; a token needs ``service`` write for it."""


class Liveness:
    """Thread-safe.  The check lives on the agent that was asked, so a session bound to it has to be
    made there."""

    def __init__(
        self,
        api: ConsulApi,
        ttl_seconds: float,
        *,
        clock: Callable[[], float] = seconds_since_boot,
        make_worker: MakeWorker = Worker,
    ) -> None:
        self._api = api
        self._beats = Beats(api, ttl_seconds, clock=clock, make_worker=make_worker)
        self._agent: Host | None = None
        self.id = f"{SERVICE}-{uuid.uuid4().hex}"
        service = {"ID": self.id, "Name": SERVICE, "Check": ttl_check(self.id, ttl_seconds)}
        self._service = json.dumps(service).encode("ascii")

    def register(self, on_doubt: OnDoubt | None = None) -> Host:
        """Register the service, its check passing, and keep it so; return the agent that has it.

        Idempotent.  *on_doubt*: see `Beats.begin`.
        """
        sent_at, token_changes = self._beats.now(), self._api.token_changes
        answer = self._api.call("PUT", REGISTER_PATH, body=self._service)
        assert answer.address is not None
        self._agent = answer.address
        self._beats.begin(answer.address, on_doubt)
        self._beats.keep(self.id, self._service, sent_at, token_changes)
        return answer.address

    def deregister(self) -> None:
        """Take the service out of the catalog; when that fails, Consul does it by itself."""
        agent, self._agent = self._agent, None
        if agent is None:
            return
        self._beats.drop(self.id)
        try:
            self._api.call("PUT", f"/v1/agent/service/deregister/{self.id}", at=agent)
        except (Unavailable, Denied) as error:
            logger.debug("service %s stays for %s: %s", self.id, DEREGISTER_AFTER, error)

    def close(self) -> None:
        """End the thread, also while the agent does not answer; the service is left alone."""
        self._beats.close()
