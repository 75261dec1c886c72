"""Run one step again and again on one named thread that can be woken, stopped and joined."""

from __future__ import annotations

import logging
import threading  # never `from threading import ...`: eventlet may patch it after our import
import time
from collections.abc import Callable

from .errors import Unavailable

logger = logging.getLogger(__name__)

SECONDS_AFTER_A_BUG = 1.0
"""How long a worker rests after its step raised something nobody expected."""


def seconds_since_boot() -> float:
    """Monotonic seconds that also count while the machine is suspended (Linux), as the clocks of
    Consul's servers do; elsewhere `time.monotonic`."""
    return time.clock_gettime(_LASTING_CLOCK)


if hasattr(time, "CLOCK_BOOTTIME"):
    _LASTING_CLOCK = time.CLOCK_BOOTTIME
else:
    seconds_since_boot = time.monotonic


class Worker:
    """A daemon thread that runs *step* until it is stopped.

    *step* returns the seconds until it wants to run again, or None to rest until `wake`.  Whatever
    is raised out of it is logged, and the step runs again after a pause: only `stop` ends the
    thread.  Should it end all the same, that is logged, `has_died` says so, and `start` starts
    another.  Nothing is started and no lock is made before `start`.  All methods are thread-safe.
    """

    def __init__(self, name: str, step: Callable[[], float | None]) -> None:
        self.name = name
        self._step = step
        self._thread: threading.Thread | None = None
        self._stopping = False
        self.has_died = False
        """Whether the thread ended though nobody stopped it, and no other was started since."""
        self._wake: threading.Event | None = None

    def start(self) -> None:
        """Start the thread if it is not running; does nothing after `stop`.

        Raises Unavailable when the process cannot have another thread; the next `start` tries
        again.
        """
        if self._thread is not None or self._stopping:
            return
        with self._own_lock():
            if self._thread is not None or self._stopping:
                return
            self._wake = threading.Event()
            thread = threading.Thread(target=self._run, name=self.name, daemon=True)
            try:
                thread.start()
            except RuntimeError as error:  # the limit of threads is reached, or Python is ending
                raise Unavailable(
                    f"{self.name}: no thread can be started ({error}); "
                    "allow the process more threads, and call again"
                ) from error
            self._thread, self.has_died = thread, False

    def _own_lock(self) -> threading.RLock:
        # setdefault is atomic in CPython, so two first callers agree on one lock; re-entrant, since
        # a signal handler may stop what the main thread is just starting.
        lock: threading.RLock = self.__dict__.setdefault("_start_lock", threading.RLock())
        return lock

    def wake(self) -> None:
        """Run the step now instead of at the end of its pause."""
        if self._wake is not None:
            self._wake.set()

    def stop(self, timeout_seconds: float) -> bool:
        """Ask the thread to end, wait for it; return whether it did within *timeout_seconds*."""
        self._stopping = True
        self.wake()
        with self._own_lock():  # a start that is under way has its thread by now
            thread = self._thread
        if thread is None or thread is threading.current_thread():
            return True
        thread.join(timeout_seconds)
        return not thread.is_alive()

    @property
    def is_stopping(self) -> bool:
        """Whether `stop` was called: a long step looks at this between two of its parts."""
        return self._stopping

    @property
    def is_running(self) -> bool:
        return self._thread is not None and self._thread.is_alive()

    def _run(self) -> None:
        try:
            self._run_until_stopped()
        finally:
            if not self._stopping:
                with self._own_lock():  # the start that made this thread has noted it by now
                    if self._thread is threading.current_thread():
                        self._thread, self.has_died = None, True
                logger.error("%s: the thread has ended; the next start makes another", self.name)

    def _run_until_stopped(self) -> None:
        wake = self._wake
        assert wake is not None
        while not self._stopping:
            wake.clear()
            try:
                pause = self._step()
            except BaseException:  # sys.exit() or a cancelled task in a callback: not our end
                logger.exception("%s: unexpected error, going on", self.name)
                pause = SECONDS_AFTER_A_BUG
            if not self._stopping:
                wake.wait(pause)

    def __repr__(self) -> str:
        state = "running" if self.is_running else "stopped" if self._stopping else "not started"
        if self.has_died:
            state = "died"
        return f"<Worker {self.name}, {state}>"


MakeWorker = Callable[[str, Callable[[], float | None]], Worker]
"""Makes a worker of its name and step: `Worker`, or in tests one whose step is run by hand."""
