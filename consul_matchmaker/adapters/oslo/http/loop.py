"""The event loop of a process: one thread, on which all its HTTP servers run.

Under eventlet the green threads of a process share the place where asyncio notes which loop runs:
of two loops the second one could not start.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from typing import Any

from ....errors import TimedOut
from ....fork import ProcessLock

logger = logging.getLogger(__name__)

SECONDS = 5.0
"""A loop starts, and ends, within milliseconds; a busy machine may need longer."""
QUIET_SECONDS = 1.0
"""What asyncio complains about, which strangers can bring about, is one line in so long."""


class _LoopThread:
    def __init__(self) -> None:
        self.users = 0
        self._thread = threading.Thread(
            target=self._run, name="consul-matchmaker-http", daemon=True
        )
        self._is_ready = threading.Event()
        self._quiet_until = 0.0
        self._thread.start()
        if not self._is_ready.wait(SECONDS):
            raise TimedOut(f"the thread of HTTP servers did not start within {SECONDS:g} s")

    @property
    def is_running(self) -> bool:
        return self._thread.is_alive()

    def end(self) -> None:
        if self.is_running:
            self.loop.call_soon_threadsafe(self._ending.set)
        self._thread.join(SECONDS)

    def _run(self) -> None:
        try:
            asyncio.run(self._main())
        except BaseException:
            logger.exception("the thread of HTTP servers has ended")

    async def _main(self) -> None:
        self.loop = asyncio.get_running_loop()
        self.loop.set_exception_handler(self._complain)
        self._ending = asyncio.Event()
        self._is_ready.set()
        await self._ending.wait()

    def _complain(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        if loop.time() < self._quiet_until:
            return
        self._quiet_until = loop.time() + QUIET_SECONDS
        error = context.get("exception")
        trace = None if isinstance(error, OSError) else error  # its text says all
        logger.error("HTTP servers: %s: %s", context.get("message"), error, exc_info=trace)


_threads: list[_LoopThread] = []
"""The one of this process, or none."""
_lock = ProcessLock(_threads)  # a forked child has not its parent's thread


def entered() -> asyncio.AbstractEventLoop:
    """The loop, which runs until as many have left it as have entered it.  Raises TimedOut."""
    with _lock:
        if not _threads or not _threads[0].is_running:
            _threads[:] = [_LoopThread()]
        _threads[0].users += 1
        return _threads[0].loop


def left(loop: asyncio.AbstractEventLoop) -> None:
    """It ends with the last one, before another one may start."""
    with _lock:
        if not _threads or _threads[0].loop is not loop:  # of the parent, before a fork
            return
        _threads[0].users -= 1
        if not _threads[0].users:
            _threads.pop().end()
