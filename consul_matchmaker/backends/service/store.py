"""Registrations as services of an agent, which everybody sees who knows Consul.

A lease is this process's incarnation: each service bears its id, and a TTL check that the process
beats (`Beats`).  The agent ends nothing by itself but what is not beaten: that is critical at once,
and gone from the catalog a minute later.  So a renewal asks the agent what it has of the lease, and
what it lacks is registered again.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import threading
import time
import uuid
from collections.abc import Callable, Collection, Mapping, Set
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import quote

from ...errors import ConfigurationError, Denied, LeaseLost, TimedOut, Unavailable
from ...model import Held, Host, Lease, Registration
from ...settings import Settings
from ...worker import seconds_since_boot
from .. import OnDoubt
from ..beats import REGISTER_PATH, Beats, ttl_check
from ..http.api import NO_PARAMETERS, Answer, ConsulApi, go_duration
from ..http.leader import Confirmer, leader_by
from ..service_names import SERVICE_LABEL
from .poll import Poll, confirmer
from .reader import META_LEASE, META_SERVER, META_TOPIC, Reader

logger = logging.getLogger(__name__)

CATALOG_SECONDS = 2.0
"""So long an agent may take to tell the servers of a change; it takes milliseconds."""
REPLACE = {"replace-existing-checks": "true"}


@dataclass(slots=True)
class _Incarnation:
    """What is known of one lease."""

    agent: Host
    node: str | None
    """The agent's node id, where the token may read it."""
    answered_at: float
    services: dict[Registration, str] = field(default_factory=dict)
    """The ids of what the agent may have."""
    confirmed: set[Registration] = field(default_factory=set)
    """Those that are beaten for, and that the catalog has shown."""
    was_silent: bool = False
    """Whether the agent did not answer a renewal since the last that it answered."""


class Services(Reader):
    """Resolver, and Registrar over the agent in use.  Thread-safe."""

    def __init__(
        self, api: ConsulApi, settings: Settings, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        super().__init__(api, settings, clock=clock)
        # A suspended machine has to notice that its beats are late.
        lasting = seconds_since_boot if clock is time.monotonic else clock
        self._beats = Beats(api, settings.check_ttl_seconds, clock=lasting)
        self._lock = threading.Lock()
        self._leases: dict[str, _Incarnation] = {}
        self._paused: set[Registration] = set()
        self._hidden_from: int | None = None
        """The token, by `token_changes`, to which the catalog does not show what it registers."""
        self._agent_seconds = min(settings.request_timeout_seconds, settings.check_ttl_seconds / 2)

    def close(self) -> None:
        """Close every connection but those of polls; services are left alone."""
        self._beats.close()
        super().close()

    def watch(self, topic: str | None) -> Poll:
        """Blocking queries for *topic*; nothing is asked yet."""
        assert topic is not None
        return Poll(self, topic, self._datacenters[0])

    def confirmer(self) -> Confirmer:
        """What asks whether the queries of `watch` would tell of a change."""
        return confirmer(self)

    # -- Registrar ---------------------------------------------------------------------------

    def open(self, on_doubt: OnDoubt | None = None) -> Lease:
        """This process's incarnation, at the agent in use: it needs no word of Consul's yet."""
        agent, node = self._node()
        lease = Lease(uuid.uuid4().hex, self._settings.lease_ttl_seconds)
        with self._lock:
            self._leases[lease.id] = _Incarnation(agent, node, self.clock())
        self._beats.begin(agent, on_doubt)
        return lease

    def publish(self, lease: Lease, registration: Registration) -> None:
        """Register the service, its check passing; return once the catalog shows it."""
        incarnation = self._incarnation(lease)
        service_id = self._id(lease, registration)
        with self._lock:  # before the call: if its outcome stays unknown, renew() finds out
            incarnation.services[registration] = service_id
            incarnation.confirmed.discard(registration)
            is_paused = registration in self._paused
        name, ttl_seconds = self.service_of(registration.topic), self._settings.check_ttl_seconds
        body = definition_of(
            lease, registration, name, service_id, ttl_seconds, is_paused=is_paused
        )
        sent_at, token_changes = self._beats.now(), self.api.token_changes
        needs = f'service "{name}" write'
        self._ask_agent(incarnation.agent, "PUT", REGISTER_PATH, REPLACE, body, needs=needs)
        self._beats.keep(_check_id(service_id), body, sent_at, token_changes)
        if self._is_paused(registration):  # perhaps since then: registering ends a maintenance
            self._set_maintenance(incarnation, service_id)
        if self._hidden_from != self.api.token_changes:
            self._wait_for_catalog(incarnation, registration, service_id)
        with self._lock:
            incarnation.confirmed.add(registration)

    def withdraw(self, lease: Lease, registration: Registration) -> None:
        """Deregister the one service of *registration*; return once the catalog is without it."""
        incarnation = self._incarnation(lease)
        service_id = self._id(lease, registration)
        with self._lock:
            incarnation.confirmed.discard(registration)
        self._deregister(incarnation, service_id)
        name = self.service_of(registration.topic)
        self._gone(incarnation.agent, name, f'Service.ID == "{service_id}"')
        with self._lock:
            incarnation.services.pop(registration, None)
            self._paused.discard(registration)

    def pause(self, registration: Registration) -> bool:
        """Put the service into maintenance: readers leave it, and it stays registered.

        Returns whether it was published.  Raises Unavailable and Denied.
        """
        with self._lock:
            found = [
                (each, each.services[registration])
                for each in self._leases.values()
                if registration in each.services
            ]
            if found:
                self._paused.add(registration)
        for incarnation, service_id in found:
            self._set_maintenance(incarnation, service_id)
            if not self._is_paused(registration):  # registered again meanwhile
                self._set_maintenance(incarnation, service_id, is_on=False)
        return bool(found)

    def resume(self, registration: Registration) -> bool:
        """Have the next `publish` end the maintenance; return whether it was in it."""
        with self._lock:
            was_paused = registration in self._paused
            self._paused.discard(registration)
        return was_paused

    def _is_paused(self, registration: Registration) -> bool:
        with self._lock:
            return registration in self._paused

    def renew(self, lease: Lease) -> Collection[Registration]:
        """What the agent has of *lease*: a service it lacks, or whose check it does not know, is
        to be registered again.

        Where the agent has not answered for the whole TTL, and there are others, the lease is lost:
        another is opened at one of them.
        """
        incarnation = self._incarnation(lease)
        now = self.clock()
        try:
            present = self._present(incarnation, lease)
        except Unavailable as error:
            incarnation.was_silent = True
            silent_seconds = now - incarnation.answered_at
            if silent_seconds < lease.ttl_seconds or len(self._settings.addresses) == 1:
                raise
            self._drop(lease)
            lost = LeaseLost(f"{incarnation.agent} has not answered for {silent_seconds:.1f} s")
            lost.why = f"the agent {incarnation.agent} does not answer"
            raise lost from error
        with self._lock:
            services, confirmed = dict(incarnation.services), set(incarnation.confirmed)
        for stray in present - set(services.values()):  # registered by a request that came late
            self._deregister(incarnation, stray)
        unknown = self._beats.unknown
        held = {
            registration
            for registration in confirmed
            if services[registration] in present
            and _check_id(services[registration]) not in unknown
        }
        cause = ""
        if held < confirmed:
            cause = self._cause(incarnation, present, unknown)
        incarnation.answered_at, incarnation.was_silent = now, False
        # Of what is on its way nothing is known: the agent may have it, and the catalog may not.
        return Held.of(held, services.keys() - confirmed, cause=cause)

    def release(self, lease: Lease) -> None:
        """Deregister every service of *lease*; return once the catalog is without them."""
        with self._lock:
            incarnation = self._leases.get(lease.id)
        if incarnation is None:
            return
        failure: Unavailable | Denied | None = None
        for service_id in {*self._present(incarnation, lease), *incarnation.services.values()}:
            try:
                self._deregister(incarnation, service_id)
            except (Unavailable, Denied) as error:
                failure = failure or error
                if isinstance(error, TimedOut):  # the others would take as long
                    break
        if failure is not None:
            raise failure
        for topic in {registration.topic for registration in incarnation.services}:
            condition = f'Service.Meta.{META_LEASE} == "{lease.id}"'
            self._gone(incarnation.agent, self.service_of(topic), condition)
        with self._lock:
            self._paused.difference_update(incarnation.services)
        self._drop(lease)

    def expire(self, topic: str, host: Host) -> int:
        """Deregister every service of *topic* on *host*, whoever registered it; return how many.

        At the agent that has it where that is the one in use, else in the catalog: an agent that
        lives has it back within about a minute.
        """
        name = self.service_of(topic)
        agent, node_id = self._node()
        answer = self.api.call("GET", f"/v1/health/service/{name}", self.consistency, at=agent)
        entries = answer.json()
        if not isinstance(entries, list):
            raise answer.unexpected()
        local = self._local(agent)
        count = 0
        for entry in entries:
            try:
                node, service = entry["Node"], entry["Service"]
                meta = service.get("Meta") or {}
                place = (service.get("Address") or node["Address"], service["Port"])
                service_id = service["ID"]
            except (AttributeError, KeyError, TypeError):
                raise answer.unexpected() from None
            if place != (host.address, host.port) or meta.get(META_TOPIC, topic) != topic:
                continue
            # Two nodes may have services of one id.
            own = local.get(service_id)
            is_own = own is not None and own.get("Address") == service.get("Address") != ""
            if node_id is not None:
                is_own = own is not None and node.get("ID") == node_id
            if is_own:
                path = f"/v1/agent/service/deregister/{quote(service_id, safe='')}"
                self._ask_agent(agent, "PUT", path, accept=(404, 500))
            else:
                wanted = {"Node": node["Node"], "ServiceID": service_id}
                if node.get("Datacenter"):
                    wanted["Datacenter"] = node["Datacenter"]
                body = json.dumps(wanted).encode("utf-8")
                self.api.call("PUT", "/v1/catalog/deregister", body=body, at=agent)
            where = f'Service.ID == "{service_id}" and Node.Node == "{node["Node"]}"'
            self._gone(agent, name, where)
            count += 1
        return count

    def prove_writable(self, topic: str) -> None:
        """Raise Denied when the token may not register *topic*: registers it, and takes it back."""
        lease = self.open()
        try:
            self.publish(lease, Registration(topic, Host("192.0.2.1", 1)))
        except (Unavailable, Denied):
            with contextlib.suppress(Unavailable, Denied):
                self.release(lease)
            raise
        self.release(lease)

    # -- at the agent ------------------------------------------------------------------------

    def _node(self) -> tuple[Host, str | None]:
        """The agent in use, and its node's id if the token may read it."""
        answer = self.api.call("GET", "/v1/agent/self", accept=(403,))
        assert answer.address is not None
        return answer.address, _node_id(answer)

    def _incarnation(self, lease: Lease) -> _Incarnation:
        with self._lock:
            incarnation = self._leases.get(lease.id)
        if incarnation is None:
            raise LeaseLost(f"incarnation {lease.id} was released: open another")
        return incarnation

    def _drop(self, lease: Lease) -> None:
        with self._lock:
            incarnation = self._leases.pop(lease.id, None)
        for service_id in incarnation.services.values() if incarnation is not None else ():
            self._beats.drop(_check_id(service_id))

    def _present(self, incarnation: _Incarnation, lease: Lease) -> Set[str]:
        """The ids of the services of *lease* that its agent has."""
        return self._local(incarnation.agent, f'Meta.{META_LEASE} == "{lease.id}"').keys()

    def _local(self, agent: Host, condition: str | None = None) -> dict[str, dict[str, Any]]:
        """The services of *agent*, by id."""
        params = {} if condition is None else {"filter": condition}
        answer = self._ask_agent(agent, "GET", "/v1/agent/services", params)
        found = answer.json()
        if not (isinstance(found, dict) and all(isinstance(one, dict) for one in found.values())):
            raise answer.unexpected()
        return found

    def _ask_agent(
        self,
        agent: Host,
        method: str,
        path: str,
        params: Mapping[str, str] = NO_PARAMETERS,
        body: bytes = b"",
        *,
        accept: tuple[int, ...] = (),
        needs: str = "",
    ) -> Answer:
        """What *agent* says that it answers by itself: it needs no time for the servers, and one
        that just starts may take a connection and forget it."""
        return self.api.call(
            method,
            path,
            params,
            body,
            accept=accept,
            at=agent,
            timeout_seconds=self._agent_seconds,
            needs=needs,
        )

    def _deregister(self, incarnation: _Incarnation, service_id: str) -> None:
        """Have the agent forget it; one that does not know it says 500 or 404."""
        check_id = _check_id(service_id)
        if (definition := self._beats.outdated(check_id)) is not None:
            self._ask_agent(incarnation.agent, "PUT", REGISTER_PATH, REPLACE, definition)
        self._beats.drop(check_id)
        path = f"/v1/agent/service/deregister/{service_id}"
        answer = self._ask_agent(incarnation.agent, "PUT", path, accept=(404, 500))
        if answer.status != 200 and self._knows(incarnation, service_id):
            raise Unavailable(f"{answer.where}: status {answer.status}, '{answer.said}'")

    def _knows(self, incarnation: _Incarnation, service_id: str) -> bool:
        path = f"/v1/agent/service/{service_id}"
        return self._ask_agent(incarnation.agent, "GET", path, accept=(404,)).status == 200

    def _set_maintenance(
        self, incarnation: _Incarnation, service_id: str, *, is_on: bool = True
    ) -> None:
        path = f"/v1/agent/service/maintenance/{service_id}"
        params = {"enable": "true" if is_on else "false", "reason": "draining"}
        self._ask_agent(incarnation.agent, "PUT", path, params)

    def _cause(
        self, incarnation: _Incarnation, present: Collection[str], unknown: Mapping[str, str]
    ) -> str:
        """Why the agent lacks something, as far as it can be told."""
        if unknown and set(incarnation.services.values()) <= set(present):
            return next(iter(unknown.values()))
        try:
            node = _node_id(
                self._ask_agent(incarnation.agent, "GET", "/v1/agent/self", accept=(403,))
            )
        except Unavailable:
            node = None
        before, incarnation.node = incarnation.node, node or incarnation.node
        if node is not None and before is not None and node != before:
            return "another agent, or one that lost its data, answers there"
        if incarnation.was_silent:
            return "the agent was restarted without them"
        return "deregistered by somebody"

    # -- in the catalog ----------------------------------------------------------------------

    def _wait_for_catalog(
        self, incarnation: _Incarnation, registration: Registration, service_id: str
    ) -> None:
        """Return once the catalog has it; what the agent alone knows nobody sees."""
        name, condition = self.service_of(registration.topic), f'Service.ID == "{service_id}"'
        if self._becomes(incarnation.agent, name, condition, is_there=True):
            return
        leader_by(self.api, incarnation.agent)  # without one nobody sees it
        try:
            self.prove_nodes_readable(name, at=incarnation.agent)
        except Denied:
            self._hidden_from = self.api.token_changes
            logger.info(
                "the catalog does not show %s to this token: an agent's word counts from now on; "
                'with node_prefix "" read "published" means that everybody can see it',
                registration,
            )
        else:
            raise _not_told(incarnation.agent)

    def _gone(self, agent: Host, name: str, condition: str) -> None:
        if not self._becomes(agent, name, condition, is_there=False):
            raise _not_told(agent)

    def _becomes(self, agent: Host, name: str, condition: str, *, is_there: bool) -> bool:
        """Whether *condition* holds of an instance, or of none, within `CATALOG_SECONDS`."""
        until = time.monotonic() + CATALOG_SECONDS
        params = {"filter": condition}
        path = f"/v1/health/service/{name}"
        answer = self.api.call("GET", path, params, at=agent)
        while bool(answer.json()) != is_there:
            left = until - time.monotonic()
            if left <= 0:
                return False
            waiting = {**params, "index": str(answer.index)}
            answer = self.api.call("GET", path, waiting, at=agent, wait_seconds=max(0.05, left))
        return True

    # -- what is written ---------------------------------------------------------------------

    def _id(self, lease: Lease, registration: Registration) -> str:
        """One for each registration and incarnation, so that no two processes share any."""
        what = json.dumps(
            [lease.id, registration.topic, str(registration.host), registration.server]
        )
        digest = hashlib.blake2s(what.encode("utf-8"), digest_size=8).hexdigest()
        return f"{self.service_of(registration.topic)}-{digest}"


def definition_of(
    lease: Lease,
    registration: Registration,
    name: str,
    service_id: str,
    check_ttl_seconds: float,
    *,
    is_paused: bool,
) -> bytes:
    """What the agent is told: the service *name* with the options of *registration*; its check is
    critical where it *is_paused*, so that in no moment it is healthy."""
    options, host, server = registration.service, registration.host, registration.server
    if host.port is None:
        raise ConfigurationError(f"a service has an address and a port, not {host}")
    tags = [*options.tags]
    if server is not None and SERVICE_LABEL.match(server.lower()) and server not in tags:
        tags.append(server)  # so that catalog mode finds it
    meta = {**options.meta, META_TOPIC: registration.topic, META_LEASE: lease.id}
    if server is not None:
        meta[META_SERVER] = server
    beaten = ttl_check(_check_id(service_id), check_ttl_seconds)
    if is_paused:
        beaten["Status"] = "critical"
    checks = [beaten]
    if options.check is not None:
        # Who is not up yet waits for the first probe; others need no more than the beats say.
        every = check_ttl_seconds if options.is_up else max(1.0, check_ttl_seconds / 3)
        probe: dict[str, object] = {
            "CheckID": f"{service_id}:probe",
            "Interval": go_duration(every),
            **probe_of(options.check),
        }
        if options.is_up:
            probe["Status"] = "passing"
        checks.append(probe)
    service = {
        "ID": service_id,
        "Name": name,
        "Tags": tags,
        "Meta": meta,
        "Address": host.address,
        "Port": host.port,
        "Weights": {"Passing": options.weight, "Warning": 1},
        "Checks": checks,
    }
    return json.dumps(service).encode("utf-8")


def probe_of(url: str) -> dict[str, object]:
    """What Consul's definition of a check has for *url*."""
    scheme, _, rest = url.partition("://")
    kind, target = {"tcp": ("TCP", rest), "grpc": ("GRPC", rest)}.get(scheme, ("HTTP", url))
    return {"Name": "probed by the agent", kind: target}


def _not_told(agent: Host) -> TimedOut:
    return TimedOut(f"{agent} has not told the servers within {CATALOG_SECONDS:g} s: retry")


def _check_id(service_id: str) -> str:
    return f"{service_id}:ttl"


def _node_id(answer: Answer) -> str | None:
    if answer.status != 200:
        return None
    try:
        return str(answer.json()["Config"]["NodeID"])
    except (KeyError, TypeError):
        raise answer.unexpected() from None
