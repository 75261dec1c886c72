"""What the servers of these tests answer, and what they remember of what they were asked."""

from __future__ import annotations

import threading
from typing import Any

HELD_SECONDS = 30.0
"""How long a method that waits to be let go does so at most: longer than any test."""


class Oops(Exception):
    """An exception of an application."""


class Endpoint:
    """Methods for calls and casts; `got` has what `note` and `hold` were given.  Thread-safe."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.got: list[Any] = []
        self.let_go = threading.Event()
        """Set, it lets every `hold` return."""

    def who(self, ctxt: Any) -> str:
        return self.name

    def echo(self, ctxt: Any, what: Any) -> Any:
        return what

    def note(self, ctxt: Any, what: Any) -> str:
        self.got.append(what)
        return self.name

    def hold(self, ctxt: Any, what: Any, seconds: float = HELD_SECONDS) -> Any:
        """Return *what* when it is let go, or after so long."""
        self.got.append(what)
        self.let_go.wait(seconds)
        return what

    def oops(self, ctxt: Any, text: str) -> None:
        raise Oops(text)

    def unsayable(self, ctxt: Any) -> Any:
        """What JSON cannot say."""
        return threading.Lock()


class Listener:
    """Takes notifications; `got` has their payloads.  The first *requeues* of them it asks for once
    more."""

    def __init__(self, name: str, requeues: int = 0) -> None:
        self.name = name
        self.got: list[Any] = []
        self._requeues = requeues

    def info(self, ctxt: Any, publisher: str, event: str, payload: Any, metadata: Any) -> Any:
        self.got.append(payload)
        if len(self.got) <= self._requeues:
            return "requeue"
        return None


class Batches:
    """Takes notifications, several at a time; `got` has the payloads of each batch."""

    def __init__(self) -> None:
        self.got: list[list[Any]] = []

    def info(self, messages: list[dict[str, Any]]) -> None:
        self.got.append([each["payload"] for each in messages])
