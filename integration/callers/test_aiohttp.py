"""The middleware of aiohttp: what it asks, whom, and what of that anybody sees."""

from __future__ import annotations

import asyncio
import io
import socket
import ssl
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import ExitStack, asynccontextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp import web
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider

from consul_matchmaker import Matchmaker, aio
from consul_matchmaker.adapters.aiohttp import matchmaker_middleware
from consul_matchmaker.errors import Closed, ConfigurationError, NoLiveHosts, Unavailable
from consul_matchmaker.model import Host
from consul_matchmaker.testing.consul_probe import Node
from integration.callers.http_server import HttpServer, ServerProcess
from integration.callers.load import Load
from integration.callers.service import (
    FAILURES,
    HANGS_SECONDS,
    SECONDS,
    TOPIC,
    URL,
    Proxy,
    Service,
    break_,
    certified,
    deaf_host,
    left_alone,
)
from integration.waiting import until

QUICK = aiohttp.ClientTimeout(total=SECONDS, sock_read=HANGS_SECONDS)
SENDS_FILES_AGAIN = tuple(map(int, version("aiohttp").split(".")[:3])) >= (3, 12, 1)


@asynccontextmanager
async def session_of(
    matchmaker: Matchmaker, *others: Any, middleware: dict[str, Any] | None = None, **options: Any
) -> AsyncIterator[aiohttp.ClientSession]:
    """With *others* before ours."""
    ours = matchmaker_middleware(aio.Matchmaker(matchmaker), **(middleware or {}))
    options = {"timeout": aiohttp.ClientTimeout(total=SECONDS), **options}
    async with aiohttp.ClientSession(middlewares=(*others, ours), **options) as session:
        yield session


async def said(answer: aiohttp.ClientResponse) -> Any:
    return await answer.json(content_type=None)


def on_loop(service: Service, play: Callable[[aiohttp.ClientSession], Awaitable[None]]) -> None:
    """Run *play* with a session."""

    async def played() -> None:
        async with session_of(service.matchmaker) as session:
            await play(session)

    asyncio.run(played())


async def eventually(claim: Callable[[], object], what: str) -> None:
    """As `until`, with a loop that runs meanwhile, for some turns in any case."""
    for _ in range(1500):
        await asyncio.sleep(0.02)
        if claim():
            return
    pytest.fail(f"not within 30 s: {what}")


# -- whom it asks, and what anybody sees of that


def test_requests_take_turns_on_kept_connections(service: Service) -> None:
    """A dozen requests to two hosts are six each, on one connection each."""

    async def play(session: aiohttp.ClientSession) -> None:
        for _ in range(12):
            async with session.get(f"{URL}/") as answer:
                assert answer.status == 200
                await answer.read()

    on_loop(service, play)
    assert service.asked == [6, 6]
    assert [server.connections for server in service.servers] == [1, 1]


def test_the_name_is_all_that_anybody_sees(service: Service) -> None:
    """The URLs of the response and its history, cookies, and the Host header have the name."""

    async def play(session: aiohttp.ClientSession) -> None:
        url = f"{URL}/orders?to=/paid&cookie=a"
        async with session.get(url) as answer:
            assert str(answer.url) == str(answer.real_url) == f"{URL}/paid"
            assert str(answer.request_info.url) == str(answer.request_info.real_url)
            assert str(answer.request_info.url) == f"{URL}/paid"
            assert answer.host == "web.service.consul"
            assert [str(one.url) for one in answer.history] == [url]
            assert {cookie["domain"] for cookie in session.cookie_jar} == {"web.service.consul"}
            told = await said(answer)
        assert told["headers"]["host"] == "web.service.consul"
        assert told["headers"]["cookie"] == "a=1", "whichever host set it"

    on_loop(service, play)


def test_raise_for_status_has_the_name(service: Service) -> None:
    """The error says the URL that the user wrote."""

    async def play(session: aiohttp.ClientSession) -> None:
        with pytest.raises(aiohttp.ClientResponseError) as raised:
            await session.get(f"{URL}/?status=404", raise_for_status=True)
        assert str(raised.value.request_info.url) == f"{URL}/?status=404"
        assert f"url='{URL}/?status=404'" in str(raised.value)

    on_loop(service, play)


def test_a_trace_has_the_name_and_what_is_sent_to_a_host_that_host(service: Service) -> None:
    """The request of a trace is the user's; its headers go to one host."""
    seen: list[tuple[str, str]] = []
    trace = aiohttp.TraceConfig()

    def noted(what: str) -> Any:
        async def note(session: Any, context: Any, params: Any) -> None:
            seen.append((what, str(params.url)))

        return note

    trace.on_request_start.append(noted("start"))
    trace.on_request_headers_sent.append(noted("sent"))
    trace.on_request_end.append(noted("end"))
    broken = service.next
    broken.status = 503

    async def play() -> None:
        async with session_of(service.matchmaker, trace_configs=[trace]) as session:
            (await session.get(f"{URL}/a")).release()

    asyncio.run(play())
    other = next(host for host in service.hosts if host != broken.host)
    assert seen == [
        ("start", f"{URL}/a"),
        ("sent", f"http://{broken.host}/a"),
        ("sent", f"http://{other}/a"),
        ("end", f"{URL}/a"),
    ]


@pytest.mark.parametrize(
    ("url", "host"),
    [
        ("http://WEB.Service.Consul/", "web.service.consul"),
        ("http://web.service.consul./", "web.service.consul."),
        ("http://web.service.consul:81/", "web.service.consul:81"),
        ("http://me:secret@web.service.consul/", "web.service.consul"),
    ],
)
def test_the_host_header_says_what_the_url_does(url: str, host: str, service: Service) -> None:
    """A port in the URL is said, but chooses no port; a password is not said."""

    async def play(session: aiohttp.ClientSession) -> None:
        async with session.get(url) as answer:
            assert (await said(answer))["headers"]["host"].rstrip(".") == host.rstrip(".")

    on_loop(service, play)


def test_other_middlewares_see_the_name(service: Service) -> None:
    """Those before ours, before and after the request; they may send it again."""
    seen = []

    async def twice(request: aiohttp.ClientRequest, handler: Any) -> aiohttp.ClientResponse:
        for _ in range(2):
            answer: aiohttp.ClientResponse = await handler(request)
            seen.append(str(request.url))
            if answer.status == 200:
                return answer
            answer.release()
        raise AssertionError

    for server in service.servers:
        server.status = 404

    async def play() -> None:
        async with session_of(service.matchmaker, twice) as session:
            with pytest.raises(AssertionError):
                await session.get(f"{URL}/")

    asyncio.run(play())
    assert seen == [f"{URL}/"] * 2
    assert service.asked == [1, 1]


def test_a_redirect_to_elsewhere_tells_elsewhere_nothing(service: Service) -> None:
    """A server that is no service of ours gets its own name as the Host header."""
    with HttpServer() as other:

        async def play(session: aiohttp.ClientSession) -> None:
            async with session.get(f"{URL}/?to=http://{other.host}/there") as answer:
                assert (await said(answer))["headers"]["host"] == str(other.host)
                assert str(answer.url) == f"http://{other.host}/there"

        on_loop(service, play)


def test_ordinary_urls_go_where_they_always_went(service: Service) -> None:
    """An address, and a name that only looks like one of ours, are nothing for the matchmaker."""

    async def play(session: aiohttp.ClientSession) -> None:
        async with session.get(f"http://{service.hosts[0]}/") as answer:
            assert str(answer.url) == f"http://{service.hosts[0]}/"
        with pytest.raises(aiohttp.ClientConnectorError):
            await session.get("http://web.service.consul.invalid/")

    on_loop(service, play)
    assert service.asked == [1, 0]
    assert service.matchmaker.good == []


def test_another_suffix(service: Service) -> None:
    """With a suffix of one's own, Consul's is an ordinary name."""

    async def play() -> None:
        async with session_of(service.matchmaker, middleware={"suffix": ".mesh"}) as session:
            async with session.get("http://web.mesh/") as answer:
                assert str(answer.url) == "http://web.mesh/"
            with pytest.raises(aiohttp.ClientConnectorError):
                await session.get("http://web.service.invalid/")

    asyncio.run(play())


# -- failover


@pytest.mark.parametrize("failure", FAILURES)
def test_what_may_be_repeated_goes_to_another_host(failure: str, service: Service) -> None:
    """The host that failed is rejected, the other one answers; nobody is busy afterwards."""
    broken = service.next
    break_(broken, failure)

    async def play(session: aiohttp.ClientSession) -> None:
        async with session.get(f"{URL}/", timeout=QUICK) as answer:
            assert answer.status == 200
            await answer.read()

    on_loop(service, play)
    assert service.matchmaker.bad == [broken.host]
    assert service.matchmaker.good == [host for host in service.hosts if host != broken.host]
    assert service.matchmaker.busy == []


@pytest.mark.parametrize("failure", FAILURES)
def test_what_may_have_been_executed_is_not_repeated(failure: str, service: Service) -> None:
    """POST is sent once: only a host that got nothing of it is no reason to give up."""
    broken = service.next
    break_(broken, failure)
    expected = {
        "stops": 200,
        "drops": aiohttp.ServerDisconnectedError,
        "hangs": aiohttp.ServerTimeoutError,
    }

    async def play(session: aiohttp.ClientSession) -> None:
        outcome: object
        try:
            async with session.post(f"{URL}/", data="x", timeout=QUICK) as answer:
                outcome = answer.status
        except aiohttp.ServerTimeoutError:
            outcome = aiohttp.ServerTimeoutError
        except aiohttp.ClientError as error:
            outcome = type(error)
        assert outcome == expected.get(failure) or outcome == int(failure)

    on_loop(service, play)
    assert sum(service.asked) == 1
    assert service.matchmaker.bad == [broken.host]
    assert service.matchmaker.busy == []


def test_a_host_that_does_not_accept_gets_nothing() -> None:
    """A connection that takes too long to be made is the host's failure, for POST as well."""
    with Service(1) as service, ExitStack() as stack:
        service.memory.declare(TOPIC, [deaf_host(stack), *service.hosts])

        async def play(session: aiohttp.ClientSession) -> None:
            timeout = aiohttp.ClientTimeout(total=SECONDS, sock_connect=HANGS_SECONDS)
            for _ in range(2):
                async with session.post(f"{URL}/", data="x", timeout=timeout) as answer:
                    assert (await said(answer))["body"] == "x"

        on_loop(service, play)
        assert len(service.matchmaker.bad) == 1
        assert service.matchmaker.bad != service.hosts


def test_what_is_no_http_is_a_failure(service: Service) -> None:
    """Where another program listens now, the request goes elsewhere."""

    async def speak(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"SSH-2.0-OpenSSH_9.6\r\n\r\n")
        await writer.drain()
        await reader.read()
        writer.close()

    async def play(session: aiohttp.ClientSession) -> None:
        async with await asyncio.start_server(speak, "127.0.0.1", 0) as server:
            port = server.sockets[0].getsockname()[1]
            service.memory.declare(TOPIC, [f"127.0.0.1:{port}", service.hosts[0]])
            for _ in range(2):
                async with session.get(f"{URL}/") as answer:
                    assert answer.status == 200
            assert [host.port for host in service.matchmaker.bad] == [port]

    on_loop(service, play)


def test_no_failover(service: Service) -> None:
    """With attempts=1 each request is sent once: aiohttp repeats nothing by itself either."""
    broken = service.next
    broken.drops = 1

    async def play() -> None:
        async with session_of(service.matchmaker, middleware={"attempts": 1}) as session:
            with pytest.raises(aiohttp.ServerDisconnectedError):
                await session.get(f"{URL}/")
            assert sum(service.asked) == 1
            async with session.get(f"{URL}/") as answer:  # the user's own repetition is another one
                assert answer.status == 200

    asyncio.run(play())
    assert sum(service.asked) == 2
    assert service.matchmaker.bad == [broken.host]


@pytest.mark.parametrize("total", [None, SECONDS])
def test_no_more_than_the_attempts(total: float | None) -> None:
    """Where all hosts break the connection, three requests are sent, and aiohttp's error raised."""
    with Service(3) as service:
        for server in service.servers:
            server.drops = 10

        async def play(session: aiohttp.ClientSession) -> None:
            for sent in (1, 2):
                with pytest.raises(aiohttp.ServerDisconnectedError):
                    await session.get(f"{URL}/", timeout=aiohttp.ClientTimeout(total=total))
                assert service.asked == [sent] * 3

        on_loop(service, play)


def test_a_middleware_before_ours_may_repeat_what_failed(service: Service) -> None:
    """Its repetition is a call of its own, though it is the same request."""
    for server in service.servers:
        server.drops = 1

    async def again(request: aiohttp.ClientRequest, handler: Any) -> aiohttp.ClientResponse:
        try:
            return await handler(request)  # type: ignore[no-any-return]
        except aiohttp.ServerDisconnectedError:
            return await handler(request)  # type: ignore[no-any-return]

    async def play() -> None:
        options = {"attempts": 1}
        async with session_of(service.matchmaker, again, middleware=options) as session:
            with pytest.raises(aiohttp.ServerDisconnectedError):
                await session.get(f"{URL}/")
            assert sum(service.asked) == 2
            async with session.get(f"{URL}/") as answer:
                assert answer.status == 200

    asyncio.run(play())


def test_the_last_answer_is_the_callers() -> None:
    """Where every host says 503, each is asked once, and the last one's answer is returned."""
    with Service(3) as service:
        for server in service.servers:
            server.status = 503

        async def play(session: aiohttp.ClientSession) -> None:
            async with session.get(f"{URL}/") as answer:
                assert answer.status == 503
                assert (await said(answer))["host"] == str(service.matchmaker.bad[-1])

        on_loop(service, play)
        assert service.asked == [1, 1, 1]
        assert service.matchmaker.busy == []


def test_the_last_failure_is_the_callers(service: Service) -> None:
    """Where no host can be reached, aiohttp's own error is raised."""
    for server in service.servers:
        server.stop()

    async def play(session: aiohttp.ClientSession) -> None:
        with pytest.raises(aiohttp.ClientConnectorError):
            await session.get(f"{URL}/")

    on_loop(service, play)
    assert set(service.matchmaker.bad) == set(service.hosts)
    assert len(service.matchmaker.bad) == 3


def test_the_answer_stays_when_nobody_else_is_left(service: Service) -> None:
    """A host says 503, and Consul goes away before the next attempt: 503 is the answer."""
    for server in service.servers:
        server.status = 503

    async def play() -> None:
        async with session_of(left_alone(service)) as session, session.get(f"{URL}/") as answer:
            assert answer.status == 503
            await answer.read()

    asyncio.run(play())
    assert sum(service.asked) == 1


def test_a_kept_connection_that_was_closed_meanwhile_fails_nothing(service: Service) -> None:
    """Servers close idle connections: the next request, POST too, makes another one."""

    async def play(session: aiohttp.ClientSession) -> None:
        for _ in range(2):
            async with session.get(f"{URL}/") as answer:
                await answer.read()
        for server in service.servers:
            server.hang_up()
            await eventually(lambda server=server: not server.open, "closed")  # type: ignore[misc]
        for _ in range(2):
            async with session.post(f"{URL}/") as answer:
                assert answer.status == 200

    on_loop(service, play)
    assert service.asked == [2, 2]
    assert service.matchmaker.bad == []


def test_a_kept_connection_that_breaks_when_it_is_used(service: Service) -> None:
    """Where aiohttp has not noticed yet, what may be repeated is repeated."""

    async def play(session: aiohttp.ClientSession) -> None:
        for _ in range(2):
            async with session.get(f"{URL}/") as answer:
                await answer.read()
        for server in service.servers:
            server.hang_up()
        async with session.get(f"{URL}/") as answer:
            assert answer.status == 200

    on_loop(service, play)
    assert sum(service.asked) == 3
    assert service.matchmaker.bad


# -- timeouts and cancellation


def test_the_total_timeout_is_for_all_attempts(service: Service) -> None:
    """The host that had the request then has failed; no other one is asked, or rejected."""
    broken = service.next
    broken.seconds = 60.0

    async def play(session: aiohttp.ClientSession) -> None:
        with pytest.raises(asyncio.TimeoutError):
            await session.get(f"{URL}/", timeout=aiohttp.ClientTimeout(total=HANGS_SECONDS))

    on_loop(service, play)
    assert service.matchmaker.bad == [broken.host]
    assert service.matchmaker.busy == []
    assert sum(service.asked) == 1


def test_the_total_timeout_while_it_connects(service: Service) -> None:
    """It is a failure of the host all the same, though a middleware sees a cancellation."""
    with ExitStack() as stack:
        host = deaf_host(stack)
        service.memory.declare(TOPIC, [host])

        async def play(session: aiohttp.ClientSession) -> None:
            with pytest.raises(asyncio.TimeoutError):
                await session.get(f"{URL}/", timeout=aiohttp.ClientTimeout(total=HANGS_SECONDS))

        on_loop(service, play)
    assert [str(one) for one in service.matchmaker.bad] == [host]
    assert service.matchmaker.busy == []


@pytest.mark.parametrize("phase", ["connects", "waits for the answer", "reads the answer"])
def test_a_cancelled_call_says_nothing_of_its_host(phase: str, service: Service) -> None:
    """It ends its attempt, whatever it was at."""
    with ExitStack() as stack:
        if phase == "connects":
            service.memory.declare(TOPIC, [deaf_host(stack)])
        for server in service.servers:
            server.seconds = 0.0 if phase == "reads the answer" else 60.0

        async def ask(session: aiohttp.ClientSession) -> None:
            async with session.get(f"{URL}/?size=1000000") as answer:
                await answer.content.read(1)
                await asyncio.sleep(60)

        async def play(session: aiohttp.ClientSession) -> None:
            task = asyncio.create_task(ask(session))
            await eventually(lambda: service.matchmaker.busy, "begun")
            if phase == "reads the answer":
                await eventually(lambda: service.matchmaker.good, "answered")
            await asyncio.sleep(0.05)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert service.matchmaker.busy == []

        on_loop(service, play)
    assert service.matchmaker.bad == []
    assert sum(service.asked) <= 1


# -- bodies


def test_a_generator_is_sent_once(service: Service) -> None:
    """What was read from it is gone; where nothing was read it goes to the next host."""

    async def body() -> AsyncIterator[bytes]:
        yield b"a"
        yield b"b"

    async def play(session: aiohttp.ClientSession) -> None:
        service.next.drops = 1
        with pytest.raises(aiohttp.ClientConnectionError):
            await session.put(f"{URL}/", data=body())
        assert sum(service.asked) == 1
        service.next.stop()
        async with session.put(f"{URL}/", data=body()) as answer:
            assert (await said(answer))["body"] == "ab"

    on_loop(service, play)


@pytest.mark.parametrize("failure", ["drops", "503"])
@pytest.mark.parametrize("kind", ["bytes", "form", "file"])
def test_a_body_that_is_kept_is_sent_again(kind: str, failure: str, service: Service) -> None:
    """The next host gets what the first one got; before 3.12.1 aiohttp closes files itself."""
    broken = service.next
    break_(broken, failure)
    data: Any = {"bytes": b"body", "form": {"a": "b"}, "file": io.BytesIO(b"body")}[kind]
    content = "a=b" if kind == "form" else "body"

    async def play(session: aiohttp.ClientSession) -> None:
        try:
            async with session.put(f"{URL}/", data=data) as answer:
                outcome = (await said(answer))["body"] if answer.status == 200 else "failed"
        except (
            aiohttp.ClientConnectionError,
            ValueError,
        ):  # ... of the file, as aiohttp does alone
            outcome = "failed"
        is_sent_again = kind != "file" or SENDS_FILES_AGAIN
        assert outcome == (content if is_sent_again else "failed")
        assert sum(service.asked) == 1 + is_sent_again

    on_loop(service, play)
    assert {one["body"] for server in service.servers for one in server.requests} == {content}


@pytest.mark.parametrize("kind", ["bytes", "file"] if SENDS_FILES_AGAIN else ["bytes"])
def test_a_host_that_refuses_a_large_body_before_its_end(kind: str, service: Service) -> None:
    """The next host gets it from its beginning."""
    content = "0123456789" * 1_000_000

    async def refuse(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 503 Busy\r\nContent-Length: 0\r\n\r\n")
        while await reader.read(65536):
            await asyncio.sleep(0.01)
        writer.close()

    async def play(session: aiohttp.ClientSession) -> None:
        async with await asyncio.start_server(refuse, "127.0.0.1", 0) as server:
            port = server.sockets[0].getsockname()[1]
            service.memory.declare(TOPIC, [f"127.0.0.1:{port}", service.hosts[0]])
            for _ in range(2):
                body = content.encode()
                data: Any = body if kind == "bytes" else io.BytesIO(body)
                async with session.put(f"{URL}/", data=data) as answer:
                    assert (await said(answer))["body"] == content
            assert [host.port for host in service.matchmaker.bad] == [port]

    on_loop(service, play)


def test_a_body_waits_for_each_host_to_want_it(service: Service) -> None:
    """With ``Expect: 100-continue`` a host may refuse before the body, which the next one gets."""

    async def refuse(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 503 Busy\r\nContent-Length: 0\r\n\r\n")
        assert await reader.read() == b""
        writer.close()

    async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        body = await reader.readexactly(4)
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\nConnection: close\r\n\r\n" + body)
        writer.close()

    async def play(session: aiohttp.ClientSession) -> None:
        refusing = await asyncio.start_server(refuse, "127.0.0.1", 0)
        accepting = await asyncio.start_server(accept, "127.0.0.1", 0)
        async with refusing, accepting:
            ports = [one.sockets[0].getsockname()[1] for one in (refusing, accepting)]
            service.memory.declare(TOPIC, [f"127.0.0.1:{port}" for port in ports])
            for _ in range(2):
                async with session.put(f"{URL}/", data=b"body", expect100=True) as answer:
                    assert await answer.read() == b"body"
            assert [host.port for host in service.matchmaker.bad] == ports[:1]

    on_loop(service, play)


def test_a_body_that_fails_says_nothing_of_the_host(service: Service) -> None:
    """An exception of the user's own is no failure of the host."""

    async def body() -> AsyncIterator[bytes]:
        yield b"a"
        raise ZeroDivisionError

    async def play(session: aiohttp.ClientSession) -> None:
        with pytest.raises(aiohttp.ClientConnectionError) as raised:
            await session.put(f"{URL}/", data=body())
        assert isinstance(raised.value.__cause__, ZeroDivisionError)

    on_loop(service, play)
    assert service.matchmaker.good == service.matchmaker.bad == service.matchmaker.busy == []


# -- busy hosts


@pytest.mark.parametrize("how", ["read", "release", "close", "with"])
def test_a_host_is_busy_until_its_answer_was_read(how: str, service: Service) -> None:
    """Or released, or closed: as long as its connection is nobody else's."""

    async def play(session: aiohttp.ClientSession) -> None:
        answer = await session.get(f"{URL}/?size=10000000")
        assert len(service.matchmaker.busy) == 1
        assert len(service.matchmaker.good) == 1, "judged by its head"
        if how == "read":
            await answer.read()
        elif how == "release":
            answer.release()
        elif how == "close":
            answer.close()
        else:
            async with answer:
                pass
        assert service.matchmaker.busy == []

    on_loop(service, play)


def test_a_websocket_keeps_its_host_busy(service: Service) -> None:
    """Until it is closed; its URL is a name as well."""

    async def echo(request: web.Request) -> web.WebSocketResponse:
        answer = web.WebSocketResponse()
        await answer.prepare(request)
        async for message in answer:
            await answer.send_str(f"{request.host} {message.data}")
        return answer

    async def play(session: aiohttp.ClientSession) -> None:
        app = web.Application()
        app.router.add_get("/", echo)
        runner = web.AppRunner(app)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        port = runner.addresses[0][1]
        service.memory.declare(TOPIC, [f"127.0.0.1:{port}"])
        async with session.ws_connect(f"{URL}/") as socket:
            await socket.send_str("a")
            assert await socket.receive_str() == "web.service.consul a"
            assert [host.port for host in service.matchmaker.busy] == [port]
        assert service.matchmaker.busy == []
        await runner.cleanup()

    on_loop(service, play)


def test_a_discarded_answer_is_released(service: Service) -> None:
    """Of two answers, one with 503, only the one that is returned holds its host."""
    broken = service.next
    broken.status = 503

    async def play(session: aiohttp.ClientSession) -> None:
        async with session.get(f"{URL}/?size=10000000"):
            assert service.matchmaker.busy == [
                host for host in service.hosts if host != broken.host
            ]
            await eventually(lambda: not broken.open, "the discarded answer's connection closed")

    on_loop(service, play)


def test_a_discarded_answer_that_was_read_keeps_its_connection(service: Service) -> None:
    """A short answer with 503 costs no connection."""
    broken = service.next
    broken.status = 503

    async def play(session: aiohttp.ClientSession) -> None:
        async with session.get(f"{URL}/") as answer:
            await answer.read()
        service.memory.declare(TOPIC, [broken.host])
        await asyncio.to_thread(
            until, lambda: service.matchmaker.hosts(TOPIC).hosts == (broken.host,), 30
        )
        async with session.get(f"{URL}/") as answer:
            assert answer.status == 503

    on_loop(service, play)
    assert broken.connections == 1


# -- hosts that leave


def test_connections_to_a_host_that_left_are_closed(service: Service) -> None:
    """When they were idle for the connector's keepalive_timeout; what is read is read."""

    async def play() -> None:
        connector = aiohttp.TCPConnector(keepalive_timeout=0.2)
        async with session_of(service.matchmaker, connector=connector) as session:
            leaving = service.next
            running = await session.get(f"{URL}/?size=10000000")
            await asyncio.to_thread(service.leave, leaving)
            for _ in range(4):
                async with session.get(f"{URL}/") as answer:
                    assert (await said(answer))["host"] != str(leaving.host)
            assert len(await running.read()) == 10000000
            await eventually(lambda: not leaving.open, "closed")

    asyncio.run(play())


# -- nobody to ask


def test_no_host_is_a_connection_error(service: Service) -> None:
    """As is that Consul is away, or the matchmaker closed: what users of aiohttp catch."""
    causes = []

    async def play(session: aiohttp.ClientSession) -> None:
        with pytest.raises(aiohttp.ClientConnectionError) as raised:
            await session.get("http://nobody.service.consul/")
        causes.append(type(raised.value.__cause__))
        service.memory.is_available = False
        with pytest.raises(aiohttp.ClientConnectionError) as raised:
            await session.get("http://unknown.service.consul/")
        causes.append(type(raised.value.__cause__))
        service.matchmaker.close()
        with pytest.raises(aiohttp.ClientConnectionError) as raised:
            await session.get(f"{URL}/")
        causes.append(type(raised.value.__cause__))

    on_loop(service, play)
    assert causes == [NoLiveHosts, Unavailable, Closed]


def test_consul_that_hangs_does_not_hold_the_loop() -> None:
    """The total timeout ends the call, and other tasks run meanwhile."""
    with socket.create_server(("127.0.0.1", 0)) as hanging:
        url = f"consul+kv://127.0.0.1:{hanging.getsockname()[1]}"

        async def play() -> None:
            turns = 0

            async def turn() -> None:
                nonlocal turns
                while True:
                    await asyncio.sleep(0.01)
                    turns += 1

            with Matchmaker.from_url(url) as matchmaker:
                async with session_of(matchmaker) as session:
                    turning = asyncio.create_task(turn())
                    with pytest.raises(asyncio.TimeoutError):
                        await session.get(
                            f"{URL}/", timeout=aiohttp.ClientTimeout(total=HANGS_SECONDS)
                        )
                    turning.cancel()
            assert turns > 3

        asyncio.run(play())


def test_an_address_that_is_none_is_a_failure_of_its_host(service: Service) -> None:
    """What somebody registered without sense does not keep others from being asked."""
    service.memory.declare(TOPIC, [Host.opaque("a b/[c"), service.hosts[0]])

    async def play(session: aiohttp.ClientSession) -> None:
        for _ in range(3):
            async with session.post(f"{URL}/") as answer:
                assert answer.status == 200

    on_loop(service, play)


# -- TLS


def test_tls_verifies_the_name(tmp_path: Path) -> None:
    """A certificate for the name is enough, though the address has none; another name fails."""
    authority, context = certified(tmp_path, "web.service.consul")
    names: list[object] = []
    context.sni_callback = lambda socket, name, context: names.append(name)
    with Service(2, tls=context) as service:
        service.memory.declare("other", service.hosts)

        async def play(session: aiohttp.ClientSession) -> None:
            trusted = ssl.create_default_context(cafile=authority)
            for _ in range(4):
                async with session.get("https://web.service.consul/", ssl=trusted) as answer:
                    assert str(answer.url) == "https://web.service.consul/"
                    await answer.read()
            assert names == ["web.service.consul"] * 2, "one connection each"
            with pytest.raises(aiohttp.ClientConnectorCertificateError):
                await session.get("https://other.service.consul/", ssl=trusted)

        on_loop(service, play)
        assert service.asked == [2, 2], "no connection that was verified for another name"
        assert set(service.matchmaker.bad) == set(service.hosts)


# -- proxies


def test_proxies_of_the_environment_are_asked_where_the_session_says_so(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without trust_env aiohttp asks none; with it, the proxy is told the host."""
    monkeypatch.delenv("NO_PROXY", raising=False)
    monkeypatch.delenv("no_proxy", raising=False)
    with Proxy() as proxy:
        monkeypatch.setenv("http_proxy", f"http://{proxy.host}")

        async def play(trust_env: bool) -> None:
            async with (
                session_of(service.matchmaker, trust_env=trust_env) as session,
                session.get(f"{URL}/a?b=c") as answer,
            ):
                assert str(answer.url) == f"{URL}/a?b=c"

        asyncio.run(play(False))
        assert proxy.targets == []
        asyncio.run(play(True))
        (told,) = proxy.targets
        assert told in [f"http://{host}/a?b=c" for host in service.hosts]
        monkeypatch.setenv("no_proxy", ".service.consul")
        asyncio.run(play(True))
        assert len(proxy.targets) == 1
        monkeypatch.delenv("no_proxy")
        proxy.stop()

        async def fail() -> None:
            async with session_of(service.matchmaker, trust_env=True) as session:
                with pytest.raises(aiohttp.ClientProxyConnectionError):
                    await session.get(f"{URL}/")

        asyncio.run(fail())
    assert service.matchmaker.bad == [], "the proxy's failure is none of a host"
    assert service.matchmaker.busy == []


# -- its own life


def test_closing_a_session_closes_its_connections_and_not_the_matchmaker(service: Service) -> None:
    """The matchmaker is the caller's."""

    async def play(session: aiohttp.ClientSession) -> None:
        async with session.get(f"{URL}/") as answer:
            await answer.read()

    on_loop(service, play)
    until(lambda: not any(server.open for server in service.servers), 30, "closed")
    assert not service.matchmaker.is_closed


def test_tasks_may_share_a_session() -> None:
    """Each request gets its own answer, and all hosts their part."""
    with Service(3) as service:

        async def play(session: aiohttp.ClientSession) -> None:
            async def ask(path: str) -> str:
                async with session.get(URL + path) as answer:
                    return str((await said(answer))["path"])

            paths = [f"/{number}" for number in range(300)]
            assert await asyncio.gather(*map(ask, paths)) == paths

        on_loop(service, play)
        assert service.asked == [100, 100, 100]
        assert service.matchmaker.busy == []


def test_what_it_cannot_work_with_is_said(service: Service) -> None:
    """A matchmaker for threads, a suffix that is none, and attempts that are none."""
    awaited = aio.Matchmaker(service.matchmaker)
    with pytest.raises(ConfigurationError, match=r"aio\.Matchmaker"):
        matchmaker_middleware(service.matchmaker)  # type: ignore[arg-type]
    with pytest.raises(ConfigurationError, match="suffix"):
        matchmaker_middleware(awaited, suffix="consul")
    with pytest.raises(ConfigurationError, match="attempts"):
        matchmaker_middleware(awaited, attempts=0)


def test_a_release_that_is_too_old_is_said(tmp_path: Path) -> None:
    """aiohttp before 3.12 has no client middlewares: the import says what is needed."""
    (tmp_path / "old.py").write_text(
        "import aiohttp\n"
        "del aiohttp.ClientMiddlewareType\n"
        "import consul_matchmaker.adapters.aiohttp\n"
    )
    done = subprocess.run([sys.executable, tmp_path / "old.py"], capture_output=True, text=True)
    assert "aiohttp 3.12, the first with client middlewares, is needed" in done.stderr
    assert "pip install 'consul-matchmaker[aiohttp]'" in done.stderr


def test_the_span_of_the_caller_names_the_host_that_answered(service: Service) -> None:
    """The last one that was tried."""
    broken = service.next
    broken.status = 503
    tracer = TracerProvider().get_tracer("test")

    async def play(session: aiohttp.ClientSession) -> None:
        with tracer.start_as_current_span("GET") as span:
            async with session.get(f"{URL}/") as answer:
                host = (await said(answer))["host"]
        assert isinstance(span, ReadableSpan)
        assert span.attributes is not None
        assert host == f"{span.attributes['server.address']}:{span.attributes['server.port']}"
        assert host != str(broken.host)

    on_loop(service, play)


# -- on a real Consul


def test_a_killed_server_fails_no_request(agent: Node, topic: str) -> None:
    """SIGKILL of one of three processes under about 500 requests a second: each is answered."""
    url = f"consul+service://{agent.http}"
    with ExitStack() as stack:
        processes = [stack.enter_context(ServerProcess(topic, url)) for _ in range(3)]
        hosts = [str(process.wait_until_registered()) for process in processes]
        matchmaker = stack.enter_context(Matchmaker.from_url(url))
        until(lambda: len(matchmaker.hosts(topic)) == 3, 30, "three hosts")
        load = Load()

        async def play() -> None:
            async with session_of(matchmaker) as session:

                async def ask() -> str:
                    async with session.get(f"http://{topic}.service.consul/") as answer:
                        return str((await said(answer))["host"])

                asking = asyncio.create_task(load.run_awaited(ask))
                while load.asked < 1000:
                    await asyncio.sleep(0.02)
                processes[0].kill()
                after = load.asked
                while load.asked < after + 1000:
                    await asyncio.sleep(0.02)
                load.stop()
                await asking

        asyncio.run(asyncio.wait_for(play(), 120))
        print(load.answers, load.failures[:3])
        assert set(load.answers) == set(hosts)
        assert load.failures == []
