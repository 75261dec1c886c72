"""The fixture `consul` that users' tests have, with a real one."""

from __future__ import annotations

import re
import socket
from pathlib import Path

import pytest

from consul_matchmaker.testing.consul_binary import ConsulNotFound, find_consul
from tests.test_pytest_plugin import examples

pytest_plugins = ["pytester"]


@pytest.fixture(scope="session")
def program() -> Path:
    """Found before pytester replaces HOME, in which the cache is."""
    try:
        return find_consul()
    except ConsulNotFound as error:
        pytest.fail(str(error))


@pytest.fixture
def project(
    program: Path, pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> pytest.Pytester:
    monkeypatch.setenv("CONSUL_BIN", str(program))
    return pytester


def test_the_example_of_the_documents(project: pytest.Pytester) -> None:
    """As it is printed."""
    project.makepyfile(examples("consul"))
    project.runpytest_subprocess().assert_outcomes(passed=1)


def test_one_consul_a_session_which_ends_with_it(project: pytest.Pytester) -> None:
    """Every mode of the library can use it; afterwards nothing listens there, nor is anything left
    on disk."""
    project.makepyfile("""
        import pytest
        from consul_matchmaker import Matchmaker

        seen = set()

        @pytest.mark.parametrize("mode", ["kv", "service", "catalog"])
        def test_it(consul, mode):
            seen.add(consul)
            assert len(seen) == 1
            with Matchmaker.from_url(consul.url(mode)) as mm:
                mm.register("web", "10.0.0.5:80").wait_until_published(timeout_seconds=10)
                if mode == "catalog":  # consul is a service of every server
                    assert len(mm.wait_for_hosts("consul", timeout_seconds=10)) == 1
                else:
                    assert len(mm.wait_for_hosts("web", timeout_seconds=10)) == 1

        def test_places(consul):
            print("places", consul.http, consul.dns, consul.cluster.folder)
            consul.cluster.pause("agent1")  # and forgets to resume it
    """)
    result = project.runpytest_subprocess("-s")
    result.assert_outcomes(passed=4)
    places = re.search(r"places (\S+) (\S+) (\S+)", result.stdout.str())
    assert places is not None
    for place in places.groups()[:2]:
        address, _, port = place.rpartition(":")
        with socket.socket() as client:
            assert client.connect_ex((address, int(port))) != 0
    assert not Path(places[3]).exists()
