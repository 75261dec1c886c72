"""The adapter of requests: what it asks, whom, and what of that anybody sees."""

from __future__ import annotations

import gc
import io
import pickle
import socket
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import requests
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider

from consul_matchmaker import Matchmaker, Settings, aio
from consul_matchmaker.adapters.requests import MatchmakerAdapter
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


def session_of(matchmaker: Matchmaker, prefix: str = URL, **options: Any) -> requests.Session:
    session = requests.Session()
    session.mount(prefix, MatchmakerAdapter(matchmaker, **options))
    return session


@pytest.fixture
def session(service: Service) -> Iterator[requests.Session]:
    with session_of(service.matchmaker) as made:
        yield made


def seconds_for(failure: str) -> float:
    return HANGS_SECONDS if failure == "hangs" else SECONDS


# -- whom it asks, and what anybody sees of that


def test_requests_take_turns_on_kept_connections(
    service: Service, session: requests.Session
) -> None:
    """A dozen requests to two hosts are six each, on one connection each."""
    for _ in range(12):
        assert session.get(f"{URL}/", timeout=SECONDS).status_code == 200
    assert service.asked == [6, 6]
    assert [server.connections for server in service.servers] == [1, 1]


def test_the_name_is_all_that_anybody_sees(service: Service, session: requests.Session) -> None:
    """The URLs and headers of response and request, cookies, and the Host header have the name."""
    url = f"{URL}/orders?to=/paid&cookie=a"
    response = session.get(url, timeout=SECONDS)
    assert response.url == response.request.url == f"{URL}/paid"
    assert [one.url for one in response.history] == [url]
    assert "Host" not in response.request.headers
    assert {cookie.domain for cookie in session.cookies} == {"web.service.consul"}
    said = response.json()
    assert said["headers"]["host"] == "web.service.consul"
    assert said["headers"]["cookie"] == "a=1", "whichever host set it"


def test_names_that_nobody_serves_leave_nothing(service: Service) -> None:
    """Whoever may choose the name in a URL cannot fill the memory of the session; a topic that has
    lost its hosts leaves nothing either."""
    with session_of(service.matchmaker, "http://") as session:
        for number in range(20):
            with pytest.raises(requests.ConnectionError):
                session.get(f"http://nobody{number}.service.consul/", timeout=SECONDS)
        adapter: Any = session.get_adapter(URL)
        assert adapter._seen == {}
        session.get(f"{URL}/", timeout=SECONDS)
        assert set(adapter._seen) == {TOPIC}
        service.memory.declare(TOPIC, [])
        until(lambda: not service.matchmaker.hosts(TOPIC), 10, "left")
        with pytest.raises(requests.ConnectionError):
            session.get(f"{URL}/", timeout=SECONDS)
        assert adapter._seen == {}
        until(lambda: not any(server.open for server in service.servers), 5, "closed")


def test_the_request_is_not_changed(service: Service, session: requests.Session) -> None:
    """A prepared request can be sent again, and is the request of its response."""
    prepared = session.prepare_request(requests.Request("GET", f"{URL}/"))
    before = dict(prepared.headers)
    for _ in range(2):
        assert session.send(prepared, timeout=SECONDS).request is prepared
    assert prepared.headers == before
    assert service.asked == [1, 1]


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
    with session_of(service.matchmaker, "http://") as session:
        said = session.get(url, timeout=SECONDS).json()
    assert said["headers"]["host"].lower() == host


def test_a_host_header_of_the_user_stays(service: Service, session: requests.Session) -> None:
    """Who says a Host header means it."""
    said = session.get(f"{URL}/", headers={"host": "other.example"}, timeout=SECONDS).json()
    assert said["headers"]["host"] == "other.example"


def test_a_redirect_to_elsewhere_tells_elsewhere_nothing(service: Service) -> None:
    """A server that is no service of ours gets its own name as the Host header."""
    with HttpServer() as other, session_of(service.matchmaker) as session:
        response = session.get(f"{URL}/?to=http://{other.host}/there", timeout=SECONDS)
        assert response.json()["headers"]["host"] == str(other.host)
        assert response.url == f"http://{other.host}/there"


@pytest.mark.parametrize("prefix", ["http://", "http://web.service.consul"])
def test_ordinary_urls_go_where_they_always_went(prefix: str, service: Service) -> None:
    """An address, and a name that only looks like one of ours, are nothing for the matchmaker."""
    with session_of(service.matchmaker, prefix) as session:
        url = f"http://{service.hosts[0]}/"
        assert session.get(url, timeout=SECONDS).url == url
        with pytest.raises(requests.ConnectionError):
            session.get("http://web.service.consul.invalid/", timeout=SECONDS)
    assert service.asked == [1, 0]
    assert service.matchmaker.good == []


def test_another_suffix(service: Service) -> None:
    """With a suffix of one's own, Consul's is an ordinary name."""
    with session_of(service.matchmaker, "http://", suffix=".mesh") as session:
        assert session.get("http://web.mesh/", timeout=SECONDS).url == "http://web.mesh/"
        with pytest.raises(requests.ConnectionError):
            session.get("http://web.service.invalid/", timeout=SECONDS)


# -- failover


@pytest.mark.parametrize("failure", FAILURES)
def test_what_may_be_repeated_goes_to_another_host(
    failure: str, service: Service, session: requests.Session
) -> None:
    """The host that failed is rejected, the other one answers; nobody is busy afterwards."""
    broken = service.next
    break_(broken, failure)
    response = session.get(f"{URL}/", timeout=seconds_for(failure))
    assert response.status_code == 200
    assert service.matchmaker.bad == [broken.host]
    assert service.matchmaker.good == [host for host in service.hosts if host != broken.host]
    assert service.matchmaker.busy == []


@pytest.mark.parametrize("failure", FAILURES)
def test_what_may_have_been_executed_is_not_repeated(
    failure: str, service: Service, session: requests.Session
) -> None:
    """POST is sent once: only a host that got nothing of it is no reason to give up."""
    broken = service.next
    break_(broken, failure)
    try:
        outcome: object = session.post(
            f"{URL}/", data="x", timeout=seconds_for(failure)
        ).status_code
    except requests.RequestException as error:
        outcome = type(error)
    expected = {"stops": 200, "drops": requests.ConnectionError, "hangs": requests.ReadTimeout}
    assert outcome == expected.get(failure) or outcome == int(failure)
    assert sum(service.asked) == 1
    assert service.matchmaker.bad == [broken.host]


def test_a_host_that_does_not_accept_gets_nothing(topic: str) -> None:
    """A connection that takes too long to be made is the host's failure, for POST as well."""
    with Service(1) as service, ExitStack() as stack:
        deaf = deaf_host(stack)
        service.memory.declare(TOPIC, [deaf, *service.hosts])
        with session_of(service.matchmaker) as session:
            for _ in range(2):
                response = session.post(f"{URL}/", data="x", timeout=(HANGS_SECONDS, SECONDS))
                assert response.json()["body"] == "x"
        assert [str(host) for host in service.matchmaker.bad] == [deaf]


def test_an_answer_that_breaks_off_is_a_failure(
    service: Service, session: requests.Session
) -> None:
    """As the body is read within the call, another host can give all of it."""
    broken = service.next
    broken.cuts = 1
    assert session.get(f"{URL}/", timeout=SECONDS).json()["host"] != str(broken.host)
    assert service.matchmaker.bad == [broken.host]
    assert service.asked == [1, 1]


def test_a_stream_that_breaks_off_is_for_who_reads_it(
    service: Service, session: requests.Session
) -> None:
    """With stream=True the answer is handed over with its head; its host is busy no more."""
    service.next.cuts = 1
    response = session.get(f"{URL}/", stream=True, timeout=SECONDS)
    with pytest.raises(requests.exceptions.ChunkedEncodingError):
        _ = response.content
    assert sum(service.asked) == 1
    assert service.matchmaker.busy == []


def test_no_failover(service: Service) -> None:
    """With attempts=1 each request is sent once, and the failure is the host's all the same."""
    with session_of(service.matchmaker, attempts=1) as session:
        broken = service.next
        broken.drops = 1
        with pytest.raises(requests.ConnectionError):
            session.get(f"{URL}/", timeout=SECONDS)
    assert sum(service.asked) == 1
    assert service.matchmaker.bad == [broken.host]


def test_the_last_answer_is_the_callers() -> None:
    """Where every host says 503, each is asked once, and the last one's answer is returned."""
    with Service(3) as service, session_of(service.matchmaker) as session:
        for server in service.servers:
            server.status = 503
        response = session.get(f"{URL}/", timeout=SECONDS)
        assert response.status_code == 503
        assert response.json()["host"] == str(service.matchmaker.bad[-1])
        assert service.asked == [1, 1, 1]
        assert service.matchmaker.busy == []


def test_the_last_failure_is_the_callers(service: Service, session: requests.Session) -> None:
    """Where no host can be reached, requests' own error is raised, of the request that was made."""
    for server in service.servers:
        server.stop()
    prepared = session.prepare_request(requests.Request("GET", f"{URL}/"))
    with pytest.raises(requests.ConnectionError) as raised:
        session.send(prepared, timeout=SECONDS)
    assert raised.value.request is prepared
    assert set(service.matchmaker.bad) == set(service.hosts)
    assert len(service.matchmaker.bad) == 3, "three attempts at two hosts, none by urllib3"


def test_the_answer_stays_when_nobody_else_is_left(
    service: Service, session: requests.Session
) -> None:
    """A host says 503, and Consul goes away before the next attempt: 503 is the answer."""
    for server in service.servers:
        server.status = 503

    with left_alone(service) as matchmaker, session_of(matchmaker) as other:
        response = other.get(f"{URL}/", timeout=SECONDS)
    assert response.status_code == 503
    assert sum(service.asked) == 1


def test_a_kept_connection_that_was_closed_meanwhile_fails_nothing(
    service: Service, session: requests.Session
) -> None:
    """Servers close idle connections: the next request, POST too, makes another one."""
    for _ in range(2):
        session.get(f"{URL}/", timeout=SECONDS)
    for server in service.servers:
        server.hang_up()
        until(lambda server=server: not server.open, 30, "closed")  # type: ignore[misc]
    for _ in range(2):
        assert session.post(f"{URL}/", timeout=SECONDS).status_code == 200
    assert service.asked == [2, 2]
    assert service.matchmaker.bad == []


# -- bodies


def test_a_generator_is_sent_once(service: Service, session: requests.Session) -> None:
    """What was read from it is gone; where nothing was read it goes to the next host."""
    service.next.drops = 1
    with pytest.raises(requests.ConnectionError):
        session.put(f"{URL}/", data=iter([b"a", b"b"]), timeout=SECONDS)
    assert sum(service.asked) == 1
    service.next.stop()
    assert session.put(f"{URL}/", data=iter([b"a", b"b"]), timeout=SECONDS).json()["body"] == "ab"


@pytest.mark.parametrize("failure", ["drops", "503"])
def test_a_file_is_sent_again_from_where_it_was(
    failure: str, service: Service, session: requests.Session
) -> None:
    """The next host gets what the first one got."""
    file = io.BytesIO(b"..body")
    file.seek(2)
    break_(service.next, failure)
    assert session.put(f"{URL}/", data=file, timeout=SECONDS).json()["body"] == "body"
    assert service.asked == [1, 1]


def test_a_body_that_fails_says_nothing_of_the_host(
    service: Service, session: requests.Session
) -> None:
    """An exception of the user's own comes out as it is; nobody is judged, nobody is busy."""

    def body() -> Iterator[bytes]:
        yield b"a"
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        session.put(f"{URL}/", data=body(), timeout=SECONDS)
    assert service.matchmaker.good == service.matchmaker.bad == service.matchmaker.busy == []


# -- busy hosts


@pytest.mark.parametrize("how", ["read", "close", "with", "raw", "forget"])
def test_a_host_is_busy_until_its_answer_was_read(
    how: str, service: Service, session: requests.Session
) -> None:
    """Or closed, or forgotten; before that its connection is nobody else's."""
    response = session.get(f"{URL}/?size=1000000", stream=True, timeout=SECONDS)
    next(response.iter_content(1000))
    assert len(service.matchmaker.busy) == 1
    assert len(service.matchmaker.good) == 1, "judged by its head"
    if how == "read":
        for _ in response.iter_content(100000):
            pass
    elif how == "close":
        response.close()
    elif how == "with":
        with response:
            pass
    elif how == "raw":
        while response.raw.read(100000):
            pass
    else:
        del response
        gc.collect()
    assert service.matchmaker.busy == []


def test_a_forgotten_answer_gives_back_its_connection_at_once(
    service: Service, session: requests.Session
) -> None:
    """Nothing but the user holds it: no cycle has to be collected first."""
    response = session.get(f"{URL}/", stream=True, timeout=SECONDS)
    gc.disable()
    try:
        del response
        assert service.matchmaker.busy == []
    finally:
        gc.enable()


def test_a_discarded_answer_is_closed(service: Service, session: requests.Session) -> None:
    """Of two answers, one with 503, only the one that is returned holds its host."""
    broken = service.next
    broken.status = 503
    response = session.get(f"{URL}/?size=1000000", stream=True, timeout=SECONDS)
    assert service.matchmaker.busy == [host for host in service.hosts if host != broken.host]
    until(lambda: not broken.open, 30, "the connection of the discarded answer closed")
    response.close()


# -- hosts that leave


def test_connections_to_a_host_that_left_are_closed(
    service: Service, session: requests.Session
) -> None:
    """At the topic's next request; what is being read on one of them is read to its end."""
    for _ in range(2):
        session.get(f"{URL}/", timeout=SECONDS)
    leaving = service.next
    running = session.get(f"{URL}/?size=1000000", stream=True, timeout=SECONDS)
    session.get(f"{URL}/", timeout=SECONDS)
    assert [server.connections for server in service.servers] == [1, 1]
    service.leave(leaving)
    session.get(f"{URL}/", timeout=SECONDS)
    assert len(leaving.open) == 1
    assert len(running.content) == 1000000
    del running
    until(lambda: not leaving.open, 30, "closed")
    stays = next(server for server in service.servers if server is not leaving)
    assert stays.connections == 1


# -- nobody to ask


def test_no_host_is_a_connection_error(service: Service, session: requests.Session) -> None:
    """As is that Consul is away, or the matchmaker closed: what users of requests catch."""
    causes = []
    with session_of(service.matchmaker, "http://") as every:
        with pytest.raises(requests.ConnectionError) as raised:
            every.get("http://nobody.service.consul/", timeout=SECONDS)
        causes.append(type(raised.value.__cause__))
        assert raised.value.request is not None
        service.memory.is_available = False
        with pytest.raises(requests.ConnectionError) as raised:
            every.get("http://unknown.service.consul/", timeout=SECONDS)
        causes.append(type(raised.value.__cause__))
        service.matchmaker.close()
        with pytest.raises(requests.ConnectionError) as raised:
            every.get(f"{URL}/", timeout=SECONDS)
        causes.append(type(raised.value.__cause__))
    assert causes == [NoLiveHosts, Unavailable, Closed]


def test_consul_that_hangs_takes_no_longer_than_a_connection_may() -> None:
    """The timeout for connecting is also that for finding out where to."""
    with socket.create_server(("127.0.0.1", 0)) as hanging:
        url = f"consul+kv://127.0.0.1:{hanging.getsockname()[1]}"
        with (
            Matchmaker.from_url(url) as matchmaker,
            session_of(matchmaker) as session,
            pytest.raises(requests.ConnectTimeout, match="within 0"),
        ):
            session.get(f"{URL}/", timeout=(0.2, 60))


def test_an_address_that_is_none_is_a_failure_of_its_host(service: Service) -> None:
    """What somebody registered without sense does not keep others from being asked."""
    service.memory.declare(TOPIC, [Host.opaque("a b/[c"), service.hosts[0]])
    with session_of(service.matchmaker) as session:
        for _ in range(3):
            assert session.post(f"{URL}/", timeout=SECONDS).status_code == 200


# -- TLS


def test_tls_verifies_the_name(tmp_path: Path) -> None:
    """A certificate for the name is enough, though the address has none; another name fails."""
    authority, context = certified(tmp_path, "web.service.consul")
    names: list[object] = []
    context.sni_callback = lambda socket, name, context: names.append(name)
    with Service(2, tls=context) as service, session_of(service.matchmaker, "https://") as session:
        for _ in range(4):
            response = session.get("https://web.service.consul/", verify=authority, timeout=SECONDS)
            assert response.url == "https://web.service.consul/"
        assert names == ["web.service.consul"] * 2, "one connection each"
        service.memory.declare("other", service.hosts)
        with pytest.raises(requests.exceptions.SSLError):
            session.get("https://other.service.consul/", verify=authority, timeout=SECONDS)
        assert service.asked == [2, 2], "no connection that was verified for another name"
        assert set(service.matchmaker.bad) == set(service.hosts)


def test_a_host_with_a_wrong_certificate_gets_nothing(tmp_path: Path) -> None:
    """So that another host may have the request, whatever its method."""
    for name in ("good", "bad"):
        (tmp_path / name).mkdir()
    authority, good = certified(tmp_path / "good", "web.service.consul")
    _, bad = certified(tmp_path / "bad", "web.service.consul")
    with HttpServer(tls=good) as right, HttpServer(tls=bad) as wrong, Service(0) as service:
        service.memory.declare(TOPIC, [right.host, wrong.host])
        with session_of(service.matchmaker, "https://", attempts=2) as session:
            for _ in range(2):
                url = "https://web.service.consul/"
                response = session.post(url, verify=authority, timeout=SECONDS)
                assert response.json()["host"] == str(right.host)
        assert service.matchmaker.bad == [wrong.host]


# -- proxies


def test_proxies_are_passed_by(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    """HTTP_PROXY is for the world outside; it gets ordinary URLs, and nothing of ours."""
    with Proxy() as proxy, session_of(service.matchmaker) as session:
        monkeypatch.setenv("HTTP_PROXY", f"http://{proxy.host}")
        monkeypatch.setenv("http_proxy", f"http://{proxy.host}")
        monkeypatch.delenv("NO_PROXY", raising=False)
        monkeypatch.delenv("no_proxy", raising=False)
        assert session.get(f"{URL}/", timeout=SECONDS).status_code == 200
        assert proxy.targets == []
        session.get("http://world.example/", timeout=SECONDS)
        assert proxy.targets == ["http://world.example/"]
    assert sum(service.asked) == 1


def test_a_proxy_that_was_asked_for(service: Service) -> None:
    """With via_proxy it is told the host, and not a name that it cannot know; NO_PROXY counts."""
    with Proxy() as proxy, session_of(service.matchmaker, via_proxy=True) as session:
        session.proxies = {"http": f"http://{proxy.host}"}
        response = session.get(f"{URL}/a?b=http://c/", timeout=SECONDS)
        assert response.url == f"{URL}/a?b=http://c/"
        assert service.asked == [0, 0]
        (told,) = proxy.targets
        assert told in [f"http://{host}/a?b=http://c/" for host in service.hosts]
        proxy.stop()
        with pytest.raises(requests.exceptions.ProxyError):
            session.get(f"{URL}/", timeout=SECONDS)
        assert service.matchmaker.bad == [], "the proxy's failure is none of a host"
        assert service.matchmaker.busy == []


def test_a_proxy_that_is_none(service: Service) -> None:
    """What is wrong with the proxy's URL is not wrong with a host."""
    with session_of(service.matchmaker, via_proxy=True) as session:
        session.proxies = {"http": "http:///"}
        with pytest.raises(requests.exceptions.InvalidProxyURL):
            session.get(f"{URL}/", timeout=SECONDS)
    assert service.matchmaker.bad == service.matchmaker.busy == []


def test_other_schemes_do_not_work(service: Service) -> None:
    """They are refused as by requests, and no host is to blame."""
    with (
        session_of(service.matchmaker, "consul://") as session,
        pytest.raises(requests.exceptions.InvalidURL),
    ):
        session.get("consul://web.service.consul/", timeout=SECONDS)
    assert service.matchmaker.bad == service.matchmaker.busy == []


# -- its own life


def test_closing_a_session_closes_its_connections_and_not_the_matchmaker(service: Service) -> None:
    """The matchmaker is the caller's."""
    session = session_of(service.matchmaker)
    session.get(f"{URL}/", timeout=SECONDS)
    session.close()
    until(lambda: not any(server.open for server in service.servers), 30, "closed")
    assert not service.matchmaker.is_closed


def test_threads_may_share_a_session() -> None:
    """Each request gets its own answer, and all hosts their part."""
    with Service(3) as service:
        matchmaker = Matchmaker(Settings(mode="kv"), backend=service.memory)
        with matchmaker, session_of(matchmaker) as session, ThreadPoolExecutor(8) as threads:
            paths = [f"/{number}" for number in range(300)]
            asked = threads.map(lambda path: session.get(URL + path, timeout=SECONDS), paths)
            assert [response.json()["path"] for response in asked] == paths
        assert service.asked == [100, 100, 100]


def test_it_has_no_copy(service: Service, session: requests.Session) -> None:
    """A pickled session would have an adapter without a matchmaker: said when it is pickled."""
    with pytest.raises(TypeError, match="MatchmakerAdapter"):
        pickle.dumps(session)


def test_what_it_cannot_work_with_is_said(service: Service) -> None:
    """A matchmaker for asyncio, a suffix that is none, and attempts that are none."""
    with pytest.raises(ConfigurationError, match="Matchmaker"):
        MatchmakerAdapter(aio.Matchmaker(service.matchmaker))  # type: ignore[arg-type]
    with pytest.raises(ConfigurationError, match="suffix"):
        MatchmakerAdapter(service.matchmaker, suffix="consul")
    with pytest.raises(ConfigurationError, match="attempts"):
        MatchmakerAdapter(service.matchmaker, attempts=0)


def test_a_release_that_is_too_old_is_said(tmp_path: Path) -> None:
    """requests before 2.32.3 would ask DNS for the name: the import says what is needed."""
    (tmp_path / "old.py").write_text(
        "import requests.adapters\n"
        "del requests.adapters.HTTPAdapter.build_connection_pool_key_attributes\n"
        "import consul_matchmaker.adapters.requests\n"
    )
    done = subprocess.run([sys.executable, tmp_path / "old.py"], capture_output=True, text=True)
    assert "requests 2.32.3 is needed: install it by `pip install" in done.stderr


def test_the_span_of_the_caller_names_the_host_that_answered(
    service: Service, session: requests.Session
) -> None:
    """The last one that was tried."""
    broken = service.next
    broken.status = 503
    tracer = TracerProvider().get_tracer("test")
    with tracer.start_as_current_span("GET") as span:
        host = session.get(f"{URL}/", timeout=SECONDS).json()["host"]
    assert isinstance(span, ReadableSpan)
    assert span.attributes is not None
    assert host == f"{span.attributes['server.address']}:{span.attributes['server.port']}"
    assert host != str(broken.host)


# -- on a real Consul


def test_a_killed_server_fails_no_request(agent: Node, topic: str) -> None:
    """SIGKILL of one of three processes under about 500 requests a second: each is answered."""
    url = f"consul+service://{agent.http}"
    with ExitStack() as stack:
        processes = [stack.enter_context(ServerProcess(topic, url)) for _ in range(3)]
        hosts = [str(process.wait_until_registered()) for process in processes]
        matchmaker = stack.enter_context(Matchmaker.from_url(url))
        until(lambda: len(matchmaker.hosts(topic)) == 3, 30, "three hosts")
        session = stack.enter_context(session_of(matchmaker, "http://"))

        def ask() -> str:
            return str(
                session.get(f"http://{topic}.service.consul/", timeout=SECONDS).json()["host"]
            )

        load = stack.enter_context(Load())
        load.start(ask)
        until(lambda: load.asked >= 1000, 60, "load")
        assert set(load.answers) == set(hosts)
        processes[0].kill()
        after = load.asked
        until(lambda: load.asked >= after + 1000, 60, "load after the kill")
        load.stop()
        print(load.answers, load.failures[:3])
        assert load.failures == []
