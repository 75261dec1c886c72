"""The counters of a transport: nothing is lost between threads, a forked child begins anew."""

from __future__ import annotations

from consul_matchmaker.backends.traffic import Traffic

from .doubles import DEADLINE_SECONDS, NO_TRAFFIC, in_thread


def test_threads_lose_nothing() -> None:
    """Eight that count at the same time: every increment is in the sum."""
    traffic = Traffic()

    def count() -> None:
        for _ in range(5_000):
            traffic.add(queries=1, sent_bytes=40)

    for each in [in_thread(count) for _ in range(8)]:
        each.result(DEADLINE_SECONDS)
    assert traffic.counts() == {**NO_TRAFFIC, "queries": 40_000, "sent_bytes": 1_600_000}
