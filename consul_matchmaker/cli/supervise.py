"""Hold a registration until a signal arrives or the supervised command ends."""

from __future__ import annotations

import contextlib
import functools
import os
import queue
import signal
import socket
import subprocess
import threading
from collections.abc import Callable, Sequence
from types import FrameType

from ..errors import Closed, Denied, MatchmakerError
from ..model import Host, Registration

NOT_FOUND, NOT_EXECUTABLE = 127, 126  # exit codes of every shell for a command it cannot start
PROBE_SECONDS = 0.1  # between two attempts to connect; servers start within a few of them
PROBE_TIMEOUT_SECONDS = 1.0
# A signal that arrives just before a wait begins does not end it, because Python runs the handler
# only after the wait.  So no wait is longer than this.
MAX_WAIT_SECONDS = 0.5
TOLD_AFTER_SECONDS = 3.0  # the operator is told why a registration is not there after so long

Say = Callable[[str], None]


class Holder:
    """One registration, held until a signal arrives or *command* ends.  For the main thread.

    *register* makes the registration; with None (catalog mode) only *command* runs.  With a
    command and *when_listening*, *register* is called once *host* accepts TCP connections, so that
    no peer is sent to a server that does not listen yet.  A signal to stop withdraws the
    registration first; the command is stopped *drain_seconds* later, when peers have noticed, or
    at the next signal.  *say* prints one line for the operator.

    Once `run` ends, SIGTERM, SIGINT and SIGHUP are ignored: the caller only has to close the
    matchmaker, which takes a bounded time, and to exit with the code that `run` returned.
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
        self._command = command
        self._when_listening = when_listening
        self._drain_seconds = drain_seconds
        self._say = say
        # A SimpleQueue, because a signal handler may put into it at any moment: it is reentrant.
        self._events: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._over = threading.Event()
        self._registration: Registration | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._exit_code: int | None = None
        self._error: MatchmakerError | None = None
        self._is_leaving = False
        self._is_draining = False

    def run(self) -> int:
        """Return the command's exit code (128 + n when signal n killed it), or 0 without one.

        Raises Denied when Consul refuses the token and there is no command to go on running.
        """
        numbers = _signals()
        for number in numbers:
            signal.signal(number, self._note_signal)
        try:
            self._start()
            while self._exit_code is None:
                self._next_event()()
                if self._error is not None:
                    raise self._error
        finally:
            for number in numbers:
                signal.signal(number, signal.SIG_IGN)
            self._over.set()
            self._leave()
        return self._exit_code

    def _next_event(self) -> Callable[[], None]:
        while True:
            with contextlib.suppress(queue.Empty):
                return self._events.get(timeout=MAX_WAIT_SECONDS)

    def _start(self) -> None:
        if not self._command:
            self._publish()
            return
        try:
            self._process = subprocess.Popen(self._command)
        except OSError as error:
            self._say(f"cannot start {self._command[0]}: {error.strerror or error}")
            is_missing = isinstance(error, FileNotFoundError)
            self._exit_code = NOT_FOUND if is_missing else NOT_EXECUTABLE
            return
        self._beside("consul-matchmaker-command", self._wait_for_command)
        if self._when_listening and self._register is not None:
            self._beside("consul-matchmaker-probe", self._wait_until_listening)
        else:
            self._publish()

    # Events, one after the other on the main thread

    def _publish(self) -> None:
        if self._register is None or self._is_leaving:
            return
        self._registration = self._register()
        self._beside("consul-matchmaker-notice", self._wait_until_published)

    def _on_signal(self, number: int) -> None:
        if self._process is not None and number not in (signal.SIGTERM, signal.SIGINT):
            self._pass_on(number)
            return
        was_leaving = self._is_leaving
        self._leave()  # before the command gets the signal, so that peers stop sending first
        if self._registration is None or self._drain_seconds <= 0 or was_leaving:
            self._stop(number)
            return
        self._is_draining = True
        self._say(f"draining for {self._drain_seconds:g} s; the next signal stops at once")
        self._beside(
            "consul-matchmaker-drain",
            functools.partial(self._wait_until_drained, self._registration, number),
        )

    def _on_drained(self, number: int) -> None:
        if self._is_draining:  # else a further signal has stopped it already
            self._stop(number)

    def _stop(self, number: int) -> None:
        self._is_draining = False
        if self._process is None:
            self._exit_code = 0
        else:
            self._pass_on(number)

    def _pass_on(self, number: int) -> None:
        assert self._process is not None
        if number == signal.SIGINT and _is_in_foreground():
            # The terminal has sent Ctrl-C to the command, too.
            return
        with contextlib.suppress(ProcessLookupError):
            self._process.send_signal(number)

    def _on_command_ended(self) -> None:
        assert self._process is not None
        code = self._process.returncode
        self._exit_code = code if code >= 0 else 128 - code

    def _leave(self) -> None:
        self._is_leaving = True
        if self._registration is not None:
            self._registration.unregister()

    def _fail(self, error: MatchmakerError) -> None:
        self._error = error

    # Waits, each on a thread of its own

    def _wait_for_command(self) -> None:
        assert self._process is not None
        self._process.wait()
        self._events.put(self._on_command_ended)

    def _wait_until_listening(self) -> None:
        told_after = TOLD_AFTER_SECONDS / PROBE_SECONDS
        probes = 0
        while not self._over.is_set():
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
                self._over.wait(PROBE_SECONDS)
            else:
                self._events.put(self._publish)
                return

    def _wait_until_published(self) -> None:
        assert self._registration is not None
        is_told = False
        while not self._over.is_set():
            try:
                self._registration.wait_until_published(timeout_seconds=TOLD_AFTER_SECONDS)
            except Closed:
                return
            except MatchmakerError as error:
                if isinstance(error, Denied) and self._process is None:
                    self._events.put(functools.partial(self._fail, error))
                    return
                if not is_told:
                    self._say(f"not registered yet, still trying: {error}")
                    is_told = True
                if isinstance(error, Denied):  # raised at once, unlike a timeout
                    self._over.wait(TOLD_AFTER_SECONDS)
            else:
                self._say(f"registered {self._registration}")
                return

    def _wait_until_drained(self, registration: Registration, number: int) -> None:
        try:
            registration.drain(self._drain_seconds)
        except MatchmakerError as error:
            self._say(f"stopping anyway: {error}")
        self._events.put(functools.partial(self._on_drained, number))

    def _beside(self, name: str, wait: Callable[[], None]) -> None:
        threading.Thread(target=wait, name=name, daemon=True).start()

    def _note_signal(self, number: int, _frame: FrameType | None) -> None:
        self._events.put(functools.partial(self._on_signal, number))


def _signals() -> list[int]:
    """The signals that end this program."""
    numbers: list[int] = [signal.SIGTERM, signal.SIGINT]
    if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
        numbers.append(signal.SIGHUP)  # it is ignored under nohup
    return numbers


def _is_in_foreground() -> bool:
    """Whether this process group is the one that gets the terminal's Ctrl-C."""
    try:
        terminal = os.open("/dev/tty", os.O_RDWR | os.O_NOCTTY)
    except OSError:
        return False
    try:
        return os.tcgetpgrp(terminal) == os.getpgrp()
    except OSError:
        return False
    finally:
        os.close(terminal)
