"""A Redis server of the machine's own program, which is what our matchmaker is compared with."""

import contextlib
import shutil
import socket
import subprocess
import time
from pathlib import Path

READY_SECONDS = 10.0
SECONDS_BETWEEN_KNOCKS = 0.02


class NoRedis(Exception):
    """There is no redis-server here, or it does not start; the message says what to do."""


class Redis:
    """Starts one on 127.0.0.1, which keeps nothing on disk; a context manager that kills it."""

    def __init__(self, folder: Path, port: int) -> None:
        program = shutil.which("redis-server")
        if program is None:
            raise NoRedis("redis-server is needed: install it (apt-get install redis-server)")
        self.address = f"127.0.0.1:{port}"
        words = ["--port", str(port), "--bind", "127.0.0.1", "--save", "", "--dir", str(folder)]
        self._port, self._command = port, [program, *words]
        self.start()

    def start(self) -> None:
        """Returns once it takes connections: a client that is refused tries again much later."""
        self._process = subprocess.Popen(self._command, stdout=subprocess.DEVNULL)
        deadline = time.monotonic() + READY_SECONDS
        while self._process.poll() is None and time.monotonic() < deadline:
            with contextlib.suppress(OSError):
                socket.create_connection(("127.0.0.1", self._port), timeout=1).close()
                return
            time.sleep(SECONDS_BETWEEN_KNOCKS)
        self.kill()
        raise NoRedis(f"redis-server does not take connections at {self.address}")

    def kill(self) -> None:
        """SIGKILL."""
        self._process.kill()
        self._process.wait()

    def __enter__(self) -> "Redis":
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.kill()
