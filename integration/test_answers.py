"""Answers through a whole Matchmaker on a real cluster: outages make them old, never empty."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from consul_matchmaker import Matchmaker, Snapshot, errors
from consul_matchmaker.testing.consul_probe import Node, request
from integration.cluster import Cluster, ask
from integration.readers import (
    HOSTS,
    SCHEDULER_SECONDS,
    TIMEOUT_SECONDS,
    TTL_SECONDS,
    Load,
    Operators,
    matchmaker,
    published,
)
from integration.waiting import until


@pytest.fixture(params=["catalog", "kv", "kv without a watch"])
def reader(
    request: pytest.FixtureRequest, cluster: Cluster, agent: Node, prefix: str, topic: str
) -> Iterator[Matchmaker]:
    """A matchmaker in each mode, for a topic that three hosts serve."""
    if request.param == "catalog":
        with Operators(agent, topic), matchmaker("catalog", agent.dns) as reader:
            until(lambda: len(reader.hosts(topic)) == len(HOSTS), 10)
            yield reader
            if cluster.is_disturbed:
                cluster.mend()
        return
    watch = request.param == "kv"
    owner = matchmaker("kv", agent.http, prefix=prefix)
    reader = matchmaker("kv", agent.http, prefix=prefix, watch=watch)
    with owner, reader:
        for host in HOSTS:
            owner.register(topic, host).wait_until_published(timeout_seconds=10)
        yield reader


def test_an_agent_that_hangs_makes_answers_old(
    cluster: Cluster, reader: Matchmaker, topic: str
) -> None:
    """SIGSTOP under load: no failed lookup and none that waits, every answer stale and ever older;
    fresh again within a TTL after it goes on."""
    with Load(reader, topic) as load:
        time.sleep(1)
        before = load.waited
        cluster.pause("agent1")
        # With a watch: when its poll is overdue, 2 x 17/16 + 3 s after the last answer.
        until(lambda: reader.hosts(topic).is_stale, 7 if reader.settings.watch else 3)
        # What the agent sent before it stopped may be read only now: a question ends by then.
        time.sleep(TIMEOUT_SECONDS)
        first = reader.hosts(topic).age_seconds
        time.sleep(8)
        held = reader.hosts(topic)
        assert held.age_seconds >= first + 7
        assert held.is_stale
        assert load.waited == before
        cluster.resume("agent1")
        until(lambda: not reader.hosts(topic).is_stale, TTL_SECONDS + SCHEDULER_SECONDS)
    assert load.failures == []
    assert load.longest < TIMEOUT_SECONDS, "as long as a question that hangs"


def test_an_agent_that_is_dead_makes_answers_old(
    cluster: Cluster, reader: Matchmaker, topic: str
) -> None:
    """SIGKILL: closed connections are noticed at once, and the last answer is served."""
    with Load(reader, topic) as load:
        time.sleep(0.5)
        cluster.kill("agent1")
        until(lambda: reader.hosts(topic).is_stale, 2 * TTL_SECONDS + TIMEOUT_SECONDS)
        time.sleep(3)
        assert reader.hosts(topic).is_stale
        assert load.failures == []
        states = reader.status()["cache"]["states"]  # type: ignore[index]
        assert states["away"] == 1


def test_a_dead_leader_is_not_noticed(cluster: Cluster, reader: Matchmaker, topic: str) -> None:
    """SIGKILL of the leader, and its return: no failed lookup and no missing host, although the
    restarted server denies live services for seconds (fact A9)."""
    with Load(reader, topic) as load:
        time.sleep(0.5)
        leader = cluster.leader()
        cluster.kill(leader)
        time.sleep(6)
        cluster.start(leader)
        cluster.wait_ready()
        time.sleep(6)
    assert load.failures == []


@pytest.fixture
def without_a_leader(cluster: Cluster) -> Callable[[], None]:
    """Takes two of three servers away, and returns when the one that is left knows no leader.  What
    was written before, it knows: Consul says when two of three do."""
    left = cluster.nodes["server3"]

    def applied(node: Node) -> int:
        return int(ask(node, "/v1/agent/self")["Stats"]["raft"]["applied_index"])

    def take_away() -> None:
        newest = max(applied(node) for node in cluster.nodes.values() if node.is_server)
        until(lambda: applied(left) >= newest, 10, "a server that knows what the others do")
        for name in ("server1", "server2"):
            cluster.kill(name)
        until(lambda: request(left, "GET", "/v1/status/leader") == (200, '""'), 60, "no leader")

    return take_away


@pytest.mark.finding("A6")
def test_dns_answers_on_without_a_leader_and_cannot_tell(
    cluster: Cluster, agent: Node, topic: str, without_a_leader: Callable[[], None]
) -> None:
    """As the failure table says: what the server that is left knew is answered, complete and not
    stale, as nothing in a DNS answer tells it from one of a cluster that is well."""
    with Operators(agent, topic), matchmaker("catalog", agent.dns) as reader:
        until(lambda: len(reader.hosts(topic)) == len(HOSTS), 10)
        without_a_leader()
        with matchmaker("catalog", agent.dns) as new:

            def answered() -> Snapshot | None:
                with contextlib.suppress(errors.Unavailable):
                    return new.hosts(topic)
                return None

            until(answered, 30, "an answer without a leader")
            answer = new.hosts(topic)
            assert len(answer) == len(HOSTS)
            assert answer.is_complete and answer.confirmed
        cluster.mend()  # before the operators take their instances back


@pytest.mark.finding("A7")
def test_a_stale_read_needs_no_leader(
    agent: Node, prefix: str, topic: str, without_a_leader: Callable[[], None]
) -> None:
    """With consistency=stale an empty topic is answered too, though nobody leads."""
    with matchmaker("kv", agent.http, prefix=prefix) as owner:
        owner.register(topic, HOSTS[0]).wait_until_published(timeout_seconds=10)
        without_a_leader()
        with matchmaker(
            "kv", agent.http, prefix=prefix, consistency="stale", watch=False
        ) as reader:

            def answered() -> bool:
                with contextlib.suppress(errors.Unavailable):
                    return reader.hosts(f"{topic}-empty").hosts == ()
                return False

            until(answered, 30, "an answer of any server")
            for number in range(5):
                began = time.monotonic()
                assert reader.hosts(f"{topic}-empty{number}").hosts == ()
                assert time.monotonic() - began < TIMEOUT_SECONDS


@pytest.mark.finding("E19")
def test_many_are_closed_before_one_of_their_polls_ends(
    agent: Node, prefix: str, topic: str
) -> None:
    """Closing waits for no answer of Consul, so closing one after the other does not either."""
    poll_seconds = 10.0

    def is_watching(each: Matchmaker) -> object:
        watcher = each.status()["watcher"]
        return isinstance(watcher, dict) and watcher["is_watching"]

    with contextlib.ExitStack() as stack:
        many = [
            stack.enter_context(matchmaker("kv", agent.http, prefix=prefix, ttl_seconds=10))
            for _ in range(20)
        ]
        for each in many:
            each.hosts(topic)
        until(lambda: all(is_watching(each) for each in many), 10)
        began = time.monotonic()
    assert all(each.status()["is_closed"] for each in many)
    assert time.monotonic() - began < poll_seconds / 2


def test_health_checks_decide_in_catalog_mode(agent: Node, topic: str) -> None:
    """A host whose check turns critical disappears, and comes back when it passes; the last one
    disappears after its absence was confirmed."""
    with Operators(agent, topic) as operators, matchmaker("catalog", agent.dns) as mm:
        mm.wait_for_hosts(topic, timeout_seconds=10)

        def shows(*hosts: str) -> Callable[[], bool]:
            return lambda: tuple(map(str, mm.hosts(topic))) == hosts

        until(shows(*HOSTS), 5)
        operators.set_health(HOSTS[0], "fail")
        until(shows(*HOSTS[1:]), TTL_SECONDS + 2)
        operators.set_health(HOSTS[0], "pass")
        until(shows(*HOSTS), TTL_SECONDS + 2)
        for host in HOSTS:
            operators.set_health(host, "fail")
        confirm_seconds = mm.settings.confirm_empty_seconds
        gone = until(shows(), TTL_SECONDS + confirm_seconds + 5)
        assert gone > confirm_seconds - 1
        with pytest.raises(errors.NoLiveHosts):
            mm.pick(topic)


def test_an_unknown_topic_delays_no_other(reader: Matchmaker, topic: str) -> None:
    """While threads ask for topics nobody serves, the known one is answered from memory."""
    with Load(reader, topic) as load:
        time.sleep(1)
        before = load.waited
        for number in range(30):
            assert reader.hosts(f"nobody-{number}-here").hosts == ()
            time.sleep(0.02)
        assert load.waited == before + 30, "one for each that was not known"
    assert load.failures == []
    assert load.longest < TIMEOUT_SECONDS


def test_explain_names_whom_it_asked(reader: Matchmaker, agent: Node, topic: str) -> None:
    """The agent, the transport and the counts of the answer that is held; fit for json."""
    told = json.loads(json.dumps(reader.explain(topic)))
    assert told["state"] == "fresh"
    assert {each["host"] for each in told["answer"]["hosts"]} == set(HOSTS)
    details = told["answer"]["details"]
    if reader.settings.mode == "catalog":
        asked = details["asked"][0]
        assert (asked["agent"], asked["rcode"], asked["records"]) == (agent.dns, "NOERROR", 3)
        assert asked["transport"] in ("udp", "tcp")
    else:
        assert (details["agent"], details["transport"]) == (agent.http, "http")
        assert details["keys"] >= 3


def test_what_is_asked_is_counted_and_a_cached_lookup_is_not(
    reader: Matchmaker, topic: str
) -> None:
    """Ten topics asked for move the counters by ten; asked for again, they move nothing."""
    settings = replace(
        reader.settings,
        watch=False,
        ttl_seconds=60,
        empty_ttl_seconds=60,
        request_timeout_seconds=60,  # nothing is sent again for a tenth of it
    )
    others = [f"nobody-{number}-{topic}"[:60] for number in range(9)]
    with Matchmaker(settings) as mm:

        def counted() -> dict[str, int]:
            sums: Counter[str] = Counter()
            for counts in mm.status()["wire"].values():  # type: ignore[attr-defined]
                sums.update(counts)
            return sums

        def queries() -> int:
            counts = counted()
            return counts["queries"] - counts["retries"] - counts["error_replies"]

        mm.hosts(topic)
        one = counted()
        assert one["replies"] >= 1
        assert one["sent_bytes"] > 0
        assert one["received_bytes"] > 0
        each = queries()
        for other in others:
            mm.hosts(other)
        # Over HTTP an answer without keys is made sure of: that it is not ACLs which hide them.
        ten = each + len(others) * (1 if settings.mode == "catalog" else 2)
        assert queries() == ten
        before = counted()
        for name in (topic, *others) * 100:
            mm.hosts(name)
        assert counted() == before


def test_a_cold_start_while_consul_hangs(
    cluster: Cluster, reader: Matchmaker, topic: str, tmp_path: Path
) -> None:
    """The answers of the process before are there within 50 ms, marked disk, until Consul is back;
    with the file cut they are not."""
    settings = replace(reader.settings, state_path=str(tmp_path))
    with Matchmaker(settings) as before:
        assert len(before.hosts(topic)) == len(HOSTS)
    with Matchmaker(settings) as well:
        assert well.hosts(topic).source != "disk"
    cluster.pause("agent1")
    seconds = []
    for _ in range(5):  # the machine may stop during one of them
        with Matchmaker(settings) as cold:
            began = time.monotonic()
            answer = cold.hosts(topic)
            seconds.append(time.monotonic() - began)
            assert tuple(map(str, answer)) == HOSTS
            assert (answer.source, answer.is_stale, answer.confirmed) == ("disk", True, False)
            cold.close(timeout_seconds=0)
    print(f"{settings.mode}: {min(seconds) * 1000:.1f} ms")
    assert min(seconds) < 0.05
    with Matchmaker(settings) as cold:
        assert cold.hosts(topic).source == "disk"
        cluster.resume("agent1")
        until(lambda: cold.hosts(topic).source != "disk", 5)
    cluster.pause("agent1")
    (file,) = tmp_path.glob("*.answer")
    file.write_bytes(file.read_bytes()[:-1])
    with Matchmaker(settings) as cold, pytest.raises(errors.Unavailable):
        cold.hosts(topic)
    cluster.resume("agent1")


def test_a_host_that_refuses_connections_is_avoided_by_all(
    agent: Node, prefix: str, topic: str
) -> None:
    """After its first failure nobody is sent there during its quarantine, then one caller is; with
    all hosts rejected callers still get hosts."""
    with contextlib.ExitStack() as stack:
        listeners = [  # nobody accepts: the kernel does, up to the backlog
            stack.enter_context(socket.create_server(("127.0.0.1", 0), backlog=2000))
            for _ in range(4)
        ]
        hosts = [f"127.0.0.1:{each.getsockname()[1]}" for each in listeners]
        published(stack, agent, prefix, topic, hosts)
        mm = stack.enter_context(
            matchmaker("kv", agent.http, prefix=prefix, quarantine_seconds=4, ttl_seconds=5)
        )
        until(lambda: len(mm.hosts(topic)) == len(hosts), 5)
        bad = hosts[0]
        listeners[0].close()
        sent: Counter[str] = Counter()
        failed_at: list[float] = []
        ends = time.monotonic() + 7

        def call() -> None:
            while time.monotonic() < ends:
                with contextlib.suppress(ConnectionError), mm.using(topic) as host:
                    sent[str(host)] += 1
                    try:
                        assert host.port is not None
                        socket.create_connection((host.address, host.port), 1).close()
                    except ConnectionError:
                        failed_at.append(time.monotonic())
                        raise
                time.sleep(0.02)

        threads = [threading.Thread(target=call) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
        rest = [at - failed_at[0] for at in failed_at]
        # Callers that were on their way there when the first one failed.
        at_once = [at for at in rest if at < 2]
        assert len(at_once) <= len(threads)
        later = [at for at in rest if at >= 2]
        assert len(later) == 1, rest
        assert later[0] >= 4 * 0.8
        assert all(sent[host] > 50 for host in hosts[1:])
        assert sent[bad] == len(rest)
        for host in hosts:
            mm.reject(topic, host)
        assert {str(mm.pick(topic)) for _ in range(20)} == set(hosts)
