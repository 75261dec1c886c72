"""`consul-matchmaker doctor` against a real Consul: well, without a leader, away, and guarded."""

import json
import uuid

import pytest

from consul_matchmaker.testing.consul_probe import Node, request
from integration.access_rules import new_token
from integration.cluster import Cluster, ask, tell
from integration.command_line import cli
from integration.waiting import until

NOBODY = "127.0.0.1:1"  # nothing listens there


def examined(url: str, **environment: str) -> tuple[int, dict[str, tuple[str, str]]]:
    """The exit code, and level and text of each finding."""
    code, out, err = cli("doctor", "--url", url, "-o", "json", **environment)
    assert "Traceback" not in err
    found = json.loads(out)["findings"]
    return code, {each["what"]: (each["level"], each["text"]) for each in found}


def test_a_good_cluster(agent: Node, prefix: str) -> None:
    """Nothing to complain of in either mode, and nothing of it stays in Consul."""
    before = set(ask(agent, "/v1/agent/services"))  # a killed owner's stays for a minute or more
    code, found = examined(f"consul+kv://{agent.http}/{prefix}?liveness=check")
    assert (code, {level for level, _ in found.values()}) == (0, {"ok"})
    assert len(found) == 5
    assert ask(agent, f"/v1/kv/{prefix}/?keys") is None
    assert set(ask(agent, "/v1/agent/services")) <= before
    code, found = examined(f"consul+catalog://{agent.dns}")
    assert (code, {level for level, _ in found.values()}) == (0, {"ok"})
    assert "lists 3 Consul servers" in found[f"{agent.dns} domain consul"][1]
    code, out, _ = cli("doctor", "--url", f"consul+catalog://{agent.dns}")
    assert (code, out.count("\nok  ")) == (0, 2)


def test_keys_that_are_not_ours(agent: Node, prefix: str) -> None:
    """A warning is no failure."""
    tell(agent, "PUT", f"/v1/kv/{prefix}/strange", "x")
    code, found = examined(f"consul+kv://{agent.http}/{prefix}")
    level, text = found[f"keys under {prefix}/ that are not ours"]
    assert (code, level) == (0, "warn")
    assert f"{prefix}/strange" in text
    assert "sweep" not in text


def test_a_wrong_domain_and_a_wrong_datacenter(agent: Node) -> None:
    """The domain is refused; an unknown datacenter looks like hidden services, and is named."""
    code, found = examined(f"consul+catalog://{agent.dns}?domain=nosuch")
    assert (code, found[f"{agent.dns} domain nosuch"][0]) == (4, "fail")
    code, found = examined(f"consul+catalog://{agent.dns}?datacenters=dc1,dc9")
    assert found[f"{agent.dns} domain consul datacenter dc1"][0] == "ok"
    assert (code, found[f"{agent.dns} domain consul datacenter dc9"][0]) == (0, "warn")


def test_an_agent_whose_http_is_closed(dns_only_agent: Node) -> None:
    """Enough for catalog mode, and not for kv mode."""
    assert examined(f"consul+catalog://{dns_only_agent.dns}")[0] == 0
    address = dns_only_agent.dns.rpartition(":")[0]
    code, found = examined(f"consul+kv://{address}:1")
    assert (code, [level for level, _ in found.values()]) == (4, ["fail"])


def test_agents_that_are_not_there(agent: Node, prefix: str) -> None:
    """Each is named; the one that answers is examined all the same."""
    code, found = examined(f"consul+kv://{NOBODY},{agent.http}/{prefix}")
    assert (code, found[f"{NOBODY} HTTP"][0], found[f"{agent.http} HTTP"][0]) == (4, "fail", "ok")
    assert found["a session"][0] == "ok"
    code, found = examined(f"consul+catalog://{NOBODY}")
    assert (code, len(found)) == (4, 1)


@pytest.mark.finding("A6")
def test_no_leader(cluster: Cluster, agent: Node, prefix: str) -> None:
    """Two of three servers killed: kv mode can do nothing, and doctor says what is missing; over
    DNS all looks well, and doctor says that DNS cannot tell."""
    for name in ("server1", "server2"):
        cluster.kill(name)
    left = cluster.nodes["server3"]
    # For some seconds it still names the leader it knew.
    until(lambda: request(left, "GET", "/v1/status/leader") == (200, '""'), 60, "no leader")
    code, found = examined(f"consul+kv://{agent.http}/{prefix}?request_timeout_seconds=10")
    level, text = found[f"{agent.http} HTTP"]
    assert (code, level) == (4, "fail")
    assert "leader" in text or "500" in text
    level, text = examined(f"consul+catalog://{agent.dns}")[1][f"{agent.dns} domain consul"]
    assert level == "ok"
    assert "DNS cannot tell whether they have a leader" in text


def test_access_rules(guarded: Node) -> None:
    """No token, a wrong one, one that may only read, and one that may all; none is shown."""
    url = f"consul+kv://{guarded.http}/guarded"
    wrong = str(uuid.uuid4())
    for token in ("", wrong):
        code, found = examined(url, CONSUL_HTTP_TOKEN=token)
        assert code == 4
        assert found["reading guarded/"][0] == found["a session"][0] == "fail"
        assert found["writing guarded/"][0] == "fail"
        assert wrong not in repr(found)
    reading = new_token(guarded, 'key_prefix "guarded/" { policy = "read" }')[1]
    code, found = examined(url, CONSUL_HTTP_TOKEN=reading)
    assert (code, found["reading guarded/"][0]) == (4, "ok")
    assert 'session_prefix "" write' in found["a session"][1]
    assert 'key_prefix "guarded/" write' in found["writing guarded/"][1]
    assert reading not in repr(found)
    rules = 'key_prefix "guarded/" { policy = "write" } session_prefix "" { policy = "write" }'
    assert examined(url, CONSUL_HTTP_TOKEN=new_token(guarded, rules)[1])[0] == 0


def test_access_rules_over_dns(guarded: Node) -> None:
    """What ACLs hide looks as if it were not there: doctor tells it from a wrong domain."""
    code, found = examined(f"consul+catalog://{guarded.dns}")
    level, text = found[f"{guarded.dns} domain consul"]
    assert (code, level) == (0, "warn")
    assert "service read" in text
