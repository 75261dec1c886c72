"""What doctor says of agents that are not as they should be, and that it ends."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

import pytest

from consul_matchmaker import cli
from consul_matchmaker.cli.doctor import Finding, findings
from consul_matchmaker.settings import Settings

from .dns_servers import Answer, Asked, DnsServer, FakeConsul, FakeInstance, reply_to
from .http_servers import LOST, Server, agent_of_keys, reply

pytestmark = pytest.mark.system

SERVERS = [FakeInstance("127.0.0.1", 8300, node=f"server{number}") for number in (1, 2, 3)]
NOBODY_LISTENS = "127.0.0.1:1"  # tcpmux: refused at once on every machine without it


def of_dns(server: DnsServer, **values: object) -> list[Finding]:
    values.setdefault("request_timeout_seconds", 30)
    settings = Settings(mode="catalog", addresses=server.address, **values)  # type: ignore[arg-type]
    return list(findings(settings))


def of_http(*addresses: str, **values: object) -> list[Finding]:
    return list(findings(Settings(mode="kv", addresses=addresses, **values)))  # type: ignore[arg-type]


def levels(found: list[Finding]) -> list[str]:
    return [finding.level for finding in found]


def saying(rcode: str) -> Answer:
    return lambda asked: [reply_to(asked, rcode=rcode)]


def hiding(asked: Asked) -> Iterable[bytes]:
    """As an agent of which ACLs hide every service."""
    if asked.name.startswith("7f000001.addr."):
        return [reply_to(asked, ["A 127.0.0.1"])]
    return [reply_to(asked, rcode="NXDOMAIN")]


# --- catalog -------------------------------------------------------------------------------------


def test_a_good_agents_dns() -> None:
    """Both transports answer, and Consul's own servers are listed."""
    with DnsServer(FakeConsul({("consul", ""): SERVERS})) as server:
        found = of_dns(server)
    assert levels(found) == ["ok", "ok", "ok"]
    assert found[2].text.startswith("lists 3 Consul servers; DNS cannot tell whether")


def test_a_datacenter_is_examined_by_itself() -> None:
    """The one that Consul does not know is warned of by name."""
    consul = FakeConsul({("consul", "dc1"): SERVERS})

    def answer(asked: Asked) -> Iterable[bytes]:
        return hiding(asked) if ".dc9." in asked.name or asked.kind == "A" else consul(asked)

    with DnsServer(answer) as server:
        found = of_dns(server, datacenters=("dc1", "dc9"))
    assert levels(found)[2:] == ["ok", "warn"]
    assert "dc9" in found[3].what
    assert "datacenters" in found[3].text


def test_one_transport_is_missing() -> None:
    """Lookups work, and what is lost is said."""
    consul = FakeConsul({("consul", ""): SERVERS})
    with DnsServer(consul, tcp=False) as server:
        found = of_dns(server)
    assert levels(found) == ["ok", "warn", "ok"]
    assert "incomplete" in found[1].text
    with DnsServer(consul, udp=False) as server:
        found = of_dns(server)
    assert levels(found) == ["warn", "ok", "ok"]
    assert "firewall" in found[0].text


def test_nobody_answers() -> None:
    """One line that names both transports."""
    (found,) = findings(Settings(mode="catalog", addresses=(NOBODY_LISTENS,)))
    assert found.level == "fail"
    assert NOBODY_LISTENS in found.what
    assert "refused" in found.text


def test_somebody_answers_nothing() -> None:
    """Who is silent is given up after one timeout by each transport."""
    with DnsServer(lambda asked: ()) as server:
        (found,) = of_dns(server, request_timeout_seconds=0.1)
    assert found.level == "fail"


@pytest.mark.parametrize(
    ("answers", "level", "words"),
    [
        (saying("REFUSED"), "fail", "not Consul for this domain"),
        (saying("NXDOMAIN"), "fail", "not Consul for this domain"),
        (saying("NOTIMP"), "fail", "rcode 4"),
        (saying("SERVFAIL"), "fail", "no leader"),
        (hiding, "warn", "service read"),
    ],
)
def test_what_an_answer_without_servers_means(answers: Answer, level: str, words: str) -> None:
    """A wrong domain, another DNS server, no leader, and ACLs that hide: each has its word."""
    with DnsServer(answers) as server:
        found = of_dns(server)
    assert levels(found) == ["ok", "ok", level]
    assert words in found[2].text


# --- kv ------------------------------------------------------------------------------------------

LEADER = reply(body=b'"127.0.0.1:8300"')


def test_every_agent_is_examined() -> None:
    """The one that cannot be reached fails; the rest is asked of the others."""
    answers: dict[str, bytes] = {
        "/v1/status/leader": LEADER,
        "/v1/agent/self": reply(body=b'{"Config": {"Version": "1.8.7"}}'),
        "/v1/session/create": reply(body=b'{"ID": "1f2e"}'),
    }

    def behave(request: Any) -> bytes:
        if request.path.startswith("/v1/kv/") and request.method == "GET":
            return reply(404, b"")
        return answers.get(request.path, reply())

    with Server(behave) as server:
        found = of_http(NOBODY_LISTENS, server.address)
        assert levels(found) == ["fail", "ok", "ok", "ok", "ok", "ok"]
        assert "Consul 1.8.7" in found[1].text
        written = [request for request in server.requests if request.method == "PUT"]
    assert [request.path for request in written] == [
        "/v1/session/create",
        "/v1/session/destroy/1f2e",
        "/v1/kv/matchmaker/_",
    ]
    assert int(written[2].target.partition("cas=")[2]) > 2**60  # so it changes nothing


@pytest.mark.parametrize(
    ("leader", "words"),
    [
        (reply(body=b'""'), "no leader"),
        (reply(500, b"No cluster leader"), "status 500"),
        (reply(body=b"<html>"), "HTTP port of a Consul agent"),
        (reply(body=b"{}"), "HTTP port of a Consul agent"),
    ],
)
def test_an_agent_that_cannot_help(leader: bytes, words: str) -> None:
    """One failure, which says why, and nothing is tried that could not succeed."""
    paths = {"/v1/status/leader": leader}
    with Server(lambda request: paths.get(request.path, reply())) as server:
        (found,) = of_http(server.address)
        assert all(request.method == "GET" for request in server.requests)
    assert found.level == "fail"
    assert words in found.text


def test_a_token_that_may_nothing() -> None:
    """Each thing it may not do is a failure of its own, and the token is not shown."""
    token = "5e4bc9f2-secret"

    def behave(request: Any) -> bytes:
        if request.path == "/v1/status/leader":
            return LEADER
        return reply(403, f"no rights for {token}".encode())

    with Server(behave) as server:
        found = of_http(server.address, token=token)
    assert levels(found) == ["ok", "fail", "fail", "fail"]
    assert "may not read its version" in found[0].text
    assert 'key_prefix "matchmaker/" read' in found[1].text
    assert 'session_prefix "" write' in found[2].text
    assert 'key_prefix "matchmaker/" write' in found[3].text
    assert token not in repr(found)


def of_keys(*keys: str) -> list[Finding]:
    """What is found of *keys*, none of which a session holds."""
    answer = agent_of_keys(*keys)

    def behave(request: Any) -> bytes:
        is_leader = request.path == "/v1/status/leader"
        return LEADER if is_leader else answer(request)

    with Server(behave) as server:
        return [each for each in of_http(server.address) if each.what.startswith("keys")]


def test_keys_that_nobody_removes() -> None:
    """Counted, one of them named, with the command that lists and removes them."""
    (found,) = of_keys(LOST)
    assert found.level == "warn"
    assert repr(LOST) in found.text
    assert "sweep" in found.text


@pytest.mark.finding("B1")
def test_keys_that_are_not_ours_are_named_and_their_removal_is_not_recommended() -> None:
    """They may be another program's data, and the prefix a mistyped one."""
    (found,) = of_keys("matchmaker/x", "matchmaker/y/z")
    assert found.level == "warn"
    assert "'matchmaker/x'" in found.text
    assert "sweep" not in found.text and "--remove" not in found.text
    assert [each.level for each in of_keys(LOST, "matchmaker/x")] == ["warn", "warn"]


# --- service -------------------------------------------------------------------------------------


def of_service(
    agent: str, *servers: str, denies: str = "", names: str = "consul web", nodes: str = "server1"
) -> list[Finding]:
    """What is found of an agent of that version, beside servers of these; with a token that may
    read these services and nodes."""
    services: dict[str, Any] = {}

    def behave(request: Any) -> bytes:
        path = request.path
        if denies and path.startswith(denies):
            return reply(403, b"Permission denied")
        if path == "/v1/status/leader":
            return LEADER
        if path == "/v1/agent/self":
            return reply(body=json.dumps({"Config": {"Version": agent, "NodeID": "1"}}).encode())
        if path == "/v1/agent/members":
            tags = [{"role": "consul", "build": f"{each}:abc"} for each in servers]
            return reply(body=json.dumps([{"Tags": each} for each in tags]).encode())
        if path == "/v1/catalog/services":
            return reply(body=json.dumps({name: [] for name in names.split()}).encode())
        if path == "/v1/catalog/nodes":
            return reply(body=json.dumps([{"Node": node} for node in nodes.split()]).encode())
        if path == "/v1/agent/service/register":
            service = json.loads(request.body)
            services[service["ID"]] = service
        if path.startswith("/v1/agent/service/deregister/"):
            services.pop(path.rpartition("/")[2])
        if path == "/v1/agent/services":
            return reply(body=json.dumps(services).encode())
        if path.startswith("/v1/health/service/"):
            return reply(body=json.dumps(list(services)).encode(), headers=["X-Consul-Index: 5"])
        return reply()

    with Server(behave) as server:
        found = list(findings(Settings(mode="service", addresses=server.address)))  # type: ignore[arg-type]
    assert services == {}, "nothing is left"
    return found


def test_service_mode_reads_and_registers() -> None:
    """One service, which is removed."""
    found = of_service("1.8.7", "1.8.7")
    assert levels(found) == ["ok"] * 4
    assert "1 services" in found[2].text
    assert "registered and removed" in found[3].text


@pytest.mark.parametrize("rights", [{"names": ""}, {"nodes": ""}])
def test_a_token_that_may_not_read(rights: dict[str, str]) -> None:
    """Any service, or any node: that is not "none are there"; every program needs both."""
    found = of_service("1.8.7", "1.8.7", **rights)
    assert levels(found) == ["ok", "ok", "fail", "ok"]
    assert 'service_prefix "" read and node_prefix "" read' in found[2].text
    assert "does not need" not in found[2].text


def test_a_token_that_may_not_register() -> None:
    """The failure says which rights it needs."""
    found = of_service("1.8.7", "1.8.7", denies="/v1/agent/service/")
    assert levels(found) == ["ok", "ok", "ok", "fail"]
    assert 'service "consul-matchmaker-doctor" write' in found[3].text


@pytest.mark.parametrize(
    ("agent", "servers", "level"),
    [
        ("1.21.4", ["1.18.2", "1.21.4"], "warn"),
        ("1.18.2", ["1.18.2"], "ok"),
        ("1.18.2", ["1.21.4"], "ok"),
        ("1.21.4", ["1.19.0"], "ok"),
    ],
)
def test_an_agent_that_is_newer_than_its_servers(
    agent: str, servers: list[str], level: str
) -> None:
    """From 1.19 on it leaves the filtering of unhealthy instances to servers, which older ones do
    not do."""
    found = of_service(agent, *servers)
    assert found[1].level == level
    if level == "warn":
        assert "upgrade the servers first" in found[1].text and "1.18.2" in found[1].text


# --- the command ---------------------------------------------------------------------------------


def test_the_command_prints_and_exits(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A line a finding; 0 when none failed, 4 when one did, 2 for wrong usage; the same as JSON."""
    monkeypatch.delenv("CONSUL_MATCHMAKER_URL", raising=False)
    with DnsServer(FakeConsul({("consul", ""): SERVERS})) as server:
        url = f"consul+catalog://{server.address}"
        assert cli.main(["doctor", "--url", url]) == 0
        printed = capsys.readouterr()
        assert printed.out.splitlines()[0] == f"ok    {server.address} UDP: answers"
        assert printed.err == ""
        assert cli.main(["doctor", "--url", url, "-o", "json"]) == 0
        first = json.loads(capsys.readouterr().out)["findings"][0]
        assert first == {"level": "ok", "what": f"{server.address} UDP", "text": "answers"}
    assert cli.main(["doctor", "--url", f"consul+kv://{NOBODY_LISTENS}"]) == 4
    assert capsys.readouterr().out.startswith("fail  ")
    assert cli.main(["doctor", "--url", "consul+catalog://?tag=a%20b"]) == 2
    assert capsys.readouterr().out == ""
