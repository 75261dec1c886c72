"""Consul's index rules: what to ask next, whether to believe an answer, how long to rest between.

A blocking query hands the index of its last answer back and waits until there is a newer one.  The
rules (facts C1, C2, C10, A9): an index below 1 counts as 1; one that goes backwards means a reset,
a restored snapshot or a server that lags behind, so ask anew without an index; and an answer older
than the one we hold is not believed until it has been repeated for a while, because a Consul server
that has just restarted says for 4 to 5 seconds, with index 1, that there is nothing at all.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

MAX_WAIT_SECONDS = 25.0
"""Some Consul releases cut HTTP answers off that take longer (fact C11, versions 1.12.1, 1.22)."""
WAIT_JITTER = 0.2
"""The share of the wait that is random, so that a thousand watchers do not poll in step."""
MIN_GAP_SECONDS = 0.025
"""Between two polls, however cheap: at most 40 a second when the cluster churns, and the most that
a change arriving right after another waits to be seen."""
WORK_SHARE = 0.1
"""The most of one processor that all queries may cost, however big and busy the prefix is."""
BYTES_PER_SECOND = 1_000_000
"""The most that they may receive, on average, while the cluster churns."""
MAX_IDLE_GAP_SECONDS = 1.0
"""Reached by doubling while polls come back early with the same answer: an empty prefix wakes on
every write anywhere in Consul's KV store, 220 times in 6 s once measured (fact C4), and a proxy may
answer at once with whatever index."""
DOUBT_GAP_SECONDS = 1.0
"""Between two polls while an answer is doubted: they come back at once, having no index."""


@dataclass(frozen=True, slots=True)
class BlockingQuery:
    """Where one blocking query stands.  Immutable: each event gives the next state."""

    confirm_seconds: float
    """How long an answer older than the believed one must be repeated until it is believed."""
    index: int = 0
    """What to ask with; 0 asks for an answer at once."""
    believed_index: int = 0
    """The index of the last answer that was believed; 0 before the first."""
    believed: object = field(default=None, repr=False)
    doubted_since: float | None = None
    """When the present doubt began; None when the last answer was believed."""
    wakes_for_nothing: int = 0
    """Polls in a row that came back before their wait was over, with the same answer."""
    failures: int = 0
    """Polls in a row without an answer."""

    @property
    def is_believed(self) -> bool:
        """Whether the last answer may be passed on."""
        return self.doubted_since is None and self.failures == 0 and self.believed_index > 0

    def answered(
        self, index: int, answer: object, now: float, *, has_waited: bool = False
    ) -> BlockingQuery:
        """The state after *answer*, compared by ``==``, came with *index* at *now*; *has_waited*
        when that took the whole wait."""
        index = max(1, index)
        is_older = index < self.believed_index
        since = now if self.doubted_since is None else self.doubted_since
        if is_older and answer != self.believed and now - since < self.confirm_seconds:
            return replace(self, index=0, doubted_since=since, failures=0)
        is_for_nothing = self.index > 0 and not has_waited and answer == self.believed
        return replace(
            self,
            # An older index is still the right one to wait on: it belongs to the answer that is
            # now believed.  (A lower one than we *asked* with would be waited on for ever.)
            index=index,
            believed_index=index,
            believed=answer,
            doubted_since=None,
            wakes_for_nothing=self.wakes_for_nothing + 1 if is_for_nothing else 0,
            failures=0,
        )

    def failed(self) -> BlockingQuery:
        """The state after a poll that brought no answer: the next one asks at once."""
        return replace(self, index=0, doubted_since=None, failures=self.failures + 1)

    def wait_seconds(self, jitter: float, longest: float = MAX_WAIT_SECONDS) -> float:
        """How long Consul may hold the next poll; *jitter* is from 0 to 1."""
        return longest * (1 - WAIT_JITTER * jitter)

    def gap_seconds(self, work_seconds: float, received_bytes: int = 0, queries: int = 1) -> float:
        """How long to rest after a poll that received *received_bytes* and cost *work_seconds* of
        processor time, also one that failed; *queries* share the bounds.

        Bounds what a churning cluster can make us spend; what changes meanwhile comes at once with
        the next poll, so nothing is lost, only seen a little later.
        """
        rest = min(MAX_IDLE_GAP_SECONDS, MIN_GAP_SECONDS * 2.0 ** min(self.wakes_for_nothing, 30))
        if self.doubted_since is not None:
            rest = DOUBT_GAP_SECONDS
        work = work_seconds * (queries / WORK_SHARE - 1)
        return max(rest, work, received_bytes * queries / BYTES_PER_SECOND)
