"""The programs of docs/recipes: out of the page, and running."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from integration.command_line import environment
from integration.waiting import until

RECIPES = Path(__file__).parent.parent.parent / "docs" / "recipes"
LONG_SECONDS = 120.0
"""How long a program may take for what takes a second or two: the machine may be busy."""


def programs(page: str, folder: Path) -> None:
    """Write each block of *page* that begins with ``# NAME`` into a file of that name."""
    text = (RECIPES / page).read_text()
    found = re.findall(r"^```(?:python|sh)\n# (\S+\.(?:py|sh))\n(.*?)^```", text, re.DOTALL | re.M)
    assert found, f"{page} has no program"
    for name, program in found:
        (folder / name).write_text(program)


class Running:
    """A command line in *folder*; a context manager that kills it.

    ``python`` and other programs are those of the tests' own environment.
    """

    def __init__(self, folder: Path, words: Sequence[str], variables: Mapping[str, str]) -> None:
        scripts = str(Path(sys.executable).parent)
        path = os.pathsep.join([scripts, os.environ.get("PATH", os.defpath)])
        self._output = tempfile.TemporaryFile("w+", dir=folder)  # noqa: SIM115
        self.process = subprocess.Popen(
            words,
            cwd=folder,
            env=environment(PATH=path, **variables),
            stdin=subprocess.DEVNULL,
            stdout=self._output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    def said(self) -> str:
        """All that it has printed."""
        return os.pread(self._output.fileno(), 1 << 24, 0).decode(errors="replace")

    def wait_for(self, words: str, *, after: str = "") -> str:
        """Until it has printed *words*, in what follows *after*; return what it has printed."""

        def has_said() -> bool:
            assert self.process.poll() is None, "it has ended"
            return words in self.said()[len(after) :]

        self.until(has_said, f"printed {words!r}")
        return self.said()

    def until(self, claim: Callable[[], object], what: str) -> None:
        """Until *claim* is true; if it never is, what the program printed is shown."""
        try:
            until(claim, LONG_SECONDS, what)
        except BaseException:
            print(self.said())
            raise

    def __enter__(self) -> Running:
        return self

    def __exit__(self, *exc_info: object) -> None:
        if self.process.poll() is None:
            os.killpg(self.process.pid, 9)
        self.process.wait()
        self._output.close()
