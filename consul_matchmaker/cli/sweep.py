"""Find keys under the prefix that no process will remove, and remove them."""

from __future__ import annotations

import contextlib

from ..errors import ConfigurationError
from ..settings import Settings


def sweep(settings: Settings, *, remove: bool) -> tuple[dict[str, str], list[str]]:
    """Those keys, each with the reason, and the ones that were removed: none without *remove*.

    Raises Unavailable and Denied, and ConfigurationError unless in kv mode.
    """
    if settings.mode != "kv":
        raise ConfigurationError("only Consul's KV store has such keys: use consul+kv://")
    from ..backends.http.api import ConsulApi
    from ..backends.kv.orphans import find_orphans, remove_orphans
    from ..backends.kv.store import Kv

    with contextlib.closing(Kv(ConsulApi(settings), settings)) as kv:
        orphans = find_orphans(kv)
        removed = remove_orphans(kv, orphans) if remove else []
    return {key: orphan.reason for key, orphan in orphans.items()}, removed
