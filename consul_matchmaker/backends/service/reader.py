"""Read which instances of a topic's service are healthy, as every program that uses Consul does."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

from ...errors import ConfigurationError, Denied, Unavailable
from ...model import ZONE, Host, Instance, Snapshot
from ...settings import Settings
from ..http.api import NO_PARAMETERS, Answer, ConsulApi, Line, timeout_until
from ..http.leader import leader_by
from ..service_names import namer

logger = logging.getLogger(__name__)

META_TOPIC, META_SERVER, META_LEASE = "matchmaker_topic", "matchmaker_server", "matchmaker_lease"
"""What a registration of ours says in its service's Meta: its topic, as two topics may be the same
service; its server; and the incarnation of the process."""
CONSUL = "consul"
"""The service of Consul's own servers."""


class Reader:
    """A Resolver over `/v1/health/service`.  Thread-safe."""

    finds_servers = False
    can_watch_all = False

    def __init__(
        self, api: ConsulApi, settings: Settings, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.api = api
        self.clock = clock
        self._settings = settings
        self._datacenters = settings.datacenters or ("",)
        self.service_of = namer(settings)
        """The name of a topic's service; raises InvalidTopic."""
        each = settings.request_timeout_seconds * len(settings.addresses)
        self.longest_lookup_seconds = each * len(self._datacenters)
        asked = settings.consistency
        self.consistency: Mapping[str, str] = {} if asked == "default" else {asked: ""}
        """The parameter of every read."""
        self._reads_nodes_by: int | None = None
        """The token, as `ConsulApi.token_changes` counts it, that was shown a node."""
        self.is_confirmed_by_leader = not settings.reads_may_lag and not settings.datacenters

    def lookup(self, topic: str, server: str | None = None, *, timeout_seconds: float) -> Snapshot:
        """Every healthy instance of *topic*, perhaps none; with *server*, only that server's.

        Of several datacenters, that of the first which has one; each may take its share of the time
        that is left, so that one which hangs leaves some for the others.  The version is the first
        datacenter's index, 0 where that cannot be asked: each has an index of its own, and what is
        doubted is that those before have none.
        """
        until = time.monotonic() + timeout_seconds
        found: Snapshot | None = None
        failure: Unavailable | None = None
        taken_at, version = math.inf, 0
        for place, datacenter in enumerate(self._datacenters):
            now = time.monotonic()
            share = (until - now) / (len(self._datacenters) - place)
            try:
                answer = self.ask(topic, datacenter, now + share)
            except Unavailable as error:
                failure = failure or error
                continue
            # That one datacenter has none is part of the answer that another one has some.
            found = self.snapshot_of(topic, answer, answer.asked_at)
            taken_at = min(taken_at, found.taken_at)
            version = answer.index if place == 0 else version
            found = replace(found, taken_at=taken_at, version=version)
            if server is not None:
                found = found.for_server(server)
            if found.instances:
                return found
        if failure is not None or found is None:
            assert failure is not None
            raise failure
        return found

    def topics(self) -> list[str]:
        """The name of every service that the token may read, sorted, but for Consul's own; these
        are no topics where a topic's service has another name.

        Raises Denied where that is none at all: there is Consul's own at least.
        """
        answer = self.api.call(
            "GET", "/v1/catalog/services", self._parameters(self._datacenters[0])
        )
        found = answer.json()
        if not isinstance(found, dict):
            raise answer.unexpected()
        # That others are hidden (Consul 1.11 says so) is usual: a token is for its services.
        if not found:
            raise _hidden(answer)
        return sorted(name for name in found if name != CONSUL)

    def status(self) -> dict[str, object]:
        """Which agent is in use."""
        return self.api.status()

    def wire(self) -> dict[str, dict[str, int]]:
        """What was said to agents and heard from them, by transport; see `Traffic`."""
        return self.api.wire()

    def close(self) -> None:
        """Close every connection but those of polls; services are left alone."""
        self.api.close()

    def __repr__(self) -> str:
        return f"<{type(self).__name__} at {self.api!r}>"

    # -- for what reads and writes here ------------------------------------------------------

    def ask(
        self,
        topic: str,
        datacenter: str = "",
        until: float = math.inf,
        *,
        at: Host | None = None,
        index: int = 0,
        wait_seconds: float | None = None,
        line: Line | None = None,
    ) -> Answer:
        """Consul's answer; with *wait_seconds* once something changed after *index*.

        Raises Denied when the token may not read that service: Consul says then that it has none.
        """
        name = self.service_of(topic)
        params = self._parameters(datacenter)
        if not self._settings.accept_warning:
            params["passing"] = ""
        if self._settings.tag is not None:
            params["tag"] = self._settings.tag
        near = self._settings.near
        if near is None and wait_seconds is not None and self.is_confirmed_by_leader:
            near = "_agent"  # has it wait at the leader, see `poll`
        if near is not None:
            params["near"] = near
        if index > 0:
            params["index"] = str(index)
        answer = self.api.call(
            "GET",
            f"/v1/health/service/{name}",
            params,
            timeout_seconds=timeout_until(until),
            at=at,
            wait_seconds=wait_seconds,
            line=line,
        )
        if answer.is_filtered:
            raise _hidden(answer, name)
        if answer.body.strip() == b"[]":
            self._prove_readable(name, answer, until, line)
        return answer

    def snapshot_of(self, topic: str, answer: Answer, asked_at: float) -> Snapshot:
        """What *answer* says of *topic*; raises Unavailable."""
        left_out: dict[str, str] = {}
        try:
            found = dict(self._instances(topic, answer.json(), left_out))
        except (AttributeError, KeyError, TypeError, ValueError):
            raise answer.unexpected() from None
        return Snapshot(
            topic,
            # Consul's own order where that is asked for.
            tuple(found.values() if self._settings.near else (found[key] for key in sorted(found))),
            "service",
            taken_at=asked_at - answer.age_seconds,
            clock=self.clock,
            details={
                "service": self.service_of(topic),
                "agent": str(answer.address),
                "transport": "http",
                "status": answer.status,
                "index": answer.index,
                "left_out": left_out,
            },
            version=answer.index,
        )

    def _instances(
        self, topic: str, entries: Any, left_out: dict[str, str]
    ) -> Iterator[tuple[tuple[str, int, str], Instance]]:
        if not isinstance(entries, list):
            raise TypeError
        for entry in entries:
            node, service = entry["Node"], entry["Service"]
            meta: dict[str, str] = service.get("Meta") or {}
            if (other := meta.get(META_TOPIC, topic)) != topic:
                left_out[service["ID"]] = f"of topic {other!r}, which has the same service"
                continue
            # An agent of 1.19 before older servers does not filter as it was asked (fact G7).
            statuses = {check["Status"] for check in entry.get("Checks") or ()}
            allowed = {"passing", "warning"} if self._settings.accept_warning else {"passing"}
            if not statuses <= allowed:
                left_out[service["ID"]] = "not healthy"
                continue
            address, port = service.get("Address") or node["Address"], service["Port"]
            try:
                host = Host.parse(f"[{address}]:{port}" if ":" in address else f"{address}:{port}")
            except ConfigurationError as error:
                left_out[service["ID"]] = str(error)
                continue
            weights = service.get("Weights") or {}
            weight = weights.get("Warning" if "warning" in statuses else "Passing", 1)
            server = meta.get(META_SERVER) or node["Node"]
            yield (
                (host.address, host.port or 0, server),
                Instance(
                    host,
                    server,
                    weight=weight,
                    tags=tuple(service.get("Tags") or ()),
                    meta=_shown(meta, node, service),
                    node=node["Node"],
                    datacenter=node.get("Datacenter"),
                ),
            )

    def _parameters(self, datacenter: str) -> dict[str, str]:
        return {**self.consistency, **({"dc": datacenter} if datacenter else {})}

    def _prove_readable(self, name: str, answer: Answer, until: float, line: Line | None) -> None:
        """Raise Denied when the token may not read the service *name*, or no node.

        Consul hides what a token may not read, as if it did not exist (fact D4); only the agent's
        own view of one service is refused with 403.  A token for some nodes only cannot be told:
        of the others it sees nothing.
        """
        path = f"/v1/agent/health/service/name/{name}"
        try:
            self.api.call(
                "GET",
                path,
                {"format": "text"},
                accept=(404,),
                timeout_seconds=timeout_until(until),
                at=answer.address,
                line=line,
            )
        except Denied:
            raise _hidden(answer, name) from None
        except Unavailable as error:  # 503: it is on that agent, and not healthy
            logger.debug("%s: %s", answer.where, error)
        self.prove_nodes_readable(name, until, answer.address, line)

    def prove_nodes_readable(
        self,
        name: str | None = None,
        until: float = math.inf,
        at: Host | None = None,
        line: Line | None = None,
    ) -> None:
        """Raise Denied when the token may read no node: then it sees no instance of any service,
        and before 1.11 Consul does not say so.

        Asked until it was shown once for this token.  Whoever may read all nodes is sent one of
        10,000: the leader's, or all of them where the catalog has none by that address.
        """
        token = self.api.token_changes
        if token == self._reads_nodes_by:
            return

        leader = leader_by(self.api, at, timeout_seconds=timeout_until(until), line=line)
        address = leader.rpartition(":")[0].strip("[]")
        for params in ({"filter": f'Address == "{address}"'}, NO_PARAMETERS):
            answer = self.api.call(
                "GET",
                "/v1/catalog/nodes",
                params,
                timeout_seconds=timeout_until(until),
                at=at,
                line=line,
            )
            nodes = answer.json()
            if not isinstance(nodes, list):
                raise answer.unexpected()
            if nodes:
                self._reads_nodes_by = token
                return
        raise _hidden(answer, name)


_OURS = {META_TOPIC, META_SERVER, META_LEASE}


def _shown(meta: Mapping[str, str], node: Any, service: Any) -> dict[str, str]:
    """What is the service's own in its *meta*; its zone is its node's where it says none.

    Consul itself has localities since 1.17, of a service or its node.
    """
    shown = {key: value for key, value in meta.items() if key not in _OURS}
    zone = (
        shown.get(ZONE)
        or (service.get("Locality") or {}).get("Zone")
        or (node.get("Meta") or {}).get(ZONE)
        or (node.get("Locality") or {}).get("Zone")
    )
    return {**shown, ZONE: zone} if zone else shown


def _hidden(answer: Answer, name: str | None = None) -> Denied:
    """For the service *name*, or for all."""
    service = 'service_prefix ""' if name is None else f'service "{name}"'
    return Denied(
        f"{answer.where}: Consul's ACLs hide something there; give the token a policy with "
        f'{service} read and node_prefix "" read'
    )
