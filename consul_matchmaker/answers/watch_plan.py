"""Decide which blocking queries run: one for each topic in use, or one for all of them.

The rules:

- With at most ``max_watches`` topics in use each has a query of its own folder, so that changes of
  other topics cost nothing.  With more, one query of the whole prefix serves all of them.
- From the prefix back to folders only when the topics have been few enough for `FIT_SECONDS`.
- Where the prefix cannot be watched (too large to be read, or the token may not read all of it),
  as many topics as may have a query of their own keep it, the others are asked for one by one, and
  the prefix is tried again after `RETRY_SECONDS`, doubling up to `MAX_RETRY_SECONDS`.
- When an agent has too many connections (status 429), half of the queries go; one may come back
  after each `RELIEF_SECONDS` without that.
- A folder's query that is not wanted any more ends at once: nobody asks for its topic, or it was
  one too many.  What the other plan left ends when all that replaces it has answered, or earlier
  where there may not be so many at once: the topics are then asked for one by one meanwhile.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, replace

FIT_SECONDS = 30.0
"""A change of plan lists what it watches once more; a topic that is asked for each 70 s, say, comes
into use and leaves it again and again."""
RETRY_SECONDS = 120.0
"""At the most that is read of an answer, 64 MiB, that is half of what a watch may receive."""
MAX_RETRY_SECONDS = 3600.0
RELIEF_SECONDS = 60.0

Watched = str | None
"""A topic, whose folder is watched; None: the whole prefix."""
PREFIX: Watched = None


@dataclass(frozen=True, slots=True)
class WatchPlan:
    """What should be watched.  Immutable: each event gives the next plan."""

    max_watches: int
    can_watch_all: bool = True
    """Whether one query can tell of all topics; else those beyond `max_watches` are not watched."""
    folders: tuple[str, ...] = ()
    """Topics that have a query of their own, unless `is_prefix`."""
    is_prefix: bool = False
    """Whether one query of the whole prefix serves all topics."""
    fits_since: float | None = None
    """Since when the topics in use are few enough for queries of their own."""
    tried_again_at: float = -math.inf
    """Until then the prefix is not watched."""
    retry_seconds: float = RETRY_SECONDS
    """How long it is not, when it cannot be watched the next time."""
    allowed: float = math.inf
    """How many queries may run since an agent had too many connections."""
    relief_at: float = math.inf
    """When one more may run."""

    @property
    def wanted(self) -> tuple[Watched, ...]:
        """What should be watched, each by a query of its own."""
        return (PREFIX,) if self.is_prefix else self.folders

    @property
    def slots(self) -> int:
        """How many queries may run at once, also while the plan changes."""
        return max(1, int(min(self.max_watches, self.allowed)))

    def planned(self, topics: Sequence[str], now: float) -> WatchPlan:
        """The plan for *topics*, which are in use at *now*."""
        plan = self._relieved(now)
        fits_since = None
        if len(topics) <= plan.max_watches:
            fits_since = now if plan.fits_since is None else plan.fits_since
        is_many = fits_since is None or (plan.is_prefix and now < fits_since + FIT_SECONDS)
        if topics and is_many and plan.can_watch_all and now >= plan.tried_again_at:
            return replace(plan, is_prefix=True, fits_since=fits_since)
        in_use, most = set(topics), min(plan.max_watches, plan.slots)
        kept = [topic for topic in plan.folders if topic in in_use]
        in_use.difference_update(kept)
        others = [topic for topic in topics if topic in in_use]
        return replace(plan, is_prefix=False, folders=tuple([*kept, *others][:most]))

    def overloaded(self, now: float) -> WatchPlan:
        """After an agent had too many connections."""
        return replace(self, allowed=max(1, self.slots / 2), relief_at=now + RELIEF_SECONDS)

    def refused(self, now: float) -> WatchPlan:
        """After the prefix could not be watched."""
        pause = self.retry_seconds
        doubled = min(MAX_RETRY_SECONDS, 2 * pause)
        return replace(self, tried_again_at=now + pause, retry_seconds=doubled)

    def accepted(self) -> WatchPlan:
        """After the prefix was watched: the next refusal is the first again."""
        return replace(self, retry_seconds=RETRY_SECONDS)

    def next_at(self, now: float) -> float:
        """When another plan may be due although nothing else happens."""
        times = [self.tried_again_at, self.relief_at]
        if self.is_prefix and self.fits_since is not None:
            times.append(self.fits_since + FIT_SECONDS)
        return min((time for time in times if time > now), default=math.inf)

    def steps(
        self, running: Mapping[Watched, bool], ending: int = 0
    ) -> tuple[Set[Watched], Sequence[Watched]]:
        """What to end and what to start now.

        *running* has what is watched, and whether its last poll was answered; *ending* is how many
        others still take a slot.
        """
        wanted = self.wanted
        is_replaced = all(running.get(each) for each in wanted)
        unwanted = [each for each in running if each not in wanted]
        end = {
            each
            for each in unwanted
            if is_replaced or not running[each] or not (each is PREFIX or self.is_prefix)
        }
        missing = [each for each in wanted if each not in running]
        free = self.slots - ending - len(running)
        if missing and free <= 0 and not end and not ending:
            end = set(unwanted[:1])
        return end, missing[: max(0, free)]

    def _relieved(self, now: float) -> WatchPlan:
        if now < self.relief_at:
            return self
        return replace(self, allowed=self.allowed + 1, relief_at=now + RELIEF_SECONDS)
