"""Fixtures of the tests of clients, such as httpx; each is collected where its client is installed.

They have tox environments of their own, ``callers`` and ``callers-oldest``.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator

import pytest

from consul_matchmaker.testing.consul_binary import ConsulNotFound
from consul_matchmaker.testing.consul_probe import Node
from integration.access_rules import SHORT_LEASES
from integration.cluster import Cluster, LocalTestCluster

CLIENTS = ("aiohttp", "grpc", "httpx", "requests", "zmq", "opentelemetry")
collect_ignore_glob = [
    f"test_{name}*.py" for name in CLIENTS if importlib.util.find_spec(name) is None
]


@pytest.fixture(scope="session")
def cluster(request: pytest.FixtureRequest) -> Iterator[Cluster]:
    """One server and `agent1`: what several servers do is tested elsewhere."""
    try:
        made = LocalTestCluster(servers=1, config=SHORT_LEASES)
        made.__enter__()
    except ConsulNotFound as error:
        pytest.fail(str(error))
    yield made
    made.close(keep_logs=request.session.testsfailed > 0)


@pytest.fixture(scope="session")
def agent(cluster: Cluster) -> Node:
    """Of that cluster; the one beside other tests is remembered for the run."""
    return cluster.nodes["agent1"]
