"""The processes that look up: each in one mode, with several threads or tasks, at a limited rate.

``python -m integration.soak.readers CONFIG`` is one; it writes what it was answered to standard
output as JSON, a line for each answer that differs, and at least one a second and topic.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

SLOT_SECONDS = 1.0
END_SECONDS = 15.0


class Reader:
    """The soak's handle on one reading process."""

    def __init__(
        self, name: str, mode: str, url: str, topics: list[str], folder: Path, **config: Any
    ) -> None:
        self.name = name
        self.mode = mode
        self.log = folder / f"{name}.log"
        self.answers = folder / f"{name}.jsonl"
        config |= {"url": url, "topics": topics, "is_async": mode == "asyncio"}
        with self.log.open("ab") as log, self.answers.open("wb") as answers:
            self._process = subprocess.Popen(
                [sys.executable, "-m", __name__, json.dumps(config)],
                stdin=subprocess.PIPE,
                stdout=answers,
                stderr=log,
                start_new_session=True,
            )

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process.poll() is None else None

    def end(self) -> int:
        """Let it run to its end; its exit code, or -9 when it had to be killed."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        try:
            return self._process.wait(END_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            return self._process.wait()


# --- in the process itself -----------------------------------------------------------------------


class Recorder:
    """Writes answers down, those that say the same in one line; thread-safe."""

    def __init__(self, write: Callable[[str], object], *, understates: bool = False) -> None:
        self._write = write
        self._understates = understates
        self._lock = threading.Lock()
        self._slots: dict[str, dict[str, Any]] = {}

    def note(self, topic: str, asked_at: float, snapshot: Any, error: str = "") -> None:
        """*snapshot* was answered just now; None with *error*."""
        answered_at = time.monotonic()
        taken_at, hosts, is_fresh = answered_at, (), False
        if snapshot is not None:
            taken_at = answered_at - (0.0 if self._understates else snapshot.age_seconds)
            hosts = snapshot.hosts
            is_fresh = not snapshot.is_stale and snapshot.confirmed and snapshot.is_complete
        times = [round(asked_at, 4), round(answered_at, 4), round(taken_at, 4)]
        with self._lock:
            slot = self._slots.get(topic)
            if (
                slot is None
                or slot["fresh"] != is_fresh
                or slot["error"] != error
                or (slot["hosts"] is not hosts and slot["hosts"] != hosts)
                or answered_at - slot["first"][1] > SLOT_SECONDS
            ):
                self._flush(topic)
                slot = self._slots[topic] = {
                    "topic": topic,
                    "hosts": hosts,
                    "fresh": is_fresh,
                    "error": error,
                    "first": times,
                    "count": 0,
                    "worst": 0.0,
                }
            slot["hosts"] = hosts
            slot["last"] = times
            slot["count"] += 1
            slot["worst"] = max(slot["worst"], round(answered_at - asked_at, 5))

    def close(self) -> None:
        with self._lock:
            for topic in list(self._slots):
                self._flush(topic)

    def _flush(self, topic: str) -> None:
        slot = self._slots.pop(topic, None)
        if slot is not None:
            self._write(json.dumps({**slot, "hosts": [str(host) for host in slot["hosts"]]}))


def main(config: dict[str, Any]) -> None:
    from consul_matchmaker import Matchmaker

    recorder = Recorder(
        lambda line: print(line, flush=True), understates="understate" in config["plant"]
    )
    stopping = threading.Event()
    threading.Thread(target=_wait_for_end, args=(stopping,), daemon=True).start()
    if "leak" in config["plant"]:
        threading.Thread(target=_leak, args=(stopping,), daemon=True).start()
    with Matchmaker.from_url(config["url"]) as matchmaker:
        if config["is_async"]:
            asyncio.run(_read_async(matchmaker, config, recorder, stopping))
        else:
            threads = [
                threading.Thread(target=_read, args=(matchmaker, config, recorder, stopping))
                for _ in range(config["threads"])
            ]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
    recorder.close()


def _wait_for_end(stopping: threading.Event) -> None:
    sys.stdin.read()
    stopping.set()


def _leak(stopping: threading.Event) -> None:
    while not stopping.wait(2):
        os.open(os.devnull, os.O_RDONLY)


def _rounds(topics: list[str]) -> Iterator[str]:
    while True:
        yield from topics


def _read(matchmaker: Any, config: Any, recorder: Recorder, stopping: threading.Event) -> None:
    from consul_matchmaker.errors import MatchmakerError

    pause = 1 / config["rate"]
    for topic in _rounds(config["topics"]):
        if stopping.wait(pause):
            return
        asked_at = time.monotonic()
        try:
            snapshot = matchmaker.hosts(topic)
        except MatchmakerError as error:
            recorder.note(topic, asked_at, None, f"{type(error).__name__}: {error}"[:200])
        else:
            recorder.note(topic, asked_at, snapshot)


async def _read_async(
    sync: Any, config: Any, recorder: Recorder, stopping: threading.Event
) -> None:
    from consul_matchmaker import aio
    from consul_matchmaker.errors import MatchmakerError

    matchmaker = aio.Matchmaker(sync)
    pause = 1 / config["rate"]

    async def read() -> None:
        for topic in _rounds(config["topics"]):
            await asyncio.sleep(pause)
            if stopping.is_set():
                return
            asked_at = time.monotonic()
            try:
                snapshot = await matchmaker.hosts(topic)
            except MatchmakerError as error:
                recorder.note(topic, asked_at, None, f"{type(error).__name__}: {error}"[:200])
            else:
                recorder.note(topic, asked_at, snapshot)

    await asyncio.gather(*(read() for _ in range(config["threads"])))


if __name__ == "__main__":
    from integration.soak.members import log_to_stderr

    log_to_stderr()
    main(json.loads(sys.argv[1]))
