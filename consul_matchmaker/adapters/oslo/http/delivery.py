"""Who gets a message: one server after the other until one takes it, or every one of a topic."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable
from concurrent import futures

from ....backoff import Backoff
from ....errors import MatchmakerError
from ....model import Host
from ...extras import extra
from .client import FAIR_SECONDS, Answer, Client, Lost, NotTaken, NotTried
from .names import Place
from .zones import Among, Found, Zones

with extra("oslo-http"):
    import oslo_messaging

FIRST_PAUSE_SECONDS, LONGEST_PAUSE_SECONDS = 0.05, 1.0
FANOUT_SECONDS = 5.0
"""A server takes a cast, a fanout or a notification within milliseconds; one that hangs costs so
much of the sender's time, and of a fanout's one of its ``fanout_connections``."""
HEARD_SECONDS = 2.0
"""Who watches a call more closely hears no heartbeat: upstream's servers send none then."""
UNKNOWN = "the secret was refused"
_REASONS = {401: UNKNOWN, 404: "it does not listen for that", 503: "it has too much to do"}


class ReplyLost(oslo_messaging.MessagingTimeout):  # type: ignore[misc]  # upstream has no types
    """The server of a call took it, and its reply is lost, as the connection broke, or is not to be
    read: whether the call was executed is unknown, and it was not sent again."""


class NoAnswer(Exception):
    """A server took the message, or may have, and there was no answer by the deadline."""


class Delivery:
    """Sends messages to servers that *zones* finds.  Thread-safe."""

    def __init__(
        self,
        zones: Zones,
        client: Client,
        *,
        fanout_connections: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._zones, self._client, self._clock = zones, client, clock
        self._backoff = Backoff(FIRST_PAUSE_SECONDS, LONGEST_PAUSE_SECONDS)
        self._closing = threading.Event()
        self._fanout_connections = fanout_connections
        self._lock = threading.Lock()
        self._pool: futures.ThreadPoolExecutor | None = None

    def send(
        self,
        place: Place,
        body: bytes,
        deadline: float,
        *,
        retry: int | None = None,
        is_mandatory: bool = False,
        is_call: bool = False,
        monitor: float | None = None,
        among: Among | None = None,
    ) -> Answer:
        """The answer of the first server of *place* that took *body*.

        One that has not taken it (nothing listens there, the connection broke before it had the
        whole, it refused) is followed by another; when all were tried, they are tried again, after
        a pause, at most *retry* times (None or below 0: until *deadline*).  Raises
        MessageDeliveryFailure when nobody took it by then, with *is_mandatory* MessageUndeliverable
        after the first round; and when somebody took it, Lost and NoAnswer.  Unless *is_call*, a
        host has `FANOUT_SECONDS` for its answer.
        """
        rounds, why = 0, ""
        tried: dict[Host, str] = {}
        while True:
            trouble = ""
            try:
                found = self._zones.next_host(place, deadline, tried, among)
            except MatchmakerError as error:
                found, trouble = None, str(error)
            if found is not None:
                answer = self._try(found, body, deadline, tried, is_call=is_call, monitor=monitor)
                if answer is not None:
                    return answer
                if self._clock() < deadline:
                    continue
            if not why or self._clock() < deadline:  # a round that the clock ended tells less
                why = _why(place, tried, trouble)
            if is_mandatory:
                raise oslo_messaging.MessageUndeliverable(
                    LookupError(why), place.exchange, str(place), "nobody took it"
                )
            is_hopeless = tried and set(tried.values()) == {UNKNOWN}
            is_enough = retry is not None and 0 <= retry <= rounds
            if is_hopeless or is_enough or not self._pause(place, tried, rounds, deadline, among):
                raise oslo_messaging.MessageDeliveryFailure(why)
            rounds += 1
            tried = {}

    def fan_out(self, body: bytes, hosts: Iterable[Found], deadline: float) -> dict[Host, str]:
        """Send *body* to every one of *hosts*, several at a time, until *deadline*; return why some
        have not got it.

        Each has `FANOUT_SECONDS`; nobody waits for another one's, but for as many connections.
        """
        with self._lock:
            if self._pool is None:
                self._pool = futures.ThreadPoolExecutor(
                    self._fanout_connections, thread_name_prefix="consul-matchmaker-fanout"
                )
            pool = self._pool
        failed: dict[Host, str] = {}

        def send(found: Found) -> None:
            if self._clock() >= deadline:
                failed[found.host] = "it was not reached before the time of the fanout was over"
                return
            try:
                self._try(found, body, deadline, failed)
            except (Lost, NoAnswer, oslo_messaging.MessageDeliveryFailure) as error:
                failed[found.host] = str(error)

        futures.wait([pool.submit(send, found) for found in hosts])
        return failed

    def may_try_again(self, deadline: float) -> bool:
        """Wait a little, as what was asked for was not to be had; False when it is too late."""
        left = deadline - self._clock()
        return left > 0 and not self._closing.wait(min(left, LONGEST_PAUSE_SECONDS))

    def close(self) -> None:
        """Have no send wait any longer for a server to come; end the threads of fanouts."""
        self._closing.set()
        with self._lock:
            pool, self._pool = self._pool, None
        if pool is not None:
            pool.shutdown(wait=False)

    def _try(
        self,
        found: Found,
        body: bytes,
        deadline: float,
        tried: dict[Host, str],
        *,
        is_call: bool = False,
        monitor: float | None = None,
    ) -> Answer | None:
        """The answer of *found* if it took *body*, or may never be given it; else None, and why is
        noted in *tried*."""
        host, place = found.host, found.place
        began = self._clock()
        until = deadline if is_call else min(deadline, began + FANOUT_SECONDS)
        attempt = found.attempt()
        try:
            answer = self._client.post(host, body, until, monitor=monitor)
            if answer is None:
                now = self._clock()
                is_missed = monitor is not None and monitor >= HEARD_SECONDS and now < until
                # A method may be slow.
                if is_missed or (not is_call and now - began >= FAIR_SECONDS):
                    attempt.judge(is_good=False)
                raise NoAnswer(f"{host} has not answered for {place}")
            attempt.judge(is_good=True)
        except (NotTaken, Lost) as error:
            if not isinstance(error, NotTried):
                attempt.judge(is_good=False)
            if isinstance(error, Lost):
                raise
            tried[host] = str(error)
            return None
        finally:
            attempt.end()
        if answer.status in _REASONS:
            tried[host] = _REASONS[answer.status]
            return None
        if answer.status not in (200, 202):
            said = answer.body[:200].decode("utf-8", "replace").strip()
            if answer.status >= 500:  # it was taken, and something went wrong then
                raise Lost(f"{host}: status {answer.status}, {said!r}")
            raise oslo_messaging.MessageDeliveryFailure(
                f"{host} refused the message: status {answer.status}, {said!r}"
            )
        return answer

    def _pause(
        self,
        place: Place,
        tried: dict[Host, str],
        rounds: int,
        deadline: float,
        among: Among | None,
    ) -> bool:
        """Wait for another try; False when it is too late for one."""
        left = deadline - self._clock()
        if left <= 0 or self._closing.is_set():
            return False
        if tried:
            is_closing = self._closing.wait(min(left, self._backoff.seconds(rounds + 1)))
            return not is_closing and self._clock() < deadline
        seconds = min(left, LONGEST_PAUSE_SECONDS)
        try:
            self._zones.wait(place, seconds, among)
        except MatchmakerError:
            left = max(0.0, deadline - self._clock())
            self._closing.wait(min(left, self._backoff.seconds(rounds + 1)))
        return self._clock() < deadline


def _why(place: Place, tried: dict[Host, str], trouble: str) -> str:
    unasked = f"Consul cannot be asked who listens for {place}: {trouble}" if trouble else ""
    if not tried:
        return unasked or f"nobody listens for {place} (service {place.service} in Consul)"
    found = ", ".join(f"{host}: {why}" for host, why in list(tried.items())[:5])
    more = f", and {len(tried) - 5} more" if len(tried) > 5 else ""
    return f"nobody took the message for {place}: {found}{more}" + (unasked and f"; {unasked}")
