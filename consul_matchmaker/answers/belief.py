"""What to believe of one topic: rules for answers and failures, which tell what they did as notes.

Pure: the moment is an argument, and nothing here logs, locks, waits or asks.

What replaces a held answer:

- A complete answer does, at once.  Unless it is doubted (`Belief._doubt_seconds`): then it must
  repeat for some seconds without a better answer in between.  Meanwhile the held one is served.
- An incomplete answer says who is there, and says nothing about who is not.  It is united with what
  is held; a host leaves when it was in no answer for `UNSEEN_TTLS` TTLs.
- An answer read from disk at a cold start is replaced by the first one that is believed.
- An outage or a refused token replaces nothing: the held answer becomes stale, and is given up
  ``max_stale_seconds`` after it was asked for.

All ages count from when a question was sent; Consul may answer at any moment after that.
"""

from __future__ import annotations

import enum
import logging
import math
from collections.abc import Callable
from dataclasses import replace

from ..backoff import Backoff
from ..errors import Denied, Unavailable
from ..model import Host, Instance, Snapshot
from ..settings import Settings
from .freshness import Freshness

AHEAD_FROM, AHEAD_TO = 0.7, 0.9
"""An answer in use is asked for again after this part of its TTL, at random, so that processes
which started together do not ask together."""
BETWEEN_REFRESHES_SECONDS = 0.1
"""The least between two background questions for one topic, whatever its TTL says."""
BETWEEN_DOUBTS_SECONDS = 1.0
"""While an answer is doubted, Consul is asked again this often (the lie lasts up to 5 s)."""
RETURN_SECONDS = 2.0
"""So long several hosts that left at once are waited for in kv mode: when the leader dies or a
quorum comes back, Consul may end the sessions of living processes, which are all back after 1.7 s
(fact B15)."""
STALE_CHECK_SECONDS = 1.0
"""While a stale answer is served, one lookup in this interval makes sure that a refresh is
scheduled."""
FAILURE_SECONDS = 1.0
"""The most that callers of a topic without an answer are told of the last failure, unasked."""
FIRST_RETRY_SECONDS = 0.5
LONGEST_PAUSE = 0.7
"""Of a TTL, between two attempts for one topic.  So answers are fresh within one TTL when Consul is
back, if what is lost of an attempt under way then takes no more than the rest, 1.5 s of the default
5 s.  Lost is, where packets were dropped, what comes after the last one was sent: by DNS a tenth of
the timeout, and 1 s of an HTTP connection's 2 s.  Nothing is lost where an agent hung or was dead:
it answers what waits, or refused at once."""
UNSEEN_TTLS = 3
"""One cut answer of 2,000 hosts lacks each with probability 1/2 (fact A3): by three, 1/8 at most,
and the backend has united several of them before it calls an answer incomplete."""

NEVER = math.inf


class State(enum.Enum):
    """What a belief is worth at one moment."""

    FRESH = "fresh"
    STALE = "stale, being refreshed"
    AWAY = "stale, Consul cannot be asked"
    GONE = "no answer that may be given"


Note = Callable[..., None]
"""Called with a level, a message and its arguments, as `logging.Logger.log`.  Whoever holds a lock
logs it later: a handler may take long."""


class Rules:
    """The numbers that all beliefs of one cache follow."""

    def __init__(
        self,
        settings: Settings,
        note: Note,
        clock: Callable[[], float],
        jitter: Callable[[], float],
    ) -> None:
        self.settings = settings
        self.note = note
        self.clock = clock
        """For the snapshots, whose age goes on counting; no rule reads it."""
        self.jitter = jitter
        self.backoff = Backoff(FIRST_RETRY_SECONDS, LONGEST_PAUSE * settings.ttl_seconds, jitter)
        self.unseen_seconds = max(
            settings.confirm_empty_seconds, UNSEEN_TTLS * settings.ttl_seconds
        )

    def ttl_seconds(self, answer: Snapshot) -> float:
        settings = self.settings
        # Consul's own is 0 unless operators set one: service_ttl, or for "nobody" soa.min_ttl (A7).
        if answer.ttl_seconds:
            return min(max(answer.ttl_seconds, settings.ttl_min_seconds), settings.ttl_max_seconds)
        return settings.ttl_seconds if answer.instances else settings.empty_ttl_seconds

    def can_lie(self, answer: Snapshot) -> bool:
        return answer.source == "dns" or (
            answer.source in ("kv", "service") and self.settings.reads_may_lag
        )


class Belief:
    """What is believed of one topic (or of one server of it), and when Consul is asked again."""

    __slots__ = (
        "doubt",
        "doubt_since",
        "empty",
        "empty_since",
        "error",
        "failing_since",
        "failures",
        "freshness",
        "full",
        "full_until",
        "had_no_time",
        "held",
        "refresh_at",
        "retry_at",
        "rules",
        "seen",
        "server",
        "topic",
        "usable_until",
    )

    def __init__(self, topic: str, server: str | None, rules: Rules) -> None:
        self.topic = topic
        self.server = server
        self.rules = rules
        self.held: Snapshot | None = None
        # Until then there is a held answer, and it is given without another look.
        self.usable_until = -NEVER
        self.refresh_at = NEVER  # when the background asks again, if somebody wants it
        self.retry_at = -NEVER  # not to be asked before
        self.freshness: Freshness | None = None  # of the watch that told of it
        self.failures = 0  # in a row
        self.failing_since = 0.0
        self.error: Unavailable | Denied | None = None
        self.had_no_time = False  # Consul was asked since the last answer, and had too little time
        self.doubt: Snapshot | None = None  # an answer that is not believed yet
        self.doubt_since = 0.0
        self.empty_since: float | None = None  # since when every answer is without hosts
        self.empty: Snapshot | None = None  # the first of these
        self.full: Snapshot | None = None  # held before hosts began to leave
        self.full_until = -NEVER
        # Who was in which answer, while answers are incomplete.
        self.seen: dict[tuple[Host, str | None], tuple[float, Instance]] | None = None

    @property
    def name(self) -> str:
        return self.topic if self.server is None else f"{self.topic} of {self.server}"

    # -- what a lookup may be given

    @property
    def gone_at(self) -> float:
        """From when on the held answer is not given any more."""
        if self.held is None:
            return -NEVER
        end = self.held.taken_at + self.rules.settings.max_stale_seconds
        return max(end, self.held.fresh_until)

    def state(self, now: float) -> State:
        """What the held answer is worth."""
        held = self.held
        if held is None or now >= self.gone_at:
            return State.GONE
        if now < held.fresh_until or self.is_watched(now):
            return State.FRESH
        return State.AWAY if self.failures else State.STALE

    def is_watched(self, now: float) -> bool:
        """Whether a watch that lives told the held answer, and would tell its changes."""
        if self.freshness is None or self.doubt is not None:  # in doubt, it told another answer
            return False
        return now < self.freshness.fresh_until

    def confirm(self, now: float) -> bool:
        """Whether the watch that told the held answer says that it is still so: then it is as fresh
        as the watch."""
        if self.freshness is None or self.held is None or self.doubt is not None:
            return False
        taken_at, fresh_until = self.freshness.span
        if now >= fresh_until:
            return False
        if fresh_until > self.held.fresh_until:
            held = self.held
            self._hold(held, max(taken_at, held.taken_at), fresh_until, held.confirmed)
            self._serve_until(now, NEVER)
            self.refresh_at = self.usable_until  # looked at then, and hardly ever asked for
        return True

    def must_ask_first(self, now: float) -> bool:
        """Whether Consul gets the chance to answer before the held answer is given: it is older
        than ``stale_while_revalidate_seconds``, or from disk, and Consul was not asked since."""
        held = self.held
        assert held is not None
        # From an agent's cache even an answer that has just come may be older than all that.
        if now < max(held.fresh_until, self.retry_at) or self.failures or self.had_no_time:
            return False
        seconds = self.rules.settings.stale_while_revalidate_seconds
        return held.source == "disk" or now - held.taken_at >= seconds

    def serve(self, now: float) -> Snapshot:
        """The held answer, given without another look for a while; a refresh is due if it is
        stale."""
        assert self.held is not None
        self._serve_until(now, now + STALE_CHECK_SECONDS)
        self.refresh_at = min(self.refresh_at, max(now, self.retry_at))
        return self.held

    def _serve_until(self, now: float, until: float) -> None:
        """Let lookups return the held answer without a look, as long as it is worth the same."""
        held = self.held
        assert held is not None
        if now < held.fresh_until:
            until = held.fresh_until
        self.usable_until = min(until, self.gone_at)

    # -- what answers and failures change

    def answered(self, answer: Snapshot, now: float, freshness: Freshness | None = None) -> bool:
        """*answer* has come at *now*; with *freshness*, from a watch.  Returns whether it changes
        the hosts that are held."""
        self._recovered(now)
        held, asked_at = self.held, answer.taken_at
        if now >= self.gone_at:  # given up: no answer is doubted for it, or united with it
            held = self.seen = None
        if freshness is not None:
            self.freshness = freshness
            if held is not None and answer.version < held.version:  # the watch doubted that itself
                self.held = held = replace(held, version=answer.version)
        if not answer.is_complete:
            answer = self._united(answer, held)
        elif held is not None and not self._is_believed(held, answer, now):
            self.retry_at = self.refresh_at = now + BETWEEN_DOUBTS_SECONDS
            if held.confirmed:
                self.held = replace(held, confirmed=False)
            self._serve_until(now, self.retry_at)
            return False
        else:
            self.seen = None
        confirmed = self._is_confirmed(answer, held, now)
        self.doubt = None
        has_lost = held is not None and len(answer.instances) < len(held.instances)
        if has_lost and now >= self.full_until:
            self.full, self.full_until = held, now + RETURN_SECONDS
        ttl_seconds = self.rules.ttl_seconds(answer)
        fresh_until = asked_at + ttl_seconds
        # While a watch would tell every change, this answer is as fresh as what it told.  But a
        # stale read may have been older.
        is_watched = self.is_watched(now)
        if is_watched and (freshness is not None or not self.rules.settings.reads_may_lag):
            assert self.freshness is not None
            fresh_until = max(fresh_until, self.freshness.fresh_until)
        is_changed = held is None or not is_same(held, answer)
        if held is not None and not is_changed and self._has_order_of(held, answer):
            answer = answer.sharing(held)
        self._hold(answer, answer.taken_at, fresh_until, confirmed)
        self.usable_until = fresh_until
        # An answer that took long is soon, or already, older than its TTL: all the same Consul is
        # left alone for half as long as it took, at most half a TTL.
        rest = min(now - answer.taken_at, ttl_seconds) / 2
        self.retry_at = now + max(rest, BETWEEN_REFRESHES_SECONDS)
        share = AHEAD_FROM + (AHEAD_TO - AHEAD_FROM) * self.rules.jitter()
        self.refresh_at = max(self.retry_at, now + (fresh_until - now) * share)
        if is_watched:  # the watch will confirm it before it runs out
            self.refresh_at = fresh_until
        return is_changed

    def failed(self, error: Exception, now: float, *, is_first: bool) -> None:
        """Consul could not be asked.  One outage is one warning, *is_first* tells: the other topics
        it concerns are details."""
        if self.failures == 0:
            self.failing_since = now
            if self.held is not None:
                self.rules.note(
                    logging.WARNING if is_first else logging.INFO,
                    "topic %s: answered from the last good answer, %.1f s old: %s",
                    self.name,
                    now - self.held.taken_at,
                    error,
                )
        self.failures += 1
        self.doubt = self.empty_since = None  # while nobody answered, nothing was repeated
        self.error = error if isinstance(error, (Unavailable, Denied)) else None
        pause = max(self.rules.backoff.seconds(self.failures), BETWEEN_REFRESHES_SECONDS)
        if now >= self.gone_at:
            self.retry_at = now + min(pause, FAILURE_SECONDS)
            self.usable_until = -NEVER
        else:
            self.retry_at = now + pause
            self._serve_until(now, self.retry_at)
        self.refresh_at = self.retry_at

    def left_unanswered(self, now: float) -> None:
        """Whoever asked had too little time, which says nothing of Consul."""
        self.had_no_time = True
        self.refresh_at = now

    def start_anew(self, rules: Rules) -> None:
        """In a forked child only the answer stays; the watch was the parent's."""
        self.rules = rules
        self.freshness = None
        self.usable_until = -NEVER
        self.refresh_at = NEVER

    def _hold(self, answer: Snapshot, taken_at: float, fresh_until: float, confirmed: bool) -> None:
        self.held = answer.stamped(
            taken_at=taken_at,
            fresh_until=fresh_until,
            clock=self.rules.clock,
            confirmed=confirmed,
        )

    def _has_order_of(self, held: Snapshot, answer: Snapshot) -> bool:
        """Whether equal hosts are in the same order, or that means nothing."""
        return self.rules.settings.near is None or answer.instances == held.instances

    def _recovered(self, now: float) -> None:
        if self.failures and self.held is not None:
            since = now - self.failing_since
            self.rules.note(
                logging.INFO, "topic %s: Consul answers again, after %.1f s", self.name, since
            )
        self.failures, self.error, self.retry_at = 0, None, -NEVER
        self.had_no_time = False

    # -- doubt

    def _is_believed(self, held: Snapshot, answer: Snapshot, now: float) -> bool:
        note, seconds = self.rules.note, self._doubt_seconds(held, answer, now)
        if not seconds:
            if self.doubt is not None:
                note(logging.INFO, "topic %s: it has %d hosts after all", self.name, len(answer))
            return True
        # Even worse than what is doubted already: that has not been repeated yet.
        if self.doubt is None or _is_suspicious(answer, self.doubt):
            if self.doubt is None:
                note(
                    logging.WARNING,
                    "topic %s: %s suddenly says %d hosts instead of %d; keeping those unless it "
                    "says so for %g s",
                    self.name,
                    answer.source,
                    len(answer),
                    len(held),
                    seconds,
                )
            self.doubt, self.doubt_since = answer, now
        if _repeated_seconds(self.doubt, answer, now - self.doubt_since) < seconds:
            return False
        note(logging.WARNING, "topic %s: confirmed, it has %d hosts", self.name, len(answer))
        return True

    def _doubt_seconds(self, held: Snapshot, answer: Snapshot, now: float) -> float:
        """How long *answer* must repeat before it replaces *held*; 0: it is believed at once.

        - From a source that can lie (DNS, or KV read with ``consistency=stale``: a restarted Consul
          server denies live services for up to 5 s, fact A9): ``confirm_empty_seconds``, where it
          is empty or has less than half of the held hosts.
        - From KV otherwise: as long, where it lacks hosts and its version went back, so that it
          is older than what is held, or Consul has lost its data.  And `RETURN_SECONDS`, where
          within so long two hosts or more left, and less than half or none are there.
        """
        if answer.instances == held.instances:
            return 0.0  # almost always; hosts need not be put in order for it
        settings = self.rules.settings
        if self.rules.can_lie(answer):
            return settings.confirm_empty_seconds if _is_suspicious(answer, held) else 0.0
        if answer.source not in ("kv", "service") or held.source == "disk":
            return 0.0
        if answer.version < held.version and not set(held.hosts) <= set(answer.hosts):
            return settings.confirm_empty_seconds
        if answer.source != "kv":
            return 0.0
        full = self.full if self.full is not None and now < self.full_until else held
        has_lost = len(full) - len(answer) >= 2 and len(answer) < len(held)
        return RETURN_SECONDS if has_lost and _is_suspicious(answer, full) else 0.0

    def _is_confirmed(self, answer: Snapshot, held: Snapshot | None, now: float) -> bool:
        """Whether *answer*, which is believed, has hosts or was repeated long enough without."""
        can_lie = self.rules.can_lie(answer)
        seconds = self.rules.settings.confirm_empty_seconds
        if not can_lie:
            seconds = RETURN_SECONDS if answer.source == "kv" else 0.0
        if answer.instances or not seconds:
            self.empty_since = None
            return True
        if self.empty_since is None:
            if not can_lie and not held:
                return True  # Consul is sure of it, and nobody has just left
            self.empty_since = now if self.doubt is None else self.doubt_since
            self.empty = answer if self.doubt is None else self.doubt
        assert self.empty is not None
        return _repeated_seconds(self.empty, answer, now - self.empty_since) >= seconds

    def _united(self, answer: Snapshot, held: Snapshot | None) -> Snapshot:
        """*answer* and what earlier answers had, without what was in none for a while; as old as
        the oldest of them that it needs."""
        now = answer.taken_at
        if self.seen is None:
            # What was read from disk ends with the first real answer, even a cut one.
            if held is None or held.source == "disk":
                self.seen = {}
            else:
                seen_at = held.taken_at
                self.seen = {(one.host, one.server): (seen_at, one) for one in held.instances}
        self.seen.update({(one.host, one.server): (now, one) for one in answer.instances})
        oldest = now - self.rules.unseen_seconds
        self.seen = {name: seen for name, seen in self.seen.items() if seen[0] >= oldest}
        instances = tuple(instance for _, instance in self.seen.values())
        taken_at = min((seen_at for seen_at, _ in self.seen.values()), default=now)
        return replace(answer.with_instances(instances), taken_at=taken_at)


def _repeated_seconds(first: Snapshot, answer: Snapshot, seconds: float) -> float:
    """How long Consul has said what *first* and *answer* say, *seconds* after it was heard first.

    Between us and Consul may be a resolver that keeps denials, as CoreDNS does for 30 s: what says
    the same second of Consul's clock is one answer, however often it is heard (fact G16).
    """
    if answer.source != "dns" or not (first.version and answer.version):
        return seconds
    return min(seconds, abs(answer.version - first.version) + 1)


def _is_suspicious(answer: Snapshot, held: Snapshot) -> bool:
    """Whether *answer* is less than half of *held*, or nothing: as a restarted server answers."""
    return len(answer) * 2 < len(held)


def is_same(one: Snapshot, other: Snapshot) -> bool:
    """Whether both have the same instances, in whatever order: DNS shuffles (fact A3)."""
    return one.instances == other.instances or set(one.instances) == set(other.instances)
