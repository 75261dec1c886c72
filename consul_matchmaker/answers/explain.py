"""Say in words and figures what is held of a topic, how it came and what is under way."""

from __future__ import annotations

from ..model import Snapshot
from .belief import NEVER
from .entry import Entry


def explained(entry: Entry, now: float) -> dict[str, object]:
    """Fit for json; the lock of the topics is held."""
    held, doubt = entry.held, entry.doubt
    next_at = min(entry.refresh_at, entry.gone_at)
    return {
        "topic": entry.topic,
        "state": entry.state(now).value,
        "answer": None if held is None else _answer(held),
        "given_up_in_seconds": None if held is None else max(0.0, entry.gone_at - now),
        "asked_again_in_seconds": max(0.0, next_at - now) if next_at < NEVER else None,
        "is_being_asked": entry.question is not None,
        "is_slow": entry.is_slow,
        "is_watched": entry.is_watched(now),
        "doubted": None
        if doubt is None
        else {**_answer(doubt), "since_seconds": now - entry.doubt_since},
        "failures": entry.failures,
        "failing_for_seconds": now - entry.failing_since if entry.failures else None,
        "last_error": None if entry.error is None else str(entry.error),
    }


def _answer(answer: Snapshot) -> dict[str, object]:
    return {
        "source": answer.source,
        "hosts": [
            {
                "host": str(one.host),
                "server": one.server,
                "priority": one.priority,
                "weight": one.weight,
            }
            for one in answer.instances
        ],
        "age_seconds": answer.age_seconds,
        "is_stale": answer.is_stale,
        "is_complete": answer.is_complete,
        "confirmed": answer.confirmed,
        "details": dict(answer.details),
    }
