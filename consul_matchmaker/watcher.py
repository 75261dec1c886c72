"""Keep every cached topic fresh by one blocking query over the whole prefix, on one thread."""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Callable, Mapping
from typing import Protocol

from .backoff import Backoff
from .blocking_query import MAX_WAIT_SECONDS, BlockingQuery
from .errors import Denied, Unavailable
from .model import Snapshot
from .settings import Settings
from .worker import Worker

logger = logging.getLogger(__name__)

FIRST_RETRY_SECONDS = 0.5
MAX_RETRY_SECONDS = 10.0
SHORTEST_WAIT_SECONDS = 2.0
"""However short ``ttl_seconds`` is: each poll that runs out carries every key once more."""
LATEST_ANSWER_SECONDS = 3.0
"""Beside the poll itself: the rest between two polls, a slow machine."""
WAIT_OVERRUN = 1 / 16
"""Consul lengthens every wait by up to this share of it."""


class Pollable(Protocol):
    """What a watcher asks; `backends.kv.Kv` is one."""

    polled_bytes: int
    """The size of the last poll's answer."""
    polled_at: float
    """When the last poll was sent, on the watcher's clock: what it brought is no older."""

    def poll(self, index: int, wait_seconds: float) -> tuple[int, Mapping[str, Snapshot]]: ...
    def poll_timeout_seconds(self, wait_seconds: float) -> float: ...
    def end_polls(self) -> None: ...


class Listener(Protocol):
    """What a watcher tells; `cache.Cache` is one."""

    def offer(
        self,
        snapshots: Mapping[str, Snapshot],
        *,
        taken_at: float,
        version: int,
        fresh_until: float,
    ) -> None: ...
    def watch_lost(self) -> None: ...


class Watcher:
    """Tells *cache* each change under the prefix, and when it can no longer do so.

    One request waits at Consul for all topics, for ``ttl_seconds`` at most; what it costs is
    bounded by `BlockingQuery`.  What it offers counts as fresh until the next answer is overdue,
    `LATEST_ANSWER_SECONDS` after its wait, or until the watch is lost: so an agent that goes silent
    on an open connection makes answers stale although nothing tells us of it.  Its age counts from
    the sending of the poll, so one that was under way for longer than Consul may hold it is fresh
    for so much less.
    Starts nothing before `start`; all methods are thread-safe.
    """

    def __init__(
        self,
        kv: Pollable,
        cache: Listener,
        settings: Settings,
        *,
        clock: Callable[[], float] = time.monotonic,
        jitter: Callable[[], float] = random.random,
        cpu_clock: Callable[[], float] = time.thread_time,
    ) -> None:
        self._kv = kv
        self._cache = cache
        self._settings = settings
        self._clock = clock
        self._jitter = jitter
        self._cpu_clock = cpu_clock
        self._backoff = Backoff(FIRST_RETRY_SECONDS, MAX_RETRY_SECONDS, jitter)
        self._worker = Worker("consul-matchmaker-watcher", self._step)
        self._longest_wait_seconds = min(
            MAX_WAIT_SECONDS, max(SHORTEST_WAIT_SECONDS, settings.ttl_seconds)
        )
        self._begin()

    def _begin(self) -> None:
        self._query = BlockingQuery(self._settings.confirm_empty_seconds)
        self._lost_at: float | None = None
        self._answered_at: float | None = None
        self._answers = 0

    def start(self) -> None:
        """Start watching if it is not running; does nothing after `close`."""
        self._worker.start()

    def close(self, timeout_seconds: float) -> bool:
        """End the poll that waits, and the thread; return whether it ended within the timeout."""
        self._worker.stop(0)  # first, so that the step knows why its poll ends
        self._kv.end_polls()
        return self._worker.stop(timeout_seconds)

    def forget(self) -> None:
        """In a forked child: not started yet, nothing known."""
        self._worker.forget()
        self._begin()

    def status(self) -> dict[str, object]:
        """Whether answers come, how many came, how old the last one is."""
        now, answered_at = self._clock(), self._answered_at
        return {
            "is_watching": self._worker.is_running and self._query.is_believed,
            "answers": self._answers,
            "answer_age_seconds": None if answered_at is None else now - answered_at,
            "index": self._query.believed_index,
            "is_doubting": self._query.doubted_since is not None,
            "failures": self._query.failures,
        }

    def __repr__(self) -> str:
        return f"<Watcher {self._query!r}, {self._worker!r}>"

    def _step(self) -> float | None:
        query, cpu_started = self._query, self._cpu_clock()
        wait_seconds, asked_at = self._wait_seconds(query), self._clock()
        try:
            index, snapshots = self._kv.poll(query.index, wait_seconds)
        except (Unavailable, Denied) as error:
            return None if self._worker.is_stopping else self._on_failure(error)
        now = self._clock()
        self._answers, self._answered_at = self._answers + 1, now
        has_waited = now - asked_at >= wait_seconds
        self._query = query.answered(index, snapshots, now, has_waited=has_waited)
        if self._query.is_believed:
            self._on_answer(snapshots, now)
        elif query.doubted_since is None:
            logger.warning(
                "Consul's answer is older than the last (index %d after %d): "
                "not believed unless it stays so for %g s",
                index,
                query.believed_index,
                query.confirm_seconds,
            )
        return self._query.gap_seconds(self._cpu_clock() - cpu_started, self._kv.polled_bytes)

    def _wait_seconds(self, query: BlockingQuery) -> float:
        share = query.wait_seconds(self._jitter()) / MAX_WAIT_SECONDS  # jittered
        return share * self._longest_wait_seconds

    def _on_answer(self, snapshots: Mapping[str, Snapshot], now: float) -> None:
        # An answer that confirms the last one is offered too: it makes it fresh again.
        longest_wait = self._longest_wait_seconds * (1 + WAIT_OVERRUN)
        came_at = min(now, self._kv.polled_at + longest_wait)
        fresh_until = came_at + longest_wait + LATEST_ANSWER_SECONDS
        self._cache.offer(
            snapshots,
            taken_at=self._kv.polled_at,
            version=self._query.believed_index,
            fresh_until=fresh_until,
        )
        if self._lost_at is not None:
            logger.info("watching again after %.1f s", now - self._lost_at)
            self._lost_at = None

    def _on_failure(self, error: Exception) -> float:
        self._query = self._query.failed()
        if self._lost_at is None:
            self._lost_at = self._clock()
            logger.warning("watch lost, asking for each topic meanwhile: %s", error)
            self._cache.watch_lost()
        return max(self._query.gap_seconds(0), self._backoff.seconds(self._query.failures))
