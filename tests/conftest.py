"""How Hypothesis runs the examples here, without a clock; and what a quick test may not do."""

import os
import signal
import sys
import threading
from collections.abc import Iterator

import consul  # noqa: F401  (it brings urllib3, which binds a socket when it is imported)
import pytest
from hypothesis import HealthCheck, settings

# The machine may stop in the middle of any example: how long one took says nothing of the code.
settings.register_profile("unhurried", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("unhurried")

# Python's names for what only a test marked `system` may do.  `time.sleep` is one since 3.13.
SYSTEM_EVENTS = {
    *("os.exec", "os.fork", "os.forkpty", "os.posix_spawn", "os.system", "subprocess.Popen"),
    *("socket.bind", "socket.connect", "socket.getaddrinfo", "socket.sendto", "time.sleep"),
}
_our_pid = os.getpid()
_seen: list[str] | None = None
"""What the test that runs has done; None while a test marked `system` runs, or none."""
_not_ours: set[int] = set()
"""Threads that ran before this test did."""


def _audit(event: str, args: tuple[object, ...]) -> None:
    if (
        event in SYSTEM_EVENTS
        and (seen := _seen) is not None
        and os.getpid() == _our_pid
        and threading.get_ident() not in _not_ours
    ):
        seen.append(f"{event}{args!r}"[:200])


sys.addaudithook(_audit)


@pytest.fixture(autouse=True)
def nothing_of_the_system(request: pytest.FixtureRequest) -> Iterator[None]:
    """A test that is not marked `system` fails when it opens a socket or starts a process."""
    global _seen, _not_ours
    if request.node.get_closest_marker("system"):
        yield
        return
    others = (thread.ident for thread in threading.enumerate() if thread.ident)
    _not_ours = set(others) - {threading.get_ident()}
    _seen = seen = []
    yield
    _seen = None
    if seen:
        done = "\n  ".join(seen)
        pytest.fail(f"mark this test with @pytest.mark.system, as it did\n  {done}", pytrace=False)


@pytest.fixture
def handlers_put_back() -> Iterator[None]:
    """For what handles signals last in the life of a process: here the next test comes.  As in a
    process that nobody started with nohup."""
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
    before = {number: signal.getsignal(number) for number in numbers}
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)
