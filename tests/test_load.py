"""What calls find of hosts: who is busy, slow or failing, and what may be retried."""

from __future__ import annotations

import gc
from typing import Any

import pytest

from consul_matchmaker.answers import load as module
from consul_matchmaker.answers.load import Load
from consul_matchmaker.model import Host, Instance

from .doubles import DEADLINE_SECONDS, ManualClock, in_thread, kv

ONE, TWO = Host("10.0.0.1", 1), Host("10.0.0.2", 1)


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock()


@pytest.fixture
def load(clock: ManualClock) -> Load:
    return Load(kv(selection="least_loaded", ejection_failure_rate=0.3), clock=clock)


def lesser(load: Load, one_weight: int = 1, two_weight: int = 1) -> Host:
    """Of both orders the same."""
    pair = Instance(ONE, weight=one_weight), Instance(TWO, weight=two_weight)
    found = {load.lesser("web", *pair).host, load.lesser("web", *pair[::-1]).host}
    assert len(found) == 1
    return found.pop()


def answered(load: Load, host: Host, seconds: float, *, is_good: bool = True) -> bool:
    return load.judged("web", host, is_good=is_good, seconds=seconds)


def test_the_host_with_fewer_calls_in_flight_has_less_to_do(load: Load) -> None:
    """Until they end; and by weight."""
    busy = [load.begin("web", ONE) for _ in range(2)]
    _kept = load.begin("web", TWO)
    assert lesser(load) == TWO
    assert lesser(load, one_weight=4) == ONE
    for (one,) in busy:
        load.end(one)
    assert lesser(load) == ONE


def test_the_slower_host_has_more_to_do(load: Load) -> None:
    """Once the latencies of both are known; a failure that comes at once does not look quick."""
    answered(load, ONE, 0.1)
    _kept = load.begin("web", ONE)
    assert lesser(load) == TWO, "of TWO nothing is known: calls in flight count"
    answered(load, TWO, 2.0)
    assert lesser(load) == ONE
    answered(load, TWO, 0.001, is_good=False)
    assert lesser(load) == ONE
    answered(load, ONE, 30.0, is_good=False)
    assert lesser(load) == TWO, "a timeout took its time"


def test_a_host_fails_too_often(load: Load, clock: ManualClock) -> None:
    """From 20 calls on; told with the failure that makes it so; afterwards it is judged anew."""
    told = [answered(load, ONE, 0.1, is_good=number % 2 == 0) for number in range(24)]
    assert told[:19] == [False] * 19
    assert told[19::2] == [True, True, True]
    assert not any(told[20::2])
    load.ejected("web", ONE)
    assert not answered(load, ONE, 0.1, is_good=False)
    clock.advance(60)
    assert not answered(load, TWO, 0.1, is_good=False)


def test_old_failures_do_not_count(load: Load, clock: ManualClock) -> None:
    """A host that failed a minute ago and answers now is well."""
    for _ in range(30):
        answered(load, ONE, 0.1, is_good=False)
    clock.advance(60)
    for _ in range(25):
        answered(load, ONE, 0.1)
    assert not answered(load, ONE, 0.1, is_good=False)


def test_what_left_is_forgotten(load: Load) -> None:
    """Also while it is busy; its end changes nothing then."""
    (one,) = load.begin("web", ONE)
    _kept = load.begin("web", TWO)
    load.hosts_are("web", (TWO,))
    assert load.explain("web", ONE) == {}
    assert load.hosts_of("web") == (TWO,)
    load.end(one)
    load.hosts_are("web", (ONE, TWO))
    assert lesser(load) == ONE
    assert load.hosts_of("mails") == ()


def test_nothing_is_counted_where_no_setting_needs_it() -> None:
    """A process that takes hosts in turn keeps no figures of them."""
    load = Load(kv())
    assert load.begin("web", ONE) == ()
    load.hosts_are("web", (ONE,))
    assert not load.judged("web", ONE, is_good=False, seconds=1)
    assert load.explain("web", ONE) == {}
    assert load.hosts_of("web") == ()


@pytest.mark.parametrize(
    "settings", [{"selection": "least_loaded"}, {"ejection_failure_rate": 0.5}]
)
def test_either_setting_has_hosts_counted(settings: dict[str, Any]) -> None:
    """Each needs what calls find; a rate of failures is judged only where one is set."""
    load = Load(kv(**settings))
    assert load.begin("web", ONE)
    told = [load.judged("web", ONE, is_good=False, seconds=None) for _ in range(30)]
    assert any(told) is ("ejection_failure_rate" in settings)
    assert load.explain("web", ONE)["latency_seconds"] is None


def test_of_two_hosts_alike_the_first_is_taken(load: Load) -> None:
    """Which is the first is drawn by chance before."""
    pair = Instance(ONE), Instance(TWO)
    assert load.lesser("web", *pair).host == ONE
    assert load.lesser("web", *pair[::-1]).host == TWO


def test_what_is_known_of_a_host_is_explained(load: Load) -> None:
    """In flight, latency, and how many of its last calls failed."""
    _kept = load.begin("web", ONE)
    assert load.explain("web", ONE) == {
        "in_flight": 1,
        "latency_seconds": None,
        "recent_calls": 0,
        "failure_rate": None,
    }
    answered(load, ONE, 0.5)
    answered(load, ONE, 0.1, is_good=False)
    assert load.explain("web", ONE) == {
        "in_flight": 1,
        "latency_seconds": 0.5,
        "recent_calls": 2,
        "failure_rate": 0.5,
    }


def test_each_topic_has_a_budget_of_its_own(load: Load) -> None:
    """A sick one takes no retries from another; what was allowed and refused is counted."""
    for _ in range(100):
        load.call("web")
    assert [load.may_retry("web") for _ in range(31)] == [True] * 30 + [False]
    assert [load.may_retry("mails") for _ in range(11)] == [True] * 10 + [False]
    assert (load.retries, load.refused) == (40, 2)


def test_hosts_that_nobody_picked_are_bounded(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who chooses hosts himself, or by the names of servers, tells of more and more of them."""
    monkeypatch.setattr(module, "MAX_HOSTS", 5)
    load.hosts_are("web", (ONE, TWO))
    (one,) = load.begin("web", ONE)
    for port in range(1, 50):
        answered(load, Host("10.0.0.9", port), 1.0)
        assert len(load._topics["web"]) <= 5 + 2
    load.end(one)
    assert load.explain("web", ONE).get("in_flight", 0) == 0


def test_topics_are_bounded(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    """With more of them, all begin anew."""
    monkeypatch.setattr(module, "MAX_TOPICS", 2)
    for topic in ("a", "b"):
        _kept = load.begin(topic, ONE)
        load.call(topic)
    assert load.explain("a", ONE)
    _kept = load.begin("c", ONE)
    load.call("c")
    assert not load.explain("a", ONE)
    assert load.explain("c", ONE)
    assert all(load.may_retry("a") for _ in range(10))


def test_a_latency_gets_old_but_not_while_a_call_waits(load: Load, clock: ManualClock) -> None:
    """A host that hangs is not taken for a quick one; one that has answered, and whose body is
    being read for long, is tried again."""
    (one,) = load.begin("web", ONE)
    _kept = load.begin("web", TWO)
    answered(load, ONE, 1.0)
    answered(load, TWO, 0.5)
    clock.advance(30)
    answered(load, TWO, 0.5)
    assert lesser(load) == TWO
    load.answered(one)
    assert lesser(load) == ONE
    load.end(one)
    assert load.explain("web", ONE)["in_flight"] == 0


def test_a_call_ends_once_and_also_when_it_is_forgotten(load: Load) -> None:
    """So an interrupt at any moment leaves no host busy."""
    (one,) = load.begin("web", ONE)
    (other,) = load.begin("web", ONE)
    for _ in range(3):
        load.answered(one)
        load.end(one)
    assert load.explain("web", ONE)["in_flight"] == 1
    load.end(one)
    del one, other
    gc.collect()
    assert load.explain("web", ONE)["in_flight"] == 0
    load.begin("web", ONE)
    assert load.explain("web", ONE)["in_flight"] == 0


def test_a_finalizer_may_end_a_call(load: Load) -> None:
    """The garbage collector runs it on a thread that holds the lock: it does not wait for that."""
    (one,) = load.begin("web", ONE)

    def collect() -> None:
        with load._lock:
            load.end(one)

    in_thread(collect).result(DEADLINE_SECONDS)
    assert load.explain("web", ONE)["in_flight"] == 0


def test_threads_lose_no_count(load: Load) -> None:
    """Eight threads that begin and end: nothing is in flight at the end."""

    def run() -> None:
        for _ in range(2000):
            (one,) = load.begin("web", ONE)
            load.end(one)

    for worker in [in_thread(run) for _ in range(8)]:
        worker.result(DEADLINE_SECONDS)
    assert load.explain("web", ONE)["in_flight"] == 0


def test_each_call_is_awaited_until_it_is_answered(load: Load, clock: ManualClock) -> None:
    """However often that is said: a slow host with another call on its way stays a slow one."""
    answered(load, ONE, 0.1)
    answered(load, TWO, 2.0)
    (first,), (second,) = load.begin("web", TWO), load.begin("web", TWO)
    for _ in range(3):
        load.answered(first)
        load.end(first)
    clock.advance(60)
    answered(load, ONE, 0.1)
    assert lesser(load) == ONE, "what the slow host has to say is awaited"
    load.answered(second)
    load.end(second)
    assert lesser(load) == TWO, "nobody knows any more that it is slow"
