"""An adapter whose package is not installed says what to install."""

from __future__ import annotations

import subprocess
import sys

import pytest

pytestmark = pytest.mark.system

WITHOUT = """
import sys
for name in (
    "aiohttp", "grpc", "httpx", "opentelemetry", "oslo_config", "oslo_messaging",
    "prometheus_client", "requests", "zmq",
):
    sys.modules[name] = None  # as if it were not installed
"""


def run(code: str) -> tuple[int, str]:
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT + code], capture_output=True, text=True, check=False
    )
    return done.returncode, done.stderr


@pytest.mark.parametrize(
    ("module", "extra"),
    [
        ("oslo_zmq", "oslo"),
        ("oslo.config", "oslo"),
        ("oslo.zmq.driver", "oslo"),
        ("prometheus", "metrics"),
        ("aiohttp", "aiohttp"),
        ("grpc", "grpc"),
        ("httpx", "httpx"),
        ("opentelemetry", "opentelemetry"),
        ("requests", "requests"),
        ("zmq", "zmq"),
    ],
)
def test_an_adapter_names_the_extra_that_it_needs(module: str, extra: str) -> None:
    """Its ImportError ends with the command that cures it."""
    code, said = run(f"import consul_matchmaker.adapters.{module}")
    assert code == 1
    assert f"`pip install 'consul-matchmaker[{extra}]'`" in said.splitlines()[-1]


def test_the_proxy_command_names_the_extra_in_one_line() -> None:
    """Without a traceback."""
    program = "from consul_matchmaker.adapters.oslo.entry_point import proxy"
    code, said = run(f"{program}; sys.exit(proxy())")
    assert (code, said.count("\n")) == (1, 1)
    assert "consul-matchmaker[oslo]" in said
