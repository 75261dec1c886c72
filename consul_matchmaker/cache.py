"""Answers kept in memory: how fresh each is, when it is asked for again, when it is given up.

An answer is in one of four states (`State`).  A topic with an answer never waits for Consul: its
answer is returned at once, and a background thread asks again, shortly before the answer runs out
where callers go on asking for it.  A topic without an answer is asked for by the first caller, on
its own thread, while others who want the same topic wait for that one answer.

What replaces a held answer:

- A complete answer does, at once.  Unless it is doubted (`Cache._doubt_seconds`): then it must
  repeat for some seconds without a better answer in between.  Meanwhile the held one is served.
- An incomplete answer says who is there, and says nothing about who is not.  It is united with what
  is held; a host leaves when it was in no answer for `UNSEEN_TTLS` TTLs.
- An answer read from disk at a cold start (`state_file`) is like a stale one, marked ``disk``; the
  first answer that is believed replaces it.
- An outage or a refused token replaces nothing: the held answer becomes stale, and is given up
  ``max_stale_seconds`` after it was asked for.

All ages count from when a question was sent; Consul may answer at any moment after that.
"""

from __future__ import annotations

import collections
import contextlib
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
from .worker import Worker, call_within

logger = logging.getLogger(__name__)

AHEAD_FROM, AHEAD_TO = 0.7, 0.9
"""An answer in use is asked for again after this part of its TTL, at random, so that processes
which started together do not ask together."""
SECONDS_BETWEEN_REFRESHES = 0.1
"""The least between two background questions for one topic, whatever its TTL says."""
SECONDS_BETWEEN_DOUBTS = 1.0
"""While an answer is doubted, Consul is asked again this often (the lie lasts up to 5 s)."""
RETURN_SECONDS = 2.0
"""So long several hosts that left at once are waited for in kv mode: when the leader dies or a
quorum comes back, Consul may end the sessions of living processes, which are all back after 1.7 s
(fact B15)."""
SECONDS_BETWEEN_KNOCKS = 1.0
"""While a stale answer is served, a caller looks this often whether a refresh is on its way."""
SECONDS_A_FAILURE_IS_REMEMBERED = 1.0
"""The most that callers of a topic without an answer are told of the last failure, unasked."""
FIRST_RETRY_SECONDS = 0.5
LONGEST_PAUSE = 0.7
"""Of a TTL, between two attempts for one topic.  So answers are fresh within one TTL when Consul is
back, if what is lost of an attempt under way then takes no more than the rest, 1.5 s of the default
5 s.  Lost is, where packets were dropped, what comes after the last one was sent: by DNS a tenth of
the timeout, and 1 s of an HTTP connection's 2 s.  Nothing is lost where an agent hung or was dead:
it answers what waits, or refused at once."""
HURRY_SECONDS = 0.1
"""A topic whose question takes longer is slow.  Consul DNS answers in 0.2 to 2 ms, and in 0.3 s
where it lists thousands."""
UNSEEN_TTLS = 3
"""One cut answer of 2,000 hosts lacks each with probability 1/2 (fact A3): by three, 1/8 at most,
and the backend has united several of them before it calls an answer incomplete."""
SHORTEST_WAIT_SECONDS = 0.05
"""Who waits for an answer for less gets as long: so a timeout of 0 means "as it is now"."""
SECOND_CHANCES = 16
"""Of topics in use, when room is made for another one: so that costs the same however many are
kept."""
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

    def __init__(self, complete: bool = True) -> None:
        self.offers = 0  # of the entry, when it began
        self.complete = complete  # whether all hosts were asked for, or some
        self._done = threading.Event()
        self._answer: Snapshot | None = None
        self._error: BaseException | None = None

    def land(self, answer: Snapshot | None, error: BaseException | None = None) -> None:
        self._answer, self._error = answer, error
        self._done.set()

    def wait(self, topic: str, timeout_seconds: float) -> Snapshot | None:
        """What it brought; None: it was broken off, ask yourself."""
        if not self._done.wait(timeout_seconds):
            raise TimedOut(
                f"{topic}: another thread asked Consul {timeout_seconds:g} s ago "
                "and still has no answer: retry"
            )
        if self._error is not None:
            raise _again(self._error) from self._error
        return self._answer


class _Count:
    """A counter that costs no lock and loses nothing: *add* is one C call."""

    __slots__ = ("_reads", "add")

    def __init__(self) -> None:
        self.add = itertools.count().__next__
        self._reads = 0

    def read(self) -> int:
        """The count; one reader at a time.  Reading takes a number itself, which is taken off."""
        self._reads += 1
        return self.add() + 1 - self._reads


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
        "full",
        "full_until",
        "gone_at",
        "is_slow",
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
        "tally",
        "topic",
        "version",
    )

    def __init__(
        self, topic: str, server: str | None, now: float, tally: Callable[[], int]
    ) -> None:
        self.topic = topic
        self.server = server
        self.snapshot: Snapshot | None = None  # the held answer
        self.part: Snapshot | None = None  # some of the hosts, while all of them are asked for
        self.quiet_until = -_NEVER  # until then the held answer is returned without a look
        self.tally = tally  # counts a lookup that does so, by what it found
        self.gone_at = -_NEVER  # from then on it is not returned any more
        self.asked_at = now  # by a caller
        self.placed_at = now  # in the order of eviction
        self.landed_at = -_NEVER  # when the last answer or failure came
        self.refresh_at = _NEVER  # when the background thread looks at it
        self.retry_at = -_NEVER  # not to be asked before
        self.offers = 0  # answers that came from the watcher
        self.flight: _Flight | None = None
        self.is_slow = False  # the last question took longer than HURRY_SECONDS
        self.failures = 0  # in a row
        self.failing_since = 0.0
        self.error: MatchmakerError | None = None
        self.doubt: Snapshot | None = None  # an answer that is not believed yet
        self.doubt_since = 0.0
        self.empty_since: float | None = None  # since when every answer is without hosts
        self.full: Snapshot | None = None  # held before hosts began to leave
        self.full_until = -_NEVER
        self.version = 0  # of the last answer that was believed
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
        for _ in range(min(len(self) - 1, SECOND_CHANCES)):
            key, entry = super().popitem()
            if entry.asked_at <= entry.placed_at:
                return key, entry
            entry.placed_at = entry.asked_at
            self[key] = entry  # there is room: it was taken out just now
        return super().popitem()


class Cache:
    """A Resolver that answers from memory.  Thread-safe; a read of a fresh answer takes no lock.

    Opens nothing and starts no thread when made; the thread ``consul-matchmaker-refresher`` starts
    when the first answer runs out.  Over DNS each topic can be slow or away by itself, as when its
    datacenter hangs (fact A13).  There this thread gives no question more than `HURRY_SECONDS`;
    what takes longer is left to a second thread, ``consul-matchmaker-refresher-slow``, which starts
    with the first such topic and keeps those that were slow the last time.  So a topic holds up the
    refreshes of others once, by `HURRY_SECONDS`, when it turns slow; and slow ones hold up each
    other, those that answer by one question of those that fail.  In KV all topics are one server's
    matter: one thread asks, for those that answer before those that fail.

    With ``threaded=False`` there is no thread: the owner calls `step`.
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
        self.finds_servers = resolver.finds_servers
        self._resolver = resolver
        self._settings = settings
        self._clock = clock
        self._jitter = jitter
        self._is_threaded = threaded
        # In the catalog topics are slow one by one; in KV they are one server's matter.
        self._can_hurry = settings.mode == "catalog"
        self._backoff = Backoff(FIRST_RETRY_SECONDS, LONGEST_PAUSE * settings.ttl_seconds, jitter)
        # A lookup ends within three timeouts (DNS), or one an agent (HTTP): then something is lost.
        self._patience_seconds = settings.request_timeout_seconds * (3 + len(settings.addresses))
        self._unseen_seconds = max(
            settings.confirm_empty_seconds, UNSEEN_TTLS * settings.ttl_seconds
        )
        self._refresher = Worker("consul-matchmaker-refresher", self._quick_step)
        self._slow_refresher = Worker("consul-matchmaker-refresher-slow", self._slow_step)
        self._has_slow = False  # a topic is slow, or was
        self._is_away = False  # a topic with an answer failed, and none has recovered since
        self._is_closed = False
        self._counts = {"answered": 0, "failed": 0, "broken_off": 0, "doubted": 0, "offered": 0}
        self._fresh, self._stale, self._away = _Count(), _Count(), _Count()
        self._disk, self._part = _Count(), _Count()
        self._asked, self._refused = _Count(), _Count()
        self._seconds_asking = self._longest_question = 0.0
        self._state_file: StateFile | None = None
        if settings.state_path is not None:
            self._state_file = StateFile(settings.state_path, settings, wall_clock=wall_clock)
        self._kept: dict[Name, Kept] | None = None  # what it held at the start; None: not read yet
        self._kept_since = 0.0
        self._reading = threading.Lock()  # held while the file is read, and not the other lock
        self._is_unsaved = False  # hosts changed since it was written
        self._saved_at = clock()
        self._entries = _Entries(settings.max_topics)
        self._at_hand = self._entries.at_hand
        self._changed = threading.Condition()
        self._version = 0  # answers that came, of any topic
        self._watched_until = -_NEVER  # until then the watcher tells of every change
        # What is to be logged once the lock is given back: a handler may take long.
        self._notes: collections.deque[tuple[int, str, tuple[object, ...]]] = collections.deque()

    # -- what callers ask

    def lookup(self, topic: str, server: str | None = None, *, complete: bool = True) -> Snapshot:
        """Every live host of *topic*, perhaps none; with *server*, only that server's.

        Does not wait for Consul while there is an answer younger than ``max_stale_seconds``.
        Else asks, and raises Unavailable or Denied.  With *complete* False some of the hosts will
        do where nothing is held: the rest is asked for in the background.
        """
        now = self._clock()  # before a new entry is made: that one was not asked for again
        try:
            entry = self._at_hand[topic]
        except (KeyError, TypeError):  # TypeError: not a text at all
            entry = self._entry(topic)
        entry.asked_at = now
        snapshot = entry.snapshot
        if server is None and snapshot is not None and now < entry.quiet_until:
            tally = entry.tally  # in two steps it is faster: it is no method
            tally()
            return snapshot
        # One server may be missing in a part of the answer: only all of it will do.
        snapshot, tally = self._look_closer(entry, now, complete or server is not None)
        if server is not None:
            snapshot, tally = self._of_server(snapshot, tally, server)
        tally()
        return snapshot

    def at_hand(self, topic: str, server: str | None = None) -> Snapshot | None:
        """What `lookup` returns, where that takes no question and no wait; else None."""
        now = self._clock()  # of all that follows: nothing may be given up in between
        entry = self._at_hand.get(topic)
        if entry is None or not _has_answer(entry, now):
            return None
        entry.asked_at = now
        snapshot, tally = self._look_closer(entry, now)
        if server is not None:
            snapshot = snapshot.for_server(server)
            if not snapshot.instances and self.finds_servers:
                entry = self._at_hand.get((topic, server))
                if entry is None or not _has_answer(entry, now):
                    return None
                entry.asked_at = now
                snapshot, tally = self._look_closer(entry, now)
        tally()
        return snapshot

    def refresh(self, topic: str, server: str | None = None) -> Snapshot:
        """Ask Consul now, or wait for the answer somebody asked for already.

        Raises Unavailable or Denied, also while `lookup` still has an answer.
        """
        try:
            snapshot = self._ask(self._entry(topic))
            if server is None:
                return snapshot
            narrowed = snapshot.for_server(server)
            if narrowed or not self.finds_servers:
                return narrowed
            return self._ask(self._entry(topic, server))
        finally:
            self._wake_refreshers()

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
                "is_slow": entry.is_slow,
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

    def offer(
        self,
        snapshots: Mapping[str, Snapshot],
        *,
        taken_at: float,
        version: int,
        fresh_until: float,
    ) -> None:
        """Take the whole truth of *taken_at*, fresh until *fresh_until*: a topic that is not in it
        has no hosts.  A *version* that went back was doubted by who offers it.

        Topics that nobody asked for are not kept.
        """
        with self._changed:
            now = self._clock()
            self._watched_until = fresh_until
            for entry in self._at_hand.values():
                if entry.server is None:
                    answer = snapshots.get(entry.topic)
                    if answer is None:
                        answer = Snapshot(entry.topic, (), "kv", taken_at=taken_at, version=version)
                    entry.offers += 1
                    entry.version = min(entry.version, version)
                    self._take(entry, answer, now, fresh_until)
            self._counts["offered"] += 1
            is_doubting = any(entry.doubt is not None for entry in self._at_hand.values())
            self._tell()
        self._log_notes()
        if is_doubting or self._is_unsaved:
            self._start_refreshers()

    def watch_lost(self) -> None:
        """The watcher lost Consul: from now on every answer is fresh for one TTL at most."""
        with self._changed:
            now = self._clock()
            self._watched_until = -_NEVER
            for entry in self._at_hand.values():
                held = entry.snapshot
                if held is not None and held.fresh_until > now + self._ttl_seconds(held):
                    self._hold(entry, held, now, now + self._ttl_seconds(held), held.confirmed)
        self._wake_refreshers()

    # -- its own life

    def status(self) -> dict[str, object]:
        """Figures for people and monitoring; everything in it is fit for json."""
        with self._changed:
            now = self._clock()
            entries = list(self._at_hand.values())
            states = [entry.state(now) for entry in entries]
            lookups = {
                "fresh": self._fresh.read(),
                "stale": self._stale.read(),
                "away": self._away.read(),
                "disk": self._disk.read(),
                "part": self._part.read(),
                "asked": self._asked.read(),
                "refused": self._refused.read(),
            }
            return {
                "topics": len(entries),
                "max_topics": self._settings.max_topics,
                "evictions": self._entries.evictions,
                "states": {state.name.lower(): states.count(state) for state in State},
                "doubted": sum(entry.doubt is not None for entry in entries),
                "slow": sum(entry.is_slow for entry in entries),
                "lookups": sum(lookups.values()),
                # Each is one of them: a fresh answer; a stale one, or one that is stale because
                # Consul is away; one from disk; some hosts while the others are asked for; none,
                # so that Consul was asked, with whatever result; or its last failure, unasked.
                "lookups_that_found": lookups,
                "questions": dict(self._counts),
                "seconds_asking": self._seconds_asking,
                "longest_question_seconds": self._longest_question,
                "refresher": "running" if self._refresher.is_running else "not running",
            }

    def forget(self) -> None:
        """In a forked child: new locks, no thread, nothing under way; the answers stay."""
        self._changed = threading.Condition()
        self._reading = threading.Lock()
        self._notes.clear()
        self._watched_until = -_NEVER
        self._refresher.forget()
        self._slow_refresher.forget()
        before, self._entries = self._at_hand, _Entries(self._settings.max_topics)
        self._at_hand = self._entries.at_hand
        for key, entry in before.items():
            entry.make_clean()
            self._entries[key] = entry

    def stop(self) -> None:
        """Begin to close: wake whoever waits for a change, tell the threads to end."""
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()
        self._refresher.stop(0)
        self._slow_refresher.stop(0)

    def close(self, timeout_seconds: float) -> bool:
        """Stop asking, wake whoever waits for a change; return whether the threads have ended."""
        deadline = self._clock() + timeout_seconds
        self.stop()  # tell both threads first, then wait for one after the other
        has_ended = self._refresher.stop(timeout_seconds)
        has_ended &= self._slow_refresher.stop(max(0.0, deadline - self._clock()))
        if has_ended and self._is_unsaved:
            has_ended = self._save_within(max(0.0, deadline - self._clock()))
        return has_ended

    def _save_within(self, seconds: float) -> bool:
        """Whether the state file was written in time; else it is written later, or not at all."""
        try:
            call_within(seconds, self._save, "consul-matchmaker-saving")
        except TimeoutError:
            logger.debug("state file not written within %.1f s", seconds)
            return False
        except RuntimeError as error:  # no thread to be had, as when the interpreter ends
            logger.debug("state file written by the caller: %s", error)
            self._save()
        return True

    def __repr__(self) -> str:
        return f"<Cache {len(self._at_hand)} topics, {self._refresher!r}>"

    # -- reading

    def _entry(self, topic: str, server: str | None = None) -> _Entry:
        checked_topic(topic)
        key: _Key = topic if server is None else (topic, server)
        if self._state_file is not None and self._kept is None and key not in self._at_hand:
            self._read_state_file(self._state_file)
        with self._changed:
            entry = self._at_hand.get(key)
            if entry is None:
                entry = _Entry(topic, server, self._clock(), self._asked.add)
                self._entries[key] = entry
                if self._state_file is not None:
                    self._take_from_disk(entry, self._state_file)
            return entry

    def _of_server(
        self, snapshot: Snapshot, tally: Callable[[], int], server: str
    ) -> tuple[Snapshot, Callable[[], int]]:
        narrowed = snapshot.for_server(server)
        if narrowed.instances or not self.finds_servers:
            return narrowed, tally
        entry = self._entry(snapshot.topic, server)
        entry.asked_at = now = self._clock()
        return self._look_closer(entry, now)

    def _look_closer(
        self, entry: _Entry, now: float, complete: bool = True
    ) -> tuple[Snapshot, Callable[[], int]]:
        """What a lookup finds, and what counts it; where it raises, it was counted."""
        held = entry.snapshot
        if held is not None and now < entry.quiet_until:
            return held, entry.tally
        with self._changed:
            held = entry.snapshot
            part = entry.part
            if not complete and held is None and part is not None and now < part.fresh_until:
                return part, self._part.add
            if held is not None and now < entry.quiet_until:
                return held, entry.tally  # it came while we waited for the lock
            if held is None or now >= entry.gone_at:
                if entry.error is not None and now < entry.retry_at:
                    self._refused.add()
                    raise _again(entry.error) from entry.error
                held = None
            else:
                is_first_look = entry.quiet_until == -_NEVER
                self._rest(entry, now, now + SECONDS_BETWEEN_KNOCKS)
                entry.refresh_at = min(entry.refresh_at, max(now, entry.retry_at))
        if held is not None:
            self._start_refreshers()
            if held.source == "disk" and is_first_look and self._is_threaded:
                with self._changed:
                    self._changed.wait_for(
                        lambda: entry.snapshot is not held or entry.failures > 0,
                        SECONDS_FOR_A_REAL_ANSWER,
                    )
                    if entry.snapshot is not None:
                        held = entry.snapshot
            return held, entry.tally
        try:
            return self._ask(entry, complete), self._asked.add
        except BaseException:
            self._asked.add()
            raise
        finally:
            if entry.part is not None:  # what is missing is asked for there
                self._start_refreshers()
            self._wake_refreshers()

    # -- asking

    def _ask(self, entry: _Entry, complete: bool = True) -> Snapshot:
        """Ask the resolver, or wait for whoever asks already; no lock is held meanwhile."""
        flight = _Flight(complete)
        while True:
            first = self._fly_first(entry, flight)
            answer = first.wait(entry.name, self._patience_seconds)
            if answer is not None and (first.complete or answer.is_complete or not complete):
                return answer

    def _fly_first(self, entry: _Entry, flight: _Flight, *, is_hurried: bool = False) -> _Flight:
        """The question that is on its way; if there is none, *flight*, which then has landed."""
        try:
            with self._changed:
                first = self._take_off(entry, flight)
            if first is flight:
                self._fly(entry, flight, is_hurried=is_hurried)
            return first
        except BaseException as error:
            # Also an interrupt before `_fly` could have noted it: nobody could ask any more.
            if entry.flight is flight:
                self._land_failure(entry, flight, error, 0.0)
            raise

    def _take_off(self, entry: _Entry, flight: _Flight) -> _Flight:
        """The question that is on its way: *flight* if there is no other.  The lock is held."""
        if entry.flight is None:
            flight.offers = entry.offers
            entry.refresh_at = _NEVER  # its answer or failure sets the next time
            entry.flight = flight
        return entry.flight

    def _fly(self, entry: _Entry, flight: _Flight, *, is_hurried: bool = False) -> Snapshot:
        began = self._clock()
        try:
            seconds = HURRY_SECONDS if is_hurried else self._resolver.longest_lookup_seconds
            answer = self._resolver.lookup(entry.topic, entry.server, timeout_seconds=seconds)
            if is_hurried and not answer.is_complete and self._clock() - began >= seconds:
                raise TimedOut(f"topic {entry.name}: no complete answer within {seconds:g} s")
        except BaseException as error:
            if is_hurried and isinstance(error, TimedOut):
                self._break_off(entry, flight)
            else:
                self._land_failure(entry, flight, error, self._clock() - began)
            raise
        if answer.clock is not self._clock:  # stamped by another clock, or not at all
            answer = replace(answer, taken_at=began, clock=self._clock)
        if not (flight.complete or answer.is_complete) and answer and entry.snapshot is None:
            return self._land_part(entry, flight, answer)
        return self._land_answer(entry, flight, answer, self._clock() - began)

    def _break_off(self, entry: _Entry, flight: _Flight) -> None:
        """Leave an entry that took longer than a hurry to the thread that has time."""
        with self._changed:
            self._counts["broken_off"] += 1
            entry.flight = None
            entry.is_slow = self._has_slow = True
            entry.refresh_at = self._clock()
            flight.land(None)
        self._start_refreshers()

    def _note_speed(self, entry: _Entry, seconds: float) -> None:
        entry.is_slow = self._can_hurry and seconds >= HURRY_SECONDS
        self._has_slow = self._has_slow or entry.is_slow

    def _land_part(self, entry: _Entry, flight: _Flight, answer: Snapshot) -> Snapshot:
        """Keep some of the hosts until the refresher has asked for all of them."""
        with self._changed:
            now = self._clock()
            self._note_success(entry, now)
            fresh_until = answer.taken_at + self._ttl_seconds(answer)
            entry.part = part = replace(answer, fresh_until=fresh_until)
            entry.flight = None
            entry.refresh_at, entry.landed_at = now, -_NEVER
            flight.land(part)
        self._log_notes()
        return part

    def _land_answer(
        self, entry: _Entry, flight: _Flight, answer: Snapshot, seconds: float
    ) -> Snapshot:
        with self._changed:
            self._note_speed(entry, seconds)
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
        self._log_notes()
        if self._is_unsaved or (entry.is_slow and self._refresher.is_running):
            self._start_refreshers()
        return held

    def _land_failure(
        self, entry: _Entry, flight: _Flight, error: BaseException, seconds: float
    ) -> None:
        with self._changed:
            now = self._clock()
            self._note_speed(entry, seconds)
            entry.flight = None
            flight.land(None, error)
            self._counts["failed"] += 1
            entry.landed_at = now
            if entry.snapshot is None and not isinstance(error, (Unavailable, Denied)):
                self._entries.pop(_key(entry), None)  # a wrong topic is nothing to remember
            elif isinstance(error, Exception):  # an interrupt of the caller says nothing of Consul
                self._note_failure(entry, error, now)
        self._log_notes()

    # -- what answers and failures do to an entry; the lock is held

    def _tell(self) -> None:
        self._version += 1
        self._changed.notify_all()

    def _note(self, level: int, message: str, *arguments: object) -> None:
        self._notes.append((level, message, arguments))

    def _log_notes(self) -> None:
        """Log what was noted; the lock is not held."""
        while self._notes:
            with contextlib.suppress(IndexError):  # another thread was faster
                level, message, arguments = self._notes.popleft()
                logger.log(level, message, *arguments)

    def _take(
        self, entry: _Entry, answer: Snapshot, now: float, fresh_until: float | None = None
    ) -> None:
        """*answer* has come; the watch says until when it is fresh, else its TTL does."""
        self._note_success(entry, now)
        if now >= entry.gone_at:  # given up: no answer is doubted for it, or united with it
            entry.snapshot = entry.seen = None
        held = entry.snapshot
        asked_at = answer.taken_at
        if not answer.is_complete:
            answer = self._united(entry, answer)
        elif held is not None and not self._is_believed(entry, held, answer, now):
            entry.retry_at = entry.refresh_at = now + SECONDS_BETWEEN_DOUBTS
            entry.landed_at = now
            self._counts["doubted"] += 1
            if held.confirmed:
                entry.snapshot = replace(held, confirmed=False)
            self._rest(entry, now, entry.retry_at)
            return
        else:
            entry.seen = None
        confirmed = self._is_confirmed(entry, answer, now)
        entry.doubt = None
        entry.version = answer.version
        has_lost = held is not None and len(answer.instances) < len(held.instances)
        if has_lost and now >= entry.full_until:
            entry.full, entry.full_until = held, now + RETURN_SECONDS
        is_watched = now < self._watched_until
        if fresh_until is None:
            fresh_until = asked_at + self._ttl_seconds(answer)
            # While all is watched, this answer was newer than the last offer and any change will be
            # offered.  But a stale read may have been older.
            if is_watched and self._settings.consistency != "stale":
                fresh_until = max(fresh_until, self._watched_until)
        if self._state_file is not None and (held is None or not is_same(held, answer)):
            self._is_unsaved = True
        self._hold(entry, answer, now, fresh_until, confirmed)
        if is_watched:  # the watcher will offer again before it runs out
            entry.refresh_at = entry.quiet_until
        entry.gone_at = max(asked_at + self._settings.max_stale_seconds, fresh_until)
        entry.landed_at = now

    def _hold(
        self,
        entry: _Entry,
        answer: Snapshot,
        now: float,
        fresh_until: float,
        confirmed: bool,
    ) -> None:
        entry.snapshot = Snapshot(
            answer.topic,
            answer.instances,
            answer.source,
            answer.is_complete,
            answer.ttl_seconds,
            answer.taken_at,
            fresh_until,
            self._clock,
            confirmed,
            answer.details,
            answer.version,
        )
        entry.part = None
        share = AHEAD_FROM + (AHEAD_TO - AHEAD_FROM) * self._jitter()
        # An answer that took long is soon, or already, older than its TTL: all the same Consul is
        # left alone for half as long as it took, at most half a TTL.
        rest = min(now - answer.taken_at, self._ttl_seconds(answer)) / 2
        entry.retry_at = now + max(rest, SECONDS_BETWEEN_REFRESHES)
        entry.refresh_at = max(entry.retry_at, now + (fresh_until - now) * share)
        entry.tally = self._fresh.add
        entry.quiet_until = fresh_until

    def _rest(self, entry: _Entry, now: float, until: float) -> None:
        """Let lookups return the held answer without a look, as long as it is worth the same."""
        held = entry.snapshot
        assert held is not None
        if now < held.fresh_until:
            found, until = self._fresh, min(until, held.fresh_until)
        elif held.source == "disk":
            found = self._disk
        else:
            found = self._away if entry.failures else self._stale
        entry.tally = found.add
        entry.quiet_until = min(until, entry.gone_at)

    def _ttl_seconds(self, answer: Snapshot) -> float:
        settings = self._settings
        # Consul's own is 0 unless operators set one: service_ttl, or for "nobody" soa.min_ttl (A7).
        if answer.ttl_seconds:
            return min(max(answer.ttl_seconds, settings.ttl_min_seconds), settings.ttl_max_seconds)
        return settings.ttl_seconds if answer.instances else settings.empty_ttl_seconds

    def _is_believed(self, entry: _Entry, held: Snapshot, answer: Snapshot, now: float) -> bool:
        seconds = self._doubt_seconds(entry, held, answer, now)
        if not seconds:
            if entry.doubt is not None:
                self._note(
                    logging.INFO, "topic %s: it has %d hosts after all", entry.name, len(answer)
                )
            return True
        # Even worse than what is doubted already: that has not been repeated yet.
        if entry.doubt is None or _is_suspicious(answer, entry.doubt):
            if entry.doubt is None:
                self._note(
                    logging.WARNING,
                    "topic %s: %s suddenly says %d hosts instead of %d; keeping those unless it "
                    "says so for %g s",
                    entry.name,
                    answer.source,
                    len(answer),
                    len(held),
                    seconds,
                )
            entry.doubt, entry.doubt_since = answer, now
        if now - entry.doubt_since < seconds:
            return False
        self._note(logging.WARNING, "topic %s: confirmed, it has %d hosts", entry.name, len(answer))
        return True

    def _doubt_seconds(self, entry: _Entry, held: Snapshot, answer: Snapshot, now: float) -> float:
        """How long *answer* must repeat before it replaces *held*; 0: it is believed at once.

        - From a source that can lie (DNS, or KV read with ``consistency=stale``: a restarted Consul
          server denies live services for up to 5 s, fact A9): ``confirm_empty_seconds``, where it
          is empty or has less than half of the held hosts.
        - From KV otherwise: as long, where it lacks hosts and its version went back, so that it
          is older than what is held, or Consul has lost its data.  And `RETURN_SECONDS`, where
          within so long two hosts or more left, and less than half or none are there.
        """
        if answer.instances == held.instances:
            return 0.0  # almost always; hosts need not be put in order for it
        if self._can_lie(answer):
            return self._settings.confirm_empty_seconds if _is_suspicious(answer, held) else 0.0
        if answer.source != "kv" or held.source == "disk":
            return 0.0
        if answer.version < entry.version and not set(held.hosts) <= set(answer.hosts):
            return self._settings.confirm_empty_seconds
        full = entry.full if entry.full is not None and now < entry.full_until else held
        has_lost = len(full) - len(answer) >= 2 and len(answer) < len(held)
        return RETURN_SECONDS if has_lost and _is_suspicious(answer, full) else 0.0

    def _is_confirmed(self, entry: _Entry, answer: Snapshot, now: float) -> bool:
        """Whether *answer*, which is believed, has hosts or was repeated long enough without."""
        seconds = self._settings.confirm_empty_seconds
        if not self._can_lie(answer):
            seconds = RETURN_SECONDS if answer.source == "kv" else 0.0
        if answer.instances or not seconds:
            entry.empty_since = None
            return True
        if entry.empty_since is None:
            if not self._can_lie(answer) and not entry.snapshot:
                return True  # Consul is sure of it, and nobody has just left
            entry.empty_since = now if entry.doubt is None else entry.doubt_since
        return now - entry.empty_since >= seconds

    def _can_lie(self, answer: Snapshot) -> bool:
        return answer.source == "dns" or (
            answer.source == "kv" and self._settings.consistency == "stale"
        )

    def _united(self, entry: _Entry, answer: Snapshot) -> Snapshot:
        """*answer* and what earlier answers had, without what was in none for a while; as old as
        the oldest of them that it needs."""
        now = answer.taken_at
        if entry.seen is None:
            held = entry.snapshot
            # What was read from disk ends with the first real answer, even a cut one.
            if held is None or held.source == "disk":
                entry.seen = {}
            else:
                seen_at = held.taken_at
                entry.seen = {(one.host, one.server): (seen_at, one) for one in held.instances}
        entry.seen.update({(one.host, one.server): (now, one) for one in answer.instances})
        oldest = now - self._unseen_seconds
        entry.seen = {name: seen for name, seen in entry.seen.items() if seen[0] >= oldest}
        instances = tuple(instance for _, instance in entry.seen.values())
        taken_at = min((seen_at for seen_at, _ in entry.seen.values()), default=now)
        return replace(answer.with_instances(instances), taken_at=taken_at)

    def _note_success(self, entry: _Entry, now: float) -> None:
        if entry.failures and entry.snapshot is not None:
            since = now - entry.failing_since
            self._note(
                logging.INFO, "topic %s: Consul answers again, after %.1f s", entry.name, since
            )
            if self._is_away:
                self._is_away = False
                # It may answer for the others too: they need not wait for their next attempt.
                for other in self._at_hand.values():
                    if other.failures:
                        other.retry_at = other.refresh_at = now
                self._wake_refreshers()
        entry.failures, entry.error, entry.retry_at = 0, None, -_NEVER

    def _read_state_file(self, state_file: StateFile) -> None:
        """Once, by the first who asks for a topic; what is held already waits for nothing."""
        with self._reading:
            if self._kept is None:
                now = self._clock()
                kept = state_file.load()
                self._kept_since = now
                self._kept = kept

    def _take_from_disk(self, entry: _Entry, state_file: StateFile) -> None:
        now = self._clock()
        kept = (self._kept or {}).pop((entry.topic, entry.server), None)
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
                self._note(
                    level,
                    "topic %s: answered from the last good answer, %.1f s old: %s",
                    entry.name,
                    now - entry.snapshot.taken_at,
                    error,
                )
        entry.failures += 1
        entry.doubt = entry.empty_since = None  # while nobody answered, nothing was repeated
        entry.error = error if isinstance(error, (Unavailable, Denied)) else None
        pause = max(self._backoff.seconds(entry.failures), SECONDS_BETWEEN_REFRESHES)
        if entry.snapshot is None or now >= entry.gone_at:
            entry.retry_at = now + min(pause, SECONDS_A_FAILURE_IS_REMEMBERED)
            entry.quiet_until = -_NEVER
        else:
            entry.retry_at = now + pause
            self._rest(entry, now, entry.retry_at)
        if entry.snapshot is not None:
            entry.refresh_at = entry.retry_at

    # -- the background threads

    def _start_refreshers(self) -> None:
        """The second one only where a topic is slow, or was."""
        if not self._is_threaded:
            return
        try:
            self._refresher.start()
            if self._has_slow:
                self._slow_refresher.start()
        except Unavailable as error:  # the process has all the threads it may have, or is ending
            logger.warning("answers grow old, no thread can be started to ask: %s", error)
        self._wake_refreshers()

    def _wake_refreshers(self) -> None:
        """They may have something to do earlier than they thought."""
        self._refresher.wake()
        self._slow_refresher.wake()

    def step(self) -> float | None:
        """Do once what the threads do; return in how many seconds to come again, None: if woken."""
        pauses = [self._quick_step(), self._slow_step()]
        return min((pause for pause in pauses if pause is not None), default=None)

    def _quick_step(self) -> float | None:
        """Ask for every entry that is due and not slow, those that failed last."""
        for entry in self._due(is_slow=False):
            if self._refresher.is_stopping:
                return None
            self._refresh(entry, is_hurried=self._can_hurry)
        if self._clock() >= self._save_at():
            self._save()
        return self._pause(min(self._next_at(is_slow=False), self._save_at()))

    def _slow_step(self) -> float | None:
        """Ask for one entry that is due and slow: of several, one that failed least."""
        for entry in self._due(is_slow=True)[:1]:
            self._refresh(entry)
            self._start_refreshers()  # the other one has it now, if it was quick
        return self._pause(self._next_at(is_slow=True))

    def _due(self, *, is_slow: bool) -> list[_Entry]:
        with self._changed:
            now = self._clock()
            due = []
            for entry in self._at_hand.values():
                if entry.refresh_at > now or entry.is_slow is not is_slow:
                    continue
                is_wanted = entry.asked_at > entry.landed_at or entry.doubt is not None
                if is_wanted and entry.flight is None:
                    due.append(entry)
                else:
                    entry.refresh_at = _NEVER  # whoever wants it, or is asking, sets the next time
            return sorted(due, key=lambda entry: entry.failures)

    def _refresh(self, entry: _Entry, *, is_hurried: bool = False) -> None:
        """Ask for *entry*, unless somebody does; that it failed is noted where it is kept."""
        try:
            self._fly_first(entry, _Flight(), is_hurried=is_hurried)
        except MatchmakerError as error:
            logger.debug("topic %s: refresh failed: %s", entry.name, error)
        except Exception:
            logger.exception("topic %s: unexpected error while asking", entry.name)

    def _next_at(self, *, is_slow: bool) -> float:
        with self._changed:
            times = [e.refresh_at for e in self._at_hand.values() if e.is_slow is is_slow]
            return min(times, default=_NEVER)

    def _pause(self, next_at: float) -> float | None:
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


def _has_answer(entry: _Entry, now: float) -> bool:
    """Whether *entry* has one that is given without a wait."""
    if entry.snapshot is None or now >= entry.gone_at:
        return False
    return entry.snapshot.source != "disk" or entry.quiet_until != -_NEVER


def _is_suspicious(answer: Snapshot, held: Snapshot) -> bool:
    """Whether *answer* is less than half of *held*, or nothing: as a restarted server answers."""
    return len(answer) * 2 < len(held)


def is_same(one: Snapshot, other: Snapshot) -> bool:
    """Whether both have the same instances, in whatever order: DNS shuffles (fact A3)."""
    return one.instances == other.instances or set(one.instances) == set(other.instances)
