"""A process that only watches twenty topics, and says at its end what that cost it."""

import json
import sys
import time

from consul_matchmaker import Settings
from consul_matchmaker.answers.cache import Cache
from consul_matchmaker.answers.watcher import Watcher
from consul_matchmaker.backends.http.api import ConsulApi
from consul_matchmaker.backends.kv.store import Kv


def main(url: str) -> None:
    # A Matchmaker's own parts: all that they exchange once all is known are polls.
    settings = Settings.from_url(url, {})
    kv = Kv(ConsulApi(settings), settings)
    cache = Cache(kv, settings)
    watcher = Watcher(kv, cache, settings)
    cache.watched_by(watcher.topics_changed)
    for number in range(20):
        cache.lookup(f"topic{number}")
    watcher.start()
    while not watcher.status()["answers"]:
        time.sleep(0.01)
    print("ready", flush=True)
    before = kv.wire()["http"]
    cpu, began = time.process_time(), time.monotonic()
    sys.stdin.read()
    after = kv.wire()["http"]
    said = {
        "cpu_share": (time.process_time() - cpu) / (time.monotonic() - began),
        "bytes": after["received_bytes"] - before["received_bytes"],
        "answers": after["replies"] - before["replies"],
    }
    watcher.close(2)
    cache.close(1)
    kv.close()
    print(json.dumps(said), flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
