"""What upstream's code asks of a matchmaker beyond its documents, shown with its own classes."""

import logging
import subprocess
import sys
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from oslo_config import cfg

from consul_matchmaker import Matchmaker, Settings, errors
from consul_matchmaker.adapters import oslo_zmq
from consul_matchmaker.adapters.oslo.config import options, read_settings
from consul_matchmaker.adapters.oslo.entry_point import matchmaker as entry_point
from consul_matchmaker.adapters.oslo.zmq.driver import ConsulDriver
from consul_matchmaker.adapters.oslo.zmq.enable import upstream_imports
from consul_matchmaker.adapters.oslo.zmq.matchmaker import LATE_SECONDS, _remember
from consul_matchmaker.backends.memory import Memory
from tests.doubles import ManualClock

with upstream_imports():
    import oslo_messaging
    from oslo_messaging._drivers import impl_zmq
    from oslo_messaging._drivers.zmq_driver import zmq_options
    from oslo_messaging._drivers.zmq_driver.client import zmq_routing_table
    from oslo_messaging._drivers.zmq_driver.matchmaker.zmq_matchmaker_base import (
        MatchmakerUnavailable,
    )

WAIT = 0.5
ONE, TWO = "10.0.0.1:9501", "10.0.0.2:9501"


@pytest.fixture
def conf() -> cfg.ConfigOpts:
    conf = cfg.ConfigOpts()
    conf([])
    zmq_options.register_opts(conf, oslo_messaging.TransportURL.parse(conf, "zmq://"))
    conf.register_opts(options(), "matchmaker_consul")
    conf.set_override("wait_timeout", WAIT, "matchmaker_consul")
    return conf


@pytest.fixture
def memory() -> Memory:
    return Memory()


@pytest.mark.finding("C12")
def test_targets_that_were_are_forgotten(conf: cfg.ConfigOpts, memory: Memory) -> None:
    """As many are remembered as topics are, however many there were."""
    conf.set_override("max_topics", 20, "matchmaker_consul")
    ours = oslo_zmq.MatchmakerConsul(
        conf, matchmaker=Matchmaker(Settings(mode="kv", max_topics=20), backend=memory)
    )
    for number in range(100):
        target = oslo_messaging.Target(topic=f"reply_{number}", server=f"s{number}")
        memory.declare(f"DEALER/reply_{number}", [ONE])
        ours.ask_before_send(target, "DEALER", timeout_seconds=1, wait=False)
        ours.get_hosts(target, "DEALER")
    tables = [ours._known, ours._keys, ours._asked_before]
    assert [len(table) for table in tables if len(table) > 20] == []


def test_a_target_in_use_outlives_many_others() -> None:
    """What goes is what was put longest ago, also when it was put before."""
    table: OrderedDict[str, int] = OrderedDict()
    for number in range(100):
        _remember(table, "in use", number, 20)
        _remember(table, f"reply_{number}", number, 20)
    assert table["in use"] == 99
    assert len(table) == 20


class Hanging(Memory):
    """Takes every question and answers none within its time."""

    longest_lookup_seconds = 300.0

    def lookup(self, topic: str, server: str | None = None, *, timeout_seconds: float = 300) -> Any:
        threading.Event().wait(timeout_seconds)
        raise errors.TimedOut(f"{topic}: nothing came within {timeout_seconds:g} s")


@pytest.fixture
def make(conf: cfg.ConfigOpts, memory: Memory) -> Iterator[Callable[..., Any]]:
    """Makes matchmakers of processes of their own, as it were."""
    made = []

    def make_one(**words: Any) -> Any:
        settings = Settings(mode="kv", ttl_seconds=0, empty_ttl_seconds=0)
        made.append(Matchmaker(settings, backend=memory))
        return oslo_zmq.MatchmakerConsul(conf, matchmaker=made[-1], **words)

    yield make_one
    for each in made:
        each.close()


def target(topic: str = "sched", server: str | None = None, fanout: bool = False) -> Any:
    return oslo_messaging.Target(topic=topic, server=server, fanout=fanout)


def until(claim: Callable[[], object]) -> None:
    deadline = time.monotonic() + 5
    while not claim():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def in_thread(call: Callable[[], object]) -> None:
    thread = threading.Thread(target=call)
    thread.start()
    thread.join()


def test_no_host_raises_within_the_wait_timeout(make: Callable[..., Any]) -> None:
    """An empty list would spoil the target for ever; upstream's routing table recovers."""
    matchmaker = make()
    began = time.monotonic()
    for lookup in (matchmaker.get_hosts_retry, matchmaker.get_hosts_fanout_retry):
        with pytest.raises(MatchmakerUnavailable):
            lookup(target(), "ROUTER")
    assert 2 * WAIT <= time.monotonic() - began < 2 * WAIT + 1
    assert matchmaker.get_hosts(target(), "ROUTER") == []


def test_a_host_that_comes_while_waiting_is_returned(make: Callable[..., Any]) -> None:
    """The first message to a topic does not need its server to be first."""
    matchmaker, server = make(), make()
    timer = threading.Timer(0.1, server.register, [target(), ONE, "ROUTER"])
    timer.start()
    assert matchmaker.get_hosts_retry(target(), "ROUTER") == [ONE]


def test_the_real_routing_table_recovers(conf: cfg.ConfigOpts, make: Callable[..., Any]) -> None:
    """Nobody at first; then a server; all gone for a while; another: each time the right host."""
    client, server = make(), make()
    table = zmq_routing_table.RoutingTableAdaptor(conf, client, 6)  # zmq.ROUTER
    table.routing_table_updater.stop()
    with pytest.raises(MatchmakerUnavailable):
        table.get_round_robin_host(target())
    server.register(target(), ONE, "ROUTER")
    assert table.get_round_robin_host(target()) == ONE
    server.unregister(target(), ONE, "ROUTER")
    until(lambda: client.get_hosts(target(), "ROUTER") == [])
    table.routing_table_updater._update_routing_table()
    assert table.get_round_robin_host(target()) == ONE, "the last known"
    server.register(target(), TWO, "ROUTER")
    until(lambda: client.get_hosts(target(), "ROUTER") == [TWO])
    table.routing_table_updater._update_routing_table()
    assert table.get_round_robin_host(target()) == TWO


def test_hosts_by_key_survive_an_outage(make: Callable[..., Any], memory: Memory) -> None:
    """The last known hosts for what is known; for anything else upstream's own error, no other."""
    client, server = make(), make()
    server.register(target(server="node7"), ONE, "ROUTER")
    assert client.get_hosts_retry(target(server="node7"), "ROUTER") == [ONE]
    memory.is_available = False
    assert client.get_hosts_by_key("ROUTER/sched/node7") == [ONE]
    for key in ("ROUTER/other", "ROUTER/other/x", "nonsense"):
        with pytest.raises(MatchmakerUnavailable):
            client.get_hosts_by_key(key)


@pytest.mark.parametrize("outage", ["is_available", "is_denied"])
def test_every_error_is_upstreams(make: Callable[..., Any], memory: Memory, outage: str) -> None:
    """Lookups and registering raise MatchmakerUnavailable, all other calls nothing."""
    matchmaker = make()
    matchmaker.register(target(), TWO, "ROUTER")
    setattr(memory, outage, outage == "is_denied")
    for call in (matchmaker.get_hosts, matchmaker.get_hosts_retry, matchmaker.get_hosts_fanout):
        with pytest.raises(MatchmakerUnavailable):
            call(target("other"), "ROUTER")
    with pytest.raises(MatchmakerUnavailable):
        matchmaker.register(target(), ONE, "ROUTER")
    matchmaker.unregister(target(), TWO, "ROUTER")
    matchmaker.register_publisher((ONE, TWO), expire=300)
    matchmaker.register_router(ONE, expire=300)
    assert matchmaker.get_publishers() == matchmaker.get_routers() == []
    setattr(memory, outage, outage == "is_available")
    until(lambda: matchmaker.get_hosts(target(), "ROUTER") == [ONE])


def test_consul_that_hangs_is_not_waited_for(conf: cfg.ConfigOpts) -> None:
    """Every lookup ends with upstream's error while the question is still open; and what was asked
    before a message, outside of upstream's lock, is not asked again inside of it."""
    hanging = Hanging()
    settings = Settings(mode="kv", request_timeout_seconds=300)
    with Matchmaker(settings, backend=hanging) as own:
        matchmaker = oslo_zmq.MatchmakerConsul(conf, matchmaker=own)
        for number, lookup in enumerate(
            (
                matchmaker.get_hosts,
                matchmaker.get_hosts_fanout,
                matchmaker.get_hosts_retry,
                matchmaker.get_hosts_fanout_retry,
            )
        ):
            with pytest.raises(MatchmakerUnavailable):
                lookup(target(f"sched{number}"), "ROUTER")
        with pytest.raises(MatchmakerUnavailable):
            matchmaker.get_hosts_by_key("ROUTER/sched")
        assert matchmaker.get_publishers() == matchmaker.get_routers() == []
        for wait in (True, False):
            matchmaker.ask_before_send(target(), "ROUTER", timeout_seconds=60, wait=wait)
        conf.set_override("wait_timeout", 60, "matchmaker_consul")
        patient = oslo_zmq.MatchmakerConsul(conf, matchmaker=own)
        patient.ask_before_send(target(), "ROUTER", timeout_seconds=WAIT, wait=True)
        for lookup in (patient.get_hosts_retry, patient.get_hosts_fanout):
            began = time.monotonic()
            with pytest.raises(MatchmakerUnavailable):
                lookup(target(), "ROUTER")
            assert time.monotonic() - began < 30


def test_the_answer_belongs_to_the_caller(make: Callable[..., Any]) -> None:
    """What it does to the list is not seen by the next one."""
    server, client = make(), make()
    server.register(target(), ONE, "ROUTER")
    server.register_router(TWO)
    lookups: list[Callable[[], list[str]]] = [
        lambda: client.get_hosts(target(), "ROUTER"),
        lambda: client.get_hosts_retry(target(), "ROUTER"),
        lambda: client.get_hosts_fanout(target(), "ROUTER"),
        lambda: client.get_hosts_by_key("ROUTER/sched"),
    ]
    for lookup in lookups:
        lookup().clear()
        assert lookup() == [ONE]
    client.get_routers().clear()
    assert client.get_routers() == [TWO]


def test_what_release_2_6_asks_for(make: Callable[..., Any]) -> None:
    """No type of listener, and one host at a time; its own errors when there is none."""
    server, client = make(), make()
    with pytest.raises(oslo_messaging.InvalidTarget):
        client.get_single_host(target())
    with pytest.raises(oslo_messaging.MessagingTimeout):
        client.get_single_host(target(), 1)
    server.register(target=target(), hostname=ONE)
    until(lambda: client.get_hosts(target()) == [ONE])
    assert client.get_single_host(target(), 1) == ONE
    server.unregister(target(), ONE)
    until(lambda: client.get_hosts(target()) == [])


def test_types_and_bytes_come_back(make: Callable[..., Any]) -> None:
    """Addresses as texts, socket identities as bytes, pairs as tuples."""
    server, client = make(), make()
    identity = b"host/sched/node7/\x00\xff\xfe"
    server.register(target(server="node7"), identity, "DEALER")
    server.register(target(server="node7"), ONE, "ROUTER")
    server.register_publisher((ONE, TWO), expire=300)
    server.register_router(TWO, expire=300)
    assert client.get_hosts(target(server="node7"), "DEALER") == [identity]
    assert client.get_hosts_fanout(target(fanout=True), "DEALER") == [identity]
    assert client.get_hosts(target(), "ROUTER") == [ONE]
    assert client.get_publishers() == [(ONE, TWO)]
    assert client.get_routers() == [TWO]
    server.unregister_publisher((ONE, TWO))
    server.unregister_router(TWO)
    until(lambda: client.get_publishers() == client.get_routers() == [])


def test_unregistering_touches_one_topic(make: Callable[..., Any]) -> None:
    """Redis drops the host from every topic until its next update (traps 1.1)."""
    server, client = make(), make()
    for topic in ("sched", "conductor"):
        server.register(target(topic), ONE, "ROUTER")
        assert client.get_hosts(target(topic), "ROUTER") == [ONE]
    server.unregister(target("sched"), ONE, "ROUTER")
    until(lambda: client.get_hosts(target("sched"), "ROUTER") == [])
    assert client.get_hosts(target("conductor"), "ROUTER") == [ONE]


def test_a_late_register_does_not_bring_a_stopped_server_back(
    make: Callable[..., Any], memory: Memory
) -> None:
    """Not from the updater that had not seen the stop; a new server at the same place is taken."""
    clock = ManualClock()
    server = make(clock=clock)

    def register() -> None:
        server.register(target(), ONE, "ROUTER")

    def found() -> list[str]:
        return [str(host) for host in memory.lookup("sched")]

    register()
    in_thread(register)
    server.unregister(target(), ONE, "ROUTER")
    in_thread(register)
    assert found() == []
    register()
    assert found() == [ONE], "another server, by the same thread"
    server.unregister(target(), ONE, "ROUTER")
    in_thread(register)
    in_thread(register)
    assert found() == [ONE], "another server, by other threads"
    server.unregister(target(), ONE, "ROUTER")
    clock.now += LATE_SECONDS
    in_thread(register)
    assert found() == [ONE], "nobody is that late"


def test_the_constructor_opens_nothing(conf: cfg.ConfigOpts) -> None:
    """Upstream builds it before services fork; no Consul is needed."""
    program = """
import gc, socket, threading
from oslo_config import cfg
from consul_matchmaker.adapters.oslo_zmq import enable
enable()
import oslo_messaging
conf = cfg.ConfigOpts()
conf([])
transport = oslo_messaging.get_rpc_transport(conf, url="zmq+consul://127.0.0.1:1/")
assert threading.active_count() == 1, threading.enumerate()
assert not [each for each in gc.get_objects() if isinstance(each, socket.socket)]
"""
    subprocess.run([sys.executable, "-W", "ignore", "-c", program], check=True, timeout=60)


def test_enable_and_disable(conf: cfg.ConfigOpts) -> None:
    """Enabling twice is enabling once, and disabling puts back what was there, to the object."""
    (option,) = (each for each in zmq_options.zmq_opts if each.name == "rpc_zmq_matchmaker")

    def state() -> list[Any]:
        driver = impl_zmq.ZmqDriver
        return [
            zmq_options.MATCHMAKER_BACKENDS,
            dict(option.type.choices),
            zmq_options.register_opts,
            driver.send,
            driver.send_notification,
        ]

    before = state()
    oslo_zmq.enable()
    oslo_zmq.enable()
    assert zmq_options.MATCHMAKER_BACKENDS == ("redis", "sentinel", "dummy", "consul")
    conf.set_override("rpc_zmq_matchmaker", "consul", "oslo_messaging_zmq")
    conf.clear_override("rpc_zmq_matchmaker", "oslo_messaging_zmq")
    oslo_zmq.disable()
    oslo_zmq.disable()
    assert state() == before
    with pytest.raises(ValueError, match="consul"):
        conf.set_override("rpc_zmq_matchmaker", "consul", "oslo_messaging_zmq")


def test_the_driver_is_made_by_a_function(conf: cfg.ConfigOpts) -> None:
    """Upstream loads what the entry point names, calls it, and asks no class for anything."""
    transport = oslo_messaging.get_rpc_transport(conf, url="consul+zmq://127.0.0.1:1/")
    assert isinstance(transport._driver, ConsulDriver)
    assert isinstance(transport._driver.matchmaker, oslo_zmq.MatchmakerConsul)


def test_a_transport_of_another_release_says_what_to_install(conf: cfg.ConfigOpts) -> None:
    """Upstream hands our errors on as they are."""
    with pytest.raises(ImportError, match=r"14 or later.*pip install .*\[oslo-http\]"):
        oslo_messaging.get_rpc_transport(conf, url="consul+http://127.0.0.1:1/")


@pytest.mark.parametrize("scheme", ["consul", "consul+kv"])
def test_a_transport_that_there_is_not_is_refused(conf: cfg.ConfigOpts, scheme: str) -> None:
    """The error names those that there are."""
    with pytest.raises(errors.ConfigurationError, match=r"consul\+zmq://.*consul\+http://"):
        oslo_messaging.get_rpc_transport(conf, url=f"{scheme}://127.0.0.1:1/")


def test_nothing_is_wrapped_twice() -> None:
    """Our own driver after `enable`: the wait before a message is one wait."""
    from consul_matchmaker.adapters.oslo.zmq.enable import sending

    plain = impl_zmq.ZmqDriver.send
    assert sending(sending(plain)).__wrapped__ is plain  # type: ignore[attr-defined]


def test_the_shim_leaves_nothing_behind() -> None:
    """Python is afterwards as it was, also for those who look for what it took away."""
    import collections

    assert not hasattr(collections, "Mapping")


def test_urls_and_options(conf: cfg.ConfigOpts, monkeypatch: pytest.MonkeyPatch) -> None:
    """The URL wins over the group, the group over the environment; tokens are not shown."""
    monkeypatch.setenv("CONSUL_MATCHMAKER_TTL_SECONDS", "7")
    conf.set_override("ttl_seconds", 8, "matchmaker_consul")
    conf.set_override("prefix", "group", "matchmaker_consul")

    def read(url: str) -> Settings:
        parsed = oslo_messaging.TransportURL.parse(conf, url)
        settings, _ = read_settings(conf, parsed)
        return settings

    settings = read("zmq+consul://:b1gs3cr3t@a:1,[::1]:2/?session_ttl_seconds=12")
    assert list(map(str, settings.addresses)) == ["a:1", "[::1]:2"]
    assert (settings.token, settings.prefix, settings.mode) == ("b1gs3cr3t", "group", "kv")
    assert (settings.session_ttl_seconds, settings.ttl_seconds) == (12, 8)
    assert "b1gs3cr3t" not in repr(settings)
    assert [option.name for option in options() if option.secret] == ["token"]
    conf.clear_override("ttl_seconds", "matchmaker_consul")
    assert read("zmq+consul://a/own").prefix == "own"
    assert read("zmq+consul://a/").ttl_seconds == 7
    assert str(read("zmq+consul://a/?mode=catalog").addresses[0]) == "a:8600"
    with pytest.raises(ValueError, match="TOKEN") as error:
        read("zmq+consul://user:b1gs3cr3t@a/")
    assert "b1gs3cr3t" not in str(error.value)


def test_update_and_expire(
    conf: cfg.ConfigOpts, make: Callable[..., Any], caplog: pytest.LogCaptureFixture
) -> None:
    """Upstream's 180 s between looks become 5 s, unless it was told; an expiry below what a crash
    takes is said, once."""
    url = oslo_messaging.TransportURL.parse(conf, "zmq+consul://127.0.0.1:1/")
    entry_point(conf, url=url)
    assert conf.oslo_messaging_zmq.zmq_target_update == 5
    conf.set_override("zmq_target_update", 60, "oslo_messaging_zmq")
    entry_point(conf, url=url)
    assert conf.oslo_messaging_zmq.zmq_target_update == 60
    server = make()
    with caplog.at_level(logging.WARNING):
        server.register(target(), ONE, "ROUTER", expire=5)
        server.register(target(), ONE, "ROUTER", expire=5)
    assert len([r for r in caplog.records if "zmq_target_expire" in r.getMessage()]) == 1


def test_sample_configuration(tmp_path: Any) -> None:
    """The real oslo-config-generator writes it, and it reads back as the defaults."""
    from pathlib import Path

    path = tmp_path / "sample.conf"
    program = Path(sys.executable).parent / "oslo-config-generator"
    words = ["--namespace", "consul_matchmaker", "--output-file", str(path)]
    subprocess.run([str(program), *words], check=True, timeout=60)
    text = path.read_text()
    assert text.count("[matchmaker_consul]") == 1
    for name in ("mode", "addresses", "token", "session_ttl_seconds", "wait_timeout"):
        assert f"\n#{name} = " in text
    lines = [line for line in text.splitlines() if "= <None>" not in line]
    lines = [line.removeprefix("#") if line.startswith("#") and not line.startswith("# ") else line
             for line in lines]  # fmt: skip
    path.write_text("\n".join([*lines, "mode = kv", ""]))
    conf = cfg.ConfigOpts()
    conf(["--config-file", str(path)])
    settings, wait_timeout = read_settings(conf)
    assert settings == Settings(mode="kv")
    assert wait_timeout == 5.0
