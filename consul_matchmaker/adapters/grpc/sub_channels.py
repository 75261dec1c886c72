"""One gRPC channel a host, made when first used and closed some time after the host left."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import grpc

from ...calls import Attempt, Attempts
from ...model import Host, Snapshot
from ..tracing import name_host
from .rules import SETTLING_SECONDS, clock

READY = grpc.ChannelConnectivity.READY
BROKEN = grpc.ChannelConnectivity.TRANSIENT_FAILURE
UNCONNECTED = (grpc.ChannelConnectivity.IDLE, grpc.ChannelConnectivity.CONNECTING)


class SubChannel:
    """The channel to one host, and how many calls use it."""

    __slots__ = ("calls", "channel", "host", "left_at", "watch")

    def __init__(self, host: Host, channel: Any, left_at: float | None) -> None:
        self.host, self.channel, self.left_at = host, channel, left_at
        self.calls = 0
        self.watch: Any = None
        """What connects it, if somebody does."""


class Use:
    """An attempt, and the sub-channel that it uses, which is not closed before `end`."""

    __slots__ = ("_is_over", "attempt", "owner", "sub")

    def __init__(self, owner: SubChannels, attempt: Attempt, sub: SubChannel) -> None:
        self.owner, self.attempt, self.sub = owner, attempt, sub
        self._is_over = False

    def end(self) -> None:
        """The call is over.  Idempotent."""
        if not self._is_over:
            self._is_over = True
            self.attempt.end()
            self.owner.give_back(self.sub)


class SubChannels:
    """Those of one topic.  Thread-safe.  What depends on the kind of channel is handed in: *make*
    opens one to a host, *state* is its connectivity or None where that is not known, *connect* has
    it connect without a call until *let_go* or it is connected, *close* ends it and waits for
    nothing."""

    def __init__(
        self,
        make: Callable[[Host], Any],
        state: Callable[[Any], grpc.ChannelConnectivity | None],
        connect: Callable[[SubChannel], None],
        let_go: Callable[[SubChannel], None],
        close: Callable[[SubChannel], None],
        grace_seconds: float,
    ) -> None:
        self._make, self.state = make, state
        self._connect, self._let_go, self._close = connect, let_go, close
        self._grace_seconds = max(grace_seconds, SETTLING_SECONDS)
        self._lock = threading.Lock()
        self._subs: dict[Host, SubChannel] = {}
        self._instances: object = None
        self._hosts: frozenset[Host] = frozenset()
        self._taken_at = 0.0
        self._leaving: list[SubChannel] = []
        self.is_closed = False
        self.generation = object()
        """Another one when a sub-channel was closed: whoever keeps something of them lets go."""

    def begin(self, tries: Attempts, snapshot: Snapshot) -> Use:
        """Begin an attempt at a host of *snapshot*: one that is connected, where another than the
        picked one is; that one is connected meanwhile.  Raises NoLiveHosts."""
        if snapshot.instances is not self._instances:
            self._follow(snapshot)
        if self._leaving:
            self._close_left()
        use = self._use(tries, snapshot)
        for _ in range(len(snapshot.hosts)):
            state = self.state(use.sub.channel)
            if state is READY or state is None or not self._is_one_ready():
                break
            if state is BROKEN:
                use.attempt.judge(is_good=False)
            self.connect(use.sub)
            use.end()
            use = self._use(tries, snapshot)
        name_host(use.sub.host)
        return use

    def connect(self, sub: SubChannel) -> None:
        """Have *sub* connect by itself, as long as it takes."""
        with self._lock:
            if sub.watch is None and not self.is_closed:
                self._connect(sub)

    def watch_of(self, sub: SubChannel) -> Any:
        """What connects *sub*, from now on if need be; None where it is connected, or where that
        cannot be known."""
        state = self.state(sub.channel)
        if state is READY or state is None:
            return None
        self.connect(sub)
        return sub.watch

    def has_left(self, sub: SubChannel) -> bool:
        """Whether the host of *sub* left before it was connected: nobody connects it any more."""
        return sub.left_at is not None and self.state(sub.channel) in UNCONNECTED

    def give_back(self, sub: SubChannel) -> None:
        with self._lock:
            sub.calls -= 1

    def every(self) -> list[SubChannel]:
        """Those of hosts that are in the topic."""
        with self._lock:
            return [sub for sub in self._subs.values() if sub.left_at is None]

    def of_host(self, host: Host) -> SubChannel:
        """The one of *host*, to connect it; made if need be."""
        with self._lock:
            return self._sub(host)

    def follow(self, snapshot: Snapshot) -> None:
        """Take notice of who serves the topic."""
        if snapshot.instances is not self._instances:
            self._follow(snapshot)

    def close_all(self) -> list[SubChannel]:
        """Have no more of them; return those that are to be closed."""
        with self._lock:
            self.is_closed = True
            subs = list(self._subs.values())
            self._subs, self._leaving, self.generation = {}, [], object()
            return subs

    def _use(self, tries: Attempts, snapshot: Snapshot) -> Use:
        attempt = tries.begin(snapshot)
        try:
            with self._lock:
                sub = self._sub(attempt.host)
                sub.calls += 1
        except BaseException:
            attempt.end()
            raise
        return Use(self, attempt, sub)

    def _sub(self, host: Host) -> SubChannel:
        if self.is_closed:
            raise ValueError("Cannot invoke RPC on closed channel!")  # as gRPC says it
        sub = self._subs.get(host)
        if sub is None:
            # An older answer may have named one that has left since.
            left_at = None if host in self._hosts else clock()
            sub = self._subs[host] = SubChannel(host, self._make(host), left_at)
            if left_at is not None:
                self._leaving.append(sub)
        return sub

    def _is_one_ready(self) -> bool:
        return any(self.state(sub.channel) is READY for sub in self.every())

    def _follow(self, snapshot: Snapshot) -> None:
        with self._lock:
            if snapshot.taken_at < self._taken_at:
                return  # another thread has seen a newer one
            self._taken_at, self._instances = snapshot.taken_at, snapshot.instances
            self._hosts = frozenset(snapshot.hosts)
            for host, sub in self._subs.items():
                if host in self._hosts:
                    sub.left_at = None
                elif sub.left_at is None:
                    sub.left_at = clock()
                    self._let_go(sub)
            self._leaving = [sub for sub in self._subs.values() if sub.left_at is not None]

    def _close_left(self) -> None:
        until = clock() - self._grace_seconds
        with self._lock:
            over = [one for one in self._leaving if not one.calls and (one.left_at or 0.0) <= until]
            if not over:
                return
            for sub in over:
                self._leaving.remove(sub)
                del self._subs[sub.host]
            self.generation = object()
        for sub in over:
            self._close(sub)
