"""What is watched for which topics in use, rule by rule."""

import math

import pytest

from consul_matchmaker.answers.watch_plan import (
    FIT_SECONDS,
    MAX_RETRY_SECONDS,
    PREFIX,
    RELIEF_SECONDS,
    RETRY_SECONDS,
    WatchPlan,
)

FOUR = ("a", "b", "c", "d")
FIVE = (*FOUR, "e")


def planned(topics, now=0.0, before=None):
    return (before or WatchPlan(max_watches=4)).planned(topics, now)


# -- what is wanted -------------------------------------------------------------------------------


def test_few_topics_have_a_query_each_and_many_share_one():
    """Up to max_watches folders, beyond that the prefix; nothing where nothing is in use."""
    assert planned(()).wanted == ()
    assert planned(("a",)).wanted == ("a",)
    assert (planned(FIVE).is_prefix, planned(FOUR).is_prefix) == (True, False)
    assert planned(FOUR).wanted == FOUR
    assert planned(FIVE).wanted == (PREFIX,)


def test_without_watches_of_folders_all_share_one():
    """max_watches=0: one query, however few topics."""
    plan = WatchPlan(max_watches=0)
    assert plan.planned((), 0).wanted == ()
    assert plan.planned(("a",), 0).wanted == (PREFIX,)
    assert plan.slots == 1


def test_a_topic_that_comes_back_and_goes_does_not_make_the_plan_flap():
    """Folders are watched again only when the topics were few enough for FIT_SECONDS in a row."""
    plan = planned(FOUR, 1, planned(FIVE, 0))
    assert plan.wanted == (PREFIX,)
    assert plan.next_at(1) == 1 + FIT_SECONDS
    plan = planned(FOUR, FIT_SECONDS, planned(FIVE, FIT_SECONDS - 1, plan))
    assert planned(FOUR, 2 * FIT_SECONDS - 1, plan).wanted == (PREFIX,)
    assert planned(FOUR, 2 * FIT_SECONDS, plan).wanted == FOUR
    assert planned((), FIT_SECONDS + 1, plan).wanted == ()


def test_the_topics_that_are_watched_keep_their_query():
    """In whatever order the topics in use come."""
    assert planned(("d", "c", "b", "a"), 1, planned(("b", "d"))).wanted == ("b", "d", "c", "a")
    assert planned(("c", "d"), 1, planned(FOUR)).wanted == ("c", "d")


def test_where_the_prefix_cannot_be_watched_some_folders_are():
    """Until it is tried again, ever later."""
    plan, now = planned(FIVE), 0.0
    for pause in (RETRY_SECONDS, 2 * RETRY_SECONDS, 4 * RETRY_SECONDS):
        assert plan.wanted == (PREFIX,)
        plan = plan.refused(now)
        assert planned(FIVE, now, plan).wanted == FOUR
        assert plan.next_at(now) == now + pause
        now += pause
        plan = planned(FIVE, now, planned(FIVE, now - 1, plan))
    for _ in range(50):
        plan = plan.refused(now)
    assert plan.next_at(now) == now + MAX_RETRY_SECONDS
    assert plan.next_at(now + MAX_RETRY_SECONDS) == math.inf
    assert plan.accepted().refused(now).next_at(now) == now + RETRY_SECONDS
    assert WatchPlan(0).refused(0).planned(FIVE, 1).wanted == ()


def test_an_agent_with_too_many_connections_gets_fewer():
    """Half of them, and half again, but one; then one more a minute."""
    plan = planned(FOUR).overloaded(0)
    assert planned(FOUR, 0, plan).wanted == ("a", "b")
    plan = planned(FOUR, 1, plan).overloaded(1).overloaded(1)
    assert planned(FOUR, 1, plan).wanted == ("a",)
    assert plan.next_at(1) == 1 + RELIEF_SECONDS
    assert plan.next_at(1 + RELIEF_SECONDS) == math.inf, "it is due"
    counts, now = [], 1.0
    for _ in range(4):
        now += RELIEF_SECONDS
        plan = planned(FOUR, now, plan)
        plan = planned(FOUR, now, plan)  # once more at the same time, which changes nothing
        counts.append(len(plan.wanted))
    assert counts == [2, 3, 4, 4]


# -- how to get there -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("topics", "running", "ending", "ends", "starts"),
    [
        pytest.param(FOUR, {}, 0, set(), list(FOUR), id="nothing runs: all start"),
        pytest.param(FOUR, dict.fromkeys(FOUR, True), 0, set(), [], id="all runs: nothing to do"),
        pytest.param(
            ("a",), {"a": False, "b": True}, 0, {"b"}, [], id="a topic out of use ends at once"
        ),
        pytest.param(
            FOUR, {"a": True, "x": True}, 1, {"x"}, ["b"], id="what is ending takes a slot"
        ),
        pytest.param(
            FIVE, dict.fromkeys(FOUR, True), 0, {"a"}, [], id="one makes room for the prefix"
        ),
        pytest.param(
            FIVE, dict.fromkeys(FOUR, True), 1, set(), [], id="no second one while that ends"
        ),
        pytest.param(
            FIVE, dict.fromkeys("bcd", True), 0, set(), [PREFIX], id="the prefix starts beside them"
        ),
        pytest.param(
            FIVE,
            {**dict.fromkeys("bcd", True), PREFIX: False},
            0,
            set(),
            [],
            id="they end when it has answered",
        ),
        pytest.param(
            FIVE,
            {**dict.fromkeys("bcd", True), PREFIX: True},
            0,
            {"b", "c", "d"},
            [],
            id="it has answered: they end",
        ),
        pytest.param(
            FIVE, {"b": False, PREFIX: False}, 0, {"b"}, [], id="what does not work ends at once"
        ),
        pytest.param(
            FOUR, {PREFIX: True}, 0, set(), ["a", "b", "c"], id="folders start beside the prefix"
        ),
        pytest.param(
            FOUR,
            {**dict.fromkeys("abc", False), PREFIX: True},
            0,
            {PREFIX},
            [],
            id="the prefix makes room for the last folder",
        ),
        pytest.param(
            ("a", "b"),
            {"a": True, "b": False, PREFIX: True},
            0,
            set(),
            [],
            id="the prefix ends when all folders have answered",
        ),
        pytest.param((), {"a": True, PREFIX: True}, 0, {"a", PREFIX}, [], id="no topics: all end"),
    ],
)
def test_steps(topics, running, ending, ends, starts):
    """What runs, and whether it has answered, says what ends and what starts now."""
    found_ends, found_starts = planned(topics).steps(running, ending)
    assert set(found_ends) == ends
    assert list(found_starts) == starts


def test_with_one_slot_one_makes_room_for_the_other():
    """max_watches=1: the topics are asked for one by one until the prefix has answered."""
    plan = WatchPlan(max_watches=1).planned(("a", "b"), 0)
    assert plan.steps({"a": True}) == ({"a"}, [])
    assert plan.steps({}, 1) == (set(), [])
    assert plan.steps({}) == (set(), [PREFIX])


def test_no_plan_changes_in_place():
    """An event gives a new plan and leaves the old one as it was."""
    plan = planned(FOUR)
    plan.planned(FIVE, 1), plan.overloaded(1), plan.refused(1), plan.accepted()
    assert plan == planned(FOUR)
