"""Keep topics in use fresh by blocking queries, and confirm that these would tell of a change.

A blocking query waits at Consul for up to 25 s, and hangs for as long where it waits at a server
that led before and is frozen or cut off now.  So it proves little before it ends.  What is said to
be fresh rests on confirmations: about each ``ttl_seconds`` the leader answers a small question, by
way of the agent where the queries wait, and that agent says who leads.  Who led already when a
query was sent, and leads still, would have ended it on a change.  Where another agent or another
leader answers, all queries are asked anew with their index.  So they are when one of them or a
confirmation failed: the agent may ask by another server then, and those that hang at a frozen one
would seem to be confirmed.

With ``consistency=stale`` no question reaches the leader, and nothing of this holds: there the
queries wait so briefly that their own answers keep topics fresh, in the sense that some server
said so.
"""

from __future__ import annotations

import itertools
import logging
import math
import random
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from ..backends.http.api import Overloaded, TooLarge
from ..backends.watching import Poll, Polled, Route, Watchable
from ..backoff import Backoff
from ..errors import Denied, InvalidTopic, Unavailable
from ..model import Snapshot
from ..settings import Settings
from ..worker import MakeWorker, Worker
from .blocking_query import MAX_WAIT_SECONDS, BlockingQuery
from .freshness import Freshness
from .watch_plan import PREFIX, Watched, WatchPlan

logger = logging.getLogger(__name__)

FIRST_RETRY_SECONDS = 0.5
MAX_RETRY_SECONDS = 10.0
INVALID_SECONDS = 3600.0
"""A topic that cannot exist rests for so long; it is out of use before."""
LATEST_ANSWER_SECONDS = 3.0
"""What was proven stays fresh for so long after the next proof was due."""
CONFIRM_JITTER = 0.2
"""The share of the time between two confirmations that is random."""
LEAST_CONFIRM_SECONDS = 1.0
"""Between two confirmations, however short ``ttl_seconds`` is."""
SETTLE_SECONDS = 0.5
"""A confirmation counts so long after it was answered, for the queries that still wait then: the
answer of another one was perhaps under way, or not read yet, and says of a change."""
PLAN_SECONDS = 5.0
"""Within so long it is noticed that a topic is not in use any more."""
END_SECONDS = 1.0
"""An interrupted query ends in milliseconds; what does not, keeps its slot until it has."""


class Listener(Protocol):
    """What a watcher tells; `cache.Cache` is one."""

    def topics_in_use(self) -> Sequence[str]:
        """What was asked for in about the last minute, or is waited for."""

    def known_version(self, topic: str) -> int:
        """Consul's index of the answer that is held for *topic*; 0 where there is none."""

    def offer(self, topic: str, snapshot: Snapshot, freshness: Freshness) -> None:
        """*snapshot* is what Consul says, and is so as long as *freshness* says."""


@dataclass(frozen=True, slots=True)
class _Told:
    """What was last told of a topic."""

    number: int
    """Of the watch that told it; later ones have higher numbers."""
    folder: bytes
    snapshot: Snapshot


@dataclass(frozen=True, slots=True, eq=False)
class _Sent:
    """A poll that waits."""

    route: Route
    at: float


@dataclass(frozen=True, slots=True)
class _Proof:
    """A confirmation that was answered, and has not settled."""

    sent_at: float
    settles_at: float
    waiting: list[tuple[_Watch, _Sent]]


class _Watch:
    """One blocking query on a thread of its own."""

    def __init__(
        self, owner: Watcher, number: int, slot: int, watched: Watched, query: BlockingQuery
    ) -> None:
        self.number, self.slot, self.watched, self.query = number, slot, watched, query
        self.freshness = Freshness()
        self.has_answered = False
        self.is_ended = False
        self.is_interrupted = False
        self.sent: _Sent | None = None
        self.rests_until = -math.inf
        self._owner = owner
        self.poll: Poll = owner.backend.watch(watched)
        self.worker = owner.make_worker(f"consul-matchmaker-poll-{slot}", self.step)

    @property
    def is_live(self) -> bool:
        """Whether what it told last is what Consul says."""
        return self.has_answered and self.query.is_believed

    def step(self) -> float | None:
        """Ask once, tell what came; return how long to rest, None: until a route is known."""
        owner, now = self._owner, self._owner.clock()
        if now < self.rests_until:
            return self.rests_until - now
        with owner.lock:
            if owner.route is None:
                return None
            sent = self.sent = _Sent(owner.route, now)
        wait_seconds = owner.wait_seconds(self.query)
        rest = work = 0.0
        try:
            polled = self.poll.poll(self.query.index, wait_seconds, sent.route.agent)
            # From here on, as eventlet runs other green threads of this thread during the wait.
            cpu_started = owner.cpu_clock()
            self._end_wait()
            self._answered(polled, sent.at, wait_seconds)
            work = owner.cpu_clock() - cpu_started
        except (Unavailable, Denied) as error:
            self._end_wait()
            if self.worker.is_stopping:
                return None
            if self.is_interrupted:
                self.is_interrupted = False
                return 0.0
            self.query = self.query.failed()
            owner.on_failure(self, sent.route, error)
            rest = owner.backoff.seconds(self.query.failures)
        except InvalidTopic:  # whoever asks for it is told; nothing is lost
            self._end_wait()
            self.query = self.query.failed()
            rest = INVALID_SECONDS
        gap = self.query.gap_seconds(work, self.poll.received_bytes, owner.queries)
        self.rests_until = owner.clock() + max(rest, gap)
        return max(rest, gap)

    def _answered(self, polled: Polled, asked_at: float, wait_seconds: float) -> None:
        before, now = self.query, self._owner.clock()
        has_waited = now - asked_at >= wait_seconds
        self.query = before.answered(polled.index, polled.fingerprint, now, has_waited=has_waited)
        if self.query.is_believed:
            self._owner.on_answer(self, polled, asked_at)
        elif before.doubted_since is None:
            logger.warning(
                "Consul's answer is older than the last (index %d after %d): "
                "not believed unless it stays so for %g s",
                polled.index,
                before.believed_index,
                before.confirm_seconds,
            )

    def _end_wait(self) -> None:
        with self._owner.lock:
            self.sent = None

    def interrupt(self) -> None:
        """Have it asked anew, with its index.  The owner's lock is held."""
        self.sent = None  # so that nothing confirms it before its thread has noticed
        self.is_interrupted = True
        self.poll.interrupt()

    def lose(self) -> None:
        """It does not know any more; what it tells later has another freshness, so that what is
        known otherwise meanwhile does not count as told.  The owner's lock is held."""
        self.freshness.lose()
        self.freshness = Freshness()

    def end(self, timeout_seconds: float) -> bool:
        """End it; return whether its thread did within *timeout_seconds*."""
        with self._owner.lock:
            self.is_ended = True
            self.freshness.lose()
        self.worker.stop(0)  # first, so that the step knows why its poll ends
        self.poll.close()
        return self.worker.stop(timeout_seconds)

    def __repr__(self) -> str:
        return f"<Watch of {self.poll!r}, {self.query!r}>"


class Watcher:
    """Tells *cache* each change of the topics in use, and how long it will be so.

    `watch_plan` says which blocking queries run, each on a thread of its own (``...-poll-1`` and so
    on, at most ``max_watches``, and one where that is 0).  A thread more, ``...-watcher``, starts
    and ends them, and confirms.  What was confirmed counts as fresh until ``ttl_seconds`` and
    `LATEST_ANSWER_SECONDS` after the confirmation was sent: so an agent that goes silent on an open
    connection, or a leader, makes answers stale although nothing tells us of it.

    Starts nothing before `watch_more`; the public methods are thread-safe.
    """

    def __init__(
        self,
        backend: Watchable,
        cache: Listener,
        settings: Settings,
        *,
        clock: Callable[[], float] = time.monotonic,
        jitter: Callable[[], float] = random.random,
        cpu_clock: Callable[[], float] = time.thread_time,
        make_worker: MakeWorker = Worker,
    ) -> None:
        self.backend, self.clock = backend, clock
        self.cpu_clock, self.make_worker = cpu_clock, make_worker
        self.backoff = Backoff(FIRST_RETRY_SECONDS, MAX_RETRY_SECONDS, jitter)
        self._cache = cache
        self._settings = settings
        self._jitter = jitter
        self._worker = make_worker("consul-matchmaker-watcher", self.step)
        self._fresh_seconds = settings.ttl_seconds + LATEST_ANSWER_SECONDS
        self._is_confirmed = backend.is_confirmed_by_leader
        self._longest_wait = MAX_WAIT_SECONDS
        if not self._is_confirmed:  # the next answer comes before the last one runs out
            self._longest_wait = min(MAX_WAIT_SECONDS, 0.4 * self._fresh_seconds)
        self.lock = threading.Lock()
        self._telling = threading.Lock()  # guards _told, and the order of offers
        self._told: dict[str, _Told] = {}
        self._plan = WatchPlan(settings.max_watches, can_watch_all=backend.can_watch_all)
        self._watches: dict[Watched, _Watch] = {}
        self._ending: list[_Watch] = []
        self._numbers = itertools.count(1)
        self._confirmer = backend.confirmer()
        self.route: Route | None = None if self._is_confirmed else Route(None, "")
        self._proof: _Proof | None = None
        self._confirmed_at = -math.inf
        self._pause_seconds = 0.0  # from a proof to the next confirmation
        self._retry_at = -math.inf
        self._failures = 0  # confirmations in a row
        self._lost_at: float | None = None
        self._answered_at: float | None = None
        self._answers = 0

    def watch_more(self) -> None:
        """A topic came into use.  Cheap; does nothing after `close`."""
        try:
            self._worker.start()
        except Unavailable as error:  # the process cannot have another thread: the next topic tries
            logger.warning("topics are not watched yet: %s", error)
        if not self._plan.is_prefix:  # there it is told of with the next answer
            self._worker.wake()

    def close(self, timeout_seconds: float) -> bool:
        """End the queries and every thread; return whether they ended within the timeout."""
        deadline = self.clock() + timeout_seconds
        self._worker.stop(0)
        self._confirmer.close()
        for watch in self._all():
            watch.end(0)
        has_ended = self._worker.stop(timeout_seconds)
        for watch in self._all():  # also one that was started meanwhile
            has_ended &= watch.end(max(0.0, deadline - self.clock()))
        return has_ended

    def status(self) -> dict[str, object]:
        """What is watched, whether answers come, how many came, how old the last one is."""
        now, answered_at = self.clock(), self._answered_at
        queries = [watch.query for watch in self._all()]
        return {
            "is_watching": bool(queries) and all(watch.is_live for watch in self._all()),
            "plan": "prefix" if self._plan.is_prefix else "folders",
            "watches": len(queries),
            "answers": self._answers,
            "answer_age_seconds": None if answered_at is None else now - answered_at,
            "index": max((query.believed_index for query in queries), default=0),
            "is_doubting": any(query.doubted_since is not None for query in queries),
            "failures": max([self._failures, *(query.failures for query in queries)]),
        }

    def __repr__(self) -> str:
        return f"<Watcher of {self._plan.wanted!r}, {self._worker!r}>"

    @property
    def queries(self) -> int:
        """How many share what watching may cost."""
        return max(1, len(self._watches))

    def wait_seconds(self, query: BlockingQuery) -> float:
        """How long the next poll of *query* may wait."""
        return query.wait_seconds(self._jitter(), self._longest_wait)

    def _all(self) -> list[_Watch]:
        with self.lock:
            return [*self._watches.values(), *self._ending]

    # -- on the threads of the queries ---------------------------------------------------------

    def on_answer(self, watch: _Watch, polled: Polled, asked_at: float) -> None:
        """Tell what *watch* brought, which is from *asked_at* or later; it is believed."""
        topic = watch.watched
        in_use = set(self._cache.topics_in_use()) if topic is None else {topic}
        with self._telling:
            told = self._told
            left = {each for each in told if told[each].number == watch.number} - in_use
            with self.lock:
                if watch.is_ended:
                    return
                # A confirmation while it waited is newer than its sending.
                taken_at = max(asked_at, watch.freshness.taken_at)
                is_first = watch.freshness.fresh_until == -math.inf
            if is_first:
                self._confirm_watch(watch, taken_at)
            for topic, folder in polled.folders(in_use | left):
                self._tell(topic, folder, watch, polled, taken_at, is_left=topic in left)
            self._confirm_watch(watch, taken_at)  # now that it has told all
        is_new, watch.has_answered = not watch.has_answered, True
        self._answers, self._answered_at = self._answers + 1, self.clock()
        if watch.watched is PREFIX:
            with self.lock:
                self._plan = self._plan.accepted()
        if is_new:
            self._worker.wake()  # others may end now
        self._tell_when_well()

    def _tell(
        self,
        topic: str,
        folder: bytes,
        watch: _Watch,
        polled: Polled,
        taken_at: float,
        *,
        is_left: bool,
    ) -> None:
        """Offer *topic* unless it was, from this watch and as it is.

        One that has *left* use is offered for the last time: later changes are not told, so what
        this watch confirms then must not count for it.
        """
        told = self._told.get(topic)
        if told is not None and told.number > watch.number:
            return  # the watch that takes over has told of it
        if told is not None and told.folder == folder:
            is_known = self._cache.known_version(topic) == told.snapshot.version
            is_told = told.number == watch.number and watch.has_answered and is_known
            if is_told and not is_left:
                return
            snapshot = replace(told.snapshot, taken_at=taken_at)
        else:
            is_first = told is not None and told.number != watch.number and not watch.has_answered
            if told is not None and is_first and polled.index < told.snapshot.version:
                return  # the other watch told of something newer: the next poll will too
            snapshot = replace(polled.snapshot(topic, folder), taken_at=taken_at)
        if is_left:
            del self._told[topic]
            self._cache.offer(topic, snapshot, Freshness())
        else:
            self._told[topic] = _Told(watch.number, folder, snapshot)
            self._cache.offer(topic, snapshot, watch.freshness)

    def _confirm_watch(self, watch: _Watch, taken_at: float) -> None:
        with self.lock:
            if not watch.is_ended:
                watch.freshness.confirm(taken_at, taken_at + self._fresh_seconds)

    def on_failure(self, watch: _Watch, route: Route, error: Exception) -> None:
        """A poll of *watch*, on *route*, brought no answer."""
        now = self.clock()
        is_refused = watch.watched is PREFIX and isinstance(error, (TooLarge, Denied))
        with self.lock:
            watch.lose()
            watch.has_answered = False
            if is_refused:
                self._plan = self._plan.refused(now)
            elif isinstance(error, Overloaded):
                self._plan = self._plan.overloaded(now)
            elif isinstance(error, Unavailable) and self.route == route and self._is_confirmed:
                self._lose_route()
        if is_refused:
            pause = self._plan.tried_again_at - now
            logger.warning("the prefix is not watched as a whole for %g s: %s", pause, error)
        else:
            self._tell_lost(error)
        self._worker.wake()

    def _lose_route(self) -> None:
        """The agent may ask by another server now, though the next confirmation names the same
        route: all that waits is asked anew.  The lock is held."""
        self.route = None
        for watch in self._watches.values():
            if watch.sent is not None:
                watch.interrupt()

    def _tell_lost(self, error: Exception) -> None:
        if self._lost_at is None:
            self._lost_at = self.clock()
            logger.warning("watch lost, asking for each topic meanwhile: %s", error)

    def _tell_when_well(self) -> None:
        lost_at = self._lost_at
        if lost_at is None or self.route is None or self._failures:
            return
        if all(watch.is_live for watch in self._all()):
            self._lost_at = None
            logger.info("watching again after %.1f s", self.clock() - lost_at)

    # -- on the watcher's thread ---------------------------------------------------------------

    def step(self) -> float | None:
        """Start and end queries, confirm; return in how many seconds to come again."""
        topics = self._cache.topics_in_use()
        self._follow_plan(topics)
        self._settle()
        if self.clock() >= self._confirm_at():
            self._confirm()
        if self._worker.is_stopping or not (topics or self._watches or self._ending):
            return None
        now = self.clock()
        proof = self._proof
        times = [now + PLAN_SECONDS, self._confirm_at(), self._plan.next_at(now)]
        if proof is not None:
            times.append(proof.settles_at)
        if self._ending or set(self._plan.wanted) - set(self._watches):
            times.append(now + END_SECONDS)
        return max(0.0, min(times) - now)

    def _follow_plan(self, topics: Sequence[str]) -> None:
        running = {watch.number for watch in self._watches.values()}
        with self._telling:
            for topic in self._told.keys() - set(topics):
                if self._told[topic].number not in running:
                    del self._told[topic]
        with self.lock:
            plan = self._plan = self._plan.planned(topics, self.clock())
            self._ending = [watch for watch in self._ending if not watch.worker.stop(0)]
        while True:
            live = {name: watch.is_live for name, watch in self._watches.items()}
            ends, starts = plan.steps(live, len(self._ending))
            if not ends:
                break
            for name in ends:
                self._end(name)
        for name in starts:
            if not self._worker.is_stopping:
                self._start(name, topics)

    def _end(self, name: Watched) -> None:
        watch = self._watches[name]
        with self.lock:
            del self._watches[name]
            self._ending.append(watch)
        if watch.end(END_SECONDS):
            with self.lock:
                self._ending.remove(watch)

    def _start(self, name: Watched, topics: Sequence[str]) -> None:
        known, told = self._cache.known_version, self._told.get(name or "")
        if name is None:  # its index is at least that of each folder
            version = max(map(known, topics), default=0)
        else:
            version = known(name) if told is None else told.snapshot.version
        seconds = self._settings.confirm_empty_seconds
        query = BlockingQuery(seconds, believed_index=version)
        taken = {watch.slot for watch in self._all()}
        slot = next(number for number in itertools.count(1) if number not in taken)
        watch = _Watch(self, next(self._numbers), slot, name, query)
        if told is not None:
            watch.query = replace(query, believed=watch.poll.fingerprint_of(told.folder))
        try:
            watch.worker.start()
        except Unavailable as error:  # the process has all the threads it may have, or is ending
            logger.warning("%r is not watched yet: %s", watch.poll, error)
            return
        with self.lock:
            self._watches[name] = watch

    def _confirm_at(self) -> float:
        """When the next confirmation is due."""
        if not self._is_confirmed or self._proof is not None or not self._watches:
            return math.inf
        if self.route is None:
            return self._retry_at
        proven = [
            max(watch.freshness.taken_at + self._pause_seconds, watch.rests_until)
            for watch in self._watches.values()
            if watch.is_live
        ]
        earliest = max(self._retry_at, self._confirmed_at + LEAST_CONFIRM_SECONDS)
        return max(earliest, min(proven, default=math.inf))

    def _confirm(self) -> None:
        # By a folder that could be read lately, where there is one; by another when that fails.
        names = sorted(self._watches, key=lambda name: not self._watches[name].is_live)
        name = names[self._failures % len(names)]
        ttl_seconds = max(LEAST_CONFIRM_SECONDS, self._settings.ttl_seconds)
        self._pause_seconds = ttl_seconds * (1 - CONFIRM_JITTER * self._jitter())
        sent_at = self._confirmed_at = self.clock()
        try:
            route = self._confirmer.confirm(name, LATEST_ANSWER_SECONDS)
        except (Unavailable, Denied) as error:
            if self._worker.is_stopping:
                return
            self._failures += 1
            with self.lock:
                self._lose_route()
                if isinstance(error, Overloaded):
                    self._plan = self._plan.overloaded(self.clock())
            self._retry_at = self.clock() + self.backoff.seconds(self._failures)
            self._tell_lost(error)
            return
        self._failures = 0
        with self.lock:
            self.route = route
            proven = []  # which wait for a change of what they told, and would tell it
            for watch in self._watches.values():
                sent = watch.sent
                if sent is None or sent.at > sent_at:
                    continue
                if sent.route != route:
                    watch.interrupt()
                elif watch.is_live and watch.query.index > 0:
                    proven.append((watch, sent))
        if proven:
            self._proof = _Proof(sent_at, self.clock() + SETTLE_SECONDS, proven)
        for watch in self._all():
            watch.worker.wake()  # those that had no route
        self._tell_when_well()

    def _settle(self) -> None:
        proof = self._proof
        if proof is None or self.clock() < proof.settles_at:
            return
        self._proof = None
        with self.lock:
            for watch, sent in proof.waiting:
                if watch.sent is sent and not watch.is_ended:
                    watch.freshness.confirm(proof.sent_at, proof.sent_at + self._fresh_seconds)
