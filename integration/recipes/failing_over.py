"""A PostgreSQL primary and its standby, each registered by a process beside it."""

from __future__ import annotations

import contextlib
import subprocess
from collections.abc import Iterator

from integration.command_line import running, said
from integration.recipes.postgres import Postgres

TOPIC = "db"


class Managed:
    """The pair, which does what the test says: nobody else promotes."""

    def __init__(self, url: str, stack: contextlib.ExitStack) -> None:
        self._url, self._stack = url, stack
        self.primary = stack.enter_context(Postgres())
        self.standby = stack.enter_context(Postgres(self.primary))
        self._beside_primary = self._register(self.primary, "primary")
        self._beside_standby = self._register(self.standby, "replica")

    def _register(self, server: Postgres, role: str) -> subprocess.Popen[str]:
        words = ["register", TOPIC, server.address, "--tag", role, "--url", self._url]
        process = self._stack.enter_context(running(*words))
        said(process, "registered")
        return process

    def kill_primary(self) -> None:
        """As its machine would die: nobody is left to withdraw it."""
        self.primary.kill()
        self._beside_primary.kill()

    def promote_standby(self) -> None:
        self.standby.promote()
        self._beside_standby.terminate()
        self._register(self.standby, "primary")


@contextlib.contextmanager
def managed(url: str) -> Iterator[Managed]:
    with contextlib.ExitStack() as stack:
        yield Managed(url, stack)
