"""Answers through a whole Matchmaker on a real cluster: outages make them old, never empty."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from consul_matchmaker import Host, Matchmaker, Settings, Snapshot, errors
from consul_matchmaker.demo.consul_probe import Node, request
from integration.cluster import Cluster

HOSTS = ("10.0.0.1:5001", "10.0.0.2:5002", "10.0.0.3:5003")
TTL_SECONDS = 1.0
TIMEOUT_SECONDS = 2.0


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


def matchmaker(mode: str, address: str, **values: object) -> Matchmaker:
    settings = {
        "mode": mode,
        "addresses": (Host.parse(address),),
        "ttl_seconds": TTL_SECONDS,
        "request_timeout_seconds": TIMEOUT_SECONDS,
        **values,
    }
    return Matchmaker(Settings(**settings))  # type: ignore[arg-type]


class Operators:
    """What operators define: one service, an instance for each of `HOSTS`, with a check."""

    def __init__(self, agent: Node, topic: str) -> None:
        self._agent, self._topic = agent, topic

    def __enter__(self) -> Operators:
        for host in HOSTS:
            address, _, port = host.rpartition(":")
            definition = {
                "ID": self.id_of(host),
                "Name": self._topic,
                "Address": address,
                "Port": int(port),
                "Check": {"CheckID": self.id_of(host), "TTL": "10m", "Status": "passing"},
            }
            self.put("/v1/agent/service/register", json.dumps(definition))
        return self

    def __exit__(self, *exc_info: object) -> None:
        for host in HOSTS:
            self.put(f"/v1/agent/service/deregister/{self.id_of(host)}")

    def id_of(self, host: str) -> str:
        return f"{self._topic}-{host.rpartition(':')[2]}"

    def set_health(self, host: str, status: str) -> None:
        self.put(f"/v1/agent/check/{status}/{self.id_of(host)}")

    def put(self, path: str, body: str | None = None) -> None:
        status, text = request(self._agent, "PUT", path, body)
        assert status == 200, text


class Load:
    """Four threads that look up all the time, and note what they got and how long it took."""

    def __init__(self, reader: Matchmaker, topic: str) -> None:
        self._reader, self._topic = reader, topic
        self._is_ended = False
        self.failures: list[BaseException | Snapshot] = []
        self.seconds: list[float] = []
        self._threads = [threading.Thread(target=self._run, daemon=True) for _ in range(4)]

    def __enter__(self) -> Load:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._is_ended = True
        for thread in self._threads:
            thread.join(10)

    def p99(self) -> float:
        """Of the lookups since the last call; in seconds."""
        seconds, self.seconds = sorted(self.seconds), []
        return seconds[int(len(seconds) * 0.99)]

    def _run(self) -> None:
        while not self._is_ended:
            began = time.perf_counter()
            try:
                found = self._reader.hosts(self._topic)
                if tuple(map(str, found)) != HOSTS:
                    self.failures.append(found)
                self._reader.pick(self._topic)
            except errors.MatchmakerError as error:
                self.failures.append(error)
            self.seconds.append(time.perf_counter() - began)
            time.sleep(0.002)


def until(claim: Callable[[], bool], seconds: float) -> float:
    """How long it took until *claim* was true; fails after *seconds*."""
    began = time.monotonic()
    while not claim():
        assert time.monotonic() - began < seconds, f"not so after {seconds:g} s"
        time.sleep(0.02)
    return time.monotonic() - began


def test_an_agent_that_hangs_makes_answers_old(
    cluster: Cluster, reader: Matchmaker, topic: str
) -> None:
    """SIGSTOP under load: no failed lookup, every answer stale and ever older, none slower; fresh
    again within a TTL (and the timeout of the question that hung) after it goes on."""
    with Load(reader, topic) as load:
        time.sleep(1)
        before = load.p99()
        cluster.pause("agent1")
        # A watch notices that nothing comes when its poll is overdue, which it learns at the end of
        # the poll; without one, a TTL is enough.
        if not reader.settings.watch:
            until(lambda: reader.hosts(topic).is_stale, TTL_SECONDS + TIMEOUT_SECONDS)
        first = reader.hosts(topic).age_seconds
        time.sleep(8)
        held = reader.hosts(topic)
        assert held.age_seconds >= first + 7
        assert held.is_stale or reader.settings.watch
        during = load.p99()
        cluster.resume("agent1")
        until(lambda: not reader.hosts(topic).is_stale, TTL_SECONDS + TIMEOUT_SECONDS + 1)
    assert load.failures == []
    assert during < 10 * before + 0.005


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
    """While threads ask for topics nobody serves, the known one is answered as fast as before."""
    with Load(reader, topic) as load:
        time.sleep(1)
        before = load.p99()
        for number in range(30):
            assert reader.hosts(f"nobody-{number}-here").hosts == ()
            time.sleep(0.02)
        assert load.p99() < 10 * before + 0.005
    assert load.failures == []
