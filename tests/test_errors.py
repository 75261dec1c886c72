"""What callers may rely on in the tree of exceptions."""

from __future__ import annotations

import inspect

import pytest

from consul_matchmaker import errors

EVERY_ERROR = [getattr(errors, name) for name in errors.__all__]


@pytest.mark.parametrize("error", EVERY_ERROR)
def test_one_except_clause_catches_all(error: type[Exception]) -> None:
    """Whoever catches MatchmakerError catches everything the package raises on purpose."""
    assert issubclass(error, errors.MatchmakerError)


def test_the_list_is_complete() -> None:
    """Every exception of the module is public, so that it can be caught by name."""
    defined = {name for name, _ in inspect.getmembers(errors, inspect.isclass)}
    assert defined == set(errors.__all__)


@pytest.mark.parametrize(
    ("error", "parent"),
    [
        (errors.ConfigurationError, ValueError),
        (errors.InvalidTopic, errors.ConfigurationError),
        (errors.TimedOut, errors.Unavailable),
    ],
)
def test_a_special_case_is_caught_by_its_general_one(
    error: type[Exception], parent: type[Exception]
) -> None:
    """A timeout is an outage, a bad topic a bad value, and a bad value a ValueError."""
    assert issubclass(error, parent)


def test_what_must_be_told_apart_stays_apart() -> None:
    """Retry (Unavailable), reopen (LeaseLost) and give up (Denied) never catch one another."""
    kinds = [errors.Unavailable, errors.LeaseLost, errors.Denied, errors.NoLiveHosts, errors.Closed]
    for kind in kinds:
        assert not any(issubclass(kind, other) for other in kinds if other is not kind)


@pytest.mark.parametrize("error", EVERY_ERROR)
def test_each_docstring_says_what_to_do_next(error: type[Exception]) -> None:
    """An exception's docstring tells the caller how to go on."""
    doc = inspect.getdoc(error) or ""
    words = ("retry", "give up", "correct", "another", "wait", "new one", "base")
    assert any(word in doc.lower() for word in words)
