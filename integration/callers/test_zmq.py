"""ZeroMQ sockets that follow a topic, and what a bound one is registered as."""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
import zmq
import zmq.asyncio

from consul_matchmaker import Host, Matchmaker, Settings, aio, errors
from consul_matchmaker.adapters.zmq import Changes, advertise, follow, following
from consul_matchmaker.backends.memory import Memory
from consul_matchmaker.model import Instance, Snapshot
from consul_matchmaker.registrations.wanted import own_address
from consul_matchmaker.testing.consul_probe import Node
from integration.waiting import threads_since, until

SECONDS = 60.0
"""A deadline; nothing here takes so long."""
TTL = 0.05
Make = Callable[..., Any]


@pytest.fixture
def memory() -> Memory:
    return Memory()


@pytest.fixture
def mm(memory: Memory) -> Iterator[Matchmaker]:
    settings = Settings(mode="kv", ttl_seconds=TTL, empty_ttl_seconds=TTL)
    with Matchmaker(settings, backend=memory) as matchmaker:
        yield matchmaker


@pytest.fixture
def make() -> Iterator[Make]:
    """Make a socket of that kind; with an endpoint, a bound one, and tell its host too."""
    context = zmq.Context()

    def made(kind: int, endpoint: str | None = None, **options: object) -> Any:
        socket = context.socket(kind)
        socket.linger = 0
        socket.rcvtimeo = socket.sndtimeo = round(SECONDS * 1000)
        for name, value in options.items():
            setattr(socket, name, value)
        if endpoint is None:
            return socket
        socket.bind(endpoint)
        return socket, Host.parse(socket.last_endpoint.decode().removeprefix("tcp://"))

    yield made
    context.destroy(linger=0)


def servers(make: Make, count: int, kind: int = zmq.PULL) -> dict[Host, Any]:
    made = (make(kind, "tcp://127.0.0.1:*") for _ in range(count))
    return {host: socket for socket, host in made}


def lookups(mm: Matchmaker) -> int:
    cache: Any = mm.status()["cache"]
    return sum(cache["lookups_that_found"].values())


def open_files() -> int:
    return sum(1 for _ in Path("/dev/fd").iterdir())


def changed(follower: Any) -> Changes:
    """What the next update that has an effect does."""
    poller = zmq.Poller()
    poller.register(follower, zmq.POLLIN)
    while True:
        assert poller.poll(SECONDS * 1000) == [(follower.fileno(), zmq.POLLIN)]
        if changes := follower.update():
            return changes


# --- a bound socket is registered ----------------------------------------------------------------


def test_a_bound_socket_is_registered_at_its_port(mm: Matchmaker, make: Make) -> None:
    """The port that the system chose, with the options of register."""
    socket, host = make(zmq.ROUTER, "tcp://127.0.0.1:*")
    with advertise(mm, "jobs", socket, server="one", beat_seconds=60) as registration:
        registration.wait_until_published(timeout_seconds=SECONDS)
        assert registration.host == host
        assert mm.hosts("jobs", "one").hosts == (host,)
        registration.beat()


def test_a_socket_on_every_address_is_registered_at_the_address_given(
    mm: Matchmaker, make: Make
) -> None:
    """As one of this machine, in IPv4 and IPv6; never as 0.0.0.0."""
    four, host = make(zmq.ROUTER, "tcp://*:*")
    six, host_six = make(zmq.ROUTER, "tcp://*:*", ipv6=True)
    assert (host.address, host_six.address) == ("0.0.0.0", "::")
    assert advertise(mm, "a", four, address="10.0.0.5").host == Host("10.0.0.5", host.port)
    assert advertise(mm, "b", six, address="FD00::5").host == Host("fd00::5", host_six.port)
    assert advertise(mm, "c", six, address="a.example").host == Host("a.example", host_six.port)


@pytest.mark.parametrize("agent", ["127.0.0.1:8500", "[2001:db8::1]:8500"])
def test_a_socket_on_every_address_finds_the_one_of_this_machine(agent: str, make: Make) -> None:
    """As register does with a port; where that is of IPv6, a socket of IPv4 is refused."""
    socket, host = make(zmq.ROUTER, "tcp://*:*")
    dual, dual_host = make(zmq.ROUTER, "tcp://*:*", ipv6=True)
    settings = Settings(mode="kv", addresses=(Host.parse(agent),))
    with Matchmaker(settings, backend=Memory()) as mm:
        try:
            own = own_address(settings.addresses[0])
        except errors.ConfigurationError:
            with pytest.raises(errors.ConfigurationError, match="no address"):
                advertise(mm, "jobs", socket)
            return
        assert advertise(mm, "jobs", dual).host == Host(own, dual_host.port)
        if ":" in own:
            with pytest.raises(errors.ConfigurationError, match=r"IPv4 only: set socket\.ipv6"):
                advertise(mm, "jobs", socket)
        else:
            assert advertise(mm, "jobs", socket).host == Host(own, host.port)


@pytest.mark.parametrize(
    ("endpoint", "says"),
    [
        (None, "not bound"),
        ("inproc://jobs", "bound to inproc://jobs, which other machines cannot reach"),
        ("ipc://{folder}/jobs", "/jobs, which other machines cannot reach"),
    ],
)
def test_what_nobody_can_reach_is_refused(
    endpoint: str | None, says: str, mm: Matchmaker, make: Make, tmp_path: Any
) -> None:
    """An unbound socket, and one of this machine only; nothing is registered."""
    socket = make(zmq.ROUTER)
    if endpoint is not None:
        socket.bind(endpoint.format(folder=tmp_path))
    with pytest.raises(errors.ConfigurationError, match=says):
        advertise(mm, "jobs", socket)
    assert mm.status()["keeper"]["registrations"] == []  # type: ignore[index]


def test_advertise_refuses_what_register_refuses(mm: Matchmaker, make: Make) -> None:
    """And a closed socket with ZeroMQ's own error."""
    socket, _ = make(zmq.ROUTER, "tcp://127.0.0.1:*")
    with pytest.raises(errors.ConfigurationError, match="service mode"):
        advertise(mm, "jobs", socket, tags=["a"])
    with pytest.raises(errors.ConfigurationError, match="no IPv6 address"):
        advertise(mm, "jobs", socket, address="10.0.0.5:80")
    socket.close()
    with pytest.raises(zmq.ZMQError):
        advertise(mm, "jobs", socket)


# --- a socket that follows -----------------------------------------------------------------------


def test_messages_go_to_every_host_in_turn(mm: Matchmaker, memory: Memory, make: Make) -> None:
    """Each of three gets two of six."""
    pulls = servers(make, 3)
    memory.declare("jobs", pulls)
    push = make(zmq.PUSH)
    with follow(mm, "jobs", push) as follower:
        assert follower.hosts == tuple(sorted(pulls))
        for number in range(6):
            push.send(b"%d" % number)
        assert sorted(pull.recv() for pull in pulls.values() for _ in range(2)) == [
            *(b"%d" % number for number in range(6))
        ]
        assert repr(follower) == "<Follower of jobs, connected to 3 hosts>"


def test_an_update_connects_the_new_and_disconnects_the_gone(
    mm: Matchmaker, memory: Memory, make: Make
) -> None:
    """It says which; the descriptor is readable until then, and not once more."""
    (old, stays, new), pulls = (all_three := servers(make, 3)), all_three
    memory.declare("jobs", [old, stays])
    push = make(zmq.PUSH)
    with follow(mm, "jobs", push) as follower:
        memory.declare("jobs", [stays, new])
        assert changed(follower) == Changes((new,), (old,))
        for _ in range(4):
            push.send(b"x")
        for host in (stays, new, stays, new):
            assert pulls[host].recv() == b"x"
        assert pulls[old].poll(0) == 0


def test_an_update_without_a_change_asks_nothing(
    mm: Matchmaker, memory: Memory, make: Make
) -> None:
    """A thousand of them are no lookup, and say that nothing changed."""
    memory.declare("jobs", ["127.0.0.1:9"])
    with follow(mm, "jobs", make(zmq.PUSH)) as follower:
        before = lookups(mm)
        assert not any(follower.update() for _ in range(1000))
        assert lookups(mm) == before


def test_many_changes_are_one_update(mm: Matchmaker, memory: Memory, make: Make) -> None:
    """Who does not look for a while is told once, or twice where the last came meanwhile."""
    with follow(mm, "jobs", make(zmq.PUSH)) as follower:
        for port in range(1, 11):
            memory.declare("jobs", [host := Host("127.0.0.1", port)])
            until(lambda host=host: mm.hosts("jobs").hosts == (host,), SECONDS)  # type: ignore[misc]
        poller = zmq.Poller()
        poller.register(follower, zmq.POLLIN)
        updates = 0
        while follower.hosts != (host,) or poller.poll(0):
            assert poller.poll(SECONDS * 1000)
            follower.update()
            updates += 1
        assert updates <= 2


def test_the_socket_is_connected_to_exactly_the_live_hosts(
    mm: Matchmaker, memory: Memory, make: Make
) -> None:
    """After each of twenty changes every live host gets one message, and no other gets any."""
    chance = random.Random(13)
    pulls = servers(make, 4)
    push = make(zmq.PUSH)
    memory.declare("jobs", live := list(pulls))
    with follow(mm, "jobs", push) as follower:
        for _ in range(20):
            before = live
            while live == before:
                live = chance.sample(list(pulls), chance.randint(1, 4))
                live.sort()
            memory.declare("jobs", live)
            while follower.hosts != tuple(live):
                changed(follower)
            for _ in live:
                push.send(b"x")
            assert [pulls[host].recv() for host in live] == [b"x"] * len(live)
        assert not any(pull.poll(0) for pull in pulls.values())


def test_a_subscriber_hears_every_host(mm: Matchmaker, memory: Memory, make: Make) -> None:
    """Those that came later too, and none that left."""
    pubs = servers(make, 2, zmq.XPUB)
    first, second = pubs
    memory.declare("news", [first])
    sub = make(zmq.SUB)
    sub.subscribe(b"")
    with follow(mm, "news", sub) as follower:
        assert pubs[first].recv() == b"\1"  # it has subscribed
        memory.declare("news", [second])
        assert changed(follower) == Changes((second,), (first,))
        assert pubs[second].recv() == b"\1"
        pubs[first].send(b"old")
        pubs[second].send(b"x")
        assert sub.recv() == b"x"


def test_a_topic_without_hosts_is_followed(mm: Matchmaker, memory: Memory, make: Make) -> None:
    """Nothing can be sent; the first host gets what is sent when it is there."""
    ((host, pull),) = servers(make, 1).items()
    push = make(zmq.PUSH)
    with follow(mm, "jobs", push) as follower:
        assert follower.hosts == ()
        with pytest.raises(zmq.Again):
            push.send(b"x", zmq.NOBLOCK)
        memory.declare("jobs", [host])
        assert changed(follower) == Changes((host,), ())
        push.send(b"x")
        assert pull.recv() == b"x"


def test_one_server_of_a_topic_can_be_followed(mm: Matchmaker, memory: Memory, make: Make) -> None:
    """Only the host that goes by that name."""
    one, two = Host("127.0.0.1", 9), Host("127.0.0.1", 10)
    memory.declare("jobs", [Instance(one, "a"), Instance(two, "b")])
    with follow(mm, "jobs", make(zmq.DEALER), server="b") as follower:
        assert follower.hosts == (two,)
        memory.declare("jobs", [Instance(one, "b")])
        assert changed(follower) == Changes((one,), (two,))


def test_a_host_that_cannot_be_connected_to_is_skipped(
    mm: Matchmaker, memory: Memory, make: Make, caplog: pytest.LogCaptureFixture
) -> None:
    """With one line in the log, however often the others change; it is said again when it left and
    came back."""
    identity, odd = Host.opaque("a socket"), Host.parse("_odd.example:9")
    memory.declare("jobs", [identity, odd, "127.0.0.1:9"])
    with follow(mm, "jobs", make(zmq.DEALER)) as follower:
        assert [str(host) for host in follower.hosts] == ["127.0.0.1:9"]
        memory.declare("jobs", [identity, odd, "127.0.0.1:10"])
        new, old = Host("127.0.0.1", 10), Host("127.0.0.1", 9)
        assert changed(follower) == Changes((new,), (old,))
        assert len(caplog.records) == 2
        memory.declare("jobs", [odd, "127.0.0.1:9"])
        assert changed(follower) == Changes((old,), (new,))
        memory.declare("jobs", [identity, odd, "127.0.0.1:10"])
        assert changed(follower) == Changes((new,), (old,))
    lines = [record.getMessage() for record in caplog.records if "ZeroMQ" in record.getMessage()]
    assert len(lines) == 3
    assert sum("a socket: it has no port" in line for line in lines) == 2
    assert sum("_odd.example:9: Invalid argument" in line for line in lines) == 1
    assert all(record.levelno == logging.WARNING for record in caplog.records)


def test_a_host_of_ipv6_is_connected_to(mm: Matchmaker, memory: Memory, make: Make) -> None:
    """By a socket that was not told to; the option is afterwards what it was."""
    pull, host = make(zmq.PULL, "tcp://[::1]:*", ipv6=True)
    memory.declare("jobs", [host])
    push = make(zmq.PUSH)
    with follow(mm, "jobs", push) as follower:
        push.send(b"x")
        assert pull.recv() == b"x"
        assert not push.ipv6
        memory.declare("jobs", [])
        assert changed(follower) == Changes((), (host,))


# --- what ZeroMQ does with messages --------------------------------------------------------------


@pytest.mark.parametrize("linger", [-1, 0])
def test_what_was_sent_to_a_gone_host_lingers(
    linger: int, mm: Matchmaker, memory: Memory, make: Make
) -> None:
    """With linger it arrives if the host comes back; without it is dropped.  Nobody else gets
    it."""
    late, host = make(zmq.PULL, "tcp://127.0.0.1:*")
    other, other_host = make(zmq.PULL, "tcp://127.0.0.1:*")
    endpoint = late.last_endpoint
    late.unbind(endpoint)
    late.close()
    memory.declare("jobs", [host])
    push = make(zmq.PUSH, linger=linger)
    with follow(mm, "jobs", push) as follower:
        push.send(b"first")
        memory.declare("jobs", [other_host])
        assert changed(follower) == Changes((other_host,), (host,))
        again = make(zmq.PULL)
        until(lambda: _is_bound(again, endpoint), SECONDS, "the port is free again")
        if linger:
            assert again.recv() == b"first"
        memory.declare("jobs", [host])
        assert changed(follower) == Changes((host,), (other_host,))
        push.send(b"second")
        assert again.recv() == b"second"
        assert other.poll(0) == 0


def _is_bound(socket: Any, endpoint: bytes) -> bool:
    try:
        socket.bind(endpoint.decode())
    except zmq.ZMQError as error:
        assert error.errno == errno.EADDRINUSE
        return False
    return True


def test_an_answer_that_was_not_received_is_lost_with_its_host(
    mm: Matchmaker, memory: Memory, make: Make
) -> None:
    """So what is there is to be received before an update: the next answer is of the next
    question."""
    router, host = make(zmq.ROUTER, "tcp://127.0.0.1:*")
    memory.declare("jobs", [host])
    dealer = make(zmq.DEALER)
    with follow(mm, "jobs", dealer) as follower:
        dealer.send(b"one")
        router.send_multipart(router.recv_multipart())
        assert dealer.poll(SECONDS * 1000) == zmq.POLLIN  # it is there
        memory.declare("jobs", [])
        assert changed(follower) == Changes((), (host,))
        assert dealer.poll(0) == 0
        memory.declare("jobs", [host])
        assert changed(follower) == Changes((host,), ())
        dealer.send(b"two")
        router.send_multipart(router.recv_multipart())
        assert dealer.recv() == b"two"


def test_a_req_socket_waits_for_ever_where_its_host_is_disconnected(
    mm: Matchmaker, memory: Memory, make: Make
) -> None:
    """It may not ask anew either: an update is for when no answer is awaited."""
    rep, host = make(zmq.REP, "tcp://127.0.0.1:*")
    memory.declare("jobs", [host])
    req = make(zmq.REQ)
    with follow(mm, "jobs", req) as follower:
        req.send(b"question")
        assert rep.recv() == b"question"
        memory.declare("jobs", [])
        assert changed(follower) == Changes((), (host,))
        rep.send(b"answer")
        with pytest.raises(zmq.ZMQError) as caught:
            req.send(b"another")
        assert caught.value.errno == zmq.EFSM


# --- outages, ends and forks ---------------------------------------------------------------------


def test_an_outage_changes_nothing(memory: Memory, make: Make) -> None:
    """Not even when the answers are too old to be given; afterwards the new host is found."""
    old, new = Host("127.0.0.1", 9), Host("127.0.0.1", 10)
    memory.declare("jobs", [old])
    settings = Settings(
        mode="kv", ttl_seconds=TTL, max_stale_seconds=TTL, stale_while_revalidate_seconds=TTL
    )
    with Matchmaker(settings, backend=memory) as mm, follow(mm, "jobs", make(zmq.PUSH)) as follower:
        memory.is_available = False

        def is_gone() -> bool:
            try:
                mm.hosts("jobs")
            except errors.Unavailable:
                return True
            return False

        until(is_gone, SECONDS)
        assert not follower.update()
        assert follower.hosts == (old,)
        memory.declare("jobs", [new])
        memory.is_available = True
        assert changed(follower) == Changes((new,), (old,))


class Hanging(Memory):
    """While `answers` is not set, a question takes all the time that it may."""

    longest_lookup_seconds = 10 * SECONDS

    def __init__(self) -> None:
        super().__init__()
        self.answers = threading.Event()
        self.answers.set()

    def lookup(
        self, topic: str, server: str | None = None, *, timeout_seconds: float = 0.0
    ) -> Snapshot:
        if not self.answers.wait(timeout_seconds):
            raise errors.TimedOut("it hangs")
        return super().lookup(topic, server, timeout_seconds=timeout_seconds)


@pytest.mark.parametrize("outage", ["away", "hangs"])
def test_a_topic_that_made_room_in_an_outage_is_found_again(outage: str, make: Make) -> None:
    """Meanwhile the connections stay, and an update does not wait for Consul."""
    memory, old, new = Hanging(), Host("127.0.0.1", 9), Host("127.0.0.1", 10)
    memory.declare("jobs", [old])
    settings = Settings(mode="kv", max_topics=1, ttl_seconds=TTL)
    with Matchmaker(settings, backend=memory) as mm, follow(mm, "jobs", make(zmq.PUSH)) as follower:
        memory.is_available = False
        if outage == "hangs":
            memory.answers.clear()
        with pytest.raises(errors.Unavailable):
            mm.hosts("other", timeout_seconds=0.0)
        poller = zmq.Poller()
        poller.register(follower, zmq.POLLIN)
        assert poller.poll(SECONDS * 1000)
        began = time.monotonic()
        assert not follower.update()
        assert time.monotonic() - began < SECONDS
        assert follower.hosts == (old,)
        memory.declare("jobs", [new])
        memory.is_available = True
        memory.answers.set()
        assert changed(follower) == Changes((new,), (old,))


def test_follow_raises_what_hosts_raises(mm: Matchmaker, memory: Memory, make: Make) -> None:
    """Where there is no first answer; and leaves nothing behind."""
    memory.is_available = False
    before, files = set(threading.enumerate()), open_files()
    socket = make(zmq.PUSH)
    own = open_files() - files
    with pytest.raises(errors.Unavailable):
        follow(mm, "jobs", socket)
    with pytest.raises(errors.InvalidTopic):
        follow(mm, "", socket)
    assert open_files() == files + own
    mm.close()
    with pytest.raises(errors.Closed):
        follow(mm, "jobs", socket)
    until(lambda: not threads_since(before), SECONDS)


def test_the_end_of_the_matchmaker_is_said_once(mm: Matchmaker, memory: Memory, make: Make) -> None:
    """The descriptor is readable, an update raises Closed, and the connections stay."""
    ((host, pull),) = servers(make, 1).items()
    memory.declare("jobs", [host])
    push = make(zmq.PUSH)
    with follow(mm, "jobs", push) as follower:
        mm.close()
        with pytest.raises(errors.Closed):
            changed(follower)
        assert not follower.update()
        push.send(b"x")
        assert pull.recv() == b"x"


def test_a_closed_follower_leaves_the_socket_as_it_is(
    mm: Matchmaker, memory: Memory, make: Make
) -> None:
    """By any thread, and twice; an update raises Closed, and changes are not told any more."""
    ((host, pull),) = servers(make, 1).items()
    memory.declare("jobs", [host])
    push = make(zmq.PUSH)
    follower = follow(mm, "jobs", push)
    closer = threading.Thread(target=follower.close)
    closer.start()
    closer.join()
    follower.close()
    assert follower.fileno() == -1
    memory.declare("jobs", [])
    until(lambda: not mm.hosts("jobs"), SECONDS)
    with pytest.raises(errors.Closed):
        follower.update()
    push.send(b"x")
    assert pull.recv() == b"x"


def test_a_socket_that_was_closed_or_disconnected_by_others(
    mm: Matchmaker, memory: Memory, make: Make
) -> None:
    """To be disconnected already is no error; to be closed is ZeroMQ's."""
    memory.declare("jobs", ["127.0.0.1:9"])
    push = make(zmq.PUSH)
    with follow(mm, "jobs", push) as follower:
        push.disconnect("tcp://127.0.0.1:9")
        memory.declare("jobs", ["127.0.0.1:10"])
        assert changed(follower).disconnected == (Host("127.0.0.1", 9),)
        push.close()
        memory.declare("jobs", ["127.0.0.1:11"])
        with pytest.raises(zmq.ZMQError):
            changed(follower)


def test_a_forked_child_does_not_follow(mm: Matchmaker, memory: Memory, make: Make) -> None:
    """Its update raises Closed and takes nothing from its parent, who is told of the change."""
    memory.declare("jobs", ["127.0.0.1:9"])
    with follow(mm, "jobs", make(zmq.PUSH)) as follower:
        memory.declare("jobs", ["127.0.0.1:10"])
        poller = zmq.Poller()
        poller.register(follower, zmq.POLLIN)
        assert poller.poll(SECONDS * 1000)
        child = os.fork()
        if child == 0:
            try:
                follower.update()
            except errors.Closed:
                follower.close()
                os._exit(0 if follower.fileno() == -1 else 2)
            finally:
                os._exit(1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        new, old = Host("127.0.0.1", 10), Host("127.0.0.1", 9)
        assert changed(follower) == Changes((new,), (old,))


def test_a_fork_while_a_change_is_told(mm: Matchmaker, memory: Memory, make: Make) -> None:
    """What another thread held at that moment does not hold up the child."""
    with follow(mm, "jobs", make(zmq.PUSH)) as follower:
        is_held, is_over = threading.Event(), threading.Event()

        def hold() -> None:
            with follower._bell._lock:
                is_held.set()
                is_over.wait(SECONDS)

        holder = threading.Thread(target=hold)
        holder.start()
        assert is_held.wait(SECONDS)
        child = os.fork()
        if child == 0:
            follower.close()
            os._exit(0)
        try:
            until(lambda: os.waitpid(child, os.WNOHANG) == (child, 0), SECONDS)
        except BaseException:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            raise
        finally:
            is_over.set()
            holder.join()


# --- asyncio -------------------------------------------------------------------------------------


def test_a_socket_of_asyncio_follows_by_itself(mm: Matchmaker, memory: Memory, make: Make) -> None:
    """During the block; afterwards it keeps what it has, and no task is left."""
    first, second = pulls = servers(make, 2)
    memory.declare("jobs", [first])

    async def program() -> None:
        with zmq.asyncio.Context() as context, context.socket(zmq.PUSH) as push:
            push.linger = 0
            async with following(aio.Matchmaker(mm), "jobs", push) as connections:
                assert connections.hosts == (first,)
                memory.declare("jobs", [second])
                await _eventually(lambda: connections.hosts == (second,))
                await push.send(b"x")
            assert len(asyncio.all_tasks()) == 1
            memory.declare("jobs", [])
            await push.send(b"y")

    asyncio.run(program())
    assert [pulls[second].recv(), pulls[second].recv()] == [b"x", b"y"]
    assert pulls[first].poll(0) == 0


def test_asyncio_outlives_outages_and_ends(mm: Matchmaker, memory: Memory) -> None:
    """Of Consul, of the socket and of the matchmaker; the block ends without an error."""
    memory.declare("jobs", ["127.0.0.1:9"])

    async def program() -> None:
        with zmq.asyncio.Context() as context, context.socket(zmq.PUSH) as push:
            push.linger = 0
            amm = aio.Matchmaker(mm)
            async with following(amm, "jobs", push) as connections:
                memory.is_available = False
                await asyncio.sleep(2 * TTL)
                memory.declare("jobs", ["127.0.0.1:10"])
                memory.is_available = True
                await _eventually(lambda: connections.hosts == (Host("127.0.0.1", 10),))
                push.close()
                memory.declare("jobs", ["127.0.0.1:11"])
                await _eventually(lambda: len(asyncio.all_tasks()) == 1)
            with context.socket(zmq.PUSH) as push:
                async with following(amm, "jobs", push) as connections:
                    await amm.close()
                    await _eventually(lambda: len(asyncio.all_tasks()) == 1)
                    assert len(connections.hosts) == 1

    asyncio.run(program())


def test_asyncio_finds_a_topic_again_that_made_room_in_an_outage(memory: Memory) -> None:
    """Before its first look, too."""
    memory.declare("jobs", ["127.0.0.1:9"])
    settings = Settings(mode="kv", max_topics=1, ttl_seconds=TTL)

    async def program() -> None:
        with zmq.asyncio.Context() as context, context.socket(zmq.PUSH) as push:
            push.linger = 0
            async with (
                aio.Matchmaker(Matchmaker(settings, backend=memory)) as amm,
                following(amm, "jobs", push) as connections,
            ):
                memory.is_available = False
                with pytest.raises(errors.Unavailable):
                    amm.sync.hosts("other")
                await asyncio.sleep(2 * TTL)
                memory.declare("jobs", ["127.0.0.1:10"])
                memory.is_available = True
                await _eventually(lambda: connections.hosts == (Host("127.0.0.1", 10),))

    asyncio.run(program())


async def _eventually(claim: Callable[[], bool]) -> None:
    deadline = time.monotonic() + SECONDS
    while not claim():
        assert time.monotonic() < deadline
        await asyncio.sleep(0.01)


# --- a real Consul -------------------------------------------------------------------------------


@contextmanager
def server_process(topic: str, url: str) -> Iterator[tuple[subprocess.Popen[str], Host]]:
    process = subprocess.Popen(
        [sys.executable, "-m", "integration.callers.zmq_server", topic, url],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        yield process, Host.parse(process.stdout.readline().strip())
    finally:
        process.kill()
        process.communicate()


def test_a_killed_server_is_left_and_a_new_one_joined(agent: Node, topic: str, make: Make) -> None:
    """As service mode sees them: afterwards every question is answered, by those that live."""
    url = f"consul+service://{agent.http}"
    dealer = make(zmq.DEALER)
    with ExitStack() as stack:
        mm = stack.enter_context(Matchmaker.from_url(url))
        one, first = stack.enter_context(server_process(topic, url))
        _, second = stack.enter_context(server_process(topic, url))
        follower = stack.enter_context(follow(mm, topic, dealer))
        assert follower.hosts == tuple(sorted((first, second)))
        assert _answers(dealer, 10) == {str(first): 5, str(second): 5}
        one.kill()
        assert changed(follower) == Changes((), (first,))
        assert _answers(dealer, 10) == {str(second): 10}
        _, third = stack.enter_context(server_process(topic, url))
        assert changed(follower) == Changes((third,), ())
        assert _answers(dealer, 10) == {str(second): 5, str(third): 5}


def _answers(dealer: Any, count: int) -> dict[str, int]:
    """How many of so many questions each server answers."""
    for number in range(count):
        dealer.send(b"%d" % number)
    found = [dealer.recv_multipart() for _ in range(count)]
    assert sorted(int(number) for number, _ in found) == list(range(count))
    hosts = [host.decode() for _, host in found]
    return {host: hosts.count(host) for host in sorted(hosts)}
