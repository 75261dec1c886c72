"""The rules of balancing: how busy and how sound a host is, what its share is, when to retry.

Pure: time is handed in.  Each rule is one that a known balancer has; its source is named.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Sequence

from ..model import Host, Instance

DECAY_SECONDS = 10.0
"""Latency that was not measured again is worth 1/e of itself after so long (Finagle's and
linkerd's peak EWMA), so that a host which was slow once is tried again."""
WINDOW_SECONDS = 10.0
"""Calls, retries and failures count for about so long (Finagle's retry budget, Envoy's outlier
detection)."""
SMALLEST_SLOW_START = 0.1
"""The share that a new host begins with (Envoy's min_weight_percent)."""
OVERPROVISIONING = 1.4
"""A zone that has 1 / 1.4 of the hosts that its callers need still keeps all their calls (Envoy's
overprovisioning factor)."""
SMALLEST_WEIGHT = 0.001
"""Weight 0 means "only a very small chance" where others have more (RFC 2782)."""
MIN_CALLS_TO_EJECT = 20
"""Fewer calls in the window say too little of a host to eject it."""


class Fading:
    """A sum of what was added, each worth 1/e after the window: about the sum of that window."""

    __slots__ = ("_at", "_sum", "_window_seconds")

    def __init__(self, window_seconds: float = WINDOW_SECONDS) -> None:
        self._sum = self._at = 0.0
        self._window_seconds = window_seconds

    def value(self, now: float) -> float:
        """What it is worth *now*."""
        if self._sum and now > self._at:
            self._sum *= math.exp((self._at - now) / self._window_seconds)
        self._at = max(self._at, now)
        return self._sum

    def add(self, amount: float, now: float) -> None:
        """Count *amount* more."""
        self._sum = self.value(now) + amount


class Latency:
    """A host's latency as peak EWMA: a slow answer counts at once, a quick one by and by."""

    __slots__ = ("_at", "_seconds")

    def __init__(self) -> None:
        self._seconds, self._at = 0.0, -math.inf

    @property
    def is_known(self) -> bool:
        """Whether it was ever measured."""
        return self._at > -math.inf

    def seconds(self, now: float, *, is_awaited: bool = False) -> float:
        """What to reckon with *now*: less and less while nobody measures; but not while an answer
        is awaited, or a host that hangs would look quicker and quicker."""
        return self._seconds if is_awaited else self._seconds * self._fading(now)

    def measured(self, seconds: float, now: float) -> None:
        """A call took *seconds*."""
        if seconds >= self.seconds(now):
            self._seconds = seconds
        else:
            kept = self._fading(now)
            self._seconds = self._seconds * kept + seconds * (1 - kept)
        self._at = max(self._at, now)

    def _fading(self, now: float) -> float:
        return math.exp(min(0.0, self._at - now) / DECAY_SECONDS) if self.is_known else 0.0


class RetryBudget:
    """How many retries a topic may have: a part of its calls, and a floor for who calls seldom.

    Both over the window, as Finagle has it: a sick service gets *fraction* more calls, not two or
    three times as many.
    """

    __slots__ = ("_calls", "_floor", "_fraction", "_retries")

    def __init__(self, fraction: float, floor_per_second: float) -> None:
        self._fraction, self._floor = fraction, floor_per_second * WINDOW_SECONDS
        self._calls, self._retries = Fading(), Fading()

    def call(self, now: float) -> None:
        """A call begins: it earns a part of a retry."""
        self._calls.add(1, now)

    def take(self, now: float) -> bool:
        """Whether there may be a retry, which is counted then."""
        if self._retries.value(now) + 1 > self._fraction * self._calls.value(now) + self._floor:
            return False
        self._retries.add(1, now)
        return True


def cost(latency: float, in_flight: int, weight: int) -> float:
    """How much a host has to do, for the lesser of two: its latency times the calls that it would
    have with this one, for each unit of weight (peak EWMA of Finagle; Mitzenmacher, 2001)."""
    return latency * (in_flight + 1) / positive(weight)


def positive(weight: int) -> float:
    """What *weight* stands for in a quotient."""
    return weight or SMALLEST_WEIGHT


def slow_start(age_seconds: float, window_seconds: float) -> float:
    """The part of its share that a host gets which came *age_seconds* ago."""
    if age_seconds >= window_seconds:
        return 1.0
    return max(SMALLEST_SLOW_START, age_seconds / window_seconds)


def local_share(local: float, everywhere: float, zones: int) -> float:
    """The part of the calls that stays in the caller's zone; the others spill over.

    *local* and *everywhere* are the weights of usable hosts.  Callers are taken to be as many in
    each of *zones*: a zone needs 1 / *zones* of all hosts, and bears `OVERPROVISIONING` times what
    its own are meant for.
    """
    return min(1.0, OVERPROVISIONING * zones * local / everywhere)


def may_eject(ejected: int, hosts: int, max_fraction: float) -> bool:
    """Whether one more of *hosts* may be ejected: never the last one, one of two or more at least,
    and else no more than *max_fraction* (Envoy, gRPC's A50)."""
    return hosts > 1 and ejected + 1 <= max(1, int(max_fraction * hosts))


def is_failing(failures: float, calls: float, failure_rate: float) -> bool:
    """Whether so many failures of so many calls are too many."""
    return calls >= MIN_CALLS_TO_EJECT and failures >= failure_rate * calls


def subset(choices: Sequence[Instance], size: int, client: str) -> tuple[Instance, ...]:
    """The *size* instances for *client* to use, in the order of *choices*.

    By rendezvous: one that leaves is replaced by one other, and one that comes takes the place of
    one or of none; all clients together use all hosts about alike.
    """
    if len(choices) <= size:
        return tuple(choices)
    name = client.encode("utf-8", "surrogatepass")
    drawn = sorted(choices, key=lambda one: draw(name, one.host), reverse=True)[:size]
    kept = {one.host for one in drawn}
    return tuple(one for one in choices if one.host in kept)


def draw(key: bytes, host: Host) -> float:
    """A number between 0 and 1, never either, that *host* draws for *key*: the same everywhere."""
    # Not hash(): that differs from process to process.
    name = str(host).encode("utf-8", "surrogatepass")
    digest = hashlib.blake2b(key, digest_size=8, key=hashlib.blake2b(name).digest()).digest()
    return (int.from_bytes(digest, "big") + 0.5) / 2**64


def newcomers(
    hosts: Iterable[Host], known: dict[Host, float] | None, now: float
) -> dict[Host, float]:
    """Since when each of *hosts* is known; for ever those of the first answer (*known* is None),
    as all of them may be as new."""
    if known is None:
        return dict.fromkeys(hosts, -math.inf)
    return {host: known.get(host, now) for host in hosts}
