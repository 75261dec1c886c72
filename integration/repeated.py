"""Do something again and again on a thread of its own."""

import threading
from collections.abc import Callable


class Repeated(threading.Thread):
    """Calls *step*, and so long after each call the next, from `start` until `stop`."""

    def __init__(self, name: str, pause_seconds: float, step: Callable[[], None]) -> None:
        super().__init__(name=name, daemon=True)
        self._pause = pause_seconds
        self._step = step
        self._stopping = threading.Event()

    def run(self) -> None:
        while not self._stopping.wait(self._pause):
            self._step()

    def stop(self) -> None:
        self._stopping.set()
        self.join()
