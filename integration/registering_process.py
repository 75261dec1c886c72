"""A process of its own that registers what it is told to on standard input.

When its input ends it ends too, as a process that does not know that it should call `close`.
`RegisteringProcess` is the test's handle on one.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import threading
import time
from typing import Any

from integration.told import ToldProcess, obey

READY_SECONDS = 10.0


class RegisteringProcess(ToldProcess):
    """Starts one; a context manager that kills what is still running."""

    end_seconds = READY_SECONDS

    def __init__(self, url: str) -> None:
        super().__init__("integration.registering_process", url)

    def register(self, topic: str, host: str) -> float:
        """Returns once Consul has confirmed it, with the seconds that this took the process."""
        seconds = self.ask("register", topic=topic, host=host)
        assert isinstance(seconds, float)
        return seconds


class Program:
    """Does what it is told."""

    def __init__(self, url: str) -> None:
        from consul_matchmaker import Matchmaker

        self._matchmaker = Matchmaker.from_url(url)

    def register(self, topic: str, host: str) -> float:
        began = time.monotonic()
        registration = self._matchmaker.register(topic, host)
        registration.wait_until_published(timeout_seconds=READY_SECONDS)
        return time.monotonic() - began

    def fork(self) -> object:
        return _fork(self._matchmaker)


def _fork(matchmaker: Any) -> object:
    """What a forked child finds, which then ends as Python programs end."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        names = sorted(thread.name for thread in threading.enumerate())
        status = matchmaker.status()["keeper"]
        found = {"threads": names, "lease": status["lease"], "wanted": status["registrations"]}
        os.write(writer, json.dumps(found).encode())
        os.close(0)  # the rest of the parent's commands is not for the child
        sys.exit(0)
    os.close(writer)
    os.waitpid(child, 0)
    with os.fdopen(reader) as pipe:
        return json.loads(pipe.read())


if __name__ == "__main__":
    logging.basicConfig(level=logging.WARNING)
    obey(Program(sys.argv[1]))
