"""What an application holds: it builds the parts that its settings need, and forwards to them."""

from __future__ import annotations

import logging
import math
import os
import random
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import fields
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, cast

from .answers.belief import is_same
from .answers.cache import Cache
from .answers.load import Load
from .answers.quarantine import Quarantine
from .answers.selection import Selector
from .backends import Registrar, Resolver
from .calls import Caller, named
from .errors import Closed, ConfigurationError, Denied, NoLiveHosts, TimedOut, Unavailable
from .fork import call_after_fork
from .model import Host, Registration, ServiceOptions, Snapshot, checked_topic, host_of, warning_of
from .registrations.keeper import Change, Keeper
from .registrations.operators import Operators
from .registrations.wanted import wanted_registration
from .settings import Settings
from .worker import seconds_since_boot

if TYPE_CHECKING:  # catalog mode never imports what kv mode needs, nor the reverse
    from .answers.watcher import Watcher
    from .backends.watching import Watchable

logger = logging.getLogger(__name__)

ASK_AGAIN_SECONDS = 0.5
"""While somebody waits for the first host of a topic, Consul is asked this often."""
SECONDS_TO_CLOSE = 5.0
GRACE_SECONDS = 0.1
"""So much later than asked for a wait may end when Consul hangs: with a timeout of 0 it is what
Consul has to answer an unknown topic."""


class Matchmaker(Caller):
    """Which hosts serve a topic, and the word that this process serves one.

    Thread-safe.  The constructor opens no socket and starts no thread; those that are needed start
    later, and end with `close`.  A forked child has neither its parent's registrations
    nor its threads and connections; the answers it had stay.  Every method raises Closed after
    `close`.

    *backend* replaces Consul, for tests and dry runs: ``Matchmaker(settings, backend=Memory())``.
    """

    def __init__(
        self,
        settings: Settings,
        *,
        backend: Resolver | None = None,
        clock: Callable[[], float] = time.monotonic,
        jitter: Callable[[], float] = random.random,
    ) -> None:
        if not isinstance(settings, Settings):
            raise ConfigurationError(
                "Matchmaker(...) takes Settings(...); for a URL there is Matchmaker.from_url(url)"
            )
        self.settings = settings
        self._backend = backend
        self.clock = clock
        self._jitter = jitter
        self._build()
        call_after_fork(self)

    def _build(
        self,
        cache: Cache | None = None,
        quarantine: Quarantine | None = None,
        keeper: Keeper | Operators | None = None,
    ) -> None:
        """Make every part.  *cache*, *quarantine*, *keeper*: in a forked child, its parent's."""
        settings, clock, jitter = self.settings, self.clock, self._jitter
        self._lock = threading.RLock()
        self._closing = threading.Event()
        self._resolver = _resolver(settings, clock) if self._backend is None else self._backend
        self._registrar = _registrar(settings, self._resolver)
        self._cache = Cache(self._resolver, settings, clock=clock, jitter=jitter, before=cache)
        self._quarantine = Quarantine(settings, clock=clock, jitter=jitter, before=quarantine)
        self.load = Load(settings, clock=clock)
        self._selector = Selector(self._quarantine, settings, self.load, clock=clock)
        self._watcher: Watcher | None = None
        if settings.watch and self._backend is None:
            self._watcher = _watcher(self._resolver, self._cache, settings, clock, jitter)
            self._cache.watched_by(self._watcher.watch_more)
        self._keeper: Keeper | Operators
        if isinstance(self._registrar, Operators):
            self._keeper = self._registrar
        elif isinstance(keeper, Keeper):
            keeper.begin(self._registrar)
        else:
            # Consul's clocks go on while this machine is suspended: so must that of the leases.
            lasting = seconds_since_boot if clock is time.monotonic else clock
            self._keeper = Keeper(self._registrar, settings, clock=lasting, jitter=jitter)

    def after_fork(self) -> None:
        """In a forked child, called by itself: make every part anew.  What was known stays."""
        was_closed = self._closing.is_set()
        self._build(self._cache, self._quarantine, self._keeper)
        if was_closed:
            self._close(0.0)

    @classmethod
    def from_url(cls, url: str) -> Matchmaker:
        """A matchmaker of ``consul+MODE://HOST:PORT``, in kv mode perhaps with a ``/PREFIX``, and
        with settings after a ``?``; the environment completes them.  Raises ConfigurationError."""
        return cls(Settings.from_url(url))

    @classmethod
    def from_env(cls) -> Matchmaker:
        """As `from_url`, of ``CONSUL_MATCHMAKER_URL`` and the other CONSUL_* variables."""
        return cls(Settings.from_env())

    # -- who serves a topic

    def hosts(
        self, topic: str, server: str | None = None, *, timeout_seconds: float | None = None
    ) -> Snapshot:
        """Every live host of *topic*, perhaps none; with *server*, only the one of that name.

        A known topic is answered from memory.  Raises Unavailable when Consul cannot be asked for
        an unknown one (or since ``max_stale_seconds``), TimedOut when it has not answered after
        *timeout_seconds* (None: what its requests may take by the settings), Denied, InvalidTopic.
        """
        return self._cache.lookup(topic, server, timeout_seconds)

    def wait_for_hosts(
        self, topic: str, *, timeout_seconds: float, server: str | None = None
    ) -> Snapshot:
        """The hosts of *topic*, as soon as there is one; Consul is asked about twice a second.

        Raises NoLiveHosts when there is none after *timeout_seconds*, TimedOut when Consul could
        not be asked, also when it hangs, and Denied at once.
        """
        self._check_open()
        deadline = self.clock() + timeout_seconds
        while True:
            left = max(0.0, deadline - self.clock())
            snapshot, error = None, None
            try:
                snapshot = self.asked_for_hosts(topic, server, left + GRACE_SECONDS)
            except Unavailable as failure:
                error = failure
            if snapshot:
                return snapshot
            left = deadline - self.clock()
            if left <= 0:
                raise nobody_came(topic, server, timeout_seconds, error)
            pause = min(left, ASK_AGAIN_SECONDS)
            if snapshot is not None:
                with suppress(Unavailable):  # the answer was given up meanwhile
                    self._cache.wait_for_change(topic, snapshot, pause, server)
            elif self._closing.wait(pause):
                raise Closed("the matchmaker was closed while waiting")

    def asked_for_hosts(
        self, topic: str, server: str | None = None, timeout_seconds: float | None = None
    ) -> Snapshot:
        """As `hosts`, but where there are none Consul is asked again, half a second apart."""
        found = self._cache.lookup(topic, server, timeout_seconds=timeout_seconds)
        if not found and found.age_seconds >= ASK_AGAIN_SECONDS:
            found = self._cache.refresh(topic, server, timeout_seconds=timeout_seconds)
        return found

    def is_alive(self, topic: str, host: str | Host) -> bool:
        """Whether *host* serves *topic*, by what `hosts` says."""
        return host_of(host) in self._cache.lookup(topic)

    def watch(self, topic: str, server: str | None = None) -> Iterator[Snapshot]:
        """The hosts of *topic* now, and again at every change, until `close`.

        Raises like `hosts` when there is no first answer; a later outage changes nothing and
        raises nothing.
        """
        first = self._cache.lookup(topic, server)
        return _changes(self._cache, self._closing, first, server)

    def cached_hosts(self, topic: str, server: str | None = None) -> Snapshot | None:
        """The cached answer, or None; never asks Consul, never waits."""
        self._check_open()
        checked_topic(topic)
        return self._cache.peek(topic, server)

    @contextmanager
    def telling(
        self, topic: str, wake: Callable[[], object], server: str | None = None
    ) -> Iterator[None]:
        """As long as the returned context is entered, *wake* is called when the hosts of *topic*
        may be others, and at `close`, on a thread of the library: it has to return at once."""
        cache = self._cache
        cache.tell(topic, server, wake)
        try:
            yield
        finally:
            if cache is self._cache:  # else this is a forked child
                cache.stop_telling(topic, server, wake)

    def next_change(
        self, seen: Snapshot, *, timeout_seconds: float, server: str | None = None
    ) -> Snapshot | None:
        """The hosts of *seen*'s topic once they are others than those, or None after the timeout.

        *server*: with which *seen* was asked for.  Raises like `hosts`, and Closed.
        """
        self._check_open()
        found = self._cache.wait_for_change(seen.topic, seen, timeout_seconds, server)
        return None if is_same(found, seen) else found

    def topics(self) -> list[str]:
        """Every topic that somebody registered (service mode: every service), sorted.  Asks Consul:
        raises Unavailable, Denied, and ConfigurationError in catalog mode, as DNS cannot list."""
        self._check_open()
        return self._registrar.topics()

    # -- that this process serves one

    def register(
        self,
        topic: str,
        host: str | Host | None = None,
        server: str | None = None,
        *,
        on_change: Callable[[Registration, Change], None] | None = None,
        beat_seconds: float | None = None,
        port: int | None = None,
        tags: Iterable[str] = (),
        meta: Mapping[str, str] | None = None,
        weight: int = 1,
        check: str | None = None,
        is_up: bool = False,
    ) -> Registration:
        """Say that *host* serves *topic*, and keep it said until unregistered or closed.

        Returns at once, whether or not Consul is up; the registration can be waited for, and
        unregisters as a context manager.  A text must be ``ADDRESS:PORT``; for anything else pass
        ``Host.opaque(text)``.  In catalog mode accepted without effect: operators register there.
        Raises ConfigurationError for a malformed host or topic, or one too long to be a key, and
        Unavailable, with nothing registered, when the process cannot have the thread for it.
        An address that leads others to themselves (loopback) or nowhere (0.0.0.0) is registered,
        with a warning in the log.  Without *host*, but with *port*, it is the address of this
        machine that others can reach.

        *tags*, *meta* (texts), *weight* and *check* are what Consul's catalog has in service mode,
        and errors in kv mode; *check* is a URL that Consul probes: http, https, tcp or grpc.  Until
        the first probe it counts as down, but for *is_up*.  With others the service is replaced.

        *on_change* is called with the registration and ``"held"`` or ``"lost"``, on a thread of
        the library that renews nothing meanwhile: it has to return at once.  With *beat_seconds*
        the application promises to call `Registration.beat` at least so often from what serves;
        when it does not, because that hangs, the registration is taken back until it does.
        """
        # Refused here, not later on a thread where nobody sees it.
        options = ServiceOptions.of(tags, meta, weight, check, is_up)
        wanted = wanted_registration(self.settings, topic, host, server, port, options)
        if beat_seconds is not None and not beat_seconds > 0:
            raise ConfigurationError(f"beat_seconds must be above 0, not {beat_seconds!r}")
        self._check_open()
        if (warning := warning_of(wanted.host)) is not None:
            logger.warning("registering %s: %s; give an address of this machine", wanted, warning)
        return self._keeper.register(wanted, on_change=on_change, beat_seconds=beat_seconds)

    def unregister(self, topic: str, host: str | Host) -> None:
        """Take back what this process registered for *topic* on *host*, and nothing else."""
        self._check_open()
        self._keeper.unregister_host(topic, host_of(host))

    def expire(self, topic: str, host: str | Host) -> int:
        """Remove *host*'s registrations of *topic* for everybody; return how many there were.

        Their owner, if it lives, registers again.  Raises Unavailable, Denied.  In catalog mode
        without effect.
        """
        self._check_open()
        count = self._registrar.expire(topic, host_of(host))
        if self.settings.mode != "catalog" and self._cache.knows(topic):
            try:
                self._cache.refresh(topic)
            except (Unavailable, Denied) as error:
                logger.debug("topic %s: not asked again after expire: %s", topic, error)
        return count

    # -- what callers found out

    def acknowledge(self, topic: str, host: str | Host) -> None:
        """It answered: lift its quarantine.  If it is our own, renew our registrations now."""
        self._check_open()
        good = host_of(host)
        self.judge(topic, good, is_good=True)
        if self._keeper.holds(topic, good):
            self._keeper.renew_now()

    def reject(self, topic: str, host: str | Host) -> None:
        """It failed: `pick` of this process avoids it for a while; `hosts` still lists it."""
        self._check_open()
        self.judge(topic, host_of(host), is_good=False)

    # -- its own life

    def explain(self, topic: str, server: str | None = None) -> dict[str, object]:
        """Why `hosts` and `pick` say what they say: what was asked and answered, by whom, what was
        left out of it and why, which hosts are rejected, and when Consul is asked again.

        Fit for json; for people and bug reports, its content may grow.  A topic that nobody asked
        for is looked up first; that Consul cannot be asked is part of the answer.  Raises Closed
        and InvalidTopic.
        """
        found: Snapshot | None = None
        with suppress(Unavailable, Denied):
            found = self._cache.lookup(topic, server)
        return {
            **self._cache.explain(topic, server),
            "rejected": self._quarantine.explain(topic, found.hosts if found else ()),
            "selection": self._selector.explain(found, server) if found else {},
        }

    def status(self) -> dict[str, object]:
        """Where everything stands, fit for json, without secrets.

        ``wire`` has by transport (``udp`` and ``tcp``, or ``http``) what was exchanged with agents:
        see `backends.traffic.Traffic`; it is empty where a backend speaks to nobody.
        """
        return {
            "mode": self.settings.mode,
            "is_closed": self._closing.is_set(),
            "settings": _shown(self.settings),
            "cache": self._cache.status(),
            "quarantine": self._quarantine.status(),
            "quarantines": self._quarantine.begun,
            "ejections": self._quarantine.ejections,
            "retries": {"allowed": self.load.retries, "refused": self.load.refused},
            "keeper": self._keeper.status(),
            "watcher": self._watcher and self._watcher.status(),
            "backend": self._resolver.status(),
            "wire": self._resolver.wire(),
        }

    @property
    def is_closed(self) -> bool:
        """Whether `close` was called."""
        return self._closing.is_set()

    def close(self, timeout_seconds: float = SECONDS_TO_CLOSE) -> None:
        """Withdraw every registration, end every thread, close every connection; idempotent.

        Returns within *timeout_seconds* even when Consul hangs; registrations then leave with
        their lease, 2 x ``session_ttl_seconds`` later at the latest.

        Raises RuntimeError, with nothing done, in a signal handler that interrupted another call
        of this library: that call may hold what closing needs.  Let handlers set a flag instead.
        """
        if not self._closing.is_set():
            _refuse_to_interrupt_ourselves()
        self._close(timeout_seconds)

    def _close(self, timeout_seconds: float) -> None:
        with self._lock:
            if self._closing.is_set():
                return
            self._closing.set()
        deadline = self.clock() + timeout_seconds

        def remaining() -> float:
            return max(0.0, deadline - self.clock())

        self._cache.stop()  # tell everybody first, then wait for one after the other
        if self._watcher is not None:
            self._watcher.close(0.0)
        has_ended = self._keeper.close(remaining())
        if self._watcher is not None:
            has_ended &= self._watcher.close(remaining())
        self._resolver.close()  # ends what is being asked
        has_ended &= self._cache.close(max(remaining(), GRACE_SECONDS))
        if not has_ended:
            logger.warning("closed within %g s although Consul did not answer", timeout_seconds)

    def __enter__(self) -> Matchmaker:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._close(SECONDS_TO_CLOSE)

    def __repr__(self) -> str:
        addresses = ",".join(map(str, self.settings.addresses))
        state = "closed" if self._closing.is_set() else repr(self._cache)
        return f"<Matchmaker {self.settings.mode} at {addresses}, {state}, {self._keeper!r}>"

    # -- inside

    def _check_open(self) -> None:
        if self._closing.is_set():
            raise Closed("this matchmaker was closed: make a new one")


def _changes(
    cache: Cache, closing: threading.Event, last: Snapshot, server: str | None
) -> Iterator[Snapshot]:
    """*last*, and what the hosts of its topic become, until *closing*."""
    yield last
    while True:
        try:
            last = cache.wait_for_change(last.topic, last, math.inf, server)
        except Closed:
            return
        except Unavailable:  # the cache has said so in the log
            if closing.wait(ASK_AGAIN_SECONDS):
                return
            continue
        yield last


def _resolver(settings: Settings, clock: Callable[[], float]) -> Resolver:
    if settings.mode == "catalog":
        from .backends.dns.resolver import DnsSrv

        return DnsSrv(settings, clock=clock)
    from .backends.http.api import ConsulApi

    api = ConsulApi(settings, clock=clock)
    if settings.mode == "service":
        from .backends.service.store import Services

        return Services(api, settings, clock=clock)
    from .backends.kv.store import Kv

    return Kv(api, settings, clock=clock)


def _registrar(settings: Settings, backend: Resolver) -> Registrar | Operators:
    if settings.mode == "catalog":
        return Operators()
    if not hasattr(backend, "publish"):
        raise ConfigurationError(f"{backend!r} cannot register: use it with mode=catalog")
    return cast(Registrar, backend)


def _watcher(
    resolver: Resolver,
    cache: Cache,
    settings: Settings,
    clock: Callable[[], float],
    jitter: Callable[[], float],
) -> Watcher:
    from .answers.watcher import Watcher

    assert hasattr(resolver, "watch")
    return Watcher(cast("Watchable", resolver), cache, settings, clock=clock, jitter=jitter)


def _refuse_to_interrupt_ourselves() -> None:
    """Raise RuntimeError when this thread is inside another public call already.

    On the main thread only a signal handler does that: it runs on top of whatever was being done.
    A listener that closes does so on the keeper's thread.
    """
    if threading.current_thread() is not threading.main_thread():
        return
    interrupted = None
    is_inside = False
    for frame, _ in traceback.walk_stack(sys._getframe(2)):  # from whoever called close
        code = frame.f_code
        # What `call` was given to call may close: `call` itself holds nothing.
        if code.co_filename in _PUBLIC_CALLS and (is_inside or code is not Caller.call.__code__):
            interrupted = code.co_name  # in the end the call that the application made
        is_inside = code.co_filename.startswith(_PACKAGE)
    if interrupted is not None:
        raise RuntimeError(
            f"close() interrupts {interrupted}() of the same thread, which may hold what it "
            "needs: let the signal handler set a flag, and close when that call has returned"
        )


_PACKAGE = str(Path(__file__).parent) + os.sep
_PUBLIC_CALLS = frozenset(
    sys.modules[each.__module__].__file__ for each in (Matchmaker, Caller, Registration)
)
"""Where every public call has a frame on the stack: the methods of Matchmaker and of what it
gives out."""


def nobody_came(
    topic: str, server: str | None, timeout_seconds: float, error: Unavailable | None
) -> TimedOut | NoLiveHosts:
    """What to raise when no host of *topic* was found in time."""
    name = named(topic, server)
    if error is None:
        return NoLiveHosts(f"no host served {name} within {timeout_seconds:g} s")
    waited = TimedOut(f"Consul could not be asked for {name} within {timeout_seconds:g} s: {error}")
    waited.__cause__ = error
    return waited


def _shown(settings: Settings) -> dict[str, object]:
    shown: dict[str, object] = {}
    for setting in fields(settings):
        value = getattr(settings, setting.name)
        if setting.metadata.get("secret"):
            value = None if value is None else "***"
        elif isinstance(value, tuple):
            value = [str(item) for item in value]
        elif isinstance(value, Mapping):
            value = dict(value)
        shown[setting.name] = value
    return shown
