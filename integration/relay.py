"""Stand between the nodes of a cluster, and pass nothing on to or from those that are cut off.

    python integration/relay.py

Needs Linux and no privileges.  Every node tells the others to reach it at an address of the
relay's.  Commands come by stdin, a line each, and are answered with a line when they are done:
`node NAME OWN_ADDRESS RELAYED_ADDRESS FOLDER TCP_PORT,... UDP_PORT`, `cut NAME`, `heal NAME`.
The relay ends with its stdin.
"""

from __future__ import annotations

import asyncio
import contextlib
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

CHUNK_BYTES = 65536


@dataclass
class Node:
    name: str
    address: str
    relayed: str
    folder: str
    tcp_ports: list[int]
    udp_port: int
    udp: asyncio.DatagramTransport | None = field(default=None, repr=False)


class Relay:
    def __init__(self) -> None:
        self._nodes: dict[str, Node] = {}
        self._cut_off: set[str] = set()
        self._changed = asyncio.Event()
        self._connections: set[asyncio.Task[None] | None] = set()  # asyncio itself may forget them

    async def run(self) -> None:
        lines = asyncio.StreamReader()
        await asyncio.get_running_loop().connect_read_pipe(
            lambda: asyncio.StreamReaderProtocol(lines), sys.stdin
        )
        while line := await lines.readline():
            verb, *words = line.decode().split()
            if verb == "node":
                await self._add(*words)
            elif verb == "cut":
                self._cut_off.add(words[0])
            else:
                self._cut_off.discard(words[0])
                self._changed.set()
                self._changed = asyncio.Event()
            print("done", flush=True)

    async def _add(
        self, name: str, address: str, relayed: str, folder: str, tcp: str, udp: str
    ) -> None:
        node = Node(
            name, address, relayed, folder, [int(port) for port in tcp.split(",")], int(udp)
        )
        loop = asyncio.get_running_loop()
        for port in node.tcp_ports:
            await asyncio.start_server(
                lambda reader, writer, port=port: self._connection(node, port, reader, writer),  # type: ignore[misc]
                relayed,
                port,
            )
        node.udp, _ = await loop.create_datagram_endpoint(
            lambda: Datagrams(self, node), (relayed, node.udp_port)
        )
        self._nodes[name] = node

    def is_cut(self, *names: str) -> bool:
        return not self._cut_off.isdisjoint(names)

    def datagram(self, target: Node, data: bytes, sender: tuple[str, int]) -> None:
        """Passed on from the sender's relayed address: who replies to it replies through us."""
        source = next((node for node in self._nodes.values() if node.address == sender[0]), None)
        if source is None or source.udp is None or self.is_cut(source.name, target.name):
            return
        source.udp.sendto(data, (target.address, target.udp_port))

    async def _connection(
        self,
        target: Node,
        port: int,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
    ) -> None:
        source = self._owner(*writer.get_extra_info("peername"))
        with contextlib.suppress(OSError), contextlib.closing(writer), self._kept():
            if source is None:  # it has ended already
                return
            await self._until_joined(source, target.name)
            far_reader, far_writer = await asyncio.open_connection(target.address, port)
            with contextlib.closing(far_writer):
                ways = (
                    self._pump(reader, far_writer, source, target.name),
                    self._pump(far_reader, writer, source, target.name),
                )
                await asyncio.gather(*ways)

    @contextlib.contextmanager
    def _kept(self) -> Iterator[None]:
        task = asyncio.current_task()
        self._connections.add(task)
        try:
            yield
        finally:
            self._connections.discard(task)

    async def _pump(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, one: str, other: str
    ) -> None:
        """What is sent while a node is cut off waits, as TCP would have it, until it is healed."""
        try:
            while data := await reader.read(CHUNK_BYTES):
                await self._until_joined(one, other)
                writer.write(data)
                await writer.drain()
            await self._until_joined(one, other)
            writer.write_eof()
        except OSError:
            await self._until_joined(one, other)
            writer.transport.abort()

    async def _until_joined(self, *names: str) -> None:
        while self.is_cut(*names):
            await self._changed.wait()

    def _owner(self, address: str, port: int) -> str | None:
        """The node whose connection this is; gossip over TCP leaves from 127.0.0.1."""
        for node in self._nodes.values():
            if node.address == address:
                return node.name
        link = f"socket:[{_inode(address, port)}]"
        for process in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                command = (process / "cmdline").read_text()
                for node in self._nodes.values():
                    if f"{node.folder}/" in command and _holds(process, link):
                        return node.name
        return None


class Datagrams(asyncio.DatagramProtocol):
    def __init__(self, relay: Relay, node: Node) -> None:
        self._relay, self._node = relay, node

    def datagram_received(self, data: bytes, addr: tuple[str, int]) -> None:
        self._relay.datagram(self._node, data, addr)


def _inode(address: str, port: int) -> str:
    """What Linux calls the socket at that end of a connection; empty when there is none."""
    octets = bytes(map(int, address.split(".")))
    local = f"{int.from_bytes(octets, sys.byteorder):08X}:{port:04X}"
    for line in Path("/proc/net/tcp").read_text().splitlines()[1:]:
        fields = line.split()
        if fields[1] == local:
            return fields[9]
    return ""


def _holds(process: Path, link: str) -> bool:
    return any(str(held.readlink()) == link for held in (process / "fd").iterdir())


if __name__ == "__main__":
    asyncio.run(Relay().run())
