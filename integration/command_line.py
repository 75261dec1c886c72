"""The command `consul-matchmaker` as a process of its own."""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

WAIT_SECONDS = 30.0


def environment(**extra: str) -> dict[str, str]:
    """The environment without any setting of the machine that runs the tests."""
    return {**{k: v for k, v in os.environ.items() if not k.startswith("CONSUL_")}, **extra}


def cli(*argv: str, **extra: str) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of `consul-matchmaker ARGV`."""
    done = subprocess.run(
        [sys.executable, "-m", "consul_matchmaker", *argv],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        env=environment(**extra),
        timeout=WAIT_SECONDS,
        check=False,
    )
    return done.returncode, done.stdout, done.stderr


@contextmanager
def running(*argv: str) -> Iterator["subprocess.Popen[str]"]:
    """`consul-matchmaker ARGV` while the block lasts."""
    process = subprocess.Popen(
        [sys.executable, "-m", "consul_matchmaker", *argv],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(),
        start_new_session=True,
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def said(process: "subprocess.Popen[str]", words: str) -> None:
    assert process.stderr is not None
    assert any(words in line for line in process.stderr), f"ended without saying {words!r}"
