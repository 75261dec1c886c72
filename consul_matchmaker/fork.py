"""What a forked child does first: it has its parent's objects, and none of its parent's threads.

It closes its copies of the parent's sockets.  Then whoever asked for it makes its parts anew: a
lock that was held in the parent is held in the child for ever.
"""

from __future__ import annotations

import logging
import os
import socket
import threading
import weakref
from contextlib import suppress
from typing import Protocol

logger = logging.getLogger(__name__)


class Forkable(Protocol):
    def after_fork(self) -> None:
        """In a forked child: make anew what has locks, threads or sockets.  Must not block."""


class Clearable(Protocol):
    def clear(self) -> None: ...


class ProcessLock:
    """A lock for what a process has once, to be kept at module level.

    It is made when it is first needed, so that eventlet can patch it after the import, and anew in
    a forked child, where another thread of the parent may have held it.  *contents*, what it
    guards, belong to the parent: they are cleared there.
    """

    def __init__(self, *contents: Clearable) -> None:
        self._contents = contents
        self._made: dict[str, threading.Lock] = {}
        call_after_fork(self)

    def after_fork(self) -> None:
        self._made.clear()
        for each in self._contents:
            each.clear()

    def __enter__(self) -> None:
        self._made.setdefault("lock", threading.Lock()).acquire()  # atomic

    def __exit__(self, *exc_info: object) -> None:
        self._made["lock"].release()


_owners: weakref.WeakSet[Forkable] = weakref.WeakSet()
_sockets: weakref.WeakSet[socket.socket] = weakref.WeakSet()


def call_after_fork(owner: Forkable) -> None:
    """Have ``owner.after_fork()`` called in every forked child, as long as *owner* lives."""
    _owners.add(owner)


def close_after_fork(sock: socket.socket) -> None:
    """Have *sock* closed in every forked child, which the parent does not notice."""
    _sockets.add(sock)


def _after_fork() -> None:
    for sock in list(_sockets):
        with suppress(OSError):
            sock.close()
    for owner in list(_owners):
        try:
            owner.after_fork()
        except Exception:  # the others have their own parts to make anew
            logger.exception("%r could not start anew in this forked child", owner)


if hasattr(os, "register_at_fork"):  # not on Windows, where nothing forks
    os.register_at_fork(after_in_child=_after_fork)
