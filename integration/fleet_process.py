"""A process with many Matchmakers: some look up all the time, one registers what it is told to.

Run as ``python integration/fleet_process.py URL``, with the package that PYTHONPATH names, of
whatever commit: only what users call is called here.  `FleetProcess` is the handle on one.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve()
ASK_SECONDS = 1.0
TICK_SECONDS = 0.001


class FleetProcess:
    """Starts one; a context manager that kills it."""

    def __init__(self, url: str, package: Path = HERE.parent.parent) -> None:
        self._process = subprocess.Popen(
            [sys.executable, str(HERE), url],
            env={**os.environ, "PYTHONPATH": str(package)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.pid = self._process.pid

    def tell(self, command: str, *words: object) -> None:
        """Have it do something: ``read TOPIC...``, ``tick``, ``register`` or ``withdraw TOPIC
        HOST``."""
        assert self._process.stdin is not None
        print(json.dumps([command, *words]), file=self._process.stdin, flush=True)

    def said(self) -> dict[str, Any]:
        """What it has found since it was asked last, once all it was told before is done."""
        self.tell("say")
        assert self._process.stdout is not None
        said: dict[str, Any] = json.loads(self._process.stdout.readline())
        return said

    def __enter__(self) -> FleetProcess:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._process.kill()
        self._process.communicate()


class Fleet:
    """The Matchmakers of this process."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._readers: list[tuple[Any, Sequence[str]]] = []
        self._owner: Any = None
        self._registrations: dict[tuple[str, str], Any] = {}
        self._longest_stall = 0.0
        self._failures = 0

    def _made(self) -> Any:
        from consul_matchmaker import Matchmaker  # of the commit that PYTHONPATH names

        return Matchmaker.from_url(self._url)

    def read(self, *topics: str) -> None:
        """One reader more, which goes on asking for *topics*."""
        reader = self._made()
        for topic in topics:
            reader.hosts(topic)
        self._readers.append((reader, topics))
        if len(self._readers) == 1:
            threading.Thread(target=self._ask, daemon=True).start()

    def _ask(self) -> None:
        while True:
            for reader, topics in tuple(self._readers):
                for topic in topics:
                    try:
                        reader.hosts(topic)
                    except Exception:
                        self._failures += 1
            time.sleep(ASK_SECONDS)

    def tick(self) -> None:
        """Have a loop like an application's own measure how long it is held up in this process."""
        threading.Thread(target=self._tick, daemon=True).start()

    def _tick(self) -> None:
        last, waited = time.perf_counter(), waited_seconds()
        while True:
            time.sleep(TICK_SECONDS)
            now = time.perf_counter()
            if now - last - TICK_SECONDS > self._longest_stall:
                stall = now - last - TICK_SECONDS - (waited_seconds() - waited)
                self._longest_stall = max(self._longest_stall, stall)
            last, waited = time.perf_counter(), waited_seconds()

    def register(self, topic: str, host: str) -> None:
        self._owner = self._owner or self._made()
        self._registrations[topic, host] = self._owner.register(topic, host)

    def withdraw(self, topic: str, host: str) -> None:
        self._registrations.pop((topic, host)).unregister()

    def say(self) -> None:
        for registration in self._registrations.values():
            registration.wait_until_published(timeout_seconds=120)
        wire: Counter[str] = Counter()
        answers = 0
        for matchmaker in [*(reader for reader, _ in self._readers), self._owner]:
            if matchmaker is not None:
                status = matchmaker.status()
                wire.update(status["wire"]["http"])
                answers += (status["watcher"] or {"answers": 0})["answers"]
        said = {
            "wire": wire,
            "answers": answers,
            "hosts": sum(
                len(reader.hosts(each)) for reader, topics in self._readers for each in topics
            ),
            "failures": self._failures,
            "longest_stall_seconds": self._longest_stall,
        }
        self._longest_stall = 0.0
        print(json.dumps(said), flush=True)


def waited_seconds() -> float:
    """How long this thread was ready to run so far, and had no processor: the machine's doing."""
    return int(Path("/proc/thread-self/schedstat").read_text().split()[1]) / 1e9


def main(url: str) -> None:
    fleet = Fleet(url)
    for line in sys.stdin:
        command, *words = json.loads(line)
        getattr(fleet, command)(*words)


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        main(sys.argv[1])
