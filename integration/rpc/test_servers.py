"""Servers: how much they take at a time, and how they stop."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from integration.rpc.conftest import Served
from integration.rpc.server_process import ServerProcess

Make = Callable[..., Any]
Serve = Callable[..., Served]
Process = Callable[..., ServerProcess]


@pytest.fixture
def threads() -> Iterator[ThreadPoolExecutor]:
    """For calls that wait while the test does something else."""
    with ThreadPoolExecutor(16) as pool:
        yield pool


# -- stopping --------------------------------------------------------------------------------------


def test_a_server_stops_at_once_although_clients_keep_connections(
    serve: Serve, client: Make, topic: str
) -> None:
    """It closes those that nothing is asked over, and waits for none of them."""
    served = serve(topic, "one")
    caller = client(topic)
    assert caller.call({}, "who") == "one"
    began = time.monotonic()
    served.stop()
    assert time.monotonic() - began < 4, "an exchange that is under way may have 5 s"
