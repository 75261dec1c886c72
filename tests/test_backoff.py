"""Tests of backoff: bounds, doubling, jitter."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from consul_matchmaker.backoff import Backoff

seconds = st.floats(0.001, 1e6)
counts = st.integers(-3, 10**9)
randomness = st.floats(0, 1, exclude_max=True)


def test_no_failure_means_no_wait() -> None:
    """After 0 failures nobody waits, whatever the randomness says."""
    assert Backoff(1.0, 10.0, lambda: 0.99).seconds(0) == 0.0


def test_the_bound_doubles_up_to_the_roof() -> None:
    """0.5, 1, 2, 4 and then the roof for ever."""
    backoff = Backoff(0.5, 5.0, lambda: 0.0)
    assert [backoff.bound_seconds(n) for n in (1, 2, 3, 4, 5, 6, 10_000)] == [
        0.5, 1.0, 2.0, 4.0, 5.0, 5.0, 5.0,
    ]  # fmt: skip


def test_a_first_wait_above_the_roof_is_cut_to_the_roof() -> None:
    """The roof wins over the first wait."""
    assert Backoff(8.0, 2.0, lambda: 0.5).seconds(1) == 1.0


@given(seconds, seconds, counts, randomness)
def test_every_wait_is_within_its_bound(
    first: float, most: float, failures: int, drawn: float
) -> None:
    """A wait is never negative, never above the roof, and any number of failures is fine."""
    wait = Backoff(first, most, lambda: drawn).seconds(failures)
    assert 0.0 <= wait <= most


def test_clients_that_fail_together_come_back_spread_over_the_whole_roof() -> None:
    """1,000 clients after many failures: no tenth of the roof sees more than 1 in 5 of them."""
    backoff = Backoff(0.5, 10.0)
    waits = [backoff.seconds(9) for _ in range(1000)]
    buckets = [sum(tenth <= wait < tenth + 1 for wait in waits) for tenth in range(10)]
    assert max(buckets) < 200
    assert min(buckets) > 20


def test_its_repr_says_what_it_does() -> None:
    """The repr is readable in a log."""
    assert repr(Backoff(0.5, 5.0)) == "<Backoff 0.5s doubling to 5s>"
