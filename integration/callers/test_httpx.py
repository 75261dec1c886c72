"""The transports for httpx, threads and asyncio: what a program sees, what goes over the wire."""

from __future__ import annotations

import asyncio
import os
import socket
import ssl
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import h2.config
import h2.connection
import h2.events
import httpx
import pytest
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from consul_matchmaker import Matchmaker, Settings, aio
from consul_matchmaker.adapters.httpx import AsyncMatchmakerTransport, MatchmakerTransport
from consul_matchmaker.backends.memory import Memory
from consul_matchmaker.errors import ConfigurationError, NoLiveHosts, TimedOut, Unavailable
from consul_matchmaker.model import Host, Snapshot
from consul_matchmaker.testing.consul_probe import Node
from integration.callers.http_server import HttpServer, ServerProcess
from integration.callers.load import Load
from integration.callers.noted import NotingMatchmaker
from integration.callers.service import HANGS_SECONDS
from integration.rpc import certificates
from integration.waiting import until

WEB = "http://web.service.consul"
NOT_REPEATED = ["POST", "PATCH"]
REPEATED = ["GET", "HEAD", "OPTIONS", "PUT", "DELETE"]


class Threads:
    """httpx.Client and what belongs to it."""

    http = httpx.HTTPTransport

    def __init__(self, matchmaker: Matchmaker, **options: Any) -> None:
        self.transport = MatchmakerTransport(matchmaker, **options)
        self.client = httpx.Client(transport=self.transport)

    def request(self, method: str, url: str, **words: Any) -> httpx.Response:
        return self.client.request(method, url, **words)

    def get(self, url: str, **words: Any) -> httpx.Response:
        return self.request("GET", url, **words)

    def begin(self, url: str) -> httpx.Response:
        """An answer whose body is not read yet."""
        return self.client.send(self.client.build_request("GET", url), stream=True)

    def read(self, response: httpx.Response) -> bytes:
        return response.read()

    def let_go(self, response: httpx.Response) -> None:
        response.close()

    def body(self, parts: Iterator[bytes]) -> Any:
        """*parts* as what a request streams."""
        return parts

    def close(self) -> None:
        self.client.close()


class Tasks(Threads):
    """httpx.AsyncClient, on an event loop that runs while it is asked."""

    http = httpx.AsyncHTTPTransport  # type: ignore[assignment]

    def __init__(self, matchmaker: Matchmaker, **options: Any) -> None:
        self._loop = asyncio.new_event_loop()
        self.transport = AsyncMatchmakerTransport(  # type: ignore[assignment]
            aio.Matchmaker(matchmaker), **options
        )
        self.client = httpx.AsyncClient(transport=self.transport)  # type: ignore[assignment]

    def _run(self, awaited: Any) -> Any:
        return self._loop.run_until_complete(awaited)

    def request(self, method: str, url: str, **words: Any) -> httpx.Response:
        return self._run(self.client.request(method, url, **words))

    def begin(self, url: str) -> httpx.Response:
        return self._run(self.client.send(self.client.build_request("GET", url), stream=True))

    def read(self, response: httpx.Response) -> bytes:
        return self._run(response.aread())

    def let_go(self, response: httpx.Response) -> None:
        self._run(response.aclose())

    def body(self, parts: Iterator[bytes]) -> Any:
        async def awaited() -> AsyncIterator[bytes]:
            for part in parts:
                yield part

        return awaited()

    def close(self) -> None:
        self._run(self.client.aclose())  # type: ignore[attr-defined]
        self._loop.close()


Make = Callable[..., Any]


@pytest.fixture
def memory() -> Memory:
    return Memory()


@pytest.fixture
def mm(memory: Memory) -> Iterator[NotingMatchmaker]:
    with NotingMatchmaker(Settings(mode="kv"), backend=memory) as made:
        yield made


@pytest.fixture(params=[Threads, Tasks], ids=["threads", "asyncio"])
def kind(request: pytest.FixtureRequest) -> type[Threads]:
    return request.param


@pytest.fixture
def make(kind: type[Threads], mm: NotingMatchmaker) -> Iterator[Make]:
    """Makes clients of one kind: ``make(attempts=1)``."""
    made: list[Threads] = []

    def make(**options: Any) -> Threads:
        made.append(kind(options.pop("matchmaker", mm), **options))
        return made[-1]

    yield make
    for client in made:
        client.close()


@pytest.fixture
def servers(memory: Memory) -> Iterator[list[HttpServer]]:
    """Three that serve `web`."""
    with ExitStack() as stack:
        made = [stack.enter_context(HttpServer()) for _ in range(3)]
        memory.declare("web", [server.host for server in made])
        yield made


@contextmanager
def one_server(memory: Memory, **options: Any) -> Iterator[HttpServer]:
    """The only one that serves `web`."""
    with HttpServer(**options) as server:
        memory.declare("web", [server.host])
        yield server


def asked(servers: list[HttpServer]) -> list[int]:
    """How many requests each was sent."""
    return [len(server.requests) for server in servers]


# --- names, and what a caller sees of them -------------------------------------------------------


def test_a_topic_is_the_host_of_a_url(make: Make, servers: list[HttpServer]) -> None:
    """Each host gets its share, over one connection that is kept; the port in a URL is not used."""
    client = make()
    for _ in range(15):
        client.get(f"{WEB}/users")
        client.get("http://WEB.service.consul.:81/users")
    assert asked(servers) == [10, 10, 10]
    assert [server.connections for server in servers] == [1, 1, 1]


def test_the_wire_says_the_name_and_the_rest_to_the_byte(make: Make, memory: Memory) -> None:
    """Host header as in the URL; path, query, headers and body as sent to an ordinary URL."""
    rest = "/a%2Fb/%20c%25/;d=1?x=%2B+1&y=a/b&z=%C3%BC&=&q=?"
    words: dict[str, Any] = {"content": b"body", "headers": {"X-Own": "1", "x-own": "2"}}
    with one_server(memory) as server:
        client = make()
        got = client.request("POST", f"{WEB}:81{rest}", **words).json()
        plain = client.request("POST", f"http://{server.host}{rest}", **words).json()
    assert got["headers"].pop("host") == "web.service.consul:81"
    assert plain["headers"].pop("host") == str(server.host)
    assert got == plain
    assert (got["path"], got["body"]) == ("/a%2Fb/%20c%25/;d=1", "body")


def test_nothing_of_the_host_leaks(make: Make, servers: list[HttpServer]) -> None:
    """Not into the answer's URL, the request, the cookies, nor where a redirect leads."""
    client = make()
    response = client.get(f"{WEB}/in?cookie=a", headers={"X-Own": "1"})
    assert response.url == f"{WEB}/in?cookie=a"
    assert response.request.url == response.url
    assert response.request.extensions.keys() == {"timeout"}
    (cookie,) = client.client.cookies.jar
    assert cookie.domain == ".web.service.consul" or cookie.domain.startswith("web.service.consul")
    for _ in servers:
        assert client.get(f"{WEB}/").json()["headers"]["cookie"] == "a=1"
    moved = client.get(f"{WEB}/?to=/there", follow_redirects=True)
    assert moved.url == f"{WEB}/there"
    assert [each.url for each in moved.history] == [f"{WEB}/?to=/there"]


def test_an_ordinary_url_goes_through_as_it_is(make: Make, servers: list[HttpServer]) -> None:
    """Its host is not looked up, and is named in the Host header as always."""
    client = make()
    host = servers[0].host
    for _ in range(2):
        assert client.get(f"http://{host}/").json()["headers"]["host"] == str(host)
    assert servers[0].connections == 1
    servers[0].status = 503
    assert client.get(f"http://{host}/").status_code == 503
    assert asked(servers) == [3, 0, 0]


def test_it_can_be_mounted_for_its_names_only(mm: Matchmaker, servers: list[HttpServer]) -> None:
    """Other URLs are then for the client's own transport."""

    def elsewhere(request: httpx.Request) -> httpx.Response:
        return httpx.Response(200, text=f"elsewhere {request.url}")

    transport = MatchmakerTransport(mm)
    mounts = {"all://*.service.consul": transport}
    with httpx.Client(transport=httpx.MockTransport(elsewhere), mounts=mounts) as client:
        assert client.get(f"{WEB}/").json()["path"] == "/"
        assert client.get("http://example.org/").text == "elsewhere http://example.org/"


def test_the_suffix_is_a_setting(make: Make, servers: list[HttpServer]) -> None:
    """Then Consul's own is an ordinary name, which the ordinary transport is asked for."""
    seen: list[str] = []

    def note(request: httpx.Request) -> httpx.Response:
        seen.append(request.url.host)
        return httpx.Response(204)

    client = make(suffix=".Internal", transport=lambda: httpx.MockTransport(note))
    client.get("http://web.internal/")
    client.get(f"{WEB}/")
    assert seen == ["127.0.0.1", "web.service.consul"]


def test_an_ipv6_host_stands_in_brackets(make: Make, memory: Memory) -> None:
    """As URLs have it."""
    memory.declare("web", ["[::1]:9501"])
    seen: list[str] = []

    def note(request: httpx.Request) -> httpx.Response:
        seen.append(str(request.url))
        return httpx.Response(204)

    client = make(transport=lambda: httpx.MockTransport(note))
    assert client.get(f"{WEB}/x").url == f"{WEB}/x"
    assert seen == ["http://[::1]:9501/x"]


def test_what_cannot_work_is_said_when_a_transport_is_made(mm: Matchmaker) -> None:
    """The wrong matchmaker, a transport that is shared, no attempts, a suffix without its dot."""
    wrong: list[tuple[Any, dict[str, Any], str]] = [
        (aio.Matchmaker(mm), {}, "takes a Matchmaker"),
        (mm, {"transport": httpx.HTTPTransport()}, "function that makes one"),
        (mm, {"attempts": 0}, "attempts must be"),
        (mm, {"suffix": "consul"}, "suffix must begin"),
    ]
    for matchmaker, options, what in wrong:
        with pytest.raises(ConfigurationError, match=what):
            MatchmakerTransport(matchmaker, **options)
    with pytest.raises(ConfigurationError, match=r"takes an aio\.Matchmaker"):
        AsyncMatchmakerTransport(mm)  # type: ignore[arg-type]


# --- a host fails --------------------------------------------------------------------------------


@pytest.mark.parametrize("status", [502, 503, 504])
def test_a_host_that_cannot_serve_is_left(
    make: Make, mm: NotingMatchmaker, servers: list[HttpServer], status: int
) -> None:
    """No caller sees it, its discarded answers are closed, and it is rejected."""
    client = make()
    servers[0].status = status
    assert {client.get(f"{WEB}/").status_code for _ in range(12)} == {200}
    assert len(servers[0].requests) >= 1
    assert set(mm.bad) == {servers[0].host}
    assert mm.busy == []
    until(lambda: not servers[0].open, 30, "the connections of discarded answers are closed")


def test_another_status_is_an_answer(
    make: Make, mm: NotingMatchmaker, servers: list[HttpServer]
) -> None:
    """500 is the program's, 429 and 404 the caller's: none of them is repeated."""
    client = make()
    for status in (500, 501, 404, 429, 301):
        assert client.get(f"{WEB}/?status={status}").status_code == status
    assert sum(asked(servers)) == 5
    assert mm.bad == []


@pytest.mark.parametrize("method", REPEATED)
def test_an_idempotent_request_is_repeated(
    make: Make, servers: list[HttpServer], method: str
) -> None:
    """With its body, when the connection breaks before there is an answer."""
    servers[0].drops = servers[1].drops = 1
    client = make()
    for _ in range(3):
        assert client.request(method, f"{WEB}/", content=b"body").status_code == 200
    assert sum(asked(servers)) == 5
    assert {one["body"] for server in servers for one in server.requests} == {"body"}


@pytest.mark.parametrize("method", NOT_REPEATED)
def test_what_may_have_been_executed_is_not_repeated(
    make: Make, mm: NotingMatchmaker, memory: Memory, method: str
) -> None:
    """The status, or the exception, is the caller's; the host is rejected all the same."""
    with one_server(memory) as server:
        client = make()
        server.status = 503
        assert client.request(method, f"{WEB}/").status_code == 503
        server.drops = 1
        with pytest.raises(httpx.RemoteProtocolError):
            client.request(method, f"{WEB}/")
        assert len(server.requests) == 2
        assert mm.bad == [server.host] * 2
        assert mm.busy == []


@pytest.mark.parametrize("method", [*REPEATED, *NOT_REPEATED])
def test_what_was_never_sent_is_sent_elsewhere(
    make: Make,
    memory: Memory,
    mm: NotingMatchmaker,
    refusing: Callable[[], Host],
    method: str,
) -> None:
    """Whatever its method, and also if its body can be read only once: nobody has read it."""
    with HttpServer() as server:
        nobody = refusing()
        memory.declare("web", [nobody, server.host])
        client = make()
        for _ in range(4):
            body = client.body(iter([b"in ", b"parts"]))
            assert client.request(method, f"{WEB}/", content=body).status_code == 200
        assert {one["body"] for one in server.requests} == {"in parts"}
        assert set(mm.bad) == {nobody}


def test_a_body_that_was_read_is_not_sent_again(make: Make, servers: list[HttpServer]) -> None:
    """Half of it would be missing."""
    for server in servers:
        server.status = 503
    client = make()
    body = client.body(iter([b"in ", b"parts"]))
    assert client.request("PUT", f"{WEB}/", content=body).status_code == 503
    assert sum(asked(servers)) == 1
    assert client.request("PUT", f"{WEB}/", content=b"whole").status_code == 503
    assert sum(asked(servers)) == 4


@pytest.mark.parametrize("error", [ValueError("no more"), httpx.ReadError("of the source")])
def test_a_body_that_fails_says_nothing_of_the_host(
    make: Make, mm: NotingMatchmaker, memory: Memory, error: Exception
) -> None:
    """Not even where it is read by httpx from somewhere else; the exception is the caller's."""

    def parts() -> Iterator[bytes]:
        yield b"in "
        raise error

    with one_server(memory):
        client = make()
        with pytest.raises(type(error), match=str(error)):
            client.request("PUT", f"{WEB}/", content=client.body(parts()))
        assert (mm.good, mm.bad, mm.busy) == ([], [], [])


def test_each_host_is_tried_once_and_the_last_answer_is_given(
    make: Make, mm: NotingMatchmaker, servers: list[HttpServer]
) -> None:
    """Up to the number of attempts."""
    for server in servers:
        server.status = 503
    assert make().get(f"{WEB}/").status_code == 503
    assert asked(servers) == [1, 1, 1]
    assert make(attempts=2).get(f"{WEB}/").status_code == 503
    assert sum(asked(servers)) == 5
    assert len(mm.bad) == 5


def test_one_attempt_turns_failover_off(
    make: Make, memory: Memory, refusing: Callable[[], Host]
) -> None:
    """The failure of the first host is the caller's."""
    with one_server(memory) as server:
        client = make(attempts=1)
        server.status = 503
        assert client.get(f"{WEB}/").status_code == 503
        server.drops = 1
        with pytest.raises(httpx.RemoteProtocolError):
            client.get(f"{WEB}/")
        memory.declare("web", [refusing()])
    with pytest.raises(httpx.ConnectError):
        client.get(f"{WEB}/")
    assert len(server.requests) == 2


def test_a_server_that_closed_its_kept_connections_costs_no_request(
    make: Make, mm: NotingMatchmaker, servers: list[HttpServer]
) -> None:
    """They are found closed before they are used, also for what cannot be repeated."""
    client = make()
    for _ in range(3):
        for _ in servers:
            client.request("POST", f"{WEB}/")
        for server in servers:
            server.hang_up()
            until(lambda server=server: not server.open, 30, "it is broken")
    assert asked(servers) == [3, 3, 3]
    assert [server.connections for server in servers] == [3, 3, 3]
    assert mm.bad == []


def test_a_host_that_is_too_slow_is_left(make: Make, mm: NotingMatchmaker, memory: Memory) -> None:
    """A timeout of the client is a failure of the host; what may not be repeated raises it."""
    with HttpServer() as slow, HttpServer() as good:
        slow.seconds = 60
        memory.declare("web", [slow.host, good.host])
        client = make()
        for _ in range(4):
            assert client.get(f"{WEB}/", timeout=HANGS_SECONDS).json()["host"] == str(good.host)
        assert set(mm.bad) == {slow.host}
        memory.declare("slow", [slow.host])
        with pytest.raises(httpx.ReadTimeout):
            client.request("POST", "http://slow.service.consul/", timeout=HANGS_SECONDS)
        assert mm.busy == []


def test_after_the_head_of_an_answer_nothing_is_repeated(
    make: Make, mm: NotingMatchmaker, memory: Memory
) -> None:
    """A body that breaks off raises, as part of it may have been used."""
    with one_server(memory) as server:
        server.cuts = 1
        with pytest.raises(httpx.RemoteProtocolError):
            make().get(f"{WEB}/")
        assert len(server.requests) == 1
        assert mm.busy == []


def test_an_url_that_cannot_be_sent_says_nothing_of_the_host(
    make: Make, mm: NotingMatchmaker, memory: Memory
) -> None:
    """Another scheme, and a header that h11 refuses: raised at once."""
    with one_server(memory):
        client = make()
        with pytest.raises(httpx.UnsupportedProtocol):
            client.get("ftp://web.service.consul/")
        with pytest.raises(httpx.LocalProtocolError):
            client.get(f"{WEB}/", headers={"X-Bad": "a\nb"})
        assert (mm.good, mm.bad, mm.busy) == ([], [], [])


def test_a_full_pool_says_nothing_of_the_host(
    make: Make, kind: type[Threads], mm: NotingMatchmaker, memory: Memory
) -> None:
    """It is never rejected; another host that has room gets the request, whatever its method."""
    limits = httpx.Limits(max_connections=1)
    client = make(transport=lambda: kind.http(limits=limits))
    timeout = httpx.Timeout(5, pool=0.2)
    with one_server(memory):
        held = client.begin(f"{WEB}/")
        with pytest.raises(httpx.PoolTimeout):
            client.request("POST", f"{WEB}/", timeout=timeout)
        client.let_go(held)
    with HttpServer() as one, HttpServer() as two:
        memory.declare("two", [one.host, two.host])
        url = "http://two.service.consul/"
        held = client.begin(url)
        for _ in range(2):
            assert client.request("POST", url, timeout=timeout).status_code == 200
        client.let_go(held)
        assert sorted(asked([one, two])) == [1, 2]
    assert (mm.bad, mm.busy) == ([], [])


@pytest.mark.parametrize(
    ("host", "what"),
    [
        (Host.opaque("a\nb"), r"bad: a\\nb is no host of a URL"),
        (Host("a b/c?d", 80), None),  # what the name service says of it
        (Host("x" * 70_000, 80), "bad: x{200} is no host of a URL"),
    ],
    ids=["opaque", "strange", "long"],
)
def test_a_host_that_no_url_can_have_is_left(
    make: Make, mm: NotingMatchmaker, memory: Memory, host: Host, what: str | None
) -> None:
    """Anybody may have registered it; where there is no other it is a connection error."""
    with HttpServer() as good:
        memory.declare("web", [host, good.host])
        memory.declare("bad", [host])
        client = make()
        for _ in range(4):
            assert client.request("POST", f"{WEB}/").status_code == 200
        with pytest.raises(httpx.ConnectError, match=what):
            client.get("http://bad.service.consul/")
        assert set(mm.bad) == {host}
        assert mm.busy == []


# --- no host, no Consul --------------------------------------------------------------------------


def test_a_topic_that_nobody_serves_is_a_connection_error(make: Make, memory: Memory) -> None:
    """With what this library says as its cause, and the request that it is about."""
    with pytest.raises(httpx.ConnectError, match="no host serves nobody now") as caught:
        make().get("http://nobody.service.consul/x")
    assert isinstance(caught.value.__cause__, NoLiveHosts)
    assert caught.value.request.url == "http://nobody.service.consul/x"


def test_consul_away_is_a_connection_error(make: Make, memory: Memory) -> None:
    """So whoever handles a server that is away handles this."""
    memory.is_available = False
    with pytest.raises(httpx.ConnectError) as caught:
        make().get(f"{WEB}/")
    assert isinstance(caught.value.__cause__, Unavailable)


def test_a_failure_says_more_than_that_no_host_is_left(make: Make, memory: Memory) -> None:
    """Where none can be found for the next attempt, the last one's failure is raised as it was."""
    memory.declare("web", ["127.0.0.1:9501"])
    with Matchmaker(Settings(mode="kv"), backend=memory) as mm:

        def fail(request: httpx.Request) -> httpx.Response:
            mm.close()
            raise httpx.ReadError("broken") from ConnectionResetError()

        client = make(matchmaker=mm, transport=lambda: httpx.MockTransport(fail))
        with pytest.raises(httpx.ReadError, match="broken") as caught:
            client.get(f"{WEB}/")
    assert isinstance(caught.value.__cause__, ConnectionResetError)


class Hanging(Memory):
    """Consul that does not answer before it is told to."""

    longest_lookup_seconds = 30.0

    def __init__(self) -> None:
        super().__init__()
        self.go_on = threading.Event()

    def lookup(
        self, topic: str, server: str | None = None, *, timeout_seconds: float = 0.0
    ) -> Snapshot:
        if not self.go_on.wait(timeout_seconds):
            raise TimedOut("it hangs")
        return super().lookup(topic, server)


def test_consul_that_hangs_is_waited_for_as_long_as_for_a_connection(make: Make) -> None:
    """It is the client's ConnectTimeout; once Consul answers the next request is sent."""
    hanging = Hanging()
    with one_server(hanging), Matchmaker(Settings(mode="kv"), backend=hanging) as mm:
        client = make(matchmaker=mm)
        try:
            with pytest.raises(httpx.ConnectTimeout) as caught:
                client.get(f"{WEB}/", timeout=httpx.Timeout(20, connect=0.2))
            assert isinstance(caught.value.__cause__, TimedOut)
        finally:
            hanging.go_on.set()
        assert client.get(f"{WEB}/", timeout=20).status_code == 200


def test_an_event_loop_goes_on_while_consul_is_asked() -> None:
    """Also where it hangs."""

    async def main(hanging: Hanging, mm: Matchmaker) -> None:
        transport = AsyncMatchmakerTransport(aio.Matchmaker(mm))
        async with httpx.AsyncClient(transport=transport, timeout=20) as client:
            running = asyncio.create_task(client.get(f"{WEB}/"))
            for _ in range(10):
                await asyncio.sleep(0.01)
            assert not running.done()
            hanging.go_on.set()
            assert (await running).status_code == 200

    hanging = Hanging()
    with one_server(hanging), Matchmaker(Settings(mode="kv"), backend=hanging) as mm:
        asyncio.run(main(hanging, mm))


# --- what a host is busy with, and its connections -----------------------------------------------


def test_a_host_is_busy_until_the_body_is_read_or_closed(
    make: Make, mm: NotingMatchmaker, memory: Memory
) -> None:
    """It is judged when the head is there."""
    with one_server(memory) as server:
        client = make()
        first, second = (client.begin(f"{WEB}/?size=100000") for _ in range(2))
        assert mm.good == mm.busy == [server.host] * 2
        assert len(client.read(first)) == 100_000
        assert len(mm.busy) == 1
        client.let_go(second)
        assert mm.busy == []


def test_reading_that_is_broken_off_ends_the_attempt(
    kind: type[Threads], make: Make, mm: NotingMatchmaker, memory: Memory
) -> None:
    """By an iterator that is closed, or a task that is cancelled; as httpx closes its connection
    then, also where nobody closes the answer."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        memory.declare("web", [Host(*listener.getsockname())])
        client = make()

        def serve() -> None:
            connection, _ = listener.accept()
            connection.recv(65536)
            connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nhalf ")
            assert connection.recv(1) == b"", "the client closes it"
            connection.close()

        with ThreadPoolExecutor() as threads:
            server = threads.submit(serve)
            response = client.begin(f"{WEB}/")
            assert len(mm.busy) == 1
            if kind is Threads:
                parts = response.iter_raw()
                assert next(parts) == b"half "
                parts.close()
            else:
                with pytest.raises(asyncio.TimeoutError):
                    client._run(asyncio.wait_for(response.aread(), 0.05))
            server.result(5)
        assert mm.busy == []
        assert not response.is_closed


def test_an_answer_that_was_read_already_keeps_nobody_busy(
    make: Make, mm: NotingMatchmaker, servers: list[HttpServer]
) -> None:
    """As those of httpx.MockTransport and of caches are; the caller has it as it is."""

    def answer(request: httpx.Request) -> httpx.Response:
        return httpx.Response(200, json={"to": str(request.url)})

    client = make(transport=lambda: httpx.MockTransport(answer))
    assert client.get(f"{WEB}/x").json()["to"].startswith("http://127.0.0.1:")
    assert mm.busy == []


def test_connections_to_a_host_that_left_are_closed(make: Make, memory: Memory) -> None:
    """By the next request for the topic; what is being answered is answered, then it is closed."""
    quick = Settings(mode="kv", ttl_seconds=0.05, stale_while_revalidate_seconds=0)
    with (
        NotingMatchmaker(quick, backend=memory) as mm,
        HttpServer() as leaves,
        HttpServer() as stays,
    ):

        def declare(*hosts: Host) -> None:
            memory.declare("web", hosts)
            until(lambda: set(mm.hosts("web")) == set(hosts), 30, "the new hosts are found")

        declare(leaves.host)
        client = make(matchmaker=mm)
        size = 3_000_000  # more than the sockets hold
        running = client.begin(f"{WEB}/?size={size}")
        client.get(f"{WEB}/")
        assert len(leaves.open) == 2
        declare(stays.host)
        for _ in range(2):
            assert client.get(f"{WEB}/").json()["host"] == str(stays.host)
        assert len(client.read(running)) == size
        until(lambda: not leaves.open, 30, "the connections to the host that left are closed")
        assert len(stays.open) == stays.connections == 1
        declare(leaves.host, stays.host)
        assert {client.get(f"{WEB}/").json()["host"] for _ in range(4)} == {
            str(leaves.host),
            str(stays.host),
        }
        declare(stays.host)
        client.get(f"{WEB}/")
        until(lambda: not leaves.open, 30, "also where nothing is being answered")
        assert mm.busy == []


def test_closing_the_client_closes_its_connections(
    make: Make, mm: NotingMatchmaker, servers: list[HttpServer]
) -> None:
    """Also those to ordinary hosts; not the matchmaker, which is the caller's."""
    client = make()
    for _ in servers:
        client.get(f"{WEB}/")
    client.get(f"http://{servers[0].host}/")
    assert [len(server.open) for server in servers] == [2, 1, 1]
    close = getattr(client.transport, "aclose", None) or client.transport.close
    for _ in range(2):
        result = close()
        if result is not None:
            client._run(result)
    for server in servers:
        until(lambda server=server: not server.open, 30, "closed")
    assert not mm.is_closed
    assert len(mm.hosts("web")) == 3


def test_names_that_nobody_serves_leave_nothing(make: Make, memory: Memory) -> None:
    """Whoever may choose the name in a URL cannot fill the memory of the client."""
    client = make()
    for number in range(20):
        with pytest.raises(httpx.ConnectError):
            client.get(f"http://nobody{number}.service.consul/")
    assert client.transport._calls._hosts == client.transport._calls._pools == {}


def test_a_forked_child_has_connections_of_its_own(mm: NotingMatchmaker, memory: Memory) -> None:
    """Two processes must not speak over one."""
    with one_server(memory) as server, httpx.Client(transport=MatchmakerTransport(mm)) as client:
        client.get(f"{WEB}/")
        child = os.fork()
        if child == 0:
            status = 1
            try:
                status = 0 if client.get(f"{WEB}/of-child").status_code == 200 else 2
            finally:
                os._exit(status)
        assert os.waitpid(child, 0)[1] == 0
        client.get(f"{WEB}/")
        assert server.connections == 2
        assert [one["path"] for one in server.requests] == ["/", "/of-child", "/"]


def test_a_cancelled_request_says_nothing_of_the_host(mm: NotingMatchmaker, memory: Memory) -> None:
    """The host is not busy with it any more, and the client goes on."""

    async def main(server: HttpServer) -> None:
        transport = AsyncMatchmakerTransport(aio.Matchmaker(mm))
        async with httpx.AsyncClient(transport=transport) as client:
            running = asyncio.create_task(client.get(f"{WEB}/?seconds=30"))
            while not server.requests:
                await asyncio.sleep(0.01)
            assert mm.busy == [server.host]
            running.cancel()
            with pytest.raises(asyncio.CancelledError):
                await running
            assert (mm.good, mm.bad, mm.busy) == ([], [], [])
            assert (await client.get(f"{WEB}/")).status_code == 200

    with one_server(memory) as server:
        asyncio.run(main(server))


# --- TLS and HTTP/2 ------------------------------------------------------------------------------


def test_tls_verifies_the_name_for_each_name(
    make: Make, kind: type[Threads], memory: Memory, tmp_path: Path
) -> None:
    """The server is told the name by SNI; a connection that was verified for one name never serves
    another name of the same host, nor the host's own address."""
    made = certificates.make(tmp_path, "web.service.consul")
    told: list[str | None] = []
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(made.certificate, made.key)
    context.sni_callback = lambda _socket, name, _context: told.append(name)
    trusting = ssl.create_default_context(cafile=made.authority)
    client = make(transport=lambda: kind.http(verify=trusting))
    with one_server(memory, tls=context) as server:
        memory.declare("other", [server.host])
        for _ in range(2):
            assert client.get("https://web.service.consul/").status_code == 200
        assert (told, server.connections) == (["web.service.consul"], 1)
        with pytest.raises(httpx.ConnectError, match=r"(?i)hostname mismatch"):
            client.get("https://other.service.consul/")
        assert "other.service.consul" in told
        with_dot = make(transport=lambda: kind.http(verify=trusting))
        assert with_dot.get("https://web.service.consul./").status_code == 200
        before = server.connections
        assert client.get(f"https://{server.host}/").status_code == 200
        assert server.connections == before + 1
    with pytest.raises(httpx.ConnectError):
        make().get("https://web.service.consul/")


class Http2Server:
    """Speaks HTTP/2 without TLS, on one thread a connection; answers with the :authority."""

    def __init__(self) -> None:
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.host = Host("127.0.0.1", self._socket.getsockname()[1])
        self.connections = 0
        self.goes_away = False
        """Whether it closes the connection at the next request, and says so."""
        self._thread = threading.Thread(target=self._accept, daemon=True)
        self._thread.start()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._socket.accept()
            except OSError:
                return
            self.connections += 1
            threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        config = h2.config.H2Configuration(client_side=False)
        state = h2.connection.H2Connection(config)
        state.initiate_connection()
        with connection:
            connection.sendall(state.data_to_send())
            while data := connection.recv(65536):
                for event in state.receive_data(data):
                    if not isinstance(event, h2.events.RequestReceived):
                        continue
                    assert event.stream_id is not None and event.headers is not None
                    if self.goes_away:
                        state.close_connection(last_stream_id=0)
                        connection.sendall(state.data_to_send())
                        return
                    headers = {bytes(name): bytes(value) for name, value in event.headers}
                    state.send_headers(event.stream_id, [(":status", "200")])
                    state.send_data(event.stream_id, headers[b":authority"], end_stream=True)
                connection.sendall(state.data_to_send())

    def __enter__(self) -> Http2Server:
        return self

    def __exit__(self, *exc_info: object) -> None:
        # Or the thread, once stopped and continued, accepts at whatever has the descriptor then.
        self._socket.shutdown(socket.SHUT_RDWR)
        self._thread.join()
        self._socket.close()


def test_http2_where_the_inner_transport_speaks_it(
    make: Make, kind: type[Threads], memory: Memory
) -> None:
    """One connection for all requests to a host; one that goes away is left."""
    with Http2Server() as one, Http2Server() as two:
        memory.declare("web", [one.host, two.host])
        client = make(transport=lambda: kind.http(http1=False, http2=True))
        for _ in range(6):
            response = client.get(f"{WEB}/")
            assert (response.http_version, response.text) == ("HTTP/2", "web.service.consul")
        assert (one.connections, two.connections) == (1, 1)
        one.goes_away = True
        for _ in range(6):
            assert client.get(f"{WEB}/").text == "web.service.consul"
        assert two.connections == 1


# --- spans ---------------------------------------------------------------------------------------


def test_the_current_span_names_the_host(
    make: Make, memory: Memory, refusing: Callable[[], Host]
) -> None:
    """The one that answered, where several were tried."""
    exporter = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    with HttpServer() as server:
        memory.declare("web", [refusing(), server.host])
        client = make()
        for _ in range(2):
            with provider.get_tracer("test").start_as_current_span("call"):
                client.get(f"{WEB}/")
    for span in exporter.get_finished_spans():
        assert span.attributes is not None
        assert span.attributes["server.address"] == "127.0.0.1"
        assert span.attributes["server.port"] == server.host.port


# --- on a real Consul ----------------------------------------------------------------------------


@contextmanager
def killed_under_load(
    agent: Node, topic: str, load: Load
) -> Iterator[tuple[Matchmaker, Callable[[], None]]]:
    """Three server processes of *topic*; what is yielded kills one, once it had its share, and
    returns when the others have had 1,000 more requests and Consul does not show it any more."""
    url = f"consul+service://{agent.http}"
    with ExitStack() as stack:
        processes = [stack.enter_context(ServerProcess(topic, url)) for _ in range(3)]
        hosts = [process.wait_until_registered() for process in processes]
        mm = stack.enter_context(Matchmaker.from_url(url))
        until(lambda: len(mm.hosts(topic)) == 3, 30, "three are found")

        def kill() -> None:
            until(lambda: min(load.answers[str(host)] for host in hosts) >= 100, 30, "load")
            processes[0].kill()
            before = load.asked
            until(lambda: load.asked >= before + 1000, 60, "load without it")
            until(lambda: hosts[0] not in mm.hosts(topic), 30, "it has left")

        yield mm, kill


def report(load: Load) -> None:
    print(f"{len(load.failures)} of {load.asked} failed; answered: {dict(load.answers)}")
    assert load.failures == []


def test_a_killed_server_fails_no_idempotent_request(agent: Node, topic: str) -> None:
    """SIGKILL of one of three under about 500 requests a second: 0 of them fail."""
    with (
        Load() as load,
        killed_under_load(agent, topic, load) as (mm, kill),
        httpx.Client(transport=MatchmakerTransport(mm)) as client,
    ):
        url = f"http://{topic}.service.consul/"
        load.start(lambda: str(client.get(url).raise_for_status().json()["host"]))
        kill()
        load.stop()
    report(load)


def test_a_killed_server_fails_no_awaited_idempotent_request(agent: Node, topic: str) -> None:
    """The same for asyncio."""

    async def main(mm: Matchmaker, kill: Callable[[], None], load: Load) -> None:
        transport = AsyncMatchmakerTransport(aio.Matchmaker(mm))
        async with httpx.AsyncClient(transport=transport) as client:

            async def ask() -> str:
                response = await client.get(f"http://{topic}.service.consul/")
                return str(response.raise_for_status().json()["host"])

            running = asyncio.create_task(load.run_awaited(ask))
            try:
                await asyncio.get_running_loop().run_in_executor(None, kill)
            finally:
                load.stop()
                await running

    with Load() as load, killed_under_load(agent, topic, load) as (mm, kill):
        asyncio.run(main(mm, kill, load))
    report(load)
