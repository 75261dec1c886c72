"""Serve the matchmaker API of oslo.messaging's ZeroMQ driver (releases 2.6 to 8.1.4).

Upstream's contract is larger than its documents; what its code asks for is said where it is met.
"""

from __future__ import annotations

import contextlib
import logging
import random
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NoReturn, TypeVar

from .... import Host, Matchmaker, Registration
from ....errors import Closed, MatchmakerError, NoLiveHosts
from ....fork import call_after_fork
from ....matchmaker import GRACE_SECONDS
from ...extras import extra
from ..config import read_settings
from ..shared import shared
from .names import (
    DIRECT,
    PUBLISHERS,
    ROUTERS,
    addresses_of,
    host_of,
    key_of,
    name_of,
    publisher_of,
    read_key,
    server_of,
    topic_of,
)

with extra("oslo"):
    from oslo_config import cfg

logger = logging.getLogger(__name__)

LATE_SECONDS = 5.0
"""How long after `unregister` a register may still come from a thread that has not seen the stop:
upstream's updater tests its flag, and then registers, with nothing slow in between."""
WITHDRAWAL_SECONDS = 1.0
"""How long a server that stops waits for Consul's word; the withdrawal goes on without it."""

Where = tuple[str, str | None]  # topic and server


class MatchmakerConsul:
    """The ``consul`` matchmaker.  Thread-safe; opens nothing and starts nothing when made.

    Hosts come back in the type that they were registered in.  Every error of this package leaves
    as upstream's MatchmakerUnavailable, which is all that its callers expect.
    """

    def __init__(
        self,
        conf: Any,
        *args: Any,
        url: Any = None,
        matchmaker: Matchmaker | None = None,
        clock: Callable[[], float] = time.monotonic,
        **kwargs: Any,
    ) -> None:
        self.conf = conf
        self.url = url
        settings, self._wait_timeout = read_settings(conf, url)
        # Shared: upstream makes a driver a transport, and a service has one for RPC and one for
        # notifications.  Nobody tells us when to close it; it leaves at exit.
        self._matchmaker = shared(settings) if matchmaker is None else matchmaker
        self._clock = clock
        # Each round costs reads from memory here: so upstream's clients may look far more often
        # for changed hosts than every 180 s.  What the operator sets still wins over a default.
        with contextlib.suppress(cfg.NoSuchOptError, cfg.NoSuchGroupError):
            seconds = max(1, round(settings.ttl_seconds))
            conf.set_default("zmq_target_update", seconds, group="oslo_messaging_zmq")
        self._max_targets = settings.max_topics
        self._crash_seconds = 2 * settings.session_ttl_seconds  # fact B1
        self.after_fork()
        call_after_fork(self)

    def after_fork(self) -> None:
        """Nothing is registered or known: upstream builds this before it forks, and registers
        after."""
        self._lock = threading.Lock()
        self._held: dict[Registration, _Held] = {}
        self._ended: dict[Registration, _Ended] = {}
        # Targets come and go (a reply queue a process): as many are remembered as topics are.
        self._known: OrderedDict[Where, _Answer] = OrderedDict()
        self._keys: OrderedDict[str, Where] = OrderedDict()
        self._asked_before: OrderedDict[Where, None] = OrderedDict()  # by `ask_before_send`
        self._told_expire = False

    # -- servers

    def register(
        self,
        target: Any,
        hostname: str | bytes,
        listener_type: str = DIRECT,  # 2.6 has one type of listener
        expire: float = -1,
    ) -> None:
        """Register a listener; upstream calls again every ``zmq_target_update`` seconds.

        Waits for Consul's word up to ``wait_timeout``, then raises MatchmakerUnavailable, upon
        which upstream goes on and so do we: the listener becomes visible once Consul answers.
        *expire* is ignored: leases expire on their own.  A value below 2 x ``session_ttl_seconds``
        is logged.
        """
        with _translated():
            topic = topic_of(target.topic, listener_type)
            wanted = Registration(topic, host_of(hostname), server_of(target))
            self._register(wanted, expire)

    def unregister(self, target: Any, hostname: str | bytes, listener_type: str = DIRECT) -> None:
        """Take back exactly that; raises nothing, as it would escape from ``server.stop()``."""
        topic = topic_of(target.topic, listener_type)
        self._unregister(Registration(topic, host_of(hostname), server_of(target)))

    # -- clients

    def get_hosts(self, target: Any, listener_type: str = DIRECT) -> list[str | bytes]:
        """The live hosts of *target*, perhaps none."""
        return self._lookup(self._where(target, listener_type)).names.copy()

    def get_single_host(
        self, target: Any, timeout: float | None = None, retry: int | None = 0
    ) -> str | bytes:
        """One of *target*'s hosts at random, as 2.6 asks for; waited for up to *timeout* seconds.

        Raises upstream's MessagingTimeout when there is none by then, and InvalidTarget when there
        was no time to wait.
        """
        where = self._where(target, DIRECT)
        found = self._lookup(where)
        if not found.hosts and timeout:
            found = self._wait(where, min(timeout, self._wait_timeout))
        if not found.hosts:
            from oslo_messaging import InvalidTarget, MessagingTimeout

            why = f"no host serves {_shown(where)}"
            raise MessagingTimeout(why) if timeout else InvalidTarget(why, target)
        return random.choice(found.names)

    def get_hosts_retry(self, target: Any, listener_type: str) -> list[str | bytes]:
        """The live hosts of *target*, waited for up to ``wait_timeout``; never an empty list.

        One empty list and upstream's client never again finds that target (oslo-facts 1).
        """
        where = self._where(target, listener_type)
        found = self._cached(where) or _NO_HOSTS
        if not found.hosts and where not in self._asked_before:
            found = self._wait(where, self._wait_timeout)
        if not found.hosts:
            _raise_unavailable(f"no host serves {_shown(where)}")
        return found.names.copy()

    def get_hosts_fanout(self, target: Any, listener_type: str) -> list[str | bytes]:
        """The same as `get_hosts`, where a fanout target's server plays no part."""
        where = self._where(target, listener_type)
        found = self._cached(where) if where in self._asked_before else self._lookup(where)
        if found is None:
            _raise_unavailable(f"{_shown(where)}: Consul could not be asked before this was sent")
        return found.names.copy()

    def get_hosts_fanout_retry(self, target: Any, listener_type: str) -> list[str | bytes]:
        """The same as `get_hosts_retry`."""
        return self.get_hosts_retry(target, listener_type)

    def get_hosts_by_key(self, key: str) -> list[str | bytes]:
        """The hosts of ``TYPE/topic[/server]``; the last known ones while there is none.

        Upstream's routing table calls it again and again for what it holds: an empty list would
        spoil the target for ever, and any other error than ours end the calling thread for good.
        """
        where = self._keys.get(key) or read_key(key)
        try:
            found = self._lookup(where)
        except _unavailable():
            if where not in self._known:
                raise
            found = _NO_HOSTS
        return (found if found.hosts else self._known.get(where, _NO_HOSTS)).names.copy()

    def ask_before_send(
        self, target: Any, listener_type: str, *, timeout_seconds: float | None, wait: bool
    ) -> None:
        """Have the hosts of *target* in memory; with *wait*, as soon as there is one.

        Called by our own driver's send.  Upstream holds one lock for all its targets while it asks
        for one, so that asking and waiting there would delay messages to other topics.
        """
        where = self._where(target, listener_type)
        _remember(self._asked_before, where, None, self._max_targets)
        with contextlib.suppress(_unavailable()):  # the send itself will meet it again
            if not wait or where in self._known:
                self._lookup(where)
            else:
                limit = self._wait_timeout
                if timeout_seconds is not None:
                    limit = min(limit, timeout_seconds)
                self._wait(where, limit)

    # -- proxies: upstream expects no error out of any of these

    def register_publisher(self, hostname: tuple[str, str], expire: float = -1) -> None:
        """Register a proxy's publisher, with the router that leads to it."""
        with contextlib.suppress(_unavailable()), _translated():
            self._register(Registration(PUBLISHERS, publisher_of(hostname)), expire)

    def unregister_publisher(self, hostname: tuple[str, str]) -> None:
        """Take it back."""
        self._unregister(Registration(PUBLISHERS, publisher_of(hostname)))

    def get_publishers(self) -> list[tuple[str, ...]]:
        """The pairs of publisher and router; those last known while Consul cannot be asked."""
        return [addresses_of(host) for host in self._lookup_or_last((PUBLISHERS, None)).hosts]

    def register_router(self, hostname: str, expire: float = -1) -> None:
        """Register a proxy's router."""
        with contextlib.suppress(_unavailable()), _translated():
            self._register(Registration(ROUTERS, host_of(hostname)), expire)

    def unregister_router(self, hostname: str) -> None:
        """Take it back."""
        self._unregister(Registration(ROUTERS, host_of(hostname)))

    def get_routers(self) -> list[str | bytes]:
        """The routers; those last known while Consul cannot be asked."""
        return self._lookup_or_last((ROUTERS, None)).names.copy()

    # -- inside

    def _where(self, target: Any, listener_type: str) -> Where:
        where = topic_of(target.topic, listener_type), server_of(target)
        _remember(self._keys, key_of(target, listener_type), where, self._max_targets)
        return where

    def _cached(self, where: Where) -> _Answer | None:
        """What takes no question to Consul."""
        try:  # not _translated(), which would be a quarter of what this costs
            snapshot = self._matchmaker.cached_hosts(*where)
        except Exception as error:
            _raise_translated(error)
        return None if snapshot is None else self._translate(where, snapshot.hosts)

    def _lookup(self, where: Where) -> _Answer:
        """What is in memory, else what Consul says within ``wait_timeout``."""
        found = self._cached(where)
        if found is None:
            with _translated():
                hosts = self._matchmaker.hosts(
                    *where, timeout_seconds=self._wait_timeout + GRACE_SECONDS
                ).hosts
            found = self._translate(where, hosts)
        return found

    def _lookup_or_last(self, where: Where) -> _Answer:
        try:
            return self._lookup(where)
        except _unavailable():
            return self._known.get(where, _NO_HOSTS)

    def _wait(self, where: Where, timeout_seconds: float) -> _Answer:
        topic, server = where
        with _translated():
            try:
                hosts = self._matchmaker.wait_for_hosts(
                    topic, server=server, timeout_seconds=timeout_seconds
                ).hosts
            except NoLiveHosts:
                return _NO_HOSTS
        return self._translate(where, hosts)

    def _translate(self, where: Where, hosts: tuple[Host, ...]) -> _Answer:
        known = self._known.get(where)
        if known is not None and known.hosts is hosts:  # the same answer from memory
            return known
        if known is not None and known.hosts == hosts:  # Consul was asked, and says the same
            found = _Answer(hosts, known.names)
        else:
            found = _Answer(hosts, [name_of(host) for host in hosts])
        if hosts:
            _remember(self._known, where, found, self._max_targets)
        return found

    def _register(self, wanted: Registration, expire: float) -> None:
        with self._lock:
            if self._is_late(wanted):
                logger.info("%s: not registered again, it has just been unregistered", wanted)
                return
            registration = self._matchmaker.register(wanted.topic, wanted.host, wanted.server)
            starter = threading.get_ident()
            self._held.setdefault(wanted, _Held(registration, starter))
            is_told, self._told_expire = self._told_expire, True
        if not is_told and 0 < expire < self._crash_seconds:
            logger.warning(
                "zmq_target_expire is %g s, but a crashed server stays for up to %g s: "
                "lower [matchmaker_consul] session_ttl_seconds",
                expire,
                self._crash_seconds,
            )
        with contextlib.suppress(Closed):  # unregistered while we wait
            registration.wait_until_published(timeout_seconds=self._wait_timeout)

    def _unregister(self, unwanted: Registration) -> None:
        with self._lock:
            held = self._held.pop(unwanted, None)
            now = self._clock()
            self._ended = {each: end for each, end in self._ended.items() if end.until > now}
            if held is None:
                return
            threads = frozenset((held.starter, threading.get_ident()))
            self._ended[unwanted] = _Ended(now + LATE_SECONDS, threads)
            held.registration.unregister()
        with contextlib.suppress(MatchmakerError):
            held.registration.wait_until_withdrawn(timeout_seconds=WITHDRAWAL_SECONDS)

    def _is_late(self, wanted: Registration) -> bool:
        """Whether this is the last call of an updater whose server was just unregistered.

        One such call can come, from another thread than those that started and stopped the server;
        a new server at the same place registers from its own updater, too, right after this.
        """
        ended = self._ended.pop(wanted, None)
        return (
            ended is not None
            and self._clock() < ended.until
            and threading.get_ident() not in ended.threads
        )

    def __repr__(self) -> str:
        return f"<MatchmakerConsul {self._matchmaker!r}>"


Key = TypeVar("Key")
Value = TypeVar("Value")


def _remember(table: OrderedDict[Key, Value], key: Key, value: Value, most: int) -> None:
    """Put it into *table*; of more than *most* the one goes that was put longest ago."""
    table[key] = value
    with contextlib.suppress(KeyError):  # another thread took it out
        table.move_to_end(key)
        if len(table) > most:
            table.popitem(last=False)


@dataclass(frozen=True)
class _Answer:
    hosts: tuple[Host, ...]
    names: list[str | bytes]  # the same for upstream, which gets copies


_NO_HOSTS = _Answer((), [])


@dataclass(frozen=True)
class _Held:
    registration: Registration
    starter: int


@dataclass(frozen=True)
class _Ended:
    until: float
    threads: frozenset[int]


def _shown(where: Where) -> str:
    topic, server = where
    return topic if server is None else f"{topic} as {server}"


def _unavailable() -> type[Exception]:
    error: type[Exception]
    try:
        from oslo_messaging._drivers.zmq_driver.matchmaker import zmq_matchmaker_base

        error = zmq_matchmaker_base.MatchmakerUnavailable
    except ImportError:  # 4.6 and before have none, only the class that it is of
        from oslo_messaging._drivers.common import RPCException

        error = RPCException
    return error


def _raise_unavailable(why: str) -> NoReturn:
    logger.debug("%s", why)  # upstream drops the message, and says so
    raise _unavailable()()


@contextlib.contextmanager
def _translated() -> Iterator[None]:
    try:
        yield
    except Exception as error:  # nothing else may get out: upstream's threads would end by it
        _raise_translated(error)


def _raise_translated(error: Exception) -> NoReturn:
    if isinstance(error, (MatchmakerError, TimeoutError)):
        logger.warning("%s", error)
    else:
        logger.exception("unexpected error")
    raise _unavailable()() from error
