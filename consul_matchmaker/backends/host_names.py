"""Resolve host names by the system's resolver, which may hang, on a bounded number of threads."""

from __future__ import annotations

import contextlib
import ipaddress
import socket
import threading
import time
from collections.abc import Callable

NAME_THREADS = 4
"""How many names the system's resolver is asked for at a time: it may hang, and its threads with
it."""


def resolve_by_system(name: str) -> list[str]:
    """The addresses the system's resolver has for *name*, IPv4 before IPv6; [] when it knows no
    such name.  Raises OSError when it cannot tell.  May take as long as that resolver likes."""
    try:
        infos = socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)
    except socket.gaierror as error:
        if error.errno in (socket.EAI_NONAME, getattr(socket, "EAI_NODATA", socket.EAI_NONAME)):
            return []
        raise
    infos.sort(key=lambda info: info[0] != socket.AF_INET)
    return list(dict.fromkeys(str(info[4][0]) for info in infos))


class _Question:
    """A name that is being resolved, for everybody who waits for it."""

    def __init__(self) -> None:
        self.is_answered = threading.Event()
        self.addresses: list[str] = []
        self.error: BaseException | None = None


class HostNames:
    """The addresses of host names, as the system's resolver (*resolve*) has them.  Thread-safe.

    Each is remembered for *ttl_seconds*, for *empty_ttl_seconds* when there is no such name; of
    the last *most* names.  Starts no thread when made.
    """

    def __init__(
        self,
        *,
        ttl_seconds: float,
        empty_ttl_seconds: float,
        most: int,
        clock: Callable[[], float] = time.monotonic,
        resolve: Callable[[str], list[str]] = resolve_by_system,
    ) -> None:
        self._ttl_seconds, self._empty_ttl_seconds = ttl_seconds, empty_ttl_seconds
        self._most = most
        self._clock = clock
        self._resolve = resolve
        self._lock = threading.Lock()
        self._slots = threading.Semaphore(NAME_THREADS)
        self._known: dict[str, tuple[list[str], float]] = {}  # and until when
        self._questions: dict[str, _Question] = {}

    def addresses(self, name: str, until: float) -> list[str]:
        """The addresses of *name*, IPv4 before IPv6; [] when there is no such name.  An IP address
        is its own.

        Raises OSError when the resolver cannot tell, TimeoutError when it has not told by *until*,
        an instant of `time.monotonic`; what it then says later is remembered all the same.
        """
        if _is_ip(name):
            return [name]
        known = self._known.get(name)
        if known is not None and self._clock() < known[1]:
            return known[0]
        question = self._questions.get(name) or self._ask(name, until)
        if not question.is_answered.wait(_seconds_until(until)):
            raise TimeoutError(f"the system's resolver did not answer for {name}")
        if question.error is not None:
            text = getattr(question.error, "strerror", None) or question.error
            raise OSError(f"{name}: {text}") from question.error
        return question.addresses

    def _ask(self, name: str, until: float) -> _Question:
        """The question for *name* that is on its way, else a new one on a thread of its own."""
        if not self._slots.acquire(timeout=_seconds_until(until)):
            raise TimeoutError(f"no time was left to resolve {name}, the system's resolver hangs")
        with self._lock:
            other = self._questions.get(name)
            question = other or self._questions.setdefault(name, _Question())
        if other is not None:
            self._slots.release()
            return other
        try:
            args = (name, question)
            threading.Thread(
                target=self._answer, args=args, name="consul-matchmaker-names", daemon=True
            ).start()
        except RuntimeError as error:  # the limit of threads is reached, or Python is ending
            self._settle(name, question, OSError(f"no thread to be had: {error}"))
        return question

    def _answer(self, name: str, question: _Question) -> None:
        asked_at, error = self._clock(), None
        try:
            question.addresses = addresses = self._resolve(name)
            ttl_seconds = self._ttl_seconds if addresses else self._empty_ttl_seconds
            with self._lock:
                self._known.pop(name, None)
                while len(self._known) >= self._most:
                    del self._known[next(iter(self._known))]
                self._known[name] = addresses, asked_at + ttl_seconds
        except BaseException as caught:  # also UnicodeError, for what cannot be a host name
            error = caught
        self._settle(name, question, error)

    def _settle(self, name: str, question: _Question, error: BaseException | None) -> None:
        question.error = error
        with self._lock, contextlib.suppress(KeyError):
            del self._questions[name]
        self._slots.release()
        question.is_answered.set()

    def __repr__(self) -> str:
        return f"<HostNames {len(self._known)} known, {len(self._questions)} asked for>"


def _is_ip(name: str) -> bool:
    try:
        ipaddress.ip_address(name.partition("%")[0])
    except ValueError:
        return False
    return True


def _seconds_until(until: float) -> float:
    return max(0.0, min(until - time.monotonic(), threading.TIMEOUT_MAX))
