"""The wire reader against dnspython: the same on every valid message, never more on others."""

from __future__ import annotations

import os
import struct

import dns.exception
import dns.flags
import dns.message
import dns.name
import dns.rdataclass
import dns.rdatatype
import dns.rrset
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from consul_matchmaker import srv_wire
from consul_matchmaker.srv_wire import BadReply, NotOurs, Reply, Srv

CASES = int(os.environ.get("CONSUL_MATCHMAKER_WIRE_CASES", "300"))
"""Of each property below; 50,000 for the 100,000 that were run once."""

many = settings(max_examples=CASES, deadline=None, suppress_health_check=list(HealthCheck))

NAME = "_scheduler._tcp.service.consul."
QUERY = dns.message.make_query(NAME, "SRV", use_edns=0, payload=1232, id=4711).to_wire()


# -- dnspython's answer, in our words


def by_dnspython(wire: bytes, query: bytes) -> Reply:
    """What dnspython reads; it goes on after records it does not like, of kinds we skip."""
    message = dns.message.from_wire(wire, one_rr_per_rrset=True, continue_on_error=True)
    question = dns.message.from_wire(query).question[0]
    records = []
    for rrset in message.answer:
        is_srv = rrset.rdtype == dns.rdatatype.SRV and rrset.rdclass == dns.rdataclass.IN
        if is_srv and rrset.name == question.name:
            for rdata in rrset:
                target = rdata.target.to_text()
                records.append(Srv(rdata.priority, rdata.weight, rdata.port, target))
    addresses: dict[str, set[bytes]] = {}
    for rrset in (*message.answer, *message.additional):
        if rrset.rdclass == dns.rdataclass.IN and rrset.rdtype in (1, 28):
            for rdata in rrset:
                packed = addresses.setdefault(rrset.name.to_text().lower(), set())
                packed.add(rdata.to_wire())
    return Reply(
        rcode=int(message.rcode()) & 0x0F,
        length=len(wire),
        is_truncated=bool(message.flags & dns.flags.TC),
        records=records,
        addresses=addresses,
    )


def same(ours: Reply, theirs: Reply) -> None:
    assert ours.rcode == theirs.rcode
    assert ours.is_truncated == theirs.is_truncated
    assert ours.records == theirs.records
    assert ours.addresses == theirs.addresses


# -- valid messages

labels = st.one_of(
    st.sampled_from([b"addr", b"node", b"dc1", b"consul", b"0a090905", b"NODE7", b"a.b"]),
    st.binary(min_size=1, max_size=63),
)
names = (
    st.lists(labels, max_size=5)
    .filter(lambda each: sum(map(len, each)) + len(each) < 255)
    .map(lambda each: dns.name.Name([*each, b""]))
)
asked_names = st.sampled_from([dns.name.from_text(NAME), dns.name.from_text(NAME.upper())])
numbers = st.integers(0, 0xFFFF)


@st.composite
def rrsets(draw: st.DrawFn, owners: st.SearchStrategy[dns.name.Name]) -> dns.rrset.RRset:
    owner = draw(owners)
    kind = draw(st.sampled_from(["SRV", "SRV", "SRV", "A", "AAAA", "TXT", "CNAME", "SOA", "MX"]))
    target = draw(names)
    rdata = {
        "SRV": lambda: f"{draw(numbers)} {draw(numbers)} {draw(numbers)} {target}",
        "A": lambda: str(draw(st.ip_addresses(v=4))),
        "AAAA": lambda: str(draw(st.ip_addresses(v=6))),
        "TXT": lambda: '"some text"',
        "CNAME": lambda: str(target),
        "SOA": lambda: f"{target} {target} 1 2 3 4 5",
        "MX": lambda: f"10 {target}",
    }[kind]()
    ttl = draw(st.sampled_from([0, 5, 2**31 - 1]))
    return dns.rrset.from_text(owner, ttl, "IN", kind, rdata)


@st.composite
def messages(draw: st.DrawFn) -> bytes:
    message = dns.message.make_response(dns.message.from_wire(QUERY))
    owners = st.one_of(asked_names, asked_names, names)
    message.answer = draw(st.lists(rrsets(owners), max_size=8))
    message.authority = draw(st.lists(rrsets(names), max_size=2))
    message.additional = draw(st.lists(rrsets(names), max_size=8))
    if draw(st.booleans()):
        message.flags |= dns.flags.TC
    message.set_rcode(draw(st.sampled_from([0, 3])))
    try:
        return message.to_wire(max_size=65_535)
    except dns.exception.DNSException:
        assume(False)
        raise


@many
@given(messages())
def test_a_valid_message_is_read_as_dnspython_reads_it(wire: bytes) -> None:
    """On what dnspython writes, records, addresses, rcode and TC are what dnspython reads."""
    same(srv_wire.read(wire, QUERY), by_dnspython(wire, QUERY))


# -- broken ones

changes = st.lists(
    st.one_of(
        st.tuples(st.just("set"), st.integers(0, 2000), st.integers(0, 255)),
        st.tuples(st.just("pointer"), st.integers(0, 2000), st.integers(0, 2000)),
        st.tuples(st.just("cut"), st.integers(0, 2000), st.just(0)),
        st.tuples(st.just("insert"), st.integers(0, 2000), st.integers(0, 255)),
        st.tuples(st.just("remove"), st.integers(0, 2000), st.integers(1, 9)),
        st.tuples(st.just("count"), st.integers(2, 5), st.integers(0, 0xFFFF)),
    ),
    min_size=1,
    max_size=4,
)


def changed(wire: bytes, todo: list[tuple[str, int, int]]) -> bytes:
    data = bytearray(wire)
    for what, place, value in todo:
        place = place if what == "count" else place % (len(data) + 1)
        if what == "set" and place < len(data):
            data[place] = value
        elif what == "pointer":
            data[place : place + 2] = struct.pack("!H", 0xC000 | value % (len(data) + 1))
        elif what == "cut":
            del data[place:]
        elif what == "insert":
            data.insert(place, value)
        elif what == "remove":
            del data[place : place + value]
        elif what == "count":
            data[2 * place : 2 * place + 2] = struct.pack("!H", value)
    return bytes(data)


def check_broken(wire: bytes) -> None:
    try:
        ours = srv_wire.read(wire, QUERY)
    except BadReply:
        return
    if not ours.records and not ours.addresses and ours.rcode not in (0, 3):
        return  # an error without a question, of which nothing is read
    same(ours, by_dnspython(wire, QUERY))


@many
@given(messages(), changes)
def test_a_broken_message_is_read_as_dnspython_reads_it_or_refused(
    wire: bytes, todo: list[tuple[str, int, int]]
) -> None:
    """However a message is damaged: the one error, or exactly what dnspython makes of it."""
    check_broken(changed(wire, todo))


@many
@given(st.binary(max_size=400))
def test_noise_is_refused(noise: bytes) -> None:
    """Bytes that only begin like a reply to the query do no more harm than a damaged one."""
    check_broken(QUERY[:2] + b"\x84\x00" + noise)
    with pytest.raises(BadReply):
        srv_wire.read(noise, QUERY)


# -- single cases


def message(
    *records: bytes, flags: int = 0x8400, counts: tuple[int, int, int] = (1, 0, 0)
) -> bytes:
    head = QUERY[:2] + struct.pack("!HHHHH", flags, 1, *counts)
    return (
        head
        + QUERY[12 : 12 + len(dns.name.from_text(NAME).to_wire() or b"") + 4]
        + b"".join(records)
    )


def record(name: bytes, kind: int, data: bytes, ttl: int = 0) -> bytes:
    return name + struct.pack("!HHIH", kind, 1, ttl, len(data)) + data


ASKED = b"\xc0\x0c"
TARGET = b"\x01n\x04node\x03dc1\x06consul\x00"


def test_another_id_is_not_ours() -> None:
    """A reply with another id is told apart from a damaged one, so that waiting can go on."""
    with pytest.raises(NotOurs):
        srv_wire.read(b"\x00\x00" + message()[2:], QUERY)


def test_another_question_is_not_ours() -> None:
    """The same id for another name is somebody else's answer."""
    other = dns.message.make_query("_other._tcp.service.consul.", "SRV", id=4711)
    with pytest.raises(NotOurs):
        srv_wire.read(dns.message.make_response(other).to_wire(), QUERY)


def test_a_query_is_not_a_reply() -> None:
    """Our own query, sent back, is no answer."""
    with pytest.raises(NotOurs):
        srv_wire.read(QUERY, QUERY)


def test_the_question_may_come_back_in_other_case() -> None:
    """Consul from 1.19 on lower-cases the name it gives back."""
    query = dns.message.make_query(NAME.upper(), "SRV", id=4711).to_wire()
    wire = message(record(ASKED, 33, struct.pack("!HHH", 1, 1, 80) + TARGET))
    assert srv_wire.read(wire, query).records == [Srv(1, 1, 80, "n.node.dc1.consul.")]


def test_an_error_may_leave_the_question_out() -> None:
    """REFUSED and its like are believed without a question; an answer without one is not."""
    assert srv_wire.read(QUERY[:2] + b"\x84\x05" + bytes(8), QUERY).rcode == srv_wire.REFUSED
    with pytest.raises(NotOurs):
        srv_wire.read(QUERY[:2] + b"\x84\x00" + bytes(8), QUERY)


@pytest.mark.parametrize(
    ("name", "wire"),
    [
        ("itself", message(record(b"\xc0" + bytes([len(message())]), 33, b""))),
        ("forward", message(record(b"\xc0\xff", 33, b""))),
        (
            "loop",
            message(record(ASKED, 33, bytes(6) + b"\x01a\xc0" + bytes([len(message()) + 18]))),
        ),
        ("label type", message(record(b"\x40a\x00", 33, b""))),
        ("past the end", message(record(ASKED, 33, b"")[:-2])),
        ("length past the end", message(record(ASKED, 16, b"")[:-2] + b"\xff\xff")),
        ("short SRV", message(record(ASKED, 33, bytes(6)))),
        ("long SRV", message(record(ASKED, 33, bytes(6) + TARGET + b"x"))),
        ("5-byte A", message(record(ASKED, 1, bytes(5)))),
        ("more than counted", message(b"x", counts=(0, 0, 0))),
        ("less than counted", message(counts=(9, 0, 0))),
    ],
)
def test_every_kind_of_damage_is_one_error(name: str, wire: bytes) -> None:
    """Pointer loops, lengths past the end and wrong counts are all BadReply."""
    with pytest.raises(BadReply):
        srv_wire.read(wire, QUERY)


def test_records_of_other_names_are_not_ours() -> None:
    """An SRV record for another name in the answer names no host of this one."""
    wire = message(record(TARGET, 33, struct.pack("!HHH", 1, 1, 80) + TARGET))
    reply = srv_wire.read(wire, QUERY)
    assert (reply.records, reply.answers) == ([], 1)


def test_a_name_is_at_most_255_bytes() -> None:
    """Pointers cannot make a name longer than DNS allows."""
    long = (
        b"".join(b"\x3f" + bytes([97 + i]) * 63 for i in range(3)) + b"\x3c" + b"d" * 60 + b"\x00"
    )
    first = record(ASKED, 33, bytes(6) + long)
    srv_wire.read(message(first), QUERY)
    start = len(message()) + 12 + 6
    longer = record(ASKED, 33, bytes(6) + b"\x01e" + struct.pack("!H", 0xC000 | start))
    with pytest.raises(BadReply):
        srv_wire.read(message(first, longer, counts=(2, 0, 0)), QUERY)


def test_a_pointer_into_its_own_name_is_refused() -> None:
    """A name that leads back into data before it, and from there over itself, is no name: where it
    ends is a matter of taste (found by the cases above: dnspython goes on after the last byte)."""
    first = record(ASKED, 16, b"\x01a\x0bx")
    back = struct.pack("!H", 0xC000 | len(message()) + 12 + 2)
    wire = message(first, record(b"\x01b" + back, 1, bytes(4)), counts=(2, 0, 0))
    with pytest.raises(BadReply):
        srv_wire.read(wire + b"\0", QUERY)


def test_a_chain_of_pointers_costs_little() -> None:
    """A message of pointers to pointers is refused instead of followed thousands of times."""
    start = len(message()) + 12
    chain = ASKED + b"".join(
        struct.pack("!H", 0xC000 | start + 2 * i) for i in range((0x3FFF - start) // 2 - 4)
    )
    owner = struct.pack("!H", 0xC000 | start + len(chain) - 2)
    wire = message(record(ASKED, 16, chain), record(owner, 33, bytes(6) + TARGET), counts=(2, 0, 0))
    with pytest.raises(BadReply):
        srv_wire.read(wire, QUERY)


@pytest.mark.parametrize(("ttl", "seconds"), [(0, 0), (7, 7), (2**31 - 1, 2**31 - 1), (2**31, 0)])
def test_a_ttl_with_its_highest_bit_set_is_zero(ttl: int, seconds: int) -> None:
    """RFC 2181, section 8."""
    wire = message(record(ASKED, 33, struct.pack("!HHH", 1, 1, 80) + TARGET, ttl))
    assert srv_wire.read(wire, QUERY).ttl_seconds == seconds


def test_a_denial_lasts_as_its_soa_says() -> None:
    """The TTL of "no such name" is the smaller of the SOA's own and its minimum (RFC 2308)."""
    soa = b"\x00\x00" + struct.pack("!IIIII", 1, 2, 3, 4, 9)
    wire = message(record(b"\x00", 6, soa, ttl=30), flags=0x8403, counts=(0, 1, 0))
    assert srv_wire.read(wire, QUERY).ttl_seconds == 9
