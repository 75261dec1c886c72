"""What a watching reader costs, whatever strangers do under its prefix.

The bytes are counted by a relay, the processor in /proc: both outside of the reader, which is a
process of its own.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import http.client
import json
import math
import os
import time
import uuid
from collections.abc import Callable, Sequence

from consul_matchmaker.backends.kv.keys import Key
from consul_matchmaker.model import Host, Registration
from consul_matchmaker.testing.consul_probe import Node
from consul_matchmaker.testing.local_consul import LocalCluster
from integration.bench.kv import new_prefix
from integration.bench.outside import CountingRelay, Process
from integration.fleet_process import FleetProcess

KEYS, RATES = (100, 10_000, 100_000), (0, 1, 10)
HOSTS_PER_TOPIC = 20
OPERATIONS = 64  # of a transaction
OTHERS = 50  # topics that change and nobody asks for
FOUR = [f"mine{number}" for number in range(4)]  # of one host each
TWENTY = [f"topic{number}" for number in range(20)]
REST_BYTES_PER_SECOND = 1_000  # design, section 7
OTHERS_BYTES_PER_CHANGE = 1.0  # 0, and what confirmations add by chance
BYTES_PER_SECOND, CPU_SHARE = 1_000_000, 0.1  # what docs/operations.md promises
STALL_SECONDS = 0.02


class Strangers:
    """*count* keys under *prefix* and one for each of FOUR, that nobody holds; for readers as good
    as any."""

    def __init__(self, node: Node, prefix: str, count: int) -> None:
        self._connection = http.client.HTTPConnection(node.http, timeout=30)
        self._prefix, self._count = prefix, count
        self.changes = 0
        self._added: str | None = None
        keys = [self._key(each, f"topic{each // HOSTS_PER_TOPIC}") for each in range(count)]
        keys += [self._key(count, topic) for topic in FOUR]
        for first in range(0, len(keys), OPERATIONS):
            some = [
                {"KV": {"Verb": "set", "Key": key, "Value": base64.b64encode(b"{}").decode()}}
                for key in keys[first : first + OPERATIONS]
            ]
            self._ask("PUT", "/v1/txn", json.dumps(some))

    def _key(self, number: int, topic: str) -> str:
        host = Host(f"10.{number >> 16}.{number >> 8 & 255}.{number & 255}", 9501)
        return Key.of(Registration(topic, host), str(uuid.uuid4())).under(self._prefix)

    def change(self, topic: str) -> None:
        """One more registration of *topic*, or that one gone again, by turns."""
        self.changes += 1
        if self._added is None:
            self._added = self._key(self._count + self.changes, topic)
            self._ask("PUT", f"/v1/kv/{self._added}", "{}")
        else:
            self._ask("DELETE", f"/v1/kv/{self._added}", "")
            self._added = None

    def _ask(self, method: str, path: str, body: str) -> None:
        self._connection.request(method, path, body)
        answer = self._connection.getresponse()
        text = answer.read()
        if answer.status != 200:
            raise SystemExit(f"{method} {path}: {answer.status} {text[:200]!r}")

    def __enter__(self) -> Strangers:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._ask("DELETE", f"/v1/kv/{self._prefix}/?recurse", "")
        self._connection.close()


class Reader:
    """One Matchmaker in a process of its own that goes on asking for *topics*, seen from outside.

    A loop in the same process measures how long it is held up; so does one in an idle process.
    """

    def __init__(self, node: Node, prefix: str, topics: Sequence[str]) -> None:
        self._stack = contextlib.ExitStack()
        self._relay = self._stack.enter_context(CountingRelay(node.http))
        url = f"consul+kv://{self._relay.address}/{prefix}"
        self._reader, self._idle = (self._stack.enter_context(FleetProcess(url)) for _ in range(2))
        self._reader.tell("read", *topics)

    def __enter__(self) -> Reader:
        for each in (self._reader, self._idle):
            each.tell("tick")
            each.said()  # it runs
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._stack.close()

    def look(self) -> dict[str, float]:
        """What it has cost since the last look, or so far."""
        said, idle = self._reader.said(), self._idle.said()
        _, sent_bytes, received_bytes = self._relay.counts
        return {
            "at": time.monotonic(),
            "bytes": sent_bytes + received_bytes,
            "answers": said["answers"],
            # Both have the loop that measures; what is left is the library's.
            "cpu": Process.look(self._reader.pid).cpu_seconds
            - Process.look(self._idle.pid).cpu_seconds,
            "stall": said["longest_stall_seconds"],
            "idle stall": idle["longest_stall_seconds"],
        }


def measured(reader: Reader, act: Callable[[], None]) -> dict[str, float]:
    """What *reader* costs while *act* runs; the stalls are the longest of this time."""
    before = reader.look()
    act()
    now = reader.look()
    return {what: now[what] - (0 if "stall" in what else before[what]) for what in now}


def changing(strangers: Strangers, rate: float, seconds: float) -> None:
    """*rate* keys change a second, of topics that are not in use."""
    began, first = time.monotonic(), strangers.changes
    while (passed := time.monotonic() - began) < seconds:
        if strangers.changes - first < passed * rate:
            strangers.change(f"others{strangers.changes // 2 % OTHERS}")
        else:
            time.sleep(0.01)


def folders(node: Node, prefix: str, strangers: Strangers, seconds: float) -> bool:
    """Four topics in use: what is read at rest, and of what others register."""
    with Reader(node, prefix, FOUR) as reader:
        time.sleep(8)  # the first answers, and their first confirmation
        rest = measured(reader, lambda: time.sleep(seconds))
        others = measured(reader, lambda: changing(strangers, math.inf, seconds))
    rest_rate, others_rate = (each["bytes"] / each["at"] for each in (rest, others))
    changes, answers = strangers.changes, others["answers"] - rest["answers"]
    per_change = max(0.0, others_rate - rest_rate) * others["at"] / changes
    print(
        f"  4 topics in use, at rest: {rest_rate:.0f} bytes/s sent and received, of "
        f"{REST_BYTES_PER_SECOND:,}; {rest['cpu'] / rest['at']:.2%} of a processor"
    )
    print(
        f"  others change {changes / others['at']:.0f} keys a second: {per_change:.2f} bytes a "
        f"change, of 0 ({OTHERS_BYTES_PER_CHANGE:g} by chance), {answers:.0f} more answers of the "
        f"watch; {others['cpu'] / others['at']:.2%} of a processor"
    )
    return rest_rate <= REST_BYTES_PER_SECOND and per_change <= OTHERS_BYTES_PER_CHANGE


def whole_prefix(node: Node, prefix: str, strangers: Strangers, seconds: float) -> bool:
    """Twenty topics in use, so that one query lists all keys, while any change."""
    is_good = True
    with Reader(node, prefix, TWENTY) as reader:
        time.sleep(8)
        for rate in RATES:
            cost = measured(reader, lambda: changing(strangers, rate, seconds))  # noqa: B023
            bytes_per_second, share = cost["bytes"] / cost["at"], cost["cpu"] / cost["at"]
            print(
                f"  20 in use, {rate:2g} changes/s: {bytes_per_second / 1000:.0f} kB/s, of 1,000; "
                f"{share:.1%} of a processor, of 10; {cost['answers'] / cost['at']:.2f} answers/s; "
                f"its loop held up for {1000 * cost['stall']:.1f} ms at most, of 20, an idle "
                f"process's for {1000 * cost['idle stall']:.1f}"
            )
            is_good &= bytes_per_second <= BYTES_PER_SECOND and share <= CPU_SHARE
            is_good &= cost["stall"] <= max(STALL_SECONDS, cost["idle stall"])
    return is_good


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m integration.bench watch", description=__doc__)
    parser.add_argument("--keys", type=int, nargs="+", default=list(KEYS))
    parser.add_argument("--seconds", type=float, default=30.0, help="of each measurement")
    options = parser.parse_args(arguments)
    missed = []
    with LocalCluster() as cluster:
        node = cluster.nodes["agent1"]
        for count in options.keys:
            prefix = new_prefix()
            with Strangers(node, prefix, count) as strangers:
                print(f"{count:,} keys under the prefix; load {os.getloadavg()[0]:.1f}")
                for part in (folders, whole_prefix):
                    if not part(node, prefix, strangers, options.seconds):
                        missed.append(f"{part.__name__} at {count:,} keys")
                        print("  -> NOT REACHED")
    print(f"\nnot reached: {', '.join(missed) or 'nothing'}")
    return 1 if missed else 0
