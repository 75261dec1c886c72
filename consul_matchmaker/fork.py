"""What a forked child does first: it has its parent's objects, and none of its parent's threads.

It closes its copies of the parent's sockets.  Then whoever asked for it makes its parts anew: a
lock that was held in the parent is held in the child for ever.
"""

from __future__ import annotations

import logging
import os
import socket
import weakref
from contextlib import suppress
from typing import Protocol

logger = logging.getLogger(__name__)


class Forkable(Protocol):
    def after_fork(self) -> None:
        """In a forked child: make anew what has locks, threads or sockets.  Must not block."""


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
