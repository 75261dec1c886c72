"""The kv and DNS backends keep the contract on a real cluster, as memory does in the unit tests."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator

import pytest

from consul_matchmaker import Matchmaker
from consul_matchmaker.backends import Resolver
from consul_matchmaker.backends.dns.resolver import DnsSrv
from consul_matchmaker.backends.http.api import ConsulApi
from consul_matchmaker.backends.kv.store import Kv
from consul_matchmaker.backends.service.store import Services
from consul_matchmaker.backends.service_names import service_of
from consul_matchmaker.errors import ConfigurationError
from consul_matchmaker.model import Host, Lease, Registration
from consul_matchmaker.settings import Settings
from consul_matchmaker.testing.consul_probe import Node
from integration.cluster import tell
from tests.awaited import Awaited
from tests.contract import ONE, Backend, RegistrarContract, ResolverContract

pytestmark = pytest.mark.docker

NOBODY = "127.0.0.1:1"  # nothing listens there


class TestKvContract(RegistrarContract):
    @pytest.fixture
    def backend(self, agent: Node, prefix: str) -> Iterator[Backend]:
        settings = Settings(mode="kv", addresses=(Host.parse(agent.http),), prefix=prefix)
        backend = Kv(ConsulApi(settings), settings)
        yield backend
        backend.close()

    @pytest.fixture
    def topic(self) -> str:
        return "scheduler"  # the prefix is this test's own

    @pytest.fixture
    def away(self) -> Iterator[Resolver]:
        settings = Settings(mode="kv", addresses=(Host.parse(NOBODY),))
        backend = Kv(ConsulApi(settings), settings)
        yield backend
        backend.close()


class TestKvContractWithConsistentReads(TestKvContract):
    """The same, where every read is confirmed by a majority of the servers."""

    @pytest.fixture
    def backend(self, agent: Node, prefix: str) -> Iterator[Backend]:
        settings = Settings(
            mode="kv",
            addresses=(Host.parse(agent.http),),
            prefix=prefix,
            consistency="consistent",
        )
        backend = Kv(ConsulApi(settings), settings)
        yield backend
        backend.close()


class TestServiceContract(RegistrarContract):
    @pytest.fixture
    def backend(self, agent: Node) -> Iterator[Backend]:
        settings = Settings(mode="service", addresses=(Host.parse(agent.http),))
        backend = Services(ConsulApi(settings), settings)
        yield backend
        backend.close()

    @pytest.fixture
    def topic(self, request: pytest.FixtureRequest) -> str:
        """The services of a cluster are everybody's."""
        return f"t-{abs(hash(request.node.nodeid)) % 10**12}"

    @pytest.fixture
    def away(self) -> Iterator[Resolver]:
        settings = Settings(mode="service", addresses=(Host.parse(NOBODY),))
        backend = Services(ConsulApi(settings), settings)
        yield backend
        backend.close()

    @pytest.mark.parametrize("name", ["/b", "..x", "notifications.info", " ", "%2F", "a b"])
    def test_any_text_is_a_topic(
        self, backend: Backend, lease: Lease, topic: str, name: str
    ) -> None:
        """Of ASCII: what cannot be in a service's name is '-' there, and what is one service that
        way is told apart all the same."""
        strange = f"{topic}{name}"
        backend.publish(lease, Registration(strange, ONE, server=name))
        assert backend.lookup(strange, timeout_seconds=5).hosts == (ONE,)
        assert backend.lookup(strange, name, timeout_seconds=5).hosts == (ONE,)
        other = service_of(strange, "{topic}", {})
        assert backend.lookup(other, timeout_seconds=5).hosts == ()
        assert other in backend.topics()

    @pytest.mark.parametrize("text", ["10.0.0.1:5001", "host/topic/server/1f2e"])
    def test_an_opaque_host_is_kept_to_the_byte(
        self, backend: Backend, lease: Lease, topic: str, text: str
    ) -> None:
        """A service has an address and a port."""
        with pytest.raises(ConfigurationError):
            backend.publish(lease, Registration(topic, Host.opaque(text)))


class TestDnsSrvContract(ResolverContract):
    @pytest.fixture
    def resolver(self, agent: Node) -> Iterator[Resolver]:
        backend = DnsSrv(Settings(mode="catalog", addresses=(Host.parse(agent.dns),)))
        yield backend
        backend.close()

    @pytest.fixture
    def away(self) -> Iterator[Resolver]:
        backend = DnsSrv(
            Settings(mode="catalog", addresses=(Host.parse(NOBODY),), request_timeout_seconds=0.2)
        )
        yield backend
        backend.close()

    @pytest.fixture
    def topic(self, request: pytest.FixtureRequest) -> str:
        """One that leaves room for a character more in a DNS label."""
        return f"t-{abs(hash(request.node.nodeid)) % 10**12}"

    @pytest.fixture
    def set_hosts(self, agent: Node) -> Iterator[Callable[[str, list[Host]], None]]:
        registered: dict[str, set[Host]] = {}

        def set_hosts(topic: str, hosts: list[Host]) -> None:
            """As an operator does, by service definitions on an agent."""
            before = registered.setdefault(topic, set())
            for host in before - set(hosts):
                tell(
                    agent, "PUT", f"/v1/agent/service/deregister/{topic}-{host.port}-{host.address}"
                )
            for host in set(hosts) - before:
                definition = {
                    "ID": f"{topic}-{host.port}-{host.address}",
                    "Name": topic,
                    "Address": host.address,
                    "Port": host.port,
                }
                tell(agent, "PUT", "/v1/agent/service/register", json.dumps(definition))
            registered[topic] = set(hosts)

        yield set_hosts
        for topic in list(registered):
            set_hosts(topic, [])


class TestAioContractOverKv(TestKvContract):
    """What callers ask holds through `consul_matchmaker.aio` too; what registers is the backend."""

    @pytest.fixture
    def resolver(self, agent: Node, prefix: str) -> Iterator[Resolver]:
        with awaited("kv", agent.http, prefix=prefix) as resolver:
            yield resolver

    @pytest.fixture
    def away(self) -> Iterator[Resolver]:
        with awaited("kv", NOBODY) as resolver:
            yield resolver


class TestAioContractOverService(TestServiceContract):
    """The same in service mode."""

    @pytest.fixture
    def resolver(self, agent: Node) -> Iterator[Resolver]:
        with awaited("service", agent.http) as resolver:
            yield resolver

    @pytest.fixture
    def away(self) -> Iterator[Resolver]:
        with awaited("service", NOBODY) as resolver:
            yield resolver


class TestAioContractOverDns(TestDnsSrvContract):
    """The same in catalog mode."""

    @pytest.fixture
    def resolver(self, agent: Node) -> Iterator[Resolver]:
        # Answers that shrink are doubted for confirm_empty_seconds: not what is asked of here.
        with awaited("catalog", agent.dns, confirm_empty_seconds=0) as resolver:
            yield resolver

    @pytest.fixture
    def away(self) -> Iterator[Resolver]:
        with awaited("catalog", NOBODY, request_timeout_seconds=0.2) as resolver:
            yield resolver


@contextlib.contextmanager
def awaited(mode: str, address: str, **values: object) -> Iterator[Resolver]:
    """A whole matchmaker behind the asyncio facade, as a Resolver."""
    settings = {
        "mode": mode,
        "addresses": address,
        "ttl_seconds": 0.1,
        "empty_ttl_seconds": 0.1,
        **values,
    }
    resolver = Awaited(Matchmaker(Settings(**settings)))  # type: ignore[arg-type]
    yield resolver
    resolver.close()
