"""What the values promise: hosts that parse and print, registrations, snapshots."""

from __future__ import annotations

import ipaddress
import pickle
import threading
from collections.abc import Callable, Iterator
from dataclasses import FrozenInstanceError, fields

import pytest
from hypothesis import given
from hypothesis import strategies as st

from consul_matchmaker.errors import ConfigurationError, InvalidTopic
from consul_matchmaker.model import (
    Held,
    Host,
    Instance,
    Registration,
    Snapshot,
    address_and_port,
    checked_topic,
    warning_of,
)

from .doubles import DEADLINE_SECONDS, ManualClock, in_thread

GOOD_HOSTS = [
    ("10.0.0.5:9501", "10.0.0.5", 9501),
    ("[::1]:9501", "::1", 9501),
    ("[fe80::1%eth0]:1", "fe80::1%eth0", 1),
    ("[2001:db8::5]:9501", "2001:db8::5", 9501),
    ("node7.example:65535", "node7.example", 65535),
    ("node_7:80", "node_7", 80),
    ("7.example.:80", "7.example.", 80),
]
BAD_HOSTS = [
    *("", ":", "9501", "scheduler", "10.0.0.5", ":9501", "10.0.0.5:", "10.0.0.5:port"),
    *("10.0.0.5:0", "10.0.0.5:65536", "10.0.0.5:-1", "10.0.0.5:+1", "10.0.0.5:1_0", "a:٣"),
    *("10.0.0.5:09501", "10.0.0.5: 9501", " 10.0.0.5:9501", "10.0.0.5:9501\n", "10.0.0.5:1e3"),
    *("10.0.0.256:1", "10.0.0:1", "010.0.0.1:1", "1.2.3.4.5:1", "...:1"),
    *(
        "::1:9501",
        "[::1]",
        "[::1]9501",
        "[::1:9501",
        "::1]:9501",
        "[::g]:1",
        "[]:1",
        "[1.2.3.4]:1",
        "[::1%]:1",
        "[::1%a\n]:1",
    ),
    *("a b:1", "-a:1", "a-:1", "a..b:1", "é.example:1", "http://10.0.0.5:1", "a/b:1", "a@b:1"),
    *("x" * 64 + ":1", "x." * 127 + "xx:1", "10.0.0.5:" + "1" * 5000),
]


@pytest.mark.parametrize(("text", "address", "port"), GOOD_HOSTS)
def test_a_host_is_read_and_printed(text: str, address: str, port: int) -> None:
    """What parses is printed back as it was."""
    host = Host.parse(text)
    assert (host.address, host.port, str(host)) == (address, port, text)


@pytest.mark.parametrize("text", BAD_HOSTS)
def test_a_typing_error_is_never_taken_for_a_host(text: str) -> None:
    """Anything else is refused, and the message repeats it where it cannot be a token."""
    with pytest.raises(ConfigurationError) as caught:
        Host.parse(text)
    may_be_a_token = "@" in text or "://" in text or len(text) > 20
    assert (repr(text) in str(caught.value)) is not may_be_a_token


def test_no_port_is_above_65535() -> None:
    """Wherever an address and a port are read, also where no Host is made of them."""
    assert address_and_port("10.0.0.5:65535") == ("10.0.0.5", 65535)
    with pytest.raises(ValueError, match="from 1 to 65535"):
        address_and_port("10.0.0.5:65536")


@pytest.mark.parametrize(
    ("text", "advice"),
    [
        ("tcp://10.0.0.5:9501", "without a scheme"),
        *((f"10.0.0.5:{port}", "from 1 to 65535") for port in ("0", "65536", "9" * 20)),
        ("::1:9501", "in brackets"),
        ("scheduler", "write ADDRESS:PORT"),
        (":9501", "write ADDRESS:PORT"),
        ("10.0.0:1", "no IPv4 address"),
        ("[::g]:1", "no IPv6 address"),
        ("a b:1", "neither an IP address nor a host name"),
    ],
)
def test_a_typing_error_is_told_what_to_do(text: str, advice: str) -> None:
    """The message says what is wrong with this text, not only that something is."""
    with pytest.raises(ConfigurationError, match=advice):
        Host.parse(text)


@pytest.mark.parametrize("value", ["", None, 9501, b"10.0.0.5:9501", ("10.0.0.5", 9501)])
def test_only_text_is_parsed(value: object) -> None:
    """Another type, or none at all, is refused as a bad value, not as a programming accident."""
    with pytest.raises(ConfigurationError):
        Host.parse(value)  # type: ignore[arg-type]
    with pytest.raises(ConfigurationError):
        Host.opaque(value)  # type: ignore[arg-type]


@pytest.mark.parametrize(("address", "port"), [("10.0.0.5", 0), ("10.0.0.5", 65536), ("", 1)])
def test_an_impossible_host_cannot_be_made(address: str, port: int) -> None:
    """The constructor too refuses what no text could say."""
    with pytest.raises(ConfigurationError):
        Host(address, port)


def test_one_ipv6_address_is_one_host() -> None:
    """Spellings of the same IPv6 address become the same host, and so the same key."""
    assert Host.parse("[0:0::0001]:1") == Host.parse("[::1]:1")
    assert Host.parse("[2001:DB8::A]:1") == Host.parse("[2001:db8::a]:1")


@pytest.mark.finding("E12")
@pytest.mark.parametrize("address", ["::ffff:10.0.0.5", "::FFFF:a00:5", "0:0:0:0:0:ffff:0a00:0005"])
@pytest.mark.parametrize("zone", ["", "%eth0"])
def test_an_ipv4_mapped_address_has_one_spelling(address: str, zone: str) -> None:
    """That of RFC 5952, whatever the Python: before 3.13 it prints ::ffff:a00:5 by itself."""
    host = Host.parse(f"[{address}{zone}]:9501")
    assert str(host) == f"[::ffff:10.0.0.5{zone}]:9501"
    assert Host.parse(str(host)) == host


@pytest.mark.parametrize(
    ("address", "words"),
    [
        *((each, "nobody") for each in ("0.0.0.0:1", "[::]:1", "[::ffff:0.0.0.0]:1")),
        *((each, "their own") for each in ("127.0.0.1:1", "[::1]:1", "LocalHost.:1")),
        *((each, None) for each in ("10.0.0.5:1", "[fe80::1%eth0]:1", "node7:1", "localhostX:1")),
    ],
)
def test_an_address_that_leads_others_nowhere_is_warned_of(address: str, words: str | None) -> None:
    """Loopback leads everybody to himself, and the unspecified address nobody anywhere."""
    found = warning_of(Host.parse(address))
    assert found is None if words is None else words in (found or "")


@given(st.text())
def test_no_text_breaks_the_parser(text: str) -> None:
    """Every text is a host that prints as itself or as a canonical form, or is refused."""
    try:
        host = Host.parse(text)
    except ConfigurationError:
        return
    assert Host.parse(str(host)) == host


@given(st.ip_addresses(), st.integers(1, 65535))
def test_every_address_and_port_round_trips(
    address: ipaddress.IPv4Address | ipaddress.IPv6Address, port: int
) -> None:
    """str and parse are each other's inverse for every IP address."""
    text = f"[{address}]:{port}" if address.version == 6 else f"{address}:{port}"
    host = Host.parse(text)
    assert Host.parse(str(host)) == host
    assert ipaddress.ip_address(host.address) == address


@given(st.text(min_size=1))
def test_an_opaque_host_is_kept_to_the_byte(text: str) -> None:
    """It prints as exactly what it was, and is never the host that it looks like."""
    host = Host.opaque(text)
    assert (str(host), host.port) == (text, None)
    assert Host.opaque("10.0.0.5:9501") != Host.parse("10.0.0.5:9501")


def test_hosts_are_sorted_by_address_then_port() -> None:
    """Any mixture of hosts has an order, opaque ones included."""
    texts = ["b:2", "a:10", "b:1", "a:9"]
    hosts = [*map(Host.parse, texts), Host.opaque("b")]
    assert [str(host) for host in sorted(hosts)] == ["a:9", "a:10", "b", "b:1", "b:2"]
    for host in hosts:
        assert not host < host


def test_values_cannot_be_changed() -> None:
    """A host handed out is the same for ever."""
    with pytest.raises(FrozenInstanceError):
        Host.parse("a:1").port = 2  # type: ignore[misc]


@pytest.mark.parametrize("topic", ["", None, 7, b"scheduler"])
def test_an_impossible_topic_is_refused(topic: object) -> None:
    """A topic is a text that is not empty."""
    with pytest.raises(InvalidTopic):
        checked_topic(topic)  # type: ignore[arg-type]


class Owner:
    """Notes what a registration asks of its owner."""

    def __init__(self) -> None:
        self.asked: list[tuple[object, ...]] = []

    def __getattr__(self, verb: str) -> Callable[..., None]:
        return lambda *arguments: self.asked.append((verb, *arguments))


def test_a_registration_hands_all_that_is_asked_to_its_owner() -> None:
    """With itself and the seconds given; leaving its block unregisters it, also by an error."""
    owner = Owner()
    registration = Registration("scheduler", Host.parse("a:1"), "node7", owner)
    with pytest.raises(ZeroDivisionError), registration as entered:
        entered.wait_until_published(timeout_seconds=2)
        raise ZeroDivisionError
    registration.beat()
    registration.drain(1.5)
    registration.wait_until_withdrawn(timeout_seconds=3)
    assert owner.asked == [
        ("wait_until_published", registration, 2),
        ("unregister", registration),
        ("beat", registration),
        ("drain", registration, 1.5),
        ("wait_until_withdrawn", registration, 3),
    ]


def test_a_registration_nobody_keeps_says_so() -> None:
    """One made by hand cannot be waited for: the message says which would be."""
    with pytest.raises(ConfigurationError, match=r"Matchmaker\.register"):
        Registration("scheduler", Host.parse("a:1")).unregister()


def test_registrations_are_equal_by_what_they_say() -> None:
    """The owner takes no part in equality, and is not printed."""
    one = Registration("scheduler", Host.parse("a:1"), "node7", Owner())
    assert one == Registration("scheduler", Host.parse("a:1"), "node7")
    assert str(one) == "scheduler at a:1 as node7"
    assert str(Registration("scheduler", Host.parse("a:1"))) == "scheduler at a:1"
    assert "Owner" not in repr(one)


def test_what_is_held_may_be_known_in_part() -> None:
    """A set of what is held, and which others were not looked at; of a whole one, none."""
    one, other = (Registration("scheduler", Host(name, 1)) for name in "ab")
    part = Held.of([one], [other])
    assert (part, part.unchecked) == ({one}, {other})
    assert Held([one]).unchecked == frozenset()


def instances(*texts: str) -> tuple[Instance, ...]:
    """Instances out of `host:port` or `host:port=server`."""
    made = []
    for text in texts:
        host, _, server = text.partition("=")
        made.append(Instance(Host.parse(host), server or None))
    return tuple(made)


def test_a_snapshot_is_a_sorted_sequence_without_duplicates() -> None:
    """It behaves like a tuple of hosts."""
    snapshot = Snapshot("scheduler", instances("b:1", "a:2", "b:1=node7", "a:1"), "memory")
    assert [str(host) for host in snapshot] == ["a:1", "a:2", "b:1"]
    assert (len(snapshot), str(snapshot[0]), str(snapshot[-1])) == (3, "a:1", "b:1")
    assert snapshot[1:] == snapshot.hosts[1:]
    assert Host.parse("b:1") in snapshot
    assert Host.parse("b:2") not in snapshot
    assert not Snapshot("scheduler", (), "memory")


def test_two_ports_of_one_address_are_two_hosts() -> None:
    """Identity is address and port (trap D9)."""
    assert len(Snapshot("scheduler", instances("a:1", "a:2"), "dns")) == 2


class Hanging(tuple[Instance, ...]):
    """Instances whose thread stops while it goes through them."""

    reached, go_on = threading.Event(), threading.Event()

    def __iter__(self) -> Iterator[Instance]:
        self.reached.set()
        assert self.go_on.wait(DEADLINE_SECONDS)
        return super().__iter__()


def test_no_snapshot_waits_for_another() -> None:
    """A child forked while another thread sorts some hosts can sort its own: no lock is shared."""
    hanging = Hanging(instances("a:1"))
    first = in_thread(lambda: Snapshot("scheduler", hanging, "dns").hosts)
    assert hanging.reached.wait(DEADLINE_SECONDS)
    other = in_thread(lambda: Snapshot("scheduler", instances("b:1"), "dns").hosts)
    assert other.result(DEADLINE_SECONDS / 2) == (Host("b", 1),)
    hanging.go_on.set()
    assert first.result(DEADLINE_SECONDS) == (Host("a", 1),)


WHOLE = Snapshot(
    "scheduler",
    instances("a:1=node1", "b:1"),
    "dns",
    is_complete=False,
    ttl_seconds=7.0,
    taken_at=100.0,
    fresh_until=105.0,
    clock=ManualClock(103.0),
    confirmed=False,
    details={"agent": "10.0.0.1:8600"},
    version=17,
)


def differences(one: Snapshot, other: Snapshot) -> set[str]:
    """The fields that are not the very same in both."""
    names = {each.name for each in fields(Snapshot)}
    return {name for name in names if getattr(one, name) is not getattr(other, name)}


def test_a_narrowed_snapshot_differs_in_its_instances_only() -> None:
    """Age, staleness, certainty and details are those of the answer that it is a part of."""
    assert WHOLE.hosts  # computed of the instances, as those by server are
    part = WHOLE.for_server("node1")
    assert differences(part, WHOLE) == {"instances"}
    assert part.instances == WHOLE.instances[:1]
    assert part.hosts == (Host("a", 1),)
    assert list(part.for_server("nobody")) == list(WHOLE.for_server("nobody")) == []
    assert WHOLE.with_instances(iter(WHOLE.instances)) == WHOLE


def test_a_stamped_snapshot_is_the_same_answer_of_another_moment() -> None:
    """What was computed of its instances is kept."""
    clock, hosts = ManualClock(203.0), WHOLE.hosts
    stamped = WHOLE.stamped(taken_at=200.0, fresh_until=205.0, clock=clock, confirmed=True)
    assert differences(stamped, WHOLE) == {"taken_at", "fresh_until", "clock", "confirmed"}
    assert (stamped.taken_at, stamped.fresh_until, stamped.confirmed) == (200.0, 205.0, True)
    assert stamped.clock is clock
    assert stamped.hosts is hosts


def test_a_snapshot_may_share_the_instances_of_an_equal_one() -> None:
    """With what was computed of them; all else stays its own."""
    newer = Snapshot("scheduler", instances("a:1=node1", "b:1"), "kv", taken_at=200.0)
    hosts = WHOLE.hosts
    shared = newer.sharing(WHOLE)
    assert differences(shared, newer) == {"instances"}
    assert shared.instances is WHOLE.instances
    assert shared.hosts is hosts


def test_a_snapshot_prints_its_doubts() -> None:
    """Each in one word, and none where there is none."""
    sure = Snapshot("scheduler", instances("a:1"), "kv")
    assert str(sure) == "<scheduler: 1 hosts, kv, 0.0s old>"
    doubted = Snapshot("scheduler", (), "dns", is_complete=False, confirmed=False)
    assert str(doubted) == "<scheduler: 0 hosts, dns, 0.0s old, incomplete, unconfirmed>"


def test_hosts_without_a_clock_are_new() -> None:
    """Those of a snapshot that was made by hand, as in tests: no age, and never stale."""
    snapshot = Snapshot("scheduler", (), "memory")
    assert (snapshot.age_seconds, snapshot.is_stale) == (0.0, False)


def test_what_a_snapshot_computes_once_is_documented() -> None:
    """`help(Snapshot.hosts)` says what it is."""
    assert Snapshot.hosts.__doc__ == "Every host once, sorted."


def test_age_and_staleness_go_on_counting() -> None:
    """A snapshot that is held grows older, and becomes stale at its time."""
    clock = ManualClock(100.0)
    snapshot = Snapshot("scheduler", (), "kv", taken_at=100.0, fresh_until=105.0, clock=clock)
    assert (snapshot.age_seconds, snapshot.is_stale) == (0.0, False)
    clock.advance(5)
    assert (snapshot.age_seconds, snapshot.is_stale) == (5.0, True)
    assert str(snapshot) == "<scheduler: 0 hosts, kv, 5.0s old, stale>"


def test_snapshots_are_equal_by_what_they_say() -> None:
    """When an answer was taken does not make it another answer."""
    one = Snapshot("scheduler", instances("a:1"), "kv", taken_at=1)
    two = Snapshot("scheduler", instances("a:1"), "kv", taken_at=2)
    assert one == two
    assert hash(one) == hash(two)


def test_a_snapshot_survives_pickling() -> None:
    """It can be handed to another process."""
    snapshot = Snapshot("scheduler", instances("a:1=node1"), "kv")
    assert pickle.loads(pickle.dumps(snapshot)) == snapshot
