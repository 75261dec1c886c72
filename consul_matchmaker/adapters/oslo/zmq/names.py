"""Translate oslo.messaging's targets, listener types and hosts to topics and Hosts, and back."""

from __future__ import annotations

from typing import Any

from ....errors import ConfigurationError
from ....model import Host

DIRECT = "ROUTER"
"""The type of listener that clients connect to themselves."""
PUBLISHERS = "PROXY/PUBLISHERS"
ROUTERS = "PROXY/ROUTERS"

# Before the text of an opaque host, so that it comes back as the type it was.  Bytes are written
# in Latin-1, which has a character for each of them.
_BYTES = "b:"
_TEXT = "s:"


def topic_of(topic: str, listener_type: str) -> str:
    """The topic that listeners of this type on *topic* are registered for; no two are the same.

    Servers that clients connect to directly have the topic's own name, which is what people and
    Consul's catalog know.
    """
    return topic if listener_type == DIRECT and "/" not in topic else f"{listener_type}/{topic}"


def server_of(target: Any) -> str | None:
    """The server that *target* asks for; upstream cuts it at the ``@`` (its bug 1630975)."""
    if target.server and not target.fanout:
        return str(target.server).split("@")[0] or None
    return None


def key_of(target: Any, listener_type: str) -> str:
    """What the host's routing table calls this target: ``TYPE/topic[/server]``."""
    server = server_of(target)
    return f"{listener_type}/{target.topic}" + (f"/{server}" if server else "")


def read_key(key: str) -> tuple[str, str | None]:
    """Topic and server of what `key_of` made; the first ``/`` in the rest begins the server."""
    listener_type, _, rest = key.partition("/")
    topic, _, server = rest.partition("/")
    return topic_of(topic, listener_type), server or None


def host_of(name: str | bytes) -> Host:
    """*name* as a Host: address and port where it is written so, else opaque, to the byte."""
    if isinstance(name, bytes):
        return Host.opaque(_BYTES + name.decode("latin-1"))
    try:
        host = Host.parse(name)
    except ConfigurationError:
        return Host.opaque(_TEXT + name)
    return host if str(host) == name else Host.opaque(_TEXT + name)


def name_of(host: Host) -> str | bytes:
    """What `host_of` was given."""
    text = str(host)
    if host.port is None and text.startswith(_BYTES):
        try:
            return text.removeprefix(_BYTES).encode("latin-1")
        except UnicodeEncodeError:  # not written by us
            return text
    return text.removeprefix(_TEXT) if host.port is None else text


def publisher_of(addresses: tuple[str, str]) -> Host:
    """A proxy's publisher and router addresses as one host: they come and go together."""
    return Host.opaque(",".join(addresses))


def addresses_of(publisher: Host) -> tuple[str, ...]:
    """What `publisher_of` was given."""
    return tuple(str(publisher).split(","))
