"""A process that does what it is told on standard input: both ends.

Each line is a command in JSON, answered by one line of JSON.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from types import TracebackType
from typing import Any

RAISED = "raised"
"""The name of what a command raised, in an answer that has nothing else."""


class ToldProcess:
    """The test's handle on one; a context manager that kills what is still running."""

    failure: type[Exception] = AssertionError
    """What a command that failed raises here."""
    end_seconds = 60.0

    def __init__(
        self, module: str, *words: str, log: Any = None, environment: dict[str, str] | None = None
    ) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-m", module, *words],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            env={**os.environ, **(environment or {})},
        )

    @property
    def pid(self) -> int:
        return self._process.pid

    def tell(self, do: str, **words: Any) -> None:
        """Send a command; `answer` must be called for it."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"do": do, **words}) + "\n")
        self._process.stdin.flush()

    def answer(self) -> Any:
        """Raises `failure` where the command failed, or the process ended."""
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise self.failure(f"the process ended with {self._process.wait()}")
        answer = json.loads(line)
        if isinstance(answer, dict) and answer.keys() == {RAISED}:
            raise self.failure(answer[RAISED])
        return answer

    def ask(self, do: str, **words: Any) -> Any:
        """Send a command; return its answer."""
        self.tell(do, **words)
        return self.answer()

    def kill(self) -> float:
        """SIGKILL; return when."""
        self._process.kill()
        self._process.wait()
        return time.monotonic()

    def end(self) -> int:
        """Let it run to its end; return its exit status."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        return self._process.wait(self.end_seconds)

    def __enter__(self) -> Any:
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
            with contextlib.suppress(OSError):
                pipe.close()


def obey(program: object, read_line: Callable[[], str] | None = None) -> None:
    """Have the methods of *program* called, as standard input says, until that ends."""
    for line in iter(read_line or sys.stdin.readline, ""):
        words = json.loads(line)
        try:
            answer = getattr(program, words.pop("do"))(**words)
        except Exception as error:
            answer = {RAISED: f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), flush=True)
