"""Wait for a condition, with a deadline and a name; never for a time."""

import time
from collections.abc import Callable

import pytest

POLL_SECONDS = 0.02


def until(
    claim: Callable[[], object], timeout_seconds: float, what: str = "what was asked"
) -> float:
    """Wait until *claim* is true; return how long that took.  Fails after the timeout."""
    began = time.monotonic()
    while not claim():
        if time.monotonic() - began > timeout_seconds:
            pytest.fail(f"not within {timeout_seconds:g} s: {what}")
        time.sleep(POLL_SECONDS)
    return time.monotonic() - began
