"""A `grpc.Channel` to a topic: each call picks a host, and uses the channel to that host."""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Sequence
from functools import partial
from typing import Any

import grpc

from ...calls import ATTEMPTS, Attempts, checked_attempts
from ...errors import MatchmakerError
from ...matchmaker import Matchmaker
from ...model import Host, checked_topic
from . import rules
from .connectivity import Connectivity
from .methods import Method, Stubs
from .pending import NoHost, Pending
from .rules import GRACE_SECONDS, Idempotence, clock
from .sub_channels import BROKEN, READY, SubChannel, SubChannels, Use

POLL_SECONDS = 0.01
SECONDS_TO_STOP = 5.0


def channel(
    matchmaker: Matchmaker,
    topic: str,
    *,
    credentials: grpc.ChannelCredentials | None = None,
    name: str | None = None,
    options: Sequence[tuple[str, Any]] = (),
    compression: grpc.Compression | None = None,
    grace_seconds: float = GRACE_SECONDS,
    attempts: int = ATTEMPTS,
    idempotent: bool | Collection[str] = (),
) -> grpc.Channel:
    """A channel whose calls go to the hosts of *topic*.  Thread-safe; to be closed, or entered.

    *credentials*, *options*, *compression*: of the channels to the hosts, as for
    `grpc.secure_channel`; certificates must be for *name* (the topic, if not given), which is also
    what servers see as authority.

    A call that was UNAVAILABLE goes to another host, up to *attempts* times in all and within the
    topic's retry budget, if it was not sent, or if its method is *idempotent*: True for all, or
    full names such as ``/package.Service/Method``.  Not one with a stream of requests, nor after
    the first answer.  The timeout is for all attempts.  Without a host a call is UNAVAILABLE at
    once, also with wait_for_ready, and its cause is the error of this library.

    The connection to a host that left is closed when its calls have ended, *grace_seconds* later at
    the earliest, by a later call or by `close`; the matchmaker is not closed.
    Raises InvalidTopic, ConfigurationError.
    """
    return Channel(
        matchmaker,
        topic,
        partial(_open, rules.options_for(name or topic, options), credentials, compression),
        grace_seconds,
        attempts,
        Idempotence(idempotent),
    )


def _open(
    options: Sequence[tuple[str, Any]],
    credentials: grpc.ChannelCredentials | None,
    compression: grpc.Compression | None,
    host: Host,
) -> grpc.Channel:
    target = rules.target_of(host)
    if credentials is None:
        return grpc.insecure_channel(target, options, compression)
    return grpc.secure_channel(target, credentials, options, compression)


def _state(sub: Any) -> grpc.ChannelConnectivity | None:
    """The connectivity of a channel to a host, or None.  gRPC has no public way to ask for it that
    starts no thread."""
    while sub is not None:  # interceptors that are put on every channel wrap it
        sub = getattr(sub, "_channel", None)
        ask = getattr(sub, "check_connectivity_state", None)
        if ask is not None:
            return _CONNECTIVITY.get(ask(False))
    return None


_CONNECTIVITY = {state.value[0]: state for state in grpc.ChannelConnectivity}


class _Watch:
    """gRPC connects a sub-channel on a thread of its own, until it has or it is closed."""

    def __init__(self, sub: SubChannel) -> None:
        self._sub = sub
        self._heard = threading.Condition()
        self._state: grpc.ChannelConnectivity | None = None
        self._is_over = False

    def __call__(self, state: grpc.ChannelConnectivity) -> None:
        with self._heard:
            self._state = state
            self._heard.notify_all()
        if state is READY:
            _let_go(self._sub)

    def end(self) -> None:
        """Nobody connects it any more."""
        with self._heard:
            self._is_over = True
            self._heard.notify_all()

    def wait(self, timeout_seconds: float | None) -> None:
        """Until it is connected, or that failed, or its host left."""
        with self._heard:
            self._heard.wait_for(
                lambda: self._is_over or self._state in (READY, BROKEN), timeout_seconds
            )


def _connect(sub: SubChannel) -> None:
    sub.watch = _Watch(sub)
    sub.channel.subscribe(sub.watch, try_to_connect=True)


def _let_go(sub: SubChannel) -> None:
    watch, sub.watch = sub.watch, None
    if watch is not None:
        sub.channel.unsubscribe(watch)
        watch.end()


def _close(sub: SubChannel) -> None:
    """gRPC's thread looks at the channel for up to 0.2 s more, and would raise if it were closed
    meanwhile: this waits for it."""
    _let_go(sub)
    until = clock() + SECONDS_TO_STOP
    while _is_polled(sub.channel) and clock() < until:
        threading.Event().wait(POLL_SECONDS)
    sub.channel.close()


def _is_polled(sub: Any) -> bool:
    """Whether gRPC has such a thread; it has no public way to ask for that."""
    while sub is not None:
        polled = getattr(sub, "_connectivity_state", None)
        if polled is not None:
            return bool(getattr(polled, "polling", False))
        sub = getattr(sub, "_channel", None)
    return False


class Channel(Stubs, grpc.Channel):
    """See `channel`."""

    def __init__(
        self,
        matchmaker: Matchmaker,
        topic: str,
        make: Callable[[Host], grpc.Channel],
        grace_seconds: float,
        attempts: int,
        idempotence: Idempotence,
    ) -> None:
        self._matchmaker, self._topic = matchmaker, checked_topic(topic)
        self._attempts = checked_attempts(attempts)
        self.idempotence = idempotence
        self.subs = SubChannels(make, _state, _connect, _let_go, _close, grace_seconds)
        self._connectivity = Connectivity(self._observe)

    # -- what the calls need

    def tries(self) -> Attempts:
        """For one call."""
        return self._matchmaker.attempts(self._topic, attempts=self._attempts)

    def begin(self, tries: Attempts, deadline: float | None, failure: Exception | None) -> Use:
        """Begin an attempt.  Raises *failure*, of the attempt before, or NoHost when there is no
        host, and ValueError after `close`."""
        try:
            hosts = self._matchmaker.hosts(self._topic, timeout_seconds=rules.left_until(deadline))
            return self.subs.begin(tries, hosts)
        except MatchmakerError as error:
            if failure is not None:  # it says more than that nobody is left
                raise failure from None
            raise NoHost(rules.because_of(error)) from error

    def begin_connected(self, tries: Attempts, deadline: float | None) -> Use:
        """As `begin`, at a host that is connected: for what cannot be sent twice.  Waits for that,
        and goes to another host if it fails, or if the host leaves before."""
        failure: Exception | None = None
        while True:
            use = self.begin(tries, deadline, failure)
            watch = self.subs.watch_of(use.sub)
            if watch is not None:
                watch.wait(rules.left_until(deadline))
            if self.subs.has_left(use.sub):
                use.end()
                continue
            if _state(use.sub.channel) is not BROKEN:
                return use
            use.attempt.judge(is_good=False)
            use.end()
            failure = NoHost(f"failed to connect to {use.sub.host}")
            if not tries.may_retry():
                raise failure

    # -- connectivity

    def subscribe(
        self,
        callback: Callable[[grpc.ChannelConnectivity], None],
        try_to_connect: bool | None = False,
    ) -> None:
        """*callback* is called with the best connectivity of the hosts, now and when it changes, on
        a thread that lives as long as somebody subscribes.  With *try_to_connect* all hosts of the
        topic are connected."""
        self._connectivity.subscribe(callback, bool(try_to_connect))

    def unsubscribe(self, callback: Callable[[grpc.ChannelConnectivity], None]) -> None:
        self._connectivity.unsubscribe(callback)

    def _observe(self, try_to_connect: bool) -> grpc.ChannelConnectivity:
        if self.subs.is_closed:
            return grpc.ChannelConnectivity.SHUTDOWN
        try:
            snapshot = self._matchmaker.hosts(self._topic)
            self.subs.follow(snapshot)
            if try_to_connect:
                for host in snapshot.hosts:
                    sub = self.subs.of_host(host)
                    if _state(sub.channel) is not READY:
                        self.subs.connect(sub)
        except MatchmakerError:
            return BROKEN
        return rules.best(_state(sub.channel) for sub in self.subs.every())

    # -- its own life

    def close(self) -> None:
        """Close the channel to every host, which ends all calls; idempotent."""
        self._connectivity.stop()
        subs = self.subs.close_all()
        for sub in subs:
            _let_go(sub)
        for sub in subs:
            _close(sub)

    def __enter__(self) -> Channel:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def __repr__(self) -> str:
        state = "closed" if self.subs.is_closed else f"{len(self.subs.every())} hosts"
        return f"<grpc channel to {self._topic}, {state}>"


class Blocking(Method):
    """A method of such a channel."""

    def begin(
        self,
        tries: Attempts,
        deadline: float | None,
        failure: Exception | None,
        metadata: Any,
        credentials: Any,
        wait_for_ready: bool | None,
        compression: Any,
    ) -> Use:
        """Begin an attempt as this method needs it, and the call's own arguments want it."""
        owner: Channel = self.owner
        if self.is_stream_sent and not wait_for_ready:
            return owner.begin_connected(tries, deadline)
        return owner.begin(tries, deadline, failure)

    def answer(self, name: str, request: Any, timeout: float | None, *how: Any) -> Any:
        """Call, and wait.  *how*: metadata, credentials, wait_for_ready and compression."""
        deadline = rules.deadline_of(timeout)
        tries = self.owner.tries()
        failure: Exception | None = None
        while True:
            use = self.begin(tries, deadline, failure, *how)
            try:
                function = getattr(self.of(use.sub), name)
                answer = function(request, rules.left_until(deadline), *how)
                use.attempt.judge(is_good=True)
                return answer
            except grpc.RpcError as error:
                self.judge(use, error.code(), deadline)
                if not self.may_move(use, tries, error.code(), error.details()):
                    raise
                failure = error
            finally:
                use.end()


class UnaryUnary(Blocking, grpc.UnaryUnaryMultiCallable):
    def __call__(
        self,
        request: Any,
        timeout: float | None = None,
        metadata: Any = None,
        credentials: grpc.CallCredentials | None = None,
        wait_for_ready: bool | None = None,
        compression: grpc.Compression | None = None,
    ) -> Any:
        how = metadata, credentials, wait_for_ready, compression
        return self.answer("__call__", request, timeout, *how)

    def with_call(
        self,
        request: Any,
        timeout: float | None = None,
        metadata: Any = None,
        credentials: grpc.CallCredentials | None = None,
        wait_for_ready: bool | None = None,
        compression: grpc.Compression | None = None,
    ) -> Any:
        how = metadata, credentials, wait_for_ready, compression
        return self.answer("with_call", request, timeout, *how)

    def future(
        self,
        request: Any,
        timeout: float | None = None,
        metadata: Any = None,
        credentials: grpc.CallCredentials | None = None,
        wait_for_ready: bool | None = None,
        compression: grpc.Compression | None = None,
    ) -> Any:
        how = metadata, credentials, wait_for_ready, compression
        return Pending.begun(self, "future", request, timeout, how)


class UnaryStream(Blocking, grpc.UnaryStreamMultiCallable):
    def __call__(
        self,
        request: Any,
        timeout: float | None = None,
        metadata: Any = None,
        credentials: grpc.CallCredentials | None = None,
        wait_for_ready: bool | None = None,
        compression: grpc.Compression | None = None,
    ) -> Any:
        how = metadata, credentials, wait_for_ready, compression
        return Pending.begun(self, "__call__", request, timeout, how)


class StreamUnary(Blocking, grpc.StreamUnaryMultiCallable):
    is_stream_sent = True

    def __call__(
        self,
        request_iterator: Any,
        timeout: float | None = None,
        metadata: Any = None,
        credentials: grpc.CallCredentials | None = None,
        wait_for_ready: bool | None = None,
        compression: grpc.Compression | None = None,
    ) -> Any:
        how = metadata, credentials, wait_for_ready, compression
        return self.answer("__call__", request_iterator, timeout, *how)

    def with_call(
        self,
        request_iterator: Any,
        timeout: float | None = None,
        metadata: Any = None,
        credentials: grpc.CallCredentials | None = None,
        wait_for_ready: bool | None = None,
        compression: grpc.Compression | None = None,
    ) -> Any:
        how = metadata, credentials, wait_for_ready, compression
        return self.answer("with_call", request_iterator, timeout, *how)

    def future(
        self,
        request_iterator: Any,
        timeout: float | None = None,
        metadata: Any = None,
        credentials: grpc.CallCredentials | None = None,
        wait_for_ready: bool | None = None,
        compression: grpc.Compression | None = None,
    ) -> Any:
        how = metadata, credentials, wait_for_ready, compression
        return Pending.begun(self, "future", request_iterator, timeout, how)


class StreamStream(Blocking, grpc.StreamStreamMultiCallable):
    is_stream_sent = True

    def __call__(
        self,
        request_iterator: Any,
        timeout: float | None = None,
        metadata: Any = None,
        credentials: grpc.CallCredentials | None = None,
        wait_for_ready: bool | None = None,
        compression: grpc.Compression | None = None,
    ) -> Any:
        how = metadata, credentials, wait_for_ready, compression
        return Pending.begun(self, "__call__", request_iterator, timeout, how)


Channel._kinds = {
    "unary_unary": UnaryUnary,
    "unary_stream": UnaryStream,
    "stream_unary": StreamUnary,
    "stream_stream": StreamStream,
}
