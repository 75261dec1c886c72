"""The shape of the package: imports go down only, a foreign package has one owner, locks are late.

Read off the source with `ast`, so that nothing need be imported to be judged.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import consul_matchmaker

PACKAGE = "consul_matchmaker"
ROOT = Path(consul_matchmaker.__file__).parent

# From the bottom up (design, section 3).  A module imports what is below it, or beside it.
LAYERS = {
    "rules": (
        "errors",
        "model",
        "settings",
        "texts",
        "backoff",
        "registrations",
        "registrations.beats",
        "registrations.differences",
        "registrations.reconciler",
        "answers",
        "answers.balance",
        "answers.belief",
        "answers.blocking_query",
        "answers.freshness",
        "answers.watch_plan",
        "backends.service_names",
        "backends.kv.keys",
        "backends.dns.wire",
        "backends.dns.coverage",
        "backends.dns.names",
    ),
    "outside": (
        "files",
        "fork",
        "worker",
        "backends",
        "backends.*",
        "answers.state_file",
    ),
    "running": ("answers.*", "registrations.*", "matchmaker", "calls", "aio"),
    "public": ("",),  # the package itself: its list of public names
    "edges": ("adapters", "adapters.*", "testing", "testing.*", "cli", "cli.*", "__main__"),
}
OWNERS = {
    "cachetools": {"answers.topics"},
    "consul": {"backends.http.exchange"},
    "dns": {"backends.dns.names", "testing.consul_probe"},
}
# What a rule has no business with: clocks, chance drawn by itself, locks, threads, the network.
NOT_FOR_RULES = {
    "asyncio",
    "select",
    "selectors",
    "socket",
    "ssl",
    "subprocess",
    "threading",
    "time",
}
LOCKS = {"Lock", "RLock", "Condition", "Event", "Semaphore", "BoundedSemaphore", "Barrier", "local"}


def name_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


MODULES = {name_of(path): path for path in sorted(ROOT.rglob("*.py"))}


def tree(module: str) -> ast.Module:
    return ast.parse(MODULES[module].read_text(encoding="utf-8"))


def imports(module: str) -> Iterator[tuple[str, int]]:
    """Every module that *module* imports, by full name, with the line; type checking apart."""
    is_package = MODULES[module].name == "__init__.py"
    package = [PACKAGE, *module.split(".")] if module else [PACKAGE]
    if not is_package:
        package = package[:-1]
    for node in _without_type_checking(tree(module)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, node.lineno
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            full = ".".join([*base, *([node.module] if node.module else [])])
            for alias in node.names:
                inner = f"{full}.{alias.name}".removeprefix(f"{PACKAGE}.")
                yield (f"{full}.{alias.name}" if inner in MODULES else full), node.lineno


def _without_type_checking(node: ast.AST) -> Iterator[ast.AST]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.dump(child.test):
            continue
        yield child
        yield from _without_type_checking(child)


def own_imports(module: str) -> dict[str, int]:
    return {
        full.removeprefix(PACKAGE).removeprefix("."): line
        for full, line in imports(module)
        if full.split(".")[0] == PACKAGE
    }


def layer_of(module: str) -> int:
    for height, members in enumerate(LAYERS.values()):
        for member in members:
            if module == member or (
                member.endswith(".*") and module.startswith(member.removesuffix("*"))
            ):
                return height
    raise AssertionError(f"{module}: say in LAYERS where it belongs")


@pytest.mark.parametrize("module", MODULES)
def test_imports_go_down(module: str) -> None:
    """A module imports nothing that is above it."""
    height = layer_of(module)
    up = [name for name in own_imports(module) if layer_of(name) > height]
    assert not up, f"{module} imports {up} above it"


def test_imports_make_no_circle() -> None:
    """Whatever a module imports can be understood without it."""
    below = {module: set(own_imports(module)) - {module} for module in MODULES}
    while free := [module for module, names in below.items() if not names & below.keys()]:
        for module in free:
            del below[module]
    assert not below, f"these import each other: {below}"


@pytest.mark.parametrize("module", MODULES)
def test_a_foreign_package_has_one_owner(module: str) -> None:
    """Beside the standard library a module imports only what it owns; adapters what they adapt."""
    if module.startswith("adapters."):
        return
    for full, line in imports(module):
        package = full.split(".")[0]
        if package != PACKAGE and package not in sys.stdlib_module_names:
            assert module in OWNERS.get(package, ()), f"{module}:{line} imports {full}"


@pytest.mark.parametrize(
    ("inside", "never"),
    [
        ("adapters.oslo.zmq.", "adapters.oslo.http"),
        ("adapters.oslo.http.", "adapters.oslo.zmq"),
    ],
)
def test_the_drivers_of_oslo_messaging_do_not_know_each_other(inside: str, never: str) -> None:
    """No release of oslo.messaging has both, so what they share is in their common folder."""
    for module in MODULES:
        if f"{module}.".startswith(inside):
            assert not [name for name in own_imports(module) if name.startswith(never)], module


def test_the_folder_of_oslo_messaging_imports_nothing() -> None:
    """So an entry point imports what it needs, and no more."""
    assert list(imports("adapters.oslo")) == []


@pytest.mark.parametrize("module", ["adapters.matchmaker_consul", "adapters.oslo_zmq"])
def test_a_name_that_users_were_told_is_no_more_than_a_name(module: str) -> None:
    """It imports from where the code is, and has none itself."""
    allowed = ast.Expr | ast.ImportFrom | ast.Assign
    assert [each for each in tree(module).body if not isinstance(each, allowed)] == []


@pytest.mark.finding("D12")
def test_every_foreign_package_is_declared() -> None:
    """What the package imports, adapters apart, stands among its dependencies."""
    text = (Path(__file__).parent.parent / "pyproject.toml").read_text(encoding="utf-8")
    listed = text.partition("\ndependencies = [")[2].partition("\n]")[0]
    declared = {name.lower() for name in re.findall(r'^\s*"([A-Za-z0-9._-]+)', listed, re.M)}
    names = {"consul": "python-consul2", "dns": "dnspython"}
    imported = {
        full.split(".")[0]
        for module in MODULES
        if not module.startswith("adapters.")
        for full, _ in imports(module)
    }
    foreign = imported - {PACKAGE} - set(sys.stdlib_module_names)
    assert {names.get(package, package) for package in foreign} <= declared


@pytest.mark.parametrize("module", LAYERS["rules"])
def test_rules_have_no_clock_lock_thread_or_socket(module: str) -> None:
    """They decide by what they are handed."""
    bad = {full for full, _ in imports(module) if full.split(".")[0] in NOT_FOR_RULES}
    assert not bad, f"{module} imports {bad}"


@pytest.mark.parametrize("module", MODULES)
def test_locks_are_made_late(module: str) -> None:
    """No lock at module or class level, and `threading` is imported in full: so eventlet can patch
    it, whether it patches before or after our import."""
    for node in ast.walk(tree(module)):
        if isinstance(node, ast.ImportFrom):
            assert node.module != "threading", f"{module}:{node.lineno} imports from threading"
    for call in _calls_at_import(tree(module)):
        made = call.func
        if isinstance(made, ast.Attribute) and isinstance(made.value, ast.Name):
            is_lock = made.value.id == "threading" and made.attr in LOCKS
            assert not is_lock, f"{module}:{call.lineno} makes a lock at import"


def _calls_at_import(node: ast.AST) -> Iterator[ast.Call]:
    """Calls that run when the module is imported: not those inside functions."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            for default in [*child.args.defaults, *filter(None, child.args.kw_defaults)]:
                yield from (each for each in ast.walk(default) if isinstance(each, ast.Call))
            continue
        if isinstance(child, ast.Call):
            yield child
        yield from _calls_at_import(child)


@pytest.mark.parametrize("module", MODULES)
def test_nothing_sleeps(module: str) -> None:
    """Waiting can always be interrupted: by events and conditions, never time.sleep."""
    if module in ("testing.consul_probe", "testing.local_consul", "cli.demo", "cli.supervise"):
        return  # they wait for other programs, on threads of their own callers
    for node in ast.walk(tree(module)):
        if isinstance(node, ast.Attribute) and node.attr == "sleep":
            if ast.unparse(node) == "asyncio.sleep":
                continue  # ends when its task is cancelled
            raise AssertionError(f"{module}:{node.lineno} sleeps")


@pytest.mark.parametrize("module", MODULES)
def test_a_module_says_what_it_is_for(module: str) -> None:
    """Its first line is a sentence."""
    doc = ast.get_docstring(tree(module))
    assert doc, f"{module} has no docstring"
    assert len(doc.splitlines()[0]) <= 100


@pytest.mark.parametrize(
    ("url", "never"),
    [
        ("consul+catalog://127.0.0.1:8600", ("consul", "requests", "urllib3")),
        ("consul+kv://127.0.0.1:8500", ("dns",)),
        ("consul+service://127.0.0.1:8500", ("dns",)),
    ],
)
@pytest.mark.system
def test_a_mode_imports_only_its_own_client(url: str, never: tuple[str, ...]) -> None:
    """Catalog mode works where HTTP clients are missing, kv mode where dnspython is."""
    program = f"""
import sys
for name in {never!r}:
    sys.modules[name] = None  # any import of it fails
from consul_matchmaker import Matchmaker
matchmaker = Matchmaker.from_url({url!r})
matchmaker.status(), repr(matchmaker)
matchmaker.close()
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)


@pytest.mark.system
def test_importing_starts_nothing() -> None:
    """Import and constructor leave one thread and no socket."""
    program = """
import gc, socket, threading
from consul_matchmaker import Matchmaker
modes = "catalog", "kv", "service"
each = [Matchmaker.from_url(f"consul+{mode}://127.0.0.1:1") for mode in modes]
assert threading.active_count() == 1, threading.enumerate()
assert not [each for each in gc.get_objects() if isinstance(each, socket.socket)]
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)
