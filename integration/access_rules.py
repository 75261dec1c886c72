"""A Consul that denies whatever no token allows, and tokens for it."""

import contextlib
import json
import uuid
from collections.abc import Iterator

from consul_matchmaker.testing.consul_binary import consul_version, find_consul
from consul_matchmaker.testing.consul_probe import Node, request
from consul_matchmaker.testing.local_consul import LocalCluster

MANAGEMENT = str(uuid.uuid4())
"""The token that may do everything."""

SHORT_LEASES = {"session_ttl_min": "2s"}
"""Configuration by which the servers grant them; 10 s are the default."""


@contextlib.contextmanager
def guarded_cluster(clients: int = 0, **rules: object) -> Iterator[LocalCluster]:
    """One server and so many client agents, as local processes; *rules* are more words of `acl`."""
    name = "initial_management" if consul_version(find_consul()) >= (1, 11) else "master"
    tokens = {name: MANAGEMENT, "agent": MANAGEMENT}
    acl = {"enabled": True, "default_policy": "deny", "tokens": tokens, **rules}
    with LocalCluster(1, clients, config={"acl": acl, **SHORT_LEASES}, token=MANAGEMENT) as cluster:
        yield cluster


def new_token(node: Node, rules: str) -> tuple[str, str]:
    """A token's accessor and secret."""
    name = f"matchmaker-{uuid.uuid4().hex[:8]}"
    body = json.dumps({"Name": name, "Rules": rules})
    put = request(node, "PUT", "/v1/acl/policy", body, token=MANAGEMENT)
    assert put[0] == 200, put
    body = json.dumps({"Policies": [{"Name": name}]})
    put = request(node, "PUT", "/v1/acl/token", body, token=MANAGEMENT)
    assert put[0] == 200, put
    made = json.loads(put[1])
    return made["AccessorID"], made["SecretID"]
