"""The same scenarios with upstream's matchmaker_redis on a real Redis, side by side."""

import time
from collections.abc import Callable
from typing import Any

import pytest

from integration.cluster import Cluster
from integration.oslo.calls import CRASH_SECONDS, LOOK_SECONDS, SOON_SECONDS, answers
from integration.oslo.conftest import QUICK
from integration.oslo.redis_server import Redis
from integration.oslo.rpc_process import RpcProcess
from integration.waiting import until

Start = Callable[..., RpcProcess]


@pytest.fixture
def urls(url: str, redis: Redis) -> dict[str, str]:
    return {
        "consul": url,
        "redis": f"zmq+redis://{redis.address}/",
        "consul, check": f"{url}&liveness=check",
    }


def test_side_by_side(
    urls: dict[str, str], topic: str, start: Start, record_property: Callable[[str, Any], None]
) -> None:
    """Lookups, calls, a server that joins, a server that crashes: with eventlet, and with threads,
    where upstream itself is slow and loses calls whichever matchmaker it has.

    How fast they are is printed here, and judged by ``python -m integration.bench oslo``.
    """
    table: dict[str, dict[str, float]] = {name: {} for name in urls}
    for name, url in urls.items():
        row = table[name]
        servers = [start(url, "eventlet") for _ in range(3)]
        for number, server in enumerate(servers):
            server.ask("serve", topic=topic, server=f"server{number}")
        client = start(url, "eventlet")
        row["lookup, us"] = 1e6 * client.ask("lookups", topic=topic, count=2000)
        made = [client.ask("parallel", topic=topic, count=4000, workers=8) for _ in range(3)]
        row["calls/s"] = 4000 / min(each["seconds"] for each in made)  # the rest is other load
        row["lost"] = sum(each["lost"] for each in made)

        joining = start(url, "eventlet")
        joining.ask("hosts", topic=topic)  # it has started
        client.tell("calls", topic=topic, pause=0.02, timeout=2, seconds=LOOK_SECONDS + 8)
        joining.ask("serve", topic=topic, server="joining")
        joined_at = time.monotonic()
        began = [began for began, _, who in client.answer() if who == "joining"]
        row["first call of a new server, s"] = min(began, default=float("nan")) - joined_at

        killed_at = servers[0].kill()
        until(lambda c=client: len(c.ask("hosts", topic=topic)) == 3, 40, "crash seen")  # type: ignore[misc]
        row["crash seen, s"] = time.monotonic() - killed_at

        threaded = start(url, "threading")
        made = threaded.ask("parallel", topic=topic, count=400, workers=4)
        row["threads: calls/s"], row["threads: lost"] = 400 / made["seconds"], made["lost"]
        for process in (*servers, joining, client, threaded):
            process.kill()
    for figure in table["consul"]:
        print(f"{figure:30}", *(f"{name} {row[figure]:9.2f}  " for name, row in table.items()))
        record_property(figure, [row[figure] for row in table.values()])
    ours, theirs = table["consul"], table["redis"]
    assert ours["crash seen, s"] <= CRASH_SECONDS
    assert table["consul, check"]["crash seen, s"] <= 3
    assert ours["first call of a new server, s"] <= LOOK_SECONDS + 2
    # Upstream answers before it listens, at times: 2 of 12,000 were lost with either.
    assert ours["lost"] <= theirs["lost"] + 0.001 * 3 * 4000


@pytest.mark.parametrize("name", ["consul", "redis"])
def test_all_servers_of_a_topic_are_gone_for_a_while(
    name: str, urls: dict[str, str], topic: str, start: Start
) -> None:
    """When others come, the client finds them; with Redis, never again (dynamic connections)."""
    options = {"use_dynamic_connections": True}
    client = start(urls[name], "eventlet", **options)
    old = start(urls[name], "eventlet", **options)
    old.ask("serve", topic=topic, server="old")
    assert set(answers(client.ask("calls", topic=topic, count=4))) == {"old"}
    old.ask("stop", server="old")
    until(lambda: client.ask("hosts", topic=topic) == [], SOON_SECONDS, "it is gone")
    client.ask("calls", topic=topic, timeout=1, seconds=3 * LOOK_SECONDS)  # upstream looks, too
    new = start(urls[name], "eventlet", **options)
    new.ask("serve", topic=topic, server="new")
    time.sleep(3 * LOOK_SECONDS)
    seen = set(answers(client.ask("calls", topic=topic, count=5, timeout=2)))
    print(f"{name}: {seen}")
    if name == "consul":
        assert seen == {"new"}
    else:
        assert {who[0] for who in seen} == {"!"}, "upstream's bug is mended?"


@pytest.mark.parametrize("name", ["consul", "redis"])
def test_the_matchmakers_server_is_killed(
    name: str, urls: dict[str, str], topic: str, start: Start, redis: Redis, cluster: Cluster
) -> None:
    """Under load: calls to a known topic go on with both; the first call to another topic succeeds
    by Consul's next agent, and fails until long after Redis is back."""
    agents = [cluster.nodes[node].http for node in ("agent1", "server1")]
    url = urls[name].replace(agents[0], ",".join(agents))
    server, client = start(url, "eventlet"), start(url, "eventlet")
    server.ask("serve", topic=topic, server="a")
    server.ask("serve", topic=f"{topic}-other", server="b")
    client.ask("calls", topic=topic)
    client.tell("calls", topic=topic, pause=0.01, seconds=6, timeout=2)
    time.sleep(1)
    if name == "consul":
        cluster.kill("agent1")
    else:
        redis.kill()
    known = client.answer()
    other = client.ask("calls", topic=f"{topic}-other", timeout=2)
    if name == "redis":
        redis.start()
    took = 0.0
    if answers(other) != ["b"]:
        took = until(
            lambda: answers(client.ask("calls", topic=f"{topic}-other", timeout=2)) == ["b"],
            60,
            "a first call after the restart",
        )
    print(f"{name}: known {answers(known)[-1]}, other {answers(other)}, back after {took:.1f} s")
    assert set(answers(known)) == {"a"}
    if name == "consul":
        assert answers(other) == ["b"]
    else:
        assert answers(other) != ["b"]
        assert took > QUICK["zmq_target_expire"] / 2
