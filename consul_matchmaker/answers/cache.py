"""Answers in memory: a belief a topic, one question a topic at a time, and a read without a lock.

A topic with an answer hardly ever waits for Consul: its answer is returned at once, and the
`Refresher` asks again, shortly before the answer runs out where callers go on asking for it.  Only
one older than ``stale_while_revalidate_seconds`` gives Consul `CHANCE_SECONDS` to answer first.  A
topic without an answer is asked for by the first caller, on its own thread, while others who want
the same topic wait for that one answer.
"""

from __future__ import annotations

import collections
import contextlib
import itertools
import logging
import random
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import cachetools

from ..backends import Resolver
from ..errors import Closed, Denied, MatchmakerError, TimedOut, Unavailable
from ..model import Snapshot, checked_topic
from ..settings import Settings
from ..worker import MakeWorker, Worker
from .belief import NEVER, Belief, Rules, State, is_same
from .freshness import Freshness
from .refresher import QUICK_SECONDS, Refreshable, Refresher
from .state_file import StateFiles

logger = logging.getLogger(__name__)

CHANCE_SECONDS = 0.02
"""So long Consul may take to answer before an old answer is given: it needs 0.2 to 2 ms where it is
well, and no caller must wait where it is not."""
ENOUGH_TIME = 0.9
"""Of ``longest_lookup_seconds``: a question that had less and was not answered says nothing of
Consul, and is asked again with all the time it needs."""
IN_USE_SECONDS = 60.0
"""A topic is watched until nobody has asked for it for so long."""
SECOND_CHANCES = 16
"""Of topics in use, when room is made for another one: so that costs the same however many are
kept."""


class _Question:
    """One question on its way; others who have the same question wait for its answer."""

    __slots__ = ("_answer", "_done", "_error", "offers", "timeout_seconds")

    def __init__(self, timeout_seconds: float) -> None:
        self.timeout_seconds = timeout_seconds
        self.offers = 0  # of the entry, when it began
        self._done = threading.Event()
        self._answer: Snapshot | None = None
        self._error: BaseException | None = None

    def settle(self, answer: Snapshot | None, error: BaseException | None = None) -> None:
        self._answer, self._error = answer, error
        self._done.set()

    def wait(self, name: str, seconds: float) -> Snapshot | None:
        """What it brought; None: it had too little time, ask yourself."""
        if not self._done.wait(min(seconds, threading.TIMEOUT_MAX)):
            raise TimedOut(
                f"{name}: another thread asked Consul, and there was no answer "
                f"within {seconds:g} s: retry"
            )
        if self._error is not None:
            raise _again(self._error) from self._error
        return self._answer


class _Entry(Belief):
    """What is believed of a topic, who asks for it and who waits for it."""

    __slots__ = (
        "asked_at",
        "is_slow",
        "offers",
        "placed_at",
        "question",
        "queued_at",
        "settled_at",
        "waiters",
    )

    def __init__(self, topic: str, server: str | None, rules: Rules, now: float) -> None:
        super().__init__(topic, server, rules)
        self.asked_at = now  # by a caller
        self.placed_at = now  # in the order of eviction
        self.settled_at = -NEVER  # when the last answer or failure came
        self.queued_at = NEVER  # the refresher's
        self.is_slow = False
        self.offers = 0  # answers that came from the watcher
        self.question: _Question | None = None
        self.waiters: list[Callable[[], object]] = []

    def start_anew(self, rules: Rules) -> None:
        """In a forked child: only the answer stays."""
        super().start_anew(rules)
        self.queued_at = NEVER
        self.question = None
        self.waiters = []

    @property
    def key(self) -> _Key:
        return self.topic if self.server is None else (self.topic, self.server)

    @property
    def is_wanted(self) -> bool:
        """Whether somebody asked since the last answer, waits for a change, or it is in doubt."""
        return self.asked_at > self.settled_at or bool(self.waiters) or self.doubt is not None


_Key = str | tuple[str, str]


class _Entries(cachetools.LRUCache[_Key, _Entry]):
    """Bounded storage.  `by_key` is the same as a plain dict, for readers that take no lock.

    Readers mark an entry with the time instead of moving it, and one that was asked for since it
    was last looked at gets a second chance: so a read costs nothing here, and what nobody asks for
    leaves first.
    """

    def __init__(self, maxsize: int, evicted: Callable[[_Entry], None]) -> None:
        super().__init__(maxsize)
        self.by_key: dict[_Key, _Entry] = {}
        self._evicted = evicted

    def __setitem__(self, key: _Key, entry: _Entry, **extra: Any) -> None:
        super().__setitem__(key, entry, **extra)
        self.by_key[key] = entry

    def __delitem__(self, key: _Key, **extra: Any) -> None:
        super().__delitem__(key, **extra)
        self.by_key.pop(key, None)

    def popitem(self) -> tuple[_Key, _Entry]:
        for _ in range(min(len(self) - 1, SECOND_CHANCES)):
            key, entry = super().popitem()
            if entry.asked_at <= entry.placed_at and not entry.waiters:
                break
            entry.placed_at = entry.asked_at
            self[key] = entry  # there is room: it was taken out just now
        else:
            key, entry = super().popitem()
        self._evicted(entry)
        return key, entry


class Cache:
    """A Resolver that answers from memory.  Thread-safe; a read of a fresh answer takes no lock.

    Opens nothing and starts no thread when made; those of the `Refresher` start when the first
    answer runs out.
    """

    def __init__(
        self,
        resolver: Resolver,
        settings: Settings,
        *,
        clock: Callable[[], float] = time.monotonic,
        jitter: Callable[[], float] = random.random,
        wall_clock: Callable[[], float] = time.time,
        make_worker: MakeWorker = Worker,
        before: Cache | None = None,
    ) -> None:
        """*before*: in a forked child, its parent's, whose answers stay."""
        self.finds_servers = resolver.finds_servers
        self.longest_lookup_seconds = resolver.longest_lookup_seconds
        self._resolver = resolver
        self._settings = settings
        self._clock = clock
        self._rules = Rules(settings, self._note, clock, jitter)
        self._refresher = Refresher(self._refresh, clock, make_worker)
        self._state_files: StateFiles | None = None
        if settings.state_path is not None:
            self._state_files = StateFiles(
                settings, clock=clock, wall_clock=wall_clock, make_worker=make_worker
            )
        self._is_away = False  # a topic with an answer failed, and none has recovered since
        self._is_closed = False
        self._hit = itertools.count().__next__  # counts without a lock, and loses nothing
        self._hits_read = 0
        self._found = dict.fromkeys(("fresh", "stale", "away", "disk", "asked", "refused"), 0)
        self._questions = dict.fromkeys(("answered", "failed", "deferred", "doubted", "offered"), 0)
        self._seconds_asking = self._longest_question = 0.0
        self._evictions = 0
        self._entries = _Entries(settings.max_topics, self._evicted)
        self._by_key = self._entries.by_key
        self._lock = threading.RLock()  # a signal handler may look up on top of a lookup
        # What is to be called once the lock is given back: log handlers, who waits for a change.
        self._outbox: collections.deque[Callable[[], object]] = collections.deque()
        self._waiters: dict[_Key, list[Callable[[], object]]] = {}
        self._in_use: dict[str, float] = {}  # when it was seen to be; the oldest first
        self.on_topic_used: Callable[[], object] | None = None
        """Called, without a lock, when `topics_in_use` has one more; set by who watches them."""
        for entry in () if before is None else list(before._by_key.values()):
            entry.start_anew(self._rules)
            self._entries[entry.key] = entry

    # -- what callers ask

    def lookup(
        self, topic: str, server: str | None = None, *, timeout_seconds: float | None = None
    ) -> Snapshot:
        """Every live host of *topic*, perhaps none; with *server*, only that server's.

        From memory while there is an answer younger than ``max_stale_seconds``.  Else asks, for
        *timeout_seconds* at most (None: as long as the backend needs), and raises Unavailable
        (TimedOut) or Denied.
        """
        now = self._clock()  # before a new entry is made: that one was not asked for again
        try:
            entry = self._by_key[topic]
        except (KeyError, TypeError):  # TypeError: not a text at all
            entry = self._entry(topic)
        entry.asked_at = now
        held = entry.held
        if held is not None and now < entry.usable_until:
            self._hit()
            if server is None:
                return held
        else:
            if timeout_seconds is None:
                timeout_seconds = self.longest_lookup_seconds
            held = self._lookup_slow(entry, now, timeout_seconds)
            if server is None:
                return held
        narrowed = held.for_server(server)
        if self._is_enough(narrowed):
            return narrowed
        if timeout_seconds is None:
            timeout_seconds = self.longest_lookup_seconds
        left = max(0.0, timeout_seconds - (self._clock() - now))
        entry = self._entry(topic, server)
        entry.asked_at = now = self._clock()
        return self._lookup_slow(entry, now, left, is_counted=True)

    def peek(self, topic: str, server: str | None = None) -> Snapshot | None:
        """What `lookup` returns from memory, or None; never asks Consul."""
        answer = self._peek(self._by_key.get(topic))
        if server is None or answer is None:
            return answer
        narrowed = answer.for_server(server)
        if self._is_enough(narrowed):
            return narrowed
        return self._peek(self._by_key.get((topic, server)), is_counted=True)

    def refresh(
        self, topic: str, server: str | None = None, *, timeout_seconds: float | None = None
    ) -> Snapshot:
        """Ask Consul now, or wait for the answer somebody asked for already.

        Raises Unavailable or Denied, also while `lookup` still has an answer.
        """
        if timeout_seconds is None:
            timeout_seconds = self.longest_lookup_seconds
        deadline = self._clock() + timeout_seconds
        answer = self._ask(self._entry(topic), timeout_seconds)
        if server is None:
            return answer
        narrowed = answer.for_server(server)
        if self._is_enough(narrowed):
            return narrowed
        return self._ask(self._entry(topic, server), max(0.0, deadline - self._clock()))

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
        changed = threading.Event()
        self.tell(topic, server, changed.set)
        try:
            while True:
                changed.clear()
                snapshot = self.lookup(topic, server)
                if seen is None or not is_same(snapshot, seen):
                    return snapshot
                remaining = deadline - self._clock()
                if remaining <= 0:
                    return snapshot
                changed.wait(min(remaining, threading.TIMEOUT_MAX))
                if self._is_closed:
                    raise Closed("the matchmaker was closed while waiting")
        finally:
            self.stop_telling(topic, server, changed.set)

    def tell(self, topic: str, server: str | None, wake: Callable[[], object]) -> None:
        """From now on *wake* is called, on whatever thread, when the hosts of *topic* may be
        others, or asking for them failed and there are none; the topic is kept fresh.  *wake* must
        not wait, nor raise.  Raises InvalidTopic and Closed."""
        self._entry(topic)
        with self._lock:
            now = self._clock()
            for key in _keys(topic, server):
                self._waiters.setdefault(key, []).append(wake)
                entry = self._by_key.get(key)  # or else it finds who waits when it is made
                if entry is None:
                    continue
                entry.waiters.append(wake)
                if entry.held is not None:
                    entry.refresh_at = min(entry.refresh_at, max(now, entry.held.fresh_until))
                    self._refresher.schedule(entry)
        self._refresher.start()

    def stop_telling(self, topic: str, server: str | None, wake: Callable[[], object]) -> None:
        """Undo one `tell`."""
        with self._lock:
            for key in _keys(topic, server):
                entry = self._by_key.get(key)
                if entry is not None:
                    entry.waiters.remove(wake)
                self._waiters[key].remove(wake)
                if not self._waiters[key]:
                    del self._waiters[key]

    def explain(self, topic: str, server: str | None = None) -> dict[str, object]:
        """What is held of *topic*, how it came, what is under way.  Asks nobody; fit for json."""
        with self._lock:
            now = self._clock()
            entry = self._entries.get(topic)
            if server is not None:
                entry = self._entries.get((topic, server), entry)
            if entry is None:
                return {"topic": topic, "state": "nobody asked for it yet"}
            held, doubt = entry.held, entry.doubt
            next_at = min(entry.refresh_at, entry.gone_at)
            return {
                "topic": topic,
                "state": entry.state(now).value,
                "answer": None if held is None else _explained(held),
                "given_up_in_seconds": None if held is None else max(0.0, entry.gone_at - now),
                "asked_again_in_seconds": max(0.0, next_at - now) if next_at < NEVER else None,
                "is_being_asked": entry.question is not None,
                "is_slow": entry.is_slow,
                "is_watched": entry.is_watched(now),
                "doubted": None
                if doubt is None
                else {**_explained(doubt), "since_seconds": now - entry.doubt_since},
                "failures": entry.failures,
                "failing_for_seconds": now - entry.failing_since if entry.failures else None,
                "last_error": None if entry.error is None else str(entry.error),
            }

    def knows(self, topic: str) -> bool:
        """Whether somebody asked for *topic*, and it was not forgotten since."""
        return topic in self._by_key

    # -- what a watcher asks and tells

    def topics_in_use(self) -> Sequence[str]:
        """Those that somebody asked for in the last `IN_USE_SECONDS`, or waits for."""
        with self._lock:
            oldest = self._clock() - IN_USE_SECONDS
            while self._in_use and next(iter(self._in_use.values())) < oldest:
                del self._in_use[next(iter(self._in_use))]
            return tuple(self._in_use)

    def known_version(self, topic: str) -> int:
        """Consul's index of the answer that is held for *topic*; 0 where there is none."""
        entry = self._by_key.get(topic)
        return (
            0 if entry is None or entry.held is None or entry.doubt is not None else entry.version
        )

    def offer(self, topic: str, answer: Snapshot, freshness: Freshness) -> None:
        """Take what a watch says of *topic*, which is fresh as long as *freshness* says.  One whose
        version went back was doubted by the watch.  A topic that nobody asked for is not kept."""
        with self._lock:
            entry = self._entries.get(topic)
            if entry is None:
                return
            entry.offers += 1
            self._questions["offered"] += 1
            self._take(entry, answer, self._clock(), freshness)
            is_doubted = entry.doubt is not None
        self._send_outbox()
        if is_doubted:
            self._refresher.start()

    # -- its own life

    def status(self) -> dict[str, object]:
        """Figures for people and monitoring; everything in it is fit for json."""
        with self._lock:
            now = self._clock()
            entries = list(self._by_key.values())
            states = [entry.state(now) for entry in entries]
            self._hits_read += 1  # reading takes a number itself
            hits = self._hit() + 1 - self._hits_read
            found = {"memory": hits, **self._found}
            return {
                "topics": len(entries),
                "max_topics": self._settings.max_topics,
                "evictions": self._evictions,
                "states": {state.name.lower(): states.count(state) for state in State},
                "doubted": sum(entry.doubt is not None for entry in entries),
                "slow": sum(entry.is_slow for entry in entries),
                "lookups": sum(found.values()),
                # Each is one of them: `memory`, what the last look found is given again; else a
                # look found a fresh answer; a stale one, or one that is stale because Consul is
                # away; one from disk; none, so that Consul was asked, with whatever result; or its
                # last failure, unasked.
                "lookups_that_found": found,
                "questions": dict(self._questions),
                "seconds_asking": self._seconds_asking,
                "longest_question_seconds": self._longest_question,
                "refresher": "running" if self._refresher.is_running else "not running",
            }

    def stop(self) -> None:
        """Begin to close: wake whoever waits for a change, tell the threads to end."""
        with self._lock:
            self._is_closed = True
            for entry in self._by_key.values():
                self._outbox.extend(entry.waiters)
            self._by_key = {}  # no lookup finds anything any more
        self._send_outbox()
        self._refresher.stop(0)
        if self._state_files is not None:
            self._state_files.stop()

    def close(self, timeout_seconds: float = 0.0) -> bool:
        """Stop asking, wake whoever waits for a change; return whether the threads have ended."""
        deadline = self._clock() + timeout_seconds
        self.stop()  # tell all threads first, then wait for one after the other
        has_ended = self._refresher.stop(timeout_seconds)
        if self._state_files is not None:
            has_ended &= self._state_files.close(max(0.0, deadline - self._clock()))
        return has_ended

    def __repr__(self) -> str:
        return f"<Cache {len(self._entries)} topics, {self._refresher!r}>"

    # -- reading

    def _entry(self, topic: str, server: str | None = None) -> _Entry:
        checked_topic(topic)
        key: _Key = topic if server is None else (topic, server)
        kept = None
        if self._state_files is not None and key not in self._by_key:
            kept = self._state_files.load(topic, server)  # reads a file: without the lock
        with self._lock:
            if self._is_closed:
                raise Closed("this matchmaker was closed: make a new one")
            entry = self._entries.get(key)
            if entry is None:
                now = self._clock()
                entry = self._entries[key] = _Entry(topic, server, self._rules, now)
                entry.waiters += self._waiters.get(key, ())
                self._note_use(entry, now)
                if kept is not None:
                    entry.read_from_disk(
                        Snapshot(
                            topic,
                            kept.instances,
                            "disk",
                            kept.is_complete,
                            taken_at=now - kept.age_seconds,
                            fresh_until=now - kept.age_seconds,
                            clock=self._clock,
                            confirmed=False,
                            details={"file": str(kept.path)},
                        )
                    )
        self._send_outbox()
        return entry

    def _is_enough(self, narrowed: Snapshot) -> bool:
        """Whether the topic's answer says all that there is to say of a server."""
        return bool(narrowed.instances) or not self.finds_servers

    def _peek(self, entry: _Entry | None, *, is_counted: bool = False) -> Snapshot | None:
        if entry is None:
            return None
        entry.asked_at = now = self._clock()
        held = entry.held
        if held is not None and now < entry.usable_until:
            if not is_counted:
                self._hit()
            return held
        with self._lock:
            if entry.held is None or now >= entry.gone_at or entry.must_ask_first(now):
                return None
            answer = self._look(entry, now, is_counted)
        self._send_outbox()
        if answer is not None and answer.is_stale:
            self._refresher.start()
        return answer

    def _lookup_slow(
        self, entry: _Entry, now: float, timeout_seconds: float, *, is_counted: bool = False
    ) -> Snapshot:
        """What is held, where it may be given; else what Consul says within *timeout_seconds*."""
        while True:
            with self._lock:
                answer = self._look(entry, now, is_counted)
                may_be_old = entry.held is not None and now < entry.gone_at
            self._send_outbox()
            if answer is not None:
                if now >= answer.fresh_until:
                    self._refresher.start()
                return answer
            seconds = min(CHANCE_SECONDS, timeout_seconds) if may_be_old else timeout_seconds
            try:
                return self._ask(entry, seconds)
            except (Unavailable, Denied):
                if not may_be_old:
                    raise
                entry.had_no_time = is_counted = True

    def _look(self, entry: _Entry, now: float, is_counted: bool) -> Snapshot | None:
        """The held answer, None if Consul is to be asked.  The lock is held."""
        held: Snapshot | None = None
        if entry.held is None or now >= entry.gone_at:
            is_refused = entry.error is not None and now < entry.retry_at
            found = "refused" if is_refused else "asked"
        else:
            self._note_use(entry, now)
            if entry.confirm(now):
                self._keep(entry)
                held = entry.held
            elif now < entry.usable_until:
                held = entry.held
            elif not entry.must_ask_first(now):
                held = entry.serve(now)
            self._refresher.schedule(entry)
            found = "asked" if held is None else entry.worth(now)
        if not is_counted:
            self._found[found] += 1
        if found == "refused":
            assert entry.error is not None
            raise _again(entry.error) from entry.error
        return held

    def _note_use(self, entry: _Entry, now: float) -> None:
        if self.on_topic_used is None or entry.server is not None:
            return
        if self._in_use.pop(entry.topic, None) is None:
            self._outbox.append(self.on_topic_used)
        self._in_use[entry.topic] = now

    # -- asking

    def _ask(self, entry: _Entry, timeout_seconds: float) -> Snapshot:
        """Ask the resolver, or wait for whoever asks already; no lock is held meanwhile."""
        deadline = self._clock() + timeout_seconds
        left = timeout_seconds
        while True:
            question = self._join(entry, _Question(min(left, self.longest_lookup_seconds)))
            answer = question.wait(entry.name, left)
            if answer is not None:
                return answer
            left = max(0.0, deadline - self._clock())

    def _join(self, entry: _Entry, question: _Question) -> _Question:
        """The question that is on its way; if there is none, *question*, which then is settled."""
        try:
            with self._lock:
                first = self._begin(entry, question)
            if first is question:
                self._ask_resolver(entry, question)
            return first
        except BaseException as error:
            # Also an interrupt before `_ask_resolver` could have noted it: nobody could ask again.
            if entry.question is question:
                self._settle_failure(entry, question, error, 0.0)
            raise

    def _begin(self, entry: _Entry, question: _Question) -> _Question:
        """The question that is on its way: *question* if there is no other.  The lock is held."""
        if entry.question is None:
            question.offers = entry.offers
            entry.refresh_at = NEVER  # its answer or failure sets the next time
            entry.question = question
        return entry.question

    def _ask_resolver(self, entry: _Entry, question: _Question) -> None:
        began, seconds = self._clock(), question.timeout_seconds
        is_short = seconds < ENOUGH_TIME * self.longest_lookup_seconds
        try:
            answer = self._resolver.lookup(entry.topic, entry.server, timeout_seconds=seconds)
            took = self._clock() - began
            if is_short and not answer.is_complete and entry.held is not None and took >= seconds:
                raise TimedOut(f"{entry.name}: no complete answer within {seconds:g} s")
        except BaseException as error:
            if is_short and isinstance(error, TimedOut):
                self._defer(entry, question)
            else:
                self._settle_failure(entry, question, error, self._clock() - began)
            raise
        if answer.clock is not self._clock:  # stamped by another clock, or not at all
            answer = answer.stamped(
                taken_at=began,
                fresh_until=answer.fresh_until,
                clock=self._clock,
                confirmed=answer.confirmed,
            )
        self._settle(entry, question, answer, took)

    def _defer(self, entry: _Entry, question: _Question) -> None:
        """Leave an entry that had too little time to the lane that has it."""
        with self._lock:
            self._questions["deferred"] += 1
            entry.question = None
            entry.is_slow = True
            entry.left_unanswered(self._clock())
            self._refresher.schedule(entry)
            question.settle(None)
        self._refresher.start()

    def _settle(self, entry: _Entry, question: _Question, answer: Snapshot, seconds: float) -> None:
        with self._lock:
            entry.is_slow = seconds >= QUICK_SECONDS
            self._seconds_asking += seconds
            self._longest_question = max(self._longest_question, seconds)
            self._questions["answered"] += 1
            entry.question = None
            # What the watcher brought while this question was on its way is newer than it.
            if entry.offers == question.offers or entry.held is None:
                self._take(entry, answer, self._clock())
            question.settle(entry.held)
        self._send_outbox()

    def _settle_failure(
        self, entry: _Entry, question: _Question, error: BaseException, seconds: float
    ) -> None:
        with self._lock:
            now = self._clock()
            entry.is_slow = seconds >= QUICK_SECONDS
            entry.question = None
            question.settle(None, error)
            self._questions["failed"] += 1
            entry.settled_at = now
            if entry.held is None and not isinstance(error, (Unavailable, Denied)):
                self._entries.pop(entry.key, None)  # a wrong topic is nothing to remember
            elif isinstance(error, Exception):  # an interrupt of the caller says nothing of Consul
                entry.failed(error, now, is_first=not self._is_away)
                self._is_away = self._is_away or entry.held is not None
                self._refresher.schedule(entry)
            if entry.held is None:
                self._outbox.extend(entry.waiters)
        self._send_outbox()

    def _take(
        self, entry: _Entry, answer: Snapshot, now: float, freshness: Freshness | None = None
    ) -> None:
        """*answer* has come.  The lock is held."""
        has_recovered = entry.failures > 0 and entry.held is not None
        is_changed = entry.answered(answer, now, freshness)
        entry.settled_at = now
        self._refresher.schedule(entry)
        if entry.doubt is not None:
            self._questions["doubted"] += 1
        else:
            self._keep(entry)
        if is_changed:
            self._outbox.extend(entry.waiters)
        if has_recovered and self._is_away:
            self._is_away = False
            # It may answer for the others too: they need not wait for their next attempt.
            for other in self._by_key.values():
                if other.failures:
                    other.retry_at = other.refresh_at = now
                    self._refresher.schedule(other)

    def _refresh(self, topic: Refreshable, timeout_seconds: float | None) -> None:
        """Ask for a topic whose time has come, if somebody wants it and no watch confirms it."""
        entry = topic
        assert isinstance(entry, _Entry)
        with self._lock:
            now = self._clock()
            is_wanted = entry.is_wanted
            if entry.refresh_at > now:  # planned anew meanwhile
                self._refresher.schedule(entry)
                return
            entry.refresh_at = NEVER
            if is_wanted:
                self._note_use(entry, now)
            is_confirmed = entry.confirm(now)
            if is_confirmed:
                self._keep(entry)
                entry.settled_at = now
                if not is_wanted:
                    entry.refresh_at = NEVER
                self._refresher.schedule(entry)
        self._send_outbox()
        if is_confirmed or not is_wanted or entry.question is not None:
            return  # whoever wants it, or is asking, sets the next time
        if timeout_seconds is None:
            timeout_seconds = self.longest_lookup_seconds
        try:
            self._join(entry, _Question(timeout_seconds))
        except MatchmakerError as error:
            logger.debug("topic %s: refresh failed: %s", entry.name, error)
        except Exception:
            logger.exception("topic %s: unexpected error while asking", entry.name)

    def _keep(self, entry: _Entry) -> None:
        """Have what is held of *entry* on disk.  The lock is held."""
        if self._state_files is not None and entry.held is not None:
            keep = self._state_files.keep
            self._outbox.append(partial(keep, entry.topic, entry.server, entry.held))

    # -- what is done without the lock

    def _note(self, level: int, message: str, *arguments: object) -> None:
        self._outbox.append(partial(logger.log, level, message, *arguments))

    def _send_outbox(self) -> None:
        while self._outbox:
            with contextlib.suppress(IndexError):  # another thread was faster
                self._outbox.popleft()()

    def _evicted(self, entry: _Entry) -> None:
        """Room was needed.  The lock is held."""
        self._evictions += 1
        entry.refresh_at = NEVER
        if entry.server is None:
            self._in_use.pop(entry.topic, None)
        self._outbox.extend(entry.waiters)  # they look again, and make another entry
        if self._state_files is not None:
            self._outbox.append(partial(self._state_files.drop, entry.topic, entry.server))


def _keys(topic: str, server: str | None) -> list[_Key]:
    """The entries that may say where *topic*, or *server* of it, is."""
    return [topic] if server is None else [topic, (topic, server)]


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


def _again(error: BaseException) -> MatchmakerError:
    """The same error for another caller: an exception that is raised twice mixes tracebacks."""
    if isinstance(error, MatchmakerError):
        return type(error)(*error.args)
    return Unavailable(f"the thread that asked failed: {error!r}: retry")
