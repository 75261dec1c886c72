"""Keep registrations true: carry out a Reconciler's actions against a Registrar, on one thread."""

from __future__ import annotations

import atexit
import collections
import contextlib
import dataclasses
import logging
import math
import os
import random
import threading
import time
import weakref
from collections.abc import Callable
from typing import Literal

from ..backends import Registrar
from ..errors import Closed, Denied, MatchmakerError, TimedOut, Unavailable
from ..model import Host, Registration, Standing
from ..settings import Settings
from ..worker import MakeWorker, Worker, seconds_since_boot
from .beats import Beats
from .reconciler import (
    Call,
    Kind,
    Note,
    Open,
    Outcome,
    Publish,
    Reconciler,
    Renew,
    State,
    Stop,
    Wait,
    Withdraw,
)

logger = logging.getLogger(__name__)

RECENT_EVENTS = 50
EXIT_SECONDS = 2.0  # what a process that ends without close() spends on leaving, at most

Change = Literal["held", "lost"]
Listener = Callable[[Registration, Change], None]

# How each kind of note is logged, and what the listeners of its registrations hear.
_TELLING: dict[Kind, tuple[int, Change | None]] = {
    Kind.PUBLISHED: (logging.INFO, "held"),
    Kind.WITHDRAWN: (logging.INFO, None),
    Kind.RECOVERED: (logging.INFO, "held"),  # nothing to do for anybody
    Kind.LOST: (logging.DEBUG, "lost"),  # REPAIRED will say it all
    Kind.STRAY: (logging.WARNING, None),
    Kind.UNREACHABLE: (logging.WARNING, None),
    Kind.OVERDUE: (logging.WARNING, "lost"),
    Kind.SILENT: (logging.WARNING, "lost"),
    Kind.REPAIRED: (logging.WARNING, "held"),
    Kind.REFUSED: (logging.ERROR, None),  # goes on until a person gives us another token
}


class Keeper:
    """Holds one lease for every registration of this process, and repairs whatever is lost.

    Its thread starts with the first `register`; no call but `close` and the waits ever waits for
    Consul.  Thread-safe.  A forked child starts with no registration, lease or thread, and never
    touches its parent's.  A process that ends without `close` leaves at once too, unless it is
    killed or ends by a signal nobody handles (SIGTERM's default): then its lease runs out.
    """

    def __init__(
        self,
        registrar: Registrar,
        settings: Settings,
        *,
        clock: Callable[[], float] = seconds_since_boot,
        jitter: Callable[[], float] = random.random,
        make_worker: MakeWorker = Worker,
    ) -> None:
        self._settings = settings
        self._clock = clock
        self._jitter = jitter
        self._make_worker = make_worker
        self.begin(registrar)
        _keepers.add(self)

    def begin(self, registrar: Registrar) -> None:
        """Hold nothing, and register with *registrar*: also in a forked child, where registrations
        of the parent refer to this very object."""
        self._registrar = registrar
        self._worker = self._make_worker("consul-matchmaker-keeper", self.step)
        self._changed = threading.Condition()
        self._reconciler = Reconciler(self._settings.lease_ttl_seconds, self._jitter)
        self._events: collections.deque[tuple[float, Note]] = collections.deque(
            maxlen=RECENT_EVENTS
        )
        self._listeners: dict[Registration, Listener] = {}
        self._told: dict[Registration, Change] = {}  # what each listener heard last
        self._beats = Beats()
        self._draining: set[Registration] = set()
        self._stepping_thread: threading.Thread | None = None
        self._may_give_up = False  # after one more try, if Consul has not answered until then
        self._pid = os.getpid()

    # What it is asked

    def register(
        self,
        registration: Registration,
        *,
        on_change: Listener | None = None,
        beat_seconds: float | None = None,
    ) -> Registration:
        """Make *registration* visible as soon as Consul can be asked, and keep it so.

        Returns at once the same registration, owned by this keeper.  *on_change* is called on the
        keeper's thread; it is told "lost" also when the lease could not be renewed for a whole TTL.
        *beat_seconds*: see `Matchmaker.register`.  Raises Closed, and Unavailable when the process
        cannot have the thread: then nothing is registered.
        """
        owned = dataclasses.replace(registration, owner=self)
        with self._changed:
            now = self._clock()
            self._reconciler.want(owned, now)
            if self._registrar.resume(owned):
                self._reconciler.want_again(owned, now)
            self._draining.discard(owned)
            self._changed.notify_all()
            self._drop_promises(owned)
            if on_change is not None:
                self._listeners[owned] = on_change
            if beat_seconds is not None:
                self._beats.promise(owned, beat_seconds, now)
        try:
            self._worker.start()
            self._worker.wake()
        except Unavailable:
            self._unregister([owned])
            raise
        return owned

    def unregister(self, registration: Registration) -> None:
        """Take back this registration (topic, host and server) and no other; idempotent."""
        self._unregister([registration])

    def unregister_host(self, topic: str, host: Host) -> None:
        """Take back every registration of *topic* on *host*, whatever its server; idempotent."""
        with self._changed:
            found = [r for r in self._registered() if (r.topic, r.host) == (topic, host)]
        self._unregister(found)

    def _unregister(self, registrations: list[Registration]) -> None:
        with self._changed:
            for registration in registrations:
                self._reconciler.unwant(registration, self._clock())
                self._drop_promises(registration)
            self._changed.notify_all()
        self._wake()

    def drain(self, registration: Registration, seconds: float) -> None:
        """Unregister, wait until Consul has confirmed it, and *seconds* more, or until `close`; in
        service mode into maintenance, wait, unregister.  Registered again meanwhile, it stays."""
        with self._changed:
            self._draining.add(registration)
        try:
            is_paused = False
            with contextlib.suppress(Unavailable, Denied):
                is_paused = self._registrar.pause(registration)
            if not is_paused:
                self.unregister(registration)
                self.wait_until_withdrawn(registration, seconds)
            with self._changed:
                self._changed.wait_for(
                    lambda: self._is_closing or registration not in self._draining, seconds
                )
                if not is_paused or registration not in self._draining:
                    return
                self.unregister(registration)
            self.wait_until_withdrawn(registration, seconds)
        finally:
            with self._changed:
                self._draining.discard(registration)

    def beat(self, registration: Registration) -> None:
        """See `Registration.beat`; does nothing when it is not registered any more."""
        with self._changed:
            if not self._is_registered(registration):
                return
            now = self._clock()
            was_silent = self._beats.beat(registration, now)
            if was_silent:
                self._reconciler.want(registration, now)
        if was_silent:
            self._wake()

    def renew_now(self) -> None:
        """Renew the lease and verify every registration now instead of at the next renewal.

        Does not wait for it.  However often it is called, Consul is asked about once a second."""
        with self._changed:
            self._reconciler.ask_renewal(self._clock())
        self._wake()

    # What it knows

    def holds(self, topic: str, host: Host) -> bool:
        """Whether this process registered *topic* on *host* and did not take it back."""
        with self._changed:
            return any((r.topic, r.host) == (topic, host) for r in self._registered())

    def standing(self, registration: Registration) -> Standing:
        """What has become of it: pending, published, suspect, lost, refused, withdrawn..."""
        with self._changed:
            return self._standing(registration)

    def _standing(self, registration: Registration) -> Standing:
        if self._beats.is_silent(registration):
            return "silent"
        return self._reconciler.standing(registration)

    def _is_registered(self, registration: Registration) -> bool:
        return self._beats.is_silent(registration) or self._reconciler.is_wanted(registration)

    def _registered(self) -> list[Registration]:
        """What the application wants, also what is taken back while it does not beat."""
        return [*self._reconciler.wanted, *self._beats.silent]

    def margin_seconds(self, registration: Registration) -> float:
        """See `Registration.margin_seconds`."""
        with self._changed:
            if not self._reconciler.is_published(registration):
                return 0.0
            return self._reconciler.margin_seconds(self._clock())

    def wait_until_published(self, registration: Registration, timeout_seconds: float) -> None:
        """Return once Consul has confirmed *registration*.

        Raises TimedOut, saying why it is not; Denied at once while Consul refuses; Closed when
        this keeper is closed, or the registration is not (or no longer) its own.
        """
        with self._changed:
            if not self._changed.wait_for(
                lambda: self._is_published(registration), timeout_seconds
            ):
                error = self._reconciler.error_of(registration)
                raise TimedOut(
                    f"{registration} was not published within {timeout_seconds:g} s: "
                    f"{error or 'Consul has not answered yet; still trying'}"
                )

    def _is_published(self, registration: Registration) -> bool:
        """Raises what `wait_until_published` does when waiting is in vain."""
        if self._reconciler.is_published(registration):
            return True
        if self._is_closing:
            raise Closed(f"{registration} was not published: its Matchmaker was closed")
        if not self._is_registered(registration):
            raise Closed(f"{registration} is not registered here: register it (again)")
        error = self._reconciler.error_of(registration)
        if isinstance(error, Denied):
            raise Denied(f"{registration} was not published: {error}") from error
        return False

    def wait_until_withdrawn(self, registration: Registration, timeout_seconds: float) -> None:
        """Return once Consul cannot be showing an unregistered *registration* any more.

        Raises TimedOut; with ``timeout_seconds=0`` this only looks.
        """
        with self._changed:
            if not self._changed.wait_for(
                lambda: self._reconciler.is_withdrawn(registration), timeout_seconds
            ):
                reason = self._reconciler.error_of(registration) or "not asked yet"
                raise TimedOut(
                    f"{registration} was not withdrawn within {timeout_seconds:g} s: {reason}"
                )

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
                "thread_has_died": self._worker.has_died,
                "registrations": [self._status_of(each) for each in self._registered()],
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
            "standing": self._standing(registration),
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

    # Its end

    def close(self, timeout_seconds: float) -> bool:
        """Take everything back at once, end the thread; return whether that was done in time.

        False after *timeout_seconds* (Consul hangs or is away): the thread then ends after the call
        that it is in and one more try, and what that leaves ends by its TTL.  Idempotent.  Called
        on the keeper's own thread, by a listener, it does not wait.
        """
        deadline = time.monotonic() + timeout_seconds
        self.begin_to_close()
        if self._stepping_thread is threading.current_thread():
            return False
        with self._changed:
            self._changed.wait_for(
                lambda: self._is_closed or self._worker.is_stopping, timeout_seconds
            )
            is_closed = self._is_closed
            self._may_give_up = not is_closed
        if is_closed:
            return self._worker.stop(max(0.0, deadline - time.monotonic()))
        self._worker.wake()
        return False

    def begin_to_close(self) -> None:
        """Have the thread take everything back, without waiting for it.  Idempotent."""
        with self._changed:
            self._reconciler.close()
            self._beats.clear()
            self._changed.notify_all()
        self._wake()

    @property
    def leaves_at_exit(self) -> bool:
        """Whether this process may still have something registered here: a child never had."""
        return self._pid == os.getpid() and not self._is_closed

    @property
    def _is_closing(self) -> bool:
        return self._reconciler.state in (State.CLOSING, State.CLOSED)

    @property
    def _is_closed(self) -> bool:
        return self._reconciler.state is State.CLOSED

    # The thread

    def _wake(self) -> None:
        if self._worker.has_died:
            with contextlib.suppress(Unavailable):  # then whoever comes next starts it
                self._worker.start()
        self._worker.wake()

    def _doubt_lease(self, reason: str | None) -> None:
        """Ask at once what became of the lease: only a renewal tells.  Returns at once."""
        if reason is not None:
            logger.info("a beat failed, asking what became of the lease: %s", reason)
        self.renew_now()

    def step(self) -> float | None:
        """Do the next thing; return in how many seconds to come again, None: when woken."""
        self._stepping_thread = threading.current_thread()
        with self._changed:
            now = self._clock()
            notes = self._take_back_the_silent(now)
            action = self._reconciler.next_action(now)
            notes += self._take_notes()
            if isinstance(action, Wait) and self._is_closing and self._may_give_up:
                action = Stop()
            if isinstance(action, Stop):
                self._worker.stop(0)
                self._changed.notify_all()
            until_silence = self._beats.next_silence_at - now
        if isinstance(action, Wait | Stop):
            self._tell(notes)
            pause = action.seconds if isinstance(action, Wait) else None
            if until_silence < math.inf:
                pause = until_silence if pause is None else min(pause, until_silence)
            return pause
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
                return self._registrar.open(self._doubt_lease)
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
        except BaseException as error:  # else the action would stay under way for ever
            logger.exception("%s: unexpected error, trying on", type(action).__name__)
            return Unavailable(f"unexpected {type(error).__name__}: see the log")
        return None

    def _take_back_the_silent(self, now: float) -> list[Note]:
        """Stop wanting what is not beaten for."""
        notes = []
        for registration, seconds in self._beats.newly_silent(now):
            self._reconciler.unwant(registration, now)
            text = f"no beat for {registration} in {seconds:.1f} s: taking it back until one"
            notes.append(Note(Kind.SILENT, text, (registration,)))
        self._events.extend((now, note) for note in notes)
        return notes

    def _drop_promises(self, registration: Registration) -> None:
        self._beats.drop(registration)
        self._listeners.pop(registration, None)

    def _take_notes(self) -> list[Note]:
        notes = self._reconciler.take_notes()
        self._events.extend((self._clock(), note) for note in notes)
        return notes

    def _tell(self, notes: list[Note]) -> None:
        """Log the notes and tell the listeners; outside the lock, as both may take their time."""
        for note in notes:
            level, change = _TELLING[note.kind]
            logger.log(level, "%s", note.text)
            for registration in note.registrations:
                if note.kind is Kind.WITHDRAWN:
                    self._told.pop(registration, None)
                elif change is not None and self._told.get(registration) != change:
                    self._told[registration] = change
                    self._tell_listener(registration, change)

    def _tell_listener(self, registration: Registration, change: Change) -> None:
        listener = self._listeners.get(registration)
        if listener is None:
            return
        try:
            listener(registration, change)
        except BaseException:  # sys.exit() or a cancelled task: no end of the keeping
            logger.exception("the listener %r failed on %s", listener, registration)


_keepers: weakref.WeakSet[Keeper] = weakref.WeakSet()


def _leave_at_exit() -> None:
    """The process ends and nobody called close(): leave now instead of when the lease runs out."""
    deadline = time.monotonic() + EXIT_SECONDS
    leaving = [keeper for keeper in list(_keepers) if keeper.leaves_at_exit]
    for keeper in leaving:  # first all are told: one whose Consul hangs keeps no other from leaving
        keeper.begin_to_close()
    for keeper in leaving:
        keeper.close(max(0.0, deadline - time.monotonic()))


atexit.register(_leave_at_exit)
