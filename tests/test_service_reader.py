"""What service mode reads, and with which rights; against a Consul made of dicts.

That the real one behaves like this is shown in integration/test_service.py.
"""

from __future__ import annotations

import logging
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import pytest

from consul_matchmaker.backends import service_names
from consul_matchmaker.backends.http.api import Answer
from consul_matchmaker.backends.service_names import namer
from consul_matchmaker.errors import Denied, TimedOut, Unavailable
from consul_matchmaker.settings import Settings

from .test_service_store import FakeConsul, entry, foreign, made

NODES = "/v1/catalog/nodes"
READ_ALL = 'service "web" read and node_prefix "" read'


class GuardedConsul(FakeConsul):
    """One whose token may read these nodes and services; each datacenter may be old or hang."""

    def __init__(self) -> None:
        super().__init__()
        self.nodes_read = {"leader", "other"}
        self.services_read: set[str] | None = None
        self.ages: dict[str, float] = {}
        self.hangs: set[str] = set()

    def call(
        self, method: str, path: str, params: dict[str, str] | None = None, *more: Any, **how: Any
    ) -> Answer:
        answer = super().call(method, path, params, *more, **how)
        datacenter = (params or {}).get("dc", "")
        if datacenter in self.hangs:
            time.sleep(how["timeout_seconds"])
            raise TimedOut(f"{answer.where}: no answer")
        return replace(answer, age_seconds=self.ages.get(datacenter, 0.0))

    def _do(self, agent: Any, path: str, params: dict[str, str], body: bytes) -> tuple[int, object]:
        if path == "catalog/nodes":
            is_leaders = params.get("filter") == 'Address == "10.0.0.2"'
            nodes = self.nodes_read & ({"leader"} if is_leaders else {"leader", "other"})
            return 200, [{"Node": node} for node in sorted(nodes)]
        status, said = super()._do(agent, path, params, body)
        if path == "catalog/services" and self.services_read is not None:
            assert isinstance(said, dict)
            return status, {name: [] for name in said if name in self.services_read}
        return status, said


@pytest.fixture
def consul() -> GuardedConsul:
    return GuardedConsul()


def looked_up(reader: Any, timeout_seconds: float = 5) -> list[str]:
    return [str(host) for host in reader.lookup("web", timeout_seconds=timeout_seconds)]


# -- rights ---------------------------------------------------------------------------------------


def test_a_token_without_nodes_is_denied(consul: GuardedConsul) -> None:
    """Before 1.11 Consul hides every instance then, and does not say so."""
    services = made(consul)
    consul.nodes_read.clear()
    for _ in range(2):
        with pytest.raises(Denied, match=READ_ALL):
            looked_up(services)
    consul.nodes_read = {"leader"}
    assert looked_up(services) == []


def test_that_nodes_may_be_read_is_asked_once_for_a_token(consul: GuardedConsul) -> None:
    """Of the leader's node alone, so that it is little; an empty topic costs nothing more then."""
    services = made(consul)
    for _ in range(3):
        assert looked_up(services) == []
    assert consul.made(NODES) == [NODES]
    consul.token_changes += 1
    consul.nodes_read.clear()
    with pytest.raises(Denied, match=READ_ALL):
        looked_up(services)


def test_a_topic_with_hosts_needs_no_proof(consul: GuardedConsul) -> None:
    """Its instances are one."""
    consul.extra = [entry(foreign("a", "10.0.0.1"))]
    assert looked_up(made(consul)) == ["10.0.0.1:80"]
    assert len(consul.calls) == 1


def test_a_token_for_other_nodes_than_the_leaders(consul: GuardedConsul) -> None:
    """It may read some, and that is all that can be told; as where the leader's node is unknown."""
    consul.nodes_read = {"other"}
    assert looked_up(made(consul)) == []
    assert consul.made(NODES) == [NODES] * 2


def test_what_cannot_be_proven_is_unavailable(consul: GuardedConsul) -> None:
    """An answer without sense proves neither."""
    for path in ("/v1/status/leader", NODES):
        consul.says = {path: {"a": 7}}
        with pytest.raises(Unavailable, match="not Consul's"):
            looked_up(made(consul))
    consul.says, consul.breaks = {}, (NODES,)
    with pytest.raises(Unavailable, match="refused"):
        looked_up(made(consul))


def test_its_services_are_those_that_the_token_may_read(consul: GuardedConsul) -> None:
    """Newer Consul says then that others are hidden, as they are from most tokens; none at all is
    no answer, as there is Consul's own."""
    consul.agents[next(iter(consul.agents))]["a"] = foreign("a")
    services = made(consul)
    assert services.topics() == ["web"]
    consul.services_read, consul.says_filtered = {"web"}, True
    assert services.topics() == ["web"]
    consul.services_read = {"consul"}
    assert services.topics() == []
    for consul.says_filtered in (True, False):
        consul.services_read = set()
        with pytest.raises(Denied, match='service_prefix "" read'):
            services.topics()


# -- answers --------------------------------------------------------------------------------------


def test_an_instance_of_another_topic_is_left_out(consul: GuardedConsul) -> None:
    """And said, as two topics may be the same service."""
    theirs = foreign("a", "10.0.0.1", Meta={"matchmaker_topic": "w.e.b"})
    consul.extra = [entry(theirs), entry(foreign("b", "10.0.0.2"))]
    found = made(consul).lookup("web", timeout_seconds=5)
    assert [str(host) for host in found] == ["10.0.0.2:80"]
    left_out = found.details["left_out"]
    assert isinstance(left_out, dict) and "'w.e.b'" in left_out["a"]


@pytest.mark.parametrize(
    ("service", "node", "zone"),
    [
        ({}, {}, None),
        ({"Meta": {"zone": "a"}}, {"Meta": {"zone": "b"}}, "a"),
        ({"Locality": {"Region": "r", "Zone": "a"}}, {"Meta": {"zone": "b"}}, "a"),
        ({"Locality": None}, {"Meta": {"zone": "b"}, "Locality": {"Zone": "c"}}, "b"),
        ({}, {"Meta": None, "Locality": {"Zone": "c"}}, "c"),
        ({}, {"Meta": {}, "Locality": {"Zone": ""}}, None),
    ],
)
def test_where_an_instance_says_its_zone(
    consul: GuardedConsul, service: dict[str, Any], node: dict[str, Any], zone: str | None
) -> None:
    """Its service's word counts before its node's; localities are Consul's own since 1.17."""
    told = entry(foreign("a", "10.0.0.1", **service))
    told["Node"].update(node)
    consul.extra = [told]
    (instance,) = made(consul).lookup("web", timeout_seconds=5).instances
    assert instance.zone == zone
    assert instance.meta == ({"zone": zone} if zone else {})


def test_a_datacenter_that_hangs_leaves_time_for_the_others(consul: GuardedConsul) -> None:
    """Each has its share of what is left."""
    consul.extra, consul.hangs = [entry(foreign("a", "10.0.0.1"))], {"dc1"}
    services = made(consul, datacenters="dc1,dc2,dc3")
    assert looked_up(services, timeout_seconds=0.6) == ["10.0.0.1:80"]
    first, second = consul.timeouts
    assert isinstance(first, float) and 0.1 < first < 0.201
    assert isinstance(second, float) and 0 < second < 0.201, "half of the 0.4 s that are left"


def test_the_oldest_answer_counts(consul: GuardedConsul) -> None:
    """That one datacenter has none is part of it, and as old as the agent's cache says."""
    healthy = consul._healthy

    def only_in_dc2(name: str, params: dict[str, str]) -> list[dict[str, Any]]:
        return healthy(name, params) if params["dc"] == "dc2" else []

    consul._healthy = only_in_dc2  # type: ignore[method-assign]
    consul.extra = [entry(foreign("a", "10.0.0.1"))]
    services = made(consul, datacenters="dc1,dc2", consistency="cached")
    for ages, oldest in (({"dc1": 40, "dc2": 3}, 40), ({"dc1": 3, "dc2": 40}, 40), ({}, 0)):
        consul.ages = dict(ages)
        found = services.lookup("web", timeout_seconds=5)
        assert found.age_seconds == pytest.approx(oldest, abs=1)


# -- names ----------------------------------------------------------------------------------------


def test_what_a_topic_is_translated_to_is_said_once(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a process, whoever asks, and however many at once; and little is remembered for it."""
    monkeypatch.setattr(service_names, "_said", {})
    settings = Settings(mode="service")
    with caplog.at_level(logging.WARNING), ThreadPoolExecutor(8) as threads:
        for number in range(50):
            ask = namer(settings)
            topics = [f"notifications.info{number}"] * 8
            assert set(threads.map(ask, topics)) == {f"notifications-info{number}"}
            namer(settings)(topics[0])
    assert len(caplog.records) == 50
    monkeypatch.setattr(service_names, "MOST_SAID", 50)
    namer(settings)("another.one")
    assert len(service_names._said) == 1
