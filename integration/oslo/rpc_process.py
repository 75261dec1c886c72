"""A process that serves and calls through oslo.messaging, as it is told on standard input.

`RpcProcess` is the test's handle.  Whether it is monkey-patched by eventlet is settled before
anything else is imported.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import threading
import time
from typing import Any

from integration.told import ToldProcess, obey


class RpcProcess(ToldProcess):
    """Starts one."""

    def __init__(
        self,
        url: str,
        executor: str,
        options: dict[str, Any] | None = None,
        log: Any = None,
        environment: dict[str, str] | None = None,
    ) -> None:
        self.url, self.executor, self.options = url, executor, options or {}
        words = url, executor, json.dumps(self.options)
        super().__init__("integration.oslo.rpc_process", *words, log=log, environment=environment)


class Endpoint:
    """What RPC servers and notification listeners answer with, and remember."""

    def __init__(self, name: str, received: list[str]) -> None:
        self.name, self._received = name, received

    def who(self, context: Any) -> str:
        return f"{self.name}"

    def note(self, context: Any, text: str) -> None:
        self._received.append(f"{self.name}:{text}")

    def info(self, context: Any, publisher: str, event: str, text: str, metadata: Any) -> None:
        self._received.append(f"{self.name}:{text}")


class Program:
    """Does what it is told."""

    def __init__(self, url: str, executor: str, options: dict[str, Any]) -> None:
        import oslo_messaging
        from oslo_config import cfg

        self.oslo, self.url, self.executor = oslo_messaging, url, executor
        self.conf = cfg.ConfigOpts()
        with tempfile.NamedTemporaryFile("w", suffix=".conf") as file:
            lines = ["rpc_zmq_host = 127.0.0.1"]
            lines += [f"{name} = {value}" for name, value in options.items()]
            for group in ("DEFAULT", "oslo_messaging_zmq"):  # the former until 4.6
                file.write("\n".join([f"[{group}]", *lines, ""]))
            file.flush()
            self.conf(["--config-file", file.name])
        if hasattr(oslo_messaging, "get_rpc_transport"):
            self.transport = oslo_messaging.get_rpc_transport(self.conf, url=url)
            self.notifying = oslo_messaging.get_notification_transport(self.conf, url=url)
        else:  # until 5.17
            self.transport = self.notifying = oslo_messaging.get_transport(self.conf, url=url)
        self.servers: dict[str, Any] = {}
        self.received: list[str] = []
        self.clients: dict[str, Any] = {}

    def serve(self, topic: str, server: str) -> float:
        began = time.monotonic()
        target = self.oslo.Target(topic=topic, server=server)
        self.servers[server] = self.oslo.get_rpc_server(
            self.transport, target, [Endpoint(server, self.received)], executor=self.executor
        )
        self.servers[server].start()
        return time.monotonic() - began

    def listen(self, topic: str, name: str) -> None:
        self.servers[name] = self.oslo.get_notification_listener(
            self.notifying,
            [self.oslo.Target(topic=topic)],
            [Endpoint(name, self.received)],
            executor=self.executor,
        )
        self.servers[name].start()

    def stop(self, server: str) -> None:
        stopped = self.servers.pop(server)
        stopped.stop()
        stopped.wait()

    def client(self, topic: str, **words: Any) -> Any:
        if topic not in self.clients:
            target = self.oslo.Target(topic=topic)
            self.clients[topic] = self.oslo.RPCClient(self.transport, target)
        return self.clients[topic].prepare(**words)

    def calls(
        self, topic: str, count: int = 1, timeout: float = 5, pause: float = 0,
        seconds: float = 0, server: str | None = None,
    ) -> list[tuple[float, float, str]]:  # fmt: skip
        """(when it began, how long it took, who answered or which error) of each call."""
        made: list[tuple[float, float, str]] = []
        words = {"server": server} if server else {}
        end = time.monotonic() + seconds
        while len(made) < count or time.monotonic() < end:
            began = time.monotonic()
            try:
                who = self.client(topic, timeout=timeout, **words).call({}, "who")
            except Exception as error:
                who = f"!{type(error).__name__}"
            made.append((began, time.monotonic() - began, who))
            if pause:
                time.sleep(pause)
        return made

    def parallel(self, topic: str, count: int, workers: int) -> dict[str, float]:
        """*count* calls from *workers* (green) threads: seconds taken, and how many were lost."""
        results: list[str] = []

        def work() -> None:
            found = self.calls(topic, count // workers)
            results.extend(who for _, _, who in found)

        self.calls(topic)
        threads = [threading.Thread(target=work) for _ in range(workers)]
        began = time.monotonic()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        seconds = time.monotonic() - began
        return {"seconds": seconds, "lost": sum(who.startswith("!") for who in results)}

    def cast(self, topic: str, text: str, server: str | None = None, fanout: bool = False) -> None:
        words: dict[str, Any] = {"fanout": True} if fanout else {}
        if server:
            words["server"] = server
        self.client(topic, **words).cast({}, "note", text=text)

    def notify(self, topic: str, text: str) -> None:
        notifier = self.oslo.Notifier(self.notifying, "test", driver="messagingv2", topics=[topic])
        notifier.info({}, "event", text)

    def beside(self, unknown: str, topics: list[str]) -> dict[str, Any]:
        """How long a call to *unknown* takes, and first calls to *topics* made meanwhile, and
        whether it goes on after those."""
        took: list[float] = []

        def call_unknown() -> None:
            took.append(self.calls(unknown, timeout=3)[0][1])

        thread = threading.Thread(target=call_unknown)
        thread.start()
        time.sleep(0.5)
        known = [self.calls(topic)[0][1] for topic in topics]
        goes_on = thread.is_alive()
        thread.join()
        return {"unknown": took[0], "known": known, "goes_on": goes_on}

    def got(self) -> list[str]:
        return list(self.received)

    def release(self) -> str:
        """Where the oslo.messaging in use is from."""
        return str(self.oslo.__file__)

    def matchmaker(self) -> Any:
        return self.transport._driver.matchmaker

    def hosts(self, topic: str, server: str | None = None, kind: str = "ROUTER") -> list[str]:
        target = self.oslo.Target(topic=topic, server=server)
        found = self.matchmaker().get_hosts(target, kind)
        return sorted(each.decode() if isinstance(each, bytes) else each for each in found)

    def lookups(self, topic: str, count: int) -> float:
        """Seconds for each of *count* lookups."""
        target = self.oslo.Target(topic=topic)
        began = time.monotonic()
        for _ in range(count):
            self.matchmaker().get_hosts(target, "ROUTER")
        return (time.monotonic() - began) / count

    def threads(self) -> list[str]:
        return sorted(thread.name for thread in threading.enumerate())

    def status(self) -> Any:
        return self.matchmaker()._matchmaker.status()["keeper"]

    def prefork(self, topic: str, workers: int) -> list[int]:
        """Fork *workers* children, each of which serves *topic* until SIGTERM; their pids."""
        pids = []
        for number in range(workers):
            pid = os.fork()
            if pid == 0:
                self._serve_in_child(topic, f"worker{number}")
            pids.append(pid)
        return pids

    def _serve_in_child(self, topic: str, server: str) -> None:
        import signal

        ended = threading.Event()
        signal.signal(signal.SIGTERM, lambda *_: ended.set())
        os.close(0)
        os.dup2(2, 1)
        self.serve(topic, server)
        while not ended.wait(0.1):
            pass
        self.stop(server)
        sys.exit(0)

    def reap(self, pids: list[int]) -> list[int]:
        """SIGTERM to each; their exit statuses."""
        import signal

        for pid in pids:
            os.kill(pid, signal.SIGTERM)
        return [os.waitpid(pid, 0)[1] for pid in pids]


def main(url: str, executor: str, options: str) -> None:
    read_line = sys.stdin.readline
    if executor == "eventlet":
        import eventlet
        from eventlet import tpool

        eventlet.monkey_patch()

        def read_line() -> str:  # a plain read would stop every green thread
            return str(tpool.execute(sys.stdin.readline))

    if url.startswith("zmq"):
        from consul_matchmaker.adapters.oslo_zmq import enable

        enable()
    obey(Program(url, executor, json.loads(options)), read_line)


if __name__ == "__main__":
    import logging

    logging.basicConfig(level=logging.WARNING, format="%(process)d %(name)s %(message)s")
    main(*sys.argv[1:])
