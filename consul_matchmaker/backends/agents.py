"""Decide which Consul agent to ask next, and which to leave alone: the same for DNS and HTTP.

The agent that worked last is asked first, then the others in the order of the settings, and those
that failed and still rest at the end.  So a dead agent costs one timeout, not one a question.
Nothing here knows a socket.
"""

from __future__ import annotations

import logging
import random
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from ..backoff import Backoff
from ..model import Host

logger = logging.getLogger(__name__)

FIRST_REST_SECONDS, LONGEST_REST_SECONDS = 1.0, 60.0
"""How long an agent that failed is left alone after the timeout that it may have cost, doubling and
jittered.  An agent restarts within a second and a machine within a minute.  A long rest makes no
question fail, as those that rest are still asked where no other answers."""
ENOUGH_TIME = 0.9
"""A timeout says something about an agent that had this share of ``request_timeout_seconds``; the
rest is what callers spend before they ask."""


@dataclass(slots=True)
class _Agent:
    address: Host
    failures: int = 0
    retry_at: float = 0.0
    """When it has failed: until then it is left alone."""
    answers: int = 0
    doubt: str | None = None
    """Why another one that works is to be used instead; None while it works itself."""


class Agents:
    """The agents at *addresses*, in the order of the settings.  Thread-safe; waits for nothing.

    *name* is what they are called in log lines, before their address.  *timeout_seconds* is
    ``request_timeout_seconds``: what an agent that does not answer costs.
    """

    def __init__(
        self,
        addresses: Sequence[Host],
        name: str,
        timeout_seconds: float,
        *,
        clock: Callable[[], float] = time.monotonic,
        jitter: Callable[[], float] = random.random,
    ) -> None:
        self._addresses = tuple(addresses)
        self._name = name
        self._timeout_seconds = timeout_seconds
        self._clock = clock
        self._backoff = Backoff(FIRST_REST_SECONDS, LONGEST_REST_SECONDS, jitter)
        self._lock = threading.Lock()
        self._agents = [_Agent(address) for address in self._addresses]
        self._in_use = 0

    def candidates(self) -> Iterator[Candidate]:
        """Every agent once, best first, for one question.

        Call `next` only with the time to ask: of the agents whose rest is over, each is handed to
        one caller, and the others leave it alone until that one has said how it went.
        """
        resting = []
        for index in self._order():
            candidate = self._take(index)
            if candidate is None:
                resting.append(index)
            else:
                yield candidate
        for index in sorted(resting, key=lambda index: self._agents[index].retry_at):
            candidate = Candidate(self, index, self._agents[index])
            candidate.is_resting = True
            yield candidate

    def is_resting(self, index: int) -> bool:
        """Whether the agent of that place in the settings has failed and is left alone for now."""
        agent = self._agents[index]
        return agent.failures > 0 and self._clock() < agent.retry_at

    def status(self) -> dict[str, object]:
        """Which agent is asked first, and which are left alone for now."""
        order = self._order()
        first = next((index for index in order if not self.is_resting(index)), order[0])
        return {
            "agent": str(self._addresses[first]),
            "agents_away": [
                str(address)
                for index, address in enumerate(self._addresses)
                if self.is_resting(index)
            ],
        }

    def __repr__(self) -> str:
        states = (
            f"{agent.address}{' (rests)' if self.is_resting(index) else ''}"
            for index, agent in enumerate(self._agents)
        )
        return f"<Agents {', '.join(states)}>"

    def _order(self) -> list[int]:
        in_use = self._in_use
        return [in_use, *(index for index in range(len(self._agents)) if index != in_use)]

    def _take(self, index: int) -> Candidate | None:
        """The agent, if it does not rest; where its rest is over, for this caller alone."""
        with self._lock:
            agent, now = self._agents[index], self._clock()
            if agent.failures and now < agent.retry_at:
                return None
            candidate = Candidate(self, index, agent)
            if agent.failures:
                candidate.is_retry = True
                agent.retry_at = now + self._timeout_seconds + LONGEST_REST_SECONDS
            return candidate


class Candidate:
    """An agent for one caller to ask now, who says by one of the verbs how it went."""

    def __init__(self, agents: Agents, index: int, agent: _Agent) -> None:
        self.index = index
        self.address = agent.address
        self.is_retry = False
        """Whether its rest is over, and this caller alone tries it."""
        self.is_resting = False
        """Whether its rest is not over: it is asked only where no other answers."""
        self._agents = agents
        self._agent = agent
        self._answers, self._failures = agent.answers, agent.failures

    def worked(self) -> None:
        """It gave a usable answer.  It is in use from now on if the one in use does not work."""
        agents, agent = self._agents, self._agent
        with agents._lock:
            had_failed, agent.failures = agent.failures > 0, 0
            agent.answers += 1
            agent.doubt = None
            before = agents._agents[agents._in_use]
            takes_over = before.doubt is not None
            if takes_over:
                agents._in_use = self.index
        if had_failed:
            logger.info("%s %s answers again", agents._name, self.address)
        if takes_over:
            text = "asking %s %s from now on (%s: %s)"
            logger.info(text, agents._name, self.address, before.address, before.doubt)

    def could_not_help(self, reason: str) -> None:
        """It answered at once, but not with what was asked for, as without a leader.  It does not
        rest, but another one that works is used from now on."""
        with self._agents._lock:
            self._agent.failures = 0
            self._agent.answers += 1
            self._agent.doubt = reason

    def failed(self, reason: str) -> bool:
        """It could not be asked, or answered what Consul would not: leave it alone for a while.

        Whether that is news: callers who asked at the same time count as one failure.
        """
        agents, agent = self._agents, self._agent
        with agents._lock:
            if agent.failures > self._failures:
                return False
            agent.failures += 1
            agent.doubt = reason
            rest_seconds = agents._timeout_seconds + agents._backoff.seconds(agent.failures)
            agent.retry_at = agents._clock() + rest_seconds
            is_first = agent.failures == 1
        if is_first:
            logger.warning("%s %s: %s", agents._name, self.address, reason)
        return True

    def timed_out(self, reason: str, allowed_seconds: float) -> bool:
        """It did not answer within *allowed_seconds*.

        That is a failure, as `failed` has it, unless it may be healthy: its caller had less than
        ``request_timeout_seconds``, or it answered somebody else meanwhile, so that what it was
        asked for, as another datacenter, is what hangs.
        """
        if allowed_seconds < ENOUGH_TIME * self._agents._timeout_seconds:
            self.was_not_asked()
            return False
        if self._agent.answers > self._answers and not self._agent.failures:
            return False
        return self.failed(reason)

    def was_not_asked(self) -> None:
        """The caller gave up before anything was learnt: let others try it."""
        if self.is_retry:
            with self._agents._lock:
                self._agent.retry_at = self._agents._clock()

    def __repr__(self) -> str:
        return f"<Candidate {self.address}{', after a rest' if self.is_retry else ''}>"
