"""Lookups over a real Consul's DNS: complete at every size, honest beyond, right after restarts."""

from __future__ import annotations

import contextlib
import json
import select
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest

from consul_matchmaker import Host, Settings
from consul_matchmaker.backends.dns.resolver import DnsSrv
from consul_matchmaker.backends.service_names import service_of
from consul_matchmaker.testing.consul_probe import Node, request
from integration.catalog import METADATA, instances, register, unregister
from integration.cluster import Cluster, ask, tell
from integration.readers import Load, Operators, matchmaker
from integration.waiting import until

# What restarts and transactions of thousands may take on a busy machine with two cores.
TIMEOUT_SECONDS = 5.0
LIES_SECONDS = 8.0  # a restarted server denies live services for 4.0-4.9 s (fact A9)

Made = Sequence[tuple[str, str, dict[str, Any]]]


@pytest.fixture
def resolver(agent: Node) -> Iterator[Callable[..., DnsSrv]]:
    """Makes resolvers that ask the client agent, or the node that is given."""
    made: list[DnsSrv] = []

    def make(node: Node = agent, **settings: Any) -> DnsSrv:
        settings.setdefault("request_timeout_seconds", TIMEOUT_SECONDS)
        settings.setdefault("addresses", (Host.parse(node.dns),))
        made.append(DnsSrv(Settings(mode="catalog", **settings)))
        return made[-1]

    yield make
    for each in made:
        each.close()


@pytest.fixture
def catalog(cluster: Cluster, agent: Node) -> Iterator[Callable[..., Made]]:
    """Registers instances, waits until every server knows them, takes them out afterwards."""
    everything: list[Made] = []

    def add(made: Made, metadata: dict[str, str] | None = None) -> Made:
        everything.append(made)
        register(agent, made, metadata=metadata)
        service = made[0][2]["Service"]
        for node in cluster.nodes.values():
            if node.is_server:
                path = f"/v1/catalog/service/{service}?stale"
                until(lambda node=node, path=path: len(ask(node, path)) == len(made), 10, path)
        return made

    yield add
    for made in everything:
        unregister(agent, made)


def hosts_of(made: Made) -> tuple[Host, ...]:
    return tuple(
        sorted(
            Host(details.get("Address") or address, details["Port"]) for _, address, details in made
        )
    )


# -- all of them


@pytest.mark.parametrize("count", [3, 50, 200, 1_000, 2_000])
@pytest.mark.parametrize("by_node", [False, True], ids=["addresses", "nodes"])
@pytest.mark.parametrize("metadata", [{}, METADATA], ids=["plain", "metadata"])
def test_all_hosts_by_dns_alone(
    resolver: Callable[..., DnsSrv],
    catalog: Callable[..., Made],
    topic: str,
    count: int,
    by_node: bool,
    metadata: dict[str, str],
) -> None:
    """Consul cuts what does not fit in silence; every host is found all the same, and it is said
    that these are all."""
    expected = hosts_of(catalog(instances(topic, count, by_node=by_node), metadata))
    snapshot = resolver().lookup(topic)
    assert snapshot.hosts == expected
    assert snapshot.is_complete
    if by_node:
        assert {instance.server for instance in snapshot.instances} == {
            f"{topic}-node{number}" for number in range(count)
        }


@pytest.mark.parametrize("count", [*range(6, 22), 120])
def test_all_hosts_around_the_size_of_a_packet(
    resolver: Callable[..., DnsSrv], catalog: Callable[..., Made], topic: str, count: int
) -> None:
    """There Consul drops one host and all metadata and comes out far below the limit (10 hosts: 9
    in 666 of 1,232 bytes); the first lookup is by UDP, and the next ones know better."""
    expected = hosts_of(
        catalog(instances(topic, count, by_node=True), {**METADATA, "consul-version": "1.8.7"})
    )
    dns_srv = resolver()
    for _ in range(3):
        snapshot = dns_srv.lookup(topic)
        assert snapshot.hosts == expected
        assert snapshot.is_complete


def test_5000_hosts_by_shards_and_honestly_without(
    resolver: Callable[..., DnsSrv], catalog: Callable[..., Made], topic: str
) -> None:
    """Ten tags of some 500 each bring every host; without them time may run out, and it is said."""
    made = instances(topic, 5_000, tags=lambda number: [f"s{number % 10:02d}"])
    expected = hosts_of(catalog(made, METADATA))
    sharded, plain = resolver(shards=10), resolver(request_timeout_seconds=2.0)
    snapshot = sharded.lookup(topic)
    assert snapshot.hosts == expected
    assert snapshot.is_complete

    started = time.monotonic()
    snapshot = plain.lookup(topic)
    assert time.monotonic() - started < plain.longest_lookup_seconds + 1.0
    assert set(snapshot.hosts) <= set(expected)
    assert len(snapshot) >= 900
    assert snapshot.hosts == expected or not snapshot.is_complete

    started = time.monotonic()
    some = plain.lookup(topic, timeout_seconds=1.0)
    assert time.monotonic() - started < 2.0
    assert len(some) >= 900
    assert not some.is_complete


# -- the right ones


@pytest.fixture
def define(agent: Node, topic: str) -> Iterator[Callable[..., str]]:
    """Defines an instance of the test's topic on the client agent, as operators do; the result is
    the id of its check, if it has one."""
    ids: list[str] = []

    def add(address: str, port: int, *, check: bool = False, tags: Sequence[str] = ()) -> str:
        definition: dict[str, Any] = {
            "ID": f"{topic}-{port}",
            "Name": topic,
            "Address": address,
            "Port": port,
            "Tags": list(tags),
        }
        if check:
            definition["Check"] = {
                "TTL": "10m",
                "Status": "passing",
                "CheckID": f"c-{topic}-{port}",
            }
        tell(agent, "PUT", "/v1/agent/service/register", json.dumps(definition))
        ids.append(definition["ID"])
        return f"c-{topic}-{port}"

    yield add
    for each in ids:
        tell(agent, "PUT", f"/v1/agent/service/deregister/{each}")


def test_critical_instances_disappear_and_come_back(
    resolver: Callable[..., DnsSrv], define: Callable[..., str], agent: Node, topic: str
) -> None:
    """Checks decide: critical is gone, warning serves, passing is back."""
    check = define("10.0.0.1", 1, check=True)
    define("10.0.0.2", 2)
    dns_srv = resolver()
    both, other = (Host("10.0.0.1", 1), Host("10.0.0.2", 2)), (Host("10.0.0.2", 2),)
    until(lambda: dns_srv.lookup(topic).hosts == both, 5, "both are there")
    tell(agent, "PUT", f"/v1/agent/check/fail/{check}")
    until(lambda: dns_srv.lookup(topic).hosts == other, 5, "the critical one is gone")
    tell(agent, "PUT", f"/v1/agent/check/warn/{check}")
    until(lambda: dns_srv.lookup(topic).hosts == both, 5, "it is back with a warning")
    tell(agent, "PUT", f"/v1/agent/check/pass/{check}")
    until(lambda: dns_srv.lookup(topic).hosts == both, 5, "it is back")


def test_every_form_of_address(
    resolver: Callable[..., DnsSrv], define: Callable[..., str], topic: str
) -> None:
    """IPv4, IPv6, host names, several instances on one address: all are found as registered."""
    for port, address in enumerate(["10.0.0.1", "10.0.0.1", "2001:db8::7", "localhost"], 1):
        define(address, port)
    dns_srv = resolver()
    until(lambda: len(dns_srv.lookup(topic)) == 4, 5, "all are there")
    assert [str(host) for host in dns_srv.lookup(topic)] == [
        *("10.0.0.1:1", "10.0.0.1:2", "127.0.0.1:4", "[2001:db8::7]:3"),
    ]


def test_one_server_of_a_topic(
    resolver: Callable[..., DnsSrv], define: Callable[..., str], topic: str
) -> None:
    """By tag and by address; the tag of the settings is honoured beside it."""
    define("10.0.0.1", 1, tags=["cinder-1", "gold"])
    define("10.0.0.2", 2, tags=["cinder-2"])
    dns_srv, gold = resolver(), resolver(tag="gold")
    until(lambda: len(dns_srv.lookup(topic)) == 2, 5, "both are there")
    assert dns_srv.lookup(topic, "cinder-2").hosts == (Host("10.0.0.2", 2),)
    assert dns_srv.lookup(topic, "10.0.0.1").hosts == (Host("10.0.0.1", 1),)
    assert dns_srv.lookup(topic, "cinder-3").hosts == ()
    assert gold.lookup(topic).hosts == (Host("10.0.0.1", 1),)
    assert gold.lookup(topic, "cinder-1").hosts == (Host("10.0.0.1", 1),)
    assert gold.lookup(topic, "cinder-2").hosts == ()


@pytest.mark.parametrize(
    "name", ["notifications.info", "neutron-vo-Port-1.4", "reply_" + "0a" * 16, "-odd-", "x" * 62]
)
def test_names_as_openstack_has_them(
    resolver: Callable[..., DnsSrv], agent: Node, name: str
) -> None:
    """The service that operators have to define is really found under the topic's name."""
    service = service_of(name, "{topic}", {})
    running = ask(agent, "/v1/agent/self")["Config"]["Version"]
    if "_" in service and tuple(map(int, running.split(".")[:2])) >= (1, 21):
        pytest.skip(f"Consul {running} takes no service with a _ (fact G20)")
    defined = [("elsewhere", "10.0.0.1", {"Service": service, "Address": "10.0.0.9", "Port": 9})]
    register(agent, defined)
    try:
        dns_srv = resolver()
        until(lambda: dns_srv.lookup(name).hosts == (Host("10.0.0.9", 9),), 5, service)
    finally:
        unregister(agent, defined)


def test_prepared_queries(
    resolver: Callable[..., DnsSrv], define: Callable[..., str], agent: Node, topic: str
) -> None:
    """A topic may be mapped to a prepared query."""
    define("10.0.0.1", 1)
    query = {"Name": f"pq-{topic}", "Service": {"Service": topic}}
    status, text = request(agent, "POST", "/v1/query", json.dumps(query))
    assert status == 200, text
    try:
        dns_srv = resolver(service_map={"anything at all": f"pq-{topic}.query"})
        found = (Host("10.0.0.1", 1),)
        until(lambda: dns_srv.lookup("anything at all").hosts == found, 5, "query answered")
    finally:
        request(agent, "DELETE", f"/v1/query/{json.loads(text)['ID']}")


def test_datacenters_in_their_order(
    resolver: Callable[..., DnsSrv], define: Callable[..., str], topic: str
) -> None:
    """A datacenter that has no hosts, or does not exist, is passed over; nobody is an answer."""
    dns_srv = resolver(datacenters="nowhere,dc1")
    snapshot = dns_srv.lookup(topic)
    assert (snapshot.hosts, snapshot.is_complete) == ((), True)
    define("10.0.0.1", 1)
    until(lambda: dns_srv.lookup(topic).hosts == (Host("10.0.0.1", 1),), 5, "spilled over")


def test_no_http_is_needed(
    resolver: Callable[..., DnsSrv], define: Callable[..., str], dns_only_agent: Node, topic: str
) -> None:
    """With the agent's HTTP port closed everything works."""
    define("10.0.0.1", 1)
    dns_srv = resolver(dns_only_agent)
    until(lambda: dns_srv.lookup(topic).hosts == (Host("10.0.0.1", 1),), 5, "found without HTTP")


# -- connections


def test_consul_ends_connections_and_nobody_notices(
    resolver: Callable[..., DnsSrv], define: Callable[..., str], topic: str
) -> None:
    """More queries than one connection may carry, and one that Consul found idle."""
    define("10.0.0.1", 1)
    dns_srv = resolver()
    until(lambda: len(dns_srv.lookup(topic)) == 1, 5, "registered")
    (channel,) = dns_srv._channels
    channel.udp_is_silent()
    for _ in range(300):
        assert len(dns_srv.lookup(topic)) == 1

    (kept,) = channel._kept
    readable, _, _ = select.select(channel._open, [], [], 15)
    assert readable, "Consul did not end an idle connection"
    kept.last_used_at = time.monotonic()  # as if we did not know
    assert len(dns_srv.lookup(topic)) == 1


# -- restarts


@pytest.mark.parametrize("which", ["leader", "follower"])
def test_a_restarted_server_empties_no_topic(
    cluster: Cluster, agent: Node, topic: str, which: str
) -> None:
    """For seconds after its start a server may deny live services; nobody hears of it, neither
    through an agent nor from that very server."""
    leader = cluster.leader()
    others = [node.name for node in cluster.nodes.values() if node.is_server]
    others.remove(leader)
    name = leader if which == "leader" else others[0]
    with contextlib.ExitStack() as stack:
        stack.enter_context(Operators(agent, topic))
        loads = []
        for node in (agent, *(cluster.nodes[each] for each in (leader, *others))):
            reader = stack.enter_context(
                matchmaker(
                    "catalog",
                    node.dns,
                    ttl_seconds=0.1,
                    empty_ttl_seconds=0.1,
                    request_timeout_seconds=1.0,
                )
            )
            until(lambda reader=reader: len(reader.hosts(topic)) == 3, 10, "all see 3 hosts")
            loads.append(stack.enter_context(Load(reader, topic)))
        cluster.kill(name)
        cluster.start(name)
        cluster.wait_ready()
        threading.Event().wait(LIES_SECONDS)  # what is claimed is that nothing happens meanwhile
    for load in loads:
        assert load.failures == []
        assert len(load.seconds) > 1_000
