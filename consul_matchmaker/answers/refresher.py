"""Decide which topic Consul is asked for next in the background, on a quick and a slow lane."""

from __future__ import annotations

import heapq
import itertools
import logging
import math
import threading
from collections.abc import Callable
from typing import Protocol

from ..errors import Unavailable
from ..worker import MakeWorker, Worker

logger = logging.getLogger(__name__)

QUICK_SECONDS = 0.1
"""The most that one question of the quick lane may take.  Consul answers in 0.2 to 2 ms, and DNS in
0.3 s where it lists thousands."""


class Refreshable(Protocol):
    """A topic, as the refresher sees it."""

    refresh_at: float
    """When it wants to be looked at."""
    queued_at: float
    """The refresher's own: when it will be; infinite while it is in no queue."""
    is_slow: bool
    """Whether its last question took longer than `QUICK_SECONDS`."""
    failures: int


class Refresher:
    """Calls *refresh* for every topic whose time has come: with `QUICK_SECONDS` on one thread, and
    with all the time it needs (None) on another for those that are slow.

    So one topic holds up the others once, by `QUICK_SECONDS`, when it turns slow; and slow ones
    hold up each other, those that answer by one question of those that fail.  A round costs what is
    due, however many topics there are.  Thread-safe; starts nothing before `start`.
    """

    def __init__(
        self,
        refresh: Callable[[Refreshable, float | None], None],
        clock: Callable[[], float],
        make_worker: MakeWorker = Worker,
    ) -> None:
        self._refresh = refresh
        self._clock = clock
        self._quick = _Lane()
        self._slow = _Lane()
        self._quick_worker = make_worker("consul-matchmaker-refresher", self._quick_step)
        self._slow_worker = make_worker("consul-matchmaker-refresher-slow", self._slow_step)
        self._count = itertools.count()
        self._lock = threading.Lock()

    def schedule(self, topic: Refreshable) -> None:
        """Look at *topic* at its ``refresh_at``, if that is earlier than planned; a later one is
        found when its time has come."""
        if topic.refresh_at >= topic.queued_at:
            return
        with self._lock:
            self._push(topic)
        (self._slow_worker if topic.is_slow else self._quick_worker).wake()

    def _push(self, topic: Refreshable) -> None:
        topic.queued_at = topic.refresh_at
        lane = self._slow if topic.is_slow else self._quick
        heapq.heappush(lane.waiting, (topic.queued_at, next(self._count), topic))

    def start(self) -> None:
        """Start what is needed and does not run, have it look at the time; that no thread is to be
        had is logged."""
        try:
            self._quick_worker.start()
            if self._slow.waiting or self._slow.due:
                self._slow_worker.start()
        except Unavailable as error:  # the process has all the threads it may have, or is ending
            logger.warning("answers grow old, no thread can be started to ask: %s", error)
        self._quick_worker.wake()
        self._slow_worker.wake()

    def stop(self, timeout_seconds: float) -> bool:
        """Tell both threads to end, and wait for them; return whether they have ended."""
        deadline = self._clock() + timeout_seconds
        self._slow_worker.stop(0)
        has_ended = self._quick_worker.stop(timeout_seconds)
        return self._slow_worker.stop(max(0.0, deadline - self._clock())) and has_ended

    @property
    def is_running(self) -> bool:
        return self._quick_worker.is_running

    def __repr__(self) -> str:
        return repr(self._quick_worker)

    def _quick_step(self) -> float | None:
        """Refresh every topic that is due and not slow, those that failed last."""
        while not self._quick_worker.is_stopping:
            topic = self._next(self._quick)
            if topic is None:
                return self._pause(self._quick)
            self._refresh(topic, QUICK_SECONDS)
        return None

    def _slow_step(self) -> float | None:
        """Refresh one topic that is due and slow: of several, one that failed least."""
        topic = self._next(self._slow)
        if topic is not None:
            self._refresh(topic, None)
        return self._pause(self._slow)

    def _next(self, lane: _Lane) -> Refreshable | None:
        now = self._clock()
        with self._lock:
            while lane.waiting and lane.waiting[0][0] <= now:
                at, number, topic = heapq.heappop(lane.waiting)
                if at != topic.queued_at:
                    continue  # it was planned anew, for an earlier time
                topic.queued_at = math.inf
                is_here = topic.is_slow is (lane is self._slow)
                if topic.refresh_at > now or not is_here:
                    if topic.refresh_at < math.inf:
                        self._push(topic)
                else:
                    heapq.heappush(lane.due, (topic.failures, number, topic))
            return heapq.heappop(lane.due)[2] if lane.due else None

    def _pause(self, lane: _Lane) -> float | None:
        with self._lock:
            if lane.due:
                return 0.0
            return max(0.0, lane.waiting[0][0] - self._clock()) if lane.waiting else None


class _Lane:
    """What waits for its time, and what is due."""

    def __init__(self) -> None:
        self.waiting: list[tuple[float, int, Refreshable]] = []
        self.due: list[tuple[int, int, Refreshable]] = []
