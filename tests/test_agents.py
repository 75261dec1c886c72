"""Which agent to ask next: one policy for DNS and HTTP, without a socket."""

from __future__ import annotations

import itertools
import logging

import pytest

from consul_matchmaker.backends.agents import LONGEST_REST_SECONDS, Agents, Candidate
from consul_matchmaker.model import Host
from tests.doubles import DEADLINE_SECONDS, ManualClock, in_thread

TIMEOUT = 5.0
A, B, C = 0, 1, 2


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock()


@pytest.fixture
def agents(clock: ManualClock) -> Agents:
    """Three, whose rests are half as long as they may be."""
    addresses = [Host("10.0.0.1", 8600), Host("10.0.0.2", 8600), Host("10.0.0.3", 8600)]
    return Agents(addresses, "Consul DNS at", TIMEOUT, clock=clock, jitter=lambda: 0.5)


def order(agents: Agents) -> list[int]:
    """In which order a question would meet them; whoever is handed out is given back."""
    found = []
    for candidate in agents.candidates():
        found.append(candidate.index)
        candidate.was_not_asked()
    return found


def nth(agents: Agents, index: int) -> Candidate:
    """The agent *index*, in the hands of one caller who met all those before it."""
    for candidate in agents.candidates():
        if candidate.index == index:
            return candidate
        candidate.was_not_asked()
    raise AssertionError(index)


def fail(agents: Agents, *indices: int) -> None:
    for index in indices:
        nth(agents, index).failed("did not answer")


def test_agents_are_asked_in_the_order_of_the_settings(agents: Agents) -> None:
    """As long as all of them work, and none of them did so far."""
    assert order(agents) == [A, B, C]
    nth(agents, C).worked()
    assert order(agents) == [A, B, C]


def test_one_that_failed_is_asked_last_until_its_rest_is_over(
    agents: Agents, clock: ManualClock
) -> None:
    """The rest is the timeout it may have cost and a jittered wait that doubles."""
    for backoff in (0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 30.0, 30.0):
        fail(agents, A)
        clock.advance(TIMEOUT + backoff - 0.01)
        assert order(agents) == [B, C, A]
        assert agents.is_resting(A)
        clock.advance(0.02)
        assert order(agents) == [A, B, C]
    assert LONGEST_REST_SECONDS / 2 == 30.0


def test_of_those_that_rest_the_one_that_may_be_back_first_comes_first(
    agents: Agents, clock: ManualClock
) -> None:
    """When nobody answers all of them are asked all the same."""
    fail(agents, C)
    clock.advance(1)
    fail(agents, A, B)
    assert order(agents) == [C, A, B]


def test_the_one_that_took_over_stays_in_use(agents: Agents, clock: ManualClock) -> None:
    """One that came back, or that comes earlier in the settings, waits until that one fails."""
    fail(agents, A)
    nth(agents, B).worked()
    clock.advance(1_000)
    assert order(agents) == [B, A, C]
    nth(agents, A).worked()
    assert order(agents) == [B, A, C]
    fail(agents, B)
    assert order(agents) == [A, C, B]
    nth(agents, A).worked()
    clock.advance(1_000)
    assert order(agents) == [A, B, C]


def test_an_answer_that_was_long_under_way_takes_nothing_over(agents: Agents) -> None:
    """As that to an old poll, when the others have moved on."""
    late = nth(agents, A)
    fail(agents, A)
    nth(agents, B).worked()
    late.worked()
    assert order(agents) == [B, A, C]


def test_one_that_answers_but_cannot_help_gives_way_to_one_that_can(agents: Agents) -> None:
    """It does not rest: when none of them can help, nothing changes."""
    for index in (A, B, C):
        nth(agents, index).could_not_help("no leader")
    assert order(agents) == [A, B, C]
    nth(agents, B).worked()
    assert order(agents) == [B, A, C]
    assert agents.status() == {"agent": "10.0.0.2:8600", "agents_away": []}


def test_after_its_rest_exactly_one_caller_tries_it(agents: Agents, clock: ManualClock) -> None:
    """The others leave it alone until that one knows."""
    fail(agents, A)
    clock.advance(100)
    retry = nth(agents, A)
    assert retry.is_retry
    assert order(agents) == [B, C, A]
    clock.advance(TIMEOUT + LONGEST_REST_SECONDS - 0.01)
    assert order(agents) == [B, C, A]
    retry.worked()
    assert order(agents) == [A, B, C]


@pytest.mark.finding("D3")
def test_whoever_did_not_get_to_ask_gives_the_try_back(agents: Agents, clock: ManualClock) -> None:
    """The next caller has it; who gives back an agent that rests ends no rest."""
    fail(agents, A)
    clock.advance(100)
    for _ in range(3):
        retry = nth(agents, A)
        assert order(agents) == [B, C, A]
        retry.was_not_asked()
        assert order(agents) == [A, B, C]
    fail(agents, A)
    nth(agents, A).was_not_asked()
    assert order(agents) == [B, C, A]


def test_a_try_is_taken_only_by_whoever_asks_for_it(agents: Agents, clock: ManualClock) -> None:
    """A question that an earlier agent answers keeps nobody from a later one."""
    fail(agents, B)
    clock.advance(100)
    assert next(agents.candidates()).index == A
    assert not agents.is_resting(B)


def test_of_many_threads_one_has_the_try(agents: Agents, clock: ManualClock) -> None:
    """They all find the agent at the moment its rest is over."""
    fail(agents, A)
    clock.advance(100)
    first = [in_thread(lambda: next(agents.candidates())) for _ in range(8)]
    taken = [each.result(DEADLINE_SECONDS) for each in first]
    assert sorted(each.index for each in taken) == [A, *[B] * 7]


def test_a_timeout_of_a_caller_in_a_hurry_says_nothing(agents: Agents, clock: ManualClock) -> None:
    """Whoever had less than request_timeout_seconds gives the agent back as it was."""
    assert not nth(agents, A).timed_out("did not answer", 0.1)
    assert order(agents) == [A, B, C]
    assert nth(agents, A).timed_out("did not answer", TIMEOUT - 0.01)
    clock.advance(100)
    assert not nth(agents, A).timed_out("did not answer", 0.1)
    assert order(agents) == [A, B, C]


def test_a_timeout_of_one_that_answered_somebody_else_says_nothing(agents: Agents) -> None:
    """What was asked for is what hangs; but an answer from before says nothing."""
    nth(agents, A).worked()
    slow = nth(agents, A)
    nth(agents, A).worked()
    assert not slow.timed_out("did not answer", TIMEOUT)
    assert nth(agents, A).timed_out("did not answer", TIMEOUT)
    assert agents.is_resting(A)


def test_callers_who_failed_at_the_same_time_count_once(
    agents: Agents, clock: ManualClock, caplog: pytest.LogCaptureFixture
) -> None:
    """However many threads met the outage, the rest is that of one failure."""
    together = [nth(agents, A) for _ in range(20)]
    assert [each.failed("did not answer") for each in together] == [True, *[False] * 19]
    clock.advance(TIMEOUT + 0.51)
    assert not agents.is_resting(A)
    assert len(caplog.records) == 1


def test_each_change_is_said_once(
    agents: Agents, clock: ManualClock, caplog: pytest.LogCaptureFixture
) -> None:
    """A failure as a warning; who is asked instead, and who answers again."""
    caplog.set_level(logging.INFO)
    fail(agents, A, B)
    fail(agents, A)
    nth(agents, C).worked()
    nth(agents, C).worked()
    clock.advance(1_000)
    nth(agents, A).worked()
    assert [(record.levelname, record.getMessage()) for record in caplog.records] == [
        ("WARNING", "Consul DNS at 10.0.0.1:8600: did not answer"),
        ("WARNING", "Consul DNS at 10.0.0.2:8600: did not answer"),
        (
            "INFO",
            "asking Consul DNS at 10.0.0.3:8600 from now on (10.0.0.1:8600: did not answer)",
        ),
        ("INFO", "Consul DNS at 10.0.0.1:8600 answers again"),
    ]


def test_status_names_the_first_and_those_left_alone(agents: Agents) -> None:
    """The one that the next question goes to, also when all of them rest."""
    assert agents.status() == {"agent": "10.0.0.1:8600", "agents_away": []}
    fail(agents, A)
    assert agents.status() == {"agent": "10.0.0.2:8600", "agents_away": ["10.0.0.1:8600"]}
    assert repr(agents) == "<Agents 10.0.0.1:8600 (rests), 10.0.0.2:8600, 10.0.0.3:8600>"
    fail(agents, B, C)
    assert agents.status()["agent"] == "10.0.0.1:8600"


def test_every_agent_is_met_exactly_once(agents: Agents, clock: ManualClock) -> None:
    """Whatever they did before: a question ends."""
    verbs = (Candidate.worked, lambda c: c.failed("no"), lambda c: c.could_not_help("no"))
    for steps in itertools.product(itertools.product((A, B, C), verbs), repeat=3):
        for index, verb in steps:
            verb(nth(agents, index))
            clock.advance(3)
            assert sorted(order(agents)) == [A, B, C]
