"""Hooks for gunicorn's configuration file: the application is registered by the master, once.

from consul_matchmaker.adapters.gunicorn import hooks

when_ready, on_exit = hooks("web", port=8080)
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ..errors import TimedOut
from ..matchmaker import SECONDS_TO_CLOSE, Matchmaker
from ..model import Host, Registration

logger = logging.getLogger(__name__)

QUICK_SECONDS = 1.0
"""How long a quick end (SIGINT, SIGQUIT, an error of the master) waits for Consul."""

Hook = Callable[[Any], None]
Key = tuple[str, str | Host | None, str | None, int | None]

_registered: dict[Key, tuple[Matchmaker, Registration]] = {}
"""What this process has registered, by topic, host, server and port.  Here and not in `hooks`, as
gunicorn executes its configuration file again at every HUP, and `when_ready` not."""

if hasattr(os, "register_at_fork"):  # a worker has nothing to withdraw
    os.register_at_fork(after_in_child=_registered.clear)


def hooks(
    topic: str,
    host: str | Host | None = None,
    server: str | None = None,
    *,
    port: int | None = None,
    tags: Sequence[str] = (),
    meta: Mapping[str, str] | None = None,
    weight: int = 1,
    check: str | None = None,
    url: str | None = None,
    drain_seconds: float = 0.0,
) -> tuple[Hook, Hook]:
    """``when_ready`` and ``on_exit``: the master registers *topic* as `Matchmaker.register` does
    when it listens.  When it ends, it withdraws first, serves for *drain_seconds* more, and only
    then stops listening; at SIGINT and SIGQUIT at once.

    Workers come and go meanwhile; a new master (USR2) registers itself beside the old one.  *url*:
    of Consul, as for `Matchmaker.from_url`; None: from the environment.
    """
    key = topic, host, server, port

    def when_ready(server_: Any) -> None:
        matchmaker = Matchmaker.from_env() if url is None else Matchmaker.from_url(url)
        registration = matchmaker.register(
            topic, host, server, port=port, tags=tags, meta=meta, weight=weight, check=check
        )
        _registered[key] = matchmaker, registration
        stop = server_.stop

        def withdraw_and_stop(graceful: bool = True) -> None:
            try:
                if graceful:
                    _withdraw(key, drain_seconds)
                else:
                    _withdraw(key, 0.0, QUICK_SECONDS)
            finally:
                stop(graceful)

        server_.stop = withdraw_and_stop  # it closes the listeners, long before on_exit

    def on_exit(server_: Any) -> None:
        _withdraw(key, drain_seconds)

    return when_ready, on_exit


def _withdraw(key: Key, drain_seconds: float, close_seconds: float = SECONDS_TO_CLOSE) -> None:
    """Take back what was registered by *key*; does nothing the second time."""
    if key not in _registered:
        return
    matchmaker, registration = _registered.pop(key)
    if drain_seconds:
        try:
            registration.drain(drain_seconds)
        except TimedOut as error:
            logger.warning("%s: %s", registration, error)
    matchmaker.close(close_seconds)
