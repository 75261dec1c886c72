"""Fixtures of the tests of clients, such as httpx; collected where all of them are installed.

They have tox environments of their own, ``callers`` and ``callers-oldest``.
"""

from __future__ import annotations

import importlib.util
import socket
from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest

from consul_matchmaker.model import Host
from consul_matchmaker.testing.consul_probe import Node
from integration.callers.service import Service
from integration.cluster import Cluster, cluster_of_the_run

CLIENTS = ("aiohttp", "grpc", "httpx", "requests", "zmq", "opentelemetry")
if any(importlib.util.find_spec(name) is None for name in CLIENTS):
    collect_ignore_glob = ["test_*.py"]


@pytest.fixture(scope="session")
def cluster(request: pytest.FixtureRequest) -> Iterator[Cluster]:
    """One server and `agent1`: what several servers do is tested elsewhere."""
    with cluster_of_the_run(request, servers=1) as made:
        yield made


@pytest.fixture(scope="session")
def agent(cluster: Cluster) -> Node:
    """Of that cluster; the one beside other tests is remembered for the run."""
    return cluster.nodes["agent1"]


@pytest.fixture
def service() -> Iterator[Service]:
    with Service() as made:
        yield made


@pytest.fixture
def refusing() -> Iterator[Callable[[], Host]]:
    """Makes hosts that refuse every connection: nobody listens, and nobody else gets the port."""
    with ExitStack() as stack:

        def make() -> Host:
            taken = stack.enter_context(socket.socket())
            taken.bind(("127.0.0.1", 0))
            return Host("127.0.0.1", taken.getsockname()[1])

        yield make
