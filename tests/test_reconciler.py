"""Tests of the reconciler: the table, the rules of the reconciler, and random histories."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from consul_matchmaker.errors import Closed, Denied, LeaseLost, TimedOut, Unavailable
from consul_matchmaker.model import Held, Host, Lease, Registration, ServiceOptions
from consul_matchmaker.registrations.reconciler import (
    ASKED_RENEWAL_SECONDS,
    TRANSITIONS,
    Action,
    Call,
    Event,
    ImpossibleEvent,
    Kind,
    Note,
    Open,
    Outcome,
    Publish,
    Reconciler,
    Release,
    Renew,
    State,
    Stop,
    Wait,
    Withdraw,
)

TTL = 9.0
INTERVAL = TTL / 3
A = Registration("scheduler", Host("10.0.0.5", 9501))
B = Registration("conductor", Host("10.0.0.5", 9501))
C = Registration("scheduler", Host("10.0.0.5", 9501), server="node7")


class Consul:
    """What the other side holds, and how it answers: a Consul of a few lines."""

    def __init__(self) -> None:
        self.leases: dict[str, set[Registration]] = {}
        self.count = 0
        self.answer = "yes"
        self.late: list[Callable[[], Outcome]] = []  # arrives after the caller gave up
        self.unchecked: set[Registration] = set()  # a renewal finds nothing out about them

    def carry_out(self, call: Call) -> Outcome:
        match self.answer, call:
            case (("fails renewing" | "fails renewing, hangs publishing"), Renew()):
                return Unavailable("status 500")
            case ("hanging", _) | ("fails renewing, hangs publishing", _):
                return TimedOut("no answer")
            case "silent", _:  # did nothing, and did not say so
                return Unavailable("connection refused")
            case ("denied", _) | ("denies publishing", Publish()):
                return Denied("token refused")
            case "fails C", Publish(_, registration) if registration == C:
                return Unavailable("HTTP 500")
            case "deaf", _:  # did it, but the answer was lost
                self._do(call)
                return Unavailable("timed out")
            case "late", _:  # will do it, some time
                self.late.append(lambda: self._do(call))
                return Unavailable("timed out")
        return self._do(call)

    def _do(self, call: Call) -> Outcome:
        if isinstance(call, Open):
            self.count += 1
            lease = Lease(f"lease-{self.count}", TTL)
            self.leases[lease.id] = set()
            return lease
        if isinstance(call, Release):
            self.leases.pop(call.lease.id, None)
            return None
        held = self.leases.get(call.lease.id)
        if isinstance(call, Withdraw):
            if held is not None:
                held.discard(call.registration)
            return None
        if held is None:  # as the KV store does: only a renewal says that the lease is gone
            return LeaseLost("gone") if isinstance(call, Renew) else Unavailable("HTTP 500")
        if isinstance(call, Publish):
            held.add(call.registration)
            return None
        if self.answer == "checks nothing":
            return Held.of((), held)
        return Held.of(held - self.unchecked, self.unchecked)

    @property
    def visible(self) -> set[Registration]:
        return set().union(*self.leases.values())


class Play:
    """A reconciler, the Consul of above, and a clock that only moves when told."""

    def __init__(self, jitter: Callable[[], float] = lambda: 0.5) -> None:
        self.consul = Consul()
        self.reconciler = Reconciler(TTL, jitter)
        self.now = 100.0
        self.calls: list[Call] = []
        self.notes: list[Note] = []

    def want(self, *registrations: Registration) -> None:
        for each in registrations:
            self.reconciler.want(each, self.now)

    def unwant(self, *registrations: Registration) -> None:
        for each in registrations:
            self.reconciler.unwant(each, self.now)

    def step(self) -> Action:
        action = self.reconciler.next_action(self.now)
        if not isinstance(action, Wait | Stop):
            self.calls.append(action)
            self.reconciler.handle(self.consul.carry_out(action), self.now, action)
        self.notes += self.reconciler.take_notes()
        return action

    def run(self) -> float | None:
        """Do all there is to do now; return the seconds until there is more."""
        for _ in range(100):
            action = self.step()
            if isinstance(action, Wait):
                return action.seconds
            if isinstance(action, Stop):
                return None
        raise AssertionError(f"never comes to rest: {self.calls[-5:]}")

    def run_for(self, seconds: float) -> None:
        until = self.now + seconds
        for _ in range(10_000):
            pause = self.run()
            if pause is None or self.now + pause > until:
                self.now = until
                return
            self.now += pause
        raise AssertionError("busy loop")

    def run_for_many(self, seconds: float) -> None:
        """As `run_for`, however much there is to do."""
        until = self.now + seconds
        while not isinstance(action := self.step(), Stop):
            if isinstance(action, Wait):
                if action.seconds is None or self.now + action.seconds > until:
                    self.now = until
                    return
                self.now += action.seconds

    def take_calls(self) -> list[str]:
        calls, self.calls = self.calls, []
        return [type(call).__name__ for call in calls]

    def take_notes(self) -> list[Kind]:
        notes, self.notes = self.notes, []
        return [note.kind for note in notes]

    @property
    def state(self) -> State:
        return self.reconciler.state

    def is_in(self, state: State) -> bool:
        return self.reconciler.state is state


@pytest.fixture
def play() -> Play:
    return Play()


@pytest.fixture
def held(play: Play) -> Play:
    """A and B are published and all is quiet."""
    play.want(A, B)
    play.run()
    play.take_calls()
    play.take_notes()
    return play


# --- the table


CELLS = [(state, event) for state in State for event in Event]


EXPECTED = """
            WANTED   UNWANTED OPENED  CONFIRMED FAILED  GONE   RELEASED CLOSE
    IDLE    OPENING  -        -       -         -       -      -        CLOSED
    OPENING -        IDLE     HELD    -         OPENING -      -        CLOSING
    HELD    -        -        -       HELD      SUSPECT LOST   IDLE     CLOSING
    SUSPECT -        -        -       HELD      SUSPECT LOST   IDLE     CLOSING
    LOST    -        IDLE     HELD    -         LOST    -      -        CLOSING
    CLOSING -        -        CLOSING CLOSING   CLOSING CLOSED CLOSED   CLOSING
    CLOSED  -        -        -       -         -       -      -        CLOSED
"""


@pytest.mark.parametrize(("state", "event"), CELLS)
def test_every_cell_of_the_table(state: State, event: Event) -> None:
    """Each event leads where the picture above says, and what is not in it cannot happen."""
    header, *rows = (line.split() for line in EXPECTED.strip().splitlines())
    row = next(row for row in rows if row[0] == state.name)
    expected = row[1 + header.index(event.name)]
    reconciler = Reconciler(TTL, random.random)
    reconciler.state = state
    if expected == "-":
        with pytest.raises(ImpossibleEvent, match=f"{state}: {event.value}"):
            reconciler._on(event)
        assert reconciler.state is state
    else:
        reconciler._on(event)
        assert reconciler.state is State[expected]


def test_only_a_lost_lease_leads_to_lost() -> None:
    """No outage, refusal or deadline has a way to LOST: only Consul's word that it is gone."""
    ways = {
        event
        for state, row in TRANSITIONS.items()
        for event, to in row.items()
        if to is State.LOST and state is not State.LOST
    }
    assert ways == {Event.GONE}


# --- getting there


def test_nothing_wanted_nothing_done(play: Play) -> None:
    """Without a registration there is no lease, nothing to renew and nothing to wake up for."""
    assert play.step() == Wait(None)
    play.reconciler.ask_renewal(play.now)
    assert play.step() == Wait(None)
    assert (play.state, play.take_calls()) == (State.IDLE, [])


def test_all_registrations_share_one_lease(play: Play) -> None:
    """Three registrations in two topics: one lease, three publications, then rest."""
    play.want(A, B, C)
    play.run()
    assert play.take_calls() == ["Open", "Publish", "Publish", "Publish"]
    assert play.consul.leases == {"lease-1": {A, B, C}}
    assert play.state is State.HELD
    assert play.reconciler.is_published(A)
    assert play.take_notes() == [Kind.PUBLISHED] * 3


def test_registering_again_is_registering_once(held: Play) -> None:
    """register is idempotent, and one unregister takes it back."""
    held.want(A)
    held.run()
    assert held.take_calls() == []
    held.unwant(A)
    held.run()
    assert held.consul.visible == {B}


def test_consul_absent_at_the_start_is_only_a_delay(play: Play) -> None:
    """The opening is retried with growing, jittered pauses and then everything is published."""
    play.consul.answer = "silent"
    play.want(A)
    pauses = []
    for _ in range(6):
        pause = play.run()
        assert pause is not None
        pauses.append(pause)
        play.now += pause
    assert pauses == [0.25, 0.5, 1.0, 1.5, 1.5, 1.5]  # full jitter of 0.5 doubling to 3, drawn 0.5
    assert play.state is State.OPENING
    assert str(play.reconciler.error_of(A)) == "connection refused"
    assert play.reconciler.standing(A) == "pending"
    assert play.take_notes() == [Kind.UNREACHABLE]  # once, not six times
    play.consul.answer = "yes"
    play.run()
    assert play.consul.visible == {A}
    assert play.reconciler.error_of(A) is None
    assert play.take_notes() == [Kind.RECOVERED, Kind.PUBLISHED]


# --- staying there


def test_renews_three_times_a_ttl_and_a_little_early(held: Play) -> None:
    """Two renewals may fail before the lease runs out; the first is anywhere in the interval."""
    assert held.run() == pytest.approx(INTERVAL * 0.55)
    held.now += INTERVAL * 0.55
    assert held.run() == pytest.approx(INTERVAL * 0.95)
    assert held.take_calls() == ["Renew"]


def test_renewals_of_processes_started_together_drift_apart() -> None:
    """First renewals are spread over nine tenths of the interval, later ones over a tenth."""
    dice = random.Random(7)
    firsts, seconds = [], []
    for _ in range(200):
        play = Play(dice.random)
        play.want(A)
        first = play.run()
        assert first is not None
        play.now += first
        second = play.run()
        assert second is not None
        firsts.append(first)
        seconds.append(second)
    assert min(firsts) < 0.15 * INTERVAL and max(firsts) > 0.95 * INTERVAL
    assert min(seconds) >= 0.9 * INTERVAL and max(seconds) <= INTERVAL
    assert max(seconds) - min(seconds) > 0.09 * INTERVAL


def seconds_until_it_asks_again(jitter: Callable[[], float]) -> float:
    """After a minute without Consul that everybody noticed in the same moment."""
    play = Play(jitter)
    play.want(A)
    play.run_for(20)
    play.consul.answer = "silent"
    play.reconciler.ask_renewal(play.now)
    play.run_for(60)
    play.consul.answer = "yes"
    back_at = play.now
    play.take_calls()
    while True:
        pause = play.run()
        if play.calls:
            return play.now - back_at
        assert pause is not None
        play.now += pause


def test_processes_that_lost_consul_together_do_not_return_together() -> None:
    """All are back within a renewal interval, and no tenth of it sees more than a quarter of them;
    without jitter one would see all."""
    dice = random.Random(7)
    returns = [seconds_until_it_asks_again(dice.random) for _ in range(300)]
    assert max(returns) <= INTERVAL
    assert max(Counter(int(each / INTERVAL * 10) for each in returns).values()) < 75
    assert len({seconds_until_it_asks_again(lambda: 1.0) for _ in range(10)}) == 1


def test_at_rest_it_only_renews(held: Play) -> None:
    """A minute without change: renewals and nothing else, so nothing is written."""
    held.run_for(60)
    assert set(held.take_calls()) == {"Renew"}
    assert held.take_notes() == []


@pytest.mark.parametrize(
    ("seconds", "told"), [(INTERVAL, [Kind.UNREACHABLE]), (3600, [Kind.UNREACHABLE, Kind.OVERDUE])]
)
def test_silence_never_means_that_the_lease_is_lost(
    held: Play, seconds: float, told: list[Kind]
) -> None:
    """However long nothing is answered: SUSPECT, said once, renewed as soon as Consul is back."""
    held.consul.answer = "silent"
    held.run_for(seconds)
    assert held.is_in(State.SUSPECT)
    assert held.reconciler.is_published(A)
    assert held.reconciler.standing(A) == "suspect"
    assert held.take_notes() == told
    held.consul.answer = "yes"
    held.run_for(INTERVAL)  # no retry waits longer than one interval
    assert held.state is State.HELD
    assert held.reconciler.lease == Lease("lease-1", TTL)
    assert set(held.take_calls()) == {"Renew"}
    assert held.take_notes() == [Kind.RECOVERED]


def test_a_suspended_machine_renews_at_once(held: Play) -> None:
    """The monotonic clock jumped by an hour: the very next action is a renewal, then a repair."""
    del held.consul.leases["lease-1"]
    held.now += 3600
    held.run()
    assert held.take_calls() == ["Renew", "Open", "Publish", "Publish"]
    assert held.consul.leases == {"lease-2": {A, B}}


def test_margin_counts_from_when_the_last_answered_renewal_was_sent(held: Play) -> None:
    """Consul may give us up one TTL after it last heard us, and we cannot know it heard us later
    than when we sent."""
    assert held.reconciler.margin_seconds(held.now) == TTL
    held.now += INTERVAL
    renewal = held.reconciler.next_action(held.now)
    assert isinstance(renewal, Renew)
    sent_at = held.now
    held.now += 2
    held.reconciler.handle({A, B}, held.now, renewal)
    assert held.reconciler.margin_seconds(held.now) == sent_at + TTL - held.now
    held.now += 100
    assert held.reconciler.margin_seconds(held.now) == 0.0


def test_asking_for_renewals_in_a_loop_does_not_flood_consul(held: Play) -> None:
    """renew now means now, but a second time not before a second later."""
    held.now += ASKED_RENEWAL_SECONDS
    for _ in range(100):
        held.reconciler.ask_renewal(held.now)
        held.run()
    assert held.take_calls() == ["Renew"]
    assert held.run() == pytest.approx(ASKED_RENEWAL_SECONDS)
    held.now += ASKED_RENEWAL_SECONDS
    held.run()
    assert held.take_calls() == ["Renew"]


# --- losses and repairs


def test_a_lost_lease_is_replaced_and_everything_published_again(held: Play) -> None:
    """One note per repair: cause, how many, how long."""
    del held.consul.leases["lease-1"]
    held.run_for(INTERVAL)
    assert held.consul.leases == {"lease-2": {A, B}}
    assert held.take_calls() == ["Renew", "Open", "Publish", "Publish"]
    assert [(note.kind, note.text) for note in held.notes] == [
        (Kind.LOST, "lease lease-1 lost (Consul does not know it any more)"),
        (
            Kind.REPAIRED,
            "lease lease-1 lost (Consul does not know it any more); "
            "published 2 registrations again after 0.0 s",
        ),
    ]
    assert held.notes[1].registrations == (A, B)
    assert held.reconciler.counts["lost"] == held.reconciler.counts["repaired"] == 1


def test_a_repair_that_meets_an_outage_counts_from_the_loss(held: Play) -> None:
    """Lost, then no new lease for a while: LOST until one is opened, and one repair in the end."""
    held.now += INTERVAL
    call = held.reconciler.next_action(held.now)
    assert isinstance(call, Renew)
    held.reconciler.handle(LeaseLost("gone"), held.now, call)
    held.consul.answer = "silent"
    held.consul.leases.clear()
    held.run_for(20)
    assert held.state is State.LOST
    assert held.reconciler.standing(A) == "lost"
    assert held.reconciler.margin_seconds(held.now) == 0.0
    held.consul.answer = "yes"
    held.run_for(INTERVAL)
    assert held.consul.visible == {A, B}
    assert held.notes[-1].text.startswith("lease lease-1 lost")
    assert held.take_notes() == [Kind.LOST, Kind.UNREACHABLE, Kind.REPAIRED]


def test_a_loss_found_after_an_outage_is_one_repair(held: Play) -> None:
    """The agent was away and came back without our session: the duration counts from the first
    renewal that failed."""
    held.consul.answer = "silent"
    held.run_for(60)
    held.consul.leases.clear()
    held.consul.answer = "yes"
    held.run_for(INTERVAL)
    repaired = held.notes[-1]
    assert held.take_notes() == [Kind.UNREACHABLE, Kind.OVERDUE, Kind.LOST, Kind.REPAIRED]
    assert "again after 5" in repaired.text or "again after 6" in repaired.text


def test_a_deleted_key_is_published_again_under_the_same_lease(held: Play) -> None:
    """The renewal says what Consul holds; what is missing comes back, and only that."""
    held.consul.leases["lease-1"].discard(A)
    held.run_for(INTERVAL)
    assert held.consul.leases == {"lease-1": {A, B}}
    assert held.take_calls() == ["Renew", "Publish"]
    assert [note.registrations for note in held.notes] == [(A,), (A,)]
    assert held.notes[-1].text == (
        "Consul did not hold scheduler at 10.0.0.5:9501 any more (deleted by somebody); "
        "published 1 registration again after 0.0 s"
    )
    assert held.take_notes() == [Kind.LOST, Kind.REPAIRED]


def test_a_loss_during_a_repair_is_one_repair(held: Play) -> None:
    """A deleted key whose publication finds the lease gone: one note with both causes."""
    held.consul.leases["lease-1"].discard(A)
    held.now += INTERVAL
    assert isinstance(held.step(), Renew)
    held.consul.leases.clear()
    held.run_for(INTERVAL)
    assert held.consul.visible == {A, B}
    assert "deleted by somebody), then lease lease-1 lost" in held.notes[-1].text
    assert held.take_notes().count(Kind.REPAIRED) == 1


def test_unregistering_what_was_being_repaired_ends_the_repair(held: Play) -> None:
    """Nobody waits for a registration that is not wanted any more."""
    held.consul.leases.clear()
    held.now += INTERVAL
    assert isinstance(held.step(), Renew)
    held.unwant(A, B)
    held.run()
    assert held.state is State.IDLE
    assert held.notes[-1].text.endswith("; nothing of it is wanted any more")
    assert held.take_notes() == [Kind.LOST, Kind.REPAIRED]


def test_what_arrived_late_at_consul_is_withdrawn(held: Play) -> None:
    """A publication that timed out, was given up, and reached Consul after all: found, removed."""
    held.consul.answer = "late"
    held.want(C)
    held.run()
    held.consul.answer = "yes"
    held.unwant(C)
    held.run_for(INTERVAL)
    held.consul.late[0]()
    assert held.consul.visible == {A, B, C}
    held.take_notes()
    held.run_for(INTERVAL)
    assert held.consul.visible == {A, B}
    assert held.take_notes() == [Kind.STRAY, Kind.WITHDRAWN]


def test_what_arrived_late_and_is_wanted_again_is_no_stray(held: Play) -> None:
    """It is as published as if it had come in time."""
    held.now += INTERVAL
    held.consul.leases["lease-1"].add(C)
    held.want(C)
    held.run()
    assert held.take_calls() == ["Renew"]
    assert held.reconciler.is_published(C)
    assert held.take_notes() == []


def test_a_failed_publication_asks_at_once_whether_the_lease_lives(held: Play) -> None:
    """Consul's 500 may mean anything; the renewal knows.  So a new topic is not late."""
    held.consul.leases.clear()
    held.want(C)
    held.run()
    assert held.take_calls() == ["Publish", "Renew", "Open", "Publish", "Publish", "Publish"]
    assert held.consul.visible == {A, B, C}


def test_a_publication_without_an_answer_that_took_effect_is_not_repeated(held: Play) -> None:
    """The renewal after it shows that Consul has it."""
    held.consul.answer = "deaf"
    held.want(C)
    assert isinstance(held.step(), Publish)
    held.consul.answer = "yes"
    held.run()
    assert held.take_calls() == ["Publish", "Renew"]
    assert held.reconciler.is_published(C)
    assert held.take_notes() == []


def test_a_refused_token_is_tried_on_and_said_once(play: Play) -> None:
    """The token may be replaced: the refusal is visible until it is, and no longer."""
    play.consul.answer = "denied"
    play.want(A)
    play.run_for(60)
    assert play.take_notes() == [Kind.REFUSED]
    assert isinstance(play.reconciler.error_of(A), Denied)
    assert play.reconciler.standing(A) == "refused"
    assert 20 < len(play.calls) < 60
    play.consul.answer = "yes"
    play.run_for(INTERVAL)
    assert play.reconciler.is_published(A)
    assert play.reconciler.error_of(A) is None
    assert play.take_notes() == [Kind.RECOVERED, Kind.PUBLISHED]


def test_a_refused_topic_does_not_hold_up_the_others(held: Play) -> None:
    """The token may be good for one key and not for another."""
    held.consul.answer = "denies publishing"
    held.want(C)
    held.run()
    assert (held.state, held.reconciler.standing(C)) == (State.HELD, "refused")
    assert held.reconciler.standing(A) == "published"
    assert held.take_calls() == ["Publish"]  # a refusal is an answer: nothing to find out


def test_an_outage_that_turns_into_a_refusal_is_news(play: Play) -> None:
    """First unreachable, then refused: two different things to do, two notes."""
    play.consul.answer = "silent"
    play.want(A)
    play.run_for(10)
    play.consul.answer = "denied"
    play.run_for(10)
    assert play.take_notes() == [Kind.UNREACHABLE, Kind.REFUSED]


# --- leaving


def test_withdrawing_one_never_touches_another(held: Play) -> None:
    """Two topics in one process, one unregistered: one call, about that one."""
    held.unwant(A)
    held.run()
    assert [call for call in held.calls if not isinstance(call, Renew)] == [
        Withdraw(Lease("lease-1", TTL), A)
    ]
    assert held.consul.visible == {B}
    assert held.reconciler.is_withdrawn(A)
    assert held.reconciler.standing(A) == "withdrawn"
    assert held.take_notes() == [Kind.WITHDRAWN]


def test_the_lease_is_released_with_its_last_registration(held: Play) -> None:
    """No session is kept for nothing, and one call removes everything."""
    held.unwant(A, B)
    assert held.run() is None
    assert held.take_calls() == ["Release"]
    assert (held.state, held.consul.leases) == (State.IDLE, {})
    held.want(A)
    held.run()
    assert held.consul.leases == {"lease-2": {A}}


def test_unregistered_while_its_publication_is_under_way(held: Play) -> None:
    """It must end withdrawn."""
    held.want(C)
    call = held.reconciler.next_action(held.now)
    held.unwant(C)
    assert not held.reconciler.is_withdrawn(C)
    assert held.reconciler.standing(C) == "withdrawing"
    assert isinstance(call, Publish)
    held.reconciler.handle(held.consul.carry_out(call), held.now, call)
    held.run()
    assert held.consul.visible == {A, B}
    assert held.reconciler.is_withdrawn(C)


def test_registered_again_while_its_withdrawal_is_under_way(held: Play) -> None:
    """It must end published, and nobody is told that it is before it is."""
    held.unwant(A)
    call = held.reconciler.next_action(held.now)
    held.want(A)
    assert isinstance(call, Withdraw)
    assert not held.reconciler.is_published(A)
    held.reconciler.handle(held.consul.carry_out(call), held.now, call)
    assert held.consul.visible == {B}
    held.run()
    assert held.consul.visible == {A, B}


def with_tag(registration: Registration, tag: str) -> Registration:
    return replace(registration, service=ServiceOptions.of([tag], None, 1, None))


def shown(play: Play) -> list[tuple[str, ...]]:
    """The tags of A, as it was published from time to time."""
    calls = [each for each in play.calls if isinstance(each, Publish) and each.registration == A]
    return [each.registration.service.tags for each in calls]


def test_other_options_are_published_whatever_was_under_way(play: Play) -> None:
    """Registered with others at rest, at once after it was unregistered, while it is published,
    and while what Consul holds is read."""
    blue, green = with_tag(A, "blue"), with_tag(A, "green")
    play.want(blue, B)
    play.run()
    play.want(green)
    assert not play.reconciler.is_published(A)
    play.run()
    assert shown(play) == [("blue",), ("green",)]

    play.unwant(A)
    play.want(blue)
    play.run()
    assert shown(play)[2:] == [("blue",)]

    play.want(green)
    call = play.reconciler.next_action(play.now)
    assert isinstance(call, Publish)
    play.want(blue)
    play.calls.append(call)
    play.reconciler.handle(play.consul.carry_out(call), play.now, call)
    assert not play.reconciler.is_published(A)
    play.run()
    assert shown(play)[3:] == [("green",), ("blue",)]

    play.now += TTL / 3
    call = play.reconciler.next_action(play.now)
    assert isinstance(call, Renew)
    play.want(green)
    play.reconciler.handle(play.consul.carry_out(call), play.now, call)
    play.run()
    assert shown(play)[5:] == [("green",)]
    play.want(green)
    play.run()
    assert len(shown(play)) == 6, "the same options are no change"


def test_published_again_while_it_is_published(held: Play) -> None:
    """What was asked for meanwhile counts."""
    held.reconciler.want_again(A, held.now)
    call = held.reconciler.next_action(held.now)
    assert isinstance(call, Publish)
    held.reconciler.want_again(A, held.now)
    held.reconciler.handle(held.consul.carry_out(call), held.now, call)
    assert not held.reconciler.is_published(A)
    held.run()
    assert held.take_calls() == ["Publish"]
    assert held.reconciler.is_published(A)


def test_registered_again_while_the_lease_is_being_released(held: Play) -> None:
    """The release took everything with it: a new lease, and published again."""
    held.unwant(A, B)
    call = held.reconciler.next_action(held.now)
    held.want(A)
    assert isinstance(call, Release)
    assert not held.reconciler.is_published(A)
    held.reconciler.handle(held.consul.carry_out(call), held.now, call)
    held.run()
    assert held.consul.leases == {"lease-2": {A}}


@pytest.mark.parametrize("answer", ["silent", "deaf"])
def test_a_release_without_an_answer_then_wanted_again(held: Play, answer: str) -> None:
    """Nobody knows whether the lease lives: the renewal tells, and this is no repair to report."""
    held.consul.answer = answer
    held.unwant(A, B)
    held.run()
    assert held.state is State.SUSPECT
    held.want(A)
    assert not held.reconciler.is_published(A)
    held.consul.answer = "yes"
    held.run_for(INTERVAL)
    assert held.consul.visible == {A}
    assert held.reconciler.is_published(A)
    assert Kind.REPAIRED not in held.take_notes()


def test_a_withdrawal_without_an_answer_is_retried(held: Play) -> None:
    """Until it is known that Consul does not show it."""
    held.consul.answer = "silent"
    held.unwant(A)
    held.run_for(1)
    assert held.reconciler.standing(A) == "withdrawing"
    held.consul.answer = "yes"
    held.run_for(INTERVAL)
    assert held.consul.visible == {B}
    assert held.reconciler.is_withdrawn(A)
    assert Kind.STRAY not in held.take_notes()


@pytest.mark.parametrize("closes", [False, True])
def test_a_release_that_fails_is_retried_without_a_busy_loop(held: Play, closes: bool) -> None:
    """Nothing is wanted, Consul is away far beyond the TTL: retried with pauses, none longer than a
    renewal interval, then done."""
    held.consul.answer = "silent"
    if closes:
        held.reconciler.close()
    else:
        held.unwant(A, B)
    held.run_for(10 * TTL)
    assert 30 < held.take_calls().count("Release") < 90
    held.consul.answer = "yes"
    held.run_for(INTERVAL)
    assert held.state is (State.CLOSED if closes else State.IDLE)
    assert held.consul.leases == {}


def test_unregistered_before_there_was_a_lease(play: Play) -> None:
    """While Consul is away, wishes come and go without a trace."""
    play.consul.answer = "silent"
    play.want(A)
    play.run()
    play.unwant(A)
    assert play.run() is None
    assert play.state is State.IDLE
    assert play.reconciler.error_of() is None


def test_closing_releases_the_lease_and_stops(held: Play) -> None:
    """One call takes everything back; afterwards there is nothing to do, and nothing is taken."""
    held.reconciler.close()
    assert not held.reconciler.is_wanted(A)
    held.run()
    assert held.take_calls() == ["Release"]
    assert (held.state, held.consul.leases) == (State.CLOSED, {})
    assert held.step() == Stop()
    with pytest.raises(Closed):
        held.want(A)
    held.unwant(A)
    held.reconciler.close()
    assert held.state is State.CLOSED


def test_closing_while_the_lease_is_being_opened(play: Play) -> None:
    """The lease that was just opened is released."""
    play.want(A)
    call = play.reconciler.next_action(play.now)
    play.reconciler.close()
    assert isinstance(call, Open)
    play.reconciler.handle(play.consul.carry_out(call), play.now, call)
    play.run()
    assert (play.state, play.consul.leases) == (State.CLOSED, {})
    assert play.take_calls() == ["Release"]


def test_closing_does_not_wait_for_the_pause_of_an_outage(held: Play) -> None:
    """In the middle of a pause the release is tried at once, then again until it is answered."""
    held.consul.answer = "silent"
    held.run_for(20)
    held.take_calls()
    held.reconciler.close()
    assert isinstance(held.step(), Release)
    held.consul.answer = "yes"
    held.run_for(INTERVAL)
    assert (held.state, held.consul.leases) == (State.CLOSED, {})


def test_closing_a_lease_that_is_gone(held: Play) -> None:
    """Somebody was faster: closed all the same."""
    call = held.reconciler.next_action(held.now + INTERVAL)
    held.reconciler.close()
    assert isinstance(call, Renew)
    held.reconciler.handle(LeaseLost("gone"), held.now, call)
    assert held.state is State.CLOSED
    assert held.step() == Stop()


# --- what is told


def told(play: Play) -> list[tuple[Kind, str, tuple[Registration, ...]]]:
    notes, play.notes = play.notes, []
    return [(note.kind, note.text, note.registrations) for note in notes]


def test_a_note_says_what_happened_and_to_which_registrations(play: Play) -> None:
    """From the first publication to the release."""
    play.want(A, B)
    play.run()
    a, b = "scheduler at 10.0.0.5:9501", "conductor at 10.0.0.5:9501"
    assert told(play) == [
        (Kind.PUBLISHED, f"published {a} under lease lease-1", (A,)),
        (Kind.PUBLISHED, f"published {b} under lease lease-1", (B,)),
    ]
    play.unwant(A)
    play.run()
    assert told(play) == [(Kind.WITHDRAWN, f"withdrew {a}", (A,))]
    play.unwant(B)
    play.run()
    released = "released lease lease-1: nothing is wanted"
    assert told(play) == [(Kind.WITHDRAWN, released, (B,))]


def test_notes_of_an_outage_are_about_what_is_published(held: Play) -> None:
    """Not about what Consul refused to take: nothing of that can be given up."""
    held.consul.answer = "denies publishing"
    held.want(C)
    held.run()
    assert [kind for kind, _, _ in told(held)] == [Kind.REFUSED]
    held.consul.answer = "silent"
    held.run_for(2 * TTL)
    held.consul.answer = "denies publishing"
    held.run_for(INTERVAL)
    notes = [each for each in told(held) if each[0] in (Kind.OVERDUE, Kind.RECOVERED)]
    assert [(kind, about) for kind, _, about in notes] == [
        (Kind.OVERDUE, (A, B)),
        (Kind.RECOVERED, (A, B)),
    ]
    assert notes[0][1] == ("lease lease-1 not renewed for its whole TTL: Consul may have ended it")
    assert notes[1][1].startswith("lease lease-1 renewed after ")


def test_each_outage_is_overdue_once(held: Play) -> None:
    """The second one as well as the first, and one under a lease that was just opened."""
    for _ in range(2):
        held.consul.answer = "silent"
        held.run_for(3 * TTL)
        held.consul.answer = "yes"
        held.run_for(INTERVAL)
        assert held.take_notes() == [Kind.UNREACHABLE, Kind.OVERDUE, Kind.RECOVERED]
    held.consul.answer = "silent"
    held.run_for(3 * TTL)
    held.consul.leases.clear()
    held.consul.answer = "yes"
    while not held.is_in(State.HELD):  # without a renewal of the new lease
        held.now += held.run() or 0.0
    held.consul.answer = "silent"
    held.take_notes()
    held.run_for(3 * TTL)
    assert held.take_notes() == [Kind.UNREACHABLE, Kind.OVERDUE]


def test_overdue_is_not_said_before_the_margin_is_used_up(held: Play) -> None:
    """Half a second before Consul may give the lease up it may not."""
    confirmed_at = held.now
    held.consul.answer = "silent"
    held.run_for(INTERVAL)
    held.now = confirmed_at + TTL - 0.5
    held.run()
    assert held.take_notes() == [Kind.UNREACHABLE]
    held.now = confirmed_at + TTL
    held.run()
    assert held.take_notes() == [Kind.OVERDUE]


def test_a_publication_that_fails_twice_is_told(held: Play) -> None:
    """Once is the renewal's to report; after a renewal that succeeded it is about this key.  It is
    retried with pauses; others are published meanwhile, and the trouble is told once."""
    held.consul.answer = "fails C"
    held.want(C)
    failures = 0
    while failures < 2:
        pause = pause_of(held)
        failures += held.take_calls().count("Publish")
        assert (held.take_notes() == [Kind.UNREACHABLE]) == (failures == 2)
        held.now += pause
    other = Registration("other", Host("10.0.0.5", 1))
    held.want(other)
    held.run_for(30)
    assert held.reconciler.is_published(other)
    assert not held.reconciler.is_published(C)
    assert 15 < held.take_calls().count("Publish") < 30
    assert held.state is State.HELD
    assert held.take_notes() == [Kind.PUBLISHED]
    assert str(held.reconciler.error_of(C)) == "HTTP 500"
    assert held.reconciler.error_of(A) is None
    held.consul.answer = "yes"
    held.run_for(INTERVAL)
    assert held.reconciler.is_published(C)
    assert "of trying" in held.notes[-1].text


@pytest.mark.parametrize("length", [1, 8, 9, 36])
def test_a_long_lease_id_is_shortened(length: int) -> None:
    """Eight characters tell leases apart; Consul's have 36."""
    lease = Lease("0123456789abcdef0123456789abcdef0123"[:length], TTL)
    reconciler = Reconciler(TTL, lambda: 0.5)
    reconciler.want(A, 0)
    for outcome in (lease, None):
        action = reconciler.next_action(0)
        assert isinstance(action, Open | Publish)
        reconciler.handle(outcome, 0, action)
    shown = lease.id if length <= 8 else "01234567…"
    assert reconciler.take_notes()[-1].text.endswith(f"under lease {shown}")


@pytest.mark.parametrize(
    ("count", "named"), [(1, "1"), (2, "1, 2"), (3, "1, 2, 3"), (4, "1, 2, 3 and 1 more"),
                         (6, "1, 2, 3 and 3 more")]
)  # fmt: skip
def test_of_many_registrations_three_are_named(play: Play, count: int, named: str) -> None:
    """The first three by name, and how many more there are."""
    many = [Registration("t", Host(f"10.0.0.{number}", 1)) for number in range(1, count + 1)]
    play.want(*reversed(many))
    play.run()
    told(play)
    play.consul.leases["lease-1"].clear()
    play.run_for(INTERVAL)
    lost = told(play)[0]
    names = ", ".join(f"t at 10.0.0.{number}:1" for number in named.split(" and")[0].split(", "))
    more = named[named.index(" and") :] if " and" in named else ""
    assert lost[1] == f"Consul did not hold {names}{more} any more (deleted by somebody)"


def test_counts_are_what_happened(play: Play) -> None:
    """Each number is how often Consul answered so; every one of them grows by one at a time."""
    tally: Counter[str] = Counter()
    names = {Open: "opened", Renew: "renewed", Publish: "published", Withdraw: "withdrawn"}
    answer = play.consul.carry_out

    def carry_out(call: Call) -> Outcome:
        outcome = answer(call)
        if isinstance(outcome, LeaseLost):
            tally["lost"] += 1
        elif isinstance(outcome, Unavailable | Denied):
            tally["failed"] += 1
        elif type(call) in names:
            tally[names[type(call)]] += 1
        return outcome

    play.consul.carry_out = carry_out  # type: ignore[method-assign]
    assert set(play.reconciler.counts.values()) == {0}
    for _ in range(3):
        play.want(A, B, C)
        play.run_for(2 * INTERVAL)
        play.unwant(A)
        play.run_for(INTERVAL)
        play.unwant(C)
        play.consul.answer = "silent"
        play.run_for(INTERVAL)
        play.consul.answer = "yes"
        play.run_for(INTERVAL)
        play.consul.leases.clear()
        play.run_for(INTERVAL)
    repairs = play.take_notes().count(Kind.REPAIRED)
    assert play.reconciler.counts == {**tally, "repaired": repairs}
    assert min(play.reconciler.counts.values()) > 1


# --- when


def test_seconds_to_the_next_renewal(play: Play) -> None:
    """None without a lease; in an outage, until the next try; never less than none."""
    seconds = play.reconciler.seconds_to_renewal
    assert seconds(play.now) is None
    play.want(A)
    pause = play.run()
    assert seconds(play.now) == pause == pytest.approx(INTERVAL * 0.55)
    play.now += INTERVAL * 0.55 - 0.25
    assert seconds(play.now) == pytest.approx(0.25)
    play.now += 1
    assert seconds(play.now) == 0.0
    play.consul.answer = "silent"
    play.run()
    assert seconds(play.now) == pytest.approx(0.25)  # full jitter of 0.5, drawn 0.5
    play.now += 10
    assert seconds(play.now) == 0.0


def pause_of(play: Play) -> float:
    pause = play.run()
    assert pause is not None
    return pause


def test_a_renewal_that_is_asked_for_in_an_outage_is_tried_within_a_second() -> None:
    """A second after the last try, or at once when that was longer ago."""
    play = Play(jitter=lambda: 1.0)
    play.want(A)
    play.run_for(INTERVAL)
    play.consul.answer = "silent"
    play.run_for(20)
    play.now += pause_of(play)
    assert pause_of(play) == pytest.approx(INTERVAL)  # the longest pause
    play.now += 0.25
    play.reconciler.ask_renewal(play.now)
    assert pause_of(play) == pytest.approx(ASKED_RENEWAL_SECONDS - 0.25)
    play.now += ASKED_RENEWAL_SECONDS - 0.25
    assert pause_of(play) == pytest.approx(INTERVAL)
    play.now += 2.0
    play.take_calls()
    play.reconciler.ask_renewal(play.now)
    play.run()
    assert play.take_calls() == ["Renew"]


def test_a_renewal_that_is_asked_for_delays_none(play: Play) -> None:
    """A try that comes sooner than in a second stays as soon."""
    play.want(A)
    play.run()
    play.consul.answer = "silent"
    play.run_for(INTERVAL * 0.55)
    assert pause_of(play) == pytest.approx(0.25)
    play.reconciler.ask_renewal(play.now)
    assert pause_of(play) == pytest.approx(0.25)


def test_closing_during_a_renewal_that_fails_releases_at_once(held: Play) -> None:
    """The pause of the outage is not waited out."""
    held.now += INTERVAL
    call = held.reconciler.next_action(held.now)
    assert isinstance(call, Renew)
    held.reconciler.close()
    held.reconciler.handle(Unavailable("timed out"), held.now, call)
    held.run()
    assert held.take_calls() == ["Release"]
    assert held.state is State.CLOSED


# --- misuse


def test_an_action_under_way_forbids_another(play: Play) -> None:
    """Two threads that both ask what to do would be a bug, and hear so."""
    play.want(A)
    play.reconciler.next_action(play.now)
    with pytest.raises(ImpossibleEvent, match="under way"):
        play.reconciler.next_action(play.now)


def test_an_outcome_nobody_asked_for_is_refused(play: Play) -> None:
    """Only the action that was given may come back."""
    with pytest.raises(ImpossibleEvent, match="not asked for"):
        play.reconciler.handle(Lease("x", TTL), play.now, Open())


def test_a_renewal_has_to_say_what_is_held(held: Play) -> None:
    """An outcome that belongs to another call is a bug, and hears so."""
    for outcome in (None, Lease("x", TTL)):
        held.now += INTERVAL
        call = held.reconciler.next_action(held.now)
        assert isinstance(call, Renew)
        with pytest.raises(AssertionError):
            held.reconciler.handle(outcome, held.now, call)


# --- random histories


class Watched(Reconciler):
    """Notes which cells of the table it goes through."""

    def __init__(self, jitter: Callable[[], float], seen: set[tuple[State, Event]]) -> None:
        super().__init__(TTL, jitter)
        self._seen = seen

    def _on(self, event: Event) -> None:
        self._seen.add((self.state, event))
        super()._on(event)


ANSWERS = ("yes", "yes", "silent", "deaf", "late", "denied", "denies publishing")


def live_randomly(dice: random.Random, seen: set[tuple[State, Event]], *, closes: bool) -> Play:
    """A random history of wishes, outages, losses and interleavings, then peace."""
    play = Play(dice.random)
    play.reconciler = reconciler = Watched(dice.random, seen)
    everything = (A, B, C)
    for _ in range(dice.randrange(5, 60)):
        action = reconciler.next_action(play.now)
        for _ in range(dice.randrange(3)):  # all of this may happen while the call is under way
            match dice.randrange(8):
                case 0 | 1 if reconciler.state not in (State.CLOSING, State.CLOSED):
                    play.want(dice.choice(everything))
                case 2 | 3:
                    play.unwant(dice.choice(everything))
                case 4:
                    play.consul.answer = dice.choice(ANSWERS)
                case 5 if play.consul.leases:
                    play.consul.leases.pop(dice.choice(list(play.consul.leases)))
                case 6 if play.consul.late:
                    play.consul.late.pop(dice.randrange(len(play.consul.late)))()
                case 7 if closes and dice.random() < 0.1:
                    reconciler.close()
        if isinstance(action, Wait):
            play.now += min(action.seconds or 1.0, dice.choice([0.0, 0.1, 5.0, 50.0]))
        elif not isinstance(action, Stop):
            outcome = play.consul.carry_out(action)
            play.now += dice.choice([0.0, 0.0, 0.1, 12.0])
            reconciler.handle(outcome, play.now, action)
        assert reconciler.published_count <= len(reconciler.wanted)
    play.consul.answer = "yes"
    for late in play.consul.late:
        late()
    play.run_for(2 * INTERVAL)
    return play


@given(st.randoms(use_true_random=False))
@settings(deadline=None, max_examples=300)
def test_whatever_happened_two_intervals_of_peace_make_it_true(dice: random.Random) -> None:
    """What Consul shows under our lease becomes exactly what is wanted, whatever came before."""
    play = live_randomly(dice, set(), closes=False)
    wanted = set(play.reconciler.wanted)
    lease = play.reconciler.lease
    assert (play.consul.leases[lease.id] if lease else set()) == wanted
    assert all(play.reconciler.standing(each) == "published" for each in wanted)
    assert play.reconciler.error_of() is None


def test_random_histories_use_every_cell_of_the_table_and_no_other() -> None:
    """Nothing in the table is dead, and no history needs what is not in it."""
    seen: set[tuple[State, Event]] = set()
    for seed in range(1500):
        live_randomly(random.Random(seed), seen, closes=True)
    assert seen == {(state, event) for state, row in TRANSITIONS.items() for event in row}


# --- while the lease is only suspected


@pytest.mark.finding("E3")
def test_changes_go_on_while_the_lease_is_only_suspected(held: Play) -> None:
    """Renewals fail, other calls do not: what is wanted is published and withdrawn at once."""
    held.consul.answer = "fails renewing"
    held.run_for(INTERVAL + 0.1)
    assert held.is_in(State.SUSPECT)
    held.want(C)
    held.unwant(B)
    held.run()
    assert held.is_in(State.SUSPECT)
    assert held.consul.visible == {A, C}
    assert held.reconciler.is_published(C)
    assert held.reconciler.is_withdrawn(B)


@pytest.mark.finding("E3")
def test_the_last_one_unregistered_leaves_a_suspected_lease_soon() -> None:
    """Its release does not wait for the next retry of the renewal, which is as late as it was
    while another registration is wanted."""
    play = Play(jitter=lambda: 0.9)
    play.want(A, B)
    play.run()
    play.consul.answer = "fails renewing"
    while play.state is not State.SUSPECT or retry_seconds(play) < 2 * ASKED_RENEWAL_SECONDS:
        play.run_for(0.1)
    pause = retry_seconds(play)
    play.unwant(A)
    assert retry_seconds(play) == pause
    play.unwant(B)
    play.run_for(ASKED_RENEWAL_SECONDS)
    assert play.consul.visible == set()


def retry_seconds(play: Play) -> float:
    seconds = play.reconciler.seconds_to_renewal(play.now)
    assert seconds is not None
    return seconds


@pytest.mark.finding("E3")
def test_renewals_come_first_while_nothing_is_answered(held: Play) -> None:
    """Among many changes that all fail, a due renewal is the next thing that is tried; the outage
    is told once, as the lease's."""
    held.consul.answer = "silent"
    held.run_for(INTERVAL)
    held.take_notes()
    held.want(C)
    held.take_calls()
    held.run_for(TTL)
    calls = held.take_calls()
    assert calls.count("Renew") >= 3
    assert "Publish" in calls
    assert held.take_notes() == [Kind.OVERDUE]
    held.consul.answer = "yes"
    held.run_for(INTERVAL)
    assert held.consul.visible == {A, B, C}


@pytest.mark.finding("E2")
def test_a_renewal_that_checked_nothing_changes_nothing(held: Play) -> None:
    """What was published counts as published; what was doubtful is done again."""
    held.consul.answer = "checks nothing"
    held.want(C)
    held.unwant(B)
    held.run_for(2 * INTERVAL)
    assert held.is_in(State.HELD)
    assert held.consul.visible == {A, C}
    assert held.take_notes() == [Kind.WITHDRAWN, Kind.PUBLISHED]
    assert held.reconciler.is_published(A)


def test_an_unanswered_publish_that_consul_holds_is_no_trouble_any_more(held: Play) -> None:
    """The renewal after it tells; one that could not look for it leaves it in doubt."""
    held.want(C)
    held.consul.unchecked = {C}
    held.consul.answer = "deaf"
    held.step()
    held.consul.answer = "yes"
    assert isinstance(held.step(), Renew)
    assert held.reconciler.error_of(C) is not None
    held.consul.unchecked = set()
    held.reconciler.ask_renewal(held.now)
    held.now += ASKED_RENEWAL_SECONDS
    while not isinstance(held.step(), Renew):
        pass
    assert held.reconciler.error_of(C) is None
    assert held.consul.visible == {A, B, C}


def test_what_could_not_be_looked_for_is_not_withdrawn_for_that(held: Play) -> None:
    """A renewal also looks for what was withdrawn a moment ago."""
    held.consul.unchecked = {C}
    held.run_for(INTERVAL)
    assert held.take_calls() == ["Renew"]


@pytest.mark.parametrize("again", [A, B])
def test_a_repair_waits_for_what_was_wanted_again_meanwhile(
    held: Play, again: Registration
) -> None:
    """It is over when all that is wanted of it is published, however the wish came and went."""
    held.consul.leases.clear()
    held.consul.answer = "denies publishing"
    held.run_for(INTERVAL + 0.1)
    assert Kind.LOST in held.take_notes()
    held.unwant(again)
    held.want(again)
    held.consul.answer = "yes"
    while Kind.REPAIRED not in held.take_notes():
        held.now += 0.1
        held.step()
    assert held.consul.visible == {A, B}


@pytest.mark.finding("E3")
@pytest.mark.parametrize(
    ("answer", "count"), [("silent", 8), ("fails renewing, hangs publishing", 1), ("hanging", 0)]
)
def test_a_suspected_lease_keeps_many_changes_from_asking(
    held: Play, answer: str, count: int
) -> None:
    """However many registrations wait, Consul hears of few of them between two tries of the lease:
    it may be recovering.  Of none where it hangs: that would hold up the next try."""
    held.consul.answer = answer
    held.run_for(INTERVAL)
    held.want(*(Registration(f"topic{number}", Host("10.0.0.5", 9501)) for number in range(1000)))
    held.take_calls()
    held.run_for_many(2 * TTL)
    between = " ".join(held.take_calls()).split("Renew")[1:-1]
    assert len(between) >= 4
    assert {part.count("Publish") for part in between} == {count}
    held.consul.answer = "yes"
    held.run_for_many(INTERVAL)
    assert len(held.consul.visible) == 1002


# --- many of them


class Counted(Registration):
    """A registration that counts how often any of them is looked for in a set or dict."""

    __slots__ = ()
    looks = 0

    def __hash__(self) -> int:
        Counted.looks += 1
        return super().__hash__()


def looks_for(count: int) -> int:
    """How many a life of *count* registrations takes: published, lost, repaired, withdrawn."""
    play = Play()
    many = [Counted("scheduler", Host("10.0.0.5", 1 + number)) for number in range(count)]
    Counted.looks = 0
    for each in many:
        play.want(each)
        play.step()
    while not isinstance(play.step(), Wait):
        pass
    play.consul.leases.clear()
    play.run_for_many(INTERVAL)
    assert len(play.consul.visible) == count
    for each in many[1:]:
        play.unwant(each)
    play.run_for_many(0)
    assert play.consul.visible == {many[0]}
    return Counted.looks


@pytest.mark.finding("C7")
def test_the_work_grows_with_the_number_of_registrations_and_not_with_its_square() -> None:
    """Four times as many cost about four times as much, also when all are lost."""
    assert looks_for(400) < 6 * looks_for(100)
