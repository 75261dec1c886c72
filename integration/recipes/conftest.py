"""Fixtures of the tests of docs/recipes; collected where the packages they need are installed.

They have a tox environment of their own, ``recipes``.
"""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from consul_matchmaker.testing.consul_probe import Node
from integration.callers.conftest import agent, cluster
from integration.recipes.pages import Running, programs

__all__ = ["agent", "cluster"]

PACKAGES = ("celery", "psycopg", "psycopg_pool", "redis", "rpyc", "sqlalchemy")
if not all(map(importlib.util.find_spec, PACKAGES)):
    collect_ignore_glob = ["test_*.py"]


@pytest.fixture
def url(agent: Node) -> str:
    """What the pages have as ``consul+service://127.0.0.1:8500``."""
    return f"consul+service://{agent.http}"


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Running]]:
    """``start(page, *words, **environment)`` runs a command line beside the page's programs."""
    with contextlib.ExitStack() as stack:

        def start_one(page: str, *words: str, **environment: str) -> Running:
            programs(page, tmp_path)
            return stack.enter_context(Running(tmp_path, words, environment))

        yield start_one
