"""What a process serves: one HTTP server, and the registrations of its listeners in Consul."""

from __future__ import annotations

import collections
import logging
import threading
import time
from typing import Any

from ....errors import MatchmakerError
from ....fork import ProcessLock
from ....matchmaker import Matchmaker
from ....model import Host, Registration
from .listeners import HttpListener, Listeners
from .names import POOL, Place
from .options import Options
from .protocol import HEALTH_PATH
from .secret import Secret
from .server import HttpServer

logger = logging.getLogger(__name__)

TAG = "oslo-rpc"
OF_THE_SERVER = (
    *("listen_address", "port_range", "tls_cert", "tls_key", "tls_ca", "rpc_token"),
    *("rpc_token_file", "max_body_bytes", "max_connections"),
)
"""The options by which HTTP servers differ: transports that agree on these share one."""


class _Shared:
    """The HTTP server of a process, with the number of those that use it."""

    def __init__(self, options: Options, secret: Secret, address: str) -> None:
        self.listeners = Listeners()
        self.server = HttpServer(options, secret, address, self.listeners.take)
        self.users = 0
        self.registered: collections.Counter[tuple[int, Registration]] = collections.Counter()
        """How many listeners each registration is for, by the id of its matchmaker."""


_shared: dict[tuple[Any, ...], _Shared] = {}
_lock = ProcessLock(_shared)  # a forked child listens on ports of its own


class Serving:
    """One listener's share of the process's server.  Thread-safe.

    Raises OSError when no port is to be had, and ConfigurationError.
    """

    def __init__(
        self, matchmaker: Matchmaker, options: Options, secret: Secret, address: str
    ) -> None:
        self._matchmaker, self._options = matchmaker, options
        self._key = tuple(getattr(options, name) for name in OF_THE_SERVER), address
        self._address = address
        self._registrations: list[Registration] = []
        self._lock = threading.Lock()
        self._never = threading.Event()
        self._is_closed = False
        with _lock:
            shared = _shared.get(self._key)
            if shared is None:
                shared = _Shared(options, secret, address)
                shared.server.start()
                _shared[self._key] = shared
            shared.users += 1
        self._process = shared

    @property
    def host(self) -> Host:
        return Host(self._address, self._process.server.port)

    def publish(self, listener: HttpListener) -> None:
        """Bring *listener* requests, and register it; return when Consul shows it, or after
        ``wait_timeout``, when it becomes known later by itself."""
        self._process.listeners.add(listener)
        deadline = time.monotonic() + self._options.wait_timeout
        made = [self._register(place, listener) for place in listener.places]
        with self._lock:
            self._registrations += made
        with _lock:
            self._process.registered.update((id(self._matchmaker), each) for each in made)
        try:
            for registration in made:
                left = max(0.0, deadline - time.monotonic())
                registration.wait_until_published(timeout_seconds=left)
        except MatchmakerError as error:
            logger.warning("%s; it serves, and is found once Consul shows it", error)

    def withdraw(self, listener: HttpListener) -> None:
        """Take the registrations back, and bring requests for ``drain_seconds`` more."""
        with self._lock:
            mine, self._registrations = self._registrations, []
        ended = [each for each in mine if self._is_last(each)]
        deadline = time.monotonic() + self._options.drain_seconds
        for registration in ended:
            registration.unregister()
        try:
            for registration in ended:
                left = max(0.0, deadline - time.monotonic())
                registration.wait_until_withdrawn(timeout_seconds=left)
        except MatchmakerError as error:
            logger.warning("%s; clients that still find it go to others", error)
        if ended:
            self._never.wait(max(0.0, deadline - time.monotonic()))
        self._process.listeners.remove(listener)

    def close(self) -> None:
        """End the server when nobody uses it any more; idempotent."""
        with self._lock:
            if self._is_closed:
                return
            self._is_closed = True
        with _lock:
            if _shared.get(self._key) is not self._process:  # of the parent, before a fork
                return
            self._process.users -= 1
            if self._process.users:
                return
            del _shared[self._key]
        self._process.server.stop()

    def _is_last(self, registration: Registration) -> bool:
        """Whether no other listener of this process needs it any more."""
        counts, key = self._process.registered, (id(self._matchmaker), registration)
        with _lock:
            counts[key] -= 1
            if counts[key] > 0:
                return False
            del counts[key]
            return True

    def _register(self, place: Place, listener: HttpListener) -> Registration:
        # A service without a server goes by the name of its node in Consul, which may be any.
        server = place.server or f"{POOL}{listener.pool or ''}"
        mode = self._matchmaker.settings.mode
        if mode != "service":
            return self._matchmaker.register(place.service, self.host, server)
        meta = {"exchange": place.exchange, "topic": place.topic}
        if listener.version is not None:
            meta["version"] = listener.version
        check = self._probe()
        return self._matchmaker.register(
            place.service, self.host, server, tags=[TAG], meta=meta, check=check, is_up=True
        )

    def _probe(self) -> str | None:
        if not self._options.health_check or self._options.tls_ca is not None:
            return None
        scheme = "https" if self._options.tls_cert else "http"
        return f"{scheme}://{self.host}{HEALTH_PATH}"
