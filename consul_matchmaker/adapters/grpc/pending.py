"""A call that is under way: a future, or a stream of answers, of one attempt after another."""

from __future__ import annotations

import logging
import threading
import weakref
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import grpc

from . import rules
from .sub_channels import Use

if TYPE_CHECKING:
    from .blocking import Blocking

logger = logging.getLogger(__name__)


class NoHost(grpc.RpcError, grpc.Call, grpc.Future):
    """A call for which there was no host: UNAVAILABLE; its cause says why."""

    def __init__(self, details: str) -> None:
        super().__init__(details)
        self._details = details

    def code(self) -> grpc.StatusCode:
        return grpc.StatusCode.UNAVAILABLE

    def details(self) -> str:
        return self._details

    debug_error_string = details

    def initial_metadata(self) -> Any:
        return ()

    trailing_metadata = initial_metadata

    def is_active(self) -> bool:
        return False

    cancel = cancelled = running = is_active

    def time_remaining(self) -> float | None:
        return None

    def done(self) -> bool:
        return True

    def result(self, timeout: float | None = None) -> Any:
        raise self

    def exception(self, timeout: float | None = None) -> NoHost:
        return self

    def traceback(self, timeout: float | None = None) -> Any:
        return self.__traceback__

    def add_callback(self, callback: Callable[[], None]) -> bool:
        return False

    def add_done_callback(self, fn: Callable[[Any], None]) -> None:
        fn(self)

    def __iter__(self) -> NoHost:
        return self

    def __next__(self) -> Any:
        raise self


class Pending(grpc.Call, grpc.Future):
    """What callers get for a call that they do not wait for.  Thread-safe.

    When an attempt ends, gRPC says so on a thread of its own; there it is decided whether the call
    is over, or goes to another host.  Like a call of gRPC it is cancelled when nobody holds it any
    more.
    """

    @classmethod
    def begun(
        cls, method: Blocking, name: str, request: Any, timeout: float | None, how: tuple[Any, ...]
    ) -> Any:
        """Begin a call; without a host it has failed already."""
        call = cls(method, name, request, timeout, how)
        try:
            return call._begin(None)
        except NoHost as error:
            return error

    def __init__(
        self, method: Blocking, name: str, request: Any, timeout: float | None, how: tuple[Any, ...]
    ) -> None:
        self._method, self._name, self._request, self._how = method, name, request, how
        self._deadline = rules.deadline_of(timeout)
        self._tries = method.owner.tries()
        self._changed = threading.Condition()
        self._inner: Any = None
        self._use: Use | None = None
        self._deciding: Any = None
        """The attempt that failed, while it is decided whether there is another one."""
        self._has_answered = self._is_over = self._is_cancelled = False
        self._callbacks: list[Callable[[], None]] = []
        self._kept: list[Pending] = []
        """Itself, once somebody wants to be told of its end."""

    def _begin(self, failure: Exception | None) -> Any:
        use = self._method.begin(self._tries, self._deadline, failure, *self._how)
        try:
            function = getattr(self._method.of(use.sub), self._name)
            inner = function(self._request, rules.left_until(self._deadline), *self._how)
        except BaseException:
            use.end()
            raise
        if not isinstance(inner, grpc.RpcContext):
            # From an interceptor that is put on every channel: it says nothing of its end.
            use.end()
            return inner
        with self._changed:
            self._inner, self._use = inner, use
            self._changed.notify_all()
            is_cancelled = self._is_cancelled
        if is_cancelled:
            inner.cancel()
        # None of what gRPC keeps until the call ends may hold the call itself.
        ended = partial(_ended, use, weakref.ref(inner), weakref.ref(self), self._kept)
        if not inner.add_callback(ended):
            ended()
        return self

    def ended(self, use: Use, inner: Any) -> None:
        """The attempt is over.  On a thread of gRPC's."""
        with self._changed:
            may_move = not (self._has_answered or self._is_cancelled)
            self._deciding = inner
        code, method = inner.code(), self._method
        method.judge(use, code, self._deadline)
        moves = may_move and method.may_move(use, self._tries, code, inner.details())
        use.end()
        if moves:
            try:
                self._begin(None)
            except Exception as error:
                logger.debug("no other attempt: %s", error)
            else:
                return
        with self._changed:
            self._is_over = True
            callbacks, self._callbacks = self._callbacks, []
            self._changed.notify_all()
        for callback in callbacks:
            try:
                callback()
            except Exception:
                logger.exception("a callback of a call raised")

    def _has_moved_from(self, inner: Any) -> bool:
        """Whether another attempt goes on for *inner*, which is over; waits for the decision."""
        with self._changed:
            self._changed.wait_for(lambda: self._is_over or self._inner is not inner)
            return self._inner is not inner

    def _last(self, ask: Callable[[Any], Any]) -> Any:
        """What *ask* says of the attempt with which the call ended."""
        while True:
            inner, error = self._inner, None
            try:
                said = ask(inner)
            except grpc.RpcError as failure:
                said, error = None, failure
            if inner.done() and self._has_moved_from(inner):
                continue
            if error is not None:
                raise error
            return said

    # -- a stream of answers

    def __iter__(self) -> Pending:
        return self

    def __next__(self) -> Any:
        while True:
            inner = self._inner
            try:
                answer = next(inner)
            except grpc.RpcError:
                if self._has_moved_from(inner):
                    continue
                raise
            if self._has_answered:
                return answer
            with self._changed:
                is_first = self._deciding is not inner
                self._has_answered |= is_first
            if is_first:
                assert self._use is not None
                self._use.attempt.judge(is_good=True)
                return answer
            if not self._has_moved_from(inner):
                return answer

    next = __next__

    # -- grpc.Call

    def is_active(self) -> bool:
        return not self.done()

    def time_remaining(self) -> float | None:
        return rules.left_until(self._deadline)

    def initial_metadata(self) -> Any:
        return self._last(lambda inner: inner.initial_metadata())

    def trailing_metadata(self) -> Any:
        return self._last(lambda inner: inner.trailing_metadata())

    def code(self) -> Any:
        return self._last(lambda inner: inner.code())

    def details(self) -> Any:
        return self._last(lambda inner: inner.details())

    def debug_error_string(self) -> Any:
        return self._last(lambda inner: inner.debug_error_string())

    def add_callback(self, callback: Callable[[], None]) -> bool:
        with self._changed:
            if self._is_over:
                return False
            self._callbacks.append(callback)
            self._kept[:] = [self]
            return True

    # -- grpc.Future

    def cancel(self) -> bool:
        with self._changed:
            if self._is_over:
                return False
            self._is_cancelled, inner = True, self._inner
        return bool(inner.cancel())

    def cancelled(self) -> bool:
        return bool(self._inner.cancelled())

    def running(self) -> bool:
        return not self.done()

    def done(self) -> bool:
        return self._is_over or self._is_cancelled

    def result(self, timeout: float | None = None) -> Any:
        until = rules.deadline_of(timeout)
        return self._last(lambda inner: inner.result(rules.left_until(until)))

    def exception(self, timeout: float | None = None) -> Any:
        until = rules.deadline_of(timeout)
        return self._last(lambda inner: inner.exception(rules.left_until(until)))

    def traceback(self, timeout: float | None = None) -> Any:
        until = rules.deadline_of(timeout)
        return self._last(lambda inner: inner.traceback(rules.left_until(until)))

    def add_done_callback(self, fn: Callable[[Any], None]) -> None:
        if not self.add_callback(lambda: fn(self)):
            fn(self)

    def __repr__(self) -> str:
        return f"<call of a topic: {self._inner!r}>"


def _ended(
    use: Use, inner: Callable[[], Any], call: Callable[[], Pending | None], kept: list[Pending]
) -> None:
    """What gRPC calls when an attempt is over."""
    attempt, pending = inner(), call()
    if attempt is None or pending is None:  # nobody wants it any more
        use.end()
        return
    pending.ended(use, attempt)
    if not pending.is_active():
        kept.clear()
