"""Answer lookups by SRV records over Consul DNS.  Never speaks HTTP, never writes.

What is asked is in `names`, how it travels in `exchange`, what bytes mean in `wire`, when an answer
is whole in `coverage`, and where a target is in `targets`.
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
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from ...errors import ConfigurationError, InvalidTopic, TimedOut, Unavailable
from ...model import Host, Instance, Snapshot
from ...settings import Settings
from ..agents import Agents
from ..host_names import HostNames, resolve_by_system
from ..traffic import Traffic
from .coverage import MAX_ANSWERS, TCP_LIMIT, Union, may_be_cut
from .exchange import SERVFAIL_TRIES, Channel, Stream
from .names import Names, is_translated, query_for, service_of
from .targets import Targets, node_of
from .wire import NXDOMAIN, SERVFAIL, BadReply, ErrorReply, Reply

logger = logging.getLogger(__name__)

EXCHANGES_PER_LOOKUP = 3
"""A lookup with time enough ends after this many times ``request_timeout_seconds``."""
MAX_OUTSTANDING = 4
"""How many repeated queries wait for an answer, on two connections: Consul answers those of one
connection one by one, and those of two at the same time.  Measured with 1,000 hosts on two busy
cores: 6.5-7.2 bare exchanges for all of them, where one connection took 8.0."""


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

    Opens no socket and starts no thread when made.

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
        self._names = Names(settings)
        # Names whose query bytes, size, addresses and log lines are remembered: two of each topic
        # in use, so that none is made anew for each lookup.
        self._max_remembered = 2 * settings.max_topics
        self._queries: dict[tuple[str, str, int], bytes] = {}
        self._host_names = HostNames(
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
        self._lock = threading.Lock()
        self._topic_of: dict[str, str] = {}
        self._said: set[tuple[str, str]] = set()
        self._large: set[str] = set()  # names whose answer did not fit UDP the last time

    def _channel(self, agent: Host) -> Channel:
        return Channel(agent, self._host_names, self._udp, self._tcp)

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
            query = self._query(f"{labels}.{self._names.domain}", kind, channel.udp_limit(until))
            if by_tcp:
                return channel.ask_tcp(query, until)
            return channel.ask_udp(query, self._timeout_seconds, until)
        finally:
            channel.close()

    def close(self) -> None:
        """Close every connection for ever; a lookup under way, or later, raises Unavailable."""
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
            query = query_for(name, kind, size)
            while len(self._queries) >= self._max_remembered:
                with contextlib.suppress(StopIteration, RuntimeError):  # another thread was faster
                    self._queries.pop(next(iter(self._queries)), None)
            self._queries[name, kind, size] = query
        return query


class _Lookup:
    """One lookup in one datacenter, until its deadline."""

    def __init__(self, resolver: DnsSrv, service: str, datacenter: str, until: float) -> None:
        self._resolver = resolver
        self._timeout_seconds = resolver._timeout_seconds
        self._until = until
        self._service, self._datacenter = service, datacenter
        self._targets = Targets(resolver._names.domain, resolver._host_names)

    # -- what to ask

    def topic(self) -> _Found:
        found = _Found()
        for name in self._resolver._names.of_topic(self._service, self._datacenter):
            try:
                found.add(self._ask(name))
            except Unavailable:
                if not found.instances:
                    raise
                found.is_complete = False  # what was found is worth more than an error
                break
        return found

    def server(self, server: str) -> _Found:
        """By tag; when no instance has it, by node name and address out of the topic's answer."""
        tagged = _Found()
        name = self._resolver._names.of_server(self._service, server, self._datacenter)
        if name is not None:
            tagged = self._ask(name)
            if tagged.instances and self._resolver._settings.tag is None:
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
            except (OSError, BadReply) as error:
                reason = _reason(error)
                reasons.append(f"{candidate.address} {reason}")
                timed_out = timed_out and isinstance(error, TimeoutError)
                if isinstance(error, ErrorReply) and error.rcode == SERVFAIL:
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
        limit = channel.udp_limit(self._exchange_until())
        asked_at = self._resolver._clock()
        query = self._resolver._query(name, "SRV", limit)
        large = self._resolver._large
        reply, is_tcp = channel.ask(
            query, self._timeout_seconds, self._until, tcp_first=name in large
        )
        if reply.answers and not reply.records:
            raise BadReply("answered with records that were not asked for")
        union = Union()
        union.add(reply)
        by_tcp = is_tcp
        if may_be_cut(reply, TCP_LIMIT if is_tcp else limit, is_tcp=is_tcp):
            if len(large) < self._resolver._max_remembered:
                large.add(name)
            self._complete(channel, query, union, is_tcp=is_tcp)
            by_tcp = True
        elif is_tcp and not may_be_cut(reply, limit, is_tcp=False):
            large.discard(name)
        found = _Found(is_complete=union.is_complete, ttl_seconds=union.ttl_seconds)
        found.asked_at = asked_at
        found.asked.append(
            {
                "name": name,
                "agent": str(channel.agent),
                "transport": "tcp" if by_tcp else "udp",
                "rcode": "NXDOMAIN" if reply.rcode == NXDOMAIN else "NOERROR",
                "answers": union.answers,
                "records": len(union.records),
            }
        )
        self._take_instances(found, name, channel, union)
        return found

    def _exchange_until(self) -> float:
        return min(time.monotonic() + self._timeout_seconds, self._until)

    def _complete(self, channel: Channel, query: bytes, union: Union, *, is_tcp: bool) -> None:
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
        except (OSError, BadReply) as error:
            # What was found is worth more than an error, and the snapshot says what it is.
            logger.debug("%s: incomplete, %s", channel.agent, error)

    # -- what it means

    def _take_instances(self, found: _Found, name: str, channel: Channel, union: Union) -> None:
        """Put into *found* what *union* has of *name*, and what it lacks."""

        def ask(target: str, kind: str) -> Reply:
            try:
                query = self._resolver._query(target, kind, channel.udp_limit(self._until))
            except InvalidTopic as error:  # the target is longer than a name may be
                raise BadReply(str(error)) from None
            return channel.ask(query, self._timeout_seconds, self._until)[0]

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
            try:
                addresses = self._targets.addresses(
                    record.target, union.addresses, ask, self._exchange_until()
                )
            except ConfigurationError:
                if self._resolver._is_first("target", name):
                    logger.warning("%s: %s is no host name, left out", name, record.target)
                found.left_out[record.target] = "no host name"
                continue
            except (OSError, BadReply) as error:
                logger.debug("%s: no address of %s: %s", name, record.target, error)
                found.left_out[record.target] = f"no address: {error}"
                found.is_complete = False
                continue
            if not addresses:
                found.left_out[record.target] = "no address"
            server = node_of(record.target)
            for address in addresses:
                host = Host(address, record.port)
                found.instances[Instance(host, server, record.priority, record.weight)] = None


def _with_records(stream: Stream, query: bytes) -> Reply:
    """The next reply of *stream* that has records; one that fails is asked for again."""
    for tries_left in range(SERVFAIL_TRIES - 1, -1, -1):
        reply = stream.receive()
        if reply.records:
            break
        if not tries_left:
            raise ErrorReply(reply.rcode)
        stream.send(query)
    return reply


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


def _reason(error: Exception) -> str:
    if isinstance(error, TimeoutError):
        return "did not answer"
    if isinstance(error, OSError):
        return f"cannot be reached ({error.strerror or error})"
    return str(error)
