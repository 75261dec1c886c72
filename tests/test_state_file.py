"""Last answers on disk: one file a topic, written when it changed, never believed blindly."""

from __future__ import annotations

import gc
import json
import logging
import os
import shutil
import stat
import subprocess
import sys
import threading
import weakref
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from consul_matchmaker.answers import state_file
from consul_matchmaker.answers.state_file import (
    A_DAY_SECONDS,
    BETWEEN_SAVES_SECONDS,
    SAVES_PER_MAX_STALE,
    StateFiles,
)
from consul_matchmaker.model import Host, Instance, Snapshot
from consul_matchmaker.worker import Worker

from .doubles import (
    DEADLINE_SECONDS,
    ManualClock,
    StillWorker,
    catalog,
    in_thread,
    kv,
    no_thread_to_be_had,
)

ONE = Instance(Host("10.0.0.1", 5001), "node1", 1, 5)
SIX = Instance(Host("::1", 5006))
OPAQUE = Instance(Host.opaque("host/é 😀/1f2e"))

SAVER = "consul-matchmaker-saver"


@pytest.fixture
def clock():
    """Of both kinds: monotonic and of the wall."""
    return ManualClock(1_700_000_000.0)


def made(folder, clock, settings=None, *, worker=StillWorker):
    settings = replace(settings or kv(), state_path=str(folder))
    return StateFiles(settings, clock=clock, wall_clock=clock, make_worker=worker)


def answer(clock, *instances, age_seconds=0.0, is_complete=True, confirmed=True, source="kv"):
    taken_at = clock.now - age_seconds
    return Snapshot(
        "t", instances, source, is_complete, taken_at=taken_at, clock=clock, confirmed=confirmed
    )


def write(files, topic, snapshot, server=None):
    files.keep(topic, server, snapshot)
    files._step()
    return files._folder.path(topic, server)


def loaded(files, topic="scheduler"):
    kept = files.load(topic, None)
    return None if kept is None else kept.instances


def say(file, said):
    """Make *file* one with a right header."""
    body = json.dumps(said).encode()
    file.write_bytes(state_file._header(body) + body)


def test_what_was_kept_is_loaded_with_its_age(tmp_path, clock):
    """Every kind of host, the server names and weights come back, older by what passed since."""
    files = made(tmp_path / "deep" / "folder", clock)
    files.keep("scheduler", None, answer(clock, ONE, SIX, OPAQUE, age_seconds=2.0))
    files.keep("scheduler", "node1", answer(clock, ONE, is_complete=False))
    files._step()
    clock.advance(10)
    files = made(tmp_path / "deep" / "folder", clock)
    all_of_it, narrowed = (
        str(files._folder.path("scheduler", server)) for server in (None, "node1")
    )
    kept, of_node1 = files.load("scheduler", None), files.load("scheduler", "node1")
    assert kept is not None and of_node1 is not None
    assert (kept.age_seconds, kept.is_complete) == (12.0, True)
    assert (kept.instances, kept.details) == ((ONE, SIX, OPAQUE), {"file": all_of_it})
    assert (kept.source, kept.is_stale, kept.confirmed) == ("disk", True, False)
    assert (of_node1.age_seconds, of_node1.is_complete) == (10.0, False)
    assert (of_node1.instances, of_node1.details) == ((ONE,), {"file": narrowed})
    assert files.load("scheduler", "node2") is None
    assert files.load("mails", None) is None


@given(names=st.sets(st.tuples(st.text(min_size=1), st.none() | st.text()), min_size=2, max_size=5))
def test_any_text_has_a_file_of_its_own(tmp_path_factory, names):
    """Whatever a topic or server is, and never outside of the folder."""
    clock, folder = ManualClock(), tmp_path_factory.mktemp("state")
    names |= {("../" * 9 + "etc", None), ("a/b", "\0"), ("\ud800", "x" * 10_000), ("C:\\x", ".")}
    files = made(folder / "ours", clock)
    hosts = {name: Instance(Host("10.0.0.1", port)) for port, name in enumerate(names, 1)}
    for name, host in hosts.items():
        files.keep(*name, answer(clock, host))
    files._step()
    for name, host in hosts.items():
        kept = files.load(*name)
        assert kept is not None
        assert kept.instances == (host,)
    assert len(list((folder / "ours").iterdir())) == len(names)
    assert [each.name for each in folder.iterdir()] == ["ours"]


# -- what is believed


def test_a_file_cut_or_changed_anywhere_holds_nothing(tmp_path, clock, caplog):
    """At every byte position: no host of it is believed, one warning says so, the other topics'
    files are not touched by it, and the next answer of its topic replaces it."""
    files = made(tmp_path, clock)
    file = write(files, "scheduler", answer(clock, ONE, SIX))
    write(files, "mails", answer(clock, SIX))
    whole = file.read_bytes()
    for place in range(len(whole)):
        flipped = whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :]
        caplog.clear()
        files = made(tmp_path, clock)
        for damaged in (whole[:place], flipped):
            file.write_bytes(damaged)
            assert loaded(files) is None
        assert [one.levelno for one in caplog.records].count(logging.WARNING) == 1
    assert loaded(files, "mails") == (SIX,)
    write(files, "scheduler", answer(clock, SIX))
    assert loaded(files) == (SIX,)


@example(body=b"[" * 100_000 + b"]" * 100_000)
@given(body=st.binary(max_size=60) | st.text('[]{}",:0123456789.nultre', max_size=60))
def test_nonsense_with_a_right_checksum_is_no_answer(tmp_path_factory, body):
    """What cannot be read as an answer raises nothing, whatever it is, and however deep."""
    files = made(tmp_path_factory.mktemp("state"), ManualClock())
    content = body.encode() if isinstance(body, str) else body
    files._folder.path("scheduler", None).write_bytes(state_file._header(content) + content)
    assert loaded(files) is None


NOW = 1_700_000_000.0
ROW = ["10.0.0.1", 1, None, 1, 1]


@pytest.mark.finding("E15")
@pytest.mark.parametrize(
    "said",
    [
        *(
            [NOW, True, [row]]
            for row in (
                ["10.0.0.1", 0, None, 1, 1],
                ["10.0.0.1", 1, None, 1],
                ["", 1, None, 1, 1],
                ["10.0.0.1", 1, None, "1", 1],
                ["10.0.0.1", 1, None, 1, None],
                ["10.0.0.1", 1, None, 1, 1.5],
                ["10.0.0.1", 1, None, -1, 1],
                ["10.0.0.1", 1, None, 1, 65536],
                ["10.0.0.1", True, None, 1, 1],
                ["10.0.0.1", 1.0, None, 1, 1],
                ["10.0.0.1", None, None, None, 1],
                ["10.0.0.1", 1, 7, 1, 1],
                [["a"], 1, None, 1, 1],
                7,
            )
        ),
        [NOW, True, {}],
        [NOW, True, []],
        [NOW, 1, [ROW]],
        [NOW, True],
        [NOW, True, [ROW], 1],
        *(
            [taken_at, True, [ROW]]
            for taken_at in (float("nan"), float("inf"), "0", None, 10**400, [], -(10**99))
        ),
    ],
    ids=lambda said: str(said)[:40],
)
def test_values_of_another_type_are_no_answer(tmp_path, clock, said):
    """What pick or a lookup would fail on later spoils the file, and so does one field too many;
    nor does it keep the next answer from being written."""
    files = made(tmp_path, clock)
    file, name = files._folder.path("scheduler", None), [files._folder._identity, "scheduler", None]
    say(file, [name, *said])
    assert loaded(files) is None
    write(files, "scheduler", answer(clock, SIX))
    assert loaded(files) == (SIX,)
    say(file, [name, NOW, True, [ROW]])
    assert loaded(files) == (Instance(Host("10.0.0.1", 1)),)


@pytest.mark.parametrize(
    "place", [("mails", None, kv()), ("scheduler", "node1", kv()), ("scheduler", None, catalog())]
)
def test_a_file_is_believed_only_of_what_it_says_that_it_is(tmp_path, clock, place):
    """A copy under the name of another topic, server or configuration is ignored."""
    file = write(made(tmp_path, clock), "scheduler", answer(clock, ONE))
    topic, server, settings = place
    other = made(tmp_path, clock, settings)
    shutil.copy(file, other._folder.path(topic, server))
    assert other.load(topic, server) is None


@pytest.mark.parametrize(
    "other",
    [
        kv(prefix="other"),
        kv(addresses="10.0.0.9:8500"),
        kv(accept_warning=True),
        catalog(),
        catalog(tag="v2"),
    ],
)
def test_another_configuration_has_other_files(tmp_path, clock, other):
    """What another cluster, prefix or tag answered is never read here."""
    write(made(tmp_path, clock, other), "scheduler", answer(clock, ONE))
    for settings in (kv(), catalog(tag="v1")):
        assert loaded(made(tmp_path, clock, settings)) is None


@pytest.mark.parametrize(
    ("settings", "beginning"), [(kv(), "kv-36f72e87b491b829"), (catalog(), "catalog-b8ce266c8bd7")]
)
def test_another_release_has_the_same_files(tmp_path, clock, settings, beginning):
    """After an upgrade what the release before wrote is read: their names stay."""
    path = made(tmp_path, clock, settings)._folder.path("scheduler", None)
    assert path.name.startswith(beginning)


@pytest.mark.finding("E15")
@pytest.mark.parametrize("make", [os.mkfifo, lambda file: file.symlink_to("/dev/zero")])
def test_what_is_no_regular_file_is_not_waited_for(tmp_path, clock, caplog, make):
    """A pipe that nobody writes, an endless device: as good as no file, with a warning, and
    replaced by the next answer."""
    files = made(tmp_path, clock)
    file = files._folder.path("scheduler", None)
    make(file)
    assert in_thread(lambda: loaded(files)).result(DEADLINE_SECONDS) is None
    assert "no regular file" in caplog.messages[-1]
    in_thread(lambda: write(files, "scheduler", answer(clock, ONE))).result(DEADLINE_SECONDS)
    assert loaded(files) == (ONE,)
    assert not file.is_symlink()


@pytest.mark.finding("E15")
def test_no_more_is_read_than_a_file_may_have(tmp_path, clock, caplog):
    """One that is too big, or grows while it is read, is ignored."""
    files = made(tmp_path, clock)
    with files._folder.path("scheduler", None).open("wb") as big:
        big.truncate(state_file.MAX_BYTES + 1)
    assert loaded(files) is None
    assert "too big" in caplog.text


def test_an_answer_has_an_end(tmp_path, clock):
    """Past max_stale_seconds it is not loaded, nor when it claims to be from the future by more
    than clocks are set back now and then."""
    files = made(tmp_path, clock, kv(max_stale_seconds=100))
    write(files, "scheduler", answer(clock, ONE, age_seconds=40))
    clock.advance(59.9)
    assert loaded(files)
    clock.advance(0.2)
    assert loaded(files) is None
    clock.advance(-104)
    kept = files.load("scheduler", None)
    assert kept is not None
    assert kept.age_seconds == 0.0
    clock.advance(-2)
    assert loaded(files) is None


# -- what is written, and when


def stamps(folder):
    return {file.name: file.stat().st_ino for file in folder.iterdir()}


class Disk:
    """In place of the folder: remembers what is saved; can fail and hang."""

    def __init__(self):
        self.saved: list[tuple[str, Any]] = []
        self.fails: set[str] = set()
        self.began, self.go_on = threading.Event(), threading.Event()
        self.go_on.set()

    def save(self, topic, server, answer):
        self.began.set()
        assert self.go_on.wait(DEADLINE_SECONDS)
        if topic not in self.fails:
            self.saved.append((topic, answer.instances))
        return topic not in self.fails

    def sweep(self, is_enough): ...

    @property
    def topics(self):
        return [topic for topic, _ in self.saved]


@pytest.fixture
def disk():
    return Disk()


@pytest.fixture
def files(tmp_path, clock, disk):
    files = made(tmp_path, clock, kv(max_stale_seconds=400))
    files._folder = disk
    return files


@pytest.fixture
def threaded(tmp_path, clock, disk):
    files = made(tmp_path, clock, worker=Worker)
    files._folder = disk
    yield files
    disk.go_on.set()
    assert files.close(DEADLINE_SECONDS) or files._worker.stop(DEADLINE_SECONDS)


def test_a_change_is_written_with_the_next_step_and_the_last_one_counts(files, disk, clock):
    """However many changes there were in between; what is the same costs none."""
    assert files._step() == BETWEEN_SAVES_SECONDS
    for instance in (ONE, SIX):
        files.keep("scheduler", None, answer(clock, instance))
    assert disk.saved == []
    files._step()
    assert disk.saved == [("scheduler", (SIX,))]
    held = answer(clock, SIX)
    files.keep("scheduler", None, held)
    files._step()
    assert len(disk.saved) == 1
    files.keep("scheduler", None, replace(held, is_complete=False))
    files._step()
    assert len(disk.saved) == 2


def test_an_unchanged_answer_is_written_before_it_runs_out(files, disk, clock):
    """Four times in max_stale_seconds, whether it is the same or a like one."""
    same = (ONE,)
    for second in range(400):
        taken_at = clock.now
        files.keep("same", None, Snapshot("same", same, "kv", taken_at=taken_at, clock=clock))
        files.keep("like", None, answer(clock, ONE))
        if second % BETWEEN_SAVES_SECONDS == 0:
            files._step()
        clock.advance(1)
    assert sorted(disk.topics) == ["like"] * SAVES_PER_MAX_STALE + ["same"] * SAVES_PER_MAX_STALE


@pytest.mark.parametrize(("max_stale_seconds", "pause"), [(10, 10), (31_536_000, 21_600)])
def test_it_is_written_not_too_often_and_four_times_a_day_at_least(
    tmp_path, clock, max_stale_seconds, pause
):
    """Ten seconds apart; and so often that no process that sweeps the folder takes it for old."""
    files = made(tmp_path, clock, kv(max_stale_seconds=max_stale_seconds))
    write(files, "scheduler", answer(clock, ONE))
    before = stamps(tmp_path)
    clock.advance(pause - 0.1)
    write(files, "scheduler", answer(clock, ONE))
    assert stamps(tmp_path) == before
    clock.advance(0.1)
    write(files, "scheduler", answer(clock, ONE))
    assert stamps(tmp_path) != before


@pytest.mark.finding("D5")
def test_one_topic_that_changed_is_one_small_file(tmp_path, clock):
    """What is written does not grow with the topics that did not change."""

    def written(topics):
        folder = tmp_path / str(topics)
        files = made(folder, clock)
        for number in range(topics):
            files.keep(f"topic{number}", None, answer(clock, ONE))
        files._step()
        before = stamps(folder)
        write(files, "topic0", answer(clock, SIX))
        return sum(
            file.stat().st_size
            for file in folder.iterdir()
            if file.stat().st_ino != before.get(file.name)
        )

    assert 0 < written(50) == written(5)


def instructions(call):
    """How many of Python's own instructions *call* takes."""
    count = 0

    def trace(frame, event, _):
        nonlocal count
        frame.f_trace_opcodes = True
        count += event == "opcode"
        return trace

    before = sys.gettrace()
    gc.disable()  # hypothesis has a callback of its own, which would be counted too
    sys.settrace(trace)
    try:
        call()
    finally:
        sys.settrace(before)
        gc.enable()
    return count


@pytest.mark.finding("D5")
def test_the_cost_does_not_grow_with_the_topics(tmp_path, clock):
    """Keeping an unchanged topic, a changed one, a new one, dropping one, and the step that writes
    one that changed often: the same number of instructions with 10 topics and with 10,000."""
    settings = kv(max_stale_seconds=10_000)

    def costs(topics):
        files = made(tmp_path / "never", clock, settings)
        files._folder = Disk()
        held = answer(clock, ONE)
        for number in range(topics):
            files.keep(f"topic{number}", None, held)
        files._step()
        changed = answer(clock, SIX)
        for _ in range(topics):
            files.keep("topic5", None, changed)
            files.keep("topic5", None, held)
        return [
            instructions(call)
            for call in (
                lambda: files.keep("topic5", None, held),
                lambda: files.keep("topic5", None, changed),
                lambda: files.keep("new", None, held),
                files._step,
                lambda: files.drop("topic5", None),
                files._step,
            )
        ]

    few, many = costs(10), costs(10_000)
    assert few == many
    assert max(few) < 1_000


@pytest.mark.finding("D5")
def test_keeping_touches_no_disk(tmp_path, clock):
    """Not even the folder is made before the thread's step."""
    files = made(tmp_path / "folder", clock)
    files.keep("scheduler", None, answer(clock, ONE))
    assert not (tmp_path / "folder").exists()
    files._step()
    assert (tmp_path / "folder").exists()


def test_what_may_be_wrong_is_not_written(files, disk, clock):
    """What came from disk, and no hosts that are not confirmed, leave the file as it is."""
    files.keep("scheduler", None, answer(clock, ONE, source="disk"))
    files.keep("scheduler", None, answer(clock, confirmed=False))
    files._step()
    assert disk.saved == []
    files.keep("scheduler", None, answer(clock, ONE, confirmed=False))
    files._step()
    assert disk.saved == [("scheduler", (ONE,))]


def test_a_topic_without_hosts_has_no_file(tmp_path, clock):
    """One that is confirmed removes it; one that never had a file gets none."""
    files = made(tmp_path, clock)
    file = write(files, "scheduler", answer(clock, ONE))
    assert file.exists()
    clock.advance(1)
    write(files, "scheduler", answer(clock))
    write(files, "mails", answer(clock))
    assert list(tmp_path.iterdir()) == []


class Traced(Host):
    """A host that can be referred to weakly."""


def test_what_is_dropped_is_freed_and_stays_on_disk(tmp_path, clock):
    """Whether it was written already or not; kept again, it is written again."""
    files = made(tmp_path, clock)
    host = Traced("10.0.0.1", 1)
    seen = weakref.ref(host)
    write(files, "scheduler", answer(clock, Instance(host)))
    files.keep("scheduler", None, answer(clock, Instance(host), ONE))
    files.drop("scheduler", None)
    files.drop("never kept", None)
    del host
    assert seen() is None
    assert "0 topics" in repr(files)
    files._step()
    assert loaded(files) == (Instance(Host("10.0.0.1", 1)),)
    write(files, "scheduler", answer(clock, SIX))
    assert loaded(files) == (SIX,)


# -- several processes, and a folder that makes trouble


def test_a_newer_answer_of_another_process_stays(tmp_path, clock):
    """An older one does not replace it, nor remove it; one that is as old or newer does."""
    one, other = made(tmp_path, clock), made(tmp_path, clock)
    write(one, "scheduler", answer(clock, ONE))
    write(other, "scheduler", answer(clock, SIX, age_seconds=1))
    assert loaded(other) == (ONE,)
    write(other, "scheduler", answer(clock, age_seconds=1))
    assert loaded(other) == (ONE,)
    write(other, "scheduler", answer(clock, SIX))
    assert loaded(one) == (SIX,)
    clock.advance(1)
    write(one, "scheduler", answer(clock))
    assert loaded(other) is None


def test_an_answer_from_the_future_is_replaced(tmp_path, clock):
    """Once the clock of the machine was set right, what was written before keeps nobody away."""
    files = made(tmp_path, clock)
    write(files, "scheduler", answer(clock, ONE))
    clock.advance(-3600)
    files = made(tmp_path, clock)
    write(files, "scheduler", answer(clock, SIX))
    assert loaded(files) == (SIX,)


def test_files_are_private(tmp_path, clock):
    """Nobody else may read them or their folder, and nothing lies beside them."""
    file = write(made(tmp_path / "ours", clock), "scheduler", answer(clock, ONE))
    assert list((tmp_path / "ours").iterdir()) == [file]
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert stat.S_IMODE(file.parent.stat().st_mode) == 0o700


def test_a_folder_that_cannot_be_written_is_one_warning(tmp_path, clock, caplog):
    """Where a file stands in its place nothing is raised, and the log is not filled; once it can
    be written, what is kept is written."""
    (tmp_path / "file").write_text("")
    files = made(tmp_path / "file", clock)
    for _ in range(3):
        write(files, "scheduler", answer(clock, ONE))
        assert loaded(files) is None
    assert [one.levelno for one in caplog.records] == [logging.WARNING]
    (tmp_path / "file").unlink()
    files._step()
    assert loaded(files) == (ONE,)


def test_a_write_that_fails_leaves_what_was_there(tmp_path, clock, caplog):
    """A name that cannot be replaced keeps what it is, and no temporary file stays behind."""
    files = made(tmp_path, clock)
    file = files._folder.path("scheduler", None)
    file.mkdir()
    for snapshot in (answer(clock, ONE), answer(clock)):
        write(files, "scheduler", snapshot)
        assert list(tmp_path.iterdir()) == [file]
    assert "state file" in caplog.text


def test_a_file_that_cannot_be_written_holds_up_no_other(files, disk, clock):
    """A disk that is full is tried once a step; where one file fails alone, the others are written
    with the next step, and it is tried again after them."""
    disk.fails = {"b"}
    for topic in "abcd":
        files.keep(topic, None, answer(clock, ONE))
    files.drop("d", None)
    files._step()
    assert disk.topics == ["a"]
    assert [topic for topic, _ in files._noted] == ["c", "d", "b"]
    files._step()
    assert disk.topics == ["a", "c"]
    disk.fails.clear()
    files._step()
    assert disk.topics == ["a", "c", "b"]


# -- the thread


def savers():
    return [thread for thread in threading.enumerate() if thread.name == SAVER]


def test_the_first_keep_starts_the_thread_and_closing_ends_it(threaded, disk, clock):
    """Making it and loading start nothing; it is a daemon, and writes at once.  What is not written
    yet is written at the end, though a step had just been; nothing is afterwards, and it can be
    closed twice."""
    assert savers() == []
    threaded.keep("a", None, answer(clock, ONE))
    (saver,) = savers()
    assert saver.daemon
    assert disk.began.wait(DEADLINE_SECONDS)
    for topic in "bcd":
        threaded.keep(topic, None, answer(clock, ONE))
    for _ in range(2):
        assert threaded.close(DEADLINE_SECONDS)
        assert savers() == []
        assert disk.topics == ["a", "b", "c", "d"]
        threaded.keep("late", None, answer(clock, ONE))


def test_closing_without_a_thread_writes(files, disk, clock):
    """By whoever closes; what is kept afterwards is not written, however often it is closed."""
    for topic in "ab":
        files.keep(topic, None, answer(clock, ONE))
        assert files.close(0)
    assert disk.topics == ["a"]
    assert "1 topics" in repr(files)


def test_what_never_wrote_is_closed_at_once(threaded, clock):
    """Without a thread there is nobody to wait for, and none is started any more."""
    assert threaded.close(0)
    threaded.keep("scheduler", None, answer(clock, ONE))
    assert savers() == []


def test_stopping_does_not_wait(threaded, disk, clock):
    """The thread writes what is left and ends by itself."""
    disk.go_on.clear()
    threaded.keep("a", None, answer(clock, ONE))
    assert disk.began.wait(DEADLINE_SECONDS)
    threaded.keep("b", None, answer(clock, ONE))
    (saver,) = savers()
    threaded.stop()
    assert saver.is_alive()
    disk.go_on.set()
    saver.join(DEADLINE_SECONDS)
    assert not saver.is_alive()
    assert disk.topics == ["a", "b"]


@pytest.mark.finding("E15")
def test_closing_does_not_wait_for_a_disk_that_hangs(threaded, disk, clock):
    """It says that the thread has not ended; which ends after the file that it was at."""
    disk.go_on.clear()
    with no_thread_to_be_had():
        threaded.keep("a", None, answer(clock, ONE))
    threaded.keep("b", None, answer(clock, ONE))
    assert disk.began.wait(DEADLINE_SECONDS)
    (saver,) = savers()
    closing = in_thread(lambda: threaded.close(0.01))
    assert closing.result(DEADLINE_SECONDS / 2) is False
    disk.go_on.set()
    saver.join(DEADLINE_SECONDS)
    assert disk.topics == ["a"]


def test_without_a_thread_to_be_had_nothing_is_raised(threaded, disk, clock):
    """What is kept waits for the next one that can start it."""
    with no_thread_to_be_had():
        threaded.keep("a", None, answer(clock, ONE))
    assert savers() == []
    threaded.keep("b", None, answer(clock, ONE))
    assert threaded.close(DEADLINE_SECONDS)
    assert disk.topics == ["a", "b"]


# -- files that nobody keeps any more


def aged(file, clock, days):
    """*file*, made if it is not there, last written *days* ago."""
    if not file.exists():
        file.write_text("")
    os.utime(file, (clock.now - days * A_DAY_SECONDS,) * 2)
    return file


def test_what_is_too_old_for_everybody_is_removed(tmp_path, clock):
    """A day and max_stale_seconds after it was written, of any settings; so are temporary files
    that a killed process left."""
    ours, others = made(tmp_path, clock), made(tmp_path, clock, catalog())
    written = [write(files, "scheduler", answer(clock, ONE)) for files in (ours, others)]
    young = write(others, "young", answer(clock, ONE))
    left = written[0].with_name(f"{written[0].name}.a_0z9")
    for file in (*written, left):
        aged(file, clock, 1.1)
    aged(young, clock, 0.9)
    made(tmp_path, clock, kv(max_stale_seconds=2 * A_DAY_SECONDS))._step()
    assert set(tmp_path.iterdir()) == {*written, left, young}
    made(tmp_path, clock)._step()
    assert list(tmp_path.iterdir()) == [young]


def test_nothing_of_others_is_removed(tmp_path, clock):
    """However old it is: files with other names, folders, what a link leads to."""
    file = made(tmp_path, clock)._folder.path("scheduler", None)
    names = ("kv-0123456789abcdef.answers", f"x{file.name}", f"{file.name}.BAK", "notes.answer")
    foreign = {aged(tmp_path / name, clock, 99) for name in names}
    target = aged(tmp_path / "target", clock, 99)
    file.symlink_to(target)
    os.utime(file, (0, 0), follow_symlinks=False)
    folder = file.with_name(file.name + ".x")
    folder.mkdir()
    aged(folder, clock, 99)
    made(tmp_path, clock)._step()
    assert set(tmp_path.iterdir()) == foreign | {target, file, folder}


def test_a_sweep_is_rare_and_ends_with_its_owner(tmp_path, clock):
    """One that is over is not begun again for a day; one that is under way holds up no close."""
    files = made(tmp_path, clock)
    name = files._folder.path("scheduler", None).name
    for number in range(5):
        aged(tmp_path / f"{name}.{number}", clock, 2)
    left = iter([False, False, True])
    files._folder.sweep(lambda: next(left))
    assert len(list(tmp_path.iterdir())) == 3
    files._step()
    assert list(tmp_path.iterdir()) == []
    late = aged(tmp_path / name, clock, 2)
    clock.advance(A_DAY_SECONDS - 1)
    files._step()
    assert late.exists()
    clock.advance(1)
    files._step()
    assert not late.exists()


def test_a_folder_that_is_not_there_is_swept_without_a_word(tmp_path, clock, caplog):
    """Nor is it made by that."""
    made(tmp_path / "folder", clock)._step()
    assert caplog.records == []
    assert not (tmp_path / "folder").exists()


WRITER = """
import sys, time
from consul_matchmaker.answers.state_file import StateFiles
from consul_matchmaker.model import Host, Instance, Snapshot
from consul_matchmaker.settings import Settings
from consul_matchmaker.worker import Worker


class StillWorker(Worker):
    def start(self): ...


folder, name = sys.argv[1:]
files = StateFiles(Settings(mode="kv", state_path=folder), make_worker=StillWorker)
for number in range(300):
    instances = tuple(Instance(Host("10.0.0.1", 1 + number), name) for _ in range(50))
    files.keep("scheduler", None, Snapshot("t", instances, "kv", taken_at=time.monotonic()))
    files._step()
"""


@pytest.mark.system
def test_whoever_reads_while_processes_write_meets_whole_files(tmp_path, caplog):
    """Two write the same topic again and again: each answer that is read is one of theirs, and
    nothing is left beside the file."""
    command = [sys.executable, "-c", WRITER, str(tmp_path)]
    writers = [subprocess.Popen([*command, name]) for name in ("one", "other")]
    files = StateFiles(kv(state_path=str(tmp_path)), make_worker=StillWorker)
    found = 0
    try:
        while any(writer.poll() is None for writer in writers):
            instances = loaded(files)
            assert found == 0 or instances is not None
            if instances is not None:
                found += 1
                assert len(set(instances)) == 1
                assert len(instances) == 50
        assert [writer.wait() for writer in writers] == [0, 0]
    finally:
        for writer in writers:
            writer.kill()
            writer.wait()
    assert found
    assert caplog.records == []
    assert len(list(tmp_path.iterdir())) == 1
