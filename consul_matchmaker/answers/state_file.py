"""Last answers on disk, one file a topic: read at a cold start, written when they changed.

A file's first line says format, checksum and length of the rest; the rest says of which settings,
topic and server it is.  Whatever does not agree with it is as good as no file.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import logging
import math
import os
import re
import stat
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

from ..errors import Unavailable
from ..model import Host, Instance, Snapshot
from ..settings import MODES, Settings
from ..worker import MakeWorker, Worker

logger = logging.getLogger(__name__)

FORMAT = "consul-matchmaker-topic-1"
MAX_BYTES = 4 * 1024 * 1024
"""A bigger file is not ours: 10,000 hosts take about 0.5 MB."""
CLOCK_SLACK_SECONDS = 5.0
"""So far in the future an answer may be from: wall clocks are set back a little now and then."""
BETWEEN_SAVES_SECONDS = 10.0
"""The least between two writes of one topic."""
SAVES_PER_MAX_STALE = 4
"""An unchanged answer is written so often in ``max_stale_seconds``, so that it does not run out."""
A_DAY_SECONDS = 86_400.0
"""A file stays at least so long after it was written, as other processes may believe it for longer
than this one; an unchanged one is therefore written four times a day at least."""
SWEEP_SECONDS = A_DAY_SECONDS
"""Between two looks for files of topics that nobody keeps any more."""
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
_OUR_NAMES = re.compile(
    rf"(?:{'|'.join(MODES)})-[0-9a-f]{{16}}-[0-9a-f]{{32}}\.answer(?:\.[a-z0-9_]+)?\Z"
)
_DO_NOT_WAIT = getattr(os, "O_NONBLOCK", 0)


_NOTHING: Mapping[str, str] = {}


class _Answer(NamedTuple):
    taken_at: float  # by the wall clock
    is_complete: bool
    instances: tuple[Instance, ...]


class _Entry:
    """The newest answer of a topic, or of one server of it."""

    __slots__ = ("latest", "rewrite_at")

    def __init__(self) -> None:
        self.latest: _Answer | None = None
        self.rewrite_at = -math.inf  # from then on it is written though it did not change


_Name = tuple[str, str | None]


class StateFiles:
    """Last answers on disk, one file a topic: read at a cold start, written when they changed.

    The thread ``consul-matchmaker-saver`` starts with the first `keep`; nothing else writes.
    Several processes may share the folder: a file with a newer answer is not replaced, and one that
    nobody keeps any more is removed once it is older than ``max_stale_seconds`` and a day.

    Thread-safe, without a lock: `keep` stores the answer before it notes the topic, and the thread
    takes the note away before it reads the answer.
    """

    def __init__(
        self,
        settings: Settings,
        *,
        clock: Callable[[], float] = time.monotonic,
        wall_clock: Callable[[], float] = time.time,
        make_worker: MakeWorker = Worker,
    ) -> None:
        self._folder = _Folder(settings, wall_clock)
        self._clock = clock
        self._wall_clock = wall_clock
        self._max_stale_seconds = settings.max_stale_seconds
        pause = min(settings.max_stale_seconds, A_DAY_SECONDS) / SAVES_PER_MAX_STALE
        self._rewrite_seconds = max(BETWEEN_SAVES_SECONDS, pause)
        self._worker = make_worker("consul-matchmaker-saver", self._step)
        self._topics: dict[_Name, _Entry] = {}
        self._noted: dict[_Name, None] = {}  # what is to be written, in that order
        self._is_closing = False
        self._has_finished = threading.Event()
        self._sweep_at = -math.inf

    def load(self, topic: str, server: str | None) -> Snapshot | None:
        """What a process kept of *topic*, stale and unconfirmed; None: it is absent, older than
        ``max_stale_seconds``, damaged, or of other settings.

        Reads one file of at most `MAX_BYTES` and waits for no writer.  Never raises: the first
        damaged file is a warning in the log.
        """
        answer = self._folder.read(topic, server)
        if answer is None:
            return None
        age_seconds = max(0.0, self._wall_clock() - answer.taken_at)
        if age_seconds >= self._max_stale_seconds:
            return None
        taken_at = self._clock() - age_seconds
        return Snapshot(
            topic,
            answer.instances,
            "disk",
            answer.is_complete,
            taken_at=taken_at,
            fresh_until=taken_at,
            clock=self._clock,
            confirmed=False,
            details={"file": str(self._folder.path(topic, server))},
        )

    def keep(self, topic: str, server: str | None, snapshot: Snapshot) -> None:
        """Have *snapshot* written if its hosts changed, or its file runs out; without hosts, have
        the file removed.

        *snapshot*'s ``taken_at`` is by this object's clock.  An empty one that is not confirmed,
        and one from disk, are passed over.  Costs the same whatever is kept; no I/O.
        """
        may_be_wrong = snapshot.source == "disk" or not (snapshot.instances or snapshot.confirmed)
        if may_be_wrong or self._is_closing:
            return
        name, now = (topic, server), self._clock()
        entry = self._topics.get(name)
        if entry is None:
            entry = self._topics.setdefault(name, _Entry())
        taken_at = self._wall_clock() - max(0.0, now - snapshot.taken_at)
        before = entry.latest
        entry.latest = _Answer(taken_at, snapshot.is_complete, snapshot.instances)
        if before is not None and before[1:] == entry.latest[1:] and now < entry.rewrite_at:
            return
        self._noted[name] = None
        try:
            self._worker.start()
        except Unavailable as error:  # the next one tries again
            logger.debug("state files are not written: %s", error)

    def drop(self, topic: str, server: str | None) -> None:
        """Forget *topic* and free its memory; what was written stays until it is too old."""
        self._topics.pop((topic, server), None)

    def stop(self) -> None:
        """Begin to close: have the thread write what is not written yet, and end.  Does not wait;
        what is kept from now on is passed over."""
        self._is_closing = True
        self._worker.wake()

    def close(self, timeout_seconds: float) -> bool:
        """Write what is not written yet; return whether the thread has ended within
        *timeout_seconds*.  When it has not, as with a disk that hangs, it ends after the file that
        it is at."""
        deadline = self._clock() + timeout_seconds
        self.stop()
        if self._worker.is_running:
            self._has_finished.wait(timeout_seconds)
        else:
            self._step()
        return self._worker.stop(max(0.0, deadline - self._clock()))

    def __repr__(self) -> str:
        return f"<StateFiles {len(self._topics)} topics, {self._worker!r}>"

    # -- the background thread

    def _step(self) -> float | None:
        """Write what `keep` noted; return in how many seconds to come again, None: never."""
        is_last = self._is_closing
        self._write_noted()
        if is_last:
            self._worker.stop(0)  # by its own thread, which ends with this step
            self._has_finished.set()
            return None
        if self._clock() >= self._sweep_at:
            self._sweep_at = self._clock() + SWEEP_SECONDS
            self._folder.sweep(lambda: self._is_closing)
        return BETWEEN_SAVES_SECONDS

    def _write_noted(self) -> None:
        """After a failure the others wait for the next step, and the topic that failed is last."""
        for name in list(self._noted):
            if self._worker.is_stopping:
                return
            del self._noted[name]
            entry = self._topics.get(name)
            if entry is None or entry.latest is None:  # dropped, or about to be noted
                continue
            now = self._clock()
            if not self._folder.save(*name, entry.latest):
                self._noted[name] = None
                return
            entry.rewrite_at = now + self._rewrite_seconds


class _Folder:
    """The files of one configuration.  Each is replaced as a whole, so a reader needs no lock."""

    def __init__(self, settings: Settings, wall_clock: Callable[[], float]) -> None:
        assert settings.state_path is not None
        identity = {name: _plain(getattr(settings, name)) for name in _IDENTITY}
        if settings.accept_warning:  # else files have the names that they had before it was one
            identity["accept_warning"] = True
        self._identity = _digest(identity)
        self._folder = Path(settings.state_path)
        self._mode = settings.mode
        self._max_age_seconds = max(settings.max_stale_seconds, A_DAY_SECONDS)
        self._wall_clock = wall_clock
        self._has_warned = False

    def path(self, topic: str, server: str | None) -> Path:
        """A file for any text: its name is made of digests."""
        name = _digest([topic, server])[:32]
        return self._folder / f"{self._mode}-{self._identity[:16]}-{name}.answer"

    def save(self, topic: str, server: str | None, answer: _Answer) -> bool:
        """Have the file say *answer*, unless it says a newer one; return whether that could be
        done.  A failure is logged, and leaves the file as it was."""
        path = self.path(topic, server)
        there = self.read(topic, server)
        try:
            if there is not None and there.taken_at > answer.taken_at:
                pass  # another process asked later
            elif answer.instances:
                self._replace(path, self._content(topic, server, answer))
            else:
                path.unlink(missing_ok=True)
        except (OSError, ValueError) as error:  # ValueError: the path is none
            self._warn(path, "cannot be written", error)
            return False
        return True

    def sweep(self, is_enough: Callable[[], bool]) -> None:
        """Remove files that are too old for everybody, until *is_enough*.

        One that is replaced just then may be lost, until it is written the next time.
        """
        oldest = self._wall_clock() - self._max_age_seconds
        with contextlib.suppress(OSError, ValueError), os.scandir(self._folder) as files:
            for file in itertools.takewhile(lambda _: not is_enough(), files):
                with contextlib.suppress(OSError):  # gone meanwhile, or not to be removed
                    if _OUR_NAMES.match(file.name) and (
                        file.is_file(follow_symlinks=False)
                        and file.stat(follow_symlinks=False).st_mtime < oldest
                    ):
                        Path(file).unlink()

    def read(self, topic: str, server: str | None) -> _Answer | None:
        """What the file says; None when it is absent, damaged or from the future."""
        path = self.path(topic, server)
        try:
            name, *answer = _checked(_content(path))
            if name != [self._identity, topic, server]:
                raise ValueError("it is of another topic, or of other settings")
            found = _answer(*answer)
        except FileNotFoundError:
            return None
        except (OSError, ValueError, TypeError, OverflowError, RecursionError) as error:
            self._warn(path, "is ignored", error)
            return None
        return found if found.taken_at <= self._wall_clock() + CLOCK_SLACK_SECONDS else None

    def _content(self, topic: str, server: str | None, answer: _Answer) -> bytes:
        rows = [
            [one.host.address, one.host.port, one.server, one.priority, one.weight]
            + ([one.tags, dict(one.meta), one.node, one.datacenter] if one.node else [])
            for one in answer.instances
        ]
        said = [[self._identity, topic, server], answer.taken_at, answer.is_complete, rows]
        body = json.dumps(said, separators=(",", ":")).encode("ascii")
        return _header(body) + body

    def _replace(self, path: Path, content: bytes) -> None:
        try:
            descriptor, temporary = tempfile.mkstemp(prefix=f"{path.name}.", dir=path.parent)
        except FileNotFoundError:
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            descriptor, temporary = tempfile.mkstemp(prefix=f"{path.name}.", dir=path.parent)
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(content)
            # No fsync, which waits for the disk each time: a power cut may leave the name without
            # the content, but the checksum tells, and it costs topics their answer of last resort.
            Path(temporary).replace(path)
        except BaseException:
            with contextlib.suppress(OSError):
                Path(temporary).unlink()
            raise

    def _warn(self, path: Path, what: str, error: Exception) -> None:
        level = logging.DEBUG if self._has_warned else logging.WARNING
        self._has_warned = True
        logger.log(level, "state file %s %s: %s", path, what, error)


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


def _checked(content: bytes) -> list[object]:
    """What *content* says; raises ValueError unless every byte is as it was written."""
    header, newline, body = content.partition(b"\n")
    if header + newline != _header(body):
        raise ValueError("damaged, or of another version")
    said = json.loads(body)
    if not isinstance(said, list):
        raise ValueError("it has no answer")
    return said


def _answer(taken_at: object, is_complete: object, rows: object) -> _Answer:
    """An answer as it was written; raises ValueError for other types, which nobody may meet."""
    if not (
        (isinstance(taken_at, float | int) and math.isfinite(taken_at))
        and (isinstance(is_complete, bool) and isinstance(rows, list) and rows)
    ):
        raise ValueError("it has no answer")
    return _Answer(float(taken_at), is_complete, tuple(_instance(*row) for row in rows))


def _instance(
    address: object,
    port: object,
    server: object,
    priority: object,
    weight: object,
    tags: object = (),
    meta: object = _NOTHING,
    node: object = None,
    datacenter: object = None,
) -> Instance:
    numbers = (priority, weight) if port is None else (port, priority, weight)
    if not (
        (isinstance(address, str) and isinstance(server, str | None))
        and all(type(number) is int and 0 <= number < 65536 for number in numbers)
    ):
        raise ValueError("it has a host that is none")
    if not (
        isinstance(tags, list | tuple)
        and isinstance(meta, Mapping)
        and {*map(type, tags), *map(type, meta.values())} <= {str}
        and isinstance(node, str | None)
        and isinstance(datacenter, str | None)
    ):
        raise ValueError("it has a service that is none")
    host = Host(address, port)  # type: ignore[arg-type]
    return Instance(host, server, priority, weight, tuple(tags), meta, node, datacenter)  # type: ignore[arg-type]


def _digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode("ascii")).hexdigest()


def _plain(value: object) -> object:
    if isinstance(value, Mapping):
        return dict(value)
    return [str(item) for item in value] if isinstance(value, tuple) else value
