"""Calls, casts, fanouts and notifications of a real oslo.messaging, its hosts found in Consul."""

import collections
import configparser
import json
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from consul_matchmaker.testing.consul_probe import Node
from integration.cluster import Cluster, free_ports, keys
from integration.oslo.calls import CRASH_SECONDS, LOOK_SECONDS, SOON_SECONDS, answered, answers
from integration.oslo.rpc_process import RpcProcess
from integration.waiting import until

Start = Callable[..., RpcProcess]


SCHEMES = {
    "option": "zmq://{agent}/{prefix}?rpc_zmq_matchmaker=consul&mode=kv",
    "name": "zmq+consul://{agent}/{prefix}?mode=kv",
    "driver": "consul+zmq://{agent}/{prefix}?mode=kv",
}


@pytest.mark.parametrize("scheme", SCHEMES)
def test_call_cast_fanout_direct_notify(
    scheme: str, executor: str, agent: Node, prefix: str, topic: str, start: Start
) -> None:
    """Each reaches whom it should, by every way to name this matchmaker."""
    url = SCHEMES[scheme].format(agent=agent.http, prefix=prefix)
    servers = [start(url, executor) for _ in range(2)]
    for number, server in enumerate(servers):
        server.ask("serve", topic=topic, server=f"server{number}")
        server.ask("listen", topic=f"{topic}-events", name=f"listener{number}")
    client = start(url, executor)
    timeout = 2 if executor == "threading" else SOON_SECONDS  # there it is how long a loss takes
    calls = client.ask("calls", topic=topic, count=10, timeout=timeout)
    assert answered(calls, executor) == {"server0", "server1"}
    direct = client.ask("calls", topic=topic, server="server1", count=5, timeout=timeout)
    assert answered(direct, executor) == {"server1"}
    client.ask("cast", topic=topic, text="one")
    client.ask("cast", topic=topic, text="direct", server="server0")
    client.ask("cast", topic=topic, text="all", fanout=True)
    client.ask("notify", topic=f"{topic}-events", text="told")

    def got(text: str) -> list[str]:
        return sorted(
            item for server in servers for item in server.ask("got") if item.endswith(f":{text}")
        )

    until(lambda: len(got("one")) == 1, SOON_SECONDS, "a cast arrives once")
    until(lambda: got("direct") == ["server0:direct"], SOON_SECONDS, "a direct cast at its server")
    everywhere = ["server0:all", "server1:all"]
    until(lambda: got("all") == everywhere, SOON_SECONDS, "a fanout everywhere")
    told = [f"listener{n}:told" for n in range(2)]
    until(lambda: got("told") == told, SOON_SECONDS, "a notification at every listener")


SETUPS: dict[str, dict[str, bool]] = {
    "dynamic": {"use_dynamic_connections": True},
    "proxy": {"use_router_proxy": True},
    "pub-sub": {"use_pub_sub": True},
    "proxy-and-pub-sub": {"use_router_proxy": True, "use_pub_sub": True},
}


@pytest.mark.parametrize("setup", SETUPS)
def test_other_set_ups(
    setup: str, url: str, topic: str, start: Start, proxy: Callable[..., None]
) -> None:
    """Calls and fanouts go through dynamic connections, and through upstream's own proxy."""
    options = SETUPS[setup]
    proxy(url, options)
    servers = [start(url, "eventlet", **options) for _ in range(2)]
    for number, server in enumerate(servers):
        server.ask("serve", topic=topic, server=f"server{number}")
    client = start(url, "eventlet", **options)
    both = {"server0", "server1"}
    until(
        lambda: set(answers(client.ask("calls", topic=topic, count=4))) == both,
        2 * SOON_SECONDS,
        "upstream has connected, which it does in the background",
    )
    calls = client.ask("calls", topic=topic, count=20, timeout=SOON_SECONDS)
    assert set(answers(calls)) == both

    def everybody_got_one() -> bool:
        client.ask("cast", topic=topic, text="all", fanout=True)  # lost where nobody subscribes yet
        return all(f"server{n}:all" in server.ask("got") for n, server in enumerate(servers))

    until(everybody_got_one, SOON_SECONDS, "a fanout everywhere")


def test_a_thousand_calls_while_one_dies_and_one_joins(url: str, topic: str, start: Start) -> None:
    """After the bound of detection every call succeeds, and the load is on all that live."""
    servers = [start(url, "eventlet") for _ in range(3)]
    for number, server in enumerate(servers):
        server.ask("serve", topic=topic, server=f"server{number}")
    joining, client = start(url, "eventlet"), start(url, "eventlet")
    bound = CRASH_SECONDS + LOOK_SECONDS
    client.tell("calls", topic=topic, count=1000, pause=0.02, timeout=2, seconds=bound + 15)
    time.sleep(3)
    killed_at = servers[0].kill()
    joining.ask("serve", topic=topic, server="server3")
    joined_at = time.monotonic()
    calls = client.answer()
    first = min(began for began, _, who in calls if who == "server3") - joined_at
    lost = [began - killed_at for began, _, who in calls if who.startswith("!")]
    after = [who for began, _, who in calls if began > killed_at + bound]
    shares = collections.Counter(after)
    print(
        f"{len(calls)} calls, {len(lost)} lost, the last {max(lost, default=0):.1f} s after the "
        f"kill; the new server's first call after {first:.2f} s; afterwards {dict(shares)}"
    )
    assert len(calls) >= 1000
    assert set(shares) == {"server1", "server2", "server3"}
    assert min(shares.values()) > len(after) / 6
    stops = 2  # of this machine; and one call may be lost meanwhile, which takes 2 s
    assert first <= LOOK_SECONDS + 2 + stops


def test_a_server_that_stops_is_gone_and_others_of_its_process_stay(
    url: str, executor: str, agent: Node, prefix: str, topic: str, start: Start
) -> None:
    """Several servers and a listener share one lease; stopping one withdraws that one alone."""
    server, client = start(url, executor), start(url, executor)
    server.ask("serve", topic=topic, server="a")
    server.ask("serve", topic=topic, server="b")
    server.ask("listen", topic=f"{topic}-events", name="listener")
    status = server.ask("status")
    assert len(status["registrations"]) >= 3
    leases = {key.split("/")[-1][:36] for key in keys(agent, prefix)}
    assert len(leases) == 1
    assert len(client.ask("hosts", topic=topic)) == 2
    assert len(client.ask("hosts", topic=topic, server="a")) == 1
    server.ask("stop", server="a")
    until(lambda: len(client.ask("hosts", topic=topic)) == 1, SOON_SECONDS, "one is left")
    assert client.ask("hosts", topic=topic, server="a") == []
    assert len(client.ask("hosts", topic=f"{topic}-events.info")) == 1
    assert server.end() == 0
    for gone in (topic, f"{topic}-events.info"):
        until(lambda t=gone: client.ask("hosts", topic=t) == [], SOON_SECONDS, "it has ended")  # type: ignore[misc]


def test_prefork(url: str, agent: Node, prefix: str, topic: str, start: Start) -> None:
    """The parent builds the transport and forks 4 workers, each of which serves: 4 registrations,
    each under a lease of its own, and clean exits that withdraw them."""
    parent, client = start(url, "threading"), start(url, "threading")
    pids = parent.ask("prefork", topic=topic, workers=4)
    until(lambda: len(client.ask("hosts", topic=topic)) == 4, SOON_SECONDS, "four are registered")
    names = {f"worker{n}" for n in range(4)}
    assert answered(client.ask("calls", topic=topic, count=40, timeout=2), "threading") == names
    leases = {key.split("/")[-1][:36] for key in keys(agent, prefix)}
    assert len(leases) == 4
    assert parent.ask("status")["registrations"] == []
    assert not [name for name in parent.ask("threads") if name.startswith("consul-matchmaker")]
    assert parent.ask("reap", pids=pids) == [0, 0, 0, 0]
    until(lambda: client.ask("hosts", topic=topic) == [], SOON_SECONDS, "all have left")


def test_an_unknown_topic_delays_no_other(url: str, topic: str, start: Start) -> None:
    """Calls to a topic nobody serves wait out their timeout; first calls to others do not."""
    server, client = start(url, "eventlet"), start(url, "eventlet")
    for number in range(5):
        server.ask("serve", topic=f"{topic}{number}", server="a")
    topics = [f"{topic}{number}" for number in range(5)]
    took = client.ask("beside", unknown=f"{topic}-nobody", topics=topics)
    print(f"first calls beside one to an unknown topic: {[round(t, 3) for t in took['known']]} s")
    assert took["goes_on"], took


def test_an_agent_that_hangs_delays_no_known_topic(
    url: str, topic: str, start: Start, cluster: Cluster
) -> None:
    """A call to an unknown topic ends in its own time, and does not hold up one to another."""
    server, client = start(url, "eventlet"), start(f"{url}&request_timeout_seconds=60", "eventlet")
    server.ask("serve", topic=topic, server="a")
    assert len(client.ask("hosts", topic=topic)) == 1  # known to us, and not to upstream
    cluster.pause("agent1")
    (_, took, who), *_ = client.ask("calls", topic=f"{topic}-nobody", timeout=1)
    assert who.startswith("!")
    assert took < 30, "half of what Consul has to answer; upstream's lock is held no longer"
    assert answers(client.ask("calls", topic=topic)) == ["a"]


@pytest.mark.parametrize("what", ["agent1", "leader"])
def test_a_node_of_consul_is_killed_under_load(
    what: str, url: str, topic: str, start: Start, cluster: Cluster
) -> None:
    """No call is lost, whether it is the agent or the leading server."""
    server, client = start(url, "eventlet"), start(url, "eventlet")
    server.ask("serve", topic=topic, server="a")
    client.ask("calls", topic=topic)
    client.tell("calls", topic=topic, pause=0.01, seconds=12, timeout=2)
    time.sleep(2)
    cluster.kill(cluster.leader() if what == "leader" else what)
    calls = client.answer()
    print(f"{len(calls)} calls, slowest {max(took for _, took, _ in calls):.3f} s")
    assert set(answers(calls)) == {"a"}


def test_all_servers_of_a_topic_are_restarted_at_once(url: str, topic: str, start: Start) -> None:
    """The client, which saw no host for a while, finds the new ones without a restart."""
    client = start(url, "eventlet")
    old = [start(url, "eventlet") for _ in range(2)]
    for server in old:
        server.ask("serve", topic=topic, server="old")
    assert set(answers(client.ask("calls", topic=topic, count=4))) == {"old"}
    for server in old:
        assert server.end() == 0
    until(lambda: client.ask("hosts", topic=topic) == [], SOON_SECONDS, "all are gone")
    client.ask("calls", topic=topic, timeout=1, seconds=3 * LOOK_SECONDS)  # upstream looks, too
    new = [start(url, "eventlet") for _ in range(2)]
    for number, server in enumerate(new):
        server.ask("serve", topic=topic, server=f"new{number}")
    seen: list[str] = []

    def both_answer() -> bool:
        seen[:] = answers(client.ask("calls", topic=topic, count=20, timeout=2))
        return set(seen) == {"new0", "new1"}

    took = until(both_answer, LOOK_SECONDS + SOON_SECONDS, "both new servers answer, and no other")
    print(f"both new servers answer after {took:.2f} s")


def documented(language: str, what: str) -> str:
    """The example in the documentation that has *what* in it."""
    page = (Path(__file__).parents[2] / "docs" / "oslo-messaging.md").read_text()
    (found,) = (
        text for text in re.findall(rf"```{language}\n(.*?)```", page, re.DOTALL) if what in text
    )
    return str(found)


def test_catalog_mode_as_documented(cluster: Cluster, topic: str, start: Start) -> None:
    """The documentation's service definition on two machines, and servers on its fixed ports:
    calls, and calls to one of them by its tag; nothing is written to Consul."""
    definition = json.loads(documented("json", "scheduler"))
    own = configparser.ConfigParser()
    own.read_string(documented("ini", "rpc_zmq_min_port"))
    assert own["oslo_messaging_zmq"]["rpc_zmq_min_port"] == str(definition["service"]["port"])
    names = {"scheduler": topic, "10.0.0.5": "127.0.0.1"}
    servers = []
    for number, port in enumerate(free_ports(2)):
        words = {**names, "node7": f"server{number}", "9501": str(port), "9502": str(port + 1)}
        machine = cluster.add_agent(f"machine{number}-{topic}", _with(words, definition))
        options = dict(_with(words, dict(own["oslo_messaging_zmq"])))
        url = f"consul+zmq://{machine.dns}/?mode=catalog"
        servers.append(start(url, "eventlet", **options))
        servers[-1].ask("serve", topic=topic, server=f"server{number}")
    client = start(f"consul+zmq://{cluster.nodes['agent1'].dns}/?mode=catalog", "eventlet")
    until(lambda: len(client.ask("hosts", topic=topic)) == 2, SOON_SECONDS, "both are in DNS")
    calls = client.ask("calls", topic=topic, count=20, timeout=SOON_SECONDS)
    assert set(answers(calls)) == {"server0", "server1"}
    direct = client.ask("calls", topic=topic, server="server1", count=5, timeout=SOON_SECONDS)
    assert set(answers(direct)) == {"server1"}
    servers[0].kill()
    until(lambda: len(client.ask("hosts", topic=topic)) == 1, 2 * SOON_SECONDS, "its check fails")


def _with(words: dict[str, str], example: Any) -> Any:
    """*example* with other words; a port stays a number."""
    pattern = "|".join(map(re.escape, words))
    return json.loads(re.sub(pattern, lambda found: words[found[0]], json.dumps(example)))
