"""Which host of a snapshot to use: by preference and weight, in turn, or by key; never a bad one.

Pure: time and chance are handed in, nothing here asks Consul.
"""

from __future__ import annotations

import bisect
import hashlib
import itertools
import math
import random
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

from ..backoff import Backoff
from ..model import Host, Instance, Snapshot
from ..settings import Settings

MAX_TURNS = 10_000
"""Round robins remembered; beyond that all begin anew, each at a random host."""
QUARANTINE_SPREAD = 0.2
"""A quarantine is up to this part shorter, at random: processes that met the same failure together
must not come back together."""
_NONE_AVOIDED: frozenset[Host] = frozenset()
LARGE_POOL = 10
"""From so many hosts on, ``panic_fraction`` counts: there the load of the many rejected ones would
fall on few; in a smaller pool the hosts that are left can bear it, and a try at a rejected host is
likely to fail."""
SMALLEST_WEIGHT = 0.001
"""Weight 0 means "only a very small chance" where others have more (RFC 2782)."""


class Quarantine:
    """Hosts that callers rejected, each with its topic.  Thread-safe.

    A rejection avoids the host for ``quarantine_seconds``; each further one that follows a trial
    doubles that, up to ``quarantine_max_seconds``.  When it ends, one caller is sent there as a
    trial and the others still are not, until it is acknowledged, or was not rejected for as long
    as the quarantine had been (so callers who never acknowledge are not cut off for ever).
    """

    def __init__(
        self,
        settings: Settings,
        *,
        clock: Callable[[], float] = time.monotonic,
        jitter: Callable[[], float] = random.random,
        before: Quarantine | None = None,
    ) -> None:
        """*before*: in a forked child, its parent's; what was learnt of the hosts stays true."""
        self._backoff = Backoff(settings.quarantine_seconds, settings.quarantine_max_seconds)
        self._clock = clock
        self._jitter = jitter
        self._panic_fraction = settings.panic_fraction
        self._memory_seconds = settings.quarantine_max_seconds
        self._records: dict[str, dict[Host, _Record]] = {} if before is None else before._records
        self._lock = threading.Lock()
        self.begun = 0  # quarantines, since the start

    def reject(self, topic: str, host: Host) -> None:
        """It failed.  Rejections during a quarantine are the same failure seen by others."""
        with self._lock:
            now = self._clock()
            self._drop_old(now)
            record = self._records.setdefault(topic, {}).setdefault(host, _Record())
            if now < record.until:
                return
            self.begun += 1
            record.rejections += 1
            spread = 1 - QUARANTINE_SPREAD * self._jitter()
            record.seconds = self._backoff.bound_seconds(record.rejections) * spread
            record.until = now + record.seconds
            record.trial_until = None

    def acknowledge(self, topic: str, host: Host) -> None:
        """It answered: nothing is held against it any more."""
        if topic not in self._records:  # almost always: the lock is not needed
            return
        with self._lock:
            self._forgive(topic, host)

    def avoided(self, topic: str, hosts: Sequence[Host]) -> frozenset[Host] | None:
        """Which of *hosts* not to use now.

        None when rejections do not matter: there are none; or all hosts are rejected; or, of
        `LARGE_POOL` hosts or more, ``panic_fraction`` or more are, for then the fault is more
        likely ours, or everywhere, and the few that are left would be overloaded.
        """
        if topic not in self._records:
            return None
        with self._lock:
            now = self._clock()
            records = self._records.get(topic, {})
            bad = frozenset(
                host for host in hosts if host in records and records[host].is_avoided(now)
            )
        is_panic = bad and (
            len(bad) == len(hosts)
            or (len(hosts) >= LARGE_POOL and len(bad) >= self._panic_fraction * len(hosts))
        )
        return None if is_panic else bad

    def begin_trial(self, topic: str, host: Host) -> bool:
        """Whether the caller may use *host*: False when another caller is trying it just now."""
        with self._lock:
            now = self._clock()
            record = self._records.get(topic, {}).get(host)
            if record is None:
                return True
            if record.is_avoided(now):
                return False
            if record.trial_until is None:
                record.trial_until = now + record.seconds
            return True

    def status(self) -> dict[str, list[str]]:
        """The hosts that are avoided now, by topic."""
        with self._lock:
            now = self._clock()
            bad = {
                topic: sorted(str(host) for host, one in records.items() if one.is_avoided(now))
                for topic, records in self._records.items()
            }
        return {topic: hosts for topic, hosts in bad.items() if hosts}

    def explain(self, topic: str, hosts: Sequence[Host]) -> dict[str, str]:
        """The rejected hosts of *topic*, and whether that counts: not if too few of *hosts* would
        be left."""
        is_heeded = topic not in self._records or self.avoided(topic, hosts) is not None
        what = "avoided by pick" if is_heeded else "used all the same: too many are rejected"
        return dict.fromkeys(self.status().get(topic, []), what)

    def _drop_old(self, now: float) -> None:
        for topic in list(self._records):
            for host, record in list(self._records[topic].items()):
                if now >= max(record.until, record.trial_until or 0.0) + self._memory_seconds:
                    self._forgive(topic, host)

    def _forgive(self, topic: str, host: Host) -> None:
        records = self._records.get(topic, {})
        records.pop(host, None)
        if not records:
            self._records.pop(topic, None)


@dataclass(slots=True)
class _Record:
    rejections: int = 0
    seconds: float = 0.0
    until: float = -math.inf  # quarantined until
    trial_until: float | None = None  # one caller tries it, the others wait until then

    def is_avoided(self, now: float) -> bool:
        return now < self.until or (self.trial_until is not None and now < self.trial_until)


class Selector:
    """Picks one host of a snapshot.  Thread-safe.

    Where instances differ in priority or weight, as RFC 2782 says: of the lowest priority number,
    at random by weight.  Else in turn, beginning at a random host, in an order that stays fair
    when hosts come and go.  With a key: by rendezvous hashing, so that when a host leaves only its
    own keys move.
    """

    def __init__(self, quarantine: Quarantine, *, chance: random.Random | None = None) -> None:
        self._quarantine = quarantine
        self._chance = chance or random.Random()
        self._turns: dict[tuple[str, str | None], _Turn] = {}
        self._lock = threading.Lock()

    def pick(
        self, snapshot: Snapshot, *, server: str | None = None, key: str | bytes | None = None
    ) -> Host | None:
        """One host, or None when the snapshot has none.  *server* only names the round robin."""
        hosts = snapshot.hosts
        if not hosts:
            return None
        topic = snapshot.topic
        avoided = self._quarantine.avoided(topic, hosts)
        if avoided is None:
            return self._pick(snapshot, server, key, _NONE_AVOIDED)
        while True:
            host = self._pick(snapshot, server, key, avoided)
            if host in avoided or self._quarantine.begin_trial(topic, host):
                return host
            avoided |= {host}  # another thread rejected or tries this very host since we looked

    def _pick(
        self,
        snapshot: Snapshot,
        server: str | None,
        key: str | bytes | None,
        avoided: frozenset[Host],
    ) -> Host:
        name = snapshot.topic, server
        turn = self._turns.get(name)
        if turn is None or turn.instances is not snapshot.instances or turn.avoided != avoided:
            turn = self._next_turn(name, snapshot, avoided)
        if key is not None:
            return by_key(turn.choices, key)
        if turn.weights is None:
            return turn.hosts[next(turn.counter) % len(turn.hosts)]
        return turn.by_weight(self._chance)

    def _next_turn(
        self,
        name: tuple[str, str | None],
        snapshot: Snapshot,
        avoided: frozenset[Host],
    ) -> _Turn:
        turn = _Turn(snapshot, avoided, preferred(snapshot.instances, avoided))
        with self._lock:
            last = self._turns.get(name)
            if (
                last is not None
                and last.instances is snapshot.instances
                and last.avoided == avoided
            ):
                return last  # another thread was faster
            if last is None:
                start = self._chance.randrange(len(turn.hosts))
            else:  # go on with the host whose turn it would have been, or the next one still there
                due = last.hosts[next(last.counter) % len(last.hosts)]
                start = bisect.bisect_left(turn.hosts, due)
            turn.counter = itertools.count(start)
            if len(self._turns) >= MAX_TURNS:
                self._turns.clear()
            self._turns[name] = turn
        return turn


class _Turn:
    """Where the round robin of one answer stands; its counter needs no lock."""

    __slots__ = ("avoided", "choices", "counter", "hosts", "instances", "weights")

    def __init__(
        self, snapshot: Snapshot, avoided: frozenset[Host], choices: Sequence[Instance]
    ) -> None:
        self.instances = snapshot.instances  # the same as long as nothing changes
        self.avoided = avoided
        self.choices = choices
        self.hosts = tuple(instance.host for instance in choices)
        self.counter: Iterator[int] = itertools.count()
        self.weights = cumulated(instance.weight for instance in choices)

    def by_weight(self, chance: random.Random) -> Host:
        assert self.weights is not None
        point = chance.random() * self.weights[-1]
        return self.hosts[bisect.bisect_right(self.weights, point)]


def preferred(instances: Iterable[Instance], avoided: frozenset[Host]) -> tuple[Instance, ...]:
    """The instances to choose from, one a host, sorted by host: those of the lowest priority number
    that are not avoided; those of the lowest at all when every one is avoided."""
    instances = tuple(instances)
    usable = [one for one in instances if one.host not in avoided] or instances
    lowest = min(one.priority for one in usable)
    by_host: dict[Host, Instance] = {}
    for one in usable:
        known = by_host.get(one.host)
        if one.priority == lowest and (known is None or one.weight > known.weight):
            by_host[one.host] = one
    return tuple(by_host[host] for host in sorted(by_host))


def cumulated(weights: Iterable[int]) -> tuple[float, ...] | None:
    """The running sums of *weights*, or None when all are the same and turns are fairer."""
    weights = tuple(weights)
    if len(set(weights)) == 1:
        return None
    return tuple(itertools.accumulate(weight or SMALLEST_WEIGHT for weight in weights))


def by_key(choices: Sequence[Instance], key: str | bytes) -> Host:
    """The host of *key*: the same in every process, and weighted.

    Rendezvous hashing (Thaler and Ravishankar, 1998), weighted by -weight / ln(hash) (Schindelhauer
    and Schomaker, 2005): every host draws a number from the key, the highest wins, so a host that
    leaves or comes moves no key between others.
    """
    raw = key.encode("utf-8", "surrogatepass") if isinstance(key, str) else key
    best = max(choices, key=lambda one: (_draw(raw, one), one.host.address, one.host.port or 0))
    return best.host


def _draw(key: bytes, instance: Instance) -> float:
    # Not hash(): that differs from process to process.
    name = str(instance.host).encode("utf-8", "surrogatepass")
    digest = hashlib.blake2b(key, digest_size=8, key=hashlib.blake2b(name).digest()).digest()
    part = (int.from_bytes(digest, "big") + 0.5) / 2**64  # between 0 and 1, never either
    return -(instance.weight or SMALLEST_WEIGHT) / math.log(part)
