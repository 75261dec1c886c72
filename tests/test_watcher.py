"""The watcher tells the cache every change, and never calls fresh what nothing proves."""

import logging
import math
import threading
import time

import pytest

from consul_matchmaker.answers.blocking_query import (
    BYTES_PER_SECOND,
    DOUBT_GAP_SECONDS,
    MAX_IDLE_GAP_SECONDS,
    MAX_WAIT_SECONDS,
    MIN_GAP_SECONDS,
)
from consul_matchmaker.answers.watch_plan import FIT_SECONDS, PREFIX
from consul_matchmaker.answers.watcher import (
    INVALID_SECONDS,
    LATEST_ANSWER_SECONDS,
    MAX_RETRY_SECONDS,
    SETTLE_SECONDS,
    Watcher,
)
from consul_matchmaker.backends.http.api import Answer, Overloaded, TooLarge
from consul_matchmaker.backends.http.exchange import MAX_ANSWER_BYTES
from consul_matchmaker.backends.kv.poll import as_answer, fingerprint
from consul_matchmaker.backends.service.poll import Poll as ServicePoll
from consul_matchmaker.backends.service.reader import Reader
from consul_matchmaker.backends.watching import Route
from consul_matchmaker.errors import Denied, InvalidTopic, Unavailable
from consul_matchmaker.model import Host, Instance, Snapshot
from consul_matchmaker.settings import Settings

from .doubles import ManualClock, StillWorker, kv

TTL_SECONDS = kv().ttl_seconds
FRESH_SECONDS = TTL_SECONDS + LATEST_ANSWER_SECONDS
HERE = Route(Host("10.0.0.1", 8500), "10.0.0.2:8300")
OTHER_LEADER = Route(HERE.agent, "10.0.0.3:8300")
OTHER_AGENT = Route(Host("10.0.0.9", 8500), HERE.leader)


class Polled:
    """What a poll brings: the ports of each topic's hosts."""

    def __init__(self, index, ports, made):
        self.index, self._ports, self._made = index, ports, made
        text = ";".join(f"{t}={sorted(p)}" for t, p in sorted(ports.items()))
        self.fingerprint = fingerprint(as_answer(text.encode()))

    def folders(self, topics):
        for topic in topics:
            ports = self._ports.get(topic, ())
            yield topic, f"{topic}={sorted(ports)}".encode() if ports else b""

    def snapshot(self, topic, folder):
        self._made.append(topic)
        instances = tuple(Instance(Host("10.0.0.1", port)) for port in self._ports.get(topic, ()))
        return Snapshot(topic, instances, "kv", version=self.index)


class Poll:
    """Plays what is scripted for one folder: (index, {topic: ports}), an error, or what to do while
    it waits, with one of these as its result."""

    received_bytes = 0

    def __init__(self, kv, watched):
        self.kv, self.watched = kv, watched
        self.is_interrupted = self.is_closed = False

    def poll(self, index, wait_seconds, at):
        self.kv.asked.append((self.watched, index, at))
        self.kv.waits.append(wait_seconds)
        event = self.kv.scripts[self.watched].pop(0)
        if callable(event):
            event = event()
        if self.is_interrupted or self.is_closed:
            self.is_interrupted = False
            raise Unavailable("given up")
        if isinstance(event, Exception):
            self.received_bytes = MAX_ANSWER_BYTES if isinstance(event, TooLarge) else 0
            raise event
        return Polled(*event, self.kv.made)

    def fingerprint_of(self, folder):
        return fingerprint(as_answer(folder))

    def interrupt(self):
        self.is_interrupted = True

    def close(self):
        self.is_closed = True


class Kv:
    can_watch_all = True

    def __init__(self, consistency="default"):
        self.is_confirmed_by_leader = consistency != "stale"
        self.scripts = {}
        self.asked, self.waits, self.made, self.polls = [], [], [], {}
        self.route = HERE
        self.routes = []  # what confirmations bring first
        self.confirmed_by = []
        self.is_closed = False

    def watch(self, topic):
        self.polls[topic] = Poll(self, topic)
        return self.polls[topic]

    def confirmer(self):
        return self

    def confirm(self, topic, timeout_seconds):
        self.confirmed_by.append(topic)
        event = self.routes.pop(0) if self.routes else self.route
        if isinstance(event, Exception):
            raise event
        return event

    def close(self):
        self.is_closed = True


class Cache:
    """Has these topics in use, and keeps what it is offered."""

    def __init__(self, *topics):
        self.in_use = topics
        self.offers = []  # (topic, ports, taken_at)
        self.held = {}  # topic -> (ports, freshness)
        self.versions = {}

    def topics_in_use(self):
        return self.in_use

    def known_version(self, topic):
        return self.versions.get(topic, 0)

    def offer(self, topic, snapshot, freshness):
        ports = [host.port for host in snapshot]
        self.offers.append((topic, ports, snapshot.taken_at))
        self.held[topic] = ports, freshness
        self.versions[topic] = snapshot.version

    @property
    def told(self):
        return [(topic, ports) for topic, ports, _ in self.offers]

    def fresh_until(self, topic):
        return self.held[topic][1].fresh_until

    def ports(self, topic):
        return self.held[topic][0]


class World:
    """A watcher whose threads move by hand: `plan` is one step of the watcher's own, `poll` of the
    query of a topic's folder, or of the prefix."""

    def __init__(self, *topics, **settings):
        self.clock, self.cache = ManualClock(), Cache(*topics)
        self.kv = Kv(settings.get("consistency", "default"))
        self.cpu = 0.0
        self.watcher = Watcher(
            self.kv,
            self.cache,
            kv(**settings),
            clock=self.clock,
            jitter=lambda: 0.5,
            cpu_clock=self._cpu_clock,
            make_worker=StillWorker,
        )

    def _cpu_clock(self):
        self.cpu += self.work_seconds
        return self.cpu

    work_seconds = 0.0

    def plan(self):
        return self.watcher.step()

    def poll(self, watched=PREFIX, *events):
        """One step of the query for each of *events*, a second apart; returns its last pause."""
        self.kv.scripts.setdefault(watched, []).extend(events)
        pause = None
        for _ in events:
            watch = self.watcher._watches[watched]
            watch.rests_until = -math.inf
            pause = watch.step()
            self.clock.advance(1)
        return pause

    def confirmed(self, result):
        """What a poll does that waits long enough to be confirmed, and brings *result* then."""

        def wait():
            self.clock.advance(TTL_SECONDS)
            self.plan()
            self.clock.advance(SETTLE_SECONDS)
            self.plan()
            return result

        return wait

    @property
    def watched(self):
        return list(self.watcher._watches)


def world(*topics, **settings):
    """One that has planned and confirmed once."""
    made = World(*topics, **settings)
    made.plan()
    return made


# -- what is told ---------------------------------------------------------------------------------


def test_a_topic_in_use_is_watched_and_each_answer_tells_its_change():
    """The first poll asks at once, the others wait for something newer than the last answer."""
    one = world("t")
    one.poll("t", (7, {"t": [1]}), (9, {"t": [1, 2]}), (12, {}))
    assert one.cache.told == [("t", [1]), ("t", [1, 2]), ("t", [])]
    assert one.kv.asked == [("t", 0, HERE.agent), ("t", 7, HERE.agent), ("t", 9, HERE.agent)]
    assert all(0.8 * MAX_WAIT_SECONDS <= wait <= MAX_WAIT_SECONDS for wait in one.kv.waits)


def test_nothing_is_watched_that_nobody_uses():
    """Without a topic in use nothing is asked, and nobody comes again by himself."""
    one = world()
    assert one.plan() is None
    assert (one.kv.asked, one.kv.confirmed_by, one.watched) == ([], [], [])


def test_what_did_not_change_is_not_offered_and_is_fresh_again():
    """An answer that confirms the last one costs the cache nothing."""
    one = world("t")
    one.poll("t", (7, {"t": [1]}))
    asked_at = one.clock()
    one.poll("t", (7, {"t": [1]}))
    assert one.cache.told == [("t", [1])]
    assert one.cache.fresh_until("t") == asked_at + FRESH_SECONDS


@pytest.mark.finding("A1")
def test_an_offer_is_as_old_as_its_poll():
    """A poll that was under way for long, its agent suspended, makes nothing fresh: its answer may
    be from when it was sent."""
    one = world("t")
    sent_at = one.clock()

    def suspended():
        one.clock.advance(100)
        return 7, {"t": [1]}

    one.poll("t", suspended)
    assert one.cache.offers == [("t", [1], sent_at)]
    assert one.cache.fresh_until("t") == sent_at + FRESH_SECONDS


def test_what_the_cache_learned_otherwise_is_told_again():
    """A topic that was asked for meanwhile is not left out of the watch for ever."""
    one = world("t")
    one.poll("t", (7, {"t": [1]}))
    one.cache.versions["t"] = 8
    one.poll("t", (9, {"t": [1]}), (9, {"t": [1]}))
    assert one.cache.told == [("t", [1]), ("t", [1])]
    assert one.kv.made == ["t"], "and not taken apart again"


# -- confirmations --------------------------------------------------------------------------------


def test_a_query_that_waits_is_confirmed_by_a_small_question():
    """Everything it told is fresh again, as of when the confirmation was sent."""
    one = world("t", "u")
    one.poll("t", (7, {"t": [1]}))
    one.poll("u", (8, {"u": [2]}))
    sent_at = one.clock() + TTL_SECONDS
    one.poll("t", one.confirmed((9, {"t": [1, 3]})))
    assert one.cache.offers[-1] == ("t", [1, 3], sent_at)
    assert one.cache.fresh_until("t") == sent_at + FRESH_SECONDS
    assert one.cache.fresh_until("u") < sent_at + TTL_SECONDS, "that one did not wait"


def test_one_confirmation_a_ttl_serves_all_queries():
    """However many wait."""
    one = world("t", "u")
    one.poll("t", (7, {"t": [1]}))
    one.poll("u", (8, {"u": [2]}))
    one.kv.confirmed_by.clear()

    def wait():
        one.poll("u", one.confirmed((8, {"u": [2]})))
        return 7, {"t": [1]}

    one.poll("t", wait)
    assert len(one.kv.confirmed_by) == 1
    assert one.cache.fresh_until("t") == one.cache.fresh_until("u")


def test_an_answer_that_was_under_way_is_not_confirmed():
    """A query that ended before the confirmation settled may have waited to be read: what it told
    before was perhaps not so any more."""
    one = world("t")
    first_at = one.clock()
    one.poll("t", (7, {"t": [1]}))

    def wait():
        one.clock.advance(TTL_SECONDS)
        one.plan()
        return 8, {"t": [2]}

    one.poll("t", wait)
    one.clock.advance(SETTLE_SECONDS)
    one.plan()
    assert one.cache.offers[-1][2] == first_at + 1, "when that poll was sent"
    assert one.cache.fresh_until("t") == first_at + 1 + FRESH_SECONDS


@pytest.mark.parametrize("route", [OTHER_LEADER, OTHER_AGENT])
def test_where_another_leads_or_answers_queries_are_asked_anew(route, caplog):
    """They may hang where nothing changes any more: they are not confirmed, but asked there."""
    one = world("t")
    one.poll("t", (7, {"t": [1]}))
    before = one.cache.fresh_until("t")
    one.kv.route = route
    one.poll("t", one.confirmed((99, {"t": [99]})), one.confirmed((8, {"t": [2]})))
    assert one.kv.asked[-1] == ("t", 7, route.agent)
    assert one.cache.told == [("t", [1]), ("t", [2])], "and nothing of what they would have said"
    assert one.cache.fresh_until("t") > before
    assert caplog.records == [], "that is no loss"


def test_a_leader_that_was_seen_by_the_second_confirmation_only_confirms_nothing():
    """A query that was sent while another led is not confirmed, whoever leads now."""
    one = world("t")
    one.poll("t", (7, {"t": [1]}))
    before = one.cache.fresh_until("t")
    one.kv.routes = [OTHER_LEADER]  # and then the first one again
    one.poll("t", one.confirmed((7, {"t": [1]})))
    assert one.cache.fresh_until("t") == before
    one.poll("t", one.confirmed((7, {"t": [1]})))
    assert one.cache.fresh_until("t") == before, "that one was sent while the other led"


def test_a_silent_leader_makes_answers_stale_in_time(caplog):
    """Confirmations that fail are tried again ever later, said once, and nothing is fresh longer
    than promised; when they come again the query is asked anew with its index, and is confirmed."""
    caplog.set_level(logging.INFO)
    one = world("t")
    asked_at = one.clock()
    one.poll("t", (7, {"t": [1]}))
    pauses = []

    def wait():
        one.clock.advance(TTL_SECONDS)
        one.kv.routes = [Unavailable("silent")] * 12
        while one.kv.routes:
            pauses.append(one.plan())
            assert one.cache.fresh_until("t") == asked_at + FRESH_SECONDS
            one.clock.advance(pauses[-1])
        one.plan()
        return 7, {"t": [1]}

    assert one.poll("t", wait) == 0.0
    one.poll("t", one.confirmed((7, {"t": [1]})))
    assert one.kv.asked[-1] == ("t", 7, HERE.agent)
    assert one.cache.fresh_until("t") > one.clock()
    assert max(pauses) == MAX_RETRY_SECONDS * 0.5  # the jitter here
    messages = [record.getMessage() for record in caplog.records]
    assert messages[0] == "watch lost, asking for each topic meanwhile: silent"
    assert messages[1].startswith("watching again after ") and len(messages) == 2


def test_a_confirmation_after_one_that_failed_proves_nothing_of_what_waited_before():
    """The agent asks by another server then, and the same leader answers, while the query hangs at
    one that is frozen."""
    one = world("t")
    one.poll("t", (7, {"t": [1]}))
    before = one.cache.fresh_until("t")

    def hang():
        one.clock.advance(TTL_SECONDS)
        one.kv.routes = [Unavailable("hangs")]
        one.plan()
        one.clock.advance(MAX_RETRY_SECONDS)
        return one.confirmed((99, {"t": [99]}))()

    one.poll("t", hang)
    assert (one.cache.told, one.cache.fresh_until("t")) == ([("t", [1])], before)
    one.poll("t", (8, {"t": [2]}))
    assert one.kv.asked[-1] == ("t", 7, HERE.agent)
    assert one.cache.ports("t") == [2]


def test_a_confirmation_after_a_poll_that_failed_proves_nothing_of_others_that_waited():
    """They wait at the same server as that one, perhaps; and whatever was about to prove them."""
    one = world("t", "u")
    one.poll("t", (7, {"t": [1]}))
    one.poll("u", (8, {"u": [2]}))
    before = one.cache.fresh_until("t")

    def hang():
        one.clock.advance(TTL_SECONDS)
        one.plan()  # confirmed, and not settled
        one.poll("u", Unavailable("reset"))
        return one.confirmed((99, {"t": [99]}))()

    one.poll("t", hang)
    assert (one.cache.told[-1], one.cache.fresh_until("t")) == (("u", [2]), before)
    one.poll("t", (9, {"t": [3]}))
    assert one.kv.asked[-1] == ("t", 7, HERE.agent)
    assert one.cache.ports("t") == [3]


def test_nothing_is_polled_while_nobody_knows_by_which_way():
    """Until a confirmation was answered, a query rests; then it is sent to that agent."""
    one = World("t")
    one.kv.routes = [Unavailable("away")]
    one.plan()
    assert one.poll("t", (7, {"t": [1]})) is None
    assert one.kv.asked == []
    one.clock.advance(MAX_RETRY_SECONDS)
    one.plan()
    one.poll("t", (8, {"t": [1]}))
    assert one.kv.asked == [("t", 0, HERE.agent)]


def test_a_topic_that_may_not_be_read_does_not_keep_others_from_being_confirmed():
    """A confirmation is refused where the topic is: another topic is tried."""
    one = World("t", "u")
    one.kv.routes = [Denied("not t")]
    one.plan()
    one.clock.advance(MAX_RETRY_SECONDS)
    one.plan()
    assert one.kv.confirmed_by == ["t", "u"]


def test_stale_reads_are_not_confirmed_but_asked_again_in_time():
    """With consistency=stale no server's answer proves another's: each poll waits so briefly that
    the next answer comes before the last one runs out."""
    one = world("t", consistency="stale")
    one.poll("t", (7, {"t": [1]}))
    asked_at = one.clock()

    def wait():
        one.clock.advance(one.kv.waits[-1] * (1 + 1 / 16))
        return 7, {"t": [1]}

    one.poll("t", wait)
    assert one.clock() - 1 < asked_at - 1 + FRESH_SECONDS
    assert one.kv.confirmed_by == []
    assert one.kv.asked[-1] == ("t", 7, None)
    assert max(one.kv.waits) * (1 + 1 / 16) * 2 < FRESH_SECONDS
    one.poll("t", Unavailable("x"), (8, {"t": [2]}))
    assert one.cache.ports("t") == [2]


@pytest.mark.parametrize(
    ("values", "near"),
    [({}, "_agent"), ({"near": "n1"}, "n1"), ({"consistency": "cached"}, None)],
)
def test_a_poll_of_service_mode_waits_where_a_confirmation_proves_something(values, near):
    """At the leader, and not for what an agent of 1.10 or later is streamed by any server; where
    nothing is confirmed that is no matter, nor is it in a question that does not wait."""
    asked = []

    class Api:
        def line(self):
            return None

        def call(self, method, path, params, **how):
            asked.append(params.get("near"))
            return Answer(200, b"[7]", 7, False, path)

    settings = Settings.from_mapping({"mode": "service", **values}, {})
    reader = Reader(Api(), settings)
    poll = ServicePoll(reader, "t", "")
    poll.poll(0, 25, None)
    poll.poll(7, 25, None)
    reader.ask("t")
    assert asked == [near, near, settings.near]


# -- losses and doubts ----------------------------------------------------------------------------


def test_a_loss_is_told_at_once_and_logged_once(caplog):
    """However many polls fail in a row; back, all is told again, with another freshness: what was
    learned otherwise meanwhile does not count as told."""
    caplog.set_level(logging.INFO)
    one = world("t")
    one.poll("t", (7, {"t": [1]}))
    before = one.cache.held["t"][1]
    for error in (Unavailable("gone"), Denied("no"), Unavailable("gone")):
        one.poll("t", error)
        assert before.fresh_until == -math.inf
        one.clock.advance(MAX_RETRY_SECONDS)
        one.plan()
    one.poll("t", (7, {"t": [1]}))
    assert one.cache.told == [("t", [1])] * 2
    assert one.cache.held["t"][1] is not before
    assert one.cache.fresh_until("t") > one.clock()
    assert before.fresh_until == -math.inf
    assert [index for _, index, _ in one.kv.asked] == [0, 7, 0, 0, 0]
    messages = [record.getMessage() for record in caplog.records]
    assert messages[0] == "watch lost, asking for each topic meanwhile: gone"
    assert messages[1].startswith("watching again after ") and len(messages) == 2


def test_failures_are_retried_ever_later():
    """Pauses after failures grow to a bound, so that a dead agent is not hammered; and each failure
    has the way looked for anew."""
    one = world("t")
    pauses = []
    for _ in range(12):
        pauses.append(one.poll("t", Unavailable("x")))
        one.plan()
    assert pauses == sorted(pauses)
    assert pauses[0] >= MIN_GAP_SECONDS
    assert pauses[-1] == MAX_RETRY_SECONDS * 0.5  # the jitter here
    assert len(one.kv.confirmed_by) == 13


def test_a_pause_is_not_cut_short_by_being_woken():
    """Whoever is woken during it rests for what is left."""
    one = world("t")
    pause = one.poll("t", TooLarge("x"))
    assert one.watcher._watches["t"].step() == pytest.approx(pause - 1)
    assert len(one.kv.asked) == 1


def test_a_topic_that_cannot_exist_rests_for_long(caplog):
    """Whoever asks for it is told so; others are watched, and nothing is said to be lost."""
    one = world("t", "u")
    one.poll("t", (7, {"t": [1]}))
    assert one.poll("u", InvalidTopic("no service has this name")) == INVALID_SECONDS
    one.poll("t", one.confirmed((8, {"t": [2]})))
    assert one.kv.asked[-1] == ("t", 7, HERE.agent)
    assert one.cache.fresh_until("t") > one.clock()
    assert one.watcher._watches["u"].sent is None
    assert caplog.records == []


def test_a_lying_server_is_not_passed_on(caplog):
    """Index 1 and nothing at all, right after a good answer, is asked again before it counts."""
    one = world("t")
    lie = 1, {}
    one.poll("t", (9, {"t": [1]}))
    assert [one.poll("t", lie) for _ in range(3)] == [DOUBT_GAP_SECONDS] * 3
    one.poll("t", (9, {"t": [1]}))
    assert one.cache.told == [("t", [1])]
    assert [index for _, index, _ in one.kv.asked] == [0, 9, 0, 0, 0]
    assert len(caplog.records) == 1


def test_a_lie_that_stays_is_the_truth():
    """What is repeated for confirm_empty_seconds is believed: Consul's data were wiped."""
    one = world("t")
    one.poll("t", (9, {"t": [1]}), *[(1, {})] * 8)
    assert one.cache.told == [("t", [1]), ("t", [])]


def test_a_first_answer_that_is_older_than_what_is_known_is_doubted():
    """Also by a query that has told nothing yet."""
    one = World("t")
    one.cache.versions["t"] = 9
    one.plan()
    one.poll("t", (1, {}))
    assert one.cache.told == []
    one.poll("t", (9, {"t": [1]}))
    assert one.cache.told == [("t", [1])]


# -- many topics, and the way there and back ------------------------------------------------------

FOUR = ("a", "b", "c", "d")
FIVE = (*FOUR, "e")
SIX = (*FIVE, "f")


def ports(index, topics=SIX):
    return index, {topic: [index] for topic in topics}


def test_above_max_watches_one_query_serves_all():
    """It takes apart and tells only what is in use, and of that only what changed."""
    one = world(*SIX)
    assert one.watched == [PREFIX]
    one.poll(PREFIX, (5, {topic: [5] for topic in (*SIX, "stranger")}))
    assert sorted(one.kv.made) == list(SIX)
    one.poll(PREFIX, (6, {topic: [5] for topic in SIX} | {"b": [6], "stranger": [6]}))
    assert one.cache.told[len(SIX) :] == [("b", [6])]
    assert one.kv.made[len(SIX) :] == ["b"]
    freshness = {id(one.cache.held[topic][1]) for topic in SIX}
    assert len(freshness) == 1


def test_a_new_topic_is_told_with_the_next_answer_of_the_prefix():
    """Nothing is interrupted for it."""
    one = world(*SIX)
    one.poll(PREFIX, ports(5))
    one.cache.in_use = (*SIX, "g")
    one.plan()
    one.poll(PREFIX, (5, {topic: [5] for topic in (*SIX, "g")}))
    assert one.cache.told[-1] == ("g", [5])
    assert one.kv.asked[-1][1] == 5


def test_a_topic_out_of_use_is_told_of_for_the_last_time():
    """With the next answer of the prefix, as it is then; what is confirmed later does not count for
    it, as its changes are not told.  Back in use it is told anew."""
    one = world(*SIX)
    one.poll(PREFIX, ports(5))
    one.cache.in_use = FIVE
    one.plan()
    assert one.cache.fresh_until("f") > one.clock(), "a change would be told"
    one.poll(PREFIX, ports(6))
    assert one.cache.ports("f") == [6]
    assert one.cache.fresh_until("f") == -math.inf
    one.poll(PREFIX, ports(7))
    assert one.cache.ports("f") == [6]
    one.cache.in_use = SIX
    one.poll(PREFIX, (8, ports(7)[1]))
    assert one.cache.ports("f") == [7]
    assert one.cache.fresh_until("f") > one.clock()


def test_from_four_topics_to_six_and_back_no_change_is_lost():
    """Until the new queries have answered the old ones go on, but for the one whose place is
    needed; each topic is then told of by the query that lives."""
    one = world(*FOUR)
    for topic in FOUR:
        one.poll(topic, (5, {topic: [5]}))
    one.cache.in_use = SIX
    one.plan()
    assert one.watched == ["b", "c", "d", PREFIX]
    assert one.cache.fresh_until("a") == -math.inf, "asked for by itself meanwhile"
    one.poll("b", (6, {"b": [6]}))
    one.poll(PREFIX, (6, {topic: [5] for topic in SIX} | {"b": [6]}))
    assert one.cache.ports("b") == [6]
    # What the old query says late, and the new one does not know, is not told.
    one.poll("b", (5, {"b": [4]}))
    assert one.cache.ports("b") == [6]
    one.plan()
    assert one.watched == [PREFIX]
    assert {topic: one.cache.ports(topic) for topic in SIX} == {
        topic: [6 if topic == "b" else 5] for topic in SIX
    }
    assert all(one.cache.fresh_until(topic) > one.clock() for topic in SIX)
    one.poll(PREFIX, (7, ports(7)[1]))

    one.cache.in_use = FOUR
    one.plan()
    one.clock.advance(FIT_SECONDS)
    one.plan()
    assert one.watched == [PREFIX, "a", "b", "c"]
    one.poll("a", (7, {"a": [7]}))
    one.poll(PREFIX, (8, ports(8)[1]))
    assert one.cache.ports("a") == [7], "which the new query tells of"
    one.poll("a", (8, {"a": [8]}))
    one.plan()
    assert one.watched == ["a", "b", "c", "d"]
    for topic in "bcd":
        one.poll(topic, (8, {topic: [8]}))
    assert {topic: one.cache.ports(topic) for topic in FOUR} == {topic: [8] for topic in FOUR}
    assert all(one.cache.fresh_until(topic) > one.clock() for topic in FOUR)


def test_an_answer_older_than_what_another_query_told_is_not_told():
    """A new query's first answer may be from before the old one's last: its next poll shows it."""
    one = world(*SIX)
    one.poll(PREFIX, ports(5))
    one.cache.in_use = FOUR
    one.plan()
    one.clock.advance(FIT_SECONDS)
    one.plan()

    def answered_before():
        one.poll(PREFIX, ports(8))
        return 7, {"a": [7]}

    one.poll("a", answered_before)
    assert one.cache.ports("a") == [8]
    one.poll("a", (8, {"a": [8]}), (9, {"a": [9]}))
    assert one.cache.told[-2:] == [("a", [8]), ("a", [9])]


def test_a_topic_out_of_use_is_watched_no_more():
    """Its query ends, and nothing of it is kept."""
    one = world("t", "u")
    one.poll("t", (7, {"t": [1]}))
    poll = one.kv.polls["t"]
    one.cache.in_use = ("u",)
    one.plan()
    assert one.watched == ["u"]
    assert poll.is_closed
    assert one.cache.fresh_until("t") == -math.inf
    one.plan()
    assert one.watcher._told == {}


def test_an_agent_with_too_many_connections_gets_fewer():
    """Status 429 ends half of the queries; the topics are asked for by themselves."""
    one = world(*FOUR)
    for topic in FOUR:
        one.poll(topic, (5, {topic: [5]}))
    one.poll("c", Overloaded("429"))
    one.plan()
    assert one.watched == ["a", "b"]
    one.kv.routes = [Overloaded("429")]
    one.clock.advance(TTL_SECONDS)
    one.plan()
    one.plan()
    assert one.watched == ["a"]


# -- what it may cost -----------------------------------------------------------------------------


def test_costly_answers_are_asked_for_less_often():
    """What an answer costs in processor time decides the rest after it, however much that is; all
    queries share the bound."""
    one = world(*SIX)
    one.work_seconds = 0.05
    assert one.poll(PREFIX, ports(5)) == pytest.approx(0.45)
    one.work_seconds = 60
    assert one.poll(PREFIX, ports(6)) == pytest.approx(540)
    one = world(*FOUR)
    one.work_seconds = 0.05
    assert one.poll("a", (5, {"a": [5]})) == pytest.approx(0.05 * (40 - 1))


def test_what_others_do_during_the_wait_is_no_cost_of_the_watch():
    """Under eventlet all threads are one, and its processor time is that of the whole program."""
    one = world(*SIX)

    def wait():
        one.cpu += 60  # what the program does meanwhile
        return ports(5)

    assert one.poll(PREFIX, wait) == pytest.approx(MIN_GAP_SECONDS)


def test_big_answers_are_asked_for_less_often():
    """200 kB rest a fifth of a second, 60 MB a minute: the share of the network is bounded."""
    one = world(*SIX)
    one.kv.polls[PREFIX].received_bytes = 200_000
    assert one.poll(PREFIX, ports(5)) == 0.2
    one.kv.polls[PREFIX].received_bytes = 60_000_000
    assert one.poll(PREFIX, ports(6)) == 60


@pytest.mark.finding("E10")
def test_polls_that_fail_for_their_size_count_in_the_bound():
    """A prefix too big to be read costs what was read of it: the average stays below the bound,
    ever less is read, and some topics are watched by themselves meanwhile."""
    one = world(*SIX)
    began, received = one.clock(), 0
    for _ in range(20):
        one.poll(PREFIX, TooLarge("the answer is too big"))
        received += MAX_ANSWER_BYTES
        one.plan()
        assert one.watched == list(FOUR)
        one.clock.now = one.watcher._plan.tried_again_at
        for _ in FOUR:
            one.plan()
        assert PREFIX in one.watched
    assert received / (one.clock() - began) <= BYTES_PER_SECOND / 10


@pytest.mark.finding("E10")
def test_a_folder_too_big_to_be_read_rests_as_long_as_its_size_says():
    """The first failure already."""
    one = world("t")
    assert one.poll("t", TooLarge("too big")) >= MAX_ANSWER_BYTES / BYTES_PER_SECOND


@pytest.mark.finding("E16")
def test_an_agent_that_does_not_wait_is_not_asked_in_a_loop():
    """The same answer before its wait is over rests ever longer; after the wait it is no fault."""
    one = world("t")
    pauses = [one.poll("t", (7, {"t": [1]})) for _ in range(8)]
    assert pauses == sorted(pauses)
    assert pauses[-1] == MAX_IDLE_GAP_SECONDS

    def wait():
        one.clock.advance(MAX_WAIT_SECONDS)
        return 7, {"t": [1]}

    assert [one.poll("t", wait) for _ in range(8)] == [MIN_GAP_SECONDS] * 8


# -- threads --------------------------------------------------------------------------------------


class WaitingPoll:
    """Answers the first poll; the next one waits until it is given up."""

    received_bytes = 0

    def __init__(self, kv):
        self.kv = kv
        self.is_waiting, self.ended = threading.Event(), threading.Event()

    def poll(self, index, wait_seconds, at):
        if index == 0:
            return Polled(7, {"t": [1]}, [])
        self.is_waiting.set()
        assert self.ended.wait(30)
        raise Unavailable("given up")

    def close(self):
        if self.kv.can_be_given_up:
            self.ended.set()


class WaitingKv(Kv):
    can_be_given_up = True

    def watch(self, topic):
        self.polls[topic] = WaitingPoll(self)
        return self.polls[topic]


@pytest.fixture
def watching():
    """A watcher with threads, whose query waits."""
    kv, cache = WaitingKv(), Cache("t")
    watcher = Watcher(kv, cache, Settings(mode="kv"))
    watcher.watch_more()
    deadline = time.monotonic() + 10
    while "t" not in kv.polls and time.monotonic() < deadline:
        threading.Event().wait(0.001)
    assert kv.polls["t"].is_waiting.wait(10)
    yield watcher, kv, cache
    kv.polls["t"].ended.set()
    assert watcher.close(10)


def threads():
    """Names of the threads of watchers."""
    names = ("consul-matchmaker-watcher", "consul-matchmaker-poll")
    return {thread.name for thread in threading.enumerate() if thread.name.startswith(names)}


def test_close_ends_a_poll_that_waits(watching, caplog):
    """close() returns soon although a poll would wait for long; the end is no loss."""
    watcher, kv, cache = watching
    assert threads() == {"consul-matchmaker-watcher", "consul-matchmaker-poll-1"}
    assert watcher.status()["is_watching"] is True
    started = time.monotonic()
    assert watcher.close(10)
    assert time.monotonic() - started < 5
    assert threads() == set()
    assert cache.told == [("t", [1])]
    assert caplog.records == []
    assert kv.is_closed
    watcher.watch_more()
    assert threads() == set()


def test_close_returns_in_time_even_if_the_poll_does_not_end(watching):
    """A poll that cannot be woken is abandoned: close says so, within its timeout."""
    watcher, kv, _ = watching
    kv.can_be_given_up = False
    started = time.monotonic()
    assert not watcher.close(0.05)
    assert time.monotonic() - started < 5


def test_a_topic_that_comes_into_use_wakes_the_planner(watching):
    """So it is watched at once."""
    watcher, kv, cache = watching
    cache.in_use = ("t", "u")
    watcher.watch_more()
    deadline = time.monotonic() + 3
    while "u" not in kv.polls and time.monotonic() < deadline:
        threading.Event().wait(0.001)
    assert "u" in kv.polls
    assert kv.polls["u"].is_waiting.wait(10)
    assert threads() == {"consul-matchmaker-watcher"} | {
        f"consul-matchmaker-poll-{slot}" for slot in (1, 2)
    }
    kv.polls["u"].ended.set()


def test_a_query_whose_thread_does_not_end_keeps_its_place():
    """So threads never grow: the next one starts when it has ended."""
    one = world("t")
    worker = one.watcher._watches["t"].worker
    worker.stop = lambda seconds: False
    one.cache.in_use = ("u", "v", "w", "x")
    one.plan()
    assert one.watched == ["u", "v", "w"]
    del worker.stop
    one.plan()
    assert one.watched == ["u", "v", "w", "x"]


def test_no_thread_to_be_had_is_made_up_for_later(caplog):
    """The topic is asked for by itself until then."""
    one = World("t")
    made = one.watcher.make_worker

    class Refused(StillWorker):
        def start(self):
            raise Unavailable("no thread can be started")

    one.watcher.make_worker = Refused
    assert one.plan() > 0
    assert (one.watched, len(caplog.records)) == ([], 1)
    one.watcher.make_worker = made
    one.plan()
    assert one.watched == ["t"]


# -- looked at from outside -----------------------------------------------------------------------


def test_status_says_where_the_watch_stands():
    """Status tells the plan, answers, their age and index, failures and doubt."""
    one = world("t")
    one.poll("t", (9, {"t": [1]}), (9, {"t": [1]}))
    assert one.watcher.status() == {
        "is_watching": True,
        "plan": "folders",
        "watches": 1,
        "answers": 2,
        "answer_age_seconds": 1.0,
        "index": 9,
        "is_doubting": False,
        "failures": 0,
    }
    one.poll("t", (1, {}))
    assert one.watcher.status()["is_doubting"]
    assert "Watcher" in repr(one.watcher) and "doubt" in repr(one.watcher._watches["t"])
    assert world(*SIX).watcher.status()["plan"] == "prefix"
