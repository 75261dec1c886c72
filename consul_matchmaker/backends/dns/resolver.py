"""Answer lookups by SRV records over Consul DNS.  Never speaks HTTP, never writes.

What is asked is in `names`, how it travels in `exchange`, what bytes mean in `wire`, and when an
answer is whole in `coverage`.
"""

from __future__ import annotations

import collections
import contextlib
import functools
import itertools
import logging
import math
import random
import time
from collections.abc import Callable

from ...errors import ConfigurationError, TimedOut, Unavailable
from ...model import Host, Instance, Snapshot, ipv6_text
from ...settings import Settings
from ..agents import Agents
from ..host_names import HostNames, resolve_by_system
from ..service_names import namer
from ..traffic import Traffic
from .coverage import TCP_LIMIT, UDP_LIMIT, Union, may_be_cut, shorter
from .exchange import Channel, Stream
from .names import Names, address_of, node_of, query_for
from .wire import NXDOMAIN, SERVFAIL, BadReply, ErrorReply, Reply

logger = logging.getLogger(__name__)

EXCHANGES_PER_LOOKUP = 3
"""A lookup with time enough ends after this many times ``request_timeout_seconds``."""
MAX_OUTSTANDING = 4
"""How many repeated queries wait for an answer, on two connections: Consul answers those of one
connection one by one, and those of two at the same time.  Measured with 1,000 hosts on two busy
cores: 6.5-7.2 bare exchanges for all of them, where one connection took 8.0."""
FAILURES_IN_A_ROW = 2 * MAX_OUTSTANDING
"""Each of them may fail twice, as while Consul elects a leader (fact A9)."""


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
        # Two names of each topic in use, so that nothing is made or said anew for each lookup.
        self._max_remembered = 2 * settings.max_topics
        remembered = functools.lru_cache(self._max_remembered)
        self._service = namer(settings)
        self._query = remembered(query_for)
        self._warn_once = remembered(logger.warning)
        self._large: set[str] = set()  # names whose answer did not fit UDP the last time
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

    def _channel(self, agent: Host) -> Channel:
        return Channel(agent, self._host_names, self._timeout_seconds, self._udp, self._tcp)

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
        failure = None
        asked_at = math.inf
        for datacenter in self._settings.datacenters or ("",):
            found = _Lookup(self, service, datacenter, until)
            try:
                found.topic() if server is None else found.server(server)
            except Unavailable as error:
                failure = failure or error
                continue
            # That one datacenter has none is part of the answer that another one has some.
            asked_at = min(asked_at, found.asked_at)
            if found.instances:
                break
            if found.left_out and not found.is_complete:  # an outage, and not "nobody"
                failure = failure or found.unusable()
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
            version=0 if found.instances else found.serial,
        )

    def probe(self, agent: Host, labels: str, kind: str, *, by_tcp: bool) -> Reply:
        """What *agent* says of *labels* in the domain by one transport, whatever it is worth: for
        who looks for a fault.  Raises OSError (TimeoutError) and BadReply."""
        until = time.monotonic() + self._timeout_seconds
        with contextlib.closing(self._channel(agent)) as channel:
            query = self._query(f"{labels}.{self._names.domain}", kind)
            return channel.ask_tcp(query, until) if by_tcp else channel.ask_udp(query, until)

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


class _Lookup:
    """One lookup in one datacenter, until its deadline, and what it found."""

    def __init__(self, resolver: DnsSrv, service: str, datacenter: str, until: float) -> None:
        self.instances: dict[Instance, None] = {}
        self.is_complete = True
        self.ttl_seconds = 0
        self.serial = 0
        """When Consul denied that there are more, by its own clock; 0 where it did not."""
        self.asked: list[dict[str, object]] = []
        self.left_out: dict[str, str] = {}
        """Targets whose records name no usable host, and why."""
        self.asked_at = math.inf
        """When the agent that answered was first asked, of several names the earliest."""
        self._resolver = resolver
        self._service, self._datacenter = service, datacenter
        self._until = until

    # -- what to ask

    def topic(self) -> None:
        for name in self._resolver._names.of_topic(self._service, self._datacenter):
            try:
                self._ask(name)
            except Unavailable:
                if not self.instances:
                    raise
                self.is_complete = False  # what was found is worth more than an error
                break

    def server(self, server: str) -> None:
        """By tag; when no instance has it, by node name and address out of the topic's answer."""
        resolver = self._resolver
        name = resolver._names.of_server(self._service, server, self._datacenter)
        if name is not None:
            self._ask(name)
        if not self.instances or resolver._settings.tag is not None:
            # DNS can ask for one tag only: what has both is what is in both answers.
            tagged = {instance.host for instance in self.instances}
            self.instances = {}
            self.topic()
            self.instances = {
                each: None
                for each in self.instances
                if each.host in tagged or server in (each.server, each.host.address, str(each.host))
            }
        self.instances = {
            Instance(each.host, server, each.priority, each.weight): None for each in self.instances
        }

    def unusable(self) -> Unavailable:
        reasons = [f"{target} ({reason})" for target, reason in sorted(self.left_out.items())]
        return Unavailable(
            f"{self._service} has instances, and none can be used now: {', '.join(reasons[:3])}: "
            "retry"
        )

    # -- whom to ask

    def _ask(self, name: str) -> None:
        """Take what the first agent that can be asked says of *name*."""
        query = self._resolver._query(name, "SRV")
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
                self._ask_agent(channel, name, query)
            except (OSError, BadReply) as error:
                channel.raise_if_closed()
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
                return
        if timed_out:
            tried = "; ".join(reasons) or "no time was left"
            raise TimedOut(
                f"no answer for {name} in time: {tried}: "
                "is a Consul agent's DNS there? (request_timeout_seconds allows more time)"
            )
        raise Unavailable(f"no usable answer for {name}: {'; '.join(reasons)}")

    # -- how to ask

    def _ask_agent(self, channel: Channel, name: str, query: bytes) -> None:
        """Take what the agent says of *name*, completed if it could have been cut."""
        asked_at = self._resolver._clock()
        large = self._resolver._large
        reply, is_tcp = channel.ask(query, self._until, tcp_first=name in large)
        if reply.answers and not reply.records:
            raise BadReply("answered with records that were not asked for")
        if may_be_cut(reply, UDP_LIMIT) and len(large) < self._resolver._max_remembered:
            large.add(name)
        else:
            large.discard(name)
        union = Union()
        union.add(reply)
        by_tcp = is_tcp
        if may_be_cut(reply, TCP_LIMIT if is_tcp else UDP_LIMIT):
            by_tcp = True
            if not is_tcp:
                union.restart()
            if not self._complete(channel, query, union):
                self.is_complete = False
        self.asked_at = min(self.asked_at, asked_at)
        self.serial = max(self.serial, reply.serial)
        self.ttl_seconds = shorter(self.ttl_seconds, union.ttl_seconds)
        self.asked.append(
            {
                "name": name,
                "agent": str(channel.agent),
                "transport": "tcp" if by_tcp else "udp",
                "rcode": "NXDOMAIN" if reply.rcode == NXDOMAIN else "NOERROR",
                "answers": union.answers,
                "records": len(union.records),
            }
        )
        self._take(union, channel, name)

    def _complete(self, channel: Channel, query: bytes, union: Union) -> bool:
        """Ask again by TCP, and again, until every record was seen; whether that came in time."""
        failures = 0
        waiting: collections.deque[Stream] = collections.deque()
        try:
            with channel.stream(self._until) as one, channel.stream(self._until) as other:
                next_stream = itertools.cycle((one, other))
                while not union.is_covered():
                    if union.is_unshuffled:
                        return False
                    # No more than it takes if they bring nothing new: none is left over then.
                    while not waiting or (
                        union.answers
                        and len(waiting) < MAX_OUTSTANDING
                        and not union.is_covered(len(waiting))
                    ):
                        waiting.append(next(next_stream))
                        waiting[-1].send(query)
                    reply = waiting.popleft().receive()
                    if reply.records:
                        failures = 0
                        union.add(reply)
                        if not may_be_cut(reply, TCP_LIMIT):
                            return True
                    elif (failures := failures + 1) > FAILURES_IN_A_ROW:
                        raise ErrorReply(reply.rcode)
                return not union.is_unshuffled
        except (OSError, BadReply) as error:
            # What was found is worth more than an error, and the snapshot says what it is.
            logger.debug("%s: incomplete, %s", channel.agent, error)
            return False

    # -- what it means

    def _take(self, union: Union, channel: Channel, name: str) -> None:
        """Take the instances that *union* has of *name*, and what it lacks."""
        for record in union.records.values():
            addresses, reason = [], "no address"
            try:
                if record.port:
                    addresses = self._addresses(record.target, union.addresses, channel)
                else:
                    reason = "port 0"
                    self._resolver._warn_once(
                        "%s: instances with port 0 are left out: register them with a port", name
                    )
            except ConfigurationError:
                reason = "no host name"
                self._resolver._warn_once("%s: targets that are no host name are left out", name)
            except (OSError, BadReply) as error:
                logger.debug("%s: no address of %s: %s", name, record.target, error)
                reason = f"no address: {error}"
                self.is_complete = False
            if not addresses:
                self.left_out[record.target] = reason
            server = node_of(record.target)
            for address in addresses:
                host = Host(address, record.port)
                self.instances[Instance(host, server, record.priority, record.weight)] = None

    def _addresses(self, target: str, known: dict[str, set[bytes]], channel: Channel) -> list[str]:
        """The addresses of *target*: IPv4, or IPv6 where there are none; [] when it has none.

        They are in its name, or *known* as they came beside the record; Consul is asked for names
        in its domain, and the system for others.  Raises OSError and BadReply when nobody can tell
        in time, and ConfigurationError for what is no host name.
        """
        packed = address_of(target)
        if packed is not None:
            return [_text(packed)]
        name = target.lower()
        if name not in known and name.endswith("." + self._resolver._names.domain):
            known[name] = self._ask_addresses(name, channel)
        if name in known:
            smallest = min(map(len, known[name]), default=0)
            return [_text(each) for each in sorted(known[name]) if len(each) == smallest]
        host_name = Host.parse(f"{name.rstrip('.')}:1").address
        until = min(time.monotonic() + self._resolver._timeout_seconds, self._until)
        found = self._resolver._host_names.addresses(host_name, until)
        return [each for each in found if (":" in each) == (":" in found[0])]

    def _ask_addresses(self, name: str, channel: Channel) -> set[bytes]:
        for kind in ("A", "AAAA"):
            reply, _ = channel.ask(self._resolver._query(name, kind), self._until)
            found = reply.addresses.get(name, set())
            if reply.answers and not found:
                raise BadReply("answered with records that were not asked for")
            if found:
                break
        return found


def _text(packed: bytes) -> str:
    return ".".join(map(str, packed)) if len(packed) == 4 else ipv6_text(packed)


def _reason(error: Exception) -> str:
    if isinstance(error, TimeoutError):
        return "did not answer"
    if isinstance(error, OSError):
        return f"cannot be reached ({error.strerror or error})"
    return str(error)
