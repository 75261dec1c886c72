"""The processes that register: one host each, through the library or through the command line.

``python -m integration.soak.members URL TOPIC HOST`` is one that uses the library; `Member` is the
soak's handle on one, which writes into the ledger what it does to it.
"""

from __future__ import annotations

import contextlib
import logging
import os
import select
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # the process that registers has no use for them
    from .ledger import Ledger
    from .schedule import MemberPlan

ANSWER_SECONDS = 20.0
END_SECONDS = 20.0
FORKED_SECONDS = 3.0
SERVE = """
import socket, sys
listener = socket.create_server((sys.argv[1], int(sys.argv[2])))
sys.stdin.read()
"""
"""The COMMAND of ``register ... -- COMMAND``: it listens, and ends with the soak."""


class Member:
    """One registering process at a time, for the same host; its methods may be called by any
    thread, one after the other."""

    def __init__(
        self,
        plan: MemberPlan,
        url: str,
        host: str,
        ledger: Ledger,
        log: Path,
        *,
        plant: tuple[str, ...] = (),
    ) -> None:
        self.plan = plan
        self.host = host
        self.log = log
        self.failures: list[str] = []
        self._url = f"{url}&liveness={plan.liveness}"
        self._ledger = ledger
        self._plant = plant
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int | None:
        process = self._process
        return process.pid if process is not None and process.poll() is None else None

    def start(self) -> None:
        """Start it; it is expected to be listed in a while."""
        program = [sys.executable, "-m"]
        if self.plan.by_command:
            serve = [sys.executable, "-S", "-c", SERVE, *self.host.rsplit(":", 1)]
            program += ["consul_matchmaker", "--url", self._url, "register"]
            program += [self.plan.topic, self.host, "--", *serve]
        else:
            program += [__name__, self._url, self.plan.topic, self.host, *self._plant]
        from .bounds import START_SECONDS

        self._ledger.up(self.host, time.monotonic(), "started", START_SECONDS)
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                program,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                start_new_session=True,
                bufsize=0,
            )

    def kill(self) -> None:
        """SIGKILL: with the command, or without the children it forked."""
        begun_at = time.monotonic()
        self._signal(signal.SIGKILL, with_children=self.plan.by_command)
        self._wait()
        self._ledger.down(self.host, begun_at, time.monotonic(), "killed")

    def kill_command(self) -> None:
        """SIGKILL for the command alone: the process around it withdraws and ends."""
        begun_at = time.monotonic()
        children = Path(f"/proc/{self.pid}/task/{self.pid}/children").read_text().split()
        for child in children:
            os.kill(int(child), signal.SIGKILL)
        self._wait()
        self._ledger.down(self.host, begun_at, time.monotonic(), "left")

    def end(self) -> None:
        """As a program ends: SIGTERM for the command line, the end of its input for the other."""
        begun_at = time.monotonic()
        assert self._process is not None and self._process.stdin is not None
        if self.plan.by_command:
            self._process.send_signal(signal.SIGTERM)
        else:
            self._process.stdin.close()
        self._wait()
        self._ledger.down(self.host, begun_at, time.monotonic(), "left")

    def suspend(self) -> None:
        begun_at = time.monotonic()
        self._signal(signal.SIGSTOP)
        self._ledger.down(self.host, begun_at, time.monotonic(), "killed")

    def resume(self) -> None:
        self._ledger.up(self.host, time.monotonic(), "resumed")
        self._signal(signal.SIGCONT)

    def fork(self) -> None:
        """A child that lives on for `FORKED_SECONDS` and ends as programs do changes nothing."""
        self._ask("fork")

    def withdraw(self) -> None:
        begun_at = time.monotonic()
        self._ask("withdraw")
        self._ledger.down(self.host, begun_at, time.monotonic(), "left")

    def publish(self) -> None:
        self._ledger.up(self.host, time.monotonic(), "started")
        self._ask("publish")

    def abandon(self) -> None:
        """At the very end: nothing of it runs on."""
        if self._process is not None:
            self._signal(signal.SIGKILL)
            self._process.wait()

    def _ask(self, command: str) -> None:
        process = self._process
        assert process is not None and process.stdin is not None and process.stdout is not None
        process.stdin.write(f"{command}\n".encode())
        if not select.select([process.stdout], [], [], ANSWER_SECONDS)[0]:
            self.failures.append(f"{command} was not done within {ANSWER_SECONDS:g} s")
        elif not process.stdout.readline():
            self.failures.append(f"{command} ended the process")

    def _wait(self) -> None:
        process = self._process
        assert process is not None
        try:
            process.wait(END_SECONDS)
        except subprocess.TimeoutExpired:
            self.failures.append(f"did not end within {END_SECONDS:g} s")
            self._signal(signal.SIGKILL)
            process.wait()
        for pipe in (process.stdin, process.stdout):
            assert pipe is not None
            pipe.close()

    def _signal(self, number: signal.Signals, *, with_children: bool = True) -> None:
        assert self._process is not None
        with contextlib.suppress(ProcessLookupError):
            (os.killpg if with_children else os.kill)(self._process.pid, number)


# --- in the process itself -----------------------------------------------------------------------


class MonotonicFormatter(logging.Formatter):
    """Lines begin with the time that the ledger uses."""

    def format(self, record: logging.LogRecord) -> str:
        text = super().format(record)
        return f"{time.monotonic():.3f} {record.levelname} {record.name}: {text}"


def log_to_stderr() -> None:
    handler = logging.StreamHandler()
    handler.setFormatter(MonotonicFormatter())
    logging.basicConfig(level=logging.WARNING, handlers=[handler])


def main(url: str, topic: str, host: str, *plant: str) -> None:
    from consul_matchmaker import Matchmaker

    matchmaker = Matchmaker.from_url(url)
    registration = matchmaker.register(topic, host)
    if "phantom" in plant:
        matchmaker.register(topic, "10.66.66.66:6666")
    if "traceback" in plant:
        logging.getLogger("planted").exception("planted", exc_info=ValueError("planted"))
    if "silent" in plant:
        threading.Timer(30, registration.unregister).start()
    for line in sys.stdin:
        command = line.strip()
        if command == "fork":
            _fork(matchmaker)
        elif command == "withdraw":
            registration.unregister()
            with contextlib.suppress(Exception):
                registration.wait_until_withdrawn(timeout_seconds=ANSWER_SECONDS - 5)
        elif command == "publish":
            registration = matchmaker.register(topic, host)
        else:
            raise SystemExit(f"unknown command {command}")
        print("done", flush=True)


def _fork(matchmaker: Any) -> None:
    child = os.fork()
    if child:
        threading.Thread(target=_reap, args=(child,), daemon=True).start()
        return
    os.close(0)  # the rest of the parent's commands is not for the child
    os.close(1)
    os.open(os.devnull, os.O_WRONLY)
    os.open(os.devnull, os.O_WRONLY)
    lease = matchmaker.status()["keeper"]["lease"]
    if lease is not None:
        logging.error("the forked child believes that it holds %s", lease)
    threading.Event().wait(FORKED_SECONDS)
    sys.exit(0)


def _reap(child: int) -> None:
    _, status = os.waitpid(child, 0)
    if status:
        logging.error("the forked child ended with %d", os.waitstatus_to_exitcode(status))


if __name__ == "__main__":
    log_to_stderr()
    main(*sys.argv[1:])
