"""A matchmaker that notes what adapters tell it of each attempt: by the seam that they use."""

from __future__ import annotations

from typing import Any

from consul_matchmaker import Matchmaker
from consul_matchmaker.model import Host, Snapshot


class NotingMatchmaker(Matchmaker):
    """For tests of one thread."""

    def __init__(self, *args: Any, **words: Any) -> None:
        super().__init__(*args, **words)
        self.busy: list[Host] = []
        """The hosts of attempts that were begun and have not ended."""
        self.good: list[Host] = []
        self.bad: list[Host] = []

    def attempts(self, *args: Any, **words: Any) -> Any:
        return _NotedAttempts(super().attempts(*args, **words), self)


class _NotedAttempts:
    def __init__(self, attempts: Any, notes: NotingMatchmaker) -> None:
        self._attempts, self._notes = attempts, notes
        self.may_retry = attempts.may_retry

    def begin(self, snapshot: Snapshot) -> _NotedAttempt:
        return _NotedAttempt(self._attempts.begin(snapshot), self._notes)


class _NotedAttempt:
    def __init__(self, attempt: Any, notes: NotingMatchmaker) -> None:
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
