"""Tests of keeper: wishes become true, repairs are told, and it always ends."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from consul_matchmaker.backends import OnDoubt
from consul_matchmaker.backends.memory import Memory
from consul_matchmaker.errors import Closed, ConfigurationError, Denied, TimedOut, Unavailable
from consul_matchmaker.model import Host, Lease, Registration
from consul_matchmaker.registrations.keeper import Keeper
from consul_matchmaker.settings import Settings

from .doubles import ManualClock, StillWorker, no_thread_to_be_had

TTL = 9.0
INTERVAL = TTL / 3
LONG = 10.0  # a deadline that is only reached when the test fails
A = Registration("scheduler", Host("10.0.0.5", 9501))
B = Registration("conductor", Host("10.0.0.5", 9501))
A7 = Registration("scheduler", Host("10.0.0.5", 9501), server="node7")
SETTINGS = Settings(mode="kv", session_ttl_seconds=TTL)
THREAD = "consul-matchmaker-keeper"


class Gate(Memory):
    """A Memory that does not answer one verb until it is let: a hanging Consul."""

    def __init__(self, verb: str) -> None:
        super().__init__()
        self.reached, self.open_up = threading.Event(), threading.Event()
        answer = getattr(self, verb)

        def hang(*args: Any) -> Any:
            self.reached.set()
            assert self.open_up.wait(LONG)
            return answer(*args)

        setattr(self, verb, hang)


class ByHand:
    """A keeper without a thread, a memory and a clock that moves when told."""

    def __init__(self, make_memory: Callable[..., Memory] = Memory) -> None:
        self.clock = ManualClock()
        self.memory = make_memory(session_ttl_seconds=TTL, clock=self.clock)
        self.keeper = Keeper(
            self.memory, SETTINGS, clock=self.clock, jitter=lambda: 0.5, make_worker=StillWorker
        )

    def run(self) -> float | None:
        """Do all there is to do now; return the seconds until there is more."""
        for _ in range(100):
            pause = self.keeper.step()
            if pause != 0.0:
                return pause
        raise AssertionError("never comes to rest")

    def run_for(self, seconds: float) -> None:
        until = self.clock.now + seconds
        while (pause := self.run()) is not None and self.clock.now + pause <= until:
            self.clock.now += pause
        self.clock.now = until

    def visible(self, topic: str = "scheduler") -> list[str]:
        return [str(host) for host in self.memory.lookup(topic, timeout_seconds=5)]


@pytest.fixture
def by_hand() -> ByHand:
    return ByHand()


@pytest.fixture
def threaded() -> Iterator[Callable[[Memory], Keeper]]:
    """Makes keepers with a real thread and clock; closes them afterwards."""
    made: list[Keeper] = []

    def make(memory: Memory) -> Keeper:
        made.append(Keeper(memory, SETTINGS))
        return made[-1]

    yield make
    for keeper in made:
        keeper.close(LONG)


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    """What a person would be told, at WARNING or above."""
    return [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]


def lease_of(keeper: Keeper) -> str:
    lease = keeper.status()["lease"]
    assert isinstance(lease, str)
    return lease


# --- wishes


def test_the_constructor_starts_nothing() -> None:
    """Hosts such as oslo.messaging build it and fork: no thread, no call before register."""
    memory = Memory()
    memory.open = None  # type: ignore[assignment,method-assign]
    before = set(threading.enumerate())
    keeper = Keeper(memory, SETTINGS)
    assert set(threading.enumerate()) <= before  # what earlier tests left behind may end meanwhile
    assert repr(keeper) == "<Keeper IDLE, 0 published>"
    assert keeper.close(LONG)


def test_register_returns_at_once_and_owns_the_registration(by_hand: ByHand) -> None:
    """Consul is not asked in the caller's thread; the registration knows whom to ask."""
    registration = by_hand.keeper.register(A)
    assert registration == A
    assert registration.owner is by_hand.keeper
    assert by_hand.visible() == []
    by_hand.run()
    assert by_hand.visible() == ["10.0.0.5:9501"]
    registration.wait_until_published(timeout_seconds=0)
    registration.unregister()
    by_hand.run()
    assert by_hand.visible() == []


def test_unregister_takes_back_only_that_one(by_hand: ByHand) -> None:
    """Same topic and host under another server name, and another topic, stay."""
    for registration in (A, A7, B):
        by_hand.keeper.register(registration)
    by_hand.run()
    by_hand.keeper.unregister(A)
    by_hand.keeper.unregister(A)
    by_hand.run()
    assert by_hand.memory.lookup("scheduler", "node7", timeout_seconds=5).hosts == (A.host,)
    assert by_hand.visible("conductor") == ["10.0.0.5:9501"]
    assert len(by_hand.memory.lookup("scheduler", timeout_seconds=5).instances) == 1


def test_unregister_host_takes_back_every_server_of_it(by_hand: ByHand) -> None:
    """matchmaker.unregister(topic, host) knows no server name."""
    elsewhere = Registration("scheduler", Host("10.0.0.6", 9501))
    for registration in (A, A7, B, elsewhere):
        by_hand.keeper.register(registration)
    by_hand.run()
    by_hand.keeper.unregister_host("scheduler", A.host)
    by_hand.run()
    assert by_hand.visible() == ["10.0.0.6:9501"]
    assert by_hand.visible("conductor") == ["10.0.0.5:9501"]


def test_holds_is_about_wishes(by_hand: ByHand) -> None:
    """True from register to unregister, whatever Consul knows."""
    assert not by_hand.keeper.holds("scheduler", A.host)
    by_hand.keeper.register(A7)
    assert by_hand.keeper.holds("scheduler", A.host)
    assert not by_hand.keeper.holds("conductor", A.host)
    by_hand.keeper.unregister(A7)
    assert not by_hand.keeper.holds("scheduler", A.host)


@pytest.mark.finding("B6")
def test_without_a_thread_nothing_is_registered(threaded: Callable[[Memory], Keeper]) -> None:
    """register says so with an error of ours, and the next one is as if it had not been."""
    memory = Memory()
    keeper = threaded(memory)
    with no_thread_to_be_had(), pytest.raises(Unavailable, match="no thread can be started"):
        keeper.register(A)
    assert not keeper.holds(A.topic, A.host)
    keeper.register(B).wait_until_published(timeout_seconds=LONG)
    assert memory.topics() == [B.topic]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.finding("B5")
def test_a_thread_that_died_shows_in_the_status_and_is_replaced(
    threaded: Callable[[Memory], Keeper],
) -> None:
    """Whatever is asked of the keeper next starts another."""
    memory = Memory()
    keeper = threaded(memory)
    keeper.register(A).wait_until_published(timeout_seconds=LONG)
    assert keeper.status()["thread_has_died"] is False
    wake, thread = keeper._worker._wake, keeper._worker._thread
    assert wake is not None and thread is not None

    def fail(timeout: float | None = None) -> bool:
        raise SystemExit

    wake.wait = fail  # type: ignore[method-assign]
    keeper.renew_now()
    thread.join(LONG)
    assert keeper.status()["thread_has_died"] is True
    keeper.unregister(A)
    keeper.wait_until_withdrawn(A, LONG)
    assert keeper.status()["thread_has_died"] is False
    assert memory.topics() == []


# --- waiting


def test_waiting_says_why_it_was_in_vain(by_hand: ByHand) -> None:
    """TimedOut holds the last reason, so that nobody has to look into the log."""
    by_hand.memory.is_available = False
    registration = by_hand.keeper.register(A)
    with pytest.raises(TimedOut, match=r"10\.0\.0\.5:9501 .*within 0 s: Consul has not answered"):
        registration.wait_until_published(timeout_seconds=0)
    by_hand.run()
    with pytest.raises(TimedOut, match="told not to answer"):
        registration.wait_until_published(timeout_seconds=0)


def test_waiting_is_refused_as_long_as_consul_refuses(by_hand: ByHand) -> None:
    """Denied at once, however long one would wait; another token ends it."""
    by_hand.memory.is_denied = True
    registration = by_hand.keeper.register(A)
    by_hand.run()
    for _ in range(2):
        with pytest.raises(Denied, match=r"scheduler at .* was not published: .* refuse"):
            registration.wait_until_published(timeout_seconds=LONG)
    by_hand.memory.is_denied = False
    by_hand.run_for(INTERVAL)
    registration.wait_until_published(timeout_seconds=0)


def test_waiting_for_what_is_not_registered(by_hand: ByHand) -> None:
    """Nobody would ever publish it: said at once."""
    registration = by_hand.keeper.register(A)
    registration.unregister()
    with pytest.raises(Closed, match="not registered here"):
        registration.wait_until_published(timeout_seconds=LONG)


def test_a_waiter_is_woken_by_close(threaded: Callable[[Memory], Keeper]) -> None:
    """Closed, not TimedOut, and at once."""
    gate = Gate("open")
    keeper = threaded(gate)
    registration = keeper.register(A)
    assert gate.reached.wait(LONG)
    raised: list[Exception] = []

    def wait() -> None:
        try:
            registration.wait_until_published(timeout_seconds=LONG)
        except Closed as error:
            raised.append(error)

    waiter = threading.Thread(target=wait)
    waiter.start()
    assert keeper.close(0.0) is False
    waiter.join(LONG)
    gate.open_up.set()
    assert len(raised) == 1
    assert keeper.close(LONG) is True
    assert repr(gate) == "<Memory 0 leases>"


def test_waiting_until_withdrawn(by_hand: ByHand) -> None:
    """Draining begins when Consul does not show the registration any more."""
    by_hand.keeper.register(A)
    registration = by_hand.keeper.register(B)
    by_hand.run()
    by_hand.memory.is_available = False
    registration.unregister()
    by_hand.run()
    with pytest.raises(TimedOut, match=r"not withdrawn within 0 s: .*told not to answer"):
        by_hand.keeper.wait_until_withdrawn(registration, 0)
    by_hand.memory.is_available = True
    by_hand.run_for(INTERVAL)
    by_hand.keeper.wait_until_withdrawn(registration, 0)
    assert by_hand.keeper.standing(registration) == "withdrawn"


# --- repairs


def test_a_lost_lease_is_one_log_line_one_event_one_count(
    by_hand: ByHand, caplog: pytest.LogCaptureFixture
) -> None:
    """Destroyed from outside: back within one renewal interval, and one line says why."""
    by_hand.keeper.register(A)
    by_hand.keeper.register(B)
    by_hand.run()
    lost = lease_of(by_hand.keeper)
    by_hand.memory.end_lease()
    by_hand.run_for(INTERVAL)
    assert by_hand.visible() == by_hand.visible("conductor") == ["10.0.0.5:9501"]
    assert warnings(caplog) == [
        f"lease {lost[:8]}… lost (Consul does not know it any more); "
        "published 2 registrations again after 0.0 s"
    ]
    status = by_hand.keeper.status()
    assert status["counts"]["repaired"] == 1  # type: ignore[index]
    repairs = [e for e in status["events"] if e["kind"] == "repaired"]  # type: ignore[attr-defined]
    assert [e["text"] for e in repairs] == warnings(caplog)


def test_renew_now_verifies_at_once(by_hand: ByHand) -> None:
    """acknowledge() of our own host does not wait for the next renewal."""
    by_hand.keeper.register(A)
    by_hand.run()
    by_hand.clock.now += 1.0
    by_hand.memory.delete("scheduler", A.host)
    by_hand.keeper.renew_now()
    by_hand.run()
    assert by_hand.visible() == ["10.0.0.5:9501"]


def test_an_outage_is_told_once_and_its_end_once(
    by_hand: ByHand, caplog: pytest.LogCaptureFixture
) -> None:
    """A minute without Consul is two warnings, not twenty: unreachable, overdue."""
    caplog.set_level(logging.INFO, "consul_matchmaker")
    by_hand.keeper.register(A)
    by_hand.run()
    caplog.clear()
    by_hand.memory.is_available = False
    by_hand.run_for(15)
    by_hand.memory.is_available = True
    by_hand.run_for(INTERVAL)
    assert [record.levelname for record in caplog.records] == ["WARNING", "WARNING", "INFO"]
    assert "cannot be renewed" in caplog.messages[0]
    assert "may have ended it" in caplog.messages[1]
    assert "renewed after 1" in caplog.messages[2]
    assert by_hand.visible() == ["10.0.0.5:9501"]


def test_listeners_hear_of_a_lease_that_may_have_run_out(by_hand: ByHand) -> None:
    """The margin is used up: lost at that moment, held again when Consul says so."""
    heard: list[str] = []
    registration = by_hand.keeper.register(A, on_change=lambda _, change: heard.append(change))
    by_hand.run()
    assert by_hand.keeper.margin_seconds(registration) == TTL
    by_hand.memory.is_available = False
    by_hand.run_for(TTL - 0.1)
    assert (heard, by_hand.keeper.standing(registration)) == (["held"], "suspect")
    by_hand.run_for(0.2)
    by_hand.run()
    assert heard == ["held", "lost"]
    assert by_hand.keeper.margin_seconds(registration) == 0.0
    by_hand.memory.is_available = True
    by_hand.run_for(INTERVAL)
    assert heard == ["held", "lost", "held"]


class Cancelled(BaseException):
    """What frameworks end their tasks with; no Exception."""


@pytest.mark.finding("E5")
@pytest.mark.parametrize("error", [ZeroDivisionError, SystemExit, Cancelled])
def test_a_listener_that_fails_harms_nobody(
    by_hand: ByHand, caplog: pytest.LogCaptureFixture, error: type[BaseException]
) -> None:
    """Logged, and the keeping goes on; sys.exit() ends no process from here, nor the keeper."""

    def fail(registration: Registration, change: str) -> None:
        raise error

    by_hand.keeper.register(A, on_change=fail)
    by_hand.run_for(2 * INTERVAL)
    assert by_hand.visible() == ["10.0.0.5:9501"]
    assert "listener" in caplog.text


@pytest.mark.parametrize(
    "error",
    [ZeroDivisionError("a bug"), ConfigurationError("token_file cannot be read"), Cancelled()],
)
def test_no_error_of_a_backend_ends_the_keeping(by_hand: ByHand, error: BaseException) -> None:
    """Even a bug, a cancelled task, or a token file that is missing for a moment, is a delay."""

    def fail(on_doubt: OnDoubt | None = None) -> Lease:
        raise error

    by_hand.memory.open = fail  # type: ignore[method-assign]
    registration = by_hand.keeper.register(A)
    by_hand.run()
    with pytest.raises(TimedOut, match=r"ZeroDivisionError|token_file|Cancelled"):
        registration.wait_until_published(timeout_seconds=0)
    del by_hand.memory.open
    by_hand.run_for(INTERVAL)
    assert by_hand.visible() == ["10.0.0.5:9501"]


# --- races, with a real thread


def test_closed_while_the_lease_is_being_opened(threaded: Callable[[Memory], Keeper]) -> None:
    """The lease that was just opened is released."""
    gate = Gate("open")
    keeper = threaded(gate)
    keeper.register(A)
    assert gate.reached.wait(LONG)
    closed: list[bool] = []
    closer = threading.Thread(target=lambda: closed.append(keeper.close(LONG)))
    closer.start()
    with keeper._changed:
        assert keeper._changed.wait_for(lambda: "CLOSING" in repr(keeper), LONG)
    gate.open_up.set()
    closer.join(LONG)
    assert closed == [True]
    assert repr(gate) == "<Memory 0 leases>"


# --- its end


def test_close_takes_everything_back_at_once(threaded: Callable[[Memory], Keeper]) -> None:
    """The lease is released, the thread is gone, and nothing is accepted any more."""
    memory = Memory()
    keeper = threaded(memory)
    registration = keeper.register(A)
    registration.wait_until_published(timeout_seconds=LONG)
    assert keeper.close(LONG) is True
    assert repr(memory) == "<Memory 0 leases>"
    assert THREAD not in [thread.name for thread in threading.enumerate()]
    with pytest.raises(Closed):
        keeper.register(B)
    with pytest.raises(Closed):
        registration.wait_until_published(timeout_seconds=LONG)
    registration.unregister()
    assert not keeper.holds("scheduler", A.host)
    assert keeper.close(LONG) is True
    assert repr(keeper) == "<Keeper CLOSED, 0 published>"


def test_close_ends_in_time_when_consul_hangs(threaded: Callable[[Memory], Keeper]) -> None:
    """It says that it did not manage; the lease then runs out by itself."""
    gate = Gate("release")
    keeper = threaded(gate)
    keeper.register(A).wait_until_published(timeout_seconds=LONG)
    assert keeper.close(0.05) is False
    gate.open_up.set()
    assert keeper.close(LONG) is True


def test_closing_while_consul_is_away_ends_the_thread(
    threaded: Callable[[Memory], Keeper],
) -> None:
    """No thread is left trying for ever; the lease runs out by itself."""
    memory = Memory()
    keeper = threaded(memory)
    keeper.register(A).wait_until_published(timeout_seconds=LONG)
    memory.is_available = False
    assert keeper.close(0.05) is False
    for thread in threading.enumerate():
        if thread.name == THREAD:
            thread.join(LONG)
    assert not keeper._worker.is_running
    assert keeper.close(LONG) is False  # at once: there is nobody left to do it


def test_a_listener_may_close_the_keeper(threaded: Callable[[Memory], Keeper]) -> None:
    """On the keeper's own thread close does not wait for itself."""
    memory = Memory()
    keeper = threaded(memory)
    heard = threading.Event()

    def close(registration: Registration, change: str) -> None:
        assert keeper.close(LONG) is False
        heard.set()

    keeper.register(A, on_change=close)
    assert heard.wait(LONG)
    assert keeper.close(LONG) is True
    assert repr(memory) == "<Memory 0 leases>"


def test_the_thread_is_named_and_single(threaded: Callable[[Memory], Keeper]) -> None:
    """One keeper, one thread, however many registrations."""
    keeper = threaded(Memory())
    for port in range(1, 30):
        keeper.register(Registration("scheduler", Host("10.0.0.5", port)))
    names = [thread.name for thread in threading.enumerate()]
    assert names.count(THREAD) == 1


# --- other processes


def run_python(script: str) -> list[str]:
    """Run *script* in a fresh interpreter; return the lines it printed."""
    prelude = """
        import logging, os, sys, threading
        import consul_matchmaker.registrations.keeper as module
        # Leaving may take as long as the machine stops meanwhile.
        at_exit, module.EXIT_SECONDS = module.EXIT_SECONDS, 10.0
        from consul_matchmaker.backends.memory import Memory
        from consul_matchmaker import Matchmaker
        from consul_matchmaker.registrations.keeper import Keeper
        from consul_matchmaker.model import Host, Registration
        from consul_matchmaker.settings import Settings
        def say(text):
            os.write(1, f"{text}\\n".encode())
        class Telling(Memory):
            def open(self, on_doubt=None):
                say(f"open {'parent' if os.getpid() == parent else 'child'}")
                return super().open()
            def release(self, lease):
                say(f"release {'parent' if os.getpid() == parent else 'child'}")
                super().release(lease)
        parent = os.getpid()
        matchmaker = Matchmaker(Settings(mode="kv"), backend=Telling())
        keeper = matchmaker._keeper
        A = Registration("scheduler", Host("10.0.0.5", 9501))
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(prelude) + textwrap.dedent(script)],
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@pytest.mark.system
def test_a_process_that_just_ends_leaves_at_once() -> None:
    """Without close(): the lease is released while the interpreter goes down."""
    assert run_python("keeper.register(A).wait_until_published(timeout_seconds=10)") == [
        "open parent",
        "release parent",
    ]


@pytest.mark.system
@pytest.mark.finding("B3")
def test_at_exit_all_are_told_before_one_is_waited_for() -> None:
    """One keeper whose Consul hangs keeps no other from leaving, whichever comes first."""
    assert run_python("""
        both = [keeper, Keeper(Telling(), Settings(mode="kv"))]
        released = [threading.Event(), threading.Event()]
        def after_the_other(number):
            def release(lease):
                released[number].set()
                say("released" if released[1 - number].wait(5) else "in vain")
            return release
        for number, each in enumerate(both):
            each.register(A).wait_until_published(timeout_seconds=10)
            each._registrar.release = after_the_other(number)
    """) == ["open parent", "open parent", "released", "released"]


@pytest.mark.system
def test_leaving_at_exit_is_bounded() -> None:
    """A Consul that hangs does not keep the process from ending."""
    assert run_python("""
        keeper.register(A).wait_until_published(timeout_seconds=10)
        keeper._registrar.release = lambda lease: threading.Event().wait()
        module.EXIT_SECONDS = at_exit
        say("end")
    """) == ["open parent", "end"]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="nothing forks here")
@pytest.mark.system
def test_a_forked_child_has_nothing_and_leaves_its_parent_alone() -> None:
    """No registration, lease or thread.  It may register by itself, under a lease of its own, which
    is all that its exit releases."""
    assert run_python("""
        registration = keeper.register(A)
        registration.wait_until_published(timeout_seconds=10)
        child = os.fork()
        if child == 0:
            say(repr(keeper))
            say(keeper.holds("scheduler", A.host))
            say([t.name for t in threading.enumerate()])
            try:
                registration.wait_until_published(timeout_seconds=10)
            except Exception as error:
                say(type(error).__name__)
            registration.unregister()
            keeper.register(A).wait_until_published(timeout_seconds=10)
            sys.exit(0)
        os.waitpid(child, 0)
        say(keeper.standing(registration))
        say(len(keeper._registrar.lookup("scheduler", timeout_seconds=5)))
    """) == [
        "open parent",
        "<Keeper IDLE, 0 published>",
        "False",
        "['MainThread']",
        "Closed",
        "open child",
        "release child",
        "published",
        "1",
        "release parent",
    ]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="nothing forks here")
@pytest.mark.system
def test_forking_while_the_keeper_is_busy_does_not_hang_the_child() -> None:
    """The fork may come while another thread holds the lock, or is in a call."""
    assert run_python("""
        reached, go_on = threading.Event(), threading.Event()
        real = keeper._registrar.publish
        def slow(lease, registration):
            if os.getpid() == parent:
                reached.set()
                go_on.wait()
            real(lease, registration)
        keeper._registrar.publish = slow
        keeper.register(A)
        reached.wait()
        locked, fork_now = threading.Event(), threading.Event()
        def hold():
            with keeper._changed:
                locked.set()
                fork_now.wait()
        threading.Thread(target=hold).start()
        locked.wait()
        child = os.fork()
        if child == 0:
            keeper.register(A).wait_until_published(timeout_seconds=10)
            say("published")
            sys.exit(0)
        os.waitpid(child, 0)
        fork_now.set(); go_on.set()
    """) == ["open parent", "open child", "published", "release child", "release parent"]


# --- what people see


def test_status_is_plain_and_complete(by_hand: ByHand) -> None:
    """JSON can say it, and it says where each registration stands and why."""
    by_hand.keeper.register(A7)
    by_hand.run()
    by_hand.memory.is_available = False
    by_hand.run_for(INTERVAL)
    status = json.loads(json.dumps(by_hand.keeper.status()))
    assert status["state"] == "SUSPECT"
    assert 0 < status["margin_seconds"] < TTL
    assert status["renews_in_seconds"] >= 0
    assert "told not to answer" in status["error"]
    assert status["registrations"] == [
        {
            "topic": "scheduler",
            "host": "10.0.0.5:9501",
            "server": "node7",
            "standing": "suspect",
            "error": status["error"],
        }
    ]
    assert [event["kind"] for event in status["events"]] == ["published", "unreachable"]


def test_its_repr_is_a_status_line(by_hand: ByHand) -> None:
    """Short enough for a log, true enough for an assertion."""
    by_hand.keeper.register(A)
    assert repr(by_hand.keeper) == "<Keeper IDLE, 0 of 1 published>"
    by_hand.run()
    assert repr(by_hand.keeper) == "<Keeper HELD, 1 published, renews in 1.6s>"


def test_waits_do_not_hold_the_lock_over_the_network(
    threaded: Callable[[Memory], Keeper],
) -> None:
    """While Consul hangs, every other call returns at once."""
    gate = Gate("open")
    keeper = threaded(gate)
    keeper.register(A)
    assert gate.reached.wait(LONG)
    keeper.register(B)
    keeper.unregister(B)
    keeper.renew_now()
    assert keeper.holds("scheduler", A.host)
    assert keeper.status()["state"] == "OPENING"
    gate.open_up.set()


# Who serves has to beat, and learns what becomes of it


def test_a_registration_that_is_not_beaten_for_is_taken_back(by_hand: ByHand) -> None:
    """Its serving loop hangs: it alone is withdrawn, told as lost, and back with the next beat."""
    changes: list[tuple[Registration, str]] = []
    registration = by_hand.keeper.register(
        A, beat_seconds=2.0, on_change=lambda *change: changes.append(change)
    )
    by_hand.keeper.register(B)
    by_hand.run_for(1.5)
    registration.beat()
    by_hand.run_for(1.5)
    assert registration.state == "published"
    by_hand.run_for(1.0)
    assert registration.state == "silent"
    status = json.dumps(by_hand.keeper.status())
    assert '"standing": "silent"' in status
    assert "no beat for scheduler at 10.0.0.5:9501 in 2.0 s" in status
    assert registration.margin_seconds == 0.0
    assert by_hand.visible() == []
    assert by_hand.visible("conductor") == ["10.0.0.5:9501"]
    assert by_hand.keeper.holds("scheduler", A.host)
    registration.beat()
    by_hand.run()
    assert registration.state == "published"
    assert by_hand.visible() == ["10.0.0.5:9501"]
    assert changes == [(A, "held"), (A, "lost"), (A, "held")]


def test_the_only_registration_may_fall_silent_too(by_hand: ByHand) -> None:
    """Its lease is given back meanwhile; unregistered, a late beat brings nothing back."""
    registration = by_hand.keeper.register(A, beat_seconds=2.0)
    by_hand.run_for(3)
    assert by_hand.keeper.status()["lease"] is None
    registration.beat()
    by_hand.run()
    assert by_hand.visible() == ["10.0.0.5:9501"]
    by_hand.run_for(3)
    by_hand.keeper.unregister_host("scheduler", A.host)
    registration.beat()
    by_hand.run_for(3)
    assert registration.state == "withdrawn"
    assert by_hand.visible() == []


def test_beating_without_having_promised_it_is_a_mistake(by_hand: ByHand) -> None:
    """Otherwise nobody would notice that the beats do nothing."""
    registration = by_hand.keeper.register(A)
    with pytest.raises(ConfigurationError, match="beat_seconds"):
        registration.beat()


def test_who_registers_can_be_told_alone(by_hand: ByHand) -> None:
    """on_change hears of its own registration only, until that is unregistered."""
    changes: list[tuple[Registration, str]] = []
    registration = by_hand.keeper.register(A, on_change=lambda *change: changes.append(change))
    by_hand.keeper.register(B)
    by_hand.run()
    lease = by_hand.keeper.status()["lease"]
    assert isinstance(lease, str)
    by_hand.memory.end_lease(lease)
    by_hand.run_for(INTERVAL + 1)
    assert changes == [(A, "held"), (A, "lost"), (A, "held")]
    registration.unregister()
    by_hand.run()
    assert len(changes) == 3


def test_the_reason_of_a_single_registration_is_told(by_hand: ByHand) -> None:
    """The lease is well, this registration is not: its own reason."""

    def refuse(lease: Lease, registration: Registration) -> None:
        raise Unavailable("HTTP 500: no leader")

    by_hand.memory.publish = refuse  # type: ignore[method-assign]
    registration = by_hand.keeper.register(A)
    by_hand.run_for(INTERVAL)
    with pytest.raises(TimedOut, match="no leader"):
        registration.wait_until_published(timeout_seconds=0)


def test_draining_waits_after_the_withdrawal(threaded: Callable[[Memory], Keeper]) -> None:
    """It returns when the time is over, or at once when the keeper is closed meanwhile."""
    memory = Memory()
    keeper = threaded(memory)
    registration = keeper.register(A)
    registration.wait_until_published(timeout_seconds=LONG)
    registration.unregister()
    keeper.wait_until_withdrawn(registration, LONG)
    registration.drain(0.001)
    assert memory.lookup("scheduler", timeout_seconds=5).hosts == ()
    again = keeper.register(A)
    again.wait_until_published(timeout_seconds=LONG)
    drained = threading.Thread(target=again.drain, args=[60.0])
    drained.start()
    keeper.wait_until_withdrawn(A, LONG)
    assert keeper.close(LONG)
    drained.join(LONG)
    assert not drained.is_alive()


class PausingMemory(Memory):
    """A Memory that has maintenance, as service mode has."""

    def __init__(self) -> None:
        super().__init__()
        self.is_paused = threading.Event()

    def pause(self, registration: Registration) -> bool:
        self.is_paused.set()
        return True

    def resume(self, registration: Registration) -> bool:
        was_paused = self.is_paused.is_set()
        self.is_paused.clear()
        return was_paused


def test_draining_is_maintenance_first_where_there_is_one(
    threaded: Callable[[Memory], Keeper],
) -> None:
    """It is withdrawn when the time is over, or the keeper is closed."""
    memory = PausingMemory()
    keeper = threaded(memory)
    registration = keeper.register(A)
    registration.wait_until_published(timeout_seconds=LONG)
    drained = threading.Thread(target=registration.drain, args=[LONG])
    drained.start()
    assert memory.is_paused.wait(LONG)
    assert registration.state == "published"
    assert keeper.close(LONG)
    drained.join(LONG)
    assert memory.lookup("scheduler", timeout_seconds=5).hosts == ()


def test_registered_again_it_is_drained_no_more(
    threaded: Callable[[Memory], Keeper], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The wait ends, it is published again, which ends the maintenance, and it stays."""
    memory = PausingMemory()
    published: list[Registration] = []
    publish = memory.publish

    def count(lease: Lease, registration: Registration) -> None:
        published.append(registration)
        publish(lease, registration)

    monkeypatch.setattr(memory, "publish", count)
    keeper = threaded(memory)
    registration = keeper.register(A)
    registration.wait_until_published(timeout_seconds=LONG)
    drained = threading.Thread(target=registration.drain, args=[LONG])
    drained.start()
    assert memory.is_paused.wait(LONG)
    keeper.register(A).wait_until_published(timeout_seconds=LONG)
    drained.join(LONG)
    assert not drained.is_alive()
    assert published == [A, A]
    assert registration.state == "published"
    assert not memory.is_paused.is_set()


def test_draining_says_when_consul_does_not_confirm(by_hand: ByHand) -> None:
    """Peers may go on sending: whoever stops serving now has to know."""
    registration = by_hand.keeper.register(A)
    by_hand.run()
    with pytest.raises(TimedOut):
        registration.drain(0.0)


# Leases that may end before their time


class DoubtedMemory(Memory):
    """A Memory whose leases may end sooner, as those of liveness=check do."""

    renewals = 0
    on_doubt: OnDoubt | None = None

    def open(self, on_doubt: OnDoubt | None = None) -> Lease:
        self.on_doubt = on_doubt
        return super().open()

    def renew(self, lease: Lease) -> tuple[Registration, ...]:
        self.renewals += 1
        return super().renew(lease)


def test_a_doubt_asks_for_a_renewal_at_once(caplog: pytest.LogCaptureFixture) -> None:
    """Only that tells whether the lease is gone; asked again when the doubt is over."""
    caplog.set_level(logging.INFO)
    by_hand = ByHand(DoubtedMemory)
    memory = by_hand.memory
    assert isinstance(memory, DoubtedMemory)
    by_hand.keeper.register(A)
    by_hand.run_for(INTERVAL * 2 + 0.1)
    assert memory.on_doubt is not None
    memory.end_lease()
    memory.renewals = 0
    memory.on_doubt("does not know that check")
    by_hand.run_for(1.0)
    assert by_hand.visible() == ["10.0.0.5:9501"]
    assert memory.renewals == 1
    memory.on_doubt(None)
    by_hand.run_for(1.0)
    assert memory.renewals == 2
    assert caplog.text.count("does not know that check") == 1
