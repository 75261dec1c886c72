"""Which hosts were found to fail, and are avoided for a while.

Pure: time and chance are handed in, nothing here asks Consul.
"""

from __future__ import annotations

import math
import random
import threading
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

from ..backoff import Backoff
from ..model import Host
from ..settings import Settings
from .balance import may_eject

QUARANTINE_SPREAD = 0.2
"""A quarantine is up to this part shorter, at random: processes that met the same failure together
must not come back together."""
LARGE_POOL = 10
"""From so many hosts on, ``panic_fraction`` counts: there the load of the many rejected ones would
fall on few; in a smaller pool the hosts that are left can bear it, and a try at a rejected host is
likely to fail."""


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
        self._max_seconds = settings.quarantine_max_seconds
        self._max_ejected = settings.ejection_max_fraction
        self._records: dict[str, dict[Host, _Record]] = {} if before is None else before._records
        self._lock = threading.Lock()
        self.begun = self.ejections = 0  # since the start

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

    def eject(self, topic: str, host: Host, hosts: Collection[Host]) -> bool:
        """Avoid *host*, one of *hosts*, for long; False, with nothing done, when it is ejected, or
        too many are."""
        with self._lock:
            now = self._clock()
            records = self._records.get(topic, {})
            ejected = {one for one, each in records.items() if each.is_ejected(now)}
            count = len(ejected.intersection(hosts))
            if host in ejected or not may_eject(count, len(hosts), self._max_ejected):
                return False
            self.ejections += 1
            record = self._records.setdefault(topic, {}).setdefault(host, _Record())
            spread = 1 - QUARANTINE_SPREAD * self._jitter()
            record.seconds = self._max_seconds * spread
            record.until = record.ejected_until = now + record.seconds
            record.trial_until = None
            return True

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
        told = dict.fromkeys(self.status().get(topic, []), what)
        with self._lock:
            for host, record in self._records.get(topic, {}).items():
                if record.is_ejected(self._clock()):
                    told[str(host)] = f"ejected, as it failed too often: {what}"
        return told

    def _drop_old(self, now: float) -> None:
        for topic in list(self._records):
            for host, record in list(self._records[topic].items()):
                if now >= max(record.until, record.trial_until or 0.0) + self._max_seconds:
                    self._forgive(topic, host)

    def _forgive(self, topic: str, host: Host) -> None:
        records = self._records.get(topic, {})
        record = records.get(host)
        if record is None or record.is_ejected(self._clock()):
            return
        del records[host]
        if not records:
            del self._records[topic]


@dataclass(slots=True)
class _Record:
    rejections: int = 0
    seconds: float = 0.0
    until: float = -math.inf  # quarantined until
    trial_until: float | None = None  # one caller tries it, the others wait until then
    ejected_until: float = -math.inf

    def is_avoided(self, now: float) -> bool:
        return now < self.until or (self.trial_until is not None and now < self.trial_until)

    def is_ejected(self, now: float) -> bool:
        return now < self.ejected_until
