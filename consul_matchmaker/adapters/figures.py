"""The figures of `Matchmaker.status()` that a monitoring system is given, whichever it is."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

Status = Mapping[str, Any]
Value = float | Mapping[str, float]


@dataclass(frozen=True, slots=True)
class Figure:
    """One figure, or with *by* one for each value of that label."""

    name: str
    """Without its unit."""
    text: str
    kind: Literal["counter", "amount", "gauge"]
    """What only grows, until the process ends; what goes up and down, and whose sum over labels and
    processes means something; what has no such sum."""
    unit: str
    """As UCUM writes it: s, By (bytes), or what is counted, in braces."""
    of: Callable[[Status], Value | None]
    """None where there is no such thing."""
    by: str = ""


def _backend(key: str) -> Callable[[Status], Any]:
    return lambda status: (status["backend"] or {}).get(key)


def _agents_away(status: Status) -> float | None:
    away = _backend("agents_away")(status)
    return None if away is None else len(away)


def _quarantined(status: Status) -> Value:
    return {topic: len(hosts) for topic, hosts in status["quarantine"].items()}


def _watcher(key: str) -> Callable[[Status], float | None]:
    return lambda status: status["watcher"] and int(status["watcher"][key])


def _registrations(status: Status) -> Value | None:
    keeper = status["keeper"]
    return keeper and Counter(each["standing"] for each in keeper["registrations"])


def _wire(name: str, text: str, unit: str, key: str) -> Figure:
    def of(status: Status) -> Value:
        return {transport: counts[key] for transport, counts in status["wire"].items()}

    return Figure(name, text, "counter", unit, of, "transport")


FIGURES = (
    Figure(
        "lookups",
        "Lookups, by what they found.",
        "counter",
        "{lookup}",
        lambda status: status["cache"]["lookups_that_found"],
        "found",
    ),
    Figure(
        "questions",
        "Answers of Consul and failures to get one.",
        "counter",
        "{question}",
        lambda status: status["cache"]["questions"],
        "outcome",
    ),
    Figure(
        "question",
        "Time spent waiting for answers.",
        "counter",
        "s",
        lambda status: status["cache"]["seconds_asking"],
    ),
    Figure(
        "longest_question",
        "The longest time that one answer took.",
        "gauge",
        "s",
        lambda status: status["cache"]["longest_question_seconds"],
    ),
    Figure(
        "evictions",
        "Topics that made room for others.",
        "counter",
        "{topic}",
        lambda status: status["cache"]["evictions"],
    ),
    Figure(
        "topics",
        "Topics in memory.",
        "amount",
        "{topic}",
        lambda status: status["cache"]["states"],
        "state",
    ),
    Figure(
        "doubted_topics",
        "Topics whose newest answer is not believed yet.",
        "amount",
        "{topic}",
        lambda status: status["cache"]["doubted"],
    ),
    Figure("agents_away", "Agents that are left alone for now.", "amount", "{agent}", _agents_away),
    Figure(
        "unknown_keys",
        "Keys under the prefix that are not ours.",
        "gauge",  # every process sees the same
        "{key}",
        _backend("unknown_keys"),
    ),
    _wire("queries", "Queries sent to agents.", "{query}", "queries"),
    _wire("retries", "Queries sent once more.", "{query}", "retries"),
    _wire("replies", "Replies of agents.", "{reply}", "replies"),
    _wire(
        "error_replies",
        "Replies by which an agent refused, or could not help.",
        "{reply}",
        "error_replies",
    ),
    _wire("sent", "DNS or HTTP messages sent to agents.", "By", "sent_bytes"),
    _wire("received", "DNS or HTTP messages received from agents.", "By", "received_bytes"),
    Figure(
        "quarantines",
        "Rejections that counted.",
        "counter",
        "{rejection}",
        lambda status: status["quarantines"],
    ),
    Figure(
        "quarantined_hosts",
        "Hosts that pick avoids now.",
        "amount",
        "{host}",
        _quarantined,
        "topic",
    ),
    Figure(
        "ejections",
        "Hosts that were avoided because they failed too often.",
        "counter",
        "{host}",
        lambda status: status["ejections"],
    ),
    Figure(
        "call_retries",
        "Calls that wanted another host, by what the retry budget said.",
        "counter",
        "{retry}",
        lambda status: status["retries"],
        "outcome",
    ),
    Figure("watching", "1 while a watch is held.", "amount", "{watch}", _watcher("is_watching")),
    Figure("watch_answers", "Answers to the watch.", "counter", "{answer}", _watcher("answers")),
    Figure(
        "lease_events",
        "What became of the lease.",
        "counter",
        "{event}",
        lambda status: status["keeper"] and status["keeper"]["counts"],
        "event",
    ),
    Figure(
        "registrations",
        "What this process registers.",
        "amount",
        "{registration}",
        _registrations,
        "standing",
    ),
)
