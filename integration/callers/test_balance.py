"""What selection, ejection and the retry budget do to real calls over sockets, counted.

The benchmark `calls` shows the same with times, and beside what other settings do.
"""

from __future__ import annotations

import time

from integration.callers.fleet import TOPIC, Fleet
from integration.waiting import until

PER_SECOND = 200.0
ENOUGH_SECONDS = 120.0
"""On a busy machine; alone each of these takes two or three."""


def test_a_slow_host_gets_a_small_part_of_the_calls() -> None:
    """Least loaded: one of two hosts takes 20 times as long, and has less than a quarter."""
    with Fleet(2, selection="least_loaded") as fleet:
        quick, slow = fleet.servers
        quick.seconds, slow.seconds = 0.02, 0.4
        with fleet.called(PER_SECOND):
            until(lambda: fleet.made >= 300, ENOUGH_SECONDS, "300 calls")
        assert 0 < fleet.share(slow) < 0.25
        assert fleet.failed == 0


def test_in_turn_a_slow_host_gets_half_of_the_calls() -> None:
    """Round robin, the default, does not look at how long a host takes."""
    with Fleet(2) as fleet:
        fleet.servers[1].seconds = 0.02
        with fleet.called(PER_SECOND):
            until(lambda: fleet.made >= 200, ENOUGH_SECONDS, "200 calls")
        assert 0.45 < fleet.share(fleet.servers[1]) < 0.55


def test_a_new_host_begins_with_a_part_of_its_share() -> None:
    """With a slow start of a minute it has less than half of an even share at first; the hosts of
    the first answer have all of theirs."""
    with Fleet(2, slow_start_seconds=60) as fleet:
        with fleet.called(PER_SECOND):
            until(lambda: fleet.made >= 100, ENOUGH_SECONDS, "100 calls")
            before = [fleet.share(server) for server in fleet.servers]
            new, came = fleet.come(), time.monotonic()
            made = fleet.made
            # Of so few it is picked at least once, but for one run in 10^8.
            until(lambda: fleet.made >= made + 600, ENOUGH_SECONDS, "600 more")
        assert min(before) > 0.4
        assert 0 < fleet.share(new, came) < 0.5 / 3


def test_a_host_that_fails_too_often_is_ejected() -> None:
    """It fails 30 % of its calls, between good ones: ejected, it gets no call; the others do."""
    # Without quarantine, which leaves it few calls: what is tested is the rate alone.
    with Fleet(
        10, quarantine_seconds=0, quarantine_max_seconds=600, ejection_failure_rate=0.2
    ) as fleet:
        bad, *good = fleet.servers
        bad.fails = 0.3
        with fleet.called(PER_SECOND, attempts=1):
            until(lambda: fleet.matchmaker.status()["ejections"], ENOUGH_SECONDS, "ejected")
            rejected = fleet.matchmaker.explain(TOPIC)["rejected"]
            made = fleet.made
            until(
                lambda: fleet.made >= made + 50 and not fleet.in_flight(bad),
                ENOUGH_SECONDS,
                "what was on its way has ended",
            )
            sent, made, began = len(bad.requests), fleet.made, time.monotonic()
            until(lambda: fleet.made >= made + 200, ENOUGH_SECONDS, "200 more")
        assert rejected == {str(bad.host): "ejected, as it failed too often: avoided by pick"}
        assert len(bad.requests) == sent
        assert all(server.requests for server in good)
        assert not any(call.host is None for call in fleet.calls if call.at >= began)


def test_never_more_than_the_cap_is_ejected() -> None:
    """Four of ten hosts fail: two are ejected, a fifth of them, and never a third one."""
    with Fleet(
        10, quarantine_seconds=0, quarantine_max_seconds=600, ejection_failure_rate=0.2
    ) as fleet:
        for server in fleet.servers[:4]:
            server.fails = 0.5
        with fleet.called(PER_SECOND, attempts=1):
            until(
                lambda: fleet.matchmaker.status()["ejections"] == 2, ENOUGH_SECONDS, "two ejected"
            )
            fleet.watch(3)
        assert fleet.most_ejected == 2
        assert fleet.matchmaker.status()["ejections"] == 2
        assert all(server.requests for server in fleet.servers)


def test_retries_do_not_melt_a_sick_service() -> None:
    """All hosts fail half of their calls: what is sent stays below 1.25 times what is called."""
    # Without the floor, which is more for each call where a busy machine makes few a second.
    with Fleet(3, retry_floor_per_second=0) as fleet:
        for server in fleet.servers:
            server.fails = 0.5
        with fleet.called(PER_SECOND):
            until(lambda: fleet.made >= 600, ENOUGH_SECONDS, "600 calls")
        assert 1.1 < fleet.sent / fleet.made < 1.25


def test_without_a_budget_a_sick_service_gets_many_more() -> None:
    """The same with a budget that refuses nothing: more than one and a half times as many."""
    with Fleet(3, retry_fraction=1, retry_floor_per_second=1000) as fleet:
        for server in fleet.servers:
            server.fails = 0.5
        with fleet.called(PER_SECOND):
            until(lambda: fleet.made >= 300, ENOUGH_SECONDS, "300 calls")
        assert fleet.sent / fleet.made > 1.5
