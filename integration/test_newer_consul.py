"""The Consul of today: contract, healing and lookups through what makes an agent a newer one."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator

import pytest

from consul_matchmaker import Matchmaker, errors
from consul_matchmaker.backends.dns.resolver import DnsSrv
from consul_matchmaker.backends.http.api import ConsulApi
from consul_matchmaker.backends.kv.store import Kv
from consul_matchmaker.backends.service.store import Services
from consul_matchmaker.model import Host
from consul_matchmaker.settings import Settings
from consul_matchmaker.testing.consul_probe import Node
from integration import test_contract
from integration.cluster import Cluster, ask, tell
from integration.newer_consul import (
    CUT_SECONDS,
    CachingResolver,
    Change,
    DnsRelay,
    StrictProxy,
    in_domain,
    with_port_0,
    without_datacenter,
)
from integration.registrations import hosts
from integration.test_service import (  # noqa: F401
    join,
    owner,
    test_an_agent_that_is_late_at_boot,
    test_deregistered_by_somebody,
    test_draining_is_maintenance_first,
    test_its_agent_comes_back,
    test_its_check_removed,
)
from integration.waiting import until
from tests.contract import Backend

ONE, TWO = "10.0.0.1:8080", "10.0.0.2:8080"
BACK = 2.0  # a renewal interval of service mode, and a busy machine


@pytest.fixture
def proxy(agent: Node) -> Iterator[StrictProxy]:
    with StrictProxy(agent.http) as proxy:
        yield proxy


# -- HTTP ------------------------------------------------------------------------------------------


class TestKvBehindAStrictProxy(test_contract.TestKvContract):
    """No request is refused for its key or its size."""

    @pytest.fixture
    def backend(self, proxy: StrictProxy, prefix: str) -> Iterator[Backend]:
        settings = Settings(mode="kv", addresses=(Host.parse(proxy.address),), prefix=prefix)
        backend = Kv(ConsulApi(settings), settings)
        yield backend
        backend.close()


class TestServiceBehindAStrictProxy(test_contract.TestServiceContract):
    @pytest.fixture
    def backend(self, proxy: StrictProxy) -> Iterator[Backend]:
        settings = Settings(mode="service", addresses=(Host.parse(proxy.address),))
        backend = Services(ConsulApi(settings), settings)
        yield backend
        backend.close()


@pytest.mark.parametrize("mode", ["kv", "service"])
def test_watches_end_before_an_answer_is_cut(
    proxy: StrictProxy, prefix: str, topic: str, mode: str
) -> None:
    """A query that waits for nothing ends by itself; none is cut, and the watch is never lost."""
    url = f"consul+{mode}://{proxy.address}" + (f"/{prefix}" if mode == "kv" else "")
    with Matchmaker.from_url(url) as reader:
        reader.hosts(topic)
        began = time.monotonic()

        def status() -> dict[str, object]:
            found = reader.status()["watcher"]
            assert isinstance(found, dict)
            return found

        until(lambda: status()["answers"] == 2, CUT_SECONDS, "a query has waited its time")
        assert 20 <= time.monotonic() - began < CUT_SECONDS
        assert status()["failures"] == 0
    assert proxy.longest_seconds < CUT_SECONDS


@pytest.mark.parametrize("status", [429, 503])
def test_request_limits(proxy: StrictProxy, agent: Node, topic: str, status: int) -> None:
    """What is over the limit is asked of another agent; alone, the last answer is served."""
    url = f"consul+service://{proxy.address},{agent.http}?watch=off&ttl_seconds=0.2"
    with Matchmaker.from_url(url) as reader, Matchmaker.from_url(url) as writer:
        writer.register(topic, ONE).wait_until_published(timeout_seconds=5)
        assert hosts(reader, topic) == [ONE]
        proxy.refuse = lambda method, path: status if "/health/" in path else None
        time.sleep(0.5)
        assert hosts(reader, topic) == [ONE]
        assert reader.status()["cache"]["questions"]["failed"] == 0  # type: ignore[index]
    with (
        Matchmaker.from_url(f"consul+service://{proxy.address}") as late,
        pytest.raises(errors.Unavailable, match=str(status)),
    ):
        late.hosts(topic)


@pytest.fixture
def url(proxy: StrictProxy) -> str:
    """Of the healing tests, which are those of test_service.py."""
    return f"consul+service://{proxy.address}?empty_ttl_seconds=1"


def test_a_registration_that_is_refused_for_a_while(
    join: Callable[..., Matchmaker],  # noqa: F811
    proxy: StrictProxy,
    agent: Node,
    topic: str,
) -> None:
    """It is back with the first request that is not."""
    join().register(topic, ONE).wait_until_published(timeout_seconds=5)
    proxy.refuse = lambda method, path: 503 if "register" in path else None
    (service,) = ask(agent, f"/v1/health/service/{topic}")
    tell(agent, "PUT", f"/v1/agent/service/deregister/{service['Service']['ID']}")
    time.sleep(1.5)
    assert ask(agent, f"/v1/health/service/{topic}") == []
    proxy.refuse = lambda method, path: None
    until(lambda: len(ask(agent, f"/v1/health/service/{topic}?passing")) == 1, BACK, "back")


def test_connections_that_were_idle_for_too_long(agent: Node, topic: str) -> None:
    """The agent closed them: the next request goes over another one, and nothing fails."""
    idle_seconds = 0.5
    with (
        StrictProxy(agent.http, idle_seconds=idle_seconds) as proxy,
        Matchmaker.from_url(f"consul+service://{proxy.address}?watch=off") as reader,
    ):
        for number in range(3):
            assert hosts(reader, f"{topic}-{number}") == []
            time.sleep(2 * idle_seconds)
        assert reader.status()["cache"]["questions"]["failed"] == 0  # type: ignore[index]


# -- DNS -------------------------------------------------------------------------------------------


@pytest.fixture(params=[without_datacenter, in_domain("example"), with_port_0])
def changed(request: pytest.FixtureRequest, agent: Node) -> Iterator[DnsRelay]:
    change: Change = request.param
    with DnsRelay(agent.dns, change) as relay:
        yield relay


class TestDnsOfNewerConsul(test_contract.TestDnsSrvContract):
    @pytest.fixture
    def resolver(self, changed: DnsRelay) -> Iterator[DnsSrv]:
        backend = DnsSrv(Settings(mode="catalog", addresses=(Host.parse(changed.address),)))
        yield backend
        backend.close()


@pytest.fixture
def declared(agent: Node, topic: str) -> Callable[[bool], None]:
    """Has an operator declare a service of the topic, or take it back."""

    def declare(is_there: bool) -> None:
        if is_there:
            service = {"ID": topic, "Name": topic, "Address": "10.0.0.1", "Port": 8080}
            tell(agent, "PUT", "/v1/agent/service/register", json.dumps(service))
            until(lambda: ask(agent, f"/v1/health/service/{topic}"), 2, "there")
        else:
            tell(agent, "PUT", f"/v1/agent/service/deregister/{topic}")
            until(lambda: not ask(agent, f"/v1/health/service/{topic}"), 2, "gone")

    return declare


def test_copies_of_a_denial_confirm_nothing(
    agent: Node, topic: str, declared: Callable[[bool], None]
) -> None:
    """A resolver that keeps denials repeats the one moment in which Consul denied the service for
    longer than `confirm_empty_seconds`: the host stays."""
    kept_seconds = 4
    with CachingResolver(agent.dns, kept_seconds) as resolver:
        url = f"consul+catalog://{resolver.address}?ttl_seconds=0.2&empty_ttl_seconds=0.2"
        declared(True)
        with Matchmaker.from_url(f"consul+catalog://{agent.dns}?empty_ttl_seconds=0") as direct:
            until(lambda: hosts(direct, topic) == [ONE], 2, "there, also by DNS")
        with Matchmaker.from_url(f"{url}&confirm_empty_seconds=2") as reader:
            assert hosts(reader, topic) == [ONE]
            declared(False)
            asked = resolver.asked
            until(lambda: hosts(reader, topic) == [ONE] and resolver.asked > asked, 6, "denied")
            declared(True)
            seen: set[tuple[str, ...]] = set()

            def look() -> bool:
                seen.add(tuple(hosts(reader, topic)))
                return resolver.asked > asked + 1

            until(look, kept_seconds + 2, "the resolver asked again")
            until(lambda: reader.hosts(topic).confirmed, 2, "and all is well")
            assert seen == {(ONE,)}
            declared(False)
            until(lambda: hosts(reader, topic) == [], 3 * kept_seconds, "truly gone")


def test_an_unhealthy_instance_in_an_answer_is_left_out(
    cluster: Cluster, agent: Node, topic: str
) -> None:
    """A client agent of 1.19 before older servers does not filter: by HTTP we do it ourselves."""
    checks = {"TTL": "10s", "Status": "critical"}
    service = {"ID": topic, "Name": topic, "Address": "10.0.0.1", "Port": 8080, "Check": checks}
    tell(agent, "PUT", "/v1/agent/service/register", json.dumps(service))
    until(lambda: ask(agent, f"/v1/health/service/{topic}"), 2, "there")
    with StrictProxy(agent.http) as proxy:
        proxy.rewrite = lambda path: path.replace("passing=&", "").replace("?passing=", "?")
        with Matchmaker.from_url(f"consul+service://{proxy.address}") as reader:
            assert hosts(reader, topic) == []
            told = reader.explain(topic)
            assert "not healthy" in str(told)
    tell(agent, "PUT", f"/v1/agent/service/deregister/{topic}")
