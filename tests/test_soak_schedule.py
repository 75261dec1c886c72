"""The soak's schedule: the same for the same seed, everything in it, and never too much at once."""

from __future__ import annotations

import itertools
import subprocess
import sys
from collections import Counter

import pytest

from integration.soak import schedule
from integration.soak.faults import ClusterFaults, MemberFaults, Writes
from integration.soak.schedule import TOPICS, Event, members, plan

TWO_MINUTES, HALF_AN_HOUR = 120.0, 1800.0
SEEDS = range(1, 9)
AWAY = {"kill", "kill command", "end", "suspend", "withdraw"}
BACK = {"start", "resume", "publish"}


def test_the_same_seed_gives_the_same_events() -> None:
    """And another seed others."""
    assert plan(1, TWO_MINUTES) == plan(1, TWO_MINUTES)
    assert plan(1, TWO_MINUTES) != plan(2, TWO_MINUTES)


@pytest.mark.system
def test_the_schedule_is_printed_without_running() -> None:
    """The same list in every process."""
    command = [sys.executable, "-m", "integration.soak", "--seed", "7", "--schedule"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.splitlines() == [str(event) for event in plan(7, TWO_MINUTES)]


def test_who_registers() -> None:
    """24 processes, each liveness by the library and by the command line, each topic on every
    agent, so that no agent's end takes a whole topic."""
    everybody = members()
    assert len(everybody) == 24 and len({each.name for each in everybody}) == 24
    assert {(each.liveness, each.by_command) for each in everybody} == {
        (liveness, by_command)
        for liveness in ("session", "node", "check")
        for by_command in (False, True)
    }
    for topic in TOPICS:
        assert len({each.agent for each in everybody if each.topic == topic}) == 3


@pytest.mark.parametrize("seconds", [TWO_MINUTES, HALF_AN_HOUR])
@pytest.mark.parametrize("seed", SEEDS)
def test_everything_comes_back(seed: int, seconds: float) -> None:
    """Who is taken away is brought back, in turn, and nobody is touched meanwhile; two of a topic
    are away at most."""
    topic_of = {each.name: each.topic for each in members()}
    away: dict[str, Event] = {}
    for event in plan(seed, seconds):
        if event.target not in topic_of or event.kind in Writes.KINDS:
            continue
        if event.kind in BACK:
            del away[event.target]
        else:
            assert event.target not in away, event
            if event.kind in AWAY:
                away[event.target] = event
                assert sum(topic_of[each] == topic_of[event.target] for each in away) <= 2
    assert not away


@pytest.mark.parametrize("seed", SEEDS)
def test_instances_fail_one_of_three_at_a_time(seed: int) -> None:
    """Each passes again, and a service keeps two."""
    failing: set[str] = set()
    for event in plan(seed, HALF_AN_HOUR):
        if event.kind == "fail":
            failing.add(event.target)
            assert len({each.partition("/")[0] for each in failing}) == len(failing)
        elif event.kind == "pass":
            failing.remove(event.target)
    assert not failing


@pytest.mark.parametrize("seconds", [TWO_MINUTES, HALF_AN_HOUR])
@pytest.mark.parametrize("seed", SEEDS)
def test_one_node_at_a_time_and_one_loss_of_quorum(seed: int, seconds: float) -> None:
    """Cluster faults do not overlap, all kinds come, and all are over before the end."""
    faults = [event for event in plan(seed, seconds) if event.hold]
    for one, next_one in itertools.pairwise(faults):
        assert one.at + one.hold < next_one.at
    kinds = Counter(event.kind for event in faults)
    assert kinds["lose quorum"] == 1
    assert faults[-1].at + faults[-1].hold < seconds
    if seconds == HALF_AN_HOUR:
        whom = {event.target.rstrip("0123456789") for event in faults}
        assert set(kinds) == {"kill", "pause", "stop", "lose quorum"}
        assert whom == {"leader", "follower", "agent", "two servers"}


def test_every_event_has_somebody_who_carries_it_out() -> None:
    """A kind that nobody knows would only be found at its time."""
    known = {member.name for member in members()}
    for event in plan(1, HALF_AN_HOUR):
        if event.kind in Writes.KINDS:
            assert event.target in known or event.target in schedule.instances()
        else:
            kinds = MemberFaults.KINDS if event.target in known else ClusterFaults.KINDS
            assert event.kind in kinds
