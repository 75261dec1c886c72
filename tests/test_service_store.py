"""What service mode says to an agent and reads from the catalog; against a Consul made of dicts.

That the real one behaves like this is shown in integration/test_service.py.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterable
from typing import Any

import pytest

from consul_matchmaker.backends.http.api import Answer
from consul_matchmaker.backends.service.store import Services
from consul_matchmaker.backends.watching import Route
from consul_matchmaker.errors import Denied, InvalidTopic, LeaseLost, TimedOut, Unavailable
from consul_matchmaker.model import Held, Host, Registration, ServiceOptions
from consul_matchmaker.settings import Settings
from consul_matchmaker.worker import seconds_since_boot

from .contract import ONE, TWO

AGENT, OTHER = Host("10.9.0.1", 8500), Host("10.9.0.2", 8500)
WEB = Registration("web", ONE)


class FakeConsul:
    """Plays ConsulApi: agents, and a catalog that is told of a change at once unless `is_deaf`."""

    def __init__(self) -> None:
        self.token_changes = 0
        self.agents: dict[Host, dict[str, dict[str, Any]]] = {AGENT: {}, OTHER: {}}
        self.nodes = {AGENT: "id-1", OTHER: "id-2"}
        self.away: set[Host] = set()
        self.catalog: dict[str, dict[str, Any]] = {}
        self.unknown_checks: set[str] = set()
        self.is_deaf = False
        self.leader = "10.0.0.2:8300"
        self.calls: list[tuple[str, str, dict[str, str]]] = []
        self.denies: tuple[str, ...] = ()
        self.says_filtered = False
        self.extra: list[dict[str, Any]] = []
        """What the catalog has beside, as entries of the health API."""
        self.indexes: dict[str, int] = {}
        """By datacenter."""
        self.breaks: tuple[str, ...] = ()
        """Paths that nobody answers."""
        self.says: dict[str, object] = {}
        """What is answered instead, by the beginning of the path."""
        self.reads_nodes = True
        """Whether the token may."""
        self.keeps_services = False
        """Whether it refuses to deregister."""
        self.deregistered: list[dict[str, str]] = []
        self.timeouts: list[object] = []
        self.closed = 0

    def call(
        self,
        method: str,
        path: str,
        params: dict[str, str] | None = None,
        body: bytes = b"",
        *,
        accept: tuple[int, ...] = (),
        at: Host | None = None,
        line: object = None,
        **how: object,
    ) -> Answer:
        params = dict(params or {})
        agent = at or next((each for each in self.agents if each not in self.away), AGENT)
        where = f"{method} {path} at {agent}"
        self.calls.append((method, path, params))
        self.timeouts.append(how.get("timeout_seconds"))
        if agent in self.away or (self.breaks and path.startswith(self.breaks)):
            raise Unavailable(f"{where}: refused")
        if path.startswith(self.denies) and self.denies:
            if 403 in accept:
                return Answer(403, b"", 0, False, where, agent)
            raise Denied(where)
        status, said = self._do(agent, path.removeprefix("/v1/"), params, body)
        for beginning, other in self.says.items():
            if path.startswith(beginning):
                said = other
        if status != 200 and status not in accept:
            raise Unavailable(f"{where}: status {status}")
        raw = json.dumps(said).encode()
        index = self.indexes.get(params.get("dc", ""), 7)
        return Answer(
            status, raw, index, self.says_filtered, where, agent, asked_at=time.monotonic()
        )

    def _do(
        self, agent: Host, path: str, params: dict[str, str], body: bytes
    ) -> tuple[int, object]:
        here = self.agents[agent]
        _, _, last = path.rpartition("/")
        if path == "agent/self":
            return 200, {"Config": {"NodeID": self.nodes[agent]}}
        if path == "agent/service/register":
            service = json.loads(body)
            here[service["ID"]] = service
            self.unknown_checks.discard(f"{service['ID']}:ttl")
        elif path == "agent/services":
            wanted = params.get("filter", "").rpartition("== ")[2].strip('"')
            return 200, {
                each: service for each, service in here.items() if wanted in ("", lease_of(service))
            }
        elif path.startswith("agent/service/deregister/"):
            if self.keeps_services or here.pop(last, None) is None:
                return 500, "Unknown service"
        elif path.startswith("agent/service/maintenance/"):
            here[last]["maintenance"] = params["enable"] == "true"
        elif path.startswith("agent/service/"):
            return (200, here[last]) if last in here else (404, None)
        elif path.startswith("agent/check/pass/"):
            known = last.removesuffix(":ttl") in here and last not in self.unknown_checks
            return (200, None) if known else (500, "does not have associated TTL")
        elif path.startswith("agent/health/service/name/"):
            return 404, None
        elif path == "status/leader":
            return 200, self.leader
        elif path == "catalog/services":
            return 200, {"consul": [], **{each["Name"]: [] for each in self._catalog().values()}}
        elif path == "catalog/nodes":
            return 200, [{"Node": "server1"}] if self.reads_nodes else []
        elif path == "catalog/deregister":
            self.deregistered.append(json.loads(body))
            service_id = self.deregistered[-1]["ServiceID"]
            self.extra = [each for each in self.extra if each["Service"]["ID"] != service_id]
        elif path.startswith("health/service/"):
            return 200, self._healthy(last, params)
        else:
            raise AssertionError(path)
        return 200, None

    def _of(self, agent: Host) -> Iterable[dict[str, Any]]:
        return self.agents[agent].values()

    def _catalog(self) -> dict[str, dict[str, Any]]:
        if not self.is_deaf:
            self.catalog = {k: v for here in self.agents.values() for k, v in here.items()}
        return self.catalog

    def _healthy(self, name: str, params: dict[str, str]) -> list[dict[str, Any]]:
        wanted = re.findall('== "(.*?)"', params.get("filter", ""))
        here = {id(each): self.nodes[agent] for agent in self.agents for each in self._of(agent)}
        found = [
            entry(each, node_id=here.get(id(each), "id-0"))
            for each in self._catalog().values()
            if not (each.get("maintenance") and "passing" in params)
        ] + self.extra
        return [
            each
            for each in found
            if each["Service"].get("Service", name) == name
            and set(wanted)
            <= {
                each["Node"]["Node"],
                each["Service"]["ID"],
                each["Service"]["Meta"].get("matchmaker_lease"),
            }
        ]

    def line(self) -> FakeConsul:
        return self

    def look_at_token(self) -> int:
        return self.token_changes

    def close(self) -> None:
        self.closed += 1

    def status(self) -> dict[str, object]:
        return {"agent": "it"}

    def wire(self) -> dict[str, dict[str, int]]:
        return {"http": {"queries": 1}}

    def interrupt(self) -> None: ...

    def made(self, kind: str) -> list[str]:
        """The paths of the calls of that kind."""
        return [path for _, path, _ in self.calls if kind in path]


def lease_of(service: dict[str, Any]) -> Any:
    return service["Meta"].get("matchmaker_lease")


def entry(
    service: dict[str, Any], *statuses: str, node: str = "n1", node_id: str = "id-0"
) -> dict[str, Any]:
    return {
        "Node": {"ID": node_id, "Node": node, "Address": "10.5.0.1", "Datacenter": "dc1"},
        "Service": {**service, "Service": service["Name"]},
        "Checks": [{"Status": status} for status in statuses or ("passing",)],
    }


def foreign(service_id: str, address: str = "", port: int = 80, **values: Any) -> dict[str, Any]:
    """A service that another program registered."""
    return {
        "ID": service_id,
        "Name": "web",
        "Address": address,
        "Port": port,
        "Meta": {},
        "Tags": [],
        **values,
    }


@pytest.fixture
def consul() -> FakeConsul:
    return FakeConsul()


def made(consul: FakeConsul, **values: Any) -> Services:
    settings = Settings(mode="service", addresses=(AGENT,), **{"ttl_seconds": 5, **values})
    return Services(consul, settings)  # type: ignore[arg-type]


@pytest.fixture
def services(consul: FakeConsul) -> Services:
    return made(consul)


def looked_up(services: Services, topic: str = "web") -> list[str]:
    return [str(host) for host in services.lookup(topic, timeout_seconds=5)]


# -- what is read ---------------------------------------------------------------------------------


def test_a_foreign_service_is_an_instance(consul: FakeConsul, services: Services) -> None:
    """Its node's name is its server; without an address of its own it has the node's."""
    consul.extra = [
        entry(
            foreign("a", Tags=["v1"], Meta={"k": "v"}, Weights={"Passing": 7, "Warning": 1}),
            node="node7",
        )
    ]
    (found,) = services.lookup("web", timeout_seconds=5).instances
    assert (str(found.host), found.server, found.weight) == ("10.5.0.1:80", "node7", 7)
    assert (found.tags, found.meta, found.datacenter) == (("v1",), {"k": "v"}, "dc1")


@pytest.mark.parametrize(
    ("service", "why"),
    [
        (foreign("a", port=0), "port"),
        (foreign("a", "not a host"), "host"),
    ],
)
def test_what_has_no_usable_host_is_left_out(
    consul: FakeConsul, services: Services, service: dict[str, Any], why: str
) -> None:
    """And said."""
    consul.extra = [entry(service), entry(foreign("b", "10.0.0.1"))]
    snapshot = services.lookup("web", timeout_seconds=5)
    assert [str(host) for host in snapshot] == ["10.0.0.1:80"]
    left_out = snapshot.details["left_out"]
    assert isinstance(left_out, dict) and why in left_out["a"]


def test_unhealthy_instances_in_an_answer_are_left_out(consul: FakeConsul) -> None:
    """As an agent of 1.19 before older servers gives them; warnings count where they may."""
    consul.extra = [
        entry(foreign("a", "10.0.0.1"), "passing", "critical"),
        entry(foreign("b", "10.0.0.2", Weights={"Passing": 9, "Warning": 2}), "warning"),
        entry(foreign("c", "10.0.0.3"), "passing"),
    ]
    assert looked_up(made(consul)) == ["10.0.0.3:80"]
    both = made(consul, accept_warning=True).lookup("web", timeout_seconds=5)
    assert [str(host) for host in both] == ["10.0.0.2:80", "10.0.0.3:80"]
    assert both.instances[0].weight == 2
    assert both.details["left_out"] == {"a": "not healthy"}


def test_an_instance_that_nobody_beats_for_is_told_apart_from_its_server(
    consul: FakeConsul, services: Services
) -> None:
    """One server of a topic, by the name that it registered or its node's."""
    services.publish(services.open(), Registration("web", ONE, "node7"))
    consul.extra = [entry(foreign("a", TWO.address, 5002))]
    for server, host in (("node7", ONE), ("n1", TWO)):
        assert services.lookup("web", server, timeout_seconds=5).hosts == (host,)
    assert services.lookup("web", "n2", timeout_seconds=5).hosts == ()


def test_distance_is_consuls_order(consul: FakeConsul) -> None:
    """Else the order is that of the hosts, so that equal answers look equal."""
    consul.extra = [entry(foreign("a", "10.0.0.2")), entry(foreign("b", "10.0.0.1"))]
    assert looked_up(made(consul)) == ["10.0.0.1:80", "10.0.0.2:80"]
    near = made(consul, near="_agent").lookup("web", timeout_seconds=5)
    assert [str(one.host) for one in near.instances] == ["10.0.0.2:80", "10.0.0.1:80"]


@pytest.mark.parametrize(
    ("values", "is_confirmed"),
    [
        ({}, True),
        ({"consistency": "consistent"}, True),
        ({"consistency": "stale"}, False),
        ({"consistency": "cached"}, False),
        ({"datacenters": "dc2"}, False),
    ],
)
def test_what_the_leader_confirms(
    consul: FakeConsul, values: dict[str, str], is_confirmed: bool
) -> None:
    """Neither what any server answers, nor what another datacenter does."""
    assert made(consul, **values).is_confirmed_by_leader is is_confirmed


def test_each_datacenter_has_its_time(consul: FakeConsul) -> None:
    """So that one which hangs leaves some to the next."""
    services = made(consul, datacenters="dc1,dc2", request_timeout_seconds=2)
    assert services.longest_lookup_seconds == 4
    services.lookup("web", timeout_seconds=3)
    allowed = [each for each in consul.timeouts if isinstance(each, float)]
    assert len(allowed) == len(consul.timeouts) > 2
    assert 1 < allowed[0] <= 1.5 and 2 < allowed[-1] <= 3


def test_its_topics_and_figures(consul: FakeConsul, services: Services) -> None:
    """Every service but Consul's own; the connections' figures are the agent's."""
    lease = services.open()
    for topic in ("web", "api"):
        services.publish(lease, Registration(topic, ONE))
    assert services.topics() == ["api", "web"]
    assert services.status() == {"agent": "it"}
    assert services.wire() == {"http": {"queries": 1}}
    services.close()
    assert consul.closed == 2, "the connections of lookups, and that of the beats"


def test_what_is_asked_for(consul: FakeConsul) -> None:
    """Tag, distance, consistency and datacenter are Consul's own parameters."""
    services = made(consul, tag="v1", near="_agent", consistency="cached", datacenters=("dc2",))
    services.lookup("web", timeout_seconds=5)
    _, path, params = consul.calls[0]
    assert path == "/v1/health/service/web"
    assert params == {"passing": "", "tag": "v1", "near": "_agent", "cached": "", "dc": "dc2"}


def test_the_first_datacenter_that_has_any(consul: FakeConsul) -> None:
    """An empty one spills over; one that fails does too, and an outage of all is an error."""
    healthy, fails = consul._healthy, False

    def by_datacenter(name: str, params: dict[str, str]) -> list[dict[str, Any]]:
        if params.get("dc") == "dc1":
            if fails:
                raise Unavailable("no path to datacenter")
            return []
        return [entry(foreign("a", "10.0.0.1"))]

    consul._healthy = by_datacenter  # type: ignore[method-assign]
    consul.indexes = {"dc1": 100, "dc2": 3}
    services = made(consul, datacenters=("dc1", "dc2"))
    found = services.lookup("web", timeout_seconds=5)
    assert [str(host) for host in found] == ["10.0.0.1:80"]
    assert found.version == 100, "each datacenter has an index of its own"
    fails = True
    found = services.lookup("web", timeout_seconds=5)
    assert ([str(host) for host in found], found.version) == (["10.0.0.1:80"], 0)
    consul._healthy = healthy  # type: ignore[method-assign]
    consul.away = {AGENT, OTHER}
    with pytest.raises(Unavailable):
        looked_up(services)


def test_what_acls_hide_is_denied_not_empty(consul: FakeConsul, services: Services) -> None:
    """By the agent's own view of one service, or by what newer Consul says."""
    consul.denies = ("/v1/agent/health/",)
    with pytest.raises(Denied, match='service "web" read'):
        looked_up(services)
    consul.denies, consul.says_filtered = (), True
    with pytest.raises(Denied, match='service "web" read'):
        looked_up(services)


def test_an_answer_without_sense_is_unavailable(consul: FakeConsul, services: Services) -> None:
    """Whatever was asked: it changes nothing."""
    lease = services.open()
    services.publish(lease, WEB)
    poll = services.watch("web")
    asked: dict[str, Callable[[], object]] = {
        "/v1/catalog/services": services.topics,
        "/v1/agent/services": lambda: services.renew(lease),
        "/v1/agent/self": services.open,
        "/v1/status/leader": lambda: services.confirmer().confirm("web", 3),
        "/v1/health/service/web": lambda: services.expire("web", ONE),
    }
    for path, ask in asked.items():
        consul.says = {path: 7}
        with pytest.raises(Unavailable):
            ask()
    consul.says, consul.indexes = {}, {"": 0}
    with pytest.raises(Unavailable):
        poll.poll(0, 25, AGENT)
    consul.indexes = {}
    assert poll.poll(0, 25, AGENT).index == 7
    assert poll.received_bytes > 100
    assert set(services.renew(lease)) == {WEB}


@pytest.mark.parametrize("said", [{}, None, [1], [{"Node": {}}], "text"])
def test_an_answer_of_somebody_else_is_unavailable(
    consul: FakeConsul, services: Services, said: Any
) -> None:
    """Never "no hosts"."""
    consul._healthy = lambda name, params: said  # type: ignore[method-assign]
    with pytest.raises(Unavailable):
        looked_up(services)


def test_topics_of_one_service_are_told_apart(consul: FakeConsul, services: Services) -> None:
    """``a.b`` and ``a-b`` are one service in Consul."""
    lease = services.open()
    services.publish(lease, Registration("a.b", ONE))
    assert looked_up(services, "a.b") == [str(ONE)]
    assert looked_up(services, "a-b") == []
    with pytest.raises(InvalidTopic):
        looked_up(made(consul, strict_names=True), "a.b")


def test_a_poll_waits_and_tells_of_a_change(consul: FakeConsul, services: Services) -> None:
    """With its index, and a fingerprint that is equal only for the same answer."""
    poll = services.watch("web")
    first = poll.poll(0, 25, AGENT)
    assert "index" not in consul.calls[0][2]
    again = poll.poll(first.index, 25, AGENT)
    assert consul.calls[-2][2]["index"] == "7" or consul.calls[-1][2].get("index") == "7"
    assert first.fingerprint == again.fingerprint == poll.fingerprint_of(b"[]")
    services.publish(services.open(), WEB)
    changed = poll.poll(7, 25, AGENT)
    assert changed.fingerprint != first.fingerprint
    ((topic, folder),) = changed.folders(["web"])
    assert changed.snapshot(topic, folder).hosts == (ONE,)


def test_a_confirmation_asks_the_leader_and_who_that_is(
    consul: FakeConsul, services: Services
) -> None:
    """What it reads takes no rights."""
    assert services.confirmer().confirm("web", 3) == Route(AGENT, consul.leader)
    consul.leader = ""
    with pytest.raises(Unavailable):
        services.confirmer().confirm("web", 3)


# -- what is written ------------------------------------------------------------------------------


def test_what_is_registered(consul: FakeConsul, services: Services) -> None:
    """Address, tags with the server among them, meta with what is ours, weight, both checks."""
    options = ServiceOptions.of(["blue"], {"k": "v"}, 5, "http://10.0.0.1:5001/health")
    lease = services.open()
    services.publish(lease, Registration("web", ONE, "Node1", service=options))
    (service,) = consul.agents[AGENT].values()
    assert (service["Name"], service["Address"], service["Port"]) == ("web", "10.0.0.1", 5001)
    assert service["Tags"] == ["blue", "Node1"]
    assert service["Meta"] == {
        "k": "v",
        "matchmaker_topic": "web",
        "matchmaker_server": "Node1",
        "matchmaker_lease": lease.id,
    }
    assert service["Weights"] == {"Passing": 5, "Warning": 1}
    beaten, probed = service["Checks"]
    assert (beaten["CheckID"], beaten["Status"]) == (f"{service['ID']}:ttl", "passing")
    assert probed["CheckID"] == f"{service['ID']}:probe"
    assert (beaten["TTL"], beaten["DeregisterCriticalServiceAfter"]) == ("3s", "1m")
    assert probed["HTTP"] == "http://10.0.0.1:5001/health"


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("https://a/x", {"HTTP": "https://a/x"}),
        ("tcp://10.0.0.1:80", {"TCP": "10.0.0.1:80"}),
        ("grpc://10.0.0.1:80/svc", {"GRPC": "10.0.0.1:80/svc"}),
    ],
)
def test_probes(consul: FakeConsul, services: Services, url: str, expected: dict[str, str]) -> None:
    """In Consul's own words."""
    options = ServiceOptions.of((), None, 1, url)
    services.publish(services.open(), Registration("web", ONE, service=options))
    ((_, probe),) = (each["Checks"] for each in consul.agents[AGENT].values())
    assert expected.items() <= probe.items()


@pytest.mark.parametrize("is_up", [True, False])
def test_a_probed_service_counts_as_down_until_the_first_probe_unless_it_is_up(
    consul: FakeConsul, services: Services, is_up: bool
) -> None:
    """A probe has no status of its own then, which Consul takes for critical; the beat is no
    probe.  Who waits for the first one is probed each second, others once in their TTL of 3 s."""
    options = ServiceOptions.of((), None, 1, "http://10.0.0.1:5001/health", is_up)
    services.publish(services.open(), Registration("web", ONE, service=options))
    ((beaten, probe),) = (each["Checks"] for each in consul.agents[AGENT].values())
    assert probe.get("Status") == ("passing" if is_up else None)
    assert probe["Interval"] == ("3s" if is_up else "1s")
    assert beaten["Status"] == "passing"


def test_without_a_probe_is_up_changes_nothing(consul: FakeConsul, services: Services) -> None:
    """A service that is beaten only is up from the start."""
    options = ServiceOptions.of((), None, 1, None, is_up=True)
    services.publish(services.open(), Registration("web", ONE, service=options))
    ((beaten,),) = (each["Checks"] for each in consul.agents[AGENT].values())
    assert beaten["Status"] == "passing"


def test_published_means_that_the_catalog_shows_it(
    consul: FakeConsul, services: Services, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An agent that has no leader says yes too, and nobody sees it."""
    monkeypatch.setattr("consul_matchmaker.backends.service.store.CATALOG_SECONDS", 0.0)
    lease = services.open()
    consul.is_deaf, consul.leader = True, ""
    with pytest.raises(Unavailable, match="no leader"):
        services.publish(lease, WEB)
    assert set(services.renew(lease)) == set(), "so it is to be published again"
    consul.is_deaf, consul.leader = False, "10.0.0.2:8300"
    services.publish(lease, WEB)
    assert set(services.renew(lease)) == {WEB}
    consul.is_deaf = True
    with pytest.raises(TimedOut):
        services.withdraw(lease, WEB)
    consul.is_deaf = False
    services.withdraw(lease, WEB)


def test_where_the_token_may_not_read_nodes_the_agents_word_counts(
    consul: FakeConsul, services: Services, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    """With a leader the catalog would show it: what is hidden cannot be waited for."""
    monkeypatch.setattr("consul_matchmaker.backends.service.store.CATALOG_SECONDS", 0.0)
    caplog.set_level("INFO")
    consul.is_deaf = True
    lease = services.open()
    with pytest.raises(TimedOut, match="has not told the servers"):
        services.publish(lease, WEB)
    consul.reads_nodes, consul.token_changes = False, 1
    services.publish(lease, WEB)
    services.publish(lease, Registration("web", TWO))
    assert len(set(services.renew(lease))) == 2
    assert caplog.text.count("an agent's word counts") == 1


def cause_of(services: Services, lease: Any) -> str:
    held = services.renew(lease)
    assert isinstance(held, Held) and not held
    return held.cause


def test_each_cause_of_loss_is_named(consul: FakeConsul, services: Services) -> None:
    """Deregistered, its check removed, the agent without its data, another agent."""
    lease = services.open()
    services.publish(lease, WEB)
    assert set(services.renew(lease)) == {WEB}
    consul.agents[AGENT].clear()
    assert cause_of(services, lease) == "deregistered by somebody"
    services.publish(lease, WEB)
    (service_id,) = consul.agents[AGENT]
    consul.unknown_checks.add(f"{service_id}:ttl")
    services._beats._due_at = 0
    services._beats.step()
    assert cause_of(services, lease) == "its check was removed"
    services.publish(lease, WEB)
    consul.away = {AGENT}
    with pytest.raises(Unavailable):
        services.renew(lease)
    consul.away = set()
    consul.agents[AGENT].clear()
    assert cause_of(services, lease) == "the agent was restarted without them"
    services.publish(lease, WEB)
    consul.agents[AGENT].clear()
    consul.breaks = ("/v1/agent/self",)
    assert cause_of(services, lease) == "deregistered by somebody", "as far as it can be told"
    consul.breaks = ()
    services.publish(lease, WEB)
    consul.agents[AGENT].clear()
    consul.nodes[AGENT] = "id-9"
    assert "another agent" in cause_of(services, lease)


def test_another_agent_takes_over_after_the_ttl(consul: FakeConsul) -> None:
    """Not before, and only where there is one."""
    now = 1000.0
    settings = Settings(mode="service", addresses=(AGENT, OTHER))
    services = Services(consul, settings, clock=lambda: now)  # type: ignore[arg-type]
    lease = services.open()
    services.publish(lease, WEB)
    now += 2
    assert set(services.renew(lease)) == {WEB}
    consul.away = {AGENT}
    now += 2
    with pytest.raises(Unavailable):
        services.renew(lease)
    now += 2
    with pytest.raises(LeaseLost) as caught:
        services.renew(lease)
    assert str(AGENT) in caught.value.why
    with pytest.raises(LeaseLost, match="open another"):
        services.publish(lease, WEB)
    lease = services.open()
    services.publish(lease, WEB)
    assert len(consul.agents[OTHER]) == 1
    assert len(services._beats._checks) == 1, "for what was lost nobody beats"


def test_beats_count_the_time_of_a_suspended_machine(consul: FakeConsul) -> None:
    """Unless a test has another clock for all of it."""
    assert made(consul)._beats.now() == pytest.approx(seconds_since_boot(), abs=5)
    settings = Settings(mode="service", addresses=(AGENT,))
    assert Services(consul, settings, clock=lambda: 7.0)._beats.now() == 7.0  # type: ignore[arg-type]


def test_other_options_that_are_refused_are_tried_again(
    consul: FakeConsul, services: Services
) -> None:
    """Although the agent has the service, as it was before."""
    lease = services.open()
    services.publish(lease, WEB)
    consul.denies = ("/v1/agent/service/register",)
    blue = Registration("web", ONE, service=ServiceOptions.of(["blue"], None, 1, None))
    with pytest.raises(Denied):
        services.publish(lease, blue)
    assert set(services.renew(lease)) == set()


def test_a_service_that_the_agent_does_not_give_up(consul: FakeConsul, services: Services) -> None:
    """It refuses, and has it still; a refusal of what it does not have is as good as done."""
    lease = services.open()
    services.publish(lease, WEB)
    consul.keeps_services = True
    with pytest.raises(Unavailable, match="500"):
        services.withdraw(lease, WEB)
    assert set(services._beats._checks) == set(), "it ends by itself"
    consul.agents[AGENT].clear()
    services.withdraw(lease, WEB)
    assert set(services.renew(lease)) == set()


def test_release_ends_all_of_a_lease(
    consul: FakeConsul, services: Services, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once the catalog is without it; what is released already costs nothing."""
    monkeypatch.setattr("consul_matchmaker.backends.service.store.CATALOG_SECONDS", 0.0)
    lease, other = services.open(), services.open()
    services.publish(lease, WEB)
    services.publish(other, Registration("web", TWO))
    consul.is_deaf = True
    with pytest.raises(TimedOut):
        services.release(lease)
    consul.is_deaf = False
    services.release(lease)
    assert looked_up(services) == [str(TWO)]
    with pytest.raises(LeaseLost):
        services.renew(lease)
    consul.calls.clear()
    services.release(lease)
    assert consul.calls == []


def test_a_token_is_tried_by_a_service_that_stays_nowhere(
    consul: FakeConsul, services: Services
) -> None:
    """Also when it is refused."""
    services.prove_writable("web")
    assert len(consul.made("/agent/service/register")) == 1
    assert consul.agents[AGENT] == {}
    consul.denies = ("/v1/agent/service/register",)
    with pytest.raises(Denied):
        services.prove_writable("web")
    assert services._leases == {}


def test_what_arrives_late_is_removed(consul: FakeConsul, services: Services) -> None:
    """A request that was given up may still register: nobody would beat for that."""
    lease = services.open()
    services.publish(lease, WEB)
    consul.agents[AGENT]["late"] = foreign("late", Meta={"matchmaker_lease": lease.id})
    assert set(services.renew(lease)) == {WEB}
    assert "late" not in consul.agents[AGENT]


def test_a_paused_service_is_in_maintenance_also_when_it_is_registered_again(
    consul: FakeConsul, services: Services
) -> None:
    """Draining survives an agent that lost it."""
    lease = services.open()
    services.publish(lease, WEB)
    assert services.pause(WEB)
    assert looked_up(services) == []
    consul.agents[AGENT].clear()
    services.publish(lease, WEB)
    assert looked_up(services) == []
    ((beaten,),) = (each["Checks"] for each in consul.agents[AGENT].values())
    assert beaten["Status"] == "critical", "in no moment it is healthy"
    services.withdraw(lease, WEB)
    assert consul.agents[AGENT] == {}
    assert not services.pause(WEB)
    assert set(services.renew(lease)) == set()
    services.publish(lease, WEB)
    assert looked_up(services) == [str(ONE)], "registered anew, it serves"


def test_a_drain_goes_on_at_another_agent(consul: FakeConsul) -> None:
    """Where it is registered once the first has not answered for the TTL."""
    now = 1000.0
    settings = Settings(mode="service", addresses=(AGENT, OTHER))
    services = Services(consul, settings, clock=lambda: now)  # type: ignore[arg-type]
    lease = services.open()
    services.publish(lease, WEB)
    services.pause(WEB)
    consul.away, now = {AGENT}, now + 4
    with pytest.raises(LeaseLost):
        services.renew(lease)
    services.publish(services.open(), WEB)
    ((service,),) = [list(consul.agents[OTHER].values())]
    assert service["maintenance"]
    assert len(services._beats._checks) == 1, "beaten for, as the agent would remove it else"


def test_maintenance_ends_when_it_is_registered_again(
    consul: FakeConsul, services: Services
) -> None:
    """Also when the request for it came late."""
    lease = services.open()
    services.publish(lease, WEB)
    assert not services.resume(WEB)
    services.pause(WEB)
    assert services.resume(WEB)
    services.publish(lease, WEB)
    assert looked_up(services) == [str(ONE)]
    do = consul._do

    def late(agent: Host, path: str, params: dict[str, str], body: bytes) -> tuple[int, object]:
        if "maintenance" in path and params["enable"] == "true":
            services.resume(WEB)
        return do(agent, path, params, body)

    consul._do = late  # type: ignore[method-assign]
    services.pause(WEB)
    assert looked_up(services) == [str(ONE)]


def test_what_is_paused_while_it_is_registered_is_in_maintenance(
    consul: FakeConsul, services: Services
) -> None:
    """Registering ends a maintenance."""
    lease = services.open()
    services.publish(lease, WEB)
    do = consul._do

    def beside(agent: Host, path: str, params: dict[str, str], body: bytes) -> tuple[int, object]:
        if path == "agent/service/register":
            consul._do = do  # type: ignore[method-assign]
            services.pause(WEB)
        return do(agent, path, params, body)

    consul._do = beside  # type: ignore[method-assign]
    services.publish(lease, WEB)
    assert looked_up(services) == []


def test_what_was_never_shown_is_withdrawn_too(
    consul: FakeConsul, services: Services, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The agent may have it, and tell the servers once there is a leader."""
    monkeypatch.setattr("consul_matchmaker.backends.service.store.CATALOG_SECONDS", 0.0)
    lease, ghost = services.open(), Registration("web", TWO)
    services.publish(lease, WEB)
    consul.is_deaf, consul.leader = True, ""
    with pytest.raises(Unavailable):
        services.publish(lease, ghost)
    held = services.renew(lease)
    assert isinstance(held, Held)
    assert (set(held), held.unchecked) == ({WEB}, {ghost})
    consul.is_deaf, consul.keeps_services = False, True
    with pytest.raises(Unavailable):
        services.withdraw(lease, WEB)
    held = services.renew(lease)
    assert isinstance(held, Held)
    assert (set(held), held.unchecked) == (set(), {WEB, ghost})


def test_a_token_for_some_services_keeps_those(consul: FakeConsul, services: Services) -> None:
    """Neither beats nor the end of the others wait for what is refused."""
    lease, api = services.open(), Registration("api", ONE)
    for registration in (api, WEB):
        services.publish(lease, registration)
    consul.denies = ("/v1/agent/check/pass/api", "/v1/agent/service/deregister/api")
    services._beats._due_at = 0
    consul.calls.clear()
    services._beats.step()
    assert len(consul.made("/check/pass/")) == 2
    held = services.renew(lease)
    assert isinstance(held, Held)
    assert (set(held), held.cause) == ({WEB}, "the token may not beat for it")
    with pytest.raises(Denied):
        services.release(lease)
    assert [each["Name"] for each in consul.agents[AGENT].values()] == ["api"]


def test_expire_leaves_the_service_of_that_id_on_another_node(
    consul: FakeConsul, services: Services
) -> None:
    """Operators give one id to a service on all nodes."""
    consul.agents[AGENT]["legacy"] = foreign("legacy", "10.9.0.1")
    there = foreign("legacy", "10.9.0.2")
    consul.extra = [entry(there, node="n2", node_id="id-2")]
    assert services.expire("web", Host("10.9.0.2", 80)) == 1
    assert "legacy" in consul.agents[AGENT]
    assert consul.extra == []
    consul.extra = [entry(there, node="n2", node_id="id-2")]
    consul.denies = ("/v1/agent/self",)
    assert services.expire("web", Host("10.9.0.1", 80)) == 1
    assert consul.agents[AGENT] == {}


def test_a_new_token_registers_again_before_it_deregisters(
    consul: FakeConsul, services: Services
) -> None:
    """An agent tells the servers of the end with the token that registered: a revoked one would
    leave the service in the catalog."""
    lease = services.open()
    services.publish(lease, WEB)
    consul.token_changes += 1
    consul.calls.clear()
    services.release(lease)
    kinds = [path.split("/")[4] for path in consul.made("/agent/service/")]
    assert kinds == ["register", "deregister"]
    assert consul.agents[AGENT] == {}


def test_expire_reaches_other_agents_by_the_catalog(
    consul: FakeConsul, services: Services, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And leaves other hosts, and other topics of the same service."""
    lease = services.open()
    services.publish(lease, WEB)
    services.publish(lease, Registration("web", TWO))
    consul.extra = [
        entry(foreign("there", ONE.address, 5001)),
        entry(foreign("other", ONE.address, 5001, Meta={"matchmaker_topic": "WEB"})),
    ]
    assert services.expire("web", ONE) == 2
    assert [each["Service"]["ID"] for each in consul.extra] == ["other"]
    assert consul.deregistered == [{"Node": "n1", "ServiceID": "there", "Datacenter": "dc1"}]
    assert looked_up(services) == [str(TWO)]
    monkeypatch.setattr("consul_matchmaker.backends.service.store.CATALOG_SECONDS", 0.0)
    consul.is_deaf = True
    with pytest.raises(TimedOut):
        services.expire("web", TWO)
