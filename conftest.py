"""For all tests: what is said of findings, and of tests that are left out.

`@pytest.mark.finding("A1")` says which found fault a test is about; `--findings` lists them.
"""

import os
from pathlib import Path

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--findings",
        action="store_true",
        help="run nothing; list the tests of each finding, and those that are expected to fail",
    )
    parser.addoption("--no-skips", action="store_true", help="a skipped test makes the run fail")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.getoption("--findings"):
        return
    rows: dict[str, dict[str, None]] = {}
    for item in items:
        for mark in item.iter_markers("finding"):
            is_open = any(item.iter_markers("xfail"))
            test = item.nodeid.partition("[")[0] + (" (xfail)" if is_open else "")
            for row in mark.args:
                rows.setdefault(row, {})[test] = None
    for row in sorted(rows, key=lambda row: (row[0], int(row[1:]))):
        for test in rows[row]:
            print(f"{row}\t{test}")
    items.clear()


# --- a skipped test fails the run, or is said at the end of `make test` ---------------------------


def _skipped(config: pytest.Config) -> list[pytest.TestReport]:
    reporter = config.pluginmanager.get_plugin("terminalreporter")
    return [] if reporter is None else reporter.stats.get("skipped", [])


def pytest_sessionfinish(session: pytest.Session) -> None:
    if session.config.getoption("--no-skips") and _skipped(session.config):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    skipped = _skipped(config)
    if skipped and config.getoption("--no-skips"):
        line = f"--no-skips: {len(skipped)} skipped, so this run fails"
        terminalreporter.write_line(line, red=True)
    if path := os.environ.get("LEFT_OUT_FILE"):
        with Path(path).open("a", encoding="utf-8") as file:
            for report in skipped:
                test = report.nodeid.rpartition("::")[2]
                assert isinstance(report.longrepr, tuple)
                file.write(f"{test}: {report.longrepr[2].removeprefix('Skipped: ')}\n")
