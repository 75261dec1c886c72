"""SRV answers out of DNS wire bytes: the header, SRV, address and SOA records, and nothing else.

dnspython reads everything and spends ten times the network's time on it (trap D15); this reads what
a lookup needs.  Whatever is not a well-formed reply to the query raises `BadReply`.
"""

from __future__ import annotations

import re
import struct
from dataclasses import dataclass, field
from typing import NamedTuple

NOERROR, FORMERR, SERVFAIL, NXDOMAIN, NOTIMP, REFUSED = 0, 1, 2, 3, 4, 5
_A, _SOA, _TXT, _AAAA, _SRV = 1, 6, 16, 28, 33
_IN = 1
_RECORD = struct.Struct("!HHIH")  # type, class, TTL, length of the data (RFC 1035, 4.1.3)
_SRV_DATA = struct.Struct("!HHH")  # priority, weight, port (RFC 2782)
_HEADER_LENGTH = 12
_NAME_LENGTH = 255  # RFC 1035, 2.3.4
# A name has at most 127 labels, and a compressor that points at a pointer wins nothing.
_POINTERS = 127
_PLAIN = re.compile(rb"[A-Za-z0-9_-]+\Z")
_ESCAPED = frozenset(b'"().;\\@$')  # what dnspython and master files write with a backslash
# An error about the query as a whole may leave the question out.
_WITHOUT_QUESTION = frozenset({FORMERR, SERVFAIL, NOTIMP, REFUSED})

_RCODES = {FORMERR: "FORMERR", SERVFAIL: "SERVFAIL", NOTIMP: "NOTIMP", REFUSED: "REFUSED"}
_REMEDIES = {
    SERVFAIL: "Consul has no leader, or cannot reach it: see `consul members`",
    REFUSED: "is this Consul's DNS port, and `domain` its domain?",
}


class BadReply(ValueError):
    """These bytes are not a DNS reply that can be used."""


class NotOurs(BadReply):
    """A message, but not the reply to this query: wrong id, wrong question, or no reply at all."""


class ErrorReply(BadReply):
    """The agent answered with an error; says which, and what to look at."""

    def __init__(self, rcode: int) -> None:
        text = f"answered {_RCODES.get(rcode, f'rcode {rcode}')}"
        super().__init__(f"{text} ({_REMEDIES.get(rcode, 'is this Consul DNS?')})")
        self.rcode = rcode


class Srv(NamedTuple):
    """One SRV record; *target* as a master file writes it, with the dot at its end."""

    priority: int
    weight: int
    port: int
    target: str


@dataclass(frozen=True, slots=True)
class Reply:
    """What a reply says about the name that was asked for."""

    rcode: int
    length: int
    """Of the whole message, in bytes: what tells whether it could have been cut."""
    is_truncated: bool = False
    answers: int = 0
    """How many answer records there were, of any kind and for any name."""
    records: list[Srv] = field(default_factory=list)
    """SRV records of the name that was asked for, in the order they came."""
    addresses: dict[str, set[bytes]] = field(default_factory=dict)
    """Packed addresses of answer and additional section, by lower-case name."""
    has_text: bool = False
    """Whether the additional section holds a TXT record."""
    ttl_seconds: int = 0
    """The smallest TTL of *records*; of the denial, by its SOA (RFC 2308), when there are none."""
    serial: int = 0
    """Of the SOA of a denial; in Consul's that is its clock, in seconds, when it answered."""


def read(wire: bytes, query: bytes) -> Reply:
    """Read *wire* as the reply to *query*.  Raises BadReply, and of that NotOurs when it is not."""
    try:
        return _read(wire, query)
    except (IndexError, struct.error, RecursionError):  # the last deep in a caller's own recursion
        raise BadReply("the message ends early, or its names lead too far") from None


def _read(wire: bytes, query: bytes) -> Reply:
    if len(wire) < _HEADER_LENGTH or wire[:2] != query[:2] or not wire[2] & 0x80:
        raise NotOurs("another id, or no reply")
    if wire[2] & 0x78:
        raise BadReply("not the reply to a standard query")
    rcode, is_truncated = wire[3] & 0x0F, bool(wire[2] & 0x02)
    questions, answers, authorities, additionals = struct.unpack_from("!HHHH", wire, 4)
    position = _HEADER_LENGTH
    if questions == 0 and rcode in _WITHOUT_QUESTION:
        return Reply(rcode, len(wire), is_truncated)
    question = _question(query)
    position += len(question)
    # Letters in any case: Consul 1.19 and later give them back in lower case (fact A8).  No length
    # of a label, and neither type nor class of our queries, is the code of a letter.
    if questions != 1 or wire[_HEADER_LENGTH:position].lower() != question.lower():
        raise NotOurs("another question")

    names = _Names(wire)
    asked, _, asked_end = names.at(_HEADER_LENGTH, len(wire))
    if asked_end + 4 != position:
        raise BadReply("a name runs out of the question")
    asked = asked.lower()
    records: list[Srv] = []
    addresses: dict[str, set[bytes]] = {}
    has_text = False
    ttls: list[int] = []
    denials: list[int] = []
    serial = 0
    length = len(wire)
    first_authority = answers
    first_additional = answers + authorities
    for number in range(answers + authorities + additionals):
        name, _, position = names.at(position, length)
        kind, group, ttl, size = _RECORD.unpack_from(wire, position)
        position += 10
        end = position + size
        if end > length:
            raise BadReply("a record runs past the end")
        if group != _IN:
            pass  # OPT keeps its size where others have their class
        elif kind == _SRV:
            if size < 7:
                raise BadReply("an SRV record is too short")
            target, _, target_end = names.at(position + 6, end)
            if target_end != end:
                raise BadReply("an SRV record is too long")
            if number < first_authority and name.lower() == asked:
                priority, weight, port = _SRV_DATA.unpack_from(wire, position)
                records.append(Srv(priority, weight, port, target))
                ttls.append(ttl)
        elif kind in (_A, _AAAA):
            if size != (4 if kind == _A else 16):
                raise BadReply("an address has the wrong length")
            if number < first_authority or number >= first_additional:
                addresses.setdefault(name.lower(), set()).add(wire[position:end])
        elif kind == _TXT:
            has_text = has_text or number >= first_additional
        elif kind == _SOA and size >= 22 and first_authority <= number < first_additional:
            denials.append(min(ttl, int.from_bytes(wire[end - 4 : end], "big")))
            serial = int.from_bytes(wire[end - 20 : end - 16], "big")
        position = end
    if position != length:
        raise BadReply("there is more than the header says")
    ttl = min(ttls or denials or [0])
    if ttl >= 1 << 31:
        ttl = 0  # RFC 2181, 8: as if it were zero
    return Reply(rcode, length, is_truncated, answers, records, addresses, has_text, ttl, serial)


def _question(query: bytes) -> bytes:
    """The question of a query of our own, which is known to be well-formed and uncompressed."""
    position = _HEADER_LENGTH
    while query[position]:
        position += 1 + query[position]
    return query[_HEADER_LENGTH : position + 5]


_Name = tuple[str, int, int]


class _Names:
    """The names of one message.  Remembers them by place, as most are pointers to earlier ones."""

    def __init__(self, wire: bytes) -> None:
        self._wire = wire
        self._known: dict[int, _Name] = {}
        self._labels: dict[bytes, str] = {}  # Consul leaves `addr.dc1.consul` in every target

    def at(self, start: int, end: int, pointers: int = 0) -> _Name:
        """The name at *start*, none of it at or after *end*, to which *pointers* led: its text, its
        length when written in full, and the place after it."""
        known = self._known.get(start)
        if known is None:
            known = self._known[start] = self._read(start, end, pointers)
        if known[2] > end:
            raise BadReply("a name runs past the end")
        return known

    def _read(self, start: int, end: int, pointers: int) -> _Name:
        wire = self._wire
        labels: list[str] = []
        length, position = 1, start
        while size := wire[position]:
            position += 1
            if size < 64:
                label = wire[position : position + size]
                position += size
                length += 1 + size
                shown = self._labels.get(label)
                if shown is None:
                    shown = self._labels[label] = _text(label)
                labels.append(shown)
            elif size >= 0xC0 and pointers < _POINTERS:
                target = (size & 0x3F) << 8 | wire[position]
                # Every pointer goes back further than the one before, so no loop is possible; and
                # what it leads to ends before, as all that was written before does.
                if target >= start:
                    raise BadReply("a pointer does not go back")
                rest = self.at(target, start, pointers + 1)
                length += rest[1] - 1
                if rest[0] != ".":
                    labels.append(rest[0][:-1])
                break
            else:
                raise BadReply("not a label")
            if position >= end:
                raise BadReply("a name runs past the end")
        if length > _NAME_LENGTH:
            raise BadReply("a name is too long")
        return ".".join(labels) + ".", length, position + 1


def _text(label: bytes) -> str:
    if _PLAIN.match(label):
        return label.decode("ascii")
    return "".join(
        f"\\{chr(byte)}"
        if byte in _ESCAPED
        else chr(byte)
        if 0x20 < byte < 0x7F
        else f"\\{byte:03d}"
        for byte in label
    )
