"""What every backend must do: one suite for memory, kv and dns_srv.

A subclass named ``Test...`` gives the fixtures that make the backend.  Each test takes its own
``topic``; what takes time is waited for by ``eventually``, never slept for.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Protocol, TypeVar

import pytest

from consul_matchmaker.backends import Registrar, Resolver
from consul_matchmaker.errors import InvalidTopic, LeaseLost, MatchmakerError, Unavailable
from consul_matchmaker.model import Host, Lease, Registration, Snapshot

T = TypeVar("T")

ONE, TWO, SIX = Host.parse("10.0.0.1:5001"), Host.parse("10.0.0.2:5002"), Host.parse("[::1]:5006")


class Backend(Resolver, Registrar, Protocol):
    """Both halves, as kv and memory have them."""


def eventually(look: Callable[[], T], is_right: Callable[[T], bool], seconds: float = 10.0) -> T:
    """What *look* returns once *is_right* of it; fails when it is still not after *seconds*."""
    deadline = time.monotonic() + seconds
    while True:
        is_last = time.monotonic() > deadline
        seen = look()
        if is_right(seen):
            return seen
        assert not is_last, f"still {seen!r} after {seconds:g} s"
        time.sleep(0.02)


def has(*hosts: Host) -> Callable[[Snapshot], bool]:
    return lambda snapshot: snapshot.hosts == tuple(sorted(hosts))


class ResolverContract:
    """What any Resolver does.  Needs the fixtures below from the subclass."""

    @pytest.fixture
    def resolver(self) -> Iterator[Resolver]:
        raise NotImplementedError

    @pytest.fixture
    def topic(self) -> str:
        """A topic of this test's own, that the backend can express."""
        raise NotImplementedError

    @pytest.fixture
    def set_hosts(self) -> Callable[[str, list[Host]], None]:
        """Make exactly these hosts serve a topic, however long it takes to be seen."""
        raise NotImplementedError

    @pytest.fixture
    def away(self) -> Resolver:
        """The same kind of backend where nothing answers."""
        raise NotImplementedError

    def test_no_hosts_is_an_answer(self, resolver: Resolver, topic: str) -> None:
        """A topic that nobody serves has an empty snapshot, not an error."""
        snapshot = resolver.lookup(topic, timeout_seconds=5)
        assert snapshot.hosts == ()
        assert snapshot.topic == topic
        assert snapshot.is_complete

    def test_every_host_once_sorted(
        self, resolver: Resolver, topic: str, set_hosts: Callable[[str, list[Host]], None]
    ) -> None:
        """An answer has every host once, in order, IPv6 included."""
        set_hosts(topic, [TWO, SIX, ONE])
        snapshot = eventually(lambda: resolver.lookup(topic, timeout_seconds=5), has(ONE, TWO, SIX))
        assert list(snapshot) == sorted([ONE, TWO, SIX])
        assert snapshot.is_complete

    def test_a_host_is_an_address_and_a_port(
        self, resolver: Resolver, topic: str, set_hosts: Callable[[str, list[Host]], None]
    ) -> None:
        """Two ports of one address are two hosts."""
        other = Host(ONE.address, 5002)
        set_hosts(topic, [ONE, other])
        eventually(lambda: resolver.lookup(topic, timeout_seconds=5), has(ONE, other))

    def test_hosts_that_leave_are_gone(
        self, resolver: Resolver, topic: str, set_hosts: Callable[[str, list[Host]], None]
    ) -> None:
        """What no longer serves the topic is not in the answer; the rest is."""
        set_hosts(topic, [ONE, TWO])
        eventually(lambda: resolver.lookup(topic, timeout_seconds=5), has(ONE, TWO))
        set_hosts(topic, [TWO])
        eventually(lambda: resolver.lookup(topic, timeout_seconds=5), has(TWO))
        set_hosts(topic, [])
        eventually(lambda: resolver.lookup(topic, timeout_seconds=5), has())

    def test_topics_are_told_apart(
        self, resolver: Resolver, topic: str, set_hosts: Callable[[str, list[Host]], None]
    ) -> None:
        """A topic whose name begins with another's is another topic."""
        longer = topic + "2"
        set_hosts(topic, [ONE])
        set_hosts(longer, [TWO])
        eventually(lambda: resolver.lookup(topic, timeout_seconds=5), has(ONE))
        eventually(lambda: resolver.lookup(longer, timeout_seconds=5), has(TWO))

    def test_an_unknown_server_has_no_host(
        self, resolver: Resolver, topic: str, set_hosts: Callable[[str, list[Host]], None]
    ) -> None:
        """Asked for a server that is not there, the answer is empty."""
        set_hosts(topic, [ONE])
        eventually(lambda: resolver.lookup(topic, timeout_seconds=5), has(ONE))
        assert resolver.lookup(topic, "nobody-here", timeout_seconds=5).hosts == ()

    def test_an_answer_knows_its_age(self, resolver: Resolver, topic: str) -> None:
        """A snapshot says when it was taken, on a clock that goes on."""
        snapshot = eventually(
            lambda: resolver.lookup(topic, timeout_seconds=5), lambda seen: not seen.is_stale
        )
        assert 0 <= snapshot.age_seconds < 60

    @pytest.mark.parametrize("bad", ["", None, 7, b"bytes"])
    def test_what_is_no_topic_is_refused(self, resolver: Resolver, bad: object) -> None:
        """An empty topic, or one that is no text, is a mistake of the caller."""
        with pytest.raises(InvalidTopic):
            resolver.lookup(bad, timeout_seconds=5)  # type: ignore[arg-type]

    def test_an_outage_is_an_error(self, away: Resolver, topic: str) -> None:
        """Where nothing answers the lookup raises Unavailable: never an empty answer."""
        with pytest.raises(Unavailable):
            away.lookup(topic, timeout_seconds=5)


class RegistrarContract(ResolverContract):
    """What a backend that can also register does beside."""

    @pytest.fixture
    def backend(self) -> Iterator[Backend]:
        raise NotImplementedError

    @pytest.fixture
    def resolver(self, backend: Backend) -> Resolver:
        return backend

    @pytest.fixture
    def set_hosts(self, backend: Backend, lease: Lease) -> Callable[[str, list[Host]], None]:
        published: dict[str, set[Host]] = {}

        def set_hosts(topic: str, hosts: list[Host]) -> None:
            before = published.setdefault(topic, set())
            for host in before - set(hosts):
                backend.withdraw(lease, Registration(topic, host))
            for host in set(hosts) - before:
                backend.publish(lease, Registration(topic, host))
            published[topic] = set(hosts)

        return set_hosts

    @pytest.fixture
    def lease(self, backend: Backend) -> Iterator[Lease]:
        lease = backend.open()
        yield lease
        backend.release(lease)

    def test_published_is_seen_at_once(self, backend: Backend, lease: Lease, topic: str) -> None:
        """What publish() returned from is in the next answer, with its server name."""
        backend.publish(lease, Registration(topic, ONE, "node1"))
        assert backend.lookup(topic, timeout_seconds=5).hosts == (ONE,)
        assert backend.lookup(topic, "node1", timeout_seconds=5).hosts == (ONE,)
        assert backend.lookup(topic, "node2", timeout_seconds=5).hosts == ()

    def test_every_verb_is_idempotent(self, backend: Backend, lease: Lease, topic: str) -> None:
        """Twice is as good as once, for each of them."""
        registration = Registration(topic, ONE)
        for _ in range(2):
            backend.publish(lease, registration)
        assert backend.lookup(topic, timeout_seconds=5).hosts == (ONE,)
        for _ in range(2):
            assert set(backend.renew(lease)) == {registration}
        for _ in range(2):
            backend.withdraw(lease, registration)
        assert backend.lookup(topic, timeout_seconds=5).hosts == ()
        for _ in range(2):
            backend.release(lease)

    def test_withdraw_takes_only_that(self, backend: Backend, lease: Lease, topic: str) -> None:
        """One of several registrations is withdrawn: the others stay, of this topic and others."""
        mine = [
            Registration(topic, ONE, "a"),
            Registration(topic, ONE, "b"),
            Registration(topic, TWO),
            Registration(topic + "2", ONE, "a"),
        ]
        for registration in mine:
            backend.publish(lease, registration)
        backend.withdraw(lease, mine[0])
        assert set(backend.renew(lease)) == set(mine[1:])
        assert backend.lookup(topic, timeout_seconds=5).hosts == (ONE, TWO)
        assert backend.lookup(topic, "a", timeout_seconds=5).hosts == ()
        assert backend.lookup(topic + "2", timeout_seconds=5).hosts == (ONE,)

    def test_release_takes_all(self, backend: Backend, topic: str) -> None:
        """A lease that is released takes everything with it, at once."""
        lease = backend.open()
        backend.publish(lease, Registration(topic, ONE))
        backend.publish(lease, Registration(topic + "2", TWO))
        backend.release(lease)
        assert backend.lookup(topic, timeout_seconds=5).hosts == ()
        assert backend.lookup(topic + "2", timeout_seconds=5).hosts == ()

    def test_a_released_lease_is_lost(self, backend: Backend, topic: str) -> None:
        """Renewing it raises LeaseLost; publishing under it raises, and shows nothing."""
        lease = backend.open()
        backend.release(lease)
        with pytest.raises(LeaseLost):
            backend.renew(lease)
        with pytest.raises(MatchmakerError):
            backend.publish(lease, Registration(topic, ONE))
        assert backend.lookup(topic, timeout_seconds=5).hosts == ()

    def test_leases_do_not_meet(self, backend: Backend, lease: Lease, topic: str) -> None:
        """The same host under two leases is one host, and stays until both have left: a restarted
        process does not wait for its dead predecessor, nor leaves with it."""
        registration = Registration(topic, ONE)
        predecessor = backend.open()
        backend.publish(predecessor, registration)
        backend.publish(lease, registration)
        assert backend.lookup(topic, timeout_seconds=5).hosts == (ONE,)
        backend.withdraw(lease, Registration(topic, TWO))  # not published: nothing happens
        backend.release(predecessor)
        assert backend.lookup(topic, timeout_seconds=5).hosts == (ONE,)
        assert set(backend.renew(lease)) == {registration}

    def test_expire_removes_whoever_owns_it(
        self, backend: Backend, lease: Lease, topic: str
    ) -> None:
        """All of a host's registrations of a topic leave; their owner finds out by renewing."""
        other = backend.open()
        for owner, server in ((lease, None), (lease, "a"), (other, None)):
            backend.publish(owner, Registration(topic, ONE, server))
        backend.publish(lease, Registration(topic, TWO))
        assert backend.expire(topic, ONE) == 3
        assert backend.expire(topic, ONE) == 0
        assert backend.lookup(topic, timeout_seconds=5).hosts == (TWO,)
        assert set(backend.renew(lease)) == {Registration(topic, TWO)}
        assert set(backend.renew(other)) == set()
        backend.release(other)

    def test_topics_are_listed(self, backend: Backend, lease: Lease, topic: str) -> None:
        """Every topic that has a registration, sorted, and none that has none any more."""
        backend.publish(lease, Registration(topic + "2", ONE))
        backend.publish(lease, Registration(topic, ONE))
        assert [each for each in backend.topics() if each.startswith(topic)] == [topic, topic + "2"]
        backend.withdraw(lease, Registration(topic, ONE))
        assert topic not in backend.topics()

    @pytest.mark.parametrize(
        "name", ["a/b", "../x", "notifications.info", "é😀", " ", "%2F", "a b"]
    )
    def test_any_text_is_a_topic(
        self, backend: Backend, lease: Lease, topic: str, name: str
    ) -> None:
        """Slashes, dots, spaces and any Unicode text survive, and reach no other topic."""
        strange = f"{topic}{name}"
        backend.publish(lease, Registration(strange, ONE, server=name))
        assert backend.lookup(strange, timeout_seconds=5).hosts == (ONE,)
        assert backend.lookup(strange, name, timeout_seconds=5).hosts == (ONE,)
        assert backend.lookup(topic, timeout_seconds=5).hosts == ()
        assert strange in backend.topics()

    @pytest.mark.parametrize("text", ["10.0.0.1:5001", "host/topic/server/1f2e", "é b%"])
    def test_an_opaque_host_is_kept_to_the_byte(
        self, backend: Backend, lease: Lease, topic: str, text: str
    ) -> None:
        """What is not host:port comes back as it was, and is not taken for a host:port."""
        backend.publish(lease, Registration(topic, Host.opaque(text)))
        (host,) = backend.lookup(topic, timeout_seconds=5)
        assert host == Host.opaque(text)
        assert host.port is None
