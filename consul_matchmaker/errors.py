"""Every exception the package raises, each telling the caller what to do next.

None of their messages ever holds a token.
"""

from __future__ import annotations


class MatchmakerError(Exception):
    """Base of everything this package raises on purpose."""


class ConfigurationError(MatchmakerError, ValueError):
    """What was asked for cannot be meant: give up, and correct the value the message names."""


class InvalidTopic(ConfigurationError):
    """This topic cannot exist (empty, or no Consul DNS name can say it): use another name."""


class Unavailable(MatchmakerError):
    """No usable answer.  Whether the call took effect is unknown: retry, it is idempotent."""


class TimedOut(Unavailable):
    """Nothing came back within the deadline: retry, or allow more time."""


class LeaseLost(MatchmakerError):
    """Consul answered that our lease is gone.  Retrying is useless: open another, publish again."""

    why = "Consul does not know it any more"
    """For the line that tells of it."""


class Denied(MatchmakerError):
    """Consul refused the token: retrying is useless until the token or its policy changes."""


class NoLiveHosts(MatchmakerError):
    """Consul was asked, and no host serves the topic now: wait (``wait_for_hosts``) or give up."""


class Closed(MatchmakerError):
    """This object was closed: make a new one."""


__all__ = [
    "Closed",
    "ConfigurationError",
    "Denied",
    "InvalidTopic",
    "LeaseLost",
    "MatchmakerError",
    "NoLiveHosts",
    "TimedOut",
    "Unavailable",
]
