"""The asyncio facade, called from code that is not: for the contract that all resolvers keep."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

from consul_matchmaker import Matchmaker, Snapshot, aio

from .doubles import DEADLINE_SECONDS

T = TypeVar("T")


def run(work: Coroutine[Any, Any, T]) -> T:
    async def bounded() -> T:
        return await asyncio.wait_for(work, DEADLINE_SECONDS)

    return asyncio.run(bounded())


class Awaited:
    """The facade as a Resolver, so that the contract can be asked of it."""

    finds_servers = True
    longest_lookup_seconds = DEADLINE_SECONDS

    def __init__(self, mm: Matchmaker) -> None:
        self._mm = mm

    def lookup(self, topic: str, server: str | None = None, *, timeout_seconds: float) -> Snapshot:
        return run(aio.Matchmaker(self._mm).hosts(topic, server))

    def status(self) -> dict[str, object]:
        return self._mm.status()

    def wire(self) -> dict[str, dict[str, int]]:
        return {}

    def close(self) -> None:
        run(aio.Matchmaker(self._mm).close())
