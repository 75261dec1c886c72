"""Fixtures that give a test a real Consul cluster, whole again after each test, and own names."""

import contextlib
import random
import re
import shlex
import signal
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from consul_matchmaker import Matchmaker, Settings
from consul_matchmaker.backends.http.api import ConsulApi
from consul_matchmaker.backends.kv.store import Kv
from consul_matchmaker.testing.consul_probe import Node
from integration.access_rules import guarded_cluster
from integration.cluster import (
    Cluster,
    DockerCluster,
    cluster_of_the_run,
    compose_command,
    free_ports,
    tell,
)

ROOT = Path(__file__).parent.parent


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("consul cluster")
    group.addoption(
        "--cluster",
        choices=("docker", "local", "auto"),
        default="auto",
        help="where the Consul cluster runs; auto: in Docker when an engine answers, else locally",
    )


def pytest_configure() -> None:
    # A shell starts background jobs with SIGINT ignored; programs that tests start inherit that.
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


# --- the cluster, in Docker by pytest-docker's fixtures ------------------------------------------


@pytest.fixture(scope="session")
def cluster_kind(pytestconfig: pytest.Config) -> str:
    """`docker` or `local`: where this run's cluster is."""
    kind = str(pytestconfig.getoption("--cluster"))
    if kind == "auto":
        return "docker" if compose_command() else "local"
    return kind


@pytest.fixture(scope="session")
def docker_compose_command(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The compose command at hand, with ports and a network nobody else uses."""
    command = compose_command()
    if command is None:
        pytest.fail("--cluster=docker needs a Docker engine that answers, and docker compose")
    names = [f"{node}_{kind}_PORT" for node in ("CONSUL", *_servers()) for kind in ("HTTP", "DNS")]
    values = dict(zip(names, map(str, free_ports(len(names))), strict=True))
    values["CONSUL_NETWORK"] = f"10.{random.randint(128, 254)}.{random.randint(0, 254)}"
    env_file = tmp_path_factory.mktemp("compose") / "ports.env"
    env_file.write_text("".join(f"{name}={value}\n" for name, value in values.items()))
    return f"{command} --env-file {shlex.quote(str(env_file))}"


def _servers() -> tuple[str, ...]:
    return ("SERVER1", "SERVER2", "SERVER3")


@pytest.fixture(scope="session")
def docker_compose_file() -> list[str]:
    return [
        str(ROOT / "docker-compose.yml"),
        str(ROOT / "integration" / "docker-compose.tests.yml"),
    ]


@pytest.fixture(scope="session")
def docker_compose_project_name() -> str:
    return f"consul-matchmaker-{uuid.uuid4().hex[:8]}"


@pytest.fixture(scope="session")
def docker_setup() -> list[str]:
    return ["up --detach"]


@pytest.fixture(scope="session")
def cluster(cluster_kind: str, request: pytest.FixtureRequest) -> Iterator[Cluster]:
    """The whole run's cluster: three servers and `agent1`, ready."""
    if cluster_kind == "docker":
        request.getfixturevalue("docker_services")  # not an argument: it would start Docker always
        docker_cluster = DockerCluster(request.getfixturevalue("docker_compose_project_name"))
        try:
            docker_cluster.wait_ready()
            yield docker_cluster
        finally:
            docker_cluster.close()
        return
    with cluster_of_the_run(request) as local_cluster:
        yield local_cluster


@pytest.fixture(scope="session")
def agent(cluster: Cluster) -> Node:
    """The client agent applications talk to: `.http` and `.dns` are its "host:port"."""
    return cluster.nodes["agent1"]


@pytest.fixture(scope="session")
def dns_only_agent(cluster: Cluster) -> Node:
    """A client agent whose HTTP port is closed."""
    return cluster.add_agent("dns-only", {"ports": {"http": -1}})


@pytest.fixture(autouse=True)
def mended(request: pytest.FixtureRequest) -> Iterator[None]:
    """After each test that did something to a node, the whole cluster is up and ready again."""
    yield
    if "cluster" in request.fixturenames:
        cluster: Cluster = request.getfixturevalue("cluster")
        if cluster.is_disturbed:
            cluster.mend()


@pytest.fixture(scope="module")
def guarded() -> Iterator[Node]:
    """One server that denies whatever no token allows."""
    with guarded_cluster() as guarded:
        yield guarded.nodes["server1"]


# --- names of a test's own -----------------------------------------------------------------------


@pytest.fixture
def topic(request: pytest.FixtureRequest) -> str:
    """A topic no other test uses; also a valid DNS label."""
    words = re.sub(r"[^a-z0-9]+", "-", request.node.name.lower()).strip("-")
    return f"{words[:40].strip('-')}-{uuid.uuid4().hex[:8]}"


@pytest.fixture
def prefix(cluster: Cluster, agent: Node, mended: None) -> Iterator[str]:
    """A root of KV keys no other test uses; emptied afterwards."""
    own_prefix = f"test-{uuid.uuid4().hex[:12]}"
    yield own_prefix
    if cluster.is_disturbed:
        cluster.mend()
    tell(agent, "DELETE", f"/v1/kv/{own_prefix}/?recurse")


# --- matchmakers ---------------------------------------------------------------------------------


@pytest.fixture
def url(agent: Node, prefix: str) -> str:
    """Of kv mode at the agent, with the shortest lease that Consul grants by default."""
    return f"consul+kv://{agent.http}/{prefix}?session_ttl_seconds=10"


@pytest.fixture
def short_ttl(cluster_kind: str) -> float:
    """The shortest lease that this run's servers grant, for tests of no particular one."""
    return 10.0 if cluster_kind == "docker" else 2.0


@pytest.fixture
def join(url: str) -> Iterator[Callable[..., Matchmaker]]:
    """Makes matchmakers, each with a lease of its own; `join("&setting=value")` adds to the URL."""
    with contextlib.ExitStack() as stack:
        yield lambda extra="": stack.enter_context(Matchmaker.from_url(url + extra))


@pytest.fixture
def make_kv(agent: Node, prefix: str) -> Iterator[Callable[..., Kv]]:
    """Make a Kv over the cluster's agent, or over other addresses."""
    made: list[Kv] = []

    def make(*addresses: str, **values: Any) -> Kv:
        values = {"mode": "kv", "prefix": prefix, "addresses": addresses or (agent.http,), **values}
        settings = Settings.from_mapping(values, {})
        made.append(Kv(ConsulApi(settings), settings))
        return made[-1]

    yield make
    for kv in made:
        kv.close()


@pytest.fixture
def kv(make_kv: Callable[..., Kv]) -> Kv:
    return make_kv()
