"""When a watching command runs, what it is told, and how signals end the watch."""

from __future__ import annotations

import os
import shlex
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from consul_matchmaker.backoff import Backoff
from consul_matchmaker.cli.watching import Follower, Told
from consul_matchmaker.errors import Denied
from consul_matchmaker.model import Host, Instance, Snapshot

from .doubles import DEADLINE_SECONDS, snapshot

pytestmark = pytest.mark.usefixtures("handlers_put_back")

POLL_SECONDS = 0.01
NEVER = Backoff(3600.0, 3600.0)


def hosts(*texts: str) -> frozenset[Host]:
    return frozenset(Host.parse(text) for text in texts)


A, B, C = "10.0.0.1:80", "10.0.0.2:80", "10.0.0.3:80"


# --- what it is told -----------------------------------------------------------------------------


def test_the_first_run_hears_of_every_host_and_the_next_of_differences() -> None:
    """What was told is not told again."""
    told = Told()
    assert told.is_news(hosts(A, B))
    assert told.begin(hosts(A, B)) == (hosts(A, B), hosts())
    told.end(has_failed=False)
    assert not told.is_news(hosts(B, A))
    assert told.is_news(hosts(B, C))
    assert told.begin(hosts(B, C)) == (hosts(C), hosts(A))


def test_that_there_is_nobody_is_told_once() -> None:
    """A first answer without hosts is an answer; the second one says nothing new."""
    told = Told()
    assert told.is_news(hosts())
    assert told.begin(hosts()) == (hosts(), hosts())
    told.end(has_failed=False)
    assert not told.is_news(hosts())


def test_a_run_that_failed_is_told_the_same_again() -> None:
    """With what has changed since; the run after one that did not fail is told that alone."""
    told = Told()
    told.begin(hosts(A))
    told.end(has_failed=False)
    told.begin(hosts(B))
    told.end(has_failed=True)
    assert told.is_news(hosts(B))
    assert told.begin(hosts(B, C)) == (hosts(B, C), hosts(A))
    told.end(has_failed=False)
    assert told.begin(hosts(B)) == (hosts(), hosts(C))


def test_what_a_failed_run_may_have_done_is_undone() -> None:
    """A host that it may have added is removed, one that it may have removed is added."""
    told = Told()
    told.begin(hosts(A))
    told.end(has_failed=False)
    told.begin(hosts(B))
    told.end(has_failed=True)
    assert told.is_news(hosts(A))
    assert told.begin(hosts(A)) == (hosts(A), hosts(B))
    told.end(has_failed=True)
    assert told.failures == 2
    assert told.begin(hosts(C)) == (hosts(C), hosts(A, B))
    told.end(has_failed=False)
    assert told.failures == 0


# --- when it runs --------------------------------------------------------------------------------


class Log:
    """The runs of a shell script, each with its variables in a line; `script` follows it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._path = folder / "log"
        self._path.touch()

    def command(self, then: str = "") -> list[str]:
        line = 'printf "%s|%s|%s|%s\\n" "$TOPIC" "$HOSTS" "$ADDED" "$REMOVED"'
        return ["sh", "-c", f"{line} >> {shlex.quote(str(self._path))}\n{then}"]

    def lines(self) -> list[str]:
        return self._path.read_text().splitlines()

    def wait_for(self, count: int) -> None:
        until(lambda: len(self.lines()) >= count)


def until(claim: Callable[[], bool]) -> None:
    never = threading.Event()
    for _ in range(round(DEADLINE_SECONDS / POLL_SECONDS)):
        if claim():
            return
        never.wait(POLL_SECONDS)
    terminate_ourselves()  # the follower's end ends the test
    raise AssertionError("not in time")


def terminate_ourselves() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


@pytest.fixture
def log(tmp_path: Path) -> Log:
    return Log(tmp_path)


def follow(
    watch: Callable[[], Iterator[Snapshot]], command: list[str], backoff: Backoff = NEVER
) -> tuple[int, list[str]]:
    """The exit code, and what the operator was told."""
    said: list[str] = []
    follower = Follower("web", watch, command=command, say=said.append, backoff=backoff)
    return follower.run(), said


def web(*texts: str) -> Snapshot:
    return snapshot("web", texts)


@pytest.mark.system
def test_it_runs_at_once_and_at_each_change(log: Log) -> None:
    """The variables have hosts sorted, and are empty where there are none."""

    def watch() -> Iterator[Snapshot]:
        for count, found in enumerate([web(), web(B, A), web(B, A), web(C)], 1):
            yield found
            log.wait_for(min(count, 2) if count < 4 else 3)
        terminate_ourselves()

    assert follow(watch, log.command()) == (0, [])
    assert log.lines() == ["web|||", f"web|{A} {B}|{A} {B}|", f"web|{C}|{C}|{A} {B}"]


@pytest.mark.system
def test_a_host_is_one_word(log: Log) -> None:
    """Anybody may choose what is no host:port: what would make two words or lines is escaped."""

    def watch() -> Iterator[Snapshot]:
        found = [Instance(Host.opaque(text)) for text in ("a b\n\0\ud800", "é")]
        yield Snapshot("web", tuple(found), "memory")
        log.wait_for(1)
        terminate_ourselves()

    follow(watch, log.command())
    hostile = r"a\x20b\n\x00\ud800 é"
    assert log.lines() == [f"web|{hostile}|{hostile}|"]


@pytest.mark.system
def test_changes_while_it_runs_are_one_more_run(log: Log) -> None:
    """Never two at once; the newest hosts are compared with what the last run was told."""
    go = log.folder / "go"
    os.mkfifo(go)

    def watch() -> Iterator[Snapshot]:
        yield web(A)
        log.wait_for(1)
        yield from (web(A, B), web(B), web(B, C))
        assert len(log.lines()) == 1
        go.write_text("")
        log.wait_for(2)
        go.write_text("")
        terminate_ourselves()

    follow(watch, log.command(f"cat {shlex.quote(str(go))}"))
    assert log.lines() == [f"web|{A}|{A}|", f"web|{B} {C}|{B} {C}|{A}"]


@pytest.mark.system
def test_what_came_and_went_while_it_ran_is_not_told(log: Log) -> None:
    """There is no difference to the last run then; the next change is one."""
    go = log.folder / "go"
    os.mkfifo(go)

    def watch() -> Iterator[Snapshot]:
        yield web(A)
        log.wait_for(1)
        yield web(B)
        yield web(A)
        go.write_text("")
        yield web(A, C)
        log.wait_for(2)
        go.write_text("")
        terminate_ourselves()

    follow(watch, log.command(f"cat {shlex.quote(str(go))}"))
    assert log.lines()[1] == f"web|{A} {C}|{C}|"


@pytest.mark.system
def test_a_failure_is_said_and_told_again_at_the_next_change(log: Log) -> None:
    """With its exit code; 128 + n where signal n killed it."""

    def watch() -> Iterator[Snapshot]:
        yield web(A)
        log.wait_for(1)
        yield web(A, B)
        log.wait_for(2)
        yield web(B)
        log.wait_for(3)
        terminate_ourselves()

    then = f'case "$HOSTS" in "{A}") exit 3;; "{A} {B}") kill -9 $$;; esac'
    code, said = follow(watch, log.command(then))
    assert code == 0
    assert log.lines() == [
        f"web|{A}|{A}|",
        f"web|{A} {B}|{A} {B}|",
        f"web|{B}|{B}|{A}",
    ]
    assert [text.partition(":")[0] for text in said] == [
        "sh failed, exit code 3",
        "sh failed, exit code 137",
    ]


@pytest.mark.system
def test_a_failure_is_repeated_without_a_change(log: Log) -> None:
    """After a pause, until it succeeds: a topic may be quiet for days."""

    def watch() -> Iterator[Snapshot]:
        yield web(A)
        log.wait_for(3)
        yield web(B)
        log.wait_for(4)
        terminate_ourselves()

    tries = shlex.quote(str(log.folder / "log"))
    code, said = follow(watch, log.command(f"[ $(wc -l < {tries}) -ge 3 ]"), Backoff(0.01, 0.02))
    assert code == 0
    assert log.lines() == [f"web|{A}|{A}|"] * 3 + [f"web|{B}|{B}|{A}"]
    assert len(said) == 2


@pytest.mark.parametrize(("name", "code"), [("/nonexistent/x", 127), ("/etc/passwd", 126)])
@pytest.mark.system
def test_what_cannot_be_started_ends_the_watch(name: str, code: int) -> None:
    """With the code of a shell: somebody mistyped it."""
    exit_code, said = follow(lambda: iter([web(A)]), [name])
    assert exit_code == code
    assert len(said) == 1 and name in said[0]


@pytest.mark.system
def test_what_cannot_be_started_later_is_a_failure(log: Log) -> None:
    """It may be replaced at this moment; once it is there again, it is told everything."""
    program, text = log.folder / "program", "#!/bin/sh\n" + log.command()[2]
    program.write_text(text)
    program.chmod(0o755)
    said: list[str] = []

    def watch() -> Iterator[Snapshot]:
        yield web(A)
        log.wait_for(1)
        program.rename(log.folder / "away")
        yield web(B)
        until(lambda: len(said) >= 2)
        (log.folder / "away").rename(program)
        yield web(B, C)
        log.wait_for(2)
        terminate_ourselves()

    follower = Follower("web", watch, command=[str(program)], say=said.append, backoff=NEVER)
    assert follower.run() == 0
    assert log.lines() == [f"web|{A}|{A}|", f"web|{B} {C}|{B} {C}|{A}"]
    assert "exit code 127" in said[1]


# --- how it ends ---------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
@pytest.mark.system
def test_a_signal_is_passed_on_and_ends_the_watch(number: int, log: Log) -> None:
    """What runs is told, its end is awaited, and nothing runs after it."""
    ready, end = log.folder / "ready", log.folder / "end"

    def watch() -> Iterator[Snapshot]:
        yield web(A)
        until(ready.exists)
        os.kill(os.getpid(), number)
        yield web(B)

    name = signal.Signals(number).name.removeprefix("SIG")
    then = f"trap 'echo {name} > {end}; exit 5' {name}; touch {ready}\nwhile :; do sleep 0.01; done"
    assert follow(watch, log.command(then)) == (0, [])
    assert end.read_text() == f"{name}\n"
    assert len(log.lines()) == 1


@pytest.mark.system
def test_a_signal_ends_a_watch_without_an_answer() -> None:
    """Consul may hang."""
    over = threading.Event()

    def watch() -> Iterator[Snapshot]:
        terminate_ourselves()
        over.wait(DEADLINE_SECONDS)
        yield web(A)

    try:
        assert follow(watch, ["false"]) == (0, [])
    finally:
        over.set()


@pytest.mark.system
def test_an_error_of_the_watch_is_raised_once_nothing_runs(log: Log) -> None:
    """Whoever started the watch learns why it ended; what runs comes to its end."""
    end = log.folder / "end"

    def watch() -> Iterator[Snapshot]:
        yield web(A)
        log.wait_for(1)
        raise Denied("no")

    with pytest.raises(Denied):
        follow(watch, log.command(f"sleep 0.2; touch {end}"))
    assert end.exists()


@pytest.mark.system
def test_it_has_our_environment(log: Log, monkeypatch: pytest.MonkeyPatch) -> None:
    """And the four variables, which replace ours; as `register -- COMMAND`, nothing else."""
    monkeypatch.setenv("HOSTS", "ours")
    monkeypatch.setenv("CONSUL_HTTP_TOKEN", "as-with-register")
    out = log.folder / "environment"

    def watch() -> Iterator[Snapshot]:
        yield web(A)
        raise Denied("raised once the copy is made")

    with pytest.raises(Denied):
        follow(watch, ["cp", "/proc/self/environ", str(out)])
    told = [f"TOPIC=web\0HOSTS={A}\0ADDED={A}\0REMOVED=\0"]
    ours = [f"{name}={value}\0" for name, value in os.environ.items() if name != "HOSTS"]
    found = os.fsdecode(out.read_bytes())
    assert sorted(found.split("\0")) == sorted("".join(ours + told).split("\0"))
