"""The command line, as processes of its own, against a real Consul."""

import json
import signal
import socket
import sys
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from consul_matchmaker.testing.consul_probe import Node
from consul_matchmaker.testing.local_consul import free_ports
from integration.access_rules import MANAGEMENT
from integration.cluster import Cluster, keys, tell
from integration.command_line import WAIT_SECONDS, cli, running, said
from integration.waiting import until

SOON_SECONDS = 1.0  # the promise for what Consul is told and not left to find out
LISTEN = (
    "import socket, sys\n"
    "with socket.create_server(('127.0.0.1', int(sys.argv[1]))) as listener:\n"
    "    while True: listener.accept()[0].close()"
)


@pytest.fixture
def free_port() -> int:
    return free_ports("127.0.0.1", 1)[0]


@pytest.fixture
def kv(agent: Node, prefix: str) -> str:
    return f"consul+kv://{agent.http}/{prefix}"


def test_register_is_seen_by_others_and_gone_on_sigterm(
    kv: str, topic: str, agent: Node, prefix: str
) -> None:
    """Published when it says so; withdrawn within a second of SIGTERM, exit 0."""
    with running("register", topic, "10.0.0.5:9501", "--server", "node7", "--url", kv) as process:
        said(process, "registered")
        assert cli("hosts", topic, "--url", kv) == (0, "10.0.0.5:9501\n", "")
        assert cli("hosts", topic, "--server", "node7", "--url", kv)[0] == 0
        assert cli("hosts", topic, "--server", "node8", "--url", kv)[0] == 3
        assert cli("topics", "--url", kv) == (0, f"{topic}\n", "")
        process.send_signal(signal.SIGTERM)
        until(lambda: keys(agent, prefix) == [], SOON_SECONDS)
        assert process.wait(WAIT_SECONDS) == 0
    assert cli("hosts", topic, "--url", kv) == (3, "", "")


def test_an_expired_registration_comes_back_if_its_owner_lives(
    kv: str, topic: str, agent: Node, prefix: str
) -> None:
    """expire removes it for everybody; the owner publishes it again within one renewal."""
    url = f"{kv}?session_ttl_seconds=10"
    with running("register", topic, "10.0.0.5:9501", "--url", url) as process:
        said(process, "registered")
        assert cli("expire", topic, "10.0.0.6:9501", "--url", kv) == (3, "0\n", "")
        assert cli("expire", topic, "10.0.0.5:9501", "--url", kv) == (0, "1\n", "")
        until(lambda: len(keys(agent, prefix)) == 1, 10.0)


def test_a_command_is_registered_while_it_listens(
    kv: str, topic: str, free_port: int, agent: Node, prefix: str
) -> None:
    """Found once it listens, gone when it ends, with its exit code."""
    host = f"127.0.0.1:{free_port}"
    command = [sys.executable, "-c", LISTEN, str(free_port)]
    with running("register", topic, host, "--url", kv, "--", *command) as process:
        said(process, "registered")
        assert cli("hosts", topic, "--url", kv) == (0, f"{host}\n", "")
        process.send_signal(signal.SIGTERM)
        assert process.wait(WAIT_SECONDS) == 128 + signal.SIGTERM
        assert keys(agent, prefix) == []


def test_a_drained_command_serves_on_after_it_was_withdrawn(
    kv: str, topic: str, free_port: int, agent: Node, prefix: str
) -> None:
    """Nobody is sent to it any more, who comes is still served; it is told to stop when the time
    is over, or by the next signal."""
    command = [sys.executable, "-c", LISTEN, str(free_port)]
    argv = ["register", topic, f"127.0.0.1:{free_port}", "--url", kv, "--drain"]
    with running(*argv, "3600", "--", *command) as process:
        said(process, "registered")
        process.send_signal(signal.SIGTERM)
        until(lambda: keys(agent, prefix) == [], SOON_SECONDS)
        socket.create_connection(("127.0.0.1", free_port), WAIT_SECONDS).close()
        assert process.poll() is None
        process.send_signal(signal.SIGTERM)
        assert process.wait(WAIT_SECONDS) == 128 + signal.SIGTERM
    with running(*argv, "1", "--", *command) as process:
        said(process, "registered")
        asked_at = time.monotonic()
        process.send_signal(signal.SIGTERM)
        assert process.wait(WAIT_SECONDS) == 128 + signal.SIGTERM
        assert time.monotonic() - asked_at >= 1.0


@pytest.mark.finding("B2")
def test_however_many_signals_come_leaving_is_finished(
    kv: str, topic: str, agent: Node, prefix: str
) -> None:
    """Signals from the first one until the process has ended: withdrawn, and exit 0."""
    for number in range(3):
        with running("register", topic, f"10.0.0.{1 + number}:9501", "--url", kv) as process:
            said(process, "registered")
            until(lambda: len(keys(agent, prefix)) == 1, WAIT_SECONDS)
            deadline = time.monotonic() + WAIT_SECONDS
            while process.poll() is None and time.monotonic() < deadline:
                process.send_signal((signal.SIGTERM, signal.SIGINT)[number % 2])
            assert process.wait(WAIT_SECONDS) == 0
        assert keys(agent, prefix) == []


def test_watch_prints_every_change(kv: str, topic: str) -> None:
    """A line now and one after each change, each within a second of it."""
    with running("watch", topic, "--url", kv) as watch:
        assert watch.stdout is not None
        assert watch.stdout.readline() == "\n"
        with running("register", topic, "10.0.0.5:9501", "--url", kv) as process:
            assert watch.stdout.readline() == "10.0.0.5:9501\n"
            process.send_signal(signal.SIGTERM)
            asked_at = time.monotonic()
            assert watch.stdout.readline() == "\n"
            assert time.monotonic() - asked_at < SOON_SECONDS
        watch.send_signal(signal.SIGINT)
        assert watch.wait(WAIT_SECONDS) == 130


def test_watch_tells_a_command_every_change(kv: str, topic: str, tmp_path: Path) -> None:
    """A run at once and one after each change; SIGTERM ends it with 0."""
    log = tmp_path / "log"
    log.touch()
    script = 'echo "$TOPIC: $HOSTS, added $ADDED, removed $REMOVED" >> "$1"'
    command = ["sh", "-c", script, "sh", str(log)]

    def is_told(*lines: str) -> bool:
        return log.read_text().splitlines()[-len(lines) :] == [f"{topic}: {line}" for line in lines]

    with running("watch", topic, "--url", kv, "--", *command) as watch:
        until(lambda: is_told(", added , removed "), WAIT_SECONDS)
        with running("register", topic, "10.0.0.5:9501", "--url", kv) as process:
            until(lambda: is_told("10.0.0.5:9501, added 10.0.0.5:9501, removed "), WAIT_SECONDS)
            process.send_signal(signal.SIGTERM)
            until(lambda: is_told(", added , removed 10.0.0.5:9501"), WAIT_SECONDS)
        watch.send_signal(signal.SIGTERM)
        assert watch.wait(WAIT_SECONDS) == 0
    assert len(log.read_text().splitlines()) == 3


@pytest.fixture
def service(agent: Node, topic: str) -> Iterator[str]:
    """A service named as the topic, with one instance, declared to Consul."""
    definition = {"Name": topic, "ID": topic, "Address": "10.0.0.9", "Port": 9509}
    tell(agent, "PUT", "/v1/agent/service/register", json.dumps(definition))
    yield topic
    tell(agent, "PUT", f"/v1/agent/service/deregister/{topic}")


def test_catalog_mode_needs_no_http(agent: Node, dns_only_agent: Node, service: str) -> None:
    """An agent whose HTTP port is closed answers all the same."""
    for node in (agent, dns_only_agent):
        url = f"consul+catalog://{node.dns}"

        def is_found(url: str = url) -> bool:
            return cli("hosts", service, "--url", url) == (0, "10.0.0.9:9509\n", "")

        until(is_found, WAIT_SECONDS)
        assert cli("hosts", f"not-{service}"[:63], "--url", url) == (3, "", "")
        assert cli("status", "--url", url)[0] == 0


def test_explain_says_who_was_asked_over_http(kv: str, topic: str, agent: Node) -> None:
    """The agent, its answer and the hosts in it; nobody's topic too."""
    with running("register", topic, "10.0.0.5:9501", "--server", "node7", "--url", kv) as process:
        said(process, "registered")
        code, out, err = cli("explain", topic, "--url", kv)
        assert (code, err) == (0, "")
        assert "host 10.0.0.5:9501, server node7" in out
        assert f"agent: {agent.http}" in out
        code, out, _ = cli("explain", topic, "--server", "node7", "--url", kv, "-o", "json")
        assert (code, json.loads(out)["answer"]["details"]["transport"]) == (0, "http")
    assert cli("explain", f"not-{topic}", "--url", kv)[0] == 3


def test_explain_says_who_was_asked_over_dns(agent: Node, service: str) -> None:
    """The name that was asked for, whom, and the code of the answer."""
    url = f"consul+catalog://{agent.dns}"
    until(lambda: cli("explain", service, "--url", url)[0] == 0, WAIT_SECONDS)
    code, out, _ = cli("explain", service, "--url", url)
    assert code == 0
    assert "host 10.0.0.9:9509" in out
    assert f"name _{service}._tcp.service.consul., agent {agent.dns}" in out
    code, out, _ = cli("explain", f"not-{service}"[:63], "--url", url)
    assert (code, "NXDOMAIN" in out) == (3, True)


def test_an_agent_that_went_away(cluster: Cluster, agent: Node, kv: str, topic: str) -> None:
    """A killed agent is an outage, not an empty answer."""
    cluster.kill("agent1")
    assert cli("hosts", topic, "--url", f"{kv}?request_timeout_seconds=2")[0] == 4
    catalog = f"consul+catalog://{agent.dns}?request_timeout_seconds=1"
    assert cli("hosts", topic, "--url", catalog)[0] == 4


# --- access rules --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "argv",
    [["hosts", "scheduler"], ["topics"], ["register", "scheduler", "10.0.0.5:9501"], ["status"]],
)
def test_a_wrong_token_is_said_and_not_shown(guarded: Node, argv: list[str]) -> None:
    """Exit 4, the word token in the message, never the token itself, and nothing is written."""
    token = str(uuid.uuid4())
    url = f"consul+kv://{guarded.http}/guarded"
    code, out, err = cli("--url", url, *argv, CONSUL_HTTP_TOKEN=token)
    assert code == 4
    assert "token" in out + err
    assert token not in out + err
    assert "Traceback" not in err
    assert keys(guarded, "guarded", token=MANAGEMENT) == []


def test_a_right_token_is_taken_from_every_place(guarded: Node, tmp_path: Path) -> None:
    """Environment, file and URL; and the explicit one wins over the environment's."""
    url = f"consul+kv://{guarded.http}/guarded"
    path = tmp_path / "token"
    path.write_text(f"{MANAGEMENT}\n")
    wrong = str(uuid.uuid4())
    assert cli("topics", "--url", url, CONSUL_HTTP_TOKEN=MANAGEMENT) == (0, "", "")
    assert cli("topics", "--url", url, CONSUL_HTTP_TOKEN_FILE=str(path)) == (0, "", "")
    named = {"CONSUL_MATCHMAKER_TOKEN": MANAGEMENT, "CONSUL_HTTP_TOKEN": wrong}
    assert cli("topics", "--url", url, **named) == (0, "", "")
    in_url = f"consul+kv://:{MANAGEMENT}@{guarded.http}/guarded"
    assert cli("topics", CONSUL_MATCHMAKER_URL=in_url, CONSUL_HTTP_TOKEN=wrong) == (0, "", "")
    code, _, err = cli("topics", "--url", in_url, CONSUL_HTTP_TOKEN=wrong)
    assert (code, "warning" in err, MANAGEMENT in err) == (0, True, False)
