"""What is believed of one topic: what answers, failures and the watch change, and for how long."""

from __future__ import annotations

from dataclasses import replace

import pytest

from consul_matchmaker.answers.belief import RETURN_SECONDS, UNSEEN_TTLS, Belief, Rules
from consul_matchmaker.answers.freshness import Freshness
from consul_matchmaker.errors import Unavailable
from consul_matchmaker.settings import Settings

from .doubles import ManualClock, catalog, kv, snapshot

A, B, C, D, E = (f"10.0.0.{number}:5000" for number in range(1, 6))


def service(**values):
    return Settings(mode="service", **values)


class Topic:
    """A belief; `hears` is one answer of Consul, *after* so many seconds."""

    def __init__(self, *hosts, settings=None):
        self.clock, self.notes = ManualClock(), []
        settings = settings or catalog()
        self.source = "dns" if settings.mode == "catalog" else settings.mode

        def note(level, message, *arguments):
            self.notes.append(message % arguments)

        rules = Rules(settings, note, self.clock, jitter=lambda: 0.0)
        self.belief = Belief("scheduler", None, rules)
        if hosts:
            self.hears(*hosts)

    def hears(
        self, *hosts, after=0.0, is_complete=True, version=0, freshness=None, age_seconds=0.0
    ):
        """Which hosts are held then; with *freshness*, from a watch."""
        self.clock.advance(after)
        answer = snapshot("scheduler", hosts, self.source, is_complete=is_complete)
        taken_at = self.clock() - age_seconds
        stamped = replace(answer, taken_at=taken_at, clock=self.clock, version=version)
        self.is_changed = self.belief.answered(stamped, self.clock(), freshness)
        return self.hosts

    def sees(self, *hosts, after=0.0):
        """Which hosts are held when a watch told of *hosts*, and whether they are confirmed."""
        held = self.hears(*hosts, after=after, freshness=Freshness())
        return held, self.held.confirmed

    def fails(self, *, after=0.0):
        self.clock.advance(after)
        self.belief.failed(Unavailable("Consul is away"), self.clock(), is_first=True)

    @property
    def held(self):
        return self.belief.held

    @property
    def hosts(self):
        return [str(host) for host in self.held]


# -- doubt


@pytest.mark.parametrize(
    ("before", "after", "is_doubted"),
    [
        ([A, B, C, D], [A], True),
        ([A, B, C, D], [A, B], False),
        ([A, B, C], [A], True),
        ([A, B], [B], False),
        ([A], [B], False),
        ([A], [], True),
        ([], [], False),
    ],
)
def test_less_than_half_is_doubted(before, after, is_doubted):
    """An answer is suspicious when it has less than half of the hosts there were."""
    topic = Topic(*before)
    topic.hears(*before)
    assert topic.hears(*after) == (before if is_doubted else after)


def test_what_gets_even_worse_must_repeat_anew():
    """Nothing after one of four has been said once, not for as long as the one of four."""
    topic = Topic(A, B, C, D)
    topic.hears(A)
    topic.hears(after=5)
    assert topic.hears(after=5) == [A, B, C, D]
    assert topic.hears(after=1) == []


def test_what_gets_better_is_confirmed_by_the_worse():
    """One of four after 6 s of nothing is believed: nothing has confirmed it long enough."""
    topic = Topic(A, B, C, D)
    topic.hears()
    assert topic.hears(A, after=6) == [A]


@pytest.mark.parametrize(("consistency", "is_doubted"), [("default", False), ("stale", True)])
def test_one_host_that_leaves_kv_is_doubted_only_where_it_reads_stale(consistency, is_doubted):
    """The leader does not lie: a clean exit is seen at once.  A stale read may."""
    topic = Topic(A, settings=kv(consistency=consistency))
    assert topic.hears() == ([A] if is_doubted else [])


@pytest.mark.finding("F1")
@pytest.mark.parametrize(("before", "after"), [([A, B], []), ([A, B, C], [A]), ([A, B, C], [])])
def test_several_hosts_that_leave_at_once_are_waited_for(before, after):
    """Where two hosts or more leave and less than half are left, those that are held are served on,
    unconfirmed, for the time in which Consul has living ones back; then it is believed."""
    topic = Topic(*before, settings=kv())
    for seconds in (0, 1, 0.9):
        assert topic.sees(*after, after=seconds) == (before, False)
    # No hosts at all are confirmed, as they were repeated.
    assert topic.sees(*after, after=0.1) == (after, True)


@pytest.mark.finding("F1", "F2", "F3")
def test_hosts_that_return_were_never_away():
    """Nobody sees a topic without its hosts when they are all back within 1.7 s."""
    topic = Topic(A, B, C, settings=kv())
    assert topic.sees() == ([A, B, C], False)
    assert topic.sees(A, B, C, after=1.7) == ([A, B, C], True)


@pytest.mark.finding("F1")
def test_hosts_that_leave_one_by_one_within_seconds_leave_at_once():
    """Consul ends the sessions of one agent one after the other: what is left when less than half
    are there is served on."""
    topic = Topic(A, B, C, settings=kv())
    assert topic.sees(B, C, after=0.1) == ([B, C], True)
    assert topic.sees(C, after=0.1) == ([B, C], False)
    assert topic.sees(after=0.1) == ([B, C], False)
    assert topic.sees(A, B, C, after=1.0) == ([A, B, C], True)
    assert topic.sees(B, C, after=RETURN_SECONDS) == ([B, C], True)
    # By then none of them belongs to what left before.
    assert topic.sees(C, after=RETURN_SECONDS) == ([C], True)


@pytest.mark.finding("F1")
def test_a_host_that_leaves_alone_is_believed_at_once():
    """A crash is seen at once, and half of the hosts may leave; the last one that leaves makes an
    answer that is not confirmed until it was repeated."""
    topic = Topic(A, B, C, D, settings=kv())
    assert topic.sees(A, B) == ([A, B], True)
    assert topic.sees(A, after=3) == ([A], True)
    assert topic.sees(after=3) == ([], False)
    assert topic.sees(after=1) == ([], False)
    assert topic.sees(after=1) == ([], True)
    assert topic.sees(B, after=0.1) == ([B], True)


@pytest.mark.finding("F1")
def test_a_direct_lookup_waits_for_hosts_too():
    """The rule is one, whoever asks."""
    topic = Topic(A, B, settings=kv())
    assert topic.hears() == [A, B]
    assert topic.hears(after=RETURN_SECONDS) == []


@pytest.mark.finding("E11")
@pytest.mark.parametrize("left", [[], [B]])
def test_an_older_answer_is_doubted_whoever_asks(left):
    """Consul's index went back: an agent that came back without its data, or a server that lags
    behind.  What it lacks is not believed until it was repeated, in a direct lookup too."""
    topic = Topic(settings=kv())
    topic.hears(A, B, version=100)
    for _ in range(6):
        assert topic.hears(*left, version=1) == [A, B]
        assert not topic.held.confirmed
        topic.clock.advance(1)
    assert topic.hears(*left, version=1) == left
    assert topic.hears(A, version=2) == [A]


@pytest.mark.finding("E11")
def test_an_older_answer_that_lacks_nothing_is_believed():
    """Consul's index goes back too when it forgets what was deleted long ago."""
    topic = Topic(settings=kv())
    topic.hears(A, version=100)
    assert topic.hears(A, B, version=50) == [A, B]
    assert topic.held.confirmed


@pytest.mark.finding("E11")
def test_a_watch_doubts_by_itself_what_is_older():
    """What it tells then is believed at once, and is not doubted when a lookup says it again."""
    topic = Topic(settings=kv())
    topic.hears(A, version=100)
    assert topic.hears(version=1, freshness=Freshness()) == []
    assert topic.hears(version=1) == []


@pytest.mark.finding("E11")
def test_an_outage_in_between_begins_the_doubt_anew():
    """While nobody answers nothing is repeated: the first answer after an outage, when servers lie,
    confirms nothing.  The same rule as the watch's."""
    topic = Topic(A)
    topic.hears()
    topic.fails(after=3)
    for _ in range(2):
        assert topic.hears(after=5.9) == [A]
    assert topic.hears(after=0.2) == []


def test_what_was_given_up_is_no_reason_to_doubt():
    """A topic that nobody asked for since max_stale_seconds has the hosts Consul says now: those
    from long ago come back neither instead of an empty answer nor beside an incomplete one."""
    topic = Topic(A, B, settings=catalog(max_stale_seconds=60))
    assert topic.hears(after=60) == []
    assert not topic.held.confirmed
    topic.hears(A, B)
    assert topic.hears(C, after=60, is_complete=False) == [C]


def test_what_was_read_from_disk_is_no_reason_to_doubt_kv():
    """The first answer of Consul is the truth; DNS must repeat that all are gone."""
    for settings, left in ((kv(), []), (catalog(), [A, B])):
        topic = Topic(settings=settings)
        stamp = {"taken_at": topic.clock(), "fresh_until": topic.clock(), "clock": topic.clock}
        topic.belief.held = replace(snapshot("scheduler", [A, B], "disk"), **stamp)
        assert topic.hears() == left


@pytest.mark.parametrize(("consistency", "fresh_seconds"), [("default", 60), ("stale", 5)])
def test_while_a_watch_tells_every_change_a_lookup_is_as_fresh_as_it(consistency, fresh_seconds):
    """But a stale read may be older than what the watch told."""
    topic, freshness = Topic(settings=kv(consistency=consistency)), Freshness()
    freshness.confirm(topic.clock(), topic.clock() + 60)
    topic.hears(A, freshness=freshness)
    assert topic.held.fresh_until == topic.clock() + 60
    topic.hears(A)
    assert topic.held.fresh_until == topic.clock() + fresh_seconds


def test_each_step_of_a_doubt_is_noted():
    """Once, however often the answer is repeated."""
    topic = Topic(A, B)
    for seconds in (0, 1, 1):
        topic.hears(after=seconds)
    topic.hears(A, B)
    topic.hears()
    topic.hears(after=6)
    words = ("suddenly says 0 hosts instead of 2", "2 hosts after all", "suddenly", "confirmed, it")
    assert len(topic.notes) == len(words)
    assert all(word in note for word, note in zip(words, topic.notes, strict=True))


# -- from the cache of an agent, and in an order of Consul's


def test_an_answer_that_was_old_when_it_came_is_given_for_a_while():
    """An agent's cache may give one of any age: not every lookup asks for the same again."""
    topic = Topic(settings=service(consistency="cached"))
    topic.hears(A, age_seconds=20)
    assert topic.held.age_seconds == 20
    assert not topic.belief.must_ask_first(topic.clock())
    assert topic.belief.must_ask_first(topic.clock() + 2.5)


@pytest.mark.parametrize(("near", "order"), [("_agent", [B, A]), (None, [A, B])])
def test_the_same_hosts_in_another_order(near, order):
    """That is no change; with `near` the newest order counts all the same."""
    topic = Topic(A, B, settings=service(near=near))
    topic.hears(B, A)
    assert [str(one.host) for one in topic.held.instances] == order
    assert not topic.is_changed


# -- answers that are confirmed


def test_a_first_empty_answer_is_confirmed_by_repetition():
    """DNS may deny what lives: only after confirm_empty_seconds is "no hosts" called confirmed."""
    topic = Topic()
    for seconds in (0, 2, 2, 1.9):
        topic.hears(after=seconds)
        assert not topic.held.confirmed
    topic.hears(after=0.1)
    assert topic.held.confirmed
    topic.hears(A)
    assert topic.held.confirmed


def test_an_answer_that_is_doubted_is_not_confirmed():
    """While Consul denies the held answer it says so; afterwards whatever holds is confirmed."""
    topic = Topic(A, B)
    assert topic.held.confirmed
    assert topic.hears() == [A, B]
    assert not topic.held.confirmed
    assert not topic.held.for_server("nobody").confirmed
    assert topic.hears(after=6) == []
    assert topic.held.confirmed


def test_kv_is_sure_of_no_hosts():
    """What cannot lie is confirmed at once."""
    topic = Topic(settings=kv())
    topic.hears()
    assert topic.held.confirmed


# -- incomplete answers


def test_an_incomplete_answer_takes_no_host_away():
    """What a cut answer lacks stays; what it adds is added; and it says that it is incomplete."""
    topic = Topic(A, B, C)
    assert topic.held.is_complete
    assert topic.hears(A, D, is_complete=False) == [A, B, C, D]
    assert not topic.held.is_complete
    assert topic.hears(B, E, is_complete=False) == [A, B, C, D, E]
    assert topic.hears(A, B, D) == [A, B, D]
    assert topic.held.is_complete
    # And what was known not to be there stays away.
    assert topic.hears(A, is_complete=False) == [A, B, D]


def test_a_host_in_no_incomplete_answer_leaves_in_the_end():
    """Missing from every answer for three TTLs: it is not there, however incomplete they were."""
    topic = Topic(A, B)
    for seconds in (0, *[5] * UNSEEN_TTLS):
        assert topic.hears(A, after=seconds, is_complete=False) == [A, B]
    assert topic.hears(A, after=1, is_complete=False) == [A]


@pytest.mark.finding("A1")
def test_an_incomplete_answer_is_as_old_as_the_oldest_that_it_needs():
    """Hosts that only an earlier answer had are no younger in a later one."""
    topic = Topic()
    topic.hears(A, is_complete=False)
    assert topic.hears(B, after=4, is_complete=False) == [A, B]
    assert topic.held.age_seconds == 4


# -- copies of a denial


@pytest.mark.parametrize("repeat_seconds", [1, 5])
def test_copies_of_a_denial_confirm_nothing(repeat_seconds):
    """A resolver between us and Consul repeats what Consul said at one moment: it is one answer,
    however long it is repeated."""
    topic = Topic(A)
    topic.hears(version=1_000)
    for _ in range(30 // repeat_seconds):
        assert topic.hears(after=repeat_seconds, version=1_000) == [A]
    assert topic.hears(after=1, version=1_003) == [A], "four seconds of Consul's are not six"
    assert topic.hears(after=1, version=1_005) == []
    assert topic.held.confirmed


def test_a_first_denial_is_confirmed_by_another_moment():
    """Where nothing was known, an empty answer is given at once, unconfirmed for as long."""
    topic = Topic()
    topic.hears(version=1_000)
    for _ in range(10):
        assert topic.hears(after=2, version=1_000) == []
        assert not topic.held.confirmed
    topic.hears(after=2, version=1_030)
    assert topic.held.confirmed


def test_another_agents_clock_may_be_behind():
    """What counts then is our own."""
    topic = Topic(A)
    topic.hears(version=1_000)
    assert topic.hears(after=5, version=10) == [A]
    assert topic.hears(after=1.5, version=11) == []


def test_a_denial_without_a_serial_counts_by_our_clock():
    """Of a server that gives none."""
    topic = Topic(A)
    topic.hears()
    assert topic.hears(after=5) == [A]
    assert topic.hears(after=1) == []
