"""What selection, ejection and the retry budget do to real calls: a slow, a new, a failing host.

Hosts are HTTP servers of this process (`integration.callers.fleet`), called at a steady rate.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from typing import Any

from integration.bench.kv import percentile
from integration.callers.fleet import Call, Fleet

PER_SECOND = 200.0
QUICK_SECONDS, SLOW_SECONDS = 0.002, 0.04
"""How long the two hosts of `slow` take: the one 20 times as long as the other."""
SLOW_SHARE = 0.25
SLOW_START_SECONDS = 10.0
FIRST_SECOND = 0.5
"""In its first second a new host gets at most this part of an even share."""
EVEN = 0.2
"""At most so far from an even share is a host whose slow start is over."""
FAILING = 0.3
FAILURE_RATE = 0.2
SENT = 1.25
UNBOUND = {"retry_fraction": 1, "retry_floor_per_second": 1000}
"""A budget that never refuses: as programs retry that have none."""


def milliseconds(calls: Sequence[Call]) -> str:
    taken = [call.seconds for call in calls if call.host is not None]
    return f"p50 {percentile(taken, 50) * 1e3:5.1f} p99 {percentile(taken, 99) * 1e3:5.1f} ms"


def slow(seconds: float) -> bool:
    """One of two hosts is 20 times slower: its share of the calls, and how long calls take."""
    print(
        f"\nthe slow one of two hosts takes {SLOW_SECONDS * 1e3:g} ms, not {QUICK_SECONDS * 1e3:g}"
    )
    shares: dict[str, float] = {}
    for selection in ("round_robin", "least_loaded"):
        with Fleet(2, selection=selection) as fleet:
            fleet.servers[0].seconds, fleet.servers[1].seconds = QUICK_SECONDS, SLOW_SECONDS
            with fleet.called(PER_SECOND):
                time.sleep(seconds)
            shares[selection] = fleet.share(fleet.servers[1])
            print(
                f"  {selection:13} its share {shares[selection]:6.1%} of {fleet.made} calls, "
                f"{milliseconds(fleet.calls)}, {fleet.failed} failed"
            )
    is_kept = shares["least_loaded"] < SLOW_SHARE
    print(f"  its share with least_loaded is below {SLOW_SHARE:.0%}: {said(is_kept)}")
    return is_kept


def new(hosts: int = 3) -> bool:
    """A host comes: its share by second, with a slow start and without."""
    print(f"\na host comes to {hosts - 1} others: its part of the calls in each second")
    rows: dict[float, list[float]] = {}
    seconds = int(SLOW_START_SECONDS) + 3
    for window in (0.0, SLOW_START_SECONDS):
        with Fleet(hosts - 1, slow_start_seconds=window) as fleet:
            with fleet.called(PER_SECOND):
                time.sleep(1)
                came, at = fleet.come(), time.monotonic()
                time.sleep(seconds)
            rows[window] = [fleet.share(came, at + n, at + n + 1) for n in range(seconds)]
        print(f"  slow_start_seconds={window:<4g}", *(f"{each:4.0%}" for each in rows[window]))
    even, with_it = 1 / hosts, rows[SLOW_START_SECONDS]
    begins = with_it[0] <= FIRST_SECOND * even
    ends = abs(statistics.mean(with_it[-2:]) / even - 1) <= EVEN
    print(f"  at most {FIRST_SECOND * even:.0%} in the first second: {said(begins)}")
    print(f"  within {EVEN:.0%} of {even:.0%} in the last two: {said(ends)}")
    return begins and ends


def failing(seconds: float) -> bool:
    """One of ten hosts fails 30 % of its calls: when it is ejected, and what callers see; then
    four of them do."""
    print(f"\none of ten hosts fails {FAILING:.0%} of its calls; {seconds:g} s, one attempt a call")
    ways: tuple[tuple[str, dict[str, Any]], ...] = (
        ("neither", {"quarantine_seconds": 0}),
        ("quarantine (default)", {}),
        ("ejection alone", {"quarantine_seconds": 0, "ejection_failure_rate": FAILURE_RATE}),
        ("both", {"ejection_failure_rate": FAILURE_RATE}),
    )
    # While the quarantine leaves the host few calls, chance says when they are enough to judge it.
    failed: dict[str, int] = {}
    is_kept = True
    for name, settings in ways:
        with Fleet(10, **settings) as fleet:
            bad, began = fleet.servers[0], time.monotonic()
            bad.fails = FAILING
            with fleet.called(PER_SECOND, attempts=1):
                fleet.watch(seconds)
            failed[name] = fleet.failed
            others = fleet.ejected.keys() - {str(bad.host)}
            at = fleet.ejected.get(str(bad.host))
        when = "" if at is None else f"; ejected after {at - began:.1f} s"
        print(f"  {name:21} {fleet.failed:4} of {fleet.made} calls failed{when}")
        is_kept = is_kept and not others and (at is not None or name != "ejection alone")
    is_kept = is_kept and max(failed["ejection alone"], failed["both"]) < failed["neither"]
    print(f"  it is ejected and no other one, and fewer calls fail: {said(is_kept)}")
    bad_ones = 4
    with Fleet(10, quarantine_seconds=0, ejection_failure_rate=FAILURE_RATE) as fleet:
        most = int(fleet.matchmaker.settings.ejection_max_fraction * 10)
        for server in fleet.servers[:bad_ones]:
            server.fails = FAILING
        with fleet.called(PER_SECOND, attempts=1):
            fleet.watch(seconds)
        is_capped = fleet.most_ejected == most
        print(
            f"  {bad_ones} of ten do: at most {fleet.most_ejected} were ejected at a time "
            f"(ejection_max_fraction allows {most}): {said(is_capped)}"
        )
    return is_kept and is_capped


def sick(seconds: float) -> bool:
    """All hosts fail half of the time: requests sent for each call made, with the retry budget and
    without one."""
    print("\nthree hosts that fail half of their calls; up to three attempts")
    ratios: dict[str, float] = {}
    ways: tuple[tuple[str, dict[str, Any]], ...] = (("no budget", UNBOUND), ("the budget", {}))
    for name, settings in ways:
        with Fleet(3, **settings) as fleet:
            for server in fleet.servers:
                server.fails = 0.5
            with fleet.called(PER_SECOND):
                time.sleep(seconds)
            ratios[name] = fleet.sent / fleet.made
        print(
            f"  {name:11} {fleet.sent} sent for {fleet.made} made: {ratios[name]:.2f}; "
            f"{fleet.failed / fleet.made:.0%} of the calls failed"
        )
    is_kept = ratios["the budget"] < SENT
    print(f"  below {SENT} with the budget: {said(is_kept)}")
    return is_kept


def said(is_reached: bool) -> str:
    return "reached" if is_reached else "NOT REACHED"
