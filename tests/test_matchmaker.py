"""What an application sees, on the memory backend: the public interface, closing, forking."""

from __future__ import annotations

import json
import logging
import os
import threading
import time
from collections.abc import Iterator

import pytest

import consul_matchmaker.backends.kv.store  # noqa: F401  here, as what it imports looks for IPv6
from consul_matchmaker import Host, Matchmaker, Settings, Snapshot, errors
from consul_matchmaker.backends.memory import Memory
from consul_matchmaker.worker import seconds_since_boot

from .contract import ONE, TWO, eventually, has
from .doubles import (
    DEADLINE_SECONDS,
    LONGEST_SECONDS,
    FakeResolver,
    ManualClock,
    catalog,
    in_thread,
    kv,
    no_thread_to_be_had,
)

SECRET = "b1gs3cr3t-token"


@pytest.fixture
def memory() -> Memory:
    return Memory()


@pytest.fixture
def mm(memory: Memory) -> Iterator[Matchmaker]:
    with Matchmaker(kv(), backend=memory) as matchmaker:
        yield matchmaker


@pytest.fixture
def other(memory: Memory) -> Iterator[Matchmaker]:
    """Another process, as it were: a matchmaker of its own over the same Consul."""
    with Matchmaker(kv(), backend=memory) as matchmaker:
        yield matchmaker


# -- looking up


def test_hosts_of_a_topic(mm: Matchmaker, memory: Memory) -> None:
    """All of them, or those of one server; an unknown topic has none."""
    memory.declare("scheduler", ["10.0.0.2:5002", "10.0.0.1:5001"])
    assert mm.hosts("scheduler").hosts == (ONE, TWO)
    assert mm.hosts("scheduler")[0] == ONE
    assert mm.hosts("nobody") == Snapshot("nobody", (), "memory")
    assert not mm.hosts("nobody")


def test_pick(mm: Matchmaker, memory: Memory) -> None:
    """One host after the other; by key always the same; none is an error that says what to do."""
    memory.declare("scheduler", ["10.0.0.1:5001", "10.0.0.2:5002"])
    assert {mm.pick("scheduler"), mm.pick("scheduler")} == {ONE, TWO}
    assert len({mm.pick("scheduler", key="tenant-42") for _ in range(5)}) == 1
    with pytest.raises(errors.NoLiveHosts, match="wait_for_hosts"):
        mm.pick("nobody")
    with pytest.raises(errors.NoLiveHosts, match="node7"):
        mm.pick("scheduler", server="node7")


def test_is_alive(mm: Matchmaker, memory: Memory) -> None:
    """Whether the host is among those of the topic, given as text or Host."""
    memory.declare("scheduler", [ONE])
    assert mm.is_alive("scheduler", "10.0.0.1:5001")
    assert mm.is_alive("scheduler", ONE)
    assert not mm.is_alive("scheduler", TWO)


def test_rejected_hosts_are_listed_but_not_picked(memory: Memory) -> None:
    """hosts() tells the truth of Consul, pick() what callers found out."""
    clock = ManualClock()
    memory.declare("scheduler", [f"10.0.0.{number}:5000" for number in range(1, 6)])
    mm = Matchmaker(kv(ttl_seconds=1000), backend=memory, clock=clock, jitter=lambda: 0.0)
    bad = mm.pick("scheduler")
    mm.reject("scheduler", bad)
    assert bad in mm.hosts("scheduler")
    assert bad not in {mm.pick("scheduler") for _ in range(20)}
    mm.acknowledge("scheduler", bad)
    assert bad in {mm.pick("scheduler") for _ in range(20)}


@pytest.mark.system
def test_waiting_for_the_first_host(memory: Memory, other: Matchmaker) -> None:
    """It comes soon after its registration by another process, also unwatched: it is asked for
    however long an answer without hosts is fresh."""
    with Matchmaker(kv(empty_ttl_seconds=3600), backend=memory) as mm:
        assert mm.hosts("scheduler").hosts == ()
        waiting = in_thread(lambda: mm.wait_for_hosts("scheduler", timeout_seconds=60))
        other.register("scheduler", ONE)
        assert waiting.result(DEADLINE_SECONDS).hosts == (ONE,)


def test_waiting_for_hosts_that_are_there(mm: Matchmaker, memory: Memory) -> None:
    """Returns at once, whatever the timeout; also for one server."""
    memory.declare("scheduler", [ONE])
    assert mm.wait_for_hosts("scheduler", timeout_seconds=0).hosts == (ONE,)
    with mm.register("mails", TWO, server="node7") as registration:
        registration.wait_until_published(timeout_seconds=DEADLINE_SECONDS)
        found = mm.wait_for_hosts("mails", timeout_seconds=0, server="node7")
        assert found.hosts == (TWO,)


class HastyClock(ManualClock):
    """At each look a minute has gone by."""

    def __call__(self) -> float:
        self.advance(60)
        return self.now


def test_waiting_in_vain(memory: Memory) -> None:
    """No hosts and no Consul are two errors."""
    with Matchmaker(kv(), backend=memory, clock=HastyClock()) as mm:
        with pytest.raises(errors.NoLiveHosts, match=r"scheduler.*20 s"):
            mm.wait_for_hosts("scheduler", timeout_seconds=20)
        memory.is_available = False
        with pytest.raises(errors.TimedOut, match="told not to answer"):
            mm.wait_for_hosts("mails", timeout_seconds=20)
        memory.is_available, memory.is_denied = True, True
        with pytest.raises(errors.Denied):
            mm.wait_for_hosts("jobs", timeout_seconds=DEADLINE_SECONDS)


@pytest.mark.system
def test_waiting_through_an_outage(mm: Matchmaker, memory: Memory) -> None:
    """Consul absent at first is no reason to give up before the timeout."""
    memory.declare("scheduler", [ONE])
    memory.is_available = False
    waiting = in_thread(lambda: mm.wait_for_hosts("scheduler", timeout_seconds=DEADLINE_SECONDS))
    memory.is_available = True
    assert waiting.result(DEADLINE_SECONDS).hosts == (ONE,)


@pytest.mark.system
def test_waiting_where_no_answer_is_kept(memory: Memory) -> None:
    """With max_stale_seconds=0 and an outage in between, waiting goes on all the same."""
    settings = kv(max_stale_seconds=0, empty_ttl_seconds=0.05)
    with Matchmaker(settings, backend=memory) as mm:
        assert mm.hosts("scheduler").hosts == ()
        memory.is_available = False
        eventually(lambda: _watch_or_none(mm), lambda found: found is None)
        with pytest.raises(errors.TimedOut):
            mm.wait_for_hosts("scheduler", timeout_seconds=0.8)
        waiting = in_thread(lambda: mm.wait_for_hosts("scheduler", timeout_seconds=10))
        memory.declare("scheduler", [ONE])
        memory.is_available = True
        assert waiting.result(DEADLINE_SECONDS).hosts == (ONE,)


@pytest.mark.system
def test_waiting_asks_at_a_bounded_rate() -> None:
    """Eight threads that wait for one topic ask about twice a second, together."""
    consul = FakeResolver()
    with Matchmaker(catalog(), backend=consul) as mm:
        began = time.monotonic()
        waiting = [
            in_thread(lambda: mm.wait_for_hosts("scheduler", timeout_seconds=1.2)) for _ in range(8)
        ]
        for each in waiting:
            error = each.exception(DEADLINE_SECONDS)
            assert isinstance(error, (errors.NoLiveHosts, errors.TimedOut))  # the machine stopped
        assert consul.count("scheduler") <= 2 + 2 * (time.monotonic() - began)


@pytest.mark.system
def test_watching(memory: Memory, other: Matchmaker) -> None:
    """The first answer comes at once, then one for each change, until the matchmaker closes."""
    mm = Matchmaker(kv(ttl_seconds=0.1, ttl_min_seconds=0.1), backend=memory)
    snapshots = mm.watch("scheduler")
    assert next(snapshots).hosts == ()
    registration = other.register("scheduler", ONE)
    assert next(snapshots).hosts == (ONE,)
    registration.unregister()
    assert next(snapshots).hosts == ()
    rest = in_thread(lambda: list(snapshots))
    mm.close()
    assert rest.result(DEADLINE_SECONDS) == []


@pytest.mark.system
def test_watching_an_outage(memory: Memory) -> None:
    """Without a first answer it raises; later an outage is not a change, and not the end."""
    with Matchmaker(kv(ttl_seconds=0.05, max_stale_seconds=0), backend=memory) as mm:
        memory.is_available = False
        with pytest.raises(errors.Unavailable):
            mm.watch("scheduler")
        memory.is_available = True
        memory.declare("scheduler", [ONE])
        snapshots = eventually(lambda: _watch_or_none(mm), lambda found: found is not None)
        assert snapshots is not None
        assert next(snapshots).hosts == (ONE,)
        memory.is_available = False
        changed = in_thread(lambda: next(snapshots))
        memory.declare("scheduler", [TWO])
        memory.is_available = True
        assert changed.result(DEADLINE_SECONDS).hosts == (TWO,)


def _watch_or_none(mm: Matchmaker) -> Iterator[Snapshot] | None:
    try:
        return mm.watch("scheduler")
    except errors.Unavailable:
        return None


@pytest.mark.system
def test_a_topic_that_is_refused_starts_no_watch() -> None:
    """Bad input changes nothing: a watch would write to Consul."""
    with Matchmaker(Settings(mode="kv", addresses=("127.0.0.1:1",))) as mm:
        with pytest.raises(errors.InvalidTopic):
            mm.hosts("")
        assert "consul-matchmaker-watcher" not in {each.name for each in threading.enumerate()}


# -- registering


@pytest.mark.system
def test_register_and_unregister(mm: Matchmaker, other: Matchmaker) -> None:
    """What one process registers another sees, and sees leaving; other topics are untouched."""
    mm.register("mails", ONE)
    registration = mm.register("scheduler", "10.0.0.1:5001", server="node7")
    registration.wait_until_published(timeout_seconds=DEADLINE_SECONDS)
    assert other.hosts("scheduler").hosts == (ONE,)
    assert other.hosts("scheduler", server="node7").hosts == (ONE,)
    assert other.topics() == ["mails", "scheduler"]
    mm.unregister("scheduler", "10.0.0.1:5001")
    eventually(other.topics, lambda topics: topics == ["mails"])


@pytest.mark.system
def test_a_registration_is_a_context_manager(mm: Matchmaker, memory: Memory) -> None:
    """It ends with its block."""
    with mm.register("scheduler", ONE) as registration:
        registration.wait_until_published(timeout_seconds=DEADLINE_SECONDS)
        assert memory.lookup("scheduler", timeout_seconds=5).hosts == (ONE,)
    eventually(lambda: memory.lookup("scheduler", timeout_seconds=5), has())


@pytest.mark.system
def test_register_does_not_need_consul(mm: Matchmaker, memory: Memory) -> None:
    """It returns at once while Consul is away, and is carried out when it comes."""
    memory.is_available = False
    registration = mm.register("scheduler", ONE)
    with pytest.raises(errors.TimedOut, match="told not to answer"):
        registration.wait_until_published(timeout_seconds=0.2)
    memory.is_available = True
    registration.wait_until_published(timeout_seconds=DEADLINE_SECONDS)
    assert memory.lookup("scheduler", timeout_seconds=5).hosts == (ONE,)


@pytest.mark.parametrize(
    "host", ["10.0.0.1", "10.0.0.1:0", "10.0.0.1:65536", "::1:80", "", "a b:1"]
)
def test_a_malformed_host_is_refused(mm: Matchmaker, memory: Memory, host: str) -> None:
    """A typing error is not taken for an identity, and nothing is written."""
    for verb in (mm.register, mm.unregister, mm.acknowledge, mm.reject, mm.expire, mm.is_alive):
        with pytest.raises(errors.ConfigurationError):
            verb("scheduler", host)
    assert memory.topics() == []


def test_an_empty_topic_is_refused(mm: Matchmaker, memory: Memory) -> None:
    """By every verb that would ask or write."""
    for verb in (mm.hosts, mm.pick, mm.watch, lambda topic: mm.register(topic, ONE)):
        with pytest.raises(errors.InvalidTopic):
            verb("")
    assert memory.topics() == []


def test_a_text_that_is_no_unicode_is_refused(mm: Matchmaker, memory: Memory) -> None:
    """At once, by register itself, whichever of the texts it is."""
    for topic, host, server in (
        ("\ud800", ONE, None),
        ("scheduler", Host.opaque("\ud800"), None),
        ("scheduler", ONE, "\ud800"),
    ):
        with pytest.raises(errors.ConfigurationError):
            mm.register(topic, host, server)
    assert memory.topics() == []


def test_opaque_hosts(mm: Matchmaker, memory: Memory) -> None:
    """A ZeroMQ identity is registered as it is, when it is said to be one."""
    identity = Host.opaque("host/topic/server/1f2e")
    registration = mm.register("scheduler", identity)
    registration.wait_until_published(timeout_seconds=DEADLINE_SECONDS)
    assert mm.hosts("scheduler").hosts == (identity,)
    assert mm.pick("scheduler").port is None


@pytest.mark.system
def test_expire(mm: Matchmaker, memory: Memory) -> None:
    """It removes a host for everybody and says how often it was there; this process sees it at
    once, and the owner, which lives, comes back when it is asked to look."""
    with Matchmaker(kv(session_ttl_seconds=3600), backend=memory) as other:  # renews by itself late
        _expired_and_back(mm, other, memory)


def _expired_and_back(mm: Matchmaker, other: Matchmaker, memory: Memory) -> None:
    registration = other.register("scheduler", ONE)
    registration.wait_until_published(timeout_seconds=DEADLINE_SECONDS)
    assert mm.hosts("scheduler").hosts == (ONE,)
    assert mm.expire("scheduler", ONE) == 1
    assert mm.hosts("scheduler").hosts == ()
    assert mm.expire("scheduler", ONE) == 0
    other.acknowledge("scheduler", ONE)  # its own: renew and verify now
    eventually(lambda: memory.lookup("scheduler", timeout_seconds=5), has(ONE))


@pytest.mark.system
def test_closing_takes_everything_back(memory: Memory) -> None:
    """Registrations leave at once, the threads end, and every verb says Closed."""
    before = set(threading.enumerate())
    mm = Matchmaker(kv(ttl_seconds=0.001), backend=memory)
    mm.register("scheduler", ONE).wait_until_published(timeout_seconds=DEADLINE_SECONDS)
    eventually(lambda: mm.hosts("scheduler"), has(ONE))
    eventually(lambda: len(set(threading.enumerate()) - before), lambda _: _looked_up(mm))
    mm.close()
    mm.close()
    assert memory.lookup("scheduler", timeout_seconds=5).hosts == ()
    assert set(threading.enumerate()) <= before
    for verb in (
        lambda: mm.hosts("scheduler"),
        lambda: mm.pick("scheduler"),
        lambda: mm.wait_for_hosts("scheduler", timeout_seconds=1),
        lambda: mm.watch("scheduler"),
        lambda: mm.is_alive("scheduler", ONE),
        lambda: mm.register("scheduler", ONE),
        lambda: mm.unregister("scheduler", ONE),
        lambda: mm.acknowledge("scheduler", ONE),
        lambda: mm.reject("scheduler", ONE),
        lambda: mm.expire("scheduler", ONE),
        mm.topics,
    ):
        with pytest.raises(errors.Closed):
            verb()
    assert "closed" in repr(mm)
    assert mm.status()["is_closed"]


def _looked_up(mm: Matchmaker) -> bool:
    mm.hosts("scheduler")
    names = {thread.name for thread in threading.enumerate()}
    return {"consul-matchmaker-keeper", "consul-matchmaker-refresher"} <= names


@pytest.mark.system
def test_closing_ends_in_time_when_consul_hangs(caplog: pytest.LogCaptureFixture) -> None:
    """It returns within its timeout, all parts together, and says that it did not wait."""

    class Stubborn(FakeResolver):
        def close(self) -> None:
            """What is under way goes on."""

    consul, clock = Stubborn(), ManualClock()
    mm = Matchmaker(catalog(), backend=consul, clock=clock)
    mm.hosts("scheduler")
    consul.hold("scheduler")
    clock.advance(10)
    mm.hosts("scheduler")
    consul.wait_until_asked("scheduler")
    while consul.timeouts[-1] != LONGEST_SECONDS:  # it had little time, and is asked again
        time.sleep(0.01)
    began = time.monotonic()
    mm.close(timeout_seconds=0.1)
    assert time.monotonic() - began < DEADLINE_SECONDS / 2
    assert "did not answer" in caplog.text
    consul.let_go("scheduler")


@pytest.mark.system
def test_a_child_is_not_its_parent(memory: Memory) -> None:
    """After a fork the child holds no registration, can register by itself, and closes without
    touching the parent's; the answers it had are still there while it starts."""
    with Matchmaker(kv(), backend=memory) as mm:
        memory.declare("jobs", [TWO])
        mm.hosts("jobs")
        mm.register("scheduler", ONE).wait_until_published(timeout_seconds=DEADLINE_SECONDS)
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                memory.is_available = False
                assert mm.hosts("jobs").hosts == (TWO,)
                memory.is_available = True
                keeper = mm.status()["keeper"]
                assert isinstance(keeper, dict) and keeper["registrations"] == []
                mine = mm.register("mails", TWO)
                mine.wait_until_published(timeout_seconds=DEADLINE_SECONDS)
                assert memory.lookup("scheduler", timeout_seconds=5).hosts == (ONE,)
                mm.close()
                assert memory.lookup("mails", timeout_seconds=5).hosts == ()
                assert memory.lookup("scheduler", timeout_seconds=5).hosts == (ONE,)
                code = 0
            finally:
                os._exit(code)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
        assert memory.lookup("scheduler", timeout_seconds=5).hosts == (ONE,)
        with pytest.raises(errors.Closed):
            mm.close()
            mm.hosts("jobs")


def test_a_child_of_a_closed_one_is_closed(memory: Memory) -> None:
    """Closed means for ever, also after a fork."""
    mm = Matchmaker(kv(), backend=memory)
    mm.hosts("scheduler")
    mm.close()
    mm.after_fork()
    with pytest.raises(errors.Closed):
        mm.hosts("scheduler")
    with pytest.raises(errors.Closed):
        mm.register("scheduler", ONE)


def test_a_child_has_its_parents_wishes_no_more(memory: Memory) -> None:
    """Who waited in the parent is nobody in the child, whatever its locks were; a host that was
    rejected still is."""
    with Matchmaker(kv(), backend=memory) as mm:
        memory.declare("jobs", [ONE, TWO])
        mm.hosts("jobs")
        mm.reject("jobs", ONE)
        woken: list[bool] = []
        with mm.telling("jobs", lambda: woken.append(True)):
            for part in (mm._cache, mm._quarantine, mm._selector):
                part._lock.acquire()  # as when another thread held it at the moment of the fork
            mm.after_fork()
            memory.declare("jobs", [TWO])
            assert mm.expire("jobs", ONE) == 0  # asks anew
        assert woken == []
        assert mm.hosts("jobs").hosts == (TWO,)
        assert mm.status()["quarantine"] == {"jobs": [str(ONE)]}


@pytest.mark.system
def test_a_child_counts_from_0() -> None:
    """What its parent asked is the parent's."""
    settings = Settings(mode="catalog", addresses=("127.0.0.1:1",), request_timeout_seconds=0.1)
    with Matchmaker(settings) as mm:
        with pytest.raises(errors.Unavailable):
            mm.hosts("scheduler")
        asked = mm.status()["wire"]
        assert asked["udp"]["queries"] > 0  # type: ignore[index]
        mm.after_fork()
        begun = mm.status()["wire"]
        assert {count for each in begun.values() for count in each.values()} == {0}  # type: ignore[attr-defined]


def test_no_thread_before_the_first_call() -> None:
    """The constructor starts nothing; looking up starts nothing while answers are fresh."""
    before = set(threading.enumerate())
    for settings in (kv(), catalog()):
        with Matchmaker(settings, backend=Memory()) as mm:
            mm.hosts("scheduler")
            assert set(threading.enumerate()) <= before


# -- catalog mode


def test_catalog_registers_nothing(caplog: pytest.LogCaptureFixture) -> None:
    """Every verb of registration is accepted, does nothing, and that is said once."""
    caplog.set_level(logging.INFO)
    consul = FakeResolver("dns")
    consul.say("scheduler", str(ONE))
    with Matchmaker(catalog(), backend=consul) as mm:
        with mm.register("mails", "10.0.0.1:5001") as registration:
            registration.wait_until_published(timeout_seconds=0)
        mm.unregister("mails", ONE)
        assert mm.expire("mails", ONE) == 0
        mm.acknowledge("scheduler", ONE)
        assert mm.hosts("scheduler").hosts == (ONE,)
        assert mm.hosts("mails").hosts == ()
        with pytest.raises(errors.ConfigurationError, match="kv mode"):
            mm.topics()
        with pytest.raises(errors.ConfigurationError):
            mm.register("mails", "nonsense")
    assert [message for message in caplog.messages if "no effect" in message] == caplog.messages
    assert len(caplog.messages) == 1


# -- what it says of itself


def test_status_is_json_without_secrets(memory: Memory) -> None:
    """It can be dumped, names every part, and does not hold the token; nor does the repr."""
    settings = kv(token=SECRET, prefix="a/b", quarantine_seconds=30)
    with Matchmaker(settings, backend=memory) as mm:
        mm.register("scheduler", ONE).wait_until_published(timeout_seconds=DEADLINE_SECONDS)
        mm.hosts("scheduler")
        mm.reject("scheduler", ONE)
        text = json.dumps(mm.status())
        assert SECRET not in text + repr(mm) + repr(mm.settings)
        told = json.loads(text)
        assert told["mode"] == "kv"
        assert told["settings"]["addresses"] == ["127.0.0.1:8500"]
        assert told["settings"]["prefix"] == "a/b"
        assert told["cache"]["topics"] == 1
        assert told["keeper"]["registrations"][0]["topic"] == "scheduler"
        assert told["quarantine"] == {"scheduler": [str(ONE)]}
        assert "127.0.0.1:8500" in repr(mm) and "1 topics" in repr(mm)


def test_made_from_a_url() -> None:
    """The URL says the mode and the settings; a wrong one is refused before anything starts."""
    with Matchmaker.from_url("consul+kv://127.0.0.1:1/some/prefix?ttl_seconds=7") as mm:
        assert (mm.settings.mode, mm.settings.prefix) == ("kv", "some/prefix")
        assert mm.settings.ttl_seconds == 7
    with Matchmaker.from_url("consul+catalog://127.0.0.1:1") as mm:
        assert mm.settings.mode == "catalog"
    with pytest.raises(errors.ConfigurationError):
        Matchmaker.from_url("redis://127.0.0.1")
    with pytest.raises(errors.ConfigurationError):
        Matchmaker(Settings(mode="kv"), backend=FakeResolver())


def test_made_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """CONSUL_MATCHMAKER_URL says it all."""
    monkeypatch.setenv("CONSUL_MATCHMAKER_URL", "consul+kv://127.0.0.1:1/env")
    with Matchmaker.from_env() as mm:
        assert mm.settings.prefix == "env"


@pytest.mark.system
def test_an_agent_that_is_not_there() -> None:
    """Each mode says Unavailable, with the address, not an empty answer."""
    for url in (
        "consul+kv://127.0.0.1:1",
        "consul+catalog://127.0.0.1:1?request_timeout_seconds=0.2",
    ):
        with (
            Matchmaker.from_url(url) as mm,
            pytest.raises(errors.Unavailable, match=r"127\.0\.0\.1:1"),
        ):
            mm.hosts("scheduler")


# -- what a registration tells


def test_a_registration_tells_where_it_stands(mm: Matchmaker) -> None:
    """Its state, how long it surely lasts, and each change to who registered it."""
    changes: list[str] = []
    registration = mm.register(
        "scheduler", "10.0.0.1:5001", on_change=lambda _, change: changes.append(change)
    )
    registration.wait_until_published(timeout_seconds=DEADLINE_SECONDS)
    assert registration.state == "published"
    assert 0 < registration.margin_seconds <= mm.settings.session_ttl_seconds
    eventually(lambda: changes == ["held"], bool)
    registration.unregister()
    registration.wait_until_withdrawn(timeout_seconds=DEADLINE_SECONDS)
    registration.drain(seconds=0.01)
    assert registration.state == "withdrawn"
    assert registration.margin_seconds == 0
    with pytest.raises(errors.ConfigurationError, match="beat_seconds"):
        mm.register("scheduler", "10.0.0.1:5001", beat_seconds=0)


def test_a_host_that_no_reader_could_tell_is_refused(mm: Matchmaker) -> None:
    """Made without `Host.parse`, in another spelling than it gives."""
    with pytest.raises(errors.ConfigurationError):
        mm.register("scheduler", Host("0::1", 5001))


def test_in_catalog_mode_a_registration_is_consuls_affair() -> None:
    """The same program runs in both modes: what it asks of its registration does nothing there."""
    with Matchmaker(catalog(), backend=FakeResolver("dns")) as mm:
        registration = mm.register("scheduler", "10.0.0.1:5001", beat_seconds=1)
        registration.beat()
        registration.drain(seconds=60)
        assert registration.state == "published"
        assert registration.margin_seconds == float("inf")


# -- using a host, and why it is that one


def test_using_a_host(memory: Memory) -> None:
    """A block that raises rejects its host, one that ends acknowledges it; an interrupt and a
    missing host say nothing."""
    memory.declare("scheduler", [f"10.0.0.{number}:5000" for number in range(1, 6)])
    with Matchmaker(kv(quarantine_seconds=30), backend=memory) as mm:
        with pytest.raises(ConnectionRefusedError), mm.using("scheduler", key="k") as bad:
            raise ConnectionRefusedError
        assert mm.status()["quarantine"] == {"scheduler": [str(bad)]}
        assert mm.status()["quarantines"] == 1
        with mm.using("scheduler", key="k") as other:
            assert other != bad
        with pytest.raises(KeyboardInterrupt), mm.using("scheduler", key="k"):
            raise KeyboardInterrupt
        assert mm.status()["quarantine"] == {"scheduler": [str(bad)]}
        mm.acknowledge("scheduler", bad)
        with mm.using("scheduler", key="k") as again:
            assert again == bad
        with pytest.raises(errors.NoLiveHosts), mm.using("nobody"):
            raise AssertionError("there is no host")


def test_explaining_an_answer(memory: Memory) -> None:
    """Looked up first, and told with what callers rejected; an outage is told, not raised."""
    mm = Matchmaker(kv(quarantine_seconds=30), backend=memory)
    memory.declare("scheduler", [ONE, TWO, "10.0.0.3:5000"])
    mm.reject("scheduler", ONE)
    told = json.loads(json.dumps(mm.explain("scheduler")))
    assert told["state"] == "fresh"
    assert told["answer"]["source"] == "memory"
    assert [each["host"] for each in told["answer"]["hosts"]][:2] == [str(ONE), str(TWO)]
    assert told["rejected"] == {str(ONE): "avoided by pick"}
    for other in (TWO, "10.0.0.3:5000"):
        mm.reject("scheduler", other)
    assert "too many" in str(mm.explain("scheduler")["rejected"])
    memory.is_available = False
    told = json.loads(json.dumps(mm.explain("mails")))
    assert "no answer" in told["state"]
    assert "told not to answer" in told["last_error"]
    with pytest.raises(errors.InvalidTopic):
        mm.explain("")
    mm.close()


@pytest.mark.system
def test_waiting_ends_in_time_although_consul_hangs() -> None:
    """However long a question hangs, for a topic or a server of it, the wait is as long as asked
    for; the error says so."""
    consul = FakeResolver(finds_servers=True)
    consul.hold("scheduler")
    with Matchmaker(catalog(), backend=consul) as mm:
        for timeout_seconds in (0.0, 0.3):
            began = time.monotonic()
            with pytest.raises(errors.TimedOut, match=r"scheduler as node1 within 0(\.3)? s"):
                mm.wait_for_hosts("scheduler", timeout_seconds=timeout_seconds, server="node1")
            assert time.monotonic() - began < DEADLINE_SECONDS / 2
        consul.say("scheduler", str(ONE))
        waiting = in_thread(lambda: mm.wait_for_hosts("scheduler", timeout_seconds=float("inf")))
        consul.let_go("scheduler")
        assert waiting.result(DEADLINE_SECONDS).hosts == (ONE,)


def test_the_next_change(memory: Memory) -> None:
    """The hosts once they are others, None when they stay what they are."""
    memory.declare("scheduler", [ONE])
    with Matchmaker(kv(ttl_seconds=0.05), backend=memory) as mm:
        seen = mm.hosts("scheduler")
        assert mm.next_change(seen, timeout_seconds=0) is None
        assert mm.cached_hosts("nobody") is None
        held = mm.cached_hosts("scheduler")
        assert held is not None and held.hosts == (ONE,)
        changing = in_thread(lambda: mm.next_change(seen, timeout_seconds=DEADLINE_SECONDS))
        memory.declare("scheduler", [TWO])
        changed = changing.result(2 * DEADLINE_SECONDS)
        assert changed is not None and changed.hosts == (TWO,)


# -- what has no thread, and what interrupts a call


@pytest.mark.system
@pytest.mark.finding("B6")
def test_a_lookup_is_answered_although_no_thread_can_watch() -> None:
    """Consul is asked by the caller; the watch begins with a later lookup."""
    with Matchmaker(kv(addresses="127.0.0.1:1", request_timeout_seconds=0.1)) as mm:
        assert mm._watcher is not None
        with no_thread_to_be_had(), pytest.raises(errors.Unavailable):
            mm.hosts("scheduler")
        assert not mm._watcher._worker.is_running
        with pytest.raises(errors.Unavailable):
            mm.hosts("conductor")
        assert mm._watcher._worker.is_running


@pytest.mark.finding("D6")
def test_leases_are_timed_by_a_clock_that_goes_on_while_the_machine_is_suspended() -> None:
    """Unless another is given: how long Consul surely shows us is a fence."""
    clock = ManualClock()
    with Matchmaker(kv(), backend=Memory()) as mm, Matchmaker(kv(), clock=clock) as other:
        assert mm._keeper is not None and other._keeper is not None
        assert mm._keeper._clock is seconds_since_boot
        assert other._keeper._clock is clock


@pytest.mark.finding("E4")
def test_closing_inside_another_call_is_refused_at_once(mm: Matchmaker, memory: Memory) -> None:
    """As a signal handler would that interrupts it; nothing is done, and it says what to do."""
    interrupted: list[str] = []

    def lookup(topic: str, server: str | None = None, *, timeout_seconds: float) -> Snapshot:
        with pytest.raises(RuntimeError, match=r"interrupts hosts\(\) .* set a flag"):
            mm.close()
        interrupted.append(topic)
        return Snapshot(topic, (), "memory")

    memory.lookup = lookup  # type: ignore[method-assign]
    mm.hosts("scheduler")
    assert interrupted == ["scheduler"]
    assert mm.status()["is_closed"] is False
    mm.close()
    mm.close()
    assert mm.status()["is_closed"] is True


@pytest.mark.finding("C8")
def test_no_thread_is_left_of_a_wait_that_ended() -> None:
    """A short wait for a topic that Consul does not answer leaves nothing behind after close."""
    consul = FakeResolver()
    consul.hold("scheduler")
    mm = Matchmaker(catalog(), backend=consul)
    before = set(threading.enumerate())
    try:
        with pytest.raises(errors.TimedOut):
            mm.wait_for_hosts("scheduler", timeout_seconds=0)
        mm.close(0.1)
        left = set(threading.enumerate()) - before
    finally:
        consul.let_go("scheduler")
    assert not left
