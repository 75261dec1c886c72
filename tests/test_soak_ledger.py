"""The soak's ledger reports every kind of broken promise that is planted, and nothing else."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from integration.soak import bounds
from integration.soak.bounds import MACHINE_SECONDS, Bound, Liveness
from integration.soak.ledger import (
    Ledger,
    Place,
    Sample,
    Sighting,
    Truth,
    Violation,
    bad_lines,
    growth,
    joined,
    wrong_answers,
)
from integration.soak.report import read_answers, timed_lines

ROOT = Path(__file__).parent.parent
ONE, TWO = "10.0.0.1:9501", "10.0.0.2:9501"
LATE = 1000.0  # when everything that began at 0 has had its time


@pytest.fixture
def ledger() -> Ledger:
    """Two hosts of one topic that live since 0."""
    ledger = Ledger()
    for host, agent in ((ONE, "agent1"), (TWO, "agent2")):
        ledger.know(Place("scheduler", host, "session", agent))
        ledger.up(host, 0.0, "started")
    return ledger


def with_liveness(liveness: Liveness) -> Ledger:
    ledger = Ledger()
    ledger.know(Place("scheduler", ONE, liveness, "agent1"))
    ledger.up(ONE, 0.0, "started")
    return ledger


def seen(
    at: float,
    *hosts: str,
    age: float = 0.0,
    mode: str = "kv",
    is_fresh: bool = True,
    error: str = "",
) -> Sighting:
    return Sighting(
        "reader", mode, "scheduler", frozenset(hosts), at, at, at - age, is_fresh, error
    )


def promises(ledger: Ledger, *sightings: Sighting) -> list[str]:
    return [each.promise for each in wrong_answers(ledger.judged(), sightings)]


def test_right_answers_break_nothing(ledger: Ledger) -> None:
    """All hosts while they live, none before, one when the other has gone."""
    ledger.down(TWO, LATE, LATE, "left")
    assert promises(ledger, seen(500, ONE, TWO), seen(LATE + 100, ONE)) == []


def test_a_host_nobody_ever_served(ledger: Ledger) -> None:
    """A host that is in no plan, or in that of another topic, is wrong from the first answer."""
    ledger.know(Place("conductor", "10.0.0.3:9501", "session", "agent1"))
    for stranger in ("10.66.66.66:6666", "10.0.0.3:9501"):
        assert promises(ledger, seen(500, ONE, TWO, stranger)) == ["a host that nobody ever served"]


def test_a_host_before_it_was_started() -> None:
    """An answer that has a host which nobody had started yet is wrong."""
    ledger = Ledger()
    ledger.know(Place("scheduler", ONE, "session", "agent1"))
    ledger.up(ONE, 100.0, "started")
    assert "an age understates" in promises(ledger, seen(99, ONE))
    assert promises(ledger, seen(101, ONE)) == []


@pytest.mark.parametrize(("how", "liveness"), sorted(bounds.GONE))
def test_an_age_that_understates(how: str, liveness: Liveness) -> None:
    """A dead host may be in an answer until its bound is over; in one that says to be of a later
    time it may not, whether or not that one calls itself fresh."""
    ledger = Ledger()
    ledger.know(Place("scheduler", ONE, liveness))
    ledger.up(ONE, 0.0, "passed" if liveness == "catalog" else "started")
    ledger.down(ONE, LATE, LATE, how)
    over = LATE + bounds.GONE[how, liveness].seconds + MACHINE_SECONDS
    assert promises(ledger, seen(over - 0.1, ONE, is_fresh=False)) == []
    assert promises(ledger, seen(over + 9, ONE, age=9.1, is_fresh=False)) == []
    assert promises(ledger, seen(over + 9, ONE, age=8.9, is_fresh=False)) == ["an age understates"]


@pytest.mark.parametrize("mode", sorted(bounds.FRESH))
def test_a_wrong_host_in_an_answer_that_calls_itself_fresh(ledger: Ledger, mode: str) -> None:
    """However old it says to be: who calls it fresh has had so long to notice."""
    ledger.down(TWO, LATE, LATE, "left")
    over = LATE + bounds.GONE["left", "session"].seconds + MACHINE_SECONDS
    limit = over + bounds.FRESH[mode].seconds + MACHINE_SECONDS
    early, late = (seen(at, ONE, TWO, age=60, mode=mode) for at in (limit - 0.1, limit + 0.1))
    assert promises(ledger, early) == []
    assert promises(ledger, late) == ["a wrong host in a fresh answer"]
    assert promises(ledger, late._replace(is_fresh=False)) == []


def test_a_live_host_that_is_missing(ledger: Ledger) -> None:
    """An answer without a host that had to be listed ever since it was given is wrong, in Consul
    itself too; one that says to be older than the host is not."""
    due = bounds.LISTED["started", "session"].seconds + MACHINE_SECONDS
    assert promises(ledger, seen(due - 0.1, ONE)) == []
    assert promises(ledger, seen(due + 9, ONE, age=9.1)) == []
    assert promises(ledger, seen(due + 9, ONE, age=8.9)) == ["a live host is missing"]
    assert promises(ledger, seen(500, ONE, mode="consul")) == ["a registration is lost"]


def test_a_known_topic_that_is_empty(ledger: Ledger) -> None:
    """No flag of the answer excuses it; only a reader that knew nobody may find nobody."""
    empty = seen(501, is_fresh=False)
    assert promises(ledger, empty) == []
    assert promises(ledger, seen(500, ONE, TWO), empty) == ["a known topic is empty"]


def test_a_known_topic_that_fails(ledger: Ledger) -> None:
    """An outage is an error only for who does not know the topic."""
    failure = seen(501, is_fresh=False, error="Unavailable: nobody answers")
    assert promises(ledger, failure) == []
    assert promises(ledger, seen(500, ONE, TWO), failure) == ["a known topic fails"]


def test_nobody_is_missing_once_all_have_gone(ledger: Ledger) -> None:
    """An empty answer is right when nobody lives."""
    for host in (ONE, TWO):
        ledger.down(host, LATE, LATE, "left")
    assert promises(ledger, seen(500, ONE, TWO), seen(LATE + 1)) == []


def test_an_answer_that_says_less_than_the_truth_for_a_moment_is_no_fault(ledger: Ledger) -> None:
    """A host that went and came back within the answer's age may be in it or not."""
    ledger.down(TWO, LATE, LATE, "left")
    ledger.up(TWO, LATE + 50, "started")
    for hosts in ((ONE,), (ONE, TWO)):
        assert promises(ledger, seen(LATE + 80, *hosts, age=79, is_fresh=False)) == []
    assert promises(ledger, seen(LATE + 80, ONE)) == ["a live host is missing"]


# --- disturbances


@pytest.mark.parametrize(("kind", "liveness"), sorted(bounds.MISSING))
def test_a_disturbance_excuses_who_is_concerned_and_only_in_its_time(
    kind: str, liveness: Liveness
) -> None:
    """A host of that agent may be missing meanwhile and so long after; a host of another not."""
    excuse = bounds.MISSING[kind, liveness]
    end = LATE + excuse.survived + 1
    over = end + excuse.after.seconds + MACHINE_SECONDS
    here, elsewhere = with_liveness(liveness), with_liveness(liveness)
    here.disturbed(kind, LATE, end, "agent1")
    elsewhere.disturbed(kind, LATE, end, "agent2")
    emptied = [] if excuse.may_empty else ["a known topic is empty"]
    for at in (LATE + 0.1, over - 0.1):
        assert promises(here, seen(at, mode="consul")) == []
        assert promises(here, seen(at - 5, ONE), seen(at)) == emptied
        assert promises(elsewhere, seen(at - 5, ONE), seen(at)) == ["a known topic is empty"]
    for at in (LATE - 0.1, over + 0.1):
        assert promises(here, seen(at - 5, ONE), seen(at)) == ["a known topic is empty"]


def test_what_a_lease_outlives_excuses_nothing() -> None:
    """An agent away for less than the lease lasts is no reason to be missing."""
    ledger = with_liveness("session")
    ledger.disturbed("agent paused", LATE, LATE + bounds.OUTLIVED - 0.1, "agent1")
    assert promises(ledger, seen(LATE + 5, ONE), seen(LATE + 6)) == ["a known topic is empty"]


def test_a_new_leader_gives_every_session_its_time_anew(ledger: Ledger) -> None:
    """A killed process may be listed 2 x TTL after the election that came before its end."""
    ledger.down(TWO, LATE, LATE, "killed")
    ledger.disturbed("no leader", LATE + 18, LATE + 30)
    assert promises(ledger, seen(LATE + 50, ONE, TWO)) == []
    late = LATE + 30 + 2 * bounds.SESSION_TTL_SECONDS + MACHINE_SECONDS + 0.1
    assert promises(ledger, seen(late, ONE, TWO)) == ["an age understates"]


def test_who_comes_while_nobody_hears_it_is_due_later() -> None:
    """A registration made while there is no leader is due after the next one is there."""
    ledger = Ledger()
    ledger.know(Place("scheduler", ONE, "session", "agent1"))
    ledger.up(ONE, LATE, "started")
    ledger.disturbed("no leader", LATE - 3, LATE + 20)
    due = LATE + 20 + bounds.LISTED["started", "session"].seconds + MACHINE_SECONDS
    found = seen(due - 1, ONE)
    assert promises(ledger, found, seen(due - 0.1)) == []
    assert promises(ledger, found, seen(due + 0.1)) == ["a known topic is empty"]


def test_a_repair_that_nobody_hears_counts_anew(ledger: Ledger) -> None:
    """A key deleted just before the leader dies is written again after the election."""
    ledger.disturbed("key deleted", LATE, LATE + 0.1, ONE)
    ledger.disturbed("no leader", LATE + 2, LATE + 12)
    due = LATE + 12 + bounds.MISSING["key deleted", "session"].after.seconds + MACHINE_SECONDS
    assert promises(ledger, seen(due - 0.1, TWO)) == []
    assert promises(ledger, seen(due + 0.1, TWO)) == ["a live host is missing"]


def test_a_renewal_on_its_way_outlives_its_process(ledger: Ledger) -> None:
    """An agent that holds one for 7 s gives the session so much more time: also one that it began
    to hold at the end of the disturbance."""
    ledger.disturbed("server back", LATE - 9, LATE - 4)
    ledger.down(TWO, LATE, LATE, "killed")
    ledger.down(ONE, LATE + 4, LATE + 4, "killed")
    bound = bounds.GONE["killed", "session"].seconds + MACHINE_SECONDS
    assert promises(ledger, seen(LATE - 4 + bounds.HELD.seconds + bound - 0.1, TWO)) == []
    for late in (
        seen(LATE - 4 + bounds.HELD.seconds + bound + 0.1, TWO),
        seen(LATE + 4 + bound + 0.1, ONE),
    ):
        assert promises(ledger, late) == ["an age understates"]


def test_a_renewal_in_a_suspended_agent_is_done_when_that_goes_on(ledger: Ledger) -> None:
    """The process that sent it may be dead by then; that of another agent is not concerned."""
    ledger.disturbed("agent paused", LATE - 2, LATE + 8, "agent1")
    ledger.down(ONE, LATE, LATE, "killed")
    ledger.down(TWO, LATE, LATE, "killed")
    bound = bounds.GONE["killed", "session"].seconds + MACHINE_SECONDS
    assert promises(ledger, seen(LATE + 8 + bound - 0.1, ONE)) == []
    assert promises(ledger, seen(LATE + 8 + bound + 0.1, ONE)) == ["an age understates"]
    assert promises(ledger, seen(LATE + bound + 0.1, TWO)) == ["an age understates"]


def test_who_leaves_while_nobody_hears_it_counts_as_killed(ledger: Ledger) -> None:
    """A clean end while its agent is away cannot be told to Consul."""
    ledger.down(ONE, LATE, LATE, "left")
    ledger.down(TWO, LATE, LATE, "left")
    ledger.disturbed("agent killed", LATE - 1, LATE + 5, "agent1")
    assert promises(ledger, seen(LATE + 19, ONE)) == []
    assert promises(ledger, seen(LATE + 19, TWO)) == [
        "an age understates",
        "a wrong host in a fresh answer",
    ]


def test_only_reads_of_any_server_may_lag(ledger: Ledger) -> None:
    """After a restart stale reads and DNS may miss a host; others may not, and a known topic is
    never empty."""
    ledger.disturbed("server back", LATE, LATE + 5)
    for mode in bounds.FRESH:
        expected = [] if mode in bounds.STALE_MODES else ["a live host is missing"]
        if mode != "consul":
            assert promises(ledger, seen(LATE + 6, ONE, mode=mode)) == expected
    emptied = (seen(LATE, ONE, mode="catalog"), seen(LATE + 6, mode="catalog"))
    assert promises(ledger, *emptied) == ["a known topic is empty"]


def test_a_host_cannot_go_twice(ledger: Ledger) -> None:
    """The soak's own mistakes do not become truth."""
    ledger.down(ONE, 1.0, 1.0, "killed")
    with pytest.raises(ValueError, match="is down already"):
        ledger.down(ONE, 2.0, 2.0, "killed")


def test_how_much_is_judged(ledger: Ledger) -> None:
    """A truth without a must and a must-not could not be broken."""
    ledger.down(TWO, 50.0, 50.0, "left")
    truth: Truth = ledger.judged()
    must, must_not = truth.judged_shares(0.0, 100.0)
    assert 0.6 < must < 0.8 and 0.2 < must_not < 0.3


# --- where the bounds are from


def all_bounds() -> list[Bound]:
    return [
        *bounds.GONE.values(),
        *bounds.LISTED.values(),
        *bounds.FRESH.values(),
        *(excuse.after for excuse in bounds.MISSING.values()),
        *bounds.LATER.values(),
        *bounds.LAGS.values(),
        bounds.HELD,
        bounds.KNOWN_TOPIC_SECONDS,
    ]


def test_every_bound_names_a_heading_that_exists() -> None:
    """What is not written for users is no excuse."""
    for bound in all_bounds():
        headings = re.findall(r"^#+ (.*)$", (ROOT / bound.document).read_text("utf-8"), re.M)
        assert bound.heading in headings, bound


# --- growth


def samples(count: int, **growing: int) -> list[Sample]:
    values = {"memory_kib": 30_000, "threads": 6, "descriptors": 12}
    return [
        Sample(3.0 * n, **{k: v + growing.get(k, 0) * n // count for k, v in values.items()})
        for n in range(count)
    ]


@pytest.mark.parametrize("what", ["memory_kib", "threads", "descriptors"])
def test_growth(what: str) -> None:
    """What grows steadily is reported with its name; a moment's peak is not."""
    assert not list(growth("m01", samples(100), 45))
    (found,) = growth("m01", samples(100, **{what: 20_000}), 45)
    assert what in found.text
    peak = samples(100)
    peak[-5] = peak[-5]._replace(**{what: 90_000})
    assert not list(growth("m01", peak, 45))


def test_growth_in_the_warm_up_and_of_short_lives_is_not_judged() -> None:
    """A process fills its memory first."""
    early = [each._replace(memory_kib=1) for each in samples(10)] + samples(100)[10:]
    assert not list(growth("m01", early, 45))
    assert not list(growth("m01", samples(10, memory_kib=90_000), 45))
    assert not list(growth("m01", [], 45))


# --- logs


def test_tracebacks_and_error_lines(tmp_path: Path) -> None:
    """Each is one violation, at its time, named by its last line; warnings are none."""
    log = tmp_path / "m01.log"
    log.write_text(
        "10.500 WARNING consul_matchmaker.keeper: lease lost\n"
        "11.000 ERROR consul_matchmaker.worker: unexpected error, going on\n"
        "Traceback (most recent call last):\n"
        '  File "x.py", line 1, in <module>\n'
        "    1 / 0\n"
        "ZeroDivisionError: division by zero\n"
        "12.000 WARNING consul_matchmaker.keeper: fine again\n"
        "consul-matchmaker: ERROR consul_matchmaker.keeper: Consul refuses the token\n"
    )
    found = list(bad_lines("m01", timed_lines(log)))
    assert [(each.promise, each.first_at) for each in found] == [
        ("an unexpected error is logged", 11.0),
        ("an unexpected traceback", 11.0),
        ("an unexpected error is logged", 12.0),
    ]
    assert "ZeroDivisionError" in found[1].text


def test_a_traceback_that_is_cut_off() -> None:
    """It is one all the same."""
    (found,) = bad_lines("m01", [(1.0, "Traceback (most recent call last):")])
    assert found.promise == "an unexpected traceback"


# --- what is printed


def test_what_follows_closely_is_one_violation() -> None:
    """A host that was missing for two seconds is told once, with how often and how long."""
    at = [1.0, 1.5, 3.0, 30.0]
    all_of_them = [Violation("p", "reader", f"text {n}", t, t) for n, t in enumerate(at)]
    first, second = joined([*all_of_them, Violation("p", "other", "x", 2.0, 2.0)])[::2]
    assert (first.first_at, first.last_at, first.count) == (1.0, 3.0, 3)
    assert (second.first_at, second.count) == (30.0, 1)


def test_answers_are_read_back(tmp_path: Path) -> None:
    """A line is two sightings, its lookups count, and only a known topic's lookup can be slow."""
    file = tmp_path / "watch.jsonl"
    line = (
        '{"topic": "scheduler", "hosts": [%s], "fresh": true, "error": "",'
        ' "first": [1, 1, 0.5], "last": [2, 2, 1.5], "count": 9, "worst": %s}\n'
    )
    file.write_text(line % ("", 7.0) + line % (f'"{ONE}"', 8.0) + line % ("", 9.0) + '{"cut')
    found = read_answers("watch", "kv", file)
    assert (len(found.sightings), found.lookups, found.worst[0]) == (6, 27, 9.0)
    assert len(found.slow) == 1
    assert found.sightings[2].hosts == {ONE}
    assert found.sightings[2].taken_at == 0.5
