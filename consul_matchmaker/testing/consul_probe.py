"""Ask a Consul node who leads, and whether it is ready for work.

For programs that run a cluster (the demo, the tests), not for applications: every function takes a
`Node`, makes short requests, and raises `NotReady` with the reason when the answer is no.
"""

import http.client
import json
import time
import uuid
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import dns.exception
import dns.message
import dns.query
import dns.rcode

REQUEST_SECONDS = 2.0
POLL_SECONDS = 0.02
CATCH_UP_SECONDS = 1.0  # a follower hears of a write with the leader's next message, in 0.1 s
PROBE_PREFIX = "consul-matchmaker-probe"

T = TypeVar("T")


class NotReady(Exception):
    """Not yet, and why.  Asking again later may succeed."""


@dataclass(frozen=True, slots=True)
class Node:
    """One Consul agent, and where it answers ("host:port", as the caller can reach it)."""

    name: str
    is_server: bool
    http: str
    dns: str
    rpc: str = ""  # as the cluster itself knows a server: what /v1/status/leader answers
    serves_http: bool = True
    serves_dns: bool = True


def wait_until(check: Callable[[], T], timeout_seconds: float) -> T:
    """What *check* returns once it no longer raises NotReady.  Raises TimeoutError, with why."""
    deadline = time.monotonic() + timeout_seconds
    while True:
        try:
            return check()
        except NotReady as reason:
            if time.monotonic() >= deadline:
                raise TimeoutError(f"still so after {timeout_seconds:.0f} s: {reason}") from reason
        time.sleep(POLL_SECONDS)


def request(
    node: Node, method: str, path: str, body: str | None = None, *, token: str = ""
) -> tuple[int, str]:
    """Status and text of one HTTP exchange.  Raises NotReady when there is no answer at all."""
    connection = http.client.HTTPConnection(node.http, timeout=REQUEST_SECONDS)
    try:
        headers = {"X-Consul-Token": token} if token else {}
        connection.request(method, path, body=body, headers=headers)
        response = connection.getresponse()
        return response.status, response.read().decode("utf-8", "replace")
    except (OSError, http.client.HTTPException) as error:
        reason = f"{node.name} does not answer HTTP on {node.http} ({error!r})"
        raise NotReady(reason) from error
    finally:
        connection.close()


def read_json(node: Node, path: str, *, token: str = "") -> Any:
    """The JSON answer to a GET.  Raises NotReady for anything but a 200."""
    status, text = request(node, "GET", path, token=token)
    if status != 200:
        raise NotReady(f"{node.name} answers {path} with {status} {text.strip()[:200]}")
    return json.loads(text)


def agreed_leader(servers: Sequence[Node], quorum: int) -> str:
    """The name of the server that at least *quorum* of *servers* follow."""
    followed: Counter[str] = Counter()
    reasons = []
    for server in servers:
        try:
            followed[read_json(server, "/v1/status/leader")] += 1
        except NotReady as reason:
            reasons.append(str(reason))
    names = {server.rpc: server.name for server in servers}
    for address, votes in followed.items():
        if votes >= quorum and address in names:
            return names[address]
    raise NotReady(f"no leader is agreed on: {dict(followed)} {'; '.join(reasons)}".strip())


def check_ready(nodes: Sequence[Node], *, token: str = "") -> None:
    """Every node passes its health check, takes part in reads and writes, and answers DNS.

    The value written through one node must be visible in the *stale* reads of every other: a
    server just restarted answers stale reads as if the cluster were empty until it caught up.
    """
    speaking = [node for node in nodes if node.serves_http]
    if not speaking:
        raise NotReady("no node serves HTTP")
    checks = read_json(speaking[0], "/v1/health/state/passing", token=token)
    alive = {check["Node"] for check in checks if check["CheckID"] == "serfHealth"}
    if missing := sorted({node.name for node in nodes} - alive):
        raise NotReady(f"not (yet) alive in the catalog: {', '.join(missing)}")
    servers = sum(node.is_server for node in nodes)
    for node in speaking:
        _check_kv(node, speaking, token)
        if not node.is_server:
            _check_connections(node, servers, token)
    for node in nodes:
        if node.serves_dns:
            check_dns(node, may_be_hidden=bool(token))


def _check_kv(writer: Node, readers: Sequence[Node], token: str) -> None:
    value = uuid.uuid4().hex
    path = f"/v1/kv/{PROBE_PREFIX}/{writer.name}-{value}"
    status, text = request(writer, "PUT", path, value, token=token)
    if status != 200 or text.strip() != "true":
        raise NotReady(f"{writer.name} refuses a write: {status} {text.strip()[:200]}")

    def see(reader: Node) -> None:
        status, text = request(reader, "GET", f"{path}?raw&stale", token=token)
        if status != 200 or text != value:
            raise NotReady(f"{reader.name} does not (yet) see what {writer.name} wrote")

    try:
        for reader in readers:
            wait_until(partial(see, reader), CATCH_UP_SECONDS)
    except TimeoutError as error:
        raise NotReady(str(error.__cause__)) from error
    finally:
        request(writer, "DELETE", path, token=token)


def _check_connections(agent: Node, servers: int, token: str) -> None:
    """A client agent reaches the leader through every server, not only through the one it uses.

    It keeps a connection to each it ever used, and finds out that one is dead when it is used
    again: whoever asked gets a 500.  After every error, also one of the asker's, it goes on to
    its next server; so one refused request for each server has tried them all.
    """
    refused = "Invalid Behavior setting"  # what the leader says: the request reached it
    for _ in range(servers):
        status, text = request(
            agent, "PUT", "/v1/session/create", '{"Behavior": "none-such"}', token=token
        )
        if refused not in text:
            raise NotReady(f"{agent.name} reaches no leader by one server: {status} {text[:200]}")


def check_dns(node: Node, *, may_be_hidden: bool = False) -> None:
    """The node's DNS finds the servers, as service `consul`.

    With *may_be_hidden*, an access rule may hide that service: NXDOMAIN is then as good.
    """
    query = dns.message.make_query("consul.service.consul.", "A")
    address, _, port = node.dns.rpartition(":")
    try:
        answer = dns.query.udp(query, address, REQUEST_SECONDS, int(port))
    except (OSError, dns.exception.DNSException) as error:
        reason = f"{node.name} does not answer DNS on {node.dns} ({error!r})"
        raise NotReady(reason) from error
    rcode = answer.rcode()
    is_found = rcode == dns.rcode.NOERROR and answer.answer
    if not is_found and not (may_be_hidden and rcode == dns.rcode.NXDOMAIN):
        raise NotReady(f"{node.name} finds no server by DNS ({dns.rcode.to_text(rcode)})")
