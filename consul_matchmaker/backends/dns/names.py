"""The DNS names of Consul: which a topic is asked for, and what a target's name says by itself.

A service is ``_<service>._<tag or tcp>.service[.<datacenter>].<domain>.``, RFC 2782's form, which
every version of Consul answers alike; a prepared query ``<name>.query[.<datacenter>].<domain>.``.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Mapping

import dns.exception
import dns.message

from ...errors import InvalidTopic
from ...model import checked_topic
from ...settings import Settings
from .coverage import UDP_LIMIT

SERVICE_LABEL = re.compile(r"[a-z0-9_-]{1,62}\Z")
"""A Consul service or tag that DNS can ask for: a label has 63 characters (RFC 1035), and one of
them is the underscore before it (RFC 2782)."""
_REPLACED = re.compile(r"[!-,./:-@\[-^`{-~ ]")  # the rest of printable ASCII
_QUERY = ".query"


def service_of(
    topic: str, template: str, service_map: Mapping[str, str], *, strict: bool = False
) -> str:
    """The Consul service that serves *topic*; the prepared query if the rule ends in ``.query``.

    What *service_map* says of the topic, else *template* with the topic for ``{topic}``, in which
    capitals become small letters (DNS does not tell them apart) and every character but letters,
    digits, ``_`` and ``-`` becomes ``-``: ``notifications.info`` is the service
    ``notifications-info``.  That may be another topic's, and the resolver says so in the log.  With
    *strict* such a topic is refused instead.  That is not the default, because topics of
    oslo.messaging have dots and its users cannot choose others.

    Raises InvalidTopic where that cannot be asked for: longer than 62 characters, or not ASCII.
    Nothing is shortened or left out, because operators have to be able to tell the name.
    """
    checked_topic(topic)
    mapped = service_map.get(topic)
    name = template.replace("{topic}", topic) if mapped is None else mapped
    is_query = (template if mapped is None else mapped).endswith(_QUERY)
    if is_query:
        name = name[: -len(_QUERY)]
    label = (_REPLACED.sub("-", name) if mapped is None else name).lower()
    if strict and mapped is None and label != name.lower():
        raise InvalidTopic(
            f"topic {topic!r} cannot be the name of a Consul service: ask for {label!r} if that is "
            "the one, or name it with service_map (strict_names refuses to translate)"
        )
    # A prepared query may have dots: Consul joins the labels again.
    if all(SERVICE_LABEL.match(part) for part in (label.split(".") if is_query else [label])):
        return label + _QUERY if is_query else label
    reason = "has more than 62 characters" if len(label) > 62 else "has characters DNS cannot carry"
    if mapped is not None:
        raise InvalidTopic(
            f"service_map: {mapped!r}, for topic {topic!r}, {reason}: give the service another name"
        )
    raise InvalidTopic(
        f"topic {topic!r} {reason} as a Consul service name: "
        f"name the service it has with service_map, as in service_map={{{topic!r}: 'its-service'}}"
    )


class Names:
    """The names to ask for, by *settings*, which has only what can be part of one."""

    def __init__(self, settings: Settings) -> None:
        self.domain = settings.domain.lower() + "."
        shards = [f"s{number:02d}" for number in range(settings.shards)]
        self._tags = shards or [settings.tag or "tcp"]

    def of_topic(self, service: str, datacenter: str) -> list[str]:
        """Together they have every instance; *datacenter* "" is the agent's own."""
        if service.endswith(_QUERY):
            return [service + self._suffix(datacenter)]
        return [self._of_tag(service, tag, datacenter) for tag in self._tags]

    def of_server(self, service: str, server: str, datacenter: str) -> str | None:
        """The name of the instances that have the tag *server*; None where none can have it."""
        tag = server.lower()
        if service.endswith(_QUERY) or tag == "tcp" or not SERVICE_LABEL.match(tag):
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
