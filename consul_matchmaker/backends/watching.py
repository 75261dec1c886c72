"""The seam of watches: what a backend with blocking queries has to do, as small protocols."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Protocol

from ..model import Host, Snapshot
from . import Resolver


@dataclass(frozen=True, slots=True)
class Route:
    """Where polls wait: at this agent, which asks the server that leads."""

    agent: Host | None
    """None: whichever agent answers."""
    leader: str


class Polled(Protocol):
    """One answer of a poll, not taken apart yet."""

    index: int
    fingerprint: object
    """Equal, for all purposes, only where Consul said the same."""

    def folders(self, topics: Iterable[str]) -> Iterator[tuple[str, bytes]]:
        """Each of *topics* with what Consul wrote of it: equal only where it said the same.  In no
        order that matters."""

    def snapshot(self, topic: str, folder: bytes) -> Snapshot:
        """What *folder*, which `folders` gave, says of *topic*; raises Unavailable."""


class Poll(Protocol):
    """Blocking queries for one topic, or for all, one after another on a connection of their own.

    `poll` is called by one thread at a time, the other methods by any.
    """

    received_bytes: int
    """The size of the last poll's answer, also of one that failed for it."""

    def poll(self, index: int, wait_seconds: float, at: Host | None) -> Polled:
        """The answer once something changed after *index*, or after *wait_seconds*, as the agent
        *at* says; with *index* 0 at once.  Raises Unavailable, also when it was interrupted, and
        Denied."""

    def fingerprint_of(self, folder: bytes) -> object:
        """That of an answer which says *folder* and nothing else."""

    def interrupt(self) -> None:
        """Make the poll that waits, or else the next one, raise Unavailable at once."""

    def close(self) -> None:
        """Close the connection; every later poll raises Unavailable."""


class Confirmer(Protocol):
    """Asks who leads, on a connection of its own.

    `confirm` is called by one thread at a time, `close` by any.
    """

    def confirm(self, topic: str | None, timeout_seconds: float) -> Route:
        """Have the leader answer, and say who that is: what polls that wait on the same route have
        not told has not happened before this was called.  Asks for no more than a watch of *topic*
        (None: of all) may read.  Raises Unavailable and Denied."""

    def close(self) -> None:
        """End what is asked now, and every later question."""


class Watchable(Resolver, Protocol):
    """A Resolver that can be watched."""

    can_watch_all: bool
    """Whether one query can tell of all topics."""
    is_confirmed_by_leader: bool
    """Whether the leader answers what is asked: then a confirmation proves what polls told."""

    def watch(self, topic: str | None) -> Poll:
        """Blocking queries for *topic*, or for all topics; nothing is asked yet."""

    def confirmer(self) -> Confirmer:
        """What asks whether the queries of `watch` would tell of a change."""
