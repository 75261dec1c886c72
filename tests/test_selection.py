"""Which host is picked: in turn, by weight, by key, and not the ones that were rejected."""

from __future__ import annotations

import math
import random
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator, Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from consul_matchmaker.answers.load import Load
from consul_matchmaker.answers.quarantine import LARGE_POOL, Quarantine
from consul_matchmaker.answers.selection import MAX_TURNS, Selector
from consul_matchmaker.model import Host, Instance, Snapshot
from consul_matchmaker.settings import Settings

from .doubles import DEADLINE_SECONDS, ManualClock, in_thread, kv


def hosts(count: int, start: int = 1) -> list[Host]:
    return [Host(f"10.0.0.{number}", 5000) for number in range(start, start + count)]


def answer(*members: Host | Instance, topic: str = "scheduler") -> Snapshot:
    instances = (one if isinstance(one, Instance) else Instance(one) for one in members)
    return Snapshot(topic, tuple(instances), "memory")


def selector(seed: int = 1, quarantine: Quarantine | None = None) -> Selector:
    return Selector(quarantine or Quarantine(kv()), kv(), Load(kv()), chance=random.Random(seed))


def picks(chooser: Selector, snapshot: Snapshot, count: int) -> list[Host]:
    picked = [chooser.pick(snapshot) for _ in range(count)]
    return [host for host in picked if host is not None]


# -- in turn


def test_nobody_is_picked_of_nobody() -> None:
    """An empty answer gives None, with a key or without."""
    assert selector().pick(answer()) is None
    assert selector().pick(answer(), key="k") is None


def test_every_host_has_its_turn() -> None:
    """Over any number of picks two hosts differ by one pick at most."""
    seven = answer(*hosts(7))
    chooser, counts = selector(), Counter[Host]()
    for _ in range(100):
        counts.update(picks(chooser, seven, 1))
        assert max(counts.values()) - min(counts[host] for host in seven) <= 1


def test_the_first_host_is_a_random_one() -> None:
    """So that processes which start together do not all go to the same host first."""
    ten = answer(*hosts(10))
    firsts = Counter(picks(selector(seed), ten, 1)[0] for seed in range(1000))
    assert len(firsts) == 10
    assert min(firsts.values()) > 60  # of 100 each; 60 is four standard deviations below


def test_the_turn_goes_on_when_the_same_answer_comes_again() -> None:
    """A refresh is no new beginning: the next one is who would have been next."""
    chooser, counts = selector(), Counter[Host]()
    for _ in range(70):  # a new snapshot for every pick
        counts.update(picks(chooser, answer(*hosts(7)), 1))
    assert set(counts.values()) == {10}


def test_the_turn_goes_on_when_hosts_come_and_go() -> None:
    """Who left is skipped, who came is in its place in the order, nobody is visited twice."""
    one, two, three, four, five = hosts(5)
    chooser = selector()
    first = picks(chooser, answer(one, two, four, five), 1)[0]
    assert first in (one, two, four, five)
    while picks(chooser, answer(one, two, four, five), 1)[0] != one:
        pass
    assert picks(chooser, answer(one, two, three, five), 3) == [two, three, five]
    assert picks(chooser, answer(two, four), 2) == [two, four]


def test_each_topic_and_server_has_its_own_turn() -> None:
    """Picks for one do not move the other's."""
    chooser = selector()
    jobs, mails = answer(*hosts(2), topic="jobs"), answer(*hosts(2), topic="mails")
    order = [chooser.pick(jobs), chooser.pick(mails), chooser.pick(jobs), chooser.pick(mails)]
    assert order[0] != order[2]
    assert order[1] != order[3]
    named = [chooser.pick(jobs, server=name) for name in ("a", "b", "a", "b")]
    assert named[0] != named[2]
    assert named[1] != named[3]


def test_threads_share_one_turn() -> None:
    """Eight threads picking at once: every host exactly as often as the others."""
    chooser, seven = selector(), answer(*hosts(7))
    workers = [in_thread(lambda: picks(chooser, seven, 700)) for _ in range(8)]
    counts = Counter(host for worker in workers for host in worker.result(DEADLINE_SECONDS))
    assert set(counts.values()) == {800}


def test_turns_take_bounded_memory() -> None:
    """A flood of topics does not grow for ever."""
    chooser = selector()
    most = 0
    for number in range(MAX_TURNS + 10):
        chooser.pick(answer(*hosts(1), topic=f"topic{number}"))
        most = max(most, len(chooser._turns))
    assert most == MAX_TURNS


# -- by priority and weight


def test_weights_are_kept() -> None:
    """100,000 picks over weights 1:2:5 are within three standard deviations (RFC 2782)."""
    total, weights = 100_000, dict(zip(hosts(3), (1, 2, 5), strict=True))
    snapshot = answer(*(Instance(host, weight=weight) for host, weight in weights.items()))
    counts = Counter(picks(selector(), snapshot, total))
    for host, weight in weights.items():
        share = weight / 8
        assert abs(counts[host] - total * share) < 3 * math.sqrt(total * share * (1 - share))


def test_weight_zero_is_a_very_small_chance() -> None:
    """Beside others it is hardly ever picked; alone, or among its like, always."""
    rare, usual = hosts(2)
    both = answer(Instance(rare, weight=0), Instance(usual, weight=1))
    counts = Counter(picks(selector(), both, 100_000))
    assert 0 < counts[rare] < 300
    assert picks(selector(), answer(Instance(rare, weight=0)), 3) == [rare] * 3
    equals = answer(*(Instance(host, weight=0) for host in hosts(2)))
    assert set(Counter(picks(selector(), equals, 100)).values()) == {50}


def test_only_the_lowest_priority_number_is_used() -> None:
    """Of the others a host is picked only when every one of the lowest is avoided."""
    first, second, spare = hosts(3)
    quarantine = Quarantine(kv(panic_fraction=1))
    chooser = selector(quarantine=quarantine)
    snapshot = answer(
        Instance(first, priority=1), Instance(second, priority=1), Instance(spare, priority=2)
    )
    assert set(picks(chooser, snapshot, 20)) == {first, second}
    quarantine.reject("scheduler", first)
    assert set(picks(chooser, snapshot, 20)) == {second}
    quarantine.reject("scheduler", second)
    assert set(picks(chooser, snapshot, 20)) == {spare}


def test_a_host_with_two_names_counts_once() -> None:
    """Two instances of one host do not double its share."""
    one, two = hosts(2)
    snapshot = answer(Instance(one, "a"), Instance(one, "b"), Instance(two))
    assert set(Counter(picks(selector(), snapshot, 100)).values()) == {50}


# -- by key


@given(st.lists(st.text(), unique=True, max_size=60), st.integers(0, 9))
def test_when_a_host_leaves_only_its_own_keys_move(keys: list[str], gone: int) -> None:
    """The other keys stay where they were, whatever they are."""
    ten, chooser = hosts(10), selector()
    before = {key: chooser.pick(answer(*ten), key=key) for key in keys}
    left = ten[gone]
    for key in keys:
        after = chooser.pick(answer(*(host for host in ten if host != left)), key=key)
        assert after == before[key] or before[key] == left


def test_keys_are_spread_by_weight() -> None:
    """10,000 keys over weights 1:1:2 are within four standard deviations."""
    total, weights = 10_000, dict(zip(hosts(3), (1, 1, 2), strict=True))
    snapshot = answer(*(Instance(host, weight=weight) for host, weight in weights.items()))
    chooser = selector()
    counts = Counter(chooser.pick(snapshot, key=str(number)) for number in range(total))
    for host, weight in weights.items():
        share = weight / 4
        assert abs(counts[host] - total * share) < 4 * math.sqrt(total * share * (1 - share))


@pytest.mark.system
def test_a_key_means_the_same_host_in_every_process() -> None:
    """Python's hash() differs from process to process; this does not."""
    program = (
        "from consul_matchmaker.model import *; from consul_matchmaker.answers.selection import *;"
        "from consul_matchmaker.settings import *;"
        "s = Snapshot('t', tuple(Instance(Host(f'10.0.0.{n}', 5000)) for n in range(1, 11)), 'kv');"
        "from consul_matchmaker.answers.load import *;"
        "from consul_matchmaker.answers.quarantine import *;"
        "e = Settings(mode='kv');c = Selector(Quarantine(e), e, Load(e));"
        "print([str(c.pick(s, key=f'tenant-{n}')) for n in range(20)])"
    )
    outputs = {
        subprocess.run(
            [sys.executable, "-c", program],
            env={"PYTHONHASHSEED": seed},
            check=True,
            capture_output=True,
            text=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert len(outputs) == 1


def test_text_and_bytes_keys() -> None:
    """A text and its UTF-8 bytes are the same key, and any text is one."""
    ten = answer(*hosts(10))
    assert selector().pick(ten, key="é") == selector().pick(ten, key="é".encode())
    assert selector().pick(ten, key="") is not None
    assert selector().pick(ten, key="\ud800") is not None


def test_a_rejected_host_lends_its_keys_to_others() -> None:
    """While it is avoided its keys go elsewhere, each to one host; then they come back."""
    clock = ManualClock()
    quarantine = Quarantine(kv(), clock=clock, jitter=lambda: 0.0)
    chooser, ten = selector(quarantine=quarantine), answer(*hosts(10))
    home = chooser.pick(ten, key="tenant")
    assert home is not None
    quarantine.reject("scheduler", home)
    away = {chooser.pick(ten, key="tenant") for _ in range(10)}
    assert len(away) == 1 and home not in away
    clock.advance(1)
    assert chooser.pick(ten, key="tenant") == home


# -- quarantine


class Bench:
    """Ten hosts, one of which is bad, and a clock."""

    def __init__(self, settings: Settings | None = None, count: int = 10) -> None:
        self.clock = ManualClock()
        self.quarantine = Quarantine(settings or kv(), clock=self.clock, jitter=lambda: 0.0)
        self.chooser = selector(quarantine=self.quarantine)
        self.hosts = hosts(count)
        self.bad = self.hosts[0]

    def reject(self, host: Host | None = None) -> None:
        self.quarantine.reject("scheduler", host or self.bad)

    def round(self, count: int = 100) -> Counter[Host]:
        return Counter(picks(self.chooser, answer(*self.hosts), count))


def test_a_rejected_host_is_avoided_for_a_while() -> None:
    """For quarantine_seconds nobody is sent there; of another topic it is as good as before."""
    bench = Bench()
    assert bench.round()[bench.bad] == 10
    bench.reject()
    assert bench.quarantine.status() == {"scheduler": [str(bench.bad)]}
    bench.clock.advance(0.99)
    assert bench.round()[bench.bad] == 0
    other = answer(*bench.hosts, topic="mails")
    assert Counter(picks(bench.chooser, other, 100))[bench.bad] == 10


def test_when_a_quarantine_ends_one_caller_tries() -> None:
    """The others are not sent there until it is acknowledged."""
    bench = Bench()
    bench.reject()
    bench.clock.advance(1)
    assert bench.round()[bench.bad] == 1
    assert bench.round()[bench.bad] == 0
    bench.quarantine.acknowledge("scheduler", bench.bad)
    assert bench.round()[bench.bad] == 10
    assert bench.quarantine.status() == {}


def test_rejections_after_a_trial_double_up_to_a_roof() -> None:
    """1, 2, 4, 8, 16, 30, 30 seconds."""
    bench = Bench()
    for seconds in (1, 2, 4, 8, 16, 30, 30):
        bench.reject()
        bench.clock.advance(seconds - 0.01)
        assert bench.round()[bench.bad] == 0
        bench.clock.advance(0.01)
        assert bench.round()[bench.bad] == 1


def test_silence_is_consent() -> None:
    """Callers who never acknowledge: a trial that nobody rejects lets the others come back."""
    bench = Bench()
    bench.reject()
    bench.clock.advance(1)
    assert bench.round()[bench.bad] == 1
    bench.clock.advance(1)
    assert bench.round()[bench.bad] == 10


@pytest.mark.parametrize(
    ("rejected", "is_panic"), [(1, False), (4, False), (5, True), (9, True), (10, True)]
)
def test_too_many_rejections_are_not_heeded(rejected: int, is_panic: bool) -> None:
    """With panic_fraction (half) of the hosts or more rejected the fault is elsewhere: all are
    used, so callers always get a host."""
    bench = Bench()
    for host in bench.hosts[:rejected]:
        bench.reject(host)
    counts = bench.round()
    assert len(counts) == (10 if is_panic else 10 - rejected)
    assert sum(counts.values()) == 100


@pytest.mark.finding("A3")
@pytest.mark.parametrize(
    ("count", "rejected"), [(2, 1), (3, 1), (3, 2), (5, 4), (LARGE_POOL - 1, LARGE_POOL - 2)]
)
@pytest.mark.parametrize("fraction", [0.0, 0.5, 1.0])
def test_in_a_small_pool_no_rejected_host_is_picked(
    count: int, rejected: int, fraction: float
) -> None:
    """While any host of a small pool is not rejected, pick takes one of those."""
    bench = Bench(kv(panic_fraction=fraction), count=count)
    for host in bench.hosts[:rejected]:
        bench.reject(host)
    assert set(bench.round()) == set(bench.hosts[rejected:])


@pytest.mark.finding("A3")
@pytest.mark.parametrize("count", [1, 2, 3, 9])
def test_where_all_are_rejected_all_are_used(count: int) -> None:
    """pick always has a host: where every one is rejected, the fault is elsewhere."""
    bench = Bench(count=count)
    for host in bench.hosts:
        bench.reject(host)
    assert set(bench.round()) == set(bench.hosts)


def test_quarantines_are_jittered() -> None:
    """They are up to a fifth shorter, at random, and never longer than the setting."""
    clock, draws = ManualClock(), iter([0.0, 0.5, 0.999])
    quarantine = Quarantine(kv(quarantine_seconds=10), clock=clock, jitter=lambda: next(draws))
    three = hosts(3)
    for host in three:
        quarantine.reject("scheduler", host)
    ten = hosts(10)
    clock.advance(8.1)
    assert quarantine.avoided("scheduler", ten) == frozenset({three[0], three[1]})
    clock.advance(1)
    assert quarantine.avoided("scheduler", ten) == frozenset({three[0]})
    clock.advance(0.9)
    assert quarantine.avoided("scheduler", ten) == frozenset()


def test_of_many_threads_one_has_the_trial() -> None:
    """Eight threads at the moment a quarantine ends: one is sent to the bad host, once."""
    bench = Bench(count=3)
    bench.reject()
    bench.clock.advance(1)
    workers = [in_thread(lambda: bench.round(300)) for _ in range(8)]
    counts = sum((worker.result(DEADLINE_SECONDS) for worker in workers), Counter[Host]())
    assert counts[bench.bad] == 1
    assert sum(counts.values()) == 2400


# -- what others can ask of a quarantine


def test_quarantines_are_counted() -> None:
    """Those that began; a rejection during one begins none."""
    bench = Bench()
    assert bench.quarantine.begun == 0
    for host in (*bench.hosts[:3], bench.bad):
        bench.reject(host)
    assert bench.quarantine.begun == 3
    bench.clock.advance(1)
    bench.reject()
    assert bench.quarantine.begun == 4


def test_forgiving_one_host_forgives_no_other() -> None:
    """Nor the same host of another topic; a host that was never rejected is nothing to forgive."""
    bench = Bench()
    other = bench.hosts[1]
    for host in (bench.bad, other):
        bench.reject(host)
    bench.quarantine.reject("mails", bench.bad)
    bench.quarantine.acknowledge("scheduler", bench.hosts[5])
    bench.quarantine.acknowledge("scheduler", bench.bad)
    assert bench.quarantine.status() == {"scheduler": [str(other)], "mails": [str(bench.bad)]}
    assert bench.quarantine.avoided("scheduler", bench.hosts) == {other}
    bench.quarantine.acknowledge("scheduler", other)
    assert bench.quarantine.status() == {"mails": [str(bench.bad)]}
    assert bench.quarantine.avoided("scheduler", bench.hosts) is None
    bench.quarantine.acknowledge("never asked for", other)


def test_a_rejection_is_forgotten_at_its_time() -> None:
    """The longest quarantine after its own or its trial's end: then the next one is a first one."""
    for wait, seconds in ((30.99, 2.0), (31.0, 1.0)):
        bench = Bench()
        bench.reject()
        bench.clock.advance(wait)
        bench.reject()
        bench.clock.advance(seconds - 0.01)
        assert bench.quarantine.status() == {"scheduler": [str(bench.bad)]}
        bench.clock.advance(0.01)
        assert bench.quarantine.status() == {}
    bench = Bench()
    bench.reject()
    bench.clock.advance(10)
    assert bench.quarantine.begin_trial("scheduler", bench.bad)  # until 11
    bench.clock.advance(30)
    bench.reject()
    bench.clock.advance(1.5)
    assert bench.quarantine.status() == {"scheduler": [str(bench.bad)]}


def test_whether_rejections_are_heeded() -> None:
    """They are, as long as others can be used instead; and where there are none."""
    bench = Bench()
    explain = bench.quarantine.explain
    assert explain("scheduler", bench.hosts) == {}
    bench.reject()
    assert explain("scheduler", bench.hosts) == {str(bench.bad): "avoided by pick"}
    assert explain("mails", [bench.bad]) == {}
    for host in bench.hosts:
        bench.reject(host)
    told = explain("scheduler", bench.hosts)
    assert set(told) == {str(host) for host in bench.hosts}
    assert set(told.values()) == {"used all the same: too many are rejected"}


def test_a_trial_is_for_one_caller() -> None:
    """None during the quarantine; then one, for as long as that had been; anybody elsewhere."""
    bench = Bench()
    assert bench.quarantine.begin_trial("scheduler", bench.bad)
    bench.reject()
    assert not bench.quarantine.begin_trial("scheduler", bench.bad)
    assert bench.quarantine.begin_trial("scheduler", bench.hosts[1])
    assert bench.quarantine.begin_trial("mails", bench.bad)
    bench.clock.advance(1)
    assert bench.quarantine.begin_trial("scheduler", bench.bad)
    assert not bench.quarantine.begin_trial("scheduler", bench.bad)
    bench.clock.advance(1)
    assert bench.quarantine.begin_trial("scheduler", bench.bad)


# -- details of a pick


def test_a_selector_draws_from_its_own_chance() -> None:
    """Two with the same seed pick the same; one without any begins somewhere too."""
    snapshot = answer(*(Instance(host, weight=1 + place) for place, host in enumerate(hosts(9))))
    one, other = (picks(selector(seed=5), snapshot, 20) for _ in range(2))
    assert one == other
    assert Selector(Quarantine(kv()), kv(), Load(kv())).pick(snapshot) in snapshot


def test_the_heaviest_entry_of_a_host_counts() -> None:
    """Wherever it stands among the host's others."""
    one, two = hosts(2)
    for weights in ((9, 1, 2), (1, 9, 2), (1, 2, 9)):
        snapshot = answer(*(Instance(one, weight=weight) for weight in weights), Instance(two))
        counts = Counter(picks(selector(), snapshot, 10_000))
        assert abs(counts[one] - 9000) < 4 * math.sqrt(10_000 * 0.9 * 0.1)


def test_each_server_has_its_own_turn_beside_rejected_hosts() -> None:
    """As it has where none is rejected."""
    quarantine = Quarantine(kv())
    chooser, five = selector(quarantine=quarantine), answer(*hosts(5), topic="jobs")
    quarantine.reject("jobs", hosts(5)[0])
    order = [chooser.pick(five, server=name) for name in "abababab"]
    assert set(order[::2]) == set(order[1::2]) == set(hosts(5)[1:])


def test_a_key_may_be_any_text_and_so_may_a_host() -> None:
    """Also one that cannot be encoded, such as an opaque host out of damaged bytes."""
    odd = answer(Host.opaque("\ud800"), Host.opaque("b"))
    assert {selector().pick(odd, key=f"{number}\ud800") for number in range(50)} == set(odd)


class TakenMeanwhile(Quarantine):
    """Between looking and picking, other threads took all hosts but one."""

    def __init__(self, rejected: Host, free: Host) -> None:
        super().__init__(kv())
        self.rejected, self.free = rejected, free
        self.tried: list[Host] = []

    def avoided(self, topic: str, hosts: Sequence[Host]) -> frozenset[Host] | None:
        return frozenset({self.rejected})

    def begin_trial(self, topic: str, host: Host) -> bool:
        self.tried.append(host)
        return host == self.free


def test_hosts_that_others_took_meanwhile_are_passed_over() -> None:
    """Each is tried once, and the one that is left is picked; never the one known as bad."""
    five = hosts(5)
    for free in five[1:]:
        quarantine = TakenMeanwhile(five[0], free)
        assert selector(quarantine=quarantine).pick(answer(*five)) == free
        assert len(set(quarantine.tried)) == len(quarantine.tried) <= 4
        assert five[0] not in quarantine.tried
    quarantine = TakenMeanwhile(five[0], Host("10.9.9.9", 1))
    assert selector(quarantine=quarantine).pick(answer(*five)) in five


class CountedInstances(tuple[Instance, ...]):
    """Counts how often somebody goes through them."""

    count = 0

    def __iter__(self) -> Iterator[Instance]:
        type(self).count += 1
        return super().__iter__()


@pytest.mark.parametrize("is_one_rejected", [False, True])
def test_an_answer_is_put_in_order_once(is_one_rejected: bool) -> None:
    """However often it is picked from, as long as the same hosts are avoided."""
    quarantine = Quarantine(kv(), clock=ManualClock())
    if is_one_rejected:
        quarantine.reject("scheduler", hosts(3)[0])
    chooser = selector(quarantine=quarantine)
    snapshot = Snapshot("scheduler", CountedInstances(map(Instance, hosts(3))), "memory")
    chooser.pick(snapshot)
    before = CountedInstances.count
    for number in range(20):
        chooser.pick(snapshot)
        chooser.pick(snapshot, key=str(number))
    assert CountedInstances.count == before
