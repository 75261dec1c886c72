"""Fill Consul's catalog with as many service instances as a test or a benchmark needs, quickly."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import Any

from consul_matchmaker.testing.consul_probe import Node
from integration.cluster import tell

OPERATIONS = 64  # the most a transaction may hold before Consul 1.14 (fact B12)
METADATA = {"consul-network-segment": ""}  # what every real agent has; it makes a TXT record


def instances(
    service: str,
    count: int,
    *,
    by_node: bool = False,
    tags: Callable[[int], Sequence[str]] = lambda number: (),
) -> list[tuple[str, str, dict[str, Any]]]:
    """*count* instances as node name, node address and service.

    Each at an address of its own: the service's, many on one node, or with *by_node* its node's.
    """
    made = []
    for number in range(count):
        address = f"10.{64 + (number >> 16)}.{number >> 8 & 255}.{number & 255}"
        details: dict[str, Any] = {
            "ID": f"{service}-{number}",
            "Service": service,
            "Port": 9000 + number,
            "Tags": list(tags(number)),
        }
        if by_node:
            made.append((f"{service}-node{number}", address, details))
        else:
            details["Address"] = address
            made.append((f"{service}-node{number % 5}", "10.9.9.9", details))
    return made


def register(
    node: Node,
    made: Sequence[tuple[str, str, dict[str, Any]]],
    *,
    metadata: dict[str, str] | None = None,
) -> None:
    """Write *made* into the catalog by way of *node*; *metadata* is every node's."""
    operations: list[dict[str, Any]] = []
    known: set[str] = set()
    for name, address, details in made:
        if name not in known:
            known.add(name)
            properties = {"Node": name, "Address": address, "Meta": metadata or {}}
            operations.append({"Node": {"Verb": "set", "Node": properties}})
        operations.append({"Service": {"Verb": "set", "Node": name, "Service": details}})
    _transact(node, operations)


def unregister(node: Node, made: Sequence[tuple[str, str, dict[str, Any]]]) -> None:
    """Take *made* out of the catalog again, with its nodes."""
    _transact(
        node,
        [
            {"Node": {"Verb": "delete", "Node": {"Node": name}}}
            for name in dict.fromkeys(name for name, _, _ in made)
        ],
    )


def _transact(node: Node, operations: list[dict[str, Any]]) -> None:
    todo = iter(operations)
    for batch in _batches(todo):
        tell(node, "PUT", "/v1/txn", json.dumps(batch))


def _batches(todo: Iterator[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    while batch := list(islice(todo, OPERATIONS)):
        yield batch
