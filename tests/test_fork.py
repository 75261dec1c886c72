"""What happens first in a forked child: sockets are closed, owners are asked to start anew."""

from __future__ import annotations

import contextlib
import gc
import os
import socket
import weakref

import pytest

from consul_matchmaker import fork

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="nothing forks here")


class Owner:
    """Counts how often it was asked."""

    def __init__(self) -> None:
        self.calls = 0

    def after_fork(self) -> None:
        self.calls += 1


class Failing(Owner):
    def after_fork(self) -> None:
        super().after_fork()
        raise ZeroDivisionError


@pytest.mark.system
def test_a_child_closes_its_copies_of_sockets_and_the_parent_keeps_its_own() -> None:
    """What the parent's peer sees is the parent alone."""
    near, far = socket.socketpair()
    other, _ = socket.socketpair()
    fork.close_after_fork(near)
    owner = Owner()
    fork.call_after_fork(owner)
    child = os.fork()
    if child == 0:
        os._exit(0 if (near.fileno(), other.fileno() > 0, owner.calls) == (-1, True, 1) else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert owner.calls == 0
    near.sendall(b"x")
    assert far.recv(1) == b"x"
    near.close()
    assert far.recv(1) == b""


@pytest.mark.finding("D7")
def test_one_that_fails_keeps_no_other_from_starting_anew(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Each is asked, whatever the others do; the error is logged."""
    owners = [Failing(), Owner(), Failing()]
    for owner in owners:
        fork.call_after_fork(owner)
    fork._after_fork()
    assert [owner.calls for owner in owners] == [1, 1, 1]
    assert "ZeroDivisionError" in caplog.text


def test_what_is_not_used_any_more_is_not_kept_for_children() -> None:
    """Being registered does not keep an owner alive."""
    owner = Owner()
    fork.call_after_fork(owner)
    gone = weakref.ref(owner)
    del owner
    gc.collect()
    assert gone() is None


@pytest.mark.system
def test_a_lock_of_a_process_is_made_anew_in_a_child():
    """Another thread of the parent may hold it; what it guards is the parent's."""
    contents = {"a": 1}
    lock = fork.ProcessLock(contents)
    with lock:  # as another thread would, while this one forks
        child = os.fork()
        if child == 0:
            with contextlib.suppress(BaseException), lock:
                os._exit(len(contents))
            os._exit(9)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    with lock:
        assert contents == {"a": 1}
