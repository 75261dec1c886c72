"""docs/recipes/rpyc.md: its programs, of which a server is killed and one is told to end."""

from __future__ import annotations

from collections.abc import Callable

from consul_matchmaker import Matchmaker
from integration.cluster import free_ports
from integration.recipes.pages import LONG_SECONDS, Running
from integration.waiting import until


def test_clients_reach_the_servers_that_live(start: Callable[..., Running], url: str) -> None:
    """Each of them, without an error when one is killed; nobody when all have ended."""
    ports = [str(port) for port in free_ports(2)]
    variables = {"CONSUL_MATCHMAKER_URL": url}
    killed, ended = (
        start("rpyc.md", "python", "server.py", "127.0.0.1", port, **variables) for port in ports
    )
    with Matchmaker.from_url(url) as matchmaker:

        def is_listed(*listed: str) -> bool:
            hosts = [str(host) for host in matchmaker.hosts("calculator")]
            return hosts == sorted(f"127.0.0.1:{port}" for port in listed)

        until(lambda: is_listed(*ports), LONG_SECONDS, "both are registered")
        client = start("rpyc.md", "python", "client.py", **variables)
        for port in ports:
            client.wait_for(f"2 + 3 = 5, says {port}")
        killed.process.kill()
        until(lambda: is_listed(ports[1]), LONG_SECONDS, "the killed one is gone")
        before = client.said()
        said = client.wait_for(f"says {ports[1]}", after=before)
        assert "All services are down" not in said
        ended.process.terminate()
        assert ended.process.wait(LONG_SECONDS) == 0
        until(is_listed, LONG_SECONDS, "nobody is left")
        client.wait_for("no answer: no host serves calculator now")
