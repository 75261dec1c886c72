"""Service mode on a real cluster: what everybody sees, every cause of loss, and its end."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from http.server import HTTPServer, SimpleHTTPRequestHandler
from pathlib import Path

import pytest

from consul_matchmaker import Matchmaker, errors
from consul_matchmaker.model import Instance
from consul_matchmaker.testing.consul_probe import Node
from consul_matchmaker.testing.local_consul import LocalCluster
from integration import catalog
from integration.access_rules import MANAGEMENT, guarded_cluster, new_token
from integration.cluster import Cluster, ask, tell
from integration.registering_process import RegisteringProcess
from integration.registrations import SLACK, answers, hosts, repairs
from integration.waiting import until

CHECK_TTL = 3.0  # the default
INTERVAL = CHECK_TTL / 3
BACK = INTERVAL + SLACK
SEEN = 0.2  # how soon everybody sees what was published
ONE, TWO = "10.0.0.1:8080", "10.0.0.2:8080"


@pytest.fixture
def url(agent: Node) -> str:
    return f"consul+service://{agent.http}?empty_ttl_seconds=1"


@pytest.fixture
def join(url: str) -> Iterator[Callable[..., Matchmaker]]:
    with ExitStack() as stack:
        yield lambda extra="": stack.enter_context(Matchmaker.from_url(url + extra))


def services(node: Node, topic: str) -> list[dict[str, object]]:
    """What the catalog has of the topic, healthy or not."""
    return [each["Service"] for each in ask(node, f"/v1/health/service/{topic}")]


def healthy(node: Node, topic: str, *, token: str = "") -> list[str]:
    """As any program sees it."""
    found = ask(node, f"/v1/health/service/{topic}?passing", token=token)
    return sorted(f"{each['Service']['Address']}:{each['Service']['Port']}" for each in found)


# -- what everybody sees ---------------------------------------------------------------------------


def test_everybody_sees_a_registration(
    join: Callable[..., Matchmaker], agent: Node, topic: str
) -> None:
    """Any client of Consul's HTTP API, and catalog mode by DNS, with tags, meta and server."""
    owner = join()
    registration = owner.register(
        topic, ONE, "node1", tags=["blue"], meta={"version": "7"}, weight=5
    )
    registration.wait_until_published(timeout_seconds=5)
    until(lambda: healthy(agent, topic) == [ONE], SEEN, "seen by HTTP")
    (service,) = services(agent, topic)
    assert service["Tags"] == ["blue", "node1"]
    assert service["Meta"]["version"] == "7"  # type: ignore[index]
    with Matchmaker.from_url(f"consul+catalog://{agent.dns}?empty_ttl_seconds=0") as reader:
        until(lambda: hosts(reader, topic) == [ONE], SEEN, "seen by DNS")
        assert [str(host) for host in reader.hosts(topic, "node1")] == [ONE]
        assert [one.weight for one in reader.hosts(topic).instances] == [5]
    with Matchmaker.from_url(f"consul+catalog://{agent.dns}?tag=blue") as reader:
        assert hosts(reader, topic) == [ONE]
    (found,) = join().hosts(topic).instances
    node = ask(agent, "/v1/agent/self")["Config"]
    assert found == Instance(
        registration.host,
        "node1",
        weight=5,
        tags=("blue", "node1"),
        meta={"version": "7"},
        node=node["NodeName"],
        datacenter=node["Datacenter"],
    )
    registration.unregister()
    registration.wait_until_withdrawn(timeout_seconds=5)
    assert healthy(agent, topic) == []


def test_other_options_replace_the_service(
    join: Callable[..., Matchmaker], agent: Node, topic: str
) -> None:
    """Registered again with other tags, it is the same registration, and has those."""
    owner = join()
    owner.register(topic, ONE, tags=["blue"]).wait_until_published(timeout_seconds=5)
    owner.register(topic, ONE, tags=["green"]).wait_until_published(timeout_seconds=5)
    until(
        lambda: [each["Tags"] for each in services(agent, topic)] == [["green"]], BACK, "replaced"
    )


def test_a_watch_hears_of_changes(join: Callable[..., Matchmaker], topic: str) -> None:
    """By a blocking query, soon; what somebody else's service does wakes nobody."""
    reader, owner = join("&ttl_seconds=60"), join()
    assert hosts(reader, topic) == []
    registrations = [owner.register(topic, host) for host in (ONE, TWO)]
    until(lambda: hosts(reader, topic) == [ONE, TWO], 2, "both are there")
    until(lambda: reader.status()["watcher"]["is_watching"], 5, "watched")  # type: ignore[index]
    registrations[0].unregister()
    registrations[0].wait_until_withdrawn(timeout_seconds=5)
    took = until(lambda: hosts(reader, topic) == [TWO], SEEN, "one has left")
    print(f"seen {took * 1000:.0f} ms after it had left")


def test_instances_that_warn_are_hosts_where_that_is_said(
    join: Callable[..., Matchmaker], agent: Node, topic: str
) -> None:
    """With `accept_warning`, in a watch as well; they bear the weight that Consul has for them."""
    weights = {"Passing": 5, "Warning": 2}
    service = {"ID": topic, "Name": topic, "Address": "10.0.0.1", "Port": 8080, "Weights": weights}
    check = {"CheckID": f"{topic}:check", "TTL": "1h", "Status": "passing"}
    strict, lenient = join(), join("&accept_warning=on")
    tell(agent, "PUT", "/v1/agent/service/register", json.dumps({**service, "Check": check}))
    for reader in (strict, lenient):
        until(lambda: hosts(reader, topic) == [ONE], 2, "healthy")  # noqa: B023
    tell(agent, "PUT", f"/v1/agent/check/warn/{topic}:check")
    until(lambda: hosts(strict, topic) == [], 5, "not for everybody")
    until(lambda: [one.weight for one in lenient.hosts(topic).instances] == [2], 2, "it warns")
    tell(agent, "PUT", f"/v1/agent/check/fail/{topic}:check")
    until(lambda: hosts(lenient, topic) == [], 5, "it fails")
    tell(agent, "PUT", f"/v1/agent/service/deregister/{topic}")


def test_nearest_first(join: Callable[..., Matchmaker], agent: Node, topic: str) -> None:
    """By Consul's coordinates; a node without any is last."""
    elsewhere = [("elsewhere", "10.0.0.9", {"Service": topic, "Address": "10.0.0.1", "Port": 8080})]
    catalog.register(agent, elsewhere)
    join().register(topic, TWO).wait_until_published(timeout_seconds=5)
    by_name, by_distance = join(), join("&near=_agent&ttl_seconds=1&watch=off")
    until(lambda: hosts(by_name, topic) == [ONE, TWO], 2, "both")

    def found() -> list[str]:
        return [str(one.host) for one in by_distance.hosts(topic).instances]

    until(lambda: found() == [TWO, ONE], 60, "the agent has its coordinates")
    catalog.unregister(agent, elsewhere)


def test_the_own_zone_first(join: Callable[..., Matchmaker], agent: Node, topic: str) -> None:
    """By what each service says, which is its process's zone, or else by what its node says; the
    other zone when none is left."""
    elsewhere = {"Service": topic, "Address": "10.0.0.3", "Port": 8080}
    node = {"Node": f"{topic}-node", "Address": "10.0.0.9"}
    in_zone = {**node, "NodeMeta": {"zone": "b"}, "Service": elsewhere}
    tell(agent, "PUT", "/v1/catalog/register", json.dumps(in_zone))
    ours = join("&zone=a").register(topic, ONE)
    join("&zone=a").register(topic, TWO, meta={"zone": "b"})
    caller = join("&zone=a")
    until(lambda: len(hosts(caller, topic)) == 3, 30, "all")
    zones = {str(one.host): one.zone for one in caller.hosts(topic).instances}
    assert zones == {ONE: "a", TWO: "b", "10.0.0.3:8080": "b"}
    near = Counter(str(caller.pick(topic)) for _ in range(1000))
    # One of three hosts for half of the callers: 1.4 x 2 / 3 of the calls.
    assert 880 < near[ONE] < 980
    assert [str(join("&zone=b").pick(topic)) for _ in range(20)].count(ONE) == 0
    ours.unregister()
    until(lambda: str(caller.pick(topic)) != ONE, 30, "the other zone")
    tell(agent, "PUT", "/v1/catalog/deregister", json.dumps(node))


def test_the_agents_own_cache_answers_without_servers(
    cluster: Cluster, join: Callable[..., Matchmaker], agent: Node, topic: str
) -> None:
    """With `consistency=cached`, also a program that starts meanwhile; by default it knows
    nothing."""
    join().register(topic, ONE).wait_until_published(timeout_seconds=5)
    reader = join("&consistency=cached")
    until(lambda: hosts(reader, topic) == [ONE], 2, "in the agent's cache")
    for name in cluster.running - {"agent1"}:
        cluster.pause(name)
    assert hosts(join("&consistency=cached"), topic) == [ONE]
    with pytest.raises(errors.Unavailable):
        join("&request_timeout_seconds=1").hosts(topic)


def test_draining_is_maintenance_first(
    join: Callable[..., Matchmaker], agent: Node, topic: str
) -> None:
    """Readers leave it at once, operators see why, and it is deregistered in the end."""
    owner = join()
    registration = owner.register(topic, ONE)
    registration.wait_until_published(timeout_seconds=5)
    draining = threading.Thread(target=registration.drain, args=(1.5,))
    draining.start()
    until(lambda: healthy(agent, topic) == [], 0.5, "nobody is sent there")
    assert len(services(agent, topic)) == 1, "and it is registered still"
    time.sleep(INTERVAL)  # a renewal
    assert (healthy(agent, topic), len(services(agent, topic))) == ([], 1)
    draining.join(10)
    assert services(agent, topic) == []


@pytest.mark.parametrize("kind", ["http", "tcp"])
def test_consul_probes_what_it_is_told_to(
    join: Callable[..., Matchmaker], agent: Node, topic: str, kind: str, cluster_kind: str
) -> None:
    """Healthy only while the probe succeeds; gone with its process whatever that says."""
    if cluster_kind == "docker":
        pytest.skip("the agent's container does not reach this process")
    server = HTTPServer(("127.0.0.1", 0), SimpleHTTPRequestHandler)
    port = server.server_address[1]
    check = f"{kind}://127.0.0.1:{port}" + ("/" if kind == "http" else "")
    owner = join()
    registration = owner.register(topic, ONE, check=check)
    registration.wait_until_published(timeout_seconds=5)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    until(lambda: healthy(agent, topic) == [ONE], 5, "the probe succeeds")
    server.shutdown()
    thread.join()
    server.server_close()
    until(lambda: healthy(agent, topic) == [], 5, "the probe fails")
    assert registration.state == "published"


# -- every cause of loss ---------------------------------------------------------------------------


def lost_and_back(agent: Node, topic: str, *, of: int = 2) -> float:
    """How long until all are back, once each."""
    return until(
        lambda: len(healthy(agent, topic)) == of and len(services(agent, topic)) == of,
        BACK,
        "all are back, once each",
    )


@pytest.fixture
def owner(join: Callable[..., Matchmaker], topic: str) -> Matchmaker:
    """It has two registrations."""
    owner = join()
    for host in (ONE, TWO):
        owner.register(topic, host).wait_until_published(timeout_seconds=5)
    return owner


def test_deregistered_by_somebody(
    owner: Matchmaker, agent: Node, topic: str, caplog: pytest.LogCaptureFixture
) -> None:
    for service in services(agent, topic):
        tell(agent, "PUT", f"/v1/agent/service/deregister/{service['ID']}")
    print(f"back {lost_and_back(agent, topic):.2f} s later; {repairs(caplog)}")
    until(lambda: len(repairs(caplog)) == 1, BACK, "one line")
    assert "deregistered by somebody" in repairs(caplog)[0]


def test_its_check_removed(
    owner: Matchmaker, agent: Node, topic: str, caplog: pytest.LogCaptureFixture
) -> None:
    """It would stay healthy for ever, whatever became of us."""

    def checks() -> int:
        found = ask(agent, f"/v1/health/checks/{topic}")
        return len(found)

    assert checks() == 2
    service = services(agent, topic)[0]
    tell(agent, "PUT", f"/v1/agent/check/deregister/{service['ID']}:ttl")
    until(lambda: checks() == 2, BACK + INTERVAL, "it has its check again")
    until(lambda: len(repairs(caplog)) == 1, BACK, "one line")
    assert "check was removed" in repairs(caplog)[0]


@pytest.mark.parametrize("how", ["restarted", "killed", "wiped"])
def test_its_agent_comes_back(
    owner: Matchmaker,
    cluster: Cluster,
    agent: Node,
    topic: str,
    how: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """With its data, or without: everything is there soon after it can be reached, once each."""
    (cluster.kill if how == "killed" else cluster.stop)("agent1")
    if how == "wiped" and isinstance(cluster, LocalCluster):
        shutil.rmtree(cluster.folder / "agent1" / "data")
    time.sleep(1)
    cluster.start("agent1")
    until(lambda: answers(agent), 30, "the agent is back")
    took = lost_and_back(agent, topic)
    print(f"{how}: back {took:.2f} s after the agent; {repairs(caplog)}")
    time.sleep(2 * INTERVAL)
    assert len(services(agent, topic)) == 2


def test_an_agent_that_is_late_at_boot(
    cluster: Cluster, join: Callable[..., Matchmaker], agent: Node, topic: str
) -> None:
    cluster.kill("agent1")
    registration = join().register(topic, ONE)
    assert registration.state == "pending"
    with pytest.raises(errors.TimedOut):
        registration.wait_until_published(timeout_seconds=1)
    cluster.start("agent1")
    until(lambda: answers(agent), 30, "the agent is back")
    registration.wait_until_published(timeout_seconds=BACK)
    assert healthy(agent, topic) == [ONE]


def test_another_agent_takes_over(cluster: Cluster, agent: Node, topic: str) -> None:
    """With several addresses, once the first has not answered for the TTL; what it comes back with
    is gone a minute later."""
    second = cluster.nodes["server1"]
    with Matchmaker.from_url(f"consul+service://{agent.http},{second.http}") as owner:
        owner.register(topic, ONE).wait_until_published(timeout_seconds=5)
        cluster.kill("agent1")
        node = ask(second, "/v1/agent/self")["Config"]["NodeName"]

        def nodes() -> list[str]:
            found = ask(second, f"/v1/health/service/{topic}?passing")
            return [each["Node"]["Node"] for each in found]

        took = until(lambda: node in nodes(), CHECK_TTL + 3 * INTERVAL + 2, "at the second agent")
        print(f"moved after {took:.2f} s")
        assert owner.hosts(topic).hosts != ()


@pytest.fixture(scope="module")
def guarded() -> Iterator[Node]:
    with guarded_cluster(clients=1) as cluster:
        yield cluster.nodes["agent1"]


def test_a_token_revoked_and_replaced(
    guarded: Node, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Everything is there within a renewal interval of the new token, and no line holds a token."""
    rules = 'service "web" {policy="write"} node_prefix "" {policy="read"}'
    accessor, secret = new_token(guarded, rules)
    token_file = tmp_path / "token"
    token_file.write_text(secret)
    url = f"consul+service://{guarded.http}?token_file={token_file}"
    with Matchmaker.from_url(url) as owner:
        owner.register("web", ONE).wait_until_published(timeout_seconds=5)
        tell(guarded, "DELETE", f"/v1/acl/token/{accessor}", token=MANAGEMENT)
        # An agent may go by what it knows of a token for acl.token_ttl, 30 s.
        until(lambda: any("refuses" in line for line in repairs(caplog)), 35, "said")
        _, secret_now = new_token(guarded, rules)
        token_file.write_text(secret_now)
        took = until(lambda: healthy(guarded, "web", token=MANAGEMENT) == [ONE], BACK, "back")
        print(f"back {took:.2f} s after the new token")
    until(lambda: healthy(guarded, "web", token=MANAGEMENT) == [], BACK, "withdrawn")
    assert secret not in caplog.text and secret_now not in caplog.text


def test_the_least_rights(guarded: Node) -> None:
    """To register, the service alone; to read, the service and the nodes; without, Denied."""
    _, writes = new_token(guarded, 'service "web" {policy="write"}')
    _, reads = new_token(guarded, 'service "web" {policy="read"} node_prefix "" {policy="read"}')
    _, nothing = new_token(guarded, 'key "x" {policy="read"}')
    url = "consul+service://:{}@" + guarded.http
    with (
        Matchmaker.from_url(url.format(writes)) as owner,
        Matchmaker.from_url(url.format(reads)) as reader,
        Matchmaker.from_url(url.format(nothing)) as stranger,
    ):
        owner.register("web", ONE).wait_until_published(timeout_seconds=5)
        until(lambda: hosts(reader, "web") == [ONE], BACK, "read")
        with pytest.raises(errors.Denied, match='service "web" read'):
            stranger.hosts("web")
        refused = reader.register("web", TWO)
        with pytest.raises(errors.Denied, match='service "web" write'):
            refused.wait_until_published(timeout_seconds=5)


# -- the end ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_processes_that_end_or_hang_are_gone(
    url: str, agent: Node, topic: str, number: signal.Signals
) -> None:
    """From HTTP and from DNS, within the check's TTL and a second; one that goes on is back."""
    with ExitStack() as stack:
        processes = [stack.enter_context(RegisteringProcess(url)) for _ in range(20)]
        for port, process in enumerate(processes, 9001):
            process.register(topic, f"10.0.0.1:{port}")
        assert len(healthy(agent, topic)) == 20
        with Matchmaker.from_url(f"consul+catalog://{agent.dns}?ttl_seconds=0") as reader:
            until(lambda: len(reader.hosts(topic)) == 20, 2, "seen by DNS")
        for process in processes:
            os.kill(process.pid, number)
        took = until(lambda: healthy(agent, topic) == [], CHECK_TTL + 1, "gone from HTTP")
        left = CHECK_TTL + 1 - took
        with Matchmaker.from_url(
            f"consul+catalog://{agent.dns}?ttl_seconds=0&confirm_empty_seconds=0"
        ) as late:
            until(lambda: late.hosts(topic).hosts == (), left, "gone from DNS")
        print(f"{number.name}: gone after {took:.2f} s")
        if number is signal.SIGSTOP:
            for process in processes:
                os.kill(process.pid, signal.SIGCONT)
            until(lambda: len(healthy(agent, topic)) == 20, BACK + 1, "back")


@pytest.mark.long
def test_what_a_killed_process_leaves_is_gone_from_the_catalog(
    url: str, agent: Node, topic: str
) -> None:
    """After three minutes at the latest."""
    with ExitStack() as stack:
        processes = [stack.enter_context(RegisteringProcess(url)) for _ in range(20)]
        for port, process in enumerate(processes, 9001):
            process.register(topic, f"10.0.0.1:{port}")
        for process in processes:
            process.kill()
        until(lambda: healthy(agent, topic) == [], CHECK_TTL + 1, "gone for readers")
        took = until(lambda: services(agent, topic) == [], 180, "gone from the catalog")
        print(f"gone from the catalog after {took:.0f} s")


def test_a_successor_at_the_same_port_does_not_keep_its_predecessor(
    url: str, agent: Node, topic: str, cluster_kind: str
) -> None:
    """Whose probe it answers."""
    if cluster_kind == "docker":
        pytest.skip("the agent's container does not reach this process")
    with socket.create_server(("127.0.0.1", 0)) as listener:
        host = f"127.0.0.1:{listener.getsockname()[1]}"
        check = ["--check", f"tcp://{host}"]
        command = [sys.executable, "-m", "consul_matchmaker", "--url", url, "register", topic, host]
        predecessor = subprocess.Popen([*command, *check])
        try:
            until(lambda: healthy(agent, topic) == [host], 15, "registered, and probed")
            (first,) = services(agent, topic)
            predecessor.kill()
            predecessor.wait()
            with Matchmaker.from_url(url) as successor:
                successor.register(topic, host, check=check[1])
                until(lambda: healthy(agent, topic) == [host], 5, "the successor is there")

                def ids() -> set[object]:
                    found = ask(agent, f"/v1/health/service/{topic}?passing")
                    return {each["Service"]["ID"] for each in found}

                until(lambda: first["ID"] not in ids() and len(ids()) == 1, CHECK_TTL + 1, "alone")
        finally:
            predecessor.kill()
            predecessor.wait()
