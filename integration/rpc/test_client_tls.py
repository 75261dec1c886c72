"""The client of consul+http over TLS: what refuses it has taken nothing, and holds nobody up."""

from __future__ import annotations

import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from consul_matchmaker.adapters.oslo.http.client import (
    TLS_SECONDS,
    Answer,
    Client,
    NotTaken,
    NotTried,
)
from consul_matchmaker.adapters.oslo.http.options import Options
from consul_matchmaker.adapters.oslo.http.secret import Secret
from consul_matchmaker.adapters.oslo.http.server import HttpServer
from consul_matchmaker.model import Host
from integration.rpc.certificates import Certificates, make
from integration.rpc.conftest import Served, wait_for_hosts
from integration.waiting import until

SECONDS = 20.0
BODY = b'{"exchange": "", "topic": "t", "ctxt": {}, "wait": false, "message": {}}'


@pytest.fixture(scope="module")
def ours(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    return make(tmp_path_factory.mktemp("ours"))


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    """Of another authority."""
    return make(tmp_path_factory.mktemp("theirs"))


def shown(certificates: Certificates) -> dict[str, str]:
    return {"tls_cert": str(certificates.certificate), "tls_key": str(certificates.key)}


def trusting(certificates: Certificates) -> dict[str, str]:
    return {"tls_ca": str(certificates.authority)}


class Listening:
    """A server that takes whatever it is sent."""

    def __init__(self, **options: Any) -> None:
        self.taken: list[Any] = []
        secret = Secret(options.pop("rpc_token", None), None)
        self.server = HttpServer(Options(**options), secret, "127.0.0.1", self._take)
        self.host = Host("127.0.0.1", self.server.port)

    def _take(self, request: Any, exchange: Any) -> int:
        self.taken.append(request)
        return 202


@contextmanager
def listening(**options: Any) -> Iterator[Listening]:
    made = Listening(**options)
    made.server.start()
    try:
        yield made
    finally:
        made.server.stop()


def post(host: Host, body: bytes = BODY, **options: Any) -> Answer | None:
    client = Client(Options(**options), Secret(None, None))
    try:
        return client.post(host, body, time.monotonic() + SECONDS)
    finally:
        client.close()


@pytest.mark.parametrize("shows", ["nothing", "another authority's"])
def test_who_refuses_our_certificate_has_taken_nothing(
    ours: Certificates, theirs: Certificates, shows: str
) -> None:
    """TLS 1.3 tells the client after the handshake; the message was not sent by then."""
    certificate = {} if shows == "nothing" else shown(theirs)
    with listening(**shown(ours), **trusting(ours)) as strict:
        for _ in range(10):
            with pytest.raises(NotTaken) as caught:
                post(strict.host, **trusting(ours), **certificate)
            assert not isinstance(caught.value, NotTried)
        assert post(strict.host, **trusting(ours), **shown(ours)) == Answer(202, b"")
        assert len(strict.taken) == 1


def test_calls_pass_by_who_refuses_our_certificate(
    serve: Callable[..., Served],
    client: Callable[..., Any],
    topic: str,
    ours: Certificates,
    theirs: Certificates,
) -> None:
    """Another server of the topic is asked, each time."""
    serve(topic, "strict", **shown(ours), **trusting(theirs))
    serve(topic, "willing", **shown(ours), **trusting(ours))
    for _ in range(5):
        caller = client(topic, **shown(ours), **trusting(ours))
        wait_for_hosts(caller, 2)
        assert caller.call({}, "who") == "willing"


def test_a_connection_is_kept_once_it_was_accepted(ours: Certificates) -> None:
    """Requests that follow cost no more handshakes."""
    with listening(**shown(ours), **trusting(ours)) as strict:
        client = Client(Options(**shown(ours), **trusting(ours)), Secret(None, None))
        kept = set()
        for _ in range(3):
            assert client.post(strict.host, BODY, time.monotonic() + SECONDS) == Answer(202, b"")
            ((_, wire),) = client._idle[strict.host]
            kept.add(wire)
        client.close()
        assert (len(kept), len(strict.taken)) == (1, 3)


@pytest.mark.parametrize("says", ["nothing", "a handshake"])
def test_a_server_that_hangs_holds_nobody_up(ours: Certificates, says: str) -> None:
    """Whether it never answers the handshake, or nothing after it: another one has time left."""
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(ours.certificate, ours.key)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        began = time.monotonic()
        client = Client(Options(**trusting(ours)), Secret(None, None))
        host = Host("127.0.0.1", listener.getsockname()[1])
        with failing_by(client, host) as failed:
            sock, _ = listener.accept()
            if says == "a handshake":
                sock = context.wrap_socket(sock, server_side=True)
            until(lambda: failed, SECONDS, "it was given up")
            sock.close()
        assert TLS_SECONDS * 0.9 < time.monotonic() - began < SECONDS - 1
        assert type(failed[0]) is NotTaken


@contextmanager
def failing_by(client: Client, host: Host) -> Iterator[list[Exception]]:
    """A post on a thread of its own; the list is to have its error."""
    failed: list[Exception] = []

    def ask() -> None:
        try:
            client.post(host, BODY, time.monotonic() + SECONDS)
        except NotTaken as error:
            failed.append(error)

    thread = threading.Thread(target=ask)
    thread.start()
    yield failed
    thread.join(SECONDS)


@pytest.mark.parametrize("status", [401, 413])
def test_a_large_request_that_is_refused_says_why(ours: Certificates, status: int) -> None:
    """The server closes the connection while the request is written; its answer is found."""
    options: dict[str, Any] = {"rpc_token": "a"} if status == 401 else {"max_body_bytes": 1000}
    with listening(**shown(ours), **options) as server:
        for _ in range(5):
            answer = post(server.host, bytes(12_000_000), **trusting(ours))
            assert answer is not None
            assert answer.status == status


def test_who_has_no_room_for_a_connection_has_taken_nothing(ours: Certificates) -> None:
    """It says so before anything is asked."""
    with listening(**shown(ours), max_connections=1) as server:
        client = Client(Options(**trusting(ours)), Secret(None, None))
        assert client.post(server.host, BODY, time.monotonic() + SECONDS) == Answer(202, b"")
        with pytest.raises(NotTaken):
            post(server.host, **trusting(ours))
        client.close()
