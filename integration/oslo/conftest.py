"""Fixtures of the oslo.messaging tests; where it is not installed they are not collected.

They have a tox environment of their own, ``oslo``: its pins are nobody else's, and a run there
that finds no test fails.
"""

import contextlib
import importlib.util
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from consul_matchmaker.demo.consul_probe import Node
from integration.cluster import free_ports
from integration.oslo.rpc_process import RpcProcess

if importlib.util.find_spec("oslo_messaging") is None:
    collect_ignore_glob = ["test_*.py"]

# What a fair comparison needs: 1 s between looks for changed hosts, instead of 180 s by default,
# and for Redis the expiry that comes nearest to a lease of 10 s, instead of 300 s.
QUICK = {"zmq_target_update": 1, "zmq_target_expire": 20}


class Redis:
    """A Redis server of the machine's own program, on a free port."""

    def __init__(self, folder: Path) -> None:
        program = shutil.which("redis-server")
        if program is None:
            pytest.fail("these tests need redis-server: install it (apt-get install redis-server)")
        self.program, self.folder = program, folder
        (self.port,) = free_ports(1)
        self.start()

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    def start(self) -> None:
        command = [self.program, "--port", str(self.port), "--bind", "127.0.0.1", "--save", ""]
        self._process = subprocess.Popen(
            [*command, "--dir", str(self.folder)], stdout=subprocess.DEVNULL
        )

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()


@pytest.fixture
def redis(tmp_path: Path) -> Iterator[Redis]:
    server = Redis(tmp_path)
    yield server
    server.kill()


@pytest.fixture
def url(agent: Node, prefix: str) -> str:
    """The transport URL that operators write."""
    return f"zmq+consul://{agent.http}/{prefix}?mode=kv"


@pytest.fixture(params=["threading", "eventlet"])
def executor(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., RpcProcess]]:
    """Starts processes, which are killed after the test; their log is in tmp_path/log."""
    with contextlib.ExitStack() as stack:
        log = stack.enter_context((tmp_path / "log").open("w"))

        def start_one(url: str, executor: str, **options: Any) -> RpcProcess:
            return stack.enter_context(RpcProcess(url, executor, {**QUICK, **options}, log))

        yield start_one


@pytest.fixture
def proxy(tmp_path: Path) -> Iterator[Callable[..., None]]:
    """Starts upstream's proxy by our console script, if the options need one."""
    with contextlib.ExitStack() as stack:

        def start_one(url: str, options: dict[str, bool]) -> None:
            if not options.keys() & {"use_router_proxy", "use_pub_sub"}:
                return
            path = tmp_path / "proxy.conf"
            lines = [f"{name} = {value}" for name, value in {**QUICK, **options}.items()]
            lines += ["rpc_zmq_host = 127.0.0.1"]
            path.write_text("\n".join(["[oslo_messaging_zmq]", *lines, ""]))
            program = Path(sys.executable).parent / "consul-matchmaker-zmq-proxy"
            words = ["--config-file", str(path), "--host", "127.0.0.1", "--url", url]
            log = stack.enter_context((tmp_path / "proxy.log").open("w"))
            process = subprocess.Popen([str(program), *words], stderr=log)
            stack.callback(process.wait)
            stack.callback(process.kill)

        yield start_one
