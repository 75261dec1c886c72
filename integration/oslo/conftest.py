"""Fixtures of the oslo.messaging tests; where it is not installed they are not collected.

They have a tox environment of their own, ``oslo``: its pins are nobody else's, and a run there
that finds no test fails.
"""

import contextlib
import importlib.util
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from consul_matchmaker.testing.consul_probe import Node
from integration.cluster import free_ports
from integration.oslo.redis_server import Redis
from integration.oslo.rpc_process import RpcProcess

if importlib.util.find_spec("oslo_messaging") is None:
    collect_ignore_glob = ["test_*.py"]

# What a fair comparison needs: 1 s between looks for changed hosts, instead of 180 s by default,
# and for Redis the expiry that comes nearest to a lease of 10 s, instead of 300 s.
QUICK = {"zmq_target_update": 1, "zmq_target_expire": 20}


@pytest.fixture
def redis(tmp_path: Path) -> Iterator[Redis]:
    with Redis(tmp_path, *free_ports(1)) as server:
        yield server


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

        def start_one(
            url: str, executor: str, environment: dict[str, str] | None = None, **options: Any
        ) -> RpcProcess:
            process = RpcProcess(url, executor, {**QUICK, **options}, log, environment)
            return stack.enter_context(process)

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
