"""The demo sees everything it claims, within a minute, and leaves nothing behind."""

import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

MOST_SECONDS = 60.0  # on an idle machine it takes 25
WAIT_SECONDS = 120.0
POLL_SECONDS = 0.1


@pytest.fixture
def scratch() -> Iterator[Path]:
    """A folder for the demo's own files, by which its processes are known too."""
    with tempfile.TemporaryDirectory(prefix="demo-test-") as folder:
        yield Path(folder)


def start(scratch: Path) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-m", "consul_matchmaker", "demo"],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "TMPDIR": str(scratch)},
        start_new_session=True,
    )


def left_running(scratch: Path) -> list[str]:
    """Command lines of the processes that were started with this scratch folder."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            environ, command = (folder / "environ").read_bytes(), (folder / "cmdline").read_bytes()
        except OSError:
            continue  # it has ended, or is not ours
        if f"TMPDIR={scratch}".encode() in environ.split(b"\0") and command:
            found.append(command.replace(b"\0", b" ").decode())
    return found


def nothing_is_left(scratch: Path) -> None:
    deadline = time.monotonic() + 10
    while left_running(scratch) and time.monotonic() < deadline:
        time.sleep(POLL_SECONDS)
    assert left_running(scratch) == []
    assert list(scratch.iterdir()) == []


def test_the_demo_sees_all_it_claims(scratch: Path) -> None:
    """Both modes, with measured times, exit 0, in less than a minute, and nothing is left."""
    began = time.monotonic()
    out, err = start(scratch).communicate(timeout=WAIT_SECONDS)
    assert time.monotonic() - began < MOST_SECONDS
    assert "NOT SEEN" not in out
    assert err == ""
    for chapter in ("kv mode", "catalog mode"):
        assert chapter in out
    gone = re.search(r"is gone, (\d+\.\d+) s later than it was killed", out)
    assert gone is not None
    assert float(gone[1]) <= 21
    nothing_is_left(scratch)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupted_demo_leaves_nothing(scratch: Path, number: int, code: int) -> None:
    """Ctrl-C and SIGTERM end the cluster and every process it started."""
    demo = start(scratch)
    assert demo.stdout is not None
    assert any("sees 3 hosts" in line for line in demo.stdout)
    assert left_running(scratch)
    demo.send_signal(number)
    _, err = demo.communicate(timeout=WAIT_SECONDS)
    assert (demo.returncode, err) == (code, "")
    nothing_is_left(scratch)
