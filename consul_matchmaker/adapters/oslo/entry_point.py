"""What entry points name: oslo.messaging's matchmaker ``consul``, and the proxy command."""

from __future__ import annotations

import sys
from typing import Any


def matchmaker(*args: Any, **kwargs: Any) -> Any:
    """The ZeroMQ driver's matchmaker when called with a configuration, as 2.6 to 8.1.4 do; the
    classic one when called with nothing, as Kilo (1.8) does."""
    if args or kwargs:
        from .zmq.matchmaker import MatchmakerConsul

        return MatchmakerConsul(*args, **kwargs)
    from .zmq.classic import MatchMakerConsul

    return MatchMakerConsul()


def proxy() -> int | None:
    """The command ``consul-matchmaker-zmq-proxy``; 1, and one line, where the extra is missing."""
    try:
        from .zmq.driver import run_proxy
    except ImportError as error:
        print(f"consul-matchmaker-zmq-proxy: {error}", file=sys.stderr)
        return 1
    run_proxy()
    return None
