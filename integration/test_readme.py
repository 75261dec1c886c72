"""The README's snippets run as they stand, against a real Consul."""

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from consul_matchmaker.testing.consul_probe import Node
from integration.cluster import ask

README = (Path(__file__).parent.parent / "README.md").read_text()
PYTHON = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
CONSOLE = re.findall(r"^\$ consul-matchmaker (.*)$", README, re.MULTILINE)
WAIT_SECONDS = 30.0


def here(text: str, agent: Node, prefix: str) -> str:
    """*text* with the test's own agent and keys in place of the default ones."""
    with_http = text.replace("consul+kv://127.0.0.1:8500", f"consul+kv://{agent.http}/{prefix}")
    with_http = with_http.replace(
        "consul+service://127.0.0.1:8500", f"consul+service://{agent.http}"
    )
    return with_http.replace("127.0.0.1:8600", agent.dns)


def environment(agent: Node, prefix: str) -> dict[str, str]:
    clean = {k: v for k, v in os.environ.items() if not k.startswith("CONSUL_")}
    exported = re.search(r"^\$ export (CONSUL_MATCHMAKER_URL)=(.*)$", README, re.MULTILINE)
    assert exported is not None
    return {**clean, exported[1]: here(exported[2], agent, prefix)}


@pytest.mark.parametrize("snippet", PYTHON, ids=range(len(PYTHON)))
def test_a_python_snippet_runs(snippet: str, agent: Node, prefix: str) -> None:
    """Copied into a file and started, it ends without an error."""
    done = subprocess.run(
        [sys.executable, "-c", here(snippet, agent, prefix)],
        capture_output=True,
        text=True,
        timeout=WAIT_SECONDS,
        env=environment(agent, prefix),
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")


@pytest.fixture
def registered(agent: Node, prefix: str, tmp_path: Path) -> Iterator[None]:
    """The README's `register` line, running, with a ./scheduler that listens."""
    register = next(line for line in CONSOLE if line.startswith("register"))
    host, port = re.findall(r"(\S+):(\d+)", register)[0]
    program = tmp_path / "scheduler"
    program.write_text("#!/bin/sh\nexec sleep 60\n")
    program.chmod(0o755)
    # The README's address is not this machine's, so nothing can listen there.
    line = register.replace(f"{host}:{port} --", f"{host}:{port} --at-once --", 1)
    process = subprocess.Popen(
        [sys.executable, "-m", "consul_matchmaker", *line.split()],
        cwd=tmp_path,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(agent, prefix),
    )
    try:
        assert process.stderr is not None
        assert "registered" in process.stderr.readline()
        yield
    finally:
        process.terminate()
        process.communicate(timeout=WAIT_SECONDS)
        assert ask(agent, f"/v1/kv/{prefix}/scheduler/?keys") is None


@pytest.mark.usefixtures("registered")
def test_the_command_lines_run(agent: Node, prefix: str) -> None:
    """Each exits 0, and `hosts` prints what the README prints below it."""
    printed = re.search(r"^\$ consul-matchmaker hosts .*\n(.*\n)", README, re.MULTILINE)
    assert printed is not None
    for line in CONSOLE:
        if line.startswith(("register", "watch")):
            continue  # they do not end: the one runs, the other is test_cli's
        done = subprocess.run(
            [sys.executable, "-m", "consul_matchmaker", *line.split()],
            capture_output=True,
            text=True,
            timeout=WAIT_SECONDS,
            env=environment(agent, prefix),
            check=False,
        )
        assert (done.returncode, done.stderr) == (0, ""), line
        if line.startswith("hosts"):
            assert done.stdout == printed[1]
