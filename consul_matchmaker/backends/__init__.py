"""The seam: what a backend has to do, as two small protocols.

Every verb is idempotent, may be called from any thread, ends within its deadline, and raises only
Unavailable (TimedOut), Denied and LeaseLost; ``lookup`` also InvalidTopic for a topic the backend
cannot express.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection
from typing import Protocol

from ..model import Host, Lease, Registration, Snapshot

ENOUGH_TIME = 0.9
"""A timeout says something of Consul, or of an agent, that had this share of the time it may need;
the rest is what callers spend before they ask."""


def seconds_left(until: float) -> float:
    """What is left until then, by `time.monotonic`, for a socket's timeout; raises TimeoutError
    when nothing is."""
    left = until - time.monotonic()
    if left <= 0:
        raise TimeoutError("no time was left")
    return left


class Resolver(Protocol):
    """Answers which hosts serve a topic."""

    finds_servers: bool
    """Whether ``lookup(topic, server)`` can find hosts that ``lookup(topic)`` does not name."""

    longest_lookup_seconds: float
    """How long a lookup may need: the *timeout_seconds* to give where the caller has none."""

    def lookup(self, topic: str, server: str | None = None, *, timeout_seconds: float) -> Snapshot:
        """Every live host of *topic*, perhaps none; with *server*, only that server's.

        Ends within *timeout_seconds*, whatever it still lacks: ``is_complete`` says whether the
        answer is all there is.

        Raises Unavailable when Consul cannot be asked, TimedOut when nothing came in time, Denied
        when it refuses."""

    def status(self) -> dict[str, object]:
        """Which agent is asked first, and which are left alone for now."""

    def wire(self) -> dict[str, dict[str, int]]:
        """What was said to agents and heard from them, by transport; see `Traffic`."""

    def close(self) -> None:
        """Close every connection for ever; a lookup under way, or later, raises Unavailable."""


OnDoubt = Callable[[str | None], None]
"""Told why a lease may have ended before its time, and None when that reason is over."""


class Registrar(Protocol):
    """Makes registrations visible to everybody, under one lease a process."""

    def open(self, on_doubt: OnDoubt | None = None) -> Lease:
        """A new lease, which ends by itself when it is not renewed.

        Where it may end sooner than that, *on_doubt* is called, on any thread: then only a renewal
        tells what has become of it."""

    def publish(self, lease: Lease, registration: Registration) -> None:
        """Make *registration* visible until it is withdrawn or *lease* ends."""

    def withdraw(self, lease: Lease, registration: Registration) -> None:
        """Take back what *lease* published for *registration*, and nothing else."""

    def pause(self, registration: Registration) -> bool:
        """Have readers leave *registration* while it stays published, also when it is published
        again, until it is withdrawn; False where none can."""

    def resume(self, registration: Registration) -> bool:
        """Undo `pause`, from when it is published again; whether it was paused."""

    def renew(self, lease: Lease) -> Collection[Registration]:
        """Keep *lease* alive; return every registration that Consul really holds under it.

        A `Held` when some could not be checked: the lease is renewed all the same.
        Raises LeaseLost when Consul says that the lease is gone: the only proof of a loss."""

    def release(self, lease: Lease) -> None:
        """End *lease* and everything published under it, at once."""

    def expire(self, topic: str, host: Host) -> int:
        """Remove *host*'s registrations of *topic*, whoever owns them; return how many."""

    def topics(self) -> list[str]:
        """Every topic that has a registration, sorted."""

    def close(self) -> None:
        """Close every connection; leases are left alone."""
