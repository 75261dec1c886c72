"""Both protocols in a dict: for users' tests, for dry runs, and as the reference of the contract.

A `Memory` plays Consul itself, so several matchmakers of one process may share one.
"""

from __future__ import annotations

import threading
import time
import uuid
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from ..errors import Denied, LeaseLost, Unavailable
from ..fork import call_after_fork
from ..model import Host, Instance, Lease, Registration, Snapshot, checked_topic, host_of
from . import OnDoubt

LIVES_PER_TTL = 2
"""Consul keeps a session for exactly twice its TTL after the last renewal (fact B2)."""


@dataclass(slots=True)
class _HeldLease:
    ttl_seconds: float
    ends_at: float
    registrations: dict[Registration, None] = field(default_factory=dict)  # a set, in order


class Memory:
    """Resolver and Registrar without Consul.  Thread-safe.

    For tests it can fail on purpose: while ``is_available`` is False every verb raises Unavailable,
    while ``is_denied`` is True every verb raises Denied; `end_lease` and `delete` take away what
    Consul may take away.  `declare` lists hosts that need no lease, as operators do in a catalog.
    """

    finds_servers = False
    longest_lookup_seconds = 0.0  # it waits for nothing

    def __init__(
        self, *, session_ttl_seconds: float = 10.0, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.is_available = True
        self.is_denied = False
        self._ttl_seconds = session_ttl_seconds
        self._clock = clock
        self._lock = threading.Lock()
        self._leases: dict[str, _HeldLease] = {}
        self._declared: dict[str, tuple[Instance, ...]] = {}
        call_after_fork(self)

    # -- Resolver

    def lookup(
        self, topic: str, server: str | None = None, *, timeout_seconds: float = 0.0
    ) -> Snapshot:
        """Every live host of *topic*; with *server*, only that server's.  Waits for nothing."""
        checked_topic(topic)
        asked_at = self._clock()
        with self._lock:
            self._answer()
            found = {
                Instance(registration.host, registration.server)
                for lease in self._leases.values()
                for registration in lease.registrations
                if registration.topic == topic
            }
            instances = [*self._declared.get(topic, ()), *sorted(found, key=_order)]
        snapshot = Snapshot(topic, tuple(instances), "memory", taken_at=asked_at, clock=self._clock)
        return snapshot if server is None else snapshot.for_server(server)

    def status(self) -> dict[str, object]:
        """Nothing: there is no agent."""
        return {}

    def wire(self) -> dict[str, dict[str, int]]:
        """Nothing: there is no transport."""
        return {}

    # -- Registrar

    def open(self, on_doubt: OnDoubt | None = None) -> Lease:
        """A new lease; it ends 2 x its TTL after the last renewal, never in doubt before."""
        with self._lock:
            self._answer()
            lease = Lease(str(uuid.uuid4()), self._ttl_seconds)
            ends_at = self._clock() + LIVES_PER_TTL * lease.ttl_seconds
            self._leases[lease.id] = _HeldLease(lease.ttl_seconds, ends_at)
            return lease

    def publish(self, lease: Lease, registration: Registration) -> None:
        """Make *registration* visible until withdrawn or until *lease* ends."""
        with self._lock:
            self._answer()
            self._held(lease).registrations[registration] = None

    def withdraw(self, lease: Lease, registration: Registration) -> None:
        """Take back what *lease* published for *registration*; nothing else is touched."""
        with self._lock:
            self._answer()
            held = self._leases.get(lease.id)
            if held is not None:
                held.registrations.pop(registration, None)

    def pause(self, registration: Registration) -> bool:
        """There is no maintenance."""
        return False

    def resume(self, registration: Registration) -> bool:
        """There is no maintenance."""
        return False

    def renew(self, lease: Lease) -> tuple[Registration, ...]:
        """Keep *lease* alive; return what it holds.  Raises LeaseLost when it has ended."""
        with self._lock:
            self._answer()
            held = self._held(lease)
            held.ends_at = self._clock() + LIVES_PER_TTL * held.ttl_seconds
            return tuple(held.registrations)

    def release(self, lease: Lease) -> None:
        """End *lease* and everything published under it."""
        with self._lock:
            self._answer()
            self._leases.pop(lease.id, None)

    def expire(self, topic: str, host: Host) -> int:
        """Remove *host*'s registrations of *topic*, whoever owns them; return how many."""
        with self._lock:
            self._answer()
            return self._delete(topic, host)

    def topics(self) -> list[str]:
        """Every topic that has a registration, sorted."""
        with self._lock:
            self._answer()
            found = {
                registration.topic
                for lease in self._leases.values()
                for registration in lease.registrations
            }
            return sorted(found | {topic for topic, hosts in self._declared.items() if hosts})

    def after_fork(self) -> None:
        """In a forked child: a new lock.  What it holds stays, as it would in Consul."""
        self._lock = threading.Lock()

    def close(self) -> None:
        """Nothing to close: others may share this memory."""

    # -- what Consul or its operators do behind our back

    def declare(self, topic: str, hosts: Iterable[str | Host | Instance]) -> None:
        """List exactly *hosts* under *topic*, without a lease; an empty list takes them away."""
        instances = tuple(
            host if isinstance(host, Instance) else Instance(host_of(host)) for host in hosts
        )
        with self._lock:
            self._declared[checked_topic(topic)] = instances

    def end_lease(self, lease_id: str | None = None) -> None:
        """End that lease, or every lease, as when somebody destroys the session."""
        with self._lock:
            for one in [lease_id] if lease_id is not None else list(self._leases):
                self._leases.pop(one, None)

    def delete(self, topic: str, host: Host) -> int:
        """Delete registrations of *topic* on *host* although their lease lives; return how many."""
        with self._lock:
            return self._delete(topic, host)

    # -- with the lock held

    def _answer(self) -> None:
        """Fail if told to; else let what has run out end first, as Consul does by itself."""
        if not self.is_available:
            raise Unavailable("the memory backend was told not to answer: set is_available")
        if self.is_denied:
            raise Denied("the memory backend was told to refuse: clear is_denied")
        now = self._clock()
        for lease_id in [one for one, lease in self._leases.items() if lease.ends_at <= now]:
            del self._leases[lease_id]

    def _held(self, lease: Lease) -> _HeldLease:
        try:
            return self._leases[lease.id]
        except KeyError:
            raise LeaseLost(f"lease {lease} has ended: open another, publish again") from None

    def _delete(self, topic: str, host: Host) -> int:
        count = 0
        for lease in self._leases.values():
            for registration in list(lease.registrations):
                if registration.topic == topic and registration.host == host:
                    del lease.registrations[registration]
                    count += 1
        return count

    def __repr__(self) -> str:
        state = "" if self.is_available else ", unavailable"
        return f"<Memory {len(self._leases)} leases{state}>"


def _order(instance: Instance) -> tuple[Host, str]:
    return instance.host, instance.server or ""
