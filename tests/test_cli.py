"""What the command line prints, on which stream, and with which exit code."""

from __future__ import annotations

import functools
import io
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import NoReturn

import pytest

from consul_matchmaker import Matchmaker, Settings, __version__
from consul_matchmaker.backends.memory import Memory
from consul_matchmaker.cli import main
from consul_matchmaker.errors import Unavailable
from consul_matchmaker.model import Host, Instance
from consul_matchmaker.testing.local_consul import free_ports

from .http_servers import LOST, Server, agent_of_keys

KV, CATALOG = "consul+kv://", "consul+catalog://"
NOBODY_LISTENS = "127.0.0.1:1"  # tcpmux: refused at once on every machine without it
SECRET = "5ecre7-0f-th3-t0ken"
WAIT_SECONDS = 20.0

Captured = pytest.CaptureFixture[str]


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """No setting of the machine that runs the tests."""
    for name in list(os.environ):
        if name.startswith("CONSUL_"):
            monkeypatch.delenv(name)


@pytest.fixture
def memory() -> Memory:
    return Memory()


class Run:
    """The command line over a memory backend: exit code, stdout, stderr."""

    def __init__(self, memory: Memory, capsys: Captured) -> None:
        self.memory, self.capsys = memory, capsys
        self.settings: list[Settings] = []

    def __call__(self, *argv: str) -> tuple[int, str, str]:
        def make(settings: Settings) -> Matchmaker:
            self.settings.append(settings)
            return Matchmaker(settings, backend=self.memory)

        code = main(argv, make_matchmaker=make)
        captured = self.capsys.readouterr()
        return code, captured.out, captured.err


@pytest.fixture
def run(memory: Memory, capsys: Captured) -> Run:
    return Run(memory, capsys)


# --- hosts, topics, expire, status ---------------------------------------------------------------


def test_hosts_prints_one_a_line_and_nothing_else(run: Run, memory: Memory) -> None:
    """Sorted, on stdout, with nothing on stderr, so that scripts can use it."""
    memory.declare("scheduler", ["10.0.0.2:9501", "10.0.0.1:9501", "[::1]:9501"])
    assert run("hosts", "scheduler", "--url", KV) == (
        0,
        "10.0.0.1:9501\n10.0.0.2:9501\n[::1]:9501\n",
        "",
    )


def test_no_hosts_is_an_answer_with_its_own_code(run: Run) -> None:
    """Nothing printed, exit 3."""
    assert run("--url", KV, "hosts", "nobody") == (3, "", "")


def test_hosts_of_one_server(run: Run, memory: Memory) -> None:
    """--server narrows; a name nobody has is no hosts."""
    memory.declare("scheduler", [Instance(Host("a", 1), "node1"), Instance(Host("b", 1), "node2")])
    assert run("hosts", "scheduler", "--server", "node2", "--url", KV) == (0, "b:1\n", "")
    assert run("hosts", "scheduler", "--server=node3", "--url", KV) == (3, "", "")


def test_hosts_as_json_is_stable(run: Run, memory: Memory) -> None:
    """The documented object, on one line, also when there are none."""
    memory.declare("scheduler", [Instance(Host("a", 1), "node1", priority=1, weight=5)])
    code, out, _ = run("-o", "json", "hosts", "scheduler", "--url", KV)
    answer = json.loads(out)
    assert answer.pop("age_seconds") >= 0
    assert (code, out.count("\n")) == (0, 1)
    assert answer == {
        "topic": "scheduler",
        "hosts": ["a:1"],
        "instances": [
            {
                "host": "a:1",
                "address": "a",
                "port": 1,
                "server": "node1",
                "priority": 1,
                "weight": 5,
            }
        ],
        "source": "memory",
        "is_stale": False,
        "is_complete": True,
    }
    code, out, _ = run("-o", "json", "hosts", "nobody", "--url", KV)
    assert (code, json.loads(out)["hosts"]) == (3, [])


def test_explain_prints_why(run: Run, memory: Memory) -> None:
    """A line a fact, hosts and what was asked one a line; the same as JSON; exits as hosts does."""
    memory.declare("scheduler", [Instance(Host("a", 1), "node1", priority=1, weight=5)])
    code, out, err = run("explain", "scheduler", "--url", KV)
    lines = out.splitlines()
    assert (code, err, lines[:2]) == (0, "", ["topic: scheduler", "state: fresh"])
    assert "    host a:1, server node1, priority 1, weight 5" in lines
    assert "failures: 0" in lines
    assert "last_error: -" in lines
    code, out, _ = run("explain", "scheduler", "--url", KV, "-o", "json")
    told = json.loads(out)
    assert (code, out.count("\n")) == (0, 1)
    assert told["answer"]["hosts"] == [
        {"host": "a:1", "server": "node1", "priority": 1, "weight": 5}
    ]


def test_explain_exits_as_hosts_does(run: Run, memory: Memory) -> None:
    """Nobody there, or nobody of that name: 3; Consul cannot be asked: 4, with the reason on
    stdout, as that is the answer; a bad topic: 2."""
    memory.declare("scheduler", [Instance(Host("a", 1), "node1")])
    assert run("explain", "nobody", "--url", KV)[0] == 3
    assert run("explain", "scheduler", "--server", "node1", "--url", KV)[0] == 0
    assert run("explain", "scheduler", "--server", "node2", "--url", KV)[0] == 3
    memory.is_available = False
    code, out, _ = run("explain", "scheduler", "--url", KV)
    assert code == 4
    assert "last_error: the memory backend was told not to answer" in out
    memory.is_available, memory.is_denied = True, True
    code, out, _ = run("explain", "scheduler", "--url", KV, "-o", "json")
    assert code == 4
    assert "refuse" in json.loads(out)["last_error"]
    code, out, err = run("explain", "", "--url", KV)
    assert (code, out, err.count("\n")) == (2, "", 1)


def test_topics_prints_one_a_line(run: Run, memory: Memory) -> None:
    """Sorted; none is an answer too."""
    assert run("topics", "--url", KV) == (0, "", "")
    memory.declare("b", ["x:1"])
    memory.declare("a", ["x:1"])
    assert run("topics", "--url", KV) == (0, "a\nb\n", "")
    assert run("topics", "--url", KV, "-o", "json") == (0, '{"topics": ["a", "b"]}\n', "")


def test_expire_says_how_many_it_removed(run: Run, memory: Memory) -> None:
    """Exit 3 when there was nothing to remove."""
    with Matchmaker(Settings(mode="kv"), backend=memory) as owner:
        registration = owner.register("scheduler", "10.0.0.1:9501")
        registration.wait_until_published(timeout_seconds=WAIT_SECONDS)
        assert run("expire", "scheduler", "10.0.0.2:9501", "--url", KV) == (3, "0\n", "")
        assert run("expire", "scheduler", "10.0.0.1:9501", "--url", KV) == (0, "1\n", "")
    code, out, _ = run("expire", "scheduler", "10.0.0.1:9501", "--url", KV, "-o", "json")
    assert code == 3
    assert json.loads(out) == {"topic": "scheduler", "host": "10.0.0.1:9501", "removed": 0}


@contextmanager
def keys_without_session(*keys: str) -> Iterator[str]:
    """The URL of an agent that has *keys*."""
    with Server(agent_of_keys(*keys)) as server:
        yield f"{KV}{server.address}"


@pytest.mark.system
def test_sweep_removes_only_when_told(run: Run) -> None:
    """Dry by default, and says so; with --remove each removed key is marked."""
    with keys_without_session(LOST, "matchmaker/x") as url:
        foreign = "matchmaker/x: not a key of ours, left alone\n"
        code, out, err = run("sweep", "--url", url)
        assert (code, out) == (0, f"{LOST}: held by no session\n{foreign}")
        assert "--remove" in err
        removed = f"{LOST}: held by no session, removed\n{foreign}"
        assert run("sweep", "--remove", "--url", url) == (0, removed, "")
    with keys_without_session(LOST) as url:
        code, out, _ = run("sweep", "--remove", "--url", url, "-o", "json")
    assert (code, json.loads(out)["removed"]) == (0, [LOST])


def test_sweep_is_for_consuls_keys(run: Run) -> None:
    """Where nothing can be left behind, asking for it is wrong usage."""
    code, out, err = run("sweep", "--url", CATALOG)
    assert (code, out) == (2, "")
    assert "consul+kv" in err


HOSTILE = "x\x1b[2J\x07\n6.6.6.6:22 \u202e\x85\\\ud800"
"""Clears the screen, rings, makes a line of its own, has spaces, turns the text round."""


@pytest.mark.finding("E13")
@pytest.mark.parametrize("command", ["hosts", "topics", "explain", "status"])
def test_what_strangers_named_is_escaped(capsys: Captured, command: str) -> None:
    """Nothing of it steers the terminal, makes a line, or is two words to a shell."""

    class Hostile(Memory):
        def topics(self) -> list[str]:
            return [HOSTILE]

    memory = Hostile()
    memory.declare(HOSTILE, [Instance(Host.opaque(HOSTILE), HOSTILE)])
    run = Run(memory, capsys)
    argv = [command, HOSTILE] if command in ("hosts", "explain") else [command]
    code, out, err = run(*argv, "--url", KV)
    assert code == 0
    assert all(line.isprintable() for line in [*out.splitlines(), *err.splitlines()])
    assert not any(line.startswith("6.6.6.6") for line in out.split("\n"))
    if command in ("hosts", "topics"):
        word = r"x\x1b[2J\x07\n6.6.6.6:22\x20\u202e\x85\\\ud800"
        assert out == word + "\n"
        assert word.encode("ascii").decode("unicode_escape") == HOSTILE  # nothing is lost
    code, out, _ = run(*argv, "--url", KV, "-o", "json")
    assert (code, out.count("\n"), out.isascii()) == (0, 1, True)
    assert json.loads(out)


@pytest.mark.system
@pytest.mark.finding("E13")
def test_a_strangers_key_is_escaped(run: Run) -> None:
    """As what strangers named otherwise; a key is at least no half of a character."""
    key = "matchmaker/" + HOSTILE.encode("utf-8", "replace").decode()
    with keys_without_session(key) as url:
        code, out, _ = run("sweep", "--url", url)
        assert (code, out.count("\n"), out.rstrip("\n").isprintable()) == (0, 1, True)
        _, out, _ = run("sweep", "--url", url, "-o", "json")
    assert (out.isascii(), list(json.loads(out)["orphans"])) == (True, [key])


@pytest.mark.finding("E13")
def test_an_errors_text_is_escaped(run: Run, memory: Memory) -> None:
    """What an agent said is as much anybody's as what is named in Consul."""

    def lookup(*args: object, **kwargs: object) -> NoReturn:
        raise Unavailable(f"the agent said {HOSTILE}")

    memory.lookup = lookup  # type: ignore[method-assign]
    for argv in (["hosts", "a"], ["explain", "a"], ["-vv", "hosts", "a"], ["hosts", HOSTILE]):
        _, out, err = run(*argv, "--url", KV)
        assert all(line.isprintable() for line in [*out.splitlines(), *err.splitlines()])
        assert "\n6.6.6.6" not in out + err


@pytest.mark.finding("E13")
def test_a_stdout_that_is_not_utf8_makes_no_traceback(
    memory: Memory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it cannot say is escaped."""
    memory.declare("ü", [Host.opaque("знак")])
    written = io.BytesIO()
    with io.TextIOWrapper(written, encoding="ascii") as out:
        monkeypatch.setattr(sys, "stdout", out)
        make = functools.partial(Matchmaker, backend=memory)
        assert main(["hosts", "ü", "--url", KV], make_matchmaker=make) == 0
        assert written.getvalue() == rb"\u0437\u043d\u0430\u043a" + b"\n"


def test_a_registration_that_nobody_can_reach_is_warned_of(
    memory: Memory, caplog: pytest.LogCaptureFixture
) -> None:
    """It is made all the same: on one machine loopback is enough."""
    with Matchmaker(Settings(mode="kv"), backend=memory) as matchmaker:
        for host in ("0.0.0.0:1", "127.0.0.1:1", "localhost:1", "[::]:1", "10.0.0.5:1"):
            matchmaker.register("scheduler", host)
    warned = [each.getMessage() for each in caplog.records if "registering" in each.getMessage()]
    assert len(warned) == 4
    assert "0.0.0.0" in warned[0]


def test_status_says_whether_consul_answers(run: Run, memory: Memory) -> None:
    """For people and for machines; exit 4 when it does not."""
    code, out, _ = run("status", "--url", KV)
    assert code == 0
    assert "answers: yes\n" in out
    memory.is_available = False
    code, out, err = run("status", "--url", f"{KV}?token={SECRET}", "-o", "json")
    status = json.loads(out)
    assert (code, status["answers"], status["mode"]) == (4, False, "kv")
    assert status["problem"]
    assert SECRET not in out + err


# --- errors --------------------------------------------------------------------------------------

BAD_INPUT = [
    (["hosts", ""], "topic"),
    (["register", "", "10.0.0.1:1"], "topic"),
    (["expire", "", "10.0.0.1:1"], "topic"),
    *((["register", "scheduler", host], "port") for host in ("a:0", "a:65536", "a:x", "a:-1")),
    *((["register", "scheduler", host], "ADDRESS:PORT") for host in ("10.0.0.1", ":1", "")),
    (["register", "scheduler", "::1:9501"], "brackets"),
    (["expire", "scheduler", "a:0"], "port"),
    (["hosts", "scheduler", "--url", "consul+kv://?ttl_second=1"], "did you mean setting ttl_seco"),
    (["hosts", "scheduler", "--url", "http://127.0.0.1:8500"], "consul+catalog://"),
    (["hosts", "scheduler", "--url", "consul+kv://127.0.0.1:65536"], "65535"),
    (["hosts"], "TOPIC"),
    (["hosts", "a", "b"], "too many"),
    (["hosts", "a", "--sever", "b"], "--sever"),
    (["hosts", "a", "-o", "xml"], "json"),
    (["register", "scheduler"], "HOST"),
    (["register", "scheduler", "a:1", "--"], "command"),
    (["watch", "scheduler", "--"], "command"),
    (["watch", "--", "true"], "TOPIC"),
    *((["register", "scheduler", "a:1", "--drain", text], "seconds") for text in ("-1", "x")),
    (["frobnicate"], "hosts"),
    ([], "COMMAND"),
]


@pytest.mark.parametrize(("argv", "remedy"), BAD_INPUT)
def test_bad_input_is_one_line_that_names_the_remedy(
    run: Run, memory: Memory, argv: list[str], remedy: str
) -> None:
    """On stderr, without a traceback, exit 2, and Consul hears nothing."""
    given_url = [] if "--url" in argv else ["--url", KV]
    code, out, err = run(*given_url, *argv)
    assert (code, out) == (2, "")
    assert err.startswith("consul-matchmaker: error: ")
    assert err.count("\n") == 1
    assert remedy in err
    assert memory.topics() == []


def test_without_a_url_the_error_says_what_to_set(run: Run) -> None:
    """Nothing is guessed: there are two modes, and they mean different things."""
    code, out, err = run("hosts", "scheduler")
    assert (code, out) == (2, "")
    assert "CONSUL_MATCHMAKER_URL" in err


def test_the_url_may_come_from_the_environment(
    run: Run, memory: Memory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """--url wins over CONSUL_MATCHMAKER_URL."""
    monkeypatch.setenv("CONSUL_MATCHMAKER_URL", "consul+kv://10.0.0.1?ttl_seconds=7")
    memory.declare("scheduler", ["a:1"])
    assert run("hosts", "scheduler") == (0, "a:1\n", "")
    assert run("hosts", "scheduler", "--url", "consul+kv://10.0.0.2") == (0, "a:1\n", "")
    assert [str(s.addresses[0]) for s in run.settings] == ["10.0.0.1:8500", "10.0.0.2:8500"]
    assert [s.ttl_seconds for s in run.settings] == [7.0, 5.0]


def test_an_outage_and_a_refusal_have_their_own_code(run: Run, memory: Memory) -> None:
    """Exit 4, one line, nothing on stdout."""
    memory.is_available = False
    for argv in (["hosts", "scheduler"], ["topics"], ["expire", "a", "b:1"], ["watch", "a"]):
        code, out, err = run(*argv, "--url", KV)
        assert (code, out, err.count("\n")) == (4, "", 1)
    memory.is_available, memory.is_denied = True, True
    for argv in (["hosts", "scheduler"], ["topics"], ["register", "a", "b:1"]):
        code, out, err = run(*argv, "--url", KV)
        assert (code, out) == (4, "")
        assert err.splitlines()[-1].startswith("consul-matchmaker: error: ")


@pytest.mark.system
def test_a_real_agent_that_is_not_there(capsys: Captured) -> None:
    """In both modes the message says whom it asked."""
    for mode in ("kv", "catalog"):
        url = f"consul+{mode}://{NOBODY_LISTENS}?request_timeout_seconds=0.5"
        assert main(["hosts", "scheduler", "--url", url]) == 4
        captured = capsys.readouterr()
        assert (captured.out, captured.err.count("\n")) == ("", 1)
        assert NOBODY_LISTENS in captured.err
        assert main(["explain", "scheduler", "--url", url]) == 4
        assert NOBODY_LISTENS in capsys.readouterr().out


@pytest.mark.parametrize(
    "argv", [["--token", SECRET, "topics"], ["topics", f"--token={SECRET}"], ["--tok", SECRET]]
)
def test_a_token_is_not_taken_from_the_command_line(run: Run, argv: list[str]) -> None:
    """Everybody could read it there; the message says where it belongs, and does not repeat it."""
    code, out, err = run("--url", KV, *argv)
    assert (code, out) == (2, "")
    assert "CONSUL_HTTP_TOKEN" in err
    assert SECRET not in err


def test_a_token_in_the_url_option_is_warned_of(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """It works, but the operator is told; from the environment it is nobody's business."""
    code, out, err = run("topics", "--url", f"consul+kv://:{SECRET}@127.0.0.1")
    assert (code, out) == (0, "")
    assert "CONSUL_MATCHMAKER_URL" in err
    assert SECRET not in err
    monkeypatch.setenv("CONSUL_MATCHMAKER_URL", f"consul+kv://:{SECRET}@127.0.0.1")
    assert run("topics") == (0, "", "")
    monkeypatch.setenv("CONSUL_HTTP_TOKEN", SECRET)
    assert run("topics", "--url", KV) == (0, "", "")


@pytest.mark.parametrize("argv", [["--help"], ["hosts", "--help"], ["register", "-h"]])
def test_help_names_the_exit_codes(run: Run, argv: list[str]) -> None:
    """On stdout, exit 0."""
    code, out, err = run(*argv)
    assert (code, err) == (0, "")
    assert "exit codes:" in out


def test_version(run: Run) -> None:
    """The name and the version, on stdout."""
    code, out, _ = run("--version")
    assert (code, out) == (0, f"consul-matchmaker {__version__}\n")


@pytest.mark.parametrize(
    "argv",
    [
        ["-o", "json", "--url", KV, "topics"],
        ["topics", "-o", "json", "--url", KV],
        ["-o", "json", "topics", "--url", KV],
        ["--url", "consul+catalog://", "topics", "-o", "json", "--url", KV],
    ],
)
def test_options_stand_before_or_after_the_command(run: Run, argv: list[str]) -> None:
    """Wherever they are given they count, and after the command they count more."""
    assert run(*argv) == (0, '{"topics": []}\n', "")


def test_a_topic_may_begin_with_a_dash(run: Run, memory: Memory) -> None:
    """After -- everything is an operand."""
    memory.declare("-x", ["a:1"])
    assert run("--url", KV, "hosts", "--", "-x") == (0, "a:1\n", "")


@pytest.mark.parametrize(
    "argv", [["register", "scheduler", "a:1"], ["expire", "scheduler", "a:1"], ["topics"]]
)
def test_what_catalog_mode_cannot_do_is_said(argv: list[str], capsys: Captured) -> None:
    """Operators write the catalog, and DNS cannot list: exit 2, with the way out."""
    assert main([*argv, "--url", CATALOG]) == 2
    assert "kv" in capsys.readouterr().err


def test_verbose_logs_to_stderr_only(run: Run, memory: Memory) -> None:
    """-v adds log lines, stdout stays as it was."""
    memory.declare("scheduler", ["a:1"])
    for flag in ("-v", "-vv"):
        code, out, _ = run("hosts", "scheduler", "--url", KV, flag)
        assert (code, out) == (0, "a:1\n")


# --- processes of their own: signals, pipes, commands --------------------------------------------

# The command line over a memory backend that says on stdout what it holds when it is asked to end.
CLI_OVER_MEMORY = """
import os, sys
from consul_matchmaker import Matchmaker
from consul_matchmaker.backends.memory import Memory
from consul_matchmaker.cli import main

class Telling(Memory):
    def release(self, lease):
        super().release(lease)
        os.write(1, f"left: {self.topics()}\\n".encode())  # whole, beside the command's lines

memory = Telling()
memory.declare("declared", ["10.0.0.1:9501", "10.0.0.2:9501"])
if sys.argv[1] == "away":
    memory.is_available = False
sys.exit(main(sys.argv[2:], make_matchmaker=lambda s: Matchmaker(s, backend=memory)))
"""


LEFT = "left: ['declared']\n"


@contextmanager
def process(
    *argv: str, state: str = "up", stdout: int = subprocess.PIPE
) -> Iterator[subprocess.Popen[str]]:
    """`consul-matchmaker ARGV` as a process of its own; killed at the end of the block."""
    started = subprocess.Popen(
        [sys.executable, "-c", CLI_OVER_MEMORY, state, "--url", KV, *argv],
        stdin=subprocess.DEVNULL,
        stdout=stdout,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,  # no terminal: signals are forwarded
        # A shell's background jobs ignore SIGINT, those of nohup SIGHUP, and so would this one.
        preexec_fn=lambda: [
            signal.signal(number, signal.SIG_DFL) for number in (signal.SIGINT, signal.SIGHUP)
        ],
    )

    def kill() -> None:
        with suppress(ProcessLookupError):
            os.killpg(started.pid, signal.SIGKILL)  # and its command, which has our pipes too

    timer = threading.Timer(WAIT_SECONDS, kill)  # no test hangs
    timer.start()
    try:
        yield started
    finally:
        timer.cancel()
        kill()
        started.communicate()


def said(started: subprocess.Popen[str], words: str) -> str:
    """The first line on stderr with *words*; what came before is dropped."""
    assert started.stderr is not None
    for line in started.stderr:
        if words in line:
            return line
    raise AssertionError(f"ended without saying {words!r}")


def python(text: str, *argv: str) -> list[str]:
    return [sys.executable, "-c", text, *argv]


ELSEWHERE = """
import signal, threading, time

def interrupt_this_thread():
    while "scheduler" not in memory.topics():
        time.sleep(0.01)
    time.sleep(0.2)  # until the main thread waits
    signal.pthread_kill(threading.get_ident(), signal.SIGTERM)

threading.Thread(target=interrupt_this_thread, daemon=True).start()
sys.exit("""


@pytest.mark.system
def test_a_signal_that_does_not_end_the_wait_is_noticed_all_the_same() -> None:
    """As one that comes just before the wait begins, or to another thread: Python runs its handler
    only when the main thread goes on."""
    text = CLI_OVER_MEMORY.replace("sys.exit(", ELSEWHERE)
    arguments = ["up", "--url", KV, "register", "scheduler", "10.0.0.1:9501"]
    ended = subprocess.run(
        python(text, *arguments), capture_output=True, text=True, timeout=WAIT_SECONDS
    )
    assert (ended.returncode, ended.stdout) == (0, LEFT)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
@pytest.mark.system
def test_register_holds_until_a_signal_and_withdraws(number: int) -> None:
    """Says when it is published; the signal is the regular end: exit 0, nothing left."""
    with process("register", "scheduler", "10.0.0.1:9501", "--server", "node1") as started:
        assert "scheduler at 10.0.0.1:9501 as node1" in said(started, "registered")
        started.send_signal(number)
        out, err = started.communicate()
        assert (started.returncode, out, err) == (0, LEFT, "")


@pytest.mark.parametrize(
    ("command", "code"),
    [("exit(0)", 0), ("exit(7)", 7), ("import os; os.kill(os.getpid(), 9)", 137)],
)
@pytest.mark.system
def test_register_ends_with_its_command(command: str, code: int) -> None:
    """With the same exit code; 128 + n when signal n killed it, as in every shell."""
    argv = ["register", "scheduler", "10.0.0.1:9501", "--at-once", "--", *python(command)]
    with process(*argv) as started:
        started.communicate()
        assert started.returncode == code


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.system
def test_a_signal_is_forwarded_to_the_command(number: int) -> None:
    """The registration goes first, the command decides when it ends, and how."""
    command = python(
        # os.write: the signal may come while `print` still flushes, which is not reentrant.
        "import os, signal, sys\n"
        "def end(n, frame):\n"
        "    os.write(1, b'command got %d\\n' % n)\n"
        "    sys.exit(5)\n"
        "signal.signal(signal.SIGTERM, end); signal.signal(signal.SIGINT, end)\n"
        "print('up', flush=True)\n"
        "while True: signal.pause()"
    )
    argv = ["register", "scheduler", "10.0.0.1:9501", "--at-once", "--", *command]
    with process(*argv) as started:
        assert started.stdout is not None
        assert started.stdout.readline() == "up\n"
        said(started, "registered")
        started.send_signal(number)
        out, _ = started.communicate()
        assert started.returncode == 5
        assert f"command got {int(number)}\n" in out
        assert LEFT in out


@pytest.mark.system
def test_a_command_may_survive_a_hangup() -> None:
    """SIGHUP means reload to many servers: it is forwarded, and the registration stays."""
    command = python(
        "import os, signal\n"
        "signal.signal(signal.SIGHUP, lambda n, f: os.write(1, b'reloaded\\n'))\n"
        "print('up', flush=True)\n"
        "signal.pause(); signal.pause()"
    )
    argv = ["register", "scheduler", "10.0.0.1:9501", "--at-once", "--", *command]
    with process(*argv) as started:
        assert started.stdout is not None
        assert started.stdout.readline() == "up\n"
        said(started, "registered")
        started.send_signal(signal.SIGHUP)
        assert started.stdout.readline() == "reloaded\n"
        started.terminate()
        out, _ = started.communicate()
        assert (started.returncode, out) == (128 + 15, LEFT)


@pytest.mark.system
def test_a_command_that_ends_before_it_listens_was_never_registered() -> None:
    """Nothing was said of it, and its code is passed on."""
    argv = [
        "register",
        "scheduler",
        f"127.0.0.1:{free_ports('127.0.0.1', 1)[0]}",
        "--",
        *python("exit(9)"),
    ]
    with process(*argv) as started:
        out, err = started.communicate()
        assert (started.returncode, out, err) == (9, "", "")


@pytest.mark.parametrize(("command", "code"), [("/nonexistent/x", 127), ("/etc/passwd", 126)])
@pytest.mark.system
def test_a_command_that_cannot_start_has_the_shells_code(command: str, code: int) -> None:
    """127 when it does not exist, 126 when it cannot be executed, and nothing is registered."""
    with process("register", "scheduler", "10.0.0.1:9501", "--", command) as started:
        out, err = started.communicate()
        assert (started.returncode, out) == (code, "")
        assert command in err
        assert err.count("\n") == 1


@pytest.mark.system
def test_in_catalog_mode_the_command_just_runs(capfd: pytest.CaptureFixture[str]) -> None:
    """The same start script serves both modes; what catalog mode does not do is said."""
    argv = ["register", "scheduler", "10.0.0.1:9501", "--url", CATALOG, "--", *python("exit(6)")]
    assert main(argv) == 6
    assert "registers nothing" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("argv", "line"),
    [
        (["declared"], "10.0.0.1:9501 10.0.0.2:9501\n"),
        (["nobody"], "\n"),
        (["declared", "-o", "json"], '"hosts": ["10.0.0.1:9501", "10.0.0.2:9501"]'),
    ],
)
@pytest.mark.system
def test_watch_prints_at_once_and_ends_on_ctrl_c(argv: list[str], line: str) -> None:
    """One flushed line per change, empty for no hosts; Ctrl-C is 130, without a traceback."""
    with process("watch", *argv) as started:
        assert started.stdout is not None
        assert line in started.stdout.readline()
        started.send_signal(signal.SIGINT)
        out, err = started.communicate()
        assert (started.returncode, out, err) == (130, "", "")


@pytest.mark.system
def test_watch_runs_a_command_instead_of_printing() -> None:
    """What is after -- is its own, options too; SIGTERM ends both with 0."""
    script = "import os, signal, sys; print(os.environ['HOSTS'], *sys.argv[1:], flush=True)"
    command = [*python(f"{script}; signal.pause()"), "-o", "--", "x"]
    with process("watch", "declared", "--", *command) as started:
        assert started.stdout is not None
        assert started.stdout.readline() == "10.0.0.1:9501 10.0.0.2:9501 -o -- x\n"
        started.send_signal(signal.SIGTERM)
        out, err = started.communicate()
        assert (started.returncode, out, err) == (0, "", "")


@pytest.mark.system
def test_a_watch_that_cannot_begin_runs_nothing(run: Run, memory: Memory) -> None:
    """Exit 4, as without a command."""
    memory.is_available = False
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        code, out, err = run("watch", "a", "--url", KV, "--", "echo", "never")
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    assert (code, out, err.count("\n")) == (4, "", 1)


@pytest.mark.system
def test_a_closed_pipe_is_no_error() -> None:
    """`hosts | head -0` ends quietly, as every tool does."""
    reading, writing = os.pipe()
    os.close(reading)
    with process("hosts", "declared", stdout=writing) as started:
        os.close(writing)
        assert started.stderr is not None
        assert started.stderr.read() == ""
        assert started.wait() == 141
