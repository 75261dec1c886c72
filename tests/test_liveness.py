"""Tests of service_check: beats come in time, also while something else is waited for."""

import pytest

from consul_matchmaker.backends.http.api import Answer
from consul_matchmaker.backends.liveness import BEAT_EVERY, ServiceCheck
from consul_matchmaker.errors import Denied, Unavailable
from consul_matchmaker.model import Host

from .doubles import ManualClock

HERE = Host("127.0.0.1", 8500)
CHECK_TTL_SECONDS = 1.0
BEAT_SECONDS = BEAT_EVERY * CHECK_TTL_SECONDS


class FakeAgent:
    """Notes what it is asked, and fails as long as it is told to."""

    def __init__(self) -> None:
        self.paths: list[str] = []
        self.error: Exception | None = None
        self.timeouts: list[float] = []
        self.token_changes = 1

    def call(self, method, path, params=None, body=b"", *, at=None, timeout_seconds=10.0):
        self.paths.append(path)
        if "/check/pass/" in path:
            assert at == HERE
            self.timeouts.append(timeout_seconds)
        if self.error is not None:
            raise self.error
        return Answer(200, b"", 0, False, path, HERE)

    @property
    def beats(self) -> int:
        return sum("/check/pass/" in path for path in self.paths)


@pytest.fixture
def agent():
    return FakeAgent()


@pytest.fixture
def clock():
    return ManualClock()


@pytest.fixture
def check(agent, clock):
    return ServiceCheck(agent, CHECK_TTL_SECONDS, clock=clock)


def test_nothing_is_beaten_for_before_it_is_registered(agent, check):
    """No thread and no request is owed to anybody then."""
    assert check.beat() is None
    check.deregister()
    assert agent.paths == []


def test_beats_come_three_times_a_ttl(agent, clock, check):
    """However often it is called, one beat is sent per interval."""
    check.register()
    for _ in range(100):
        assert 0 < check.beat() <= BEAT_SECONDS
        clock.advance(BEAT_SECONDS / 10)
    assert agent.beats in (9, 10)
    assert set(agent.timeouts) == {CHECK_TTL_SECONDS / 2}


def test_a_failed_beat_is_said_until_one_succeeds(agent, clock, check):
    """An agent that is gone, or that has forgotten the check: the lease may be lost."""
    check.register()
    agent.error = Unavailable("status 500")
    clock.advance(BEAT_SECONDS)
    for _ in range(2):
        with pytest.raises(Unavailable, match="status 500"):
            check.beat()
    assert agent.beats == 1
    agent.error = Denied("403")
    clock.advance(BEAT_SECONDS)
    with pytest.raises(Denied):
        check.beat()
    agent.error = None
    clock.advance(BEAT_SECONDS)
    assert check.beat() == BEAT_SECONDS


def test_a_late_beat_is_said(agent, clock, check):
    """A suspended machine beats on as if nothing had been, but Consul has seen a dead process."""
    check.register()
    clock.advance(CHECK_TTL_SECONDS + 60)
    with pytest.raises(Unavailable, match=r"60\.0 s late"):
        check.beat()
    clock.advance(BEAT_SECONDS)
    assert check.beat() == BEAT_SECONDS


def test_a_beat_while_waiting_keeps_its_error_for_beat(agent, clock, check):
    """Who waits for another answer is not disturbed by it."""
    assert check.beat_meanwhile() > 0
    check.register()
    agent.error = Unavailable("gone")
    clock.advance(BEAT_SECONDS)
    assert check.beat_meanwhile() == BEAT_SECONDS
    with pytest.raises(Unavailable, match="gone"):
        check.beat()


def test_another_token_registers_anew(agent, clock, check):
    """The agent syncs a check with the token that registered it: a revoked one tells nobody that
    we are gone.  That registration is the beat."""
    check.register()
    agent.token_changes += 1
    for _ in range(3):
        clock.advance(BEAT_SECONDS)
        check.beat()
    assert agent.paths.count("/v1/agent/service/register") == 2
    assert agent.beats == 2


def test_what_cannot_be_deregistered_is_left_to_consul(agent, clock, check):
    """Leaving never fails for it, and no beat keeps it alive, or is asked for any more."""
    check.register()
    agent.error = Unavailable("gone")
    clock.advance(BEAT_SECONDS)
    with pytest.raises(Unavailable):
        check.beat()
    check.deregister()
    clock.advance(BEAT_SECONDS)
    assert check.beat() is None


def test_a_forked_child_has_no_check(agent, clock, check):
    """It never beats for its parent, and would register under another id."""
    before = check.id
    check.register()
    check.forget()
    clock.advance(BEAT_SECONDS)
    assert check.beat() is None
    assert check.id != before


@pytest.mark.finding("D10")
def test_each_failure_is_raised_as_an_object_of_its_own(agent, clock, check):
    """One that is raised again and again would grow with every traceback."""
    check.register()
    agent.error = Unavailable("status 500")
    clock.advance(BEAT_SECONDS)
    raised = []
    for _ in range(2):
        with pytest.raises(Unavailable, match="status 500") as caught:
            check.beat()
        raised.append(caught.value)
    assert raised[0] is not raised[1]


@pytest.mark.finding("F1")
def test_a_longer_ttl_is_beaten_as_often_in_proportion(agent, clock):
    """The deployment says how long a beat may be held up; nothing is late before that."""
    check = ServiceCheck(agent, 5.0, clock=clock)
    check.register()
    clock.advance(4.9)
    assert check.beat() == 5.0 * BEAT_EVERY
    clock.advance(5.1)
    with pytest.raises(Unavailable, match=r"0\.1 s late"):
        check.beat()
