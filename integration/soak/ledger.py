"""The truth about every host, and the judgement of what was answered: pure, judged at the end.

All times are of CLOCK_MONOTONIC, which every process of one machine shares.
"""

from __future__ import annotations

import bisect
import threading
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from . import bounds
from .bounds import MACHINE_SECONDS, Liveness


@dataclass(frozen=True)
class Place:
    """A host of a topic, how its life is known to Consul, and by which agent (None: by none)."""

    topic: str
    host: str
    liveness: Liveness
    agent: str | None = None


class Sighting(NamedTuple):
    """An answer, or an error, that a reader had."""

    reader: str
    mode: str
    topic: str
    hosts: frozenset[str]
    asked_at: float
    answered_at: float
    taken_at: float
    """When Consul gave it, by its own word: ``answered_at`` less ``age_seconds``."""
    is_fresh: bool = True
    """It calls itself neither stale, nor unconfirmed, nor incomplete."""
    error: str = ""


@dataclass(frozen=True)
class Disturbance:
    """From *begin* to *end* something was wrong with *where*: an agent, a host, None for all."""

    kind: str
    begin: float
    end: float
    where: str | None = None

    def concerns(self, place: Place) -> bool:
        return self.where is None or self.where in (place.agent, place.host)


@dataclass(frozen=True)
class Violation:
    """A promise that was broken, how often, and when first and last."""

    promise: str
    who: str
    text: str
    first_at: float
    last_at: float
    count: int = 1

    def __str__(self) -> str:
        times = f", {self.count} times in {self.last_at - self.first_at:.1f} s"
        return f"{self.promise}: {self.who}: {self.text}" + (times if self.count > 1 else "")


@dataclass
class _Life:
    """A host may be listed from *up_at* on, must be from *due_at* until *down_at*, and never after
    *gone_at*."""

    came: str
    up_at: float
    due_at: float
    down_from: float = float("inf")
    down_at: float = float("inf")
    how: str = ""
    gone_at: float = float("inf")


@dataclass
class Ledger:
    """What was done, written down while it is done; thread-safe."""

    places: dict[str, Place] = field(default_factory=dict)
    disturbances: list[Disturbance] = field(default_factory=list)
    _lives: dict[str, list[_Life]] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def know(self, place: Place) -> None:
        """There is such a host; nobody has started it yet."""
        with self._lock:
            self.places[place.host] = place
            self._lives[place.host] = []

    def up(self, host: str, at: float, how: str, extra_seconds: float = 0.0) -> None:
        """From *at* on it may be listed; and must be after what `bounds.LISTED` says of *how*."""
        seconds = bounds.LISTED[how, self.places[host].liveness].seconds
        with self._lock:
            self._lives[host].append(_Life(how, at, at + seconds + extra_seconds + MACHINE_SECONDS))

    def due(self, host: str, at: float, how: str) -> None:
        """It was made so only at *at*: what `up` said of *how* counts from then."""
        seconds = bounds.LISTED[how, self.places[host].liveness].seconds
        with self._lock:
            self._lives[host][-1].due_at = at + seconds + MACHINE_SECONDS

    def down(self, host: str, begun_at: float, done_at: float, how: str) -> None:
        """It was made to go between these two moments: it may be listed no longer than `GONE`."""
        with self._lock:
            life = self._lives[host][-1]
            if life.how:
                raise ValueError(f"{host} is down already")
            life.down_from, life.down_at, life.how = begun_at, done_at, how

    def disturbed(self, kind: str, begin: float, end: float, where: str | None = None) -> None:
        with self._lock:
            self.disturbances.append(Disturbance(kind, begin, end, where))

    def judged(self) -> Truth:
        """The truth, now that everything is known."""
        return Truth(self.places, self._lives, self.disturbances)


class Truth:
    """What Consul must, may and must not have listed, at every moment."""

    def __init__(
        self,
        places: dict[str, Place],
        lives: dict[str, list[_Life]],
        disturbances: Sequence[Disturbance],
    ) -> None:
        self._places = places
        self._lives = {host: [replace(life) for life in all_of] for host, all_of in lives.items()}
        self._disturbances = sorted(disturbances, key=lambda each: (each.begin, each.end))
        self._excused: dict[str, list[tuple[float, float]]] = {}
        self._may_be_all: dict[str, list[tuple[float, float]]] = {}
        for host, place in places.items():
            self._excused[host] = list(self._excuses(place))
            self._may_be_all[host] = list(self._excuses(place, of_all=True))
            for life in self._lives[host]:
                life.due_at = self._due_at(place, life)
                life.gone_at = self._gone_at(place, life)
        self._lagging = [
            (each.begin, each.end + bounds.LAGS[each.kind].seconds + MACHINE_SECONDS)
            for each in self._disturbances
            if each.kind in bounds.LAGS
        ]
        self._members: dict[str, list[str]] = {}
        for place in places.values():
            self._members.setdefault(place.topic, []).append(place.host)

    def members(self, topic: str) -> Sequence[str]:
        return self._members.get(topic, ())

    def is_known(self, topic: str, host: str) -> bool:
        place = self._places.get(host)
        return place is not None and place.topic == topic

    def must_not(self, host: str, begin: float, end: float) -> bool:
        """Whether *host* was surely in no list of Consul's at any moment from *begin* to *end*."""
        return all(end < life.up_at or life.gone_at < begin for life in self._lives[host])

    def must(self, host: str, begin: float, end: float) -> bool:
        """Whether *host* had to be in Consul's list at every moment from *begin* to *end*."""
        return self._is_wanted(host, begin, end) and not _meets(self._excused[host], begin, end)

    def must_not_be_all(self, host: str, begin: float, end: float) -> bool:
        """Whether *host* is a reason not to answer its topic empty: it had to be in Consul's list,
        or was only missing for what readers hold back."""
        return self._is_wanted(host, begin, end) and not _meets(self._may_be_all[host], begin, end)

    def _is_wanted(self, host: str, begin: float, end: float) -> bool:
        return any(life.due_at <= begin and end < life.down_from for life in self._lives[host])

    def lags(self, mode: str, begin: float, end: float) -> bool:
        """Whether a reader in *mode* may have been answered by a server that lags."""
        return mode in bounds.STALE_MODES and _meets(self._lagging, begin, end)

    def gone_since(self, host: str, moment: float) -> float:
        """For how long *host* had surely been gone at *moment*; infinite if it never was there."""
        before = [life.gone_at for life in self._lives[host] if life.up_at <= moment]
        return moment - max(before, default=float("-inf"))

    def judged_shares(self, begin: float, end: float) -> tuple[float, float]:
        """Which share of all hosts' time Consul had to list them, and which it must not have."""
        moments = [begin + (end - begin) * (n + 0.5) / SHARES for n in range(SHARES)]
        pairs = [(host, moment) for host in self._places for moment in moments]
        must = sum(self.must(host, moment, moment) for host, moment in pairs)
        must_not = sum(self.must_not(host, moment, moment) for host, moment in pairs)
        return must / len(pairs), must_not / len(pairs)

    def _excuses(self, place: Place, *, of_all: bool = False) -> Iterator[tuple[float, float]]:
        for each in self._disturbances:
            excuse = bounds.MISSING.get((each.kind, place.liveness))
            if excuse is None or not each.concerns(place) or (of_all and not excuse.may_empty):
                continue
            if each.end - each.begin > excuse.survived:
                after = excuse.after.seconds + MACHINE_SECONDS
                yield each.begin, self._repaired_at(place, each.begin, each.end + after, after)

    def _due_at(self, place: Place, life: _Life) -> float:
        seconds = bounds.LISTED[life.came, place.liveness].seconds + MACHINE_SECONDS
        return self._repaired_at(place, life.up_at, life.due_at, seconds)

    def _repaired_at(self, place: Place, begin: float, end: float, seconds: float) -> float:
        """*end* of what takes *seconds*, which count anew when Consul cannot be told of it."""
        for each in self._disturbances:
            is_unheard = each.kind in bounds.UNHEARD and each.concerns(place)
            if is_unheard and each.begin <= end and each.end >= begin:
                end = max(end, each.end + seconds)
        return end

    def _gone_at(self, place: Place, life: _Life) -> float:
        if not life.how:
            return float("inf")
        seconds = bounds.GONE[life.how, place.liveness].seconds
        gone_at = life.down_at + seconds + MACHINE_SECONDS
        for each in self._disturbances:
            if not each.concerns(place) or each.begin > gone_at:
                continue
            is_held = each.kind in bounds.ELECTING and place.liveness != "check"
            if is_held and each.begin <= life.down_at:
                renewed_at = min(life.down_at, each.end) + bounds.HELD.seconds
                if renewed_at >= life.down_from:
                    gone_at = max(gone_at, renewed_at + seconds + MACHINE_SECONDS)
            if each.end < life.down_from:
                continue
            if life.how == "left" and each.kind in bounds.UNHEARD:
                seconds = bounds.GONE["killed", place.liveness].seconds
                gone_at = max(gone_at, life.down_at + seconds + MACHINE_SECONDS)
            later = bounds.LATER.get((each.kind, place.liveness))
            if later is not None:
                gone_at = max(gone_at, each.end + later.seconds + seconds + MACHINE_SECONDS)
        return gone_at


SHARES = 500


def _meets(spans: Iterable[tuple[float, float]], begin: float, end: float) -> bool:
    return any(first <= end and begin <= last for first, last in spans)


# --- judgements ----------------------------------------------------------------------------------


def wrong_answers(truth: Truth, sightings: Iterable[Sighting]) -> Iterator[Violation]:
    """Every promise about answers that these sightings, in their order, break."""
    known: set[tuple[str, str]] = set()  # topics by reader
    for each in sightings:
        if each.error:
            if (each.reader, each.topic) in known:
                yield _violation("a known topic fails", each, each.error)
            continue
        if each.hosts:
            known.add((each.reader, each.topic))
        yield from _wrong_hosts(truth, each)
        yield from _missing_hosts(truth, each, is_known=(each.reader, each.topic) in known)


def _wrong_hosts(truth: Truth, each: Sighting) -> Iterator[Violation]:
    age = each.answered_at - each.taken_at
    for host in sorted(each.hosts):
        if not truth.is_known(each.topic, host):
            yield _violation("a host that nobody ever served", each, host)
            continue
        if truth.lags(each.mode, each.taken_at, each.answered_at):
            continue
        if truth.must_not(host, each.taken_at, each.answered_at):
            gone = truth.gone_since(host, each.taken_at)
            yield _violation("an age understates", each, f"{host} gone {gone:.1f} s before", age)
        behind = bounds.FRESH[each.mode].seconds + MACHINE_SECONDS
        if each.is_fresh and truth.must_not(host, each.asked_at - behind, each.answered_at):
            yield _violation("a wrong host in a fresh answer", each, host, age)


def _missing_hosts(truth: Truth, each: Sighting, *, is_known: bool) -> Iterator[Violation]:
    members = truth.members(each.topic)
    span = (each.taken_at, each.answered_at)
    age = each.answered_at - each.taken_at
    if not each.hosts and is_known and each.mode != "consul":
        alive = sum(truth.must_not_be_all(host, *span) for host in members)
        if alive:
            yield _violation("a known topic is empty", each, f"{alive} live hosts", age)
            return
    must = [host for host in members if host not in each.hosts and truth.must(host, *span)]
    if each.is_fresh and not truth.lags(each.mode, each.taken_at, each.answered_at):
        promise = "a registration is lost" if each.mode == "consul" else "a live host is missing"
        for host in must:
            yield _violation(promise, each, host, age)


def _violation(promise: str, each: Sighting, text: str, age: float | None = None) -> Violation:
    said = "" if age is None else f" ({age:.2f} s old{', fresh' if each.is_fresh else ''})"
    who = f"{each.reader} ({each.mode}), topic {each.topic}"
    return Violation(promise, who, text + said, each.answered_at, each.answered_at)


TOGETHER_SECONDS = 5.0


def joined(violations: Iterable[Violation]) -> list[Violation]:
    """One for those of the same promise and reader that follow each other closely."""
    found: list[Violation] = []
    latest: dict[tuple[str, str], int] = {}
    for each in sorted(violations, key=lambda each: each.first_at):
        place = latest.get((each.promise, each.who))
        if place is not None and each.first_at - found[place].last_at <= TOGETHER_SECONDS:
            old = found[place]
            found[place] = Violation(
                old.promise,
                old.who,
                old.text,
                old.first_at,
                max(old.last_at, each.last_at),
                old.count + each.count,
            )
        else:
            latest[each.promise, each.who] = len(found)
            found.append(each)
    return found


# --- growth --------------------------------------------------------------------------------------


class Sample(NamedTuple):
    """What a process held at one moment."""

    at: float
    memory_kib: int
    threads: int
    descriptors: int


def growth(who: str, samples: Sequence[Sample], warm_up_seconds: float) -> Iterator[Violation]:
    """What grew by more than it may, from the end of the warm-up to the last third.

    Medians of both ends: a thread that lives for a moment is no growth.
    """
    times = [sample.at for sample in samples]
    later = samples[bisect.bisect_left(times, times[0] + warm_up_seconds) :] if samples else ()
    third = len(later) // 3
    if third < 3:
        return
    for name, allowed in (
        ("memory_kib", bounds.GROWTH_KIB),
        ("threads", bounds.GROWTH_THREADS),
        ("descriptors", bounds.GROWTH_DESCRIPTORS),
    ):
        values = [getattr(sample, name) for sample in later]
        before, after = (sorted(part)[third // 2] for part in (values[:third], values[-third:]))
        if after - before > allowed:
            text = f"{name} grew from {before} to {after}, by more than {allowed}"
            yield Violation("no growth", who, text, later[-third].at, later[-1].at)


# --- logs ----------------------------------------------------------------------------------------

EXPECTED_LINES: dict[str, str] = {}
"""What may stand in an ERROR line, with the reason.  Nothing so far."""


def bad_lines(who: str, lines: Iterable[tuple[float, str]]) -> Iterator[Violation]:
    """Tracebacks and ERROR lines that no reason in `EXPECTED_LINES` covers, and what follows."""
    is_trace = False
    began_at = at = 0.0
    for at, line in lines:
        if is_trace and line.startswith((" ", "\t")):
            continue
        if is_trace:  # the first line that is not indented names the exception
            is_trace = False
            yield Violation("an unexpected traceback", who, line.strip()[:300], began_at, at)
        elif line.startswith("Traceback"):
            is_trace, began_at = True, at
        elif (" ERROR " in line or " CRITICAL " in line) and not any(
            text in line for text in EXPECTED_LINES
        ):
            yield Violation("an unexpected error is logged", who, line.strip()[:300], at, at)
    if is_trace:
        yield Violation("an unexpected traceback", who, "cut off", began_at, at)
