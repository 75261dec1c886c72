"""Answers on disk: written whole or not at all, and never believed when anything is wrong."""

from __future__ import annotations

import fcntl
import json
import logging
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from consul_matchmaker import state_file
from consul_matchmaker.model import Host, Instance
from consul_matchmaker.settings import Settings
from consul_matchmaker.state_file import Kept, StateFile

from .doubles import DEADLINE_SECONDS, ManualClock, catalog, in_thread, kv

ONE = Instance(Host("10.0.0.1", 5001), "node1", 1, 5)
SIX = Instance(Host("::1", 5006))
OPAQUE = Instance(Host.opaque("host/é 😀/1f2e"))


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock(1_700_000_000.0)


def made(folder: Path, clock: ManualClock, settings: Settings | None = None) -> StateFile:
    return StateFile(str(folder), settings or kv(), wall_clock=clock)


def kept(*instances: Instance, age_seconds: float = 0.0, is_complete: bool = True) -> Kept:
    return Kept(age_seconds, is_complete, instances)


def test_what_was_saved_is_loaded_with_its_age(tmp_path: Path, clock: ManualClock) -> None:
    """Every kind of host, the server names and weights come back, older by what passed since."""
    answers = {
        ("scheduler", None): kept(ONE, SIX, OPAQUE, age_seconds=2.0),
        ("scheduler", "node1"): kept(ONE, is_complete=False),
    }
    made(tmp_path / "deep" / "folder", clock).save(answers)
    clock.advance(10)
    assert made(tmp_path / "deep" / "folder", clock).load() == {
        ("scheduler", None): kept(ONE, SIX, OPAQUE, age_seconds=12.0),
        ("scheduler", "node1"): kept(ONE, age_seconds=10.0, is_complete=False),
    }


def test_a_file_cut_anywhere_holds_nothing(
    tmp_path: Path, clock: ManualClock, caplog: pytest.LogCaptureFixture
) -> None:
    """At every byte position: no host of it is believed, and one warning says so."""
    file = made(tmp_path, clock)
    file.save({("scheduler", None): kept(ONE, SIX), ("mails", None): kept(OPAQUE)})
    whole = file.path.read_bytes()
    for length in range(len(whole)):
        file.path.write_bytes(whole[:length])
        caplog.clear()
        cut = made(tmp_path, clock)
        assert cut.load() == cut.load() == {}
        assert len([one for one in caplog.records if one.levelno == logging.WARNING]) == 1
    file.path.write_bytes(whole)
    assert len(file.load()) == 2


def test_a_flipped_bit_is_noticed(tmp_path: Path, clock: ManualClock) -> None:
    """Any single changed byte makes the whole file worthless."""
    file = made(tmp_path, clock)
    file.save({("scheduler", None): kept(ONE)})
    whole = file.path.read_bytes()
    for place in range(len(whole)):
        file.path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        assert file.load() == {}


@given(body=st.binary(max_size=60) | st.text('[]{}",:0123456789.nultre', max_size=60))
def test_nonsense_with_a_right_checksum_is_no_answer(
    tmp_path_factory: pytest.TempPathFactory, body: bytes | str
) -> None:
    """What cannot be read as answers raises nothing, whatever it is."""
    file = made(tmp_path_factory.mktemp("state"), ManualClock())
    content = body.encode() if isinstance(body, str) else body
    file.path.write_bytes(state_file._header(content) + content)
    assert file.load() == {}


def test_rows_of_another_shape_are_no_answer(tmp_path: Path, clock: ManualClock) -> None:
    """A host with an impossible port, or a field too many, spoils the file: it is not ours."""
    file = made(tmp_path, clock)
    for instance in (["10.0.0.1", 0, None, 1, 1], ["10.0.0.1", 1, None, 1], ["", 1, None, 1, 1]):
        body = json.dumps([["scheduler", None, clock.now, True, [instance]]]).encode()
        file.path.write_bytes(state_file._header(body) + body)
        assert file.load() == {}


@pytest.mark.finding("E15")
@pytest.mark.parametrize(
    "row",
    [
        ["scheduler", None, 0, True, [["10.0.0.1", 1, None, "1", 1]]],
        ["scheduler", None, 0, True, [["10.0.0.1", 1, None, 1, None]]],
        ["scheduler", None, 0, True, [["10.0.0.1", 1, None, 1, 1.5]]],
        ["scheduler", None, 0, True, [["10.0.0.1", 1, None, -1, 1]]],
        ["scheduler", None, 0, True, [["10.0.0.1", True, None, 1, 1]]],
        ["scheduler", None, 0, True, [["10.0.0.1", 1.0, None, 1, 1]]],
        ["scheduler", None, 0, True, [["10.0.0.1", 1, 7, 1, 1]]],
        ["scheduler", None, 0, True, [[["a"], 1, None, 1, 1]]],
        ["scheduler", None, 0, True, {}],
        ["scheduler", None, 0, 1, []],
        ["scheduler", None, float("nan"), True, []],
        ["scheduler", None, "0", True, []],
        ["scheduler", None, 10**400, True, []],
        ["scheduler", 7, 0, True, []],
        [7, None, 0, True, []],
        ["", None, 0, True, []],
    ],
    ids=str,
)
def test_values_of_another_type_are_no_answer(
    tmp_path: Path, clock: ManualClock, row: list[object]
) -> None:
    """What pick or a lookup would fail on later spoils the file."""
    file = made(tmp_path, clock)
    if row[2] == 0:
        row = [*row[:2], clock.now, *row[3:]]
    body = json.dumps([row]).encode()
    file.path.write_bytes(state_file._header(body) + body)
    assert file.load() == {}


@pytest.mark.finding("E15")
def test_what_is_no_regular_file_is_not_waited_for(
    tmp_path: Path, clock: ManualClock, caplog: pytest.LogCaptureFixture
) -> None:
    """A pipe that nobody writes, an endless device: as good as no file, with a warning, and
    replaced by the next save."""
    file = made(tmp_path, clock)

    def pipe() -> None:
        os.mkfifo(file.path)

    def device() -> None:
        file.path.symlink_to("/dev/zero")

    for make in (pipe, device):
        make()
        reading = in_thread(made(tmp_path, clock).load)
        assert reading.result(DEADLINE_SECONDS) == {}
        assert "no regular file" in caplog.messages[-1]
        in_thread(lambda: file.save({("scheduler", None): kept(ONE)})).result(DEADLINE_SECONDS)
        assert file.load()
        assert not file.path.is_symlink()
        file.path.unlink()


@pytest.mark.finding("E15")
def test_no_more_is_read_than_a_file_may_have(
    tmp_path: Path, clock: ManualClock, caplog: pytest.LogCaptureFixture
) -> None:
    """One that is too big, or grows while it is read, is ignored."""
    file = made(tmp_path, clock)
    with file.path.open("wb") as big:
        big.truncate(state_file.MAX_BYTES + 1)
    assert file.load() == {}
    assert "too big" in caplog.text


def test_an_answer_has_an_end(tmp_path: Path, clock: ManualClock) -> None:
    """Past max_stale_seconds it is not loaded, nor when it claims to be from the future."""
    settings = kv(max_stale_seconds=100)
    made(tmp_path, clock, settings).save({("scheduler", None): kept(ONE, age_seconds=40)})
    clock.advance(59.9)
    assert made(tmp_path, clock, settings).load()
    clock.advance(0.2)
    assert not made(tmp_path, clock, settings).load()
    clock.advance(-1000)
    assert not made(tmp_path, clock, settings).load()


def test_processes_that_share_a_folder_keep_each_others_answers(
    tmp_path: Path, clock: ManualClock
) -> None:
    """The newest answer of a topic wins, and a newer one without hosts removes it."""
    one, other = made(tmp_path, clock), made(tmp_path, clock)
    one.save({("a", None): kept(ONE), ("b", None): kept(ONE, age_seconds=5)})
    other.save({("b", None): kept(SIX), ("c", None): kept(SIX)})
    one.save({("b", None): kept(ONE, age_seconds=5)})
    found = one.load()
    assert {name: each.instances for (name, _), each in found.items()} == {
        "a": (ONE,),
        "b": (SIX,),
        "c": (SIX,),
    }
    other.save({("a", None): kept(), ("c", None): kept(age_seconds=5)})
    assert {name for name, _ in one.load()} == {"b", "c"}


@pytest.mark.parametrize(
    "other",
    [
        kv(prefix="other"),
        kv(addresses="10.0.0.9:8500"),
        catalog(),
        catalog(tag="v2"),
    ],
)
def test_another_configuration_has_another_file(
    tmp_path: Path, clock: ManualClock, other: Settings
) -> None:
    """What another cluster, prefix or tag answered is never read here."""
    made(tmp_path, clock, other).save({("scheduler", None): kept(ONE)})
    for settings in (kv(), catalog(tag="v1")):
        assert made(tmp_path, clock, settings).load() == {}


def test_the_file_is_bounded_and_private(tmp_path: Path, clock: ManualClock) -> None:
    """The newest max_topics answers, readable by nobody else, and only an empty lock beside it."""
    file = made(tmp_path, clock, kv(max_topics=3))
    file.save({(f"t{age}", None): kept(ONE, age_seconds=age) for age in range(9)})
    assert sorted(name for name, _ in file.load()) == ["t0", "t1", "t2"]
    lock = file.path.with_suffix(".lock")
    assert set(tmp_path.iterdir()) == {file.path, lock}
    assert lock.read_bytes() == b""
    assert stat.S_IMODE(file.path.stat().st_mode) == 0o600


def test_a_folder_that_cannot_be_written_is_one_warning(
    tmp_path: Path, clock: ManualClock, caplog: pytest.LogCaptureFixture
) -> None:
    """Where a file stands in its place nothing is raised, and the log is not filled."""
    (tmp_path / "file").write_text("")
    file = made(tmp_path / "file", clock)
    for _ in range(3):
        file.save({("scheduler", None): kept(ONE)})
        assert file.load() == {}
    assert [one.levelno for one in caplog.records] == [logging.WARNING]


def test_a_write_that_fails_leaves_the_old_file(
    tmp_path: Path, clock: ManualClock, caplog: pytest.LogCaptureFixture
) -> None:
    """A name that cannot be replaced keeps what it is, and no temporary file stays behind."""
    file = made(tmp_path, clock)
    file.path.mkdir()
    file.save({("scheduler", None): kept(ONE)})
    assert set(tmp_path.iterdir()) == {file.path, file.path.with_suffix(".lock")}
    assert "state file" in caplog.text


def test_what_others_keep_longer_and_more_of_stays(tmp_path: Path, clock: ManualClock) -> None:
    """A process with small limits gives nothing older or more itself, and removes nothing of
    theirs; what is a day old leaves with the next write."""
    other = made(tmp_path, clock)
    other.save({(f"t{number}", None): kept(ONE) for number in range(5)})
    clock.advance(600)
    small = made(tmp_path, clock, kv(max_topics=1, max_stale_seconds=60))
    small.save({("own", None): kept(SIX)})
    assert list(small.load()) == [("own", None)]
    assert {name for name, _ in other.load()} == {"own", "t0", "t1", "t2", "t3"}
    clock.advance(86_400)
    small.save({})
    forever = made(tmp_path, clock, kv(max_stale_seconds=864_000))
    assert forever.load() == {}


WRITER = """
import sys
from consul_matchmaker.model import Host, Instance
from consul_matchmaker.settings import Settings
from consul_matchmaker.state_file import Kept, StateFile

folder, name = sys.argv[1:]
file = StateFile(folder, Settings(mode="kv"), lock_seconds=60)
host = Instance(Host("10.0.0.1", 5001))
for number in range(150):
    file.save({(f"{name}-{number}", None): Kept(0.0, True, (host,))})
"""


@pytest.mark.system
def test_processes_that_write_in_the_same_moment_lose_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Two write 150 answers each, every one only once: all are there, and whoever reads meanwhile
    never meets a damaged file, nor less than before."""
    command = [sys.executable, "-c", WRITER, str(tmp_path)]
    writers = [subprocess.Popen([*command, name]) for name in ("one", "other")]
    file = StateFile(str(tmp_path), kv())
    found: set[str] = set()
    try:
        while any(writer.poll() is None for writer in writers):
            now = {name for name, _ in file.load()}
            assert found <= now
            found = now
        assert [writer.wait() for writer in writers] == [0, 0]
    finally:
        for writer in writers:
            writer.kill()
            writer.wait()
    everything = {f"{name}-{number}" for name in ("one", "other") for number in range(150)}
    assert {name for name, _ in file.load()} == everything
    assert caplog.records == []


def test_a_writer_that_hangs_keeps_nobody_from_writing(tmp_path: Path, clock: ManualClock) -> None:
    """Who cannot get the lock in time writes without it: the file is whole either way."""
    lock = os.open(
        made(tmp_path, clock).path.with_suffix(".lock"), os.O_RDWR | os.O_CREAT, mode=0o600
    )
    fcntl.flock(lock, fcntl.LOCK_EX)
    try:
        file = StateFile(str(tmp_path), kv(), wall_clock=clock, lock_seconds=0.05)
        file.save({("scheduler", None): kept(ONE)})
        assert file.load() == {("scheduler", None): kept(ONE)}
    finally:
        os.close(lock)


@pytest.mark.system
def test_a_child_forked_during_a_write_does_not_keep_the_lock(
    tmp_path: Path, clock: ManualClock
) -> None:
    """It inherits the open lock file, and not the lock once its parent has written."""
    file = StateFile(str(tmp_path), kv(), wall_clock=clock, lock_seconds=60)
    told, tell = os.pipe()
    with file._locked():
        pid = os.fork()
        if pid == 0:
            os.read(told, 1)  # lives until its parent has written again
            os._exit(0)
    try:
        other = os.open(file.path.with_suffix(".lock"), os.O_RDWR)
        fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.close(other)
    finally:
        os.write(tell, b"x")
        os.waitpid(pid, 0)
        os.close(told)
        os.close(tell)
