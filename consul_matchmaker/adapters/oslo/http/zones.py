"""The hosts of a topic in several datacenters: the nearest first, the others when it has none."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection
from dataclasses import replace
from typing import Any, NamedTuple

from ....calls import Attempt
from ....errors import MatchmakerError, NoLiveHosts, Unavailable
from ....matchmaker import Matchmaker
from ....model import Host, Instance, Snapshot
from ....settings import Settings
from .names import Place

logger = logging.getLogger(__name__)

Among = Callable[[Snapshot], Snapshot]
"""What of an answer is meant."""


class Found(NamedTuple):
    """A host of a place, and who found it."""

    host: Host
    place: Place
    matchmaker: Matchmaker

    def attempt(self) -> Attempt:
        """One use of the host, which begins now."""
        return self.matchmaker.attempt(self.place.service, self.host)


def settings_by_zone(settings: Settings) -> list[Settings]:
    """Those of one Matchmaker a datacenter, in order of preference.

    One for all of them would not find a server that only a later one has, as it goes on to the next
    only where nobody serves the topic; and it would not watch.
    """
    if len(settings.datacenters) < 2 or settings.mode == "kv":
        return [settings]
    anew: dict[str, Any] = {"watch": None}  # off with several datacenters, on with one
    return [replace(settings, datacenters=(zone,), **anew) for zone in settings.datacenters]


class Zones:
    """What *matchmakers* find, one a datacenter, in order of preference.  Thread-safe."""

    def __init__(
        self,
        matchmakers: Collection[Matchmaker],
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._matchmakers, self._clock = tuple(matchmakers), clock

    def next_host(
        self,
        place: Place,
        deadline: float,
        tried: Collection[Host],
        among: Among | None = None,
    ) -> Found | None:
        """One of *place* that is not among *tried*; None where there is none.  Raises
        MatchmakerError when none is known and a datacenter could not be asked by *deadline*."""
        failures: list[MatchmakerError] = []
        for number, matchmaker in enumerate(self._matchmakers):
            try:
                left = self._share(deadline, number)
                snapshot = matchmaker.hosts(place.service, place.server, timeout_seconds=left)
                if among is not None:
                    snapshot = among(snapshot)
                host = matchmaker.picked(snapshot, place.server, exclude=tried)
                return Found(host, place, matchmaker)
            except NoLiveHosts:
                continue
            except MatchmakerError as error:
                failures.append(self._named(matchmaker, error))
        if failures:
            raise failures[0]
        return None

    def everywhere(self, place: Place, deadline: float) -> list[tuple[Found, Instance]]:
        """Every instance of *place* in each datacenter that could be asked by *deadline*.  Raises
        MatchmakerError when none could."""
        found: list[tuple[Found, Instance]] = []
        failures: list[MatchmakerError] = []
        for number, matchmaker in enumerate(self._matchmakers):
            try:
                left = self._share(deadline, number)
                snapshot = matchmaker.hosts(place.service, timeout_seconds=left)
            except MatchmakerError as error:
                failures.append(self._named(matchmaker, error))
                continue
            found += [(Found(one.host, place, matchmaker), one) for one in snapshot.instances]
        if len(failures) == len(self._matchmakers):
            raise failures[0]
        for failure in failures:
            logger.warning("%s: not every datacenter could be asked: %s", place, failure)
        return found

    def wait(self, place: Place, seconds: float, among: Among | None = None) -> None:
        """Return when the nearest has a host of *place*.  Raises MatchmakerError after *seconds*,
        and at once when Consul cannot be asked, or has others only than are meant."""
        found = self._matchmakers[0].wait_for_hosts(
            place.service, timeout_seconds=seconds, server=place.server
        )
        if among is not None and not among(found).instances:
            raise NoLiveHosts(f"{place}: there are others only")

    def _named(self, matchmaker: Matchmaker, error: MatchmakerError) -> MatchmakerError:
        """*error* with the datacenter, where there are several."""
        if len(self._matchmakers) < 2:
            return error
        return Unavailable(f"datacenter {matchmaker.settings.datacenters[0]}: {error}")

    def _share(self, deadline: float, number: int) -> float:
        """How long one may be asked: the others need time, too."""
        return max(0.001, deadline - self._clock()) / (len(self._matchmakers) - number)
