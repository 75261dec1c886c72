"""The process that multiplies fanouts, and what a dead server costs the others."""

from __future__ import annotations

import contextlib
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from consul_matchmaker.adapters.oslo.http.names import BROADCASTER, service_of
from consul_matchmaker.testing.consul_probe import Node
from integration.cluster import ask
from integration.rpc.conftest import FOUND_SECONDS, QUICK, Served, wait_for_hosts
from integration.rpc.peers import Peer
from integration.waiting import until

Make = Callable[..., Any]
Serve = Callable[..., Served]
Operator = Callable[..., str]
Start = Callable[..., "BroadcasterProcess"]

THRESHOLD = 3
GIVEN_UP_SECONDS = 5.0
"""How long a server of a fanout may hang."""
OTHERS = 8
START_SECONDS = 20.0


class BroadcasterProcess:
    """The command, as users start it; a context manager that kills it."""

    def __init__(self, *words: str, log: Any) -> None:
        program = Path(sys.executable).parent / "consul-matchmaker-broadcaster"
        self._process = subprocess.Popen([program, *words], stderr=log)

    def pause(self) -> None:
        self._process.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        self._process.send_signal(signal.SIGCONT)

    def terminate(self) -> None:
        """SIGTERM."""
        self._process.terminate()

    def wait(self, seconds: float) -> int:
        """Its exit status."""
        return self._process.wait(seconds)

    def __enter__(self) -> BroadcasterProcess:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._process.kill()
        self._process.wait()


def registered(agent: Node) -> int:
    """How many broadcasters Consul has, whether they are up or not."""
    return len(ask(agent, f"/v1/health/service/{BROADCASTER.service}"))


@pytest.fixture
def start(
    tmp_path: Path, url_of: Callable[..., str], agent: Node
) -> Iterator[Callable[..., BroadcasterProcess]]:
    """Starts broadcasters, and waits until they are found; their log is tmp_path/log."""
    with contextlib.ExitStack() as stack:
        log = stack.enter_context((tmp_path / "log").open("w"))
        started: list[BroadcasterProcess] = []

        def start_one(*words: str, **options: Any) -> BroadcasterProcess:
            before = registered(agent)
            words = words or ("--url", url_of(**options))
            started.append(stack.enter_context(BroadcasterProcess(*words, log=log)))
            until(lambda: registered(agent) == before + 1, START_SECONDS, "it is registered")
            return started[-1]

        yield start_one
        for each in started:
            each.resume()
            each.terminate()
        for each in started:
            each.wait(2 * FOUND_SECONDS)


def got(served: list[Served]) -> list[list[Any]]:
    return [sorted(each.endpoint.got) for each in served]


def all_got(served: list[Served], what: list[Any]) -> None:
    """Wait until each server has got all, and fail where one has got more."""
    until(lambda: all(len(each) >= len(what) for each in got(served)), FOUND_SECONDS, "all have it")
    assert got(served) == [what] * len(served)


def fan_out(caller: Any, what: Any) -> None:
    caller.prepare(fanout=True).cast({}, "note", what=what)


# -- with a broadcaster ----------------------------------------------------------------------------


def test_each_server_gets_a_fanout_once(
    start: Start, serve: Serve, client: Make, topic: str
) -> None:
    """As many fanouts as are cast, at each of four servers."""
    start()
    served = [serve(topic, f"server{number}") for number in range(THRESHOLD + 1)]
    caller = client(topic, broadcaster_threshold=THRESHOLD)
    wait_for_hosts(caller, len(served))
    for number in range(10):
        fan_out(caller, number)
    all_got(served, list(range(10)))


def test_from_the_threshold_on_the_broadcaster_sends_it(
    start: Start, serve: Serve, client: Make, topic: str
) -> None:
    """While it stands still nobody gets a fanout for three servers, and afterwards each does,
    once; of two servers each gets it from the client at once."""
    broadcaster = start()
    served = [serve(topic, f"server{number}") for number in range(THRESHOLD)]
    few = [serve(f"{topic}-few", f"server{number}") for number in range(THRESHOLD - 1)]
    caller = client(topic, broadcaster_threshold=THRESHOLD)
    for_few = client(f"{topic}-few", broadcaster_threshold=THRESHOLD)
    wait_for_hosts(caller, len(served))
    wait_for_hosts(for_few, len(few))
    broadcaster.pause()
    fan_out(for_few, "few")
    all_got(few, ["few"])
    fan_out(caller, "many")
    assert got(served) == [[]] * THRESHOLD
    broadcaster.resume()
    all_got(served, ["many"])


def test_it_reads_all_from_a_file(
    start: Start, serve: Serve, client: Make, agent: Node, tmp_path: Path, topic: str
) -> None:
    """The URL, and a secret, which does not stand in its log."""
    (tmp_path / "token").write_text("a-secret\n")
    lines = ["[DEFAULT]", f"transport_url = consul+http://{agent.http}/", "[consul_http]"]
    lines += [f"{name} = {value}" for name, value in QUICK.items()]
    config = tmp_path / "rpc.conf"
    config.write_text("\n".join([*lines, "rpc_token = a-secret", ""]))
    broadcaster = start("--config-file", str(config))
    options = {"rpc_token_file": tmp_path / "token"}
    served = [serve(topic, f"server{number}", **options) for number in range(THRESHOLD)]
    caller = client(topic, broadcaster_threshold=THRESHOLD, **options)
    wait_for_hosts(caller, len(served))
    broadcaster.pause()
    fan_out(caller, 1)
    assert got(served) == [[]] * THRESHOLD
    broadcaster.resume()
    all_got(served, [1])
    assert "a-secret" not in (tmp_path / "log").read_text()


def test_sigterm_ends_it_when_it_has_finished_what_it_took(
    start: Start, serve: Serve, client: Make, operator: Operator, agent: Node, topic: str,
    tmp_path: Path,
) -> None:  # fmt: skip
    """It is found no more at once; a fanout that a server which hangs holds up reaches the others;
    then it ends with 0."""
    broadcaster = start(fanout_connections=1)
    served = [serve(topic, f"server{number}") for number in range(THRESHOLD)]
    asked: list[bytes] = []

    def hang(sock: socket.socket, body: bytes) -> None:
        asked.append(body)
        sock.recv(1)  # until the other side gives up

    with Peer(hang) as first, Peer(hang) as second:
        for peer in (first, second):
            operator(service_of("openstack", topic), peer.port)
        caller = client(topic, broadcaster_threshold=THRESHOLD)
        wait_for_hosts(caller, len(served) + 2)
        fan_out(caller, "last")
        until(lambda: asked, FOUND_SECONDS, "it has begun")
        broadcaster.terminate()
        until(lambda: registered(agent) == 0, FOUND_SECONDS, "it is not registered any more")
        assert broadcaster.wait(3 * GIVEN_UP_SECONDS) == 0
        assert got(served) == [["last"]] * THRESHOLD, "when it has ended, all have it"
        assert len(asked) == 2
        log = (tmp_path / "log").read_text()
        assert log.count("has not got a fanout") == 2
        assert "Traceback" not in log


@pytest.mark.parametrize("words", [[], ["--url", "rabbit://127.0.0.1/"]])
def test_what_cannot_be_meant_is_one_line(words: list[str]) -> None:
    """It ends with 2."""
    program = Path(sys.executable).parent / "consul-matchmaker-broadcaster"
    done = subprocess.run(
        [program, *words], capture_output=True, text=True, timeout=START_SECONDS, check=False
    )
    assert done.returncode == 2
    lines = [line for line in done.stderr.splitlines() if line.startswith("consul-matchmaker")]
    assert lines == [
        "consul-matchmaker-broadcaster: the transport URL must begin with consul+http://"
    ]


# -- without one -----------------------------------------------------------------------------------


def test_without_a_broadcaster_the_client_does_it(serve: Serve, client: Make, topic: str) -> None:
    """Each server gets it once."""
    served = [serve(topic, f"server{number}") for number in range(THRESHOLD + 1)]
    caller = client(topic, broadcaster_threshold=THRESHOLD)
    wait_for_hosts(caller, len(served))
    fan_out(caller, 1)
    all_got(served, [1])


def test_a_broadcaster_that_is_gone_is_none(
    serve: Serve, client: Make, operator: Operator, refusing_port: int, topic: str
) -> None:
    """One that Consul has, and that refuses connections, is no broadcaster: the client does it."""
    operator(BROADCASTER.service, refusing_port)
    served = [serve(topic, f"server{number}") for number in range(THRESHOLD)]
    caller = client(topic, broadcaster_threshold=THRESHOLD)
    wait_for_hosts(caller, len(served))
    fan_out(caller, 1)
    all_got(served, [1])


# -- dead servers ----------------------------------------------------------------------------------


@contextlib.contextmanager
def dropping() -> Iterator[int]:
    """A port that answers no packet, as one behind a firewall: its queue of connections is full."""
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(socket.socket())
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        port = listener.getsockname()[1]
        for _ in range(4):
            sock = stack.enter_context(socket.socket())
            sock.setblocking(False)
            sock.connect_ex(("127.0.0.1", port))
        with socket.socket() as other:
            other.settimeout(0.3)
            with pytest.raises(TimeoutError):
                other.connect(("127.0.0.1", port))
        yield port


@contextlib.contextmanager
def hanging() -> Iterator[int]:
    """A port that takes requests and answers none."""
    with Peer(lambda sock, body: sock.recv(1) and None) as peer:
        yield peer.port


@pytest.mark.parametrize("who_sends", ["the client", "a broadcaster"])
@pytest.mark.parametrize("dead", [dropping, hanging], ids=["drops packets", "hangs"])
def test_a_dead_server_costs_the_others_nothing(
    dead: Callable[[], contextlib.AbstractContextManager[int]], who_sends: str, start: Start,
    serve: Serve, client: Make, operator: Operator, topic: str,
) -> None:  # fmt: skip
    """They have the fanout within a second; who sends it gives that one up after 5 s."""
    threshold = 0
    if who_sends == "a broadcaster":
        start()
        threshold = THRESHOLD
    served = [serve(topic, f"server{number}") for number in range(OTHERS)]
    with dead() as port, ThreadPoolExecutor(1) as pool:
        operator(service_of("openstack", topic), port)
        caller = client(topic, broadcaster_threshold=threshold)
        wait_for_hosts(caller, OTHERS + 1)
        began = time.monotonic()
        sent = pool.submit(fan_out, caller, 1)
        until(lambda: all(got(served)), FOUND_SECONDS, "the others have it")
        took = time.monotonic() - began
        sent.result()
        returned = time.monotonic() - began
    print(f"the others have it after {took:.3f} s; the cast returned after {returned:.2f} s")
    assert took < 1
    assert returned < GIVEN_UP_SECONDS + 1
    assert got(served) == [[1]] * OTHERS
