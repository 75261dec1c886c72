"""The rule of `tox -e mutation` for what is only text, and its list of accepted changes."""

from __future__ import annotations

import ast
from collections import Counter
from pathlib import Path

import pytest

import consul_matchmaker

from . import mutation
from .mutation import Mutant, accepted, is_only_text, listed

FUNCTION = """
def step(self, error, now):
    why = f"after {now - self.since:.1f} s"
    if self.cause:
        why += f" of {self.cause}"
    kept = "text" + str(now)
    if error is None:
        raise ValueError(f"no error {why}", "see the manual")
    self._note(Kind.LOST, f"lost {why}", kept)
    return kept
"""


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("no error {why}", "XXno error {why}XX"),
        ('raise ValueError(f"no error {why}", "see the manual")', "raise ValueError(None)"),
        ("now - self.since", "now + self.since"),  # of a number that is only shown
        (' of {self.cause}"', ' OF {self.cause}"'),
        ("if self.cause:", "if not self.cause:"),  # decides on text only
        ('f"lost {why}"', "None"),
        ('why = f"after {now - self.since:.1f} s"', "why = None"),
    ],
)
def test_what_only_a_person_would_notice_is_only_text(before: str, after: str) -> None:
    """Exceptions' arguments, notes' texts, and variables that are read in those only."""
    assert is_only_text(*trees(before, after))


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("ValueError(f", "TypeError(f"),
        ("error is None", "error is not None"),
        ("Kind.LOST", "None"),
        (', f"lost {why}"', ""),
        ('"text"', '"TEXT"'),  # returned too
        ("f\"lost {why}\", kept", "f\"lost {why}\""),
    ],
)  # fmt: skip
def test_what_a_program_could_notice_is_more(before: str, after: str) -> None:
    """Which exception, whether there is one, what a note is about, and what is returned."""
    assert not is_only_text(*trees(before, after))


def trees(before: str, after: str) -> tuple[ast.AST, ast.AST]:
    assert FUNCTION.count(before) == 1
    return ast.parse(FUNCTION).body[0], ast.parse(FUNCTION.replace(before, after)).body[0]


def test_the_list_is_read_as_it_is_written() -> None:
    """The same change twice counts twice; a line without a reason is refused."""
    found = [Mutant("m.f", "a = 1", "a = 2"), Mutant("m.f", "a = 1", "a = None")] * 2
    found.append(Mutant("m.g", "b = 1", "b = 2"))
    text = listed(found)
    with pytest.raises(AssertionError):
        accepted(text)
    assert accepted(text.replace(": \n", ": a reason\n")) == Counter(found)


def test_every_accepted_change_has_a_reason_and_a_module_of_the_rules() -> None:
    """So that nothing is accepted that is not looked at."""
    found = accepted(mutation.ACCEPTED.read_text(encoding="utf-8"))
    assert {each.function.split(".")[0] for each in found} <= mutation.MODULES.keys()


@pytest.mark.parametrize("module", mutation.MODULES)
def test_every_module_of_the_rules_is_one_file(module: str) -> None:
    """Where two have the same name, the list has the folder, too."""
    tree = Path(consul_matchmaker.__file__).parent.parent
    assert mutation.path_of(module, tree).is_file()
