"""`Matchmaker.call`, threaded and awaited: where the next attempt goes, and when there is none."""

from __future__ import annotations

import asyncio
import gc
import threading
import time
import weakref
from collections.abc import Awaitable, Callable, Iterator
from contextlib import suppress
from typing import Any

import pytest

from consul_matchmaker import Host, Matchmaker, Settings, Snapshot, aio
from consul_matchmaker.backends.memory import Memory
from consul_matchmaker.errors import Closed, ConfigurationError, NoLiveHosts, TimedOut, Unavailable

from .doubles import DEADLINE_SECONDS, ManualClock, in_thread

TOPIC = "web"
Called = list[str]
Function = Callable[[Host], Any]


def hosts(count: int) -> list[Host]:
    return [Host(f"10.0.0.{number}", 80) for number in range(1, count + 1)]


class Play:
    """A Matchmaker over memory, called in one of two ways."""

    def __init__(self, way: str, **settings: Any) -> None:
        self.memory, self.clock, self.way = Memory(), ManualClock(), way
        self.memory.declare(TOPIC, hosts(3))
        told = Settings(mode="kv", **settings)
        self.mm = Matchmaker(told, backend=self.memory, clock=self.clock, jitter=lambda: 0.0)
        self.called: list[Host] = []

    def call(self, outcomes: Function, **options: Any) -> Any:
        """*outcomes* returns what the function returns, or an exception that it raises."""

        def function(host: Host) -> Any:
            self.called.append(host)
            outcome = outcomes(host)
            if isinstance(outcome, BaseException):
                raise outcome
            return outcome

        if self.way == "threaded":
            return self.mm.call(TOPIC, function, **options)

        async def awaited(host: Host) -> Any:
            return function(host)

        return asyncio.run(aio.Matchmaker(self.mm).call(TOPIC, awaited, **options))

    @property
    def rejected(self) -> set[str]:
        return set(self.mm.status()["quarantine"].get(TOPIC, ()))  # type: ignore[attr-defined]


@pytest.fixture(params=["threaded", "awaited"])
def play(request: pytest.FixtureRequest) -> Iterator[Play]:
    made = Play(request.param)
    yield made
    made.mm.close()


def test_what_the_function_returns_is_returned(play: Play) -> None:
    """From one host, in turn; each is called once."""
    assert [play.call(str) for _ in range(3)] == [str(host) for host in play.called]
    assert set(play.called) == set(hosts(3))
    assert not play.rejected


def test_a_failure_goes_to_another_host(play: Play) -> None:
    """To one that was not tried; those that failed are rejected, the one that answered is not."""
    failures = iter([OSError("down"), TimeoutError("slow")])
    assert play.call(lambda host: next(failures, "done")) == "done"
    assert len(set(play.called)) == 3
    assert play.rejected == {str(host) for host in play.called[:2]}


def test_after_the_last_attempt_the_last_failure_is_raised(play: Play) -> None:
    """As the function raised it; no host is called twice while there is another."""
    play.memory.declare(TOPIC, hosts(5))
    with pytest.raises(OSError, match="3") as caught:
        play.call(lambda host: OSError(str(len(play.called))))
    assert len(set(play.called)) == len(play.called) == 3
    assert caught.value.__cause__ is None
    play.called.clear()
    with pytest.raises(OSError):
        play.call(lambda host: OSError(), attempts=1)
    assert len(play.called) == 1


def test_a_host_that_was_tried_is_better_than_none(play: Play) -> None:
    """With a single one it is called again."""
    play.memory.declare(TOPIC, hosts(1))
    failures = iter([OSError(), OSError()])
    assert play.call(lambda host: next(failures, "done")) == "done"
    assert play.called == hosts(1) * 3


def test_a_function_may_close_a_matchmaker() -> None:
    """Its own, or the one that calls it: no call of the library is interrupted by that."""
    play, other = Play("threaded"), Play("threaded")

    def function(host: Host) -> str:
        other.mm.close()
        play.mm.close()
        return "done"

    assert play.mm.call(TOPIC, function) == "done"
    assert play.mm.is_closed
    assert other.mm.is_closed


def test_a_lookup_of_a_call_is_not_interrupted_by_close() -> None:
    """As any other lookup: the handler of a signal is told so."""
    told: list[str] = []

    class Interrupted(Memory):
        def lookup(self, *arguments: Any, **options: Any) -> Snapshot:
            with pytest.raises(RuntimeError, match="interrupts call") as caught:
                mm.close()
            told.append(str(caught.value))
            return super().lookup(*arguments, **options)

    memory = Interrupted()
    memory.declare(TOPIC, hosts(1))
    with Matchmaker(Settings(mode="kv"), backend=memory) as mm:
        mm.call(TOPIC, str)
    assert told


def test_what_is_no_failure_of_the_host_is_raised_at_once(play: Play) -> None:
    """And says nothing of it: neither rejected nor acknowledged."""
    play.memory.declare(TOPIC, hosts(1))
    play.mm.reject(TOPIC, hosts(1)[0])
    with pytest.raises(KeyError):
        play.call(lambda host: KeyError("no such user"))
    assert len(play.called) == 1
    assert play.rejected == {str(hosts(1)[0])}


def test_the_user_says_what_is_a_failure(play: Play) -> None:
    """`retry_on`: those classes and what is below them."""

    class Busy(Exception):
        pass

    failures = iter([Busy()])
    assert play.call(lambda host: next(failures, "done"), retry_on=(Busy,)) == "done"
    with pytest.raises(OSError):
        play.call(lambda host: OSError(), retry_on=(Busy,))
    assert len(play.called) == 3


def test_a_key_goes_to_its_own_host_first(play: Play) -> None:
    """And when that fails, all calls of the key go to the same second one."""
    first = play.mm.pick(TOPIC, key="tenant")
    assert play.call(str, key="tenant") == str(first)
    second = play.mm.pick(TOPIC, key="tenant", exclude=[first])
    play.called.clear()
    answer = play.call(lambda host: OSError() if host == first else str(host), key="tenant")
    assert answer == str(second)
    assert play.called == [first, second]


def test_nobody_to_call(play: Play) -> None:
    """As `pick` says it: nobody, or that Consul cannot be asked; the function is not called."""
    play.memory.declare(TOPIC, [])
    with pytest.raises(NoLiveHosts):
        play.call(str)
    play.clock.advance(5000)
    play.memory.is_available = False
    with pytest.raises(Unavailable):
        play.call(str)
    play.mm.close()
    with pytest.raises(Closed):
        play.call(str)
    assert play.called == []


def test_hosts_that_leave_during_a_call(play: Play) -> None:
    """When nobody is left, the failure is told, which says more than that."""

    def leave(host: Host) -> OSError:
        play.memory.declare(TOPIC, [])
        play.mm.expire(TOPIC, host)
        return OSError("down")

    with pytest.raises(OSError, match="down") as caught:
        play.call(leave)
    assert caught.value.__context__ is None
    assert len(play.called) == 1


@pytest.mark.parametrize("way", ["threaded", "awaited"])
@pytest.mark.parametrize("is_said", [True, False])
def test_a_failure_keeps_its_own_cause(way: str, is_said: bool) -> None:
    """Also when it is raised because nobody is left; no exception of ours stands before it."""
    play, root = Play(way), KeyError("root")

    def function(host: Host) -> OSError:
        play.memory.declare(TOPIC, [])
        play.mm.expire(TOPIC, host)
        down = OSError("down")
        down.__context__ = root
        if is_said:
            down.__cause__ = root
        return down

    with pytest.raises(OSError, match="down") as caught:
        play.call(function)
    assert caught.value.__context__ is root
    assert caught.value.__cause__ is (root if is_said else None)
    assert caught.value.__suppress_context__ is is_said
    play.mm.close()


class Resource:
    """What a function has while it is called."""


@pytest.mark.parametrize(
    ("way", "failures"),  # not all three, awaited: asyncio.run keeps what it raises
    [("threaded", 1), ("threaded", 3), ("awaited", 1), ("awaited", 2)],
)
def test_what_a_failed_attempt_had_is_freed(way: str, failures: int) -> None:
    """With the call, without waiting for the garbage collector: a socket, a large answer."""
    play, had = Play(way), []

    def failing(host: Host) -> str:
        resource = Resource()
        had.append(weakref.ref(resource))
        if len(had) <= failures:
            raise OSError
        return "done"

    gc.collect()
    gc.disable()
    try:
        with suppress(OSError):
            play.call(failing)
        assert len(had) > 1
        assert [each() for each in had] == [None] * len(had)
    finally:
        gc.enable()
    play.mm.close()


@pytest.mark.parametrize("attempts", [0, -1, True, 1.5, "3"])
def test_attempts_are_a_number(play: Play, attempts: Any) -> None:
    """An error that names what was given; nothing is called."""
    with pytest.raises(ConfigurationError, match="attempts must be a whole number from 1"):
        play.call(str, attempts=attempts)
    assert play.called == []


def test_retries_end_with_the_budget(play: Play) -> None:
    """All hosts fail for ever: of 1,000 calls, as many more as the fraction and the floor say."""
    for _ in range(1000):
        with pytest.raises(OSError):
            play.call(lambda host: OSError())
    assert len(play.called) == 1000 + 200 + 10
    # The first five have all the floor; each other one is refused its second or its first retry.
    assert play.mm.status()["retries"] == {"allowed": 210, "refused": 995}


@pytest.mark.parametrize("way", ["threaded", "awaited"])
def test_the_budget_is_set(way: str) -> None:
    """Without any there is one attempt a call, whatever `attempts` says."""
    play = Play(way, retry_fraction=0, retry_floor_per_second=0)
    with pytest.raises(OSError):
        play.call(lambda host: OSError(), attempts=5)
    assert len(play.called) == 1
    play.mm.close()


def test_no_attempt_begins_after_the_timeout() -> None:
    """Threaded, the function ends by itself."""
    play = Play("threaded")

    def slow(host: Host) -> OSError:
        play.clock.advance(2)
        return OSError()

    with pytest.raises(OSError):
        play.call(slow, timeout_seconds=3)
    assert len(play.called) == 2
    play.mm.close()


@pytest.mark.system
def test_awaited_the_attempt_is_cancelled_at_the_timeout() -> None:
    """It fails by TimeoutError, which rejects the host; none begins after it."""
    play = Play("awaited")
    called: list[Host] = []

    async def hang(host: Host) -> None:
        called.append(host)
        await asyncio.Event().wait()

    with pytest.raises(asyncio.TimeoutError):
        asyncio.run(aio.Matchmaker(play.mm).call(TOPIC, hang, timeout_seconds=0.05))
    assert len(called) == 1
    assert play.rejected == {str(called[0])}
    play.mm.close()


@pytest.mark.system
def test_the_timeout_is_for_asking_consul_too() -> None:
    """What an awaited attempt may take is what is left when its host is known."""
    halves = 0.3

    class Slow(Memory):
        longest_lookup_seconds = DEADLINE_SECONDS

        def lookup(self, *arguments: Any, **options: Any) -> Snapshot:
            time.sleep(halves)
            return super().lookup(*arguments, **options)

    async def function(host: Host) -> str:
        await asyncio.sleep(halves)
        return "in twice as much"

    consul = Slow()
    consul.declare(TOPIC, hosts(1))
    mm = Matchmaker(Settings(mode="kv"), backend=consul)
    with pytest.raises((asyncio.TimeoutError, TimedOut)):
        asyncio.run(aio.Matchmaker(mm).call(TOPIC, function, timeout_seconds=halves * 1.5))
    mm.close()


@pytest.mark.system
def test_a_cancelled_call_says_nothing_of_the_host() -> None:
    """It leaves at once, and the host is not busy any more."""
    play = Play("awaited", selection="least_loaded")

    async def cancel() -> None:
        began = asyncio.Event()

        async def hang(host: Host) -> None:
            began.set()
            await asyncio.Event().wait()

        task = asyncio.create_task(aio.Matchmaker(play.mm).call(TOPIC, hang))
        await began.wait()
        assert in_flight(play.mm) == 1
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(cancel())
    assert in_flight(play.mm) == 0
    assert not play.rejected
    play.mm.close()


def in_flight(mm: Matchmaker) -> int:
    told: Any = mm.explain(TOPIC)["selection"]
    return sum(one.get("in_flight", 0) for one in told.values())


@pytest.mark.parametrize("way", ["threaded", "awaited"])
@pytest.mark.parametrize("outcome", ["done", OSError(), KeyError(), KeyboardInterrupt()])
def test_a_host_is_busy_while_it_is_called(way: str, outcome: Any) -> None:
    """However the call ends."""
    play = Play(way, selection="least_loaded")
    busy = []

    def function(host: Host) -> Any:
        busy.append(in_flight(play.mm) if way == "threaded" else 1)
        return outcome

    try:
        play.call(function)
    except BaseException as error:
        assert type(error) is type(outcome)
    assert set(busy) == {1}
    assert in_flight(play.mm) == 0
    play.mm.close()


@pytest.mark.parametrize("is_raised", [True, False])
def test_using_counts_too(is_raised: bool) -> None:
    """A block is a call: busy until its end, and measured."""
    play = Play("threaded", selection="least_loaded")
    with pytest.raises(OSError) if is_raised else pytest.raises(StopIteration):
        with play.mm.using(TOPIC) as host:
            assert in_flight(play.mm) == 1
            play.clock.advance(2)
            if is_raised:
                raise OSError
        raise StopIteration
    assert in_flight(play.mm) == 0
    told: Any = play.mm.explain(TOPIC)["selection"]
    assert told[str(host)]["latency_seconds"] == 2
    play.mm.close()


def test_a_host_that_fails_often_is_ejected() -> None:
    """Although it answers in between; no more than the cap; and `status` counts it."""
    play = Play("threaded", ejection_failure_rate=0.3, quarantine_seconds=0)
    play.memory.declare(TOPIC, hosts(10))
    bad, calls = set(hosts(3)), 0

    def outcome(host: Host) -> Any:
        nonlocal calls
        calls += host in bad
        return OSError() if host in bad and calls % 2 else "done"

    for _ in range(2000):
        play.clock.advance(0.005)
        play.call(outcome)
    told = play.mm.explain(TOPIC)
    ejected = {host for host, why in told["rejected"].items() if "ejected" in why}  # type: ignore[attr-defined]
    assert len(ejected) == 2
    assert ejected < {str(host) for host in bad}
    assert play.mm.status()["ejections"] == 2
    play.mm.close()


def test_an_attempt_ends_once() -> None:
    """Whoever says so, and how often; only the first word on the host counts."""
    play = Play("threaded", selection="least_loaded")
    attempt = play.mm.attempts(TOPIC).begin(play.mm.hosts(TOPIC))
    other = play.mm.attempts(TOPIC).begin(play.mm.hosts(TOPIC))
    workers = [in_thread(attempt.end) for _ in range(8)]
    for worker in workers:
        worker.result(DEADLINE_SECONDS)
    attempt.judge(is_good=False)
    attempt.judge(is_good=True)
    assert play.rejected == {str(attempt.host)}
    assert in_flight(play.mm) == 1
    other.end()
    assert in_flight(play.mm) == 0
    play.mm.close()


def test_an_attempt_that_is_forgotten_ends() -> None:
    """By an answer that nobody reads, an interrupt before its block: its host is not shunned."""
    play = Play("threaded", selection="least_loaded")
    attempt = play.mm.attempts(TOPIC).begin(play.mm.hosts(TOPIC))
    assert in_flight(play.mm) == 1
    del attempt
    gc.collect()
    assert in_flight(play.mm) == 0
    assert not play.rejected
    play.mm.close()


def test_an_attempt_ends_although_it_cannot_be_judged() -> None:
    """Whatever goes wrong, here `retry_on` that is no tuple: the host is not busy any more."""
    play = Play("threaded", selection="least_loaded")
    failures: Any = [OSError]
    attempt = play.mm.attempts(TOPIC, failures=failures).begin(play.mm.hosts(TOPIC))
    with pytest.raises(TypeError), attempt:
        raise OSError
    assert in_flight(play.mm) == 0
    play.mm.close()


def test_pick_leaves_out_hosts() -> None:
    """Given as hosts or as texts; an error where nobody else is left, or a text is no host."""
    play = Play("threaded")
    first, second, third = hosts(3)
    assert {play.mm.pick(TOPIC, exclude=[first, str(second)]) for _ in range(9)} == {third}
    with pytest.raises(NoLiveHosts, match="every host of web is excluded: 3 are there"):
        play.mm.pick(TOPIC, exclude=hosts(3))
    with pytest.raises(ConfigurationError):
        play.mm.pick(TOPIC, exclude=["10.0.0.1"])
    picked: Awaitable[Host] = aio.Matchmaker(play.mm).pick(TOPIC, exclude=[first, str(second)])

    async def wait() -> Host:
        return await picked

    assert asyncio.run(wait()) == third
    play.mm.close()


@pytest.mark.parametrize("way", ["ends", "is forgotten", "is judged"])
def test_a_host_that_hangs_does_not_attract_calls(way: str) -> None:
    """Although its latency was measured long ago; once its calls are over it has another chance."""
    play = Play("threaded", selection="least_loaded")
    play.memory.declare(TOPIC, hosts(2))
    play.clock.advance(1)
    bad, hanging = hosts(1)[0], []
    for number in range(12_000):  # 100 calls a second
        attempt = play.mm.attempts(TOPIC).begin(play.mm.hosts(TOPIC))
        play.clock.advance(0.01)
        if number < 100 or attempt.host != bad:
            attempt.judge(is_good=True)
            attempt.end()
        else:
            hanging.append(attempt)
    assert 0 < len(hanging) < 10
    for attempt in hanging:
        if way == "is judged":
            attempt.judge(is_good=True)
        if way != "is forgotten":
            attempt.end()
    del attempt
    hanging.clear()
    gc.collect()
    assert in_flight(play.mm) == 0
    play.clock.advance(1000)
    play.mm.acknowledge(TOPIC, hosts(2)[1])
    if way != "is judged":  # else it is known to be slow
        assert bad in {play.mm.pick(TOPIC) for _ in range(100)}
    play.mm.close()


class Compared(Host):
    """Counts how often hosts are compared."""

    count = 0

    def __eq__(self, other: object) -> bool:
        Compared.count += 1
        return Host.__eq__(self, other)

    __hash__ = Host.__hash__


def many(count: int) -> list[Host]:
    return [Compared(f"10.0.{number // 250}.{number % 250}", 80) for number in range(count)]


@pytest.mark.parametrize("what", ["exclude", "exclude awaited", "explain", "eject"])
def test_work_grows_with_the_hosts_and_not_with_their_square(what: str) -> None:
    """Of 400 hosts half are excluded, or rejected: none is compared with all others."""
    play = Play("threaded", selection="least_loaded", ejection_failure_rate=0.3, subset_size=100)
    fleet = many(400)
    play.memory.declare(TOPIC, fleet)
    play.mm.pick(TOPIC)
    for host in fleet[:200]:
        play.mm.reject(TOPIC, host)
    Compared.count = 0
    if what == "exclude":
        assert play.mm.pick(TOPIC, exclude=many(200)) in fleet[200:]
    elif what == "exclude awaited":
        picked = aio.Matchmaker(play.mm).pick(TOPIC, exclude=many(200))
        assert asyncio.run(asyncio.wait_for(picked, DEADLINE_SECONDS)) in fleet[200:]
    elif what == "explain":
        told: Any = play.mm.explain(TOPIC)
        assert len(told["selection"]) == 400
    else:
        for _ in range(30):
            play.mm.reject(TOPIC, fleet[0])
        assert play.mm.status()["ejections"] == 1
    assert Compared.count < 10 * 400
    play.mm.close()


def test_threads_call_at_once() -> None:
    """Eight threads, each fails at its first host: every call is answered by another one."""
    play = Play("threaded", retry_fraction=1)
    tried = threading.local()

    def function(host: Host) -> Host:
        if getattr(tried, "first", None) is None:
            tried.first = host
            raise OSError
        assert host != tried.first
        tried.first = None
        return host

    def run() -> None:
        for _ in range(200):
            play.mm.call(TOPIC, function)

    for worker in [in_thread(run) for _ in range(8)]:
        worker.result(DEADLINE_SECONDS)
    play.mm.close()
