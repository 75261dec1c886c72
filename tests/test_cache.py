"""Answers: when they are fresh, asked for again, doubted, kept through an outage, given up."""

from __future__ import annotations

import contextlib
import json
import logging
import sys
import threading
import time
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from consul_matchmaker.answers import cache as cache_module
from consul_matchmaker.answers import questions as questions_module
from consul_matchmaker.answers.belief import (
    BETWEEN_DOUBTS_SECONDS,
    State,
)
from consul_matchmaker.answers.cache import Cache
from consul_matchmaker.answers.freshness import Freshness
from consul_matchmaker.answers.refresher import QUICK_SECONDS
from consul_matchmaker.answers.state_file import StateFiles
from consul_matchmaker.answers.topics import SECOND_CHANCES, SPARE_ENDS
from consul_matchmaker.errors import (
    Closed,
    ConfigurationError,
    Denied,
    InvalidTopic,
    TimedOut,
    Unavailable,
)

from .doubles import (
    DEADLINE_SECONDS,
    LONGEST_SECONDS,
    FakeResolver,
    ManualClock,
    StillWorker,
    catalog,
    in_thread,
    kv,
    snapshot,
)

A, B, C, D, E = (f"10.0.0.{number}:5000" for number in range(1, 6))


@contextlib.contextmanager
def telling(cache, topic, wake, server=None):
    cache.tell(topic, server, wake)
    yield
    cache.stop_telling(topic, server, wake)


@pytest.fixture
def clock():
    return ManualClock()


@pytest.fixture
def consul():
    return FakeResolver()


@pytest.fixture
def cache(consul, clock):
    return made(consul, clock)


class SlowConsul(FakeResolver):
    """Each topic takes its seconds: the clock moves as if they were waited for."""

    def __init__(self, clock):
        super().__init__("dns")
        self.clock = clock
        self.takes: dict[str, float] = {}
        self.answered_at: dict[str, float] = {}
        self.hurried: list[str] = []  # asked by the quick lane

    def lookup(self, topic, server=None, *, timeout_seconds=LONGEST_SECONDS):
        if timeout_seconds == QUICK_SECONDS:
            self.hurried.append(topic)
        if self.takes.get(topic, 0.0) > timeout_seconds or (
            timeout_seconds < LONGEST_SECONDS and topic in self._gates
        ):
            self.clock.advance(timeout_seconds)
            raise TimedOut("not so fast")
        self.clock.advance(self.takes.get(topic, 0.0))
        self.answered_at[topic] = self.clock()
        return super().lookup(topic, server, timeout_seconds=timeout_seconds)


def made(consul, clock, settings=None, max_topics=100, jitter=lambda: 0.0, **more):
    """A cache whose background work is done by `step`, jitter at its least."""
    settings = replace(settings or kv(), max_topics=max_topics)
    return Cache(consul, settings, clock=clock, jitter=jitter, make_worker=StillWorker, **more)


def learn(cache, consul, *hosts, **more):
    """Consul says that these serve "scheduler", and somebody looks it up."""
    consul.say("scheduler", *hosts, **more)
    return cache.lookup("scheduler")


def known(cache, consul, *topics):
    """Each has a host, and was looked up."""
    for topic in topics:
        consul.say(topic, A)
        cache.lookup(topic)


def later(cache, clock, seconds, *topics):
    """After so many seconds *topics* are looked up ("scheduler" unless told), and the background
    does what is due."""
    clock.advance(seconds)
    for topic in topics or ("scheduler",):
        cache.lookup(topic)
    step(cache)


def quick_step(cache):
    return cache._refresher.step(cache._refresher.quick)


def slow_step(cache):
    return cache._refresher.step(cache._refresher.slow)


def step(cache):
    """Do once what the threads do; return in how many seconds they would come again."""
    pauses = [quick_step(cache), slow_step(cache)]
    return min((pause for pause in pauses if pause is not None), default=None)


def topics(cache):
    """Every topic that is held."""
    entries = list(cache._by_key.values())  # at once: its threads may change it meanwhile
    return sorted({entry.topic for entry in entries if entry.server is None})


def offer(cache, snapshots, seconds, version=0, freshness=None):
    """A watch of all topics brings *snapshots*, asked for just now, which are fresh for
    *seconds*; return what it says of that."""
    now = cache._clock()
    freshness = freshness or Freshness()
    freshness.confirm(now, now + seconds)
    for topic in topics(cache):
        answer = snapshots.get(topic, snapshot(topic, (), "kv"))
        stamped = replace(answer, taken_at=now, clock=cache._clock, version=version)
        cache.offer(topic, stamped, freshness)
    return freshness


def shown(answer):
    return [str(host) for host in answer]


def look(cache):
    """Which hosts a lookup gives, and whether they are stale."""
    answer = cache.lookup("scheduler")
    return shown(answer), answer.is_stale


# -- fresh, stale, away, gone


@pytest.mark.finding("A1")
@pytest.mark.parametrize("settings", [kv(), catalog()])
def test_an_answer_is_as_old_as_its_question(clock, settings):
    """Its age and its freshness count from when it was asked for: one that took longer than its
    TTL is stale when it comes, and is asked for again half a TTL later."""
    consul = SlowConsul(clock)
    consul.takes["scheduler"] = 3
    consul.say("scheduler", A)
    cache = made(consul, clock, settings)
    assert cache.lookup("scheduler").age_seconds == 3
    clock.advance(1.9)
    assert not cache.lookup("scheduler").is_stale
    clock.advance(0.1)
    assert cache.lookup("scheduler").is_stale
    consul.takes["scheduler"] = 6
    step(cache)
    answer = cache.lookup("scheduler")
    assert (answer.age_seconds, answer.is_stale) == (6, True)
    consul.takes["scheduler"] = 0
    later(cache, clock, 2.5)
    answer = cache.lookup("scheduler")
    assert (answer.age_seconds, answer.is_stale) == (0, False)


@pytest.mark.finding("A1")
def test_what_a_resolver_says_of_its_answers_age_is_kept(clock):
    """A resolver knows best which of its questions was answered."""

    class Late(FakeResolver):
        def lookup(self, topic, server=None, *, timeout_seconds):
            answer = super().lookup(topic, server, timeout_seconds=timeout_seconds)
            return replace(answer, taken_at=clock() - 4, clock=clock)

    consul = Late()
    consul.say("scheduler", A)
    answer = made(consul, clock).lookup("scheduler")
    assert answer.age_seconds == 4
    clock.advance(1)
    assert answer.is_stale


@pytest.mark.finding("A1")
def test_an_offer_is_as_old_as_the_watch_says(cache, consul, clock):
    """It counts from when the watch asked, and then from what it confirmed since."""
    learn(cache, consul, A)
    clock.advance(10)
    asked_at, freshness = clock(), Freshness()
    freshness.confirm(asked_at, asked_at + 8)
    clock.advance(7)
    found = snapshot("scheduler", [A], "kv")
    cache.offer("scheduler", replace(found, taken_at=asked_at, clock=clock), freshness)
    assert cache.lookup("scheduler").age_seconds == 7
    assert not cache.lookup("scheduler").is_stale
    clock.advance(1)
    freshness.confirm(clock() - 0.5, clock() + 7.5)
    answer = cache.lookup("scheduler")
    assert (answer.age_seconds, answer.is_stale) == (0.5, False)
    clock.advance(8)
    assert cache.lookup("scheduler").is_stale
    assert len(consul.asked) == 1


@pytest.mark.finding("A2")
def test_an_old_answer_is_given_only_where_consul_cannot_be_asked(consul, clock):
    """Beyond a few TTLs Consul is asked first: where it is well nobody gets the hosts of half an
    hour ago; in an outage they are what there is, up to max_stale_seconds."""
    cache = made(consul, clock)
    learn(cache, consul, A)
    consul.say("scheduler", B)
    clock.advance(1800)
    assert look(cache) == ([B], False)
    consul.fail("scheduler")
    clock.advance(1800)
    assert look(cache) == ([B], True)


@pytest.mark.finding("D1")
def test_nothing_is_logged_while_topics_are_locked(dns, clock, caplog):
    """A log handler that takes long holds up nobody: in it, another thread can look up and ask."""
    caplog.set_level(logging.DEBUG)
    cache = made(dns, clock, catalog())
    dns.say("other", B)
    said: list[str] = []

    class LooksUp(logging.Handler):
        def emit(self, record):
            said.append(record.getMessage())
            asked = in_thread(lambda: (cache.refresh("other"), cache.status()))
            asked.result(DEADLINE_SECONDS)

    handler = LooksUp()
    logger = logging.getLogger("consul_matchmaker.answers.topics")
    logger.addHandler(handler)
    try:
        learn(cache, dns, A, B)
        dns.say("scheduler")
        cache.refresh("scheduler")
        dns.say("scheduler", A, B)
        cache.refresh("scheduler")
        dns.say("scheduler")
        cache.refresh("scheduler")
        clock.advance(6)
        cache.refresh("scheduler")
        dns.fail("scheduler")
        with pytest.raises(Unavailable):
            cache.refresh("scheduler")
        dns.say("scheduler", A)
        cache.refresh("scheduler")
    finally:
        logger.removeHandler(handler)
    for told in ("suddenly", "after all", "confirmed", "last good answer", "answers again"):
        assert any(told in each for each in said), said


@pytest.mark.parametrize(("hosts", "ttl_seconds"), [([A], 5), ([], 1)])
def test_past_its_ttl_an_answer_is_returned_while_it_is_asked_for_again(
    cache, consul, clock, hosts, ttl_seconds
):
    """The old answer comes at once, marked stale, to however many; one refresh runs, which is the
    background's work.  An answer without hosts has a TTL of its own."""
    held = learn(cache, consul, *hosts)
    consul.say("scheduler", B)
    clock.advance(ttl_seconds)
    for _ in range(100):
        assert look(cache) == (hosts, True)
    assert held.is_stale
    assert consul.count("scheduler") == 1
    step(cache)
    assert consul.count("scheduler") == 2
    assert look(cache) == ([B], False)


def test_a_topic_in_use_is_refreshed_before_it_is_stale(cache, consul, clock):
    """Where callers go on asking, the answer is renewed ahead of its time: nobody sees it stale."""
    learn(cache, consul, A)
    for _ in range(40):
        clock.advance(0.5)
        assert not cache.lookup("scheduler").is_stale
        step(cache)
    assert 5 <= consul.count("scheduler") <= 7  # each 0.7 x 5 s = 3.5 s of the 20 s


def test_nobody_asks_for_what_nobody_wants(cache, consul, clock):
    """A topic that callers stopped asking for costs nothing any more."""
    learn(cache, consul, A)
    clock.advance(1)
    cache.lookup("scheduler")
    pause = 0.0
    while pause is not None:
        clock.advance(pause)
        pause = step(cache)
    assert consul.count("scheduler") == 2
    clock.advance(1000)
    assert step(cache) is None
    assert consul.count("scheduler") == 2


def test_refreshes_of_many_processes_do_not_align(consul, clock):
    """When an answer is asked for again is drawn at random between 0.7 and 0.9 of its TTL."""
    consul.say("scheduler", A)
    pauses = []
    draws = iter([0.0, 0.5, 0.99])
    for _ in range(3):
        cache = made(consul, clock, kv(ttl_seconds=10), jitter=lambda: next(draws))
        cache.lookup("scheduler")
        pauses.append(step(cache))
    assert pauses == [pytest.approx(7.0), pytest.approx(8.0), pytest.approx(8.98)]


@pytest.mark.parametrize(
    ("hosts", "said", "fresh_seconds"),
    [([A], None, 5), ([A], 0.0, 5), ([], None, 1)]
    + [(hosts, *ttl) for hosts in ([A], []) for ttl in ((0.2, 1), (30.0, 30), (600.0, 60))],
)
def test_a_ttl_in_the_answer_is_obeyed_within_bounds(
    cache, consul, clock, hosts, said, fresh_seconds
):
    """A DNS TTL above 0 is cut to ttl_min_seconds..ttl_max_seconds, also that of a denial (RFC
    2308: it is the SOA record's); without one: ttl_seconds or empty_ttl_seconds."""
    answer = learn(cache, consul, *hosts, ttl_seconds=said)
    clock.advance(fresh_seconds - 0.01)
    assert not answer.is_stale
    clock.advance(0.01)
    assert answer.is_stale


def test_an_outage_makes_answers_old_not_empty(cache, consul, clock):
    """The last good answer is served, ever older and marked stale, until max_stale_seconds."""
    learn(cache, consul, A)
    consul.fail("scheduler")
    age = 0.0
    for _ in range(359):
        clock.advance(10)
        answer = cache.lookup("scheduler")
        step(cache)
        assert shown(answer) == [A]
        assert answer.is_stale
        assert answer.age_seconds > age
        age = answer.age_seconds
    clock.advance(10)
    with pytest.raises(Unavailable, match="Consul is away"):
        cache.lookup("scheduler")


def test_after_an_outage_answers_are_fresh_within_one_ttl(cache, consul, clock):
    """Attempts back off, but never by more than a TTL, and the first success releases them all."""
    topics = [f"topic{number}" for number in range(20)]
    cache = made(consul, clock, jitter=lambda: 0.999)
    for topic in topics:
        consul.say(topic, A)
        cache.lookup(topic)
        consul.fail(topic)
    for _ in range(600):
        later(cache, clock, 0.1, *topics)
    assert consul.count("topic0") < 20  # 60 s of outage: not a question every tenth of a second
    for topic in topics:
        consul.say(topic, B)
    for _ in range(52):
        later(cache, clock, 0.1, "topic0")
    for topic in topics:
        assert shown(cache.lookup(topic)) == [B]
        assert not cache.lookup(topic).is_stale


@pytest.mark.system
def test_an_attempt_that_is_lost_and_the_pause_after_it_are_one_ttl():
    """Whenever Consul comes back, also when 0.3 TTL of an attempt under way are lost then, the
    answer is fresh within one TTL."""
    for tenths in range(60):
        clock = ManualClock()
        consul = SlowConsul(clock)
        cache = made(consul, clock, jitter=lambda: 0.999)
        learn(cache, consul, A)
        consul.fail("scheduler", TimedOut("nothing came"))
        consul.takes["scheduler"] = 1.5
        back_at = clock() + 60 + tenths / 10
        while clock() < back_at or cache.lookup("scheduler").is_stale:
            if clock() >= back_at:
                consul.say("scheduler", A)
                consul.takes.clear()
            cache.lookup("scheduler")
            pause = step(cache)
            clock.advance(0.01 if pause is None else min(pause, 0.01))
        assert clock() - back_at <= 5.01


def test_the_first_that_is_answered_again_releases_the_others(consul, clock):
    """Once Consul answers for one topic, those that failed too do not wait out their pause."""
    draws = iter([0.0] * 2 + [0.1, 0.9] + [0.0] * 10)
    cache = made(consul, clock, jitter=lambda: next(draws))
    for topic in ("early", "late"):
        consul.say(topic, A)
        cache.lookup(topic)
        consul.fail(topic)
    clock.advance(6)
    for round_seconds in (0.0, 0.15):  # both fail; then one may be asked again, the other not yet
        clock.advance(round_seconds)
        for topic in ("early", "late"):
            cache.lookup(topic)
            consul.say(topic, B) if round_seconds else None
        step(cache)
    assert shown(cache.lookup("early")) == [B]
    assert shown(cache.lookup("late")) == [B]


def test_an_answer_is_given_up_in_time_while_attempts_pause(consul, clock):
    """However long the pause to the next attempt, max_stale_seconds is the end."""
    cache = made(consul, clock, kv(max_stale_seconds=5.2), jitter=lambda: 0.999)
    learn(cache, consul, A)
    consul.fail("scheduler")
    later(cache, clock, 5)
    assert shown(cache.lookup("scheduler")) == [A]
    clock.advance(0.2)
    with pytest.raises(Unavailable):
        cache.lookup("scheduler")


def test_one_log_line_a_transition(cache, consul, clock, caplog):
    """An outage is one warning with its reason, its end one line with its length."""
    caplog.set_level(logging.INFO)
    learn(cache, consul, A)
    consul.fail("scheduler", TimedOut("127.0.0.1:8600 did not answer"))
    for _ in range(300):
        later(cache, clock, 0.1)
    consul.say("scheduler", A)
    for _ in range(60):
        later(cache, clock, 0.1)
    begun, ended = caplog.records
    assert begun.levelno == logging.WARNING
    assert "scheduler" in begun.message and "did not answer" in begun.message
    assert ended.levelno == logging.INFO
    assert "again, after" in ended.message


def test_an_outage_of_many_topics_is_one_warning(cache, consul, clock, caplog):
    """The first topic that cannot be asked is a warning; the others it takes along are not."""
    caplog.set_level(logging.INFO)
    for topic in "abc":
        consul.say(topic, A)
        cache.lookup(topic)
        consul.fail(topic)
    later(cache, clock, 6, *"abc")
    levels = sorted(record.levelno for record in caplog.records)
    assert levels == [logging.INFO, logging.INFO, logging.WARNING]


def test_a_refused_token_does_not_empty_what_is_held(cache, consul, clock):
    """Denied with an answer at hand is an outage; without one it is raised."""
    learn(cache, consul, A)
    consul.fail("scheduler", Denied("the token was refused"))
    consul.fail("unknown", Denied("the token was refused"))
    later(cache, clock, 6)
    assert shown(cache.lookup("scheduler")) == [A]
    with pytest.raises(Denied):
        cache.lookup("unknown")


def test_max_stale_of_zero_gives_up_at_once(consul, clock):
    """With max_stale_seconds=0 an answer is gone when it is no longer fresh: callers ask."""
    cache = made(consul, clock, kv(max_stale_seconds=0))
    learn(cache, consul, A)
    clock.advance(4)
    assert shown(cache.lookup("scheduler")) == [A]
    consul.fail("scheduler")
    clock.advance(1)
    with pytest.raises(Unavailable):
        cache.lookup("scheduler")
    consul.say("scheduler", B)
    clock.advance(1)
    assert shown(cache.lookup("scheduler")) == [B]


def test_status_counts_the_states(cache, consul, clock):
    """Fresh, stale, away and gone are what they say."""
    for topic in ("fresh", "stale", "away"):
        consul.say(topic, A)
    cache.lookup("stale")
    cache.lookup("away")
    consul.fail("away")
    later(cache, clock, 6, "away")
    cache.lookup("fresh")
    consul.fail("gone")
    with pytest.raises(Unavailable):
        cache.lookup("gone")
    assert cache.status()["states"] == {"fresh": 1, "stale": 1, "away": 1, "gone": 1}


# -- one question at a time


@pytest.mark.parametrize("hosts", [(A,), ()])
def test_an_unknown_topic_is_asked_for_once(consul, hosts):
    """However many threads want it, one asks and all have its answer, also that nobody serves."""
    cache = Cache(consul, kv(ttl_seconds=60, empty_ttl_seconds=60))
    consul.say("scheduler", *hosts)
    consul.hold("scheduler")
    threads = [in_thread(lambda: cache.lookup("scheduler")) for _ in range(8)]
    consul.wait_until_asked("scheduler")
    consul.let_go("scheduler")
    for thread in threads:
        assert shown(thread.result(DEADLINE_SECONDS)) == list(hosts)
    assert consul.count("scheduler") == 1
    assert cache.close(DEADLINE_SECONDS)


def test_a_failure_is_everybodys_and_does_not_make_them_stampede(consul):
    """All who wait get the error, each its own exception, and nobody asks again just then."""
    clock = ManualClock()
    cache = made(consul, clock, jitter=lambda: 0.9)
    consul.fail("scheduler", TimedOut("nothing came"))
    consul.hold("scheduler")
    threads = [in_thread(lambda: cache.lookup("scheduler")) for _ in range(8)]
    consul.wait_until_asked("scheduler")
    consul.let_go("scheduler")
    errors = [thread.exception(DEADLINE_SECONDS) for thread in threads]
    assert all(isinstance(error, TimedOut) for error in errors)
    assert len({id(error) for error in errors}) == 8
    with pytest.raises(TimedOut, match="nothing came"):
        cache.lookup("scheduler")
    assert consul.count("scheduler") == 1
    consul.say("scheduler", A)
    clock.advance(1)
    assert shown(cache.lookup("scheduler")) == [A]


def test_a_topic_that_hangs_delays_no_other(consul):
    """While one topic's question hangs, unknown and known topics are answered."""
    cache = Cache(consul, kv())
    consul.say("known", A)
    consul.say("unknown", B)
    cache.lookup("known")
    consul.hold("slow")
    hanging = in_thread(lambda: cache.lookup("slow"))
    consul.wait_until_asked("slow")
    assert shown(cache.lookup("known")) == [A]
    assert shown(cache.lookup("unknown")) == [B]
    assert not hanging.done()
    consul.let_go("slow")
    hanging.result(DEADLINE_SECONDS)


@pytest.mark.system
def test_waiting_for_anothers_question_has_an_end(consul):
    """A question that is lost for ever does not hold up those who wait for its answer."""
    cache = Cache(consul, kv())
    consul.hold("slow")
    hanging = in_thread(lambda: cache.lookup("slow"))
    consul.wait_until_asked("slow")
    with pytest.raises(TimedOut, match="slow"):
        cache.lookup("slow", timeout_seconds=0.05)
    consul.let_go("slow")
    hanging.result(DEADLINE_SECONDS)


def test_healthy_topics_are_refreshed_first(cache, consul, clock):
    """A topic that failed is asked after those that did not: its timeout is waited out last."""
    for topic in "abc":
        consul.say(topic, A)
        cache.lookup(topic)
    consul.fail("a")
    later(cache, clock, 6, "a")
    clock.advance(6)
    for topic in "abc":
        cache.lookup(topic)
    consul.asked.clear()
    step(cache)
    assert [topic for topic, _ in consul.asked] == ["b", "c", "a"]


def wanted(cache, clock, *topics):
    clock.advance(6)
    for topic in topics:
        cache.lookup(topic)


def test_topics_that_turn_slow_delay_the_others_once(clock):
    """Each by QUICK_SECONDS: five that hang by half a second together, and from then on not."""
    consul = SlowConsul(clock)
    cache = made(consul, clock, catalog(stale_while_revalidate_seconds=3600))
    slow = [f"slow{number}" for number in range(5)]
    topics = [*slow, "a", "b", "c"]
    known(cache, consul, *topics)
    consul.takes = dict.fromkeys(slow, 2.0)
    for delay in (5 * QUICK_SECONDS, 0, 0):
        wanted(cache, clock, *topics)
        began = clock()
        consul.hurried.clear()
        quick_step(cache)
        assert max(consul.answered_at[topic] for topic in "abc") - began == pytest.approx(delay)
        assert set(consul.hurried) == set(topics if delay else "abc")
        for _ in slow:  # one at a time, with all the time it needs
            slow_step(cache)
            answered = max(slow, key=lambda topic: consul.answered_at[topic])
            assert not cache.lookup(answered).is_stale
    questions: Any = cache.status()["questions"]
    assert (questions["deferred"], questions["failed"]) == (5, 0)


def test_a_slow_topic_that_is_quick_again_is_asked_in_a_hurry(clock):
    """How long its last question took decides, whoever asked it."""
    consul = SlowConsul(clock)
    cache = made(consul, clock, catalog())
    consul.takes["large"] = 0.3
    known(cache, consul, "large")  # a caller waited for it
    consul.takes["large"] = 0.01
    for hurried in ([], ["large"]):
        wanted(cache, clock, "large")
        consul.hurried.clear()
        step(cache)
        assert consul.hurried == hurried
        assert not cache.lookup("large").is_stale


def test_an_answer_that_was_cut_for_lack_of_time_is_asked_for_again(clock):
    """By the lane that has the time; meanwhile the complete one is kept."""
    consul = SlowConsul(clock)
    cache = made(consul, clock, catalog())
    learn(cache, consul, A, B)
    consul.say("scheduler", A, C, is_complete=False)
    consul.takes["scheduler"] = QUICK_SECONDS
    clock.advance(6)
    cache.lookup("scheduler")
    quick_step(cache)
    assert look(cache) == ([A, B], True)
    slow_step(cache)
    assert look(cache) == ([A, B, C], False)


def test_slow_topics_that_answer_come_before_those_that_fail(clock):
    """A large topic waits for one question of a dead one, and not for all of them."""
    consul = SlowConsul(clock)
    cache = made(consul, clock, catalog(stale_while_revalidate_seconds=3600))
    dead = [f"dead{number}" for number in range(5)]
    for topic in [*dead, "large"]:
        consul.takes[topic] = 0.5
        known(cache, consul, topic)
    for topic in dead:
        consul.fail(topic, TimedOut("its datacenter is away"))
    wanted(cache, clock, *dead, "large")
    for _ in range(6):
        step(cache)
    wanted(cache, clock, *dead, "large")
    consul.asked.clear()
    step(cache)
    assert consul.asked[0] == ("large", None)


def test_who_waits_for_a_question_that_had_too_little_time_asks_himself(clock):
    """A caller is told what Consul says, and not that somebody was in a hurry."""

    class Held(SlowConsul):
        def __init__(self):
            super().__init__(clock)
            self.is_asked, self.goes_on = threading.Event(), threading.Event()

        def lookup(self, topic, server=None, *, timeout_seconds=LONGEST_SECONDS):
            if timeout_seconds == QUICK_SECONDS:
                self.is_asked.set()
                assert self.goes_on.wait(DEADLINE_SECONDS)
                raise TimedOut("not so fast")
            return super().lookup(topic, server, timeout_seconds=timeout_seconds)

    consul = Held()
    cache = made(consul, clock, catalog())
    known(cache, consul, "scheduler")
    wanted(cache, clock, "scheduler")
    hurried = in_thread(lambda: quick_step(cache))
    assert consul.is_asked.wait(DEADLINE_SECONDS)
    consul.say("scheduler", B)
    waiting = in_thread(lambda: cache.refresh("scheduler"))
    consul.goes_on.set()
    hurried.result(DEADLINE_SECONDS)
    assert shown(waiting.result(DEADLINE_SECONDS)) == [B]


def test_a_callers_question_delays_no_refresh(cache, consul, clock):
    """What a caller asks for already, and waits for, the background does not wait for too."""
    known(cache, consul, "a", "b")
    consul.hold("a")
    asking = in_thread(lambda: cache.refresh("a"))
    consul.wait_until_asked("a")
    wanted(cache, clock, "a", "b")
    step(cache)
    assert consul.count("b") == 2
    assert not asking.done()
    consul.let_go("a")
    asking.result(DEADLINE_SECONDS)


@pytest.mark.parametrize("error", [InvalidTopic, ConfigurationError])
def test_a_wrong_question_is_never_remembered(cache, consul, error):
    """What the caller or the settings got wrong is raised each time, and takes no room."""
    consul.fail("wrong", error("this topic cannot be asked for"))
    for _ in range(2):
        with pytest.raises(error):
            cache.lookup("wrong")
    assert consul.count("wrong") == 2
    assert topics(cache) == []


@pytest.mark.parametrize("bad", ["", None, 7, b"bytes", ["list"], {}])
def test_what_is_no_topic_is_refused(cache, consul, bad):
    """An empty topic, or none at all, never reaches Consul."""
    with pytest.raises(InvalidTopic):
        cache.lookup(bad)
    assert consul.asked == []


def test_an_interrupted_caller_does_not_block_the_others(consul):
    """Ctrl-C in the thread that asks is an error for those who wait, and leaves nothing behind."""
    cache = Cache(consul, kv())
    consul.fail("scheduler", KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        cache.lookup("scheduler")
    consul.say("scheduler", A)
    assert shown(cache.lookup("scheduler")) == [A]


@pytest.mark.finding("D4")
def test_an_interrupt_between_two_lines_does_not_block_the_others(consul):
    """Wherever a signal's exception meets the thread that asks: the topic can be asked for again,
    and nobody waits for a question that has ended."""
    clock = ManualClock()
    outcomes: set[str] = set()
    for line in range(1, 80):
        cache = made(consul, clock, kv(request_timeout_seconds=0.05))
        consul.say("scheduler", A)
        left = line

        def interrupt(frame, event, _):
            nonlocal left
            # All that is called up to the resolver; what settles the question is not traced.
            if frame.f_code.co_name not in (
                "lookup",
                "_lookup_slow",
                "_ask",
                "ask",
                "join",
                "_ask_resolver",
            ):
                return None
            if frame.f_code.co_filename not in (cache_module.__file__, questions_module.__file__):
                return None
            if event == "line":
                left -= 1
                if left == 0:
                    raise KeyboardInterrupt
            return interrupt

        before = sys.gettrace()
        sys.settrace(interrupt)
        try:
            cache.lookup("scheduler")
            outcomes.add("answered")
        except KeyboardInterrupt:
            outcomes.add("interrupted")
        finally:
            sys.settrace(before)
        assert shown(cache.lookup("scheduler")) == [A], line
    assert outcomes == {"answered", "interrupted"}


def test_an_interrupted_caller_is_no_outage(cache, consul, caplog):
    """A signal that ends the program while it asks is not told as a failure of Consul."""
    learn(cache, consul, A)
    consul.fail("scheduler", SystemExit(0))
    with pytest.raises(SystemExit):
        cache.refresh("scheduler")
    assert caplog.messages == []
    assert shown(cache.lookup("scheduler")) == [A]
    assert cache.explain("scheduler")["failures"] == 0


def test_a_bug_in_a_backend_keeps_the_last_good_answer(cache, consul, clock, caplog):
    """What nobody expected is logged with its traceback, and the answer stays."""
    learn(cache, consul, A)
    consul.fail("scheduler", ZeroDivisionError("a bug"))
    later(cache, clock, 6)
    assert shown(cache.lookup("scheduler")) == [A]
    assert "a bug" in caplog.text


def test_refresh_asks_now(cache, consul):
    """refresh() does not look at the TTL, and raises although lookup() still has an answer."""
    learn(cache, consul, A)
    consul.say("scheduler", B)
    assert shown(cache.refresh("scheduler")) == [B]
    assert shown(cache.lookup("scheduler")) == [B]
    consul.fail("scheduler")
    with pytest.raises(Unavailable):
        cache.refresh("scheduler")
    assert shown(cache.lookup("scheduler")) == [B]


# -- answers that are not believed at once


@pytest.fixture
def dns():
    return FakeResolver("dns")


def keep_asking(cache, clock, seconds):
    """Look up twice a second, as a caller does, and let the background work."""
    for _ in range(round(seconds * 2)):
        later(cache, clock, 0.5)


def test_one_empty_answer_is_not_believed(dns, clock):
    """A restarted Consul server denies live services for up to 5 s (fact A9): nobody notices."""
    cache = made(dns, clock, catalog())
    learn(cache, dns, A, B)
    dns.say("scheduler")
    keep_asking(cache, clock, 3.5 + 4.9)
    assert shown(cache.lookup("scheduler")) == [A, B]
    dns.say("scheduler", A, B)
    keep_asking(cache, clock, 1)
    assert not cache.lookup("scheduler").is_stale
    dns.say("scheduler")
    keep_asking(cache, clock, 3.5 + 4.9)  # and the next lie is doubted as long as the first
    assert shown(cache.lookup("scheduler")) == [A, B]


def test_an_empty_answer_that_repeats_is_believed(dns, clock, caplog):
    """After confirm_empty_seconds of the same the hosts are gone, with one line for each step."""
    cache = made(dns, clock, catalog())
    learn(cache, dns, A, B)
    dns.say("scheduler")
    keep_asking(cache, clock, 3.5 + 6 + BETWEEN_DOUBTS_SECONDS)
    assert shown(cache.lookup("scheduler")) == []
    doubted, believed = caplog.messages
    assert "suddenly says 0 hosts instead of 2" in doubted
    assert "confirmed" in believed


def test_doubt_is_settled_even_if_nobody_asks(dns, clock):
    """While an answer is doubted Consul is asked each second, whether or not callers come; and what
    it says is there to be read."""
    cache = made(dns, clock, catalog())
    learn(cache, dns, A)
    dns.say("scheduler")
    later(cache, clock, 5)
    assert cache.explain("scheduler")["doubted"]["hosts"] == []
    for _ in range(7):
        clock.advance(1)
        step(cache)
    assert shown(cache.lookup("scheduler")) == []


@pytest.mark.finding("F1")
def test_what_a_watch_says_and_nobody_believes_is_asked_for_again(clock):
    """Until it was repeated, or hosts are back, though the watch says no more of it."""
    consul = FakeResolver("kv")
    cache = made(consul, clock)
    learn(cache, consul, A, B)
    consul.say("scheduler")
    offer(cache, {}, 8)
    assert look(cache) == ([A, B], False)
    keep_asking(cache, clock, 1.5)
    held = cache.lookup("scheduler")
    assert (shown(held), held.confirmed) == ([A, B], False)
    keep_asking(cache, clock, 1.0)
    held = cache.lookup("scheduler")
    assert (shown(held), held.confirmed) == ([], True)


def test_a_doubt_does_not_keep_an_answer_past_its_end(dns, clock):
    """However long Consul must repeat itself, max_stale_seconds is the end of the held answer."""
    cache = made(dns, clock, catalog(max_stale_seconds=5.5))
    learn(cache, dns, A, B)
    clock.advance(5)
    dns.say("scheduler")
    assert shown(cache.refresh("scheduler")) == [A, B]
    clock.advance(0.5)
    assert shown(cache.lookup("scheduler")) == []


@pytest.mark.finding("A1")
@pytest.mark.parametrize(
    ("seconds", "ttl_seconds", "most"), [(6, 5, 15), (1.5, 1, 61), (0.3, 5, 35)]
)
def test_who_answers_slowly_is_asked_no_more_often(clock, seconds, ttl_seconds, most):
    """An answer that is older than its TTL when it comes is honestly stale, and no reason to ask at
    once: Consul is left alone for half as long as it took, at most half a TTL."""

    consul = SlowConsul(clock)
    consul.takes["scheduler"] = seconds
    consul.say("scheduler", A)
    cache = made(consul, clock, kv(ttl_seconds=ttl_seconds))
    until = clock.now + 120
    while clock.now < until:
        cache.lookup("scheduler")
        step(cache)
        clock.advance(0.1)
    assert 0 < consul.count("scheduler") <= most


# -- what the watcher tells


def test_an_offer_replaces_what_is_held(cache, consul, clock):
    """A topic that nobody asked for is not kept."""
    known(cache, consul, "one", "two")
    freshness = offer(cache, {"one": snapshot("one", [C])}, 60)
    cache.offer("three", snapshot("three", [D]), freshness)
    assert shown(cache.lookup("one")) == [C]
    assert shown(cache.lookup("two")) == []
    assert topics(cache) == ["one", "two"]
    clock.advance(59)
    for topic in ("one", "two"):
        assert not cache.lookup(topic).is_stale
        step(cache)
    assert len(consul.asked) == 2


def test_a_watcher_is_told_which_topics_are_in_use(cache, consul, clock):
    """Those that somebody asks for, or waits for, and no longer than that; it is called once for
    each that is new."""
    told = 0

    def on_topic_used():
        nonlocal told
        told += 1

    cache.watched_by(on_topic_used)
    cache.lookup("one")
    cache.lookup("two")
    cache.lookup("two")
    assert (cache.topics_in_use(), told) == (("one", "two"), 2)
    freshness = offer(cache, {}, 8)
    with telling(cache, "two", lambda: None):
        for _ in range(20):
            clock.advance(4)
            freshness.confirm(clock(), clock() + 8)
            step(cache)
        assert (cache.topics_in_use(), told) == (("two",), 2)
    clock.advance(61)
    assert cache.topics_in_use() == ()
    cache.lookup("one")
    assert (cache.topics_in_use(), told) == (("one",), 3)
    assert len(consul.asked) == 3


def test_a_topic_that_turns_out_wrong_is_not_watched(cache, consul):
    """Whoever plans the watches is told at once; an outage says nothing of the topic."""
    told = []
    cache.watched_by(lambda: told.append(cache.topics_in_use()))
    consul.fail("no such name", InvalidTopic("it is no name"))
    with pytest.raises(InvalidTopic):
        cache.lookup("no such name")
    assert told == [("no such name",), ()]
    consul.fail("scheduler")
    with pytest.raises(Unavailable):
        cache.lookup("scheduler")
    assert told[2:] == [("scheduler",)]


def test_what_is_remembered_of_topics_in_use_is_bounded(consul, clock):
    """By max_topics, however many other topics are asked for in a minute."""
    cache = made(consul, clock, max_topics=10)
    cache.watched_by(lambda: None)
    for number in range(1000):
        cache.lookup(f"topic{number}")
        assert len(cache._topics._ends) <= 2 * 10 + SPARE_ENDS + 1
    assert len(cache.topics_in_use()) == 10
    clock.advance(61)
    assert cache.topics_in_use() == ()
    assert cache._topics._ends == []


def test_a_topic_that_changes_all_the_time_stays_in_use(cache, consul, clock):
    """Although its answer is never old enough to be looked at again; until nobody asks for it."""
    cache.watched_by(lambda: None)
    cache.lookup("scheduler")
    freshness = offer(cache, {}, 8)
    for number in range(50):
        clock.advance(3)
        freshness.confirm(clock(), clock() + 8)
        cache.offer("scheduler", snapshot("scheduler", [A, B][: 1 + number % 2]), freshness)
        step(cache)
        cache.lookup("scheduler")
        assert cache.topics_in_use() == ("scheduler",), f"after {3 * number} s"
    clock.advance(59)
    assert cache.topics_in_use() == ("scheduler",)
    clock.advance(2)
    assert cache.topics_in_use() == ()


def test_a_watcher_may_begin_where_an_answer_ended(clock):
    """By Consul's index of the answer that is held, where it is not doubted."""
    consul = FakeResolver("kv")
    cache = made(consul, clock)
    assert cache.known_version("scheduler") == 0
    learn(cache, consul, A)
    offer(cache, {"scheduler": snapshot("scheduler", [A], "kv")}, 8, version=100)
    assert cache.known_version("scheduler") == 100
    consul.say("scheduler")  # with index 0
    cache.refresh("scheduler")
    assert cache.known_version("scheduler") == 0


def test_a_question_older_than_an_offer_does_not_undo_it(cache, consul):
    """An answer that was on its way when the watcher told the news is old news."""
    learn(cache, consul, A)
    consul.hold("scheduler")
    asking = in_thread(lambda: cache.refresh("scheduler"))
    consul.wait_until_asked("scheduler")
    offer(cache, {"scheduler": snapshot("scheduler", [B])}, 60)
    consul.let_go("scheduler")
    assert shown(asking.result(DEADLINE_SECONDS)) == [B]
    assert shown(cache.lookup("scheduler")) == [B]


def test_when_the_watch_is_lost_topics_are_asked_for_again(cache, consul, clock):
    """What the watch told is fresh no longer than it said; then each topic's own TTL counts."""
    learn(cache, consul, A)
    freshness = offer(cache, {"scheduler": snapshot("scheduler", [A], "kv")}, 8)
    clock.advance(5)
    freshness.lose()
    assert not cache.lookup("scheduler").is_stale
    clock.advance(3)
    assert cache.lookup("scheduler").is_stale
    step(cache)
    assert consul.count("scheduler") == 2
    assert not cache.lookup("scheduler").is_stale
    clock.advance(5)
    assert cache.lookup("scheduler").is_stale


def test_what_a_watch_confirmed_lately_is_young(consul, clock):
    """However long ago it was first told: Consul is not asked for it, and when Consul goes away it
    is given for all of max_stale_seconds."""
    cache = made(consul, clock, kv(max_stale_seconds=60))
    learn(cache, consul, A)
    freshness = offer(cache, {"scheduler": snapshot("scheduler", [A], "kv")}, 8)
    for _ in range(20):
        clock.advance(4)
        freshness.confirm(clock(), clock() + 8)
        cache.lookup("scheduler")
        step(cache)
    assert consul.count("scheduler") == 1
    consul.fail("scheduler")
    freshness.lose()
    clock.advance(59)
    assert cache.lookup("scheduler").age_seconds == 59
    clock.advance(1)
    with pytest.raises(Unavailable):
        cache.lookup("scheduler")


# -- waiting for a change


def test_waiting_ends_with_a_change(consul):
    """It returns the new answer as soon as it comes, and not when the same comes again."""
    cache = Cache(consul, kv())
    seen = learn(cache, consul, A)
    waiting = in_thread(lambda: cache.wait_for_change("scheduler", seen, DEADLINE_SECONDS))
    offer(cache, {"scheduler": snapshot("scheduler", [A])}, 60)
    assert not waiting.done()
    offer(cache, {"scheduler": snapshot("scheduler", [A, B])}, 60)
    assert shown(waiting.result(DEADLINE_SECONDS)) == [A, B]
    assert cache.close(DEADLINE_SECONDS)


def test_order_is_no_change(consul):
    """Consul shuffles DNS answers (fact A3): the same hosts in another order are the same.  Without
    a change the current answer comes back after the timeout."""
    cache = Cache(consul, kv())
    seen = learn(cache, consul, A, B)
    consul.say("scheduler", B, A)
    cache.refresh("scheduler")
    assert shown(cache.wait_for_change("scheduler", seen, 0.05)) == [A, B]
    assert shown(cache.wait_for_change("scheduler", None, DEADLINE_SECONDS)) == [A, B]


@pytest.mark.system
def test_waiting_polls_where_nothing_is_watched(consul):
    """In catalog mode a change is seen within a TTL, by the refreshes that waiting asks for."""
    cache = Cache(consul, kv(ttl_seconds=0.1, ttl_min_seconds=0.1))
    seen = learn(cache, consul, A)
    consul.say("scheduler", B)
    assert shown(cache.wait_for_change("scheduler", seen, DEADLINE_SECONDS)) == [B]
    assert cache.close(DEADLINE_SECONDS)


def test_closing_ends_all_waiting(consul):
    """Whoever waits for a change is told at once."""
    cache = Cache(consul, kv())
    seen = cache.lookup("scheduler")
    waiting = in_thread(lambda: cache.wait_for_change("scheduler", seen, 60))
    assert cache.close(DEADLINE_SECONDS)
    with pytest.raises(Closed):
        waiting.result(DEADLINE_SECONDS)


# -- servers


def test_a_server_is_found_in_the_topics_answer(cache, consul):
    """Its hosts are those of the topic that go by that name: no question of its own."""
    consul.say("scheduler", f"{A}=node1", f"{B}=node2", f"{C}=node1")
    assert shown(cache.lookup("scheduler", "node1")) == [A, C]
    assert shown(cache.lookup("scheduler", "node3")) == []
    assert shown(cache.refresh("scheduler", "node2")) == [B]
    assert {server for _, server in consul.asked} == {None}


def test_a_resolver_that_finds_servers_is_asked_for_the_server(clock):
    """Only where the topic's answer has no such server, and remembered like any answer; a lookup
    counts once, and not once more as its topic's."""
    consul = FakeResolver("dns", finds_servers=True)
    cache = made(consul, clock, catalog())
    consul.say("scheduler", f"{A}=node1")
    consul.say("scheduler", B, server="node2")
    assert shown(cache.lookup("scheduler", "node1")) == [A]
    for _ in range(3):
        assert shown(cache.lookup("scheduler", "node2")) == [B]
    assert consul.asked == [("scheduler", None), ("scheduler", "node2")]
    assert counted(cache) == {"asked": 1, "memory": 3}
    assert shown(cache.refresh("scheduler", "node2")) == [B]
    assert topics(cache) == ["scheduler"]


def test_peek_gives_what_a_lookup_would_and_asks_nobody(clock):
    """None where a lookup would ask; what it gives is counted as a lookup."""
    consul = FakeResolver("dns", finds_servers=True)
    cache = made(consul, clock, catalog())
    assert cache.peek("scheduler") is None
    learn(cache, consul, f"{A}=node1")
    assert shown(cache.peek("scheduler")) == [A]
    assert shown(cache.peek("scheduler", "node1")) == [A]
    assert cache.peek("scheduler", "node2") is None
    consul.say("scheduler", B, server="node2")
    cache.lookup("scheduler", "node2")
    assert shown(cache.peek("scheduler", "node2")) == [B]
    clock.advance(6)
    assert cache.peek("scheduler").is_stale
    assert cache.peek("scheduler", "node2").is_stale
    assert counted(cache) == {"asked": 1, "memory": 6, "stale": 1}
    clock.advance(1800)
    assert cache.peek("scheduler") is None
    assert consul.asked == [("scheduler", None), ("scheduler", "node2")]


# -- bounds, threads, forks


def test_memory_is_bounded(consul, clock):
    """With max_topics reached, the topic that was least lately asked for makes room."""
    cache = made(consul, clock, max_topics=3)
    for topic in "abc":
        cache.lookup(topic)
        clock.advance(0.1)
    cache.lookup("a")
    clock.advance(0.1)
    cache.lookup("d")
    assert topics(cache) == ["a", "c", "d"]
    cache.lookup("b")
    for number in range(1000):
        cache.lookup(f"topic{number}")
        assert len(topics(cache)) == 3
    assert cache.status()["evictions"] == 1002
    cache = made(consul, clock, max_topics=1)
    for topic in ("a", "b", "a"):
        clock.advance(1)
        assert shown(cache.lookup(topic)) == []
        assert topics(cache) == [topic]


def test_a_topic_in_use_is_not_evicted_by_a_flood(consul, clock):
    """A thousand topics that are asked for once do not push out one that is asked for always."""
    cache = made(consul, clock, max_topics=10)
    cache.lookup("scheduler")
    for number in range(1000):
        clock.advance(0.001)
        cache.lookup(f"topic{number}")
        clock.advance(0.001)
        cache.lookup("scheduler")
    assert consul.count("scheduler") == 1


@pytest.mark.finding("C4")
@pytest.mark.parametrize("max_topics", [50, 1000])
def test_making_room_looks_at_few_topics(consul, clock, max_topics):
    """However many topics are kept, and all of them in use."""
    cache = made(consul, clock, max_topics=max_topics)
    for round_ in range(2):
        for number in range(max_topics):
            cache.lookup(f"topic{number}")
        clock.advance(1 + round_)
    before = {id(entry): entry.placed_at for entry in cache._by_key.values()}
    cache.lookup("one more")
    looked_at = sum(
        entry.placed_at != before[id(entry)]
        for entry in cache._by_key.values()
        if entry.topic != "one more"
    )
    assert looked_at <= SECOND_CHANCES
    assert len(cache._by_key) == max_topics


@pytest.mark.finding("C3")
def test_a_watch_that_brings_nothing_new_costs_nothing(cache, consul, clock):
    """What a watch confirms leaves each topic's answer as it is, whose turn of `pick` goes on: a
    lookup gives it the newer age, and nothing else is done."""
    learn(cache, consul, A)
    freshness = offer(cache, {"scheduler": snapshot("scheduler", [A], "kv")}, 8)
    before = cache.lookup("scheduler")
    assert before.hosts
    clock.advance(5)
    freshness.confirm(clock(), clock() + 8)
    assert cache.lookup("scheduler") is before
    clock.advance(3)
    now = cache.lookup("scheduler")
    assert (now.age_seconds, now.is_stale) == (3, False)
    assert now.instances is before.instances
    assert now.hosts is before.hosts


@pytest.mark.finding("C3")
def test_a_round_of_the_refresher_looks_at_what_is_due(consul, clock):
    """One topic that is due costs the same beside ten others as beside a thousand."""

    def reads(topics):
        cache = made(consul, clock, max_topics=topics)
        for number in range(topics):
            cache.lookup(f"topic{number}")
        looked_at = 0

        class Counting(dict[Any, Any]):
            def values(self):
                nonlocal looked_at
                looked_at += len(self)
                return super().values()

        cache._by_key = Counting(cache._by_key)
        cache._topics._entries.by_key = cache._topics.by_key = cache._by_key
        clock.advance(1)
        step(cache)
        return looked_at

    assert reads(1000) <= reads(10)


@pytest.mark.finding("C5")
def test_an_answer_wakes_only_those_who_wait_for_its_topic(cache, consul):
    """Answers of one topic, and those that change nothing, wake nobody who waits for another."""
    consul.say("scheduler", A)
    consul.say("other", B)
    cache.lookup("scheduler")
    woken: list[str] = []
    with (
        telling(cache, "scheduler", lambda: woken.append("scheduler")),
        telling(cache, "other", lambda: woken.append("other")),
    ):
        for _ in range(20):
            cache.refresh("scheduler")
            cache.refresh("other")
        assert woken == ["other"]  # its first answer
        consul.say("scheduler", C)
        cache.refresh("scheduler")
        assert woken == ["other", "scheduler"]
    consul.say("scheduler", A)
    cache.refresh("scheduler")
    assert len(woken) == 2


def test_who_waits_for_a_server_is_told_though_it_is_asked_for_only_later(clock):
    """Also when the topic's own answer had the server at first, or room was made meanwhile."""
    consul = FakeResolver("dns", finds_servers=True)
    cache = made(consul, clock, catalog(), max_topics=2)
    consul.say("scheduler", f"{A}=node1")
    cache.lookup("scheduler", "node1")
    woken: list[None] = []
    with telling(cache, "scheduler", lambda: woken.append(None), "node1"):
        consul.say("scheduler", B)
        consul.say("scheduler", C, server="node1")
        cache.refresh("scheduler", "node1")
        woken.clear()
        consul.say("scheduler", D, server="node1")
        assert shown(cache.refresh("scheduler", "node1")) == [D]
        assert len(woken) == 1
    cache.refresh("scheduler")
    consul.say("scheduler", E, server="node1")
    cache.refresh("scheduler", "node1")
    assert len(woken) == 1
    assert cache._topics.waiting == {}


@pytest.fixture
def threads_before():
    yield set(threading.enumerate())


def test_the_thread_starts_with_the_first_stale_answer(consul, clock, threads_before):
    """Not when the cache is made, not while answers are fresh; and close() ends it."""
    cache = Cache(consul, kv(), clock=clock)
    cache.lookup("scheduler")
    assert set(threading.enumerate()) <= threads_before
    clock.advance(2)
    cache.lookup("scheduler")
    (thread,) = set(threading.enumerate()) - threads_before
    assert thread.name == "consul-matchmaker-refresher"
    assert cache.close(DEADLINE_SECONDS)
    assert not thread.is_alive()


def test_without_a_thread_to_be_had_answers_grow_old(consul, clock, caplog):
    """A process at its limit of threads is answered from memory; with one again, it is fresh."""
    cache = Cache(consul, kv(), clock=clock)
    seen = learn(cache, consul, A)
    consul.say("scheduler", B)
    clock.advance(6)
    before = threading.stack_size(1 << 60)  # no thread has room for that
    try:
        assert cache.lookup("scheduler").is_stale
    finally:
        threading.stack_size(before)
    assert "no thread can be started" in caplog.text
    clock.advance(1)
    change = in_thread(lambda: cache.wait_for_change("scheduler", seen, DEADLINE_SECONDS))
    assert shown(change.result(DEADLINE_SECONDS)) == [B]
    assert cache.close(DEADLINE_SECONDS)


def test_a_topic_that_hangs_has_a_thread_of_its_own(clock, threads_before):
    """While it hangs, the others are refreshed again and again; close() ends both threads, as soon
    as the question has ended."""
    consul = SlowConsul(clock)
    cache = Cache(consul, catalog(), clock=clock)
    known(cache, consul, "far", "near")
    consul.hold("far")
    wanted(cache, clock, "far")
    consul.wait_until_asked("far")
    for host in (B, C, D):
        seen = cache.lookup("near")
        consul.say("near", host)
        wanted(cache, clock, "far", "near")
        found = cache.wait_for_change("near", seen, DEADLINE_SECONDS)
        assert (shown(found), found.is_stale) == ([host], False)
    assert consul.count("far") == 2
    assert cache.lookup("far").is_stale
    threads = set(threading.enumerate()) - threads_before
    names = {"consul-matchmaker-refresher", "consul-matchmaker-refresher-slow"}
    assert {thread.name for thread in threads} == names
    assert not cache.close(0.01)
    consul.let_go("far")
    assert cache.close(DEADLINE_SECONDS)
    assert not any(thread.is_alive() for thread in threads)


def test_a_topic_that_was_slow_from_the_start_is_refreshed_ahead(clock):
    """As soon as the background works for any topic, it works for slow ones too: nobody has to find
    their answer stale first."""
    consul = SlowConsul(clock)
    cache = Cache(consul, catalog(ttl_seconds=100), clock=clock, jitter=lambda: 0.0)
    cache.lookup("nobody")
    consul.takes["large"] = 0.3
    consul.say("large", A)
    seen = cache.lookup("large")
    clock.advance(1)
    cache.lookup("nobody")  # stale, so that the background begins
    clock.advance(75)
    consul.say("large", B)
    assert not cache.lookup("large").is_stale
    cache.lookup("nobody")  # stale again, so that the background looks at the clock again
    assert shown(cache.wait_for_change("large", seen, DEADLINE_SECONDS)) == [B]
    assert not seen.is_stale
    assert cache.close(DEADLINE_SECONDS)


def test_a_forked_child_keeps_the_answers_only(cache, consul, clock):
    """What was under way in the parent is forgotten: no lock, question or thread is waited for."""
    learn(cache, consul, A)
    consul.hold("scheduler")
    asking = in_thread(lambda: cache.refresh("scheduler"))
    consul.wait_until_asked("scheduler")
    cache._lock.acquire()  # as when another thread held it at the moment of the fork
    child = Cache(consul, kv(), clock=clock, before=cache)
    assert shown(child.lookup("scheduler")) == [A]
    consul.say("scheduler", B)
    parents = consul.stop_holding("scheduler")
    assert shown(child.refresh("scheduler")) == [B]
    assert consul.count("scheduler") == 3
    cache._lock.release()
    parents.set()
    asking.result(DEADLINE_SECONDS)


def test_threads_and_topics_all_at_once(consul):
    """Eight threads, fifty topics in room for twenty, offers and refreshes between: every answer
    is the right one."""
    cache = Cache(consul, kv(ttl_seconds=0.01, ttl_min_seconds=0.01, max_topics=20))
    truth = {f"topic{number}": f"10.0.1.{number + 1}:80" for number in range(50)}
    for topic, host in truth.items():
        consul.say(topic, host)
    watched = {topic: snapshot(topic, [host]) for topic, host in truth.items()}

    def work(start):
        for count in range(1500):
            topic = f"topic{(start * 7 + count) % 50}"
            assert shown(cache.lookup(topic)) == [truth[topic]]
            if count % 100 == start:
                freshness = offer(cache, watched, 0.01)
                if count % 200 == start:
                    freshness.lose()
        return start

    workers = [in_thread(lambda start=start: work(start)) for start in range(8)]
    assert [worker.result(60) for worker in workers] == list(range(8))
    assert len(topics(cache)) <= 20
    assert cache.close(DEADLINE_SECONDS)


STEPS = st.lists(
    st.one_of(
        # Sums of these are exact: the very moment at which an answer is given up is the same here.
        st.tuples(st.just("advance"), st.sampled_from([0.125, 0.5, 1, 4, 6, 50])),
        st.tuples(st.just("say"), st.sampled_from([(), (A,), (A, B), (A, B, C, D), (E,)])),
        st.tuples(st.just("offer"), st.sampled_from([5, 8])),
        st.tuples(st.sampled_from(["fail", "lookup", "refresh", "step", "watch_lost"]), st.none()),
    ),
    max_size=60,
)


@example(
    [
        ("say", (A,)),
        ("lookup", None),
        ("say", ()),
        ("offer", 8),  # which is doubted
        ("advance", 6),
        ("lookup", None),
    ],
    catalog(max_stale_seconds=60),
)
@given(STEPS, st.sampled_from([kv(max_stale_seconds=60), catalog(max_stale_seconds=60)]))
def test_whatever_happens(steps, settings):
    """A lookup never asks while its answer is young, never fails while it may be given, never
    invents or ages a host wrongly, and is right again soon after Consul is."""
    clock, consul = ManualClock(), FakeResolver("dns" if settings.mode == "catalog" else "kv")
    cache = made(consul, clock, settings)
    truth: tuple[str, ...] = ()
    freshness = Freshness()
    ever: set[tuple[str, ...]] = {()}
    given_at: float | None = None  # the last time Consul gave an answer

    def ask(call):
        may_be_given = given_at is not None and clock() - given_at < 60
        before, lookups = len(consul.asked), counted(cache)
        try:
            answer = call("scheduler")
        except Unavailable:
            assert call == cache.refresh or not may_be_given
            answer = None
        if call != cache.refresh:
            found = [what for what, n in counted(cache).items() if n != lookups.get(what, 0)]
            assert sum(counted(cache).values()) == sum(lookups.values()) + 1
            if len(consul.asked) > before:
                assert found == ["asked"]
            elif answer is None:
                assert found == ["refused"]
            else:
                looks = [["stale"], ["away"]] if answer.is_stale else [["fresh"]]
                assert found in [["memory"], *looks]
        if answer is None:
            return
        assert tuple(shown(answer)) in ever
        assert 0 <= answer.age_seconds <= 60 + 5
        is_young = given_at is not None and clock() - given_at < 15
        assert call == cache.refresh or not is_young or len(consul.asked) == before

    for verb, value in [*steps, ("say", truth)]:
        if verb == "advance":
            clock.advance(value)
        elif verb == "say":
            truth = value
            ever.add(truth)
            consul.say("scheduler", *truth)
        elif verb == "fail":
            consul.fail("scheduler")
        elif verb == "offer" and topics(cache):
            answer = snapshot("scheduler", truth, consul.source)
            freshness = offer(cache, {"scheduler": answer}, value)
        elif verb == "watch_lost":
            freshness.lose()
        elif verb == "step":
            step(cache)
        elif verb in ("lookup", "refresh"):
            ask(cache.lookup if verb == "lookup" else cache.refresh)
        states = cache.status()["states"]
        assert isinstance(states, dict) and sum(states.values()) == len(topics(cache))
        if len(consul.asked) and topics(cache):
            held = cache._by_key["scheduler"].held
            given_at = None if held is None else held.taken_at
    freshness.lose()
    for _ in range(40):  # two TTLs, a doubt, and the longest pause between two attempts
        clock.advance(0.5)
        with contextlib.suppress(Unavailable):
            cache.lookup("scheduler")
        step(cache)
    assert tuple(shown(cache.lookup("scheduler"))) == truth


# -- where an answer is from


def test_explain_tells_the_state_and_the_last_error(cache, consul, clock):
    """In words and figures fit for json, for a topic nobody asked for too."""
    assert "nobody asked" in str(cache.explain("scheduler"))
    learn(cache, consul, A)
    clock.advance(6)
    cache.lookup("scheduler")
    consul.fail("scheduler")
    step(cache)
    clock.advance(2)
    told: Any = json.loads(json.dumps(cache.explain("scheduler")))
    assert told["state"] == State.AWAY.value
    assert told["answer"]["hosts"][0]["host"] == A
    assert told["answer"]["age_seconds"] == pytest.approx(8)
    assert told["last_error"] == "Consul is away"
    assert (told["failures"], told["failing_for_seconds"]) == (1, pytest.approx(2))


def counted(cache):
    """Lookups by what they found, without those that were not."""
    status: Any = cache.status()
    found: dict[str, int] = status["lookups_that_found"]
    assert status["lookups"] == sum(found.values())
    return {what: count for what, count in found.items() if count}


def test_every_lookup_is_counted_by_what_it_found(cache, consul, clock):
    """Each once: also those of an answer that was found stale just before, and of a server."""
    consul.say("scheduler", f"{A}=node1")
    for _ in range(4):
        cache.lookup("scheduler", "node1")
    clock.advance(5)
    for _ in range(5):
        assert cache.lookup("scheduler").is_stale
    consul.fail("scheduler")
    step(cache)
    for seconds in (0.0, 1.0, 1.0):
        clock.advance(seconds)
        for _ in range(2):
            assert cache.lookup("scheduler").is_stale
    consul.fail("mails")
    for _ in range(3):
        with pytest.raises(Unavailable):
            cache.lookup("mails")
    for _ in range(3):  # reading the figures does not change them
        assert counted(cache) == {
            "memory": 11,
            "stale": 1,
            "away": 2,
            "asked": 2,
            "refused": 2,
        }


def test_an_answer_that_fails_to_be_refreshed_counts_as_fresh_while_it_is(cache, consul, clock):
    """A refresh ahead of time that fails, and one that is doubted, change nothing before the TTL
    is over; after it the count says why the answer is stale."""
    dns = FakeResolver("dns")
    doubting = made(dns, clock, catalog())
    for each, resolver in ((cache, consul), (doubting, dns)):
        learn(each, resolver, A)
    consul.fail("scheduler")
    dns.say("scheduler")
    for each in (cache, doubting):
        with contextlib.suppress(Unavailable):
            each.refresh("scheduler")
    for _ in range(9):
        clock.advance(1)
        for each in (cache, doubting):
            each.lookup("scheduler")
    assert counted(cache) == {"asked": 1, "memory": 4, "away": 5}
    assert counted(doubting) == {"asked": 1, "memory": 4, "stale": 5}


def test_no_lookup_is_lost_between_threads(cache, consul):
    """The counts are exact however many threads look up, and read them, at a time."""
    learn(cache, consul, A)
    looking = [in_thread(lambda: [cache.lookup("scheduler") for _ in range(500)]) for _ in range(4)]
    reading = [in_thread(lambda: [counted(cache) for _ in range(50)]) for _ in range(2)]
    for each in (*looking, *reading):
        each.result(DEADLINE_SECONDS)
    assert counted(cache) == {"asked": 1, "memory": 2000}


# -- answers from disk


@pytest.fixture
def wall():
    return ManualClock(1_700_000_000.0)


def on_disk(consul, clock, wall, folder, **values):
    return made(consul, clock, kv(state_path=str(folder), **values), wall_clock=wall)


def test_a_cold_start_while_consul_is_away(consul, clock, wall, tmp_path):
    """The answer of the process before is given, marked for what it is, until the first real one;
    a topic that is not in the file is still an error."""
    before = on_disk(consul, clock, wall, tmp_path)
    learn(before, consul, A, B)
    clock.advance(20)
    wall.advance(20)
    assert before.close(DEADLINE_SECONDS)
    wall.advance(100)
    consul.fail("scheduler")
    consul.fail("mails")
    cache = on_disk(consul, clock, wall, tmp_path)
    answer = cache.lookup("scheduler")
    assert shown(answer) == [A, B]
    assert (answer.source, answer.is_stale, answer.confirmed) == ("disk", True, False)
    assert answer.age_seconds == pytest.approx(120)
    with pytest.raises(Unavailable):
        cache.lookup("mails")
    step(cache)
    assert cache.lookup("scheduler").source == "disk"
    assert counted(cache) == {"asked": 2, "memory": 1}  # Consul has the first word
    consul.say("scheduler", C)
    later(cache, clock, 1)
    answer = cache.lookup("scheduler")
    assert (shown(answer), answer.source, answer.confirmed) == ([C], "memory", True)


def test_an_answer_from_disk_is_given_up_like_any_other(consul, clock, wall, tmp_path):
    """max_stale_seconds counts from the moment Consul gave it, in whatever process."""
    before = on_disk(consul, clock, wall, tmp_path, max_stale_seconds=60)
    learn(before, consul, A)
    before.close(DEADLINE_SECONDS)
    wall.advance(50)
    consul.fail("scheduler")
    cache = on_disk(consul, clock, wall, tmp_path, max_stale_seconds=60)
    assert shown(cache.lookup("scheduler")) == [A]
    clock.advance(10)
    with pytest.raises(Unavailable):
        cache.lookup("scheduler")


def test_a_cut_answer_takes_nothing_over_from_disk(dns, clock, wall, tmp_path):
    """Even an incomplete real answer is not united with what the file said."""
    before = on_disk(dns, clock, wall, tmp_path)
    learn(before, dns, A, B)
    before.close(DEADLINE_SECONDS)
    cache = on_disk(dns, clock, wall, tmp_path)
    dns.fail("scheduler")
    assert shown(cache.lookup("scheduler")) == [A, B]
    dns.say("scheduler", C, is_complete=False)
    assert shown(cache.refresh("scheduler")) == [C]


def test_answers_are_written_by_neither_lookup_nor_refresh(consul, clock, wall, tmp_path):
    """The thread of the state files writes them; what a watch confirms is told to it as well."""
    cache = on_disk(consul, clock, wall, tmp_path, max_stale_seconds=400)
    assert cache._state_files is not None
    learn(cache, consul, A)
    freshness = offer(cache, {"scheduler": snapshot("scheduler", [A], "kv")}, 8)
    assert list(tmp_path.iterdir()) == []
    cache._state_files._step()
    (file,) = tmp_path.iterdir()
    written = file.stat().st_ino
    for _ in range(30):
        clock.advance(4)
        wall.advance(4)
        freshness.confirm(clock(), clock() + 8)
        cache.lookup("scheduler")
        step(cache)
    assert file.stat().st_ino == written
    cache._state_files._step()
    assert file.stat().st_ino != written


@pytest.mark.system
def test_a_consul_that_is_well_is_quicker_than_the_file(consul, tmp_path, monkeypatch):
    """At a start with Consul there the first answer is its own already; with one that hangs the
    file's comes soon, and only the first caller waits for it at all."""
    monkeypatch.setattr(cache_module, "CHANCE_SECONDS", 1.0)
    settings = kv(state_path=str(tmp_path))
    consul.say("scheduler", A)
    before = Cache(consul, settings)
    before.lookup("scheduler")
    assert before.close(DEADLINE_SECONDS)
    consul.say("scheduler", B)
    cache = Cache(consul, settings)
    assert shown(cache.lookup("scheduler")) == [B]
    assert cache.close(DEADLINE_SECONDS)

    class Hanging(FakeResolver):
        """Answers nothing within the time it is given."""

        def lookup(self, topic, server=None, *, timeout_seconds=LONGEST_SECONDS):
            self.asked.append((topic, server))
            assert not gone_on.wait(timeout_seconds)
            raise TimedOut("nothing came")

    gone_on, hanging = threading.Event(), Hanging()
    cache = Cache(hanging, settings)
    began = time.monotonic()
    for _ in range(10):
        answer = cache.lookup("scheduler")
        assert (shown(answer), answer.source) == ([B], "disk")
    assert 1.0 <= time.monotonic() - began < 2.0
    cache.close(DEADLINE_SECONDS)


@pytest.mark.finding("E15")
def test_a_state_file_that_takes_long_holds_up_no_known_topic(consul, tmp_path):
    """It is read by the first who asks for a new topic, outside the lock of all topics."""
    cache = Cache(consul, kv(state_path=str(tmp_path)))
    consul.say("scheduler", A)
    consul.say("mails", B)
    cache.lookup("scheduler")
    assert cache._state_files is not None
    began, go_on = threading.Event(), threading.Event()

    class HeldUp(StateFiles):
        def load(self, topic, server):
            began.set()
            assert go_on.wait(DEADLINE_SECONDS)

    cache._state_files.__class__ = HeldUp
    asking = in_thread(lambda: cache.lookup("mails"))
    assert began.wait(DEADLINE_SECONDS)
    looking = in_thread(lambda: (cache.refresh("scheduler") and cache.status())["topics"])
    try:
        assert looking.result(DEADLINE_SECONDS / 2) == 1
        assert not asking.done()
    finally:
        go_on.set()
    assert shown(asking.result(DEADLINE_SECONDS)) == [B]
    cache.close(DEADLINE_SECONDS)
