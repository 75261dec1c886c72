"""How soon kv mode shows what happens, and what it costs; each figure beside what it compares with.

Every part runs against one local cluster of three servers and an agent.  Absolute times are this
machine's; what counts are the ratios, and the bounds that settings promise.
"""

from __future__ import annotations

import argparse
import bisect
import http.client
import json
import logging
import random
import statistics
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate

from consul_matchmaker import Matchmaker, Settings
from consul_matchmaker.backends.http.api import ConsulApi
from consul_matchmaker.model import Host
from consul_matchmaker.testing.consul_probe import Node, NotReady, read_json, request
from consul_matchmaker.testing.local_consul import LocalCluster
from integration.bench.kv_herd import Herd
from integration.bench.outside import Process, pid_of, raft_index
from integration.crowd import Crowd

TTL = 10.0
INTERVAL = TTL / 3  # of renewals
EXCHANGE = 1.5  # design, section 7: at most so many bare exchanges for a call
SLACK = 1.0  # three answers in turn, where two cores play Consul and a thousand clients


def new_prefix() -> str:
    return f"bench-{uuid.uuid4().hex[:8]}"


def url_of(node: Node, prefix: str, liveness: str = "session") -> str:
    return f"consul+kv://{node.http}/{prefix}?session_ttl_seconds={TTL:g}&liveness={liveness}"


def until(claim: Callable[[], object], seconds: float, what: str) -> None:
    deadline = time.monotonic() + seconds
    while not claim():
        if time.monotonic() > deadline:
            raise SystemExit(f"not within {seconds:g} s: {what}")
        time.sleep(0.005)


def spread(seconds: Sequence[float]) -> str:
    return (
        f"n={len(seconds)}  min {min(seconds):6.2f}  median {statistics.median(seconds):6.2f}  "
        f"max {max(seconds):6.2f} s"
    )


def percentile(values: Sequence[float], per_cent: float) -> float:
    return sorted(values)[min(len(values) - 1, int(len(values) * per_cent / 100))]


# -- SIGKILL to a watching reader's answer ---------------------------------------------------------


def crash(cluster: LocalCluster, n: int) -> bool:
    """Time from SIGKILL to a watching reader's answer without that host, for each liveness."""
    print(f"\nSIGKILL of {n} processes, each until a watching reader's answer lacks it")
    medians = {}
    node = cluster.nodes["agent1"]
    worst = 0.0
    for liveness in ("session", "node", "check"):
        url = url_of(node, new_prefix(), liveness)
        with Matchmaker.from_url(url) as reader, Crowd(url, "scheduler", n) as crowd:
            until(lambda: len(reader.hosts("scheduler")) == n, 10, "all are there")
            time.sleep(4)  # an agent whose servers have just joined reports checks 3 s late
            killed: dict[str, float] = {}
            gone: dict[str, float] = {}
            deadline = time.monotonic() + 2 * TTL + 5
            waiting = list(crowd.pids)
            next_kill = time.monotonic()
            while len(gone) < n and time.monotonic() < deadline:
                now = time.monotonic()
                if waiting and now >= next_kill:
                    host = waiting.pop()
                    killed[host] = crowd.kill(host)
                    next_kill = now + random.uniform(0.05, 0.2)  # between two beats, anywhere
                shown = {str(host) for host in reader.hosts("scheduler")}
                for host in killed.keys() - gone.keys() - shown:
                    gone[host] = time.monotonic() - killed[host]
                time.sleep(0.005)
        took = list(gone.values())
        medians[liveness] = statistics.median(took)
        worst = max(took)
        print(f"  {liveness:8} {spread(took)}")
    ratio = medians["session"] / medians["check"]
    print(f"  check is {ratio:.0f} times faster than session; its worst {worst:.2f} of 1.50 s")
    return worst <= 1.5


# -- registration to a watching reader's answer ----------------------------------------------------


def seen(cluster: LocalCluster, n: int) -> bool:
    """Registration to a watching reader's answer, beside a bare write and a bare blocking query."""
    print(
        f"\nregistration to a watching reader's answer, {n} times, in turn with the bare exchange"
    )
    node, prefix = cluster.nodes["agent1"], new_prefix()
    ours: list[float] = []
    bare: list[float] = []
    with (
        Matchmaker.from_url(url_of(node, prefix)) as reader,
        Matchmaker.from_url(url_of(node, prefix)) as owner,
    ):
        first = owner.register("scheduler", "10.0.0.1:1")
        first.wait_until_published(timeout_seconds=5)
        until(lambda: len(reader.hosts("scheduler")) == 1, 5, "the first is there")
        began = 0.0
        for number, snapshot in enumerate(reader.watch("scheduler")):
            if number:
                assert Host("10.0.0.1", number + 1) in snapshot
                ours.append(time.monotonic() - began)
                bare.append(bare_exchange(node))
            if number == n:
                break
            began = time.monotonic()
            owner.register("scheduler", f"10.0.0.1:{number + 2}")
    for name, took in (("bare", bare), ("ours", ours)):
        p50, p99 = percentile(took, 50) * 1000, percentile(took, 99) * 1000
        print(f"  {name}  p50 {p50:6.1f}  p99 {p99:6.1f} ms")
    print(f"  ratio of the medians {statistics.median(ours) / statistics.median(bare):.1f}")
    return percentile(ours, 99) <= 0.1


def bare_exchange(node: Node) -> float:
    """From the start of a PUT to the answer of a blocking query that waits for it."""
    folder = new_prefix()
    request(node, "PUT", f"/v1/kv/{folder}/a", "x")
    waiting = http.client.HTTPConnection(node.http, timeout=30)
    waiting.request("GET", f"/v1/kv/{folder}/?keys")
    answer = waiting.getresponse()
    answer.read()
    index = answer.getheader("X-Consul-Index")
    waiting.request("GET", f"/v1/kv/{folder}/?keys&index={index}&wait=20s")
    time.sleep(0.01)  # so that it waits already
    began = time.monotonic()
    threading.Thread(target=request, args=(node, "PUT", f"/v1/kv/{folder}/b", "x")).start()
    waiting.getresponse().read()
    took = time.monotonic() - began
    waiting.close()
    return took


# -- at rest ---------------------------------------------------------------------------------------


def exchange(cluster: LocalCluster, rounds: int) -> bool:
    """One uncached call of Consul's HTTP API, beside the same exchange over `http.client`."""
    node = cluster.nodes["agent1"]
    address, path = Host.parse(node.http), "/v1/agent/services"  # the agent answers it by itself
    connection = http.client.HTTPConnection(address.address, address.port)
    api = ConsulApi(Settings.from_url(f"consul+kv://{node.http}"))

    def bare() -> None:
        connection.request("GET", path, headers={"Accept": "application/json"})
        connection.getresponse().read()

    ways = {"http.client": bare, "ours": lambda: api.call("GET", path)}
    times: dict[str, list[float]] = {way: [] for way in ways}
    for number in range(rounds + 1):
        for way, call in ways.items():
            began = time.perf_counter()
            call()
            if number:  # the first one connects
                times[way].append(time.perf_counter() - began)
    api.close()
    connection.close()
    medians = {way: statistics.median(each) for way, each in times.items()}
    ratio = medians["ours"] / medians["http.client"]
    print(
        f"\none call of the HTTP API, {rounds} in turn: ours {1e6 * medians['ours']:.0f} us, "
        f"http.client {1e6 * medians['http.client']:.0f} us: {ratio:.2f} x (bound {EXCHANGE:g})"
    )
    return ratio <= EXCHANGE


def rest(cluster: LocalCluster, n: int, seconds: float) -> bool:
    """Raft entries while n registrations rest, beside the idle cluster before and after."""
    print(f"\nRaft entries in {seconds:g} s: {n} registrations at rest, and the idle cluster")
    moved: dict[str, list[int]] = {"idle": [], "session": [], "check": []}
    for what in ("idle", "session", "check", "idle"):
        owner = None
        if what != "idle":
            node = cluster.nodes["agent1"]
            owner = Matchmaker.from_url(url_of(node, new_prefix(), what))
            for port in range(1, n + 1):
                owner.register("scheduler", f"10.0.0.1:{port}")
            last = owner.register("scheduler", f"10.0.0.1:{n + 1}")
            last.wait_until_published(timeout_seconds=30)
            time.sleep(2)
        before = raft_index(cluster)
        time.sleep(seconds)
        moved[what].append(raft_index(cluster) - before)
        print(f"  {what:8} {moved[what][-1]} entries")
        if owner is not None:
            owner.close()
    return max(moved["session"] + moved["check"]) <= max(moved["idle"]) + 2


# -- the herd --------------------------------------------------------------------------------------


def herd(cluster: LocalCluster, n: int, seconds: float) -> bool:
    """n clients that notice in the same moment that their agent is gone, and return when it does.

    How many requests a second are answered is bounded by this machine; what comes together beyond
    that has to wait.  So the bound is on how many requests waited for their answers at once.
    """
    seconds = max(seconds, 2 * TTL + 1)  # else the leases outlive it
    print(f"\n{n} clients, agent away for {seconds:g} s; requests once it can be asked again")
    node, waiting, took = cluster.nodes["agent1"], {}, {}
    for jitter in ("jitter", "none"):
        prefix = new_prefix()
        with Herd(node.http, prefix, TTL, n, jitter) as clients:
            clients.start()
            until(lambda: is_whole(node, prefix, n), 120, "all are published")  # noqa: B023
            if jitter == "jitter":
                print(f"  {at_rest(cluster, clients)}")
            cluster.pause("agent1")
            time.sleep(2 * INTERVAL)  # by now all of them are waiting for it
            cluster.kill("agent1")  # ... and all hear at once that it is gone
            time.sleep(seconds)
            cluster.start("agent1")
            until(lambda: can_be_asked(node), 30, "the agent answers")
            began, cpu = time.monotonic(), clients.cpu_seconds()
            until(lambda: is_whole(node, prefix, n), 120, "all are back")  # noqa: B023
            cores = (clients.cpu_seconds() - cpu) / (time.monotonic() - began)
            time.sleep(INTERVAL)
            log = [each for each in clients.log() if each.sent_at >= began]
        sent = [each.sent_at for each in log]
        changes = [(each.sent_at, 1) for each in log] + [(each.answered_at, -1) for each in log]
        waiting[jitter] = max(accumulate(change for _, change in sorted(changes)))
        published = (r for r in log if r.what == "publish" and r.status == 200)
        took[jitter] = max(each.answered_at for each in published) - began
        answers = [each.answered_at - each.sent_at for each in log]
        print(
            f"  {jitter:8} all back after {took[jitter]:.2f} s; requests: at most "
            f"{busiest(sent, 1.0)} in a second, {busiest(sent, 0.1)} in a tenth, {waiting[jitter]} "
            f"waiting at once; answered in p50 {percentile(answers, 50) * 1000:.0f}, "
            f"p99 {percentile(answers, 99) * 1000:.0f} ms; the clients took {cores:.2f} processors"
        )
        destroy_sessions(node)
        cluster.wait_ready()
    ratio = waiting["jitter"] / waiting["none"]
    print(
        f"  waiting at once, jitter / none: {ratio:.2f} of 0.50; back after {took['jitter']:.2f} s "
        f"of {INTERVAL + SLACK:.2f}; at rest {2 * n / INTERVAL:.0f} requests a second"
    )
    return ratio <= 0.5 and took["jitter"] <= INTERVAL + SLACK


def at_rest(cluster: LocalCluster, clients: Herd) -> str:
    """What renewals cost Consul."""
    nodes = {"the agent": "agent1", "the leader": cluster.leader()}
    pids = {who: pid_of(cluster, name) for who, name in nodes.items()}
    before, count = {who: Process.look(pid) for who, pid in pids.items()}, len(clients.log())
    time.sleep(TTL)
    used = {who: (Process.look(pid) - before[who]).cpu_seconds for who, pid in pids.items()}
    count = len(clients.log()) - count
    costs = [f"{who} {used[who] / count * 1e6:.0f} us" for who in used]
    return f"at rest {count / TTL:.0f} requests a second, each takes {', '.join(costs)}"


def busiest(moments: Sequence[float], seconds: float) -> int:
    """How many of *moments* are at most within any *seconds*."""
    ordered = sorted(moments)
    return max(
        bisect.bisect_left(ordered, at + seconds) - place for place, at in enumerate(ordered)
    )


def can_be_asked(node: Node) -> bool:
    try:
        return request(node, "GET", "/v1/kv/none?consistent")[0] == 404
    except NotReady:
        return False


def destroy_sessions(node: Node) -> None:
    for session in read_json(node, "/v1/session/list"):
        request(node, "PUT", f"/v1/session/destroy/{session['ID']}")


def is_whole(node: Node, prefix: str, n: int) -> bool:
    time.sleep(0.2)
    try:
        status, text = request(node, "GET", f"/v1/kv/{prefix}/?keys")
    except NotReady:
        return False
    return status == 200 and sum(key != f"{prefix}/_" for key in json.loads(text)) == n


# -- which of them ---------------------------------------------------------------------------------


def parts(arguments: argparse.Namespace) -> Iterator[tuple[str, Callable[[LocalCluster], bool]]]:
    yield "exchange", lambda cluster: exchange(cluster, arguments.rounds)
    yield "crash", lambda cluster: crash(cluster, arguments.crashes)
    yield "seen", lambda cluster: seen(cluster, arguments.rounds)
    yield "rest", lambda cluster: rest(cluster, 100, arguments.seconds)
    yield "herd", lambda cluster: herd(cluster, arguments.leases, arguments.seconds)


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m integration.bench kv", description=__doc__)
    parser.add_argument("only", nargs="*", help="exchange, crash, seen, rest, herd; all")
    parser.add_argument("--crashes", type=int, default=20, help="processes killed a liveness")
    parser.add_argument("--rounds", type=int, default=500, help="registrations, and calls, timed")
    parser.add_argument("--leases", type=int, default=1_000, help="of the herd")
    parser.add_argument("--seconds", type=float, default=60.0, help="at rest, and away")
    arguments = parser.parse_args(argv)
    logging.getLogger("consul_matchmaker").setLevel(logging.CRITICAL)  # a thousand repairs
    failed = []
    # All clients of the herd come from one address, of which Consul takes 200 connections.
    limits = {"http_max_conns_per_client": 200 + 2 * arguments.leases}
    with LocalCluster(config={"limits": limits}) as cluster:
        for name, run in parts(arguments):
            if arguments.only and name not in arguments.only:
                continue
            if not run(cluster):
                failed.append(name)
                print("  -> NOT REACHED")
            cluster.wait_ready()
    print(f"\nnot reached: {', '.join(failed) or 'nothing'}")
    return 1 if failed else 0
