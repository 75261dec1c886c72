"""Answer lookups by SRV records over Consul DNS.  Never speaks HTTP, never writes.

What is asked is ``_<service>._<tag or tcp>.service[.<datacenter>].<domain>.``; how a topic becomes
a service is `naming.service_of`.
"""

from __future__ import annotations

import collections
import contextlib
import itertools
import logging
import math
import random
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import TypeVar

import dns.exception
import dns.message
import dns.name

from ..errors import ConfigurationError, InvalidTopic, TimedOut, Unavailable
from ..model import Host, Instance, Snapshot, ipv6_text
from ..naming import SERVICE_LABEL, is_translated, service_of, shard_tag
from ..settings import Settings
from ..srv_coverage import MAX_ANSWERS, TCP_LIMIT, is_covered, may_be_cut
from ..srv_wire import NOERROR, NXDOMAIN, REFUSED, SERVFAIL, BadReply, Reply, Srv
from .agents import Agents
from .dns_exchange import Channel, Stream
from .host_names import HostNames, resolve_by_system
from .traffic import Traffic

logger = logging.getLogger(__name__)

_K = TypeVar("_K")
_V = TypeVar("_V")

EXCHANGES_PER_LOOKUP = 3
"""A lookup with time enough ends after this many times ``request_timeout_seconds``."""
UDP_SHARE = 0.2
RESENDS_PER_TIMEOUT = 10
"""A query goes out by UDP twice, a tenth of the timeout apart, and after a fifth of it by TCP,
which repairs losses by itself.  More would make Consul answer a topic of thousands, which takes it
0.3 s, several times at once.  Where there is no TCP, UDP goes on every tenth: when a fifth of all
packets is lost, 0.36 of all exchanges fail, and ten of them in a row once in 27,000."""
SERVFAIL_TRIES = 3
"""While Consul elects a leader single queries fail, and the next one works (fact A9)."""
MAX_OUTSTANDING = 4
"""How many repeated queries wait for an answer, on two connections: Consul answers those of one
connection one by one, and those of two at the same time.  Measured with 1,000 hosts on two busy
cores: 6.5-7.2 bare exchanges for all of them, where one connection took 8.0."""

_RCODES = {1: "FORMERR", SERVFAIL: "SERVFAIL", 4: "NOTIMP", REFUSED: "REFUSED"}
_REMEDIES = {
    SERVFAIL: "Consul has no leader, or cannot reach it: see `consul members`",
    REFUSED: "is this Consul's DNS port, and `domain` its domain?",
}


class _Failed(Exception):
    """An agent gave an answer that is none; says which."""

    def __init__(self, rcode: int) -> None:
        text = f"answered {_RCODES.get(rcode, f'rcode {rcode}')}"
        super().__init__(f"{text} ({_REMEDIES.get(rcode, 'is this Consul DNS?')})")
        self.rcode = rcode


@dataclass(slots=True)
class _Found:
    """What DNS said of one name, or of several put together."""

    instances: dict[Instance, None] = field(default_factory=dict)
    is_complete: bool = True
    ttl_seconds: int = 0
    asked: list[dict[str, object]] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)
    """Targets whose records name no usable host, and why."""
    asked_at: float = math.inf
    """When the agent that answered was first asked, of several names the earliest."""

    def add(self, other: _Found) -> None:
        self.asked_at = min(self.asked_at, other.asked_at)
        self.instances.update(other.instances)
        self.asked += other.asked
        self.left_out.update(other.left_out)
        self.is_complete = self.is_complete and other.is_complete
        both = [ttl for ttl in (self.ttl_seconds, other.ttl_seconds) if ttl]
        self.ttl_seconds = min(both, default=0)


class DnsSrv:
    """The hosts of a topic, as Consul's catalog and health checks have them.  Thread-safe.

    Opens no socket and starts no thread when made.  Raises ConfigurationError where ``domain``,
    ``tag`` or ``datacenters`` cannot be parts of a DNS name.

    Host names, of agents as well as of services, are resolved by the system's resolver
    (*resolve*) beside the caller's thread, so that a slow one holds no lookup past its end.
    """

    finds_servers = True

    def __init__(
        self,
        settings: Settings,
        *,
        clock: Callable[[], float] = time.monotonic,
        jitter: Callable[[], float] = random.random,
        resolve: Callable[[str], list[str]] = resolve_by_system,
    ) -> None:
        self._settings = settings
        self._clock = clock
        self._timeout_seconds = settings.request_timeout_seconds
        self.longest_lookup_seconds = EXCHANGES_PER_LOOKUP * settings.request_timeout_seconds
        self._domain = _checked_domain(settings.domain)
        for setting, labels in (("tag", [settings.tag]), ("datacenters", settings.datacenters)):
            for label in labels:
                if label is not None and not SERVICE_LABEL.match(label.lower()):
                    raise ConfigurationError(
                        f"{setting}: {label!r} cannot be asked for over DNS: "
                        "use up to 62 letters, digits, '-' and '_'"
                    )
        if settings.tag is not None and settings.tag.lower() == "tcp":
            raise ConfigurationError("tag: DNS takes 'tcp' for no tag at all: give it another name")
        # Names whose query bytes, size, addresses and log lines are remembered: two of each topic
        # in use, so that none is made anew for each lookup.
        self._max_remembered = 2 * settings.max_topics
        self._queries: dict[tuple[str, str, int], bytes] = {}
        self._names = HostNames(
            ttl_seconds=settings.ttl_seconds,
            empty_ttl_seconds=settings.empty_ttl_seconds,
            most=self._max_remembered,
            clock=clock,
            resolve=resolve,
        )
        self._udp, self._tcp = Traffic(), Traffic()
        self._channels = [self._channel(address) for address in settings.addresses]
        self._agents = Agents(
            settings.addresses, "Consul DNS at", self._timeout_seconds, clock=clock, jitter=jitter
        )
        self._forget_topics()

    def _channel(self, agent: Host) -> Channel:
        return Channel(agent, self._names, self._udp, self._tcp)

    def _forget_topics(self) -> None:
        self._lock = threading.Lock()
        self._topic_of: dict[str, str] = {}
        self._said: set[tuple[str, str]] = set()
        self._large: set[str] = set()  # names whose answer did not fit UDP the last time

    def lookup(
        self, topic: str, server: str | None = None, *, timeout_seconds: float | None = None
    ) -> Snapshot:
        """Every live host of *topic*, perhaps none; with *server*, only that server's.

        *server* is the tag an instance has, else its node's name or its address, with or without
        the port.  The datacenters are asked in their order until one has hosts.

        Ends within *timeout_seconds*, by default `longest_lookup_seconds`; an answer that could
        not be completed by then is not ``is_complete``.  Raises Unavailable when Consul cannot be
        asked (TimedOut when nothing came in time), InvalidTopic when DNS cannot carry the topic's
        service.
        """
        if timeout_seconds is None:
            timeout_seconds = self.longest_lookup_seconds
        until = time.monotonic() + timeout_seconds
        service = self._service(topic)
        found, failure = _Found(), None
        asked_at = math.inf
        for datacenter in self._settings.datacenters or ("",):
            lookup = _Lookup(self, service, datacenter, until)
            try:
                found = lookup.topic() if server is None else lookup.server(server)
            except Unavailable as error:
                failure = failure or error
                continue
            # That one datacenter has none is part of the answer that another one has some.
            asked_at = min(asked_at, found.asked_at)
            if found.instances:
                break
            if found.left_out and not found.is_complete:  # an outage, and not "nobody"
                failure = failure or _unusable(service, found)
        if failure is not None and not found.instances:
            raise failure
        return Snapshot(
            topic,
            tuple(found.instances),
            "dns",
            is_complete=found.is_complete,
            ttl_seconds=float(found.ttl_seconds) if found.ttl_seconds else None,
            taken_at=asked_at,
            clock=self._clock,
            details={"service": service, "asked": found.asked, "left_out": found.left_out},
        )

    def probe(self, agent: Host, labels: str, kind: str, *, by_tcp: bool) -> Reply:
        """What *agent* says of *labels* in the domain by one transport, whatever it is worth: for
        who looks for a fault.  Raises OSError (TimeoutError) and BadReply."""
        channel = self._channel(agent)
        until = time.monotonic() + self._timeout_seconds
        try:
            query = self._query(f"{labels}.{self._domain}", kind, channel.udp_limit(until))
            if by_tcp:
                return channel.ask_tcp(query, until)
            return channel.ask_udp(query, self._timeout_seconds / RESENDS_PER_TIMEOUT, until)
        finally:
            channel.close()

    def forget(self) -> None:
        """Drop every connection without touching the network: this is a forked child now."""
        self._udp.forget()
        self._tcp.forget()
        self._names.forget()
        for channel in self._channels:
            channel.forget()
        self._agents.forget()
        self._forget_topics()

    def close(self) -> None:
        """Close every connection; a later lookup opens others."""
        for channel in self._channels:
            channel.close()

    def status(self) -> dict[str, object]:
        """Which agent is asked first, and which are left alone for now."""
        return self._agents.status()

    def wire(self) -> dict[str, dict[str, int]]:
        """What was said to agents and heard from them, by transport; see `Traffic`."""
        return {"udp": self._udp.counts(), "tcp": self._tcp.counts()}

    def __repr__(self) -> str:
        return f"<DnsSrv {self._agents!r}>"

    def _service(self, topic: str) -> str:
        settings = self._settings
        service = service_of(
            topic, settings.service_template, settings.service_map, strict=settings.strict_names
        )
        if topic in settings.service_map:
            return service  # whoever mapped two topics to one service meant it
        if is_translated(topic, settings.service_template) and self._is_first("name", topic):
            logger.warning(
                "topic %r is asked for as the Consul service %r, as DNS cannot carry its name: "
                "are that service's hosts meant? service_map says which service a topic has, and "
                "strict_names refuses this",
                topic,
                service,
            )
        other = self._topic_of.get(service)
        if other is None:
            if len(self._topic_of) < self._max_remembered:
                self._topic_of[service] = topic
        elif other != topic and self._is_first("service", service):
            logger.warning(
                "topics %r and %r are both the Consul service %r: tell them apart with service_map",
                other,
                topic,
                service,
            )
        return service

    def _is_first(self, what: str, name: str) -> bool:
        """Whether this is the first time to say *what* about *name*; the caller says it then."""
        with self._lock:
            if (what, name) in self._said or len(self._said) >= self._max_remembered:
                return False
            self._said.add((what, name))
            return True

    def _query(self, name: str, kind: str, size: int) -> bytes:
        """The query for *name*, all but its id, which every sending makes anew."""
        query = self._queries.get((name, kind, size))
        if query is None:
            try:
                query = dns.message.make_query(name, kind, use_edns=0, payload=size).to_wire()
            except dns.exception.DNSException as error:
                raise InvalidTopic(f"{name!r} cannot be asked for over DNS: {error}") from None
            _remember(self._queries, (name, kind, size), query, self._max_remembered)
        return query


class _Lookup:
    """One lookup in one datacenter, until its deadline."""

    def __init__(self, resolver: DnsSrv, service: str, datacenter: str, until: float) -> None:
        self._resolver = resolver
        self._settings = resolver._settings
        self._timeout_seconds = resolver._timeout_seconds
        self._until = until
        self._is_query = service.endswith(".query")
        self._service = service
        self._suffix = f".{datacenter}.{resolver._domain}" if datacenter else f".{resolver._domain}"
        self._addresses: dict[str, list[str]] = {}  # of targets that had to be asked for

    # -- what to ask

    def topic(self) -> _Found:
        if self._is_query:
            return self._ask(self._service + self._suffix)
        if not self._settings.shards:
            return self._ask(self._name(self._settings.tag or "tcp"))
        found = _Found()
        for number in range(self._settings.shards):
            try:
                found.add(self._ask(self._name(shard_tag(number))))
            except Unavailable:
                if not found.instances:
                    raise
                found.is_complete = False
                break
        return found

    def server(self, server: str) -> _Found:
        """By tag; when no instance has it, by node name and address out of the topic's answer."""
        tagged = _Found()
        if not self._is_query and SERVICE_LABEL.match(server.lower()) and server.lower() != "tcp":
            tagged = self._ask(self._name(server))
            if tagged.instances and self._settings.tag is None:
                return _named(server, tagged, tagged.instances)
        whole = self.topic()
        whole.asked_at = min(whole.asked_at, tagged.asked_at)
        hosts = {instance.host for instance in tagged.instances}
        return _named(
            server,
            whole,
            [
                instance
                for instance in whole.instances
                # DNS can ask for one tag only: what has both is what is in both answers.
                if instance.host in hosts
                or server in (instance.server, instance.host.address, str(instance.host))
            ],
        )

    def _name(self, tag: str) -> str:
        return f"_{self._service}._{tag}.service{self._suffix}"

    # -- whom to ask

    def _ask(self, name: str) -> _Found:
        """What the first agent that can be asked says of *name*."""
        reasons: list[str] = []
        timed_out = True
        candidates = self._resolver._agents.candidates()
        # The time first: an agent that this yields after a rest is ours to try.
        while (began := time.monotonic()) < self._until:
            candidate = next(candidates, None)
            if candidate is None:
                break
            channel = self._resolver._channels[candidate.index]
            try:
                found = self._ask_agent(channel, name)
            except (OSError, BadReply, _Failed) as error:
                reason = _reason(error)
                reasons.append(f"{candidate.address} {reason}")
                timed_out = timed_out and isinstance(error, TimeoutError)
                if isinstance(error, _Failed) and error.rcode == SERVFAIL:
                    candidate.could_not_help(reason)  # it is the cluster that fails
                    continue
                if isinstance(error, TimeoutError):
                    is_away = candidate.timed_out(reason, self._until - began)
                else:
                    is_away = candidate.failed(reason)
                if is_away:
                    channel.unreachable()
            except BaseException:
                candidate.was_not_asked()
                raise
            else:
                candidate.worked()
                return found
        if timed_out:
            tried = "; ".join(reasons) or "no time was left"
            raise TimedOut(
                f"no answer for {name} in time: {tried}: "
                "is a Consul agent's DNS there? (request_timeout_seconds allows more time)"
            )
        raise Unavailable(f"no usable answer for {name}: {'; '.join(reasons)}")

    # -- how to ask

    def _ask_agent(self, channel: Channel, name: str) -> _Found:
        """What the agent says of *name*, completed if it could have been cut."""
        limit = channel.udp_limit(min(time.monotonic() + self._timeout_seconds, self._until))
        asked_at = self._resolver._clock()
        query = self._resolver._query(name, "SRV", limit)
        large = self._resolver._large
        reply, is_tcp = self._exchange(channel, query, tcp_first=name in large)
        if reply.answers and not reply.records:
            raise BadReply("answered with records that were not asked for")
        union = _Union()
        union.add(reply)
        if may_be_cut(reply, TCP_LIMIT if is_tcp else limit, is_tcp=is_tcp):
            if len(large) < self._resolver._max_remembered:
                large.add(name)
            union.was_completed = True
            self._complete_union(channel, query, union, is_tcp=is_tcp)
        elif is_tcp and not may_be_cut(reply, limit, is_tcp=False):
            large.discard(name)
        found = self._found(name, channel, union)
        found.asked_at = asked_at
        found.asked.append(
            {
                "name": name,
                "agent": str(channel.agent),
                "transport": "tcp" if is_tcp or union.was_completed else "udp",
                "rcode": "NXDOMAIN" if reply.rcode == NXDOMAIN else "NOERROR",
                "answers": union.answers,
                "records": len(union.records),
            }
        )
        return found

    def _exchange(
        self, channel: Channel, query: bytes, *, tcp_first: bool = False
    ) -> tuple[Reply, bool]:
        """One usable reply and whether it came by TCP."""
        for tries_left in range(SERVFAIL_TRIES - 1, -1, -1):
            reply, is_tcp = self._transmit(channel, query, tcp_first or channel.wants_tcp_first)
            if reply.rcode in (NOERROR, NXDOMAIN):
                break
            if reply.rcode != SERVFAIL or not tries_left:
                raise _Failed(reply.rcode)
        return reply, is_tcp

    def _transmit(self, channel: Channel, query: bytes, tcp_first: bool) -> tuple[Reply, bool]:
        now = time.monotonic()
        until = min(now + self._timeout_seconds, self._until)
        resend = self._timeout_seconds / RESENDS_PER_TIMEOUT
        if not tcp_first:
            try:
                udp_until = min(now + self._timeout_seconds * UDP_SHARE, until)
                return channel.ask_udp(query, resend, udp_until), False
            except OSError:  # lost, or kept out by a firewall
                if time.monotonic() >= until:
                    raise
        try:
            reply = channel.ask_tcp(query, until)
        except TimeoutError:
            raise
        except OSError:  # nothing listens there, or nothing gets through
            return channel.ask_udp(query, resend, until), False
        if not tcp_first:
            channel.udp_is_silent()
        return reply, True

    def _complete_union(
        self, channel: Channel, query: bytes, union: _Union, *, is_tcp: bool
    ) -> None:
        """Ask again by TCP, and again, until every record was seen, or the time is over."""
        union.is_complete = False
        try:
            with Stream(channel, self._until) as one, Stream(channel, self._until) as other:
                if not is_tcp:
                    one.send(query)
                    reply = _with_records(one, query)
                    is_cut = may_be_cut(reply, TCP_LIMIT, is_tcp=True)
                    if not is_cut or len(reply.records) > len(union.records):
                        union.restart()
                    union.add(reply)
                    if not is_cut:
                        union.is_complete = True
                        return
                next_stream = itertools.cycle((one, other))
                waiting: collections.deque[Stream] = collections.deque()
                while not union.is_covered():
                    if union.is_unshuffled or union.answers >= MAX_ANSWERS:
                        return
                    # No more than it takes if they bring nothing new: none is left over then.
                    while len(waiting) < MAX_OUTSTANDING and not union.is_covered(len(waiting)):
                        waiting.append(next(next_stream))
                        waiting[-1].send(query)
                    union.add(_with_records(waiting.popleft(), query))
                union.is_complete = not union.is_unshuffled
        except (OSError, BadReply, _Failed) as error:
            # What was found is worth more than an error, and the snapshot says what it is.
            logger.debug("%s: incomplete, %s", channel.agent, error)

    # -- what it means

    def _found(self, name: str, channel: Channel, union: _Union) -> _Found:
        found = _Found(is_complete=union.is_complete, ttl_seconds=union.ttl_seconds)
        for record in union.records.values():
            if record.target == ".":
                found.left_out["."] = "the service is declared to be absent"
                continue  # RFC 2782: decidedly not available at this domain
            if not record.port:
                if self._resolver._is_first("port 0", name):
                    logger.warning(
                        "%s: an instance at %s has port 0 and is left out: "
                        "register it with a port of its own",
                        name,
                        record.target,
                    )
                found.left_out[record.target] = "port 0"
                continue
            addresses = _decoded(record.target) or _printed(union.addresses, record.target)
            try:
                if addresses is None and self._is_consuls(record.target):
                    addresses = self._asked(channel, record.target)
                if addresses is None:
                    addresses = self._by_system(record.target)
            except ConfigurationError:
                if self._resolver._is_first("target", name):
                    logger.warning("%s: %s is no host name, left out", name, record.target)
                found.left_out[record.target] = "no host name"
                continue
            except (OSError, BadReply, _Failed) as error:
                logger.debug("%s: no address of %s: %s", name, record.target, error)
                found.left_out[record.target] = f"no address: {error}"
                found.is_complete = False
                continue
            if not addresses:
                found.left_out[record.target] = "no address"
            server = _node(record.target)
            for address in addresses:
                host = Host(address, record.port)
                found.instances[Instance(host, server, record.priority, record.weight)] = None
        return found

    def _is_consuls(self, target: str) -> bool:
        """Whether *target* is a name that only Consul can resolve, and not the system."""
        target = target.lower()
        return target.endswith("." + self._resolver._domain) or ".node." in target

    def _asked(self, channel: Channel, target: str) -> list[str] | None:
        """The addresses of a target that came without; [] when there are none, None if it is no
        name of Consul's at all."""
        name = target.lower()
        if name not in self._addresses:
            addresses: list[str] = []
            for kind in ("A", "AAAA"):
                try:
                    query = self._resolver._query(target, kind, channel.udp_limit(self._until))
                    reply, _ = self._exchange(channel, query)
                except InvalidTopic as error:
                    raise BadReply(str(error)) from None
                except _Failed as error:
                    if error.rcode == REFUSED:
                        return None
                    raise
                addresses = _printed(reply.addresses, target) or []
                if reply.answers and not addresses:
                    raise BadReply("answered with records that were not asked for")
                if addresses:
                    break
            self._addresses[name] = addresses
        return self._addresses[name]

    def _by_system(self, target: str) -> list[str]:
        """The addresses of a host name that is not Consul's; [] when there is no such name.

        Raises ConfigurationError for what is no host name, OSError when the resolver cannot tell.
        """
        name = Host.parse(f"{target.rstrip('.').lower()}:1").address
        until = min(time.monotonic() + self._timeout_seconds, self._until)
        addresses = self._resolver._names.addresses(name, until)
        # One way to reach a host: IPv4, or IPv6 where there are none.
        return sorted(each for each in addresses if (":" in each) == (":" in addresses[0]))


class _Union:
    """The records of several answers to one query."""

    def __init__(self) -> None:
        self.is_complete = True
        self.is_unshuffled = False
        self.was_completed = False  # by TCP
        self._ttls: list[int] = []
        self.addresses: dict[str, set[bytes]] = {}
        self.records: dict[tuple[str, int], Srv] = {}
        self.restart()

    def restart(self) -> None:
        """The next answer is the first to count: those before had less room."""
        self.answers = 0
        self._smallest = 0
        self._last: list[Srv] = []

    def add(self, reply: Reply) -> None:
        self.is_unshuffled = len(self._last) > 16 and reply.records == self._last
        self._last = reply.records
        self._smallest = min(self._smallest or len(reply.records), len(reply.records))
        self.answers += 1
        self._ttls.append(reply.ttl_seconds)
        self.records.update(((record.target, record.port), record) for record in reply.records)
        if not self.addresses:
            self.addresses = reply.addresses
            return
        for name, addresses in reply.addresses.items():
            self.addresses.setdefault(name, set()).update(addresses)

    def is_covered(self, more: int = 0) -> bool:
        """Whether everything was seen, were there *more* answers that brought nothing new."""
        return is_covered(len(self.records), self._smallest, self.answers + more)

    @property
    def ttl_seconds(self) -> int:
        return min((ttl for ttl in self._ttls if ttl), default=0)


def _remember(table: dict[_K, _V], key: _K, value: _V, most: int) -> None:
    """Put it into *table*, in place of the oldest entry where there is no more room."""
    if len(table) >= most:
        with contextlib.suppress(StopIteration, RuntimeError):  # another thread was faster
            table.pop(next(iter(table)), None)
    table[key] = value


def _with_records(stream: Stream, query: bytes) -> Reply:
    """The next reply of *stream* that has records; one that fails is asked for again."""
    for tries_left in range(SERVFAIL_TRIES - 1, -1, -1):
        reply = stream.receive()
        if reply.records:
            break
        if not tries_left:
            raise _Failed(reply.rcode)
        stream.send(query)
    return reply


def _checked_domain(domain: str) -> str:
    """*domain* as it ends a name, or ConfigurationError."""
    try:
        name = dns.name.from_text(domain.strip("."))
    except dns.exception.DNSException as error:
        raise ConfigurationError(f"domain: {domain!r} is no DNS domain: {error}") from None
    return name.to_text().lower()


def _named(server: str, found: _Found, instances: Iterable[Instance]) -> _Found:
    """Those *instances* of *found*, all going by the name *server*."""
    named = {
        Instance(instance.host, server, instance.priority, instance.weight): None
        for instance in instances
    }
    return _Found(
        named, found.is_complete, found.ttl_seconds, found.asked, found.left_out, found.asked_at
    )


def _unusable(service: str, found: _Found) -> Unavailable:
    reasons = [f"{target} ({reason})" for target, reason in sorted(found.left_out.items())]
    return Unavailable(
        f"{service} has instances, and none can be used now: {', '.join(reasons[:3])}: retry"
    )


def _decoded(target: str) -> list[str] | None:
    """The address in ``0a090905.addr.<datacenter>.<domain>.``, None for other names."""
    if target[8:14].lower() != ".addr." and target[32:38].lower() != ".addr.":
        return None
    try:
        return [_address(bytes.fromhex(target.partition(".")[0]))]
    except ValueError:  # no hex digits, or too few of them
        return None


def _printed(addresses: Mapping[str, set[bytes]], target: str) -> list[str] | None:
    """The addresses of *target*: IPv4, or IPv6 where there are none; one way to reach a node."""
    packed = addresses.get(target.lower())
    if not packed:
        return None
    return [_address(each) for each in sorted(packed) if len(each) == min(map(len, packed))]


def _address(packed: bytes) -> str:
    return ".".join(map(str, packed)) if len(packed) == 4 else ipv6_text(packed)


def _node(target: str) -> str | None:
    """The node's name in ``<node>.node.<datacenter>.<domain>.``; it may have dots itself."""
    node, separator, _ = target.rpartition(".node.")
    return node if separator else None


def _reason(error: Exception) -> str:
    if isinstance(error, TimeoutError):
        return "did not answer"
    if isinstance(error, OSError):
        return f"cannot be reached ({error.strerror or error})"
    return str(error)
