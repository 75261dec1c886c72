"""The plugin for pytest: the fixtures `consul` and `matchmaker`; see docs/testing.md.

A module of its own, as pytest imports it at every start: one of the package would bring all of it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from consul_matchmaker.testing.fixtures import MemoryMatchmaker, RunningConsul

NOT_FOUND = "consul_not_found"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addini(
        NOT_FOUND,
        "whether tests with the fixture `consul` fail or skip where no Consul program is found",
        default="fail",
    )


@pytest.fixture(scope="session")
def consul(pytestconfig: pytest.Config) -> Iterator[RunningConsul]:
    """A real Consul, one server and one agent: `consul.url("service")`, `consul.http`."""
    from consul_matchmaker.testing.consul_binary import ConsulNotFound
    from consul_matchmaker.testing.fixtures import RunningConsul

    otherwise = pytestconfig.getini(NOT_FOUND)
    if otherwise not in ("fail", "skip"):
        raise pytest.UsageError(f"{NOT_FOUND} must be fail or skip, not {otherwise!r}")
    running = RunningConsul()
    try:
        running.start()
    except ConsulNotFound as error:
        if otherwise == "skip":
            pytest.skip(str(error))
        pytest.fail(f"{error}; or let these tests skip: {NOT_FOUND} = skip", pytrace=False)
    yield running
    running.close()


@pytest.fixture
def matchmaker() -> Iterator[MemoryMatchmaker]:
    """A Matchmaker without Consul: `matchmaker.declare("web", ["10.0.0.5:80"])` sets its hosts."""
    from consul_matchmaker.testing.fixtures import MemoryMatchmaker

    made = MemoryMatchmaker()
    yield made
    made.memory.is_available, made.memory.is_denied = True, False  # so that closing need not wait
    made.close()
