"""Catalog mode: Consul's service definitions say who serves a topic, and operators write them."""

from __future__ import annotations

import dataclasses
import logging
import math

from ..errors import ConfigurationError
from ..model import Host, Registration, Standing
from .keeper import Listener

logger = logging.getLogger(__name__)


class Operators:
    """What catalog mode has in place of a keeper and of a registrar: nothing it is asked for has an
    effect, and the log says so once.  So a program runs unchanged in both modes.  Thread-safe."""

    def __init__(self) -> None:
        self._is_told = False

    # -- in place of a keeper

    def register(
        self,
        registration: Registration,
        *,
        on_change: Listener | None = None,
        beat_seconds: float | None = None,
    ) -> Registration:
        self._tell()
        return dataclasses.replace(registration, owner=self)

    def unregister_host(self, topic: str, host: Host) -> None:
        self._tell()

    def holds(self, topic: str, host: Host) -> bool:
        return False

    def renew_now(self) -> None:
        """There is no lease."""

    def status(self) -> None:
        """Nothing."""

    def close(self, timeout_seconds: float) -> bool:
        return True

    # -- in place of a registrar

    def topics(self) -> list[str]:
        raise ConfigurationError(
            "Consul DNS cannot list topics: use kv mode, or `consul catalog services`"
        )

    def expire(self, topic: str, host: Host) -> int:
        self._tell()
        return 0

    # -- as the owner of registrations

    def wait_until_published(self, registration: Registration, timeout_seconds: float) -> None:
        """There is nothing to wait for."""

    def wait_until_withdrawn(self, registration: Registration, timeout_seconds: float) -> None:
        """Nor here."""

    def unregister(self, registration: Registration) -> None:
        """There is nothing to take back."""

    def drain(self, registration: Registration, seconds: float) -> None:
        """Whoever deregisters in Consul has to wait there."""

    def beat(self, registration: Registration) -> None:
        """Consul's own checks say whether it lives."""

    def standing(self, registration: Registration) -> Standing:
        return "published"

    def margin_seconds(self, registration: Registration) -> float:
        return math.inf

    def _tell(self) -> None:
        if not self._is_told:
            self._is_told = True
            logger.info(
                "catalog mode: register, unregister and expire have no effect, Consul's service "
                "definitions say who serves a topic; consul+service:// registers there"
            )
