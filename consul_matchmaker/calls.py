"""One call of a service: attempts at one host after another, until one answers."""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING, TypeVar

from .errors import ConfigurationError, MatchmakerError
from .model import Host, Snapshot, checked_topic

if TYPE_CHECKING:
    from .matchmaker import Matchmaker

T = TypeVar("T")

ATTEMPTS = 3
RETRY_ON = (OSError, TimeoutError)


class Attempt:
    """One use of one host, from the moment that it is picked.  Thread-safe.

    `judge` says once what came of it, `end` that the host is busy with it no longer.  As a context
    manager: the host failed if the block raises, answered if it does not; what is no Exception (an
    interrupt, a cancelled task) says nothing of it.
    """

    __slots__ = ("_is_judged", "_is_over", "_matchmaker", "host", "topic")

    def __init__(self, matchmaker: Matchmaker, topic: str, host: Host) -> None:
        self._matchmaker = matchmaker
        self.topic, self.host = topic, host
        self._is_judged = self._is_over = False

    def judge(self, *, is_good: bool) -> None:
        """The host answered, now, or it failed: it is acknowledged or rejected.  Only the first
        word counts."""
        if not self._is_judged:
            self._is_judged = True
            self._matchmaker.judge(self.topic, self.host, is_good=is_good)

    def end(self) -> None:
        """The host is not busy with it any more; without `judge` before, nothing is known of it.
        Idempotent."""
        self._is_over = True

    def __enter__(self) -> Attempt:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is None or isinstance(error, Exception):
            self.judge(is_good=error is None)
        self.end()


class Attempts:
    """The attempts of one call: which host is next, and whether there may be another one.

    For one thread or task at a time.
    """

    def __init__(
        self,
        matchmaker: Matchmaker,
        topic: str,
        server: str | None = None,
        *,
        attempts: int = ATTEMPTS,
        key: str | bytes | None = None,
    ) -> None:
        """Raises ConfigurationError unless *attempts* is at least 1."""
        if type(attempts) is not int or attempts < 1:
            raise ConfigurationError(f"attempts must be a whole number from 1, not {attempts!r}")
        self.topic, self.server = checked_topic(topic), server
        self._matchmaker, self._key = matchmaker, key
        self._left = attempts
        self._tried: set[Host] = set()

    def begin(self, snapshot: Snapshot) -> Attempt:
        """Use a host of *snapshot*, an answer of `Matchmaker.hosts` for this topic and server: one
        that was not tried yet, while there is one.  Raises NoLiveHosts."""
        untried = self._tried if any(host not in self._tried for host in snapshot.hosts) else ()
        host = self._matchmaker.picked(snapshot, self.server, key=self._key, exclude=untried)
        self._tried.add(host)
        return Attempt(self._matchmaker, self.topic, host)

    def may_retry(self) -> bool:
        """Whether another attempt is allowed after the last one failed: there are attempts left,
        and something is left of the topic's retry budget, from which this takes."""
        self._left -= 1
        return self._left > 0


def call(
    matchmaker: Matchmaker,
    topic: str,
    function: Callable[[Host], T],
    *,
    attempts: int,
    key: str | bytes | None,
    retry_on: tuple[type[Exception], ...],
    timeout_seconds: float | None,
    clock: Callable[[], float],
) -> T:
    """See `Matchmaker.call`."""
    tries = matchmaker.attempts(topic, attempts=attempts, key=key)
    deadline = None if timeout_seconds is None else clock() + timeout_seconds
    failure: Exception | None = None
    while True:
        left = None if deadline is None else max(0.0, deadline - clock())
        try:
            attempt = tries.begin(matchmaker.hosts(topic, timeout_seconds=left))
        except MatchmakerError:
            if failure is not None:  # it says more than that nobody is left
                raise failure from None
            raise
        try:
            result = function(attempt.host)
        except retry_on as error:
            attempt.judge(is_good=False)
            attempt.end()
            if (deadline is not None and clock() >= deadline) or not tries.may_retry():
                raise
            failure = error
        except BaseException:
            attempt.end()
            raise
        else:
            attempt.judge(is_good=True)
            attempt.end()
            return result
