"""Tell subscribers how well the hosts of a topic are connected, on a thread while there are any."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

import grpc

from ...worker import Worker

logger = logging.getLogger(__name__)

Callback = Callable[[grpc.ChannelConnectivity], None]

POLL_SECONDS = 0.1
"""So often it is looked at; gRPC does so every 0.2 s."""
SECONDS_TO_STOP = 5.0


class Connectivity:
    """*observe* says what it is; with True it has all hosts connect.  Thread-safe."""

    def __init__(self, observe: Callable[[bool], grpc.ChannelConnectivity]) -> None:
        self._observe = observe
        self._lock = threading.Lock()
        self._told: list[tuple[Callback, grpc.ChannelConnectivity | None]] = []
        self._is_to_connect = False
        self._worker: Worker | None = None

    def subscribe(self, callback: Callback, try_to_connect: bool) -> None:
        with self._lock:
            self._told.append((callback, None))
            self._is_to_connect |= try_to_connect
            if self._worker is None:
                self._worker = Worker("consul-matchmaker-grpc-connectivity", self._step)
            self._worker.start()
            self._worker.wake()

    def unsubscribe(self, callback: Callback) -> None:
        with self._lock:
            kept = [one for one in self._told if one[0] != callback]
            self._told = kept
            if kept or self._worker is None:
                return
            worker, self._worker, self._is_to_connect = self._worker, None, False
        worker.stop(0)

    def stop(self) -> None:
        """Tell nobody any more, and end the thread."""
        with self._lock:
            self._told, worker, self._worker = [], self._worker, None
        if worker is not None:
            worker.stop(SECONDS_TO_STOP)

    def _step(self) -> float:
        now = self._observe(self._is_to_connect)
        with self._lock:
            due = [callback for callback, told in self._told if told is not now]
            self._told = [(callback, now) for callback, _ in self._told]
        for callback in due:
            try:
                callback(now)
            except Exception:
                logger.exception("a subscriber of a channel's connectivity raised")
        return POLL_SECONDS
