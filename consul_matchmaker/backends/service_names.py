"""Which Consul service serves a topic.  Pure; for catalog and service mode alike."""

from __future__ import annotations

import functools
import logging
import re
from collections.abc import Callable, Mapping

from ..errors import InvalidTopic
from ..model import checked_topic
from ..settings import Settings

logger = logging.getLogger(__name__)

SERVICE_LABEL = re.compile(r"[a-z0-9_-]{1,62}\Z")
"""A Consul service or tag that DNS can ask for: a label has 63 characters (RFC 1035), and one of
them is the underscore before it (RFC 2782)."""
QUERY = ".query"
_REPLACED = re.compile(r"[!-,./:-@\[-^`{-~ ]")  # the rest of printable ASCII


def service_of(
    topic: str,
    template: str,
    service_map: Mapping[str, str],
    *,
    strict: bool = False,
    has_underscores: bool = True,
) -> str:
    """The Consul service that serves *topic*; the prepared query if the rule ends in ``.query``.

    What *service_map* says of the topic, else *template* with the topic for ``{topic}``, in which
    capitals become small letters (DNS does not tell them apart) and every character but letters,
    digits, ``_`` and ``-`` becomes ``-``: ``notifications.info`` is the service
    ``notifications-info``.  That may be another topic's, and the resolver says so in the log.  With
    *strict* such a topic is refused instead.  That is not the default, because topics of
    oslo.messaging have dots and its users cannot choose others.  Without *has_underscores* a ``_``
    becomes ``-`` too: newer agents refuse to register a service with one (fact G20).

    Raises InvalidTopic where that cannot be asked for: longer than 62 characters, or not ASCII.
    Nothing is shortened or left out, because operators have to be able to tell the name.
    """
    checked_topic(topic)
    mapped = service_map.get(topic)
    name = template.replace("{topic}", topic) if mapped is None else mapped
    is_query = (template if mapped is None else mapped).endswith(QUERY)
    if is_query:
        name = name[: -len(QUERY)]
    label = (_REPLACED.sub("-", name) if mapped is None else name).lower()
    if mapped is None and not has_underscores:
        label = label.replace("_", "-")
    if strict and mapped is None and label != name.lower():
        raise InvalidTopic(
            f"topic {topic!r} cannot be the name of a Consul service: ask for {label!r} if that is "
            "the one, or name it with service_map (strict_names refuses to translate)"
        )
    # A prepared query may have dots: Consul joins the labels again.
    if all(SERVICE_LABEL.match(part) for part in (label.split(".") if is_query else [label])):
        return label + QUERY if is_query else label
    reason = "has more than 62 characters" if len(label) > 62 else "has characters DNS cannot carry"
    if mapped is not None:
        raise InvalidTopic(
            f"service_map: {mapped!r}, for topic {topic!r}, {reason}: give the service another name"
        )
    raise InvalidTopic(
        f"topic {topic!r} {reason} as a Consul service name: "
        f"name the service it has with service_map, as in service_map={{{topic!r}: 'its-service'}}"
    )


MOST_SAID = 10_000
_said: dict[tuple[str, str], object] = {}
"""The topics, with their services, that the log has; no more than about `MOST_SAID`."""


def namer(settings: Settings) -> Callable[[str], str]:
    """`service_of` by *settings*; remembers, and says once in a process of a topic that its service
    may be another one's."""

    @functools.lru_cache(2 * settings.max_topics)
    def service_name(topic: str) -> str:
        template, service_map = settings.service_template, settings.service_map
        service = service_of(
            topic,
            template,
            service_map,
            strict=settings.strict_names,
            has_underscores=settings.mode != "service",
        )
        is_translated = service != template.replace("{topic}", topic).lower()
        if topic not in service_map and is_translated and _is_news(topic, service):
            logger.warning(
                "topic %r is the Consul service %r, as Consul cannot carry its name: "
                "are that service's hosts meant? service_map says which service a topic has, and "
                "strict_names refuses this",
                topic,
                service,
            )
        return service

    return service_name


def _is_news(topic: str, service: str) -> bool:
    """Whether this was not asked before, by any thread: one of several is told so."""
    if len(_said) >= MOST_SAID:
        _said.clear()
    mine = object()
    return _said.setdefault((topic, service), mine) is mine  # without a lock, also in a signal
