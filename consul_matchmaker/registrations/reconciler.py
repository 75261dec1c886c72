"""Decide what to do next so that what Consul shows becomes what is wanted; do none of it.

One `Reconciler` a process, for all its topics.  It is told what is *wanted* and what came of each
action, and knows the next one:

    action = reconciler.next_action(now)     # Open | Publish | Withdraw | Renew | Release | Wait...
    reconciler.handle(carry_out(action), now, action)

What happens when the session dies is all here.  Renewals that are not answered make the lease
SUSPECT; it stays the same lease however long that lasts, and after its TTL a note says that Consul
may have ended it.  Only Consul's word that it is gone (LeaseLost, to a renewal) makes it LOST: a
repair begins, another lease is opened, and all that is wanted is published under it.  A key that
somebody deleted is missing from a renewal's answer, and is repaired under the same lease.

It has no clock, lock, thread or I/O, so it is not thread-safe.  What it found out that a person
should know it leaves as notes: `take_notes`.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from ..backoff import Backoff
from ..errors import Closed, Denied, LeaseLost, MatchmakerError, TimedOut
from ..model import Held, Lease, Registration, Standing
from .differences import Differences, Trouble

RENEWALS_PER_TTL = 3  # two renewals may fail before the lease runs out
FAILED_CHANGES_PER_RENEWAL = 8
"""So many of them, and then none until a lease that is suspected was tried again: thousands of
registrations would each ask servers that recover, at paces of their own."""
RENEWAL_JITTER = 0.1  # a renewal comes up to a tenth early, so that processes drift apart
FIRST_RENEWAL_FROM = 0.1  # the first one anywhere in 10-100 % of the interval: started together,
#                           processes do not renew together
FIRST_RETRY_SECONDS = 0.5  # an election takes 1-6 s (fact C8): three or four retries get over it
ASKED_RENEWAL_SECONDS = 1.0  # renewals that callers ask for are at least this far apart


class State(enum.Enum):
    """What is known of the lease.  Only a LeaseLost makes it LOST; silence, however long, never."""

    IDLE = "IDLE"  # nothing wanted, no lease
    OPENING = "OPENING"  # something wanted, no lease yet
    HELD = "HELD"
    SUSPECT = "SUSPECT"  # the last renewal or release was not answered: held, as far as is known
    LOST = "LOST"  # Consul said that it is gone; another one is being opened
    CLOSING = "CLOSING"
    CLOSED = "CLOSED"

    def __str__(self) -> str:
        return self.value


class Event(enum.Enum):
    """What can happen to the lease."""

    WANTED = "something is wanted"
    UNWANTED = "nothing is wanted any more"
    OPENED = "a lease was opened"
    CONFIRMED = "the lease was renewed"
    FAILED = "opening, renewing or releasing was not answered, or refused"
    GONE = "Consul does not know the lease any more"
    RELEASED = "no lease is left"
    CLOSE = "it is time to go"


# What is not in it cannot happen, and says so (ImpossibleEvent).
TRANSITIONS: Mapping[State, Mapping[Event, State]] = MappingProxyType(
    {
        State.IDLE: {
            Event.WANTED: State.OPENING,
            Event.CLOSE: State.CLOSED,
        },
        State.OPENING: {
            Event.OPENED: State.HELD,
            Event.FAILED: State.OPENING,
            Event.UNWANTED: State.IDLE,
            Event.CLOSE: State.CLOSING,
        },
        State.HELD: {
            Event.CONFIRMED: State.HELD,
            Event.FAILED: State.SUSPECT,
            Event.GONE: State.LOST,
            Event.RELEASED: State.IDLE,
            Event.CLOSE: State.CLOSING,
        },
        State.SUSPECT: {
            Event.CONFIRMED: State.HELD,
            Event.FAILED: State.SUSPECT,
            Event.GONE: State.LOST,
            Event.RELEASED: State.IDLE,
            Event.CLOSE: State.CLOSING,
        },
        State.LOST: {
            Event.OPENED: State.HELD,
            Event.FAILED: State.LOST,
            Event.UNWANTED: State.IDLE,
            Event.CLOSE: State.CLOSING,
        },
        State.CLOSING: {
            Event.OPENED: State.CLOSING,  # the opening was under way: release what it brought
            Event.CONFIRMED: State.CLOSING,
            Event.FAILED: State.CLOSING,
            Event.GONE: State.CLOSED,
            Event.RELEASED: State.CLOSED,
            Event.CLOSE: State.CLOSING,
        },
        State.CLOSED: {
            Event.CLOSE: State.CLOSED,
        },
    }
)


class ImpossibleEvent(RuntimeError):
    """An event that the table does not have in this state: a bug in this package."""


@dataclass(frozen=True, slots=True)
class Open:
    """Open a lease."""


@dataclass(frozen=True, slots=True)
class Publish:
    lease: Lease
    registration: Registration


@dataclass(frozen=True, slots=True)
class Withdraw:
    lease: Lease
    registration: Registration


@dataclass(frozen=True, slots=True)
class Renew:
    lease: Lease


@dataclass(frozen=True, slots=True)
class Release:
    lease: Lease


@dataclass(frozen=True, slots=True)
class Wait:
    """Nothing to do for so long; None: until something is asked for."""

    seconds: float | None


@dataclass(frozen=True, slots=True)
class Stop:
    """All done, for ever."""


Call = Open | Publish | Withdraw | Renew | Release
"""What somebody with a connection to Consul has to carry out."""
Action = Call | Wait | Stop
Outcome = Lease | Collection[Registration] | MatchmakerError | None
"""What a call brought: Open a Lease, Renew the registrations held (a `Held` when some could not be
checked), the others nothing; or an error."""


class Kind(enum.Enum):
    """What a note is about."""

    PUBLISHED = "published"
    WITHDRAWN = "withdrawn"
    UNREACHABLE = "unreachable"  # Consul did not answer, once per outage
    REFUSED = "refused"  # Consul refuses the token, once until it does not
    RECOVERED = "recovered"  # an outage or a refusal ended, and nothing was lost
    OVERDUE = "overdue"  # not renewed for a whole TTL: Consul may have given us up by now
    LOST = "lost"  # lease or keys gone; says nothing to a person yet, `REPAIRED` will
    REPAIRED = "repaired"  # once per repair, with its cause and duration
    SILENT = "silent"  # the application has stopped beating for it
    STRAY = "stray"  # held by Consul but not wanted: an old request that arrived late


@dataclass(frozen=True, slots=True)
class Note:
    """Something that a person, or the owner of *registrations*, should know."""

    kind: Kind
    text: str
    registrations: tuple[Registration, ...] = ()


@dataclass(slots=True)
class _Repair:
    cause: str
    began_at: float
    pending: dict[Registration, None] = field(default_factory=dict)  # all that it is about
    missing: dict[Registration, None] = field(default_factory=dict)  # all of it that may be missing


class Reconciler:
    """The wanted registrations, the lease, and what is known to be published under it.

    *ttl_seconds* bounds the waits while there is no lease; a lease brings its own.
    """

    def __init__(self, ttl_seconds: float, jitter: Callable[[], float]) -> None:
        self._jitter = jitter
        # Never longer than a renewal interval: then everything is back within one after an outage.
        self._backoff = Backoff(FIRST_RETRY_SECONDS, ttl_seconds / RENEWALS_PER_TTL, jitter)
        self.state = State.IDLE
        self.lease: Lease | None = None
        self.counts = dict.fromkeys(
            ("opened", "renewed", "published", "withdrawn", "failed", "lost", "repaired"), 0
        )
        self._differences = Differences()
        self._changes_left = 0  # so many may fail until a suspected lease was tried again
        self._in_flight: Call | None = None
        self._sent_at = 0.0
        self._renew_at = math.inf
        self._confirmed_at = -math.inf  # when the last answered opening or renewal was *sent*
        self._lease_trouble: Trouble | None = None
        self._repair: _Repair | None = None
        self._notes: list[Note] = []

    # What is asked of it

    def want(self, registration: Registration, now: float) -> None:
        """From now on *registration* should be visible.  Raises Closed."""
        if self.state in (State.CLOSING, State.CLOSED):
            raise Closed("this keeper is closed: make a new Matchmaker")
        self._differences.want(registration, now)
        if self._repair is not None and registration in self._repair.pending:
            self._repair.missing[registration] = None

    def want_again(self, registration: Registration, now: float) -> None:
        """Publish *registration*, which is wanted, whatever is known of it."""
        self._differences.want_again(registration, now)

    def unwant(self, registration: Registration, now: float) -> None:
        """From now on *registration* should not be visible; idempotent."""
        self._differences.unwant(registration, now)
        self._settle_repair(now)
        if (
            not self._differences.wanted and self.lease is not None
        ):  # what releases it waits for no renewal
            self._hurry(now)

    def ask_renewal(self, now: float) -> None:
        """Renew, and so verify, at once; again and again asked for, about once a second."""
        at_earliest = max(now, self._confirmed_at + ASKED_RENEWAL_SECONDS)
        self._renew_at = min(self._renew_at, at_earliest)
        self._hurry(now)

    def _hurry(self, now: float) -> None:
        """Do not rest until the next retry of the lease."""
        if self._lease_trouble is not None:
            soon = max(now, self._sent_at + ASKED_RENEWAL_SECONDS)
            self._lease_trouble.retry_at = min(self._lease_trouble.retry_at, soon)

    def close(self) -> None:
        """Want nothing any more, release the lease without delay, then stop; idempotent."""
        self._on(Event.CLOSE)
        self._differences.wanted.clear()
        self._lease_trouble = self._repair = None

    # What it knows

    @property
    def wanted(self) -> tuple[Registration, ...]:
        return tuple(self._differences.wanted)

    def is_wanted(self, registration: Registration) -> bool:
        return registration in self._differences.wanted

    def is_published(self, registration: Registration) -> bool:
        """Whether it is wanted and Consul confirmed it; a SUSPECT lease does not undo that."""
        return self.is_wanted(registration) and not self._differences.is_missing(registration)

    def is_withdrawn(self, registration: Registration) -> bool:
        """Whether it is not wanted, and Consul cannot be showing it for us."""
        found = self._differences
        return registration not in found.wanted and registration not in found.maybe_published

    def standing(self, registration: Registration) -> Standing:
        """What has become of the wish."""
        if not self.is_wanted(registration):
            return "withdrawn" if self.is_withdrawn(registration) else "withdrawing"
        if self.is_published(registration):
            return "suspect" if self.state is State.SUSPECT else "published"
        if isinstance(self.error_of(registration), Denied):
            return "refused"
        if self._repair and registration in self._repair.pending:
            return "lost"
        return "pending"

    @property
    def published_count(self) -> int:
        return len(self._published_and_wanted())

    def error_of(self, registration: Registration | None = None) -> MatchmakerError | None:
        """Why it, or the lease, does not get on at the moment; None when nothing is wrong."""
        trouble = self._lease_trouble
        if trouble is None and registration is not None:
            trouble = self._differences.troubles.get(registration)
        return trouble.error if trouble else None

    def margin_seconds(self, now: float) -> float:
        """How long until Consul may give our lease up, at the earliest; 0 without a lease.

        Consul counts from when it answered (fact B2: to 2 x TTL, but promises only the TTL), which
        is not before the last answered call was sent.
        """
        if self.lease is None:
            return 0.0
        return max(0.0, self._confirmed_at + self.lease.ttl_seconds - now)

    def seconds_to_renewal(self, now: float) -> float | None:
        if self.lease is None:
            return None
        at = self._lease_trouble.retry_at if self._lease_trouble else self._renew_at
        return max(0.0, at - now)

    def take_notes(self) -> list[Note]:
        """What happened since the last call, oldest first."""
        notes, self._notes = self._notes, []
        return notes

    # What to do

    def next_action(self, now: float) -> Action:
        """What to do now.  A Call must be carried out and its outcome given to `handle`."""
        if self._in_flight is not None:
            raise ImpossibleEvent(f"{self._in_flight} is still under way")
        action = self._choose(now)
        if isinstance(action, Wait | Stop):
            return action
        self._in_flight, self._sent_at = action, now
        # From the moment it is sent nobody may rely on what it is about to change.
        if isinstance(action, Publish):
            self._differences.publishing(action.registration)
        elif isinstance(action, Withdraw):
            self._differences.published.discard(action.registration)
        elif isinstance(action, Release):
            self._differences.published.clear()
        return action

    def _choose(self, now: float) -> Action:
        lease = self.lease
        if self.state is State.CLOSING and lease is None:
            self._on(Event.RELEASED)
        if self.state is State.CLOSED:
            return Stop()
        if not self._differences.wanted:
            if lease is not None:
                return self._unless_it_is_too_early(now, Release(lease))
            if self.state is not State.IDLE:
                self._on(Event.UNWANTED)
                self._lease_trouble = None  # nobody is waiting for that lease any more
            return Wait(None)
        if lease is None:
            if self.state is State.IDLE:
                self._on(Event.WANTED)
            return self._unless_it_is_too_early(now, Open())
        wake_at = self._renew_at
        if self._lease_trouble is not None:  # SUSPECT: changes go on, the renewal comes first
            wake_at = self._lease_trouble.retry_at
            self._note_when_overdue(lease, self._lease_trouble, now)
        if now >= wake_at:
            return Renew(lease)
        if self._lease_trouble is not None and not self._lease_trouble.is_overdue:
            wake_at = min(wake_at, now + self.margin_seconds(now))
        if self.state is State.SUSPECT and self._changes_left <= 0:
            return Wait(wake_at - now)
        if (due := self._differences.next_due(now)) is not None:
            registration, is_missing = due
            return (Publish if is_missing else Withdraw)(lease, registration)
        return Wait(max(0.0, min(wake_at, self._differences.rests_until) - now))

    def _unless_it_is_too_early(self, now: float, action: Open | Release) -> Action:
        trouble = self._lease_trouble
        if trouble is None or now >= trouble.retry_at:
            return action
        return Wait(trouble.retry_at - now)

    # What came of it

    def handle(self, outcome: Outcome, now: float, action: Call) -> None:
        """Learn what came of *action*, the last one that `next_action` gave."""
        if action is not self._in_flight:
            raise ImpossibleEvent(f"{action} was not asked for")
        self._in_flight = None
        if isinstance(outcome, LeaseLost) and not isinstance(action, Open):
            if isinstance(action, Release):
                self._released(now)  # somebody else was faster
            else:
                self._lost(now, outcome.why)
        elif isinstance(outcome, MatchmakerError):
            self.counts["failed"] += 1
            if isinstance(action, Publish | Withdraw):
                self._not_changed(outcome, now, action)
            else:
                self._not_answered(outcome, now, action)
        elif isinstance(action, Open):
            assert isinstance(outcome, Lease), outcome
            self._opened(outcome, now)
        elif isinstance(action, Renew):
            assert outcome is not None and not isinstance(outcome, Lease), outcome
            self._renewed(outcome, now)
        elif isinstance(action, Release):
            self._released(now)
        else:
            self._changed(now, action)

    def _opened(self, lease: Lease, now: float) -> None:
        self._on(Event.OPENED)
        self.counts["opened"] += 1
        self.lease, self._confirmed_at = lease, self._sent_at
        self._renew_at = now + _interval(lease) * (
            FIRST_RENEWAL_FROM + (1 - FIRST_RENEWAL_FROM) * self._jitter()
        )
        trouble, self._lease_trouble = self._lease_trouble, None
        if trouble and trouble.is_told and self._repair is None:
            waited = f"opened lease {_short(lease)} after {now - trouble.since:.1f} s of trying"
            self._note(Kind.RECOVERED, waited)

    def _renewed(self, held: Collection[Registration], now: float) -> None:
        assert self.lease is not None
        self._on(Event.CONFIRMED)
        self.counts["renewed"] += 1
        self._confirmed_at = self._sent_at
        self._renew_at = now + _interval(self.lease) * (1 - RENEWAL_JITTER * self._jitter())
        unchecked = held.unchecked if isinstance(held, Held) else ()
        missing, strays = self._differences.found(held, unchecked, now)
        self._note_recovery(now)
        if strays:
            self._note(Kind.STRAY, f"Consul shows {_names(strays)}, not wanted: withdrawing it")
        if missing:
            why = (held.cause if isinstance(held, Held) else "") or "deleted by somebody"
            cause = f"Consul did not hold {_names(missing)} any more ({why})"
            self._begin_repair(cause, now, missing)
        self._settle_repair(now)

    def _released(self, now: float) -> None:
        self._on(Event.RELEASED)
        lease, gone = self.lease, tuple(self._differences.maybe_published)
        self._drop_lease(now)
        assert lease is not None
        self._note(Kind.WITHDRAWN, f"released lease {_short(lease)}: nothing is wanted", gone)

    def _lost(self, now: float, why: str) -> None:
        assert self.lease is not None
        self._on(Event.GONE)
        self.counts["lost"] += 1
        missing = self._published_and_wanted()
        cause = f"lease {_short(self.lease)} lost ({why})"
        since = self._lease_trouble.since if self._lease_trouble else now
        self._drop_lease(now)
        if missing:
            self._begin_repair(cause, since, missing)

    def _changed(self, now: float, action: Publish | Withdraw) -> None:
        registration, is_published = action.registration, isinstance(action, Publish)
        trouble = self._differences.changed(registration, now, is_published=is_published)
        if not is_published:
            self.counts["withdrawn"] += 1
            self._note(Kind.WITHDRAWN, f"withdrew {registration}", (registration,))
            return
        self.counts["published"] += 1
        if self._repair is None or registration not in self._repair.pending:
            text = f"published {registration} under lease {_short(action.lease)}"
            if trouble and trouble.is_told:
                text += f" after {now - trouble.since:.1f} s of trying"
            self._note(Kind.PUBLISHED, text, (registration,))
        self._settle_repair(now)

    def _not_changed(self, error: MatchmakerError, now: float, action: Publish | Withdraw) -> None:
        if self.state is State.CLOSING:
            return  # the release takes everything with it
        registration = action.registration
        trouble = self._failed_again(self._differences.troubles.get(registration), error, now)
        self._differences.not_changed(registration, trouble, now)
        if not trouble.is_refusal:
            self._changes_left = _without_time_out(self._changes_left - 1, error)
            # Perhaps the lease is gone: only a renewal tells.  It also tells what really happened.
            self._renew_at = min(self._renew_at, now)
        # One silence is the renewal's to report; a second one may mean that the lease is well.
        is_own = trouble.failures > 1 and self.state is State.HELD
        if not trouble.is_told and (trouble.is_refusal or is_own):
            verb = "published" if isinstance(action, Publish) else "withdrawn"
            self._note_trouble(trouble, f"{registration} cannot be {verb}")

    def _not_answered(
        self, error: MatchmakerError, now: float, action: Open | Renew | Release
    ) -> None:
        self._on(Event.FAILED)
        self._changes_left = _without_time_out(FAILED_CHANGES_PER_RENEWAL, error)
        if self.state is State.CLOSING and not isinstance(action, Release):
            return  # the release comes next, and without delay
        trouble = self._failed_again(self._lease_trouble, error, now)
        self._lease_trouble = trouble
        if trouble.is_told:
            return
        if isinstance(action, Open):
            after = f" after {self._repair.cause}" if self._repair else ""
            what = f"no lease can be opened for {_count(self._differences.wanted)}{after}"
        elif isinstance(action, Renew):
            shown = f"{_count(self._differences.published)} for at least"
            what = (
                f"lease {_short(action.lease)} cannot be renewed; Consul shows its {shown} "
                f"{self.margin_seconds(now):.1f} s more"
            )
        else:
            what = f"lease {_short(action.lease)} cannot be released"
        self._note_trouble(trouble, what)

    # How it does that

    def _on(self, event: Event) -> None:
        try:
            self.state = TRANSITIONS[self.state][event]
        except KeyError:
            raise ImpossibleEvent(f"{self.state}: {event.value}") from None

    def _published_and_wanted(self) -> list[Registration]:
        return [each for each in self._differences.wanted if self.is_published(each)]

    def _drop_lease(self, now: float) -> None:
        self.lease = self._lease_trouble = None
        self._differences.clear(now)

    def _failed_again(self, trouble: Trouble | None, error: MatchmakerError, now: float) -> Trouble:
        trouble = trouble or Trouble(error, since=self._sent_at)
        if isinstance(error, Denied) != trouble.is_refusal:
            trouble.is_told = False  # another kind of trouble is news
        trouble.error = error
        trouble.failures += 1
        trouble.retry_at = now + self._backoff.seconds(trouble.failures)
        return trouble

    def _note(self, kind: Kind, text: str, registrations: Iterable[Registration] = ()) -> None:
        self._notes.append(Note(kind, text, tuple(registrations)))

    def _note_trouble(self, trouble: Trouble, what: str) -> None:
        trouble.is_told = True
        kind = Kind.REFUSED if trouble.is_refusal else Kind.UNREACHABLE
        self._note(kind, f"{what}; trying on ({trouble.error})")

    def _note_when_overdue(self, lease: Lease, trouble: Trouble, now: float) -> None:
        if not trouble.is_overdue and self.margin_seconds(now) <= 0:
            trouble.is_overdue = True
            text = f"lease {_short(lease)} not renewed for its whole TTL: Consul may have ended it"
            self._note(Kind.OVERDUE, text, self._published_and_wanted())

    def _note_recovery(self, now: float) -> None:
        trouble, self._lease_trouble = self._lease_trouble, None
        if trouble is not None and self.lease is not None:
            text = f"lease {_short(self.lease)} renewed after {now - trouble.since:.1f} s of trying"
            self._note(Kind.RECOVERED, text, self._published_and_wanted())

    def _begin_repair(self, cause: str, began_at: float, missing: list[Registration]) -> None:
        if self._repair is None:
            self._repair = _Repair(cause, began_at)
        else:  # a loss during a repair is one more cause of the same repair
            self._repair.cause += f", then {cause}"
        self._repair.pending.update(dict.fromkeys(missing))
        self._repair.missing.update(dict.fromkeys(missing))
        self._note(Kind.LOST, cause, missing)

    def _settle_repair(self, now: float) -> None:
        """Note a repair, once, when all it is about is published again or not wanted any more."""
        repair = self._repair
        if repair is None:
            return
        while repair.missing:
            if self._differences.is_missing(next(reversed(repair.missing))):
                return
            repair.missing.popitem()
        pending = [each for each in repair.pending if self.is_wanted(each)]
        self._repair = None
        self.counts["repaired"] += 1
        what = "nothing of it is wanted any more"
        if pending:
            seconds = now - repair.began_at
            what = f"published {_count(pending)} again after {seconds:.1f} s"
        self._note(Kind.REPAIRED, f"{repair.cause}; {what}", pending)


def _without_time_out(changes: int, error: MatchmakerError) -> int:
    """So many *changes*, or none after a time-out: the next would hold up the next renewal."""
    return 0 if isinstance(error, TimedOut) else changes


def _interval(lease: Lease) -> float:
    return lease.ttl_seconds / RENEWALS_PER_TTL


def _short(lease: Lease) -> str:
    return lease.id if len(lease.id) <= 8 else f"{lease.id[:8]}…"


def _count(registrations: Collection[Registration]) -> str:
    return f"{len(registrations)} registration{'' if len(registrations) == 1 else 's'}"


def _names(registrations: Collection[Registration]) -> str:
    """The first three of them, and how many more there are."""
    some = sorted(map(str, registrations))
    more = f" and {len(some) - 3} more" if len(some) > 3 else ""
    return ", ".join(some[:3]) + more
