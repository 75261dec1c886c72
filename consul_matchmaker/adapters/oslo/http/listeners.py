"""The listeners of a process: what they are registered for, and what each of them gets."""

from __future__ import annotations

import inspect
import logging
import queue
import threading
from typing import Any, Protocol

from ...extras import extra
from .messages import Request, failure_of, reply_of
from .names import Place
from .server_connection import Exchange

with extra("oslo-http"):
    from oslo_messaging._drivers import base, common

logger = logging.getLogger(__name__)


_TAKES_ID = "msg_id" in inspect.signature(base.RpcIncomingMessage).parameters
"""Later releases make a random one up where they are given none."""


class Serving(Protocol):
    """What makes a listener known, and brings it requests."""

    def publish(self, listener: HttpListener) -> None: ...
    def withdraw(self, listener: HttpListener) -> None: ...
    def close(self) -> None: ...


class Incoming(base.RpcIncomingMessage):  # type: ignore[misc]  # upstream has no types
    """A message that a listener has; its end makes room for another.

    It ends with the reply, or when nothing can give one any more: upstream drops the message of a
    method that ends by SystemExit.
    """

    def __init__(self, request: Request, exchange: Exchange, listener: HttpListener) -> None:
        super().__init__(request.ctxt, request.message, *((request.id,) if _TAKES_ID else ()))
        self.msg_id = request.id  # which 14.0 does not know
        self.client_timeout = request.monitor
        self._waits = request.wait
        self.exchange, self._listener = exchange, listener

    def __del__(self) -> None:  # on any thread, at any time: it must not take a lock
        if self._listener.holds(self):
            self._listener.done(self)
            if self._waits:
                self.exchange.abandon()

    def reply(self, reply: Any = None, failure: Any = None) -> None:
        """The result of a call, or the ``sys.exc_info()`` of its failure; a cast's goes nowhere."""
        if not self._waits:
            self._listener.done(self)
            return
        try:
            body = reply_of(reply) if failure is None else _failure(failure)
        except Exception as error:  # what JSON cannot say
            logger.exception("the reply to message %s cannot be sent", self.msg_id)
            body = _failure((type(error), error, error.__traceback__))
        self._listener.done(self)  # first: who hears the reply may send the next message at once
        self.exchange.finish(body)

    def heartbeat(self) -> None:
        self.exchange.heartbeat()

    def acknowledge(self) -> None:
        """Of a call or cast more is heard."""

    def requeue(self) -> None:
        self._listener.again(self)


class IncomingNotification(Incoming):
    """A notification; it is done with when it is acknowledged."""

    def acknowledge(self) -> None:
        self._listener.done(self)


class HttpListener(base.Listener):  # type: ignore[misc]  # upstream has no types
    """Takes the messages of *places*, from `start` to `stop`.  Thread-safe.

    It has at most *most* that are not finished, and of fanouts as many again.  *pool*: of a
    notification listener, the pool it belongs to.  *version*: that of the server's Target, if it
    has one, for others to see in Consul.
    """

    def __init__(
        self,
        serving: Serving,
        places: list[Place],
        batch_size: int,
        batch_timeout: float | None,
        *,
        most: int,
        incoming: type[Incoming] = Incoming,
        pool: str | None = None,
        version: str | None = None,
    ) -> None:
        super().__init__(batch_size, batch_timeout)
        self.places, self.pool, self.version = places, pool, version
        self._serving, self._incoming = serving, incoming
        # A batch has to fit, and the next one is gathered while it is worked at.
        self._most = most if batch_size == 1 else max(most, 2 * batch_size)
        # Added to by the server's thread alone; the rest is one atomic operation each.
        self._taken: set[Exchange] = set()
        self._batches = _Batches(batch_size, batch_timeout) if batch_size > 1 else None

    def start(self, on_incoming_callback: Any) -> None:
        super().start(on_incoming_callback)
        if self._batches is not None:
            self._batches.start(on_incoming_callback)
        self._serving.publish(self)

    def stop(self) -> None:
        """Withdraw it, take what still comes for ``drain_seconds``, and then no more."""
        self._serving.withdraw(self)
        super().stop()
        if self._batches is not None:
            self._batches.stop()

    def cleanup(self) -> None:
        self._serving.close()

    def take(self, request: Request, exchange: Exchange) -> bool:
        """Have it, unless there is too much to do."""
        callback = self.on_incoming_callback
        if callback is None:
            return False
        if len(self._taken) >= (2 * self._most if request.fanout else self._most):
            return False
        message = self._incoming(request, exchange, self)
        self._taken.add(exchange)
        if not self._deliver(message):
            self.done(message)
            return False
        return True

    def again(self, message: Incoming) -> None:
        """Deliver it once more, at the end of those that wait."""
        if not self._deliver(message):
            self.done(message)

    def done(self, message: Incoming) -> None:
        self._taken.discard(message.exchange)

    def holds(self, message: Incoming) -> bool:
        """Whether it is not finished."""
        return message.exchange in self._taken

    def _deliver(self, message: Incoming) -> bool:
        callback = self.on_incoming_callback
        try:
            if self._batches is not None:
                self._batches.put(message)
            elif callback is None:
                return False
            else:
                callback([message])
        except RuntimeError:  # its executor was shut down
            return False
        except Exception:
            logger.exception("a message for %s could not be executed", self.places[0])
            return False
        return True


class _Batches(base.PollStyleListenerAdapter):  # type: ignore[misc]  # upstream has no types
    """Gathers messages, and delivers several at a time on a thread of its own."""

    def __init__(self, batch_size: int, batch_timeout: float | None) -> None:
        self._queue = _Queue()
        super().__init__(self._queue, batch_size, batch_timeout)

    def put(self, message: Incoming) -> None:
        self._queue.messages.put(message)


class _Queue(base.PollStyleListener):  # type: ignore[misc]  # upstream has no types
    def __init__(self) -> None:
        super().__init__()
        self.messages: queue.Queue[Incoming | None] = queue.Queue()
        self._is_stopped = False

    @base.batch_poll_helper  # type: ignore[untyped-decorator]
    def poll(self, timeout: float | None = None) -> Incoming | None:
        """The next message; None after *timeout*, and once it is stopped where there is none."""
        try:
            return self.messages.get(block=not self._is_stopped, timeout=timeout)
        except queue.Empty:
            return None

    def stop(self) -> None:
        self._is_stopped = True
        self.messages.put(None)  # wakes who waits for one


class Listeners:
    """Which listener of a process gets a request: each in turn.  Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._by_topic: dict[tuple[str, str], tuple[HttpListener, ...]] = {}
        self._turn = 0

    def add(self, listener: HttpListener) -> None:
        with self._lock:
            for place in listener.places:
                topic = place.exchange, place.topic
                self._by_topic[topic] = (*self._by_topic.get(topic, ()), listener)

    def remove(self, listener: HttpListener) -> None:
        with self._lock:
            for place in listener.places:
                topic = place.exchange, place.topic
                rest = tuple(one for one in self._by_topic.get(topic, ()) if one is not listener)
                if rest:
                    self._by_topic[topic] = rest
                else:
                    self._by_topic.pop(topic, None)

    def take(self, request: Request, exchange: Exchange) -> int:
        """202 when it was taken, 404 when nobody listens for it, 503 when all have too much."""
        topic = request.exchange, request.topic
        found = [one for one in self._by_topic.get(topic, ()) if _is_meant(request, one)]
        if not found:
            return 404
        if request.fanout:
            missed = [one for one in found if not one.take(request, exchange)]
            if len(missed) == len(found):
                return 503
            for listener in missed:  # asked again, the others would get it twice
                logger.warning("%s has too much to do: it misses a fanout", listener.places[0])
            return 202
        self._turn += 1
        for number in range(len(found)):
            if found[(self._turn + number) % len(found)].take(request, exchange):
                return 202
        return 503


def _is_meant(request: Request, listener: HttpListener) -> bool:
    if request.pool != listener.pool:
        return False
    if request.server is None:
        return True
    here = request.exchange, request.topic, request.server
    return any((one.exchange, one.topic, one.server) == here for one in listener.places)


def _failure(exc_info: Any) -> bytes:
    return failure_of(common.serialize_remote_exception(exc_info))
