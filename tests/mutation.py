"""Change the rules in every small way, and say which changes no test of theirs notices.

`tox -e mutation`, or `tox -e mutation -- wire keys` for some modules only.  mutmut makes the
changes ("mutants") and runs, for each, the tests that reach the changed function.  Works in a copy
of the tree.  Prints a row a module and fails when a change is not noticed and not accepted in
`mutation_survivors.txt`, or when something is accepted there that does not survive.

Changes of nothing but a message are left out, by one rule: original and change are the same once
the texts of messages are blanked.  Those are the arguments of an exception that is raised, the text
of a note, and what is assigned to variables that are read in such texts only.
"""

from __future__ import annotations

import argparse
import ast
import copy
import difflib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parent.parent
PACKAGE = "consul_matchmaker"
ACCEPTED = Path(__file__).parent / "mutation_survivors.txt"
WANTED_SHARE = 0.95

# Each module, by its own name wherever it lies, and the tests that are about it.  With its folder
# where another module has the same name.
MODULES = {
    "backoff": ("test_backoff",),
    "blocking_query": ("test_blocking_query",),
    "differences": ("test_reconciler",),
    "reconciler": ("test_reconciler",),
    "model": ("test_model",),
    "dns/names": ("test_dns_names",),
    "keys": ("test_kv_keys",),
    "balance": ("test_balance", "test_selection"),
    "load": ("test_load",),
    "quarantine": ("test_selection", "test_balancing"),
    "selection": ("test_selection", "test_balancing", "test_calls"),
    "watch_plan": ("test_watch_plan",),
    "wire": ("test_dns_wire",),
}
# What takes the text of a note, and which argument that is.
NOTES = {"_note": 1, "_note_trouble": 1, "_begin_repair": 0}
SETTINGS = """
[tool.mutmut]
source_paths = ["{package}"]
only_mutate = {files}
also_copy = ["conftest.py"]
timeout_multiplier = 4.0
timeout_constant = 5.0
pytest_add_cli_args = ["-p", "no:cacheprovider", "-p", "no:xdist"]
pytest_add_cli_args_test_selection = {tests}
"""
KILLED, SURVIVED = {"killed", "timeout", "segfault"}, {"survived", "no tests"}


@dataclass(frozen=True, order=True)
class Mutant:
    """A change, told by where it is and what it does, not by a number: lines and numbers move."""

    function: str
    removed: str
    added: str


@dataclass
class Score:
    killed: int = 0
    only_text: int = 0
    survivors: list[Mutant] = field(default_factory=list)

    def row(self, name: str, accepted: int) -> str:
        counted = self.killed + len(self.survivors)
        share = 100 * self.killed / counted if counted else 100.0
        numbers = (counted + self.only_text, self.only_text, counted, self.killed)
        cells = "".join(f"{number:>10}" for number in numbers)
        return f"{name:<16}{cells}{share:>9.1f}%{accepted:>10}{len(self.survivors) - accepted:>10}"


HEAD = "module             mutants text only   counted    killed     share  accepted       new"


# -- what a change is


class _Blank(ast.NodeTransformer):
    """Puts nothing in the place of a message's text; *messages* are the variables that hold one."""

    def __init__(self, messages: set[str]) -> None:
        self._messages = messages

    def visit_Raise(self, node: ast.Raise) -> ast.AST:
        if isinstance(node.exc, ast.Call):
            node.exc.args, node.exc.keywords = [], []
        return self.generic_visit(node)

    def visit_Call(self, node: ast.Call) -> ast.AST:
        place = NOTES.get(node.func.attr) if isinstance(node.func, ast.Attribute) else None
        if place is not None and place < len(node.args):
            node.args[place] = ast.Constant("")
        return self.generic_visit(node)

    def visit_Assign(self, node: ast.Assign) -> ast.AST:
        return self._assigned(node, node.targets)

    def visit_AugAssign(self, node: ast.AugAssign) -> ast.AST:
        return self._assigned(node, [node.target])

    def _assigned(self, node: ast.Assign | ast.AugAssign, targets: list[ast.expr]) -> ast.AST:
        if all(isinstance(each, ast.Name) and each.id in self._messages for each in targets):
            return ast.Pass()
        return self.generic_visit(node)

    def visit_If(self, node: ast.If) -> ast.AST:
        self.generic_visit(node)
        does_nothing = all(isinstance(each, ast.Pass) for each in (*node.body, *node.orelse))
        return ast.Pass() if does_nothing else node


def _blanked(function: ast.AST, messages: set[str]) -> ast.AST:
    blank: ast.AST = _Blank(messages).visit(copy.deepcopy(function))
    return blank


def _messages(function: ast.AST) -> set[str]:
    """The variables of *function* that are read nowhere but in the texts of messages."""
    found: set[str] = set()
    while True:
        rest = list(ast.walk(_blanked(function, found)))
        names = [each for each in rest if isinstance(each, ast.Name)]
        read = {each.id for each in names if isinstance(each.ctx, ast.Load)}
        new = {each.id for each in names if isinstance(each.ctx, ast.Store)} - read
        if not new - found:
            return found
        found |= new


def is_only_text(original: ast.AST, changed: ast.AST) -> bool:
    """Whether only the text of a message is another."""
    messages = _messages(original)
    return ast.dump(_blanked(original, messages)) == ast.dump(_blanked(changed, messages))


def mutants(module: str, path: Path) -> Iterator[tuple[str, Mutant, bool]]:
    """Each change in the file that mutmut made of *module*: its name there, what it is, whether of
    text only."""
    functions = {
        node.name: node
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    }
    for name, node in functions.items():
        found = re.fullmatch(r"(x(?:ǁ|_)(.+))__mutmut_\d+", name)
        if found is None:
            continue
        original = copy.copy(functions[f"{found[1]}__mutmut_orig"])
        changed = copy.copy(node)
        original.name = changed.name = "_"
        before, after = (ast.unparse(each).splitlines() for each in (original, changed))
        by_sign: dict[str, list[str]] = {"- ": [], "+ ": []}
        for line in difflib.ndiff(before, after):
            if line[:2] in by_sign:
                by_sign[line[:2]].append(line[2:].strip())
        mutant = Mutant(
            f"{module}.{found[2].replace('ǁ', '.')}",
            " | ".join(by_sign["- "]),
            " | ".join(by_sign["+ "]),
        )
        yield name, mutant, is_only_text(original, changed)


# -- which are accepted


def accepted(text: str) -> Counter[Mutant]:
    """The list of survivors: a line FUNCTION: REASON, then `- ` and `+ ` lines of its changes.

    Several `+ ` lines under one `- ` line are as many changes; a line given twice counts twice.
    """
    found: Counter[Mutant] = Counter()
    function = removed = ""
    for line in text.splitlines():
        if line.startswith("    - "):
            removed = line[6:]
        elif line.startswith("    + "):
            found[Mutant(function, removed, line[6:])] += 1
        elif line.strip() and not line.startswith("#"):
            function, colon, reason = line.partition(": ")
            assert colon and reason, f"{ACCEPTED.name}: {line!r} gives no reason"
    return found


def listed(survivors: Iterable[Mutant]) -> str:
    """*survivors* as that list has them, each without its reason."""
    lines = []
    last = ("", "")
    for each in sorted(survivors):
        if each.function != last[0]:
            lines.append(f"{each.function}: ")
        if (each.function, each.removed) != last:
            lines.append(f"    - {each.removed}")
        lines.append(f"    + {each.added}")
        last = (each.function, each.removed)
    return "\n".join(lines)


# -- the run


def path_of(module: str, tree: Path) -> Path:
    (path,) = (tree / PACKAGE).rglob(f"{module}.py")
    return path


def run(tree: Path, modules: list[str]) -> None:
    """Have mutmut make and try every change of *modules*, in *tree*."""
    tests = sorted({f"tests/{test}.py" for module in modules for test in MODULES[module]})
    files = [str(path_of(module, tree).relative_to(tree)) for module in modules]
    settings = SETTINGS.format(package=PACKAGE, files=json.dumps(files), tests=json.dumps(tests))
    with (tree / "pyproject.toml").open("a", encoding="utf-8") as project:
        project.write(settings)
    # As in CI, Hypothesis draws the same examples each time, and remembers none.
    environment = {
        **os.environ,
        "CI": "true",
        "CONSUL_MATCHMAKER_WIRE_CASES": "50",
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    with (tree / "mutmut.log").open("w") as log:
        done = subprocess.run(
            ["nice", sys.executable, "-m", "mutmut", "run", "--max-children", "1"],
            cwd=tree, env=environment, stdout=log, stderr=subprocess.STDOUT, check=False,
        )  # fmt: skip
    if done.returncode:
        sys.exit((tree / "mutmut.log").read_text()[-4000:])


def scores(tree: Path, modules: list[str]) -> dict[str, Score]:
    """What came of each change."""
    from mutmut.stats import status_by_exit_code  # type: ignore[import-not-found]

    found: defaultdict[str, Score] = defaultdict(Score)
    for module in modules:
        path = path_of(module, tree / "mutants")
        codes = json.loads(path.with_suffix(".py.meta").read_text())["exit_code_by_key"]
        by_name = {name.rpartition(".")[2]: code for name, code in codes.items()}
        for name, mutant, is_text in mutants(module, path):
            status = status_by_exit_code[by_name.pop(name)]
            assert status in KILLED | SURVIVED, f"{module}: {name}: {status}"
            if is_text:
                found[module].only_text += 1
            elif status in KILLED:
                found[module].killed += 1
            else:
                found[module].survivors.append(mutant)
        assert not by_name, f"{module}: not read: {by_name}"
    return dict(found)


def report(found: dict[str, Score], known: Counter[Mutant]) -> bool:
    """Print the table and what is not as listed; whether all is well."""
    modules = sorted(found)
    survivors = Counter(each for module in modules for each in found[module].survivors)
    known = Counter({each: n for each, n in known.items() if each.function.split(".")[0] in found})
    new, gone = survivors - known, known - survivors
    total = Score()
    print(HEAD)
    for module in modules:
        score = found[module]
        is_new = sum(n for each, n in new.items() if each.function.split(".")[0] == module)
        print(score.row(module, len(score.survivors) - is_new))
        total.killed += score.killed
        total.only_text += score.only_text
        total.survivors += score.survivors
    print(total.row("all", sum((survivors - new).values())))
    if new:
        print(f"\nNo test notices these, and {ACCEPTED.name} does not accept them:")
        print(listed(new.elements()))
    if gone:
        print(f"\n{ACCEPTED.name} accepts these, and they do not survive any more: take them out")
        print(listed(gone.elements()))
    counted = total.killed + len(total.survivors)
    is_enough = total.killed >= WANTED_SHARE * counted
    if not is_enough:
        print(f"\nless than {100 * WANTED_SHARE:g} % of {counted} are noticed")
    return is_enough and not new and not gone


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("modules", nargs="*", metavar="MODULE", help=f"of {', '.join(MODULES)}")
    chosen = parser.parse_args().modules or list(MODULES)
    if unknown := set(chosen) - MODULES.keys():
        parser.error(f"not one of the rules: {', '.join(sorted(unknown))}")
    with tempfile.TemporaryDirectory(prefix="consul-matchmaker-mutation.") as name:
        tree = Path(name)
        shutil.copytree(ROOT / PACKAGE, tree / PACKAGE)
        shutil.copytree(ROOT / "tests", tree / "tests")
        for file in ("conftest.py", "pyproject.toml"):
            shutil.copy(ROOT / file, tree / file)
        run(tree, chosen)
        is_well = report(scores(tree, chosen), accepted(ACCEPTED.read_text(encoding="utf-8")))
    sys.exit(not is_well)


if __name__ == "__main__":
    main()
