"""One Matchmaker a process for the same settings, closed with its last user."""

from __future__ import annotations

from dataclasses import fields

from ...fork import ProcessLock
from ...matchmaker import Matchmaker
from ...settings import Settings

_users: dict[str, tuple[Matchmaker, int]] = {}
_lock = ProcessLock()


def shared(settings: Settings) -> Matchmaker:
    """The one of *settings*; to be given back by `released`, where anybody tells when."""
    key = repr([getattr(settings, setting.name) for setting in fields(settings)])
    with _lock:
        matchmaker, users = _users.get(key) or (Matchmaker(settings), 0)
        _users[key] = matchmaker, users + 1
    return matchmaker


def released(matchmaker: Matchmaker) -> None:
    """One user less; the last one's leaving closes it."""
    with _lock:
        for key, (known, users) in list(_users.items()):
            if known is matchmaker:
                if users > 1:
                    _users[key] = known, users - 1
                    return
                del _users[key]
    matchmaker.close()
