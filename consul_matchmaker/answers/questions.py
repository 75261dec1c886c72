"""Ask the resolver: one question a topic at a time, whose answer all have who want it meanwhile."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent import futures
from dataclasses import replace

from ..backends import ENOUGH_TIME, Resolver
from ..errors import MatchmakerError, TimedOut, Unavailable
from ..model import Snapshot
from .belief import NEVER
from .entry import Entry
from .refresher import QUICK_SECONDS
from .topics import Topics


class _Question(futures.Future[Snapshot | None]):
    """One that is on its way.  Without an answer it had too little time: ask yourself."""

    def __init__(self, timeout_seconds: float) -> None:
        super().__init__()
        self.timeout_seconds = timeout_seconds
        self.offers = 0  # of the entry, when it began


class Questions:
    """Thread-safe; no lock is held while the resolver is asked."""

    def __init__(self, resolver: Resolver, topics: Topics, clock: Callable[[], float]) -> None:
        self._resolver = resolver
        self._longest_seconds = resolver.longest_lookup_seconds
        self._topics = topics
        self._clock = clock

    def ask(self, entry: Entry, timeout_seconds: float) -> Snapshot:
        """The answer of the resolver, or to the question that is on its way.

        Raises Unavailable (TimedOut), Denied and what else the resolver raises.
        """
        deadline = self._clock() + timeout_seconds
        left = timeout_seconds
        while True:
            question = self.join(entry, left)
            try:
                error = question.exception(min(left, threading.TIMEOUT_MAX))
            except futures.TimeoutError:
                raise TimedOut(
                    f"{entry.name}: another thread asked Consul, and there was no answer "
                    f"within {left:g} s: retry"
                ) from None
            if error is not None:
                raise again(error) from error
            answer = question.result()
            if answer is not None:
                return answer
            left = max(0.0, deadline - self._clock())

    def join(self, entry: Entry, timeout_seconds: float) -> _Question:
        """The question that is on its way; if there is none, one that was asked just now."""
        question = _Question(min(timeout_seconds, self._longest_seconds))
        try:
            with self._topics.lock:
                first = entry.question
                if first is None:
                    question.offers = entry.offers
                    entry.refresh_at = NEVER  # its answer or failure sets the next time
                    entry.question = question
            if first is None:
                self._ask_resolver(entry, question)
                return question
        except BaseException as error:
            # Also an interrupt before `_ask_resolver` could have noted it: nobody could ask again.
            if entry.question is question:
                self._settle(entry, question, error, 0.0)
            raise
        assert isinstance(first, _Question)
        return first

    def _ask_resolver(self, entry: Entry, question: _Question) -> None:
        began = self._clock()
        answer: Snapshot | BaseException
        try:
            answer = self._resolver.lookup(
                entry.topic, entry.server, timeout_seconds=question.timeout_seconds
            )
        except BaseException as error:
            answer = error
        took = self._clock() - began
        if isinstance(answer, Snapshot):
            if answer.clock is not self._clock:  # stamped by another clock, or not at all
                answer = replace(answer, taken_at=began, clock=self._clock)
            is_cut = not answer.is_complete and took >= question.timeout_seconds
            if is_cut and self._is_short(question) and entry.held is not None:
                answer = TimedOut(f"{entry.name}: no complete answer within {took:g} s")
        self._settle(entry, question, answer, took)
        if isinstance(answer, BaseException):
            raise answer

    def _is_short(self, question: _Question) -> bool:
        return question.timeout_seconds < ENOUGH_TIME * self._longest_seconds

    def _settle(
        self, entry: Entry, question: _Question, answer: Snapshot | BaseException, seconds: float
    ) -> None:
        with self._topics.outbox, self._topics.lock:
            now = self._clock()
            entry.question = None
            entry.is_slow = seconds >= QUICK_SECONDS
            if isinstance(answer, Snapshot):
                self._topics.counts.answered(seconds)
                # What the watcher brought while this question was on its way is newer than it.
                if entry.offers == question.offers or entry.held is None:
                    self._topics.take(entry, answer, now)
                question.set_result(entry.held)
            elif isinstance(answer, TimedOut) and self._is_short(question):
                # It had too little time, and is left to the lane that has it.
                self._topics.counts.questions["deferred"] += 1
                entry.is_slow = True
                entry.left_unanswered(now)
                self._topics.refresher.schedule(entry)
                self._topics.outbox.put(self._topics.refresher.start)
                question.set_result(None)
            else:
                self._topics.counts.questions["failed"] += 1
                question.set_exception(answer)
                self._topics.fail(entry, answer, now)


def again(error: BaseException) -> MatchmakerError:
    """The same error for another caller: an exception that is raised twice mixes tracebacks."""
    if isinstance(error, MatchmakerError):
        return type(error)(*error.args)
    return Unavailable(f"the thread that asked failed: {error!r}: retry")
