"""Tests of worker: one named thread that is woken, stopped, joined, and forgotten by a child."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator

import pytest

from consul_matchmaker.errors import Unavailable
from consul_matchmaker.worker import Worker, seconds_since_boot

from .doubles import no_thread_to_be_had

LONG = 10.0  # a deadline that is only reached when the test fails


class Steps:
    """A step that counts how often it ran, and rests as long as it is told."""

    def __init__(self, pause: float | None = None) -> None:
        self.pause = pause
        self.count = 0
        self.threads: set[str] = set()
        self._ran = threading.Condition()

    def __call__(self) -> float | None:
        with self._ran:
            self.count += 1
            self.threads.add(threading.current_thread().name)
            self._ran.notify_all()
        return self.pause

    def wait_for(self, count: int) -> bool:
        with self._ran:
            return self._ran.wait_for(lambda: self.count >= count, LONG)


@pytest.fixture
def steps() -> Steps:
    return Steps()


@pytest.fixture
def resting(steps: Steps) -> Iterator[Worker]:
    """A worker that ran its step once and rests until it is woken."""
    resting = Worker("consul-matchmaker-test", steps)
    resting.start()
    assert steps.wait_for(1)
    yield resting
    resting.stop(LONG)


def test_nothing_happens_before_start(steps: Steps) -> None:
    """The constructor makes neither thread nor lock; waking what does not run does nothing."""
    before = set(threading.enumerate())
    idle = Worker("idle", steps)
    idle.wake()
    assert set(threading.enumerate()) <= before
    assert repr(idle) == "<Worker idle, not started>"
    assert idle.stop(0) is True


def test_it_runs_its_step_on_one_named_daemon_thread(resting: Worker, steps: Steps) -> None:
    """However often it is started."""
    resting.start()
    resting.start()
    threads = [t for t in threading.enumerate() if t.name == "consul-matchmaker-test"]
    assert len(threads) == 1
    assert threads[0].daemon
    assert steps.threads == {"consul-matchmaker-test"}
    assert repr(resting) == "<Worker consul-matchmaker-test, running>"


def test_first_starts_from_many_threads_make_one_thread(steps: Steps) -> None:
    """Two first callers agree."""
    together = threading.Barrier(8)
    shared = Worker("shared", steps)

    def start() -> None:
        together.wait(LONG)
        shared.start()

    starters = [threading.Thread(target=start) for _ in range(8)]
    for starter in starters:
        starter.start()
    for starter in starters:
        starter.join(LONG)
    assert [t.name for t in threading.enumerate()].count("shared") == 1
    assert shared.stop(LONG)


def test_waking_ends_the_rest(resting: Worker, steps: Steps) -> None:
    """A step that asked for no next time runs when it is woken, and only then."""
    resting.wake()
    assert steps.wait_for(2)


def test_a_wake_during_a_step_is_not_lost() -> None:
    """What was asked for while the step ran is seen by the next one."""
    in_step, go_on, ran_again = threading.Event(), threading.Event(), threading.Event()

    def step() -> None:
        if in_step.is_set():
            ran_again.set()
        in_step.set()
        assert go_on.wait(LONG)

    busy = Worker("busy", step)
    busy.start()
    assert in_step.wait(LONG)
    busy.wake()
    go_on.set()
    assert ran_again.wait(LONG)
    assert busy.stop(LONG)


def test_it_comes_again_after_the_pause_it_asked_for() -> None:
    """Without being woken."""
    steps = Steps(pause=0.001)
    ticking = Worker("ticking", steps)
    ticking.start()
    assert steps.wait_for(5)
    assert ticking.stop(LONG)


def test_stopping_ends_a_rest_and_is_for_ever(resting: Worker, steps: Steps) -> None:
    """stop joins, is idempotent, and nothing starts it again."""
    assert resting.stop(LONG) is True
    assert resting.stop(0) is True
    assert not resting.is_running
    assert resting.is_stopping
    resting.start()
    resting.wake()
    assert not resting.is_running
    assert steps.count == 1
    assert repr(resting) == "<Worker consul-matchmaker-test, stopped>"


def test_stopping_a_step_that_hangs_ends_in_time() -> None:
    """It says that the thread has not ended; the thread ends after its step."""
    in_step, go_on = threading.Event(), threading.Event()

    def step() -> None:
        in_step.set()
        assert go_on.wait(LONG)

    hanging = Worker("hanging", step)
    hanging.start()
    assert in_step.wait(LONG)
    assert hanging.stop(0.01) is False
    go_on.set()
    assert hanging.stop(LONG) is True


def test_a_step_may_stop_its_own_worker() -> None:
    """It does not join itself."""
    stopped: list[bool] = []
    suicidal = Worker("suicidal", lambda: stopped.append(suicidal.stop(LONG)))
    suicidal.start()
    assert suicidal.stop(LONG)
    assert stopped in ([True], [])  # stopped from outside before its first step, perhaps


def test_an_error_out_of_a_step_is_logged_and_outlived(caplog: pytest.LogCaptureFixture) -> None:
    """The thread outlives every error, and rests before the next try unless it is woken."""
    failed, went_on = threading.Event(), threading.Event()

    def step() -> None:
        if failed.is_set():
            went_on.set()
        else:
            failed.set()
            raise ZeroDivisionError("a bug")

    stubborn = Worker("stubborn", step)
    with caplog.at_level(logging.ERROR):
        stubborn.start()
        assert failed.wait(LONG)
        while not went_on.wait(0.01):
            stubborn.wake()
    assert stubborn.stop(LONG)
    assert "stubborn: unexpected error, going on" in caplog.text
    assert "ZeroDivisionError" in caplog.text


def test_stop_meets_a_start_that_is_under_way() -> None:
    """Whoever stops right after another thread started waits for the thread that it made."""
    for _ in range(50):
        steps = Steps()
        raced = Worker("raced", steps)
        starter = threading.Thread(target=raced.start)
        starter.start()
        assert raced.stop(LONG)
        starter.join(LONG)
        assert not raced.is_running


class Cancelled(BaseException):
    """What frameworks end their tasks with; no Exception, like SystemExit."""


@pytest.mark.finding("B5")
@pytest.mark.finding("E5")
@pytest.mark.parametrize("error", [Cancelled, SystemExit, KeyboardInterrupt])
def test_what_is_no_exception_ends_no_thread_either(
    error: type[BaseException], caplog: pytest.LogCaptureFixture
) -> None:
    """It is logged, and the step runs again: only stop ends the thread."""
    failed, went_on = threading.Event(), threading.Event()

    def step() -> None:
        if failed.is_set():
            went_on.set()
        else:
            failed.set()
            raise error

    stubborn = Worker("stubborn", step)
    stubborn.start()
    assert failed.wait(LONG)
    while stubborn.is_running and not went_on.wait(0.01):
        stubborn.wake()
    assert went_on.is_set()
    assert not stubborn.has_died
    assert stubborn.stop(LONG)
    assert "stubborn: unexpected error, going on" in caplog.text


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.finding("B5")
def test_a_thread_that_ended_all_the_same_is_told_and_replaced(
    resting: Worker, steps: Steps, caplog: pytest.LogCaptureFixture
) -> None:
    """Whatever ended it: an error in the log, `has_died`, and another thread by the next start."""
    wake, died = resting._wake, resting._thread
    assert wake is not None and died is not None

    def fail(timeout: float | None = None) -> bool:
        raise SystemExit

    wake.wait = fail  # type: ignore[method-assign]
    wake.set()
    died.join(LONG)
    assert resting.has_died
    assert repr(resting) == "<Worker consul-matchmaker-test, died>"
    assert "the thread has ended; the next start makes another" in caplog.text
    count = steps.count
    resting.start()
    assert steps.wait_for(count + 1)
    assert not resting.has_died


@pytest.mark.finding("B6")
def test_no_thread_to_be_had_is_an_error_of_ours(steps: Steps) -> None:
    """Unavailable, and the next start tries again."""
    starved = Worker("starved", steps)
    with no_thread_to_be_had(), pytest.raises(Unavailable, match="no thread can be started"):
        starved.start()
    assert not starved.is_running
    starved.start()
    assert steps.wait_for(1)
    assert starved.stop(LONG)


@pytest.mark.finding("D6")
def test_the_lasting_clock_counts_while_the_machine_is_suspended() -> None:
    """On Linux it is the clock that goes on then; it is never behind the other."""
    before = time.monotonic()
    now = seconds_since_boot()
    assert now >= before - 0.001
    if hasattr(time, "CLOCK_BOOTTIME"):
        assert now <= time.clock_gettime(time.CLOCK_BOOTTIME)
