"""Hold a registration until a signal arrives or the supervised command ends."""

from __future__ import annotations

import functools
import signal
import socket
from collections.abc import Callable, Sequence

from ..errors import Closed, Denied, MatchmakerError
from ..model import Host, Registration
from .events import Command, Events, Say

PROBE_SECONDS = 0.1  # between two attempts to connect; servers start within a few of them
PROBE_TIMEOUT_SECONDS = 1.0
TOLD_AFTER_SECONDS = 3.0  # the operator is told why a registration is not there after so long


class Holder:
    """One registration, held until a signal arrives or *command* ends.  For the main thread.

    *register* makes the registration; with None (catalog mode) only *command* runs.  With a
    command and *when_listening*, *register* is called once *host* accepts TCP connections, so that
    no peer is sent to a server that does not listen yet.  A signal to stop withdraws the
    registration first; the command is stopped *drain_seconds* later, when peers have noticed, or
    at the next signal.  *say* prints one line for the operator.

    Once `run` ends, those signals are ignored: see `Events`.
    """

    def __init__(
        self,
        register: Callable[[], Registration] | None,
        host: Host,
        *,
        command: Sequence[str] = (),
        when_listening: bool = True,
        drain_seconds: float = 0.0,
        say: Say,
    ) -> None:
        self._register = register
        self._host = host
        self._when_listening = when_listening
        self._drain_seconds = drain_seconds
        self._say = say
        self._events = Events(self._on_signal)
        self._command: Command | None = None
        if command:
            self._command = Command(command, self._events, self._events.end, say)
        self._registration: Registration | None = None
        self._is_leaving = False
        self._is_draining = False

    def run(self) -> int:
        """Return the command's exit code (128 + n when signal n killed it), or 0 without one.

        Raises Denied when Consul refuses the token and there is no command to go on running.
        """
        try:
            return self._events.run(self._start)
        finally:
            self._leave()

    def _start(self) -> None:
        if self._command is None:
            self._publish()
            return
        code = self._command.start()
        if code:
            self._events.end(code)
        elif self._when_listening and self._register is not None:
            self._events.beside("consul-matchmaker-probe", self._wait_until_listening)
        else:
            self._publish()

    # Events, one after the other on the main thread

    def _publish(self) -> None:
        if self._register is None or self._is_leaving:
            return
        self._registration = self._register()
        self._events.beside("consul-matchmaker-notice", self._wait_until_published)

    def _on_signal(self, number: int) -> None:
        if self._command is not None and number not in (signal.SIGTERM, signal.SIGINT):
            self._command.pass_on(number)
            return
        was_leaving = self._is_leaving
        self._leave()  # before the command gets the signal, so that peers stop sending first
        if self._registration is None or self._drain_seconds <= 0 or was_leaving:
            self._stop(number)
            return
        self._is_draining = True
        self._say(f"draining for {self._drain_seconds:g} s; the next signal stops at once")
        self._events.beside(
            "consul-matchmaker-drain",
            functools.partial(self._wait_until_drained, self._registration, number),
        )

    def _on_drained(self, number: int) -> None:
        if self._is_draining:  # else a further signal has stopped it already
            self._stop(number)

    def _stop(self, number: int) -> None:
        self._is_draining = False
        if self._command is None:
            self._events.end(0)
        else:
            self._command.pass_on(number)

    def _leave(self) -> None:
        self._is_leaving = True
        if self._registration is not None:
            self._registration.unregister()

    def _fail(self, error: MatchmakerError) -> None:
        raise error

    # Waits, each on a thread of its own

    def _wait_until_listening(self) -> None:
        told_after = TOLD_AFTER_SECONDS / PROBE_SECONDS
        probes = 0
        while not self._events.over.is_set():
            try:
                # The command line accepts HOST:PORT only, so there is a port.
                address = (self._host.address, self._host.port or 0)
                socket.create_connection(address, PROBE_TIMEOUT_SECONDS).close()
            except OSError as error:
                probes += 1
                if probes == told_after:
                    self._say(
                        f"not registered yet: {self._host} accepts no TCP connection "
                        f"({error.strerror or error}); --at-once does not wait for it"
                    )
                self._events.over.wait(PROBE_SECONDS)
            else:
                self._events.put(self._publish)
                return

    def _wait_until_published(self) -> None:
        assert self._registration is not None
        is_told = False
        while not self._events.over.is_set():
            try:
                self._registration.wait_until_published(timeout_seconds=TOLD_AFTER_SECONDS)
            except Closed:
                return
            except MatchmakerError as error:
                if isinstance(error, Denied) and self._command is None:
                    self._events.put(functools.partial(self._fail, error))
                    return
                if not is_told:
                    self._say(f"not registered yet, still trying: {error}")
                    is_told = True
                if isinstance(error, Denied):  # raised at once, unlike a timeout
                    self._events.over.wait(TOLD_AFTER_SECONDS)
            else:
                self._say(f"registered {self._registration}")
                return

    def _wait_until_drained(self, registration: Registration, number: int) -> None:
        try:
            registration.drain(self._drain_seconds)
        except MatchmakerError as error:
            self._say(f"stopping anyway: {error}")
        self._events.put(functools.partial(self._on_drained, number))
