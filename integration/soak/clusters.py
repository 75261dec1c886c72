"""A cluster for one soak, of local processes or in Docker, beside which others may run."""

from __future__ import annotations

import contextlib
import os
import random
import shlex
import subprocess
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path

from consul_matchmaker.testing.local_consul import ClusterError
from integration.cluster import (
    Cluster,
    DockerCluster,
    LocalTestCluster,
    compose_command,
    free_ports,
)

from .schedule import AGENTS

ROOT = Path(__file__).parent.parent.parent
NODES = ("CONSUL", "SERVER1", "SERVER2", "SERVER3")
COMPOSE_SECONDS = 300.0


@contextlib.contextmanager
def started(kind: str) -> Iterator[Cluster]:
    """Three servers and every agent of the schedule, ready; removed afterwards."""
    if kind == "local":
        local = LocalTestCluster(clients=len(AGENTS))
        with local:
            yield local
    else:
        with _composed() as project:
            docker = DockerCluster(project)
            try:
                docker.wait_ready()
                for name in AGENTS:
                    if name not in docker.nodes:
                        docker.add_agent(name)
                yield docker
            finally:
                docker.close()


@contextlib.contextmanager
def _composed() -> Iterator[str]:
    """A compose project with ports and a network nobody else uses."""
    command = compose_command()
    if command is None:
        raise ClusterError("--cluster docker needs a Docker engine that answers, and compose")
    names = [f"{node}_{kind}_PORT" for node in NODES for kind in ("HTTP", "DNS")]
    values = dict(zip(names, map(str, free_ports(len(names))), strict=True))
    values["CONSUL_NETWORK"] = f"10.{random.randint(128, 254)}.{random.randint(0, 254)}"
    project = f"consul-matchmaker-soak-{uuid.uuid4().hex[:8]}"
    files = (ROOT / "docker-compose.yml", ROOT / "integration" / "docker-compose.tests.yml")
    with tempfile.TemporaryDirectory(prefix="consul-matchmaker-soak-") as folder:
        env_file = Path(folder) / "ports.env"
        env_file.write_text("".join(f"{name}={value}\n" for name, value in values.items()))
        compose = [*shlex.split(command), "--env-file", str(env_file), "-p", project]
        for file in files:
            compose += ["-f", str(file)]

        def run(*words: str) -> None:
            subprocess.run(
                [*compose, *words], check=True, timeout=COMPOSE_SECONDS, env=os.environ | values
            )

        try:
            run("up", "--detach")
            yield project
        finally:
            run("down", "--volumes", "--timeout", "5")
