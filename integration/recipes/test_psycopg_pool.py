"""docs/recipes/psycopg_pool.md: its program, on a real PostgreSQL whose primary is killed."""

from __future__ import annotations

from collections.abc import Callable

from integration.recipes.failing_over import managed
from integration.recipes.pages import Running


def test_the_pool_moves_to_the_new_primary(start: Callable[..., Running], url: str) -> None:
    """What is asked meanwhile fails with the pool's own error, and the program goes on."""
    with managed(url) as servers:
        app = start(
            "psycopg_pool.md", "python", "app.py", CONSUL_MATCHMAKER_URL=f"{url}?tag=primary"
        )
        app.wait_for(f"at port {servers.primary.port}")
        servers.kill_primary()
        before = app.wait_for("not counted")
        servers.promote_standby()
        said = app.wait_for(f"at port {servers.standby.port}", after=before)
        assert f"at port {servers.primary.port}" not in said[len(before) :]
