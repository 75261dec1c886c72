"""Which hosts `pick` takes by zone, subset, weight, load and age, and which it leaves out."""

from __future__ import annotations

import random
import socket
from collections import Counter
from contextlib import suppress
from typing import Any

import pytest

from consul_matchmaker.answers.load import Load
from consul_matchmaker.answers.quarantine import Quarantine
from consul_matchmaker.answers.selection import Selector
from consul_matchmaker.model import Host, Instance, Snapshot
from consul_matchmaker.settings import Settings

from .doubles import ManualClock

TOPIC = "web"


def host(number: int) -> Host:
    return Host(f"10.0.0.{number}", 80)


def hosts(count: int) -> list[Host]:
    return [host(number) for number in range(1, count + 1)]


def answer(*members: Host | Instance) -> Snapshot:
    instances = (one if isinstance(one, Instance) else Instance(one) for one in members)
    return Snapshot(TOPIC, tuple(instances), "service")


def zoned(number: int, zone: str, weight: int = 1) -> Instance:
    return Instance(host(number), weight=weight, meta={"zone": zone})


class Chooser:
    """A Selector with its parts, and a clock that is moved by hand."""

    def __init__(self, **settings: Any) -> None:
        self.clock = ManualClock()
        told = Settings(mode="service", **{"client_id": "me", **settings})
        self.quarantine = Quarantine(told, clock=self.clock, jitter=lambda: 0.0)
        self.load = Load(told, clock=self.clock)
        chance = random.Random(1)
        self.selector = Selector(self.quarantine, told, self.load, clock=self.clock, chance=chance)

    def counts(self, snapshot: Snapshot, total: int = 1000, **options: Any) -> Counter[Host]:
        return Counter(
            picked
            for picked in (self.selector.pick(snapshot, **options) for _ in range(total))
            if picked is not None
        )

    def why(self, snapshot: Snapshot, number: int) -> str:
        told = self.selector.explain(snapshot)[str(host(number))]
        assert bool(told["is_chosen"]) is bool(self.counts(snapshot, 2000)[host(number)])
        return str(told["why"])


SELECTIONS = pytest.mark.parametrize("selection", ["round_robin", "weighted", "least_loaded"])


# -- exclusion


@SELECTIONS
@pytest.mark.parametrize("weight", [1, 3])
def test_an_excluded_host_is_never_picked(selection: str, weight: int) -> None:
    """Whatever the selection; the others share."""
    chooser = Chooser(selection=selection)
    three = answer(Instance(host(1), weight=weight), *hosts(3)[1:])
    counts = chooser.counts(three, exclude={host(2)})
    least = {host(1)} if (selection, weight) == ("least_loaded", 3) else {host(1), host(3)}
    assert set(counts) == least
    assert chooser.counts(three, exclude=hosts(3)) == {}
    assert chooser.counts(three, 200)[host(2)] > 20, "it is forgotten afterwards"


@SELECTIONS
def test_a_rejected_host_is_better_than_an_excluded_one(selection: str) -> None:
    """What was tried in this call failed in this call."""
    chooser = Chooser(selection=selection)
    two = answer(*hosts(2))
    chooser.quarantine.reject(TOPIC, host(1))
    assert set(chooser.counts(two)) == {host(2)}
    assert set(chooser.counts(two, exclude={host(2)})) == {host(1)}
    assert set(chooser.counts(two, exclude={host(2)}, key="k")) == {host(1)}


def test_a_host_of_another_priority_is_better_than_an_excluded_one() -> None:
    """The spare hosts are for that."""
    chooser = Chooser()
    both = answer(Instance(host(1), priority=1), Instance(host(2), priority=2))
    assert set(chooser.counts(both, exclude={host(1)})) == {host(2)}


def test_a_key_goes_to_its_second_host() -> None:
    """To the same one each time, which is where it goes when the first leaves."""
    chooser, five = Chooser(), answer(*hosts(5))
    first = chooser.selector.pick(five, key="tenant")
    assert first is not None
    second = chooser.selector.pick(five, key="tenant", exclude={first})
    rest = answer(*(one for one in hosts(5) if one != first))
    assert second == chooser.selector.pick(rest, key="tenant")


def test_exclusion_does_not_disturb_the_turn() -> None:
    """Other callers go on in turn while one goes elsewhere."""
    chooser, four = Chooser(), answer(*hosts(4))
    counts: Counter[Host] = Counter()
    for number in range(400):
        counts += chooser.counts(four, 1)
        if number % 10 == 0:
            chooser.counts(four, 1, exclude={host(1), host(2), host(3), host(4)})
            chooser.counts(four, 1, exclude={host(1)})
    assert max(counts.values()) - min(counts.values()) <= 40


def test_where_a_host_is_excluded_the_weights_of_the_others_count() -> None:
    """Also of those that are only better than it."""
    chooser = Chooser()
    three = answer(host(1), Instance(host(2), weight=9), host(3))
    assert 850 < chooser.counts(three, exclude={host(1)})[host(2)] < 950
    for number in (2, 3):
        chooser.quarantine.reject(TOPIC, host(number))
    assert 850 < chooser.counts(three, exclude={host(1)})[host(2)] < 950
    of_keys = {chooser.selector.pick(three, key="k", exclude={host(1)}) for _ in range(50)}
    assert len(of_keys) == 1


# -- weights


def test_weighted_is_in_turn() -> None:
    """5:1:1 over seven picks is exactly that, and the five are not in a row."""
    chooser = Chooser(selection="weighted")
    snapshot = answer(Instance(host(1), weight=5), *hosts(3)[1:])
    chooser.counts(snapshot, 70)
    for _ in range(20):
        picked = [chooser.selector.pick(snapshot) for _ in range(7)]
        assert Counter(picked) == {host(1): 5, host(2): 1, host(3): 1}
    assert set(chooser.counts(answer(*hosts(4)), 400).values()) == {100}


@pytest.mark.parametrize("moment", range(1, 7))
def test_an_interrupt_takes_no_host_out_of_the_turn(moment: int) -> None:
    """Whenever it comes; here while one host after the other is looked at."""
    looks = 0

    class Interrupting(frozenset[Host]):
        def __contains__(self, one: object) -> bool:
            nonlocal looks
            looks += 1
            if looks == moment:
                raise KeyboardInterrupt
            return one in hosts(3)

    chooser, four = Chooser(selection="weighted"), answer(*hosts(4))
    for _ in range(5):
        looks = 0
        with suppress(KeyboardInterrupt):
            chooser.selector.pick(four, exclude=Interrupting(hosts(3)))
    assert set(chooser.counts(four, 400)) == set(hosts(4))


def test_processes_do_not_begin_with_the_same_host() -> None:
    """Weighted turns begin at random."""
    firsts = set()
    for seed in range(30):
        told = Settings(mode="service", selection="weighted")
        parts = Quarantine(told), told, Load(told)
        selector = Selector(*parts, chance=random.Random(seed))
        firsts.add(selector.pick(answer(*hosts(3))))
    assert firsts == set(hosts(3))


# -- load


def test_least_loaded_leaves_the_busy_host() -> None:
    """A host with more in flight is taken only when it is drawn with itself, which is never."""
    chooser, two = Chooser(selection="least_loaded"), answer(*hosts(2))
    _kept = chooser.load.begin(TOPIC, host(1))
    assert set(chooser.counts(two)) == {host(2)}
    assert set(chooser.counts(answer(host(1)))) == {host(1)}


def test_least_loaded_draws_two_of_all() -> None:
    """Of five with one busy, the others share evenly."""
    chooser, five = Chooser(selection="least_loaded"), answer(*hosts(5))
    _kept = chooser.load.begin(TOPIC, host(1))
    counts = chooser.counts(five, 4000)
    assert counts[host(1)] == 0
    assert all(850 < counts[one] < 1150 for one in hosts(5)[1:])


def test_a_call_that_ends_frees_its_host() -> None:
    """A slow host gets few calls, by what is in flight and by its latency; it is not forgotten."""
    chooser, two = Chooser(selection="least_loaded"), answer(*hosts(2))
    for one, seconds in ((host(1), 0.01), (host(2), 0.2)):
        chooser.load.judged(TOPIC, one, is_good=True, seconds=seconds)
    assert set(chooser.counts(two)) == {host(1)}
    chooser.clock.advance(60)
    chooser.load.judged(TOPIC, host(1), is_good=True, seconds=0.01)
    assert set(chooser.counts(two)) == {host(2)}


def test_least_loaded_leaves_alone_what_has_no_weight() -> None:
    """Where others have some, a weight of 0 is a very small chance: also with several such hosts,
    of which two are drawn often."""
    chooser = Chooser(selection="least_loaded")
    members = [Instance(host(number), weight=0) for number in range(1, 6)]
    counts = chooser.counts(answer(*members, host(6), host(7)), 10_000)
    assert 0 < sum(counts[host(number)] for number in range(1, 6)) < 50
    assert 4000 < counts[host(6)] < 6000
    rest = chooser.counts(answer(*members, host(6)), 100, exclude={host(6)})
    assert set(rest) == set(hosts(5))
    assert set(chooser.counts(answer(*members), 1000)) == set(hosts(5))


# -- zones


def test_the_own_zone_is_used_first() -> None:
    """Alone, as long as its hosts are enough."""
    chooser = Chooser(zone="a")
    six = answer(*(zoned(number, zone) for number, zone in enumerate("aabbcc", 1)))
    assert chooser.counts(six) == {host(1): 500, host(2): 500}
    assert "100% of the calls go to hosts of zone a" in chooser.why(six, 1)
    assert chooser.why(six, 3) == "it is outside of zone a, whose own hosts are enough"


def test_calls_spill_over_as_far_as_the_zone_is_too_small() -> None:
    """One of ten hosts for half of the callers: it keeps 28 %, and the others share the rest."""
    chooser = Chooser(zone="a")
    ten = answer(zoned(1, "a"), *(zoned(number, "b") for number in range(2, 11)))
    counts = chooser.counts(ten, 10_000)
    assert 2600 < counts[host(1)] < 3000
    assert all(750 < counts[host(number)] < 850 for number in range(2, 11))


def test_rejected_hosts_of_the_zone_count_as_missing() -> None:
    """One of two left in a zone of six hosts: 1.4 x 3 / 5 of the calls stay."""
    chooser = Chooser(zone="a")
    six = answer(*(zoned(number, zone) for number, zone in enumerate("aabbcc", 1)))
    chooser.quarantine.reject(TOPIC, host(1))
    counts = chooser.counts(six, 10_000)
    assert 8000 < counts[host(2)] < 8800
    chooser.quarantine.reject(TOPIC, host(2))
    assert set(chooser.counts(six)) == {host(number) for number in (3, 4, 5, 6)}


@pytest.mark.parametrize("zones", ["bbcc", "aaaa"])
def test_a_zone_of_nobody_or_of_everybody_is_none(zones: str) -> None:
    """All hosts are used alike."""
    chooser = Chooser(zone="a")
    four = answer(*(zoned(number, zone) for number, zone in enumerate(zones, 1)))
    assert set(chooser.counts(four).values()) == {250}


def test_another_zone_is_better_than_an_excluded_host() -> None:
    """Where the only host of ours failed in this call."""
    chooser = Chooser(zone="a")
    two = answer(zoned(1, "a"), zoned(2, "b"))
    assert set(chooser.counts(two, exclude={host(1)})) == {host(2)}


def test_a_key_knows_no_zone_and_no_subset() -> None:
    """It means the same host in every process, wherever that runs."""
    four = answer(*(zoned(number, zone) for number, zone in enumerate("aabb", 1)))
    plain, near = Chooser(), Chooser(zone="a", subset_size=1)
    for number in range(50):
        key = f"tenant-{number}"
        assert plain.selector.pick(four, key=key) == near.selector.pick(four, key=key)


# -- subsets


@SELECTIONS
def test_a_process_uses_its_subset(selection: str) -> None:
    """The same hosts always; one that is rejected is replaced by one other."""
    chooser, hundred = Chooser(subset_size=5, selection=selection), answer(*hosts(100))
    used = set(chooser.counts(hundred))
    assert len(used) == 5
    bad = min(used)
    chooser.quarantine.reject(TOPIC, bad)
    after = set(chooser.counts(hundred))
    assert len(after) == 5
    assert used - after == {bad}
    other = next(one for one in hosts(100) if one not in used | after)
    assert "not one of the 5 for this client" in chooser.why(hundred, int(other.address[7:]))
    assert set(chooser.counts(hundred, exclude=used | after)) <= set(hosts(100)) - used - after


def test_a_machine_has_a_subset_by_its_name() -> None:
    """Where no client_id is given."""
    hundred = answer(*hosts(100))
    ours = set(Chooser(subset_size=5, client_id=None).counts(hundred))
    assert ours == set(Chooser(subset_size=5, client_id=socket.gethostname()).counts(hundred))


def test_a_subset_is_of_the_zone() -> None:
    """And of the others one as large, for what spills over."""
    chooser = Chooser(zone="a", subset_size=2)
    members = [zoned(number, "a" if number <= 4 else "b") for number in range(1, 31)]
    counts = chooser.counts(answer(*members), 10_000)
    assert len([one for one in counts if int(one.address[7:]) <= 4]) == 2
    assert len(counts) == 4


# -- new hosts


@SELECTIONS
def test_a_new_host_begins_slowly(selection: str) -> None:
    """A tenth of its share at first, half of it in the middle, all of it at the end."""
    chooser = Chooser(selection=selection, slow_start_seconds=10)
    chooser.counts(answer(*hosts(3)), 10)
    four = answer(*hosts(4))
    shares = []
    for seconds in (0, 5, 5):
        chooser.clock.advance(seconds)
        counts = chooser.counts(four, 4000)
        shares.append(counts[host(4)] / (4000 / 4))
        if seconds == 0:
            assert "new and gets 10% of its share" in chooser.why(four, 4)
    if selection == "least_loaded":  # 4 of 7 pairs have it, and equal loads are drawn
        assert shares[0] < 0.25 < shares[1] < shares[2]
    else:
        assert shares[0] == pytest.approx(0.1, abs=0.04)
        assert shares[1] == pytest.approx(0.5, abs=0.08)
        assert shares[2] == pytest.approx(1.0, abs=0.01)


def test_where_all_are_new_none_is_held_back() -> None:
    """The hosts of the first answer; and a topic whose hosts are all replaced at once."""
    chooser = Chooser(slow_start_seconds=10)
    assert set(chooser.counts(answer(host(1), host(2))).values()) == {500}
    after = chooser.counts(answer(host(3), host(4)))
    assert sum(after.values()) == 1000
    assert all(400 < after[host(number)] < 600 for number in (3, 4))


# -- ejection


def test_an_ejected_host_is_avoided_whatever_it_answers() -> None:
    """For the longest quarantine; then one caller tries it."""
    chooser, three = Chooser(), answer(*hosts(3))
    assert chooser.quarantine.eject(TOPIC, host(1), hosts(3))
    chooser.quarantine.acknowledge(TOPIC, host(1))
    assert set(chooser.counts(three)) == {host(2), host(3)}
    assert "ejected" in chooser.quarantine.explain(TOPIC, hosts(3))[str(host(1))]
    chooser.clock.advance(30)
    assert chooser.counts(three)[host(1)] == 1
    chooser.quarantine.acknowledge(TOPIC, host(1))
    assert set(chooser.counts(three)) == set(hosts(3))


def test_no_more_are_ejected_than_the_cap() -> None:
    """A fifth of ten; when one comes back another may go; hosts that left do not count."""
    chooser, ten = Chooser(), hosts(10)
    assert [chooser.quarantine.eject(TOPIC, one, ten) for one in ten[:4]] == [
        True,
        True,
        False,
        False,
    ]
    assert chooser.quarantine.ejections == 2
    assert len(chooser.counts(answer(*ten))) == 8
    assert chooser.quarantine.eject(TOPIC, host(5), ten[2:])
    chooser.clock.advance(30)
    assert chooser.quarantine.eject(TOPIC, host(6), ten)


def test_a_host_is_ejected_once() -> None:
    """Calls that were under way fail after it; then neither its time nor the count grows."""
    chooser, ten = Chooser(), hosts(10)
    assert chooser.quarantine.eject(TOPIC, host(1), ten)
    chooser.clock.advance(20)
    assert not chooser.quarantine.eject(TOPIC, host(1), ten)
    assert chooser.quarantine.ejections == 1
    chooser.clock.advance(10)
    assert chooser.counts(answer(*ten))[host(1)] == 1, "one tries it"


def test_ejections_are_jittered_and_survive_a_fork() -> None:
    """Up to a fifth shorter, as quarantines are; a child goes on with what its parent found."""
    clock, told = ManualClock(), Settings(mode="service")
    parent = Quarantine(told, clock=clock, jitter=lambda: 1.0)
    assert parent.eject(TOPIC, host(1), hosts(3))
    child = Quarantine(told, clock=clock, before=parent)
    clock.advance(23.9)
    assert child.status() == {TOPIC: [str(host(1))]}
    clock.advance(0.2)
    assert child.status() == {}


def test_a_single_host_is_not_ejected() -> None:
    """Nor one of a topic whose hosts are not known."""
    chooser = Chooser()
    assert not chooser.quarantine.eject(TOPIC, host(1), hosts(1))
    assert not chooser.quarantine.eject(TOPIC, host(1), ())
    assert chooser.quarantine.status() == {}


# -- why


def test_why_a_host_is_not_chosen() -> None:
    """Rejected, or of another priority; and how the others are chosen."""
    chooser = Chooser()
    snapshot = answer(
        Instance(host(1), priority=1, weight=2), host(2), Instance(host(3), priority=2)
    )
    chooser.quarantine.reject(TOPIC, host(2))
    assert chooser.why(snapshot, 2) == "it was rejected"
    assert chooser.why(snapshot, 3) == "its priority is 2, and hosts of priority 1 are there"
    assert chooser.why(snapshot, 1) == "in turn"
    two = answer(Instance(host(1), weight=2), host(2))
    assert Chooser().why(two, 1) == "at random by weight"
    assert Chooser(selection="weighted").why(two, 1) == "in turn by weight"
    assert Chooser(selection="least_loaded").why(two, 1) == "the less loaded of two"
    assert chooser.selector.explain(answer()) == {}
    spares = answer(host(1), Instance(host(2), priority=3), Instance(host(2), "b", priority=2))
    assert Chooser().why(spares, 2) == "its priority is 2, and hosts of priority 1 are there"


def test_what_is_told_of_a_host_that_is_chosen() -> None:
    """Its zone's share, that it is new, and what its calls found."""
    chooser = Chooser(zone="a", slow_start_seconds=10, selection="least_loaded")
    one, two, three = zoned(1, "a"), zoned(2, "b"), zoned(3, "b")
    chooser.counts(answer(one, two), 1)
    both = answer(one, two, three)
    chooser.counts(both, 1)
    busy = chooser.load.begin(TOPIC, host(3))
    told = {name: told["why"] for name, told in chooser.selector.explain(both).items()}
    near = "the less loaded of two; 93% of the calls go to hosts of zone a"
    far = "the less loaded of two; 7% of the calls go to hosts outside of zone a"
    new = f"{far}; it is new and gets 10% of its share"
    assert list(told.values()) == [near, far, new]
    assert chooser.selector.explain(both)[str(host(3))]["in_flight"] == len(busy) == 1
