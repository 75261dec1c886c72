"""A service that makes its transport, perhaps calls, and then forks workers, until SIGTERM.

    python -m integration.rpc.prefork_process URL TOPIC WORKERS [--call TOPIC]

It prints the process ids of its workers once they were forked; on SIGTERM it ends them, waits, and
prints their exit statuses.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from typing import IO, Any

END_SECONDS = 20.0


class PreforkProcess:
    """Starts one; a context manager that kills it, and its workers."""

    def __init__(
        self, url: str, topic: str, workers: int, *, call: str | None = None, log: IO[str]
    ) -> None:
        words = [url, topic, str(workers), *([] if call is None else ["--call", call])]
        self._process = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-m", "integration.rpc.prefork_process", *words],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            start_new_session=True,  # so that all of it may be killed at once
        )
        self.workers = self._numbers()

    @property
    def pid(self) -> int:
        return self._process.pid

    def stop(self) -> list[int]:
        """SIGTERM; return its exit status, and those of its workers."""
        self._process.terminate()
        statuses = self._numbers()
        return [self._process.wait(END_SECONDS), *statuses]

    def processes(self) -> list[int]:
        """Those of its session that run."""
        told = ["ps", "-o", "pid=", "-s", str(self.pid)]
        found = subprocess.run(told, capture_output=True, text=True, check=False).stdout
        return [int(pid) for pid in found.split()]

    def __enter__(self) -> PreforkProcess:
        return self

    def __exit__(self, *exc_info: object) -> None:
        for pid in self.processes():
            with contextlib.suppress(ProcessLookupError):  # one that had ended, as its parent ends
                os.kill(pid, signal.SIGKILL)
        self._process.wait()
        assert self._process.stdout is not None
        self._process.stdout.close()

    def _numbers(self) -> list[int]:
        assert self._process.stdout is not None
        return [int(word) for word in self._process.stdout.readline().split()]


class Endpoint:
    def who(self, context: Any) -> list[Any]:
        return [os.getpid(), sorted(thread.name for thread in threading.enumerate())]


def serve(transport: Any, topic: str, name: str) -> None:
    """Until SIGTERM."""
    import oslo_messaging

    target = oslo_messaging.Target(topic=topic, server=name)
    server = oslo_messaging.get_rpc_server(transport, target, [Endpoint()], executor="threading")
    ended = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: ended.set())
    server.start()
    ended.wait()
    server.stop()
    server.wait()
    transport.cleanup()


def forked(work: Callable[[], None]) -> int:
    """The process id of a child that does *work* and ends."""
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        work()
        status = 0
    finally:
        sys.stderr.flush()
        os._exit(status)  # as services do: what the parent wants done at its exit is not ours


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m integration.rpc.prefork_process")
    parser.add_argument("url")
    parser.add_argument("topic")
    parser.add_argument("workers", type=int)
    parser.add_argument("--call", help="a topic that the parent calls before it forks")
    options = parser.parse_args()
    import oslo_messaging
    from oslo_config import cfg

    conf = cfg.ConfigOpts()
    conf([])
    transport = oslo_messaging.get_rpc_transport(conf, url=options.url)
    if options.call:
        target = oslo_messaging.Target(topic=options.call)
        create = getattr(oslo_messaging, "get_rpc_client", None) or oslo_messaging.RPCClient  # 14.0
        create(transport, target, timeout=20).call({}, "who")
    ended = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: ended.set())
    workers = [
        forked(lambda name=f"worker{n}": serve(transport, options.topic, name))  # type: ignore[misc]
        for n in range(options.workers)
    ]
    print(*workers, flush=True)
    ended.wait()
    for pid in workers:
        os.kill(pid, signal.SIGTERM)
    print(*(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in workers), flush=True)
    transport.cleanup()


if __name__ == "__main__":
    import logging

    logging.basicConfig(level=logging.WARNING, format="%(process)d %(name)s %(message)s")
    main()
