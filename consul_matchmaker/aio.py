"""The Matchmaker for asyncio: the same names, awaited; what could wait leaves the event loop.

    async with aio.Matchmaker.from_url("consul+kv://127.0.0.1:8500") as mm:
        await mm.hosts("scheduler")

It is one `consul_matchmaker.Matchmaker`, `mm.sync`, and decides nothing itself.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from types import TracebackType
from typing import TypeVar, cast

from . import matchmaker, model
from .errors import Closed, Unavailable
from .keeper import Change
from .model import Host, Snapshot, Standing
from .settings import Settings

T = TypeVar("T")

SECONDS_PER_WAIT = 5.0
"""How long the thread of a cancelled `watch` may live on."""
SECONDS_BETWEEN_ASKS = 0.5


class Registration:
    """A `consul_matchmaker.Registration` whose waits are awaited; also an async context manager."""

    def __init__(self, sync: model.Registration) -> None:
        self.sync = sync

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
        await off_loop(lambda: self.sync.wait_until_published(timeout_seconds=timeout_seconds))

    async def wait_until_withdrawn(self, *, timeout_seconds: float) -> None:
        """After `unregister`, return once Consul cannot be showing it.  Raises TimedOut."""
        await off_loop(lambda: self.sync.wait_until_withdrawn(timeout_seconds=timeout_seconds))

    async def unregister(self) -> None:
        """Take the wish back; only this one."""
        self.sync.unregister()

    async def drain(self, seconds: float) -> None:
        """Take it back, then go on serving for *seconds* before this returns."""
        await off_loop(lambda: self.sync.drain(seconds))

    async def __aenter__(self) -> Registration:
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self.unregister()

    def __str__(self) -> str:
        return str(self.sync)


class Matchmaker:
    """`consul_matchmaker.Matchmaker`, awaited; every method means, returns and raises the same.

    An answer at hand is returned without leaving the event loop; so are the calls that only note
    something (register, reject, acknowledge): they never wait for Consul.  Everything else runs on
    a thread of its own for as long as it takes, so that one that hangs holds up no other.  A
    cancelled call stops waiting at once; its question ends by itself, and its answer is kept.
    """

    def __init__(self, settings: Settings | matchmaker.Matchmaker) -> None:
        self.sync = (
            settings
            if isinstance(settings, matchmaker.Matchmaker)
            else matchmaker.Matchmaker(settings)
        )
        self.settings = self.sync.settings

    @classmethod
    def from_url(cls, url: str) -> Matchmaker:
        return cls(matchmaker.Matchmaker.from_url(url))

    @classmethod
    def from_env(cls) -> Matchmaker:
        return cls(matchmaker.Matchmaker.from_env())

    # -- who serves a topic

    async def hosts(self, topic: str, server: str | None = None) -> Snapshot:
        """Every live host of *topic*; with *server*, only the one of that name."""
        held = self.sync.hosts_at_hand(topic, server)
        return held if held is not None else await off_loop(lambda: self.sync.hosts(topic, server))

    async def pick(
        self, topic: str, server: str | None = None, *, key: str | bytes | None = None
    ) -> Host:
        """One live host of *topic* that is not rejected."""
        # Out of this very answer: to look once more could ask Consul, on the event loop.
        return self.sync.picked(await self.hosts(topic, server), server, key=key)

    @asynccontextmanager
    async def using(
        self, topic: str, server: str | None = None, *, key: str | bytes | None = None
    ) -> AsyncIterator[Host]:
        """A picked host, for an ``async with`` block: rejected if the block raises, else
        acknowledged.  A cancellation says nothing of the host."""
        host = await self.pick(topic, server, key=key)
        with self.sync.judging(topic, host):
            yield host

    async def wait_for_hosts(
        self, topic: str, *, timeout_seconds: float, server: str | None = None
    ) -> Snapshot:
        """The hosts of *topic*, as soon as there is one."""
        return await off_loop(
            lambda: self.sync.wait_for_hosts(topic, timeout_seconds=timeout_seconds, server=server)
        )

    async def is_alive(self, topic: str, host: str | Host) -> bool:
        """Whether *host* serves *topic*, by what `hosts` says."""
        wanted = host if isinstance(host, Host) else Host.parse(host)
        return wanted in await self.hosts(topic)

    async def watch(self, topic: str, server: str | None = None) -> AsyncIterator[Snapshot]:
        """The hosts of *topic* now, and again at every change, until `close`."""
        last = await self.hosts(topic, server)
        yield last
        while True:
            try:
                changed = await off_loop(
                    lambda seen: self.sync.next_change(
                        seen, timeout_seconds=SECONDS_PER_WAIT, server=server
                    ),
                    last,
                )
            except Closed:
                return
            except Unavailable:  # the cache has said so in the log
                await asyncio.sleep(SECONDS_BETWEEN_ASKS)
            else:
                if changed is not None:
                    last = changed
                    yield last

    async def topics(self) -> list[str]:
        """Every topic that somebody registered, sorted."""
        return await off_loop(self.sync.topics)

    # -- that this process serves one

    async def register(
        self,
        topic: str,
        host: str | Host,
        server: str | None = None,
        *,
        on_change: Callable[[model.Registration, Change], None] | None = None,
        beat_seconds: float | None = None,
    ) -> Registration:
        """Say that *host* serves *topic*; returns at once.  *on_change* is called on a thread of
        the library: hand over with ``loop.call_soon_threadsafe``."""
        return Registration(
            self.sync.register(topic, host, server, on_change=on_change, beat_seconds=beat_seconds)
        )

    async def unregister(self, topic: str, host: str | Host) -> None:
        """Take back what this process registered for *topic* on *host*."""
        self.sync.unregister(topic, host)

    async def expire(self, topic: str, host: str | Host) -> int:
        """Remove *host*'s registrations of *topic* for everybody; return how many there were."""
        return await off_loop(lambda: self.sync.expire(topic, host))

    async def orphans(self) -> dict[str, str]:
        """Keys under the prefix that nobody will remove, or that are not ours, with the reason."""
        return await off_loop(self.sync.orphans)

    async def sweep(self) -> list[str]:
        """Remove those `orphans` that are ours and held by no session; return what is gone."""
        return await off_loop(self.sync.sweep)

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
        return await off_loop(lambda: self.sync.explain(topic, server))

    def status(self) -> dict[str, object]:
        """Where everything stands; asks nobody, and is not awaited."""
        return self.sync.status()

    async def close(self, timeout_seconds: float = 5.0) -> None:
        """Withdraw every registration, end every thread, close every connection; idempotent.

        A cancellation does not stop it: it goes on by itself."""
        await off_loop(lambda: self.sync.close(timeout_seconds))

    async def __aenter__(self) -> Matchmaker:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.close()

    def __repr__(self) -> str:
        return f"<aio {self.sync!r}>"


async def off_loop(call: Callable[..., T], *arguments: object) -> T:
    """What *call* returns or raises, run on a thread of its own.

    Not the event loop's pool: that has few threads, is the application's, and is waited for when
    the loop ends.
    """
    loop = asyncio.get_running_loop()
    future: asyncio.Future[T] = loop.create_future()

    def settle(value: T | None, error: BaseException | None) -> None:
        if future.done():  # cancelled meanwhile
            return
        if error is None:
            future.set_result(cast(T, value))
        else:
            future.set_exception(error)

    def run() -> None:
        value: T | None = None
        error: BaseException | None = None
        try:
            value = call(*arguments)
        except BaseException as failure:
            error = failure
        with suppress(RuntimeError):  # the loop was closed meanwhile: nobody waits any more
            loop.call_soon_threadsafe(settle, value, error)

    threading.Thread(target=run, name="consul-matchmaker-awaited", daemon=True).start()
    return await future
