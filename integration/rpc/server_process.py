"""A process that serves RPC as it is told on standard input; `ServerProcess` is the test's handle.

Each line is a command in JSON, answered by one line of JSON.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from types import TracebackType
from typing import Any

END_SECONDS = 10.0


class ServerProcess:
    """Starts one, with a transport of *url*; a context manager that kills what still runs."""

    def __init__(self, url: str, log: Any) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-m", "integration.rpc.server_process", url],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
        )

    def ask(self, do: str, **words: Any) -> Any:
        """Have a method of `Program` called; return its answer."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps({"do": do, **words}) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise AssertionError(f"the process ended with {self._process.wait()}")
        answer = json.loads(line)
        if isinstance(answer, dict) and "failed" in answer:
            raise AssertionError(answer["failed"])
        return answer

    def pause(self) -> None:
        """SIGSTOP: its connections stay open, and nothing answers."""
        os.kill(self._process.pid, signal.SIGSTOP)

    def resume(self) -> None:
        os.kill(self._process.pid, signal.SIGCONT)

    def kill(self) -> None:
        """SIGKILL."""
        self._process.kill()
        self._process.wait()

    def end(self) -> int:
        """Let it run to its end; its exit status."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        return self._process.wait(END_SECONDS)

    def __enter__(self) -> ServerProcess:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.kill()
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            with contextlib.suppress(OSError):
                pipe.close()


class Program:
    """Does what it is told."""

    def __init__(self, url: str) -> None:
        import oslo_messaging
        from oslo_config import cfg

        self._oslo = oslo_messaging
        conf = cfg.ConfigOpts()
        conf([])
        self._transport = oslo_messaging.get_rpc_transport(conf, url=url)
        self._servers: dict[str, Any] = {}
        self._endpoints: dict[str, Any] = {}

    def serve(self, topic: str, server: str) -> None:
        from integration.rpc.endpoints import Endpoint

        endpoint = self._endpoints.setdefault(server, Endpoint(server))
        target = self._oslo.Target(topic=topic, server=server)
        self._servers[server] = self._oslo.get_rpc_server(
            self._transport, target, [endpoint], executor="threading"
        )
        self._servers[server].start()

    def stop(self, server: str) -> None:
        stopped = self._servers.pop(server)
        stopped.stop()
        stopped.wait()

    def got(self, server: str) -> list[Any]:
        return list(self._endpoints[server].got)

    def close(self) -> None:
        for server in list(self._servers):
            self.stop(server)
        self._transport.cleanup()


def main(url: str) -> None:
    program = Program(url)
    for line in sys.stdin:
        words = json.loads(line)
        try:
            answer = getattr(program, words.pop("do"))(**words)
        except Exception as error:
            answer = {"failed": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), flush=True)
    program.close()


if __name__ == "__main__":
    import logging

    logging.basicConfig(level=logging.WARNING, format="%(process)d %(name)s %(message)s")
    main(*sys.argv[1:])
