"""Who leads Consul's servers, and whether that one answers: what watches are confirmed by."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from ...errors import Unavailable
from ...model import Host
from ..watching import Route
from .api import ConsulApi, Line


def leader_by(
    api: ConsulApi,
    agent: Host | None,
    *,
    timeout_seconds: float | None = None,
    line: Line | None = None,
) -> str:
    """The address for other servers of the one that leads, as *agent* says.  Raises Unavailable,
    also where none does."""
    said = api.call(
        "GET", "/v1/status/leader", at=agent, timeout_seconds=timeout_seconds, line=line
    )
    leader = said.json()
    if not isinstance(leader, str):
        raise said.unexpected()
    if not leader:
        raise Unavailable(f"{said.where}: Consul has no leader now")
    return leader


class Confirmer:
    """Asks who leads, on a connection of its own; see `watching.Confirmer`.

    *path_of* gives what to read for a confirmation of a topic, or of all (None): something that a
    watch of it may read, there or not.
    """

    def __init__(
        self,
        api: ConsulApi,
        path_of: Callable[[str | None], str],
        consistency: Mapping[str, str],
    ) -> None:
        self._api, self._line = api, api.line()
        self._path_of, self._consistency = path_of, consistency

    def confirm(self, topic: str | None, timeout_seconds: float) -> Route:
        """Have the leader answer, then ask the same agent who that is: whoever led before and leads
        afterwards answered."""
        answer = self._api.call(
            "GET",
            self._path_of(topic),
            self._consistency,
            accept=(404,),
            timeout_seconds=timeout_seconds,
            line=self._line,
        )
        agent = answer.address
        leader = leader_by(self._api, agent, timeout_seconds=timeout_seconds, line=self._line)
        return Route(agent, leader)

    def close(self) -> None:
        """End what is asked now, and every later question."""
        self._line.close()
