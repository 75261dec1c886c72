"""DnsSrv against DNS servers on real sockets: like Consul, broken, lossy, slow and malicious."""

from __future__ import annotations

import logging
import os
import random
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
from consul_matchmaker.errors import InvalidTopic, TimedOut, Unavailable
from consul_matchmaker.model import Host, Instance, Snapshot
from consul_matchmaker.settings import Settings
from tests.dns_servers import (
    ASKED,
    Answer,
    Asked,
    DnsServer,
    FakeConsul,
    FakeInstance,
    header,
    record,
    reply_to,
)
from tests.doubles import DEADLINE_SECONDS, NO_TRAFFIC, ManualClock, in_thread

pytestmark = pytest.mark.system

Lookup = Callable[..., DnsSrv]
Ask = Callable[..., Snapshot]
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

    def make(
        *servers: DnsServer | str,
        resolve: Callable[[str], list[str]] = resolve,
        **settings: object,
    ) -> DnsSrv:
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


@pytest.fixture
def ask(resolver: Lookup) -> Ask:
    """Looks "scheduler" up once, at a server of its own that gives *answer*."""

    def lookup(answer: Answer, server: str | None = None, **settings: object) -> Snapshot:
        with DnsServer(answer) as agent:
            return resolver(agent, **settings).lookup("scheduler", server)

    return lookup


def says(*answers: str, **options: Any) -> Answer:
    """The same answer to whatever is asked."""
    return lambda asked: [reply_to(asked, answers, **options)]


def targets(*answers: str, other: str) -> Answer:
    """SRV records *answers*; to whatever else is asked, the code *other*."""
    return lambda asked: [
        reply_to(asked, answers) if asked.kind == "SRV" else reply_to(asked, rcode=other)
    ]


def unless(is_wrong: Callable[[Asked], bool], answer: Answer, rcode: str | None) -> Answer:
    """*answer*, but where *is_wrong* an error, or silence."""

    def choose(asked: Asked) -> Iterable[bytes]:
        if not is_wrong(asked):
            return answer(asked)
        return [reply_to(asked, rcode=rcode)] if rcode else []

    return choose


def many(count: int, *, nodes: bool = False, text: str = "") -> list[FakeInstance]:
    return [
        FakeInstance(f"10.1.{i >> 8}.{i & 255}", 9000 + i, f"n{i}" if nodes else None, (), text)
        for i in range(count)
    ]


def consul(*instances: FakeInstance, **options: object) -> FakeConsul:
    return FakeConsul({("scheduler", ""): list(instances)}, **options)  # type: ignore[arg-type]


def hosts(*texts: str) -> tuple[Host, ...]:
    return tuple(sorted(Host.parse(text) for text in texts))


def tcp_only(resolver: Lookup, server: DnsServer, **settings: object) -> DnsSrv:
    """A resolver that asks by TCP first."""
    dns_srv = resolver(server, **settings)
    for channel in dns_srv._channels:
        channel.udp_is_silent()
    return dns_srv


# -- what answers mean


def test_every_form_of_target(ask: Ask) -> None:
    """Addresses in the name, node names, IPv6 and host names: all are hosts; nodes are servers."""
    snapshot = ask(
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
    assert snapshot.hosts == hosts(
        *("10.9.9.5:1", "[2001:db8::1]:2", "10.0.0.7:3", "[::1]:4", "192.0.2.5:5"),
        *("127.0.0.1:6", "10.9.9.5:7"),
    )
    servers = {instance.host.port: instance.server for instance in snapshot.instances}
    assert servers == dict.fromkeys(range(1, 8)) | {3: "node.with.dots", 4: "n4"}
    assert (snapshot.source, snapshot.is_complete) == ("dns", True)


def test_priority_and_weight_are_kept(ask: Ask) -> None:
    """RFC 2782's preference reaches whoever selects."""
    snapshot = ask(says("SRV 7 3 80 0a000001.addr.dc1.consul."))
    assert snapshot.instances == (Instance(Host("10.0.0.1", 80), None, 7, 3),)


def test_a_snapshot_knows_when_it_was_taken(ask: Ask, clock: ManualClock) -> None:
    """Its age counts on the clock that was handed in."""
    snapshot = ask(consul(*many(1)))
    clock.now += 3
    assert snapshot.age_seconds == 3


@pytest.mark.parametrize(("ttl", "seconds"), [(0, None), (9, 9.0), (2**31, None)])
def test_a_ttl_above_zero_is_passed_on(ask: Ask, ttl: int, seconds: float | None) -> None:
    """Consul's default 0 says nothing, and a TTL with its highest bit set is 0 (RFC 2181)."""
    assert ask(consul(*many(2), ttl=ttl)).ttl_seconds == seconds


def test_nobody_is_an_answer(ask: Ask) -> None:
    """What Consul does not know, or denies, has no hosts; NOERROR without records neither.  A SOA's
    minimum is its TTL."""
    snapshot = ask(consul())
    assert (len(snapshot), snapshot.is_complete, snapshot.ttl_seconds) == (0, True, None)
    snapshot = ask(says(authority=["consul. 30 SOA ns.consul. postmaster.consul. 1 2 3 4 5"]))
    assert (len(snapshot), snapshot.ttl_seconds) == (0, 5.0)


def test_port_0_is_left_out_and_said_once(
    resolver: Lookup, caplog: pytest.LogCaptureFixture
) -> None:
    """An older agent gives newer multi-port services port 0: nobody could connect there.  The
    answer says it, too: which agent was asked for which name, how, how much came, what of it."""
    with DnsServer(consul(FakeInstance("10.0.0.1", 0), FakeInstance("10.0.0.2", 80))) as server:
        dns_srv = resolver(server)
        for _ in range(3):
            snapshot = dns_srv.lookup("scheduler")
            assert snapshot.hosts == hosts("10.0.0.2:80")
    assert [r.getMessage().count("port 0") for r in caplog.records] == [1]
    details: Any = snapshot.details
    assert list(details["left_out"].values()) == ["port 0"]
    (asked,) = details["asked"]
    assert asked["name"] == "_scheduler._tcp.service.consul."
    assert asked["agent"] == server.address
    assert (asked["transport"], asked["rcode"]) == ("udp", "NOERROR")
    assert (asked["answers"], asked["records"]) == (1, 2)


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
    asked = [(each.name.partition(".")[0], each.kind) for each in server.asked]
    assert sorted(each for each in asked if each[1] != "SRV") == [
        *(("n1", "A"), ("n2", "A"), ("n2", "AAAA"))
    ]


@pytest.mark.parametrize(
    ("target", "other", "is_complete"),
    [
        pytest.param("gone.node.dc1.consul.", "NXDOMAIN", True, id="a node that left meanwhile"),
        pytest.param("n1.node.dc1.consul.", "SERVFAIL", False, id="a node, in an outage"),
        pytest.param("gone.example.", "REFUSED", True, id="a name that nobody knows"),
        pytest.param("unsure.example.", "REFUSED", False, id="a name the system cannot tell"),
        pytest.param(".", "REFUSED", True, id="RFC 2782: decidedly not available"),
        pytest.param("zzzzzzzz.addr.dc1.consul.", "NXDOMAIN", True, id="no hex digits"),
        pytest.param("0a0001.addr.dc1.consul.", "NXDOMAIN", True, id="too few hex digits"),
    ],
)
def test_a_target_without_address_is_no_host(
    ask: Ask, target: str, other: str, is_complete: bool
) -> None:
    """A definite no is an answer: the others are all there is, and `details` says who is not.  An
    outage is no proof of absence: with others the answer is incomplete; alone it is an outage."""
    lost = f"SRV 1 1 1 {target}"
    snapshot = ask(targets(lost, "SRV 1 1 2 ok.example.", other=other))
    assert snapshot.hosts == hosts("192.0.2.81:2", "192.0.2.82:2")
    assert snapshot.is_complete == is_complete
    assert list(snapshot.details["left_out"]) == [target]  # type: ignore[call-overload]
    if is_complete:
        assert len(ask(targets(lost, other=other))) == 0
    else:
        with pytest.raises(Unavailable, match=target):
            ask(targets(lost, other=other))


def test_a_resolver_that_hangs_holds_no_lookup(ask: Ask) -> None:
    """The lookup ends in its own time, whatever the system's resolver does."""
    end = threading.Event()

    def hang(name: str) -> list[str]:
        end.wait()
        return []

    try:
        with pytest.raises(Unavailable):
            ask(says("SRV 1 1 1 db.example."), resolve=hang, request_timeout_seconds=TIMEOUT)
    finally:
        end.set()


def test_a_name_outside_consul_is_resolved_by_the_system(ask: Ask) -> None:
    """Consul is not asked for names that are not in its domain."""
    answer = targets("SRV 1 1 1 my.node.example.org.", other="SERVFAIL")
    assert ask(answer).hosts == hosts("192.0.2.9:1")


# -- what is asked


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({"tag": "Gold", "datacenters": "dc2"}, "_scheduler._gold.service.dc2.consul."),
        ({"service_template": "mm-{topic}"}, "_mm-scheduler._tcp.service.consul."),
        ({"service_map": "scheduler=near.by.query"}, "near.by.query.consul."),
    ],
)
def test_the_name_that_is_asked_for(resolver: Lookup, settings: dict[str, str], name: str) -> None:
    """As the settings say."""
    with DnsServer(says(rcode="NXDOMAIN")) as server:
        resolver(server, **settings).lookup("scheduler")
        assert server.names() == [name]


@pytest.mark.parametrize(
    ("topic", "domain", "remedy"),
    [("t" * 80, "consul", "service_map"), ("t" * 60, ".".join(["d" * 60] * 4), "DNS")],
)
def test_a_topic_dns_cannot_carry_is_invalid_and_nothing_is_asked(
    resolver: Lookup, topic: str, domain: str, remedy: str
) -> None:
    """InvalidTopic, with service_map as the remedy; also where the domain leaves no room."""
    with DnsServer(consul()) as server:
        with pytest.raises(InvalidTopic, match=remedy):
            resolver(server, domain=domain).lookup(topic)
        assert server.asked == []


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
    for words in ("'my.dotted'", "'my-dotted'", "service_map", "strict_names"):
        assert words in said


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

    def queries(numbers: Iterable[int]) -> list[bytes]:
        return [dns_srv._query(f"topic{number}.service.consul", "SRV") for number in numbers]

    first = queries(range(6000))
    assert all(one is other for one, other in zip(first, queries(range(6000)), strict=True))
    queries(range(6000, 12_001))
    assert queries([1])[0] is first[1]
    assert dns_srv._query.cache_info().currsize == 12_000


@pytest.mark.finding("C9")
def test_host_names_are_remembered_for_a_ttl(resolver: Lookup, clock: ManualClock) -> None:
    """This machine's resolver is asked once a TTL for a name, however many lookups need it."""
    asked: list[str] = []

    def count(name: str) -> list[str]:
        asked.append(name)
        return ["192.0.2.1"]

    with DnsServer(says("SRV 1 1 1 db.example.")) as server:
        dns_srv = resolver(server, ttl_seconds=5, resolve=count)
        for _ in range(5):
            assert dns_srv.lookup("scheduler").hosts == hosts("192.0.2.1:1")
        assert asked == ["db.example"]
        clock.now += 5
        dns_srv.lookup("scheduler")
        assert len(asked) == 2


@pytest.mark.finding("A1")
def test_an_answer_is_as_old_as_its_question(resolver: Lookup, clock: ManualClock) -> None:
    """What Consul took to answer counts; of several questions the first one does, and what an
    earlier agent wasted does not."""
    fake = consul(*many(2))

    def slow(asked: Asked) -> list[bytes]:
        clock.now += 6
        return fake(asked)

    def useless(asked: Asked) -> list[bytes]:
        clock.now += 100
        return [reply_to(asked, rcode="REFUSED")]

    with DnsServer(slow) as server, DnsServer(useless) as bad:
        assert resolver(server).lookup("scheduler").age_seconds == 6
        assert resolver(server, shards=2).lookup("scheduler").age_seconds == 12
        assert resolver(server, datacenters="dc9,dc8").lookup("nobody").age_seconds == 12
        assert resolver(bad, server).lookup("scheduler").age_seconds == 6


@pytest.mark.finding("D3")
def test_an_agent_due_for_a_try_is_not_kept_from_others_by_whoever_has_no_time(
    resolver: Lookup, clock: ManualClock
) -> None:
    """A caller whose deadline has passed, or whose question is wrong, tries nobody: the next one
    finds the agent that came back."""
    with DnsServer(says(rcode="REFUSED")) as server:
        dns_srv = resolver(server, domain=".".join(["d" * 60] * 3))
        with pytest.raises(Unavailable):
            dns_srv.lookup("scheduler")
        clock.now += PATIENCE + 60
        with pytest.raises(TimedOut):
            dns_srv.lookup("scheduler", timeout_seconds=-1)
        assert dns_srv.status()["agents_away"] == []
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


def test_server_by_node_name_by_address_and_beside_a_tag(ask: Ask) -> None:
    """Where no instance has such a tag, the topic's own answer tells which one is meant.  DNS can
    ask for one tag only: with the settings' tag the server is what is in both answers."""
    fake = consul(
        FakeInstance("10.0.0.1", 1, "n1", ("gold", "a")),
        FakeInstance("10.0.0.2", 2, "n2", ("lead", "a")),
    )
    for name in ("n2", "10.0.0.2", "10.0.0.2:2"):
        assert ask(fake, name).hosts == hosts("10.0.0.2:2")
    assert len(ask(fake, "n3")) == 0
    assert ask(fake, "a", tag="gold").hosts == hosts("10.0.0.1:1")


def test_the_first_datacenter_that_has_hosts(resolver: Lookup) -> None:
    """The order is one of preference: the next is asked only when one has none.  One that cannot be
    asked is not one without hosts: another one's will do, but without any it is an outage."""
    fake = FakeConsul({("a", "dc1"): many(1), ("a", "dc2"): many(2), ("b", "dc2"): many(3)})
    with DnsServer(fake) as server:
        dns_srv = resolver(server, datacenters="dc1,dc2")
        assert len(dns_srv.lookup("a")) == 1
        assert len(server.asked) == 1
        assert len(dns_srv.lookup("b")) == 3
        assert len(dns_srv.lookup("c")) == 0
        server.answer = unless(lambda asked: ".dc1." in asked.name, fake, "SERVFAIL")
        assert len(dns_srv.lookup("a")) == 2
        with pytest.raises(Unavailable):
            dns_srv.lookup("c")


def test_queries_cannot_be_guessed(resolver: Lookup) -> None:
    """Every query has a new random id and a port of its own: who forges must guess both."""
    with DnsServer(consul(*many(3))) as server:
        dns_srv = resolver(server)
        for _ in range(30):
            dns_srv.lookup("scheduler")
    assert len({each.wire[:2] for each in server.asked}) > 25
    assert len({each.source for each in server.asked}) > 15  # a port may come up again


# -- complete, or said so


@pytest.mark.parametrize("text", ["", "consul-network-segment="])
def test_what_fits_a_packet_comes_by_one_exchange(resolver: Lookup, text: str) -> None:
    """By UDP, and surely all.  What does not comes by TCP, and the next time by TCP at once, over
    the same connection, as long as it is that large."""
    with DnsServer(consul(*many(3, text=text))) as server:
        dns_srv = resolver(server)
        for count in (3, 200, 200, 60, 3, 3):
            server.answer = consul(*many(count, text=text))
            snapshot = dns_srv.lookup("scheduler")
            assert (len(snapshot), snapshot.is_complete) == (count, True)
        by_tcp = [False, False, True, True, True, True, False]
        assert [each.is_tcp for each in server.asked] == by_tcp
        assert server.connections == 1


def test_an_answer_cut_on_tcp_too_is_completed_by_repeating(resolver: Lookup) -> None:
    """Consul shuffles before it cuts: the union of answers grows until nothing can be missing."""
    with DnsServer(consul(*many(1_500))) as server:
        snapshot = resolver(server).lookup("scheduler")
    assert (len(snapshot), snapshot.is_complete) == (1_500, True)
    assert 10 <= len(server.asked) <= 25
    assert server.connections <= 2


def test_1024_answers_on_tcp_are_never_taken_for_all(ask: Ask) -> None:
    """Consul keeps 1,024 at most, on TCP only, and does not say so (fact A2)."""
    snapshot = ask(consul(*many(1_100), additional=False))
    assert (len(snapshot), snapshot.is_complete) == (1_100, True)


@pytest.mark.parametrize("count", range(5, 17))
def test_metadata_that_pushed_an_instance_out_is_noticed(ask: Ask, count: int) -> None:
    """A reply 100 bytes too long loses one instance and all TXT records, and comes out at half of
    the limit (measured on 1.8.7: 9 of 10 hosts in 666 of 1,232 bytes)."""
    text = "consul-network-segment=" + "x" * 20
    snapshot = ask(consul(*many(count, nodes=True, text=text)))
    assert (len(snapshot), snapshot.is_complete) == (count, True)


@pytest.mark.parametrize("failures", [2, 9])
def test_failures_in_the_middle_of_a_union_are_not_its_end(resolver: Lookup, failures: int) -> None:
    """A SERVFAIL or two are asked again; more leave what was found, and that it is not all."""
    fake = consul(*many(60))
    with DnsServer(fake) as server:
        server.answer = unless(
            lambda asked: 1 < len(server.asked) <= 1 + failures, fake, "SERVFAIL"
        )
        snapshot = resolver(server).lookup("scheduler")
    assert snapshot.is_complete == (failures == 2)
    assert (len(snapshot) == 60) == (failures == 2)
    assert len(snapshot) > 5


def test_a_union_that_cannot_end_in_time_says_so(resolver: Lookup) -> None:
    """A fifth of the hosts at a time, slowly: what was found, within the bound, incomplete."""
    fake = consul(*many(4_000))

    def answer(asked: Asked) -> Iterable[bytes]:
        if len(server.asked) > 2:
            server.closing.wait(1)
        return fake(asked)

    with DnsServer(answer) as server:
        started = time.monotonic()
        snapshot = resolver(server, request_timeout_seconds=1.5).lookup("scheduler")
        assert time.monotonic() - started < 8
    assert 700 <= len(snapshot) < 4_000
    assert not snapshot.is_complete


def test_repeats_of_one_and_the_same_answer_prove_nothing(resolver: Lookup) -> None:
    """A cache between us and Consul does not shuffle: asking again is useless, and said so."""
    with DnsServer(consul(*many(1_500), is_shuffled=False)) as server:
        assert not resolver(server).lookup("scheduler").is_complete
        assert len(server.asked) < 7


def test_tc_on_tcp_makes_no_loop(resolver: Lookup) -> None:
    """With enable_truncate Consul says TC on TCP too; the union ends by its own rule."""
    answers = [f"SRV 1 1 {port} 0a000001.addr.dc1.consul." for port in range(1, 6)]
    with DnsServer(says(*answers, truncated=True)) as server:
        assert len(resolver(server).lookup("scheduler")) == 5
        assert len(server.asked) < 10


def test_an_answer_that_tcp_cannot_complete_is_kept(resolver: Lookup) -> None:
    """Where TCP is closed, what came by UDP is worth more than an error, and is incomplete."""
    with DnsServer(consul(*many(300)), tcp=False) as server:
        snapshot = resolver(server).lookup("scheduler")
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
        names = [f"_scheduler._s0{n}.service.consul." for n in range(4)]
        assert list(dict.fromkeys(server.names())) == names


def test_shards_that_cannot_be_asked_for_leave_the_answer_incomplete(ask: Ask) -> None:
    """The others' hosts are worth more than an error; without any it is an outage."""
    fake = consul(FakeInstance("10.0.0.1", 1, tags=("s00",)))
    answer = unless(lambda asked: "_s01" in asked.name, fake, "REFUSED")
    snapshot = ask(answer, shards=2)
    assert (snapshot.hosts, snapshot.is_complete) == (hosts("10.0.0.1:1"), False)
    fake.services["scheduler", ""].clear()
    with pytest.raises(Unavailable):
        ask(answer, shards=2)


# -- a kept TCP connection


def some_queries(count: int) -> Callable[[DnsServer, socket.socket], None]:
    """Closes each connection after *count* queries, as Consul does after 128."""

    def serve(server: DnsServer, stream: socket.socket) -> None:
        for _ in range(count):
            if (asked := server.receive(stream)) is not None:
                server.reply(stream, asked)

    return serve


def test_a_connection_the_agent_closed_is_quietly_opened_again(
    resolver: Lookup, caplog: pytest.LogCaptureFixture
) -> None:
    """Consul ends connections after 128 queries and when idle: no lookup fails for that, and what
    is sent once more is counted as a retry."""
    caplog.set_level(logging.DEBUG)
    with DnsServer(consul(*many(3)), serve_tcp=some_queries(2)) as server:
        dns_srv = tcp_only(resolver, server)
        assert [len(dns_srv.lookup("scheduler")) for _ in range(7)] == [3] * 7
        assert server.connections == 4
    tcp = dns_srv.wire()["tcp"]
    # A query may have been sent into the closed connection, or been refused there.
    assert tcp["retries"] == 3
    assert 7 <= tcp["queries"] <= 10
    assert tcp["replies"] == 7
    assert caplog.records == []


def test_a_union_survives_the_end_of_its_connection(resolver: Lookup) -> None:
    """What was not answered yet is asked on a new connection."""
    with DnsServer(consul(*many(1_000)), serve_tcp=some_queries(3)) as server:
        snapshot = tcp_only(resolver, server).lookup("scheduler")
    assert (len(snapshot), snapshot.is_complete) == (1_000, True)
    assert server.connections > 2


def test_a_forked_child_leaves_its_parents_connection_alone(resolver: Lookup) -> None:
    """Two processes on one connection would read each other's answers: the child's copy is closed,
    and what it makes anew has a connection of its own."""
    with DnsServer(consul(*many(3))) as server:
        dns_srv = tcp_only(resolver, server)
        dns_srv.lookup("scheduler")
        (parents,) = dns_srv._channels[0]._open
        if os.fork() == 0:
            found = 0
            try:
                if parents.fileno() == -1:
                    found = len(tcp_only(resolver, server).lookup("scheduler"))
            finally:
                os._exit(found)
        _, status = os.wait()
        assert os.waitstatus_to_exitcode(status) == 3
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
    with DnsServer(fake) as server:
        server.answer = unless(lambda asked: len(server.asked) < 3, fake, "SERVFAIL")
        assert len(resolver(server).lookup("scheduler")) == 3


@pytest.mark.parametrize(
    ("rcode", "remedy"), [("SERVFAIL", "leader"), ("REFUSED", "`domain`"), ("FORMERR", "Consul")]
)
def test_an_error_is_an_outage_and_names_the_remedy(
    resolver: Lookup, rcode: str, remedy: str
) -> None:
    """Unavailable, with the agent, what it answered, and what to look at."""
    with DnsServer(says(rcode=rcode)) as server:
        with pytest.raises(Unavailable, match=remedy) as caught:
            resolver(server).lookup("scheduler")
        assert len(server.asked) == (3 if rcode == "SERVFAIL" else 1)
    assert server.address in str(caught.value)
    assert rcode in str(caught.value)
    assert not isinstance(caught.value, TimedOut)


def silent(server: DnsServer, stream: socket.socket) -> None:
    server.closing.wait()


def test_no_answer_is_timed_out_and_not_empty(resolver: Lookup) -> None:
    """Silence on both transports ends with the timeout."""
    with DnsServer(lambda asked: [], serve_tcp=silent) as server:
        started = time.monotonic()
        with pytest.raises(TimedOut, match="request_timeout_seconds"):
            resolver(server, request_timeout_seconds=TIMEOUT).lookup("scheduler")
        assert TIMEOUT * 0.9 < time.monotonic() - started < TIMEOUT * 3


def test_a_closed_port_is_known_at_once(resolver: Lookup) -> None:
    """Nothing listens there: no need to wait for the timeout.  A firewall may reject UDP and let
    TCP through."""
    with DnsServer(consul(), udp=False, tcp=False) as server:
        started = time.monotonic()
        with pytest.raises(Unavailable, match="cannot be reached"):
            resolver(server).lookup("scheduler")
        assert time.monotonic() - started < PATIENCE / 6
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
    """REFUSED and silence of one are answered by another; that it has no leader costs three
    queries once, and not at each lookup."""
    with DnsServer(consul(*many(3))) as good:
        with DnsServer(says(rcode="REFUSED")) as bad:
            assert len(resolver(bad, good).lookup("scheduler")) == 3
        with DnsServer(lambda asked: []) as mute:
            dns_srv = resolver(mute, good, request_timeout_seconds=TIMEOUT)
            assert len(dns_srv.lookup("scheduler")) == 3
        with DnsServer(says(rcode="SERVFAIL")) as bad:
            dns_srv = resolver(bad, good)
            for _ in range(4):
                assert len(dns_srv.lookup("scheduler")) == 3
            assert len(bad.asked) == 3
            assert dns_srv.status() == {"agent": good.address, "agents_away": []}


def test_a_dead_agent_costs_one_timeout(
    resolver: Lookup, clock: ManualClock, caplog: pytest.LogCaptureFixture
) -> None:
    """The one that took over stays in use, however long; when it fails, the other may be back."""
    caplog.set_level(logging.INFO)
    fake = consul(*many(3))
    alive: list[str] = ["b"]

    def answer(name: str) -> Answer:
        return unless(lambda asked: name not in alive, fake, None)

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


def test_a_lookup_with_little_time_ends_in_time_and_blames_no_agent(
    resolver: Lookup, caplog: pytest.LogCaptureFixture
) -> None:
    """It answers like any other where there is time; where there is not, it says nothing of the
    agent: neither that it is away, nor that its UDP is silent."""
    answer = unless(lambda asked: "_scheduler" not in asked.name, consul(*many(3)), None)
    with DnsServer(answer) as server:
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
    fake = consul(*many(60))
    may_answer = threading.Event()

    def answer(asked: Asked) -> Iterable[bytes]:
        if asked.is_tcp:
            may_answer.wait(PATIENCE)
        return fake(asked)

    with DnsServer(answer) as server:
        dns_srv = resolver(server)
        started = time.monotonic()
        some = dns_srv.lookup("scheduler", timeout_seconds=1)
        assert time.monotonic() - started < PATIENCE / 2
        assert not some.is_complete
        assert 3 < len(some) < 60
        assert dns_srv.status() == {"agent": server.address, "agents_away": []}
        may_answer.set()
        assert len(dns_srv.lookup("scheduler")) == 60


def test_a_lookup_says_how_long_it_may_need(resolver: Lookup) -> None:
    """Three exchanges, each of which may take the whole request_timeout_seconds."""
    assert resolver("127.0.0.1:1", request_timeout_seconds=2).longest_lookup_seconds == 6


def test_an_agent_that_answers_tcp_only_costs_no_wait_each_time(resolver: Lookup) -> None:
    """A firewall that eats UDP is noticed once."""
    with DnsServer(unless(lambda asked: not asked.is_tcp, consul(*many(3)), None)) as server:
        dns_srv = resolver(server, request_timeout_seconds=5)
        for _ in range(4):
            assert len(dns_srv.lookup("scheduler")) == 3
        # Twice in one lookup; once where half a second went by before it could be sent again.
        assert sum(not each.is_tcp for each in server.asked) in (1, 2)


@pytest.mark.parametrize("tcp", [True, False])
def test_a_fifth_of_all_packets_lost_fails_no_lookup(resolver: Lookup, tcp: bool) -> None:
    """Queries are sent again, and with TCP beside UDP there is another way."""
    chance = random.Random(7)
    lost: list[bool] = []

    def is_lost(asked: Asked) -> bool:
        """On its way, or its reply; TCP repairs that."""
        lost.append(not asked.is_tcp and chance.random() > 0.8 * 0.8)
        return lost[-1]

    with DnsServer(unless(is_lost, consul(*many(3)), None), tcp=tcp) as server:
        dns_srv = resolver(server, request_timeout_seconds=2)
        for _ in range(40):
            assert len(dns_srv.lookup("scheduler")) == 3
            dns_srv._channels[0]._tcp_first_until = 0.0  # so that UDP is asked all the same
        assert sum(lost) > 5


def test_an_agents_name_is_not_resolved_for_longer_than_a_question_may_take() -> None:
    """The system's resolver may hang; an address needs none."""
    end = threading.Event()

    def hang(name: str) -> list[str]:
        assert end.wait(60)
        return ["127.0.0.1"]

    names = HostNames(ttl_seconds=5, empty_ttl_seconds=1, most=10, resolve=hang)
    channel = Channel(Host.parse("localhost:8600"), names, 1, Traffic(), Traffic())
    for ask in (channel.ask_udp, channel.ask_tcp):
        with pytest.raises(OSError, match="resolver did not answer"):
            ask(b"..", time.monotonic() + 0.01)
    end.set()


def test_an_agent_that_cannot_be_reached_is_tried_at_its_next_address(resolver: Lookup) -> None:
    """IPv4 first; a name may have an address where nothing listens."""
    with DnsServer(consul(*many(2)), address="127.0.0.2") as server:
        addresses = ["127.0.0.1", "127.0.0.2"]
        dns_srv = resolver(f"two.example:{server.port}", resolve=lambda name: addresses)
        with pytest.raises(Unavailable):
            dns_srv.lookup("scheduler")
        assert len(dns_srv.lookup("scheduler")) == 2


@pytest.mark.parametrize("by_tcp", [False, True])
def test_closing_ends_a_lookup_that_waits(resolver: Lookup, by_tcp: bool) -> None:
    """At once, whichever transport it waits at; a later one is refused."""
    with DnsServer(lambda asked: [], serve_tcp=silent) as server:
        dns_srv = tcp_only(resolver, server) if by_tcp else resolver(server)
        lookup = in_thread(lambda: dns_srv.lookup("scheduler"))
        transport = "tcp" if by_tcp else "udp"
        deadline = time.monotonic() + DEADLINE_SECONDS
        while not dns_srv.wire()[transport]["queries"] and time.monotonic() < deadline:
            time.sleep(0.01)
        dns_srv.close()
        assert isinstance(lookup.exception(DEADLINE_SECONDS), Unavailable)
        with pytest.raises(Unavailable, match="closed"):
            dns_srv.lookup("scheduler")


# -- malicious servers


def srv(asked: Asked, *records: str, **options: Any) -> bytes:
    return reply_to(asked, [f"SRV 1 1 {record}" for record in records], **options)


GOOD = "80 0a000001.addr.dc1.consul."
EVIL = "666 06060606.addr.dc1.consul."


def other_question(asked: Asked) -> bytes:
    wrong = Asked(asked.wire.replace(b"scheduler", b"schedulex"), asked.is_tcp, asked.source)
    return srv(wrong, EVIL)


def test_wrong_ids_and_questions_are_not_listened_to(resolver: Lookup) -> None:
    """Whatever comes before the answer that does not belong to the query changes nothing.  And the
    socket is connected: the kernel keeps out what another address sends."""

    def answer(asked: Asked) -> list[bytes]:
        evil = srv(asked, EVIL)
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as stranger:
            stranger.sendto(evil, asked.source)
        other = bytes([asked.wire[0] ^ 1]) + evil[1:]
        return [other, other_question(asked), asked.wire, b"", b"\xff" * 9, srv(asked, GOOD)]

    with DnsServer(answer, tcp=False) as server:
        assert resolver(server).lookup("scheduler").hosts == hosts("10.0.0.1:80")


BROKEN: dict[str, Callable[[Asked], bytes]] = {
    "truncated record": lambda asked: srv(asked, GOOD)[:-7],
    "pointer to itself": lambda asked: header(asked, 1) + b"\xc0" + bytes([len(header(asked, 1))]),
    "pointer loop": lambda asked: (
        header(asked, 1)
        + record(ASKED, 33, bytes(6) + b"\xc0" + bytes([len(header(asked, 1)) + 18]))
    ),
    "length past the end": lambda asked: (
        header(asked, 1) + record(ASKED, 33, b"")[:-2] + b"\xff\xff"
    ),
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


def test_addresses_of_a_node_that_were_not_asked_for_are_no_hosts(ask: Ask) -> None:
    """An answer about another name says nothing of this one."""

    def answer(asked: Asked) -> list[bytes]:
        if asked.kind == "SRV":
            return [srv(asked, GOOD, "80 n1.node.dc1.consul.")]
        return [reply_to(asked, ["A 6.6.6.6"], owner="n2.node.dc1.consul.")]

    snapshot = ask(answer)
    assert (snapshot.hosts, snapshot.is_complete) == (hosts("10.0.0.1:80"), False)


def test_10000_additional_records_change_nothing(ask: Ask) -> None:
    """As many as a message holds, all for other names or of other kinds."""

    def answer(asked: Asked) -> list[bytes]:
        junk = b"".join(record(b"\0", 1, b"\6\6\6\6") for _ in range(3_500))
        data = struct.pack("!HHH", 1, 1, 80) + b"\x080a000001\x04addr\x03dc1\x06consul\x00"
        return [header(asked, 1, 3_500) + record(ASKED, 33, data) + junk]

    assert ask(answer).hosts == hosts("10.0.0.1:80")


@pytest.mark.parametrize(
    "label", [b"\0", b"a\0b", b"\xff\xfe", "ü".encode(), b"a b", b"a\nb", b"."]
)
def test_labels_that_are_no_host_name_are_left_out(ask: Ask, label: bytes) -> None:
    """NUL, spaces, line ends and bytes outside ASCII reach nobody who connects or logs."""
    bad = struct.pack("!HHH", 1, 1, 80) + bytes([len(label)]) + label + b"\x07example\x00"
    good = struct.pack("!HHH", 1, 1, 81) + b"\x02ok\x07example\x00"
    records = record(ASKED, 33, bad) + record(ASKED, 33, good)
    found = ask(lambda asked: [header(asked, 2) + records]).hosts
    assert found == hosts("192.0.2.81:81", "192.0.2.82:81")


def drip(server: DnsServer, stream: socket.socket) -> None:
    asked = server.receive(stream)
    assert asked is not None
    stream.sendall(b"\xff\xff" + asked.wire[:2])
    while not server.closing.wait(0.005):
        stream.sendall(b"\x84")


def no_length(server: DnsServer, stream: socket.socket) -> None:
    server.receive(stream)
    stream.sendall(b"\0\0" * 100)
    server.closing.wait()


@pytest.mark.parametrize("serve", [drip, DnsServer.receive, no_length])
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
    nodes = says(*(f"SRV 1 1 {n} n{n}.node.dc1.consul." for n in range(1, 41)))
    started = time.monotonic()
    outage = pytest.raises(Unavailable, match="none can be used")  # and not "nobody"
    server = DnsServer(unless(lambda asked: asked.kind != "SRV", nodes, None), tcp=False)
    with server, outage:
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


# -- what is counted

UNHURRIED = 60  # nothing is sent again for a tenth of it, however busy the machine is


@pytest.mark.parametrize("count", [3, 1_500])
def test_traffic_is_counted_exactly(resolver: Lookup, count: int) -> None:
    """Every query and reply with its bytes, by TCP with the length before it: one query by UDP, and
    where that was cut every repeated one."""
    fake = consul(*many(count))
    replied = {False: 0, True: 0}

    def answer(asked: Asked) -> list[bytes]:
        (reply,) = fake(asked)
        replied[asked.is_tcp] += len(reply) + 2 * asked.is_tcp
        return [reply]

    with DnsServer(answer) as server:
        dns_srv = resolver(server, request_timeout_seconds=UNHURRIED)
        assert dns_srv.lookup("scheduler").is_complete
        dns_srv.close()
    for transport, is_tcp in (("udp", False), ("tcp", True)):
        asked = [each for each in server.asked if each.is_tcp is is_tcp]
        assert dns_srv.wire()[transport] == {
            **NO_TRAFFIC,
            "queries": len(asked),
            "replies": len(asked),
            "sent_bytes": sum(len(each.wire) + 2 * is_tcp for each in asked),
            "received_bytes": replied[is_tcp],
        }
    assert dns_srv.wire()["udp"]["queries"] == 1
    assert (dns_srv.wire()["tcp"]["queries"] > 0) == (count > 3)


def test_what_gets_no_reply_is_sent_again_and_counted(resolver: Lookup) -> None:
    """By UDP after a pause: each sending is a query, all but the first are retries."""
    with DnsServer(consul(*many(1)), tcp=False) as server:
        server.answer = unless(lambda asked: len(server.asked) < 3, server.answer, None)
        dns_srv = resolver(server, request_timeout_seconds=5)
        dns_srv.lookup("scheduler")
        udp = dns_srv.wire()["udp"]
        assert udp["sent_bytes"] == udp["queries"] * len(server.asked[0].wire)
    # Two were lost, in one round by UDP or, where that was given up for TCP, in two.
    assert udp["queries"] >= 3
    assert 1 <= udp["retries"] < udp["queries"]
    assert (udp["replies"], udp["error_replies"]) == (1, 0)
    assert set(dns_srv.wire()["tcp"].values()) == {0}  # no connection came about


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
