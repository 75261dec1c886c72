"""Ask at a steady rate, from several threads or tasks, and count what came of it."""

from __future__ import annotations

import asyncio
import itertools
import threading
import time
from collections import Counter
from collections.abc import Awaitable, Callable

CALLERS = 8


class Load:
    """So many questions a second; *ask* returns who answered, and raises where nobody did.

    For threads it is a context manager; tasks have ``asyncio.create_task(load.run_awaited(ask))``
    and `stop`.  Who falls behind, as when the machine stops, catches up at once.
    """

    def __init__(self, per_second: float = 500.0) -> None:
        self._per_second = per_second
        self._is_over = threading.Event()
        self._turns = itertools.count()
        self._began = time.monotonic()
        self._threads: list[threading.Thread] = []
        self.answers: Counter[str] = Counter()
        """How many, by who answered."""
        self.failures: list[str] = []
        """What was raised."""
        self._lock = threading.Lock()

    @property
    def asked(self) -> int:
        return sum(self.answers.values()) + len(self.failures)

    def start(self, ask: Callable[[], str]) -> None:
        """Have threads ask until `stop`."""
        self._began = time.monotonic()
        self._threads = [threading.Thread(target=self._run, args=(ask,)) for _ in range(CALLERS)]
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """Let what is asked come to its end; idempotent."""
        self._is_over.set()
        for thread in self._threads:
            thread.join()

    def _run(self, ask: Callable[[], str]) -> None:
        while not self._is_over.wait(self._seconds_to_next()):
            try:
                who = ask()
            except Exception as error:
                self._failed(error)
            else:
                self._answered(who)

    async def run_awaited(self, ask: Callable[[], Awaitable[str]]) -> None:
        """Have tasks ask until `stop`."""
        self._began = time.monotonic()
        await asyncio.gather(*(self._run_awaited(ask) for _ in range(CALLERS)))

    async def _run_awaited(self, ask: Callable[[], Awaitable[str]]) -> None:
        while not self._is_over.is_set():
            await asyncio.sleep(self._seconds_to_next())
            try:
                who = await ask()
            except Exception as error:
                self._failed(error)
            else:
                self._answered(who)

    def _seconds_to_next(self) -> float:
        at = self._began + next(self._turns) / self._per_second
        return max(0.0, at - time.monotonic())

    def _answered(self, who: str) -> None:
        with self._lock:
            self.answers[who] += 1

    def _failed(self, error: Exception) -> None:
        with self._lock:
            self.failures.append(f"{type(error).__name__}: {error}")

    def __enter__(self) -> Load:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.stop()
