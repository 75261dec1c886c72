"""The DNS names of Consul: which a topic is asked for, and what a target's name says by itself.

A service is ``_<service>._<tag or tcp>.service[.<datacenter>].<domain>.``, RFC 2782's form, which
every version of Consul answers alike; a prepared query ``<name>.query[.<datacenter>].<domain>.``.
"""

from __future__ import annotations

import contextlib

import dns.exception
import dns.message

from ...errors import InvalidTopic
from ...settings import Settings
from ..service_names import QUERY, SERVICE_LABEL
from .coverage import UDP_LIMIT


class Names:
    """The names to ask for, by *settings*, which has only what can be part of one."""

    def __init__(self, settings: Settings) -> None:
        self.domain = settings.domain.lower() + "."
        shards = [f"s{number:02d}" for number in range(settings.shards)]
        self._tags = shards or [settings.tag or "tcp"]

    def of_topic(self, service: str, datacenter: str) -> list[str]:
        """Together they have every instance; *datacenter* "" is the agent's own."""
        if service.endswith(QUERY):
            return [service + self._suffix(datacenter)]
        return [self._of_tag(service, tag, datacenter) for tag in self._tags]

    def of_server(self, service: str, server: str, datacenter: str) -> str | None:
        """The name of the instances that have the tag *server*; None where none can have it."""
        tag = server.lower()
        if service.endswith(QUERY) or tag == "tcp" or not SERVICE_LABEL.match(tag):
            return None
        return self._of_tag(service, server, datacenter)

    def _of_tag(self, service: str, tag: str, datacenter: str) -> str:
        return f"_{service}._{tag}.service{self._suffix(datacenter)}"

    def _suffix(self, datacenter: str) -> str:
        return f".{datacenter}.{self.domain}" if datacenter else f".{self.domain}"


def query_for(name: str, kind: str) -> bytes:
    """The query for *name*, all but its id, which every sending makes anew; raises InvalidTopic."""
    try:
        return dns.message.make_query(name, kind, payload=UDP_LIMIT).to_wire()
    except dns.exception.DNSException as error:
        raise InvalidTopic(f"{name!r} cannot be asked for over DNS: {error}") from None


def node_of(target: str) -> str | None:
    """The node's name in ``<node>.node.<datacenter>.<domain>.``; it may have dots itself."""
    node, separator, _ = target.rpartition(".node.")
    return node if separator else None


def address_of(target: str) -> bytes | None:
    """The address in ``0a090905.addr.<datacenter>.<domain>.``, None for other names."""
    digits, _, rest = target.partition(".")
    if len(digits) in (8, 32) and rest[:5].lower() == "addr.":
        with contextlib.suppress(ValueError):  # no hex digits, or too few of them
            return bytes.fromhex(digits)
    return None
