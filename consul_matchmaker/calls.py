"""One call of a service: attempts at one host after another, until one answers."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import TypeVar

from .answers.cache import Cache
from .answers.load import Load
from .answers.quarantine import Quarantine
from .answers.selection import Selector
from .errors import ConfigurationError, MatchmakerError, NoLiveHosts
from .model import Host, Snapshot, checked_topic, host_of

T = TypeVar("T")

Failures = tuple[type[Exception], ...]

ATTEMPTS = 3
RETRY_ON: Failures = (OSError, TimeoutError)


def checked_attempts(attempts: int) -> int:
    """*attempts*; raises ConfigurationError unless it is at least 1."""
    if type(attempts) is not int or attempts < 1:
        raise ConfigurationError(f"attempts must be a whole number from 1, not {attempts!r}")
    return attempts


class Attempt:
    """One use of one host, from the moment that it is picked.  Thread-safe.

    `judge` says once what came of it, `end` that the host is busy with it no longer.  As a context
    manager: the host failed if the block raises one of the failures that `Caller.attempts` was
    given, and answered if the block raises nothing; all else says nothing of it.
    """

    __slots__ = ("_began", "_busy", "_caller", "_failures", "_is_judged", "_load", "host", "topic")

    def __init__(self, caller: Caller, topic: str, host: Host, failures: Failures) -> None:
        self._caller, self._failures = caller, failures
        self.topic, self.host = topic, host
        self._is_judged = False
        self._load = caller.load
        self._busy = self._load.begin(topic, host)
        self._began = caller.clock()

    def judge(self, *, is_good: bool) -> None:
        """The host answered, now, or it failed: it is acknowledged or rejected.  Only the first
        word counts."""
        if not self._is_judged:
            self._is_judged = True
            for call in self._busy:
                self._load.answered(call)
            seconds = self._caller.clock() - self._began
            self._caller.judge(self.topic, self.host, is_good=is_good, seconds=seconds)

    def end(self) -> None:
        """The host is not busy with it any more; without `judge` before, nothing is known of it.
        Idempotent; an attempt that is forgotten has ended."""
        for call in self._busy:
            self._load.end(call)  # in a forked child of the parent's load, which nobody reads
        self._busy = ()

    def __enter__(self) -> Attempt:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            if error is None or isinstance(error, self._failures):
                self.judge(is_good=error is None)
        finally:
            self.end()


class Attempts:
    """The attempts of one call: which host is next, and whether there may be another one.

    For one thread or task at a time.
    """

    def __init__(
        self,
        caller: Caller,
        topic: str,
        server: str | None = None,
        *,
        attempts: int,
        key: str | bytes | None,
        failures: Failures,
    ) -> None:
        """Raises ConfigurationError unless *attempts* is at least 1."""
        self._left = checked_attempts(attempts)
        self.topic, self.server = checked_topic(topic), server
        self._caller, self._key, self._failures = caller, key, failures
        self._tried: set[Host] = set()
        if attempts > 1:
            caller.load.call(topic)

    def begin(self, snapshot: Snapshot) -> Attempt:
        """Use a host of *snapshot*, an answer of `Matchmaker.hosts` for this topic and server: one
        that was not tried yet, while there is one.  Raises NoLiveHosts."""
        exclude = self._tried if any(host not in self._tried for host in snapshot.hosts) else ()
        host = self._caller.picked(snapshot, self.server, key=self._key, exclude=exclude)
        self._tried.add(host)
        return self._caller.attempt(self.topic, host, failures=self._failures)

    def may_retry(self) -> bool:
        """Whether another attempt is allowed after the last one failed: there are attempts left,
        and something is left of the topic's retry budget, from which this takes."""
        self._left -= 1
        return self._left > 0 and self._caller.load.may_retry(self.topic)


class Caller:
    """The part of a Matchmaker that chooses a host, and learns from the calls of it."""

    clock: Callable[[], float]
    load: Load
    """What the calls of this process found."""
    _cache: Cache
    _quarantine: Quarantine
    _selector: Selector

    def pick(
        self,
        topic: str,
        server: str | None = None,
        *,
        key: str | bytes | None = None,
        exclude: Collection[str | Host] = (),
    ) -> Host:
        """One live host of *topic* that is not rejected; which, the setting ``selection`` says.

        With *key*, the same host for the same key in every process, as long as that host lives.
        Never one of *exclude*: those that were tried.  Raises NoLiveHosts when there is none (but
        those), and what `hosts` raises.
        """
        snapshot = self._cache.lookup(topic, server)
        tried = frozenset(map(host_of, exclude)) if exclude else ()
        return self.picked(snapshot, server, key=key, exclude=tried)

    def picked(
        self,
        snapshot: Snapshot,
        server: str | None = None,
        *,
        key: str | bytes | None = None,
        exclude: Collection[Host] = (),
    ) -> Host:
        """As `pick`, out of an answer that `hosts` gave, also for *server*: asks nobody."""
        self._check_open()
        host = self._selector.pick(snapshot, server=server, key=key, exclude=exclude)
        if host is None:
            name = named(snapshot.topic, server)
            if snapshot:
                raise NoLiveHosts(f"every host of {name} is excluded: {len(snapshot)} are there")
            raise NoLiveHosts(f"no host serves {name} now: try wait_for_hosts()")
        return host

    @contextmanager
    def using(
        self, topic: str, server: str | None = None, *, key: str | bytes | None = None
    ) -> Iterator[Host]:
        """A picked host, for a ``with`` block: rejected if the block raises, else acknowledged.

        What is no failure of the host must not leave the block as an exception; what is no
        Exception (an interrupt, a cancelled task) says nothing of the host.  Raises like `pick`.
        """
        attempts = self.attempts(topic, server, attempts=1, key=key)
        with attempts.begin(self._cache.lookup(topic, server)) as attempt:
            yield attempt.host

    def attempts(
        self,
        topic: str,
        server: str | None = None,
        *,
        attempts: int = ATTEMPTS,
        key: str | bytes | None = None,
        failures: Failures = (Exception,),
    ) -> Attempts:
        """The attempts of one call, for who calls in a way of his own, as the adapters do.

        *failures*: what a block of an attempt raises where the host failed."""
        return Attempts(self, topic, server, attempts=attempts, key=key, failures=failures)

    def attempt(self, topic: str, host: Host, *, failures: Failures = (Exception,)) -> Attempt:
        """One use of *host*, which begins now; for who has chosen it himself."""
        return Attempt(self, topic, host, failures)

    def call(
        self,
        topic: str,
        function: Callable[[Host], T],
        *,
        attempts: int = ATTEMPTS,
        key: str | bytes | None = None,
        retry_on: Failures = RETRY_ON,
        timeout_seconds: float | None = None,
    ) -> T:
        """What ``function(host)`` returns for a host of *topic*; for another one when it fails.

        A host fails by raising one of *retry_on*: it is rejected, and *function* is called for a
        host that was not tried yet, while there is one, up to *attempts* times in all and within
        the topic's retry budget (settings ``retry_fraction``, ``retry_floor_per_second``).  Then
        the last failure is raised; as is at once whatever else *function* raises, which says
        nothing of the host.  *function* may be executed twice: what must not be is not for
        *retry_on*.

        No attempt begins *timeout_seconds* after the call; *function* has to have a timeout of its
        own.  Raises like `pick` when no host can be found for the first attempt.
        """
        tries = self.attempts(topic, attempts=attempts, key=key, failures=retry_on)
        deadline = None if timeout_seconds is None else self.clock() + timeout_seconds
        failure: Exception | None = None
        try:
            while True:
                left = None if deadline is None else max(0.0, deadline - self.clock())
                try:
                    attempt = tries.begin(self._cache.lookup(topic, timeout_seconds=left))
                except MatchmakerError:
                    if failure is None:
                        raise
                    break  # the failure says more than that nobody is left
                try:
                    with attempt:
                        return function(attempt.host)
                except retry_on as error:
                    is_late = deadline is not None and self.clock() >= deadline
                    if is_late or not tries.may_retry():
                        raise
                    failure = error
            raise failure
        finally:
            del failure  # which refers to this frame

    def judge(self, topic: str, host: Host, *, is_good: bool, seconds: float | None = None) -> None:
        """Reject *host*, or lift its quarantine: what `using` does at its end.  *seconds*: how long
        the call took."""
        (self._quarantine.acknowledge if is_good else self._quarantine.reject)(topic, host)
        load = self.load
        if load.judged(topic, host, is_good=is_good, seconds=seconds) and self._quarantine.eject(
            topic, host, load.hosts_of(topic)
        ):
            load.ejected(topic, host)

    def _check_open(self) -> None:
        raise NotImplementedError


def named(topic: str, server: str | None) -> str:
    return topic if server is None else f"{topic} as {server}"
