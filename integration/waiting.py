"""Wait for a condition, with a deadline and a name; never for a time."""

import threading
import time
from collections.abc import Callable

import pytest

POLL_SECONDS = 0.02


def until(
    claim: Callable[[], object], timeout_seconds: float, what: str = "what was asked"
) -> float:
    """Wait until *claim* is true; return how long that took.

    Fails when it was not true after the timeout: a machine that stops while we wait is no failure.
    """
    began = time.monotonic()
    while True:
        looked_after = time.monotonic() - began
        if claim():
            return looked_after
        if looked_after > timeout_seconds:
            pytest.fail(f"not within {timeout_seconds:g} s: {what}")
        time.sleep(POLL_SECONDS)


def threads_since(before: set[threading.Thread]) -> list[str]:
    """The names of our threads that run now and did not then."""
    names = [thread.name for thread in set(threading.enumerate()) - before]
    return [name for name in names if name.startswith("consul-matchmaker")]
