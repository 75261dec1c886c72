"""A message for every server of a topic, or for one of each pool of listeners."""

from __future__ import annotations

import functools
import logging
import threading
import time
from dataclasses import replace
from typing import Any

from ....errors import MatchmakerError
from ....model import Host, Instance, Snapshot
from ...extras import extra
from .client import Lost
from .delivery import Delivery, NoAnswer
from .messages import Request, body_of
from .names import BROADCASTER, Place, pool_of
from .zones import Found, Zones

with extra("oslo-http"):
    import oslo_messaging

logger = logging.getLogger(__name__)

DROPPED_SECONDS, MOST_DROPPED = 60.0, 1000
"""A topic of dropped notifications is warned of once in so many seconds; the last so many are
remembered."""
BROADCASTER_SECONDS = 2.0
"""A broadcaster takes a message at once, or the sender does its work."""


class Fanout:
    """Thread-safe.  *threshold*: from so many hosts on a broadcaster is asked; 0: never."""

    def __init__(self, delivery: Delivery, zones: Zones, threshold: int) -> None:
        self._delivery, self._zones, self._threshold = delivery, zones, threshold
        self._lock = threading.Lock()
        self._warned_at: dict[Place, float] = {}

    def send(self, request: Request, body: bytes, deadline: float, *, is_mandatory: bool) -> None:
        """Give *request*, which *body* says, to every host of its topic.

        Raises MessageDeliveryFailure when Consul could not be asked by *deadline*, and, when
        *is_mandatory*, MessageUndeliverable when nobody is there.  Who has not got it stands in the
        log.
        """
        place = Place(request.exchange, request.topic)
        hosts = self._hosts(place, deadline)
        if not hosts and is_mandatory:
            why = LookupError(f"nobody listens for {place}")
            raise oslo_messaging.MessageUndeliverable(
                why, place.exchange, str(place), request.message
            )
        is_large = self._threshold and len(hosts) >= self._threshold
        if is_large and self._is_broadcast(request, deadline):
            return
        self._send_to_all(place, body, hosts, deadline)

    def multiply(self, request: Request, deadline: float) -> None:
        """The work of a broadcaster: the same, whatever the number of hosts."""
        place = Place(request.exchange, request.topic)
        self._send_to_all(place, body_of(request), self._hosts(place, deadline), deadline)

    def notify(self, request: Request, body: bytes, deadline: float, retry: int | None) -> None:
        """Give *request*, which *body* says, to one listener of each pool; see
        `HttpDriver.send_notification`."""
        place = Place(request.exchange, request.topic)
        pools = {pool_of(one.server) for _, one in self._instances(place, deadline)}
        if not pools and (retry is None or retry < 0):
            level = logging.WARNING if self._is_news(place) else logging.DEBUG
            logger.log(level, "nobody listens for notifications of %s: dropped", place)
            return
        left: list[str | None] = sorted(pools or {None}, key=str)
        whys: dict[str | None, str] = {}
        for tries in _tries(len(left), retry):
            left = self._give(request, body, left, deadline, tries, whys)
        if whys:
            raise oslo_messaging.MessageDeliveryFailure(
                "; ".join(f"pool {pool}: {why}" if pool else why for pool, why in whys.items())
            )

    def _give(
        self,
        request: Request,
        plain: bytes,
        pools: list[str | None],
        deadline: float,
        retry: int | None,
        whys: dict[str | None, str],
    ) -> list[str | None]:
        """Give *request* to one listener of each pool, in the pool's share of the time; return the
        pools that have not taken it.  *whys* has what stands against each, also against those that
        may have taken it."""
        place = Place(request.exchange, request.topic)
        left = []
        for number, pool in enumerate(pools):
            body = plain if pool is None else body_of(replace(request, pool=pool))
            now = time.monotonic()
            share = now + (deadline - now) / (len(pools) - number)
            among = functools.partial(_of_pool, pool=pool)
            try:
                self._delivery.send(place, body, share, retry=retry, among=among)
                whys.pop(pool, None)
            except oslo_messaging.MessageDeliveryFailure as error:
                whys[pool] = str(error)
                left.append(pool)
            except (Lost, NoAnswer) as error:
                whys[pool] = f"{place}: {error}; it may have been taken, and was not sent again"
        return left

    def _is_news(self, place: Place) -> bool:
        """Whether *place* was not warned of lately."""
        now = time.monotonic()
        with self._lock:
            at = self._warned_at.get(place)
            if at is not None and now - at < DROPPED_SECONDS:
                return False
            self._warned_at.pop(place, None)  # the first is the oldest
            if len(self._warned_at) >= MOST_DROPPED:
                del self._warned_at[next(iter(self._warned_at))]
            self._warned_at[place] = now
            return True

    def _send_to_all(self, place: Place, body: bytes, hosts: list[Found], deadline: float) -> None:
        for host, why in self._delivery.fan_out(body, hosts, deadline).items():
            logger.warning("%s has not got a fanout for %s: %s", host, place, why)

    def _hosts(self, place: Place, deadline: float) -> list[Found]:
        """Each host once."""
        hosts: dict[Host, Found] = {}
        for found, _ in self._instances(place, deadline):
            hosts.setdefault(found.host, found)
        return list(hosts.values())

    def _instances(self, place: Place, deadline: float) -> list[tuple[Found, Instance]]:
        while True:
            try:
                return self._zones.everywhere(place, deadline)
            except MatchmakerError as error:
                if not self._delivery.may_try_again(deadline):
                    raise oslo_messaging.MessageDeliveryFailure(f"{place}: {error}") from error

    def _is_broadcast(self, request: Request, deadline: float) -> bool:
        """Whether a broadcaster has taken the fanout."""
        inner: dict[str, Any] = {
            "exchange": request.exchange,
            "topic": request.topic,
            "ctxt": request.ctxt,
            "message": request.message,
        }
        body = body_of(Request(BROADCASTER.exchange, BROADCASTER.topic, {}, inner))
        soon = min(deadline, time.monotonic() + BROADCASTER_SECONDS)
        try:
            self._delivery.send(BROADCASTER, body, soon, retry=0)
        except oslo_messaging.MessageDeliveryFailure as error:
            logger.debug("no broadcaster: %s", error)
            return False
        except (Lost, NoAnswer) as error:  # it may be at it: twice would be worse
            logger.warning("a broadcaster may not have got a fanout: %s", error)
        return True


def _tries(pools: int, retry: int | None) -> list[int | None]:
    """The *retry* of each time round: first one try for every pool, so that none waits for the
    further tries of another."""
    if pools < 2 or retry == 0:
        return [retry]
    return [0, retry - 1 if retry is not None and retry > 0 else retry]


def _of_pool(found: Snapshot, pool: str | None) -> Snapshot:
    return found.with_instances(one for one in found.instances if pool_of(one.server) == pool)
