"""What the endpoints of all servers of a topic were told to record, read from their file."""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

SECONDS_BETWEEN_LOOKS = 0.02


@dataclass(frozen=True)
class Entry:
    """One message that one server got."""

    number: int
    server: str
    at: float
    """By `time.monotonic`, which on Linux is the same for all processes."""


class Record:
    """Reads what was appended since it last looked.  Not thread-safe."""

    def __init__(self, path: Path) -> None:
        path.touch()
        self.path, self._offset = path, 0
        self.entries: list[Entry] = []

    def read(self) -> list[Entry]:
        """All entries so far."""
        with self.path.open("rb") as file:
            file.seek(self._offset)
            whole, newline, _ = file.read().rpartition(b"\n")
        self._offset += len(whole) + len(newline)
        for line in whole.decode().splitlines():
            number, server, at = line.split()
            self.entries.append(Entry(int(number), server, float(at)))
        return self.entries

    def wait_for(self, count: int, timeout_seconds: float) -> bool:
        """Until there are so many entries; whether that was in time."""
        deadline = time.monotonic() + timeout_seconds
        while len(self.read()) < count:
            if time.monotonic() > deadline:
                return False
            time.sleep(SECONDS_BETWEEN_LOOKS)
        return True

    def counts(self) -> Counter[int]:
        """How often each number was recorded."""
        return Counter(entry.number for entry in self.read())
