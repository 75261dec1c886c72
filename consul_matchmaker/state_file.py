"""Last-known-good answers on disk: read at a cold start, never believed blindly.

One file a configuration, in the folder ``state_path``.  Its first line says format, checksum and
length of the rest; whatever does not agree with it is as good as no file.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import math
import os
import stat
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from .model import Host, Instance
from .settings import Settings

try:
    import fcntl
except ImportError:  # Windows: there two that write in the same moment may lose the older write
    fcntl = None  # type: ignore[assignment]

logger = logging.getLogger(__name__)

_DO_NOT_WAIT = getattr(os, "O_NONBLOCK", 0)

FORMAT = "consul-matchmaker-answers-1"
MAX_BYTES = 64 * 1024 * 1024
"""A bigger file is not ours: 10,000 topics of 20 hosts take about 10 MB."""
CLOCK_SLACK_SECONDS = 5.0
"""So far in the future an answer may be from: wall clocks are set back a little now and then."""
A_DAY_SECONDS = 86_400.0
"""So long what others wrote stays in the file, though it may be too old for this process; who
believes in answers of up to four days writes them anew within one."""
LOCK_SECONDS = 1.0
"""How long a writer waits for another one, which needs some milliseconds unless it is suspended."""
SECONDS_BETWEEN_TRIES = 0.01
# What makes the hosts of a topic other ones: files of settings that differ in it never mix.
_IDENTITY = (
    "mode",
    "addresses",
    "domain",
    "datacenters",
    "tag",
    "service_template",
    "service_map",
    "shards",
    "prefix",
)

Name = tuple[str, str | None]
"""A topic, and the server it was narrowed to."""

_Taken = tuple[float, bool, tuple[Instance, ...]]
"""When an answer was taken (wall clock), whether it is complete, and who is in it."""


class Kept(NamedTuple):
    """An answer as it is kept."""

    age_seconds: float
    is_complete: bool
    instances: tuple[Instance, ...]


class StateFile:
    """Reads and writes the answers of one configuration.  No lock: its owner calls one at a time.

    Several processes may share the folder: each keeps what the others wrote, the newest answer of a
    topic wins, and a lock on the file beside it lets one write after the other.  Only who waits
    longer than *lock_seconds* for it writes all the same: then the older write may be lost.  A
    reader needs no lock: the file is replaced as a whole.
    """

    def __init__(
        self,
        folder: str,
        settings: Settings,
        *,
        wall_clock: Callable[[], float] = time.time,
        lock_seconds: float = LOCK_SECONDS,
    ) -> None:
        identity = {name: _plain(getattr(settings, name)) for name in _IDENTITY}
        digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
        self.path = Path(folder) / f"{settings.mode}-{digest[:16]}.answers"
        self._max_age_seconds = settings.max_stale_seconds
        self._max_answers = settings.max_topics
        self._wall_clock = wall_clock
        self._lock_seconds = lock_seconds
        self._has_warned = False

    def load(self) -> dict[Name, Kept]:
        """Every answer that is not too old; none, with one warning, when the file is damaged."""
        now = self._wall_clock()
        return {
            name: Kept(max(0.0, now - taken_at), is_complete, instances)
            for name, (taken_at, is_complete, instances) in self._read(now).items()
            if now - taken_at < self._max_age_seconds
        }

    def save(self, answers: Mapping[Name, Kept]) -> None:
        """Put *answers* into the file at once or not at all; one without hosts removes its topic.

        A failure is logged, the first one as a warning, and leaves the file as it was.
        """
        now = self._wall_clock()  # the ages are as of now, and not of when it is our turn
        taken = {
            name: (now - answer.age_seconds, answer.is_complete, answer.instances)
            for name, answer in answers.items()
        }
        try:
            self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            with self._locked():
                self._replace(self._merged(taken))
        except OSError as error:
            self._warn("cannot be written", error)

    def _merged(self, answers: Mapping[Name, _Taken]) -> bytes:
        """The content that has the newest of *answers* and what the file has."""
        kept = self._read(self._wall_clock())
        # Other processes may keep more of them, and for longer, than this one would.
        max_answers = max(self._max_answers, len(kept))
        for name, answer in answers.items():
            if name not in kept or kept[name][0] <= answer[0]:
                kept[name] = answer
        newest = sorted(
            (item for item in kept.items() if item[1][2]), key=lambda item: item[1][0], reverse=True
        )
        rows = [
            [topic, server, taken_at, is_complete, [_row(one) for one in instances]]
            for (topic, server), (taken_at, is_complete, instances) in newest[:max_answers]
        ]
        body = json.dumps(rows, separators=(",", ":")).encode("ascii")
        return _header(body) + body

    def _read(self, now: float) -> dict[Name, _Taken]:
        try:
            found = dict(_answer(*row) for row in _checked(_content(self.path)))
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, TypeError, OverflowError, RecursionError) as error:
            self._warn("is ignored", error)
            return {}
        return {
            name: answer
            for name, answer in found.items()
            if -CLOCK_SLACK_SECONDS <= now - answer[0] < max(self._max_age_seconds, A_DAY_SECONDS)
        }

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        """Keep other processes from writing, if that can be had within the time for it."""
        flags = os.O_RDWR | os.O_CREAT | _DO_NOT_WAIT
        lock = os.open(self.path.with_suffix(".lock"), flags, 0o600)
        try:
            self._wait_for(lock)
            yield
        finally:
            if fcntl is not None:  # closing would not do: a child forked meanwhile has it open too
                with contextlib.suppress(OSError):
                    fcntl.flock(lock, fcntl.LOCK_UN)
            os.close(lock)

    def _wait_for(self, lock: int) -> None:
        if fcntl is None:
            return
        until, pause = time.monotonic() + self._lock_seconds, threading.Event()
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except BlockingIOError:
                if time.monotonic() >= until:
                    logger.debug("state file %s: written without the lock", self.path)
                    return
            except OSError as error:  # a file system without locks
                logger.debug("state file %s cannot be locked: %s", self.path, error)
                return
            pause.wait(SECONDS_BETWEEN_TRIES)

    def _replace(self, content: bytes) -> None:
        descriptor, temporary = tempfile.mkstemp(prefix=self.path.name, dir=self.path.parent)
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())  # else a power cut may leave the name without the content
            Path(temporary).replace(self.path)
        except BaseException:
            with contextlib.suppress(OSError):
                Path(temporary).unlink()
            raise

    def _warn(self, what: str, error: Exception) -> None:
        level = logging.DEBUG if self._has_warned else logging.WARNING
        self._has_warned = True
        logger.log(level, "state file %s %s: %s", self.path, what, error)


def _content(path: Path) -> bytes:
    """What the file holds; raises ValueError for what is no regular file, or too big.

    Never waits for a writer, as opening a pipe would, and reads no more than is allowed, as a
    device has no size.
    """
    with os.fdopen(os.open(path, os.O_RDONLY | _DO_NOT_WAIT), "rb") as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise ValueError("it is no regular file")
        content = file.read(MAX_BYTES + 1)
    if len(content) > MAX_BYTES:
        raise ValueError("it is too big")
    return content


def _header(body: bytes) -> bytes:
    return f"{FORMAT} {hashlib.sha256(body).hexdigest()} {len(body)}\n".encode("ascii")


def _checked(content: bytes) -> Any:
    """The rows in *content*; raises ValueError unless every byte is as it was written."""
    header, newline, body = content.partition(b"\n")
    if header + newline != _header(body):
        raise ValueError("damaged, or of another version")
    return json.loads(body)


def _row(instance: Instance) -> list[object]:
    host = instance.host
    return [host.address, host.port, instance.server, instance.priority, instance.weight]


def _answer(
    topic: object, server: object, taken_at: object, is_complete: object, instances: object
) -> tuple[Name, _Taken]:
    """A row as it was written; raises ValueError for one of other types, which nobody may meet."""
    if not (
        (isinstance(topic, str) and topic and isinstance(server, str | None))
        and (isinstance(taken_at, float | int) and math.isfinite(taken_at))
        and (isinstance(is_complete, bool) and isinstance(instances, list))
    ):
        raise ValueError("it has a row that is no answer")
    return (topic, server), (float(taken_at), is_complete, tuple(_instance(*x) for x in instances))


def _instance(
    address: object, port: object, server: object, priority: object, weight: object
) -> Instance:
    numbers = [number for number in (port, priority, weight) if number is not None]
    if not (
        (isinstance(address, str) and isinstance(server, str | None))
        and all(type(number) is int and 0 <= number < 65536 for number in numbers)
        and len(numbers) >= (2 if port is None else 3)
        and None not in (priority, weight)
    ):
        raise ValueError("it has a host that is none")
    return Instance(Host(address, port), server, priority, weight)  # type: ignore[arg-type]


def _plain(value: object) -> object:
    if isinstance(value, Mapping):
        return dict(value)
    return [str(item) for item in value] if isinstance(value, tuple) else value
