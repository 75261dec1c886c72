"""Publish and look up registrations as Consul keys held under one session.

What the choices rest on (facts B and C, measured): a key is written by ``acquire`` only and named
after its lease, so that nothing outlives its process and a restarted process never meets its dead
predecessor's key; a session has ``Behavior=delete``, no lock-delay and no serfHealth check, which
would end it on a gossip blip; the address is in the key, so that ``?keys`` alone answers a lookup.
"""

from __future__ import annotations

import json
import logging
import math
import os
import random
import socket
import threading
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import TypeVar

from ...errors import Denied, LeaseLost, TimedOut, Unavailable
from ...model import Held, Host, Instance, Lease, Registration, Snapshot
from ...settings import Settings
from ...worker import seconds_since_boot
from .. import OnDoubt
from ..http.api import Answer, ConsulApi, Line, go_duration
from ..liveness import Liveness
from .keys import MAX_KEY_BYTES, SENTINEL, Key, host_folder, topic_folder
from .poll import Confirmer, Poll

logger = logging.getLogger(__name__)

T = TypeVar("T")

CHECKS_PER_REQUEST = 64
"""Operations that Consul takes in one transaction: 64 until 1.14, 128 since (fact B12)."""
CHECK_BYTES_PER_REQUEST = 500_000
"""Bytes of such a transaction: Consul refuses more than 512 KiB (fact B12)."""
REMEMBERED_KEYS = 16384
"""Keys whose parts are remembered from one answer to the next; about 10 MB when full."""
REMEMBERED_LENGTH = 1000
"""Longer keys are taken apart each time: Consul takes keys of half a megabyte from anybody."""
SHOWN_LENGTH = 80
"""Of a key in a log line."""
NOT_OURS = "not a key of ours, left alone"
"""Why a key that is not named as we name keys is among the orphans."""
CONSUL_SESSION_TTL_MIN_SECONDS = 10
"""Consul's own floor, unless the servers' session_ttl_min lowers it (fact B1)."""
LATE_SECONDS = 60.0
"""How long after its withdrawal a registration whose publishing was not answered is looked for:
Consul itself holds a request for 7 s while there is no leader (fact C8)."""
NO_INDEX = 2**62
"""A ModifyIndex that no key has: they count what was ever written."""
NODE_CHECK = "serfHealth"
"""Consul's name for "the node of this agent answers gossip"."""


@dataclass(frozen=True, slots=True)
class _Entry:
    """What one key of ours says, made once for all answers that hold it."""

    topic: str
    place: tuple[str, int, str]
    """Host and server: what Host says of equality and order, at a tenth of what that costs."""
    instance: Instance
    lease_id: str


@dataclass(frozen=True, slots=True)
class _Orphan:
    reason: str
    index: int | None = None
    """Its ModifyIndex, where it may be removed."""


class _Remembered:
    """What was made of texts, at most *places* of them.  Thread-safe.

    When full, a new one takes the place of any other: in the order of use, an answer that is one
    key longer than what is remembered would find none of its keys again.
    """

    def __init__(self, make: Callable[[str], _Entry | None], places: int) -> None:
        self._make = make
        self._places = places
        self._lock = threading.Lock()
        self._made: dict[str, _Entry | None] = {}
        self._order: list[str] = []

    def __call__(self, text: str) -> _Entry | None:
        try:
            return self._made[text]
        except KeyError:
            pass
        entry = self._make(text)
        if len(text) <= REMEMBERED_LENGTH:
            with self._lock:
                if text not in self._made:
                    self._put(text, entry)
        return entry

    def _put(self, text: str, entry: _Entry | None) -> None:
        if len(self._order) < self._places:
            self._order.append(text)
        else:
            place = random.randrange(self._places)
            del self._made[self._order[place]]
            self._order[place] = text
        self._made[text] = entry


class Kv:
    """A Resolver and a Registrar over Consul's KV store and sessions.  Thread-safe.

    Makes no connection before the first call.
    """

    finds_servers = False

    def __init__(
        self, api: ConsulApi, settings: Settings, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._api = api
        self._settings = settings
        self._prefix = settings.prefix
        self._clock = clock
        self.longest_lookup_seconds = settings.request_timeout_seconds * len(settings.addresses)
        self._liveness: Liveness | None = None
        if settings.liveness == "check":
            # A suspended machine has to notice that its beat is late.
            lasting = seconds_since_boot if clock is time.monotonic else clock
            self._liveness = Liveness(api, settings.check_ttl_seconds, clock=lasting)
        self._lock = threading.Lock()
        # By lease, and until when a renewal has to look for it.
        self._published: dict[str, dict[Registration, float]] = {}
        self._unanswered: set[tuple[str, Registration]] = set()  # publishes that may still arrive
        # Successive answers hold nearly the same keys, and taking one apart is what costs.
        self._parsed = _Remembered(self._parse, REMEMBERED_KEYS)
        self._unknown_keys = 0
        self._checks_fail = False  # whether that was said
        self._may_write_sentinel = True

    def close(self) -> None:
        """Close every connection but those of polls; leases are left alone."""
        if self._liveness is not None:
            self._liveness.close()
        self._api.close()

    # -- Resolver ----------------------------------------------------------------------------

    def lookup(self, topic: str, server: str | None = None, *, timeout_seconds: float) -> Snapshot:
        """Every live host of *topic*, perhaps none; with *server*, only that server's."""
        until = time.monotonic() + timeout_seconds
        folder = topic_folder(self._prefix, topic)
        keys, answer = self._keys_under(folder, until)
        snapshot = self.snapshot_of(topic, keys, answer)
        return snapshot if server is None else snapshot.for_server(server)

    def watch(self, topic: str | None) -> Poll:
        """Blocking queries of the folder of *topic*, or of all topics; nothing is asked yet."""
        return Poll(self._api, self, self._prefix, topic, clock=self._clock)

    def confirmer(self) -> Confirmer:
        """What asks whether the queries of `watch` would tell of a change."""
        return Confirmer(self._api, self, self._prefix)

    def topics(self) -> list[str]:
        """Every topic that has a registration, sorted."""
        keys, _ = self._keys_under(self._prefix + "/")
        return sorted({entry.topic for entry in self._registrations(keys)})

    def orphans(self) -> dict[str, str]:
        """Keys under the prefix that nobody will remove, each with the reason.

        They are held by no session, or not named as we name keys (`NOT_OURS`); a sentinel, also
        that of a prefix below this one, is neither.  Values are read of those alone that the
        session in their name does not hold.
        """
        return {key: entry.reason for key, entry in self._orphans().items()}

    def _orphans(self) -> dict[str, _Orphan]:
        answer = self._api.call("GET", _kv(self._prefix + "/"), {"keys": ""}, accept=(404,))
        keys = _keys_of(answer)
        if not keys:
            self.prove_readable(self._prefix + "/", answer)
        found: dict[str, _Orphan] = {}
        checks: list[_Check[str]] = []
        longest = len(self._prefix) + MAX_KEY_BYTES
        for text in keys:
            entry = self._parsed(text)
            if entry is not None and len(text) <= longest:
                checks.append((text, _check(text, entry.lease_id)))
            elif not text.endswith(f"/{SENTINEL}"):
                found[text] = _Orphan(NOT_OURS)
        for some in _in_requests(checks):
            held = set(self._held(some))
            for text, _ in some:
                if text not in held and (index := self._index_without_session(text)) is not None:
                    found[text] = _Orphan("held by no session", index)
        return dict(sorted(found.items()))

    def _index_without_session(self, key: str) -> int | None:
        """The ModifyIndex of *key* if it exists and no session holds it."""
        answer = self._api.call("GET", _kv(key), accept=(404,))
        if answer.status == 404:
            return None
        try:
            (entry,) = answer.json()
            return None if entry.get("Session") else int(entry["ModifyIndex"])
        except (TypeError, KeyError, ValueError, AttributeError):
            raise answer.unexpected() from None

    def sweep(self) -> list[str]:
        """Remove the keys of ours that no session holds; return those that are gone.

        Keys that are not ours are never touched: the prefix may be another program's.  A key that
        was acquired or written since it was looked at stays.
        """
        removed = []
        for key, entry in self._orphans().items():
            if entry.index is None:
                continue
            answer = self._api.call("DELETE", _kv(key), {"cas": str(entry.index)})
            # Read back: Consul says true also where there was nothing to delete.
            if answer.json() is True and self._is_gone(key):
                removed.append(key)
        return removed

    def _is_gone(self, key: str) -> bool:
        return self._api.call("GET", _kv(key), accept=(404,)).status == 404

    def prove_writable(self) -> None:
        """Raise Denied when the token may not write under the prefix.  Writes nothing: the index
        that is asked for is no key's."""
        self._api.call("PUT", _kv(f"{self._prefix}/{SENTINEL}"), {"cas": str(NO_INDEX)})

    # -- Registrar ---------------------------------------------------------------------------

    def open(self, on_doubt: OnDoubt | None = None) -> Lease:
        """A new session, which Consul ends 2 x TTL after the last renewal at the latest.

        With ``liveness=check`` it hangs on a check too, which a thread keeps passing; *on_doubt*
        is called when that fails."""
        ttl_seconds = self._settings.session_ttl_seconds
        # Beside our own check too: it runs on the agent, and says nothing once that is dead.
        node_checks = [] if self._settings.liveness == "session" else [NODE_CHECK]
        wanted: dict[str, object] = {
            "Name": "consul-matchmaker",
            "TTL": go_duration(ttl_seconds),
            "Behavior": "delete",
            "LockDelay": "0s",
            # Said twice, as releases differ in which one they read (fact B4).
            "Checks": node_checks,
            "NodeChecks": node_checks,
        }
        place = None
        if self._liveness is not None:
            place = self._liveness.register(on_doubt)
            wanted["ServiceChecks"] = [{"ID": self._liveness.id}]
        try:
            answer = self._api.call("PUT", "/v1/session/create", body=_json(wanted), at=place)
        except Unavailable as error:
            if ttl_seconds >= CONSUL_SESSION_TTL_MIN_SECONDS:
                raise
            raise type(error)(
                f"{error} (session_ttl_seconds is {ttl_seconds:g}: below "
                f"{CONSUL_SESSION_TTL_MIN_SECONDS} the servers' session_ttl_min must allow it)"
            ) from error
        lease_id = _field(answer, "ID")
        with self._lock:
            self._published[lease_id] = {}
        return Lease(lease_id, ttl_seconds)

    def publish(self, lease: Lease, registration: Registration) -> None:
        """Make *registration* visible as long as *lease* lives."""
        key = Key.of(registration, lease.id).under(self._prefix)
        with self._lock:  # before the call: if its outcome stays unknown, renew() finds out
            self._published.setdefault(lease.id, {})[registration] = math.inf
            was_unanswered = (lease.id, registration) in self._unanswered
            self._unanswered.add((lease.id, registration))
        answer = self._api.call(
            "PUT", _kv(key), {"acquire": lease.id}, self._description(registration)
        )
        if not was_unanswered:
            with self._lock:
                self._unanswered.discard((lease.id, registration))
        if answer.json() is not True:
            raise Unavailable(f"{answer.where}: the key is held by another session, trying again")

    def withdraw(self, lease: Lease, registration: Registration) -> None:
        """Delete the one key that *lease* holds for *registration*."""
        self._api.call("DELETE", _kv(Key.of(registration, lease.id).under(self._prefix)))
        with self._lock:
            published = self._published.get(lease.id, {})
            if (lease.id, registration) not in self._unanswered:
                published.pop(registration, None)
            elif registration in published:  # renewals look whether the late request undid this
                published[registration] = self._clock() + LATE_SECONDS
                self._unanswered.discard((lease.id, registration))

    def renew(self, lease: Lease) -> Collection[Registration]:
        """Keep *lease* alive, and return what Consul holds of what we published under it.

        Renewing alone proves nothing of the keys: Consul goes on answering 200 when one was deleted
        (fact B7).  So each is checked, 64 a request, by a transaction that only reads: it costs
        what this process has published, however big the cluster is, and writes nothing to Raft.
        A check that fails leaves the lease renewed, and its keys unchecked in what is returned.
        """
        answer = self._api.call("PUT", f"/v1/session/renew/{lease.id}", accept=(404,))
        if answer.status == 404:
            self._drop(lease)
            raise LeaseLost(f"{answer.where}: Consul has ended this session; open another")
        now = self._clock()
        with self._lock:
            known = self._published.get(lease.id, {})
            for late in [each for each, until in known.items() if until <= now]:
                del known[late]
            published = sorted(known, key=str)
        held: set[Registration] = set()
        unchecked: list[Registration] = []
        error: Unavailable | Denied | None = None
        for some in _in_requests([self._check_of(lease, each) for each in published]):
            try:
                if not isinstance(error, TimedOut):  # hanging, it would hold up the next renewal
                    held.update(self._held(some))
                    continue
            except (Unavailable, Denied) as failure:
                error = error or failure
            unchecked += [registration for registration, _ in some]
        self._tell_of_checks(error, len(unchecked))
        return Held.in_part(held, unchecked) if unchecked else held

    def _tell_of_checks(self, error: Unavailable | Denied | None, count: int) -> None:
        if error is not None and not self._checks_fail:
            logger.warning("lease renewed, %d registrations not verified: %s", count, error)
        self._checks_fail = error is not None

    def release(self, lease: Lease) -> None:
        """Destroy the session; Consul deletes its keys with it, in the same Raft entry."""
        self._api.call("PUT", f"/v1/session/destroy/{lease.id}", accept=(404,))
        self._drop(lease)
        if self._liveness is not None:
            self._liveness.deregister()

    def expire(self, topic: str, host: Host) -> int:
        """Delete every key of *topic* on *host*, whoever holds it; return how many there were."""
        folder = host_folder(self._prefix, topic, host)
        keys, _ = self._keys_under(folder)
        if keys:
            self._api.call("DELETE", _kv(folder), {"recurse": ""})
        return len(self._registrations(keys))

    def status(self) -> dict[str, object]:
        """Which agent is in use, and how many keys were not understood when last met."""
        return {**self._api.status(), "unknown_keys": self._unknown_keys}

    def wire(self) -> dict[str, dict[str, int]]:
        """What was said to agents and heard from them, by transport; see `Traffic`."""
        return self._api.wire()

    def __repr__(self) -> str:
        return f"<Kv {self._prefix}/ at {self._api!r}>"

    # -- reading -----------------------------------------------------------------------------

    def _keys_under(self, folder: str, until: float = math.inf) -> tuple[list[str], Answer]:
        """The keys that begin with *folder*, and the answer they are from."""
        params, seconds = {"keys": "", **self.consistency()}, _left(until)
        answer = self._api.call("GET", _kv(folder), params, accept=(404,), timeout_seconds=seconds)
        keys = _keys_of(answer)
        if not keys:
            self.prove_readable(folder, answer, until)
        return keys, answer

    def consistency(self) -> dict[str, str]:
        """The parameter of a read, by ``consistency``."""
        asked = self._settings.consistency
        return {} if asked == "default" else {asked: ""}

    def prove_readable(
        self, folder: str, answer: Answer, until: float = math.inf, line: Line | None = None
    ) -> None:
        """Raise Denied when *answer* lacks something because the token may not read *folder*.

        Consul hides what a token may not list, as if it did not exist (fact D4); only a single key
        is refused with 403.
        """
        if answer.is_filtered:
            raise self._hidden(folder, answer)
        path, params, seconds = _kv(folder + SENTINEL), self.consistency(), _left(until)
        (line or self._api).call("GET", path, params, accept=(404,), timeout_seconds=seconds)

    def _hidden(self, folder: str, answer: Answer) -> Denied:
        return Denied(
            f"{answer.where}: Consul's ACLs hide something there; "
            f'give the token a policy with key_prefix "{folder}" read'
        )

    def _registrations(self, keys: Iterable[str]) -> list[_Entry]:
        """*keys* taken apart, without those that are not ours."""
        found: list[_Entry] = []
        unknown: list[str] = []
        for text in keys:
            entry = self._parsed(text)
            if entry is not None:
                found.append(entry)
            elif text != f"{self._prefix}/{SENTINEL}":
                unknown.append(text)
        if unknown and not self._unknown_keys:
            logger.warning(
                "ignoring %d keys under %s/ that are not ours, such as %r%s",
                len(unknown),
                self._prefix,
                unknown[0][:SHOWN_LENGTH],
                "..." if len(unknown[0]) > SHOWN_LENGTH else "",
            )
        if unknown:
            self._unknown_keys = len(unknown)
        return found

    def _parse(self, text: str) -> _Entry | None:
        try:
            key = Key.parse(self._prefix, text)
        except ValueError:  # ConfigurationError is one
            return None
        place = key.host.address, key.host.port or 0, key.server or ""
        return _Entry(key.topic, place, Instance(key.host, key.server), key.lease_id)

    def snapshot_of(self, topic: str, keys: Sequence[str], answer: Answer) -> Snapshot:
        """What *keys*, which *answer* has of *topic*, say."""
        # Two incarnations of one host are one instance: the dead one's key leaves with its lease.
        entries = self._registrations(keys)
        found = {entry.place: entry.instance for entry in entries if entry.topic == topic}
        return Snapshot(
            topic,
            tuple(found[place] for place in sorted(found)),
            "kv",
            taken_at=answer.asked_at,
            clock=self._clock,
            details=_details(answer, keys),
            version=answer.index,
        )

    def _check_of(self, lease: Lease, registration: Registration) -> _Check[Registration]:
        key = Key.of(registration, lease.id).under(self._prefix)
        return registration, _check(key, lease.id)

    def _held(self, checks: list[_Check[T]]) -> list[T]:
        """Those of *checks* that Consul holds.

        One that fails makes the transaction fail, and Consul need not have made the others: where
        the token may not read a key it names that key and looks at no other.  So they are asked
        again without those that failed, until what is left all holds.
        """
        while checks:
            body = _json([{"KV": check} for _, check in checks])
            answer = self._api.call("PUT", "/v1/txn", body=body, accept=(409,))
            if answer.status == 200:
                break
            failed = _failed_operations(answer, len(checks))
            checks = [each for number, each in enumerate(checks) if number not in failed]
        return [one for one, _ in checks]

    # -- writing -----------------------------------------------------------------------------

    def _drop(self, lease: Lease) -> None:
        with self._lock:
            for registration in self._published.pop(lease.id, ()):
                self._unanswered.discard((lease.id, registration))

    def write_sentinel(self, line: Line) -> None:
        """Put one key without a session under the prefix, if there is none.

        A poll on a prefix that never had a key wakes on every write anywhere in Consul's KV store
        (fact C4).  Whoever may not write goes on without it.
        """
        if not self._may_write_sentinel:
            return
        text = "Kept by consul-matchmaker so that watching this folder stays cheap."
        try:
            line.call("PUT", _kv(f"{self._prefix}/{SENTINEL}"), {"cas": "0"}, text.encode("ascii"))
        except Denied:
            self._may_write_sentinel = False
            logger.info(
                "may not write %s/%s: until somebody does, an empty prefix is polled more often",
                self._prefix,
                SENTINEL,
            )
        except Unavailable as error:
            logger.debug("sentinel not written: %s", error)

    def _description(self, registration: Registration) -> bytes:
        """For people: nothing reads it back."""
        return _json(
            {
                "topic": registration.topic,
                "host": str(registration.host),
                "server": registration.server,
                "pid": os.getpid(),
                "hostname": socket.gethostname(),
                "registered_at": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            }
        )


def _left(until: float) -> float | None:
    """The seconds until then; None: as many as a call takes by default."""
    return None if until == math.inf else until - time.monotonic()


def _details(answer: Answer, keys: Sequence[str]) -> dict[str, object]:
    return {
        "agent": str(answer.address),
        "transport": "http",
        "status": answer.status,
        "index": answer.index,
        "keys": len(keys),
    }


def _keys_of(answer: Answer) -> list[str]:
    keys = [] if answer.status == 404 else answer.json()
    if not (isinstance(keys, list) and set(map(type, keys)) <= {str}):
        raise answer.unexpected()
    return keys


def _failed_operations(answer: Answer, count: int) -> set[int]:
    """Which of *count* operations of a transaction Consul names as failed; at least one."""
    try:
        failed = {int(error["OpIndex"]) for error in answer.json()["Errors"]}
    except (TypeError, KeyError, ValueError):
        raise answer.unexpected() from None
    if not failed or not failed <= set(range(count)):
        raise answer.unexpected()
    return failed


_Check = tuple[T, Mapping[str, str]]
"""What is looked for, and the operation that checks whether its session holds it."""


def _check(key: str, session: str) -> Mapping[str, str]:
    return {"Verb": "check-session", "Key": key, "Session": session}


def _in_requests(checks: Iterable[_Check[T]]) -> Iterator[list[_Check[T]]]:
    """*checks* in as few requests as Consul's limits allow."""
    some: list[_Check[T]] = []
    size = 0
    for check in checks:
        bytes_of_it = len(_json({"KV": check[1]})) + len(", ")
        if len(some) == CHECKS_PER_REQUEST or (
            some and size + bytes_of_it > CHECK_BYTES_PER_REQUEST
        ):
            yield some
            some, size = [], 0
        some.append(check)
        size += bytes_of_it
    if some:
        yield some


def _kv(key: str) -> str:
    return f"/v1/kv/{key}"


def _json(value: object) -> bytes:
    return json.dumps(value).encode("ascii")


def _field(answer: Answer, name: str) -> str:
    body = answer.json()
    value = body.get(name) if isinstance(body, dict) else None
    if not isinstance(value, str) or not value:
        raise answer.unexpected()
    return value
