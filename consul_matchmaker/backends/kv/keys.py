"""The KV keys of registrations, and what they mean.

They are ``<prefix>/<topic>/<host>/<incarnation>``.  A segment holds only ``[A-Za-z0-9_-]``,
the alphabet that every Consul version accepts (fact B13: 1.21.5 refuses ``:``, ``%`` and space):
those letters, digits and ``-`` stand for themselves, any other byte of the UTF-8 text is ``_`` and
two hex digits.  So every text survives the round trip, two texts never meet, and no topic leaves
its folder.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from ...errors import ConfigurationError
from ...model import Host, Registration, checked_topic

_LITERAL = frozenset(b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-")
_SEGMENT = re.compile(r"(?:[A-Za-z0-9-]|_[0-9a-f]{2})+\Z")
_ESCAPED = {b"%02x" % byte: bytes([byte]) for byte in range(256) if byte not in _LITERAL}
_OPAQUE = "_-"
"""Begins the segment of a host that is not host:port.  No escape looks like it, so the opaque text
``10.0.0.5:9501`` and the host 10.0.0.5:9501 are two keys."""
_LEASE_ID = re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}\Z")
_LEASE_ID_LENGTH = 36

MAX_KEY_BYTES = 7500
"""Of a key after its prefix.  It is part of a request line, of which any HTTP program has to take
8,000 bytes (RFC 9112, section 3); the rest is for the method, the prefix and the parameters."""

SENTINEL = "_"
"""A last segment that no text encodes to: such a key is ours, but no registration."""


def encode_segment(text: str) -> str:
    """*text* in the alphabet of keys.  Raises ConfigurationError when it is not encodable."""
    try:
        raw = text.encode("utf-8")
    except UnicodeEncodeError:
        raise ConfigurationError(f"{text!r} is not valid Unicode text") from None
    return "".join(chr(byte) if byte in _LITERAL else f"_{byte:02x}" for byte in raw)


def decode_segment(segment: str) -> str:
    """The text that `encode_segment` made *segment* of; raises ValueError when there is none."""
    if not _SEGMENT.match(segment):
        raise ValueError(f"not an encoded segment: {segment!r}")
    first, *escaped = segment.encode("ascii").split(b"_")
    try:
        raw = first + b"".join([_ESCAPED[part[:2]] + part[2:] for part in escaped])
    except KeyError:  # one text, one key: `_41` is not another `A`
        raise ValueError(f"not the encoding of any text: {segment!r}") from None
    return raw.decode("utf-8")


@dataclass(frozen=True, slots=True)
class Key:
    """A registration's KV key, taken apart.

    The incarnation is the id of the lease that holds the key, so a restarted process never meets
    its dead predecessor's key, followed by ``-`` and the server name if there is one, so that the
    keys alone answer a lookup by server.
    """

    topic: str
    host: Host
    lease_id: str
    server: str | None = None

    @classmethod
    def of(cls, registration: Registration, lease_id: str) -> Key:
        return cls(registration.topic, registration.host, lease_id, registration.server)

    @classmethod
    def parse(cls, prefix: str, text: str) -> Key:
        """Read a key under *prefix*; raises ValueError for what is not a registration of ours."""
        if not text.startswith(prefix + "/"):
            raise ValueError(f"not under {prefix}/: {text!r}")
        segments = text[len(prefix) + 1 :].split("/")
        if len(segments) != 3:
            raise ValueError(f"not <topic>/<host>/<incarnation>: {text!r}")
        topic, host, incarnation = segments
        lease_id, server = incarnation[:_LEASE_ID_LENGTH], incarnation[_LEASE_ID_LENGTH:]
        if not _LEASE_ID.match(lease_id) or (server and not server.startswith("-")):
            raise ValueError(f"not an incarnation of ours: {text!r}")
        return cls(
            decode_segment(topic),
            _decode_host(host),
            lease_id,
            decode_segment(server[1:]) if server else None,
        )

    def under(self, prefix: str) -> str:
        """The key as Consul knows it."""
        server = f"-{encode_segment(self.server)}" if self.server else ""
        return f"{host_folder(prefix, self.topic, self.host)}{self.lease_id}{server}"

    @property
    def registration(self) -> Registration:
        return Registration(self.topic, self.host, self.server)


def checked_registration(registration: Registration) -> Registration:
    """Return *registration* unchanged; raise ConfigurationError when no reader could tell it.

    That is text which is not Unicode, an empty server name, or a Host made without `Host.parse`
    that it would not have made: not an address, or not in its one spelling.  Also a registration
    whose key were too long for a request (MAX_KEY_BYTES).
    """
    checked_topic(registration.topic)
    lease_id = "00000000-0000-0000-0000-000000000000"
    try:
        text = Key.of(registration, lease_id).under("x")
        key = Key.parse("x", text)
    except ConfigurationError:
        raise
    except ValueError as error:
        raise ConfigurationError(f"{registration}: {error}") from None
    if key.registration != registration:
        raise ConfigurationError(f"{registration}: the server name is empty; leave it out")
    if len(text) > MAX_KEY_BYTES:
        raise ConfigurationError(
            f"{str(registration)[:60]}...: its key has {len(text)} bytes, and {MAX_KEY_BYTES} is "
            "the most that a request surely carries; use a shorter topic, host or server name "
            "(what is not a letter, a digit or '-' takes 3 bytes or more)"
        )
    return registration


def topic_folder(prefix: str, topic: str) -> str:
    """Where *topic*'s keys are; ends in ``/``, so ``scheduler`` never shows ``scheduler2``."""
    return f"{prefix}/{encode_segment(checked_topic(topic))}/"


def host_folder(prefix: str, topic: str, host: Host) -> str:
    """Where the keys of *topic* on *host* are, whoever published them; ends in ``/``."""
    segment = encode_segment(str(host))
    return topic_folder(prefix, topic) + (_OPAQUE + segment if host.port is None else segment) + "/"


def _decode_host(segment: str) -> Host:
    if segment.startswith(_OPAQUE):
        return Host.opaque(decode_segment(segment[len(_OPAQUE) :]))
    text = decode_segment(segment)
    host = Host.parse(text)
    if str(host) != text:  # one host, one key: [0::1]:5 is not another [::1]:5
        raise ValueError(f"not the text of any host: {text!r}")
    return host
