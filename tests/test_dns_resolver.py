"""DnsSrv against DNS servers on real sockets: like Consul, broken, lossy, slow and malicious."""

from __future__ import annotations

import logging
import os
import select
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable
from typing import Any

import pytest

from consul_matchmaker.backends.dns.exchange import Channel
from consul_matchmaker.backends.dns.resolver import DnsSrv
from consul_matchmaker.backends.host_names import HostNames
from consul_matchmaker.backends.traffic import Traffic
from consul_matchmaker.errors import ConfigurationError, InvalidTopic, TimedOut, Unavailable
from consul_matchmaker.model import Host, Instance
from consul_matchmaker.settings import Settings
from tests.dns_servers import (
    Asked,
    DnsServer,
    FakeConsul,
    FakeInstance,
    LossyRelay,
    reply_to,
)
from tests.doubles import DEADLINE_SECONDS, NO_TRAFFIC, ManualClock, in_thread

pytestmark = pytest.mark.system

Lookup = Callable[..., DnsSrv]
PATIENCE = 30.0
"""One exchange: a query goes out again after a tenth of it and by TCP after a fifth, so a server's
thread may stop for a second and nothing else is asked."""
TIMEOUT = 1.0
"""One exchange where a test waits for its end."""


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock()


NAMES = {
    "db.example.com": ["192.0.2.5"],
    "localhost": ["127.0.0.1"],
    "db.example": ["192.0.2.2"],
    "ok.example": ["192.0.2.81", "192.0.2.82"],
    "my.node.example.org": ["192.0.2.9"],
}


def resolve(name: str) -> list[str]:
    """In place of the system's resolver, which knows other names on every machine."""
    if name == "unsure.example":
        raise socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution")
    return NAMES.get(name, [])


@pytest.fixture
def resolver(clock: ManualClock, request: pytest.FixtureRequest) -> Lookup:
    """Makes a DnsSrv on servers, or "host:port", and settings."""

    def make(*servers: DnsServer | str, **settings: object) -> DnsSrv:
        addresses = tuple(each if isinstance(each, str) else each.address for each in servers)
        settings.setdefault("request_timeout_seconds", PATIENCE)
        made = DnsSrv(
            Settings(mode="catalog", addresses=addresses, **settings),  # type: ignore[arg-type]
            clock=clock,
            jitter=lambda: 0.5,
            resolve=resolve,
        )
        request.addfinalizer(made.close)
        return made

    return make


def many(count: int, *, nodes: bool = False, text: str = "") -> list[FakeInstance]:
    return [
        FakeInstance(f"10.1.{i >> 8}.{i & 255}", 9000 + i, f"n{i}" if nodes else None, (), text)
        for i in range(count)
    ]


def consul(*instances: FakeInstance, **options: object) -> FakeConsul:
    return FakeConsul({("scheduler", ""): list(instances)}, **options)  # type: ignore[arg-type]


def hosts(*texts: str) -> tuple[Host, ...]:
    return tuple(sorted(Host.parse(text) for text in texts))


# -- what answers mean


def test_every_form_of_target(resolver: Lookup) -> None:
    """Addresses in the name, node names, IPv6 and host names: all are hosts; nodes are servers."""
    server = DnsServer(
        consul(
            FakeInstance("10.9.9.5", 1),
            FakeInstance("2001:db8::1", 2),
            FakeInstance("10.0.0.7", 3, node="node.with.dots"),
            FakeInstance("::1", 4, node="n4"),
            FakeInstance("db.example.com", 5),
            FakeInstance("localhost", 6),
            FakeInstance("10.9.9.5", 7),
        )
    )
    with server:
        snapshot = resolver(server).lookup("scheduler")
    assert snapshot.hosts == hosts(
        *("10.9.9.5:1", "[2001:db8::1]:2", "10.0.0.7:3", "[::1]:4", "192.0.2.5:5"),
        *("127.0.0.1:6", "10.9.9.5:7"),
    )
    servers = {instance.host.port: instance.server for instance in snapshot.instances}
    assert servers == dict.fromkeys(range(1, 8)) | {3: "node.with.dots", 4: "n4"}
    assert snapshot.source == "dns"
    assert snapshot.is_complete
    assert len(server.asked) == 1


def test_priority_and_weight_are_kept(resolver: Lookup) -> None:
    """RFC 2782's preference reaches whoever selects."""
    with DnsServer(lambda asked: [reply_to(asked, ["SRV 7 3 80 0a000001.addr.dc1.consul."])]) as s:
        snapshot = resolver(s).lookup("scheduler")
    assert snapshot.instances == (Instance(Host("10.0.0.1", 80), None, 7, 3),)


def test_a_snapshot_knows_when_it_was_taken(resolver: Lookup, clock: ManualClock) -> None:
    """Its age counts on the clock that was handed in."""
    with DnsServer(consul(*many(1))) as server:
        snapshot = resolver(server).lookup("scheduler")
    clock.now += 3
    assert snapshot.age_seconds == 3


@pytest.mark.parametrize(("ttl", "seconds"), [(0, None), (9, 9.0), (2**31, None)])
def test_a_ttl_above_zero_is_passed_on(resolver: Lookup, ttl: int, seconds: float | None) -> None:
    """Consul's default 0 says nothing, and a TTL with its highest bit set is 0 (RFC 2181)."""
    with DnsServer(consul(*many(2), ttl=ttl)) as server:
        assert resolver(server).lookup("scheduler").ttl_seconds == seconds


def test_nxdomain_is_no_hosts(resolver: Lookup) -> None:
    """What Consul does not know, or denies, has no hosts: an answer, not an error."""
    with DnsServer(consul()) as server:
        snapshot = resolver(server).lookup("unknown")
    assert (len(snapshot), snapshot.is_complete, snapshot.ttl_seconds) == (0, True, None)


def test_an_empty_answer_is_no_hosts_for_as_long_as_its_soa_says(resolver: Lookup) -> None:
    """NOERROR without records is an answer too; a SOA's minimum is its TTL."""
    soa = "consul. 30 SOA ns.consul. postmaster.consul. 1 2 3 4 5"
    with DnsServer(lambda asked: [reply_to(asked, authority=[soa])]) as server:
        snapshot = resolver(server).lookup("scheduler")
    assert (len(snapshot), snapshot.ttl_seconds) == (0, 5.0)


def test_port_0_is_left_out_and_said_once(
    resolver: Lookup, caplog: pytest.LogCaptureFixture
) -> None:
    """An older agent gives newer multi-port services port 0: nobody could connect there."""
    with DnsServer(consul(FakeInstance("10.0.0.1", 0), FakeInstance("10.0.0.2", 80))) as server:
        dns_srv = resolver(server)
        for _ in range(3):
            assert dns_srv.lookup("scheduler").hosts == hosts("10.0.0.2:80")
    assert [r.getMessage().count("port 0") for r in caplog.records] == [1]


def test_an_answer_says_how_it_came(resolver: Lookup) -> None:
    """Which agent was asked for which name, by what transport, how much came and was left out."""
    with DnsServer(consul(FakeInstance("10.0.0.1", 0), FakeInstance("10.0.0.2", 80))) as server:
        details: Any = resolver(server).lookup("scheduler").details
        (asked,) = details["asked"]
        assert asked["name"] == "_scheduler._tcp.service.consul."
        assert asked["agent"].startswith("127.0.0.1:")
        assert (asked["transport"], asked["rcode"]) == ("udp", "NOERROR")
        assert (asked["answers"], asked["records"]) == (1, 2)
        assert list(details["left_out"].values()) == ["port 0"]


def test_a_dot_as_target_is_no_host(resolver: Lookup) -> None:
    """RFC 2782: the service is decidedly not available."""
    with DnsServer(lambda asked: [reply_to(asked, ["SRV 0 0 80 ."])]) as server:
        assert len(resolver(server).lookup("scheduler")) == 0


def test_addresses_that_did_not_come_along_are_asked_for(resolver: Lookup) -> None:
    """Once for each node, whatever the number of its instances, IPv6 after IPv4."""
    fake = consul(
        FakeInstance("10.0.0.1", 1, node="n1"),
        FakeInstance("10.0.0.1", 2, node="n1"),
        FakeInstance("2001:db8::9", 3, node="n2"),
        FakeInstance("10.0.0.4", 4),
        additional=False,
    )
    with DnsServer(fake) as server:
        snapshot = resolver(server).lookup("scheduler")
    assert snapshot.hosts == hosts("10.0.0.1:1", "10.0.0.1:2", "[2001:db8::9]:3", "10.0.0.4:4")
    assert snapshot.is_complete
    asked = sorted((each.name.partition(".")[0], each.kind) for each in server.asked[1:])
    assert asked == [("n1", "A"), ("n2", "A"), ("n2", "AAAA")]


def test_a_node_without_address_is_no_host(resolver: Lookup) -> None:
    """A node that left between two answers has no address; the others stay."""

    def answer(asked: Asked) -> list[bytes]:
        if asked.kind != "SRV":
            return [reply_to(asked, rcode="NXDOMAIN")]
        targets = ["SRV 1 1 1 gone.node.dc1.consul.", "SRV 1 1 2 0a000002.addr.dc1.consul."]
        return [reply_to(asked, targets)]

    with DnsServer(answer) as server:
        assert resolver(server).lookup("scheduler").hosts == hosts("10.0.0.2:2")


def test_a_node_whose_address_cannot_be_asked_for_leaves_the_answer_incomplete(
    resolver: Lookup,
) -> None:
    """An outage in the middle of a lookup is not the end of a host, and it is said."""

    def answer(asked: Asked) -> list[bytes]:
        if asked.kind != "SRV":
            return [reply_to(asked, rcode="SERVFAIL")]
        return [reply_to(asked, ["SRV 1 1 1 n1.node.dc1.consul.", "SRV 1 1 2 db.example."])]

    with DnsServer(answer) as server:
        snapshot = resolver(server).lookup("scheduler")
    assert (snapshot.hosts, snapshot.is_complete) == (hosts("192.0.2.2:2"), False)


def test_a_name_nobody_knows_is_left_out(resolver: Lookup) -> None:
    """A definite no is an answer: the others are all there is, and `details` says who is not."""
    answer = ["SRV 1 1 1 gone.example.", "SRV 1 1 2 ok.example."]
    with DnsServer(lambda asked: [reply_to(asked, answer)]) as server:
        snapshot = resolver(server).lookup("scheduler")
    assert snapshot.hosts == hosts("192.0.2.81:2", "192.0.2.82:2")
    assert snapshot.is_complete
    assert snapshot.details["left_out"] == {"gone.example.": "no address"}


def test_a_name_the_system_cannot_tell_is_no_proof_of_absence(resolver: Lookup) -> None:
    """With others, the answer is incomplete; alone, it is an outage and not an empty answer."""
    answer = ["SRV 1 1 1 unsure.example.", "SRV 1 1 2 ok.example."]
    with DnsServer(lambda asked: [reply_to(asked, answer)]) as server:
        snapshot = resolver(server).lookup("scheduler")
        assert snapshot.hosts == hosts("192.0.2.81:2", "192.0.2.82:2")
        assert not snapshot.is_complete
        del answer[1]
        with pytest.raises(Unavailable, match=r"unsure\.example"):
            resolver(server).lookup("scheduler")


def test_a_resolver_that_hangs_holds_no_lookup(clock: ManualClock) -> None:
    """The lookup ends in its own time, whatever the system's resolver does."""
    end = threading.Event()

    def hang(name: str) -> list[str]:
        end.wait()
        return []

    with DnsServer(lambda asked: [reply_to(asked, ["SRV 1 1 1 db.example."])]) as server:
        settings = Settings(
            mode="catalog", addresses=(server.address,), request_timeout_seconds=TIMEOUT
        )
        try:
            with pytest.raises(Unavailable):
                DnsSrv(settings, clock=clock, resolve=hang).lookup("scheduler")
        finally:
            end.set()


def test_a_name_outside_consul_is_resolved_by_the_system(resolver: Lookup) -> None:
    """Where Consul refuses to resolve a target, this machine does."""

    def answer(asked: Asked) -> list[bytes]:
        if asked.kind != "SRV":
            return [reply_to(asked, rcode="REFUSED")]
        return [reply_to(asked, ["SRV 1 1 1 my.node.example.org."])]

    with DnsServer(answer) as server:
        assert resolver(server).lookup("scheduler").hosts == hosts("192.0.2.9:1")


# -- what is asked


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({}, "_scheduler._tcp.service.consul."),
        ({"tag": "Gold"}, "_scheduler._gold.service.consul."),
        ({"domain": "Corp.Example."}, "_scheduler._tcp.service.corp.example."),
        ({"datacenters": "dc2"}, "_scheduler._tcp.service.dc2.consul."),
        ({"service_template": "mm-{topic}"}, "_mm-scheduler._tcp.service.consul."),
        ({"service_map": "scheduler=other"}, "_other._tcp.service.consul."),
        ({"service_map": "scheduler=near.by.query"}, "near.by.query.consul."),
        (
            {"service_template": "{topic}.query", "datacenters": "dc2"},
            "scheduler.query.dc2.consul.",
        ),
    ],
)
def test_the_name_that_is_asked_for(resolver: Lookup, settings: dict[str, str], name: str) -> None:
    """RFC 2782's form, which every version answers alike; prepared queries in theirs."""
    with DnsServer(lambda asked: [reply_to(asked, rcode="NXDOMAIN")]) as server:
        resolver(server, **settings).lookup("scheduler")
        assert server.names() == [name]


@pytest.mark.parametrize(
    "settings", [{"tag": "a.b"}, {"tag": "tcp"}, {"datacenters": "a b"}, {"domain": "a..b"}]
)
def test_what_cannot_be_part_of_a_name_is_refused_at_the_start(
    resolver: Lookup, settings: dict[str, str]
) -> None:
    """Not at the first lookup, and with the setting's name."""
    with pytest.raises(ConfigurationError, match=next(iter(settings))):
        resolver("127.0.0.1:1", **settings)


def test_a_topic_dns_cannot_carry_is_invalid_and_nothing_is_asked(resolver: Lookup) -> None:
    """InvalidTopic, with service_map as the remedy."""
    with DnsServer(consul()) as server:
        with pytest.raises(InvalidTopic, match="service_map"):
            resolver(server).lookup("t" * 80)
        assert server.asked == []


def test_a_name_too_long_for_dns_is_invalid(resolver: Lookup) -> None:
    """A domain may leave no room for a topic."""
    with pytest.raises(InvalidTopic, match="DNS"):
        resolver("127.0.0.1:1", domain=".".join(["d" * 60] * 4)).lookup("t" * 60)


def test_two_topics_that_meet_on_one_service_are_said_once(
    resolver: Lookup, caplog: pytest.LogCaptureFixture
) -> None:
    """They share hosts, which may be a surprise; those mapped by hand are meant."""
    with DnsServer(consul()) as server:
        dns_srv = resolver(server, service_map={"x": "one", "y": "one"})
        for topic in ("notifications.info", "notifications-info", "notifications.info", "x", "y"):
            dns_srv.lookup(topic)
    met = [record for record in caplog.records if "are both" in record.getMessage()]
    assert len(met) == 1
    assert "service_map" in met[0].getMessage()


@pytest.mark.finding("A4")
def test_a_translated_name_is_said(resolver: Lookup, caplog: pytest.LogCaptureFixture) -> None:
    """A topic whose service has another name is never answered in silence: the log says so once,
    and each answer names its service.  What was mapped by hand, or needs no translation, is not
    said."""
    fake = FakeConsul({("my-dotted", ""): many(1), ("scheduler", ""): many(1)})
    with DnsServer(fake) as server:
        dns_srv = resolver(server, service_map={"by.hand": "scheduler"})
        for topic in ("my.dotted", "my.dotted", "Scheduler", "by.hand"):
            snapshot = dns_srv.lookup(topic)
            assert len(snapshot) == 1
            assert snapshot.details["service"] == (
                "my-dotted" if topic == "my.dotted" else "scheduler"
            )
    (said,) = caplog.messages
    assert "'my.dotted'" in said
    assert "'my-dotted'" in said
    assert "service_map" in said
    assert "strict_names" in said


@pytest.mark.finding("A4")
def test_strict_names_refuse_a_translation(resolver: Lookup) -> None:
    """The error names the service that would have been asked for; nothing is asked."""
    with DnsServer(consul(*many(1))) as server:
        dns_srv = resolver(server, strict_names=True, service_map={"by.hand": "scheduler"})
        with pytest.raises(InvalidTopic, match=r"'my\.dotted'.*'my-dotted'"):
            dns_srv.lookup("my.dotted")
        assert server.asked == []
        for topic in ("scheduler", "Scheduler", "by.hand"):
            assert len(dns_srv.lookup(topic)) == 1


@pytest.mark.finding("C10")
def test_the_queries_of_all_topics_in_use_are_remembered(resolver: Lookup) -> None:
    """As many as `max_topics` says, and one more takes the place of the oldest, not of all."""
    dns_srv = resolver("127.0.0.1:1", max_topics=6000)
    first = dns_srv._query("topic0.service.consul", "SRV", 1232)
    queries = [dns_srv._query(f"topic{n}.service.consul", "SRV", 1232) for n in range(6000)]
    again = [dns_srv._query(f"topic{n}.service.consul", "SRV", 1232) for n in range(6000)]
    assert queries[0] is first
    assert all(one is other for one, other in zip(queries, again, strict=True))
    for number in range(6000, 20_000):
        dns_srv._query(f"topic{number}.service.consul", "SRV", 1232)
    assert len(dns_srv._queries) == 12_000


@pytest.mark.finding("C9")
def test_host_names_are_remembered_for_a_ttl(clock: ManualClock) -> None:
    """This machine's resolver is asked once a TTL for a name, however many lookups need it."""
    asked: list[str] = []

    def count(name: str) -> list[str]:
        asked.append(name)
        return ["192.0.2.1"]

    with DnsServer(lambda query: [reply_to(query, ["SRV 1 1 1 db.example."])]) as server:
        settings = Settings(mode="catalog", addresses=(server.address,), ttl_seconds=5)
        dns_srv = DnsSrv(settings, clock=clock, resolve=count)
        for _ in range(5):
            assert dns_srv.lookup("scheduler").hosts == hosts("192.0.2.1:1")
        assert asked == ["db.example"]
        clock.now += 5
        dns_srv.lookup("scheduler")
        assert len(asked) == 2
        dns_srv.close()
        dns_srv = DnsSrv(settings, clock=clock, resolve=count)  # as in a forked child
        dns_srv.lookup("scheduler")
        assert len(asked) == 3
        dns_srv.close()


@pytest.mark.finding("A1")
def test_an_answer_is_as_old_as_its_question(resolver: Lookup, clock: ManualClock) -> None:
    """What Consul took to answer counts; of several questions the first one does, and what an
    earlier agent wasted does not."""
    fake = consul(*many(2))

    def slow(asked: Asked) -> list[bytes]:
        clock.now += 6
        return fake(asked)

    with DnsServer(slow) as server:
        assert resolver(server).lookup("scheduler").age_seconds == 6
        assert resolver(server, shards=2).lookup("scheduler").age_seconds == 12
        assert resolver(server, datacenters="dc9,dc8").lookup("nobody").age_seconds == 12

        def useless(asked: Asked) -> list[bytes]:
            clock.now += 100
            return [reply_to(asked, rcode="REFUSED")]

        with DnsServer(useless) as bad:
            assert resolver(bad, server).lookup("scheduler").age_seconds == 6


@pytest.mark.finding("D3")
def test_an_agent_due_for_a_try_is_not_kept_from_others_by_whoever_has_no_time(
    resolver: Lookup, clock: ManualClock
) -> None:
    """A caller whose deadline has passed, or whose question is wrong, tries nobody: the next one
    finds the agent that came back."""
    fake = consul(*many(1))
    rcodes = ["REFUSED"]
    with DnsServer(
        lambda asked: [reply_to(asked, rcode=rcodes[0])] if rcodes else fake(asked)
    ) as server:
        dns_srv = resolver(server, domain=".".join(["d" * 60] * 3))
        with pytest.raises(Unavailable):
            dns_srv.lookup("scheduler")
        clock.now += PATIENCE + 60
        with pytest.raises(TimedOut):
            dns_srv.lookup("scheduler", timeout_seconds=-1)
        assert dns_srv.status()["agents_away"] == []
        rcodes.clear()
        with pytest.raises(InvalidTopic):
            dns_srv.lookup("t" * 60)
        assert dns_srv.status()["agents_away"] == []


def test_server_by_tag(resolver: Lookup) -> None:
    """The instance that has the server's name as a tag, by one question."""
    fake = consul(
        FakeInstance("10.0.0.1", 1, tags=("cinder-1",)), FakeInstance("10.0.0.2", 2, tags=("x",))
    )
    with DnsServer(fake) as server:
        snapshot = resolver(server).lookup("scheduler", "cinder-1")
        assert server.names() == ["_scheduler._cinder-1.service.consul."]
    assert snapshot.instances == (Instance(Host("10.0.0.1", 1), "cinder-1"),)
    assert snapshot.for_server("cinder-1").hosts == snapshot.hosts


@pytest.mark.parametrize("server_name", ["n2", "10.0.0.2", "10.0.0.2:2"])
def test_server_by_node_name_and_by_address(resolver: Lookup, server_name: str) -> None:
    """Where no instance has such a tag, the topic's own answer tells which one is meant."""
    fake = consul(FakeInstance("10.0.0.1", 1, "n1"), FakeInstance("10.0.0.2", 2, "n2"))
    with DnsServer(fake) as server:
        snapshot = resolver(server).lookup("scheduler", server_name)
        assert snapshot.hosts == hosts("10.0.0.2:2")
        assert len(resolver(server).lookup("scheduler", "n3")) == 0


def test_server_and_tag_together(resolver: Lookup) -> None:
    """DNS can ask for one tag only: the server is what is in both answers."""
    fake = consul(
        FakeInstance("10.0.0.1", 1, tags=("gold", "a")),
        FakeInstance("10.0.0.2", 2, tags=("lead", "a")),
    )
    with DnsServer(fake) as server:
        assert resolver(server, tag="gold").lookup("scheduler", "a").hosts == hosts("10.0.0.1:1")


def test_the_first_datacenter_that_has_hosts(resolver: Lookup) -> None:
    """The order is one of preference: the next is asked only when one has none."""
    fake = FakeConsul(
        {
            ("a", "dc1"): [FakeInstance("10.0.0.1", 1)],
            ("a", "dc2"): [FakeInstance("10.0.0.2", 2)],
            ("b", "dc2"): [FakeInstance("10.0.0.3", 3)],
        }
    )
    with DnsServer(fake) as server:
        dns_srv = resolver(server, datacenters="dc1,dc2")
        assert dns_srv.lookup("a").hosts == hosts("10.0.0.1:1")
        assert len(server.asked) == 1
        assert dns_srv.lookup("b").hosts == hosts("10.0.0.3:3")
        assert len(dns_srv.lookup("c")) == 0


def test_a_datacenter_that_cannot_be_asked_is_not_one_without_hosts(resolver: Lookup) -> None:
    """Another one's hosts will do; but when those have none either, it is an outage."""
    fake = FakeConsul({("a", "dc2"): [FakeInstance("10.0.0.2", 2)]})

    def answer(asked: Asked) -> Iterable[bytes]:
        return [reply_to(asked, rcode="SERVFAIL")] if ".dc1." in asked.name else fake(asked)

    with DnsServer(answer) as server:
        dns_srv = resolver(server, datacenters="dc1,dc2")
        assert dns_srv.lookup("a").hosts == hosts("10.0.0.2:2")
        with pytest.raises(Unavailable):
            dns_srv.lookup("b")


def test_queries_cannot_be_guessed(resolver: Lookup) -> None:
    """Every query has a new random id and a port of its own: who forges must guess both."""
    with DnsServer(consul(*many(3))) as server:
        dns_srv = resolver(server)
        for _ in range(30):
            dns_srv.lookup("scheduler")
    assert len({each.wire[:2] for each in server.asked}) > 25
    assert len({each.source for each in server.asked}) > 15  # a port may come up again


# -- complete, or said so


def test_what_fits_comes_by_one_exchange(resolver: Lookup) -> None:
    """On this machine 200 hosts are one UDP exchange, and surely all."""
    with DnsServer(consul(*many(200))) as server:
        snapshot = resolver(server).lookup("scheduler")
    assert (len(snapshot), snapshot.is_complete, len(server.asked)) == (200, True, 1)


def test_a_cut_udp_answer_is_asked_for_by_tcp(resolver: Lookup) -> None:
    """And the next time by TCP at once, over the same connection, as long as it is that large."""
    with DnsServer(consul(*many(60), udp_limit=1232), udp=True) as server:
        dns_srv = resolver(server)
        small_udp(dns_srv)
        for _ in range(3):
            snapshot = dns_srv.lookup("scheduler")
            assert (len(snapshot), snapshot.is_complete) == (60, True)
        assert [each.is_tcp for each in server.asked] == [False, True, True, True]
        assert server.connections == 1
        server.answer = consul(*many(3))
        assert [len(dns_srv.lookup("scheduler")) for _ in range(2)] == [3, 3]
        assert [each.is_tcp for each in server.asked[4:]] == [True, False]


def small_udp(dns_srv: DnsSrv) -> None:
    """As if the agents were on other machines, where UDP has 1,232 bytes."""
    for channel in dns_srv._channels:
        channel._is_local = False


def test_an_answer_cut_on_tcp_too_is_completed_by_repeating(resolver: Lookup) -> None:
    """Consul shuffles before it cuts: the union of answers grows until nothing can be missing."""
    with DnsServer(consul(*many(1_500))) as server:
        snapshot = resolver(server).lookup("scheduler")
    assert (len(snapshot), snapshot.is_complete) == (1_500, True)
    assert 10 <= len(server.asked) <= 25
    assert server.connections <= 2


def test_1024_answers_on_tcp_are_never_taken_for_all(resolver: Lookup) -> None:
    """Consul keeps 1,024 at most, on TCP only, and does not say so (fact A2)."""
    with DnsServer(consul(*many(1_100), additional=False)) as server:
        dns_srv = tcp_only(resolver, server)
        snapshot = dns_srv.lookup("scheduler")
    assert (len(snapshot), snapshot.is_complete) == (1_100, True)
    assert len(server.asked) > 3


@pytest.mark.parametrize("count", range(5, 17))
def test_metadata_that_pushed_an_instance_out_is_noticed(resolver: Lookup, count: int) -> None:
    """A reply 100 bytes too long loses one instance and all TXT records, and comes out at half of
    the limit (measured on 1.8.7: 9 of 10 hosts in 666 of 1,232 bytes)."""
    text = "consul-network-segment=" + "x" * 20
    with DnsServer(consul(*many(count, nodes=True, text=text))) as server:
        dns_srv = resolver(server)
        small_udp(dns_srv)
        snapshot = dns_srv.lookup("scheduler")
    assert (len(snapshot), snapshot.is_complete) == (count, True)


@pytest.mark.parametrize("failures", [2, 9])
def test_failures_in_the_middle_of_a_union_are_not_its_end(resolver: Lookup, failures: int) -> None:
    """A SERVFAIL or two are asked again; more leave what was found, and that it is not all."""
    fake = consul(*many(60))

    def answer(asked: Asked) -> Iterable[bytes]:
        if 1 < len(server.asked) <= 1 + failures:
            return [reply_to(asked, rcode="SERVFAIL")]
        return fake(asked)

    with DnsServer(answer) as server:
        dns_srv = resolver(server)
        small_udp(dns_srv)
        snapshot = dns_srv.lookup("scheduler")
    assert snapshot.is_complete == (failures == 2)
    assert (len(snapshot) == 60) == (failures == 2)
    assert len(snapshot) > 5


def test_a_union_that_cannot_end_in_time_says_so(resolver: Lookup) -> None:
    """A fifth of the hosts at a time, slowly: what was found, within the bound, incomplete."""
    fake = consul(*many(4_000))

    def answer(asked: Asked) -> Iterable[bytes]:
        if len(server.asked) > 1:
            server.closing.wait(1)
        return fake(asked)

    with DnsServer(answer) as server:
        dns_srv = resolver(server, request_timeout_seconds=1.5)
        started = time.monotonic()
        snapshot = dns_srv.lookup("scheduler")
        assert time.monotonic() - started < 8
    assert 700 <= len(snapshot) < 4_000
    assert not snapshot.is_complete


def test_repeats_of_one_and_the_same_answer_prove_nothing(resolver: Lookup) -> None:
    """A cache between us and Consul does not shuffle: asking again is useless, and said so."""
    with DnsServer(consul(*many(1_500), is_shuffled=False)) as server:
        snapshot = resolver(server).lookup("scheduler")
        assert not snapshot.is_complete
        assert len(server.asked) < 6


def test_tc_on_tcp_makes_no_loop(resolver: Lookup) -> None:
    """With enable_truncate Consul says TC on TCP too; the union ends by its own rule."""
    answers = [f"SRV 1 1 {port} 0a000001.addr.dc1.consul." for port in range(1, 6)]
    with DnsServer(lambda asked: [reply_to(asked, answers, truncated=True)]) as server:
        snapshot = resolver(server).lookup("scheduler")
        assert len(server.asked) < 10
    assert len(snapshot) == 5


def test_an_answer_that_tcp_cannot_complete_is_kept(resolver: Lookup) -> None:
    """Where TCP is closed, what came by UDP is worth more than an error, and is incomplete."""
    with DnsServer(consul(*many(300)), tcp=False) as server:
        dns_srv = resolver(server)
        small_udp(dns_srv)
        snapshot = dns_srv.lookup("scheduler")
    assert 0 < len(snapshot) < 300
    assert not snapshot.is_complete


def test_shards_are_asked_for_one_by_one(resolver: Lookup) -> None:
    """Each shard fits into one answer, so all of them are the topic."""
    instances = many(100)
    for number, each in enumerate(instances):
        each.tags = (f"s{number % 4:02d}",)
    with DnsServer(consul(*instances)) as server:
        snapshot = resolver(server, shards=4).lookup("scheduler")
        assert (len(snapshot), snapshot.is_complete) == (100, True)
        assert server.names() == [f"_scheduler._s0{n}.service.consul." for n in range(4)]


# -- a kept TCP connection


def tcp_only(resolver: Lookup, server: DnsServer, **settings: object) -> DnsSrv:
    """A resolver that asks by TCP first."""
    dns_srv = resolver(server, **settings)
    for channel in dns_srv._channels:
        channel.udp_is_silent()
    return dns_srv


def test_a_connection_the_agent_closed_is_quietly_opened_again(
    resolver: Lookup, caplog: pytest.LogCaptureFixture
) -> None:
    """Consul ends connections after 128 queries and when idle: no lookup fails for that."""
    caplog.set_level(logging.DEBUG)
    fake = consul(*many(3))

    def two_queries(server: DnsServer, stream: socket.socket) -> None:
        for _ in range(2):
            asked = server.receive(stream)
            if asked is None:
                return
            for reply in fake(asked):
                stream.sendall(len(reply).to_bytes(2, "big") + reply)

    with DnsServer(fake, serve_tcp=two_queries) as server:
        dns_srv = tcp_only(resolver, server)
        assert [len(dns_srv.lookup("scheduler")) for _ in range(7)] == [3] * 7
        assert server.connections == 4
    assert caplog.records == []


def test_a_union_survives_the_end_of_its_connection(resolver: Lookup) -> None:
    """What was not answered yet is asked on a new connection."""
    fake = consul(*many(1_000))

    def three_queries(server: DnsServer, stream: socket.socket) -> None:
        for _ in range(3):
            asked = server.receive(stream)
            for reply in fake(asked) if asked else ():
                stream.sendall(len(reply).to_bytes(2, "big") + reply)

    with DnsServer(fake, serve_tcp=three_queries) as server:
        dns_srv = tcp_only(resolver, server)
        snapshot = dns_srv.lookup("scheduler")
    assert (len(snapshot), snapshot.is_complete) == (1_000, True)
    assert server.connections > 2


def test_a_forked_child_starts_with_connections_of_its_own(resolver: Lookup) -> None:
    """Two processes on one connection would read each other's answers."""
    with DnsServer(consul(*many(3))) as server:
        dns_srv = tcp_only(resolver, server)
        dns_srv.lookup("scheduler")
        if os.fork() == 0:
            found = 0
            try:
                dns_srv = tcp_only(resolver, server)
                found = len(dns_srv.lookup("scheduler"))
            finally:
                os._exit(found)
        _, status = os.wait()
        assert os.waitstatus_to_exitcode(status) == 3
        assert server.connections == 2
        dns_srv.lookup("scheduler")
        assert server.connections == 2


def test_nothing_is_opened_or_started_by_construction(resolver: Lookup) -> None:
    """Programs build it before they fork."""
    lowest_free, threads = os.dup(0), threading.active_count()
    os.close(lowest_free)
    dns_srv = resolver("127.0.0.1:1", "agent.invalid:8600")
    following = os.dup(0)  # the lowest number that is free: no higher when nothing was opened
    os.close(following)
    # Lower, or fewer, when what an earlier test left behind ended just now.
    assert following <= lowest_free
    assert threading.active_count() <= threads
    assert "127.0.0.1:1" in repr(dns_srv)


def test_many_threads_at_once(resolver: Lookup) -> None:
    """Lookups of several threads do not disturb each other, on either transport."""
    fake = FakeConsul(
        {(f"t{n}", ""): [FakeInstance("10.0.0.1", 100 + n)] * (n + 1) for n in range(8)}
    )
    results: list[bool] = []
    with DnsServer(fake) as server:
        for dns_srv in (resolver(server), tcp_only(resolver, server)):

            def run(number: int, dns_srv: DnsSrv = dns_srv) -> None:
                for _ in range(20):
                    found = dns_srv.lookup(f"t{number}").hosts
                    results.append(found == hosts(f"10.0.0.1:{100 + number}"))

            threads = [threading.Thread(target=run, args=[n]) for n in range(8)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
    assert results == [True] * 320


# -- agents that fail


def test_servfail_is_asked_again_at_once(resolver: Lookup) -> None:
    """While a leader is elected single queries fail: two of them cost nothing."""
    fake = consul(*many(3))

    def answer(asked: Asked) -> Iterable[bytes]:
        return fake(asked) if len(server.asked) > 2 else [reply_to(asked, rcode="SERVFAIL")]

    with DnsServer(answer) as server:
        assert len(resolver(server).lookup("scheduler")) == 3


@pytest.mark.parametrize(
    ("rcode", "remedy"), [("SERVFAIL", "leader"), ("REFUSED", "`domain`"), ("FORMERR", "Consul")]
)
def test_an_error_is_an_outage_and_names_the_remedy(
    resolver: Lookup, rcode: str, remedy: str
) -> None:
    """Unavailable, with the agent, what it answered, and what to look at."""
    with DnsServer(lambda asked: [reply_to(asked, rcode=rcode)]) as server:
        with pytest.raises(Unavailable, match=remedy) as caught:
            resolver(server).lookup("scheduler")
        assert len(server.asked) == (3 if rcode == "SERVFAIL" else 1)
    assert server.address in str(caught.value)
    assert rcode in str(caught.value)
    assert not isinstance(caught.value, TimedOut)


def test_no_answer_is_timed_out_and_not_empty(resolver: Lookup) -> None:
    """Silence on both transports ends with the timeout."""

    def silent(server: DnsServer, stream: socket.socket) -> None:
        server.closing.wait()

    with DnsServer(lambda asked: [], serve_tcp=silent) as server:
        started = time.monotonic()
        with pytest.raises(TimedOut, match="request_timeout_seconds"):
            resolver(server, request_timeout_seconds=TIMEOUT).lookup("scheduler")
        assert TIMEOUT * 0.9 < time.monotonic() - started < TIMEOUT * 3


def test_a_closed_port_is_known_at_once(resolver: Lookup) -> None:
    """Nothing listens there: no need to wait for the timeout."""
    with DnsServer(consul(), udp=False, tcp=False) as server:
        started = time.monotonic()
        with pytest.raises(Unavailable, match="cannot be reached"):
            resolver(server).lookup("scheduler")
        assert time.monotonic() - started < PATIENCE / 6


def test_udp_that_is_refused_leaves_tcp(resolver: Lookup) -> None:
    """A firewall may reject one and let the other through."""
    with DnsServer(consul(*many(2)), udp=False) as server:
        assert len(resolver(server).lookup("scheduler")) == 2


def test_an_agent_whose_name_does_not_resolve_is_unavailable(resolver: Lookup) -> None:
    """A name that no resolver knows is an outage of that agent, not an error of its own."""
    with DnsServer(consul(*many(2))) as server:
        assert len(resolver("agent.invalid:8600", server).lookup("scheduler")) == 2
        with pytest.raises(Unavailable):
            resolver("agent.invalid:8600").lookup("scheduler")
        assert len(resolver(f"localhost:{server.port}").lookup("scheduler")) == 2


@pytest.mark.skipif(not socket.has_ipv6, reason="this machine has no IPv6")
def test_an_agent_on_ipv6(resolver: Lookup) -> None:
    """Agents may be asked over IPv6."""
    try:
        server = DnsServer(consul(*many(2)), address="::1")
    except OSError:
        pytest.skip("this machine has no IPv6 loopback")
    with server:
        assert len(resolver(server).lookup("scheduler")) == 2


def test_the_other_agents_are_asked(resolver: Lookup) -> None:
    """SERVFAIL, REFUSED and silence of one are answered by another."""
    with DnsServer(consul(*many(3))) as good:
        for rcode in ("SERVFAIL", "REFUSED"):
            with DnsServer(lambda asked, rcode=rcode: [reply_to(asked, rcode=rcode)]) as bad:
                assert len(resolver(bad, good).lookup("scheduler")) == 3
        with DnsServer(lambda asked: []) as silent:
            dns_srv = resolver(silent, good, request_timeout_seconds=TIMEOUT)
            assert len(dns_srv.lookup("scheduler")) == 3


def test_a_dead_agent_costs_one_timeout(
    resolver: Lookup, clock: ManualClock, caplog: pytest.LogCaptureFixture
) -> None:
    """The one that took over stays in use, however long; when it fails, the other may be back."""
    caplog.set_level(logging.INFO)
    fake = consul(*many(3))
    alive: list[str] = ["b"]

    def answer(name: str) -> Callable[[Asked], Iterable[bytes]]:
        return lambda asked: fake(asked) if name in alive else []

    with DnsServer(answer("a"), tcp=False) as a, DnsServer(answer("b"), tcp=False) as b:
        dns_srv = resolver(a, b, request_timeout_seconds=TIMEOUT)
        assert dns_srv.status() == {"agent": a.address, "agents_away": []}
        assert len(dns_srv.lookup("scheduler")) == 3
        assert dns_srv.status() == {"agent": b.address, "agents_away": [a.address]}
        asked = len(a.asked)
        for _ in range(5):
            clock.now += 30
            assert len(dns_srv.lookup("scheduler")) == 3
        assert len(a.asked) == asked
        alive[:] = ["a"]
        assert len(dns_srv.lookup("scheduler")) == 3
        assert dns_srv.status() == {"agent": a.address, "agents_away": [b.address]}
    levels = [record.levelname for record in caplog.records]
    assert levels == ["WARNING", "INFO", "WARNING", "INFO", "INFO"]


def test_an_agent_without_a_leader_gives_way_to_one_that_has(resolver: Lookup) -> None:
    """Its failure costs three queries once, and not at each lookup."""
    with (
        DnsServer(lambda asked: [reply_to(asked, rcode="SERVFAIL")]) as bad,
        DnsServer(consul(*many(3))) as good,
    ):
        dns_srv = resolver(bad, good)
        for _ in range(4):
            assert len(dns_srv.lookup("scheduler")) == 3
        assert len(bad.asked) == 3
        assert dns_srv.status() == {"agent": good.address, "agents_away": []}


def test_a_lookup_with_little_time_ends_in_time_and_blames_no_agent(
    resolver: Lookup, caplog: pytest.LogCaptureFixture
) -> None:
    """It answers like any other where there is time; where there is not, it says nothing of the
    agent: neither that it is away, nor that its UDP is silent."""
    fake = consul(*many(3))
    with DnsServer(lambda asked: fake(asked) if "_scheduler" in asked.name else []) as server:
        dns_srv = resolver(server, request_timeout_seconds=10)
        assert len(dns_srv.lookup("scheduler", timeout_seconds=10)) == 3
        started = time.monotonic()
        with pytest.raises(TimedOut, match="in time"):
            dns_srv.lookup("far", timeout_seconds=0.1)
        assert time.monotonic() - started < 2
        assert dns_srv.status() == {"agent": server.address, "agents_away": []}
        dns_srv.lookup("scheduler")
        assert not any(asked.is_tcp for asked in server.asked)
    assert caplog.messages == []


def test_an_answer_that_cannot_be_completed_in_time_says_so(resolver: Lookup) -> None:
    """What came is worth more than an error; with time enough it is all."""
    fake = consul(*many(60), udp_limit=1232)
    may_answer = threading.Event()

    def answer(asked: Asked) -> Iterable[bytes]:
        if asked.is_tcp:
            may_answer.wait(PATIENCE)
        return fake(asked)

    with DnsServer(answer) as server:
        dns_srv = resolver(server)
        small_udp(dns_srv)
        started = time.monotonic()
        some = dns_srv.lookup("scheduler", timeout_seconds=1)
        assert time.monotonic() - started < PATIENCE / 2
        assert not some.is_complete
        assert 5 < len(some) < 60
        assert dns_srv.status() == {"agent": server.address, "agents_away": []}
        may_answer.set()
        assert len(dns_srv.lookup("scheduler")) == 60


def test_shards_that_cannot_be_asked_for_leave_the_answer_incomplete(resolver: Lookup) -> None:
    """The others' hosts are worth more than an error; without any it is an outage."""
    fake = consul(FakeInstance("10.0.0.1", 1, tags=("s00",)))

    def answer(asked: Asked) -> Iterable[bytes]:
        return [reply_to(asked, rcode="REFUSED")] if "_s01" in asked.name else fake(asked)

    with DnsServer(answer) as server:
        snapshot = resolver(server, shards=2).lookup("scheduler")
        assert (snapshot.hosts, snapshot.is_complete) == (hosts("10.0.0.1:1"), False)
        fake.services["scheduler", ""].clear()
        with pytest.raises(Unavailable):
            resolver(server, shards=2).lookup("scheduler")


def test_a_lookup_says_how_long_it_may_need(resolver: Lookup) -> None:
    """Three exchanges, each of which may take the whole request_timeout_seconds."""
    assert resolver("127.0.0.1:1", request_timeout_seconds=2).longest_lookup_seconds == 6


def test_an_agent_that_answers_others_meanwhile_is_not_away(
    resolver: Lookup, caplog: pytest.LogCaptureFixture
) -> None:
    """A question without an answer, as for a datacenter that hangs, is that question's failure."""
    fake = consul(*many(3))
    with DnsServer(lambda asked: fake(asked) if "_scheduler" in asked.name else []) as server:
        dns_srv = resolver(server, request_timeout_seconds=2)

        def ask_for_far() -> None:
            with pytest.raises(TimedOut):
                dns_srv.lookup("far")

        asking = threading.Thread(target=ask_for_far)
        asking.start()
        while asking.is_alive():
            assert len(dns_srv.lookup("scheduler")) == 3
            asking.join(0.01)
        assert dns_srv.status() == {"agent": server.address, "agents_away": []}
    assert caplog.messages == []


def test_all_agents_resting_are_asked_all_the_same(resolver: Lookup, clock: ManualClock) -> None:
    """When nobody answered, the next lookup tries them at once: one of them may be back."""
    fake = consul(*many(3))
    alive: list[bool] = []
    with DnsServer(lambda asked: fake(asked) if alive else [], tcp=False) as server:
        dns_srv = resolver(server, request_timeout_seconds=TIMEOUT)
        with pytest.raises(TimedOut):
            dns_srv.lookup("scheduler")
        alive.append(True)
        assert len(dns_srv.lookup("scheduler")) == 3


def test_an_agent_that_answers_tcp_only_costs_no_wait_each_time(resolver: Lookup) -> None:
    """A firewall that eats UDP is noticed once."""
    with DnsServer(consul(*many(3))) as server:
        fake = server.answer
        server.answer = lambda asked: fake(asked) if asked.is_tcp else []
        dns_srv = resolver(server, request_timeout_seconds=5)
        for _ in range(4):
            assert len(dns_srv.lookup("scheduler")) == 3
        # Twice in one lookup; once where half a second went by before it could be sent again.
        assert sum(not each.is_tcp for each in server.asked) in (1, 2)


@pytest.mark.parametrize("tcp", [True, False])
def test_a_fifth_of_all_packets_lost_fails_no_lookup(resolver: Lookup, tcp: bool) -> None:
    """Queries are sent again, and with TCP beside UDP there is another way."""
    with DnsServer(consul(*many(3))) as server, LossyRelay(server, 0.2, seed=7) as relay:
        dns_srv = resolver(relay.address, request_timeout_seconds=2)
        for _ in range(40):
            assert len(dns_srv.lookup("scheduler")) == 3
            if tcp:  # as if the relay carried TCP: its port is what the channel connects to
                dns_srv._channels[0]._tcp_first_until = 0.0
        assert relay.lost > 10


def channel_to(agent: str, resolve: Callable[[str], list[str]] = resolve) -> Channel:
    names = HostNames(ttl_seconds=5, empty_ttl_seconds=1, most=10, resolve=resolve)
    return Channel(Host.parse(agent), names, Traffic(), Traffic())


def test_an_agents_name_is_not_resolved_for_longer_than_a_question_may_take() -> None:
    """The system's resolver may hang; an address needs none."""
    end = threading.Event()

    def hang(name: str) -> list[str]:
        assert end.wait(60)
        return ["127.0.0.1"]

    channel = channel_to("localhost:8600", hang)
    with pytest.raises(TimeoutError):
        channel.udp_limit(time.monotonic() + 0.01)
    with pytest.raises(TimeoutError):
        channel.ask_udp(b"..", 1, time.monotonic() + 0.01)
    end.set()
    assert channel.udp_limit(time.monotonic() + 60) == 65_000


def test_an_agent_that_cannot_be_reached_is_tried_at_its_next_address(resolver: Lookup) -> None:
    """IPv4 first; a name may have an address where nothing listens."""
    with DnsServer(consul(*many(2)), address="127.0.0.2") as server:
        settings = Settings(mode="catalog", addresses=(Host("two.example", server.port),))
        dns_srv = DnsSrv(settings, resolve=lambda name: ["127.0.0.1", "127.0.0.2"])
        with pytest.raises(Unavailable):
            dns_srv.lookup("scheduler")
        assert len(dns_srv.lookup("scheduler")) == 2
        dns_srv.close()


@pytest.mark.parametrize("by_tcp", [False, True])
def test_closing_ends_a_lookup_that_waits(resolver: Lookup, by_tcp: bool) -> None:
    """At once, whichever transport it waits at; a later one is refused."""
    ended = threading.Event()

    def silent(server: DnsServer, stream: socket.socket) -> None:
        ended.wait(DEADLINE_SECONDS)

    with DnsServer(lambda asked: [], serve_tcp=silent) as server:
        dns_srv = resolver(server)
        if by_tcp:
            dns_srv._channels[0].udp_is_silent()
        lookup = in_thread(lambda: dns_srv.lookup("scheduler"))
        transport = "tcp" if by_tcp else "udp"
        deadline = time.monotonic() + DEADLINE_SECONDS
        while not dns_srv.wire()[transport]["queries"] and time.monotonic() < deadline:
            time.sleep(0.01)
        dns_srv.close()
        assert isinstance(lookup.exception(DEADLINE_SECONDS), Unavailable)
        with pytest.raises(Unavailable, match="closed"):
            dns_srv.lookup("scheduler")
        ended.set()


def test_an_agent_is_local_by_loopback_or_by_its_address() -> None:
    """Whether fragments matter: loopback, and every address this machine has, do not need them."""
    assert channel_to("127.83.1.4:8600").udp_limit(0) == 65_000
    assert channel_to("[::1]:8600").udp_limit(0) == 65_000


# -- malicious servers


def srv(asked: Asked, *records: str, **options: object) -> bytes:
    return reply_to(asked, [f"SRV 1 1 {record}" for record in records], **options)  # type: ignore[arg-type]


GOOD = "80 0a000001.addr.dc1.consul."
EVIL = "666 06060606.addr.dc1.consul."


def other_question(asked: Asked) -> bytes:
    wrong = Asked(asked.wire.replace(b"scheduler", b"schedulex"), asked.is_tcp, asked.source)
    return srv(wrong, EVIL)


def test_wrong_ids_and_questions_are_not_listened_to(resolver: Lookup) -> None:
    """Whatever comes before the answer that does not belong to the query changes nothing."""

    def answer(asked: Asked) -> list[bytes]:
        evil = srv(asked, EVIL)
        other = bytes([asked.wire[0] ^ 1]) + evil[1:]
        return [other, other_question(asked), asked.wire, b"", b"\xff" * 9, srv(asked, GOOD)]

    with DnsServer(answer, tcp=False) as server:
        assert resolver(server).lookup("scheduler").hosts == hosts("10.0.0.1:80")


def test_others_cannot_answer(resolver: Lookup) -> None:
    """The socket is connected: the kernel keeps out what another address sends."""
    fake = consul(FakeInstance("10.0.0.1", 80))

    def answer(asked: Asked) -> Iterable[bytes]:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as stranger:
            stranger.sendto(srv(asked, EVIL), asked.source)
        return fake(asked)

    with DnsServer(answer) as server:
        assert resolver(server).lookup("scheduler").hosts == hosts("10.0.0.1:80")


def header(asked: Asked, answers: int, additional: int = 0) -> bytes:
    question = asked.wire[12 : 12 + asked.wire[12:].index(b"\0") + 5]
    return asked.wire[:2] + struct.pack("!BBHHHH", 0x84, 0, 1, answers, 0, additional) + question


def record(data: bytes, kind: int = 33, name: bytes = b"\xc0\x0c") -> bytes:
    return name + struct.pack("!HHIH", kind, 1, 0, len(data)) + data


BROKEN: dict[str, Callable[[Asked], bytes]] = {
    "truncated record": lambda asked: srv(asked, GOOD)[:-7],
    "pointer to itself": lambda asked: header(asked, 1) + b"\xc0" + bytes([len(header(asked, 1))]),
    "pointer loop": lambda asked: (
        header(asked, 1) + record(bytes(6) + b"\xc0" + bytes([len(header(asked, 1)) + 18]))
    ),
    "length past the end": lambda asked: header(asked, 1) + record(b"")[:-2] + b"\xff\xff",
    "garbage": lambda asked: asked.wire[:2] + b"\x84\x00" + b"\xa5" * 60_000,
    "a million records": lambda asked: header(asked, 0xFFFF, 0xFFFF),
    "CNAME": lambda asked: reply_to(asked, ["CNAME evil.example."]),
    "another owner": lambda asked: srv(asked, EVIL, owner="_other._tcp.service.consul."),
    "another owner, addresses beside": lambda asked: srv(
        asked, EVIL, owner="_o._tcp.service.consul.", additional=["a.consul. A 6.6.6.6"]
    ),
    "addresses": lambda asked: reply_to(asked, ["A 6.6.6.6"]),
    "nothing": lambda asked: b"",
    "a query": lambda asked: asked.wire,
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_answers_are_an_outage_and_never_a_host(resolver: Lookup, name: str) -> None:
    """No crash, no wrong host, no hang past the timeout; another agent may know better."""
    started = time.monotonic()
    with DnsServer(lambda asked: [BROKEN[name](asked)]) as bad:
        with pytest.raises(Unavailable):
            resolver(bad, request_timeout_seconds=TIMEOUT).lookup("scheduler")
        with DnsServer(consul(*many(2))) as good:
            dns_srv = resolver(bad, good, request_timeout_seconds=TIMEOUT)
            assert len(dns_srv.lookup("scheduler")) == 2
    assert time.monotonic() - started < 6 * TIMEOUT


def test_10000_additional_records_change_nothing(resolver: Lookup) -> None:
    """As many as a message holds, all for other names or of other kinds."""

    def answer(asked: Asked) -> list[bytes]:
        junk = b"".join(record(b"\6\6\6\6", 1, b"\0") for _ in range(3_500))
        data = struct.pack("!HHH", 1, 1, 80) + b"\x080a000001\x04addr\x03dc1\x06consul\x00"
        return [header(asked, 1, 3_500) + record(data) + junk]

    with DnsServer(answer) as server:
        assert resolver(server).lookup("scheduler").hosts == hosts("10.0.0.1:80")


@pytest.mark.parametrize(
    "label", [b"\0", b"a\0b", b"\xff\xfe", "ü".encode(), b"a b", b"a\nb", b"."]
)
def test_labels_that_are_no_host_name_are_left_out(resolver: Lookup, label: bytes) -> None:
    """NUL, spaces, line ends and bytes outside ASCII reach nobody who connects or logs."""
    bad = struct.pack("!HHH", 1, 1, 80) + bytes([len(label)]) + label + b"\x07example\x00"
    good = struct.pack("!HHH", 1, 1, 81) + b"\x02ok\x07example\x00"
    with DnsServer(lambda asked: [header(asked, 2) + record(bad) + record(good)]) as server:
        assert resolver(server).lookup("scheduler").hosts == hosts("192.0.2.81:81", "192.0.2.82:81")


def test_odd_addr_names_are_no_addresses(resolver: Lookup) -> None:
    """Hex digits of the wrong length, or none, are not decoded to anything."""
    names = ["zzzzzzzz.addr", "0a0001.addr", "0a 00 01.addr", "0a000001ff.addr"]

    def answer(asked: Asked) -> list[bytes]:
        if asked.kind != "SRV":
            return [reply_to(asked, rcode="NXDOMAIN")]
        return [srv(asked, *(f"{n + 1} {name}.dc1.consul." for n, name in enumerate(names[:2])))]

    with DnsServer(answer) as server:
        assert len(resolver(server).lookup("scheduler")) == 0


def drip(server: DnsServer, stream: socket.socket) -> None:
    asked = server.receive(stream)
    assert asked is not None
    stream.sendall(b"\xff\xff" + asked.wire[:2])
    while not server.closing.wait(0.005):
        stream.sendall(b"\x84")


def hang_up(server: DnsServer, stream: socket.socket) -> None:
    server.receive(stream)


def no_length(server: DnsServer, stream: socket.socket) -> None:
    server.receive(stream)
    stream.sendall(b"\0\0" * 100)
    server.closing.wait()


@pytest.mark.parametrize("serve", [drip, hang_up, no_length])
def test_tcp_that_drips_or_breaks_ends_at_the_timeout(
    resolver: Lookup, serve: Callable[[DnsServer, socket.socket], None]
) -> None:
    """An endless drip cannot hold a lookup, nor can one that hangs up or sends nothing at all."""
    started = time.monotonic()
    with DnsServer(lambda asked: [], serve_tcp=serve) as server, pytest.raises(Unavailable):
        tcp_only(resolver, server, request_timeout_seconds=TIMEOUT).lookup("scheduler")
    assert time.monotonic() - started < 4 * TIMEOUT


def test_a_flood_of_foreign_packets_ends_at_the_timeout(resolver: Lookup) -> None:
    """However many wrong replies arrive, the deadline is looked at between any two."""
    done = threading.Event()

    def flood(asked: Asked) -> Iterable[bytes]:
        while not done.is_set() and not server.closing.is_set():
            yield b"\0\0" + asked.wire[2:]

    started = time.monotonic()
    with DnsServer(flood, tcp=False) as server:
        with pytest.raises(TimedOut):
            resolver(server, request_timeout_seconds=TIMEOUT).lookup("scheduler")
        done.set()
    assert time.monotonic() - started < 4 * TIMEOUT


def test_many_targets_without_addresses_end_at_the_timeout(resolver: Lookup) -> None:
    """A server that names nodes and then falls silent costs one lookup's bound, not one a node."""

    def answer(asked: Asked) -> list[bytes]:
        if asked.kind != "SRV":
            return []
        return [srv(asked, *(f"{n + 1} n{n}.node.dc1.consul." for n in range(40)))]

    started = time.monotonic()
    outage = pytest.raises(Unavailable, match="none can be used")  # and not "nobody"
    with DnsServer(answer, tcp=False) as server, outage:
        resolver(server, request_timeout_seconds=1.5).lookup("scheduler")
    assert time.monotonic() - started < 10  # one a node, and of each kind, would be 120


# -- what is imported


def test_http_is_never_imported() -> None:
    """Catalog mode works without consul, requests and urllib3."""
    program = (
        "import sys, consul_matchmaker.backends.dns.resolver;"
        "print({'consul', 'requests', 'urllib3'} & set(sys.modules))"
    )
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert run.stdout == "set()\n", run.stderr


def test_select_has_room_for_many_descriptors() -> None:
    """Sockets are waited for by their own timeout (poll), so descriptors above 1,023 are fine."""
    assert hasattr(select, "poll")


# -- what is counted

UNHURRIED = 60  # nothing is sent again for a tenth of it, however busy the machine is


class Counted:
    """Has *answer* answer, and knows how many bytes that came to, by transport."""

    def __init__(self, answer: Callable[[Asked], Iterable[bytes]]) -> None:
        self.answer = answer
        self.replied = {False: 0, True: 0}

    def __call__(self, asked: Asked) -> list[bytes]:
        replies = list(self.answer(asked))
        self.replied[asked.is_tcp] += sum(map(len, replies)) + 2 * asked.is_tcp * len(replies)
        return replies


def sent(server: DnsServer, *, tcp: bool) -> int:
    return sum(len(each.wire) + 2 * tcp for each in server.asked if each.is_tcp is tcp)


def test_a_lookup_by_udp_is_counted_exactly(resolver: Lookup) -> None:
    """One query, one reply, their bytes; nothing by TCP."""
    fake = Counted(consul(*many(3)))
    with DnsServer(fake) as server:
        dns_srv = resolver(server, request_timeout_seconds=UNHURRIED)
        dns_srv.lookup("scheduler")
        udp = {
            **NO_TRAFFIC,
            "queries": 1,
            "replies": 1,
            "sent_bytes": sent(server, tcp=False),
            "received_bytes": fake.replied[False],
        }
        assert dns_srv.wire() == {"udp": udp, "tcp": NO_TRAFFIC}
        assert udp["sent_bytes"] and udp["received_bytes"]
        dns_srv.close()
        assert dns_srv.wire()["udp"] == udp


def test_an_answer_completed_by_tcp_is_counted_exactly(resolver: Lookup) -> None:
    """Every repeated query with its length before it; the cut answer by UDP as well."""
    fake = Counted(consul(*many(1_500), udp_limit=4_096))
    with DnsServer(fake) as server:
        dns_srv = resolver(server, request_timeout_seconds=UNHURRIED)
        assert dns_srv.lookup("scheduler").is_complete
        by_tcp = sum(each.is_tcp for each in server.asked)
    wire = dns_srv.wire()
    assert (wire["udp"]["replies"], wire["udp"]["received_bytes"]) == (1, fake.replied[False])
    assert wire["tcp"] == {
        **NO_TRAFFIC,
        "queries": by_tcp,
        "replies": by_tcp,
        "sent_bytes": sent(server, tcp=True),
        "received_bytes": fake.replied[True],
    }


def test_what_gets_no_reply_is_sent_again_and_counted(resolver: Lookup) -> None:
    """By UDP after a pause: each sending is a query, all but the first are retries."""
    dropped = []

    def lossy(asked: Asked) -> Iterable[bytes]:
        if not asked.is_tcp:
            dropped.append(asked)
            if len(dropped) < 3:
                return ()
        return consul(*many(1))(asked)

    with DnsServer(lossy, tcp=False) as server:
        dns_srv = resolver(server, request_timeout_seconds=5)
        dns_srv.lookup("scheduler")
        udp = dns_srv.wire()["udp"]
        assert udp["sent_bytes"] == udp["queries"] * len(server.asked[0].wire)
    # Two were lost, in one round by UDP or, where that was given up for TCP, in two.
    assert udp["queries"] >= 3
    assert 1 <= udp["retries"] < udp["queries"]
    assert (udp["replies"], udp["error_replies"]) == (1, 0)
    assert set(dns_srv.wire()["tcp"].values()) == {0}  # no connection came about


def test_a_closed_connection_is_a_retry(resolver: Lookup) -> None:
    """Consul ends connections that were idle: what is sent on the next one is a retry."""

    def once(server: DnsServer, stream: socket.socket) -> None:
        asked = server.receive(stream)
        assert asked is not None
        (reply,) = consul(*many(1))(asked)
        stream.sendall(len(reply).to_bytes(2, "big") + reply)

    with DnsServer(consul(*many(1)), udp=False, serve_tcp=once) as server:
        dns_srv = resolver(server, request_timeout_seconds=5)
        for _ in range(2):
            dns_srv.lookup("scheduler")
        tcp = dns_srv.wire()["tcp"]
        assert len(server.asked) == 2
    # The second lookup may have sent its query into the closed connection, or been refused there.
    assert (tcp["queries"] - tcp["retries"], tcp["retries"]) in ((1, 1), (2, 1))
    assert tcp["replies"] == 2


def test_a_reply_that_says_no_is_counted_as_one(resolver: Lookup) -> None:
    """SERVFAIL is asked about three times; NXDOMAIN is an answer like any other."""
    codes = iter(["NXDOMAIN", *["SERVFAIL"] * 3])
    with DnsServer(lambda asked: [reply_to(asked, rcode=next(codes))]) as server:
        dns_srv = resolver(server, request_timeout_seconds=UNHURRIED)
        dns_srv.lookup("scheduler")
        assert dns_srv.wire()["udp"]["error_replies"] == 0
        with pytest.raises(Unavailable):
            dns_srv.lookup("scheduler")
        udp = dns_srv.wire()["udp"]
    assert (udp["queries"], udp["retries"]) == (4, 0)
    assert (udp["replies"], udp["error_replies"]) == (4, 3)
