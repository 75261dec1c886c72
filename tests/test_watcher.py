"""The watcher tells the cache every change, and once when it no longer can."""

import logging
import threading
import time

import pytest

from consul_matchmaker.blocking_query import (
    BYTES_PER_SECOND,
    DOUBT_GAP_SECONDS,
    MAX_GAP_SECONDS,
    MAX_IDLE_GAP_SECONDS,
    MAX_WAIT_SECONDS,
    MIN_GAP_SECONDS,
)
from consul_matchmaker.errors import Denied, Unavailable
from consul_matchmaker.model import Host, Instance, Snapshot
from consul_matchmaker.settings import Settings
from consul_matchmaker.watcher import MAX_RETRY_SECONDS, Watcher

from .doubles import ManualClock

SETTINGS = Settings(mode="kv")


def answer(*ports):
    """What a poll brings: the topic's hosts."""
    instances = tuple(Instance(Host("10.0.0.1", port)) for port in ports)
    return {"t": Snapshot("t", instances, "kv")} if ports else {}


class Kv:
    """Gives the scripted answers, (index, snapshots) or an error, and notes the questions."""

    polled_bytes = 0
    polled_at = 1000.0

    def __init__(self, *script):
        self.script = list(script)
        self.asked = []

    def poll(self, index, wait_seconds):
        self.asked.append((index, wait_seconds))
        event = self.script.pop(0)
        if isinstance(event, Exception):
            raise event
        return event

    def poll_timeout_seconds(self, wait_seconds):
        return wait_seconds + 10

    def end_polls(self):
        pass


class WaitingKv(Kv):
    """Answers the first poll; the next one waits until polls are ended."""

    def __init__(self):
        super().__init__((7, answer(1)))
        self.is_waiting = threading.Event()
        self.ended = threading.Event()

    def poll(self, index, wait_seconds):
        if self.script:
            return super().poll(index, wait_seconds)
        self.is_waiting.set()
        assert self.ended.wait(30)
        raise Unavailable("polls were ended")

    def end_polls(self):
        self.ended.set()


class Cache:
    def __init__(self):
        self.told = []

    def offer(self, snapshots, *, taken_at, version, fresh_until):
        ports = sorted(h.port for s in snapshots.values() for h in s)
        self.told.append((ports, fresh_until - taken_at, taken_at))

    def watch_lost(self):
        self.told.append("lost")

    @property
    def offers(self):
        return [entry if entry == "lost" else entry[0] for entry in self.told]


def watch(*script, seconds_between=1.0, cpu_seconds=0.0):
    """Run one step for each event of *script*; return all there is to look at."""
    clock, kv, cache = ManualClock(), Kv(*script), Cache()
    cpu = iter(x * cpu_seconds for x in range(1000))
    watcher = Watcher(
        kv, cache, SETTINGS, clock=clock, jitter=lambda: 0.5, cpu_clock=lambda: next(cpu)
    )
    pauses = []
    while kv.script:
        pauses.append(watcher._step())
        clock.now += seconds_between
    return watcher, kv, cache, pauses


def test_each_answer_is_offered_and_the_next_poll_waits_on_its_index():
    """The first poll asks at once, the others wait for something newer than the last answer."""
    _, kv, cache, pauses = watch((7, answer(1)), (9, answer(1, 2)), (12, answer()))
    assert cache.offers == [[1], [1, 2], []]
    assert [index for index, _ in kv.asked] == [0, 7, 9]
    assert pauses == [MIN_GAP_SECONDS] * 3


def test_a_wait_that_ran_out_makes_the_answer_fresh_again():
    """An unchanged answer is offered too, as Consul has just confirmed it."""
    _, _, cache, _ = watch((7, answer(1)), (7, answer(1)))
    assert cache.offers == [[1], [1]]


def test_an_offer_stays_fresh_until_the_next_answer_is_overdue():
    """Freshness outlives the longest poll, so that no lookup asks while the watch works, and not
    by much, so that an agent that hangs is noticed."""
    _, kv, cache, _ = watch((7, answer(1)), (7, answer(1)))
    longest = Settings(mode="kv").ttl_seconds
    assert all(0.8 * longest <= wait <= longest < MAX_WAIT_SECONDS for _, wait in kv.asked)
    for _, fresh_seconds, _ in cache.told[:1]:
        assert longest * (1 + 1 / 16) + 2 < fresh_seconds < longest + 4


def test_a_loss_is_told_once_and_logged_once(caplog):
    """However many polls fail in a row, the cache hears of it once, and so do people."""
    caplog.set_level(logging.INFO)
    _, kv, cache, _ = watch(
        (7, answer(1)), Unavailable("gone"), Denied("no"), Unavailable("gone"), (9, answer(2))
    )
    assert cache.offers == [[1], "lost", [2]]
    assert [index for index, _ in kv.asked] == [0, 7, 0, 0, 0]
    assert [r.getMessage() for r in caplog.records] == [
        "watch lost, asking for each topic meanwhile: gone",
        "watching again after 3.0 s",
    ]


def test_a_second_loss_is_told_again():
    """Each outage is one loss."""
    _, _, cache, _ = watch(
        (7, answer(1)), Unavailable("x"), (7, answer(1)), Unavailable("x"), (7, answer(1))
    )
    assert cache.offers == [[1], "lost", [1], "lost", [1]]


def test_failures_are_retried_ever_later():
    """Pauses after failures grow to a bound, so that a dead agent is not hammered."""
    _, _, _, pauses = watch(*[Unavailable("x")] * 12)
    assert pauses == sorted(pauses)
    assert pauses[0] >= MIN_GAP_SECONDS
    assert pauses[-1] == MAX_RETRY_SECONDS * 0.5  # the jitter here


def test_a_lying_server_is_not_passed_on(caplog):
    """Index 1 and nothing at all, right after a good answer, is asked again before it counts."""
    lie = (1, answer())
    _, kv, cache, pauses = watch((9, answer(1)), lie, lie, lie, (9, answer(1)))
    assert cache.offers == [[1], [1]]
    assert [index for index, _ in kv.asked] == [0, 9, 0, 0, 0]
    assert pauses[1:4] == [DOUBT_GAP_SECONDS] * 3
    assert len(caplog.records) == 1


def test_a_lie_that_stays_is_the_truth():
    """What is repeated for confirm_empty_seconds is believed: Consul's data were wiped."""
    _, _, cache, _ = watch((9, answer(1)), *[(1, answer())] * 8)
    assert cache.offers == [[1], [], []]


def test_costly_answers_are_asked_for_less_often():
    """What an answer costs in processor time decides the rest after it."""
    _, _, _, pauses = watch((7, answer(1)), (8, answer(2)), cpu_seconds=0.05)
    assert pauses == [pytest.approx(0.45)] * 2
    _, _, _, pauses = watch((7, answer(1)), (8, answer(2)), cpu_seconds=60)
    assert pauses == [MAX_GAP_SECONDS] * 2


def test_nothing_runs_before_start():
    """Made, the watcher has no thread and asks nothing."""
    kv = Kv((7, answer(1)))
    watcher = Watcher(kv, Cache(), SETTINGS)
    assert kv.asked == []
    assert watcher.status()["is_watching"] is False
    assert watcher.close(1)
    watcher.start()
    assert kv.asked == []


def test_close_ends_a_poll_that_waits(caplog):
    """close() returns soon although a poll would wait for long; the end is no loss."""
    kv, cache = WaitingKv(), Cache()
    watcher = Watcher(kv, cache, SETTINGS)
    watcher.start()
    assert kv.is_waiting.wait(10)
    assert "consul-matchmaker-watcher" in {thread.name for thread in threading.enumerate()}
    assert watcher.status()["is_watching"] is True
    started = time.monotonic()
    assert watcher.close(10)
    assert time.monotonic() - started < 5
    assert "consul-matchmaker-watcher" not in {thread.name for thread in threading.enumerate()}
    assert cache.offers == [[1]]
    assert caplog.records == []


def test_close_returns_in_time_even_if_the_poll_does_not_end():
    """A poll that cannot be woken is abandoned: close says so, within its timeout."""
    kv = WaitingKv()
    kv.end_polls = lambda: None
    watcher = Watcher(kv, Cache(), SETTINGS)
    watcher.start()
    assert kv.is_waiting.wait(10)
    started = time.monotonic()
    assert not watcher.close(0.05)
    assert time.monotonic() - started < 5
    kv.ended.set()
    assert watcher.close(10)


def test_status_says_where_the_watch_stands():
    """Status tells answers, their age and index, failures and doubt."""
    watcher, _, _, _ = watch((9, answer(1)), (9, answer(1)))
    assert watcher.status() == {
        "is_watching": False,  # no thread here
        "answers": 2,
        "answer_age_seconds": 1.0,
        "index": 9,
        "is_doubting": False,
        "failures": 0,
    }
    watcher, _, _, _ = watch((9, answer(1)), (1, answer()), Unavailable("x"), (1, answer()))
    assert watcher.status()["is_doubting"]
    assert "Watcher" in repr(watcher)


def test_a_forked_child_begins_anew():
    """After forget() nothing is known, and the next poll asks at once."""
    watcher, kv, _, _ = watch((9, answer(1)))
    watcher.forget()
    kv.script = [(9, answer(1))]
    watcher._step()
    assert [index for index, _ in kv.asked] == [0, 0]
    assert watcher.status()["answers"] == 1


def test_big_answers_are_asked_for_less_often():
    """200 kB a second answer rests a fifth of a second: the share of the network is bounded."""
    kv = Kv((9, answer(1)))
    kv.polled_bytes = 200_000
    watcher = Watcher(
        kv, Cache(), SETTINGS, clock=ManualClock(), jitter=lambda: 0.5, cpu_clock=ManualClock()
    )
    assert watcher._step() == 0.2


@pytest.mark.finding("E16")
def test_an_agent_that_does_not_wait_is_not_asked_in_a_loop():
    """The same answer before its wait is over rests ever longer; after the wait it is no fault."""
    _, _, _, pauses = watch(*[(7, answer(1))] * 8, seconds_between=0.0)
    assert pauses == sorted(pauses)
    assert pauses[-1] == MAX_IDLE_GAP_SECONDS

    clock = ManualClock()

    class Waits(Kv):
        def poll(self, index, wait_seconds):
            clock.now += wait_seconds
            return super().poll(index, wait_seconds)

    kv = Waits(*[(7, answer(1))] * 8)
    watcher = Watcher(kv, Cache(), SETTINGS, clock=clock, jitter=lambda: 0.5, cpu_clock=lambda: 0.0)
    assert [watcher._step() for _ in range(8)] == [MIN_GAP_SECONDS] * 8


@pytest.mark.finding("A1")
def test_an_offer_is_as_old_as_its_poll():
    """A poll that was under way for long, its agent suspended, makes nothing fresh: its answer may
    be from when it was sent."""
    clock, cache = ManualClock(), Cache()
    longest = SETTINGS.ttl_seconds

    class Suspended(Kv):
        def poll(self, index, wait_seconds):
            self.polled_at = clock.now
            clock.now += seconds
            return super().poll(index, wait_seconds)

    kv = Suspended(*[(7, answer(1))] * 4)
    watcher = Watcher(kv, cache, SETTINGS, clock=clock, jitter=lambda: 0.5)
    fresh = []
    for seconds in (0.0, longest, 10.0, 100.0):
        watcher._step()
        _, fresh_seconds, taken_at = cache.told[-1]
        assert taken_at == clock.now - seconds
        fresh.append(fresh_seconds)
    assert fresh == sorted(fresh)
    assert fresh[0] < longest + 4
    assert fresh[-1] == fresh[-2] < 2 * longest + 4


@pytest.mark.finding("E10")
@pytest.mark.xfail(strict=True, reason="E10: mended by the rebuild of the watch")
def test_polls_that_fail_for_their_size_count_in_the_bound():
    """An answer too big to be read costs what was read of it: the average stays below the bound."""
    kv = Kv(*[Unavailable("the answer is too big")] * 20)
    kv.polled_bytes = 64_000_000
    watcher = Watcher(
        kv, Cache(), SETTINGS, clock=ManualClock(), jitter=lambda: 0.5, cpu_clock=lambda: 0.0
    )
    pauses = [watcher._step() for _ in range(20)]
    assert 20 * kv.polled_bytes / sum(pauses) <= BYTES_PER_SECOND
