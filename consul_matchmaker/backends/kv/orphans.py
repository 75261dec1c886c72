"""Find, and remove, keys under the prefix that no session will take along."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from .keys import MAX_KEY_BYTES, SENTINEL
from .reader import Reader, kv_path
from .session_checks import held_keys, in_requests

NOT_OURS = "not a key of ours, left alone"
"""Why a key that is not named as we name keys is among the orphans."""


@dataclass(frozen=True, slots=True)
class Orphan:
    reason: str
    index: int | None = None
    """Its ModifyIndex, where it may be removed."""

    @property
    def is_ours(self) -> bool:
        return self.index is not None


def find_orphans(reader: Reader) -> dict[str, Orphan]:
    """Keys that are held by no session, or not named as we name keys; a sentinel, also that of a
    prefix below this one, is neither.

    Values are read of those alone that the session in their name does not hold.
    """
    keys, _ = reader.keys_under(reader.prefix + "/")
    found: dict[str, Orphan] = {}
    checks: list[tuple[str, str]] = []
    for key in keys:
        entry = reader.entry_of(key)
        if entry is not None and len(key) <= len(reader.prefix) + MAX_KEY_BYTES:
            checks.append((key, entry.lease_id))
        elif not key.endswith(f"/{SENTINEL}"):
            found[key] = Orphan(NOT_OURS)
    for some in in_requests(checks):
        held = held_keys(reader.api, some)
        for key, _ in some:
            if key not in held and (index := _index_without_session(reader, key)) is not None:
                found[key] = Orphan("held by no session", index)
    return dict(sorted(found.items()))


def remove_orphans(reader: Reader, orphans: Mapping[str, Orphan]) -> list[str]:
    """Of what `find_orphans` found, remove the keys of ours; return those that are gone.

    Keys that are not ours are never touched: the prefix may be another program's.  A key that was
    acquired or written since it was looked at stays.
    """
    removed = []
    for key, orphan in orphans.items():
        if orphan.index is None:
            continue
        path = kv_path(key)
        answer = reader.api.call("DELETE", path, {"cas": str(orphan.index)})
        # Read back: Consul says true also where there was nothing to delete.
        if answer.json() is True and reader.api.call("GET", path, accept=(404,)).status == 404:
            removed.append(key)
    return removed


def _index_without_session(reader: Reader, key: str) -> int | None:
    """The ModifyIndex of *key* if it exists and no session holds it."""
    answer = reader.api.call("GET", kv_path(key), accept=(404,))
    if answer.status == 404:
        return None
    try:
        (entry,) = answer.json()
        return None if entry.get("Session") else int(entry["ModifyIndex"])
    except (TypeError, KeyError, ValueError, AttributeError):
        raise answer.unexpected() from None
