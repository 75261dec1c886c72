"""The index rules, event by event."""

import pytest

from consul_matchmaker.answers.blocking_query import (
    BYTES_PER_SECOND,
    DOUBT_GAP_SECONDS,
    MAX_IDLE_GAP_SECONDS,
    MAX_WAIT_SECONDS,
    MIN_GAP_SECONDS,
    WORK_SHARE,
    BlockingQuery,
)

CONFIRM_SECONDS = 6.0
FAILURE = "failure"


def after(*events):
    """The state after events: (index, answer, now) or FAILURE."""
    query = BlockingQuery(CONFIRM_SECONDS)
    for event in events:
        query = query.failed() if event == FAILURE else query.answered(*event)
    return query


# what happened, in order -> (index to ask with, is the last answer believed)
RULES = {
    "nothing yet": ((), 0, False),
    "first answer": (((7, "a", 0),), 7, True),
    "newer index, new answer": (((7, "a", 0), (9, "b", 1)), 9, True),
    "wait ran out": (((7, "a", 0), (7, "a", 25)), 7, True),
    "index 0 counts as 1": (((0, "", 0),), 1, True),
    "negative index counts as 1": (((-5, "", 0),), 1, True),
    "first answer is empty": (((1, "", 0),), 1, True),
    "went back, other answer": (((9, "a", 0), (3, "b", 1)), 0, False),
    "went back to 1 and empty, as a restarted server says": (
        ((9, "a", 0), (1, "", 1)),
        0,
        False,
    ),
    "the lie, then the truth": (((9, "a", 0), (1, "", 1), (9, "a", 4)), 9, True),
    "the lie, then a change": (((9, "a", 0), (1, "", 1), (12, "b", 4)), 12, True),
    "the lie goes on": (((9, "a", 0), (1, "", 1), (1, "", 6.9)), 0, False),
    "it was no lie": (((9, "a", 0), (1, "", 1), (1, "", 7.0)), 1, True),
    "restored snapshot, going on from there": (
        ((9, "a", 0), (3, "b", 1), (3, "b", 8), (4, "c", 9)),
        4,
        True,
    ),
    "went back, same answer: tombstones were reaped": (((9, "a", 0), (3, "a", 25)), 3, True),
    "a lagging server's older answer": (((9, "b", 0), (8, "a", 1)), 0, False),
    "empty with a newer index is the truth": (((9, "a", 0), (10, "", 1)), 10, True),
    "the same index, another answer": (((9, "a", 0), (9, "b", 1)), 9, True),
    "failure": (((9, "a", 0), FAILURE), 0, False),
    "back after a failure": (((9, "a", 0), FAILURE, (11, "b", 9)), 11, True),
    "back after a failure, unchanged": (((9, "a", 0), FAILURE, (9, "a", 9)), 9, True),
    "back after a failure, at a server that lies": (
        ((9, "a", 0), FAILURE, (1, "", 60)),
        0,
        False,
    ),
    "failures do not count as repetitions": (
        ((9, "a", 0), (1, "", 1), FAILURE, (1, "", 20)),
        0,
        False,
    ),
}


@pytest.mark.parametrize(("events", "index", "is_believed"), RULES.values(), ids=RULES)
def test_rules(events, index, is_believed):
    """Each line of events leads to this index to ask with, and to this belief."""
    query = after(*events)
    assert (query.index, query.is_believed) == (index, is_believed)


def test_a_doubted_answer_does_not_replace_the_believed_one():
    """While in doubt, the index and the answer to compare with are the last believed ones."""
    query = after((9, "a", 0), (1, "", 1))
    assert (query.believed_index, query.believed, query.doubted_since) == (9, "a", 1)


def test_no_state_changes_in_place():
    """An event gives a new state and leaves the old one as it was."""
    first = after((9, "a", 0))
    first.answered(1, "", 1)
    first.failed()
    assert first == after((9, "a", 0))


def test_failures_in_a_row_are_counted_until_any_answer():
    """One by one; an answer that is doubted is an answer too."""
    failed = [after((9, "a", 0), *[FAILURE] * count).failures for count in range(4)]
    assert failed == [0, 1, 2, 3]
    doubted = after((9, "a", 0), FAILURE, FAILURE, (1, "", 60))
    assert (doubted.failures, doubted.doubted_since) == (0, 60)
    assert after((9, "a", 0), FAILURE, (9, "a", 60)).failures == 0


@pytest.mark.parametrize("jitter", [0.0, 0.3, 0.999])
def test_the_wait_is_jittered_and_short(jitter):
    """Consul never holds a poll for more than 25 s, and watchers do not wait equally long."""
    assert 0.8 * MAX_WAIT_SECONDS <= BlockingQuery(6).wait_seconds(jitter) <= MAX_WAIT_SECONDS
    assert BlockingQuery(6).wait_seconds(0.9) < BlockingQuery(6).wait_seconds(0.1)


@pytest.mark.parametrize("work_seconds", [0, 0.001, 0.01, 0.1, 0.15, 10, 1000])
def test_work_is_a_bounded_share_of_the_time(work_seconds):
    """Rests grow with what an answer costs, so that the work stays below its share."""
    gap = after((9, "a", 0)).gap_seconds(work_seconds)
    assert gap >= MIN_GAP_SECONDS
    assert work_seconds / (work_seconds + gap) <= WORK_SHARE + 1e-9


def test_rests_are_what_the_bounds_say_and_no_longer():
    """Nine times the work for a tenth of a processor, a second for a million bytes."""
    query = after((9, "a", 0))
    assert query.gap_seconds(0.01) == pytest.approx(0.09)
    assert query.gap_seconds(0, BYTES_PER_SECOND // 2) == 0.5
    assert query.gap_seconds(0.1, BYTES_PER_SECOND // 2) == pytest.approx(0.9)
    assert query.gap_seconds(0) == MIN_GAP_SECONDS


@pytest.mark.parametrize("answer_bytes", [100_000, 500_000, 2_000_000, 64 * 2**20])
@pytest.mark.parametrize("events", [((9, "a", 0),), ((9, "a", 0), (1, "", 1)), (FAILURE,)])
def test_watching_receives_a_bounded_number_of_bytes(answer_bytes, events):
    """However hard the cluster churns, rests keep the average below the bound, whatever the size of
    an answer; also while answers are doubted, or fail."""
    gap = after(*events).gap_seconds(0, answer_bytes)
    assert answer_bytes / gap <= BYTES_PER_SECOND


def test_several_queries_share_the_bounds():
    """Each rests so much longer."""
    query = after((9, "a", 0))
    assert query.gap_seconds(0.01, queries=4) == pytest.approx(0.39)
    assert query.gap_seconds(0, BYTES_PER_SECOND // 2, 4) == 2.0


def test_wakes_for_nothing_rest_ever_longer():
    """Newer indexes with the same answer, as on an empty prefix, are asked for less and less."""
    query = after((9, "", 0))
    gaps = []
    for index in range(10, 22):
        query = query.answered(index, "", index)
        gaps.append(query.gap_seconds(0))
    doubled = [MIN_GAP_SECONDS * 2**count for count in range(1, 13)]
    assert gaps == [min(gap, MAX_IDLE_GAP_SECONDS) for gap in doubled]
    assert query.answered(99, "x", 99).gap_seconds(0) == MIN_GAP_SECONDS


def test_a_wait_that_ran_out_is_no_wake_for_nothing():
    """A quiet cluster is asked again at once: a change right after is seen at once."""
    query = after((9, "a", 0))
    for number in range(1, 20):
        query = query.answered(9, "a", 25 * number, has_waited=True)
    assert query.gap_seconds(0) == MIN_GAP_SECONDS


def test_only_a_wait_that_ended_early_wakes_for_nothing():
    """From the smallest index on; an answer to a question without an index woke nobody."""
    assert after((1, "", 0), (2, "", 1)).wakes_for_nothing == 1
    assert after((9, "a", 0), FAILURE, (11, "a", 2)).wakes_for_nothing == 0


def test_a_doubted_answer_is_asked_for_again_after_a_rest():
    """Without an index polls come back at once, so doubting must not become a busy loop."""
    assert after((9, "a", 0), (1, "", 1)).gap_seconds(0) == DOUBT_GAP_SECONDS


@pytest.mark.finding("E16")
@pytest.mark.parametrize(
    "index_of",
    [lambda n: 9, lambda n: 1000 - n, lambda n: 2**62, lambda n: 9 + n],
    ids=["same", "falling", "huge", "rising"],
)
def test_an_agent_that_answers_at_once_with_the_same_is_asked_less_and_less(index_of):
    """Whatever index it gives: who does not wait, and has nothing new, is not asked in a loop."""
    query = BlockingQuery(6.0)
    gaps = []
    for number in range(20):
        query = query.answered(index_of(number), "a", number / 1000)
        gaps.append(query.gap_seconds(0))
    assert gaps == sorted(gaps)
    assert gaps[-1] == MAX_IDLE_GAP_SECONDS
    assert query.answered(2**63, "b", 1).gap_seconds(0) == MIN_GAP_SECONDS
