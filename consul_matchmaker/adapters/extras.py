"""Say which extra brings a foreign package that is not installed, or not in the release needed."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator


@contextlib.contextmanager
def extra(name: str, needs: str = "") -> Iterator[None]:
    """Have an ImportError of the block name the extra of this package that brings what it needs.

    *needs*: the package and release, for where another release of it may be installed.
    """
    try:
        yield
    except ImportError as error:
        why = f"{error}: {needs} is needed" if needs else str(error)
        raise ImportError(
            f"{why}: install it by `pip install 'consul-matchmaker[{name}]'`", name=error.name
        ) from error
