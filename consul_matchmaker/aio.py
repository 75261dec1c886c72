"""The Matchmaker for asyncio: the same names, awaited; what may block leaves the event loop.

    async with aio.Matchmaker.from_url("consul+kv://127.0.0.1:8500") as mm:
        await mm.hosts("scheduler")

It is one `consul_matchmaker.Matchmaker`, `mm.sync`, and decides nothing itself.
"""

from __future__ import annotations

import asyncio
import collections
import math
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Iterable, Mapping
from concurrent.futures import Future
from contextlib import asynccontextmanager, suppress
from types import TracebackType
from typing import Any, TypeVar, cast

from . import matchmaker, model
from .answers.belief import is_same
from .calls import ATTEMPTS, RETRY_ON, Failures, named
from .errors import Closed, MatchmakerError, TimedOut, Unavailable
from .fork import call_after_fork
from .matchmaker import ASK_AGAIN_SECONDS, GRACE_SECONDS, nobody_came
from .model import Host, Snapshot, Standing, host_of
from .registrations.keeper import Change
from .settings import Settings

T = TypeVar("T")

_Call = tuple[str, str, "str | None"]
"""A method, a topic and a server."""

THREAD_NAME = "consul-matchmaker-awaited"
HANGS = "it has not answered yet"
MAX_THREADS = 16
"""At most so many awaited calls ask Consul at the same time."""
RETRY_ON_AWAITED = (*RETRY_ON, asyncio.TimeoutError)  # which is another one in Python 3.10
POLL_SECONDS = 0.02
"""While a registration is waited for, its state is read this often; that asks nobody."""


class Registration:
    """A `consul_matchmaker.Registration` whose waits are awaited; also an async context manager."""

    def __init__(self, sync: model.Registration, owner: matchmaker.Matchmaker) -> None:
        self.sync = sync
        self._owner = owner

    @property
    def topic(self) -> str:
        return self.sync.topic

    @property
    def host(self) -> Host:
        return self.sync.host

    @property
    def server(self) -> str | None:
        return self.sync.server

    @property
    def state(self) -> Standing:
        """What has become of it, as far as this process knows."""
        return self.sync.state

    @property
    def margin_seconds(self) -> float:
        """How long Consul surely goes on showing it if nothing is heard from us any more."""
        return self.sync.margin_seconds

    def beat(self) -> None:
        """Say that the loop which serves this still runs; cheap, and not awaited."""
        self.sync.beat()

    async def wait_until_published(self, *, timeout_seconds: float) -> None:
        """Return once Consul has confirmed it.  Raises TimedOut, Denied, Closed."""
        await _until(self.sync.wait_until_published, timeout_seconds)

    async def wait_until_withdrawn(self, *, timeout_seconds: float) -> None:
        """After `unregister`, return once Consul cannot be showing it.  Raises TimedOut."""
        await _until(self.sync.wait_until_withdrawn, timeout_seconds)

    async def unregister(self) -> None:
        """Take the wish back; only this one."""
        self.sync.unregister()

    async def drain(self, seconds: float) -> None:
        """Take it back, then go on serving for *seconds* before this returns."""
        self.sync.unregister()
        await self.wait_until_withdrawn(timeout_seconds=seconds)
        until = time.monotonic() + seconds
        while (left := until - time.monotonic()) > 0 and not self._owner.is_closed:
            await asyncio.sleep(min(left, POLL_SECONDS))

    async def __aenter__(self) -> Registration:
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self.unregister()

    def __str__(self) -> str:
        return str(self.sync)


class Matchmaker:
    """`consul_matchmaker.Matchmaker`, awaited; every method means, returns and raises the same.

    A cached answer is returned without leaving the event loop; so are the calls that only note
    something (register, reject, acknowledge): they never wait for Consul.  What asks Consul runs on
    one of at most `MAX_THREADS` threads; questions for one topic share one.  A watch, and whoever
    waits, has no thread: it is called back.  A cancelled call stops waiting at once; its question
    ends by itself, and its answer is kept.
    """

    def __init__(self, settings: Settings | matchmaker.Matchmaker) -> None:
        self.sync = (
            settings
            if isinstance(settings, matchmaker.Matchmaker)
            else matchmaker.Matchmaker(settings)
        )
        self.settings = self.sync.settings
        self.after_fork()
        call_after_fork(self)

    def after_fork(self) -> None:
        """In a forked child, called by itself: no thread, and nothing is asked."""
        self._threads = _Threads()
        self._running: dict[_Call, asyncio.Future[Any]] = {}

    @classmethod
    def from_url(cls, url: str) -> Matchmaker:
        return cls(matchmaker.Matchmaker.from_url(url))

    @classmethod
    def from_env(cls) -> Matchmaker:
        return cls(matchmaker.Matchmaker.from_env())

    # -- who serves a topic

    async def hosts(
        self, topic: str, server: str | None = None, *, timeout_seconds: float | None = None
    ) -> Snapshot:
        """Every live host of *topic*; with *server*, only the one of that name."""
        held = self.sync.cached_hosts(topic, server)
        if held is not None:
            return held
        if timeout_seconds is None:
            return await self._shared(self.sync.hosts, topic, server)
        asking = self._off_loop(
            lambda: self.sync.hosts(topic, server, timeout_seconds=timeout_seconds)
        )
        try:  # its thread may have to wait for others, before its own timeout begins
            return await asyncio.wait_for(asking, timeout_seconds + GRACE_SECONDS)
        except asyncio.TimeoutError:
            name = named(topic, server)
            waited = f"Consul could not be asked for {name} within {timeout_seconds:g} s"
            raise TimedOut(waited) from None

    async def pick(
        self,
        topic: str,
        server: str | None = None,
        *,
        key: str | bytes | None = None,
        exclude: Collection[str | Host] = (),
    ) -> Host:
        """One live host of *topic* that is neither rejected nor one of *exclude*."""
        # Out of this very answer: to look once more could ask Consul, on the event loop.
        snapshot = await self.hosts(topic, server)
        tried = frozenset(map(host_of, exclude))
        return self.sync.picked(snapshot, server, key=key, exclude=tried)

    @asynccontextmanager
    async def using(
        self, topic: str, server: str | None = None, *, key: str | bytes | None = None
    ) -> AsyncIterator[Host]:
        """A picked host, for an ``async with`` block: rejected if the block raises, else
        acknowledged.  A cancellation says nothing of the host."""
        attempts = self.sync.attempts(topic, server, attempts=1, key=key)
        with attempts.begin(await self.hosts(topic, server)) as attempt:
            yield attempt.host

    async def call(
        self,
        topic: str,
        function: Callable[[Host], Awaitable[T]],
        *,
        attempts: int = ATTEMPTS,
        key: str | bytes | None = None,
        retry_on: Failures = RETRY_ON_AWAITED,
        timeout_seconds: float | None = None,
    ) -> T:
        """What ``await function(host)`` returns for a host of *topic*; for another one when it
        fails.  The attempt that is under way after *timeout_seconds* is cancelled, and fails by
        asyncio.TimeoutError."""
        tries = self.sync.attempts(topic, attempts=attempts, key=key, failures=retry_on)
        until = math.inf if timeout_seconds is None else time.monotonic() + timeout_seconds

        def left() -> float | None:
            return None if timeout_seconds is None else max(0.0, until - time.monotonic())

        failure: Exception | None = None
        try:
            while True:
                try:
                    attempt = tries.begin(await self.hosts(topic, timeout_seconds=left()))
                except MatchmakerError:
                    if failure is None:
                        raise
                    break  # the failure says more than that nobody is left
                try:
                    with attempt:
                        return await asyncio.wait_for(function(attempt.host), left())
                except retry_on as error:
                    if time.monotonic() >= until or not tries.may_retry():
                        raise
                    failure = error
            raise failure
        finally:
            del failure  # which refers to this frame

    async def wait_for_hosts(
        self, topic: str, *, timeout_seconds: float, server: str | None = None
    ) -> Snapshot:
        """The hosts of *topic*, as soon as there is one."""
        deadline = time.monotonic() + timeout_seconds
        with _ChangeEvent(self.sync, topic, server) as change:
            while True:
                left = max(0.0, deadline - time.monotonic())
                error: Unavailable | None = None
                try:
                    found = await asyncio.wait_for(
                        self._shared(self.sync.asked_for_hosts, topic, server),
                        left + GRACE_SECONDS,
                    )
                    if found:
                        return found
                except (Unavailable, asyncio.TimeoutError) as failure:
                    error = failure if isinstance(failure, Unavailable) else Unavailable(HANGS)
                if left <= 0:
                    raise nobody_came(topic, server, timeout_seconds, error)
                await change.wait(min(left, ASK_AGAIN_SECONDS))

    async def is_alive(self, topic: str, host: str | Host) -> bool:
        """Whether *host* serves *topic*, by what `hosts` says."""
        return host_of(host) in await self.hosts(topic)

    async def watch(self, topic: str, server: str | None = None) -> AsyncIterator[Snapshot]:
        """The hosts of *topic* now, and again at every change, until `close`."""
        last = await self.hosts(topic, server)
        yield last
        with suppress(Closed):
            while True:
                with _ChangeEvent(self.sync, topic, server) as change:
                    try:
                        found = await self.hosts(topic, server)
                    except Unavailable:  # the cache has said so in the log
                        await change.wait(ASK_AGAIN_SECONDS)
                        continue
                    if is_same(found, last):
                        await change.wait()
                        continue
                last = found
                yield last

    async def topics(self) -> list[str]:
        """Every topic that somebody registered, sorted."""
        return await self._off_loop(self.sync.topics)

    # -- that this process serves one

    async def register(
        self,
        topic: str,
        host: str | Host | None = None,
        server: str | None = None,
        *,
        on_change: Callable[[model.Registration, Change], None] | None = None,
        beat_seconds: float | None = None,
        port: int | None = None,
        tags: Iterable[str] = (),
        meta: Mapping[str, str] | None = None,
        weight: int = 1,
        check: str | None = None,
        is_up: bool = False,
    ) -> Registration:
        """Say that *host* serves *topic*; returns at once.  *on_change* is called on a thread of
        the library: hand over with ``loop.call_soon_threadsafe``."""
        registration = self.sync.register(
            topic,
            host,
            server,
            on_change=on_change,
            beat_seconds=beat_seconds,
            port=port,
            tags=tags,
            meta=meta,
            weight=weight,
            check=check,
            is_up=is_up,
        )
        return Registration(registration, self.sync)

    async def unregister(self, topic: str, host: str | Host) -> None:
        """Take back what this process registered for *topic* on *host*."""
        self.sync.unregister(topic, host)

    async def expire(self, topic: str, host: str | Host) -> int:
        """Remove *host*'s registrations of *topic* for everybody; return how many there were."""
        return await self._off_loop(lambda: self.sync.expire(topic, host))

    # -- what callers found out

    async def acknowledge(self, topic: str, host: str | Host) -> None:
        """It answered: lift its quarantine.  If it is our own, renew our registrations now."""
        self.sync.acknowledge(topic, host)

    async def reject(self, topic: str, host: str | Host) -> None:
        """It failed: `pick` of this process avoids it for a while."""
        self.sync.reject(topic, host)

    # -- its own life

    async def explain(self, topic: str, server: str | None = None) -> dict[str, object]:
        """Why `hosts` and `pick` say what they say."""
        return await self._off_loop(lambda: self.sync.explain(topic, server))

    def status(self) -> dict[str, object]:
        """Where everything stands; asks nobody, and is not awaited."""
        return self.sync.status()

    async def close(self, timeout_seconds: float = 5.0) -> None:
        """Withdraw every registration, end every thread, close every connection; idempotent.

        A cancellation does not stop it: it goes on by itself."""
        closing = _Threads()  # the others may all be waiting for Consul
        await off_loop(closing, lambda: self.sync.close(timeout_seconds))

    async def __aenter__(self) -> Matchmaker:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.close()

    @property
    def is_closed(self) -> bool:
        """Whether `close` was called."""
        return self.sync.is_closed

    def __repr__(self) -> str:
        return f"<aio {self.sync!r}>"

    async def _off_loop(self, call: Callable[[], T]) -> T:
        return await off_loop(self._threads, call)

    async def _shared(
        self, call: Callable[[str, str | None], T], topic: str, server: str | None
    ) -> T:
        """What *call* says, run once for all who want it on this loop at this moment; it outlives
        who gives up."""
        loop, key = asyncio.get_running_loop(), (call.__name__, topic, server)
        running = self._running.get(key)
        if running is None or running.done() or running.get_loop() is not loop:
            running = asyncio.ensure_future(self._off_loop(lambda: call(topic, server)))
            running.add_done_callback(lambda done: self._ended(key, done))
            self._running[key] = running
        return cast(T, await asyncio.shield(running))

    def _ended(self, key: _Call, done: asyncio.Future[Any]) -> None:
        if self._running.get(key) is done:
            del self._running[key]
        if not done.cancelled():
            done.exception()  # looked at, also where everybody has given up


class _ChangeEvent:
    """An event of this event loop, set when the hosts of a topic may be others."""

    def __init__(self, sync: matchmaker.Matchmaker, topic: str, server: str | None) -> None:
        self._loop = asyncio.get_running_loop()
        self._happened = asyncio.Event()
        self._telling = sync.telling(topic, self._tell_loop, server)

    def _tell_loop(self) -> None:
        with suppress(RuntimeError):  # the loop was closed meanwhile: nobody waits any more
            self._loop.call_soon_threadsafe(self._happened.set)

    async def wait(self, seconds: float | None = None) -> None:
        """Until it happens, or for *seconds*."""
        with suppress(asyncio.TimeoutError):
            await asyncio.wait_for(self._happened.wait(), seconds)
        self._happened.clear()

    def __enter__(self) -> _ChangeEvent:
        self._telling.__enter__()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._telling.__exit__(None, None, None)


class _Threads:
    """Runs calls on at most `MAX_THREADS` daemon threads, which end when there is nothing to do.

    Not the event loop's pool: that is the application's, and is waited for when the loop ends.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._calls: collections.deque[Callable[[], None]] = collections.deque()
        self._count = 0

    def run(self, call: Callable[[], None]) -> None:
        """Have *call* run on one of them; raises RuntimeError when there is none to be had."""
        with self._lock:
            self._calls.append(call)
            if self._count == MAX_THREADS:
                return
            self._count += 1
        try:
            threading.Thread(target=self._run, name=THREAD_NAME, daemon=True).start()
        except BaseException:
            with self._lock:
                self._count -= 1
                if not self._count:
                    self._calls.clear()
                    raise

    def _run(self) -> None:
        while True:
            with self._lock:
                if not self._calls:
                    self._count -= 1
                    return
                call = self._calls.popleft()
            call()


async def off_loop(threads: _Threads, call: Callable[[], T]) -> T:
    """What *call* returns or raises, run on one of *threads*; cancelled, it goes on by itself."""
    answer: Future[T] = Future()
    answer.set_running_or_notify_cancel()

    def run() -> None:
        try:
            answer.set_result(call())
        except BaseException as error:
            answer.set_exception(error)

    threads.run(run)
    return await asyncio.wrap_future(answer)


async def _until(wait: Callable[..., None], timeout_seconds: float) -> None:
    """Return when *wait*, a wait of a registration, would; raise what it raises."""
    deadline = time.monotonic() + timeout_seconds
    while True:
        try:
            return wait(timeout_seconds=0)
        except TimedOut as error:
            left = deadline - time.monotonic()
            if left <= 0:
                text = str(error).replace("within 0 s", f"within {timeout_seconds:g} s")
                raise TimedOut(text) from error
        await asyncio.sleep(min(left, POLL_SECONDS))
