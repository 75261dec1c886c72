"""What a poll of kv mode and one of service mode share."""

from __future__ import annotations

import zlib
from collections.abc import Callable

from .api import Answer, ConsulApi, TooLarge
from .exchange import MAX_ANSWER_BYTES


class LongPoll:
    """Blocking queries, one after another, on a connection of their own; see `watching.Poll`."""

    def __init__(self, api: ConsulApi) -> None:
        self._line = api.line()
        self.received_bytes = 0
        """The size of the last poll's answer, also of one that failed for it."""

    def received(self, ask: Callable[[], Answer]) -> Answer:
        """The answer that *ask* brings, which takes `_line`, with an index to wait on.  Raises
        Unavailable, also where it has none, and Denied."""
        self.received_bytes = 0
        try:
            answer = ask()
        except TooLarge:
            self.received_bytes = MAX_ANSWER_BYTES
            raise
        self.received_bytes = len(answer.body)
        if not answer.index:  # without one the next poll would not wait
            raise answer.unexpected()
        return answer

    def interrupt(self) -> None:
        """Make the poll that waits, or else the next one, raise Unavailable at once."""
        self._line.interrupt()

    def close(self) -> None:
        """Close the connection; every later poll raises Unavailable."""
        self._line.close()


def fingerprint(text: bytes) -> object:
    """What tells answers apart; `zlib.crc32` does not hold up other threads."""
    return len(text), zlib.crc32(text)
