"""A process that plays many clients, each with one lease, one registration and one connection.

Run as ``python -m integration.bench.kv_herd ADDRESS PREFIX TTL FIRST_PORT COUNT JITTER``; `Herd` is
the handle on several.  What a client asks and when is the product's `Reconciler`'s word; how it is
sent is not the product's: there a request takes three times the processor that it takes in all of
Consul, and a thousand such clients on one machine would measure themselves.
"""

from __future__ import annotations

import asyncio
import json
import random
import socket
import subprocess
import sys
import time
from typing import Any, NamedTuple

from consul_matchmaker.backends.kv.keys import Key
from consul_matchmaker.errors import LeaseLost, Unavailable
from consul_matchmaker.model import Host, Lease, Registration
from consul_matchmaker.registrations.reconciler import (
    Call,
    Open,
    Outcome,
    Publish,
    Reconciler,
    Renew,
    Stop,
    Wait,
)

PROCESSES = 2
JITTERS = {"jitter": random.random, "none": lambda: 1.0}


class Request(NamedTuple):
    """One that got an answer; the times are the monotonic clock's, the same in every process."""

    sent_at: float
    answered_at: float
    what: str
    status: int


class Client:
    """Keeps one registration, named by its port, and writes down every answer in *log*."""

    def __init__(
        self, address: Host, prefix: str, ttl: float, port: int, jitter: str, log: list[Request]
    ) -> None:
        self._address, self._prefix, self._ttl, self._log = address, prefix, ttl, log
        self._registration = Registration("scheduler", Host("10.0.0.1", port))
        self._reconciler = Reconciler(ttl, JITTERS[jitter])
        self._reconciler.want(self._registration, time.monotonic())
        self._connection: socket.socket | None = None

    async def run(self) -> None:
        while True:
            action = self._reconciler.next_action(time.monotonic())
            self._reconciler.take_notes()
            if isinstance(action, Wait | Stop):  # it is never told to stop
                assert isinstance(action, Wait) and action.seconds is not None
                await asyncio.sleep(action.seconds)
                continue
            outcome = await self._carry_out(action)
            self._reconciler.handle(outcome, time.monotonic(), action)

    async def _carry_out(self, action: Call) -> Outcome:
        """The same requests as `backends.kv.Kv` makes."""
        try:
            if isinstance(action, Open):
                wanted: dict[str, object] = {"TTL": f"{self._ttl:g}s", "LockDelay": "0s"}
                wanted |= {"Behavior": "delete", "Checks": [], "NodeChecks": []}
                status, text = await self._ask("create", "session/create", wanted)
                if status == 200:
                    return Lease(json.loads(text)["ID"], self._ttl)
            else:
                lease = action.lease
                key = Key.of(self._registration, lease.id).under(self._prefix)
                if isinstance(action, Publish):
                    status, _ = await self._ask("publish", f"kv/{key}?acquire={lease.id}", {})
                    if status == 200:
                        return None
                elif isinstance(action, Renew):
                    status, _ = await self._ask("renew", f"session/renew/{lease.id}")
                    if status == 404:
                        return LeaseLost("gone")
                    if status == 200:
                        check = {"Verb": "check-session", "Key": key, "Session": lease.id}
                        status, _ = await self._ask("verify", "txn", [{"KV": check}])
                        if status == 200:
                            return [self._registration]
            return Unavailable(f"status {status}")
        except OSError as error:
            if self._connection is not None:
                self._connection.close()
                self._connection = None
            return Unavailable(repr(error))

    async def _ask(self, what: str, path: str, body: object = None) -> tuple[int, bytes]:
        content = b"" if body is None else json.dumps(body).encode()
        head = f"PUT /v1/{path} HTTP/1.1\r\nHost: consul\r\nContent-Length: {len(content)}\r\n\r\n"
        sent_at = time.monotonic()
        if self._connection is None:
            address, port = self._address.address, self._address.port or 0
            self._connection = socket.create_connection((address, port))  # on this machine: at once
            self._connection.setblocking(False)
        loop, answer = asyncio.get_running_loop(), b""
        await loop.sock_sendall(self._connection, head.encode() + content)
        while not _is_whole(answer):
            received = await loop.sock_recv(self._connection, 65536)
            if not received:
                raise ConnectionResetError("closed by the agent")
            answer += received
        status, text = int(answer.split(maxsplit=2)[1]), answer.partition(b"\r\n\r\n")[2]
        self._log.append(Request(sent_at, time.monotonic(), what, status))
        return status, text


def _is_whole(answer: bytes) -> bool:
    head, end, text = answer.partition(b"\r\n\r\n")
    length = head.lower().partition(b"\r\ncontent-length:")[2].partition(b"\r\n")[0]
    return bool(end) and len(text) == int(length)


class Herd:
    """*count* clients in a few processes; a context manager that kills them.

    *jitter* is "jitter" for the product's own, and "none" for a constant in its place.
    """

    def __init__(self, address: str, prefix: str, ttl: float, count: int, jitter: str) -> None:
        self._processes = []
        for number in range(PROCESSES):
            first, end = (count * each // PROCESSES for each in (number, number + 1))
            command = [sys.executable, "-m", "integration.bench.kv_herd", address, prefix, str(ttl)]
            command += [str(first + 1), str(end - first), jitter]
            self._processes.append(
                subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
            )

    def start(self) -> None:
        self._ask("start")

    def cpu_seconds(self) -> float:
        """What all of it has used so far."""
        return float(sum(self._ask("cpu")))

    def log(self) -> list[Request]:
        return [Request(*each) for log in self._ask("log") for each in log]

    def _ask(self, command: str) -> list[Any]:
        for process in self._processes:
            assert process.stdin is not None
            print(command, file=process.stdin, flush=True)
        answers = []
        for process in self._processes:
            assert process.stdout is not None
            answers.append(json.loads(process.stdout.readline()))
        return answers

    def __enter__(self) -> Herd:
        return self

    def __exit__(self, *exc_info: object) -> None:
        for process in self._processes:
            process.kill()
            process.communicate()


async def main(
    address: str, prefix: str, ttl: str, first_port: str, count: str, jitter: str
) -> None:
    log: list[Request] = []
    ports = range(int(first_port), int(first_port) + int(count))
    agent = Host.parse(address)
    clients = [Client(agent, prefix, float(ttl), port, jitter, log) for port in ports]
    tasks = []
    while line := await asyncio.to_thread(sys.stdin.readline):
        answer: object = None
        if line == "start\n":
            tasks += [asyncio.create_task(client.run()) for client in clients]
        elif line == "cpu\n":
            answer = time.process_time()
        elif line == "log\n":
            answer = log
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
