"""The driver of ``consul+http``: what oslo.messaging asks of one, over HTTP and Consul."""

from __future__ import annotations

import contextlib
import itertools
import time
import uuid
from typing import Any

from ....errors import MatchmakerError
from ....fork import call_after_fork
from ....matchmaker import Matchmaker
from ....registrations.wanted import own_address
from ...extras import extra
from ..shared import released, shared
from .client import Client, Lost
from .delivery import Delivery, NoAnswer, ReplyLost
from .fanout import Fanout
from .listeners import HttpListener, Incoming, IncomingNotification
from .messages import Malformed, Request, body_of, read_reply
from .names import Place
from .options import read_options
from .secret import Secret
from .serving import Serving
from .zones import Zones, settings_by_zone

with extra("oslo-http"):
    import oslo_messaging
    from oslo_messaging._drivers import base, common

DEFAULT_POOL_SIZE = 64
"""Of upstream's executor_thread_pool_size."""


class HttpDriver(base.BaseDriver):  # type: ignore[misc]  # upstream has no types
    """RPC and notifications between a transport's clients and servers.  Thread-safe.

    Opens nothing and starts nothing when made, so that a service may fork after it has made its
    transport.  Raises oslo.messaging's errors only; ConfigurationError (also a ValueError) when it
    is made.
    """

    def __init__(
        self,
        conf: Any,
        url: Any,
        default_exchange: str | None = None,
        allowed_remote_exmods: list[str] | None = None,
    ) -> None:
        super().__init__(conf, url, default_exchange, allowed_remote_exmods)
        register_upstream_options(conf)
        self._settings, self._options = read_options(conf, url)
        self._secret = Secret(self._options.rpc_token, self._options.rpc_token_file)
        self._matchmakers = [shared(one) for one in settings_by_zone(self._settings)]
        self._zones = Zones(self._matchmakers)
        self._is_closed = False
        self.after_fork()
        call_after_fork(self)

    def after_fork(self) -> None:
        """In a forked child: connections of its own, and names of messages."""
        self._ids, self._count = uuid.uuid4().hex, itertools.count(1)
        self._client = Client(self._options, self._secret)
        at_a_time = self._options.fanout_connections
        self._delivery = Delivery(self._zones, self._client, fanout_connections=at_a_time)
        self._fanout = Fanout(self._delivery, self._zones, self._options.broadcaster_threshold)

    @property
    def matchmaker(self) -> Matchmaker:
        """What finds the servers, in the nearest datacenter; shared by the transports of a process
        that have the same settings."""
        return self._matchmakers[0]

    def require_features(self, requeue: bool = False) -> None:
        """Every one is there."""

    # -- clients -----------------------------------------------------------------------------

    def send(
        self,
        target: Any,
        ctxt: Any,
        message: dict[str, Any],
        wait_for_reply: bool | None = None,
        timeout: float | None = None,
        call_monitor_timeout: float | None = None,
        retry: int | None = None,
        transport_options: Any = None,
    ) -> Any:
        """The reply of a call, or None when a cast was taken.

        Raises MessagingTimeout when there is no reply in time (`ReplyLost`, a MessagingTimeout,
        when it broke off, or is not to be read), MessageDeliveryFailure when nobody took a cast in
        time or *retry* was reached, MessageUndeliverable when nobody took it and
        *transport_options* say at_least_once; and what the method raised.
        """
        seconds = self._options.delivery_timeout if timeout is None else timeout
        deadline = time.monotonic() + seconds
        is_mandatory = bool(getattr(transport_options, "at_least_once", False))
        if target.fanout:
            place = self._place(target, None)
            request = Request(place.exchange, place.topic, _plain(ctxt), message, fanout=True)
            body = self._body(request)
            self._fanout.send(request, body, deadline, is_mandatory=is_mandatory)
            return None
        place = self._place(target, target.server)
        request = Request(
            place.exchange,
            place.topic,
            _plain(ctxt),
            message,
            server=place.server,
            wait=bool(wait_for_reply),
            monitor=call_monitor_timeout or None if wait_for_reply else None,
            id=f"{self._ids}-{next(self._count)}",
        )
        body = self._body(request)
        try:
            answer = self._delivery.send(
                place,
                body,
                deadline,
                retry=retry,
                is_mandatory=is_mandatory,
                is_call=request.wait,
                monitor=request.monitor,
            )
        except oslo_messaging.MessageDeliveryFailure as error:
            if wait_for_reply and time.monotonic() >= deadline:
                raise oslo_messaging.MessagingTimeout(str(error)) from error
            raise
        except NoAnswer as error:
            if wait_for_reply:
                raise oslo_messaging.MessagingTimeout(f"{error} in time") from error
            raise oslo_messaging.MessageDeliveryFailure(
                f"{error} in time: it may have the message, which was not sent again"
            ) from error
        except Lost as error:
            what = f"{place}: the message was sent, and its answer is lost ({error})"
            if wait_for_reply:
                raise ReplyLost(f"{what}: it may have been executed") from error
            raise oslo_messaging.MessageDeliveryFailure(
                f"{what}: it may have been taken, and was not sent again"
            ) from error
        return self._result(place, answer.body) if wait_for_reply else None

    def send_notification(
        self,
        target: Any,
        ctxt: Any,
        message: dict[str, Any],
        version: float,
        retry: int | None = None,
    ) -> None:
        """Give it to one listener of each pool.

        Nobody keeps it: where nobody listens it is dropped, with a line in the log, unless *retry*
        is 0 or more: then MessageDeliveryFailure is raised after so many more tries.
        """
        place = self._place(target, None)
        request = Request(place.exchange, place.topic, _plain(ctxt), message)
        body = self._body(request)
        deadline = time.monotonic() + self._options.delivery_timeout
        self._fanout.notify(request, body, deadline, retry)

    def multiply(self, request: Request) -> None:
        """Give the fanout *request* to every host of its topic, within ``delivery_timeout``."""
        self._fanout.multiply(request, time.monotonic() + self._options.delivery_timeout)

    # -- servers -----------------------------------------------------------------------------

    def listen(self, target: Any, batch_size: int, batch_timeout: float | None) -> HttpListener:
        """A listener for calls, casts and fanouts; `start` of it makes it known."""
        places = [self._place(target, target.server)]
        version = None if target.version is None else str(target.version)
        return self._listener(places, batch_size, batch_timeout, version=version)

    def listen_for_notifications(
        self,
        targets_and_priorities: list[tuple[Any, str]],
        pool: str | None,
        batch_size: int,
        batch_timeout: float | None,
    ) -> HttpListener:
        """A listener for each topic and priority; those of one *pool* share what there is."""
        places = [
            Place(self._exchange(target), f"{target.topic}.{priority}")
            for target, priority in targets_and_priorities
        ]
        return self._listener(
            places, batch_size, batch_timeout, incoming=IncomingNotification, pool=pool or None
        )

    def _listener(
        self,
        places: list[Place],
        batch_size: int,
        batch_timeout: float | None,
        *,
        incoming: type[Incoming] = Incoming,
        pool: str | None = None,
        version: str | None = None,
    ) -> HttpListener:
        try:
            serving = Serving(self.matchmaker, self._options, self._secret, self._address())
        except (OSError, MatchmakerError) as error:
            raise base.TransportDriverError(f"{places[0]}: {error}") from error
        return HttpListener(
            serving,
            places,
            batch_size,
            batch_timeout,
            most=self._most_messages(),
            incoming=incoming,
            pool=pool,
            version=version,
        )

    def cleanup(self) -> None:
        """Close connections, and what nobody else of the process uses; idempotent."""
        if self._is_closed:
            return
        self._is_closed = True
        self._delivery.close()
        self._client.close()
        for matchmaker in self._matchmakers:
            released(matchmaker)

    # -- inside ------------------------------------------------------------------------------

    def _exchange(self, target: Any) -> str:
        return str(target.exchange or self._default_exchange or "openstack")

    def _place(self, target: Any, server: str | None) -> Place:
        return Place(self._exchange(target), str(target.topic), server)

    def _address(self) -> str:
        return self._options.host or own_address(self._settings.addresses[0])

    def _most_messages(self) -> int:
        size = getattr(self.conf, "executor_thread_pool_size", DEFAULT_POOL_SIZE)
        return self._options.max_messages or 2 * int(size)

    def _body(self, request: Request) -> bytes:
        body = body_of(request)
        if len(body) > self._options.max_body_bytes:
            raise oslo_messaging.MessageDeliveryFailure(
                f"{request.exchange}/{request.topic}: the message has {len(body)} bytes, and "
                f"max_body_bytes allows {self._options.max_body_bytes}"
            )
        return body

    def _result(self, place: Place, body: bytes) -> Any:
        try:
            result, failure = read_reply(body)
        except Malformed as error:
            raise ReplyLost(f"{place}: {error}: it may have been executed") from error
        if failure is None:
            return result
        raise common.deserialize_remote_exception(failure, self._allowed_remote_exmods)


def _plain(ctxt: Any) -> dict[str, Any]:
    """*ctxt* as a dict: what other drivers take has ``to_dict`` where it is none."""
    if ctxt is None:
        return {}
    found: dict[str, Any] = ctxt if isinstance(ctxt, dict) else ctxt.to_dict()
    return found


def register_upstream_options(conf: Any) -> None:
    """Make known to *conf* what upstream registers on the global configuration only, and asks of
    any: without it a configuration of one's own fails in ``call``."""
    for module, name in (
        ("_tracing", "oslo_messaging_tracing"),
        ("_metrics", "oslo_messaging_metrics"),
    ):
        with contextlib.suppress(ImportError, AttributeError):
            found = __import__(f"oslo_messaging.{module}.client", fromlist=[name])
            conf.register_opts(getattr(found, name), group=name)
