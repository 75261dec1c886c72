"""The programs of docs/callers.md, and those of the README that call, run as they stand there."""

from __future__ import annotations

import importlib.util
import os
import re
import socket
import subprocess
import sys
import uuid
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from consul_matchmaker import Matchmaker
from consul_matchmaker.testing.consul_probe import Node
from integration.callers.echo_process import EchoProcess

ROOT = Path(__file__).parent.parent.parent
PAGE = (ROOT / "docs" / "callers.md").read_text()
README = (ROOT / "README.md").read_text()
SECTION = re.compile(r"^## (.+?)\n(.*?)(?=^## |\Z)", re.MULTILINE | re.DOTALL)
PYTHON = re.compile(r"```python\n(.*?)```", re.DOTALL)
SECTIONS = {name: PYTHON.findall(text) for name, text in SECTION.findall(PAGE)}
(SERVICES,) = SECTIONS.pop("By hand: the hosts")
KINDS = {
    "httpx": ("httpx", "http"),
    "aiohttp": ("aiohttp", "http"),
    "requests": ("requests", "http"),
    "gRPC": ("grpc", "grpc"),
    "ZeroMQ": ("zmq", "zmq"),
}
"""By section: what must be installed, and which server answers."""
ASKED = 200
KILLED_AFTER = 50
END_SECONDS = 60.0


def programs() -> Iterator[tuple[str, str, str]]:
    """Those of the sections of clients that are installed: a name, the program, its server."""
    for section, (package, kind) in KINDS.items():
        if importlib.util.find_spec(package) is not None:
            by_hand, ours = SECTIONS[section]
            yield f"{section} by hand", by_hand, kind
            yield f"{section} with the library", ours, kind


PROGRAMS = {name: (program, kind) for name, program, kind in programs()}
# In the README `py` marks those that need a service or a client; test_readme runs the rest.
OTHERS = {
    f"{section} {number}": program
    for section, found in {
        **SECTIONS,
        "README": re.findall(r"```py\n(.*?)```", README, re.DOTALL),
    }.items()
    if section not in KINDS
    for number, program in enumerate(found)
    if "import httpx" not in program or importlib.util.find_spec("httpx") is not None
}


@pytest.fixture
def topic() -> str:
    return f"web-{uuid.uuid4().hex[:8]}"


@pytest.fixture
def folder(tmp_path: Path, agent: Node, topic: str) -> Path:
    """Where programs find `services.py`."""
    (tmp_path / "services.py").write_text(here(SERVICES, agent, topic))
    return tmp_path


def here(program: str, agent: Node, topic: str) -> str:
    """*program* with this test's agent, and its topic in place of ``web``."""
    address, _, port = agent.http.rpartition(":")
    program = program.replace("127.0.0.1:8500", agent.http)
    program = program.replace('"127.0.0.1", 8500', f'"{address}", {port}')
    return program.replace('"web"', f'"{topic}"').replace("web.service.", f"{topic}.service.")


def started(program: str, folder: Path, stdout: Any = subprocess.PIPE) -> subprocess.Popen[str]:
    clean = {name: value for name, value in os.environ.items() if not name.startswith("CONSUL_")}
    return subprocess.Popen(
        [sys.executable, "-u", "-c", program],
        cwd=folder,
        env=clean,
        stdout=stdout,
        stderr=subprocess.PIPE,
        text=True,
    )


def serve(stack: ExitStack, kind: str, agent: Node, topic: str) -> dict[str, EchoProcess]:
    """Three servers in processes, registered, by host."""
    url = f"consul+service://{agent.http}"
    processes = [stack.enter_context(EchoProcess(url)) for _ in range(3)]
    return {process.serve(kind, topic): process for process in processes}


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_program_is_answered_while_a_host_is_killed(
    name: str, folder: Path, agent: Node, topic: str
) -> None:
    """All its questions are answered, by all hosts, and in the end by those that live."""
    program, kind = PROGRAMS[name]
    with ExitStack() as stack:
        servers = serve(stack, kind, agent, topic)
        # What is printed waits to be read, a few lines of it: it goes on once the host is killed.
        ours, theirs = map(stack.enter_context, socket.socketpair())
        theirs.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)
        process = started(here(program, agent, topic), folder, theirs)
        stack.callback(process.kill)
        theirs.close()
        ours.settimeout(END_SECONDS)
        printed = stack.enter_context(ours.makefile())
        answers = [printed.readline().strip() for _ in range(KILLED_AFTER)]
        killed, *left = servers
        servers[killed].kill()
        answers += printed.read().splitlines()
        _, errors = process.communicate(timeout=END_SECONDS)
    assert (process.returncode, errors) == (0, "")
    assert [answer for answer in answers if answer not in servers] == []
    assert len(answers) == ASKED
    assert set(answers[:KILLED_AFTER]) == set(servers)
    assert set(answers[-KILLED_AFTER:]) == set(left)


@pytest.mark.parametrize("name", OTHERS)
def test_a_snippet_runs(name: str, folder: Path, agent: Node, topic: str) -> None:
    """Copied into a file and started, it ends without an error."""
    with ExitStack() as stack:
        serve(stack, "http", agent, topic)
        url = f"consul+service://{agent.http}"
        with Matchmaker.from_url(url) as matchmaker:
            assert len(matchmaker.hosts(topic)) == 3
        process = started(here(OTHERS[name], agent, topic), folder)
        stack.callback(process.kill)
        printed, errors = process.communicate(timeout=END_SECONDS)
    assert (process.returncode, errors) == (0, "")
    assert printed


def lines(program: str) -> int:
    """Without blank ones, and the one that names the file."""
    return len([line for line in program.splitlines() if line.strip() and line[0] != "#"])


@pytest.mark.parametrize("section", KINDS)
def test_the_table_counts_the_lines(section: str) -> None:
    """A row for each client says how many lines its programs have."""
    by_hand, ours = SECTIONS[section]
    row = re.search(rf"^\| {section} \| (\d+) \+ (\d+) \| (\d+) \|", PAGE, re.MULTILINE)
    assert row is not None
    counted = lines(SERVICES), lines(by_hand), lines(ours)
    assert tuple(map(int, row.groups())) == counted
