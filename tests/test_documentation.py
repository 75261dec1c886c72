"""What the documents say of settings, commands, files and exit codes is what the code does.

`python tests/test_documentation.py` writes the settings table anew.
"""

from __future__ import annotations

import re
from dataclasses import Field, fields
from pathlib import Path
from typing import Any

import pytest

import consul_matchmaker
from consul_matchmaker import cli, errors
from consul_matchmaker.errors import ConfigurationError
from consul_matchmaker.settings import Settings

ROOT = Path(__file__).parent.parent
RECIPES = sorted((ROOT / "docs" / "recipes").glob("*.md"))
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), *RECIPES]
SETTINGS_PAGE = ROOT / "docs" / "settings.md"
BEGIN, END = "<!-- table: begin -->\n", "<!-- table: end -->\n"
BY_MODE = ("addresses", "request_timeout_seconds", "check_ttl_seconds", "watch")


def default_of(setting: Field[Any]) -> str:
    if setting.name == "mode":
        return "needed"
    if setting.name in BY_MODE:
        return "by mode"
    if isinstance(setting.default, bool):
        return "on" if setting.default else "off"
    if isinstance(setting.default, (int, float)):
        return f"{setting.default:g}"
    return f"`{setting.default}`" if setting.default else "none"


def values_of(setting: Field[Any]) -> str:
    """Which numbers or words the setting takes, out of its own error; nothing for other texts."""
    with pytest.raises(ConfigurationError) as caught:
        Settings(**{"mode": "kv", setting.name: object()})
    allowed = re.search(
        r"must be (?:a number from |one of )?(.*?)(?:, in| \(it)", str(caught.value)
    )
    found = allowed[1] if allowed else ""
    return "" if found.startswith(("a ", "left")) else found


def settings_table() -> str:
    rows = ["| setting | default | values | meaning | Consul's variable |", "|---|---|---|---|---|"]
    for setting in fields(Settings):
        variables = ", ".join(f"`{name}`" for name in setting.metadata.get("variables", ()))
        doc = setting.metadata["doc"].replace("|", "\\|")
        cells = (f"`{setting.name}`", default_of(setting), values_of(setting), doc, variables)
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows) + "\n"


def test_the_settings_table_is_the_definition() -> None:
    """Every setting with its default, bounds and variables; run this file to write it anew."""
    text = SETTINGS_PAGE.read_text()
    assert text[text.index(BEGIN) + len(BEGIN) : text.index(END)] == settings_table()


def test_the_settings_named_in_the_readme_have_the_defaults_it_says() -> None:
    """The short table of the README has the same defaults."""
    settings = {setting.name: setting for setting in fields(Settings)}
    rows = re.findall(r"^\| `(\w+)` \| ([^|]+) \|", PAGES[0].read_text(), re.MULTILINE)
    named = [(name, default) for name, default in rows if name in settings]
    assert len(named) >= 8
    assert named == [(name, default_of(settings[name])) for name, _ in named]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_settings_in_urls_exist(page: Path) -> None:
    """Every complete URL of ours in the documents can be read."""
    for url in re.findall(r"consul\+(?:kv|catalog|service)://[^\s`\"')]+", page.read_text()):
        if not re.search(r"[A-Z<]{3}|\.\.\.", url):  # HOST:PORT and such
            Settings.from_url(url.rstrip(".,;:"), {})


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    """Every relative link names a file of the repository."""
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text()):
        if "://" not in target:
            assert (page.parent / target).exists(), target


def test_the_readme_can_be_read_on_a_package_index() -> None:
    """Its links are absolute; files of the repository are named, and exist."""
    text = PAGES[0].read_text()
    targets = re.findall(r"\]\(([^)]+)\)", text)
    assert [target for target in targets if "://" not in target] == []
    named = re.findall(r"`((?:docs/[\w/.-]+|[A-Z]+(?:\.md)?))`", text)
    files = [name for name in named if "/" in name or name.endswith(".md")]
    assert len(files) >= 7
    assert [name for name in files if not (ROOT / name).exists()] == []


def test_the_readme_names_every_extra_for_users() -> None:
    """An adapter that needs more says in the README how it is installed."""
    text = PAGES[0].read_text()
    project = (ROOT / "pyproject.toml").read_text()
    extras = re.search(r"\[project.optional-dependencies\]\n(.*?)\n\n", project, re.DOTALL)
    assert extras is not None
    names = set(re.findall(r"^([\w-]+) = \[", extras[1], re.MULTILINE))
    assert {"metrics", "oslo"} <= names
    for name in names - {"test", "lint", "bench"}:
        assert f"`{name}`" in text


def test_every_command_is_documented() -> None:
    """The page of the command line has a section for each command, and no other."""
    text = (ROOT / "docs" / "command-line.md").read_text()
    documented = re.findall(r"^## `(\w+)", text, re.MULTILINE)
    actions = [a for a in cli._parser()._actions if getattr(a, "choices", None)]
    names = next(list(a.choices or ()) for a in actions if a.dest == "command")
    assert sorted(documented) == sorted(names)


def test_every_exit_code_is_documented() -> None:
    """The same codes in the help and in the page."""
    text = (ROOT / "docs" / "command-line.md").read_text()
    for code in (cli.OK, cli.FAILED, cli.WRONG_USAGE, cli.NO_HOSTS, cli.NO_ANSWER, cli.INTERRUPTED):
        assert re.search(rf"^\| {code} \|", text, re.MULTILINE)
        assert re.search(rf"^  {code} ", cli.EXIT_CODES, re.MULTILINE)


def test_every_error_is_documented() -> None:
    """The README names each exception a caller may meet."""
    text = PAGES[0].read_text()
    assert [name for name in errors.__all__ if f"`{name}`" not in text] == []


def test_every_module_is_in_the_architecture() -> None:
    """Its table has a place for each module, the folders of the edges apart, and for no other."""
    named = re.findall(r"`([\w/]+\.py)`", (ROOT / "docs" / "architecture.md").read_text())
    package = Path(consul_matchmaker.__file__).parent  # also of a wheel
    modules = {path.relative_to(package).as_posix() for path in package.rglob("*.py")}
    assert set(named) <= modules | {"tests/test_import_law.py"}
    whole = ("adapters/", "cli/")
    needed = {each for each in modules if not each.startswith(whole) and "__" not in each}
    assert needed <= set(named)


@pytest.mark.parametrize("page", RECIPES, ids=lambda page: page.name)
def test_every_recipe_is_run_by_a_test(page: Path) -> None:
    """A page of docs/recipes has a program, the test of its name, and says what it does not do."""
    text = page.read_text()
    assert (ROOT / "integration" / "recipes" / f"test_{page.stem}.py").exists()
    assert re.search(r"^```python\n# \S+\.py$", text, re.MULTILINE)
    headings = re.findall(r"^## (.*)$", text, re.MULTILINE)
    assert headings[-1] == "What it does not do"
    assert re.match(r"When .* dies$", headings[-2])


def test_the_first_screen_has_the_two_commands() -> None:
    """`make demo` and `make test`, and nothing to do before."""
    first_screen = "\n".join(PAGES[0].read_text().splitlines()[:30])
    block = re.search(r"```console\n(.*?)```", first_screen, re.DOTALL)
    assert block is not None
    assert re.findall(r"^\$ (make \w+)", block[1], re.MULTILINE) == ["make demo", "make test"]


if __name__ == "__main__":
    page = SETTINGS_PAGE.read_text()
    before, after = page[: page.index(BEGIN) + len(BEGIN)], page[page.index(END) :]
    SETTINGS_PAGE.write_text(before + settings_table() + after)
