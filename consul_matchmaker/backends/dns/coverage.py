"""Whether a Consul SRV answer may have been cut, and after how many answers all of it was seen.

Consul cuts in silence and never says how many records there are (facts A1-A3), so both are
arithmetic over what did come.
"""

from __future__ import annotations

from .wire import Reply, Srv

UDP_LIMIT = 1_232
"""The EDNS size to ask for: fits one packet of 1,280 bytes, the least MTU of IPv6 (DNS flag day
2020).  About 14 hosts; more go over TCP, which loses no fragments, and is no slower once it is
connected (fact A10)."""
TCP_LIMIT = 65_523
"""Where Consul's trimTCPResponse cuts (fact A2)."""
TCP_RECORDS = 1_024
"""How many SRV records it keeps at most, on TCP only, and never says so (fact A2)."""
LARGEST_RECORD = 18 + 255 + 28
"""The most that one more instance adds: an SRV record with the longest name, and an IPv6 address.
Whole instances are dropped, so a reply that ends further below the limit lacks none."""
METADATA = 200
"""Bytes of TXT records a node has, at most as far as we care: two defaults of 35, and some more.
Consul measures with them, and once it drops anything drops all of them: a reply can be 100 bytes
too long with them, lose one instance, and come out far below the limit."""

ACCEPTED_UNSEEN = 0.001
"""A union is called complete when, of a thousand such unions, one would lack one record."""


def may_be_cut(reply: Reply, limit: int) -> bool:
    """Whether *reply* may lack records, if Consul had *limit* bytes for it; or would, if it had."""
    if reply.is_truncated or reply.length > limit:  # the first only with enable_truncate
        return True
    if limit == TCP_LIMIT and len(reply.records) >= TCP_RECORDS:
        return True
    if reply.has_text:
        return False  # Consul drops every TXT record before the first instance
    return reply.length + LARGEST_RECORD + METADATA * len(reply.records) > limit


class Union:
    """The records of several answers to one query, each of which may lack some."""

    def __init__(self) -> None:
        self.records: dict[tuple[str, int], Srv] = {}
        self.addresses: dict[str, set[bytes]] = {}
        self.ttl_seconds = 0
        self.restart()

    def restart(self) -> None:
        """The next answer is the first to count: those before had less room."""
        self.answers = 0
        self.is_unshuffled = False
        """Whether one answer came twice, so out of a cache: the next ones will be no other."""
        self._smallest = 0
        self._last: list[Srv] = []

    def add(self, reply: Reply) -> None:
        self.answers += 1
        self.is_unshuffled = len(self._last) > 16 and reply.records == self._last
        self._last = reply.records
        self._smallest = min(self._smallest or len(reply.records), len(reply.records))
        self.ttl_seconds = shorter(self.ttl_seconds, reply.ttl_seconds)
        self.records.update(((record.target, record.port), record) for record in reply.records)
        for name, addresses in reply.addresses.items():
            self.addresses.setdefault(name, set()).update(addresses)

    def is_covered(self, more: int = 0) -> bool:
        """Whether there is no doubt that everything was seen, were there *more* answers that
        brought nothing new.

        Consul shuffles for each query before it cuts (fact A3), so each answer is a sample.  Were
        there one record more than were seen, n, an answer of m would lack a given record with
        1 - m/n, all k of them with (1 - m/n)^k, and n (1 - m/n)^k records would be unseen on
        average.  Once that is below ACCEPTED_UNSEEN there is none.  While many are missing, n still
        grows and with it that figure.  It takes, for

            n = 1,000   m = 997:   3 answers       n = 2,000   m = 997:  22 answers
            n = 1,000   m = 816:   9 answers       n = 5,000   m = 997:  70 answers

        To *find* everything takes half as many (2, 5, 12, 45 measured); the rest is certainty.
        """
        total = len(self.records) + 1
        unseen = total * (1 - self._smallest / total) ** (self.answers + more)
        return unseen <= ACCEPTED_UNSEEN


def shorter(one: int, other: int) -> int:
    """The shorter of two TTLs, of which 0 says nothing."""
    return min(one, other) if one and other else one or other
