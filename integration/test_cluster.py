"""The harness itself: what a test does to a node really happens, and is undone afterwards."""

import socket
import uuid

import pytest

from consul_matchmaker.testing.consul_probe import (
    Node,
    NotReady,
    check_dns,
    read_json,
    request,
    wait_until,
)
from integration.cluster import Cluster

pytestmark = pytest.mark.docker

SERF_LEFT = 3


def write(node: Node, prefix: str) -> None:
    status, text = request(node, "PUT", f"/v1/kv/{prefix}/{uuid.uuid4().hex}", "value")
    if (status, text.strip()) != (200, "true"):
        raise NotReady(f"{status} {text}")


def test_three_servers_and_an_agent(cluster: Cluster, agent: Node, prefix: str) -> None:
    """The cluster has three voting servers and a client agent, which writes and answers DNS."""
    assert set(cluster.nodes) >= {"server1", "server2", "server3", "agent1"}
    raft = read_json(agent, "/v1/operator/raft/configuration")
    voters = {server["Node"] for server in raft["Servers"] if server["Voter"]}
    assert voters == {"server1", "server2", "server3"}
    assert not read_json(agent, "/v1/agent/self")["Config"]["Server"]
    write(agent, prefix)
    check_dns(agent)


def test_killing_the_leader_elects_another(cluster: Cluster, agent: Node, prefix: str) -> None:
    """The two servers left elect a leader, and writes through the agent go on."""
    old = cluster.leader()
    cluster.kill(old)
    assert old not in cluster.running
    assert cluster.leader() != old
    wait_until(lambda: write(agent, prefix), 10)


def test_a_killed_server_comes_back_with_its_vote(cluster: Cluster, agent: Node) -> None:
    """A server that was killed and started again votes at once, under its old identity."""
    before = read_json(agent, "/v1/operator/raft/configuration")["Servers"]
    follower = next(n for n in ("server1", "server2", "server3") if n != cluster.leader())
    cluster.restart(follower, graceful=False)
    cluster.wait_ready()
    after = read_json(agent, "/v1/operator/raft/configuration")["Servers"]
    assert {(s["ID"], s["Voter"]) for s in after} == {(s["ID"], s["Voter"]) for s in before}


def test_a_paused_agent_accepts_and_says_nothing(cluster: Cluster, agent: Node) -> None:
    """A paused node's port still takes connections, but no answer comes, until it is resumed."""
    cluster.pause("agent1")
    assert "agent1" not in cluster.running
    host, _, port = agent.http.partition(":")
    socket.create_connection((host, int(port)), timeout=2).close()
    with pytest.raises(NotReady, match="does not answer"):
        request(agent, "GET", "/v1/status/leader")
    cluster.resume("agent1")
    assert read_json(agent, "/v1/status/leader")


def test_a_leader_cut_off_is_replaced(cluster: Cluster, agent: Node, prefix: str) -> None:
    """The majority goes on under another leader; healed, the old one follows it."""
    old = cluster.leader()
    address = cluster.nodes[old].rpc
    cluster.partition(old)

    def is_replaced() -> None:
        if read_json(agent, "/v1/status/leader") in ("", address):
            raise NotReady("the old leader is still followed")
        write(agent, prefix)

    wait_until(is_replaced, 30)
    cluster.heal(old)
    cluster.wait_ready()
    new_leader = cluster.nodes[cluster.leader()].rpc
    assert read_json(cluster.nodes[old], "/v1/status/leader") == new_leader
    assert cluster.nodes[old].rpc == address


def test_a_node_cut_off_is_seen_as_dead(cluster: Cluster, agent: Node) -> None:
    """A partition also stops gossip: the others declare the node dead, and alive when healed."""
    follower = next(n for n in ("server1", "server2", "server3") if n != cluster.leader())

    def is_critical() -> None:
        checks = read_json(agent, f"/v1/health/node/{follower}")
        if not any(c["CheckID"] == "serfHealth" and c["Status"] == "critical" for c in checks):
            raise NotReady(f"{follower} still passes its health check")

    cluster.partition(follower)
    wait_until(is_critical, 30)
    cluster.heal(follower)
    cluster.wait_ready()


def test_mend_brings_everything_back(cluster: Cluster) -> None:
    """Killed, paused and cut off at once: `mend` leaves a cluster that is ready and whole."""
    cluster.kill("server1")
    cluster.partition("server2")
    cluster.pause("server3")
    assert cluster.is_disturbed
    cluster.mend()
    assert not cluster.is_disturbed
    assert cluster.running == set(cluster.nodes)


def test_a_stopped_agent_leaves(cluster: Cluster) -> None:
    """Stopped gracefully, a client agent says goodbye: no server takes it for alive or failed."""
    server = cluster.nodes["server1"]
    cluster.stop("agent1")

    def has_left() -> None:
        members = {m["Name"]: m["Status"] for m in read_json(server, "/v1/agent/members")}
        if members.get("agent1", SERF_LEFT) != SERF_LEFT:
            raise NotReady(f"agent1 is {members['agent1']} for gossip")
        # Not the catalog: until it has ended, the leaving agent may put itself back in there.

    wait_until(has_left, 15)
    cluster.start("agent1")
    cluster.wait_ready()


def test_an_agent_without_http_answers_dns(dns_only_agent: Node) -> None:
    """With its HTTP port closed an agent still answers DNS."""
    with pytest.raises(NotReady, match="does not answer HTTP"):
        request(dns_only_agent, "GET", "/v1/status/leader")
    check_dns(dns_only_agent)
