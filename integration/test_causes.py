"""Causes of loss that no other test has: a token replaced, an agent wiped, a process suspended."""

import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from consul_matchmaker import Matchmaker, errors
from consul_matchmaker.cli.sweep import sweep
from consul_matchmaker.testing.consul_probe import Node, request
from consul_matchmaker.testing.local_consul import LocalCluster
from integration.access_rules import MANAGEMENT, guarded_cluster, new_token
from integration.cluster import Cluster, keys, tell
from integration.registering_process import RegisteringProcess
from integration.registrations import (
    INTERVAL,
    SLACK,
    SOON,
    answers,
    hosts,
    lease_of,
    repairs,
)
from integration.waiting import until

RULES = 'key_prefix "matchmaker/" {policy="write"} session_prefix "" {policy="write"}'
CHECK_RULES = RULES + ' service "consul-matchmaker" {policy="write"}'


# -- a cluster with access rules -------------------------------------------------------------------


@pytest.fixture(scope="module")
def guarded() -> Iterator[Node]:
    """The agent of a small cluster of local processes that refuses whoever has no token."""
    with guarded_cluster(clients=1) as cluster:
        yield cluster.nodes["agent1"]


@pytest.mark.parametrize("liveness", ["session", "check"])
def test_a_token_revoked_and_replaced(
    guarded: Node, tmp_path: Path, caplog: pytest.LogCaptureFixture, liveness: str
) -> None:
    """Refused, it says so once and keeps trying; the file replaced, all is back within a renewal
    interval, without anybody calling anything, once each; no log line holds a token."""
    rules = CHECK_RULES if liveness == "check" else RULES
    accessor, secret = new_token(guarded, rules)
    token_file = tmp_path / "token"
    token_file.write_text(secret)
    url = f"consul+kv://{guarded.http}/matchmaker?token_file={token_file}&liveness={liveness}"
    url += "&session_ttl_seconds=2" if liveness == "session" else ""

    def held() -> int:
        status, text = request(guarded, "GET", "/v1/kv/matchmaker/?keys", token=MANAGEMENT)
        return len([k for k in text.split(",") if "/scheduler/" in k]) if status == 200 else 0

    with Matchmaker.from_url(url) as owner:
        changes: list[str] = []
        for port in (9501, 9502):
            owner.register(
                "scheduler", f"10.0.0.1:{port}", on_change=lambda _, change: changes.append(change)
            ).wait_until_published(timeout_seconds=5)
        path = f"/v1/acl/token/{accessor}"
        tell(guarded, "DELETE", path, token=MANAGEMENT)
        until(lambda: any("refuses" in line for line in repairs(caplog)), INTERVAL + SLACK, "said")
        late = owner.register("scheduler", "10.0.0.1:9503")
        with pytest.raises(errors.Denied):
            late.wait_until_published(timeout_seconds=INTERVAL + SLACK)
        if liveness == "session":  # for longer than the lease lives
            until(lambda: held() == 0, 2 * 2 + 1 + SOON, "Consul has ended the lease")
        _, secret_now = new_token(guarded, rules)
        token_file.write_text(secret_now)
        took = until(lambda: held() == 3, INTERVAL + SLACK, "all are back")
        until(lambda: late.state == "published", SOON, "and its owner has heard of it")
        print(f"{liveness}: back {took:.2f} s after the new token; {repairs(caplog)}")
        lost = ["lost", "lost", "held", "held"] if liveness == "session" else []
        until(lambda: changes == ["held", "held", *lost], SOON, "told")
    assert held() == 0
    assert secret not in caplog.text and secret_now not in caplog.text


def test_a_crash_is_seen_also_after_the_token_was_replaced(guarded: Node, tmp_path: Path) -> None:
    """The agent reports the check with the new token: the old one may be revoked."""
    accessor, secret = new_token(guarded, CHECK_RULES)
    _, secret_now = new_token(guarded, CHECK_RULES)
    token_file = tmp_path / "token"
    token_file.write_text(secret)
    url = f"consul+kv://{guarded.http}/matchmaker?token_file={token_file}&liveness=check"
    with (
        Matchmaker.from_url(f"consul+kv://:{MANAGEMENT}@{guarded.http}/matchmaker") as reader,
        RegisteringProcess(url) as process,
    ):
        process.register("scheduler", "10.0.0.1:9501")
        until(lambda: hosts(reader, "scheduler") == ["10.0.0.1:9501"], SOON, "there")
        token_file.write_text(secret_now)
        time.sleep(1)
        path = f"/v1/acl/token/{accessor}"
        tell(guarded, "DELETE", path, token=MANAGEMENT)
        time.sleep(1)
        process.kill()
        took = until(lambda: hosts(reader, "scheduler") == [], 4.5, "gone")
        print(f"gone after {took:.2f} s")


# -- the others ------------------------------------------------------------------------------------


@pytest.mark.parametrize("liveness", ["session", "node", "check"])
def test_an_agent_that_lost_its_memory(
    cluster: Cluster,
    join: Callable[..., Matchmaker],
    agent: Node,
    prefix: str,
    cluster_kind: str,
    liveness: str,
) -> None:
    """Its data folder wiped, it comes back as another node of the same name: everything is there
    within a renewal interval, once each."""
    owner = join(f"&liveness={liveness}")
    for port in (9501, 9502):
        owner.register("scheduler", f"10.0.0.1:{port}").wait_until_published(timeout_seconds=5)
    cluster.stop("agent1")
    if isinstance(cluster, LocalCluster):
        shutil.rmtree(cluster.folder / "agent1" / "data")
    # In Docker a client agent that left is as good as new: its data is its node id alone.
    time.sleep(1)
    cluster.start("agent1")
    until(lambda: answers(agent), 30, "the agent is back")
    took = until(lambda: len(keys(agent, prefix)) == 2, INTERVAL + SLACK, "both are back")
    print(f"{liveness}: back {took:.2f} s after the agent")
    time.sleep(INTERVAL)
    assert len(keys(agent, prefix)) == 2


def test_a_process_suspended_for_longer_than_its_lease_lives(
    join: Callable[..., Matchmaker], agent: Node, prefix: str, short_ttl: float
) -> None:
    """As a laptop that slept: gone after 2 x TTL, back within a renewal interval of waking up."""
    reader = join()
    url = f"consul+kv://{agent.http}/{prefix}?session_ttl_seconds={short_ttl:g}"
    with RegisteringProcess(url) as process:
        process.register("scheduler", "10.0.0.1:9501")
        until(lambda: hosts(reader, "scheduler") == ["10.0.0.1:9501"], SOON, "there")
        os.kill(process.pid, signal.SIGSTOP)
        gone = until(lambda: hosts(reader, "scheduler") == [], 2 * short_ttl + 1, "gone")
        os.kill(process.pid, signal.SIGCONT)
        within = short_ttl / 3 + SLACK
        back = until(lambda: hosts(reader, "scheduler") == ["10.0.0.1:9501"], within, "back")
        print(f"gone after {gone:.2f} s, back {back:.2f} s after SIGCONT")
        assert len(keys(agent, prefix)) == 1


def test_consul_absent_when_the_process_starts(
    cluster: Cluster, join: Callable[..., Matchmaker], agent: Node, prefix: str
) -> None:
    """Registered while nobody listens; the agent comes later, and that is all it takes."""
    cluster.kill("agent1")
    owner = join("&liveness=check")
    registration = owner.register("scheduler", "10.0.0.1:9501")
    assert registration.state == "pending"
    with pytest.raises(errors.TimedOut):
        registration.wait_until_published(timeout_seconds=2)
    cluster.start("agent1")
    until(lambda: answers(agent), 30, "the agent is back")
    registration.wait_until_published(timeout_seconds=INTERVAL + SLACK)
    assert len(keys(agent, prefix)) == 1


def test_another_agent_takes_over_with_its_own_check(
    cluster: Cluster, join: Callable[..., Matchmaker], agent: Node, prefix: str
) -> None:
    """With several addresses, check and session are always on the same agent: the first one dead,
    both are made anew at the second."""
    second = cluster.nodes["server1"]
    url = f"consul+kv://{agent.http},{second.http}/{prefix}?liveness=check"
    with Matchmaker.from_url(url) as owner:
        owner.register("scheduler", "10.0.0.1:9501").wait_until_published(timeout_seconds=5)
        lease = lease_of(owner)
        cluster.kill("agent1")
        took = until(
            # A dead node's sessions end when gossip has found out (fact B5: 5.3 s).
            lambda: lease_of_or_none(owner) not in (None, lease) and len(keys(second, prefix)) == 1,
            15,
            "under another lease at the second agent",
        )
        print(f"moved after {took:.2f} s")
        time.sleep(2)
        assert len(keys(second, prefix)) == 1


def lease_of_or_none(matchmaker: Matchmaker) -> object:
    keeper = matchmaker.status()["keeper"]
    assert isinstance(keeper, dict)
    return keeper["lease"]


def test_sweep_finds_what_nobody_will_remove(
    join: Callable[..., Matchmaker], agent: Node, prefix: str
) -> None:
    """A lock given back is found and removed; a foreign key is found, and stays."""
    owner = join()
    owner.register("scheduler", "10.0.0.1:9501").wait_until_published(timeout_seconds=5)
    owner.register("conductor", "10.0.0.1:9501").wait_until_published(timeout_seconds=5)
    (given_back,) = (key for key in keys(agent, prefix) if "/conductor/" in key)
    lease = lease_of(owner)
    tell(agent, "PUT", f"/v1/kv/{given_back}?release={lease}")
    tell(agent, "PUT", f"/v1/kv/{prefix}/by-hand", "x")
    orphans, removed = sweep(owner.settings, remove=True)
    assert (set(orphans), removed) == ({given_back, f"{prefix}/by-hand"}, [given_back])
    orphans, removed = sweep(owner.settings, remove=False)
    assert (set(orphans), removed) == ({f"{prefix}/by-hand"}, [])
    until(lambda: len(keys(agent, prefix)) == 3, INTERVAL + SLACK, "its owner has it back")
