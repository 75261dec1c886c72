"""How servers are found: in each mode, while Consul is away, and in other datacenters."""

from __future__ import annotations

import threading
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from consul_matchmaker.adapters.oslo.http.names import service_of
from consul_matchmaker.testing.consul_probe import Node, NotReady, request
from integration.cluster import Cluster, ask, free_ports, keys, tell
from integration.datacenters import two_datacenters
from integration.rpc.conftest import FOUND_SECONDS, Served, matchmaker_of, wait_for_hosts
from integration.waiting import threads_since, until

Make = Callable[..., Any]
Serve = Callable[..., Served]
Operator = Callable[..., str]

QUICK_SECONDS = 0.5
OFTEN = {"ttl_seconds": QUICK_SECONDS, "empty_ttl_seconds": QUICK_SECONDS}


# -- modes -----------------------------------------------------------------------------------------


@pytest.fixture
def kv_options(agent: Node) -> Iterator[dict[str, Any]]:
    prefix = f"test-{uuid.uuid4().hex[:12]}"
    yield {"mode": "kv", "prefix": prefix, "session_ttl_seconds": 10}
    tell(agent, "DELETE", f"/v1/kv/{prefix}/?recurse")


def test_kv_mode_needs_no_service(
    serve: Serve, client: Make, agent: Node, kv_options: dict[str, Any], topic: str
) -> None:
    """Call, cast, fanout and direct calls by keys alone; the keys go when the servers stop."""
    served = [serve(topic, name, **kv_options) for name in ("one", "two")]
    caller = client(topic, **kv_options)
    wait_for_hosts(caller, 2)
    assert sorted(caller.call({}, "who") for _ in range(4)) == ["one", "one", "two", "two"]
    assert caller.prepare(server="two").call({}, "who") == "two"
    caller.prepare(fanout=True).cast({}, "note", what="all")
    until(lambda: all(each.endpoint.got for each in served), FOUND_SECONDS, "everybody has it")
    assert [each.endpoint.got for each in served] == [["all"], ["all"]]
    caller.prepare(server="one").cast({}, "note", what="one")
    until(lambda: served[0].endpoint.got == ["all", "one"], FOUND_SECONDS, "one has it")
    assert len(keys(agent, kv_options["prefix"])) == 2
    assert ask(agent, f"/v1/health/service/{service_of('openstack', topic)}") == []
    for each in served:
        each.stop()
    assert keys(agent, kv_options["prefix"]) == []


def test_catalog_mode_needs_dns_alone(
    serve: Serve, client: Make, operator: Operator, dns_only_agent: Node, topic: str
) -> None:
    """Operators define the services; servers register nothing, and clients find them by DNS at an
    agent whose HTTP port refuses connections."""
    with pytest.raises(NotReady):
        request(dns_only_agent, "GET", "/v1/status/leader")
    options = {"agent_address": dns_only_agent.dns, "mode": "catalog", **OFTEN}
    served = []
    for name, port in zip(("one", "two"), free_ports(2), strict=True):
        served.append(serve(topic, name, port_range=f"{port}-{port}", **options))
        operator(service_of("openstack", topic), port, tags=(name,))
    caller = client(topic, **options)
    wait_for_hosts(caller, 2)
    assert {caller.call({}, "who") for _ in range(20)} == {"one", "two"}
    assert [caller.prepare(server="two").call({}, "who") for _ in range(3)] == ["two"] * 3
    caller.prepare(fanout=True).cast({}, "note", what="all")
    until(lambda: all(each.endpoint.got for each in served), FOUND_SECONDS, "everybody has it")
    assert [each.endpoint.got for each in served] == [["all"], ["all"]]


@pytest.mark.parametrize(("name", "is_found"), [("Node7", True), ("node7.example.org", False)])
def test_catalog_mode_finds_servers_that_are_a_dns_label(
    name: str, is_found: bool, serve: Serve, client: Make, agent: Node, topic: str
) -> None:
    """Where servers register in service mode, and their name has no dot: DNS can ask for it."""
    import oslo_messaging

    serve(topic, name)
    by_dns = client(topic, agent_address=agent.dns, mode="catalog", **OFTEN)
    wait_for_hosts(by_dns, 1)
    assert by_dns.call({}, "who") == name
    assert client(topic).prepare(server=name).call({}, "who") == name
    if is_found:
        assert by_dns.prepare(server=name).call({}, "who") == name
    else:
        with pytest.raises(oslo_messaging.MessagingTimeout, match=f"{topic} as {name}"):
            by_dns.prepare(server=name, timeout=1).call({}, "who")


def test_a_server_starts_while_consul_is_away(
    serve: Serve, client: Make, operator: Operator, agent: Node, topic: str
) -> None:
    """Within wait_timeout; it serves, and is found once Consul shows it."""
    (nobody, port) = free_ports(2)
    away = {"agent_address": f"127.0.0.1:{nobody}", "wait_timeout": 0.3}
    began = time.monotonic()
    serve(topic, "one", port_range=f"{port}-{port}", **away)
    assert time.monotonic() - began < 5
    operator(service_of("openstack", topic), port)
    assert client(topic).call({}, "who") == "one"


# -- Consul away -----------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["kill", "pause"])
def test_calls_to_known_topics_go_on_while_the_agent_is_away(
    how: str, serve: Serve, client: Make, cluster: Cluster, topic: str
) -> None:
    """Calls, direct ones, casts and fanouts, also long after the answers have run out; none waits
    for Consul; and to whom nobody knows a call fails by its timeout."""
    import oslo_messaging

    served = [serve(topic, name) for name in ("one", "two")]
    often = {**OFTEN, "stale_while_revalidate_seconds": QUICK_SECONDS}
    caller = client(topic, **often)
    wait_for_hosts(caller, 2)
    assert caller.prepare(server="one").call({}, "who") == "one"
    getattr(cluster, how)("agent1")
    slowest, answers, began = 0.0, set(), time.monotonic()
    while time.monotonic() - began < 6 * QUICK_SECONDS:
        asked_at = time.monotonic()
        answers.add(caller.call({}, "who"))
        assert caller.prepare(server="one").call({}, "who") == "one"
        slowest = max(slowest, time.monotonic() - asked_at)
    assert answers == {"one", "two"}
    assert slowest < 2
    caller.cast({}, "note", what="cast")
    caller.prepare(fanout=True).cast({}, "note", what="fanout")

    def got() -> list[str]:
        return sorted(text for each in served for text in each.endpoint.got)

    until(lambda: len(got()) == 3, FOUND_SECONDS, "they are executed")
    assert got() == ["cast", "fanout", "fanout"]
    unknown = client(f"{topic}-unknown", over=caller.transport, timeout=1)
    asked_at = time.monotonic()
    with pytest.raises(oslo_messaging.MessagingTimeout):
        unknown.call({}, "who")
    assert 1 <= time.monotonic() - asked_at < 4
    cluster.mend()
    until(
        lambda: len(matchmaker_of(caller.transport).hosts(service_of("openstack", topic))) == 2,
        FOUND_SECONDS,
        "both are there",
    )
    assert {caller.call({}, "who") for _ in range(4)} == {"one", "two"}


# -- datacenters -----------------------------------------------------------------------------------


@pytest.fixture
def threads() -> Iterator[ThreadPoolExecutor]:
    """For calls that wait while the test does something else."""
    with ThreadPoolExecutor(4) as pool:
        yield pool


@pytest.fixture
def datacenters() -> Iterator[tuple[Node, Node]]:
    """An agent of dc1, and the server of dc2."""
    with two_datacenters() as (near, far):
        yield near.nodes["agent1"], far.nodes["server1"]


def test_calls_spill_over_to_the_next_datacenter(
    datacenters: tuple[Node, Node],
    serve: Serve,
    client: Make,
    threads: ThreadPoolExecutor,
    topic: str,
) -> None:
    """A call goes to the nearest datacenter that has a server with room; a direct one wherever that
    server is; a fanout everywhere; and home again once there is a server."""
    near, far = datacenters
    home = serve(topic, "home", agent_address=near.http, max_messages=1)
    abroad = serve(topic, "abroad", agent_address=far.http)
    caller = client(topic, agent_address=near.http, datacenters="dc1,dc2", **OFTEN)
    other = client(topic, agent_address=near.http, datacenters="dc2,dc1", **OFTEN)
    assert {caller.call({}, "who") for _ in range(4)} == {"home"}
    assert {other.call({}, "who") for _ in range(4)} == {"abroad"}
    assert caller.prepare(server="abroad").call({}, "who") == "abroad"
    caller.prepare(fanout=True).cast({}, "note", what="all")
    until(lambda: home.endpoint.got and abroad.endpoint.got, FOUND_SECONDS, "everybody has it")
    assert (home.endpoint.got, abroad.endpoint.got) == (["all"], ["all"])
    call = threads.submit(caller.prepare(server="home").call, {}, "hold", what="held")
    until(lambda: home.endpoint.got == ["all", "held"], FOUND_SECONDS, "home is full")
    assert [caller.call({}, "who") for _ in range(4)] == ["abroad"] * 4
    home.endpoint.let_go.set()
    assert call.result(FOUND_SECONDS) == "held"
    until(lambda: caller.call({}, "who") == "home", FOUND_SECONDS, "home has room")
    home.stop()
    assert [caller.call({}, "who") for _ in range(4)] == ["abroad"] * 4
    serve(topic, "home again", agent_address=near.http)
    until(lambda: caller.call({}, "who") == "home again", FOUND_SECONDS, "at home again")


# -- a process's matchmakers -----------------------------------------------------------------------


def test_transports_with_one_url_share_a_matchmaker(
    transport: Make, serve: Serve, client: Make, topic: str
) -> None:
    """It is closed with the last of them, and not with the first; another URL has another."""
    one, two, other = transport(), transport(), transport(ttl_seconds=4)
    shared = matchmaker_of(one)
    assert matchmaker_of(two) is shared
    assert matchmaker_of(other) is not shared
    serve(topic, "server", over=two)
    one.cleanup()
    one.cleanup()
    assert not shared.is_closed
    assert client(topic, over=two).call({}, "who") == "server"


def test_the_last_transport_closes_the_matchmaker(transport: Make) -> None:
    """And one that is made afterwards has a new one."""
    one, two = transport(), transport()
    shared = matchmaker_of(one)
    one.cleanup()
    assert not shared.is_closed
    two.cleanup()
    assert shared.is_closed
    assert matchmaker_of(transport()) is not shared


def test_a_transport_asks_consul_nothing_until_it_is_used(transport: Make) -> None:
    """So that a service may fork after it has made one."""
    before = set(threading.enumerate())
    asked = matchmaker_of(transport()).status()["wire"]
    assert [each["queries"] for each in asked.values()] == [0]
    assert threads_since(before) == []
