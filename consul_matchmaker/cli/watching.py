"""Run a command with the hosts of a topic, and again at each change of them."""

from __future__ import annotations

import functools
import os
import threading
from collections.abc import Callable, Iterable, Sequence

from ..backoff import Backoff
from ..model import Host, Snapshot
from ..texts import escaped_word
from .events import Command, Events, Say

FIRST_PAUSE_SECONDS, LONGEST_PAUSE_SECONDS = 2.0, 60.0  # after a run that failed
NOBODY: frozenset[Host] = frozenset()


class Told:
    """What the command knows: rules only, without a process or a clock.

    Nobody can say what a run that failed has done of what it was told.  So the command hears of a
    host that it *may* lack as added, and of one that it *may* still have as removed.
    """

    def __init__(self) -> None:
        self.hosts: frozenset[Host] | None = None
        """What the last run was told."""
        self.failures = 0
        """How many runs failed since the last one that did not."""
        self._surely = self._perhaps = NOBODY
        self._is_behind = True

    def is_news(self, hosts: frozenset[Host]) -> bool:
        """Whether there has to be a run: also for a first answer without hosts, and after a run
        that failed."""
        return self._is_behind or hosts != self._surely

    def begin(self, hosts: frozenset[Host]) -> tuple[frozenset[Host], frozenset[Host]]:
        """A run is told *hosts*: return those that are added, and those that are removed."""
        self.hosts = hosts
        return hosts - self._surely, self._perhaps - hosts

    def end(self, *, has_failed: bool) -> None:
        """That run has ended."""
        assert self.hosts is not None
        self._is_behind = has_failed
        if has_failed:
            self.failures += 1
            self._surely, self._perhaps = self._surely & self.hosts, self._perhaps | self.hosts
        else:
            self.failures = 0
            self._surely = self._perhaps = self.hosts


class Follower:
    """Runs *command* with the hosts of *topic* until a signal arrives.  For the main thread.

    *watch* returns the hosts now, and again at each change, as `Matchmaker.watch` does.  One run at
    a time: when it ends, the next is told what has changed since the last one that did not fail.
    A run that fails is repeated with the next change, or after a pause.  A signal to stop is passed
    on to a run, whose end is awaited.  *say* prints one line for the operator.
    """

    def __init__(
        self,
        topic: str,
        watch: Callable[[], Iterable[Snapshot]],
        *,
        command: Sequence[str],
        say: Say,
        backoff: Backoff | None = None,
    ) -> None:
        self._topic, self._watch, self._say = topic, watch, say
        self._events = Events(self._on_signal)
        self._command = Command(command, self._events, self._on_command_ended, say)
        self._backoff = backoff or Backoff(FIRST_PAUSE_SECONDS, LONGEST_PAUSE_SECONDS)
        self._told = Told()
        self._hosts: frozenset[Host] | None = None
        self._pause: threading.Timer | None = None
        self._is_leaving = False
        self._error: Exception | None = None

    def run(self) -> int:
        """Return 0 after a signal, or 127 or 126 when the first run cannot be started.

        Raises what *watch* raises, but not while the command runs.
        """
        return self._events.run(
            lambda: self._events.beside("consul-matchmaker-watch", self._follow)
        )

    # Events, one after the other on the main thread

    def _on_hosts(self, hosts: frozenset[Host]) -> None:
        if hosts != self._hosts:  # else a tag or a weight is another
            self._hosts = hosts
            self._tell()

    def _on_command_ended(self, exit_code: int) -> None:
        if self._is_leaving:
            self._leave()
        else:
            self._note(exit_code)

    def _on_signal(self, number: int) -> None:
        if self._command.is_running:
            self._command.pass_on(number)
        self._leave()

    def _on_error(self, error: Exception) -> None:
        self._error = error
        self._leave()

    # What they lead to

    def _tell(self) -> None:
        """Start a run, unless one runs, or there is nothing to tell."""
        if self._command.is_running or self._is_leaving or self._hosts is None:
            return
        if not self._told.is_news(self._hosts):
            return
        if self._pause is not None:
            self._pause.cancel()
        is_first = self._told.hosts is None
        added, removed = self._told.begin(self._hosts)
        variables = {
            b"TOPIC": os.fsencode(self._topic),
            b"HOSTS": _words(self._hosts),
            b"ADDED": _words(added),
            b"REMOVED": _words(removed),
        }
        code = self._command.start(variables)
        if code and is_first:
            self._events.end(code)
        elif code:
            self._note(code)

    def _note(self, exit_code: int) -> None:
        """A run has ended, or could not be started."""
        self._told.end(has_failed=exit_code != 0)
        if exit_code:
            seconds = self._backoff.bound_seconds(self._told.failures)
            self._say(
                f"{self._command.name} failed, exit code {exit_code}: it runs again at the next "
                f"change, or in {seconds:g} s"
            )
            if self._hosts == self._told.hosts:
                self._pause = threading.Timer(seconds, self._events.put, [self._tell])
                self._pause.daemon = True
                self._pause.start()
                return
        self._tell()

    def _leave(self) -> None:
        """End, once no run is left."""
        self._is_leaving = True
        if self._command.is_running:
            return
        if self._error is not None:
            raise self._error
        self._events.end(0)

    # The wait, on a thread of its own

    def _follow(self) -> None:
        try:
            for snapshot in self._watch():
                hosts = frozenset(snapshot.hosts)
                self._events.put(functools.partial(self._on_hosts, hosts))
        except Exception as error:  # raised by `run`
            self._events.put(functools.partial(self._on_error, error))


def _words(hosts: Iterable[Host]) -> bytes:
    """Sorted, escaped as `hosts` and `watch` print them: a host cannot be taken for two."""
    return " ".join(escaped_word(str(host)) for host in sorted(hosts)).encode()
