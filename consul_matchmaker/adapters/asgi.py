"""A lifespan for ASGI applications (FastAPI, Starlette): registered while the application serves.

    app = FastAPI(lifespan=lifespan("web", port=8080))

However many workers there are, the application is registered once.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any

from ..matchmaker import Matchmaker
from ..model import Host, Registration, ServiceOptions
from ..registrations.wanted import wanted_registration
from .one_of_siblings import OneOfSiblings

Lifespan = Callable[[Any], AbstractAsyncContextManager[Any]]


def lifespan(
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
    drain_seconds: float = 1.0,
    inner: Lifespan | None = None,
) -> Lifespan:
    """What an ASGI application takes as its lifespan: it registers *topic* as
    `Matchmaker.register` does, once *inner*, the application's own lifespan, has started up.

    At the end it stops being found, serves for *drain_seconds* more, and then lets *inner* shut
    down.  *url*: of Consul, as for `Matchmaker.from_url`; None: from the environment.  Of several
    workers one registers, and another takes over when that one ends.  Raises ConfigurationError at
    start-up for what cannot be registered.
    """

    @asynccontextmanager
    async def registered(app: Any) -> AsyncIterator[Any]:
        async with (inner or _nothing)(app) as state:
            matchmaker = Matchmaker.from_env() if url is None else Matchmaker.from_url(url)
            options = ServiceOptions.of(tags, meta, weight, check)
            wanted_registration(matchmaker.settings, topic, host, server, port, options)

            def register() -> Registration:
                return matchmaker.register(
                    topic, host, server, port=port, tags=tags, meta=meta, weight=weight, check=check
                )

            what = topic, host, server, port, matchmaker.settings.addresses
            siblings = OneOfSiblings(" ".join(map(str, what)), register)
            siblings.start()
            try:
                yield state
            finally:
                loop = asyncio.get_running_loop()
                await loop.run_in_executor(None, siblings.stop, drain_seconds)
                await loop.run_in_executor(None, matchmaker.close)

    return registered


@asynccontextmanager
async def _nothing(app: Any) -> AsyncIterator[None]:
    yield None
