"""Who promised to beat for a registration, and who has fallen silent.  Pure."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ..errors import ConfigurationError
from ..model import Registration


@dataclass(slots=True)
class _Promise:
    every_seconds: float
    beaten_at: float
    is_silent: bool = False


class Beats:
    """The promises of an application to call `Registration.beat`, and how it keeps them."""

    def __init__(self) -> None:
        self._promises: dict[Registration, _Promise] = {}
        self.next_silence_at = math.inf
        """When somebody may have fallen silent, at the earliest."""

    def promise(self, registration: Registration, every_seconds: float, now: float) -> None:
        """From *now* on it is beaten for at least so often, or silent."""
        self._promises[registration] = _Promise(every_seconds, now)
        self.next_silence_at = min(self.next_silence_at, now + every_seconds)

    def drop(self, registration: Registration) -> None:
        """Nothing is promised for it any more."""
        self._promises.pop(registration, None)

    def clear(self) -> None:
        """Nothing is promised any more."""
        self._promises.clear()

    def beat(self, registration: Registration, now: float) -> bool:
        """Note a beat; return whether it ends a silence.

        Raises ConfigurationError when none was promised."""
        promise = self._promises.get(registration)
        if promise is None:
            raise ConfigurationError(f"{registration}: register it with beat_seconds")
        promise.beaten_at = now
        was_silent, promise.is_silent = promise.is_silent, False
        if was_silent:
            self.next_silence_at = min(self.next_silence_at, now + promise.every_seconds)
        return was_silent

    def is_silent(self, registration: Registration) -> bool:
        promise = self._promises.get(registration)
        return promise is not None and promise.is_silent

    @property
    def silent(self) -> list[Registration]:
        return [each for each, promise in self._promises.items() if promise.is_silent]

    def newly_silent(self, now: float) -> list[tuple[Registration, float]]:
        """Who has fallen silent since the last call, each with the seconds since its last beat."""
        found: list[tuple[Registration, float]] = []
        if now < self.next_silence_at:
            return found
        self.next_silence_at = math.inf
        for registration, promise in self._promises.items():
            silent_at = promise.beaten_at + promise.every_seconds
            if promise.is_silent:
                continue
            if silent_at <= now:
                promise.is_silent = True
                found.append((registration, now - promise.beaten_at))
            else:
                self.next_silence_at = min(self.next_silence_at, silent_at)
        return found
