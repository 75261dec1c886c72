"""Say which extra brings a foreign package that is not installed."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator


@contextlib.contextmanager
def extra(name: str) -> Iterator[None]:
    """Have an ImportError of the block name the extra of this package that brings what it needs."""
    try:
        yield
    except ImportError as error:
        raise ImportError(
            f"{error}: install it by `pip install 'consul-matchmaker[{name}]'`", name=error.name
        ) from error
