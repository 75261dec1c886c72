"""Whether a file, which somebody may replace at any time, is another one than before."""

from __future__ import annotations

from pathlib import Path


def stamp_of(path: str | Path) -> tuple[int, int, int]:
    """What is another one when the file at *path* is.  Raises OSError when there is none."""
    found = Path(path).stat()
    return found.st_mtime_ns, found.st_size, found.st_ino
