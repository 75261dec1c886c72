"""A process of its own that serves RPC on a transport until SIGTERM.

    python -m integration.rpc.service_process --url URL --topic TOPIC [--servers N] ...

It prints `ready` once all its servers serve.  `ServiceProcess` is the test's handle on one.
"""

from __future__ import annotations

import argparse
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import IO, Any

from integration.rpc.transports import Transport

READY_SECONDS = 120.0  # 200 servers on a busy machine
STOP_SECONDS = 60.0
SECONDS_BETWEEN_LOOKS = 1.0  # whether our parent still lives


class ServiceProcess:
    """Starts one, and returns once it serves; a context manager that kills what still runs.

    What its endpoints are told to record is appended to *record*: a line has the number, the name
    of the server, and the time of `time.monotonic`, which on Linux is the same for all processes.
    """

    def __init__(
        self,
        transport: Transport,
        topic: str,
        name: str = "server",
        *,
        servers: int = 1,
        record: Path | None = None,
        executor: str = "threading",
        log: IO[str] | None = None,
    ) -> None:
        words = ["--topic", topic, "--name", name, "--servers", str(servers)]
        words += [] if record is None else ["--record", str(record)]
        patched = ["integration.rpc.patched"] if executor == "eventlet" else []
        self._process = subprocess.Popen(
            [
                *(sys.executable, "-W", "ignore", "-m", *patched),
                "integration.rpc.service_process",
                *(*transport.words, *words, "--executor", executor),
            ],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
        )
        self.name = name

    def wait_ready(self) -> None:
        """Raises RuntimeError where it ended before it served, or took too long."""
        assert self._process.stdout is not None
        late = threading.Timer(READY_SECONDS, self._process.kill)
        late.start()
        line = self._process.stdout.readline()
        late.cancel()
        if line != "ready\n":
            raise RuntimeError(f"{self.name} does not serve: it ended with {self._process.wait()}")

    @property
    def pid(self) -> int:
        return self._process.pid

    def kill(self) -> None:
        """SIGKILL."""
        self._process.kill()
        self._process.wait()

    def pause(self) -> None:
        self._process.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        self._process.send_signal(signal.SIGCONT)

    def stop(self) -> int:
        """SIGTERM; return its exit status."""
        self._process.terminate()
        try:
            return self._process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self.kill()
            raise RuntimeError(f"{self.name} did not end within {STOP_SECONDS:g} s") from None

    def __enter__(self) -> ServiceProcess:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.kill()
        assert self._process.stdout is not None
        self._process.stdout.close()


class Endpoint:
    """What each server answers with."""

    def __init__(self, name: str, record: int | None) -> None:
        self._name, self._record = name, record

    def echo(self, context: Any, text: str) -> str:
        return text

    def who(self, context: Any) -> str:
        return self._name

    def record(self, context: Any, number: int) -> int:
        """In one write: it is whole in the file, also where this process is killed after it."""
        assert self._record is not None
        os.write(self._record, f"{number} {self._name} {time.monotonic()}\n".encode())
        return number

    def slow(self, context: Any, seconds: float) -> float:
        time.sleep(seconds)
        return seconds

    def fail(self, context: Any) -> None:
        raise ValueError("as asked")


def configured(config_files: list[str]) -> Any:
    """The one configuration of this process; a private one lacks options that calls need."""
    from oslo_config import cfg

    words = [word for file in config_files for word in ("--config-file", file)]
    cfg.CONF(words, project="rpc", default_config_files=[], default_config_dirs=[])
    return cfg.CONF


def end_with_parent() -> None:
    """Have this process end soon after the one that started it, which may be killed."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(SECONDS_BETWEEN_LOOKS)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def serve(options: argparse.Namespace) -> None:
    """Until SIGTERM: then stop every server, wait for what they still do, and end."""
    import oslo_messaging

    ended = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: ended.set())
    transport = oslo_messaging.get_rpc_transport(configured(options.config_file), url=options.url)
    record = None
    if options.record:
        record = os.open(options.record, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    names = [f"{options.name}-{number}" for number in range(options.servers)]
    servers = [
        oslo_messaging.get_rpc_server(
            transport,
            oslo_messaging.Target(topic=options.topic, server=name),
            [Endpoint(name, record)],
            executor=options.executor,
        )
        for name in names
    ]
    for server in servers:
        server.start()
    print("ready", flush=True)
    while not ended.wait(0.5):  # under eventlet a wait without end hears no signal
        pass
    for server in servers:
        server.stop()
    for server in servers:
        server.wait()
    transport.cleanup()


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m integration.rpc.service_process")
    parser.add_argument("--url", required=True)
    parser.add_argument("--config-file", action="append", default=[], help="for oslo.config")
    parser.add_argument("--topic", required=True)
    parser.add_argument("--name", default="server", help="servers are called NAME-0, NAME-1 ...")
    parser.add_argument("--servers", type=int, default=1)
    parser.add_argument("--record", help="the file that `record` appends to")
    parser.add_argument(
        "--executor",
        choices=("threading", "eventlet"),
        default="threading",
        help="for eventlet run it by integration.rpc.patched",
    )
    options = parser.parse_args()
    logging.basicConfig(
        level=logging.WARNING,
        format=f"%(asctime)s {options.name} %(process)d %(name)s %(message)s",
    )
    end_with_parent()
    serve(options)


if __name__ == "__main__":
    main()
