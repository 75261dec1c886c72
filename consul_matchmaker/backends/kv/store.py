"""Publish registrations as Consul keys held under one session.

What the choices rest on (facts B and C, measured): a key is written by ``acquire`` only and named
after its lease, so that nothing outlives its process and a restarted process never meets its dead
predecessor's key; a session has ``Behavior=delete``, no lock-delay and no serfHealth check, which
would end it on a gossip blip; the address is in the key, so that ``?keys`` alone answers a lookup.
"""

from __future__ import annotations

import json
import logging
import math
import os
import socket
import threading
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass
from datetime import datetime, timezone

from ...errors import Denied, LeaseLost, TimedOut, Unavailable
from ...model import Held, Host, Lease, Registration
from ...settings import Settings
from ...worker import seconds_since_boot
from .. import OnDoubt
from ..http.api import Answer, ConsulApi, go_duration
from ..http.leader import Confirmer
from ..liveness import Liveness
from .keys import SENTINEL, Key, host_folder
from .poll import Poll, confirmer
from .reader import Reader, kv_path
from .session_checks import held_keys, in_requests

logger = logging.getLogger(__name__)

CONSUL_SESSION_TTL_MIN_SECONDS = 10
"""Consul's own floor, unless the servers' session_ttl_min lowers it (fact B1)."""
LATE_SECONDS = 60.0
"""How long after its withdrawal a registration whose publishing was not answered is looked for:
Consul itself holds a request for 7 s while there is no leader (fact C8)."""
NO_INDEX = 2**62
"""A ModifyIndex that no key has: they count what was ever written."""
NODE_CHECK = "serfHealth"
"""Consul's name for "the node of this agent answers gossip"."""


@dataclass(slots=True)
class _Publication:
    """A registration that Consul may hold under a lease."""

    may_arrive_late: bool
    """Whether a request to publish it was not answered."""
    until: float = math.inf
    """When renewals stop looking for it."""


class Kv(Reader):
    """A Resolver and a Registrar over Consul's KV store and sessions.  Thread-safe.

    Makes no connection before the first call.
    """

    def __init__(
        self, api: ConsulApi, settings: Settings, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        super().__init__(api, settings, clock=clock)
        self._settings = settings
        self._liveness: Liveness | None = None
        if settings.liveness == "check":
            # A suspended machine has to notice that its beat is late.
            lasting = seconds_since_boot if clock is time.monotonic else clock
            self._liveness = Liveness(api, settings.check_ttl_seconds, clock=lasting)
        self._lock = threading.Lock()
        self._published: dict[str, dict[Registration, _Publication]] = {}  # by lease
        self._checks_fail = False  # whether that was said

    def close(self) -> None:
        """Close every connection but those of polls; leases are left alone."""
        if self._liveness is not None:
            self._liveness.close()
        super().close()

    def watch(self, topic: str | None) -> Poll:
        """Blocking queries of the folder of *topic*, or of all topics; nothing is asked yet."""
        return Poll(self, topic)

    def confirmer(self) -> Confirmer:
        """What asks whether the queries of `watch` would tell of a change."""
        return confirmer(self)

    # -- Registrar ---------------------------------------------------------------------------

    def open(self, on_doubt: OnDoubt | None = None) -> Lease:
        """A new session, which Consul ends 2 x TTL after the last renewal at the latest.

        With ``liveness=check`` it hangs on a check too, which a thread keeps passing; *on_doubt*
        is called when that fails."""
        ttl_seconds = self._settings.session_ttl_seconds
        # Beside our own check too: it runs on the agent, and says nothing once that is dead.
        node_checks = [] if self._settings.liveness == "session" else [NODE_CHECK]
        wanted: dict[str, object] = {
            "Name": "consul-matchmaker",
            "TTL": go_duration(ttl_seconds),
            "Behavior": "delete",
            "LockDelay": "0s",
            # Said twice, as releases differ in which one they read (fact B4).
            "Checks": node_checks,
            "NodeChecks": node_checks,
        }
        agent = None
        if self._liveness is not None:
            agent = self._liveness.register(on_doubt)
            wanted["ServiceChecks"] = [{"ID": self._liveness.id}]
        try:
            answer = self.api.call("PUT", "/v1/session/create", body=_json(wanted), at=agent)
        except Unavailable as error:
            if ttl_seconds >= CONSUL_SESSION_TTL_MIN_SECONDS:
                raise
            raise type(error)(
                f"{error} (session_ttl_seconds is {ttl_seconds:g}: below "
                f"{CONSUL_SESSION_TTL_MIN_SECONDS} the servers' session_ttl_min must allow it)"
            ) from error
        lease_id = _field(answer, "ID")
        with self._lock:
            self._published[lease_id] = {}
        return Lease(lease_id, ttl_seconds)

    def publish(self, lease: Lease, registration: Registration) -> None:
        """Make *registration* visible as long as *lease* lives."""
        publication = _Publication(may_arrive_late=True)
        with self._lock:  # before the call: if its outcome stays unknown, renew() finds out
            published = self._published.setdefault(lease.id, {})
            before = published.get(registration)
            published[registration] = publication
        params, value = {"acquire": lease.id}, self._description(registration)
        answer = self.api.call("PUT", self._path(lease, registration), params, value)
        publication.may_arrive_late = before is not None and before.may_arrive_late
        if answer.json() is not True:
            raise Unavailable(f"{answer.where}: the key is held by another session, trying again")

    def withdraw(self, lease: Lease, registration: Registration) -> None:
        """Delete the one key that *lease* holds for *registration*."""
        self.api.call("DELETE", self._path(lease, registration))
        with self._lock:
            published = self._published.get(lease.id, {})
            publication = published.get(registration)
            if publication is not None and publication.may_arrive_late:
                publication.until = self.clock() + LATE_SECONDS
            else:
                published.pop(registration, None)

    def pause(self, registration: Registration) -> bool:
        """A key has no maintenance."""
        return False

    def resume(self, registration: Registration) -> bool:
        """A key has no maintenance."""
        return False

    def renew(self, lease: Lease) -> Collection[Registration]:
        """Keep *lease* alive, and return what Consul holds of what we published under it.

        Renewing alone proves nothing of the keys: Consul goes on answering 200 when one was deleted
        (fact B7).  So each is checked, 64 a request, by a transaction that only reads: it costs
        what this process has published, however big the cluster is, and writes nothing to Raft.
        A check that fails leaves the lease renewed, and its keys unchecked in what is returned.
        """
        answer = self.api.call("PUT", f"/v1/session/renew/{lease.id}", accept=(404,))
        if answer.status == 404:
            self._drop(lease)
            raise LeaseLost(f"{answer.where}: Consul has ended this session; open another")
        by_key = {self._key(lease, each): each for each in self._looked_for(lease)}
        held: set[str] = set()
        unchecked: list[str] = []
        error: Unavailable | Denied | None = None
        for checks in in_requests((key, lease.id) for key in by_key):
            try:
                if not isinstance(error, TimedOut):  # hanging, it would hold up the next renewal
                    held |= held_keys(self.api, checks)
                    continue
            except (Unavailable, Denied) as failure:
                error = error or failure
            unchecked += [key for key, _ in checks]
        if error is not None and not self._checks_fail:
            logger.warning(
                "lease renewed, %d registrations not verified: %s", len(unchecked), error
            )
        self._checks_fail = error is not None
        found = {by_key[key] for key in held}
        return Held.of(found, [by_key[key] for key in unchecked]) if unchecked else found

    def release(self, lease: Lease) -> None:
        """Destroy the session; Consul deletes its keys with it, in the same Raft entry."""
        self.api.call("PUT", f"/v1/session/destroy/{lease.id}", accept=(404,))
        self._drop(lease)
        if self._liveness is not None:
            self._liveness.deregister()

    def expire(self, topic: str, host: Host) -> int:
        """Delete every key of *topic* on *host*, whoever holds it; return how many there were."""
        folder = host_folder(self.prefix, topic, host)
        keys, _ = self.keys_under(folder)
        if keys:
            self.api.call("DELETE", kv_path(folder), {"recurse": ""})
        return len(self.entries_of(keys))

    def prove_writable(self) -> None:
        """Raise Denied when the token may not write under the prefix.  Writes nothing: the index
        that is asked for is no key's."""
        self.api.call("PUT", kv_path(f"{self.prefix}/{SENTINEL}"), {"cas": str(NO_INDEX)})

    # -- what is published -------------------------------------------------------------------

    def _key(self, lease: Lease, registration: Registration) -> str:
        return Key.of(registration, lease.id).under(self.prefix)

    def _path(self, lease: Lease, registration: Registration) -> str:
        return kv_path(self._key(lease, registration))

    def _looked_for(self, lease: Lease) -> list[Registration]:
        """What Consul may hold under *lease*, sorted."""
        with self._lock:
            known, now = self._published.get(lease.id, {}), self.clock()
            for late in [each for each, publication in known.items() if publication.until <= now]:
                del known[late]
            return sorted(known, key=str)

    def _drop(self, lease: Lease) -> None:
        with self._lock:
            self._published.pop(lease.id, None)

    def _description(self, registration: Registration) -> bytes:
        """For people: nothing reads it back."""
        return _json(
            {
                "topic": registration.topic,
                "host": str(registration.host),
                "server": registration.server,
                "pid": os.getpid(),
                "hostname": socket.gethostname(),
                "registered_at": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            }
        )


def _json(value: object) -> bytes:
    return json.dumps(value).encode("ascii")


def _field(answer: Answer, name: str) -> str:
    body = answer.json()
    value = body.get(name) if isinstance(body, dict) else None
    if not isinstance(value, str) or not value:
        raise answer.unexpected()
    return value
