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

from consul_matchmaker.backends.dns import wire as dns_wire
from consul_matchmaker.backends.dns.wire import BadReply, NotOurs, Reply, Srv
from tests.dns_servers import ASKED, name_bytes, record

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
    same(dns_wire.read(wire, QUERY), by_dnspython(wire, QUERY))


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
        ours = dns_wire.read(wire, QUERY)
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
        dns_wire.read(noise, QUERY)


# -- single cases

TARGET = b"\x01n\x04node\x03dc1\x06consul\x00"
NAMED = "n.node.dc1.consul."


def message(
    *records: bytes, counts: tuple[int, int, int] = (1, 0, 0), flags: int = 0x8400
) -> bytes:
    """The reply to QUERY: its header and question, and whatever *records* are."""
    question = QUERY[12 : 12 + len(name_bytes(NAME)) + 4]
    return QUERY[:2] + struct.pack("!HHHHH", flags, 1, *counts) + question + b"".join(records)


def srv(target: bytes, name: bytes = ASKED, ttl: int = 0) -> bytes:
    """An SRV record."""
    return record(name, 33, struct.pack("!HHH", 1, 2, 80) + target, ttl)


def pointer(place: int) -> bytes:
    return struct.pack("!H", 0xC000 | place)


def read_all(*records: bytes, counts: tuple[int, int, int], flags: int = 0x8400) -> Reply:
    return dns_wire.read(message(*records, flags=flags, counts=counts), QUERY)


def not_ours(wire: bytes) -> None:
    """*wire* is somebody else's: the reply may still come."""
    with pytest.raises(NotOurs):
        dns_wire.read(wire, QUERY)


def refused(wire: bytes) -> None:
    """*wire* is damaged: no use waiting for another reply with the same id."""
    with pytest.raises(BadReply) as caught:
        dns_wire.read(wire, QUERY)
    assert not isinstance(caught.value, NotOurs)


@pytest.mark.parametrize(
    "wire",
    [
        pytest.param(message(record(pointer(len(message())), 33, b"")), id="pointer to itself"),
        pytest.param(message(record(pointer(0xFF), 33, b"")), id="pointer ahead"),
        pytest.param(message(srv(b"\x01a" + pointer(len(message()) + 18))), id="pointer loop"),
        pytest.param(message(record(ASKED, 33, b"")[:-2]), id="past the end"),
        pytest.param(message(record(ASKED, 16, b"")[:-2] + b"\xff\xff"), id="length past the end"),
        pytest.param(message(srv(TARGET + b"x")), id="long SRV"),
    ],
)
def test_every_kind_of_damage_is_one_error(wire: bytes) -> None:
    """Pointer loops and lengths past the end are all BadReply."""
    refused(wire)


def test_a_pointer_into_its_own_name_is_refused() -> None:
    """A name that leads back into data before it, and from there over itself, is no name: where it
    ends is a matter of taste (found by the cases above: dnspython goes on after the last byte).
    What a pointer leads to ends before the name that led there begins, to the byte."""
    first = record(ASKED, 16, b"\x01a\x0bx")
    back = pointer(len(message()) + 12 + 2)
    refused(message(first, record(b"\x01b" + back, 1, bytes(4)), b"\0", counts=(2, 0, 0)))
    first = record(ASKED, 16, b"\xc0")
    owner = b"\x0c" + b"a" * 12 + pointer(len(message()) + 12)
    refused(message(first, record(owner, 1, bytes(4)), counts=(2, 0, 0)))


def test_a_chain_of_pointers_costs_little() -> None:
    """A message of pointers to pointers is refused instead of followed thousands of times."""
    start = len(message()) + 12
    chain = ASKED + b"".join(pointer(start + 2 * i) for i in range((0x3FFF - start) // 2 - 4))
    owner = pointer(start + len(chain) - 2)
    refused(message(record(ASKED, 16, chain), srv(TARGET, owner), counts=(2, 0, 0)))


# -- the header, bit by bit


def test_what_is_no_reply_to_this_query_is_not_ours() -> None:
    """Less than a header, another id, another question or not exactly one: somebody else's."""
    wire = message(srv(TARGET))
    not_ours(QUERY)
    for length in (0, 1, 2, 3, 11):
        not_ours(wire[:length])
    end = len(message())
    for reply in (wire, message(flags=0x8405, counts=(0, 0, 0))):
        for place in (0, 1, 14, end - 3, end - 1):  # the id, the name, type and class
            not_ours(reply[:place] + bytes([reply[place] ^ 1]) + reply[place + 1 :])
    for questions in (0, 2):
        not_ours(wire[:5] + bytes([questions]) + wire[6:])


def test_the_question_may_come_back_in_other_case() -> None:
    """Consul from 1.19 on lower-cases the name it gives back."""
    query = dns.message.make_query(NAME.upper(), "SRV", id=4711).to_wire()
    assert dns_wire.read(message(srv(TARGET)), query).records == [Srv(1, 2, 80, NAMED)]


@pytest.mark.parametrize("opcode", [0x0800, 0x1000, 0x2000, 0x4000])
def test_only_the_reply_to_a_standard_query_is_read(opcode: int) -> None:
    """Inverse queries, updates and the like have other contents."""
    refused(message(srv(TARGET), flags=0x8400 | opcode))


@pytest.mark.parametrize(
    ("flags", "rcode", "is_truncated"),
    [
        (0x8000, 0, False),
        (0x8500, 0, False),  # authoritative, recursion desired
        (0x8200, 0, True),
        (0x8780, 0, True),  # with all the others
        (0x84F3, 3, False),  # recursion available, authentic, not checked
        (0x840F, 15, False),
    ],
)
def test_the_flags_are_read_bit_by_bit(flags: int, rcode: int, is_truncated: bool) -> None:
    """Four bits of code and one for truncation, whatever the bits around them say."""
    reply = read_all(srv(TARGET), counts=(1, 0, 0), flags=flags)
    assert (reply.rcode, reply.is_truncated) == (rcode, is_truncated)
    assert reply.length == len(message(srv(TARGET)))


@pytest.mark.parametrize("rcode", range(16))
def test_which_errors_may_leave_the_question_out(rcode: int) -> None:
    """Those about the query as a whole; what they say of truncation and length is read too."""
    wire = QUERY[:2] + struct.pack("!HHHHH", 0x8600 | rcode, 0, 0, 0, 0)
    if rcode in (1, 2, 4, 5):
        reply = dns_wire.read(wire, QUERY)
        assert (reply.rcode, reply.length, reply.is_truncated) == (rcode, 12, True)
    else:
        not_ours(wire)


def test_a_reply_without_records_says_nothing() -> None:
    """No record, no address, no text, and no time that it lasts."""
    reply = read_all(counts=(0, 0, 0))
    assert reply == Reply(0, len(message()))
    assert (reply.answers, reply.ttl_seconds, reply.has_text) == (0, 0, False)


# -- which records count


ADDRESS = record(TARGET, 1, bytes([10, 0, 0, 5]))
ADDRESS6 = record(TARGET, 28, bytes(15) + b"\x01")
TEXT = record(TARGET, 16, b"\x01x")


def test_an_srv_record_counts_in_the_answer_only() -> None:
    """In the other sections it names no host."""
    one = srv(TARGET)
    assert len(read_all(one, one, counts=(2, 0, 0)).records) == 2
    assert len(read_all(one, one, counts=(1, 1, 0)).records) == 1
    assert len(read_all(one, one, counts=(1, 0, 1)).records) == 1
    assert read_all(one, one, counts=(0, 1, 1)).records == []


def test_all_answer_records_are_counted_whatever_they_are() -> None:
    """The count tells whether more was there than was of use."""
    reply = read_all(srv(TARGET), TEXT, ADDRESS, ADDRESS, counts=(3, 0, 1))
    assert (reply.answers, len(reply.records)) == (3, 1)


def test_addresses_count_in_answer_and_additional_section() -> None:
    """Not in the authority section, where they are of name servers."""
    both = {NAMED: {bytes([10, 0, 0, 5]), bytes(15) + b"\x01"}}
    assert read_all(ADDRESS, ADDRESS6, counts=(1, 0, 1)).addresses == both
    assert read_all(ADDRESS6, ADDRESS, counts=(2, 0, 0)).addresses == both
    assert read_all(ADDRESS, ADDRESS6, counts=(0, 0, 2)).addresses == both
    assert read_all(ADDRESS, ADDRESS6, counts=(0, 2, 0)).addresses == {}
    first = {NAMED: {bytes([10, 0, 0, 5])}}
    assert read_all(ADDRESS, ADDRESS6, counts=(1, 1, 0)).addresses == first
    assert read_all(ADDRESS6, ADDRESS, counts=(0, 1, 1)).addresses == first


def test_addresses_are_found_by_lower_case_name() -> None:
    """Targets may come in other letters than the addresses of the same host."""
    shouted = record(TARGET.upper(), 1, bytes(4))
    assert read_all(shouted, counts=(0, 0, 1)).addresses == {NAMED: {bytes(4)}}


def test_an_srv_record_is_of_the_name_that_was_asked_for() -> None:
    """In whatever letters, as DNS does not tell capitals apart; another name's names no host."""
    for name, count in ((name_bytes(NAME.upper()), 1), (TARGET, 0)):
        reply = read_all(srv(TARGET, name), counts=(1, 0, 0))
        assert (len(reply.records), reply.answers) == (count, 1)


def test_text_counts_in_the_additional_section_only() -> None:
    """There it is what an operator wrote about a node; once there it stays."""
    assert read_all(TEXT, ADDRESS, counts=(0, 0, 2)).has_text is True
    assert read_all(ADDRESS, TEXT, counts=(0, 0, 2)).has_text is True
    assert read_all(ADDRESS, ADDRESS, TEXT, counts=(1, 1, 1)).has_text is True
    assert read_all(TEXT, TEXT, counts=(1, 1, 0)).has_text is False
    assert read_all(ADDRESS, counts=(0, 0, 1)).has_text is False


def test_records_of_other_classes_are_passed_over() -> None:
    """Their data means something else, so its size is not judged either."""
    for kind in (1, 6, 16, 28, 33):
        odd = TARGET + struct.pack("!HHIH", kind, 3, 0, 1) + b"x"
        reply = read_all(odd, odd, odd, srv(TARGET, ttl=9), counts=(4, 0, 0))
        assert (len(reply.records), reply.addresses, reply.ttl_seconds) == (1, {}, 9)
    chaos = ASKED + struct.pack("!HHIH", 33, 3, 0, len(TARGET) + 6) + bytes(6) + TARGET
    assert read_all(chaos, counts=(1, 0, 0)).records == []


def test_priority_weight_and_port_are_in_that_order() -> None:
    """RFC 2782; the target as a master file writes it, also the root."""
    data = struct.pack("!HHH", 10, 20, 30)
    reply = read_all(record(ASKED, 33, data + b"\x00"), counts=(1, 0, 0))
    assert reply.records == [Srv(10, 20, 30, ".")]


@pytest.mark.parametrize(
    ("kind", "size"), [(1, 3), (1, 5), (1, 16), (28, 4), (28, 15), (28, 17), (33, 0), (33, 6)]
)
def test_data_of_the_wrong_size_is_damage(kind: int, size: int) -> None:
    """Addresses have 4 and 16 bytes, and an SRV record 7 at least, in whatever section."""
    for counts in ((1, 0, 0), (0, 1, 0), (0, 0, 1)):
        refused(message(record(ASKED, kind, bytes(size)), counts=counts))


def test_what_follows_the_records_is_damage() -> None:
    """One byte more or less than the header says, at the end of any section."""
    wire = message(srv(TARGET), ADDRESS, counts=(1, 0, 1))
    dns_wire.read(wire, QUERY)
    refused(wire + b"\x00")
    refused(wire[:-1])
    refused(message(srv(TARGET), ADDRESS, counts=(1, 0, 0)))
    refused(message(srv(TARGET), ADDRESS, counts=(1, 1, 1)))
    for counts in ((0xFFFF, 0, 0), (0, 0xFFFF, 0), (0, 0, 0xFFFF), (0x8000, 0x8000, 0)):
        refused(message(counts=counts))


# -- how long it lasts


def soa(minimum: int, ttl: int, names: bytes = b"\x00\x00") -> bytes:
    return record(b"\x00", 6, names + struct.pack("!IIIII", 1, 2, 3, 4, minimum), ttl)


def test_the_smallest_ttl_of_our_records_counts() -> None:
    """Not that of records of other names, of addresses, or of a denial beside them."""
    other = srv(TARGET, name=TARGET, ttl=1)
    records = (srv(TARGET, ttl=30), srv(TARGET, ttl=7), srv(TARGET, ttl=20), other, soa(2, 2))
    assert read_all(*records, counts=(4, 1, 0)).ttl_seconds == 7


@pytest.mark.parametrize(("ttl", "seconds"), [(0, 0), (7, 7), (2**31 - 1, 2**31 - 1), (2**31, 0)])
def test_a_ttl_with_its_highest_bit_set_is_zero(ttl: int, seconds: int) -> None:
    """RFC 2181, section 8."""
    assert read_all(srv(TARGET, ttl=ttl), counts=(1, 0, 0)).ttl_seconds == seconds


@pytest.mark.parametrize(
    ("minimum", "ttl", "seconds"), [(9, 30, 9), (30, 9, 9), (0, 9, 0), (2**31 - 1,) * 3]
)
def test_a_denial_lasts_for_the_smaller_of_two_times(minimum: int, ttl: int, seconds: int) -> None:
    """Of the SOA's own TTL and the minimum it names, in four bytes (RFC 2308)."""
    assert read_all(soa(minimum, ttl), counts=(0, 1, 0), flags=0x8403).ttl_seconds == seconds
    names = b"\x02ns\x00\x04post\x00"
    assert read_all(soa(minimum, ttl, names), counts=(0, 1, 0)).ttl_seconds == seconds


def test_a_denial_is_told_in_the_authority_section_only() -> None:
    """An SOA elsewhere, or one too short to have a minimum, says nothing."""
    told = read_all(soa(5, 5), soa(9, 9), soa(7, 7), counts=(1, 1, 1))
    assert (told.ttl_seconds, told.serial) == (9, 1)
    assert read_all(soa(5, 5), counts=(1, 0, 0)).serial == 0
    assert read_all(soa(5, 5), counts=(1, 0, 0)).ttl_seconds == 0
    assert read_all(soa(5, 5), counts=(0, 0, 1)).ttl_seconds == 0
    short = record(b"\x00", 6, bytes(17) + struct.pack("!I", 5), ttl=5)
    assert read_all(short, counts=(0, 1, 0)).ttl_seconds == 0


# -- names


def name_of(length: int, start: int = 97) -> bytes:
    """A name of *length* bytes on the wire, its end included."""
    labels = []
    rest = length - 1
    while rest:
        size = min(63, rest - 1) if rest != 65 else 62  # never one byte left over
        labels.append(bytes([size]) + bytes([start + len(labels)]) * size)
        rest -= size + 1
    return b"".join(labels) + b"\x00"


def spelled(name: bytes) -> str:
    return str(dns.name.from_wire(name, 0)[0])


def test_a_name_of_255_bytes_is_read_and_one_of_256_is_not() -> None:
    """RFC 1035, 2.3.4, for names written in full."""
    assert read_all(srv(name_of(255)), counts=(1, 0, 0)).records[0].target == spelled(name_of(255))
    refused(message(srv(name_of(256))))


@pytest.mark.parametrize("is_known", [True, False])
def test_a_name_of_255_bytes_may_end_in_a_pointer(is_known: bool) -> None:
    """Whether the rest was a name before, or is in data that nobody reads as a name."""
    rest = name_of(200)
    kind, data = (33, bytes(6) + rest) if is_known else (16, rest)
    first = record(ASKED, kind, data)
    start = len(message()) + len(first) - len(rest)
    for length, is_good in ((254, True), (255, True), (256, False), (257, False)):
        head = name_of(length - 200 + 1, 110)[:-1]
        wire = message(first, srv(head + pointer(start)), counts=(2, 0, 0))
        if is_good:
            assert dns_wire.read(wire, QUERY).records[-1].target == spelled(head + rest)
        else:
            refused(wire)


def test_a_label_has_63_bytes_at_most() -> None:
    """Longer lengths are other things, of which only pointers are in use."""
    longest = b"\x3f" + b"a" * 63 + b"\x00"
    assert read_all(srv(longest), counts=(1, 0, 0)).records[0].target == "a" * 63 + "."
    refused(message(srv(b"\x40" + b"a" * 64 + b"\x00")))
    for size in (0x40, 0x80, 0xBF):
        refused(message(srv(bytes([size, 0x0C]))))
        refused(message(srv(b"\x01a" + bytes([size, 0x0C]))))


@pytest.mark.parametrize("prefix", [b"", b"\x01a", b"\x01a\x02bc"], ids=len)
@pytest.mark.parametrize("is_known", [True, False])
def test_pointers_lead_anywhere_before(prefix: bytes, is_known: bool) -> None:
    """Across the 256th and the 4096th byte too, to names read before or to data."""
    for gap in (0, 100, 300, 5000, 10_000):
        filler = record(b"\x00", 99, bytes(gap))
        kind, data = (33, bytes(6) + TARGET) if is_known else (16, TARGET)
        place = len(message(filler)) + 12 + (6 if is_known else 0)
        last = record(prefix + pointer(place), 1, bytes(4))
        more = srv(prefix + pointer(place))
        reply = read_all(filler, record(ASKED, kind, data), last, more, counts=(4, 0, 0))
        name = ".".join([*("a", "bc")[: len(prefix) // 2], NAMED])
        assert reply.addresses == {name: {bytes(4)}}
        assert reply.records[-1] == Srv(1, 2, 80, name)


def test_all_bits_of_a_pointer_count() -> None:
    """Names at 12, 268 and 524 are three names: one bit of the place apart, or a byte."""
    records: list[bytes] = []
    for place, label in ((268, b"\x01p"), (524, b"\x01q")):
        gap = place - len(message(*records)) - 11  # the filler's own owner, and its head
        records.append(record(b"\x00", 99, bytes(gap)))
        records.append(record(label + TARGET, 99, b""))
    for place, first in ((268, "p"), (524, "q")):
        records.append(record(pointer(place), 1, first.encode() * 4))
    reply = read_all(*records, counts=(6, 0, 0))
    assert reply.addresses == {f"p.{NAMED}": {b"pppp"}, f"q.{NAMED}": {b"qqqq"}}


def test_a_pointer_to_the_root_adds_nothing() -> None:
    """The end of an earlier name is a name too."""
    wire = message(srv(b"\x00"), srv(b"\x01a" + pointer(len(message()) + 18)), counts=(2, 0, 0))
    assert [each.target for each in dns_wire.read(wire, QUERY).records] == [".", "a."]


@pytest.mark.parametrize(("hops", "is_good"), [(1, True), (127, True), (128, False)])
def test_a_name_has_as_many_pointers_as_it_could_have_labels(hops: int, is_good: bool) -> None:
    """127; a compressor that points at a pointer wins nothing."""
    start = len(message()) + 12
    chain = TARGET + b"".join(
        pointer(start if n == 0 else start + len(TARGET) + 2 * (n - 1)) for n in range(hops - 1)
    )
    first = record(ASKED, 16, chain)
    last = start if hops == 1 else start + len(chain) - 2
    wire = message(first, record(pointer(last), 1, bytes(4)), counts=(2, 0, 0))
    if is_good:
        assert dns_wire.read(wire, QUERY).addresses == {NAMED: {bytes(4)}}
    else:
        refused(wire)


def test_a_name_ends_with_its_record() -> None:
    """Neither label nor pointer goes on in the record behind, though its bytes would fit."""
    for cut in (b"\x01n", b"\x01n\xc0", b"\xc0", b"\x02n"):
        for behind in (b"\x00", ASKED, b"\x0c" + b"a" * 12 + b"\x00"):
            refused(message(srv(cut), record(behind, 16, b""), counts=(2, 0, 0)))


def test_every_byte_is_written_as_a_master_file_writes_it() -> None:
    """As dnspython does: escapes for what means something there, numbers for what none can see."""
    for byte in range(256):
        target = b"\x03a" + bytes([byte]) + b"z\x00"
        reply = read_all(srv(target), counts=(1, 0, 0))
        assert reply.records[0].target == spelled(target)


class CountedBytes(bytes):
    """Counts how often one byte of it is looked at."""

    looks = 0

    def __getitem__(self, place):  # type: ignore[no-untyped-def, override]
        self.looks += isinstance(place, int)
        return super().__getitem__(place)


def test_a_name_is_read_once() -> None:
    """A pointer to a name that was read before costs the same however long the name is: three looks
    at its two bytes, and one more where a label of its own stands before it, with its length."""
    looks = []
    for labels in (1, 100):
        long = b"\x01a" * labels + b"\x00"
        first = srv(long)
        start = pointer(len(message()) + 18)
        more = [srv(start, name=start), srv(b"\x01b" + start)] * 50
        wire = message(first, *more, counts=(101, 0, 0))
        few, many = CountedBytes(message(first)), CountedBytes(wire)
        for each in (few, many):
            dns_wire.read(each, QUERY)
        looks.append(many.looks - few.looks)
    assert looks[0] == looks[1] <= 50 * (3 + 3 + 3 + 4)


@pytest.mark.parametrize(
    ("rcode", "text"),
    [
        (1, "answered FORMERR (is this Consul DNS?)"),
        (2, "answered SERVFAIL (Consul has no leader, or cannot reach it: see `consul members`)"),
        (4, "answered NOTIMP (is this Consul DNS?)"),
        (5, "answered REFUSED (is this Consul's DNS port, and `domain` its domain?)"),
        (9, "answered rcode 9 (is this Consul DNS?)"),
    ],
)
def test_an_error_says_what_to_look_at(rcode: int, text: str) -> None:
    """By its name and a remedy."""
    error = dns_wire.ErrorReply(rcode)
    assert (str(error), error.rcode) == (text, rcode)
