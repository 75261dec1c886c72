"""Keep one entry a topic, in bounded memory and under one lock: what is believed, who wants it."""

from __future__ import annotations

import collections
import contextlib
import heapq
import logging
import threading
from collections.abc import Callable, Container, Iterable, Sequence
from functools import partial
from typing import Any

import cachetools

from ..errors import Closed, Denied, Unavailable
from ..model import Snapshot, checked_topic
from ..settings import Settings
from .belief import NEVER, Rules
from .counts import Counts
from .entry import Entry, Key, key_of
from .freshness import Freshness
from .refresher import Refresher
from .state_file import StateFiles

logger = logging.getLogger(__name__)

IN_USE_SECONDS = 60.0
"""A topic is watched until nobody has asked for it for so long."""
SECOND_CHANCES = 16
"""Of topics in use, when room is made for another one: so that costs the same however many are
kept."""

SPARE_ENDS = 64
"""Of topics that are not in use any more: so many are kept, and as many as there are in use."""


class Outbox:
    """What is called once the lock is given back: log handlers, who waits for a change, the disk.

    Used as ``with outbox, lock: ...``.
    """

    def __init__(self) -> None:
        self._calls: collections.deque[Callable[[], object]] = collections.deque()

    def put(self, call: Callable[..., object], *arguments: object) -> None:
        self._calls.append(partial(call, *arguments))

    def __enter__(self) -> None: ...

    def __exit__(self, *_: object) -> None:
        while self._calls:
            with contextlib.suppress(IndexError):  # another thread was faster
                self._calls.popleft()()


class _Bounded(cachetools.LRUCache[Key, Entry]):
    """Bounded storage.  `by_key` is the same as a plain dict, for readers that take no lock.

    Readers mark an entry with the time instead of moving it, and one that was asked for since it
    was last looked at gets a second chance: so a read costs nothing here, and what nobody asks for
    leaves first.
    """

    def __init__(
        self,
        maxsize: int,
        waiting: Container[Key],
        evicted: Callable[[Entry], None],
    ) -> None:
        super().__init__(maxsize)
        self.by_key: dict[Key, Entry] = {}
        self._waiting = waiting
        self._evicted = evicted

    def __setitem__(self, key: Key, entry: Entry, **extra: Any) -> None:
        super().__setitem__(key, entry, **extra)
        self.by_key[key] = entry

    def __delitem__(self, key: Key, **extra: Any) -> None:
        super().__delitem__(key, **extra)
        self.by_key.pop(key, None)

    def popitem(self) -> tuple[Key, Entry]:
        for _ in range(min(len(self) - 1, SECOND_CHANCES)):
            key, entry = super().popitem()
            if entry.asked_at <= entry.placed_at and key not in self._waiting:
                break
            entry.placed_at = entry.asked_at
            self[key] = entry  # there is room: it was taken out just now
        else:
            key, entry = super().popitem()
        self._evicted(entry)
        return key, entry


class Topics:
    """Every topic that somebody asked for lately.

    But for `entry`, which takes the lock itself, all methods are called with `lock` held, in
    `outbox`.
    """

    def __init__(
        self,
        settings: Settings,
        clock: Callable[[], float],
        jitter: Callable[[], float],
        refresher: Refresher,
        state_files: StateFiles | None,
    ) -> None:
        self.lock = threading.RLock()  # a signal handler may look up on top of a lookup
        self.waiting: dict[Key, list[Callable[[], object]]] = {}
        """What to call when the hosts of a topic may be others."""
        self.is_closed = False
        self.on_topic_used: Callable[[], object] | None = None
        self.outbox = Outbox()
        self._rules = Rules(settings, partial(self.outbox.put, logger.log), clock, jitter)
        self.refresher = refresher
        self._state_files = state_files
        self.counts = Counts()
        self._is_away = False  # a topic with an answer failed, and none has recovered since
        self._in_use: dict[str, float] = {}  # until when, unless it is asked for
        self._ends: list[tuple[float, str]] = []  # the same as a heap, and what does not count
        self._entries = _Bounded(settings.max_topics, self.waiting, self._evicted)
        self.by_key = self._entries.by_key
        """Every entry; may be read without the lock."""

    def entry(self, topic: str, server: str | None = None) -> Entry:
        """That of *topic*, made if there is none.  Raises InvalidTopic and Closed."""
        checked_topic(topic)
        key, kept = key_of(topic, server), None
        if self._state_files is not None and key not in self.by_key:
            kept = self._state_files.load(topic, server)  # reads a file: without the lock
        with self.outbox, self.lock:
            if self.is_closed:
                raise Closed("this matchmaker was closed: make a new one")
            entry = self._entries.get(key)
            if entry is None:
                now = self._rules.clock()
                entry = self._entries[key] = Entry(topic, server, self._rules, now)
                entry.held = kept
                self.note_use(entry, now)
        return entry

    def take_over(self, entries: Iterable[Entry]) -> None:
        """Hold the answers of the process that this one was forked from."""
        for entry in list(entries):
            entry.start_anew(self._rules)
            self._entries[entry.key] = entry

    def take(
        self, entry: Entry, answer: Snapshot, now: float, freshness: Freshness | None = None
    ) -> None:
        """*answer* has come; with *freshness*, from a watch."""
        has_recovered = entry.failures > 0 and entry.held is not None
        is_changed = entry.answered(answer, now, freshness)
        entry.settled_at = now
        self.refresher.schedule(entry)
        if entry.doubt is not None:
            self.counts.questions["doubted"] += 1
        else:
            self._keep(entry)
        if is_changed:
            self._wake(entry)
        if has_recovered and self._is_away:
            self._is_away = False
            # It may answer for the others too: they need not wait for their next attempt.
            for other in self.by_key.values():
                if other.failures:
                    other.retry_at = other.refresh_at = now
                    self.refresher.schedule(other)

    def fail(self, entry: Entry, error: BaseException, now: float) -> None:
        """There was no answer."""
        entry.settled_at = now
        if entry.held is None and not isinstance(error, (Unavailable, Denied)):
            self._entries.pop(entry.key, None)  # a wrong topic is nothing to remember
            was_in_use = entry.server is None and self._in_use.pop(entry.topic, None) is not None
            if was_in_use and self.on_topic_used is not None:
                self.outbox.put(self.on_topic_used)  # there is one less to watch
        elif isinstance(error, Exception):  # an interrupt of the caller says nothing of Consul
            entry.failed(error, now, is_first=not self._is_away)
            self._is_away = self._is_away or entry.held is not None
            self.refresher.schedule(entry)
        if entry.held is None:
            self._wake(entry)

    def confirm(self, entry: Entry, now: float) -> bool:
        """Whether a watch says that what is held is still so."""
        is_confirmed = entry.confirm(now)
        if is_confirmed:
            self._keep(entry)
        return is_confirmed

    def is_wanted(self, entry: Entry) -> bool:
        """Whether somebody asked since the last answer, waits for a change, or it is in doubt."""
        is_asked_for = entry.asked_at > entry.settled_at
        return is_asked_for or entry.doubt is not None or entry.key in self.waiting

    def note_use(self, entry: Entry, now: float) -> None:
        """Somebody asked for *entry*, or waits for it; needed once, as `in_use` sees the rest."""
        if self.on_topic_used is None or entry.server is not None or entry.topic in self._in_use:
            return
        self._use_until(entry.topic, now + IN_USE_SECONDS)
        self.outbox.put(self.on_topic_used)

    def in_use(self, now: float) -> Sequence[str]:
        """Those that somebody asked for in the last `IN_USE_SECONDS`, or waits for."""
        while self._ends and self._ends[0][0] <= now:
            until, topic = heapq.heappop(self._ends)
            if self._in_use.get(topic) != until:
                continue  # it was evicted
            del self._in_use[topic]
            entry = self.by_key.get(topic)
            if entry is None:
                continue  # a wrong topic, as it turned out
            is_wanted_now = topic in self.waiting or entry.doubt is not None
            used_until = IN_USE_SECONDS + (now if is_wanted_now else entry.asked_at)
            if used_until > now:
                self._use_until(topic, used_until)
        return tuple(self._in_use)

    def _use_until(self, topic: str, until: float) -> None:
        self._in_use[topic] = until
        heapq.heappush(self._ends, (until, topic))
        if len(self._ends) > 2 * len(self._in_use) + SPARE_ENDS:
            self._ends = [(ends_at, name) for name, ends_at in self._in_use.items()]
            heapq.heapify(self._ends)

    def close(self) -> None:
        """No entry is made any more; whoever waits is told."""
        self.is_closed = True
        for wakes in self.waiting.values():
            for wake in wakes:
                self.outbox.put(wake)

    def _wake(self, entry: Entry) -> None:
        for wake in self.waiting.get(entry.key, ()):
            self.outbox.put(wake)

    def _keep(self, entry: Entry) -> None:
        """Have what is held of *entry* on disk."""
        if self._state_files is not None and entry.held is not None:
            self.outbox.put(self._state_files.keep, entry.topic, entry.server, entry.held)

    def _evicted(self, entry: Entry) -> None:
        """Room was needed."""
        self.counts.evictions += 1
        entry.refresh_at = NEVER
        if entry.server is None:
            self._in_use.pop(entry.topic, None)
        self._wake(entry)  # they look again, and make another entry
        if self._state_files is not None:
            self.outbox.put(self._state_files.drop, entry.topic, entry.server)
