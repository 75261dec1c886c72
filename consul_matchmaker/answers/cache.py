"""Answers in memory: a belief a topic, one question a topic at a time, and a read without a lock.

A topic with an answer hardly ever waits for Consul: its answer is returned at once, and the
`Refresher` asks again, shortly before the answer runs out where callers go on asking for it.  Only
one older than ``stale_while_revalidate_seconds`` gives Consul `CHANCE_SECONDS` to answer first.  A
topic without an answer is asked for by the first caller, on its own thread, while others who want
the same topic wait for that one answer.
"""

from __future__ import annotations

import logging
import random
import threading
import time
from collections.abc import Callable, Sequence

from ..backends import Resolver
from ..errors import Closed, Denied, MatchmakerError, Unavailable
from ..model import Snapshot
from ..settings import Settings
from ..worker import MakeWorker, Worker
from .belief import NEVER, State, is_same
from .entry import Entry, Key, key_of
from .explain import explained
from .freshness import Freshness
from .questions import Questions, again
from .refresher import Refresher
from .state_file import StateFiles
from .topics import Topics

logger = logging.getLogger(__name__)

CHANCE_SECONDS = 0.02
"""So long Consul may take to answer before an old answer is given: it needs 0.2 to 2 ms where it is
well, and no caller must wait where it is not."""


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
        self._settings = settings
        self._clock = clock
        self._refresher = Refresher(self._refresh, clock, make_worker)
        self._state_files: StateFiles | None = None
        if settings.state_path is not None:
            self._state_files = StateFiles(
                settings, clock=clock, wall_clock=wall_clock, make_worker=make_worker
            )
        self._topics = Topics(settings, clock, jitter, self._refresher, self._state_files)
        self._questions = Questions(resolver, self._topics, clock)
        # At hand for reads.
        self._by_key, self._hits = self._topics.by_key, self._topics.counts.hits
        self._lock, self._outbox = self._topics.lock, self._topics.outbox
        if before is not None:
            self._topics.take_over(before._by_key.values())

    # -- what callers ask

    def lookup(
        self, topic: str, server: str | None = None, timeout_seconds: float | None = None
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
            entry = self._topics.entry(topic)
        entry.asked_at = now
        if now < entry.usable_until:
            next(self._hits)
            answer: Snapshot = entry.held  # type: ignore[assignment]  # as it is usable
        else:
            answer = self._lookup_slow(entry, now, self._deadline(now, timeout_seconds))
        if server is None:
            return answer
        narrowed = self._narrowed(answer, server)
        if narrowed is None:
            deadline = self._deadline(now, timeout_seconds)
            entry = self._topics.entry(topic, server)
            entry.asked_at = now = self._clock()
            narrowed = self._lookup_slow(entry, now, deadline, is_counted=True)
        return narrowed

    def peek(self, topic: str, server: str | None = None) -> Snapshot | None:
        """What `lookup` returns from memory, or None; never asks Consul."""
        answer = self._peek(topic)
        if server is None or answer is None:
            return answer
        narrowed = self._narrowed(answer, server)
        return self._peek((topic, server), is_counted=True) if narrowed is None else narrowed

    def refresh(
        self, topic: str, server: str | None = None, *, timeout_seconds: float | None = None
    ) -> Snapshot:
        """Ask Consul now, or wait for the answer somebody asked for already.

        Raises Unavailable or Denied, also while `lookup` still has an answer.
        """
        deadline = self._deadline(self._clock(), timeout_seconds)
        answer = self._ask(self._topics.entry(topic), deadline)
        if server is None:
            return answer
        narrowed = self._narrowed(answer, server)
        if narrowed is None:
            narrowed = self._ask(self._topics.entry(topic, server), deadline)
        return narrowed

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
                if self._topics.is_closed:
                    raise Closed("the matchmaker was closed while waiting")
        finally:
            self.stop_telling(topic, server, changed.set)

    def tell(self, topic: str, server: str | None, wake: Callable[[], object]) -> None:
        """From now on *wake* is called, on whatever thread, when the hosts of *topic* may be
        others, or asking for them failed and there are none; the topic is kept fresh.  *wake* must
        not wait, nor raise.  Raises InvalidTopic and Closed."""
        self._topics.entry(topic)
        with self._lock:
            now = self._clock()
            for key in _keys(topic, server):
                self._topics.waiting.setdefault(key, []).append(wake)
                entry = self._by_key.get(key)
                if entry is not None and entry.held is not None:
                    entry.refresh_at = min(entry.refresh_at, max(now, entry.held.fresh_until))
                    self._refresher.schedule(entry)
        self._refresher.start()

    def stop_telling(self, topic: str, server: str | None, wake: Callable[[], object]) -> None:
        """Undo one `tell`."""
        waiting = self._topics.waiting
        with self._lock:
            for key in _keys(topic, server):
                waiting[key].remove(wake)
                if not waiting[key]:
                    del waiting[key]

    def explain(self, topic: str, server: str | None = None) -> dict[str, object]:
        """What is held of *topic*, how it came, what is under way.  Asks nobody; fit for json."""
        with self._lock:
            entry = self._by_key.get(key_of(topic, server)) or self._by_key.get(topic)
            if entry is None:
                return {"topic": topic, "state": "nobody asked for it yet"}
            return explained(entry, self._clock())

    def knows(self, topic: str) -> bool:
        """Whether somebody asked for *topic*, and it was not forgotten since."""
        return topic in self._by_key

    # -- what a watcher asks and tells

    def watched_by(self, on_topic_used: Callable[[], object]) -> None:
        """Have *on_topic_used* called, without a lock, when `topics_in_use` has another one, or one
        less that cannot exist."""
        self._topics.on_topic_used = on_topic_used

    def topics_in_use(self) -> Sequence[str]:
        """Those that somebody asked for in about the last minute, or waits for."""
        with self._lock:
            return self._topics.in_use(self._clock())

    def known_version(self, topic: str) -> int:
        """Consul's index of the answer that is held for *topic*; 0 where there is none."""
        entry = self._by_key.get(topic)
        held = None if entry is None or entry.doubt is not None else entry.held
        return 0 if held is None else held.version

    def offer(self, topic: str, answer: Snapshot, freshness: Freshness) -> None:
        """Take what a watch says of *topic*, which is fresh as long as *freshness* says.  One whose
        version went back was doubted by the watch.  A topic that nobody asked for is not kept."""
        with self._outbox, self._lock:
            entry = self._by_key.get(topic)
            if entry is None:
                return
            entry.offers += 1
            self._topics.counts.questions["offered"] += 1
            self._topics.take(entry, answer, self._clock(), freshness)
            is_doubted = entry.doubt is not None
        if is_doubted:
            self._refresher.start()

    # -- its own life

    def status(self) -> dict[str, object]:
        """Figures for people and monitoring; everything in it is fit for json."""
        with self._lock:
            now = self._clock()
            entries = list(self._by_key.values())
            states = [entry.state(now) for entry in entries]
            return {
                "topics": len(entries),
                "max_topics": self._settings.max_topics,
                "states": {state.name.lower(): states.count(state) for state in State},
                "doubted": sum(entry.doubt is not None for entry in entries),
                "slow": sum(entry.is_slow for entry in entries),
                **self._topics.counts.status(),
                "refresher": "running" if self._refresher.is_running else "not running",
            }

    def stop(self) -> None:
        """Begin to close: wake whoever waits for a change, tell the threads to end."""
        with self._outbox, self._lock:
            self._topics.close()
            self._by_key = {}  # no lookup finds anything any more
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
        return f"<Cache {len(self._topics.by_key)} topics, {self._refresher!r}>"

    # -- inside

    def _deadline(self, now: float, timeout_seconds: float | None) -> float:
        return now + (self.longest_lookup_seconds if timeout_seconds is None else timeout_seconds)

    def _narrowed(self, answer: Snapshot, server: str) -> Snapshot | None:
        """What *answer*, which is of a topic, says of *server*; None: the resolver is to be asked
        for that server, of which it may find more."""
        narrowed = answer.for_server(server)
        return narrowed if narrowed.instances or not self.finds_servers else None

    def _peek(self, key: Key, *, is_counted: bool = False) -> Snapshot | None:
        entry = self._by_key.get(key)
        if entry is None:
            return None
        entry.asked_at = now = self._clock()
        if now < entry.usable_until:
            if not is_counted:
                next(self._hits)
            return entry.held
        with self._outbox, self._lock:
            found, answer = self._look(entry, now)
            if answer is not None and not is_counted:
                self._topics.counts.found[found] += 1
        if answer is not None and answer.is_stale:
            self._refresher.start()
        return answer

    def _lookup_slow(
        self, entry: Entry, now: float, deadline: float, *, is_counted: bool = False
    ) -> Snapshot:
        """What is held, where it may be given; else what Consul says until *deadline*."""
        while True:
            with self._outbox, self._lock:
                found, answer = self._look(entry, now)
                may_be_old, error = now < entry.gone_at, entry.error
                if not is_counted:
                    self._topics.counts.found[found] += 1
            if answer is not None:
                if now >= answer.fresh_until:
                    self._refresher.start()
                return answer
            if found == "refused":
                assert error is not None
                raise again(error) from error
            until = min(deadline, now + CHANCE_SECONDS) if may_be_old else deadline
            try:
                return self._ask(entry, until)
            except (Unavailable, Denied):
                if not may_be_old:
                    raise
                entry.had_no_time = is_counted = True

    def _ask(self, entry: Entry, deadline: float) -> Snapshot:
        return self._questions.ask(entry, max(0.0, deadline - self._clock()))

    def _look(self, entry: Entry, now: float) -> tuple[str, Snapshot | None]:
        """What a lookup finds, as it is counted, and the held answer; None if Consul is to be
        asked, or its last failure to be raised.  The lock is held."""
        if now >= entry.gone_at:
            is_refused = entry.error is not None and now < entry.retry_at
            return "refused" if is_refused else "asked", None
        answer = None
        self._topics.note_use(entry, now)
        if self._topics.confirm(entry, now) or now < entry.usable_until:
            answer = entry.held
        elif not entry.must_ask_first(now):
            answer = entry.serve(now)
        self._refresher.schedule(entry)
        if answer is None:
            return "asked", None
        is_from_disk = answer.source == "disk"
        return "disk" if is_from_disk else entry.state(now).name.lower(), answer

    def _refresh(self, entry: Entry, timeout_seconds: float | None) -> None:
        """Ask for a topic whose time has come, if somebody wants it and no watch confirms it."""
        with self._outbox, self._lock:
            now = self._clock()
            if entry.refresh_at > now:  # planned anew meanwhile
                self._refresher.schedule(entry)
                return
            entry.refresh_at = NEVER
            is_wanted = self._topics.is_wanted(entry)
            if is_wanted:
                self._topics.note_use(entry, now)
            is_confirmed = self._topics.confirm(entry, now)
            if is_confirmed:
                entry.settled_at = now
                if not is_wanted:
                    entry.refresh_at = NEVER
                self._refresher.schedule(entry)
        if is_confirmed or not is_wanted or entry.question is not None:
            return  # whoever wants it, or is asking, sets the next time
        if timeout_seconds is None:
            timeout_seconds = self.longest_lookup_seconds
        try:
            self._questions.join(entry, timeout_seconds)
        except MatchmakerError as error:
            logger.debug("topic %s: refresh failed: %s", entry.name, error)
        except Exception:
            logger.exception("topic %s: unexpected error while asking", entry.name)


def _keys(topic: str, server: str | None) -> list[Key]:
    """The entries that may say where *topic*, or *server* of it, is."""
    return [topic] if server is None else [topic, (topic, server)]
