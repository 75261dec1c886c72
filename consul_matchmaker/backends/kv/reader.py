"""Read which hosts serve a topic off the keys of its folder."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from ...errors import Denied
from ...model import Instance, Snapshot
from ...settings import Settings
from ..http.api import Answer, ConsulApi, Line, timeout_until
from .keys import SENTINEL, Key, topic_folder

logger = logging.getLogger(__name__)

REMEMBERED_KEYS = 16384
"""Keys whose parts are remembered from one answer to the next; about 10 MB when full."""
REMEMBERED_LENGTH = 1000
"""Longer keys are taken apart each time: Consul takes keys of half a megabyte from anybody."""
SHOWN_LENGTH = 80
"""Of a key in a log line."""


@dataclass(frozen=True, slots=True)
class Entry:
    """What one key of ours says, made once for all answers that hold it."""

    topic: str
    sort_key: tuple[str, int, str]
    """Host and server: what Host says of equality and order, at a tenth of what that costs."""
    instance: Instance
    lease_id: str


class Reader:
    """A Resolver over the keys under one prefix.  Thread-safe."""

    finds_servers = False
    can_watch_all = True

    def __init__(
        self, api: ConsulApi, settings: Settings, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.api = api
        self.prefix = settings.prefix
        self.clock = clock
        self.longest_lookup_seconds = settings.request_timeout_seconds * len(settings.addresses)
        asked = settings.consistency
        self.consistency: Mapping[str, str] = {} if asked == "default" else {asked: ""}
        """The parameter of every read."""
        self.is_confirmed_by_leader = not settings.reads_may_lag
        # Successive answers hold nearly the same keys, and taking one apart is what costs.
        self._remembered: dict[str, Entry | None] = {}
        self._not_remembered = 0
        self._unknown_keys = 0
        self.may_write_sentinel = True
        """Until Consul refuses it to a poll."""

    def lookup(self, topic: str, server: str | None = None, *, timeout_seconds: float) -> Snapshot:
        """Every live host of *topic*, perhaps none; with *server*, only that server's."""
        until = time.monotonic() + timeout_seconds
        keys, answer = self.keys_under(topic_folder(self.prefix, topic), until)
        snapshot = self.snapshot_of(topic, keys, answer)
        return snapshot if server is None else snapshot.for_server(server)

    def topics(self) -> list[str]:
        """Every topic that has a registration, sorted."""
        keys, _ = self.keys_under(self.prefix + "/")
        return sorted({entry.topic for entry in self.entries_of(keys)})

    def status(self) -> dict[str, object]:
        """Which agent is in use, and how many keys were not understood when last met."""
        return {**self.api.status(), "unknown_keys": self._unknown_keys}

    def wire(self) -> dict[str, dict[str, int]]:
        """What was said to agents and heard from them, by transport; see `Traffic`."""
        return self.api.wire()

    def close(self) -> None:
        """Close every connection but those of polls; leases are left alone."""
        self.api.close()

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.prefix}/ at {self.api!r}>"

    # -- for what reads and writes here ------------------------------------------------------

    def keys_under(self, folder: str, until: float = math.inf) -> tuple[list[str], Answer]:
        """The keys that begin with *folder*, and the answer they are from."""
        params, seconds = {"keys": "", **self.consistency}, timeout_until(until)
        path = kv_path(folder)
        answer = self.api.call("GET", path, params, accept=(404,), timeout_seconds=seconds)
        keys = keys_in(answer)
        if not keys:
            self.prove_readable(folder, answer, until)
        return keys, answer

    def prove_readable(
        self, folder: str, answer: Answer, until: float = math.inf, line: Line | None = None
    ) -> None:
        """Raise Denied when *answer* lacks something because the token may not read *folder*.

        Consul hides what a token may not list, as if it did not exist (fact D4); only a single key
        is refused with 403.
        """
        if answer.is_filtered:
            raise Denied(
                f"{answer.where}: Consul's ACLs hide something there; "
                f'give the token a policy with key_prefix "{folder}" read'
            )
        path, seconds = kv_path(folder + SENTINEL), timeout_until(until)
        self.api.call(
            "GET", path, self.consistency, accept=(404,), timeout_seconds=seconds, line=line
        )

    def snapshot_of(self, topic: str, keys: Sequence[str], answer: Answer) -> Snapshot:
        """What *keys*, which *answer* has of *topic*, say."""
        # Two incarnations of one host are one instance: the dead one's key leaves with its lease.
        entries = self.entries_of(keys)
        found = {entry.sort_key: entry.instance for entry in entries if entry.topic == topic}
        return Snapshot(
            topic,
            tuple(found[sort_key] for sort_key in sorted(found)),
            "kv",
            taken_at=answer.asked_at,
            clock=self.clock,
            details={
                "agent": str(answer.address),
                "transport": "http",
                "status": answer.status,
                "index": answer.index,
                "keys": len(keys),
            },
            version=answer.index,
        )

    def entries_of(self, keys: Iterable[str]) -> list[Entry]:
        """*keys* taken apart, without those that are not ours."""
        found: list[Entry] = []
        unknown: list[str] = []
        for text in keys:
            entry = self.entry_of(text)
            if entry is not None:
                found.append(entry)
            elif text != f"{self.prefix}/{SENTINEL}":
                unknown.append(text)
        if unknown and not self._unknown_keys:
            logger.warning(
                "ignoring %d keys under %s/ that are not ours, such as %r%s",
                len(unknown),
                self.prefix,
                unknown[0][:SHOWN_LENGTH],
                "..." if len(unknown[0]) > SHOWN_LENGTH else "",
            )
        if unknown:
            self._unknown_keys = len(unknown)
        return found

    def entry_of(self, text: str) -> Entry | None:
        """What the key *text* says; None where it is not ours."""
        remembered = self._remembered
        try:
            return remembered[text]
        except KeyError:
            entry = self._parse(text)
        if len(text) > REMEMBERED_LENGTH:
            return entry
        if len(remembered) < REMEMBERED_KEYS:
            remembered[text] = entry
            return entry
        # Full: what is remembered stays, so that an answer that is one key longer does not find
        # none of its keys again; but not once most of it may be keys that are gone.
        self._not_remembered += 1
        if self._not_remembered > REMEMBERED_KEYS:
            self._remembered, self._not_remembered = {}, 0
        return entry

    def _parse(self, text: str) -> Entry | None:
        try:
            key = Key.parse(self.prefix, text)
        except ValueError:  # ConfigurationError is one
            return None
        sort_key = key.host.address, key.host.port or 0, key.server or ""
        return Entry(key.topic, sort_key, Instance(key.host, key.server), key.lease_id)


def keys_in(answer: Answer) -> list[str]:
    """The keys that *answer* lists; raises Unavailable when it is no such list."""
    keys = [] if answer.status == 404 else answer.json()
    if not (isinstance(keys, list) and set(map(type, keys)) <= {str}):
        raise answer.unexpected()
    return keys


def kv_path(key: str) -> str:
    return f"/v1/kv/{key}"
