"""A process that serves RPC as it is told on standard input; `ServerProcess` is its handle."""

from __future__ import annotations

import signal
import sys
from typing import Any

from integration.told import ToldProcess, obey


class ServerProcess(ToldProcess):
    """Starts one, with a transport of *url*."""

    end_seconds = 10.0

    def __init__(self, url: str, log: Any) -> None:
        super().__init__("integration.rpc.server_process", url, log=log)

    def pause(self) -> None:
        """SIGSTOP: its connections stay open, and nothing answers."""
        self._process.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        self._process.send_signal(signal.SIGCONT)


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
    obey(program)
    program.close()


if __name__ == "__main__":
    import logging

    logging.basicConfig(level=logging.WARNING, format="%(process)d %(name)s %(message)s")
    main(*sys.argv[1:])
