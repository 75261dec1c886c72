"""A process that only watches twenty topics, and says at its end what that cost it."""

import json
import sys
import time

from consul_matchmaker import Settings
from consul_matchmaker.backends.kv import Kv
from consul_matchmaker.cache import Cache
from consul_matchmaker.watcher import Watcher
from integration.bench.kv import CountingAgent


def main(url: str) -> None:
    # A Matchmaker's own parts, over an agent that counts.
    settings = Settings.from_url(url, {})
    agent = CountingAgent(settings)
    kv = Kv(agent, settings)
    cache = Cache(kv, settings)
    watcher = Watcher(kv, cache, settings)
    for number in range(20):
        cache.lookup(f"topic{number}")
    watcher.start()
    while not agent.polls:
        time.sleep(0.01)
    print("ready", flush=True)
    polls, size = agent.polls, agent.poll_bytes
    cpu, began = time.process_time(), time.monotonic()
    sys.stdin.read()
    said = {
        "cpu_share": (time.process_time() - cpu) / (time.monotonic() - began),
        "bytes": agent.poll_bytes - size,
        "answers": agent.polls - polls,
    }
    watcher.close(2)
    cache.close(1)
    kv.close()
    print(json.dumps(said), flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
