"""Serve the classic matchmaker API of oslo's ZeroMQ driver, Folsom to Kilo: hosts without ports.

Nothing of oslo is needed; where oslo.config is installed, its ``[matchmaker_consul]`` is read.
"""

from __future__ import annotations

import contextlib
import threading
import time
from typing import Any, Protocol

from .... import Host, Matchmaker, Registration, Settings
from ....errors import ConfigurationError, MatchmakerError, NoLiveHosts
from ....fork import call_after_fork

PUBLICATION_SECONDS = 5.0
WITHDRAWAL_SECONDS = 1.0
SEEN_SECONDS = 1.0
SECONDS_BETWEEN_LOOKS = 0.01

Queue = tuple[str, str | None]  # a direct key, and the host it leads to


class MatchMakerException(Exception):
    """What upstream raises when there is nothing to keep alive."""


class Binding(Protocol):
    """Whether a key is of one kind."""

    def test(self, key: str) -> bool: ...


class Exchange(Protocol):
    """Where a key leads to."""

    def run(self, key: str) -> list[Queue]: ...


class FanoutBinding:
    """``fanout~topic``"""

    def test(self, key: str) -> bool:
        return key.startswith("fanout~")


class DirectBinding:
    """``topic.host``"""

    def test(self, key: str) -> bool:
        return "." in key


class TopicBinding:
    """``topic``"""

    def test(self, key: str) -> bool:
        return "." not in key


class MatchMakerConsul:
    """Which hosts take the messages of a key.  Thread-safe; opens nothing when made.

    In kv mode it is a HeartbeatMatchMakerBase: what is registered is kept alive by the one
    heartbeat of the process, from `register` on.  In catalog mode it is a plain MatchMakerBase:
    `register`, `unregister`, `expire` and all of the heartbeat do nothing.
    `queues`, `is_alive` and `expire` raise errors.Unavailable when Consul cannot be asked.
    """

    def __init__(self, matchmaker: Matchmaker | None = None) -> None:
        self._matchmaker = Matchmaker(_settings()) if matchmaker is None else matchmaker
        self._has_heartbeat = self._matchmaker.settings.mode != "catalog"
        self.bindings: list[tuple[Binding, Exchange, bool, bool]] = []
        self.add_binding(FanoutBinding(), _Fanout(self._matchmaker))
        self.add_binding(DirectBinding(), _Direct())
        self.add_binding(TopicBinding(), _Topic(self._matchmaker))
        self.after_fork()
        call_after_fork(self)

    def after_fork(self) -> None:
        """In a forked child: nothing is registered here."""
        self._lock = threading.Lock()
        self._never = threading.Event()
        self._registrations: dict[tuple[str, str], Registration] = {}

    @property
    def hosts(self) -> set[str]:
        """Every host registered here."""
        with self._lock:
            return {host for _, host in self._registrations}

    @property
    def host_topic(self) -> dict[tuple[str, str], str]:
        """Every (key, host) registered here, with the host."""
        with self._lock:
            return {(key, host): host for key, host in self._registrations}

    def register(self, key: str, host: str) -> None:
        """Say that *host* takes the messages of *key*.

        Waits for Consul's word, as callers of upstream's expect, but not for long: without it the
        registration becomes visible later, by itself.
        """
        with self._lock:
            registration = self._matchmaker.register(key, _host(host))
            self._registrations[key, host] = registration
        with contextlib.suppress(MatchmakerError):  # the keeper says in the log what is wrong
            registration.wait_until_published(timeout_seconds=PUBLICATION_SECONDS)
            self._wait_until_seen(registration, True)

    def unregister(self, key: str, host: str) -> None:
        """Take that back."""
        with self._lock:
            registration = self._registrations.pop((key, host), None)
        if registration is not None:
            registration.unregister()
            with contextlib.suppress(MatchmakerError):
                registration.wait_until_withdrawn(timeout_seconds=WITHDRAWAL_SECONDS)
                self._wait_until_seen(registration, False)

    def ack_alive(self, key: str, host: str) -> None:
        """*host* answered: it is no longer avoided, and renewed now if it is our own.

        As with upstream's Redis it is registered if nobody has it registered.
        """
        self._matchmaker.acknowledge(key, _host(host))
        if self._has_heartbeat and not self.is_alive(key, host):
            self.register(key, host)

    def is_alive(self, topic: str, host: str) -> bool:
        """Whether *host*, also written ``topic.host``, takes the messages of *topic*."""
        wanted = host.removeprefix(f"{topic}.")
        return any(wanted == found for _, found in _queues(self._matchmaker, topic))

    def expire(self, topic: str, host: str) -> None:
        """Remove *host*, also written ``topic.host``, for everybody; if it lives it returns."""
        self._matchmaker.expire(topic, _host(host.removeprefix(f"{topic}.")))

    def send_heartbeats(self) -> None:
        """Renew all that is registered here now, instead of in time."""
        for key, host in self.host_topic:
            self.ack_alive(key, host)

    def start_heartbeat(self) -> None:
        """Begin again after `stop_heartbeat`; `register` has begun by itself.

        Raises MatchMakerException when nothing is registered, but for catalog mode.
        """
        registered = self.host_topic
        if self._has_heartbeat and not registered:
            raise MatchMakerException("Register before starting heartbeat.")
        for key, host in registered:
            self.register(key, host)

    def stop_heartbeat(self) -> None:
        """Keep nothing alive any more: all that is registered here leaves at once."""
        for key, host in self.host_topic:
            self._matchmaker.unregister(key, _host(host))

    def add_binding(self, binding: Binding, rule: Exchange, last: bool = True) -> None:
        """Have keys that pass *binding* answered by *rule*; when *last*, by no later rule, too."""
        self.bindings.append((binding, rule, False, last))

    def queues(self, key: str) -> list[Queue]:
        """``[("topic.host", host)]``: one host for ``topic``, every one for ``fanout~topic``, that
        one for ``topic.host``, which is not looked up; empty when there is none."""
        found: list[Queue] = []
        for binding, exchange, _, last in self.bindings:
            if binding.test(key):
                found.extend(exchange.run(key))
                if last:
                    break
        return found

    def _wait_until_seen(self, registration: Registration, is_there: bool) -> None:
        """Until our own next lookup says so, too: what was looked up before is still in memory for
        the moment that Consul's word takes, and upstream's callers are used to Redis."""
        deadline = time.monotonic() + (SEEN_SECONDS if self._has_heartbeat else 0.0)
        topic, host = registration.topic, registration.host
        while time.monotonic() < deadline and self._matchmaker.is_alive(topic, host) != is_there:
            self._never.wait(SECONDS_BETWEEN_LOOKS)


class _Direct:
    def run(self, key: str) -> list[Queue]:
        return [(key, key.split(".", 1)[1])]


class _Fanout:
    def __init__(self, matchmaker: Matchmaker) -> None:
        self._matchmaker = matchmaker

    def run(self, key: str) -> list[Queue]:
        return _queues(self._matchmaker, key.split("~", 1)[1])


class _Topic:
    def __init__(self, matchmaker: Matchmaker) -> None:
        self._matchmaker = matchmaker

    def run(self, key: str) -> list[Queue]:
        try:
            host = self._matchmaker.pick(key)
        except NoLiveHosts:
            return []
        return [_queue(self._matchmaker, key, host)]


def _queues(matchmaker: Matchmaker, topic: str) -> list[Queue]:
    return [_queue(matchmaker, topic, host) for host in matchmaker.hosts(topic)]


def _queue(matchmaker: Matchmaker, topic: str, host: Host) -> Queue:
    # Consul's catalog adds the service's port, which this API has no place for: its driver connects
    # to rpc_zmq_port everywhere.
    name = host.address if matchmaker.settings.mode == "catalog" else str(host)
    return f"{topic}.{name}", name


def _host(name: str) -> Host:
    with contextlib.suppress(ConfigurationError):
        host = Host.parse(name)
        if str(host) == name:
            return host
    return Host.opaque(name)


def _settings() -> Settings:
    try:
        from oslo_config import cfg
    except ImportError:
        return Settings.from_env()
    from ..config import read_settings

    conf: Any = cfg.CONF
    settings, _ = read_settings(conf)
    return settings
