"""Under eventlet all works by green threads, whether it patches before or after our import."""

import json
import subprocess
import sys

import pytest

from consul_matchmaker.testing.consul_probe import Node

RUN_SECONDS = 60.0
ORDER = {
    "before": "import eventlet; eventlet.monkey_patch(); import consul_matchmaker",
    "after": "import consul_matchmaker, eventlet; eventlet.monkey_patch()",
}
PROGRAM = """
import json, sys, time
from consul_matchmaker import Matchmaker

ticks = 0

def tick():
    global ticks
    while True:
        ticks += 1
        eventlet.sleep(0.01)

eventlet.spawn(tick)
eventlet.sleep(0)
mode, address, prefix, topic = sys.argv[1:]
url = f"consul+{mode}://{address}/" + (prefix if mode == "kv" else "")
with Matchmaker.from_url(url) as reader:
    if mode == "kv":
        owner = Matchmaker.from_url(url)
        waiting = [eventlet.spawn(reader.wait_for_hosts, topic, timeout_seconds=20)
                   for _ in range(5)]
        eventlet.sleep(0.5)
        owner.register(topic, "10.0.0.1:9501").wait_until_published(timeout_seconds=10)
        found = [str(host) for green in waiting for host in green.wait()]
        before = ticks
        owner.close()
        deadline = time.monotonic() + 10
        while reader.hosts(topic) and time.monotonic() < deadline:
            time.sleep(0.05)
        left = [str(host) for host in reader.hosts(topic)]
    else:
        before = ticks
        greens = [eventlet.spawn(reader.hosts, topic) for _ in range(5)]
        found = [str(host) for green in greens for host in green.wait()]
        left = []
        eventlet.sleep(0.05)
    print(json.dumps({"found": found, "left": left, "ticked": 0 < before < ticks}))
"""


def run(order: str, *words: str) -> object:
    command = [sys.executable, "-W", "ignore", "-c", ORDER[order] + PROGRAM, *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=RUN_SECONDS, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("order", ORDER)
def test_kv(order: str, agent: Node, prefix: str, topic: str) -> None:
    """Five green threads wait for a host, see it when it comes, and that it leaves; others run."""
    found = run(order, "kv", agent.http, prefix, topic)
    assert found == {"found": ["10.0.0.1:9501"] * 5, "left": [], "ticked": True}


@pytest.mark.parametrize("order", ORDER)
def test_catalog(order: str, agent: Node, prefix: str) -> None:
    """Five green threads ask DNS at once; others run."""
    found = run(order, "catalog", agent.dns, prefix, "consul")
    assert isinstance(found, dict)
    hosts = found.pop("found")
    assert (len(hosts), len(set(hosts))) == (15, 3), "Consul's own three servers, for each"
    assert found == {"left": [], "ticked": True}
