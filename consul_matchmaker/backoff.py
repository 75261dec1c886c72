"""How long to wait after the n-th failure in a row.

"Full jitter": a uniformly random wait between nothing and a bound that doubles with every failure
up to a roof.  Of the variants compared in M. Brooker, "Exponential Backoff And Jitter" (AWS
Architecture Blog, 2015) it needs the fewest calls to get many contenders through, and unlike
"decorrelated jitter" it remembers nothing: the count of failures says all.  Clients that fail
together (their Consul agent restarts, the leader dies) so come back spread over the whole roof.
"""

from __future__ import annotations

import random
from collections.abc import Callable

_MOST_DOUBLINGS = 64  # more would only overflow a float; no roof is that high


class Backoff:
    """Waits of at most *first_seconds*, doubling to at most *max_seconds*, each one jittered.

    *jitter* returns a number from 0 (included) to 1 (excluded).  Has no state: thread-safe.
    """

    def __init__(
        self,
        first_seconds: float,
        max_seconds: float,
        jitter: Callable[[], float] = random.random,
    ) -> None:
        self.max_seconds = max_seconds
        self.first_seconds = min(first_seconds, max_seconds)
        self._jitter = jitter

    def bound_seconds(self, failures: int) -> float:
        """The longest wait after *failures* failures in a row; 0 after none."""
        if failures <= 0:
            return 0.0
        return min(self.max_seconds, self.first_seconds * 2.0 ** min(failures - 1, _MOST_DOUBLINGS))

    def seconds(self, failures: int) -> float:
        """The wait after *failures* failures in a row, drawn anew at each call; 0 after none."""
        return self.bound_seconds(failures) * self._jitter()

    def __repr__(self) -> str:
        return f"<Backoff {self.first_seconds:g}s doubling to {self.max_seconds:g}s>"
