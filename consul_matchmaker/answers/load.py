"""What the calls of this process found: how busy, how quick and how sound each host is."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Collection

from ..model import Host, Instance
from ..settings import Settings
from .balance import Fading, Latency, RetryBudget, cost, is_failing

MAX_TOPICS = 10_000
"""So many topics are remembered; beyond that all begin anew."""
MAX_HOSTS = 10_000
"""So many hosts of a topic are remembered beside those that it has; beyond that all begin anew."""


class HostLoad:
    """One host of one topic; changed with the lock of `Load` held."""

    __slots__ = ("calls", "failures", "in_flight", "latency", "unanswered")

    def __init__(self) -> None:
        self.in_flight = self.unanswered = 0
        self.latency = Latency()
        self.calls, self.failures = Fading(), Fading()


class Busy:
    """One call of a host.  It ends when it is forgotten, or the host would be taken for busy for
    ever: by an answer that nobody reads, or an interrupt at any moment."""

    __slots__ = ("_end", "is_answered", "is_over", "load")

    def __init__(self, load: HostLoad, end: Callable[[Busy], None]) -> None:
        self._end = end
        self.load = load
        self.is_answered = self.is_over = True  # as it is not counted yet

    def __del__(self) -> None:
        self._end(self)


class Load:
    """Counts calls by topic and host, and the retries of each topic.  Thread-safe.

    Hosts are counted only where a setting needs it: ``selection=least_loaded`` or
    ``ejection_failure_rate``.
    """

    def __init__(self, settings: Settings, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._failure_rate = settings.ejection_failure_rate
        self.is_counted = settings.selection == "least_loaded" or self._failure_rate > 0
        self._budget = settings.retry_fraction, settings.retry_floor_per_second
        self._budgets: dict[str, RetryBudget] = {}
        self._topics: dict[str, dict[Host, HostLoad]] = {}
        self._hosts: dict[str, Collection[Host]] = {}
        self._lock = threading.Lock()
        self._answered: deque[Busy] = deque()
        self._ended: deque[Busy] = deque()
        """Those not counted yet, perhaps more than once."""
        self.retries = self.refused = 0
        """Since the start: retries, and those that the budget did not allow."""

    # -- one call of one host

    def begin(self, topic: str, host: Host) -> tuple[Busy, ...]:
        """*host* has one call more to answer, until what is returned is given to `end`, or
        forgotten; nothing where hosts are not counted."""
        if not self.is_counted:
            return ()
        with self._lock:
            self._count_ended()
            one = self._of(topic, host)
            call = Busy(one, self._ended.append)
            one.in_flight += 1
            one.unanswered += 1
            call.is_answered = call.is_over = False
        return (call,)

    def answered(self, call: Busy) -> None:
        """Nobody waits for the answer to *call* any more.  Idempotent; takes no lock, as `end`."""
        self._answered.append(call)

    def end(self, call: Busy) -> None:
        """*call* is over.  Idempotent; takes no lock: a finalizer may say so, which the garbage
        collector runs in the middle of anything."""
        self._ended.append(call)

    def judged(self, topic: str, host: Host, *, is_good: bool, seconds: float | None) -> bool:
        """A call was answered or failed, after *seconds* if that is known; whether *host* fails too
        often."""
        if not self.is_counted:
            return False
        with self._lock:
            now = self._clock()
            one = self._of(topic, host)
            one.calls.add(1, now)
            if not is_good:
                one.failures.add(1, now)
            # A failure that comes quickly must not make the host look quick.
            if seconds is not None and (is_good or seconds > one.latency.seconds(now)):
                one.latency.measured(seconds, now)
            if is_good or not self._failure_rate:
                return False
            return is_failing(one.failures.value(now), one.calls.value(now), self._failure_rate)

    def ejected(self, topic: str, host: Host) -> None:
        """*host* is judged anew when it comes back."""
        with self._lock:
            one = self._of(topic, host)
            one.calls, one.failures = Fading(), Fading()

    # -- which host

    def hosts_are(self, topic: str, hosts: Collection[Host]) -> None:
        """The hosts of *topic*; what is known of others is dropped."""
        if not self.is_counted:
            return
        with self._lock:
            known = self._known(topic)
            for host in known.keys() - set(hosts):
                del known[host]
            self._hosts[topic] = hosts

    def hosts_of(self, topic: str) -> Collection[Host]:
        """What `hosts_are` was told."""
        return self._hosts.get(topic, ())

    def lesser(self, topic: str, one: Instance, other: Instance) -> Instance:
        """Which of two has less to do.  Where a latency is not known, only what is in flight and
        the weights count."""
        with self._lock:
            self._count_ended()
            now = self._clock()
            each = [self._of(topic, instance.host) for instance in (one, other)]
            are_known = all(load.latency.is_known for load in each)
            costs = [
                cost(
                    load.latency.seconds(now, is_awaited=load.unanswered > 0) if are_known else 1.0,
                    load.in_flight,
                    instance.weight,
                )
                for load, instance in zip(each, (one, other), strict=True)
            ]
        return other if costs[1] < costs[0] else one

    # -- retries

    def call(self, topic: str) -> None:
        """A call begins that may be repeated."""
        with self._lock:
            self._budget_of(topic).call(self._clock())

    def may_retry(self, topic: str) -> bool:
        """Whether the topic's budget allows one more retry, which is counted then."""
        with self._lock:
            is_allowed = self._budget_of(topic).take(self._clock())
            self.retries += is_allowed
            self.refused += not is_allowed
        return is_allowed

    # -- for people

    def explain(self, topic: str, host: Host) -> dict[str, object]:
        """What is known of *host*; nothing where hosts are not counted."""
        with self._lock:
            self._count_ended()
            one = self._topics.get(topic, {}).get(host)
            if one is None:
                return {}
            now = self._clock()
            calls = one.calls.value(now)
            is_known = one.latency.is_known
            return {
                "in_flight": one.in_flight,
                "latency_seconds": one.latency.seconds(now) if is_known else None,
                "recent_calls": calls,
                "failure_rate": one.failures.value(now) / calls if calls else None,
            }

    def _count_ended(self) -> None:
        # One is taken out when it is counted: an interrupt in between loses none.
        while self._answered:
            _count_answered(self._answered[0])
            self._answered.popleft()
        while self._ended:
            call = self._ended[0]
            _count_answered(call)
            if not call.is_over:
                call.is_over = True
                call.load.in_flight -= 1
            self._ended.popleft()

    def _of(self, topic: str, host: Host) -> HostLoad:
        known = self._known(topic)
        one = known.get(host)
        if one is None:
            if len(known) >= MAX_HOSTS + len(self.hosts_of(topic)):
                known.clear()
            one = known[host] = HostLoad()
        return one

    def _known(self, topic: str) -> dict[Host, HostLoad]:
        if topic not in self._topics and len(self._topics) >= MAX_TOPICS:
            self._topics.clear()
            self._hosts.clear()
        return self._topics.setdefault(topic, {})

    def _budget_of(self, topic: str) -> RetryBudget:
        budget = self._budgets.get(topic)
        if budget is None:
            if len(self._budgets) >= MAX_TOPICS:
                self._budgets.clear()
            budget = self._budgets[topic] = RetryBudget(*self._budget)
        return budget


def _count_answered(call: Busy) -> None:
    if not call.is_answered:
        call.is_answered = True
        call.load.unanswered -= 1
