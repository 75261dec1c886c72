"""A PostgreSQL of the machine's own programs: a primary, and standbys of it."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from integration.cluster import free_ports
from integration.waiting import until

READY_SECONDS = 120.0
USER = "app"
# It refuses to run as root.
ACCOUNT: dict[str, Any] = (
    {"user": "postgres", "group": "postgres", "extra_groups": []} if os.geteuid() == 0 else {}
)


class NoPostgres(Exception):
    """There is no PostgreSQL here; the message says what to do."""


def _programs() -> Path:
    """The folder of the newest, which Debian does not have on PATH."""
    found = Path("/usr/lib/postgresql").glob("*/bin/postgres")
    newest = max(found, key=lambda path: float(path.parent.parent.name), default=None)
    on_path = shutil.which("postgres")
    if newest is None and on_path is None:
        raise NoPostgres("PostgreSQL is needed: install it (apt-get install postgresql)")
    return newest.parent if newest else Path(str(on_path)).parent


class Postgres:
    """One on 127.0.0.1, a standby of *primary* if that is given; a context manager that ends it.

    Its files are in a folder of its own: those of a test are under a folder that only root enters.
    Everybody is let in as the superuser `USER`, without a password.
    """

    def __init__(self, primary: Postgres | None = None) -> None:
        self._bin = _programs()
        (self.port,) = free_ports(1)
        self.address = f"127.0.0.1:{self.port}"
        self._folder = Path(tempfile.mkdtemp(prefix="consul-matchmaker-postgres-"))
        self._data = self._folder / "data"
        if ACCOUNT:
            shutil.chown(self._folder, ACCOUNT["user"], ACCOUNT["group"])
        self._process: subprocess.Popen[bytes] | None = None
        try:
            if primary is None:
                words = ["--username", USER, "--auth", "trust", "--no-locale", "--encoding", "UTF8"]
                self._run("initdb", *words, "--no-sync")
            else:
                of = ["--host", "127.0.0.1", "--port", str(primary.port), "--username", USER]
                self._run("pg_basebackup", *of, "--write-recovery-conf", "--no-sync")
            self._start()
        except BaseException:
            self.__exit__()
            raise

    def _run(self, program: str, *words: str) -> None:
        done = subprocess.run(
            [self._bin / program, "--pgdata", self._data, *words],
            cwd=self._folder,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=READY_SECONDS,
            check=False,
            **ACCOUNT,
        )
        assert done.returncode == 0, done.stderr

    def _start(self) -> None:
        settings = {
            "port": self.port,
            "listen_addresses": "127.0.0.1",
            "unix_socket_directories": "",
            "fsync": "off",
        }
        words = [word for name, value in settings.items() for word in ("-c", f"{name}={value}")]
        with (self._folder / "log").open("w") as log:
            self._process = subprocess.Popen(
                [self._bin / "postgres", "-D", self._data, *words],
                cwd=self._folder,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                **ACCOUNT,
            )
        until(self._is_ready, READY_SECONDS, "PostgreSQL takes connections")

    def _is_ready(self) -> bool:
        assert self._process is not None
        assert self._process.poll() is None, (self._folder / "log").read_text()
        asked = [self._bin / "pg_isready", "-q", "-h", "127.0.0.1", "-p", str(self.port)]
        return subprocess.run(asked, check=False).returncode == 0

    def promote(self) -> None:
        """Make the standby a primary; returns once it is one."""
        self._run("pg_ctl", "promote", "--wait", "--timeout", f"{READY_SECONDS:.0f}")

    def kill(self) -> None:
        """SIGKILL: its children end with it."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()

    def __enter__(self) -> Postgres:
        return self

    def __exit__(self, *exc_info: object) -> None:
        if self._process is not None:
            self._process.send_signal(signal.SIGQUIT)  # at once, but it waits for its children
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(READY_SECONDS)
        self.kill()
        shutil.rmtree(self._folder, ignore_errors=True)
