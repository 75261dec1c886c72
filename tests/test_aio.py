"""The asyncio facade: the same answers, never in the way of the event loop."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator

import pytest

from consul_matchmaker import Host, Matchmaker, Settings, Snapshot, aio, errors
from consul_matchmaker.backends import Resolver
from consul_matchmaker.backends.memory import Memory

from .awaited import Awaited, run
from .contract import ONE, TWO, ResolverContract
from .doubles import DEADLINE_SECONDS, FakeResolver, catalog, kv


@pytest.mark.system
class TestAioContract(ResolverContract):
    """What holds of the backend holds of it behind the facade."""

    @pytest.fixture
    def memory(self) -> Memory:
        return Memory()

    @pytest.fixture
    def resolver(self, memory: Memory) -> Iterator[Resolver]:
        settings = kv(ttl_seconds=0.05, empty_ttl_seconds=0.05)
        resolver = Awaited(Matchmaker(settings, backend=memory))
        yield resolver
        resolver.close()

    @pytest.fixture
    def away(self) -> Iterator[Resolver]:
        memory = Memory()
        memory.is_available = False
        resolver = Awaited(Matchmaker(kv(), backend=memory))
        yield resolver
        resolver.close()

    @pytest.fixture
    def topic(self) -> str:
        return "scheduler"

    @pytest.fixture
    def set_hosts(self, memory: Memory) -> Callable[[str, list[Host]], None]:
        return memory.declare


def test_every_method_of_the_matchmaker_is_there() -> None:
    """The same public names, and no verb that the other does not have."""

    def names(of: type) -> set[str]:
        return {name for name in dir(of) if not name.startswith("_")}

    waiting = {"asked_for_hosts", "next_change", "telling"}
    helpers = {"attempt", "attempts", "cached_hosts", "picked", "judge", *waiting}
    assert names(Matchmaker) - names(aio.Matchmaker) == helpers
    assert names(aio.Matchmaker) - names(Matchmaker) == set()


def test_a_cached_answer_does_not_leave_the_loop() -> None:
    """A known topic is answered without a thread, also when it is picked from."""
    memory = Memory()
    memory.declare("scheduler", [ONE])

    async def work() -> None:
        async with aio.Matchmaker(Matchmaker(kv(), backend=memory)) as mm:
            first = mm.hosts("scheduler")
            assert (await first).hosts == (ONE,)
            again = mm.hosts("scheduler")
            with pytest.raises(StopIteration) as caught:
                again.send(None)  # done at its first step: nothing was awaited
            assert caught.value.value.hosts == (ONE,)
            assert await mm.pick("scheduler") == ONE
            assert await mm.is_alive("scheduler", str(ONE))
            assert (await mm.explain("scheduler"))["topic"] == "scheduler"

    run(work())


@pytest.mark.finding("D2")
@pytest.mark.parametrize("verb", ["hosts", "pick", "using", "is_alive"])
def test_no_awaited_call_asks_consul_on_the_event_loop(verb: str) -> None:
    """Also where no answer is kept: what was awaited is used, and not looked up once more."""
    threads: list[str] = []

    class Noting(FakeResolver):
        def lookup(
            self,
            topic: str,
            server: str | None = None,
            *,
            timeout_seconds: float = DEADLINE_SECONDS,
        ) -> Snapshot:
            threads.append(threading.current_thread().name)
            return super().lookup(topic, server, timeout_seconds=timeout_seconds)

    consul = Noting()
    consul.say("scheduler", str(ONE))
    settings = catalog(ttl_seconds=0, ttl_min_seconds=0, empty_ttl_seconds=0, max_stale_seconds=0)

    async def work() -> None:
        async with aio.Matchmaker(Matchmaker(settings, backend=consul)) as mm:
            for _ in range(3):
                if verb == "using":
                    async with mm.using("scheduler") as host:
                        assert host == ONE
                else:
                    arguments = ("scheduler", ONE) if verb == "is_alive" else ("scheduler",)
                    await getattr(mm, verb)(*arguments)

    run(work())
    assert len(threads) >= 3
    assert set(threads) <= {"consul-matchmaker-awaited", "consul-matchmaker-refresher"}


def test_a_topic_that_hangs_holds_up_neither_loop_nor_others() -> None:
    """While many calls wait for one topic, others are answered; cancelling them takes no time, and
    the answer comes into the memory all the same."""
    consul = FakeResolver()
    consul.say("slow", str(TWO))
    consul.say("scheduler", str(ONE))
    consul.hold("slow")

    async def work() -> None:
        async with aio.Matchmaker(Matchmaker(catalog(), backend=consul)) as mm:
            waiting = [asyncio.create_task(mm.hosts("slow")) for _ in range(50)]
            assert (await mm.hosts("scheduler")).hosts == (ONE,)
            assert not any(task.done() for task in waiting)
            for task in waiting:
                task.cancel()
            await asyncio.gather(*waiting, return_exceptions=True)
            assert all(task.cancelled() for task in waiting)
            consul.let_go("slow")
            assert (await mm.hosts("slow")).hosts == (TWO,)
            assert consul.count("slow") == 1

    run(work())


def test_a_timeout_counts_while_every_thread_waits_for_consul() -> None:
    """As many topics hang as there are threads to ask: one more raises TimedOut at its time."""
    consul = FakeResolver()
    topics = [f"slow{number}" for number in range(aio.MAX_THREADS)]
    for topic in topics:
        consul.say(topic, str(ONE))
        consul.hold(topic)

    async def work() -> None:
        async with aio.Matchmaker(Matchmaker(catalog(), backend=consul)) as mm:
            waiting = [asyncio.create_task(mm.hosts(topic)) for topic in topics]
            while len(consul.asked) < len(topics):
                await asyncio.sleep(0.001)
            with pytest.raises(errors.TimedOut, match="another"):
                await mm.hosts("another", timeout_seconds=0)
            assert not any(task.done() for task in waiting)
            for topic in topics:
                consul.let_go(topic)
            await asyncio.gather(*waiting)

    run(work())


@pytest.mark.system
def test_registering_waiting_and_watching() -> None:
    """A registration is awaited, seen by a watch, and leaves with its block."""
    memory = Memory()

    async def work() -> None:
        settings = kv(ttl_seconds=0.05, empty_ttl_seconds=0.05)
        async with (
            aio.Matchmaker(Matchmaker(kv(), backend=memory)) as owner,
            aio.Matchmaker(Matchmaker(settings, backend=memory)) as reader,
        ):
            changes = reader.watch("scheduler")
            assert (await anext(changes)).hosts == ()
            async with await owner.register("scheduler", ONE, server="node1") as registration:
                await registration.wait_until_published(timeout_seconds=DEADLINE_SECONDS)
                assert registration.state == "published"
                assert 0 < registration.margin_seconds <= owner.settings.session_ttl_seconds
                assert (registration.topic, registration.host) == ("scheduler", ONE)
                assert str(registration) == "scheduler at 10.0.0.1:5001 as node1"
                assert registration.server == "node1"
                with pytest.raises(errors.TimedOut, match="within 0 s"):
                    await registration.wait_until_withdrawn(timeout_seconds=0)
                with pytest.raises(errors.ConfigurationError, match="beat_seconds"):
                    registration.beat()
                assert (await anext(changes)).hosts == (ONE,)
                found = await reader.wait_for_hosts("scheduler", timeout_seconds=5, server="node1")
                assert found.hosts == (ONE,)
                assert await reader.topics() == ["scheduler"]
            assert (await anext(changes)).hosts == ()
            again = await owner.register("scheduler", TWO)
            await again.wait_until_published(timeout_seconds=DEADLINE_SECONDS)
            await reader.reject("scheduler", TWO)
            assert reader.status()["quarantine"] == {"scheduler": [str(TWO)]}
            await reader.acknowledge("scheduler", TWO)
            assert reader.status()["quarantine"] == {}
            assert await reader.expire("scheduler", TWO) == 1
            await owner.unregister("scheduler", TWO)
            await reader.close()
            assert reader.is_closed and "closed" in repr(reader)
            with pytest.raises(StopAsyncIteration):
                await anext(changes)
            with pytest.raises(errors.Closed):
                await reader.hosts("scheduler")

    run(work())


def test_a_failure_in_a_block_rejects_and_a_cancellation_does_not() -> None:
    """As the synchronous one; a task that is cancelled has learnt nothing of the host."""
    memory = Memory()
    memory.declare("scheduler", [f"10.0.0.{number}:5000" for number in range(1, 6)])

    async def work() -> None:
        settings = kv(quarantine_seconds=30)
        async with aio.Matchmaker(Matchmaker(settings, backend=memory)) as mm:
            with pytest.raises(ConnectionError):
                async with mm.using("scheduler") as bad:
                    raise ConnectionError
            assert mm.status()["quarantine"] == {"scheduler": [str(bad)]}
            with pytest.raises(asyncio.CancelledError):
                async with mm.using("scheduler"):
                    raise asyncio.CancelledError
            assert mm.status()["quarantine"] == {"scheduler": [str(bad)]}

    run(work())


def test_errors_are_the_same() -> None:
    """What the synchronous calls raise comes out of the awaited ones."""
    memory = Memory()
    memory.is_available = False

    async def work() -> None:
        async with aio.Matchmaker(Settings(mode="kv", addresses="127.0.0.1:1")) as mm:
            with pytest.raises(errors.InvalidTopic):
                await mm.hosts("")
        async with aio.Matchmaker(Matchmaker(kv(), backend=memory)) as mm:
            with pytest.raises(errors.Unavailable):
                await mm.pick("scheduler")
            memory.is_available = True
            with pytest.raises(errors.NoLiveHosts):
                await mm.pick("nobody")

    run(work())


def test_a_loop_that_ended_is_not_disturbed() -> None:
    """An answer that comes after its loop was closed is dropped without a noise."""
    consul = FakeResolver()
    consul.hold("slow")
    mm = Matchmaker(catalog(), backend=consul)

    async def work() -> None:
        task = asyncio.create_task(aio.Matchmaker(mm).hosts("slow"))
        await asyncio.get_running_loop().run_in_executor(None, consul.wait_until_asked, "slow")
        task.cancel()

    run(work())
    threads = [one for one in threading.enumerate() if one.name == "consul-matchmaker-awaited"]
    consul.let_go("slow")
    for thread in threads:
        thread.join(DEADLINE_SECONDS)
        assert not thread.is_alive()
    mm.close()


@pytest.mark.finding("C6")
def test_watches_need_no_thread_each() -> None:
    """However many topics are watched, the threads that wait for them are few."""
    memory = Memory()
    memory.declare("scheduler", [ONE])

    async def work() -> int:
        async with aio.Matchmaker(Matchmaker(kv(), backend=memory)) as mm:
            watches = [mm.watch("scheduler") for _ in range(20)]
            for watch in watches:
                assert (await watch.__anext__()).hosts == (ONE,)
            waiting = [asyncio.ensure_future(watch.__anext__()) for watch in watches]
            await asyncio.sleep(0)
            await asyncio.sleep(0)
            names = [thread.name for thread in threading.enumerate()]
            for task in waiting:
                task.cancel()
            await asyncio.gather(*waiting, return_exceptions=True)
            return names.count("consul-matchmaker-awaited")

    assert run(work()) <= 4
