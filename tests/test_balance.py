"""The rules of balancing: what a host costs, what its share is, and what may be retried."""

from __future__ import annotations

import math
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from consul_matchmaker.answers import balance
from consul_matchmaker.answers.balance import Fading, Latency, RetryBudget
from consul_matchmaker.model import Host, Instance

HOSTS = [Host(f"10.0.0.{number}", 5000) for number in range(1, 101)]
# As this release draws: another draw would move keys and subsets at an update.
KNOWN_SUBSET = ["10.0.0.43", "10.0.0.62", "10.0.0.93"]
KNOWN_DRAW = 0.3876780581730202


def test_a_fading_sum_is_about_the_sum_of_its_window() -> None:
    """What comes at a steady rate adds up to rate x window; what stops is 1/e after the window."""
    calls = Fading(10)
    assert calls.value(5) == 0
    for tick in range(10_000):
        calls.add(1, tick / 100)
    assert calls.value(99.99) == pytest.approx(1000, rel=0.01)
    assert calls.value(109.99) == pytest.approx(1000 / math.e, rel=0.01)


def test_a_clock_that_another_thread_read_earlier_changes_nothing() -> None:
    """A sum does not grow because a caller comes with an older moment."""
    calls = Fading(10)
    calls.add(8, 20)
    assert calls.value(10) == 8
    assert calls.value(20) == 8
    calls.add(1, 10)
    assert calls.value(30) == pytest.approx(9 / math.e)


def test_a_slow_answer_counts_at_once_and_a_quick_one_by_and_by() -> None:
    """Peak EWMA: a host that becomes slow is left soon, and trusted again only after a while."""
    latency = Latency()
    assert not latency.is_known
    assert latency.seconds(0) == 0
    latency.measured(0.1, 0)
    assert latency.is_known
    assert latency.seconds(0) == 0.1
    latency.measured(2, 0)
    assert latency.seconds(0) == 2
    latency.measured(0.1, 0)
    assert latency.seconds(0) == 2
    latency.measured(0.1, 10)
    assert latency.seconds(10) == pytest.approx(2 / math.e + 0.1 * (1 - 1 / math.e))


def test_a_latency_that_nobody_measures_fades() -> None:
    """So a host that was slow once is tried again."""
    latency = Latency()
    latency.measured(2, 100)
    assert latency.seconds(110) == pytest.approx(2 / math.e)
    assert latency.seconds(90) == 2
    latency.measured(1, 120)
    assert latency.seconds(120) == 1


def test_what_a_host_costs() -> None:
    """Twice the latency, twice the calls or half the weight is twice the cost."""
    assert balance.cost(0.1, 0, 1) == 0.1
    assert balance.cost(0.2, 0, 1) == 0.2
    assert balance.cost(0.1, 1, 1) == 0.2
    assert balance.cost(0.1, 3, 4) == 0.1
    assert balance.cost(0.1, 0, 0) == 100, "a weight of 0 is a very small one"


def test_a_service_that_is_sick_gets_a_fifth_more_calls() -> None:
    """Half of all attempts fail for a minute at 100 calls/s: retries are 20 %, and the floor."""
    budget, sent = RetryBudget(0.2, 1.0), 0
    for call in range(6000):
        now = call / 100
        budget.call(now)
        sent += 1
        if call % 2 and budget.take(now):
            sent += 1
    assert sent + 10 >= 1.2 * 6000
    assert sent <= 1.21 * 6000 + 10


def test_who_calls_seldom_may_retry() -> None:
    """The floor: ten within ten seconds, whatever the calls."""
    budget = RetryBudget(0.2, 1.0)
    assert [budget.take(50) for _ in range(12)] == [True] * 10 + [False] * 2
    assert budget.take(51.1)
    assert not budget.take(51.1)


def test_without_fraction_and_floor_there_are_no_retries() -> None:
    """Both settings at 0 turn them off."""
    budget = RetryBudget(0, 0)
    budget.call(1)
    assert not budget.take(1)


def test_a_new_host_begins_with_a_tenth() -> None:
    """Its share grows with its age, up to all of it."""
    shares = [balance.slow_start(age, 10) for age in (0, 0.5, 1, 5, 9, 10, math.inf)]
    assert shares == [0.1, 0.1, 0.1, 0.5, 0.9, 1, 1]
    assert balance.slow_start(0, 0) == 1


@pytest.mark.parametrize(
    ("local", "everywhere", "zones", "share"),
    [
        (3, 9, 3, 1),  # a third of the hosts for a third of the callers
        (5, 9, 2, 1),
        (15, 63, 3, 1),  # 1 / 1.4 of its due is enough
        (1, 10, 2, 0.28),
        (1, 3, 2, 1.4 * 2 / 3),
    ],
)
def test_a_zone_keeps_what_its_hosts_can_bear(
    local: int, everywhere: int, zones: int, share: float
) -> None:
    """All calls while it has nearly its due of the hosts; else a part, and the rest spills over."""
    assert balance.local_share(local, everywhere, zones) == pytest.approx(share)


@pytest.mark.parametrize(
    ("hosts", "fraction", "most"),
    [(0, 1, 0), (1, 1, 0), (2, 0.2, 1), (3, 0.2, 1), (10, 0.2, 2), (10, 0, 1), (4, 1, 4)],
)
def test_how_many_hosts_may_be_ejected(hosts: int, fraction: float, most: int) -> None:
    """The fraction; one at least, and never a single host."""
    allowed = [balance.may_eject(ejected, hosts, fraction) for ejected in range(hosts + 1)]
    assert allowed == [True] * most + [False] * (hosts + 1 - most)


def test_a_few_failures_say_little() -> None:
    """The rate counts from 20 calls on."""
    assert not balance.is_failing(19, 19, 0.3)
    assert balance.is_failing(6, 20, 0.3)
    assert not balance.is_failing(5.9, 20, 0.3)


@given(st.integers(1, 100), st.integers(1, 100), st.integers(0, 99), st.text())
def test_a_subset_is_stable(count: int, size: int, gone: int, client: str) -> None:
    """One host that leaves is replaced by one other, and none else changes; the order is kept."""
    choices = [Instance(host) for host in HOSTS[:count]]
    chosen = balance.subset(choices, size, client)
    assert len(chosen) == min(size, count)
    assert list(chosen) == [one for one in choices if one in chosen]
    left = [one for one in choices if one.host != HOSTS[gone]]
    if left:
        after = balance.subset(left, size, client)
        assert {one for one in chosen if one in left} <= set(after)


def test_a_client_of_any_name_has_a_subset() -> None:
    """Also one whose name is no Unicode, as a file system may have it; and it is a known one."""
    choices = [Instance(host) for host in HOSTS]
    assert len(balance.subset(choices, 3, "\udcff")) == 3
    assert [one.host.address for one in balance.subset(choices, 3, "web-1")] == KNOWN_SUBSET


def test_draws_are_even_and_the_same_everywhere() -> None:
    """A number that never changes: or every process would move its keys with the next release."""
    draws = [balance.draw(b"key", Host(f"10.1.{n >> 8}.{n & 255}", 80)) for n in range(10_000)]
    assert 0 < min(draws) < 0.001 < 0.999 < max(draws) < 1
    assert sum(draws) / len(draws) == pytest.approx(0.5, abs=0.02)
    assert balance.draw(b"key", HOSTS[0]) == KNOWN_DRAW
    assert 0 < balance.draw(b"key", Host.opaque("\udcff")) < 1


def test_clients_together_use_all_hosts() -> None:
    """1,000 clients with 10 of 100 hosts each: every host has its 100 clients, within 40."""
    counts: Counter[Host] = Counter()
    for client in range(1000):
        chosen = balance.subset([Instance(host) for host in HOSTS], 10, f"client-{client}")
        counts.update(one.host for one in chosen)
    assert all(60 <= counts[host] <= 140 for host in HOSTS)


def test_since_when_hosts_are_known() -> None:
    """Those of the first answer for ever; a later one since it came, also when it comes again."""
    one, two = HOSTS[:2]
    first = balance.newcomers([one], None, 5)
    assert first == {one: -math.inf}
    second = balance.newcomers([one, two], first, 7)
    assert second == {one: -math.inf, two: 7}
    assert balance.newcomers([two], second, 9) == {two: 7}
    assert balance.newcomers([one, two], {two: 7}, 11) == {one: 11, two: 7}
