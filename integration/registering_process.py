"""A process of its own that registers what it is told to on standard input, a command a line.

Each command is answered by one line of JSON.  When its input ends it ends too, as a process that
does not know that it should call `close`.  `RegisteringProcess` is the test's handle on one.
"""

import json
import logging
import os
import subprocess
import sys
import threading
import time
from types import TracebackType
from typing import Any

READY_SECONDS = 10.0


class RegisteringProcess:
    """Starts one; a context manager that kills what is still running."""

    def __init__(self, url: str) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "integration.registering_process", url],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def ask(self, *words: str) -> Any:
        """Send one command; return its answer."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(" ".join(words) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise AssertionError(f"{words}: the process ended with {self._process.wait()}")
        return json.loads(line)

    def register(self, topic: str, host: str) -> float:
        """Returns once Consul has confirmed it, with the seconds that this took the process."""
        seconds = self.ask("register", topic, host)
        assert isinstance(seconds, float)
        return seconds

    @property
    def pid(self) -> int:
        return self._process.pid

    def kill(self) -> None:
        """SIGKILL."""
        self._process.kill()
        self._process.wait()

    def end(self) -> None:
        """Let it run to its end, and wait for that."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        assert self._process.wait(READY_SECONDS) == 0

    def __enter__(self) -> "RegisteringProcess":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.kill()
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            pipe.close()


def main(url: str) -> None:
    from consul_matchmaker import Matchmaker

    matchmaker = Matchmaker.from_url(url)
    registrations = {}
    for line in sys.stdin:
        answer: object
        command, *words = line.split()
        if command == "register":
            topic, host = words
            began = time.monotonic()
            registrations[topic, host] = registration = matchmaker.register(topic, host)
            registration.wait_until_published(timeout_seconds=READY_SECONDS)
            answer = time.monotonic() - began
        elif command == "fork":
            answer = _fork(matchmaker)
        else:
            raise SystemExit(f"unknown command {command}")
        print(json.dumps(answer), flush=True)


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
    main(sys.argv[1])
