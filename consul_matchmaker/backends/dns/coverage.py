"""Whether a Consul SRV answer may have been cut, and after how many answers all of it was seen.

Consul cuts in silence and never says how many records there are (facts A1-A3), so both are
arithmetic over what did come.
"""

from __future__ import annotations

from .wire import Reply, Srv

UDP_LIMIT_LOCAL = 65_000
"""The EDNS size asked of an agent on this machine: what fits comes in one exchange, as nothing is
split into fragments on loopback.  UDP carries 65,507 bytes at most, and Consul may add its own OPT
record after it has measured; a reply above that is never sent."""
UDP_LIMIT_REMOTE = 1_232
"""The EDNS size asked of other agents: fits one packet of 1,280 bytes, the least MTU of IPv6 (DNS
flag day 2020).  About 14 hosts; more go over TCP, which loses no fragments."""
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
MAX_ANSWERS = 100
"""Enough for 5,000 records (see `is_covered`), and fewer than a TCP connection carries (A10)."""


def may_be_cut(reply: Reply, limit: int, *, is_tcp: bool) -> bool:
    """Whether *reply*, for which Consul had *limit* bytes, may lack records."""
    if reply.is_truncated:  # only with enable_truncate
        return True
    if is_tcp and len(reply.records) >= TCP_RECORDS:
        return True
    if reply.has_text:
        return False  # Consul drops every TXT record before the first instance
    needed = reply.length + LARGEST_RECORD + METADATA * len(reply.records)
    return needed > limit


def is_covered(seen: int, smallest: int, answers: int) -> bool:
    """Whether *answers* answers of at least *smallest* records each, *seen* different ones in all,
    leave no doubt that there is no further record.

    Consul shuffles for each query before it cuts (fact A3), so each answer is a sample.  Were there
    one record more, n = seen + 1, an answer of m would lack a given record with 1 - m/n, all k of
    them with (1 - m/n)^k, and n (1 - m/n)^k records would be unseen on average.  Once that is
    below ACCEPTED_UNSEEN there is none.  While many are missing, `seen` still grows and with it
    that figure; after two answers with exactly the same records it is 1/n.  It takes, for

        n = 1,000   m = 997:   3 answers       n = 2,000   m = 997:  22 answers
        n = 1,000   m = 816:   9 answers       n = 5,000   m = 997:  70 answers

    To *find* everything takes about half as many (2, 5, 12, 45 measured); the rest is certainty.
    """
    total = seen + 1
    return total * (1 - smallest / total) ** answers <= ACCEPTED_UNSEEN


class Union:
    """The records of several answers to one query."""

    def __init__(self) -> None:
        self.is_complete = True
        self.is_unshuffled = False
        self._ttls: list[int] = []
        self.addresses: dict[str, set[bytes]] = {}
        self.records: dict[tuple[str, int], Srv] = {}
        self.restart()

    def restart(self) -> None:
        """The next answer is the first to count: those before had less room."""
        self.answers = 0
        self._smallest = 0
        self._last: list[Srv] = []

    def add(self, reply: Reply) -> None:
        self.is_unshuffled = len(self._last) > 16 and reply.records == self._last
        self._last = reply.records
        self._smallest = min(self._smallest or len(reply.records), len(reply.records))
        self.answers += 1
        self._ttls.append(reply.ttl_seconds)
        self.records.update(((record.target, record.port), record) for record in reply.records)
        if not self.addresses:
            self.addresses = reply.addresses
            return
        for name, addresses in reply.addresses.items():
            self.addresses.setdefault(name, set()).update(addresses)

    def is_covered(self, more: int = 0) -> bool:
        """Whether everything was seen, were there *more* answers that brought nothing new."""
        return is_covered(len(self.records), self._smallest, self.answers + more)

    @property
    def ttl_seconds(self) -> int:
        return min((ttl for ttl in self._ttls if ttl), default=0)
