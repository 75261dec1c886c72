"""Registrations against a real Consul: they appear at once, leave in time, and heal themselves."""

import contextlib
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable

import pytest

from consul_matchmaker import Matchmaker, Registration, errors
from consul_matchmaker.answers.belief import BETWEEN_DOUBTS_SECONDS, RETURN_SECONDS
from consul_matchmaker.cli.sweep import sweep
from consul_matchmaker.testing.consul_probe import Node, wait_until
from integration.access_rules import MANAGEMENT, new_token
from integration.cluster import Cluster, ask, keys, tell
from integration.registering_process import RegisteringProcess
from integration.registrations import (
    CRASH_SECONDS,
    INTERVAL,
    SLACK,
    SOON,
    TTL,
    Sampler,
    answers,
    delete_key,
    destroy_session,
    hosts,
    lease_of,
    repairs,
)
from integration.waiting import until

# A watching reader, and one that asks Consul again every quarter of a second.
READERS = {"watching": "", "asking": "&watch=false&ttl_seconds=0.25&empty_ttl_seconds=0.25"}


@pytest.mark.docker
def test_processes_come_crash_end_restart_and_fork(
    url: str, join: Callable[..., Matchmaker], agent: Node, prefix: str
) -> None:
    """Seen within 1 s; killed: gone within 2 x TTL + 1 s for every reader; ended without close:
    gone within 1 s; restarted at the same host:port: visible within 1 s and for good; a forked
    child has nothing, and its exit takes nothing."""
    crashing, ending, restarting, forking = (f"10.0.0.{n}:9501" for n in range(1, 5))
    readers = {name: join(extra) for name, extra in READERS.items()}
    for reader in readers.values():
        assert hosts(reader, "scheduler") == []
    with contextlib.ExitStack() as stack:
        processes = {}
        for host in (crashing, ending, restarting, forking):
            processes[host] = stack.enter_context(RegisteringProcess(url))
            processes[host].register("scheduler", host)
        for name, reader in readers.items():
            until(lambda reader=reader: len(hosts(reader, "scheduler")) == 4, SOON, name)  # type: ignore[misc]

        with Sampler(readers, "scheduler") as sampler:
            processes[crashing].kill()
            processes[restarting].kill()
            killed_at = time.monotonic()
            (old_key,) = (key for key in keys(agent, prefix) if "10_2e0_2e0_2e3" in key)

            successor = stack.enter_context(RegisteringProcess(url))
            visible_after = successor.register("scheduler", restarting)
            assert old_key in keys(agent, prefix), "the dead predecessor still holds its key"
            assert len([key for key in keys(agent, prefix) if "10_2e0_2e0_2e3" in key]) == 2

            assert processes[ending].end() == 0
            ended_at = time.monotonic()
            child = processes[forking].ask("fork")
            until(
                lambda: len(keys(agent, prefix)) == 2,
                killed_at + CRASH_SECONDS - time.monotonic(),
                "only the successor and the forking one are left",
            )
            time.sleep(1.0)  # now that the predecessor's session is gone: does the successor stay?

        crash = {name: sampler.last_with(name, crashing) - killed_at for name in readers}
        end = {name: sampler.last_with(name, ending) - ended_at for name in readers}
        print(f"restarted: {visible_after:.2f} s; killed: {crash}; ended: {end}")
        assert child == {"threads": ["MainThread"], "lease": None, "wanted": []}
        assert max(crash.values()) <= CRASH_SECONDS
        assert max(end.values()) <= SOON
        assert visible_after <= SOON
        assert sampler.always(restarting)
        assert sampler.always(forking)
        for reader in readers.values():
            assert hosts(reader, "scheduler") == [restarting, forking]
        assert len(keys(agent, prefix)) == 2


def test_two_topics_in_one_process_one_unregistered(
    join: Callable[..., Matchmaker], agent: Node, prefix: str
) -> None:
    """The other topic's key is not even written again."""
    owner, reader = join(), join()
    owner.register("scheduler", "10.0.0.1:9501").wait_until_published(timeout_seconds=5)
    owner.register("conductor", "10.0.0.1:9501").wait_until_published(timeout_seconds=5)
    assert hosts(reader, "scheduler") == hosts(reader, "conductor") == ["10.0.0.1:9501"]
    (kept,) = (key for key in keys(agent, prefix) if "/conductor/" in key)
    (before,) = ask(agent, f"/v1/kv/{kept}")
    owner.unregister("scheduler", "10.0.0.1:9501")
    until(lambda: hosts(reader, "scheduler") == [], SOON, "unregistered is gone")
    assert keys(agent, prefix) == [kept]
    assert ask(agent, f"/v1/kv/{kept}") == [before]
    assert hosts(reader, "conductor") == ["10.0.0.1:9501"]


def test_session_destroyed_key_deleted_host_expired(
    join: Callable[..., Matchmaker],
    agent: Node,
    prefix: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Each is back within one renewal interval, with one log line that says why."""
    losing_session, losing_key, expired, reader = join(), join(), join(), join()
    owners = {
        "10.0.0.1:9501": losing_session,
        "10.0.0.2:9501": losing_key,
        "10.0.0.3:9501": expired,
    }
    for host, owner in owners.items():
        for topic in ("scheduler", "conductor"):
            owner.register(topic, host).wait_until_published(timeout_seconds=5)
    until(lambda: hosts(reader, "scheduler") == list(owners), SOON, "all are there")
    session = lease_of(losing_session)
    (key,) = (k for k in keys(agent, prefix) if "/scheduler/10_2e0_2e0_2e2" in k)

    destroy_session(agent, session)
    delete_key(agent, key)
    assert reader.expire("scheduler", "10.0.0.3:9501") == 1
    assert len(keys(agent, prefix)) == 2
    took = until(lambda: len(keys(agent, prefix)) == 6, INTERVAL + SLACK, "all are back")
    until(lambda: hosts(reader, "scheduler") == list(owners), SOON, "and seen")

    print(f"back after {took:.2f} s; {repairs(caplog)}")
    until(lambda: len(repairs(caplog)) >= 3, SOON, "three lines")
    assert len(repairs(caplog)) == 3
    deleted, expiry, lost = sorted(repairs(caplog))
    assert lost.startswith(f"lease {session[:8]}… lost (Consul does not know it any more)")
    assert "published 2 registrations again after" in lost
    for line, host in ((deleted, "10.0.0.2:9501"), (expiry, "10.0.0.3:9501")):
        assert line.startswith(f"Consul did not hold scheduler at {host} any more")
        assert "published 1 registration again after" in line
    assert lease_of(losing_session) != session


def test_closing_leaves_neither_key_nor_session(
    join: Callable[..., Matchmaker], agent: Node, prefix: str
) -> None:
    """Gone for a watching reader at once, not after a TTL."""
    owner, reader = join(), join()
    owner.register("scheduler", "10.0.0.1:9501").wait_until_published(timeout_seconds=5)
    until(lambda: hosts(reader, "scheduler") == ["10.0.0.1:9501"], SOON, "there")
    session = lease_of(owner)
    assert [s["ID"] for s in ask(agent, f"/v1/session/info/{session}")] == [session]
    owner.close()
    until(lambda: hosts(reader, "scheduler") == [], SOON, "gone")
    assert keys(agent, prefix) == []
    assert ask(agent, f"/v1/session/info/{session}") == []


def test_leader_killed_while_registering_and_looking_up(
    cluster: Cluster, join: Callable[..., Matchmaker], agent: Node, prefix: str
) -> None:
    """No failed lookup of a known topic in four threads; what was registered before and during
    the election is there afterwards, once."""
    owner, reader = join(), join()
    first = owner.register("scheduler", "10.0.0.1:9501")
    first.wait_until_published(timeout_seconds=5)
    until(lambda: hosts(reader, "scheduler") == ["10.0.0.1:9501"], SOON, "there")
    failed: list[object] = []
    lookups = [0] * 4
    done = threading.Event()

    def look_up(number: int) -> None:
        while not done.wait(0.002):
            lookups[number] += 1
            try:
                found = hosts(reader, "scheduler")
            except errors.MatchmakerError as error:
                failed.append(error)
            else:
                if "10.0.0.1:9501" not in found:
                    failed.append(found)

    threads = [threading.Thread(target=look_up, args=[number]) for number in range(4)]
    for thread in threads:
        thread.start()
    try:
        cluster.kill(cluster.leader())
        late: list[Registration] = []
        for port in range(9502, 9507):
            late.append(owner.register("scheduler", f"10.0.0.1:{port}"))
        for registration in late:
            registration.wait_until_published(timeout_seconds=30)
        cluster.leader()
        until(lambda: len(hosts(reader, "scheduler")) == 6, INTERVAL + SLACK, "all are seen")
    finally:
        done.set()
        for thread in threads:
            thread.join()
    assert failed == []
    assert min(lookups) > 100
    assert len(keys(agent, prefix)) == 6


@pytest.mark.docker
@pytest.mark.parametrize("graceful", [False, True], ids=["killed", "left"])
def test_agent_away_and_back(
    cluster: Cluster,
    join: Callable[..., Matchmaker],
    agent: Node,
    prefix: str,
    graceful: bool,
) -> None:
    """Killed or left gracefully (which ends its sessions), then started again: all registrations
    are back within one renewal interval, once each; so is one whose process started meanwhile,
    which could say why it waited."""
    owner = join()
    before = [owner.register("scheduler", f"10.0.0.1:{port}") for port in (9501, 9502)]
    for registration in before:
        registration.wait_until_published(timeout_seconds=5)
    (cluster.stop if graceful else cluster.kill)("agent1")
    newcomer = join()
    began = time.monotonic()
    new = newcomer.register("scheduler", "10.0.0.2:9501")
    assert time.monotonic() - began < 5, "register never waits for Consul"
    with pytest.raises(errors.TimedOut, match=r"within 1 s: .*refused|reset|closed|Consul"):
        new.wait_until_published(timeout_seconds=1)
    time.sleep(INTERVAL)  # long enough for a renewal to fail
    cluster.start("agent1")
    until(lambda: answers(agent), 30, "the agent is back")
    took = until(lambda: len(keys(agent, prefix)) == 3, INTERVAL + SLACK, "all are back")
    new.wait_until_published(timeout_seconds=1)
    print(f"all back {took:.2f} s after the agent")
    with Matchmaker.from_url(f"consul+kv://{agent.http}/{prefix}") as reader:
        until(
            lambda: (
                hosts(reader, "scheduler") == ["10.0.0.1:9501", "10.0.0.1:9502", "10.0.0.2:9501"]
            ),
            SOON,
            "and seen",
        )
    time.sleep(INTERVAL)
    assert len(keys(agent, prefix)) == 3, "exactly one key a registration, also later"
    wait_until(lambda: cluster.wait_ready(), 30)


def test_an_agent_that_hangs_delays_nobody_and_loses_nothing(
    cluster: Cluster, join: Callable[..., Matchmaker], agent: Node, prefix: str
) -> None:
    """Longer than the TTL without any answer: register returns at once, close in time, and the
    lease is the same one afterwards, for only Consul's word ends it."""
    owner, leaving, reader = join(), join(), join()
    owner.register("scheduler", "10.0.0.1:9501").wait_until_published(timeout_seconds=5)
    leaving.register("scheduler", "10.0.0.2:9501").wait_until_published(timeout_seconds=5)
    until(lambda: len(hosts(reader, "scheduler")) == 2, SOON, "both are there")
    lease = lease_of(owner)
    cluster.pause("agent1")
    paused_at = time.monotonic()
    added = owner.register("conductor", "10.0.0.1:9501")
    leaving.close(timeout_seconds=1)
    assert time.monotonic() - paused_at < 5  # one call that waited would have taken 10
    with pytest.raises(errors.TimedOut):
        added.wait_until_published(timeout_seconds=TTL + 2)
    assert len(hosts(reader, "scheduler")) == 2
    cluster.resume("agent1")
    until(lambda: answers(agent), 30, "the agent is back")
    added.wait_until_published(timeout_seconds=INTERVAL + SLACK)
    assert lease_of(owner) == lease
    until(
        lambda: len(keys(agent, prefix)) == 2, CRASH_SECONDS, "what could not leave ends by its TTL"
    )


def test_quorum_lost_for_a_minute(
    cluster: Cluster,
    join: Callable[..., Matchmaker],
    agent: Node,
    prefix: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Much longer than a lease lives, with every liveness: nothing is given up meanwhile, and
    everything is there within a renewal interval of the quorum's return, once, together with what
    was registered and without what was unregistered in between."""
    owners = {
        "10.0.0.1:9501": join("&liveness=session"),
        "10.0.0.2:9501": join("&liveness=node"),
        "10.0.0.3:9501": join("&liveness=check"),
    }
    # While its watch is not back, a reader asks again when its TTL is over: soon.
    reader = join("&ttl_seconds=1")
    for host, owner in owners.items():
        for topic in ("scheduler", "conductor"):
            owner.register(topic, host).wait_until_published(timeout_seconds=5)
    until(lambda: hosts(reader, "scheduler") == list(owners), SOON, "all are there")
    until(lambda: hosts(reader, "conductor") == list(owners), SOON, "of the other topic, too")
    leases = [lease_of(owner) for owner in owners.values()]
    leader = cluster.leader()
    follower = next(n for n in cluster.nodes if n.startswith("server") and n != leader)
    cluster.kill(leader)
    cluster.kill(follower)
    added = []
    for host, owner in owners.items():
        owner.unregister("conductor", host)
        added.append(owner.register("engine", host))
    time.sleep(60)
    assert hosts(reader, "scheduler") == hosts(reader, "conductor") == list(owners)
    assert [lease_of(owner) for owner in owners.values()] == leases
    cluster.start(leader)
    cluster.start(follower)
    until(lambda: answers(agent), 30, "there is a leader again")

    def is_true_again() -> bool:
        shown = {topic: hosts(reader, topic) for topic in ("scheduler", "conductor", "engine")}
        return shown == {"scheduler": list(owners), "conductor": [], "engine": list(owners)}

    def held() -> list[str]:
        return sorted(key.split("/")[1] for key in keys(agent, prefix))

    wanted = ["engine"] * 3 + ["scheduler"] * 3
    took = until(lambda: held() == wanted, INTERVAL + SLACK, "what is wanted is what Consul holds")
    for registration in added:
        registration.wait_until_published(timeout_seconds=1)
    # Three hosts that leave a topic at once are believed when Consul has said so for a while.
    until(is_true_again, RETURN_SECONDS + BETWEEN_DOUBTS_SECONDS + SOON, "and what is seen")
    print(f"back {took:.2f} s after the quorum; {repairs(caplog)}")
    time.sleep(INTERVAL)
    assert is_true_again()
    assert len(keys(agent, prefix)) == 2 * len(owners), "one entry each, no duplicate"
    assert sweep(reader.settings, remove=False) == ({}, [])
    for owner in owners.values():
        keeper = owner.status()["keeper"]
        assert isinstance(keeper, dict)
        kinds = [event["kind"] for event in keeper["events"]]
        # A new leader gives every session a fresh TTL (fact B2): as a rule nothing was lost.
        assert kinds.count("repaired") == kinds.count("lost") <= 1
        assert kinds.count("overdue") == 1, "said once, however long it takes"


@pytest.mark.finding("E4")
def test_a_signal_handler_that_closes_never_hangs(url: str, agent: Node, prefix: str) -> None:
    """2,000 real signals, whatever the main thread is calling: close() works or refuses at once."""
    command = [sys.executable, "-m", "integration.closing_process", url]
    with subprocess.Popen(command, stdout=subprocess.PIPE, bufsize=0) as process:
        try:
            assert process.stdout is not None
            answers = [process.stdout.read(1)]
            assert answers == [b"+"]
            for _ in range(2000):
                process.send_signal(signal.SIGUSR1)
                ready, _, _ = select.select([process.stdout], [], [], 20)
                assert ready, "it hangs"
                answers.append(process.stdout.read(1))
            process.send_signal(signal.SIGTERM)
            assert process.wait(20) == 0
        finally:
            process.kill()
    print(f"{answers.count(b'r')} refused, {answers.count(b'c')} closed")
    assert set(answers) <= {b"+", b"r", b"c"}
    assert b"r" in answers
    assert keys(agent, prefix) == []


@pytest.mark.finding("E1")
def test_a_registration_that_the_token_may_not_have_is_refused_alone(
    guarded: Node,
) -> None:
    """The permitted one beside it is published, and comes back when its key is deleted."""
    rules = (
        'key_prefix "alone/allowed/" { policy = "write" } session_prefix "" { policy = "write" }'
    )
    _, token = new_token(guarded, rules)
    url = f"consul+kv://:{token}@{guarded.http}/alone?watch=no&session_ttl_seconds=10"
    with Matchmaker.from_url(url) as owner:
        refused = owner.register("refused", "10.0.0.1:9501")
        allowed = owner.register("allowed", "10.0.0.1:9501")
        allowed.wait_until_published(timeout_seconds=10)
        until(lambda: refused.state == "refused", 10, "refused")
        (key,) = keys(guarded, "alone", token=MANAGEMENT)
        tell(guarded, "DELETE", f"/v1/kv/{key}", token=MANAGEMENT)
        until(
            lambda: keys(guarded, "alone", token=MANAGEMENT) == [key],
            INTERVAL + SLACK,
            "back",
        )
        until(lambda: allowed.state == "published", SOON, "and its owner has heard of it")
        assert refused.state == "refused"
