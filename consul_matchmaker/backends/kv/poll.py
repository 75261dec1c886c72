"""Wait for changes below one KV folder, and take apart only what is asked for.

An answer lists every key below the folder, in order, and may have a hundred thousand.  So it is
kept as the text that Consul wrote, and searched for the folder of a topic by halves: what is not
looked at costs nothing, and no call into C is long enough to stall the application's other threads.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Iterable, Iterator

from ...errors import Denied, Unavailable
from ...model import Host, Snapshot
from ..http.api import Answer
from ..http.leader import Confirmer
from ..http.long_poll import LongPoll, fingerprint
from .keys import SENTINEL, topic_folder
from .reader import Reader, keys_in, kv_path

logger = logging.getLogger(__name__)

PROOF_SECONDS = 60.0
"""How long a token that could read the folder is taken to read all of it, where answers do not get
shorter: Consul up to 1.10 does not say that it hides something (fact D4)."""
FIRST_STEP_BYTES = 256
BETWEEN_KEYS = b'","'
LONGEST_KEY_BYTES = 512 * 1024
"""As Consul takes them; nothing but backslashes is written twice as long."""
PIECE_BYTES = 65536
"""Of an answer, taken apart by one call: about a millisecond."""


class Polled:
    """One answer of a poll, not taken apart yet."""

    def __init__(self, reader: Reader, answer: Answer) -> None:
        self._reader, self._answer = reader, answer
        self._text = _compact(answer)
        self.index, self.length = answer.index, len(self._text)
        self.fingerprint = fingerprint(self._text)
        """Equal, for all purposes, only where Consul gave the same keys."""

    def folders(self, topics: Iterable[str]) -> Iterator[tuple[str, bytes]]:
        """Each of *topics* with its keys as Consul wrote them: equal only where they are the same.

        In no order that matters.
        """
        end = 1
        prefix = self._reader.prefix
        for folder, topic in sorted((topic_folder(prefix, each), each) for each in topics):
            start, end = span_of(self._text, folder, end)
            yield topic, self._text[start:end].removesuffix(b",")

    def has(self, key: str) -> bool:
        """Whether a key begins with *key*."""
        start, end = span_of(self._text, key)
        return end > start

    def snapshot(self, topic: str, folder: bytes) -> Snapshot:
        """What *folder*, which `folders` gave, says of *topic*; raises Unavailable."""
        try:
            return self._reader.snapshot_of(topic, list(_keys_of(folder)), self._answer)
        except ValueError:
            raise self._answer.unexpected() from None


class Poll(LongPoll):
    """Blocking queries of one folder, one after another, on a connection of their own.

    `poll` is called by one thread at a time, the other methods by any.
    """

    def __init__(self, reader: Reader, topic: str | None) -> None:
        super().__init__(reader.api)
        self._reader = reader
        self._is_whole_prefix = topic is None
        self._folder = _folder_of(reader, topic)
        self._proven_length = 0
        self._proven_for = -1  # token
        self._proven_until = -math.inf

    def poll(self, index: int, wait_seconds: float, at: Host | None) -> Polled:
        """The folder once something changed after *index*, or after *wait_seconds*, as the agent
        *at* says; with *index* 0 at once.

        Raises Unavailable, also when it was interrupted, and Denied, also when the token may read
        only some of the folder: the rest would look as if nobody served it.
        """
        params = {"keys": "", **self._reader.consistency}
        if index > 0:
            params["index"] = str(index)
        answer = self.received(
            lambda: self._reader.api.call(
                "GET",
                kv_path(self._folder),
                params,
                accept=(404,),
                at=at,
                wait_seconds=wait_seconds,
                line=self._line,
            )
        )
        polled = Polled(self._reader, answer)
        if self._is_whole_prefix:
            if answer.is_filtered or not polled.has(self._folder + SENTINEL):
                self._prove(polled, answer)
                self._write_sentinel()
        elif answer.status == 404 or answer.is_filtered:
            self._prove(polled, answer)
        return polled

    def fingerprint_of(self, folder: bytes) -> object:
        """That of an answer which has *folder* and nothing else."""
        return fingerprint(as_answer(folder))

    def __repr__(self) -> str:
        return f"<Poll {self._folder}>"

    def _prove(self, polled: Polled, answer: Answer) -> None:
        """Raise Denied when *answer* lacks something because the token may not read the folder.

        By a question of its own, but only once in a while: what is hidden makes answers shorter.
        """
        now, token = self._reader.clock(), self._reader.api.token_changes
        is_due = now >= self._proven_until or token != self._proven_for
        if is_due or answer.is_filtered or polled.length < self._proven_length:
            self._proven_for = -1
            self._reader.prove_readable(self._folder, answer, line=self._line)
            self._proven_for, self._proven_until = token, now + PROOF_SECONDS
        self._proven_length = polled.length

    def _write_sentinel(self) -> None:
        """Put one key without a session under the prefix, if there is none.

        A poll on a prefix that never had a key wakes on every write anywhere in Consul's KV store
        (fact C4).  Whoever may not write goes on without it.
        """
        if not self._reader.may_write_sentinel:
            return
        path, text = (
            kv_path(self._folder + SENTINEL),
            b"Kept by consul-matchmaker so that watching this folder stays cheap.",
        )
        try:
            self._reader.api.call("PUT", path, {"cas": "0"}, text, line=self._line)
        except Denied:
            self._reader.may_write_sentinel = False
            logger.info(
                "may not write %s%s: until somebody does, an empty prefix is polled more often",
                self._folder,
                SENTINEL,
            )
        except Unavailable as error:
            logger.debug("sentinel not written: %s", error)


def confirmer(reader: Reader) -> Confirmer:
    """What reads the sentinel of a topic, or of the whole prefix."""
    return Confirmer(
        reader.api,
        lambda topic: kv_path(_folder_of(reader, topic) + SENTINEL),
        reader.consistency,
    )


def _folder_of(reader: Reader, topic: str | None) -> str:
    return f"{reader.prefix}/" if topic is None else topic_folder(reader.prefix, topic)


def as_answer(folder: bytes) -> bytes:
    """The answer that has the keys of *folder* and no others."""
    return b"[%b]" % folder


def span_of(text: bytes, beginning: str, low: int = 1) -> tuple[int, int]:
    """Where the keys in *text* that begin with *beginning* are, none of which is before *low*.

    *text* is a JSON list of texts without spaces, in order, as Consul writes it.
    """
    first = beginning.encode("ascii")
    start = low if text.startswith(first, low + 1) else _first(text, first, low)
    return start, _first(text, first[:-1] + bytes([first[-1] + 1]), start)


def _first(text: bytes, wanted: bytes, low: int) -> int:
    """Where in *text*, from *low* on, the first key begins that is not before *wanted*."""
    high, step = len(text) - 1, FIRST_STEP_BYTES
    while low < high:
        # In steps that double until a key is not before it, then by halves: it is often near.
        middle = min(low + step, (low + high) // 2) if step else (low + high) // 2
        start = _start_of_key(text, low, middle)
        end = _end_of_key(text, start)
        key = text[start + 1 : end]
        if b"\\" in key:  # an escape, which is not in the order of what it stands for
            key = json.loads(text[start : end + 1]).encode("utf-8", "surrogatepass")
        if key >= wanted:
            high, step = start, 0
        else:
            low, step = min(end + len('",'), high), 2 * step
    return low


def _start_of_key(text: bytes, low: int, middle: int) -> int:
    """Where the key begins that is at *middle*; *low* is where another one, or this one, does."""
    end = text.rfind(BETWEEN_KEYS, low, middle + 1)
    while end > 0 and _is_escaped(text, end):
        end = text.rfind(BETWEEN_KEYS, low, end)
    return low if end < 0 else end + len('",')


def _end_of_key(text: bytes, start: int) -> int:
    """Where the quote is that ends the key which begins at *start*."""
    end = text.find(BETWEEN_KEYS, start + 1)
    while end > 0 and _is_escaped(text, end):
        end = text.find(BETWEEN_KEYS, end + 1)
    return len(text) - len('"]') if end < 0 else end


def _is_escaped(text: bytes, quote: int) -> bool:
    """Whether the quote belongs to a key, as in one that ends in ``",``."""
    if text[quote - 1 : quote] != b"\\":
        return False
    before = text[max(0, quote - 2 * LONGEST_KEY_BYTES) : quote]
    return bool((len(before) - len(before.rstrip(b"\\"))) % 2)


def _compact(answer: Answer) -> bytes:
    """The keys of *answer* as a JSON list without spaces."""
    if answer.status == 404:
        return b"[]"
    body = answer.body
    if body[:2] == b'["' and body[-2:] == b'"]' and b'", "' not in body[:PIECE_BYTES]:
        return body
    keys = keys_in(answer)  # an agent in development mode writes a key a line
    return json.dumps(keys, separators=(",", ":"), ensure_ascii=False).encode("utf-8")


def _keys_of(folder: bytes) -> Iterator[str]:
    """Each key of *folder*; raises ValueError for what is none."""
    start = 0
    while start < len(folder):
        end = folder.find(BETWEEN_KEYS, start + PIECE_BYTES) + 1 or len(folder)
        while end < len(folder) and _is_escaped(folder, end - 1):
            end = folder.find(BETWEEN_KEYS, end) + 1 or len(folder)
        keys = json.loads(as_answer(folder[start:end]))
        if not set(map(type, keys)) <= {str}:
            raise ValueError("not a list of texts")
        yield from keys
        start = end + 1
