"""Reads back what the processes wrote, judges it by the ledger, and prints the verdict."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from . import bounds
from .ledger import Sighting, Violation

BEFORE_SECONDS = 15.0
AFTER_SECONDS = 5.0
MOST_PRINTED = 40


@dataclass
class Answers:
    """What one reader was answered."""

    sightings: list[Sighting] = field(default_factory=list)
    lookups: int = 0
    worst: tuple[float, float, str] = (0.0, 0.0, "")
    """The slowest lookup of a topic that was known: seconds, when, topic."""
    slow: list[Violation] = field(default_factory=list)


def read_answers(reader: str, mode: str, path: Path) -> Answers:
    """What the process wrote; its last line may be cut."""
    found = Answers()
    known: set[str] = set()
    for row in _rows(path):
        topic = row["topic"]
        found.lookups += row["count"]
        hosts = frozenset(row["hosts"])
        for asked_at, answered_at, taken_at in _different(row["first"], row["last"]):
            found.sightings.append(
                Sighting(
                    reader,
                    mode,
                    topic,
                    hosts,
                    asked_at,
                    answered_at,
                    taken_at,
                    row["fresh"],
                    row["error"],
                )
            )
        if topic in known:
            at = row["last"][1]
            found.worst = max(found.worst, (row["worst"], at, topic))
            if row["worst"] > bounds.KNOWN_TOPIC_SECONDS.seconds + bounds.MACHINE_SECONDS:
                text = f"{row['worst']:.2f} s"
                who = f"{reader} ({mode}), topic {topic}"
                found.slow.append(Violation("a lookup of a known topic waits", who, text, at, at))
        if hosts:
            known.add(topic)
    return found


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    with path.open(encoding="utf-8") as lines:
        for line in lines:
            if line.endswith("\n"):
                yield json.loads(line)


def _different(first: Sequence[float], last: Sequence[float]) -> Iterator[Sequence[float]]:
    yield first
    if last != first:
        yield last


def timed_lines(path: Path) -> Iterator[tuple[float, str]]:
    """The lines of a log, each with its time, or that of the last one that has one."""
    at = 0.0
    with path.open(encoding="utf-8", errors="replace") as lines:
        for line in lines:
            first, _, rest = line.partition(" ")
            try:
                at = float(first)
            except ValueError:
                yield at, line.rstrip("\n")
            else:
                yield at, " " + rest.rstrip("\n")


def print_violations(
    violations: Sequence[Violation], notes: Sequence[tuple[float, str]], began_at: float
) -> None:
    """Each with what was done around it."""
    for each in violations[:MOST_PRINTED]:
        print(f"\nVIOLATION at {each.first_at - began_at:.2f}: {each}")
        for at, text in notes:
            if each.first_at - BEFORE_SECONDS <= at <= each.last_at + AFTER_SECONDS:
                print(f"    {at - began_at:8.2f}  {text}")
    if len(violations) > MOST_PRINTED:
        print(f"\nand {len(violations) - MOST_PRINTED} more violations")


def print_summary(
    done: Iterable[str],
    answers: dict[str, Answers],
    violations: Sequence[Violation],
    details: Sequence[str],
    began_at: float,
) -> None:
    kinds = Counter(done)
    total = sum(kinds.values())
    print(f"\nevents: {total}: " + ", ".join(f"{kinds[kind]} {kind}" for kind in sorted(kinds)))
    print(f"lookups: {sum(each.lookups for each in answers.values())}")
    for name, each in answers.items():
        seconds, at, topic = each.worst
        worst = f"worst of a known topic {seconds * 1000:.1f} ms ({topic}, {at - began_at:.1f})"
        print(f"  {name}: {each.lookups}, {worst if topic else 'no known topic'}")
    for line in details:
        print(line)
    print(f"violations: {len(violations)}")
    for promise, count in Counter(each.promise for each in violations).items():
        print(f"  {promise}: {count}")
