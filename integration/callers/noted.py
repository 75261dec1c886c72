"""A matchmaker that notes what adapters tell it of each attempt: by the seam that they use."""

from __future__ import annotations

from typing import Any

from consul_matchmaker import Matchmaker
from consul_matchmaker.calls import Attempt, Attempts
from consul_matchmaker.model import Host, Snapshot


class NotingMatchmaker(Matchmaker):
    """For tests of one thread."""

    def __init__(self, *args: Any, **words: Any) -> None:
        super().__init__(*args, **words)
        self.busy: list[Host] = []
        """The hosts of attempts that were begun and have not ended."""
        self.good: list[Host] = []
        self.bad: list[Host] = []

    def attempts(self, *args: Any, **words: Any) -> Attempts:
        return _NotedAttempts(self, *args, **words)


class _NotedAttempts(Attempts):
    def __init__(self, notes: NotingMatchmaker, *args: Any, **words: Any) -> None:
        super().__init__(notes, *args, **words)
        self._notes = notes

    def begin(self, snapshot: Snapshot) -> Any:
        return _NotedAttempt(super().begin(snapshot), self._notes)


class _NotedAttempt:
    def __init__(self, attempt: Attempt, notes: NotingMatchmaker) -> None:
        self._attempt, self._notes = attempt, notes
        self._is_over = False
        self.host, self.topic = attempt.host, attempt.topic
        notes.busy.append(self.host)

    def judge(self, *, is_good: bool) -> None:
        (self._notes.good if is_good else self._notes.bad).append(self.host)
        self._attempt.judge(is_good=is_good)

    def end(self) -> None:
        if not self._is_over:
            self._is_over = True
            self._notes.busy.remove(self.host)
        self._attempt.end()

    def __enter__(self) -> Attempt:
        return self._attempt.__enter__()

    def __exit__(self, *exc_info: Any) -> None:
        self._attempt.__exit__(*exc_info)
