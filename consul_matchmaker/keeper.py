"""Keep registrations true: carry out a Reconciler's actions against a Registrar, on one thread."""

from __future__ import annotations

import atexit
import collections
import dataclasses
import logging
import os
import random
import threading
import time
import weakref
from collections.abc import Callable
from typing import Literal

from .backends import Registrar
from .errors import Closed, Denied, MatchmakerError, TimedOut, Unavailable
from .lease_state import (
    Call,
    Kind,
    Note,
    Open,
    Outcome,
    Publish,
    Reconciler,
    Renew,
    Standing,
    State,
    Stop,
    Wait,
    Withdraw,
)
from .model import Host, Registration
from .settings import Settings
from .worker import Worker, forget_in_child

logger = logging.getLogger(__name__)

RECENT_EVENTS = 50
SECONDS_AT_EXIT = 2.0  # what a process that ends without close() spends on leaving, at most

_LEVELS = {
    Kind.PUBLISHED: logging.INFO,
    Kind.WITHDRAWN: logging.INFO,
    Kind.RECOVERED: logging.INFO,  # nothing to do for anybody
    Kind.STRAY: logging.WARNING,
    Kind.UNREACHABLE: logging.WARNING,
    Kind.OVERDUE: logging.WARNING,
    Kind.REPAIRED: logging.WARNING,
    Kind.REFUSED: logging.ERROR,  # goes on until a person gives us another token
}

Change = Literal["held", "lost"]
Listener = Callable[[Registration, Change], None]


class Keeper:
    """Holds one lease for every registration of this process, and repairs whatever is lost.

    Its thread starts with the first `register`; no call but `close` and the waits ever waits for
    Consul.  Thread-safe.  A forked child starts with no registration, lease or thread, and never
    touches its parent's.  A process that ends without `close` leaves at once too, unless it is
    killed or ends by a signal nobody handles (SIGTERM's default): then its lease runs out.

    With ``threaded=False`` there is no thread: the owner calls `step`.
    """

    def __init__(
        self,
        registrar: Registrar,
        settings: Settings,
        *,
        clock: Callable[[], float] = time.monotonic,
        jitter: Callable[[], float] = random.random,
        threaded: bool = True,
    ) -> None:
        self._registrar = registrar
        self._settings = settings
        self._clock = clock
        self._jitter = jitter
        self._threaded = threaded
        self._listeners: list[Listener] = []
        self._worker = Worker("consul-matchmaker-keeper", self.step)
        self._make_clean()
        forget_in_child(self)
        _keepers.add(self)

    def _make_clean(self) -> None:
        self._changed = threading.Condition()  # re-entrant: a signal handler may call close()
        self._reconciler = Reconciler(self._settings.session_ttl_seconds, self._jitter)
        self._events: collections.deque[tuple[float, Note]] = collections.deque(
            maxlen=RECENT_EVENTS
        )
        self._told: dict[Registration, Change] = {}
        self._stepping_thread: int | None = None
        self._may_give_up = self._gave_up = False  # the first is close's word, the second step's
        self._pid = os.getpid()

    # What it is asked

    def register(self, registration: Registration) -> Registration:
        """Make *registration* visible as soon as Consul can be asked, and keep it so.

        Returns at once the same registration, owned by this keeper.  Raises Closed.
        """
        owned = dataclasses.replace(registration, owner=self)
        with self._changed:
            self._reconciler.want(owned, self._clock())
        self._go_on()
        return owned

    def unregister(self, registration: Registration) -> None:
        """Take back this registration (topic, host and server) and no other; idempotent."""
        self._unregister([registration])

    def unregister_host(self, topic: str, host: Host) -> None:
        """Take back every registration of *topic* on *host*, whatever its server; idempotent."""
        with self._changed:
            found = [r for r in self._reconciler.wanted if (r.topic, r.host) == (topic, host)]
        self._unregister(found)

    def _unregister(self, registrations: list[Registration]) -> None:
        with self._changed:
            for registration in registrations:
                self._reconciler.unwant(registration, self._clock())
            self._changed.notify_all()
        self._worker.wake()

    def renew_now(self) -> None:
        """Renew the lease and verify every registration now instead of at the next renewal.

        Does not wait for it.  However often it is called, Consul is asked about once a second."""
        with self._changed:
            self._reconciler.ask_renewal(self._clock())
        self._worker.wake()

    def listen(self, listener: Listener) -> None:
        """Have ``listener(registration, "held" | "lost")`` called when either becomes true.

        "lost" is said when Consul has dropped a registration, or may have: its lease could not be
        renewed for a whole TTL.  Called on the keeper's thread: it must return soon, as nothing is
        renewed meanwhile.  What it raises is logged.
        """
        self._listeners.append(listener)

    # What it knows

    def holds(self, topic: str, host: Host) -> bool:
        """Whether this process registered *topic* on *host* and did not take it back."""
        with self._changed:
            return any((r.topic, r.host) == (topic, host) for r in self._reconciler.wanted)

    def standing(self, registration: Registration) -> Standing:
        """What has become of it: pending, published, suspect, lost, refused, withdrawn..."""
        with self._changed:
            return self._reconciler.standing(registration)

    def margin_seconds(self, registration: Registration) -> float:
        """How long Consul surely goes on showing it if nothing is heard from us any more.

        0 while it is not published.  Not counted: somebody deleting it, or the end of its agent.
        """
        with self._changed:
            if not self._reconciler.is_published(registration):
                return 0.0
            return self._reconciler.margin_seconds(self._clock())

    def wait_until_published(self, registration: Registration, timeout_seconds: float) -> None:
        """Return once Consul has confirmed *registration*.

        Raises TimedOut, saying why it is not; Denied at once while Consul refuses; Closed when
        this keeper is closed, or the registration is not (or no longer) one of its own.
        """
        deadline = self._clock() + timeout_seconds
        with self._changed:
            while not self._reconciler.is_published(registration):
                if self._is_closing:
                    raise Closed(f"{registration} was not published: its Matchmaker was closed")
                if not self._reconciler.is_wanted(registration):
                    raise Closed(f"{registration} is not registered here: register it (again)")
                error = self._reconciler.error_of(registration)
                if isinstance(error, Denied):
                    raise Denied(f"{registration} was not published: {error}") from error
                remaining = deadline - self._clock()
                if remaining <= 0:
                    reason = error or "Consul has not answered yet; still trying"
                    raise TimedOut(
                        f"{registration} was not published within {timeout_seconds:g} s: {reason}"
                    )
                self._changed.wait(remaining)

    def wait_until_withdrawn(self, registration: Registration, timeout_seconds: float) -> None:
        """Return once Consul cannot be showing an unregistered *registration* any more.

        Raises TimedOut; with ``timeout_seconds=0`` this only looks.
        """
        deadline = self._clock() + timeout_seconds
        with self._changed:
            while not self._reconciler.is_withdrawn(registration):
                remaining = deadline - self._clock()
                if remaining <= 0:
                    reason = self._reconciler.error_of(registration) or "not asked yet"
                    raise TimedOut(
                        f"{registration} was not withdrawn within {timeout_seconds:g} s: {reason}"
                    )
                self._changed.wait(remaining)

    def status(self) -> dict[str, object]:
        """Where everything stands, as plain values that JSON can say."""
        with self._changed:
            now, reconciler = self._clock(), self._reconciler
            error = reconciler.error_of()
            return {
                "state": str(reconciler.state),
                "lease": reconciler.lease.id if reconciler.lease else None,
                "margin_seconds": reconciler.margin_seconds(now),
                "renews_in_seconds": reconciler.seconds_to_renewal(now),
                "error": str(error) if error else None,
                "registrations": [self._status_of(each) for each in reconciler.wanted],
                "counts": dict(reconciler.counts),
                "events": [
                    {"seconds_ago": now - at, "kind": note.kind.value, "text": note.text}
                    for at, note in self._events
                ],
            }

    def _status_of(self, registration: Registration) -> dict[str, object]:
        error = self._reconciler.error_of(registration)
        return {
            "topic": registration.topic,
            "host": str(registration.host),
            "server": registration.server,
            "standing": self._reconciler.standing(registration),
            "error": str(error) if error else None,
        }

    def __repr__(self) -> str:
        with self._changed:
            reconciler, now = self._reconciler, self._clock()
            published, wanted = reconciler.published_count, len(reconciler.wanted)
            count = f"{published}" if published == wanted else f"{published} of {wanted}"
            seconds = reconciler.seconds_to_renewal(now)
            renewal = "" if seconds is None else f", renews in {seconds:.1f}s"
            return f"<Keeper {reconciler.state}, {count} published{renewal}>"

    # Its end, and its child

    def close(self, timeout_seconds: float) -> bool:
        """Take everything back at once, end the thread; return whether that was done in time.

        False after *timeout_seconds* (Consul hangs or is away): the thread then ends after the call
        that it is in and one more try, and what that leaves ends by its TTL.  Idempotent.  Called
        on the keeper's own thread, by a listener, it does not wait.
        """
        deadline = time.monotonic() + timeout_seconds
        with self._changed:
            self._reconciler.close()
            self._changed.notify_all()
        self._worker.wake()
        if self._stepping_thread == threading.get_ident():
            return False
        if not self._threaded:
            while not self._is_closed and self.step() == 0.0:
                pass
            return self._is_closed
        with self._changed:
            self._changed.wait_for(
                lambda: self._is_closed or self._gave_up,
                timeout=max(0.0, deadline - time.monotonic()),
            )
            is_closed = self._is_closed
            self._may_give_up = not is_closed
        if is_closed:
            return self._worker.stop(max(0.0, deadline - time.monotonic()))
        self._worker.wake()
        return False

    def leave_at_exit(self, timeout_seconds: float) -> None:
        """Close, if this is the process that registered here and not a child that never knew."""
        if self._pid == os.getpid() and not self._is_closed:
            self.close(timeout_seconds)

    @property
    def _is_closing(self) -> bool:
        return self._reconciler.state in (State.CLOSING, State.CLOSED)

    @property
    def _is_closed(self) -> bool:
        return self._reconciler.state is State.CLOSED

    def forget(self) -> None:
        """In a forked child: nothing is registered here, and the lease is the parent's."""
        was_closing = self._is_closing
        self._worker.forget()
        self._make_clean()
        if was_closing:
            self._reconciler.close()

    # The thread

    def _go_on(self) -> None:
        if self._threaded:
            self._worker.start()
            self._worker.wake()

    def step(self) -> float | None:
        """Do the next thing; return in how many seconds to come again, None: when woken.

        The keeper's thread calls it; without one, its owner does, from one thread at a time.
        """
        self._stepping_thread = threading.get_ident()
        try:
            return self._step()
        finally:
            self._stepping_thread = None

    def _step(self) -> float | None:
        with self._changed:
            action = self._reconciler.next_action(self._clock())
            notes = self._take_notes()
            if isinstance(action, Wait) and self._is_closing and self._may_give_up:
                self._gave_up, action = True, Stop()
            if isinstance(action, Stop):
                self._changed.notify_all()
        if isinstance(action, Wait | Stop):
            self._tell(notes)
            if isinstance(action, Wait):
                return action.seconds
            self._worker.stop(0)
            return None
        outcome = self._carry_out(action)  # may take seconds; nobody is waiting for us
        with self._changed:
            self._reconciler.handle(outcome, self._clock(), action)
            notes += self._take_notes()
            self._changed.notify_all()
        self._tell(notes)
        return 0.0

    def _carry_out(self, action: Call) -> Outcome:
        try:
            if isinstance(action, Open):
                return self._registrar.open()
            if isinstance(action, Renew):
                return self._registrar.renew(action.lease)
            if isinstance(action, Publish):
                self._registrar.publish(action.lease, action.registration)
            elif isinstance(action, Withdraw):
                self._registrar.withdraw(action.lease, action.registration)
            else:
                self._registrar.release(action.lease)
        except MatchmakerError as error:
            return error
        except Exception as error:
            logger.exception("%s: unexpected error, trying on", type(action).__name__)
            return Unavailable(f"unexpected {type(error).__name__}: see the log")
        return None

    def _take_notes(self) -> list[Note]:
        notes = self._reconciler.take_notes()
        self._events.extend((self._clock(), note) for note in notes)
        return notes

    def _tell(self, notes: list[Note]) -> None:
        """Log the notes and tell the listeners; outside the lock, as both may take their time."""
        for note in notes:
            level = _LEVELS.get(note.kind)
            if level is not None:
                logger.log(level, "%s", note.text)
            if note.kind in (Kind.LOST, Kind.OVERDUE):
                self._tell_listeners(note.registrations, "lost")
            elif note.kind in (Kind.PUBLISHED, Kind.REPAIRED, Kind.RECOVERED):
                self._tell_listeners(note.registrations, "held")
            elif note.kind is Kind.WITHDRAWN:
                for registration in note.registrations:
                    self._told.pop(registration, None)

    def _tell_listeners(self, registrations: tuple[Registration, ...], change: Change) -> None:
        for registration in registrations:
            if self._told.get(registration) == change:
                continue
            self._told[registration] = change
            for listener in list(self._listeners):
                try:
                    listener(registration, change)
                except Exception:
                    logger.exception("the listener %r failed on %s", listener, registration)


_keepers: weakref.WeakSet[Keeper] = weakref.WeakSet()


def _leave_at_exit() -> None:
    """The process ends and nobody called close(): leave now instead of when the lease runs out."""
    deadline = time.monotonic() + SECONDS_AT_EXIT
    for keeper in list(_keepers):
        keeper.leave_at_exit(max(0.0, deadline - time.monotonic()))


atexit.register(_leave_at_exit)
