"""A process with a TTL check: beats come in time, and who holds a lease hears when they fail."""

import threading
import time

import pytest

from consul_matchmaker.backends.beats import BEAT_EVERY
from consul_matchmaker.backends.http.api import Answer, ConsulApi
from consul_matchmaker.backends.liveness import Liveness
from consul_matchmaker.errors import Denied, Unavailable
from consul_matchmaker.model import Host
from consul_matchmaker.settings import Settings

from .contract import eventually
from .doubles import ManualClock, StillWorker, in_thread
from .http_servers import Server, reply

HERE = Host("127.0.0.1", 8500)
CHECK_TTL_SECONDS = 1.0
BEAT_SECONDS = BEAT_EVERY * CHECK_TTL_SECONDS


class FakeApi:
    """Notes what it is asked, and fails as long as it is told to."""

    def __init__(self) -> None:
        self.paths: list[str] = []
        self.error: Exception | None = None
        self.timeouts: list[float] = []
        self.token_changes = 1

    def call(
        self,
        method,
        path,
        params=None,
        body=b"",
        *,
        accept=(),
        at=None,
        line=None,
        timeout_seconds=10,
    ):
        self.paths.append(path)
        if "/check/pass/" in path:
            assert (at, line) == (HERE, self)
            self.timeouts.append(timeout_seconds)
        if self.error is not None:
            raise self.error
        return Answer(200, b"", 0, False, path, HERE)

    def line(self):
        return self

    @property
    def beats(self) -> int:
        return sum("/check/pass/" in path for path in self.paths)


@pytest.fixture
def api():
    return FakeApi()


@pytest.fixture
def clock():
    return ManualClock()


@pytest.fixture
def doubts():
    return []


def made(api, clock, ttl_seconds=CHECK_TTL_SECONDS):
    return Liveness(api, ttl_seconds, clock=clock, make_worker=StillWorker)


@pytest.fixture
def liveness(api, clock):
    return made(api, clock)


def test_nothing_is_beaten_for_before_it_is_registered(api, liveness):
    """No request is owed to anybody then."""
    assert liveness._beats.step() is None
    liveness.deregister()
    assert api.paths == []


def test_beats_come_three_times_a_ttl(api, clock, liveness, doubts):
    """However often the thread wakes, one beat is sent per interval."""
    liveness.register(doubts.append)
    for _ in range(100):
        assert 0 < liveness._beats.step() <= BEAT_SECONDS
        clock.advance(BEAT_SECONDS / 10)
    assert api.beats in (9, 10)
    assert set(api.timeouts) == {CHECK_TTL_SECONDS / 2}
    assert doubts == []


@pytest.mark.finding("D10")
def test_a_failure_is_told_once_and_its_end_once(api, clock, liveness, doubts):
    """As text, of an agent that is gone or has forgotten the check: the lease may be lost."""
    liveness.register(doubts.append)
    api.error = Unavailable("status 500")
    for _ in range(3):
        clock.advance(BEAT_SECONDS)
        liveness._beats.step()
    assert (api.beats, doubts) == (3, ["status 500"])
    api.error = Denied("403")
    clock.advance(BEAT_SECONDS)
    liveness._beats.step()
    api.error = None
    for _ in range(3):
        clock.advance(BEAT_SECONDS)
        assert liveness._beats.step() == pytest.approx(BEAT_SECONDS)
    assert doubts == ["status 500", None]


def test_a_beat_that_took_its_time_is_followed_by_the_next_at_once(api, clock, liveness):
    """An agent that hangs for half the TTL leaves time for one more try."""
    liveness.register()
    clock.advance(BEAT_SECONDS)
    call, api.error = api.call, Unavailable("no answer within 0.5 s")

    def slow(*args, **how):
        clock.advance(how["timeout_seconds"])
        return call(*args, **how)

    api.call = slow
    assert liveness._beats.step() == 0


def test_a_late_beat_is_told(api, clock, liveness, doubts):
    """A suspended machine beats on as if nothing had been, but Consul has seen a dead process."""
    liveness.register(doubts.append)
    clock.advance(CHECK_TTL_SECONDS + 60)
    liveness._beats.step()
    (doubt,) = doubts
    assert "60.0 s late" in doubt
    clock.advance(BEAT_SECONDS)
    liveness._beats.step()
    assert doubts == [doubt, None]


def test_another_token_registers_anew(api, clock, liveness):
    """The agent syncs a check with the token that registered it: a revoked one tells nobody that
    we are gone.  That registration is the beat."""
    liveness.register()
    api.token_changes += 1
    for _ in range(3):
        clock.advance(BEAT_SECONDS)
        liveness._beats.step()
    assert api.paths.count("/v1/agent/service/register") == 2
    assert api.beats == 2


def test_what_cannot_be_deregistered_is_left_to_consul(api, clock, liveness, doubts):
    """Leaving never fails for it, and no beat keeps it alive any more."""
    liveness.register(doubts.append)
    api.error = Unavailable("gone")
    liveness.deregister()
    clock.advance(BEAT_SECONDS)
    assert liveness._beats.step() is None
    assert (api.beats, doubts) == (0, [])


@pytest.mark.finding("F1")
def test_a_longer_ttl_is_beaten_as_often_in_proportion(api, clock, doubts):
    """The deployment says how long a beat may be held up; nothing is late before that."""
    liveness = made(api, clock, 5.0)
    liveness.register(doubts.append)
    clock.advance(4.9)
    assert liveness._beats.step() == pytest.approx(5.0 * BEAT_EVERY)
    assert doubts == []
    clock.advance(5.1)
    liveness._beats.step()
    assert "0.1 s late" in doubts[0]


@pytest.mark.system
@pytest.mark.finding("B4")
def test_beats_go_on_whatever_else_hangs():
    """A call that hangs holds no beat up, nor does the thread outlive `close`, also while the agent
    answers no beat either."""
    with Server() as server:
        hangs = threading.Event()

        def behave(request):
            if hangs.is_set() or request.path == "/v1/session/create":
                return lambda sock: server.stopping.wait(30)
            return reply()

        server.behave = behave
        api = ConsulApi(Settings(mode="kv", addresses=(server.address,)))
        liveness = Liveness(api, 0.3)
        liveness.register()
        in_thread(lambda: api.call("PUT", "/v1/session/create"))

        def beats():
            return sum("/check/pass/" in request.path for request in server.requests)

        eventually(beats, lambda count: count > 5)
        hangs.set()
        before = beats()
        eventually(beats, lambda count: count > before)
        started = time.monotonic()
        liveness.close()
        assert not liveness._beats._worker.is_running
        assert time.monotonic() - started < 5
