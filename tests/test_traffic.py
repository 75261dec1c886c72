"""The counters of a transport: nothing is lost between threads, a forked child begins anew."""

from __future__ import annotations

import os

import pytest

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


@pytest.mark.system
def test_a_forked_child_begins_at_0() -> None:
    """Even when another thread of its parent was just counting, with the lock in its hand."""
    traffic = Traffic()
    traffic.add(queries=3, retries=True)
    with traffic._lock:
        pid = os.fork()
        if pid == 0:
            traffic.forget()
            traffic.add(replies=1)
            os._exit(0 if traffic.counts() == {**NO_TRAFFIC, "replies": 1} else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert traffic.counts() == {**NO_TRAFFIC, "queries": 3, "retries": 1}
