"""Answers kept in memory: how fresh each is, when it is asked for again, when it is given up.

An answer is in one of four states (`State`).  A topic with an answer never waits for Consul: its
answer is returned at once, and one background thread asks again, shortly before the answer runs out
where callers go on asking for it.  A topic without an answer is asked for by the first caller, on
its own thread, while others who want the same topic wait for that one answer.

What replaces a held answer:

- A complete answer does, at once.  Unless its source can lie (DNS, or KV read with
  ``consistency=stale``: a restarted Consul server denies live services for up to 5 s, fact A9) and
  it is empty or less than half the held one: that must repeat for ``confirm_empty_seconds``
  without a better answer in between.  Meanwhile the held answer is served.
- An incomplete answer says who is there, and says nothing about who is not.  It is united with what
  is held; a host leaves when it was in no answer for `UNSEEN_TTLS` TTLs.
- An answer read from disk at a cold start (`state_file`) is like a stale one, marked ``disk``; the
  first answer that is believed replaces it.
- An outage or a refused token replaces nothing: the held answer becomes stale, and is given up
  ``max_stale_seconds`` after it came.
"""

from __future__ import annotations

import enum
import itertools
import logging
import math
import random
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import cachetools

from .backends import Resolver
from .backoff import Backoff
from .errors import Closed, Denied, MatchmakerError, TimedOut, Unavailable
from .model import Host, Instance, Snapshot, checked_topic
from .settings import Settings
from .state_file import Kept, Name, StateFile
from .worker import Worker

logger = logging.getLogger(__name__)

AHEAD_FROM, AHEAD_TO = 0.7, 0.9
"""An answer in use is asked for again after this part of its TTL, at random, so that processes
which started together do not ask together."""
SECONDS_BETWEEN_REFRESHES = 0.1
"""The least between two background questions for one topic, whatever its TTL says."""
SECONDS_BETWEEN_DOUBTS = 1.0
"""While an answer is doubted, Consul is asked again this often (the lie lasts up to 5 s)."""
SECONDS_BETWEEN_KNOCKS = 1.0
"""While a stale answer is served, a caller looks this often whether a refresh is on its way."""
SECONDS_A_FAILURE_IS_REMEMBERED = 1.0
"""The most that callers of a topic without an answer are told of the last failure, unasked."""
FIRST_RETRY_SECONDS = 0.5
UNSEEN_TTLS = 3
"""One cut answer of 2,000 hosts lacks each with probability 1/2 (fact A3): by three, 1/8 at most,
and the backend has united several of them before it calls an answer incomplete."""
SHORTEST_WAIT_SECONDS = 0.05
"""Who waits for an answer for less gets as long: so a timeout of 0 means "as it is now"."""
SECONDS_FOR_A_REAL_ANSWER = 0.02
"""At a cold start, Consul has this long before an answer from disk is given: it needs 0.2 to 2 ms
where it is well, and no caller must wait where it is not."""
SECONDS_BETWEEN_SAVES = 10.0
"""The least between two writes of the state file."""
SAVES_PER_MAX_STALE = 4
"""Without a change it is written so often in ``max_stale_seconds``, so that it does not run out."""

_NEVER = math.inf


class State(enum.Enum):
    """What an entry is worth at one moment."""

    FRESH = "fresh"
    STALE = "stale, being refreshed"
    AWAY = "stale, Consul cannot be asked"
    GONE = "no answer that may be given"


class _Flight:
    """One question on its way; others who have the same question wait for its answer."""

    __slots__ = ("_answer", "_done", "_error", "complete", "offers")

    def __init__(self, offers: int, complete: bool) -> None:
        self.offers = offers
        self.complete = complete  # whether all hosts were asked for, or some
        self._done = threading.Event()
        self._answer: Snapshot | None = None
        self._error: BaseException | None = None

    def land(self, answer: Snapshot | None, error: BaseException | None = None) -> None:
        self._answer, self._error = answer, error
        self._done.set()

    def wait(self, topic: str, timeout_seconds: float) -> Snapshot:
        if not self._done.wait(timeout_seconds):
            raise TimedOut(
                f"{topic}: another thread asked Consul {timeout_seconds:g} s ago "
                "and still has no answer: retry"
            )
        if self._error is not None:
            raise _again(self._error) from self._error
        assert self._answer is not None
        return self._answer


class _Entry:
    """What is known of one topic (or of one server of it)."""

    __slots__ = (
        "asked_at",
        "doubt",
        "doubt_since",
        "empty_since",
        "error",
        "failing_since",
        "failures",
        "flight",
        "gone_at",
        "landed_at",
        "offers",
        "part",
        "placed_at",
        "quiet_until",
        "refresh_at",
        "retry_at",
        "seen",
        "server",
        "snapshot",
        "topic",
    )

    def __init__(self, topic: str, server: str | None, now: float) -> None:
        self.topic = topic
        self.server = server
        self.snapshot: Snapshot | None = None  # the held answer
        self.part: Snapshot | None = None  # some of the hosts, while all of them are asked for
        self.quiet_until = -_NEVER  # until then the held answer is returned without a look
        self.gone_at = -_NEVER  # from then on it is not returned any more
        self.asked_at = now  # by a caller
        self.placed_at = now  # in the order of eviction
        self.landed_at = now  # when the last answer or failure came
        self.refresh_at = _NEVER  # when the background thread looks at it
        self.retry_at = -_NEVER  # not to be asked before
        self.offers = 0  # answers that came from the watcher
        self.flight: _Flight | None = None
        self.failures = 0  # in a row
        self.failing_since = 0.0
        self.error: MatchmakerError | None = None
        self.doubt: Snapshot | None = None  # an answer that is not believed yet
        self.doubt_since = 0.0
        self.empty_since: float | None = None  # since when every answer is without hosts
        # Who was in which answer, while answers are incomplete.
        self.seen: dict[tuple[Host, str | None], tuple[float, Instance]] | None = None

    @property
    def name(self) -> str:
        return self.topic if self.server is None else f"{self.topic} of {self.server}"

    def state(self, now: float) -> State:
        if self.snapshot is None or now >= self.gone_at:
            return State.GONE
        if now < self.snapshot.fresh_until:
            return State.FRESH
        return State.AWAY if self.failures else State.STALE

    def make_clean(self) -> None:
        """Only the answer stays; what was under way belonged to the parent's threads."""
        self.flight = None
        self.quiet_until = -_NEVER
        self.refresh_at = _NEVER


_Key = str | tuple[str, str]


class _Entries(cachetools.LRUCache[_Key, _Entry]):
    """Bounded storage.  `at_hand` is the same as a plain dict, for readers that take no lock.

    Readers mark an entry with the time instead of moving it, and one that was asked for since it
    was last looked at gets a second chance: so a read costs nothing here, and what nobody asks for
    leaves first.
    """

    def __init__(self, maxsize: int) -> None:
        super().__init__(maxsize)
        self.at_hand: dict[_Key, _Entry] = {}
        self.evictions = 0

    def __setitem__(self, key: _Key, entry: _Entry, **extra: Any) -> None:
        super().__setitem__(key, entry, **extra)
        self.at_hand[key] = entry

    def __delitem__(self, key: _Key, **extra: Any) -> None:
        super().__delitem__(key, **extra)
        self.at_hand.pop(key, None)

    def popitem(self) -> tuple[_Key, _Entry]:
        self.evictions += 1
        for _ in range(len(self) - 1):
            key, entry = super().popitem()
            if entry.asked_at <= entry.placed_at:
                return key, entry
            entry.placed_at = entry.asked_at
            self[key] = entry  # there is room: it was taken out just now
        return super().popitem()


class Cache:
    """A Resolver that answers from memory.  Thread-safe; a read of a fresh answer takes no lock.

    Opens nothing and starts no thread when made; the thread ``consul-matchmaker-refresher`` starts
    when the first answer runs out.  With ``threaded=False`` there is no thread: the owner calls
    `step`.
    """

    def __init__(
        self,
        resolver: Resolver,
        settings: Settings,
        *,
        clock: Callable[[], float] = time.monotonic,
        jitter: Callable[[], float] = random.random,
        wall_clock: Callable[[], float] = time.time,
        threaded: bool = True,
    ) -> None:
        self.narrows = resolver.narrows
        self._resolver = resolver
        self._settings = settings
        self._clock = clock
        self._jitter = jitter
        self._is_threaded = threaded
        # At most one TTL between two attempts: when Consul is back, answers are fresh within one.
        self._backoff = Backoff(FIRST_RETRY_SECONDS, max(1.0, settings.ttl_seconds), jitter)
        # A lookup ends within three timeouts (DNS), or one an agent (HTTP): then something is lost.
        self._patience_seconds = settings.request_timeout_seconds * (3 + len(settings.addresses))
        self._unseen_seconds = max(
            settings.confirm_empty_seconds, UNSEEN_TTLS * settings.ttl_seconds
        )
        self._refresher = Worker("consul-matchmaker-refresher", self.step)
        self._is_away = False  # a topic with an answer failed, and none has recovered since
        self._is_closed = False
        self._counts = {"answered": 0, "failed": 0, "doubted": 0, "offered": 0}
        self._closer = {"stale": 0, "away": 0, "asked": 0, "refused": 0, "disk": 0}
        self._seconds_asking = self._longest_question = 0.0
        self._state_file: StateFile | None = None
        if settings.state_path is not None:
            self._state_file = StateFile(settings.state_path, settings, wall_clock=wall_clock)
        self._kept: dict[Name, Kept] | None = None  # what it held at the start; None: not read yet
        self._kept_since = 0.0
        self._is_unsaved = False  # hosts changed since it was written
        self._saved_at = clock()
        self._begin_counting()
        self._entries = _Entries(settings.max_topics)
        self._at_hand = self._entries.at_hand
        self._changed = threading.Condition()
        self._version = 0  # answers that came, of any topic
        self._watched_until = -_NEVER  # until then the watcher tells of every change

    def _begin_counting(self) -> None:
        # The one counter that costs no lock and loses nothing: `next` of it is one C call.
        self._count_lookup = itertools.count().__next__
        self._counter_reads = 0

    # -- what callers ask

    def lookup(self, topic: str, server: str | None = None, *, complete: bool = True) -> Snapshot:
        """Every live host of *topic*, perhaps none; with *server*, only that server's.

        Does not wait for Consul while there is an answer younger than ``max_stale_seconds``.
        Else asks, and raises Unavailable or Denied.  With *complete* False some of the hosts will
        do where nothing is held: the rest is asked for in the background.
        """
        try:
            entry = self._at_hand[topic]
        except (KeyError, TypeError):  # TypeError: not a text at all
            entry = self._entry(topic)
        self._count_lookup()
        entry.asked_at = now = self._clock()
        snapshot = entry.snapshot
        if snapshot is None or now >= entry.quiet_until:
            # One server may be missing in a part of the answer: only all of it will do.
            snapshot = self._look_closer(entry, now, complete or server is not None)
        return snapshot if server is None else self._of_server(snapshot, server)

    def at_hand(self, topic: str, server: str | None = None) -> Snapshot | None:
        """What `lookup` returns, where that takes no question and no wait; else None."""
        entry = self._at_hand.get(topic)
        if not self._has_answer(entry):
            return None
        if server is not None and self.narrows:
            assert entry is not None and entry.snapshot is not None
            is_known = self._has_answer(self._at_hand.get((topic, server)))
            if not is_known and not entry.snapshot.for_server(server):
                return None
        return self.lookup(topic, server)

    def _has_answer(self, entry: _Entry | None) -> bool:
        if entry is None or entry.snapshot is None or self._clock() >= entry.gone_at:
            return False
        return entry.snapshot.source != "disk" or entry.quiet_until != -_NEVER

    def refresh(self, topic: str, server: str | None = None) -> Snapshot:
        """Ask Consul now, or wait for the answer somebody asked for already.

        Raises Unavailable or Denied, also while `lookup` still has an answer.
        """
        try:
            snapshot = self._ask(self._entry(topic))
            if server is None:
                return snapshot
            narrowed = snapshot.for_server(server)
            if narrowed or not self.narrows:
                return narrowed
            return self._ask(self._entry(topic, server))
        finally:
            self._refresher.wake()  # it may have something to do earlier than it thought

    def wait_for_change(
        self,
        topic: str,
        seen: Snapshot | None,
        timeout_seconds: float,
        server: str | None = None,
    ) -> Snapshot:
        """The current answer, as soon as its instances differ from those of *seen*, or else after
        *timeout_seconds*.  Raises Unavailable or Denied like `lookup`, and Closed."""
        deadline = self._clock() + timeout_seconds
        while True:
            version = self._version
            snapshot = self.lookup(topic, server)
            if seen is None or not is_same(snapshot, seen):
                return snapshot
            with self._changed:
                if self._is_closed:
                    raise Closed("the matchmaker was closed while waiting")
                now = self._clock()
                remaining = deadline - now
                if remaining <= 0:
                    return snapshot
                # An answer that came between the look and the lock must not be slept over.
                if self._version == version:
                    # Looking is also what keeps the topic asked for: when it becomes stale, and
                    # each second.
                    until_stale = snapshot.fresh_until - now
                    pause = min(remaining, SECONDS_BETWEEN_KNOCKS)
                    self._changed.wait(min(pause, until_stale) if until_stale > 0 else pause)

    def explain(self, topic: str, server: str | None = None) -> dict[str, object]:
        """What is held of *topic*, how it came, what is under way.  Asks nobody; fit for json."""
        with self._changed:
            now = self._clock()
            entry = self._at_hand.get(topic)
            if server is not None:
                entry = self._at_hand.get((topic, server), entry)
            if entry is None:
                return {"topic": topic, "state": "nobody asked for it yet"}
            held, doubt = entry.snapshot, entry.doubt
            next_at = min(entry.refresh_at, entry.gone_at)
            return {
                "topic": topic,
                "state": entry.state(now).value,
                "answer": None if held is None else _explained(held),
                "given_up_in_seconds": None if held is None else max(0.0, entry.gone_at - now),
                "asked_again_in_seconds": max(0.0, next_at - now) if next_at < _NEVER else None,
                "is_being_asked": entry.flight is not None,
                "is_watched": now < self._watched_until,
                "doubted": None
                if doubt is None
                else {**_explained(doubt), "since_seconds": now - entry.doubt_since},
                "failures": entry.failures,
                "failing_for_seconds": now - entry.failing_since if entry.failures else None,
                "last_error": None if entry.error is None else str(entry.error),
            }

    def topics_in_use(self) -> list[str]:
        """Every topic that has an entry, sorted."""
        with self._changed:
            return sorted({entry.topic for entry in self._at_hand.values() if entry.server is None})

    # -- what the watcher tells

    def offer(self, snapshots: Mapping[str, Snapshot], fresh_seconds: float) -> None:
        """Take the whole truth, fresh for *fresh_seconds*: a topic that is not in it has no hosts.

        Topics that nobody asked for are not kept.
        """
        with self._changed:
            now = self._clock()
            self._watched_until = now + fresh_seconds
            for entry in self._at_hand.values():
                if entry.server is None:
                    answer = snapshots.get(entry.topic) or Snapshot(entry.topic, (), "kv")
                    entry.offers += 1
                    self._take(entry, answer, now, fresh_seconds)
            self._counts["offered"] += 1
            is_doubting = any(entry.doubt is not None for entry in self._at_hand.values())
            self._tell()
        if is_doubting or self._is_unsaved:
            self._start_refresher()

    def watch_lost(self) -> None:
        """The watcher lost Consul: from now on every answer is fresh for one TTL at most."""
        with self._changed:
            now = self._clock()
            self._watched_until = -_NEVER
            for entry in self._at_hand.values():
                held = entry.snapshot
                if held is not None and held.fresh_until > now + self._ttl_seconds(held):
                    seconds = self._ttl_seconds(held)
                    self._hold(entry, held, held.taken_at, now, seconds, held.confirmed)
        self._refresher.wake()

    # -- its own life

    def status(self) -> dict[str, object]:
        """Figures for people and monitoring; everything in it is fit for json."""
        with self._changed:
            now = self._clock()
            entries = list(self._at_hand.values())
            states = [entry.state(now) for entry in entries]
            # Reading takes a number itself: those are not lookups.
            lookups = self._count_lookup() - self._counter_reads
            self._counter_reads += 1
            return {
                "topics": len(entries),
                "max_topics": self._settings.max_topics,
                "evictions": self._entries.evictions,
                "states": {state.name.lower(): states.count(state) for state in State},
                "doubted": sum(entry.doubt is not None for entry in entries),
                "lookups": lookups,
                # Of them, at most one a second a topic: the others are not worth a look.
                "lookups_that_found": dict(self._closer),
                "questions": dict(self._counts),
                "seconds_asking": self._seconds_asking,
                "longest_question_seconds": self._longest_question,
                "refresher": "running" if self._refresher.is_running else "not running",
            }

    def forget(self) -> None:
        """In a forked child: new locks, no thread, nothing under way; the answers stay."""
        self._changed = threading.Condition()
        self._watched_until = -_NEVER
        self._refresher.forget()
        before, self._entries = self._at_hand, _Entries(self._settings.max_topics)
        self._at_hand = self._entries.at_hand
        for key, entry in before.items():
            entry.make_clean()
            self._entries[key] = entry

    def close(self, timeout_seconds: float) -> bool:
        """Stop asking, wake whoever waits for a change; return whether the thread has ended."""
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()
        has_ended = self._refresher.stop(timeout_seconds)
        if has_ended and self._is_unsaved:
            self._save()
        return has_ended

    def __repr__(self) -> str:
        return f"<Cache {len(self._at_hand)} topics, {self._refresher!r}>"

    # -- reading

    def _entry(self, topic: str, server: str | None = None) -> _Entry:
        checked_topic(topic)
        key: _Key = topic if server is None else (topic, server)
        with self._changed:
            entry = self._at_hand.get(key)
            if entry is None:
                entry = self._entries[key] = _Entry(topic, server, self._clock())
                if self._state_file is not None:
                    self._take_from_disk(entry, self._state_file)
            return entry

    def _of_server(self, snapshot: Snapshot, server: str) -> Snapshot:
        narrowed = snapshot.for_server(server)
        if narrowed.instances or not self.narrows:
            return narrowed
        entry = self._entry(snapshot.topic, server)
        entry.asked_at = now = self._clock()
        held = entry.snapshot
        return (
            held if held is not None and now < entry.quiet_until else self._look_closer(entry, now)
        )

    def _look_closer(self, entry: _Entry, now: float, complete: bool = True) -> Snapshot:
        """The answer of an entry that is not simply fresh: old but held, or none yet."""
        with self._changed:
            held = entry.snapshot
            part = entry.part
            if not complete and held is None and part is not None and now < part.fresh_until:
                return part
            if held is not None and now < entry.quiet_until:
                return held  # it came while we waited for the lock
            if held is None or now >= entry.gone_at:
                if entry.error is not None and now < entry.retry_at:
                    self._closer["refused"] += 1
                    raise _again(entry.error) from entry.error
                held = None
                self._closer["asked"] += 1
            else:
                is_first_look = entry.quiet_until == -_NEVER
                found = "disk" if held.source == "disk" else "away" if entry.failures else "stale"
                self._closer[found] += 1
                entry.quiet_until = min(now + SECONDS_BETWEEN_KNOCKS, entry.gone_at)
                entry.refresh_at = min(entry.refresh_at, max(now, entry.retry_at))
        if held is not None:
            self._start_refresher()
            if held.source == "disk" and is_first_look and self._is_threaded:
                with self._changed:
                    self._changed.wait_for(
                        lambda: entry.snapshot is not held or entry.failures > 0,
                        SECONDS_FOR_A_REAL_ANSWER,
                    )
                    return entry.snapshot or held
            return held
        try:
            return self._ask(entry, complete)
        finally:
            if entry.part is not None:  # what is missing is asked for there
                self._start_refresher()
            self._refresher.wake()  # it may have something to do earlier than it thought

    # -- asking

    def _ask(self, entry: _Entry, complete: bool = True) -> Snapshot:
        """Ask the resolver, or wait for whoever asks already; no lock is held meanwhile."""
        while True:
            with self._changed:
                flight, is_ours = entry.flight, False
                if flight is None:
                    flight, is_ours = _Flight(entry.offers, complete), True
                    entry.flight = flight
            if is_ours:
                break
            answer = flight.wait(entry.name, self._patience_seconds)
            if flight.complete or answer.is_complete or not complete:
                return answer
        began = self._clock()
        try:
            if complete:
                answer = self._resolver.lookup(entry.topic, entry.server)
            else:
                answer = self._resolver.lookup(entry.topic, entry.server, complete=False)
        except BaseException as error:
            self._land_failure(entry, flight, error)
            raise
        if not (complete or answer.is_complete) and answer and entry.snapshot is None:
            return self._land_part(entry, flight, answer)
        return self._land_answer(entry, flight, answer, self._clock() - began)

    def _land_part(self, entry: _Entry, flight: _Flight, answer: Snapshot) -> Snapshot:
        """Keep some of the hosts until the refresher has asked for all of them."""
        with self._changed:
            now = self._clock()
            self._note_success(entry, now)
            entry.part = part = replace(answer, fresh_until=now + self._ttl_seconds(answer))
            entry.flight = None
            entry.refresh_at, entry.landed_at = now, -_NEVER
            flight.land(part)
        return part

    def _land_answer(
        self, entry: _Entry, flight: _Flight, answer: Snapshot, seconds: float
    ) -> Snapshot:
        with self._changed:
            self._seconds_asking += seconds
            self._longest_question = max(self._longest_question, seconds)
            # What the watcher brought while this question was on its way is newer than it.
            if entry.offers == flight.offers or entry.snapshot is None:
                self._take(entry, answer, self._clock())
            self._counts["answered"] += 1
            held = entry.snapshot
            assert held is not None
            entry.flight = None
            flight.land(held)
            self._tell()
        if self._is_unsaved and self._is_threaded:
            self._refresher.start()
        return held

    def _land_failure(self, entry: _Entry, flight: _Flight, error: BaseException) -> None:
        with self._changed:
            now = self._clock()
            entry.flight = None
            flight.land(None, error)
            self._counts["failed"] += 1
            entry.landed_at = now
            if entry.snapshot is None and not isinstance(error, (Unavailable, Denied)):
                self._entries.pop(_key(entry), None)  # a wrong topic is nothing to remember
            else:
                self._note_failure(entry, error, now)

    # -- what answers and failures do to an entry; the lock is held

    def _tell(self) -> None:
        self._version += 1
        self._changed.notify_all()

    def _take(
        self, entry: _Entry, answer: Snapshot, now: float, fresh_seconds: float | None = None
    ) -> None:
        self._note_success(entry, now)
        held = entry.snapshot
        if not answer.is_complete:
            answer = answer.with_instances(self._united(entry, answer, now))
        elif held is not None and not self._is_believed(entry, held, answer, now):
            entry.retry_at = entry.refresh_at = now + SECONDS_BETWEEN_DOUBTS
            entry.quiet_until = entry.retry_at
            entry.landed_at = now
            self._counts["doubted"] += 1
            if held.confirmed:
                entry.snapshot = replace(held, confirmed=False)
            return
        else:
            entry.seen = None
        confirmed = self._is_confirmed(entry, answer, now)
        entry.doubt = None
        is_watched = now < self._watched_until
        if fresh_seconds is None:
            fresh_seconds = self._ttl_seconds(answer)
            # While all is watched, this answer was newer than the last offer and any change will be
            # offered.  But a stale read may have been older.
            if is_watched and self._settings.consistency != "stale":
                fresh_seconds = max(fresh_seconds, self._watched_until - now)
        if self._state_file is not None and (held is None or not is_same(held, answer)):
            self._is_unsaved = True
        self._hold(entry, answer, now, now, fresh_seconds, confirmed)
        if is_watched:  # the watcher will offer again before it runs out
            entry.refresh_at = entry.quiet_until
        entry.gone_at = now + max(self._settings.max_stale_seconds, fresh_seconds)
        entry.landed_at = now

    def _hold(
        self,
        entry: _Entry,
        answer: Snapshot,
        taken_at: float,
        now: float,
        fresh_seconds: float,
        confirmed: bool,
    ) -> None:
        entry.snapshot = Snapshot(
            answer.topic,
            answer.instances,
            answer.source,
            answer.is_complete,
            answer.ttl_seconds,
            taken_at,
            now + fresh_seconds,
            self._clock,
            confirmed,
            answer.details,
        )
        entry.part = None
        share = AHEAD_FROM + (AHEAD_TO - AHEAD_FROM) * self._jitter()
        entry.retry_at = now + SECONDS_BETWEEN_REFRESHES
        entry.refresh_at = max(entry.retry_at, now + fresh_seconds * share)
        entry.quiet_until = now + fresh_seconds

    def _ttl_seconds(self, answer: Snapshot) -> float:
        settings = self._settings
        # Consul's own is 0 unless operators set one: service_ttl, or for "nobody" soa.min_ttl (A7).
        if answer.ttl_seconds:
            return min(max(answer.ttl_seconds, settings.ttl_min_seconds), settings.ttl_max_seconds)
        return settings.ttl_seconds if answer.instances else settings.empty_ttl_seconds

    def _is_believed(self, entry: _Entry, held: Snapshot, answer: Snapshot, now: float) -> bool:
        if not self._can_lie(answer) or not _is_suspicious(answer, held):
            if entry.doubt is not None:
                logger.info("topic %s: it has %d hosts after all", entry.name, len(answer))
            return True
        # Even worse than what is doubted already: that has not been repeated yet.
        if entry.doubt is None or _is_suspicious(answer, entry.doubt):
            if entry.doubt is None:
                logger.warning(
                    "topic %s: %s suddenly says %d hosts instead of %d; keeping those unless it "
                    "says so for %g s",
                    entry.name,
                    answer.source,
                    len(answer),
                    len(held),
                    self._settings.confirm_empty_seconds,
                )
            entry.doubt, entry.doubt_since = answer, now
        if now - entry.doubt_since < self._settings.confirm_empty_seconds:
            return False
        logger.warning("topic %s: confirmed, it has %d hosts", entry.name, len(answer))
        return True

    def _is_confirmed(self, entry: _Entry, answer: Snapshot, now: float) -> bool:
        """Whether *answer*, which is believed, has hosts or was repeated long enough without."""
        if answer.instances or not self._can_lie(answer):
            entry.empty_since = None
            return True
        if entry.empty_since is None:
            entry.empty_since = now if entry.doubt is None else entry.doubt_since
        return now - entry.empty_since >= self._settings.confirm_empty_seconds

    def _can_lie(self, answer: Snapshot) -> bool:
        return answer.source == "dns" or (
            answer.source == "kv" and self._settings.consistency == "stale"
        )

    def _united(self, entry: _Entry, answer: Snapshot, now: float) -> tuple[Instance, ...]:
        """*answer* and what earlier answers had, without what was in none for a while."""
        if entry.seen is None:
            held = entry.snapshot
            # What was read from disk ends with the first real answer, even a cut one.
            before = () if held is None or held.source == "disk" else held.instances
            entry.seen = {(one.host, one.server): (now, one) for one in before}
        entry.seen.update({(one.host, one.server): (now, one) for one in answer.instances})
        oldest = now - self._unseen_seconds
        entry.seen = {name: seen for name, seen in entry.seen.items() if seen[0] >= oldest}
        return tuple(instance for _, instance in entry.seen.values())

    def _note_success(self, entry: _Entry, now: float) -> None:
        if entry.failures and entry.snapshot is not None:
            since = now - entry.failing_since
            logger.info("topic %s: Consul answers again, after %.1f s", entry.name, since)
            if self._is_away:
                self._is_away = False
                # It may answer for the others too: they need not wait for their next attempt.
                for other in self._at_hand.values():
                    if other.failures:
                        other.retry_at = other.refresh_at = now
        entry.failures, entry.error, entry.retry_at = 0, None, -_NEVER

    def _take_from_disk(self, entry: _Entry, state_file: StateFile) -> None:
        now = self._clock()
        if self._kept is None:
            self._kept, self._kept_since = state_file.load(), now
        kept = self._kept.pop((entry.topic, entry.server), None)
        if kept is None:
            return
        taken_at = self._kept_since - kept.age_seconds
        entry.gone_at = taken_at + self._settings.max_stale_seconds
        entry.snapshot = Snapshot(
            entry.topic,
            kept.instances,
            "disk",
            kept.is_complete,
            taken_at=taken_at,
            fresh_until=now,
            clock=self._clock,
            confirmed=False,
            details={"file": str(state_file.path)},
        )

    def _note_failure(self, entry: _Entry, error: BaseException, now: float) -> None:
        if entry.failures == 0:
            entry.failing_since = now
            if entry.snapshot is not None:
                # One outage, one warning; the other topics it concerns are details.
                level = logging.INFO if self._is_away else logging.WARNING
                self._is_away = True
                logger.log(
                    level,
                    "topic %s: answered from the last good answer, %.1f s old: %s",
                    entry.name,
                    now - entry.snapshot.taken_at,
                    error,
                )
        entry.failures += 1
        entry.error = error if isinstance(error, (Unavailable, Denied)) else None
        pause = max(self._backoff.seconds(entry.failures), SECONDS_BETWEEN_REFRESHES)
        if entry.snapshot is None or now >= entry.gone_at:
            entry.retry_at = now + min(pause, SECONDS_A_FAILURE_IS_REMEMBERED)
            entry.quiet_until = -_NEVER
        else:
            entry.retry_at = now + pause
            entry.quiet_until = min(entry.retry_at, entry.gone_at)
        if entry.snapshot is not None:
            entry.refresh_at = entry.retry_at

    # -- the background thread

    def _start_refresher(self) -> None:
        if self._is_threaded:
            self._refresher.start()
            self._refresher.wake()

    def step(self) -> float | None:
        """Ask for every entry whose time has come, the healthy ones first; return in how many
        seconds to come again, None: when woken.

        A question ends within its timeout, and a topic that fails is asked more and more seldom: so
        one slow topic holds up the refreshes of the others by no more than its timeout.
        """
        for entry in self._due():
            if self._refresher.is_stopping:
                return None
            try:
                self._ask(entry)
            except MatchmakerError as error:
                logger.debug("topic %s: refresh failed: %s", entry.name, error)
            except Exception:
                logger.exception("topic %s: unexpected error while asking", entry.name)
        if self._clock() >= self._save_at():
            self._save()
        with self._changed:
            next_at = min((entry.refresh_at for entry in self._at_hand.values()), default=_NEVER)
            next_at = min(next_at, self._save_at())
            return None if next_at == _NEVER else max(0.0, next_at - self._clock())

    def _save_at(self) -> float:
        if self._state_file is None:
            return _NEVER
        pause = SECONDS_BETWEEN_SAVES
        if not self._is_unsaved:
            pause = max(pause, self._settings.max_stale_seconds / SAVES_PER_MAX_STALE)
        return self._saved_at + pause

    def _save(self) -> None:
        """Write the state file: by the background thread, or by `close` once that has ended."""
        assert self._state_file is not None
        with self._changed:
            self._is_unsaved, self._saved_at = False, self._clock()
            answers = {
                (entry.topic, entry.server): Kept(
                    held.age_seconds, held.is_complete, held.instances
                )
                for entry in self._at_hand.values()
                if (held := entry.snapshot) is not None
                and held.source != "disk"
                and (held.instances or held.confirmed)
            }
        self._state_file.save(answers)

    def _due(self) -> list[_Entry]:
        with self._changed:
            now = self._clock()
            due = []
            for entry in self._at_hand.values():
                if entry.refresh_at > now:
                    continue
                entry.refresh_at = _NEVER  # its answer or failure sets the next time
                is_wanted = entry.asked_at > entry.landed_at or entry.doubt is not None
                if is_wanted and entry.flight is None:
                    due.append(entry)
            return sorted(due, key=lambda entry: entry.failures)


def _explained(answer: Snapshot) -> dict[str, object]:
    return {
        "source": answer.source,
        "hosts": [
            {
                "host": str(one.host),
                "server": one.server,
                "priority": one.priority,
                "weight": one.weight,
            }
            for one in answer.instances
        ],
        "age_seconds": answer.age_seconds,
        "is_stale": answer.is_stale,
        "is_complete": answer.is_complete,
        "confirmed": answer.confirmed,
        "details": dict(answer.details),
    }


def _key(entry: _Entry) -> _Key:
    return entry.topic if entry.server is None else (entry.topic, entry.server)


def _again(error: BaseException) -> MatchmakerError:
    """The same error for another caller: an exception that is raised twice mixes tracebacks."""
    if isinstance(error, MatchmakerError):
        return type(error)(*error.args)
    return Unavailable(f"the thread that asked failed: {error!r}: retry")


def _is_suspicious(answer: Snapshot, held: Snapshot) -> bool:
    """Whether *answer* is less than half of *held*, or nothing: as a restarted server answers."""
    return len(answer) * 2 < len(held)


def is_same(one: Snapshot, other: Snapshot) -> bool:
    """Whether both have the same instances, in whatever order: DNS shuffles (fact A3)."""
    return one.instances == other.instances or set(one.instances) == set(other.instances)
