"""A process under eventlet that calls, casts and fans out, and may serve what it asks for itself.

    python -m integration.rpc.patched integration.rpc.green_process URL TOPIC [--serve]

It prints what came of it, in JSON.
"""

from __future__ import annotations

import argparse
import json
import time
from typing import Any

CALL_SECONDS = 20.0
AT_A_TIME = 8
MONITOR_SECONDS = 2
"""Of which upstream's server sends a sign of life every half; it refuses less."""


class Endpoint:
    def __init__(self, name: str) -> None:
        self._name = name
        self.got: list[int] = []

    def echo(self, context: Any, text: str) -> str:
        return text

    def record(self, context: Any, number: int) -> None:
        self.got.append(number)

    def slow(self, context: Any, seconds: float) -> float:
        time.sleep(seconds)
        return seconds

    def fail(self, context: Any) -> None:
        raise ValueError("as asked")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m integration.rpc.green_process")
    parser.add_argument("url")
    parser.add_argument("topic")
    parser.add_argument("--serve", action="store_true", help="by two servers of the executor")
    options = parser.parse_args()
    import eventlet
    import oslo_messaging
    from eventlet.patcher import is_monkey_patched
    from oslo_config import cfg

    assert is_monkey_patched("socket") and is_monkey_patched("thread")
    ticks = [0]

    def tick() -> None:
        while True:
            ticks[0] += 1
            eventlet.sleep(0.01)

    conf = cfg.ConfigOpts()
    conf([])
    transport = oslo_messaging.get_rpc_transport(conf, url=options.url)
    servers, endpoints = [], [Endpoint("one"), Endpoint("two")] if options.serve else []
    for endpoint in endpoints:
        target = oslo_messaging.Target(topic=options.topic, server=endpoint._name)
        server = oslo_messaging.get_rpc_server(transport, target, [endpoint], executor="eventlet")
        server.start()
        servers.append(server)
    eventlet.spawn(tick)
    create = getattr(oslo_messaging, "get_rpc_client", None) or oslo_messaging.RPCClient  # 14.0
    client = create(transport, oslo_messaging.Target(topic=options.topic), timeout=CALL_SECONDS)
    found: dict[str, Any] = {"echo": client.call({}, "echo", text="said")}

    began = time.monotonic()
    greens = [eventlet.spawn(client.call, {}, "slow", seconds=0.5) for _ in range(AT_A_TIME)]
    found["at a time"] = [green.wait() for green in greens]
    found["at a time, seconds"] = time.monotonic() - began

    before = ticks[0]
    monitored = client.prepare(call_monitor_timeout=MONITOR_SECONDS)
    found["monitored"] = monitored.call({}, "slow", seconds=2 * MONITOR_SECONDS)
    found["ticks"] = ticks[0] - before
    try:
        client.call({}, "fail")
    except ValueError as error:
        found["failed"] = str(error).splitlines()[0]
    client.cast({}, "record", number=1)
    client.prepare(fanout=True).cast({}, "record", number=2)
    deadline = time.monotonic() + CALL_SECONDS
    while endpoints and time.monotonic() < deadline:
        if sum(len(each.got) for each in endpoints) >= 3:
            break
        eventlet.sleep(0.05)
    found["got"] = sorted(sorted(each.got) for each in endpoints)
    for server in servers:
        server.stop()
        server.wait()
    transport.cleanup()
    print(json.dumps(found), flush=True)


if __name__ == "__main__":
    import logging

    logging.basicConfig(level=logging.WARNING, format="%(process)d %(name)s %(message)s")
    main()
