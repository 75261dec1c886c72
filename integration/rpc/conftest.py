"""Fixtures of the RPC tests: a Consul, and clients and servers of oslo.messaging over it.

Where today's oslo.messaging is not installed the tests are not collected.
"""

from __future__ import annotations

import contextlib
import importlib.util
import itertools
import json
import socket
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from consul_matchmaker.testing.consul_probe import Node
from integration.cluster import Cluster, cluster_of_the_run, tell
from integration.rpc.endpoints import Endpoint
from integration.rpc.server_process import ServerProcess
from integration.waiting import until

NEEDED = ("httptools", "oslo_messaging")
if any(importlib.util.find_spec(name) is None for name in NEEDED):
    collect_ignore_glob = ["test_*.py"]

FOUND_SECONDS = 10.0
"""What was registered is found within milliseconds; the rest is for busy machines."""
CALL_SECONDS = 20.0
"""The timeout of calls that are to succeed."""
QUICK = {"host": "127.0.0.1", "drain_seconds": 0.1, "delivery_timeout": CALL_SECONDS}


@pytest.fixture(scope="session")
def cluster(request: pytest.FixtureRequest) -> Iterator[Cluster]:
    """One server and `agent1`: what several servers do is tested elsewhere."""
    with cluster_of_the_run(request, servers=1) as made:
        yield made


@pytest.fixture
def url_of(agent: Node) -> Callable[..., str]:
    """The transport URL with such options: `url_of(max_messages=1)`."""

    def url(agent_address: str = agent.http, **options: Any) -> str:
        query = "&".join(f"{name}={value}" for name, value in {**QUICK, **options}.items())
        return f"consul+http://{agent_address}/?{query}"

    return url


@pytest.fixture
def transport(url_of: Callable[..., str]) -> Iterator[Callable[..., Any]]:
    """Makes transports, each of a ConfigOpts of its own: `transport(max_messages=1)`.

    Two that have the same options share a matchmaker and, if they serve, an HTTP server.
    """
    import oslo_messaging
    from oslo_config import cfg

    with contextlib.ExitStack() as stack:

        def make(
            url: str | None = None,
            *,
            notifies: bool = False,
            remote_modules: list[str] | None = None,
            **options: Any,
        ) -> Any:
            conf = cfg.ConfigOpts()
            conf([])
            url = url or url_of(**options)
            if notifies:
                made = oslo_messaging.get_notification_transport(conf, url=url)
            else:
                made = oslo_messaging.get_rpc_transport(
                    conf, url=url, allowed_remote_exmods=remote_modules
                )
            stack.callback(made.cleanup)
            return made

        yield make


@dataclass
class Served:
    """A server that runs, and its endpoint."""

    server: Any
    endpoint: Any

    def stop(self) -> None:
        """As a service does: no more messages, and then the end of those that it has."""
        self.endpoint.let_go.set()
        self.server.stop()
        self.server.wait()


@contextlib.contextmanager
def stopped_together() -> Iterator[list[Callable[[], object]]]:
    """Calls at its end what was added to the list, all at a time: upstream's executors take a
    second to end their threads."""
    stops: list[Callable[[], object]] = []
    try:
        yield stops
    finally:
        if stops:
            with ThreadPoolExecutor(len(stops)) as pool:
                for stopped in [pool.submit(stop) for stop in stops]:
                    stopped.result()


_numbers = itertools.count()


def of_its_own() -> dict[str, Any]:
    """Options by which a transport shares no HTTP server with any other, as if it were in another
    process."""
    return {"max_connections": 5000 + next(_numbers)}


@pytest.fixture
def serve(transport: Callable[..., Any]) -> Iterator[Callable[..., Served]]:
    """Starts RPC servers in this process: `serve(topic, "name")`, each on a port of its own."""
    import oslo_messaging

    with stopped_together() as stops:

        def start(
            topic: str,
            name: str,
            *,
            exchange: str | None = None,
            over: Any = None,
            workers: int | None = None,
            version: str | None = None,
            **options: Any,
        ) -> Served:
            if over is None:
                over = transport(**{**of_its_own(), **options})
            words = {"exchange": exchange, "topic": topic, "server": name, "version": version}
            target = oslo_messaging.Target(**words)
            endpoint = Endpoint(name)
            server = oslo_messaging.get_rpc_server(over, target, [endpoint], executor="threading")
            server.start(override_pool_size=workers)
            served = Served(server, endpoint)
            stops.append(served.stop)
            return served

        yield start


@pytest.fixture
def client(transport: Callable[..., Any]) -> Callable[..., Any]:
    """Makes RPC clients: `client(topic)`, over a transport of its own unless one is given."""
    import oslo_messaging

    def make(topic: str, *, over: Any = None, exchange: str | None = None, **options: Any) -> Any:
        words = {
            name: options.pop(name)
            for name in ("timeout", "retry", "call_monitor_timeout", "transport_options")
            if name in options
        }
        over = over or transport(**options)
        target = oslo_messaging.Target(exchange=exchange, topic=topic)
        new = getattr(oslo_messaging, "get_rpc_client", oslo_messaging.RPCClient)  # 14.0 has none
        return new(over, target, **{"timeout": CALL_SECONDS, **words})

    return make


@pytest.fixture
def listen(transport: Callable[..., Any]) -> Iterator[Callable[..., Any]]:
    """Starts notification listeners: `listen(topic, Listener("a"), pool="p")`."""
    import oslo_messaging

    with stopped_together() as stops:

        def start(
            topic: str, endpoint: Any, *, pool: str | None = None, batch: tuple[Any, ...] = ()
        ) -> Any:
            make = oslo_messaging.get_notification_listener
            words: dict[str, Any] = {}
            if batch:
                make = oslo_messaging.get_batch_notification_listener
                words = dict(zip(("batch_size", "batch_timeout"), batch, strict=True))
            listener = make(
                transport(notifies=True, **of_its_own()),
                [oslo_messaging.Target(topic=topic)],
                [endpoint],
                executor="threading",
                allow_requeue=True,
                pool=pool,
                **words,
            )
            listener.start()
            stops.append(lambda: (listener.stop(), listener.wait()))
            return listener

        yield start


@pytest.fixture
def process(tmp_path: Path, url_of: Callable[..., str]) -> Iterator[Callable[..., ServerProcess]]:
    """Starts processes that serve; they are killed after the test; their log is tmp_path/log."""
    with contextlib.ExitStack() as stack:
        log = stack.enter_context((tmp_path / "log").open("w"))
        yield lambda **options: stack.enter_context(ServerProcess(url_of(**options), log))


@pytest.fixture
def operator(agent: Node) -> Iterator[Callable[..., str]]:
    """Defines services as operators do: `operator(service, port)` on 127.0.0.1, until the end."""
    with contextlib.ExitStack() as stack:

        def define(service: str, port: int, tags: tuple[str, ...] = ()) -> str:
            service_id = f"{service}-{uuid.uuid4().hex[:8]}"
            said = {"ID": service_id, "Name": service, "Address": "127.0.0.1", "Port": port}
            body = json.dumps({**said, "Tags": list(tags)})
            tell(agent, "PUT", "/v1/agent/service/register", body)
            stack.callback(tell, agent, "PUT", f"/v1/agent/service/deregister/{service_id}")
            return f"127.0.0.1:{port}"

        yield define


@pytest.fixture
def refusing_port() -> Iterator[int]:
    """A port of 127.0.0.1 that nobody else can take, and that refuses connections."""
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        yield bound.getsockname()[1]


def matchmaker_of(transport: Any) -> Any:
    """What finds the servers of *transport*."""
    return transport._driver.matchmaker


def wait_for_hosts(client: Any, count: int) -> None:
    """Until the matchmaker of *client* finds so many hosts of its topic."""
    from consul_matchmaker.adapters.oslo.http.names import service_of

    service = service_of(client.target.exchange or "openstack", client.target.topic)
    found = matchmaker_of(client.transport)
    until(lambda: len(found.hosts(service)) == count, FOUND_SECONDS, f"{count} hosts are found")
