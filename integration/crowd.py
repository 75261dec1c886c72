"""Many processes that each register one host: forked from one, so that fifty start in a moment.

Run as ``python -m integration.crowd URL TOPIC COUNT``; `Crowd` is the handle on it.
"""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from types import TracebackType
from typing import Any

READY_SECONDS = 30.0


class Crowd:
    """Starts one and waits until all are registered; a context manager that kills what is left."""

    def __init__(self, url: str, topic: str, count: int) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "integration.crowd", url, topic, str(count)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise AssertionError(f"the crowd ended with {self._process.wait()}")
        self.pids: dict[str, int] = json.loads(line)
        """The process of each host."""

    def kill(self, host: str) -> float:
        """SIGKILL; returns when, on the monotonic clock."""
        os.kill(self.pids[host], signal.SIGKILL)
        return time.monotonic()

    def __enter__(self) -> "Crowd":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.close()  # it kills its children then
        self._process.wait(READY_SECONDS)
        self._process.stdout.close()


def main(url: str, topic: str, count: int) -> None:
    from consul_matchmaker import Matchmaker

    pids: dict[str, int] = {}
    reader, writer = os.pipe()
    for number in range(count):
        host = f"10.1.{number // 250}.{number % 250 + 1}:9501"
        pid = os.fork()
        if pid == 0:
            os.close(0)
            matchmaker: Any = Matchmaker.from_url(url)
            registration = matchmaker.register(topic, host)
            registration.wait_until_published(timeout_seconds=READY_SECONDS)
            os.write(writer, b".")
            threading.Event().wait()
        pids[host] = pid
    signal.alarm(int(READY_SECONDS))  # some child failed, and has said so on stderr
    ready = 0
    while ready < count:
        ready += len(os.read(reader, count))
    signal.alarm(0)
    print(json.dumps(pids), flush=True)
    sys.stdin.read()
    for pid in pids.values():
        os.kill(pid, signal.SIGKILL)  # a zombie takes it too


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
