"""Serve both of oslo.messaging's matchmaker APIs under the one entry-point name ``consul``."""

from __future__ import annotations

from typing import Any


def matchmaker(*args: Any, **kwargs: Any) -> Any:
    """The ZeroMQ driver's matchmaker when called with a configuration, as 2.6 to 8.1.4 do; the
    classic one when called with nothing, as Kilo (1.8) does."""
    if args or kwargs:
        from .oslo_zmq import MatchmakerConsul

        return MatchmakerConsul(*args, **kwargs)
    from .matchmaker_consul import MatchMakerConsul

    return MatchMakerConsul()
