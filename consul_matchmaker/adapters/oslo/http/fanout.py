"""A message for every server of a topic, or for one of each pool of listeners."""

from __future__ import annotations

import functools
import logging
import time
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

BROADCASTER_SECONDS = 2.0
"""A broadcaster takes a message at once, or the sender does its work."""


class Fanout:
    """Thread-safe.  *threshold*: from so many hosts on a broadcaster is asked; 0: never."""

    def __init__(self, delivery: Delivery, zones: Zones, threshold: int) -> None:
        self._delivery, self._zones, self._threshold = delivery, zones, threshold

    def send(self, request: Request, deadline: float, *, is_mandatory: bool) -> None:
        """Give *request* to every host of its topic.

        Raises MessageDeliveryFailure when Consul could not be asked by *deadline*, and, when
        *is_mandatory*, MessageUndeliverable when nobody is there.  Who has not got it stands in the
        log.
        """
        place = Place(request.exchange, request.topic)
        body = body_of(request)
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

    def notify(self, request: Request, deadline: float, retry: int | None) -> None:
        """Give *request* to one listener of each pool; see `HttpDriver.send_notification`."""
        place = Place(request.exchange, request.topic)
        pools = {pool_of(one.server) for _, one in self._instances(place, deadline)}
        if not pools and (retry is None or retry < 0):
            logger.warning("nobody listens for notifications of %s: dropped", place)
            return
        for pool in sorted(pools or {None}, key=str):
            request.pool = pool
            among = functools.partial(_of_pool, pool=pool)
            try:
                self._delivery.send(place, body_of(request), deadline, retry=retry, among=among)
            except (Lost, NoAnswer) as error:
                raise oslo_messaging.MessageDeliveryFailure(
                    f"{place}: {error}; it may have been taken, and was not sent again"
                ) from error

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


def _of_pool(found: Snapshot, pool: str | None) -> Snapshot:
    return found.with_instances(one for one in found.instances if pool_of(one.server) == pool)
