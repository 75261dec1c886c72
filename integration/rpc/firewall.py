"""Drop what a process is sent and sends over TCP, by rules of the firewall (Linux, root)."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

LISTEN = "0A"  # include/net/tcp_states.h


def is_usable() -> bool:
    """Whether this process may set rules."""
    program = shutil.which("iptables")
    if program is None or os.geteuid() != 0:
        return False
    return subprocess.run([program, "-S"], capture_output=True, check=False).returncode == 0


@dataclass(frozen=True)
class Socket:
    """Our end of a connection, or what is listened at."""

    address: str
    port: int
    is_listening: bool


def sockets(pid: int) -> list[Socket]:
    """The TCP sockets over IPv4 of a process."""
    links = set()
    for held in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(OSError):  # closed meanwhile
            links.add(str(held.readlink()))
    found = []
    for line in Path(f"/proc/{pid}/net/tcp").read_text().splitlines()[1:]:
        fields = line.split()
        if f"socket:[{fields[9]}]" in links:
            address, _, port = fields[1].partition(":")
            octets = int(address, 16).to_bytes(4, sys.byteorder)
            is_listening = fields[3] == LISTEN
            found.append(Socket(".".join(map(str, octets)), int(port, 16), is_listening))
    return found


@contextlib.contextmanager
def dropped(some: list[Socket]) -> Iterator[None]:
    """Whatever is sent to *some* or from there is lost, without a word, until the end."""
    rules = []
    for each in some:
        near = [] if each.address == "0.0.0.0" else ["-d", each.address]
        far = [] if each.address == "0.0.0.0" else ["-s", each.address]
        rules.append(["-p", "tcp", *near, "--dport", str(each.port), "-j", "DROP"])
        rules.append(["-p", "tcp", *far, "--sport", str(each.port), "-j", "DROP"])
    with contextlib.ExitStack() as stack:
        for rule in rules:
            _iptables("-I", rule)
            stack.callback(_iptables, "-D", rule)
        yield


def _iptables(what: str, rule: list[str]) -> None:
    subprocess.run(["iptables", "--wait", "5", what, "INPUT", *rule], check=True)
