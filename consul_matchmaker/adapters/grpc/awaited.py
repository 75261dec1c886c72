"""A `grpc.aio.Channel` to a topic: each call picks a host, and uses the channel to that host."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from functools import partial
from typing import Any

import grpc

from ... import aio
from ...calls import ATTEMPTS, Attempts, checked_attempts
from ...errors import MatchmakerError, Unavailable
from ...model import Host, Snapshot, checked_topic
from . import rules
from .awaited_calls import StreamStreamCall, StreamUnaryCall, UnaryStreamCall, UnaryUnaryCall
from .methods import Method, Stubs
from .rules import GRACE_SECONDS, Idempotence
from .sub_channels import BROKEN, READY, SubChannel, SubChannels, Use

POLL_SECONDS = 0.05
"""So often the connectivity is looked at while somebody waits for it to change."""


def aio_channel(
    matchmaker: aio.Matchmaker,
    topic: str,
    *,
    credentials: grpc.ChannelCredentials | None = None,
    name: str | None = None,
    options: Sequence[tuple[str, Any]] = (),
    compression: grpc.Compression | None = None,
    interceptors: Sequence[grpc.aio.ClientInterceptor] = (),
    grace_seconds: float = GRACE_SECONDS,
    attempts: int = ATTEMPTS,
    idempotent: bool | Collection[str] = (),
) -> grpc.aio.Channel:
    """As `channel`, for asyncio; *interceptors* see every attempt.

    It belongs to the event loop on which it is first used: make one on each.
    """
    given = rules.options_for(name or topic, options)
    make = partial(_open, given, credentials, compression, list(interceptors))
    return Channel(matchmaker, topic, make, grace_seconds, attempts, Idempotence(idempotent))


def _open(
    options: Sequence[tuple[str, Any]],
    credentials: grpc.ChannelCredentials | None,
    compression: grpc.Compression | None,
    interceptors: Sequence[grpc.aio.ClientInterceptor],
    host: Host,
) -> grpc.aio.Channel:
    target = rules.target_of(host)
    if credentials is None:
        return grpc.aio.insecure_channel(target, options, compression, interceptors)
    return grpc.aio.secure_channel(target, credentials, options, compression, interceptors)


def _state(channel: Any) -> grpc.ChannelConnectivity | None:
    state: grpc.ChannelConnectivity = channel.get_state()
    return state


def _connect(sub: SubChannel) -> None:
    async def until_ready() -> None:
        try:
            with suppress(grpc.aio.UsageError):  # it was closed
                await sub.channel.channel_ready()
        finally:
            sub.watch = None

    sub.watch = asyncio.ensure_future(until_ready())


async def _settled(watch: Any, sub: SubChannel, timeout_seconds: float | None) -> None:
    """Return when *sub* is connected, or that failed, or its host left."""

    async def until_settled() -> None:
        while (
            watch is not None
            and not watch.done()
            and (state := _state(sub.channel)) not in (READY, BROKEN)
        ):
            assert state is not None
            changed = asyncio.ensure_future(sub.channel.wait_for_state_change(state))
            try:
                await asyncio.wait([watch, changed], return_when=asyncio.FIRST_COMPLETED)
                if changed.done():
                    changed.result()  # raises where the channel was closed
            finally:
                changed.cancel()

    with suppress(asyncio.TimeoutError):
        await asyncio.wait_for(until_settled(), timeout_seconds)


def _let_go(sub: SubChannel) -> None:
    if sub.watch is not None:
        sub.watch.cancel()


async def _close(sub: SubChannel, grace: float | None = None) -> None:
    _let_go(sub)
    await sub.channel.close(grace)


class Channel(Stubs, grpc.aio.Channel):
    """See `aio_channel`."""

    def __init__(
        self,
        matchmaker: aio.Matchmaker,
        topic: str,
        make: Callable[[Host], grpc.aio.Channel],
        grace_seconds: float,
        attempts: int,
        idempotence: Idempotence,
    ) -> None:
        self._matchmaker, self._topic = matchmaker, checked_topic(topic)
        self._attempts = checked_attempts(attempts)
        self.idempotence = idempotence
        self.subs = SubChannels(make, _state, _connect, _let_go, self._close_soon, grace_seconds)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._closing: set[asyncio.Task[None]] = set()

    # -- what the calls need

    def loop(self) -> asyncio.AbstractEventLoop:
        """This event loop; raises RuntimeError on another one than the first time."""
        loop = asyncio.get_running_loop()
        if self._loop is not loop:
            if self._loop is not None:
                raise RuntimeError("this channel belongs to another event loop: make one on each")
            self._loop = loop
        return loop

    def tries(self) -> Attempts:
        """For one call."""
        return self._matchmaker.sync.attempts(self._topic, attempts=self._attempts)

    def known_hosts(self) -> Snapshot | None:
        """Those that are known without a question to Consul.  Raises MatchmakerError."""
        return self._matchmaker.sync.cached_hosts(self._topic)

    async def hosts(self, deadline: float | None) -> Snapshot:
        """Raises MatchmakerError."""
        left = rules.left_until(deadline)
        return await self._matchmaker.hosts(self._topic, timeout_seconds=left)

    async def begin_connected(self, tries: Attempts, deadline: float | None) -> Use:
        """As `begin`, at a host that is connected: for what cannot be sent twice.  Waits for that,
        and goes to another host if it fails, or if the host leaves before."""
        while True:
            use = self.begin(tries, await self.hosts(deadline))
            try:
                await _settled(self.subs.watch_of(use.sub), use.sub, rules.left_until(deadline))
            except BaseException:
                use.end()
                raise
            if self.subs.has_left(use.sub):
                use.end()
                continue
            if _state(use.sub.channel) is not BROKEN:
                return use
            use.attempt.judge(is_good=False)
            use.end()
            if not tries.may_retry():
                raise Unavailable(f"failed to connect to {use.sub.host}")

    def begin(self, tries: Attempts, hosts: Snapshot) -> Use:
        """Begin an attempt.  Raises MatchmakerError, and UsageError after `close`."""
        try:
            return self.subs.begin(tries, hosts)
        except ValueError as error:
            raise grpc.aio.UsageError("Channel is closed.") from error

    # -- connectivity

    def get_state(self, try_to_connect: bool = False) -> grpc.ChannelConnectivity:
        """The best connectivity of the hosts.  With *try_to_connect* all hosts of the topic that
        are known are connected."""
        if self.subs.is_closed:
            return grpc.ChannelConnectivity.SHUTDOWN
        try:
            hosts = self.known_hosts()
        except MatchmakerError:
            return BROKEN
        if hosts is not None:
            self.subs.follow(hosts)
            if try_to_connect:
                self.loop()
                for host in hosts.hosts:
                    sub = self.subs.of_host(host)
                    if _state(sub.channel) is not READY:
                        self.subs.connect(sub)
        return rules.best(_state(sub.channel) for sub in self.subs.every())

    async def wait_for_state_change(self, last_observed_state: grpc.ChannelConnectivity) -> None:
        """Until `get_state` says another one."""
        while self.get_state() is last_observed_state:
            with suppress(MatchmakerError):
                await self.hosts(None)  # of a topic that is not known yet, Consul is asked
            await asyncio.sleep(POLL_SECONDS)

    async def channel_ready(self) -> None:
        """Until a host is connected."""
        while (state := self.get_state(try_to_connect=True)) is not READY:
            if state is grpc.ChannelConnectivity.SHUTDOWN:
                raise grpc.aio.UsageError("Channel is closed.")
            with suppress(MatchmakerError):
                await self.hosts(None)
            await asyncio.sleep(POLL_SECONDS)

    # -- its own life

    async def close(self, grace: float | None = None) -> None:
        """Close the channel to every host; idempotent.  Calls that run may go on for *grace*
        seconds."""
        subs = self.subs.close_all()
        await asyncio.gather(*(_close(sub, grace) for sub in subs), *self._closing)

    async def __aenter__(self) -> Channel:
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self.close()

    def _close_soon(self, sub: SubChannel) -> None:
        task = asyncio.ensure_future(_close(sub))
        self._closing.add(task)
        task.add_done_callback(self._closing.discard)

    def __repr__(self) -> str:
        state = "closed" if self.subs.is_closed else f"{len(self.subs.every())} hosts"
        return f"<grpc.aio channel to {self._topic}, {state}>"


class UnaryUnary(Method, grpc.aio.UnaryUnaryMultiCallable):
    def __call__(
        self,
        request: Any,
        *,
        timeout: float | None = None,
        metadata: Any = None,
        credentials: grpc.CallCredentials | None = None,
        wait_for_ready: bool | None = None,
        compression: grpc.Compression | None = None,
    ) -> UnaryUnaryCall:
        how = metadata, credentials, wait_for_ready, compression
        return UnaryUnaryCall(self, request, timeout, *how)


class UnaryStream(Method, grpc.aio.UnaryStreamMultiCallable):
    def __call__(
        self,
        request: Any,
        *,
        timeout: float | None = None,
        metadata: Any = None,
        credentials: grpc.CallCredentials | None = None,
        wait_for_ready: bool | None = None,
        compression: grpc.Compression | None = None,
    ) -> UnaryStreamCall:
        how = metadata, credentials, wait_for_ready, compression
        return UnaryStreamCall(self, request, timeout, *how)


class StreamUnary(Method, grpc.aio.StreamUnaryMultiCallable):
    is_stream_sent = True

    def __call__(
        self,
        request_iterator: Any = None,
        timeout: float | None = None,
        metadata: Any = None,
        credentials: grpc.CallCredentials | None = None,
        wait_for_ready: bool | None = None,
        compression: grpc.Compression | None = None,
    ) -> StreamUnaryCall:
        how = metadata, credentials, wait_for_ready, compression
        return StreamUnaryCall(self, request_iterator, timeout, *how)


class StreamStream(Method, grpc.aio.StreamStreamMultiCallable):
    is_stream_sent = True

    def __call__(
        self,
        request_iterator: Any = None,
        timeout: float | None = None,
        metadata: Any = None,
        credentials: grpc.CallCredentials | None = None,
        wait_for_ready: bool | None = None,
        compression: grpc.Compression | None = None,
    ) -> StreamStreamCall:
        how = metadata, credentials, wait_for_ready, compression
        return StreamStreamCall(self, request_iterator, timeout, *how)


Channel._kinds = {
    "unary_unary": UnaryUnary,
    "unary_stream": UnaryStream,
    "stream_unary": StreamUnary,
    "stream_stream": StreamStream,
}
