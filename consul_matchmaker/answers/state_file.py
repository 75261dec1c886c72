"""Last answers on disk, one file a topic: read at a cold start, written when they changed.

A file's first line says format, checksum and length of the rest; the rest says of which settings,
topic and server it is.  Whatever does not agree with it is as good as no file.
"""

from __future__ import annotations

import collections
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
from collections.abc import Callable, Iterator, Mapping
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
SWEEP_FILES = 1_000
"""Files that one step of such a look checks: some milliseconds."""
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


class Kept(NamedTuple):
    """An answer as a file has it."""

    age_seconds: float
    is_complete: bool
    instances: tuple[Instance, ...]
    path: str


class _Answer(NamedTuple):
    taken_at: float  # by the wall clock
    is_complete: bool
    instances: tuple[Instance, ...]


class _Entry:
    """A topic, or one server of it: the newest answer, and the one that was written."""

    __slots__ = ("is_noted", "latest", "name", "rewrite_at", "written")

    def __init__(self, topic: str, server: str | None) -> None:
        self.name = (topic, server)
        self.latest: _Answer | None = None  # None: dropped
        self.written: _Answer | None = None
        self.rewrite_at = -math.inf  # from then on it is written though it did not change
        self.is_noted = False


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
        pause = min(settings.max_stale_seconds, A_DAY_SECONDS) / SAVES_PER_MAX_STALE
        self._rewrite_seconds = max(BETWEEN_SAVES_SECONDS, pause)
        self._worker = make_worker("consul-matchmaker-saver", self._step)
        self._topics: dict[tuple[str, str | None], _Entry] = {}
        self._noted: collections.deque[_Entry] = collections.deque()  # what `step` looks at
        self._is_closing = False
        self._has_finished = threading.Event()
        self._sweep_at = -math.inf
        self._sweeping: Iterator[None] | None = None

    def load(self, topic: str, server: str | None) -> Kept | None:
        """What a process kept of *topic*, or None: it is absent, older than ``max_stale_seconds``,
        damaged, or of other settings.

        Reads one file of at most `MAX_BYTES` and waits for no writer.  Never raises: the first
        damaged file is a warning in the log.
        """
        return self._folder.load(topic, server)

    def keep(self, topic: str, server: str | None, snapshot: Snapshot) -> None:
        """Have *snapshot* written if its hosts changed, or its file runs out; without hosts, have
        the file removed.

        *snapshot*'s ``taken_at`` is by this object's clock.  An empty one that is not confirmed,
        and one from disk, are passed over.  Costs the same whatever is kept; no I/O.
        """
        may_be_wrong = snapshot.source == "disk" or not (snapshot.instances or snapshot.confirmed)
        if may_be_wrong or self._is_closing:
            return
        entry = self._topics.get((topic, server))
        if entry is None:
            entry = self._topics.setdefault((topic, server), _Entry(topic, server))
        now, latest = self._clock(), entry.latest
        if (
            latest is not None
            and latest.instances is snapshot.instances
            and latest.is_complete is snapshot.is_complete
            and now < entry.rewrite_at
        ):
            return
        taken_at = self._wall_clock() - max(0.0, now - snapshot.taken_at)
        entry.latest = _Answer(taken_at, snapshot.is_complete, snapshot.instances)
        self._note(entry)
        try:
            self._worker.start()
        except Unavailable as error:  # the next one tries again
            logger.debug("state files are not written: %s", error)

    def _note(self, entry: _Entry) -> None:
        if not entry.is_noted:
            entry.is_noted = True
            self._noted.append(entry)

    def drop(self, topic: str, server: str | None) -> None:
        """Forget *topic* and free its memory; what was written stays until it is too old."""
        entry = self._topics.pop((topic, server), None)
        if entry is not None:
            entry.latest = entry.written = None

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
            self._sweeping = None
            self._worker.stop(0)  # by its own thread, which ends with this step
            self._has_finished.set()
            return None
        self._sweep()
        return BETWEEN_SAVES_SECONDS

    def _write_noted(self) -> None:
        """After a failure the others wait for the next step, and the topic that failed is last."""
        failed: _Entry | None = None
        for _ in range(len(self._noted)):  # what is noted meanwhile has its turn in the next step
            if self._worker.is_stopping:
                return
            entry = self._noted.popleft()
            entry.is_noted = False
            if failed is not None and entry.latest is not None:
                self._note(entry)
            elif not self._is_written(entry):
                failed = entry
        if failed is not None:
            self._note(failed)

    def _is_written(self, entry: _Entry) -> bool:
        """Whether the file of *entry* is as it should be, now at the latest."""
        latest, written, now = entry.latest, entry.written, self._clock()
        if latest is None:
            return True
        is_same = written is not None and latest[1:] == written[1:]
        if not is_same or now >= entry.rewrite_at:
            if not self._folder.save(*entry.name, latest):
                return False
            entry.rewrite_at = now + self._rewrite_seconds
        entry.written = latest  # though it be equal: its instances are shared with the cache
        return True

    def _sweep(self) -> None:
        now = self._clock()
        if self._sweeping is None and now >= self._sweep_at:
            self._sweep_at = now + SWEEP_SECONDS
            self._sweeping = self._folder.sweep()
        if self._sweeping is not None:
            checked = sum(1 for _ in itertools.islice(self._sweeping, SWEEP_FILES))
            if checked < SWEEP_FILES:
                self._sweeping = None


class _Folder:
    """The files of one configuration.  Each is replaced as a whole, so a reader needs no lock."""

    def __init__(self, settings: Settings, wall_clock: Callable[[], float]) -> None:
        assert settings.state_path is not None
        identity = {name: _plain(getattr(settings, name)) for name in _IDENTITY}
        self._identity = _digest(identity)
        self._folder = Path(settings.state_path)
        self._mode = settings.mode
        self._max_age_seconds = settings.max_stale_seconds
        self._wall_clock = wall_clock
        self._has_warned = False

    def path(self, topic: str, server: str | None) -> Path:
        """A file for any text: its name is made of digests."""
        name = _digest([topic, server])[:32]
        return self._folder / f"{self._mode}-{self._identity[:16]}-{name}.answer"

    def load(self, topic: str, server: str | None) -> Kept | None:
        now, path = self._wall_clock(), self.path(topic, server)
        answer = self._read(path, topic, server, now)
        if answer is None or now - answer.taken_at >= self._max_age_seconds:
            return None
        age_seconds = max(0.0, now - answer.taken_at)
        return Kept(age_seconds, answer.is_complete, answer.instances, str(path))

    def save(self, topic: str, server: str | None, answer: _Answer) -> bool:
        """Have the file say *answer*, unless it says a newer one; return whether that could be
        done.  A failure is logged, and leaves the file as it was."""
        path = self.path(topic, server)
        there = self._read(path, topic, server, self._wall_clock())
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

    def sweep(self) -> Iterator[None]:
        """Remove files that are too old for everybody; yields after each file of the folder.

        One that is replaced just then may be lost, until it is written the next time.
        """
        oldest = self._wall_clock() - max(self._max_age_seconds, A_DAY_SECONDS)
        with contextlib.suppress(OSError, ValueError), os.scandir(self._folder) as files:
            for file in files:
                with contextlib.suppress(OSError):  # gone meanwhile, or not to be removed
                    if _OUR_NAMES.match(file.name) and (
                        file.is_file(follow_symlinks=False)
                        and file.stat(follow_symlinks=False).st_mtime < oldest
                    ):
                        Path(file).unlink()
                yield

    def _read(self, path: Path, topic: str, server: str | None, now: float) -> _Answer | None:
        """What the file says; None when it is absent, damaged or from the future."""
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
        return found if found.taken_at <= now + CLOCK_SLACK_SECONDS else None

    def _content(self, topic: str, server: str | None, answer: _Answer) -> bytes:
        rows = [_row(instance) for instance in answer.instances]
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


def _row(instance: Instance) -> list[object]:
    host = instance.host
    return [host.address, host.port, instance.server, instance.priority, instance.weight]


def _answer(taken_at: object, is_complete: object, rows: object) -> _Answer:
    """An answer as it was written; raises ValueError for other types, which nobody may meet."""
    if not (
        (isinstance(taken_at, float | int) and math.isfinite(taken_at))
        and (isinstance(is_complete, bool) and isinstance(rows, list) and rows)
    ):
        raise ValueError("it has no answer")
    return _Answer(float(taken_at), is_complete, tuple(_instance(*row) for row in rows))


def _instance(
    address: object, port: object, server: object, priority: object, weight: object
) -> Instance:
    numbers = (priority, weight) if port is None else (port, priority, weight)
    if not (
        (isinstance(address, str) and isinstance(server, str | None))
        and all(type(number) is int and 0 <= number < 65536 for number in numbers)
    ):
        raise ValueError("it has a host that is none")
    return Instance(Host(address, port), server, priority, weight)  # type: ignore[arg-type]


def _digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode("ascii")).hexdigest()


def _plain(value: object) -> object:
    if isinstance(value, Mapping):
        return dict(value)
    return [str(item) for item in value] if isinstance(value, tuple) else value
