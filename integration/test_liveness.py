"""How soon the loss of a process is seen, and what `liveness=check` does with real agents."""

import os
import signal
import statistics
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest

from consul_matchmaker import Matchmaker, Registration
from consul_matchmaker.testing.consul_probe import Node
from integration.cluster import Cluster, ask, keys
from integration.registering_process import RegisteringProcess
from integration.registrations import (
    INTERVAL,
    SLACK,
    SOON,
    answers,
    hosts,
    lease_of,
)
from integration.waiting import until

SERVICE = "consul-matchmaker"
CHECK_SECONDS = 1.5  # design, section 7: crash seen by every reader with liveness=check
STAGGER_SECONDS = 3.0  # how late an agent reports its checks after servers joined (Consul's rule)
BEAT_SECONDS = 2.0  # promised by the application; a machine may stop for a second between two
SLOW_LISTENER_SECONDS = 3.0  # the check's TTL is 1 s
CRASHES = 5  # more of them, and every liveness, in `python -m integration.bench kv`


@pytest.fixture
def url(url: str) -> str:
    return f"{url}&liveness=check"


def services(agent: Node) -> list[str]:
    """The ids of our services on this agent."""
    found: dict[str, Any] = ask(agent, "/v1/agent/services")
    return [each for each, service in found.items() if service["Service"] == SERVICE]


def test_a_killed_process_is_gone_within_a_second(
    url: str, join: Callable[..., Matchmaker], agent: Node, prefix: str
) -> None:
    """A watching reader's answer lacks it <= 1.5 s after SIGKILL, and never a survivor."""
    reader, survivor = join(), join()
    survivor.register("scheduler", "10.0.0.9:9501").wait_until_published(timeout_seconds=5)
    until(lambda: hosts(reader, "scheduler") == ["10.0.0.9:9501"], SOON, "the survivor is there")
    took = []
    for number in range(CRASHES + 1):
        host = f"10.0.1.{number}:9501"
        with RegisteringProcess(url) as process:
            process.register("scheduler", host)
            until(lambda host=host: host in hosts(reader, "scheduler"), SOON, host)  # type: ignore[misc]
            time.sleep(0.1 * number)  # at another moment between two beats each time
            process.kill()
            began = time.monotonic()
            until(
                lambda host=host: host not in hosts(reader, "scheduler"),  # type: ignore[misc]
                CHECK_SECONDS if number else CHECK_SECONDS + STAGGER_SECONDS,
                f"{host} is gone",
            )
            if number:  # the first only proves that the agent has settled
                took.append(time.monotonic() - began)
        assert "10.0.0.9:9501" in hosts(reader, "scheduler")
    print(f"min {min(took):.2f}, median {statistics.median(took):.2f}, max {max(took):.2f} s")
    assert len(keys(agent, prefix)) == 1


def test_what_it_leaves_in_the_catalog(join: Callable[..., Matchmaker], agent: Node) -> None:
    """One service a process, which beats and cleans itself up, and leaves with close()."""
    before = services(agent)
    owner = join()
    owner.register("scheduler", "10.0.0.1:9501").wait_until_published(timeout_seconds=5)
    owner.register("conductor", "10.0.0.1:9501").wait_until_published(timeout_seconds=5)
    (service,) = set(services(agent)) - set(before)
    (session,) = ask(agent, f"/v1/session/info/{lease_of(owner)}")
    assert session["NodeChecks"] == ["serfHealth"]
    assert [each["ID"] for each in session["ServiceChecks"]] == [service]
    check = ask(agent, "/v1/agent/checks")[service]
    assert (check["Type"], check["Status"]) == ("ttl", "passing")
    owner.close()
    assert set(services(agent)) <= set(before)


def test_beating_goes_on_while_consul_has_no_leader(
    cluster: Cluster, prefix: str, join: Callable[..., Matchmaker]
) -> None:
    """The keeper waits for servers that do not answer, and yet its check stays passing: neither
    the lease nor a registration is lost to an election."""
    # Where nothing else changes: what killed processes left on the other agent is removed a minute
    # later, and an agent that has a change to tell holds beats back while there is no leader.
    agent = cluster.add_agent("quiet")
    url = f"consul+kv://{agent.http}/{prefix}?liveness=check&session_ttl_seconds=10"
    with Matchmaker.from_url(url) as owner:
        reader = join()
        owner.register("scheduler", "10.0.0.1:9501").wait_until_published(timeout_seconds=5)
        until(lambda: hosts(reader, "scheduler") == ["10.0.0.1:9501"], SOON, "there")
        lease, ids = lease_of(owner), services(agent)
        leader = cluster.leader()
        follower = next(n for n in cluster.nodes if n.startswith("server") and n != leader)
        cluster.kill(leader)
        cluster.kill(follower)
        began = time.monotonic()
        while time.monotonic() - began < 12:
            checks = ask(agent, "/v1/agent/checks")
            assert [checks[each]["Status"] for each in ids] == ["passing"]
            time.sleep(0.2)
        cluster.start(leader)
        cluster.start(follower)
        until(lambda: answers(agent), 30, "there is a leader again")
        until(lambda: owner.status()["keeper"]["state"] == "HELD", 10, "renewed")  # type: ignore[index]
        assert lease_of(owner) == lease
        assert hosts(reader, "scheduler") == ["10.0.0.1:9501"]


@pytest.mark.finding("F1")
def test_a_longer_check_ttl_outlives_an_election(
    url: str, join: Callable[..., Matchmaker], cluster: Cluster, agent: Node, prefix: str
) -> None:
    """The agent holds beats back until a leader is there, once it has another check's end to tell:
    with check_ttl_seconds=5 the living process loses nothing."""
    owner = join("&check_ttl_seconds=5")
    owner.register("scheduler", "10.0.0.1:9501").wait_until_published(timeout_seconds=5)
    lease = lease_of(owner)
    with RegisteringProcess(url) as other:
        other.register("scheduler", "10.0.0.2:9501")
        cluster.kill(cluster.leader())
        other.kill()
    cluster.leader()
    until(lambda: len(keys(agent, prefix)) == 1, 30, "the dead one is gone")
    until(lambda: owner.status()["keeper"]["state"] == "HELD", 10, "renewed")  # type: ignore[index]
    assert lease_of(owner) == lease
    assert owner.status()["keeper"]["counts"]["lost"] == 0  # type: ignore[index]


@pytest.mark.finding("B4")
def test_a_slow_listener_costs_no_registration(
    join: Callable[..., Matchmaker], agent: Node, prefix: str
) -> None:
    """While the application's own `on_change` takes three times the check's TTL, beats go on."""
    entered, may_return = threading.Event(), threading.Event()

    def slow(registration: Registration, change: str) -> None:
        entered.set()
        may_return.wait(SLOW_LISTENER_SECONDS)

    owner = join()
    owner.register("scheduler", "10.0.0.1:9501", on_change=slow)
    assert entered.wait(5)
    (key,) = keys(agent, prefix)
    try:
        began = time.monotonic()
        while time.monotonic() - began < SLOW_LISTENER_SECONDS:
            assert keys(agent, prefix) == [key]
            time.sleep(0.1)
    finally:
        may_return.set()


@pytest.mark.parametrize("graceful", [False, True], ids=["killed", "left"])
def test_an_agent_restart_is_over_at_once(
    join: Callable[..., Matchmaker], cluster: Cluster, agent: Node, prefix: str, graceful: bool
) -> None:
    """The check is critical when the agent returns, which ends the session, unless a beat comes
    before the agent has told anybody; a beat finds out, long before the next renewal."""
    before = set(services(agent))
    owner = join()
    for port in (9501, 9502):
        owner.register("scheduler", f"10.0.0.1:{port}").wait_until_published(timeout_seconds=5)
    (cluster.stop if graceful else cluster.kill)("agent1")
    time.sleep(2)
    cluster.start("agent1")
    until(lambda: answers(agent), 30, "the agent is back")
    took = until(lambda: len(keys(agent, prefix)) == 2, INTERVAL + SLACK, "all are back")
    print(f"all back {took:.2f} s after the agent")
    time.sleep(STAGGER_SECONDS + SOON)  # by then the agent has told all there is to tell
    until(lambda: len(keys(agent, prefix)) == 2, SOON, "all are there")
    session = ask(agent, f"/v1/session/info/{lease_of(owner)}")
    assert len(session) == 1
    assert len(set(services(agent)) - before) == 1


def test_a_suspended_process_is_gone_and_comes_back(
    url: str, join: Callable[..., Matchmaker], agent: Node, prefix: str
) -> None:
    """SIGSTOP is seen like a crash; after SIGCONT its first beat finds the loss."""
    reader = join()
    with RegisteringProcess(url) as process:
        process.register("scheduler", "10.0.0.1:9501")
        until(lambda: hosts(reader, "scheduler") == ["10.0.0.1:9501"], SOON, "there")
        os.kill(process.pid, signal.SIGSTOP)
        until(lambda: hosts(reader, "scheduler") == [], 1.5 + STAGGER_SECONDS, "suspended: gone")
        time.sleep(3)
        os.kill(process.pid, signal.SIGCONT)
        took = until(lambda: hosts(reader, "scheduler") == ["10.0.0.1:9501"], SOON + 1, "back")
        print(f"back {took:.2f} s after SIGCONT")
        assert len(keys(agent, prefix)) == 1


def test_a_hung_serving_loop_is_taken_back(
    join: Callable[..., Matchmaker], agent: Node, prefix: str
) -> None:
    """An application that stops beating is not shown, though its process and lease live; another
    registration of the same process is not touched; with the next beat it is back."""
    reader, owner = join(), join()
    changes: list[str] = []
    other = owner.register("conductor", "10.0.0.1:9501")
    registration = owner.register(
        "scheduler",
        "10.0.0.1:9501",
        beat_seconds=BEAT_SECONDS,
        on_change=lambda _, change: changes.append(change),
    )
    until(lambda: (registration.beat(), registration.state == "published")[1], 5, "published")  # type: ignore[func-returns-value]
    other.wait_until_published(timeout_seconds=5)
    until(lambda: (registration.beat(), hosts(reader, "scheduler"))[1], SOON, "seen")  # type: ignore[func-returns-value]
    registration.beat()
    took = until(lambda: hosts(reader, "scheduler") == [], BEAT_SECONDS + SOON, "hung: gone")
    assert registration.state == "silent"
    registration.beat()
    back = until(
        lambda: (registration.beat(), hosts(reader, "scheduler"))[1],  # type: ignore[func-returns-value]
        SOON,
        "beating again: back",
    )
    print(f"gone {took:.2f} s after the last beat, back {back:.2f} s after the next")
    until(lambda: changes == ["held", "lost", "held"], SOON, "told")
    assert hosts(reader, "conductor") == ["10.0.0.1:9501"]
    assert registration.margin_seconds > 5


def test_draining_withdraws_before_it_waits(
    join: Callable[..., Matchmaker], agent: Node, prefix: str
) -> None:
    """Readers lose it at once, the caller goes on serving for as long as it said."""
    reader, owner = join(), join()
    registration = owner.register("scheduler", "10.0.0.1:9501")
    registration.wait_until_published(timeout_seconds=5)
    until(lambda: hosts(reader, "scheduler") == ["10.0.0.1:9501"], SOON, "there")
    began = time.monotonic()
    registration.drain(1.0)
    assert time.monotonic() - began >= 1.0
    assert hosts(reader, "scheduler") == []
    assert registration.state == "withdrawn"
