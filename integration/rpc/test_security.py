"""Who may speak to a server, what others learn, and what they can do to it."""

from __future__ import annotations

import contextlib
import gzip
import json
import logging
import re
import resource
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from consul_matchmaker.adapters.oslo.http.names import service_of
from consul_matchmaker.testing.consul_probe import Node
from integration.cluster import ask
from integration.rpc import certificates, hostile
from integration.rpc.certificates import Certificates
from integration.rpc.conftest import FOUND_SECONDS, QUICK, Served, wait_for_hosts
from integration.rpc.service_process import ServiceProcess
from integration.rpc.transports import Transport
from integration.waiting import until

Make = Callable[..., Any]
Serve = Callable[..., Served]
Start = Callable[..., ServiceProcess]

TOKEN = "T0ken-of-the-tests-which-nobody-may-see"
OTHER = "An0ther-token"
READ_SECONDS = 10.0
"""What a server gives a request to come."""
CLOSE = "Connection: close"
REQUESTS = 10_000
CONNECTIONS = 6
"""Threads that send malformed requests, each over one connection after the other."""
FLOOD_SECONDS = 40.0
PATIENCE_SECONDS = 0.02
"""How long whoever sends a part of a request waits before it closes the connection."""


def port_of(agent: Node, topic: str) -> int:
    """Where the server of *topic* listens."""
    (found,) = ask(agent, f"/v1/health/service/{service_of('openstack', topic)}")
    return int(found["Service"]["Port"])


@pytest.fixture
def token_file(tmp_path: Path) -> Path:
    path = tmp_path / "token"
    path.write_text(f"{TOKEN}\n")
    return path


@pytest.fixture
def start(tmp_path: Path, agent: Node) -> Iterator[Callable[..., ServiceProcess]]:
    """Starts processes that serve: `start(topic, max_connections=5)`; their log is tmp_path/log,
    what they recorded in tmp_path/record."""
    with contextlib.ExitStack() as stack:
        log = stack.enter_context((tmp_path / "log").open("w"))

        def start_one(topic: str, *, environment: None = None, **options: Any) -> ServiceProcess:
            options = {**QUICK, **options}
            lines = [f"{name} = {value}" for name, value in options.items()]
            config = tmp_path / "rpc.conf"
            config.write_text("\n".join(["[consul_http]", *lines, ""]))
            over = Transport("consul", f"consul+http://{agent.http}/", config)
            record = tmp_path / "record"
            process = ServiceProcess(over, topic, record=record, log=log)
            stack.enter_context(process)
            process.wait_ready()
            return process

        yield start_one


# -- the token -------------------------------------------------------------------------------------


def test_a_client_with_the_token_is_served(
    serve: Serve, client: Make, token_file: Path, topic: str
) -> None:
    """Both have it from a file."""
    serve(topic, "one", rpc_token_file=token_file)
    assert client(topic, rpc_token_file=token_file).call({}, "who") == "one"


@pytest.mark.parametrize("kind", ["call", "cast"])
@pytest.mark.parametrize("shown", [OTHER, None])
def test_a_client_without_the_token_is_refused(
    kind: str, shown: str | None, serve: Serve, client: Make, token_file: Path, tmp_path: Path,
    topic: str,
) -> None:  # fmt: skip
    """At once, whatever its timeout, by an error that says why; nothing is executed."""
    import oslo_messaging

    served = serve(topic, "one", rpc_token_file=token_file)
    (tmp_path / "other").write_text(f"{shown}\n")
    options = {} if shown is None else {"rpc_token_file": tmp_path / "other"}
    caller = client(topic, **options)
    wait_for_hosts(caller, 1)
    began = time.monotonic()
    with pytest.raises(oslo_messaging.MessageDeliveryFailure, match="the secret was refused"):
        getattr(caller, kind)({}, "note", what=1)
    assert time.monotonic() - began < FOUND_SECONDS, "its timeout is 20 s"
    assert served.endpoint.got == []


def test_a_server_without_a_token_asks_for_none(
    serve: Serve, client: Make, token_file: Path, topic: str
) -> None:
    """It serves clients that show one, and those that do not: so servers may be given one last."""
    serve(topic, "one")
    assert client(topic).call({}, "who") == "one"
    assert client(topic, rpc_token_file=token_file).call({}, "who") == "one"


def test_a_token_is_replaced_while_calls_go_on(
    serve: Serve, client: Make, tmp_path: Path, topic: str
) -> None:
    """Servers accept both, then clients show the new one, then servers forget the old one: no call
    fails, and whoever has the old one is refused afterwards."""
    import oslo_messaging

    of_server, of_client, old = (tmp_path / name for name in ("server", "client", "old"))
    for path in (of_server, of_client, old):
        path.write_text(f"{TOKEN}\n")
    serve(topic, "one", rpc_token_file=of_server)
    caller, late = client(topic, rpc_token_file=of_client), client(topic, rpc_token_file=old)
    assert late.call({}, "who") == "one"
    answers: list[str] = []
    ended = threading.Event()

    def call() -> None:
        while not ended.is_set():
            answers.append(caller.call({}, "who"))

    def more() -> None:
        """Calls that began after now have ended."""
        enough = len(answers) + 2 * 4 + 20
        until(lambda: len(answers) > enough, FOUND_SECONDS, "calls go on")

    with ThreadPoolExecutor(4) as pool:
        calling = [pool.submit(call) for _ in range(4)]
        try:
            more()
            for path, lines in (
                (of_server, f"{OTHER}\n{TOKEN}\n"),
                (of_client, f"{OTHER}\n"),
                (of_server, f"{OTHER}\n"),
            ):
                whole = path.with_suffix(".new")
                whole.write_text(lines)
                whole.replace(path)
                more()
        finally:
            ended.set()
        for each in calling:
            each.result()
    assert set(answers) == {"one"}
    with pytest.raises(oslo_messaging.MessageDeliveryFailure, match="refused"):
        late.call({}, "who")


def test_nobody_without_the_token_learns_which_topics_there_are(
    serve: Serve, token_file: Path, agent: Node, topic: str
) -> None:
    """The answers for a topic that is served and for one that is not are the same, byte by byte;
    those to other paths do not say, either."""
    serve(topic, "one", rpc_token_file=token_file)
    port = port_of(agent, topic)

    def said(name: str, **words: Any) -> bytes:
        data = hostile.request(json.dumps(hostile.content(name)).encode(), CLOSE, **words)
        return re.sub(rb"Date: [^\r]*", b"", hostile.answer_to(port, data))

    unknown = "x" * len(topic)
    for words in ({}, {"token": OTHER}, {"first": "POST /other HTTP/1.1"}):
        assert said(topic, **words) == said(unknown, **words)
    assert hostile.statuses(said(topic)) == {401}
    assert hostile.statuses(said(topic, first="POST /other HTTP/1.1")) == {404}
    assert hostile.statuses(said(unknown, token=TOKEN)) == {404}, "who has it is told"
    health = hostile.answer_to(port, hostile.request(b"", CLOSE, first="GET /health HTTP/1.1"))
    assert health.endswith(b"\r\n\r\nok\n")


def test_the_token_is_said_nowhere(
    serve: Serve, client: Make, token_file: Path, tmp_path: Path, topic: str,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    """Not in a log, also of the level DEBUG, nor in the representation of an object or in an
    error, nor of Consul's token."""
    import oslo_messaging
    from oslo_config import cfg

    with caplog.at_level(logging.DEBUG):
        served = serve(topic, "one", rpc_token_file=token_file)
        caller = client(topic, rpc_token_file=token_file)
        assert caller.call({}, "who") == "one"
        (tmp_path / "other").write_text(f"{OTHER}\n")
        refused = client(topic, rpc_token_file=tmp_path / "other")
        with pytest.raises(oslo_messaging.MessageDeliveryFailure) as failure:
            refused.call({}, "who")
        conf = cfg.ConfigOpts()
        conf([])
        conf_token = client(topic).transport.conf
        conf_token.set_override("rpc_token", TOKEN, group="consul_http")
        conf_token.log_opt_values(logging.getLogger("options"), logging.DEBUG)
        url = f"consul+http://127.0.0.1:1/?rpc_token={TOKEN}"
        with pytest.raises(ValueError) as in_url:
            oslo_messaging.get_rpc_transport(conf, url=url)
    driver = caller.transport._driver
    parts = [driver, *vars(driver).values(), caller, caller.transport, served.server]
    said = [
        caplog.text,
        repr(failure.value),
        str(failure.value),
        str(in_url.value),
        *map(repr, parts),
    ]
    assert "rpc_token" in caplog.text
    for token in (TOKEN, OTHER):
        assert not [text for text in said if token in text]


def test_the_token_is_not_in_the_list_of_processes(
    start: Start, token_file: Path, topic: str
) -> None:
    """Neither in the command of a process that serves, nor in its environment."""
    process = start(topic, rpc_token_file=token_file)
    for name in ("cmdline", "environ"):
        assert TOKEN.encode() not in Path(f"/proc/{process.pid}/{name}").read_bytes()


# -- TLS -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def authorities(tmp_path_factory: pytest.TempPathFactory) -> tuple[Certificates, Certificates]:
    """Ours, and a stranger's."""
    folder = tmp_path_factory.mktemp("tls")
    return certificates.make(folder / "own"), certificates.make(folder / "strange")


def shown(found: Certificates, authority: Certificates | None = None) -> dict[str, Path]:
    """The options of who shows the certificate of *found*, and trusts *authority*, or the same."""
    return {
        "tls_cert": found.certificate,
        "tls_key": found.key,
        "tls_ca": (authority or found).authority,
    }


def test_both_show_certificates(
    serve: Serve, client: Make, authorities: tuple[Certificates, Certificates], topic: str
) -> None:
    """Calls and casts go over TLS."""
    own, _ = authorities
    served = serve(topic, "one", **shown(own))
    caller = client(topic, **shown(own))
    assert caller.call({}, "who") == "one"
    caller.cast({}, "note", what=1)
    until(lambda: served.endpoint.got == [1], FOUND_SECONDS, "the cast is executed")


@pytest.mark.parametrize("whose", ["none", "a stranger's"])
def test_a_client_without_a_certificate_of_ours_is_refused(
    whose: str, serve: Serve, client: Make, authorities: tuple[Certificates, Certificates],
    agent: Node, topic: str,
) -> None:  # fmt: skip
    """The handshake fails, whatever it sends: not a byte of HTTP comes back, and nothing is
    executed."""
    import oslo_messaging

    own, strange = authorities
    served = serve(topic, "one", **shown(own))
    context = ssl.create_default_context(cafile=own.authority)
    options: dict[str, Path] = {"tls_ca": own.authority}
    if whose != "none":
        context.load_cert_chain(strange.certificate, strange.key)
        options = shown(strange, own)
    body = json.dumps(hostile.content(topic)).encode()
    said = b""
    with (
        hostile.connected(port_of(agent, topic)) as sock,
        contextlib.suppress(OSError),
        context.wrap_socket(sock, server_hostname="127.0.0.1") as secured,
    ):
        secured.sendall(hostile.request(body))
        said = secured.recv(1000)
    assert said == b""
    caller = client(topic, timeout=2, **options)
    wait_for_hosts(caller, 1)
    with pytest.raises(oslo_messaging.MessagingException) as raised:
        caller.call({}, "note", what=1)
    print(f"{type(raised.value).__name__}: {raised.value}")
    assert served.endpoint.got == []


def test_a_server_with_a_strange_certificate_gets_nothing(
    serve: Serve, client: Make, authorities: tuple[Certificates, Certificates], topic: str
) -> None:
    """The client does not send its message, and says why."""
    import oslo_messaging

    own, strange = authorities
    served = serve(topic, "one", **shown(strange))
    caller = client(topic, timeout=2, **shown(own))
    wait_for_hosts(caller, 1)
    with pytest.raises(oslo_messaging.MessagingException, match="CERTIFICATE_VERIFY_FAILED"):
        caller.call({}, "note", what=1)
    assert served.endpoint.got == []


def test_without_tls_nothing_is_said_to_a_port_with_it(
    serve: Serve, client: Make, authorities: tuple[Certificates, Certificates], agent: Node,
    topic: str,
) -> None:  # fmt: skip
    """Not a byte of HTTP comes back; and a client that speaks TLS to a port without it fails."""
    import oslo_messaging

    own, _ = authorities
    served = serve(topic, "one", **shown(own))
    said = hostile.answer_to(port_of(agent, topic), hostile.request(first="GET /health HTTP/1.1"))
    assert hostile.statuses(said) == set()
    plain = f"{topic}-plain"
    served = serve(plain, "two")
    for name, options in ((topic, {}), (plain, shown(own))):
        caller = client(name, timeout=2, **options)
        wait_for_hosts(caller, 1)
        with pytest.raises(oslo_messaging.MessagingException):
            caller.call({}, "note", what=1)
    assert served.endpoint.got == []


# -- malformed requests ----------------------------------------------------------------------------


def used(process: ServiceProcess) -> dict[str, int]:
    """Of a process: memory in KiB, now and at most so far, threads, and file descriptors."""
    lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
    said = dict(line.split(":", 1) for line in lines)
    found = {name: int(said[name].split()[0]) for name in ("VmRSS", "VmHWM", "Threads")}
    return {**found, "files": len(list(Path(f"/proc/{process.pid}/fd").iterdir()))}


def test_ten_thousand_malformed_requests(
    start: Start, client: Make, token_file: Path, agent: Node, tmp_path: Path, topic: str
) -> None:
    """None is executed or answered as if it were; correct calls are served all the time; memory,
    threads and files of the server do not grow, and its log has no traceback."""
    process = start(topic, rpc_token_file=token_file)
    port = port_of(agent, topic)
    caller = client(topic, rpc_token_file=token_file)

    def flood(numbers: range, seed: int) -> dict[str, set[int]]:
        made, found = hostile.Malformed(topic, TOKEN, seed), {}
        for number in numbers:
            kind, data = made.next(number)
            said = hostile.statuses(hostile.answer_to(port, data, PATIENCE_SECONDS))
            found.setdefault(kind.removeprefix("pipelined, "), set()).update(said)
        return found

    with ThreadPoolExecutor(CONNECTIONS + 4) as pool:
        list(pool.map(lambda _: caller.call({}, "echo", text="warm"), range(64)))
        shares = [range(first, REQUESTS // 4, CONNECTIONS) for first in range(CONNECTIONS)]
        list(pool.map(flood, shares, range(100, 100 + CONNECTIONS)))
        before = used(process)
        began = time.monotonic()
        shares = [range(first, REQUESTS, CONNECTIONS) for first in range(CONNECTIONS)]
        floods = [pool.submit(flood, share, seed) for seed, share in enumerate(shares)]
        served, slowest = 0, 0.0
        while not all(each.done() for each in floods):
            asked_at = time.monotonic()
            assert caller.call({}, "echo", text=str(served)) == str(served)
            served, slowest = served + 1, max(slowest, time.monotonic() - asked_at)
        took = time.monotonic() - began
        kinds: dict[str, set[int]] = {}
        for each in floods:
            for kind, found in each.result().items():
                kinds.setdefault(kind, set()).update(found)
    longest = f"{1000 * slowest:.0f} ms"
    print(f"{REQUESTS} requests in {took:.1f} s; {served} calls meanwhile, the longest {longest}")
    for kind, found in sorted(kinds.items()):
        print(f"  {kind}: {sorted(found)}")
    assert took < FLOOD_SECONDS
    assert served > 100
    assert caller.call({}, "record", number=7) == 7
    assert [line.split()[0] for line in (tmp_path / "record").read_text().splitlines()] == ["7"]
    assert not {status for found in kinds.values() for status in found if not 400 <= status < 500}
    assert {kind for kind, found in kinds.items() if not found} == {"half a request"}
    until(lambda: used(process)["files"] <= before["files"] + 2, FOUND_SECONDS, "all are closed")
    after = used(process)
    print(f"before {before}, after {after}")
    assert after["Threads"] <= before["Threads"]
    assert after["VmRSS"] < before["VmRSS"] + 2.5 * REQUESTS, "2.5 KiB a request would be a leak"
    assert "Traceback" not in (tmp_path / "log").read_text()


@pytest.mark.parametrize("message", [7, None, [], {}, {"method": None}, {"method": "x", "args": 1}])
def test_what_upstream_cannot_handle_takes_no_place_for_ever(
    message: object, start: Start, client: Make, token_file: Path, agent: Node, topic: str
) -> None:
    """Its sender is answered, and after more of it than the server takes at a time others are
    served still."""
    most = 3
    start(topic, rpc_token_file=token_file, max_messages=most)
    port, caller = port_of(agent, topic), client(topic, rpc_token_file=token_file)
    body = json.dumps(hostile.content(topic, message=message)).encode()
    status = 200 if isinstance(message, dict) else 400
    for _ in range(2 * most):
        data = hostile.request(body, CLOSE, token=TOKEN)
        assert hostile.statuses(hostile.answer_to(port, data)) == {status}
    assert caller.call({}, "echo", text="x") == "x"


def test_a_small_body_that_unpacks_to_a_large_one_is_not_unpacked(
    start: Start, token_file: Path, agent: Node, topic: str
) -> None:
    """1 MB that would be 1 GB costs the server no memory, also where nobody shows the token."""
    process = start(topic, rpc_token_file=token_file)
    port, before = port_of(agent, topic), used(process)["VmHWM"]
    unpacked = gzip.compress(b" " * 10_000_000) * 100
    for token, status in ((None, 401), (TOKEN, 400)):
        data = hostile.request(unpacked, "Content-Encoding: gzip", token=token)
        assert hostile.statuses(hostile.answer_to(port, data)) <= {status}
        assert used(process)["VmHWM"] < before + 10_000


def test_requests_whose_answers_nobody_reads_are_not_kept(
    start: Start, token_file: Path, agent: Node, topic: str
) -> None:
    """Whoever has no token gets two answers over a connection, and what else it has sent is not
    read: 500,000 probes over one cost no memory."""
    process = start(topic, rpc_token_file=token_file)
    before = used(process)["VmHWM"]
    probes = hostile.request(first="GET /health HTTP/1.1") * 1000
    with hostile.connected(port_of(agent, topic), 1.0) as sock:
        try:
            for _ in range(500):
                sock.sendall(probes)
        except OSError as error:
            print(f"{type(error).__name__}: {error}")
        assert hostile.told(sock).count(b"HTTP/1.1 200") <= 2
    assert used(process)["VmHWM"] < before + 40_000, "without a limit it took 900 MB"


def test_slow_requests_are_given_up(
    start: Start, client: Make, token_file: Path, agent: Node, topic: str
) -> None:
    """Whoever sends a byte from time to time, of a head or of a body, or nothing at all, is
    disconnected after 10 s; others are served meanwhile."""
    start(topic, rpc_token_file=token_file)
    port, caller = port_of(agent, topic), client(topic, rpc_token_file=token_file)
    whole = hostile.request(b" " * 1000, token=TOKEN)
    head = whole.index(b"\r\n\r\n")
    begun = {"nothing": b"", "a head": whole[: head - 60], "a body": whole[: head + 10]}
    with contextlib.ExitStack() as stack:
        open_since = time.monotonic()
        waiting: dict[socket.socket, tuple[str, bytes]] = {}
        for kind, first in begun.items():
            for _ in range(20):
                sock = stack.enter_context(hostile.connected(port))
                sock.sendall(first)
                waiting[sock] = kind, whole[len(first) :]
        closed: dict[str, list[float]] = {kind: [] for kind in begun}
        calls = 0
        while waiting and time.monotonic() - open_since < 2 * READ_SECONDS:
            for sock, (kind, rest) in list(waiting.items()):
                try:
                    if kind != "nothing":
                        sock.sendall(rest[:1])
                    sock.settimeout(0.001)
                    over = sock.recv(1000) == b""
                except TimeoutError:
                    over = False
                except ConnectionError:
                    over = True
                if over:
                    closed[kind].append(time.monotonic() - open_since)
                    del waiting[sock]
                else:
                    waiting[sock] = kind, rest[1:]
            assert caller.call({}, "echo", text="x") == "x"
            calls += 1
            time.sleep(0.1)
    print(
        {kind: f"{min(each):.1f}-{max(each):.1f} s" for kind, each in closed.items() if each}, calls
    )
    assert not waiting, "they are still open"
    assert min(map(min, closed.values())) > READ_SECONDS / 2, "whoever is slow has some seconds"


# -- limits ----------------------------------------------------------------------------------------


def test_no_more_connections_than_max_connections(
    start: Start, client: Make, agent: Node, topic: str
) -> None:
    """The next one is answered by 503 and closed; when one has ended, another is served."""
    most = 8
    start(topic, max_connections=most, health_check=False)
    port, caller = port_of(agent, topic), client(topic)
    with contextlib.ExitStack() as stack:
        held = [stack.enter_context(hostile.connected(port)) for _ in range(most)]
        for sock in held:
            sock.sendall(b"POST")
        for _ in range(3):
            assert hostile.statuses(hostile.answer_to(port, hostile.request())) == {503}
        held[0].close()
        assert caller.call({}, "echo", text="x") == "x"


@contextlib.contextmanager
def fewer_files(count: int) -> Iterator[None]:
    """What is started meanwhile may have so many files open."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (count, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_connections_leave_the_process_files_of_its_own(
    start: Start, agent: Node, tmp_path: Path, topic: str
) -> None:
    """Where the system allows a process fewer files than `max_connections`, further ones are turned
    away as well, before there is no file left to speak to Consul by."""
    files = 400
    with fewer_files(files):
        process = start(topic)
    port = port_of(agent, topic)
    with contextlib.ExitStack() as stack:
        held = [stack.enter_context(hostile.connected(port)) for _ in range(files + 50)]
        until(
            lambda: hostile.statuses(hostile.answer_to(port, hostile.request(), 1.0)) == {503},
            FOUND_SECONDS,
            "further ones are turned away",
        )
        assert used(process)["files"] < 0.9 * files
        assert len(held) > files
    log = (tmp_path / "log").read_text()
    assert "Traceback" not in log
    assert log.count("further ones are turned away") == 1


@pytest.mark.parametrize("size", [100_000, 12_000_000])
@pytest.mark.parametrize("kind", ["call", "cast"])
def test_a_message_longer_than_the_server_takes(
    kind: str, size: int, serve: Serve, client: Make, topic: str
) -> None:
    """It is refused at once, whatever the client's own limit, and the error says so."""
    import oslo_messaging

    served = serve(topic, "one", max_body_bytes=50_000)
    caller = client(topic)
    began = time.monotonic()
    with pytest.raises(oslo_messaging.MessageDeliveryFailure, match="413"):
        getattr(caller, kind)({}, "note", what="x" * size)
    assert time.monotonic() - began < FOUND_SECONDS, "its timeout is 20 s"
    assert served.endpoint.got == []
    assert caller.call({}, "echo", what="short") == "short"


def test_a_message_longer_than_the_client_may_send(serve: Serve, client: Make, topic: str) -> None:
    """It is not sent; the error names both numbers."""
    import oslo_messaging

    served = serve(topic, "one")
    caller = client(topic, max_body_bytes=2000)
    with pytest.raises(oslo_messaging.MessageDeliveryFailure, match=r"\d{4} bytes.* 2000"):
        caller.cast({}, "note", what="x" * 2000)
    assert served.endpoint.got == []
