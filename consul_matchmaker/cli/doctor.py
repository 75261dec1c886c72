"""Examine what a matchmaker needs of Consul; each finding says how to mend what is wrong."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator, Iterator
from typing import TYPE_CHECKING, Literal, NamedTuple

from ..backends.dns.wire import NXDOMAIN, REFUSED, SERVFAIL, BadReply, Reply
from ..errors import Denied, Unavailable
from ..model import Host
from ..settings import Settings

if TYPE_CHECKING:  # catalog mode never imports what kv mode needs, nor the reverse
    from ..backends.dns.resolver import DnsSrv
    from ..backends.http.api import ConsulApi
    from ..backends.kv.store import Kv
    from ..backends.service.store import Services

PROBE = "consul-matchmaker-doctor"
SERVERS = "_consul._tcp.service"
"""The service that every Consul cluster has: its servers."""
LOOPBACK_NAME, LOOPBACK = "7f000001.addr", b"\x7f\x00\x00\x01"
"""A name that an agent answers by itself, without the servers and their ACLs (fact A4)."""


class Finding(NamedTuple):
    """What one check found."""

    level: Literal["ok", "warn", "fail"]
    what: str
    text: str


def findings(settings: Settings) -> Iterator[Finding]:
    """Every finding as soon as it is known.

    Each takes a few requests, and each request at most ``request_timeout_seconds`` per agent.
    Writes nothing but, in kv mode, one session (with ``liveness=check`` a service too), and in
    service mode one service, which readers of that name may see; both are removed at once.  Raises
    ConfigurationError.
    """
    return {"catalog": _of_catalog, "kv": _of_kv, "service": _of_service}[settings.mode](settings)


# --- catalog -------------------------------------------------------------------------------------


def _of_catalog(settings: Settings) -> Iterator[Finding]:
    from ..backends.dns.resolver import DnsSrv

    with contextlib.closing(DnsSrv(settings)) as dns_srv:
        for address in settings.addresses:
            yield from _of_dns(dns_srv, address, settings)


def _of_dns(dns_srv: DnsSrv, address: Host, settings: Settings) -> Iterator[Finding]:
    udp = _heard(dns_srv, address, by_tcp=False)
    tcp = _heard(dns_srv, address, by_tcp=True)
    if isinstance(udp, str) and isinstance(tcp, str):
        yield Finding(
            "fail",
            f"{address} DNS",
            f"no answer by UDP ({udp}) or by TCP ({tcp}): start a Consul agent there, give its "
            "DNS port in addresses, or open the firewall",
        )
        return
    for name, heard, loss in (
        ("UDP", udp, "about once a minute a lookup waits for it, and then uses TCP"),
        ("TCP", tcp, "topics with more hosts than UDP carries stay incomplete"),
    ):
        if isinstance(heard, str):
            text = f"no answer ({heard}): {loss}; open the firewall"
            yield Finding("warn", f"{address} {name}", text)
        else:
            yield Finding("ok", f"{address} {name}", "answers")
    by_tcp = isinstance(udp, str)
    for datacenter in settings.datacenters or ("",):
        yield _of_domain(dns_srv, address, settings, datacenter, by_tcp)


def _of_domain(
    dns_srv: DnsSrv, address: Host, settings: Settings, datacenter: str, by_tcp: bool
) -> Finding:
    what = f"{address} domain {settings.domain}"
    if datacenter:
        what += f" datacenter {datacenter}"
    reply = _heard(dns_srv, address, datacenter, by_tcp=by_tcp)
    if isinstance(reply, str):
        return Finding("fail", what, f"no answer this time ({reply}): try again")
    if reply.records:
        # Any server answers, also one without a leader (fact A9).
        text = (
            f"lists {len(reply.records)} Consul servers; DNS cannot tell whether they have a "
            "leader: `doctor` with a consul+kv:// URL of this agent can"
        )
        return Finding("ok", what, text)
    if reply.rcode == SERVFAIL:
        text = "SERVFAIL: Consul has no leader, or cannot reach it: see `consul members`"
        return Finding("fail", what, text)
    if reply.rcode not in (REFUSED, NXDOMAIN, 0) or not _is_consul(dns_srv, address, by_tcp):
        return Finding(
            "fail",
            what,
            f"the server there is not Consul for this domain (rcode {reply.rcode}): set "
            "domain to the agent's, and addresses to its DNS port",
        )
    text = "answers, but hides Consul's servers: give the agent's default token service read"
    if datacenter:
        text += ", or correct datacenters"
    return Finding("warn", what, f"{text}; in DNS a hidden service looks like one without hosts")


def _is_consul(dns_srv: DnsSrv, address: Host, by_tcp: bool) -> bool:
    try:
        reply = dns_srv.probe(address, LOOPBACK_NAME, "A", by_tcp=by_tcp)
    except (OSError, BadReply):
        return False
    return any(LOOPBACK in found for found in reply.addresses.values())


def _heard(dns_srv: DnsSrv, address: Host, datacenter: str = "", *, by_tcp: bool) -> Reply | str:
    """The agent's answer about Consul's own servers, or why there is none."""
    labels = f"{SERVERS}.{datacenter}" if datacenter else SERVERS
    try:
        return dns_srv.probe(address, labels, "SRV", by_tcp=by_tcp)
    except (OSError, BadReply) as error:
        return str(getattr(error, "strerror", None) or error)


# --- kv ------------------------------------------------------------------------------------------


def _of_kv(settings: Settings) -> Iterator[Finding]:
    from ..backends.http.api import ConsulApi
    from ..backends.kv.store import Kv

    api = ConsulApi(settings)
    with contextlib.closing(Kv(api, settings)) as kv:
        usable = 0
        for address in settings.addresses:
            usable += yield from _of_http(api, address)
        if usable:
            yield from _of_keys(kv, settings)
            yield _tried("a session", lambda: _with_a_session(kv))
            yield _tried(f"writing {settings.prefix}/", lambda: _with_a_write(kv))


def _of_http(api: ConsulApi, address: Host) -> Generator[Finding, None, bool]:
    what = f"{address} HTTP"
    try:
        answer = api.call("GET", "/v1/status/leader", at=address)
        leader = answer.json()
        if not isinstance(leader, str):
            raise answer.unexpected()
    except (Unavailable, Denied) as error:
        yield Finding("fail", what, str(error))
        return False
    version = _version(api, address)
    if not leader:
        text = f"{version} answers, but knows no leader: see `consul operator raft list-peers`"
        yield Finding("fail", what, text)
        return False
    yield Finding("ok", what, f"{version} answers, the leader is {leader}")
    return True


def _version(api: ConsulApi, address: Host) -> str:
    try:
        told = api.call("GET", "/v1/agent/self", at=address).json()
        return f"Consul {told['Config']['Version']}"
    except (Unavailable, Denied, TypeError, KeyError):
        return "Consul (this token may not read its version)"


def _of_keys(kv: Kv, settings: Settings) -> Iterator[Finding]:
    from ..backends.kv.orphans import find_orphans

    what = f"reading {settings.prefix}/"
    try:
        orphans = find_orphans(kv)
    except (Unavailable, Denied) as error:
        yield Finding("fail", what, str(error))
        return
    yield Finding("ok", what, "allowed")
    foreign = [key for key, orphan in orphans.items() if not orphan.is_ours]
    left = [key for key, orphan in orphans.items() if orphan.is_ours]
    what = f"keys under {settings.prefix}/"
    if left:
        yield Finding(
            "warn",
            what,
            f"{len(left)} that no session holds and no process will remove, such as {left[0]!r}: "
            "`consul-matchmaker sweep` lists them, and removes them with --remove",
        )
    if foreign:
        yield Finding(
            "warn",
            f"{what} that are not ours",
            f"{len(foreign)}, such as {foreign[0][:100]!r}: this program never touches them; "
            "if another program uses this prefix, set prefix to another one",
        )
    if not orphans:
        yield Finding("ok", what, "every key is understood, and held by a session")


# --- service -------------------------------------------------------------------------------------


def _of_service(settings: Settings) -> Iterator[Finding]:
    from ..backends.http.api import ConsulApi
    from ..backends.service.store import Services

    api = ConsulApi(settings)
    with contextlib.closing(Services(api, settings)) as services:
        usable = 0
        for address in settings.addresses:
            if (yield from _of_http(api, address)):
                usable += 1
                yield from _of_versions(api, address)
        if usable:
            yield _tried("reading services", lambda: _with_a_read(services), is_of_readers=True)
            yield _tried(f"registering a service {PROBE}", lambda: _with_a_service(services))


def _of_versions(api: ConsulApi, address: Host) -> Iterator[Finding]:
    """An agent of 1.19 or later before older servers does not leave out what is unhealthy."""
    what = f"{address} version"
    try:
        agent = api.call("GET", "/v1/agent/self", at=address).json()["Config"]["Version"]
        members = api.call("GET", "/v1/agent/members", at=address).json()
        servers = {
            each["Tags"]["build"].partition(":")[0]
            for each in members
            if each["Tags"].get("role") == "consul"
        }
    except (Unavailable, Denied, TypeError, KeyError, AttributeError):
        return  # it may not be read: nothing depends on it
    older = sorted(each for each in servers if _numbers(each) < (1, 19) <= _numbers(agent))
    if older:
        yield Finding(
            "warn",
            what,
            f"the agent is Consul {agent}, and servers are {', '.join(older)}: programs that ask "
            "this agent for healthy services also get others (this one leaves them out): upgrade "
            "the servers first",
        )
    elif servers:
        yield Finding("ok", what, f"Consul {agent}, servers {', '.join(sorted(servers))}")


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".")[:2] if part.isdecimal())


def _with_a_read(services: Services) -> str:
    names = services.topics()
    services.prove_nodes_readable()
    return f"allowed: there are {len(names)} services"


def _with_a_service(services: Services) -> str:
    services.prove_writable(PROBE)
    return "allowed: it was registered and removed"


# --- both ----------------------------------------------------------------------------------------


def _with_a_session(kv: Kv) -> str:
    lease = kv.open()
    kv.release(lease)
    return f"with a TTL of {lease.ttl_seconds:g} s was created and destroyed"


def _with_a_write(kv: Kv) -> str:
    kv.prove_writable()
    return "allowed"


def _tried(what: str, attempt: Callable[[], str], *, is_of_readers: bool = False) -> Finding:
    """What *attempt* says; unless that *is_of_readers*, only programs that register need it."""
    try:
        return Finding("ok", what, attempt())
    except (Unavailable, Denied) as error:
        rest = "" if is_of_readers else " (a program that only looks up does not need this)"
        return Finding("fail", what, f"{error}{rest}")
