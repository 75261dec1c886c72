"""When a held registration is made, what the operator is told, and how signals end it."""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from consul_matchmaker.cli.supervise import Holder
from consul_matchmaker.errors import Denied, TimedOut
from consul_matchmaker.model import Host, Registration
from consul_matchmaker.testing.local_consul import free_ports

pytestmark = pytest.mark.usefixtures("handlers_put_back")

WAIT_SECONDS = 20.0
LISTEN = (
    "import socket, sys\n"
    "with socket.create_server(('127.0.0.1', int(sys.argv[1]))) as listener:\n"
    "    while True: listener.accept()[0].close()"
)


class Owner:
    """Plays the keeper: answers each wait with the next of *answers*, the last one for ever."""

    def __init__(self, *answers: Exception | None, then: Callable[[], None]) -> None:
        self.answers = list(answers)
        self.then = then
        self.unregistered = 0
        self.drain_is_over = threading.Event()
        self.drained_seconds: list[float] = []
        self.on_drain: Callable[[], None] = self.drain_is_over.set
        self.drain_error: Exception | None = None

    def wait_until_published(self, registration: Registration, timeout_seconds: float) -> None:
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        if not self.answers[1:]:
            self.then()
        if answer is not None:
            raise answer

    def unregister(self, registration: Registration) -> None:
        self.unregistered += 1

    def drain(self, registration: Registration, seconds: float) -> None:
        self.drained_seconds.append(seconds)
        self.on_drain()
        self.drain_is_over.wait(WAIT_SECONDS)
        if self.drain_error is not None:
            raise self.drain_error


def terminate_ourselves() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def nothing(_text: str) -> None:
    """An operator who does not listen."""


def holder(
    owner: Owner,
    say: Callable[[str], None],
    *command: str,
    when_listening: bool = True,
    drain_seconds: float = 0.0,
) -> Holder:
    registration = Registration("scheduler", Host("10.0.0.1", 9501), "node1", owner)
    return Holder(
        lambda: registration,
        registration.host,
        command=command,
        when_listening=when_listening,
        drain_seconds=drain_seconds,
        say=say,
    )


@pytest.mark.system
def test_the_command_listens_before_anybody_is_sent_to_it() -> None:
    """The registration is made only once the port accepts connections."""
    (port,), connected = free_ports("127.0.0.1", 1), []
    owner = Owner(None, then=terminate_ourselves)

    def register() -> Registration:
        with socket.create_connection(("127.0.0.1", port), WAIT_SECONDS):
            connected.append(port)
        return Registration("scheduler", Host("127.0.0.1", port), None, owner)

    command = [sys.executable, "-c", LISTEN, str(port)]
    held = Holder(register, Host("127.0.0.1", port), command=command, say=nothing)
    assert held.run() == 128 + signal.SIGTERM
    assert connected == [port]
    assert owner.unregistered >= 1


def test_a_refused_token_ends_what_has_no_command() -> None:
    """There is nothing else to keep alive: the error is the caller's."""
    owner = Owner(Denied("no"), then=lambda: None)
    with pytest.raises(Denied):
        holder(owner, nothing).run()
    assert owner.unregistered >= 1


@pytest.mark.system
def test_a_refused_token_does_not_end_a_command() -> None:
    """The server goes on working; the operator is told once."""
    said: list[str] = []
    owner = Owner(Denied("no"), then=lambda: None)

    def say(text: str) -> None:
        said.append(text)
        terminate_ourselves()

    command = [sys.executable, "-c", "import signal; signal.pause()"]
    assert holder(owner, say, *command, when_listening=False).run() == 128 + signal.SIGTERM
    assert said == ["not registered yet, still trying: no"]


def test_an_outage_is_said_once_and_its_end_too() -> None:
    """However long it takes, two lines."""
    said: list[str] = []
    owner = Owner(TimedOut("away"), TimedOut("away"), None, then=lambda: None)

    def say(text: str) -> None:
        said.append(text)
        if text.startswith("registered"):
            terminate_ourselves()

    assert holder(owner, say).run() == 0
    assert said == [
        "not registered yet, still trying: away",
        "registered scheduler at 10.0.0.1:9501 as node1",
    ]


PAUSE = (sys.executable, "-c", "import signal; signal.pause()")


@pytest.mark.parametrize("command", [(), PAUSE], ids=["alone", "with a command"])
@pytest.mark.system
def test_draining_withdraws_first_and_stops_when_it_is_over(command: tuple[str, ...]) -> None:
    """The signal withdraws; only the end of the drain ends what runs, with the usual code."""
    owner = Owner(None, then=terminate_ourselves)
    withdrawn: list[int] = []

    def on_drain() -> None:
        withdrawn.append(owner.unregistered)
        owner.drain_is_over.set()

    owner.on_drain = on_drain
    said: list[str] = []
    held = holder(owner, said.append, *command, when_listening=False, drain_seconds=7.0)
    assert held.run() == (128 + signal.SIGTERM if command else 0)
    assert owner.drained_seconds == [7.0]
    assert withdrawn[0] >= 1
    assert "draining for 7 s; the next signal stops at once" in said


@pytest.mark.parametrize("command", [(), PAUSE], ids=["alone", "with a command"])
@pytest.mark.system
def test_the_next_signal_ends_draining_at_once(command: tuple[str, ...]) -> None:
    """However long it would go on."""
    owner = Owner(None, then=terminate_ourselves)
    owner.on_drain = terminate_ourselves
    held = holder(owner, nothing, *command, when_listening=False, drain_seconds=3600.0)
    try:
        assert held.run() == (128 + signal.SIGTERM if command else 0)
        assert not owner.drain_is_over.is_set()
    finally:
        owner.drain_is_over.set()


@pytest.mark.system
def test_a_command_that_ends_while_draining_is_not_waited_for(tmp_path: Path) -> None:
    """There is nothing left that peers could reach."""
    owner = Owner(None, then=terminate_ourselves)
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    owner.on_drain = lambda: fifo.write_text("go")
    script = f"open({str(fifo)!r}).read(); exit(9)"
    held = holder(
        owner, nothing, sys.executable, "-c", script, when_listening=False, drain_seconds=3600.0
    )
    try:
        assert held.run() == 9
        assert not owner.drain_is_over.is_set()
    finally:
        owner.drain_is_over.set()


def test_a_withdrawal_that_consul_does_not_confirm_is_said() -> None:
    """It stops all the same: nobody could wait for longer than he said."""
    owner = Owner(None, then=terminate_ourselves)
    owner.drain_error = TimedOut("away")
    said: list[str] = []
    assert holder(owner, said.append, drain_seconds=1.0).run() == 0
    assert "stopping anyway: away" in said


@pytest.mark.finding("B2")
def test_no_further_signal_keeps_it_from_leaving() -> None:
    """Once it leaves, and as long as the process then lives, signals that end programs do not."""
    owner = Owner(None, then=terminate_ourselves)
    assert holder(owner, nothing).run() == 0
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        os.kill(os.getpid(), number)
    assert owner.unregistered >= 1
