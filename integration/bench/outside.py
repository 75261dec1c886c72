"""What Consul's nodes and their clients cost, read outside of both: from /proc and on the wire."""

from __future__ import annotations

import asyncio
import contextlib
import os
import threading
from dataclasses import dataclass
from pathlib import Path

from consul_matchmaker.model import Host
from consul_matchmaker.testing.consul_probe import read_json
from consul_matchmaker.testing.local_consul import LocalCluster

CHUNK_BYTES = 1 << 18
TICKS, PAGE_BYTES = os.sysconf("SC_CLK_TCK"), os.sysconf("SC_PAGE_SIZE")


def pid_of(cluster: LocalCluster, name: str) -> int:
    """The process of that node: the one whose command names its configuration."""
    config = f"{cluster.folder}/{name}/config.json".encode()
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if config in (process / "cmdline").read_bytes():
                return int(process.name)
    raise ValueError(f"{name} does not run")


def raft_index(cluster: LocalCluster) -> int:
    """How many entries the log of Raft has had."""
    leader = cluster.nodes[cluster.leader()]
    return int(read_json(leader, "/v1/agent/self")["Stats"]["raft"]["last_log_index"])


@dataclass(frozen=True)
class Process:
    """What one has used so far; ``-`` gives what it used between two looks."""

    cpu_seconds: float
    read_bytes: int
    """By read(), from files and sockets: in Consul not gossip, which comes by recvfrom()."""
    written_bytes: int
    memory_bytes: int = 0

    @classmethod
    def look(cls, pid: int) -> Process:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        lines = Path(f"/proc/{pid}/io").read_text().splitlines()
        io = {name: int(value) for name, _, value in (line.partition(":") for line in lines)}
        cpu_seconds, memory_bytes = (int(fields[11]) + int(fields[12])) / TICKS, int(fields[21])
        return cls(cpu_seconds, io["rchar"], io["wchar"], memory_bytes * PAGE_BYTES)

    def __sub__(self, before: Process) -> Process:
        return Process(
            self.cpu_seconds - before.cpu_seconds,
            self.read_bytes - before.read_bytes,
            self.written_bytes - before.written_bytes,
            self.memory_bytes - before.memory_bytes,
        )


class CountingRelay:
    """Passes connections on to an agent, and counts what goes there and back; a context manager.

    The bytes are those that TCP carries.  A request is counted by its first line.
    """

    def __init__(self, target: str) -> None:
        self._target = Host.parse(target)
        self._ends = asyncio.Event()
        self._is_open = threading.Event()
        self._thread = threading.Thread(target=asyncio.run, args=(self._serve(),))
        self.address = ""
        self.requests = self.sent_bytes = self.received_bytes = self.connections = 0
        """Requests and bytes so far, as the clients see them; connections now."""

    def __enter__(self) -> CountingRelay:
        self._thread.start()
        self._is_open.wait()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._loop.call_soon_threadsafe(self._ends.set)
        self._thread.join()

    async def _serve(self) -> None:
        self._loop = asyncio.get_running_loop()
        server = await asyncio.start_server(self._connection, "127.0.0.1", 0, backlog=1_000)
        self.address = "{}:{}".format(*server.sockets[0].getsockname())
        self._is_open.set()
        await self._ends.wait()  # what is still open ends with the loop

    @property
    def counts(self) -> tuple[int, int, int]:
        return self.requests, self.sent_bytes, self.received_bytes

    async def _connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        ended = contextlib.suppress(OSError, asyncio.CancelledError)  # the latter: with the loop
        with ended, contextlib.closing(writer):
            to_agent = await asyncio.open_connection(self._target.address, self._target.port)
            await asyncio.gather(self._there(reader, to_agent[1]), self._back(to_agent[0], writer))
        self.connections -= 1

    async def _there(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.closing(writer):
            while data := await reader.read(CHUNK_BYTES):
                self.sent_bytes += len(data)
                self.requests += data.count(b" HTTP/1.1\r\n")
                writer.write(data)
                await writer.drain()

    async def _back(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.closing(writer):
            while data := await reader.read(CHUNK_BYTES):
                self.received_bytes += len(data)
                writer.write(data)
                await writer.drain()
