"""A call under asyncio: one attempt after another, each a call of `grpc.aio` to one host."""

from __future__ import annotations

import asyncio
import logging
import weakref
from collections.abc import AsyncIterator, Callable, Coroutine, Generator
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import grpc

from ...errors import MatchmakerError
from . import rules
from .sub_channels import Use

if TYPE_CHECKING:
    from .methods import Method

logger = logging.getLogger(__name__)


class Call(grpc.aio.Call):
    """What all kinds of calls have.

    It begins when it is made where the topic's hosts are known; else once Consul has answered.
    When an attempt ends, it is decided at once whether the call is over or goes to another host.
    """

    _channel: Any = None
    """Not that of any channel: up to gRPC 1.76 at least, a channel that closes looks for its own
    calls among the `self` of all tasks of the event loop, and refuses those that do not say."""

    def __init__(
        self,
        method: Method,
        request: Any,
        timeout: float | None,
        metadata: Any,
        credentials: Any,
        wait_for_ready: bool | None,
        compression: Any,
    ) -> None:
        owner = method.owner
        self._loop: asyncio.AbstractEventLoop = owner.loop()
        self._method, self._owner, self._request = method, owner, request
        self._how = {
            "metadata": metadata,
            "credentials": credentials,
            "wait_for_ready": wait_for_ready,
            "compression": compression,
        }
        self._deadline = rules.deadline_of(timeout)
        self._tries = owner.tries()
        self._inner: Any = None
        """The attempt that goes on, or the last one; None while Consul is asked."""
        self._use: Use | None = None
        self._error: BaseException | None = None
        """Why there is no attempt."""
        self._asking: asyncio.Task[None] | None = None
        self._changed: asyncio.Future[None] = self._loop.create_future()
        """Done, and another one, when one of these changes."""
        self._has_answered = self._is_over = self._is_cancelled = False
        self._callbacks: list[Callable[[Any], None]] = []
        self._kept: list[Call] = []
        """Itself, where the call goes on although nobody holds it."""
        self._keep()
        self._go_on(None)

    def _keep(self) -> None:
        """gRPC's calls with one answer go on although nobody holds them."""
        self._kept[:] = [self]

    # -- one attempt after another

    def _go_on(self, failed: Any) -> None:
        """Begin an attempt.  *failed*: the one before, which remains the outcome if there is no
        host for another one."""
        try:
            hosts = None if self._must_wait() else self._owner.known_hosts()
            if hosts is None:
                self._inner = None
                self._asking = self._loop.create_task(self._ask(failed))
            else:
                self._begin(self._owner.begin(self._tries, hosts))
        except Exception as error:
            if failed is None and not isinstance(error, MatchmakerError):
                raise
            self._give_up(failed, error)

    def _must_wait(self) -> bool:
        """Whether it may only begin at a host that is connected."""
        return self._method.is_stream_sent and not self._how["wait_for_ready"]

    async def _ask(self, failed: Any) -> None:
        try:
            if self._must_wait():
                self._begin(await self._owner.begin_connected(self._tries, self._deadline))
            else:
                hosts = await self._owner.hosts(self._deadline)
                self._begin(self._owner.begin(self._tries, hosts))
        except Exception as error:
            self._give_up(failed, error)

    def _begin(self, use: Use) -> None:
        try:
            left = rules.left_until(self._deadline)
            inner = self._method.of(use.sub)(self._request, timeout=left, **self._how)
        except BaseException:
            use.end()
            raise
        self._inner, self._use = inner, use
        self._tell_change()
        inner.add_done_callback(_Ended(weakref.ref(self), use, self._kept))

    def _give_up(self, failed: Any, error: Exception) -> None:
        self._inner = failed
        if failed is None:
            if isinstance(error, MatchmakerError):
                said = rules.because_of(error)
                unavailable = _error(grpc.StatusCode.UNAVAILABLE, said)
                unavailable.__cause__ = error
                self._error = unavailable
            else:
                self._error = error
        self._end()

    def ended(self, use: Use, inner: Any) -> None:
        """The attempt is over: judge it, and go on if that may be."""
        code, details = _at_hand(inner.code()), _at_hand(inner.details())
        self._method.judge(use, code, self._deadline)
        moves = not (self._has_answered or self._is_cancelled) and self._method.may_move(
            use, self._tries, code, details
        )
        use.end()
        if moves:
            self._go_on(inner)
        else:
            self._end()

    def _end(self) -> None:
        self._is_over = True
        self._kept.clear()
        self._tell_change()
        callbacks, self._callbacks = self._callbacks, []
        for callback in callbacks:
            try:
                callback(self)
            except Exception:
                logger.exception("a callback of a call raised")

    def _tell_change(self) -> None:
        changed, self._changed = self._changed, self._loop.create_future()
        if not changed.done():
            changed.set_result(None)

    # -- what the kinds of calls need

    async def _current(self) -> Any:
        """The attempt that goes on.  Raises what there is instead."""
        while self._inner is None:
            if self._is_cancelled:
                raise asyncio.CancelledError
            if self._error is not None:
                raise self._error
            await asyncio.shield(self._changed)
        return self._inner

    async def _has_moved_from(self, inner: Any) -> bool:
        """Whether another attempt goes on for *inner*, which is over."""
        while self._inner is inner and not self._is_over:
            await asyncio.shield(self._changed)
        return self._inner is not inner

    async def _last(self, ask: Callable[[Any], Coroutine[Any, Any, Any]]) -> Any:
        """What *ask* says of the attempt with which the call ended."""
        while True:
            inner = await self._current()
            said = await ask(inner)
            if not (inner.done() and await self._has_moved_from(inner)):
                return said

    async def _answer(self) -> Any:
        try:
            while True:
                inner = await self._current()
                try:
                    return await inner
                except grpc.aio.AioRpcError:
                    if not await self._has_moved_from(inner):
                        raise
        except asyncio.CancelledError:  # who waits is cancelled, and the call with it
            self.cancel()
            raise

    def _is_from_another(self, inner: Any) -> bool:
        """Whether an answer of *inner* is to be left out, since the call has begun elsewhere; if it
        is not, the call stays."""
        if self._inner is not inner:
            return True
        if not self._has_answered:
            self._has_answered = True
            assert self._use is not None
            self._use.attempt.judge(is_good=True)
        return False

    # -- grpc.aio.Call

    def cancelled(self) -> bool:
        return self._is_cancelled or (self._inner is not None and self._inner.cancelled())

    def done(self) -> bool:
        return self._is_over or self._is_cancelled

    def time_remaining(self) -> float | None:
        return rules.left_until(self._deadline)

    def cancel(self) -> bool:
        if self.done():
            return False
        self._is_cancelled = True
        if self._inner is not None:
            return bool(self._inner.cancel())
        if self._asking is not None:
            self._asking.cancel()
        self._end()
        return True

    def add_done_callback(self, callback: Callable[[Any], None]) -> None:
        if self._is_over:
            callback(self)
        else:
            self._callbacks.append(callback)
            self._kept[:] = [self]

    async def initial_metadata(self) -> Any:
        return await self._told("initial_metadata")

    async def trailing_metadata(self) -> Any:
        return await self._told("trailing_metadata")

    async def code(self) -> Any:
        return await self._told("code")

    async def details(self) -> Any:
        return await self._told("details")

    async def debug_error_string(self) -> Any:
        return await self._told("debug_error_string")

    async def _told(self, what: str) -> Any:
        try:
            return await self._last(lambda inner: getattr(inner, what)())
        except grpc.aio.AioRpcError as error:
            return getattr(error, what)()
        except asyncio.CancelledError:
            if self._inner is None and self._is_cancelled:
                return getattr(_error(grpc.StatusCode.CANCELLED, "Locally cancelled"), what)()
            raise

    async def wait_for_connection(self) -> None:
        while True:
            inner = await self._current()
            try:
                await inner.wait_for_connection()
            except grpc.aio.AioRpcError:
                if not await self._has_moved_from(inner):
                    raise
            else:
                return

    def __del__(self) -> None:
        inner = getattr(self, "_inner", None)
        if inner is not None and not self._is_over:
            with suppress(Exception):  # the event loop may be closed
                inner.cancel()

    def __repr__(self) -> str:
        return f"<call of a topic: {self._error or self._inner!r}>"


class _Answers(Call):
    """A stream of answers; the call is cancelled when nobody holds it any more."""

    _iterator: AsyncIterator[Any] | None = None

    def _keep(self) -> None:
        """It is not."""

    def __aiter__(self) -> AsyncIterator[Any]:
        if self._iterator is None:
            self._iterator = self._iterated()
        return self._iterator

    async def _iterated(self) -> AsyncIterator[Any]:
        while True:
            inner = await self._current()
            try:
                async for answer in inner:
                    if self._is_from_another(inner):
                        break
                    yield answer
                else:
                    return
            except grpc.aio.AioRpcError:
                if not await self._has_moved_from(inner):
                    raise

    async def read(self) -> Any:
        while True:
            inner = await self._current()
            try:
                answer = await inner.read()
            except grpc.aio.AioRpcError:
                if not await self._has_moved_from(inner):
                    raise
            else:
                if answer is grpc.aio.EOF or not self._is_from_another(inner):
                    return answer


class _Requests(Call):
    """A stream of requests."""

    async def write(self, request: Any) -> None:
        await (await self._current()).write(request)

    async def done_writing(self) -> None:
        await (await self._current()).done_writing()


class UnaryUnaryCall(Call, grpc.aio.UnaryUnaryCall):
    def __await__(self) -> Generator[Any, None, Any]:
        return self._answer().__await__()


class UnaryStreamCall(_Answers, grpc.aio.UnaryStreamCall):
    pass


class StreamUnaryCall(_Requests, grpc.aio.StreamUnaryCall):
    def __await__(self) -> Generator[Any, None, Any]:
        return self._answer().__await__()


class StreamStreamCall(_Requests, _Answers, grpc.aio.StreamStreamCall):
    pass


class _Ended:
    """What gRPC calls when an attempt is over."""

    def __init__(self, call: Callable[[], Call | None], use: Use, kept: list[Call]) -> None:
        self._call, self._use, self._kept = call, use, kept

    def __call__(self, inner: Any) -> None:
        call = self._call()
        if call is None:  # nobody wants it any more
            self._use.end()
        else:
            call.ended(self._use, inner)


def _error(code: grpc.StatusCode, details: str) -> Any:
    nothing = grpc.aio.Metadata()
    return grpc.aio.AioRpcError(code, nothing, nothing, details, details)


def _at_hand(asked: Coroutine[Any, Any, Any]) -> Any:
    """What *asked* returns, which need not wait: the call is over."""
    try:
        asked.send(None)
    except StopIteration as stop:
        return stop.value
    asked.close()
    raise RuntimeError("a call of grpc.aio that is over does not know its status")
