"""What entry points name: matchmaker and driver ``consul`` of oslo.messaging, and two commands."""

from __future__ import annotations

import sys
from typing import Any

from ...errors import ConfigurationError
from ..extras import extra


def matchmaker(*args: Any, **kwargs: Any) -> Any:
    """The ZeroMQ driver's matchmaker when called with a configuration, as 2.6 to 8.1.4 do; the
    classic one when called with nothing, as Kilo (1.8) does."""
    if args or kwargs:
        from .zmq.matchmaker import MatchmakerConsul

        return MatchmakerConsul(*args, **kwargs)
    from .zmq.classic import MatchMakerConsul

    return MatchMakerConsul()


def driver(conf: Any, url: Any, *args: Any, **kwargs: Any) -> Any:
    """The transport driver of ``consul+zmq://``, for oslo.messaging to 8.1.4, or of
    ``consul+http://``, for 14 and later.

    Raises ConfigurationError for any other scheme, and ImportError, which says what to install,
    where oslo.messaging is missing or its release is one for the other scheme.
    """
    transport = url.transport.partition("+")[2]
    if transport == "zmq":
        from .zmq.driver import ConsulDriver

        return ConsulDriver(conf, url, *args, **kwargs)
    if transport == "http":
        with extra("oslo-http", needs="oslo.messaging 14 or later"):
            from oslo_messaging import TransportOptions  # noqa: F401  (8.1.4 has none)
        from .http.driver import HttpDriver

        return HttpDriver(conf, url, *args, **kwargs)
    raise ConfigurationError(  # and repeats nothing of the URL, which may hold a token
        "the transport URL must begin with consul+zmq:// (oslo.messaging 8.1.4) or consul+http:// "
        "(oslo.messaging 14 or later), for example consul+zmq://127.0.0.1:8500/matchmaker"
    )


def broadcaster() -> int | None:
    """The command ``consul-matchmaker-broadcaster``; 1, and one line, without the extra."""
    try:
        from .http.broadcaster import main
    except ImportError as error:
        print(f"consul-matchmaker-broadcaster: {error}", file=sys.stderr)
        return 1
    return main()


def proxy() -> int | None:
    """The command ``consul-matchmaker-zmq-proxy``; 1, and one line, where the extra is missing."""
    try:
        from .zmq.driver import run_proxy
    except ImportError as error:
        print(f"consul-matchmaker-zmq-proxy: {error}", file=sys.stderr)
        return 1
    run_proxy()
    return None
