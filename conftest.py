"""Which found fault a test is about: `@pytest.mark.finding("A1")`; `--findings` lists them."""

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--findings",
        action="store_true",
        help="run nothing; list the tests of each finding, and those that are expected to fail",
    )


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
