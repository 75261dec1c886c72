"""Which service of Consul stands for an exchange and a topic.  Pure."""

from __future__ import annotations

import functools
import hashlib
import re
from typing import NamedTuple

MOST_CHARACTERS = 62
"""A DNS label has 63 characters (RFC 1035), one of which a query by RFC 2782 needs."""
_PLAIN_EXCHANGE = re.compile(r"[a-z0-9]+\Z")
_PLAIN_TOPIC = re.compile(r"[a-z0-9]([a-z0-9-]*[a-z0-9])?\Z")
_ENDS_LIKE_A_DIGEST = re.compile(r".*-[0-9a-f]{10}\Z")


class Place(NamedTuple):
    """Where a message goes, as in oslo.messaging's Target."""

    exchange: str
    topic: str
    server: str | None = None

    @property
    def service(self) -> str:
        return service_of(self.exchange, self.topic)

    def __str__(self) -> str:
        return f"{self.exchange}/{self.topic}" + (f" as {self.server}" if self.server else "")


POOL = "pool-"
"""Before the name of a pool of notification listeners, where others have the name of a server;
alone, it stands for listeners of no pool."""


def pool_of(server: str | None) -> str | None:
    """The pool that this says, if it is one's."""
    return (server.removeprefix(POOL) or None) if server and server.startswith(POOL) else None


BROADCASTER = Place("consulmatchmaker", "broadcaster")


@functools.lru_cache(4096)
def service_of(exchange: str, topic: str) -> str:
    """``exchange-topic``, such as ``nova-compute``; no two have the same.

    An exchange of letters and digits alone, and a topic that has ``-`` besides, are readable in it.
    For others, for a name of more than 62 characters, and for one that ends as if it had a digest,
    what DNS cannot carry becomes ``-``, and a digest is added.
    """
    plain = f"{exchange}-{topic}"
    is_plain = _PLAIN_EXCHANGE.match(exchange) and _PLAIN_TOPIC.match(topic)
    is_clear = len(plain) <= MOST_CHARACTERS and not _ENDS_LIKE_A_DIGEST.match(plain)
    if is_plain and is_clear:
        return plain
    digest = hashlib.blake2s(f"{len(exchange)}:{plain}".encode(), digest_size=5).hexdigest()
    readable = re.sub(r"[^a-z0-9]+", "-", plain.lower()).strip("-")
    return f"{readable[: MOST_CHARACTERS - len(digest) - 1].rstrip('-') or 'x'}-{digest}"
