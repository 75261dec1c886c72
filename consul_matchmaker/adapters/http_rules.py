"""What the adapters of HTTP clients share: which URL means a topic, what may be repeated."""

from __future__ import annotations

from ..errors import ConfigurationError
from ..settings import Settings

FAILED_STATUSES = frozenset({502, 503, 504})
"""The server, or what it depends on, is down or overloaded (RFC 9110, 15.6.3 to 15.6.5): the host
is rejected, and another one may do better."""
IDEMPOTENT_METHODS = frozenset({"GET", "HEAD", "OPTIONS", "TRACE", "PUT", "DELETE"})
"""Twice has the effect of once (RFC 9110, 9.2.2)."""


def default_suffix(settings: Settings) -> str:
    """What follows the topic in a URL's host where no suffix is given: Consul's own spelling, so
    that a URL means the same with and without this library."""
    return f".service.{settings.domain}".lower()


def checked_suffix(suffix: str | None, settings: Settings) -> str:
    """*suffix*, or where it is None the default.  Raises ConfigurationError for one that would make
    a topic of every host, or of a part of a label."""
    if suffix is None:
        return default_suffix(settings)
    if not suffix.startswith(".") or not suffix.strip("."):
        raise ConfigurationError(
            f"suffix must begin with a dot and have a name after it, as in '.service.consul', "
            f"not {suffix!r}"
        )
    return suffix.rstrip(".").lower()


def topic_of(host: str, suffix: str) -> str | None:
    """The topic that *host*, of a URL, means; None where it is an ordinary name.

    Upper and lower case are the same in a URL's host: a topic that has capitals has no URL.
    """
    name = host.rstrip(".").lower()
    topic = name.removesuffix(suffix)
    return topic if topic and topic != name else None


def may_repeat(method: str, *, was_sent: bool, is_kept: bool) -> bool:
    """Whether a request that failed may go to another host: not if it may have been executed and
    twice is not as once, nor when its body is gone (*is_kept*: it can be sent again)."""
    return is_kept and (not was_sent or method.upper() in IDEMPOTENT_METHODS)
