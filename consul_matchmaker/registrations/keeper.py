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
from ..errors import Closed, ConfigurationError, Denied, MatchmakerError, TimedOut, Unavailable
from ..model import Host, Registration, Standing
from ..settings import Settings
from ..worker import Worker, seconds_since_boot
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
SECONDS_AT_EXIT = 2.0  # what a process that ends without close() spends on leaving, at most

_LEVELS = {
    Kind.PUBLISHED: logging.INFO,
    Kind.WITHDRAWN: logging.INFO,
    Kind.RECOVERED: logging.INFO,  # nothing to do for anybody
    Kind.STRAY: logging.WARNING,
    Kind.UNREACHABLE: logging.WARNING,
    Kind.OVERDUE: logging.WARNING,
    Kind.SILENT: logging.WARNING,
    Kind.REPAIRED: logging.WARNING,
    Kind.REFUSED: logging.ERROR,  # goes on until a person gives us another token
}

Change = Literal["held", "lost"]
Listener = Callable[[Registration, Change], None]


@dataclasses.dataclass(slots=True)
class _Beats:
    """What the application promised for one registration, and when it last kept it."""

    every_seconds: float
    at: float
    is_silent: bool = False


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
        clock: Callable[[], float] = seconds_since_boot,
        jitter: Callable[[], float] = random.random,
        threaded: bool = True,
    ) -> None:
        self._settings = settings
        self._clock = clock
        self._jitter = jitter
        self._threaded = threaded
        self._listeners: list[Listener] = []
        self.begin(registrar)
        _keepers.add(self)

    def begin(self, registrar: Registrar) -> None:
        """Hold nothing, and register with *registrar*: also in a forked child, where registrations
        of the parent refer to this very object."""
        self._registrar = registrar
        self._worker = Worker("consul-matchmaker-keeper", self.step)
        self._changed = threading.Condition()
        self._reconciler = Reconciler(self._settings.session_ttl_seconds, self._jitter)
        self._events: collections.deque[tuple[float, Note]] = collections.deque(
            maxlen=RECENT_EVENTS
        )
        self._told: dict[Registration, Change] = {}
        self._own_listeners: dict[Registration, Listener] = {}
        self._beats: dict[Registration, _Beats] = {}
        self._silence_at = math.inf  # when somebody may have fallen silent, at the earliest
        self._stepping_thread: int | None = None
        self._may_give_up = self._gave_up = False  # the first is close's word, the second step's
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

        Returns at once the same registration, owned by this keeper.  *on_change* is what `listen`
        takes, for this registration alone.  With *beat_seconds* it is taken back whenever the
        application has not called `beat` for so long, and is back with the next one.
        Raises Closed, and Unavailable when the process cannot have the thread: then nothing is
        registered.
        """
        owned = dataclasses.replace(registration, owner=self)
        with self._changed:
            now = self._clock()
            self._reconciler.want(owned, now)
            self._forget_promises(owned)
            if on_change is not None:
                self._own_listeners[owned] = on_change
            if beat_seconds is not None:
                self._beats[owned] = _Beats(beat_seconds, now)
                self._silence_at = min(self._silence_at, now + beat_seconds)
        try:
            self._start()
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
                self._forget_promises(registration)
            self._changed.notify_all()
        self._wake()

    def drain(self, registration: Registration, seconds: float) -> None:
        """Unregister, wait until Consul has confirmed it, and *seconds* more, or until `close`.

        Raises TimedOut when Consul does not confirm it within *seconds*.
        """
        self.unregister(registration)
        self.wait_until_withdrawn(registration, seconds)
        with self._changed:
            self._changed.wait_for(lambda: self._is_closing, seconds)

    def beat(self, registration: Registration) -> None:
        """Say that what serves *registration* still runs.  Raises ConfigurationError when it was
        registered without ``beat_seconds``; does nothing when it is not registered any more."""
        with self._changed:
            beats = self._beats.get(registration)
            if beats is None:
                if self._reconciler.is_wanted(registration):
                    raise ConfigurationError(f"{registration}: register it with beat_seconds")
                return
            beats.at = self._clock()
            was_silent, beats.is_silent = beats.is_silent, False
            if was_silent:
                self._reconciler.want(registration, beats.at)
                self._silence_at = min(self._silence_at, beats.at + beats.every_seconds)
        if was_silent:
            self._wake()

    def renew_now(self) -> None:
        """Renew the lease and verify every registration now instead of at the next renewal.

        Does not wait for it.  However often it is called, Consul is asked about once a second."""
        with self._changed:
            self._reconciler.ask_renewal(self._clock())
        self._wake()

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
            return any((r.topic, r.host) == (topic, host) for r in self._registered())

    def standing(self, registration: Registration) -> Standing:
        """What has become of it: pending, published, suspect, lost, refused, withdrawn..."""
        with self._changed:
            return self._standing(registration)

    def _standing(self, registration: Registration) -> Standing:
        beats = self._beats.get(registration)
        if beats is not None and beats.is_silent:
            return "silent"
        return self._reconciler.standing(registration)

    def _is_registered(self, registration: Registration) -> bool:
        beats = self._beats.get(registration)
        is_silent = beats is not None and beats.is_silent
        return is_silent or self._reconciler.is_wanted(registration)

    def _registered(self) -> list[Registration]:
        """What the application wants, also what is taken back while it does not beat."""
        silent = [each for each, beats in self._beats.items() if beats.is_silent]
        return [*self._reconciler.wanted, *silent]

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
                if not self._is_registered(registration):
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

    def _start(self) -> None:
        if self._threaded:
            self._worker.start()
            self._worker.wake()

    def _wake(self) -> None:
        if self._worker.has_died:
            with contextlib.suppress(Unavailable):  # then whoever comes next starts it
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

    def _doubt_lease(self, reason: str | None) -> None:
        """Ask at once what became of the lease: only a renewal tells.  Returns at once."""
        if reason is not None:
            logger.info("a beat failed, asking what became of the lease: %s", reason)
        self.renew_now()

    def _step(self) -> float | None:
        with self._changed:
            now = self._clock()
            silence, seconds_to_silence = self._take_back_the_silent(now)
            action = self._reconciler.next_action(now)
            notes = silence + self._take_notes()
            if isinstance(action, Wait) and self._is_closing and self._may_give_up:
                self._gave_up, action = True, Stop()
            if isinstance(action, Stop):
                self._changed.notify_all()
        if isinstance(action, Wait | Stop):
            self._tell(notes)
            if isinstance(action, Wait):
                waits = (action.seconds, seconds_to_silence)
                return min((each for each in waits if each is not None), default=None)
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

    def _take_back_the_silent(self, now: float) -> tuple[list[Note], float | None]:
        """Stop wanting what is not beaten for; return the notes of it, and when to look again."""
        notes: list[Note] = []
        if now < self._silence_at:
            return notes, None if self._silence_at == math.inf else self._silence_at - now
        self._silence_at = math.inf
        for registration, beats in self._beats.items():
            if beats.is_silent:
                continue
            silent_at = beats.at + beats.every_seconds
            if silent_at > now:
                self._silence_at = min(self._silence_at, silent_at)
                continue
            beats.is_silent = True
            self._reconciler.unwant(registration, now)
            text = f"no beat for {registration} in {now - beats.at:.1f} s: taking it back until one"
            notes.append(Note(Kind.SILENT, text, (registration,)))
            self._events.append((now, notes[-1]))
        return notes, None if self._silence_at == math.inf else self._silence_at - now

    def _forget_promises(self, registration: Registration) -> None:
        self._beats.pop(registration, None)
        self._own_listeners.pop(registration, None)

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
            if note.kind in (Kind.LOST, Kind.OVERDUE, Kind.SILENT):
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
            own = self._own_listeners.get(registration)
            for listener in [*self._listeners, *([own] if own else [])]:
                try:
                    listener(registration, change)
                except BaseException:  # sys.exit() or a cancelled task: no end of the keeping
                    logger.exception("the listener %r failed on %s", listener, registration)


_keepers: weakref.WeakSet[Keeper] = weakref.WeakSet()


def _leave_at_exit() -> None:
    """The process ends and nobody called close(): leave now instead of when the lease runs out."""
    deadline = time.monotonic() + SECONDS_AT_EXIT
    leaving = [keeper for keeper in list(_keepers) if keeper.leaves_at_exit]
    for keeper in leaving:  # first all are told: one whose Consul hangs keeps no other from leaving
        keeper.begin_to_close()
    for keeper in leaving:
        keeper.close(max(0.0, deadline - time.monotonic()))


atexit.register(_leave_at_exit)
