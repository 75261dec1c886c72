"""The memory backend keeps the contract, and takes things away when told."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from consul_matchmaker.backends.memory import Memory
from consul_matchmaker.errors import Denied, LeaseLost, Unavailable
from consul_matchmaker.model import Host, Instance, Registration

from .contract import ONE, TWO, Backend, RegistrarContract
from .doubles import ManualClock


class TestMemoryContract(RegistrarContract):
    @pytest.fixture
    def backend(self) -> Iterator[Backend]:
        yield Memory()

    @pytest.fixture
    def topic(self) -> str:
        return "scheduler"

    @pytest.fixture
    def away(self) -> Memory:
        memory = Memory()
        memory.is_available = False
        return memory


def test_a_lease_lives_twice_its_ttl_after_the_last_renewal() -> None:
    """Like Consul's sessions (fact B2): 20 s for a TTL of 10, counted anew by each renewal."""
    clock = ManualClock()
    memory = Memory(session_ttl_seconds=10, clock=clock)
    lease = memory.open()
    memory.publish(lease, Registration("scheduler", ONE))
    clock.advance(19)
    memory.renew(lease)
    clock.advance(19.9)
    assert memory.lookup("scheduler", timeout_seconds=5).hosts == (ONE,)
    clock.advance(0.1)
    assert memory.lookup("scheduler", timeout_seconds=5).hosts == ()
    with pytest.raises(LeaseLost):
        memory.renew(lease)


def test_ending_a_lease_is_noticed_by_its_owner() -> None:
    """end_lease() is what somebody does who destroys the session."""
    memory = Memory()
    lease, other = memory.open(), memory.open()
    memory.publish(other, Registration("scheduler", TWO))
    memory.end_lease(lease.id)
    with pytest.raises(LeaseLost):
        memory.renew(lease)
    assert memory.lookup("scheduler", timeout_seconds=5).hosts == (TWO,)
    memory.end_lease()
    assert memory.lookup("scheduler", timeout_seconds=5).hosts == ()


def test_deleting_leaves_the_lease() -> None:
    """A registration deleted from outside is missing from what renew() returns."""
    memory = Memory()
    lease = memory.open()
    memory.publish(lease, Registration("scheduler", ONE))
    assert memory.delete("scheduler", ONE) == 1
    assert list(memory.renew(lease)) == []


def test_declared_hosts_need_no_lease() -> None:
    """declare() lists hosts as operators do in a catalog, with weights if wanted."""
    memory = Memory()
    heavy = Instance(TWO, weight=5)
    memory.declare("scheduler", ["10.0.0.1:5001", heavy])
    assert memory.lookup("scheduler", timeout_seconds=5).hosts == (ONE, TWO)
    assert heavy in memory.lookup("scheduler", timeout_seconds=5).instances
    assert memory.topics() == ["scheduler"]
    memory.declare("scheduler", [])
    assert memory.topics() == []


def test_every_verb_can_be_made_to_fail() -> None:
    """is_available and is_denied fail every verb, and nothing else changes."""
    memory = Memory()
    lease = memory.open()
    registration = Registration("scheduler", Host.opaque("identity"))
    for switch, error in (("is_available", Unavailable), ("is_denied", Denied)):
        setattr(memory, switch, not getattr(memory, switch))
        for verb in (
            lambda: memory.lookup("scheduler", timeout_seconds=5),
            memory.open,
            lambda: memory.publish(lease, registration),
            lambda: memory.withdraw(lease, registration),
            lambda: memory.renew(lease),
            lambda: memory.release(lease),
            lambda: memory.expire("scheduler", ONE),
            memory.topics,
        ):
            with pytest.raises(error):
                verb()
        setattr(memory, switch, not getattr(memory, switch))
    assert list(memory.renew(lease)) == []
