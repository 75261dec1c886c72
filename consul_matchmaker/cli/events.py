"""The main thread of a command that runs until a signal: its events, and the COMMAND it started."""

from __future__ import annotations

import contextlib
import functools
import os
import queue
import signal
import subprocess
import threading
from collections.abc import Callable, Mapping, Sequence
from types import FrameType

NOT_FOUND, NOT_EXECUTABLE = 127, 126  # exit codes of every shell for a command it cannot start
# A signal that arrives just before a wait begins does not end it, because Python runs the handler
# only after the wait.  So no wait is longer than this.
MAX_WAIT_SECONDS = 0.5

Say = Callable[[str], None]
"""Prints one line for the operator."""


class Events:
    """What happened, handled one after the other on the main thread.

    Once `run` ends, SIGTERM, SIGINT and SIGHUP are ignored: the caller only has to close the
    matchmaker, which takes a bounded time, and to exit with the code that `run` returned.
    """

    def __init__(self, on_signal: Callable[[int], None]) -> None:
        self._on_signal = on_signal
        # A SimpleQueue, because a signal handler may put into it at any moment: it is reentrant.
        self._queue: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._exit_code: int | None = None
        self.over = threading.Event()
        """Set when `run` ends."""

    def run(self, start: Callable[[], None]) -> int:
        """Call *start*, handle events until `end`, return its code; raise what an event raises."""
        numbers = _signals()
        for number in numbers:
            signal.signal(number, self._note_signal)
        try:
            start()
            while self._exit_code is None:
                self._next()()
        finally:
            for number in numbers:
                signal.signal(number, signal.SIG_IGN)
            self.over.set()
        return self._exit_code

    def end(self, exit_code: int) -> None:
        """Let `run` return; on the main thread."""
        self._exit_code = exit_code

    def put(self, event: Callable[[], None]) -> None:
        """Have *event* called on the main thread.  From any thread, and from signal handlers."""
        self._queue.put(event)

    def beside(self, name: str, wait: Callable[[], None]) -> None:
        """Wait on a thread of its own."""
        threading.Thread(target=wait, name=name, daemon=True).start()

    def _next(self) -> Callable[[], None]:
        while True:
            with contextlib.suppress(queue.Empty):
                return self._queue.get(timeout=MAX_WAIT_SECONDS)

    def _note_signal(self, number: int, _frame: FrameType | None) -> None:
        self.put(functools.partial(self._on_signal, number))


class Command:
    """A program that the operator gave, run once or again and again; for the main thread.

    It inherits our environment, and the file descriptors that a shell would leave it.  *on_end* is
    an event: it is called with the exit code, 128 + n when signal n killed it.
    """

    def __init__(
        self, words: Sequence[str], events: Events, on_end: Callable[[int], None], say: Say
    ) -> None:
        self.name = words[0]
        self._words = words
        self._events, self._on_end, self._say = events, on_end, say
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def is_running(self) -> bool:
        """Whether it was started and *on_end* was not called yet."""
        return self._process is not None

    def start(self, variables: Mapping[bytes, bytes] | None = None) -> int:
        """Start it with *variables* added to our environment; return 0, or the code with which a
        shell that cannot start it exits, after the operator was told why."""
        try:
            process = subprocess.Popen(self._words, env={**os.environb, **(variables or {})})
        except OSError as error:
            self._say(f"cannot start {self.name}: {error.strerror or error}")
            return NOT_FOUND if isinstance(error, FileNotFoundError) else NOT_EXECUTABLE
        self._process = process
        self._events.beside("consul-matchmaker-command", functools.partial(self._wait, process))
        return 0

    def pass_on(self, number: int) -> None:
        """Send it the signal that we got."""
        assert self._process is not None
        if number == signal.SIGINT and _is_in_foreground():
            # The terminal has sent Ctrl-C to the command, too.
            return
        with contextlib.suppress(ProcessLookupError):
            self._process.send_signal(number)

    def _wait(self, process: subprocess.Popen[bytes]) -> None:
        code = process.wait()
        self._events.put(functools.partial(self._ended, code if code >= 0 else 128 - code))

    def _ended(self, exit_code: int) -> None:
        self._process = None
        self._on_end(exit_code)


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
