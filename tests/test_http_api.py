"""One exchange with an agent: form, deadline, token, what each failure means, which agent."""

import contextlib
import gc
import gzip
import http.client
import logging
import os
import shutil
import socket
import ssl
import subprocess
import sys
import threading
import time
import tracemalloc

import pytest

from consul_matchmaker.backends.http.api import ConsulApi, Overloaded, TooLarge, go_duration
from consul_matchmaker.backends.http.exchange import IDLE_CONNECTIONS, MAX_ANSWER_BYTES
from consul_matchmaker.errors import Denied, TimedOut, Unavailable
from consul_matchmaker.settings import Settings

from .contract import eventually
from .doubles import DEADLINE_SECONDS, ManualClock, in_thread
from .http_servers import Server, reply

pytestmark = pytest.mark.system

TOKEN = "5e4bc9f2-secret"


@pytest.fixture
def server():
    with Server() as it:
        yield it


def agent_at(*addresses, clock=time.monotonic, **settings):
    values = {"mode": "kv", "request_timeout_seconds": 5, "addresses": ",".join(addresses)}
    return ConsulApi(Settings(**{**values, **settings}), clock=clock)


def closed_port():
    """An address where nobody listens."""
    with socket.create_server(("127.0.0.1", 0)) as sock:
        return f"127.0.0.1:{sock.getsockname()[1]}"


# -- the form of a request ------------------------------------------------------------------------


@pytest.mark.parametrize("token", [None, TOKEN])
def test_the_token_goes_into_its_header_and_nowhere_else(server, token):
    """No URL, which ends up in logs, ever holds the token; without one there is no header."""
    agent_at(server.address, token=token).call("PUT", "/v1/kv/a", {"acquire": "id"}, b"value")
    (request,) = server.requests
    assert (request.token, request.target) == (token, "/v1/kv/a?acquire=id")


@pytest.mark.parametrize("body", [b"", b"x", b"x" * 100_000])
@pytest.mark.parametrize("method", ["PUT", "DELETE"])
def test_a_body_has_a_length_and_is_never_chunked(server, method, body):
    """New Consul releases check Content-Length, and old ones let chunked bodies of any size in."""
    agent_at(server.address).call(method, "/v1/kv/a", body=body)
    (request,) = server.requests
    assert request.headers["content-length"] == str(len(body))
    assert "transfer-encoding" not in request.headers
    assert request.body == body


def test_only_the_settings_count(server, monkeypatch, tmp_path):
    """Proxies, tokens and .netrc of the environment do not reach a request."""
    netrc = tmp_path / "netrc"
    netrc.write_text("machine 127.0.0.1 login somebody password something\n")
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "CONSUL_HTTP_ADDR"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")
    monkeypatch.setenv("NETRC", str(netrc))
    monkeypatch.setenv("CONSUL_HTTP_TOKEN", "from-the-environment")
    monkeypatch.setenv("CONSUL_HTTP_SSL", "true")
    agent_at(server.address, token=TOKEN).call("GET", "/v1/kv/a")
    (request,) = server.requests
    assert request.token == TOKEN
    assert "authorization" not in request.headers


def test_calls_share_one_connection(server):
    """At rest an agent costs one connection, however many calls there are."""
    agent = agent_at(server.address)
    for _ in range(20):
        agent.call("GET", "/v1/kv/a")
    assert server.connections == 1


def python_calls(function):
    """How many functions of Python *function* calls: a cost that no busy machine changes.

    The garbage collector is off meanwhile: it would run, in this thread, the finalizers of what
    other tests left behind.
    """
    count = 0

    def note(frame, event, argument):
        nonlocal count
        count += event == "call"

    gc.disable()
    sys.setprofile(note)
    try:
        function()
    finally:
        sys.setprofile(None)
        gc.enable()
    return count


@pytest.mark.finding("C11")
def test_a_call_does_little_more_than_one_of_http_client(server):
    """What a lookup costs is Consul's and the network's.  `python -m integration.bench kv exchange`
    measures it in seconds."""
    bare = http.client.HTTPConnection("127.0.0.1", server.port)

    def exchange():
        bare.request("GET", "/v1/kv/a")
        assert bare.getresponse().read() == b"true"

    agent = agent_at(server.address)
    exchange()
    agent.call("GET", "/v1/kv/a")
    costs = python_calls(lambda: agent.call("GET", "/v1/kv/a")), python_calls(exchange)
    bare.close()
    assert costs[0] <= 2 * costs[1], costs


def test_threads_never_mix_their_answers(server):
    """Each thread gets the answer to its own question, from one pool of connections."""
    server.behave = lambda request: reply(body=request.path.encode())
    agent = agent_at(server.address)

    def ask(number):
        paths = [f"/v1/kv/{number}-{n}" for n in range(30)]
        return [path for path in paths if agent.call("GET", path).body != path.encode()]

    threads = [in_thread(lambda number=number: ask(number)) for number in range(8)]
    assert [thread.result(DEADLINE_SECONDS) for thread in threads] == [[]] * 8
    assert len(server.requests) == 240
    assert server.connections < 240


def test_making_an_agent_opens_nothing():
    """No socket, no thread, no file is touched before the first call."""
    before = set(threading.enumerate())
    agent = agent_at(closed_port(), token_file="/nonexistent/token")
    assert set(threading.enumerate()) <= before  # earlier tests' servers may end meanwhile
    assert "127.0.0.1" in repr(agent)
    agent.close()


def test_ipv6_addresses_are_bracketed():
    """An agent at ::1 can be asked."""
    if not socket.has_ipv6:
        pytest.skip("no IPv6 here")
    try:
        server = Server(family=socket.AF_INET6)
    except OSError:
        pytest.skip("no ::1 here")
    with server:
        agent = agent_at(f"[::1]:{server.port}")
        assert agent.call("GET", "/v1/kv/a").body == b"true"
        assert server.requests[0].headers["host"] == f"[::1]:{server.port}"


# -- what an answer means -------------------------------------------------------------------------


def test_an_accepted_status_is_an_answer():
    """404 means what the call says it means."""
    with Server(lambda request: reply(404, b"")) as server:
        agent = agent_at(server.address)
        assert agent.call("GET", "/v1/kv/a", accept=(404,)).status == 404
        with pytest.raises(Unavailable, match="404"):
            agent.call("GET", "/v1/kv/a")


@pytest.mark.parametrize(
    ("statuses", "error"),
    [
        ((400, 405, 413, 500, 502, 503, 599), Unavailable),
        ((401, 403), Denied),
        ((429,), Overloaded),
    ],
)
def test_the_status_decides_never_the_text(server, statuses, error):
    """A misleading text changes nothing; it is shown, with method, path and agent."""
    for status in statuses:
        answer = reply(status, b"Permission denied: No cluster leader")
        server.behave = lambda request, answer=answer: answer
        with pytest.raises(error) as caught:
            agent_at(server.address).call("PUT", "/v1/session/create")
        assert type(caught.value) is error
        message = str(caught.value)
        assert f"PUT /v1/session/create at {server.address}: status {status}" in message
        assert "No cluster leader" in message


@pytest.mark.parametrize("status", [301, 302, 307, 308])
def test_redirects_are_errors_and_not_followed(status):
    """A redirect would carry the token to somebody else."""
    with Server() as other:
        where = f"Location: http://{other.address}/"
        with Server(lambda request: reply(status, b"", [where])) as server:
            with pytest.raises(Unavailable, match="redirect"):
                agent_at(server.address, token=TOKEN).call("GET", "/v1/kv/a")
            assert len(server.requests) == 1
        assert other.requests == []


@pytest.mark.parametrize(
    ("header", "index"),
    [
        ("X-Consul-Index: 17", 17),
        ("X-Consul-Index: 18446744073709551615", 0),  # more than any Raft index
        ("X-Consul-Index: 0", 0),
        ("X-Consul-Index: -3", 0),
        ("X-Consul-Index: 1e3", 0),
        ("X-Consul-Index: ²", 0),
        ("X-Consul-Index:", 0),
        ("X-Other: 1", 0),
    ],
)
def test_the_index_is_a_number_or_zero(header, index):
    """A missing or strange X-Consul-Index is 0, whatever it looks like."""
    raw = reply(headers=["X-None: 1"]).replace(b"X-None: 1", header.encode("latin-1"))
    with Server(lambda request: raw) as server:
        assert agent_at(server.address).call("GET", "/v1/kv/a").index == index


def test_filtering_by_acls_is_noticed():
    """Consul 1.11 and later says when ACLs hid something."""
    headers = ["X-Consul-Results-Filtered-By-ACLs: true"]
    with Server(lambda request: reply(headers=headers)) as server:
        assert agent_at(server.address).call("GET", "/v1/kv/a").is_filtered


@pytest.mark.parametrize("body", [b"", b"<html>", b'["a', b"\xff\xfe", b"[" * 100_000])
def test_what_is_not_json_is_no_answer(body):
    """A cut or foreign body is Unavailable, not a Python error."""
    with Server(lambda request: reply(body=body)) as server:
        answer = agent_at(server.address).call("GET", "/v1/kv/a")
        with pytest.raises(Unavailable, match="Consul"):
            answer.json()


OK = b"HTTP/1.1 200 OK\r\n"
CHUNKED = OK + b"Transfer-Encoding: chunked\r\n\r\n"
FOUND = b"HTTP/1.1 302 Found\r\nLocation: "
BROKEN = {
    "no HTTP": b"nonsense\r\n\r\n",
    "no status": b"HTTP/1.1 abc\r\n\r\n",
    "cut body": OK + b"Content-Length: 50\r\n\r\ncut",
    "broken chunks": CHUNKED + b"zz\r\n",
    "long header": OK + b"X-Long: " + b"x" * 200_000 + b"\r\n\r\n",
    "many headers": OK + b"X-Many: 1\r\n" * 2000 + b"\r\n",
    "negative chunk": CHUNKED + b"-5\r\n",
    "chunk of bytes": CHUNKED + b"\xff\r\n",
    "endless chunk": CHUNKED + b"9" * 40 + b"\r\n",
    "large chunk": CHUNKED + b"7" * 15 + b"\r\nx",
    "cut chunk": CHUNKED + b"5\r\nx",
    "no URL": FOUND + b"http://[\r\nContent-Length: 0\r\n\r\n",
    "no text": FOUND + b"\xff\xfe\r\nContent-Length: 0\r\n\r\n",
    "no port": FOUND + b"http://a:b:c/\r\nContent-Length: -5\r\n\r\n",
    "two lengths": OK + b"Content-Length: 5, 6\r\n\r\nabcde",
    "endless length": OK + b"Content-Length: " + b"9" * 40 + b"\r\n\r\nx",
}


@pytest.mark.parametrize("raw", BROKEN.values(), ids=BROKEN)
@pytest.mark.finding("E8")
def test_broken_http_is_unavailable(server, raw):
    """Whatever a broken peer sends, it is Unavailable."""
    server.behave = lambda request: lambda sock: sock.sendall(raw)
    with pytest.raises(Unavailable):
        agent_at(server.address).call("GET", "/v1/kv/a").json()


@pytest.mark.finding("E8")
@pytest.mark.parametrize(
    "start", [b"HTTP/1.1 200 OK\r\n\r\n", b"HTTP/1.1 302 Found\r\nLocation: /x\r\n\r\n"]
)
def test_a_body_without_end_is_not_read(server, start):
    """What exceeds every sensible answer is given up, with its connection; a redirect too."""

    def flood(sock):
        sock.sendall(start)
        for _ in range(MAX_ANSWER_BYTES // 2**20 + 8):
            sock.sendall(b"x" * 2**20)

    server.behave = lambda request: flood
    with pytest.raises(TooLarge, match="exceeds"):
        agent_at(server.address).call("GET", "/v1/kv/a")


@pytest.mark.finding("E8")
def test_the_body_of_a_redirect_is_bounded_and_not_unpacked(server):
    """It is read as any other body is: a megabyte that unpacks to a gigabyte stays a megabyte."""
    packed = gzip.compress(bytes(2**25), 1)  # 32 MB in 140 KB
    headers = ["Location: http://127.0.0.1:1/", "Content-Encoding: gzip"]
    server.behave = lambda request: reply(302, packed, headers)
    agent = agent_at(server.address)
    tracemalloc.start()
    with contextlib.closing(agent), pytest.raises(Unavailable, match="redirect"):
        agent.call("GET", "/v1/kv/a")
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert most < 2**22


@pytest.mark.finding("E18")
def test_cookies_are_not_kept(server):
    """Consul sets none; what another sets is neither kept nor sent back."""
    numbers = iter(range(1000))
    server.behave = lambda request: reply(headers=[f"Set-Cookie: c{next(numbers)}=x; Path=/"])
    agent = agent_at(server.address)
    for _ in range(3):
        agent.call("GET", "/v1/kv/a")
    assert [request.headers.get("cookie") for request in server.requests] == [None] * 3


@pytest.mark.finding("E18")
def test_many_calls_at_once_are_no_news_for_the_log(server, caplog):
    """More connections than are kept are closed without a word of a foreign library."""
    together = threading.Barrier(IDLE_CONNECTIONS + 6)
    server.behave = lambda request: together.wait(10) * b"" + reply()
    agent = agent_at(server.address)
    calls = [in_thread(lambda: agent.call("GET", "/v1/kv/a")) for _ in range(together.parties)]
    assert [call.result(DEADLINE_SECONDS).status for call in calls] == [200] * len(calls)
    assert len(server.requests) == len(calls)
    assert caplog.records == []


# -- what is shown ---------------------------------------------------------------------------------


def parts_of(secret, size=4):
    return [secret[start : start + size] for start in range(len(secret) - size + 1)]


def all_of(error):
    """All that a log could show of *error* and of every error behind it."""
    shown = [str(error), repr(error), repr(error.args), repr(vars(error))]
    shown += [all_of(each) for each in (error.__cause__, error.__context__) if each is not None]
    return "\n".join(shown)


ECHOES = {
    "body": lambda text: reply(500, text),
    "refusal": lambda text: reply(403, text),
    "bad request": lambda text: reply(400, text),
    "redirect": lambda text: reply(302, text, [f"Location: http://a/?{text.decode()}"]),
    "reason": lambda text: b"HTTP/1.1 500 " + text + b"\r\nContent-Length: 0\r\n\r\n",
    "status": lambda text: b"HTTP/1.1 " + text + b" 2\r\n\r\n",
    "version": lambda text: text + b" 200 OK\r\n\r\n",
    "length": lambda text: b"HTTP/1.1 200 OK\r\nContent-Length: " + text + b"\r\n\r\n",
    "coding": lambda text: (
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + text + b"\r\n"
    ),
    "header": lambda text: b"HTTP/1.1 200 OK\r\n" + text + b"\r\n\r\n" + text,
    "not JSON": lambda text: reply(200, text),
}


@pytest.mark.finding("E14")
@pytest.mark.parametrize("echo", ECHOES)
def test_an_agent_that_repeats_the_token_is_not_quoted(echo, caplog):
    """Wherever it stands, whatever is cut off: no four characters of it are in any error."""
    token = "9f3c7a1e-5b2d-4e68-a0f7-c4d1b8e6235a"
    pads = iter([0, 1, 100, *range(160, 201, 3), 9_990])
    parts = []
    with Server() as server:
        agent = agent_at(server.address, token=token)
        for pad in pads:
            text = b"=" * pad + token.encode() + b"\x1b[31m"
            raw = ECHOES[echo](text)
            server.behave = lambda request, raw=raw: lambda sock: sock.sendall(raw)
            with contextlib.suppress(Unavailable, Denied):
                try:
                    agent.call("GET", "/v1/kv/a").json()
                except (Unavailable, Denied) as error:
                    parts.append(all_of(error))
                    raise
    assert parts
    # The port, drawn at random, may have four digits of it by chance.
    shown = "\n".join([*parts, caplog.text]).replace(str(server.address), "")
    assert [part for part in parts_of(token) if part in shown] == []
    assert "\x1b" not in shown


# -- deadlines ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("start", "drop"),
    [
        (None, b""),
        (b"", b"x"),
        (OK + b"X-Header: ", b"x"),
        (OK + b"X-Header: ", b"\r\nX: x"),
        (OK + b"Content-Length: 100000\r\n\r\n", b"x"),
        (CHUNKED, b"1\r\nx\r\n"),
        (OK + b"\r\n", b"x"),
    ],
    ids=["silence", "status line", "header", "headers", "length", "chunks", "no length"],
)
def test_a_dripping_server_does_not_hold_us_past_the_deadline(server, start, drop):
    """The deadline is for the whole answer, however many pieces it comes in, each of them well
    within any timeout from piece to piece."""

    def drip(sock):
        sock.sendall(start or b"")
        while not server.stopping.wait(0.03 if start is not None else 30):
            sock.sendall(drop)

    server.behave = lambda request: drip
    agent = agent_at(server.address, request_timeout_seconds=0.3)
    started = time.monotonic()
    with pytest.raises(TimedOut, match=r"GET /v1/kv/a.*within 0\.3 s"):
        agent.call("GET", "/v1/kv/a")
    assert time.monotonic() - started < 5
    assert len(server.requests) <= 1  # none while the server has not come to read it


def test_the_time_of_a_call_is_for_all_agents_together():
    """However many are silent; and one that had less time than the setting gives is not away."""
    with Server() as first, Server() as second:
        for server in (first, second):
            server.behave = lambda request, server=server: lambda sock: server.stopping.wait(30)
        agent = agent_at(first.address, second.address, request_timeout_seconds=1)
        started = time.monotonic()
        with pytest.raises(TimedOut):
            agent.call("GET", "/v1/kv/a", timeout_seconds=1.3)
        assert 1.2 < time.monotonic() - started < 1.9
        assert agent.status() == {"agent": second.address, "agents_away": [first.address]}


def test_a_short_deadline_says_nothing_of_the_agent():
    """Who has no time to wait for it changes nothing for the others."""
    with Server() as server:
        server.behave = lambda request: lambda sock: server.stopping.wait(30)
        agent = agent_at(server.address)
        for seconds in (0.1, 0.0, -1.0):
            with pytest.raises(TimedOut):
                agent.call("GET", "/v1/kv/a", timeout_seconds=seconds)
        assert agent.status()["agents_away"] == []


def test_a_tls_handshake_is_within_the_deadline():
    """An agent that takes the connection and says nothing is no longer waited for than others."""
    with Server() as silent:
        agent = agent_at(silent.address, tls=True, verify=False, request_timeout_seconds=0.3)
        started = time.monotonic()
        with pytest.raises(TimedOut):
            agent.call("GET", "/v1/kv/a")
        assert time.monotonic() - started < 5


def test_the_deadline_of_one_call_does_not_reach_the_next():
    """A connection that was kept starts each call with the whole time."""
    with Server(lambda request: reply(body=b"x" * 100)) as server:
        agent = agent_at(server.address)
        agent.call("GET", "/v1/kv/a", timeout_seconds=2)
        threading.Event().wait(2)
        agent.call("GET", "/v1/kv/a")
        assert server.connections == 1


def test_a_poll_waits_longer_than_a_call():
    """Consul holds a poll for its wait, a sixteenth of it, and while there is no leader."""
    agent = agent_at("127.0.0.1:1", request_timeout_seconds=10)
    assert agent.poll_timeout_seconds(16) == 17 + 10
    assert agent_at("127.0.0.1:1", request_timeout_seconds=1).poll_timeout_seconds(16) == 17 + 8


@pytest.mark.parametrize(
    ("seconds", "text"), [(10, "10s"), (1.5, "1500ms"), (0.05, "50ms"), (86400, "86400s")]
)
def test_durations_are_what_go_reads(seconds, text):
    """Consul refuses a bare number and reads whole seconds or milliseconds."""
    assert go_duration(seconds) == text


# -- connections that break -----------------------------------------------------------------------


def test_a_kept_connection_that_was_closed_is_replaced_silently(server):
    """An agent that was restarted between two calls costs nobody an error."""
    agent = agent_at(server.address)
    agent.call("GET", "/v1/kv/a")
    server.close_connections()
    agent.call("GET", "/v1/kv/b")
    assert server.connections == 2


def test_a_connection_closed_under_a_request_is_retried_once():
    """The close may cross the request: the call, idempotent as all are, is made again."""
    answers = iter([None, reply(body=b"2")])
    with Server(lambda request: next(answers)) as server:
        assert agent_at(server.address).call("GET", "/v1/kv/a").body == b"2"
        assert len(server.requests) == 2


def test_connections_that_are_always_closed_are_unavailable():
    """As Consul does to whoever has too many of them: one more try, then an error."""
    with Server(lambda request: None) as server:
        with pytest.raises(Unavailable, match="without response"):
            agent_at(server.address).call("GET", "/v1/kv/a")
        assert len(server.requests) == 2


def test_nobody_listening_says_what_to_check():
    """The error names the call, the agent, the reason and the remedy, and no Python internals."""
    address = closed_port()
    with pytest.raises(Unavailable) as caught:
        agent_at(address, token=TOKEN).call("GET", "/v1/kv/a", {"acquire": "x"})
    assert str(caught.value) == (
        f"GET /v1/kv/a at {address}: Connection refused; "
        "check that a Consul agent listens there, and the setting addresses"
    )


def test_names_are_resolved_within_the_deadline(server):
    """A name is what the system's resolver says, one that it does not know is a failure like any
    other, and a resolver that hangs holds nobody past his time."""
    hangs = threading.Event()

    def resolve(name):
        if name == "hanging":
            hangs.wait(DEADLINE_SECONDS)
        return ["127.0.0.1"] if name == "known" else []

    def api(name):
        settings = Settings(mode="kv", addresses=(f"{name}:{server.port}",))
        return ConsulApi(settings, resolve=resolve)

    assert api("known").call("GET", "/v1/kv/a").status == 200
    with pytest.raises(Unavailable, match="no host of the name unknown; check that a Consul agent"):
        api("unknown").call("GET", "/v1/kv/a")
    with pytest.raises(TimedOut):
        api("hanging").call("GET", "/v1/kv/a", timeout_seconds=0.2)
    hangs.set()


def test_close_ends_a_call_that_waits_and_refuses_later_ones(server):
    """At once, though the agent hangs; no other agent is asked instead."""
    arrived, go_on = threading.Event(), threading.Event()

    def hang(request):
        arrived.set()
        go_on.wait(DEADLINE_SECONDS)
        return reply(200, b"")

    server.behave = hang
    agent = agent_at(server.address, server.address)
    call = in_thread(lambda: agent.call("GET", "/v1/kv/a"))
    assert arrived.wait(DEADLINE_SECONDS)
    agent.close()
    assert isinstance(call.exception(DEADLINE_SECONDS), Unavailable)
    go_on.set()
    with pytest.raises(Unavailable, match="closed"):
        agent.call("GET", "/v1/kv/a")
    assert len(server.requests) == 1
    assert agent.status()["agents_away"] == []


# -- lines ----------------------------------------------------------------------------------------


def waits_for_ever(server):
    """Answers all but polls, which wait until the server stops."""
    return lambda request: (
        (lambda sock: server.stopping.wait(30)) if "wait=" in request.target else reply()
    )


def poll(agent, line, at=None):
    params = {"keys": "", "index": "7"}
    return agent.call("GET", "/v1/kv/p/", params, wait_seconds=2.5, line=line, at=at)


def polling(agent, line, server):
    """A poll on a thread of its own, which has reached *server*."""
    seen = len(server.requests)
    waiting = in_thread(lambda: poll(agent, line))
    while len(server.requests) == seen:
        assert not waiting.done(), waiting.result()
        threading.Event().wait(0.01)
    return waiting


def test_a_poll_has_a_connection_of_its_own(server):
    """It says how long to wait, and calls meanwhile are not held up."""
    release = threading.Event()

    def behave(request):
        if "wait=" in request.target:
            release.wait(30)
        return reply(headers=["X-Consul-Index: 8"])

    server.behave = behave
    agent = agent_at(server.address)
    line = agent.line()
    waiting = polling(agent, line, server)
    agent.call("GET", "/v1/kv/a")
    release.set()
    assert waiting.result(DEADLINE_SECONDS).index == 8
    poll(agent, line)
    assert server.requests[0].target == "/v1/kv/p/?keys=&index=7&wait=2500ms"
    assert server.connections == 2


@pytest.mark.parametrize("when", ["it waits", "it is not used", "it was used"])
def test_an_interrupt_ends_one_poll(server, when):
    """The one that waits, or else the next, at once, without a retry and without blame for the
    agent; one after it works again."""
    agent = agent_at(server.address)
    line = agent.line()
    if when == "it waits":
        server.behave = waits_for_ever(server)
        waiting = polling(agent, line, server)
        line.interrupt()
        with pytest.raises(Unavailable, match="given up"):
            waiting.result(DEADLINE_SECONDS)
    else:
        if when == "it was used":
            poll(agent, line)
        line.interrupt()
        seen = len(server.requests)
        with pytest.raises(Unavailable, match="given up"):
            poll(agent, line)
        assert len(server.requests) == seen
    server.behave = lambda request: reply()
    poll(agent, line)
    assert agent.status() == {"agent": server.address, "agents_away": []}


def test_a_closed_line_stays_closed(server):
    """What waits on it ends, and nothing more is asked; calls go on."""
    server.behave = waits_for_ever(server)
    agent = agent_at(server.address)
    line = agent.line()
    waiting = polling(agent, line, server)
    line.close()
    with pytest.raises(Unavailable, match="closed"):
        waiting.result(DEADLINE_SECONDS)
    for _ in range(2):
        with pytest.raises(Unavailable, match="closed"):
            poll(agent, line)
    assert len(server.requests) == 1
    agent.call("GET", "/v1/kv/a")
    assert agent.status() == {"agent": server.address, "agents_away": []}


def test_a_line_goes_where_it_is_told(server):
    """With `at` it asks that agent and no other, and its connection to another is closed."""
    with Server() as other:
        agent = agent_at(server.address, other.address)
        line = agent.line()
        for number, where in enumerate((server, other)):
            at = agent._settings.addresses[number]
            assert poll(agent, line, at).address == at
            assert len(where.requests) == 1
        eventually(lambda: server.is_connected, lambda is_connected: not is_connected)


# -- tokens ---------------------------------------------------------------------------------------


def test_a_changed_token_file_is_used_at_the_next_call(server, tmp_path):
    """Rotating the file is enough; nothing has to be restarted."""
    file = tmp_path / "token"
    file.write_text("first\n")
    agent = agent_at(server.address, token_file=str(file))
    agent.call("GET", "/v1/kv/a")
    new = tmp_path / "new"
    new.write_text("second\n")
    new.replace(file)
    agent.call("GET", "/v1/kv/a")
    assert [request.token for request in server.requests] == ["first", "second"]


def test_a_refused_token_is_read_again_and_tried_once(tmp_path):
    """A file that changed without looking changed is read again when Consul refuses."""
    file = tmp_path / "token"
    file.write_text("first")
    stamp = file.stat()

    def behave(request):
        if request.token == "good!":
            return reply()
        file.write_text("good!")  # the same size, and below the same time stamp
        os.utime(file, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
        return reply(403, b"ACL not found")

    with Server(behave) as server:
        agent = agent_at(server.address, token_file=str(file))
        assert agent.call("GET", "/v1/kv/a").status == 200
        assert [request.token for request in server.requests] == ["first", "good!"]


def test_a_refused_token_that_stays_is_denied(tmp_path):
    """The same token is not sent twice, and the error names the remedy but not the token."""
    file = tmp_path / "token"
    file.write_text(TOKEN)
    with Server(lambda request: reply(403, f"token {TOKEN} is bad".encode())) as server:
        with pytest.raises(Denied, match="token_file") as caught:
            agent_at(server.address, token_file=str(file)).call("GET", "/v1/kv/a")
        assert TOKEN not in str(caught.value)
        assert len(server.requests) == 1


def test_access_without_a_token_is_denied_in_other_words():
    """Who gave no token is told to give one."""
    refusal = reply(403, b"Permission denied")
    with Server(lambda r: refusal) as server, pytest.raises(Denied, match="without a token"):
        agent_at(server.address).call("GET", "/v1/kv/a")


def test_a_token_file_that_is_gone_for_a_while_leaves_the_old_token(server, tmp_path):
    """Between the two halves of a rotation calls go on."""
    file = tmp_path / "token"
    file.write_text("first")
    agent = agent_at(server.address, token_file=str(file))
    agent.call("GET", "/v1/kv/a")
    file.unlink()
    agent.call("GET", "/v1/kv/a")
    file.write_text("second")
    agent.call("GET", "/v1/kv/a")
    assert [request.token for request in server.requests] == ["first", "first", "second"]


@pytest.mark.parametrize("token", [None, "evil\r\nX-Other: 1", "schlüssel", "two words"])
def test_a_token_file_without_a_token_is_denied(server, tmp_path, token):
    """Without one there is nothing to ask with; what no header can carry is neither sent nor
    shown.  The error names the file."""
    file = tmp_path / "token-file"
    if token is not None:
        file.write_text(token)
    with pytest.raises(Denied, match="token-file") as caught:
        agent_at(server.address, token_file=str(file)).call("GET", "/v1/kv/a")
    assert token is None or token not in str(caught.value)
    assert server.requests == []


@pytest.mark.parametrize(
    ("method", "path", "right"),
    [
        ("GET", "/v1/kv/mm/t/", 'key_prefix "mm/" read'),
        ("PUT", "/v1/kv/mm/t/h/i", 'key_prefix "mm/" write'),
        ("PUT", "/v1/session/create", 'session_prefix "" write'),
    ],
)
def test_a_refusal_names_the_right_that_is_missing(method, path, right):
    """What to write into the policy stands in the error."""
    refusal = reply(403, b"Permission denied")
    with Server(lambda r: refusal) as server, pytest.raises(Denied, match=right):
        agent_at(server.address, prefix="mm", token=TOKEN).call(method, path)


# -- several agents -------------------------------------------------------------------------------


def test_the_first_address_that_works_is_kept(server, caplog):
    """The next in order takes over, it is said once, and the dead one is not asked again."""
    caplog.set_level(logging.INFO)
    dead = closed_port()
    clock = ManualClock()
    with Server() as third:
        agent = agent_at(dead, server.address, third.address, clock=clock)
        for _ in range(10):
            agent.call("GET", "/v1/kv/a")
        assert len(server.requests) == 10
        assert third.requests == []
    failed, taken = caplog.records
    assert (failed.levelno, dead in failed.getMessage()) == (logging.WARNING, True)
    assert f"asking the Consul agent {server.address} from now on" in taken.getMessage()
    assert agent.status() == {"agent": server.address, "agents_away": [dead]}


@pytest.mark.finding("D8")
def test_the_pause_of_a_dead_agent_is_jittered():
    """Processes that lost it together do not all come back to it at the same moment."""
    with Server() as other:
        clock = ManualClock()
        tries = []
        for share in (0.0, 0.999):
            with Server(lambda request: None) as dead:
                settings = Settings(mode="kv", addresses=(dead.address, other.address))
                agent = ConsulApi(settings, clock=clock, jitter=lambda share=share: share)
                agent.call("GET", "/v1/kv/a")
                clock.now += settings.request_timeout_seconds + 0.5  # half of the jitter
                other.behave = lambda request: reply(500)
                with pytest.raises(Unavailable):
                    agent.call("GET", "/v1/kv/a")
                other.behave = lambda request: reply()
                tries.append(dead.connections)
    assert tries[0] > tries[1]


def test_when_all_are_away_one_is_asked_a_call():
    """No call waits for every dead agent; each gets its turn, so the one that is back is found."""
    clock = ManualClock()
    with Server(lambda r: None) as a, Server(lambda r: None) as b, Server(lambda r: None) as c:
        servers = [a, b, c]
        addresses = tuple(server.address for server in servers)
        settings = Settings(mode="kv", addresses=addresses)
        agent = ConsulApi(settings, clock=clock, jitter=lambda: 0.5)
        with pytest.raises(Unavailable, match=a.address):
            agent.call("GET", "/v1/kv/a")
        counts = [len(server.requests) for server in servers]
        assert counts == [2, 2, 2]  # each is given its one retry
        with pytest.raises(Unavailable):
            agent.call("GET", "/v1/kv/a")
        assert sum(len(server.requests) for server in servers) == 8
        c.behave = lambda request: reply()
        for _ in range(3):
            with contextlib.suppress(Unavailable):
                agent.call("GET", "/v1/kv/a")
        assert agent.status()["agent"] == c.address


def test_an_agent_that_cannot_help_costs_one_other_opinion():
    """Without a leader all agents answer 500: two are asked, not all, and none is shunned."""
    with (
        Server(lambda r: reply(500, b"No cluster leader")) as a,
        Server(lambda r: reply(500, b"No cluster leader")) as b,
        Server() as c,
    ):
        agent = agent_at(a.address, b.address, c.address)
        with pytest.raises(Unavailable, match=a.address):
            agent.call("GET", "/v1/kv/a")
        assert [len(server.requests) for server in (a, b, c)] == [1, 1, 0]
        assert agent.status() == {"agent": a.address, "agents_away": []}


def test_an_agent_that_lost_the_servers_is_left_for_one_that_has_them(server):
    """An isolated client agent answers 500; the other one answers, and is kept."""
    with Server(lambda r: reply(500, b"No known Consul servers")) as isolated:
        agent = agent_at(isolated.address, server.address)
        for _ in range(5):
            agent.call("GET", "/v1/kv/a")
        assert len(isolated.requests) == 1
        assert len(server.requests) == 5


@pytest.mark.parametrize("status", [403, 404, 400, 301])
def test_a_clear_answer_is_not_taken_to_another_agent(server, status):
    """What one agent says for the whole cluster, another would say as well."""
    with Server(lambda r: reply(status)) as first, pytest.raises((Unavailable, Denied)):
        agent_at(first.address, server.address).call("GET", "/v1/kv/a")
    assert server.requests == []


# -- TLS ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def certificate(tmp_path_factory):
    """A certificate for 127.0.0.1, signed by itself, and its key."""
    if shutil.which("openssl") is None:
        pytest.skip("no openssl command to make a certificate with")
    folder = tmp_path_factory.mktemp("tls")
    cert, key = str(folder / "cert.pem"), str(folder / "key.pem")
    request = "openssl req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=test -addext"
    files = ["subjectAltName=IP:127.0.0.1", "-keyout", key, "-out", cert]
    subprocess.run([*request.split(), *files], check=True, capture_output=True)
    return cert, key


@pytest.fixture
def tls_server(certificate):
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(*certificate)
    context.load_verify_locations(certificate[0])
    context.verify_mode = ssl.CERT_OPTIONAL
    with Server(tls=context) as it:
        yield it


def test_tls_with_its_ca(tls_server, certificate):
    """ca_cert, client_cert and client_key make a verified connection, kept between calls."""
    cert, key = certificate
    agent = agent_at(
        tls_server.address, tls=True, ca_cert=cert, client_cert=cert, client_key=key, token=TOKEN
    )
    for _ in range(3):
        assert agent.call("GET", "/v1/kv/a").status == 200
    assert tls_server.connections == 1
    assert tls_server.requests[0].token == TOKEN


def test_tls_with_an_unknown_ca_is_refused(tls_server, monkeypatch, certificate):
    """The token is not sent to a stranger; CAs of the environment do not count."""
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", certificate[0])
    monkeypatch.setenv("CURL_CA_BUNDLE", certificate[0])
    with pytest.raises(Unavailable, match="ca_cert"):
        agent_at(tls_server.address, tls=True, token=TOKEN).call("GET", "/v1/kv/a")
    assert tls_server.requests == []


@pytest.mark.finding("E17")
@pytest.mark.filterwarnings("error")
def test_tls_without_verification(tls_server, caplog):
    """verify=false talks to anybody, and says so once, whatever Python does with warnings."""
    agent = agent_at(tls_server.address, tls=True, verify=False)
    for _ in range(3):
        assert agent.call("GET", "/v1/kv/a").status == 200
        tls_server.close_connections()
    assert poll(agent, agent.line()).status == 200
    (record,) = caplog.records
    assert (record.levelno, record.name) == (logging.WARNING, "consul_matchmaker.backends.http.api")
    assert "ca_cert" in record.getMessage()


@pytest.mark.finding("D11")
def test_the_cas_of_the_system_are_believed(tls_server, monkeypatch, certificate):
    """Without ca_cert those of OpenSSL count, which SSL_CERT_FILE names too, not certifi's."""
    monkeypatch.setenv("SSL_CERT_FILE", certificate[0])
    agent = agent_at(tls_server.address, tls=True)
    for _ in range(3):
        assert agent.call("GET", "/v1/kv/a").status == 200
    assert tls_server.connections == 1


def test_a_missing_ca_file_is_named(tls_server, tmp_path):
    """A wrong path is said, not a stack trace of a foreign library."""
    with pytest.raises(Unavailable, match=r"missing\.pem"):
        agent_at(tls_server.address, tls=True, ca_cert=str(tmp_path / "missing.pem")).call(
            "GET", "/v1/kv/a"
        )


def test_a_tls_poll_can_be_interrupted(tls_server, certificate):
    """One over TLS is woken as well."""
    tls_server.behave = waits_for_ever(tls_server)
    agent = agent_at(tls_server.address, tls=True, ca_cert=certificate[0])
    line = agent.line()
    waiting = polling(agent, line, tls_server)
    line.interrupt()
    with pytest.raises(Unavailable, match="given up"):
        waiting.result(DEADLINE_SECONDS)


def test_a_call_at_one_agent_goes_nowhere_else(server):
    """Its failure is its caller's alone: the others are asked as before."""
    agent = agent_at(server.address, "127.0.0.1:1")
    first, second = agent._settings.addresses
    assert agent.call("GET", "/v1/kv/a", at=first).address == first
    with pytest.raises(Unavailable):
        agent.call("GET", "/v1/kv/a", at=second)
    server.behave = lambda request: reply(500, b"CheckID is unknown")
    with pytest.raises(Unavailable, match="CheckID is unknown"):
        agent.call("PUT", "/v1/agent/check/pass/x", at=first)
    server.behave = lambda request: reply(403, b"")
    with pytest.raises(Denied, match='service "consul-matchmaker" write'):
        agent.call("PUT", "/v1/agent/check/pass/x", at=first)
    assert agent.status()["agents_away"] == []


# -- what is counted --------------------------------------------------------------------------


def test_queries_and_bytes_are_counted_exactly():
    """Of whole HTTP messages; a refused call is a reply, and an error of the agent's too."""
    answers = {
        "/v1/kv/a": reply(body=b"x" * 70_000),
        "/v1/kv/b": reply(404),
        "/v1/kv/c": reply(403),
    }
    with Server(lambda request: answers[request.path]) as server:
        agent = agent_at(server.address)
        agent.call("GET", "/v1/kv/a", {"keys": ""})
        agent.call("PUT", "/v1/kv/b", body=b"twelve bytes", accept=(404,))
        with pytest.raises(Denied):
            agent.call("GET", "/v1/kv/c")
        agent.call("GET", "/v1/kv/a", wait_seconds=1.0, line=agent.line())
    assert agent.wire() == {
        "http": {
            "queries": 4,
            "retries": 0,
            "replies": 4,
            "error_replies": 1,
            "sent_bytes": sum(request.size for request in server.requests),
            "received_bytes": sum(len(answers[request.path]) for request in server.requests),
        }
    }


def test_what_has_no_reply_is_counted_as_sent_only(server):
    """A repeated call is a query and a retry; nothing is sent where no connection comes about."""
    agent = agent_at(server.address)
    agent.call("GET", "/v1/kv/a")
    server.behave = lambda request: None
    with pytest.raises(Unavailable):
        agent.call("GET", "/v1/kv/a")
    counts = agent.wire()["http"]
    assert (counts["queries"], counts["retries"], counts["replies"]) == (3, 1, 1)
    assert counts["sent_bytes"] == sum(request.size for request in server.requests)
    nobody = agent_at("127.0.0.1:1")
    with pytest.raises(Unavailable):
        nobody.call("GET", "/v1/kv/a")
    assert set(nobody.wire()["http"].values()) == {0}
