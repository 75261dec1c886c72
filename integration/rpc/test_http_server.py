"""The HTTP server of a process: certificates that are renewed, limits, forks, messages that die."""

from __future__ import annotations

import contextlib
import json
import shutil
import socket
import ssl
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import oslo_messaging
import pytest

from consul_matchmaker.adapters.oslo.http.options import Options
from consul_matchmaker.adapters.oslo.http.secret import Secret
from consul_matchmaker.adapters.oslo.http.server import HttpServer
from consul_matchmaker.adapters.oslo.http.server_connection import READ_SECONDS
from integration.rpc import certificates
from integration.rpc.certificates import Certificates
from integration.rpc.conftest import (
    FOUND_SECONDS,
    Served,
    of_its_own,
    stopped_together,
    wait_for_hosts,
)
from integration.rpc.endpoints import Endpoint
from integration.waiting import until

Make = Callable[..., Any]
Serve = Callable[..., Served]

SECONDS = 10.0
"""What takes milliseconds has so long on a busy machine."""


@contextlib.contextmanager
def running(options: Options, **words: Any) -> Iterator[HttpServer]:
    """A server that takes nothing."""
    server = HttpServer(options, Secret(None, None), "127.0.0.1", lambda *_: 404, **words)
    server.start()
    try:
        yield server
    finally:
        server.stop()


def post(sock: socket.socket, body: bytes, *headers: str) -> bytes:
    """The first bytes of the answer."""
    lines = ["POST /rpc HTTP/1.1", "Host: a", f"Content-Length: {len(body)}", *headers]
    sock.sendall("\r\n".join(lines).encode() + b"\r\n\r\n" + body)
    return sock.recv(65536)


# -- certificates ----------------------------------------------------------------------------------


def certificate_of(port: int) -> str:
    """The one that new connections are shown."""
    return ssl.get_server_certificate(("127.0.0.1", port), timeout=SECONDS).strip()


def text_of(files: Certificates) -> str:
    return files.certificate.read_text().strip()


def put(files: Certificates, folder: Path) -> None:
    """Have *folder* hold them, as a renewal does: the certificate, and then its key."""
    for file in (files.authority, files.certificate, files.key):
        shutil.copy(file, folder / "new")
        (folder / "new").rename(folder / file.name)


@pytest.fixture
def renewals(tmp_path: Path) -> tuple[Certificates, Certificates, Certificates]:
    """Those that a server reads, and two with which to renew them."""
    used, *more = (certificates.make(tmp_path / name) for name in ("used", "first", "second"))
    return used, more[0], more[1]


def test_a_renewed_certificate_is_used_without_a_restart(
    renewals: tuple[Certificates, ...], caplog: pytest.LogCaptureFixture
) -> None:
    """New connections get it, and those that there are go on.  What cannot be loaded is one line
    in the log, and changes nothing."""
    used, first, second = renewals
    options = Options(tls_cert=str(used.certificate), tls_key=str(used.key))
    trusting = ssl.create_default_context(cafile=str(used.authority))
    with running(options, look_seconds=0.02) as server:
        plain = socket.create_connection(("127.0.0.1", server.port), SECONDS)
        with trusting.wrap_socket(plain, server_hostname="127.0.0.1") as kept:
            put(first, used.certificate.parent)
            until(lambda: certificate_of(server.port) == text_of(first), SECONDS, "it is used")
            assert b" 400 " in post(kept, b"not JSON")[:20]
        caplog.clear()
        no_key = used.key.with_suffix(".none")
        no_key.write_text("no key\n")
        no_key.replace(used.key)  # one change: a file that is written is for a moment empty
        until(lambda: caplog.records, SECONDS, "the key is found to be none")
        assert certificate_of(server.port) == text_of(first)
        used.key.unlink()
        until(lambda: len(caplog.records) == 2, SECONDS, "the key is found to be gone")
        put(second, used.certificate.parent)
        until(lambda: certificate_of(server.port) == text_of(second), SECONDS, "it is used")
    told = [each.getMessage() for each in caplog.records]
    assert all("cannot be used" in each for each in told)
    assert len(told) <= 4  # the renewal, too, was for a moment no good


def test_clients_of_an_authority_that_was_replaced_are_refused(
    renewals: tuple[Certificates, ...],
) -> None:
    """The new file of tls_ca says who is let in; the old one nothing any more."""
    used, first, _ = renewals
    put(first, used.certificate.parent)
    old, new = renewals[2], first
    put(old, used.certificate.parent)
    options = Options(
        tls_cert=str(used.certificate), tls_key=str(used.key), tls_ca=str(used.authority)
    )

    def is_let_in(files: Certificates, port: int) -> bool:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        context.load_cert_chain(files.certificate, files.key)
        plain = socket.create_connection(("127.0.0.1", port), SECONDS)
        try:
            with plain, context.wrap_socket(plain) as sock:
                return b" 400 " in post(sock, b"not JSON")[:20]
        except OSError:
            return False

    with running(options, look_seconds=0.02) as server:
        assert is_let_in(old, server.port)
        assert not is_let_in(new, server.port)
        put(new, used.certificate.parent)
        until(lambda: is_let_in(new, server.port), SECONDS, "the new one is trusted")
        until(lambda: not is_let_in(old, server.port), SECONDS, "the old one is not")


# -- limits ----------------------------------------------------------------------------------------

FEW_FILES = """
import logging, resource, sys
resource.setrlimit(resource.RLIMIT_NOFILE, (64, 4096))
logging.basicConfig(level=logging.INFO)
from consul_matchmaker.adapters.oslo.http.options import Options
from consul_matchmaker.adapters.oslo.http.secret import Secret
from consul_matchmaker.adapters.oslo.http.server import HttpServer
server = HttpServer(Options(), Secret(None, None), "127.0.0.1", lambda *_: 404)
server.start()
held = [open("/dev/null") for _ in range(int(sys.argv[1]))]
print(server.port, flush=True)
sys.stdin.read()
for each in held:
    each.close()
server.stop()
"""


@pytest.mark.parametrize("held", [0, 30])
def test_too_few_files_for_all_connections_do_not_fill_the_log(held: int, tmp_path: Path) -> None:
    """A process that may open 64 files takes 32 connections, says so once, answers the others that
    it is busy, and says that once a minute; where it has no file left, too, it writes a line a
    second at most."""
    log = tmp_path / "log"
    with log.open("w") as written, contextlib.ExitStack() as stack:
        process = subprocess.Popen(
            [sys.executable, "-c", FEW_FILES, str(held)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=written,
            text=True,
        )
        stack.callback(process.kill)
        assert process.stdin is not None and process.stdout is not None
        address = "127.0.0.1", int(process.stdout.readline())
        opened = [
            stack.enter_context(socket.create_connection(address, SECONDS)) for _ in range(300)
        ]
        if held:
            until(lambda: "no connection can be taken" in log.read_text(), SECONDS, "it complains")
        else:
            answers = [each.recv(100) for each in opened[100:]]
            assert all(each.startswith(b"HTTP/1.1 503") for each in answers)
        process.stdin.close()
        assert process.wait(3 * SECONDS) == 0
        process.stdout.close()
    lines = log.read_text().splitlines()
    assert "it takes 32 connections" in lines[0]
    assert len(lines) <= (10 if held else 2), lines[:20]


def test_who_has_only_asked_for_its_health_keeps_no_connection(serve: Serve, topic: str) -> None:
    """It needs no secret: a stranger who sends half a request after it is gone in 10 s."""
    host = serve(topic, "one").server.listener._serving.host
    with socket.create_connection((host.address, host.port), 2 * READ_SECONDS) as sock:
        sock.sendall(b"GET /health HTTP/1.1\r\nHost: a\r\n\r\nPOST /rpc HT")
        answer = b""
        with contextlib.suppress(ConnectionResetError):
            while piece := sock.recv(1000):
                answer += piece
    assert answer.startswith(b"HTTP/1.1 200") and answer.endswith(b"ok\n")


# -- messages that die -----------------------------------------------------------------------------


LEAVING = """
import gc, sys
from oslo_config import cfg
import oslo_messaging

class Endpoint:
    def leave(self, ctxt, how):
        raise {"exit": SystemExit, "kill": BaseException}[how]

    def collect(self, ctxt):
        gc.collect()

conf = cfg.ConfigOpts()
conf([])
transport = oslo_messaging.get_rpc_transport(conf, url=sys.argv[1])
target = oslo_messaging.Target(topic=sys.argv[2], server="one")
server = oslo_messaging.get_rpc_server(transport, target, [Endpoint()], executor="threading")
server.start()
sys.stdin.read()
server.stop()
server.wait()
transport.cleanup()
"""


@pytest.mark.parametrize("how", ["exit", "kill"])
@pytest.mark.parametrize("monitor", [None, 5])
def test_a_method_that_ends_without_a_reply_makes_room(
    monitor: int | None, how: str, url_of: Callable[..., str], client: Make, topic: str
) -> None:
    """By `sys.exit`, or by what kills green threads: once Python has collected the message, its
    caller is told, and others are taken in its place."""
    url = url_of(max_messages=2)
    process = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", LEAVING, url, topic], stdin=subprocess.PIPE
    )
    caller = client(topic)
    wait_for_hosts(caller, 1)
    leaver = caller.prepare(call_monitor_timeout=monitor, retry=0)
    with ThreadPoolExecutor(1) as threads, process:
        for _ in range(3):
            calling = threads.submit(leaver.call, {}, "leave", how=how)
            until(
                lambda calling=calling: (caller.call({}, "collect"), calling.done())[1],  # type: ignore[misc]
                SECONDS,
                "the caller is told",
            )
            told = "without a reply" if monitor is None else "it may have been executed"
            with pytest.raises(oslo_messaging.MessagingException, match=told):
                calling.result()
        assert process.stdin is not None
        process.stdin.close()
        assert process.wait(SECONDS) == 0


def test_what_fails_to_take_a_message_leaves_it_to_others(
    serve: Serve, client: Make, topic: str, caplog: pytest.LogCaptureFixture
) -> None:
    """It is in the log with a traceback, and takes no room."""
    broken, other = serve(topic, "broken", max_messages=1), serve(topic, "other")
    caller = client(topic, retry=0)
    wait_for_hosts(caller, 2)
    taking = broken.server.listener.on_incoming_callback

    def fail(_: Any) -> None:
        raise ValueError("as asked")

    broken.server.listener.on_incoming_callback = fail
    assert [caller.call({}, "who") for _ in range(4)] == ["other"] * 4
    assert any(each.exc_info and "as asked" in str(each.exc_info[1]) for each in caplog.records)
    broken.server.listener.on_incoming_callback = taking
    assert {caller.call({}, "who") for _ in range(4)} == {"broken", "other"}
    assert other.endpoint.got == []


# -- processes -------------------------------------------------------------------------------------


def test_a_forked_child_does_not_keep_its_parents_connections(tmp_path: Path) -> None:
    """When the parent dies its callers see it at once, although the child lives."""
    program = """
import os, sys
from consul_matchmaker.adapters.oslo.http.options import Options
from consul_matchmaker.adapters.oslo.http.secret import Secret
from consul_matchmaker.adapters.oslo.http.server import HttpServer
server = HttpServer(Options(), Secret(None, None), "127.0.0.1", lambda *_: 404)
server.start()
print(server.port, flush=True)
sys.stdin.readline()
if os.fork() == 0:
    print("forked", flush=True)
    sys.stdin.read()
    os._exit(0)
os.waitpid(-1, 0)
"""
    process = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", program],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdin is not None and process.stdout is not None
    with process.stdin, process.stdout:
        port = int(process.stdout.readline())
        with socket.create_connection(("127.0.0.1", port), SECONDS) as sock:
            assert b" 400 " in post(sock, b"not JSON", "Connection: keep-alive")[:20]
        with socket.create_connection(("127.0.0.1", port), SECONDS) as sock:
            sock.sendall(b"POST")
            until(lambda: is_taken(process.pid, sock), SECONDS, "the parent has the connection")
            print(file=process.stdin, flush=True)
            assert process.stdout.readline() == "forked\n"
            process.kill()
            with contextlib.suppress(ConnectionResetError):
                assert sock.recv(1) == b""
        process.wait()
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", port), SECONDS)


def is_taken(pid: int, sock: socket.socket) -> bool:
    """Whether the other end of *sock* is open in the process *pid*."""
    local, peer = (
        f"0100007F:{port:04X}" for port in (sock.getsockname()[1], sock.getpeername()[1])
    )
    lines = Path("/proc/net/tcp").read_text().splitlines()
    inodes = {line.split()[9] for line in lines if line.split()[1:3] == [peer, local]}
    links = []
    for link in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(OSError):
            links.append(str(link.readlink()))
    return any(f"socket:[{inode}]" in links for inode in inodes)


def test_servers_of_one_process_share_one_thread(serve: Serve, client: Make, topic: str) -> None:
    """Whatever their options are; it ends with the last of them."""

    def threads() -> int:
        return [each.name for each in threading.enumerate()].count("consul-matchmaker-http")

    assert threads() == 0
    served = [serve(topic, name) for name in ("one", "two")]
    ports = {each.server.listener._serving.host.port for each in served}
    assert len(ports) == 2
    caller = client(topic)
    wait_for_hosts(caller, 2)
    assert {caller.call({}, "who") for _ in range(4)} == {"one", "two"}
    assert threads() == 1
    served[0].stop()
    assert threads() == 1
    until(lambda: caller.call({}, "who") == "two", FOUND_SECONDS, "the other one serves")
    served[1].stop()
    assert threads() == 0


def test_transports_that_differ_in_what_no_server_needs_share_one(
    transport: Make, topic: str
) -> None:
    """They have one port, and each its own limits."""
    own, ports = of_its_own(), set()
    with stopped_together() as stops:
        for number, options in enumerate(({"max_messages": 5}, {"delivery_timeout": 3})):
            server = oslo_messaging.get_rpc_server(
                transport(**own, **options),
                oslo_messaging.Target(topic=topic, server=str(number)),
                [Endpoint(str(number))],
                executor="threading",
            )
            server.start()
            stops.append(lambda server=server: (server.stop(), server.wait()))  # type: ignore[misc]
            ports.add(server.listener._serving.host.port)
    assert len(ports) == 1


EVENTLET = """
import eventlet
eventlet.monkey_patch()
import json, sys
from oslo_config import cfg
import oslo_messaging

class Endpoint:
    def echo(self, ctxt, what):
        return what

answers = []
transports, servers = [], []
for number in range(2):
    conf = cfg.ConfigOpts()
    conf([])
    url = f"{sys.argv[1]}&max_connections={50 + number}"
    transports.append(oslo_messaging.get_rpc_transport(conf, url=url))
    target = oslo_messaging.Target(topic=f"{sys.argv[2]}-{number}", server="one")
    servers.append(oslo_messaging.get_rpc_server(
        transports[-1], target, [Endpoint()], executor="eventlet"))
    servers[-1].start()
    create = getattr(oslo_messaging, "get_rpc_client", None) or oslo_messaging.RPCClient  # 14.0
    client = create(transports[-1], target, timeout=10)
    answers.append(client.call({}, "echo", what=number))
for server in servers:
    server.stop()
    server.wait()
for transport in transports:
    transport.cleanup()
print(json.dumps(answers))
"""


def test_under_eventlet_a_process_has_several_servers(
    url_of: Callable[..., str], topic: str
) -> None:
    """Green threads share the place where asyncio notes its running loop."""
    command = [sys.executable, "-W", "ignore", "-c", EVENTLET, url_of(), topic]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == [0, 1]
