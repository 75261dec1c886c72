"""Count lookups by what they found, and questions by what became of them."""

from __future__ import annotations

import itertools

FOUND = ("fresh", "stale", "away", "disk", "asked", "refused")
OUTCOMES = ("answered", "failed", "deferred", "doubted", "offered")


class Counts:
    """`next(hits)` takes no lock, and loses nothing; the rest is changed under the lock of the
    topics."""

    def __init__(self) -> None:
        self.hits = itertools.count()
        """Lookups that were given what the last look found."""
        self._hits_read = 0
        self.found = dict.fromkeys(FOUND, 0)
        self.questions = dict.fromkeys(OUTCOMES, 0)
        self.seconds_asking = self.longest_question = 0.0
        self.evictions = 0

    def answered(self, seconds: float) -> None:
        self.questions["answered"] += 1
        self.seconds_asking += seconds
        self.longest_question = max(self.longest_question, seconds)

    def status(self) -> dict[str, object]:
        self._hits_read += 1  # reading takes a number itself
        found = {"memory": next(self.hits) + 1 - self._hits_read, **self.found}
        return {
            "lookups": sum(found.values()),
            # Each is one of them: `memory`, what the last look found is given again; else a look
            # found a fresh answer; a stale one, or one that is stale because Consul is away; one
            # from disk; none, so that Consul was asked, with whatever result; or its last failure,
            # unasked.
            "lookups_that_found": found,
            "questions": dict(self.questions),
            "seconds_asking": self.seconds_asking,
            "longest_question_seconds": self.longest_question,
            "evictions": self.evictions,
        }
