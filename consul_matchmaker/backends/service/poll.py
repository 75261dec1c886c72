"""Wait for changes of one service.

With ``near`` a poll waits at the leader; without, for what any server streams to a newer agent.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from ...model import Host, Snapshot
from ..http.api import Answer
from ..http.leader import Confirmer
from ..http.long_poll import LongPoll, fingerprint
from .reader import Reader

NOBODYS_SERVICE = "/v1/health/service/consul-matchmaker-nobody"
"""What a confirmation reads: an empty answer, which takes no rights, from the leader itself."""


class Polled:
    """One answer of a poll, not taken apart yet."""

    def __init__(self, reader: Reader, answer: Answer) -> None:
        self._reader, self._answer = reader, answer
        self.index = answer.index
        self.fingerprint = fingerprint(answer.body)

    def folders(self, topics: Iterable[str]) -> Iterator[tuple[str, bytes]]:
        """Each of *topics*, of which there is one, with what Consul wrote of it."""
        for topic in topics:
            yield topic, self._answer.body

    def snapshot(self, topic: str, folder: bytes) -> Snapshot:
        """What this answer says of *topic*; raises Unavailable."""
        return self._reader.snapshot_of(topic, self._answer, self._answer.asked_at)


class Poll(LongPoll):
    """Blocking queries for one topic; see `watching.Poll`."""

    def __init__(self, reader: Reader, topic: str, datacenter: str) -> None:
        super().__init__(reader.api)
        self._reader, self._topic, self._datacenter = reader, topic, datacenter

    def poll(self, index: int, wait_seconds: float, at: Host | None) -> Polled:
        """The service once something of it changed after *index*, or after *wait_seconds*."""
        answer = self.received(
            lambda: self._reader.ask(
                self._topic,
                self._datacenter,
                at=at,
                index=index,
                wait_seconds=wait_seconds,
                line=self._line,
            )
        )
        return Polled(self._reader, answer)

    def fingerprint_of(self, folder: bytes) -> object:
        return fingerprint(folder)

    def __repr__(self) -> str:
        return f"<Poll {self._topic}>"


def confirmer(reader: Reader) -> Confirmer:
    """What reads a service that nobody has."""
    return Confirmer(reader.api, lambda topic: NOBODYS_SERVICE, reader.consistency)
