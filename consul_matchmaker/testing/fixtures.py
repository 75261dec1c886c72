"""What the fixtures of the pytest plugin give: a running Consul, and a Matchmaker without one."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress

from ..backends.memory import Memory
from ..errors import Denied, Unavailable
from ..matchmaker import Matchmaker
from ..model import Host, Instance
from ..settings import Settings
from .local_consul import LocalCluster

LEASE_SECONDS = 2
"""In kv mode; a killed process is gone after twice as long.  Consul alone grants 10 s and more."""


class RunningConsul:
    """One Consul server and one client agent, as processes of this machine, from `start` to
    `close`."""

    def __init__(self) -> None:
        self.cluster = LocalCluster(
            servers=1, clients=1, config={"session_ttl_min": f"{LEASE_SECONDS}s"}
        )
        """For outages: ``cluster.pause("agent1")``, and ``resume``."""

    def start(self) -> None:
        """Raises ConsulNotFound, and ClusterError where it does not become ready."""
        self.cluster.__enter__()

    def close(self) -> None:
        self.cluster.close()

    @property
    def http(self) -> str:
        """Where the agent answers by HTTP, as host:port."""
        return self.cluster.nodes["agent1"].http

    @property
    def dns(self) -> str:
        """Where the agent answers by DNS, as host:port."""
        return self.cluster.nodes["agent1"].dns

    def url(self, mode: str) -> str:
        """For `Matchmaker.from_url`; *mode*: service, kv or catalog."""
        if mode == "catalog":
            return f"consul+catalog://{self.dns}"
        lease = f"?session_ttl_seconds={LEASE_SECONDS}" if mode == "kv" else ""
        return f"consul+{mode}://{self.http}{lease}"

    def __repr__(self) -> str:
        return f"<RunningConsul {self.cluster!r}>"


class MemoryMatchmaker(Matchmaker):
    """A Matchmaker whose Consul is `memory`: nothing is asked by network.

    ``memory.is_available = False`` is an outage.
    """

    def __init__(self) -> None:
        self.memory = Memory()
        super().__init__(Settings(mode="kv"), backend=self.memory)

    def declare(self, topic: str, hosts: Iterable[str | Host | Instance]) -> None:
        """Exactly *hosts* serve *topic*, beside those that are registered; seen at once."""
        self.memory.declare(topic, hosts)
        if self._cache.knows(topic):
            with suppress(Unavailable, Denied):  # then it is seen when that is over
                self._cache.refresh(topic)
