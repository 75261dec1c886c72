"""Show each mode on a real Consul cluster, and check every claim."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import IO

from ..testing.consul_binary import ConsulNotFound
from ..testing.consul_probe import Node, NotReady, request
from ..testing.local_consul import ClusterError, LocalCluster, free_ports

SESSION_TTL_SECONDS = 10.0  # Consul's floor (fact B1)
# Promised for kv mode: Consul removes a crashed process's keys after 2 x TTL, and readers see it
# within another second.
CRASH_SECONDS = 2 * SESSION_TTL_SECONDS + 1
SOON_SECONDS = 1.0  # promised for every change that a process makes itself
START_SECONDS = 15.0  # a Python process on a busy machine
GONE_SECONDS = 3.0 + 1.0  # service mode: the TTL of the check, 3 s by default, and one more
HEALED_SECONDS = 1.0 + SOON_SECONDS  # a renewal comes each third of that
CHECK_INTERVAL = "1s"  # Consul's floor (facts, F)
CHECK_SECONDS = 5.0  # one check interval, its timeout, the reader's TTL of 1 s, and a busy machine
EXIT_SECONDS = 10.0

# A server whose port is open as long as it lives.
_SERVER = """
import socket, sys
with socket.create_server(("127.0.0.1", int(sys.argv[1]))) as listener:
    while True:
        listener.accept()[0].close()
"""


class _Story:
    """Prints what happens, and collects the claims that were not observed."""

    def __init__(self) -> None:
        self.missing: list[str] = []
        self._began = time.monotonic()

    def say(self, text: str = "") -> None:
        print(text, flush=True)

    def chapter(self, text: str) -> None:
        self.say(f"\n{text}\n{'-' * len(text)}")

    def happens(self, text: str) -> None:
        self.say(f"[{time.monotonic() - self._began:5.1f} s] {text}")

    def claim(self, text: str, is_true: bool) -> None:
        self.happens(f"{'ok     ' if is_true else 'NOT SEEN'} {text}")
        if not is_true:
            self.missing.append(text)

    def claim_in_time(self, text: str, seconds: float | None) -> None:
        """*text*, with ``{after}`` for how long it took; None: it took too long."""
        after = "in time" if seconds is None else f"{seconds:.2f} s later"
        self.claim(text.format(after=after), seconds is not None)


class _Reader:
    """A process that runs `watch TOPIC`, and each answer it printed, with the time."""

    def __init__(self, processes: _Processes, url: str, topic: str) -> None:
        self._changed = threading.Condition()
        self._answers: list[tuple[float, frozenset[str]]] = []
        process = processes.ours(url, "watch", topic, "-o", "json", stdout=subprocess.PIPE)
        assert process.stdout is not None
        threading.Thread(target=self._read, args=(process.stdout,), daemon=True).start()

    def _read(self, lines: IO[str]) -> None:
        for line in lines:
            answer = time.monotonic(), frozenset(json.loads(line)["hosts"])
            with self._changed:
                self._answers.append(answer)
                self._changed.notify_all()

    def seconds_until(
        self, is_so: Callable[[frozenset[str]], bool], since: float, within_seconds: float
    ) -> float | None:
        """Seconds from *since* until the newest answer *is_so*; None when it never was in time."""

        def seen_at() -> float | None:
            for at, hosts in reversed(self._answers):
                if at < since:
                    return since if is_so(hosts) else None
                if is_so(hosts):
                    return at
            return None

        deadline = since + within_seconds
        with self._changed:
            self._changed.wait_for(
                lambda: seen_at() is not None, timeout=max(0.0, deadline - time.monotonic())
            )
            at = seen_at()
        return None if at is None or at > deadline else at - since

    def always_had(self, host: str, since: float) -> bool:
        """Whether no answer since then was without *host*."""
        with self._changed:
            before = [hosts for at, hosts in self._answers if at < since][-1:]
            after = [hosts for at, hosts in self._answers if at >= since]
        return all(host in hosts for hosts in before + after)


class _Processes:
    """Every process that the demo starts, except Consul; none outlives the block."""

    def __init__(self) -> None:
        self._all: list[subprocess.Popen[str]] = []

    def __enter__(self) -> _Processes:
        return self

    def __exit__(self, *exc_info: object) -> None:
        for process in self._all:
            process.kill()
        for process in self._all:
            process.wait()
            if process.stdout is not None:
                process.stdout.close()

    def ours(self, url: str, *arguments: str, stdout: int = subprocess.DEVNULL) -> Popen:
        """`consul-matchmaker ARGUMENTS`, against *url* and no other setting of the environment."""
        environ = {k: v for k, v in os.environ.items() if not k.startswith("CONSUL_")}
        return self._start(
            [sys.executable, "-m", "consul_matchmaker", *arguments],
            stdout,
            {**environ, "CONSUL_MATCHMAKER_URL": url},
        )

    def server(self, port: int) -> Popen:
        """A process that listens on *port*."""
        return self._start([sys.executable, "-c", _SERVER, str(port)], subprocess.DEVNULL, None)

    def _start(self, command: list[str], stdout: int, env: dict[str, str] | None) -> Popen:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=stdout,
            stderr=subprocess.DEVNULL,
            env=env,
            text=True,
        )
        self._all.append(process)
        return process


Popen = subprocess.Popen[str]


def run() -> int:
    """Run the demo; return 0 when every claim was observed, else 1.

    Leaves nothing running, also after Ctrl-C or SIGTERM.
    """
    story = _Story()
    with _ended_cleanly_by_sigterm():
        try:
            story.say("Starting a Consul cluster: three servers and one client agent, on 127.x.")
            story.say("(A machine without a consul program fetches one first.)")
            with LocalCluster(servers=3, clients=1) as cluster, _Processes() as processes:
                story.happens("the cluster is ready")
                _tell(story, cluster.nodes["agent1"], processes)
        except (ConsulNotFound, ClusterError, NotReady) as error:
            story.claim(f"a Consul cluster: {error}", False)
    story.say()
    if story.missing:
        story.say("Not everything was observed:")
        for claim in story.missing:
            story.say(f"  - {claim}")
        return 1
    story.say(
        "Everything above was measured now, on a real Consul cluster, which has been removed."
    )
    return 0


def _tell(story: _Story, agent: Node, processes: _Processes) -> None:
    story.chapter("kv mode: applications register themselves")
    kv = f"consul+kv://{agent.http}?session_ttl_seconds={SESSION_TTL_SECONDS:g}"
    reader = _Reader(processes, kv, "scheduler")
    crashed, restarted, leaving = "10.0.0.1:9501", "10.0.0.2:9501", "10.0.0.3:9501"
    running = {
        host: processes.ours(kv, "register", "scheduler", host)
        for host in (crashed, restarted, leaving)
    }
    began = time.monotonic()
    story.happens("three processes run `consul-matchmaker register scheduler 10.0.0.N:9501`")
    seconds = reader.seconds_until(lambda hosts: hosts == set(running), began, START_SECONDS)
    story.claim_in_time("a fourth, which watches, sees 3 hosts, {after}", seconds)
    lookup = processes.ours(kv, "hosts", "scheduler", stdout=subprocess.PIPE)
    printed = lookup.communicate(timeout=START_SECONDS)[0].split()
    story.claim(f"`hosts scheduler` prints {', '.join(printed)}", set(printed) == set(running))

    leaves_at = time.monotonic()
    running[leaving].send_signal(signal.SIGTERM)
    story.happens(f"{leaving} is asked to end (SIGTERM)")
    seconds = reader.seconds_until(lambda hosts: leaving not in hosts, leaves_at, SOON_SECONDS)
    story.claim_in_time(f"it is gone, {{after}} (promised: {SOON_SECONDS:g} s)", seconds)

    for host in (crashed, restarted):
        running[host].kill()
    crashes_at = time.monotonic()
    story.happens(f"{crashed} and {restarted} are killed (SIGKILL): they cannot withdraw")
    processes.ours(kv, "register", "scheduler", restarted)
    story.happens(f"{restarted} is started again at once, at the same address")
    story.happens(f"Consul gives the dead 2 x TTL = {2 * SESSION_TTL_SECONDS:g} s; meanwhile:")

    _tell_service(story, agent, processes)
    _tell_catalog(story, agent, processes)

    story.chapter("kv mode again: the killed processes")
    seconds = reader.seconds_until(lambda hosts: crashed not in hosts, crashes_at, CRASH_SECONDS)
    story.claim_in_time(
        f"{crashed} is gone, {{after}} than it was killed (promised: {CRASH_SECONDS:g} s)", seconds
    )
    # Its predecessor died at the same moment: after that lease, too, only its own is left.
    reader.seconds_until(lambda hosts: False, crashes_at, CRASH_SECONDS)
    story.claim(
        f"{restarted} was never missing: its predecessor's end did not affect it",
        reader.always_had(restarted, crashes_at),
    )


def _tell_service(story: _Story, agent: Node, processes: _Processes) -> None:
    story.chapter("service mode: applications register themselves as Consul services")
    service = f"consul+service://{agent.http}"
    reader = _Reader(processes, service, "web")
    crashed, other = "10.0.0.1:8080", "10.0.0.2:8080"
    running = {
        host: processes.ours(service, "register", "web", host, "--tag", "blue")
        for host in (crashed, other)
    }
    began = time.monotonic()
    story.happens("two processes run `consul-matchmaker register web 10.0.0.N:8080 --tag blue`")
    seconds = reader.seconds_until(lambda hosts: hosts == set(running), began, START_SECONDS)
    story.claim_in_time("a third, which watches, sees both, {after}", seconds)
    by_dns = _Reader(processes, f"consul+catalog://{agent.dns}?ttl_seconds=1&tag=blue", "web")
    seconds = by_dns.seconds_until(lambda hosts: hosts == set(running), began, 2 * START_SECONDS)
    story.claim("so does whoever asks Consul's DNS, by the tag too", seconds is not None)

    at = time.monotonic()
    for service_id in _services(agent, "web"):
        request(agent, "PUT", f"/v1/agent/service/deregister/{service_id}")
    story.happens("somebody deregisters both services on the agent")
    # Not both at once: the first may be back before the second is gone.
    seconds = reader.seconds_until(lambda hosts: hosts < set(running), at, SOON_SECONDS)
    story.claim_in_time("it is noticed, {after}", seconds)
    if seconds is not None:
        at += seconds + 0.001  # when that answer is the last one, not the one before
    seconds = reader.seconds_until(lambda hosts: hosts == set(running), at, HEALED_SECONDS)
    story.claim_in_time("they are back by themselves, {after}", seconds)

    running[crashed].kill()
    at = time.monotonic()
    story.happens(f"{crashed} is killed (SIGKILL): nobody beats its check any more")
    seconds = reader.seconds_until(lambda hosts: crashed not in hosts, at, GONE_SECONDS)
    story.claim_in_time(f"it is gone, {{after}} (promised: {GONE_SECONDS:g} s)", seconds)


def _services(agent: Node, name: str) -> list[str]:
    _, text = request(agent, "GET", f"/v1/health/service/{name}")
    return [each["Service"]["ID"] for each in json.loads(text)]


def _tell_catalog(story: _Story, agent: Node, processes: _Processes) -> None:
    story.chapter("catalog mode: Consul registers and checks, readers ask its DNS")
    catalog = f"consul+catalog://{agent.dns}?ttl_seconds=1"
    reader = _Reader(processes, catalog, "printer")
    running = {f"127.0.0.1:{port}": processes.server(port) for port in free_ports("127.0.0.1", 3)}
    for number, host in enumerate(running, start=1):
        _register_service(agent, f"printer{number}", host)
    began = time.monotonic()
    story.happens("three servers are declared to Consul as service `printer`, with a TCP check")
    seconds = reader.seconds_until(lambda hosts: hosts == set(running), began, START_SECONDS)
    story.claim_in_time("they are found by DNS alone, {after}", seconds)

    crashed = min(running)
    running[crashed].kill()
    crashes_at = time.monotonic()
    story.happens(f"{crashed} is killed (SIGKILL): its check turns critical")
    seconds = reader.seconds_until(lambda hosts: crashed not in hosts, crashes_at, CHECK_SECONDS)
    story.claim_in_time("it is gone, {after}", seconds)

    lookup = processes.ours(catalog, "hosts", "nobody")
    code = lookup.wait(START_SECONDS)
    story.claim(f"`hosts nobody` prints nothing and exits {code}: no hosts is an answer", code == 3)


def _register_service(agent: Node, service_id: str, host: str) -> None:
    """Declare a service with a health check, as a definition file of an operator does."""
    address, _, port = host.rpartition(":")
    check = {"CheckID": service_id, "TCP": host, "Interval": CHECK_INTERVAL, "Timeout": "500ms"}
    definition = {
        "ID": service_id,
        "Name": "printer",
        "Address": address,
        "Port": int(port),
        "Check": check,
    }
    status, text = request(agent, "PUT", "/v1/agent/service/register", json.dumps(definition))
    if status != 200:
        raise NotReady(f"Consul refuses the service definition: {status} {text.strip()}")


@contextlib.contextmanager
def _ended_cleanly_by_sigterm() -> Iterator[None]:
    """SIGTERM unwinds the stack, as Ctrl-C does, so that all that was started ends."""

    def end(number: int, _frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
