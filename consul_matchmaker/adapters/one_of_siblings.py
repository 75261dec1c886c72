"""One registration for all workers of an application that share a port, whichever of them lives."""

from __future__ import annotations

import fcntl
import hashlib
import logging
import os
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path

from ..errors import TimedOut
from ..fork import call_after_fork
from ..model import Registration
from ..worker import Worker

logger = logging.getLogger(__name__)

TRY_SECONDS = 0.2
"""How soon a worker takes over from one that ended: before its service can be missed, which Consul
shows for `check_ttl_seconds` (3) after a crash."""
HANDOVER_SECONDS = 1.0
"""How long a worker that ends waits for another to take over, before it takes the registration for
the application's last."""
SEEN_SECONDS = 0.5
"""How long the one that takes over may need until everybody sees it."""


class OneOfSiblings:
    """Registers by *register* while this process holds the lock of *name*, and nobody does twice.

    The lock is a file in the folder for temporary files, held by `flock`: the kernel gives it back
    when its process ends, however that comes.  A forked child has neither the lock nor the
    registration; it may `start` as one more sibling.  Thread-safe.
    """

    def __init__(self, name: str, register: Callable[[], Registration]) -> None:
        self._register = register
        self._path = lock_path(name)
        self._begin()
        call_after_fork(self)

    def _begin(self) -> None:
        self._file: int | None = None
        self._registration: Registration | None = None
        self._lock = threading.Lock()
        self._worker = Worker("consul-matchmaker-sibling", self._step)

    def after_fork(self) -> None:
        """In a forked child: close the file, as the lock would outlive the parent with it."""
        file = self._file
        self._begin()
        if file is not None:
            os.close(file)

    def start(self) -> None:
        """Register now, or as soon as no other process does."""
        self._worker.start()

    def stop(self, drain_seconds: float) -> None:
        """Leave it to another worker, or, where there is none, drain and withdraw."""
        self._worker.stop(TRY_SECONDS)
        with self._lock:
            registration, file = self._registration, self._file
            self._registration = self._file = None
        if file is None:
            return
        try:
            if registration is not None:
                self._leave(registration, file, drain_seconds)
        finally:
            os.close(file)

    def _leave(self, registration: Registration, file: int, drain_seconds: float) -> None:
        # To close it is not enough: a child that C code forked has it open too.
        fcntl.flock(file, fcntl.LOCK_UN)
        if _is_taken_over(file):
            registration.unregister()
            return
        try:
            registration.drain(drain_seconds)
        except TimedOut as error:
            logger.warning("%s: %s", registration, error)

    def _step(self) -> float | None:
        with self._lock:
            if self._worker.is_stopping:
                return None
            if self._file is None:
                flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW
                self._file = os.open(self._path, flags, 0o600)
            if not _try_to_lock(self._file):
                return TRY_SECONDS
            try:
                self._registration = self._register()
            except BaseException:
                fcntl.flock(self._file, fcntl.LOCK_UN)
                raise
            return None


def _is_taken_over(file: int) -> bool:
    """Whether another process takes the lock within `HANDOVER_SECONDS`; then it has registered
    too."""
    waiting = threading.Event()
    for _ in range(round(HANDOVER_SECONDS / TRY_SECONDS)):
        waiting.wait(TRY_SECONDS)
        if not _try_to_lock(file):
            waiting.wait(SEEN_SECONDS)
            return True
        fcntl.flock(file, fcntl.LOCK_UN)
    return False


def _try_to_lock(file: int) -> bool:
    """Whether *file* could be locked, and is so now; False while another process has it."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def lock_path(name: str) -> Path:
    """The file whose lock says who registers."""
    digest = hashlib.blake2s(name.encode("utf-8"), digest_size=8).hexdigest()
    return Path(tempfile.gettempdir()) / f"consul-matchmaker-{os.getuid()}-{digest}.lock"
