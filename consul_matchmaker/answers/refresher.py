"""Decide which topic Consul is asked for next in the background, on a quick and a slow lane."""

from __future__ import annotations

import heapq
import itertools
import logging
import math
import threading
from collections.abc import Callable

from ..errors import Unavailable
from ..worker import MakeWorker, Worker
from .entry import Entry

logger = logging.getLogger(__name__)

QUICK_SECONDS = 0.1
"""The most that one question of the quick lane may take.  Consul answers in 0.2 to 2 ms, and DNS in
0.3 s where it lists thousands."""


class _Lane:
    """Entries that wait for their time, those that are due, and the thread that looks at them."""

    def __init__(self, name: str, step: Callable[[_Lane], float | None], make: MakeWorker) -> None:
        self.waiting: list[tuple[float, int, Entry]] = []
        self.due: list[tuple[int, int, Entry]] = []
        self.worker = make(name, lambda: step(self))


class Refresher:
    """Calls *refresh* for every entry whose time has come: with `QUICK_SECONDS` on one thread, and
    with all the time it needs (None) on another for those that are slow.

    So one topic holds up the others once, by `QUICK_SECONDS`, when it turns slow; and slow ones
    hold up each other, those that answer by one question of those that fail.  A round costs what is
    due, however many topics there are.  Thread-safe; starts nothing before `start`.
    """

    def __init__(
        self,
        refresh: Callable[[Entry, float | None], None],
        clock: Callable[[], float],
        make_worker: MakeWorker = Worker,
    ) -> None:
        self._refresh = refresh
        self._clock = clock
        self.quick = _Lane("consul-matchmaker-refresher", self.step, make_worker)
        self.slow = _Lane("consul-matchmaker-refresher-slow", self.step, make_worker)
        self._count = itertools.count()
        self._lock = threading.Lock()

    def schedule(self, entry: Entry) -> None:
        """Look at *entry* at its ``refresh_at``, if that is earlier than planned; a later one is
        found when its time has come."""
        if entry.refresh_at < entry.queued_at:
            with self._lock:
                lane = self._push(entry)
            lane.worker.wake()

    def _push(self, entry: Entry) -> _Lane:
        entry.queued_at = entry.refresh_at
        lane = self.slow if entry.is_slow else self.quick
        heapq.heappush(lane.waiting, (entry.queued_at, next(self._count), entry))
        return lane

    def start(self) -> None:
        """Start what is needed and does not run, have it look at the time; that no thread is to be
        had is logged."""
        try:
            self.quick.worker.start()
            if self.slow.waiting or self.slow.due:
                self.slow.worker.start()
        except Unavailable as error:  # the process has all the threads it may have, or is ending
            logger.warning("answers grow old, no thread can be started to ask: %s", error)
        self.quick.worker.wake()
        self.slow.worker.wake()

    def stop(self, timeout_seconds: float) -> bool:
        """Tell both threads to end, and wait for them; return whether they have ended."""
        deadline = self._clock() + timeout_seconds
        self.slow.worker.stop(0)
        has_ended = self.quick.worker.stop(timeout_seconds)
        return self.slow.worker.stop(max(0.0, deadline - self._clock())) and has_ended

    @property
    def is_running(self) -> bool:
        return self.quick.worker.is_running

    def __repr__(self) -> str:
        return repr(self.quick.worker)

    def step(self, lane: _Lane) -> float | None:
        """Refresh every entry of *lane* that is due, those that failed last; return how long to
        rest."""
        while not lane.worker.is_stopping:
            entry = self._next(lane)
            if entry is None:
                return max(0.0, lane.waiting[0][0] - self._clock()) if lane.waiting else None
            self._refresh(entry, QUICK_SECONDS if lane is self.quick else None)
        return None

    def _next(self, lane: _Lane) -> Entry | None:
        now = self._clock()
        with self._lock:
            while lane.waiting and lane.waiting[0][0] <= now:
                at, number, entry = heapq.heappop(lane.waiting)
                if at != entry.queued_at:
                    continue  # it was planned anew, for an earlier time
                entry.queued_at = math.inf
                if entry.refresh_at <= now and entry.is_slow is (lane is self.slow):
                    heapq.heappush(lane.due, (entry.failures, number, entry))
                elif entry.refresh_at < math.inf:
                    self._push(entry)
            return heapq.heappop(lane.due)[2] if lane.due else None
