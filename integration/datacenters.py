"""Two Consul datacenters on this machine, joined over the WAN: what one cluster cannot show."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

from consul_matchmaker.testing.consul_probe import Node, NotReady, read_json, wait_until
from consul_matchmaker.testing.local_consul import LocalCluster
from integration import catalog
from integration.cluster import free_ports

JOINED_SECONDS = 30.0


@contextlib.contextmanager
def two_datacenters(servers: int = 1) -> Iterator[tuple[LocalCluster, LocalCluster]]:
    """`dc1` of so many servers and `agent1`, and `dc2` of `server1` alone, once they are joined."""
    *ports, far_port = free_ports(servers + 1)
    near_config = {f"server{number}": _wan(port) for number, port in enumerate(ports, start=1)}
    with contextlib.ExitStack() as stack:
        near = stack.enter_context(LocalCluster(servers, clients=1, node_config=near_config))
        address = near.nodes["server1"].rpc.rpartition(":")[0]
        far_config = {
            "datacenter": "dc2",
            "retry_join_wan": [f"{address}:{ports[0]}"],
            "retry_interval_wan": "1s",
            **_wan(far_port),
        }
        far = stack.enter_context(LocalCluster(servers=1, clients=0, config=far_config))
        wait_until(lambda: _check_joined(near.nodes["agent1"]), JOINED_SECONDS)
        yield near, far


def _wan(port: int) -> dict[str, Any]:
    return {"ports": {"serf_wan": port}}


def _check_joined(agent: Node) -> None:
    known = read_json(agent, "/v1/catalog/datacenters")
    if known != ["dc1", "dc2"]:
        raise NotReady(f"{agent.name} knows the datacenters {known}")
    for service in read_json(agent, "/v1/catalog/services?dc=dc2"):
        if service == "consul":
            return
    raise NotReady("dc2 does not answer yet")


def serve(node: Node, topics: Iterable[str], hosts: int = 3) -> None:
    """So many hosts serve each of *topics* in *node*'s datacenter."""
    for topic in topics:
        catalog.register(node, catalog.instances(topic, hosts))
