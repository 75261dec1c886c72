"""HostNames over a resolver that answers, fails and hangs as it is told."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator

import pytest

from consul_matchmaker.backends.host_names import NAME_THREADS, HostNames, resolve_by_system
from tests.doubles import DEADLINE_SECONDS, ManualClock, in_thread, no_thread_to_be_had


class Resolver:
    """In place of the system's."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.says: dict[str, list[str] | BaseException] = {}
        self.may_answer = threading.Event()
        self.may_answer.set()

    def __call__(self, name: str) -> list[str]:
        self.asked.append(name)
        self.may_answer.wait(DEADLINE_SECONDS)
        said = self.says.get(name, [])
        if isinstance(said, BaseException):
            raise said
        return said


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock()


@pytest.fixture
def resolver() -> Iterator[Resolver]:
    made = Resolver()
    yield made
    made.may_answer.set()


@pytest.fixture
def names(clock: ManualClock, resolver: Resolver) -> HostNames:
    return HostNames(ttl_seconds=5, empty_ttl_seconds=1, most=3, clock=clock, resolve=resolver)


def soon() -> float:
    return time.monotonic() + DEADLINE_SECONDS


def now() -> float:
    return time.monotonic() + 0.01


@pytest.mark.finding("C9")
def test_a_name_is_remembered_for_a_ttl(
    names: HostNames, resolver: Resolver, clock: ManualClock
) -> None:
    """One that is unknown for the shorter one; what is remembered takes no time at all."""
    resolver.says["db.example"] = ["192.0.2.1"]
    for _ in range(5):
        assert names.addresses("db.example", soon()) == ["192.0.2.1"]
        assert names.addresses("gone.example", soon()) == []
    assert resolver.asked == ["db.example", "gone.example"]
    assert names.addresses("db.example", 0) == ["192.0.2.1"]
    clock.advance(1)
    names.addresses("db.example", soon())
    names.addresses("gone.example", soon())
    assert resolver.asked[2:] == ["gone.example"]
    clock.advance(4)
    names.addresses("db.example", soon())
    assert resolver.asked[3:] == ["db.example"]


def test_the_last_names_are_remembered(names: HostNames, resolver: Resolver) -> None:
    """As many as was said; the oldest one is forgotten first."""
    for name in "abcd":
        names.addresses(name, soon())
    names.addresses("b", soon())
    assert resolver.asked == list("abcd")
    names.addresses("a", soon())
    assert resolver.asked == list("abcda")


@pytest.mark.parametrize("error", [socket.gaierror(socket.EAI_AGAIN, "later"), UnicodeError("no")])
def test_what_the_resolver_cannot_tell_is_an_error_and_not_remembered(
    names: HostNames, resolver: Resolver, error: Exception
) -> None:
    """OSError with its words, and the next caller asks again."""
    resolver.says["unsure.example"] = error
    with pytest.raises(OSError, match=f"unsure.example: {error.args[-1]}"):
        names.addresses("unsure.example", soon())
    resolver.says["unsure.example"] = ["192.0.2.2"]
    assert names.addresses("unsure.example", soon()) == ["192.0.2.2"]


@pytest.mark.finding("C9")
def test_a_resolver_that_hangs_holds_a_bounded_number_of_threads_and_no_caller(
    names: HostNames, resolver: Resolver
) -> None:
    """Everybody is told in time; those who ask for the same name share a thread, and what comes
    late is remembered."""
    resolver.may_answer.clear()
    resolver.says["n0"] = ["192.0.2.9"]
    for number in [*range(NAME_THREADS + 3), 0, 1]:
        with pytest.raises(TimeoutError, match=f"n{number}"):
            names.addresses(f"n{number}", now())
    assert resolver.asked == [f"n{number}" for number in range(NAME_THREADS)]
    late = [in_thread(lambda: names.addresses("n0", soon())) for _ in range(3)]
    resolver.may_answer.set()
    assert [each.result(DEADLINE_SECONDS) for each in late] == [["192.0.2.9"]] * 3
    assert names.addresses("another", soon()) == []
    assert resolver.asked.count("n0") == 1


def test_without_a_thread_it_is_an_error(names: HostNames, resolver: Resolver) -> None:
    """OSError, and the next caller may have one."""
    for _ in range(NAME_THREADS + 1):
        with no_thread_to_be_had(), pytest.raises(OSError, match="thread"):
            names.addresses("db.example", soon())
    assert names.addresses("db.example", soon()) == []
    assert resolver.asked == ["db.example"]


@pytest.mark.system
def test_the_systems_resolver() -> None:
    """It knows this machine, IPv4 first, and says so where a name is none."""
    assert resolve_by_system("localhost")[0] in ("127.0.0.1", "::1")
    assert resolve_by_system("192.0.2.1") == ["192.0.2.1"]


@pytest.mark.system
def test_a_name_that_does_not_exist_has_no_addresses() -> None:
    """Or the resolver cannot tell, where there is no network."""
    try:
        assert resolve_by_system("agent.invalid") == []
    except OSError as error:
        assert isinstance(error, socket.gaierror)
