"""Which registrations are wanted, which ones Consul shows, and which of those differ.

Pure, as the `Reconciler` that keeps it.
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections import OrderedDict
from collections.abc import Collection
from dataclasses import dataclass

from ..errors import Denied, MatchmakerError
from ..model import Registration, ServiceOptions


@dataclass(slots=True)
class Trouble:
    """Failures in a row of one thing, and when to try it again."""

    error: MatchmakerError
    since: float
    failures: int = 0
    retry_at: float = 0.0
    is_told: bool = False  # whether a note speaks of it already
    is_overdue: bool = False  # of a lease: whether its whole TTL has passed meanwhile

    @property
    def is_refusal(self) -> bool:
        """Whether Consul answered, and refused."""
        return isinstance(self.error, Denied)


class Differences:
    """What is wanted, what Consul shows of it, and the next registration that differs.

    The differences are kept up with every change, and what failed rests on a heap until it is
    tried again, so that the next one is found without a search.
    """

    def __init__(self) -> None:
        self.wanted: dict[Registration, Registration] = {}  # a set that keeps its order
        self.published: set[Registration] = set()
        """What Consul confirmed."""
        self.maybe_published: set[Registration] = set()
        """What Consul may show: more, where a publish, withdraw or release was not answered."""
        self._shown_as: dict[Registration, ServiceOptions] = {}
        """With which options it was published."""
        self._again: set[Registration] = set()
        """Those that are to be published whatever is known of them."""
        self.troubles: dict[Registration, Trouble] = {}
        # Ordered ones, because the first of a plain dict is searched for behind what has left it.
        self._to_withdraw: OrderedDict[Registration, None] = OrderedDict()
        self._to_publish: OrderedDict[Registration, None] = OrderedDict()
        self._resting: list[tuple[float, int, Registration]] = []
        self._rests = itertools.count()

    def want(self, registration: Registration, now: float) -> None:
        """It should be visible, as a service with these options."""
        self.wanted.pop(registration, None)  # one with other options looks the same
        self.wanted[registration] = registration
        self._compare(registration, now)

    def want_again(self, registration: Registration, now: float) -> None:
        """It is to be published, whatever is known of it."""
        self._again.add(registration)
        self._compare(registration, now)

    def unwant(self, registration: Registration, now: float) -> None:
        """It should not be visible."""
        self.wanted.pop(registration, None)
        self._compare(registration, now)

    def is_missing(self, registration: Registration) -> bool:
        """Whether it is wanted, and not known to be visible as it is wanted."""
        wanted = self.wanted.get(registration)
        if wanted is None:
            return False
        if registration not in self.published or registration in self._again:
            return True
        return self._shown_as.get(registration, wanted.service) != wanted.service

    def publishing(self, registration: Registration) -> None:
        """It is about to be published: until that is confirmed, nobody may rely on it."""
        self.maybe_published.add(registration)
        self.published.discard(registration)
        self._again.discard(registration)

    def changed(
        self, registration: Registration, now: float, *, is_published: bool
    ) -> Trouble | None:
        """It was published, or withdrawn; return what trouble that ends."""
        trouble = self.troubles.pop(registration, None)
        if is_published:
            self.published.add(registration)
            self._shown_as[registration] = registration.service
        else:
            self.maybe_published.discard(registration)
            self._shown_as.pop(registration, None)
            self._again.discard(registration)
        self._compare(registration, now)
        return trouble

    def not_changed(self, registration: Registration, trouble: Trouble, now: float) -> None:
        """Publishing or withdrawing it failed: it rests until it is to be tried again."""
        self.troubles[registration] = trouble
        self._compare(registration, now)
        heapq.heappush(self._resting, (trouble.retry_at, next(self._rests), registration))

    def found(
        self, held: Collection[Registration], unchecked: Collection[Registration], now: float
    ) -> tuple[list[Registration], set[Registration]]:
        """Consul holds exactly *held*, and perhaps *unchecked*.

        Return what was published and wanted and is gone, and what is there though nobody wants it.
        """
        held = set(held)
        # A check that was not made proves nothing: what was known before stays known.
        gone = self.published.difference(unchecked, held)
        strays = held.difference(self.maybe_published, self.wanted)
        self.published = held | self.published.intersection(unchecked)
        self.maybe_published = held | self.maybe_published.intersection(unchecked)
        for each in self._shown_as.keys() - self.maybe_published:
            del self._shown_as[each]
        self._again &= self.maybe_published
        for each in [each for each in self.troubles if each not in unchecked]:
            if (each in held) == (each in self.wanted):
                del self.troubles[each]
        self._compare_all(now)
        return [each for each in self.wanted if each in gone], strays

    def clear(self, now: float) -> None:
        """The lease is gone, and all that was published under it."""
        self.published.clear()
        self.maybe_published.clear()
        self._shown_as.clear()
        self._again.clear()
        self.troubles.clear()
        self._resting.clear()
        self._compare_all(now)

    def next_due(self, now: float) -> tuple[Registration, bool] | None:
        """The first one that differs and does not rest, and whether it is to be published.

        Withdrawals come first, since a host that is shown without serving is worse than one that
        serves without being shown."""
        while self._resting and self._resting[0][0] <= now:
            self._compare(heapq.heappop(self._resting)[2], now)
        for registration in self._to_withdraw:
            return registration, False
        for registration in self._to_publish:
            return self.wanted[registration], True
        return None

    @property
    def rests_until(self) -> float:
        """When something that rests is to be tried again; infinite when nothing rests."""
        return self._resting[0][0] if self._resting else math.inf

    def _compare(self, registration: Registration, now: float) -> None:
        """Note what is to be done about *registration*: call it after anything of it changed."""
        trouble = self.troubles.get(registration)
        is_due = trouble is None or trouble.retry_at <= now
        is_stray = registration not in self.wanted and registration in self.maybe_published
        _include(self._to_withdraw, registration, is_due and is_stray)
        _include(self._to_publish, registration, is_due and self.is_missing(registration))

    def _compare_all(self, now: float) -> None:
        self._to_withdraw.clear()
        self._to_publish.clear()
        for registration in [*self.maybe_published, *self.wanted]:
            self._compare(registration, now)


def _include(
    queue: OrderedDict[Registration, None], registration: Registration, belongs: bool
) -> None:
    if belongs:
        queue[registration] = None
    else:
        queue.pop(registration, None)
