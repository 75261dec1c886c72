"""A datacenter that cannot be reached makes its own topics old, and nobody else's."""

from __future__ import annotations

import contextlib
import itertools
import threading
import time
from collections.abc import Callable, Iterable

import pytest

from consul_matchmaker import Host, Matchmaker, Settings, errors
from consul_matchmaker.testing.local_consul import LocalCluster
from integration.datacenters import serve, two_datacenters
from integration.waiting import until

TTL_SECONDS = 15.0
"""Refreshes come 1.5 s before it at the latest: so long the scheduler may hold up all of it."""
TIMEOUT_SECONDS = 2.0
NEAR = [f"near-{number}" for number in range(20)]
FAR = ["far-0", "far-1"]
NOBODY = ["nobody-0", "nobody-1"]


def paused(far: LocalCluster) -> Callable[[], None]:
    """Questions for it hang (fact A13)."""
    far.pause("server1")
    return lambda: far.resume("server1")


def killed(far: LocalCluster) -> Callable[[], None]:
    """Questions for it fail at once (fact A13)."""
    far.kill("server1")

    def bring_back() -> None:
        far.start("server1")
        far.wait_ready()

    return bring_back


@pytest.mark.long  # and so, as it brings its own clusters, not once more in Docker
@pytest.mark.parametrize("take_away", [paused, killed])
def test_a_datacenter_away_makes_no_others_topic_stale(
    take_away: Callable[[LocalCluster], Callable[[], None]],
) -> None:
    """While threads ask all the time for its topics, for such that nobody serves and for unknown
    ones, which all end in it, the other topics are never stale.  Its own keep their last answer,
    marked stale, and are fresh when it is back."""
    with contextlib.ExitStack() as stack:
        near, far = stack.enter_context(two_datacenters())
        serve(near.nodes["agent1"], NEAR)
        serve(far.nodes["server1"], FAR)
        settings = Settings(
            mode="catalog",
            addresses=(Host.parse(near.nodes["agent1"].dns),),
            datacenters=("dc1", "dc2"),
            ttl_seconds=TTL_SECONDS,
            request_timeout_seconds=TIMEOUT_SECONDS,
        )
        mm = stack.enter_context(Matchmaker(settings))
        for topic in (*NEAR, *FAR):
            assert len(mm.wait_for_hosts(topic, timeout_seconds=10)) == 3
        for topic in NOBODY:
            assert mm.hosts(topic).hosts == ()

        is_over = threading.Event()
        unknown = (f"unknown-{number}" for number in itertools.count())

        def ask(topics: Iterable[str]) -> None:
            for topic in topics:
                with contextlib.suppress(errors.Unavailable):
                    mm.hosts(topic)
                if is_over.wait(0.005):
                    return

        asked: list[Iterable[str]] = [itertools.cycle(FAR), itertools.cycle(NOBODY), unknown]
        askers = [threading.Thread(target=ask, args=(topics,)) for topics in asked]
        for asker in askers:
            asker.start()
        stack.callback(lambda: [asker.join(30) for asker in askers])
        stack.callback(is_over.set)

        bring_back = take_away(far)
        ends = time.monotonic() + 2 * TTL_SECONDS
        while time.monotonic() < ends:
            for topic in NEAR:
                held = mm.hosts(topic)
                assert not held.is_stale, (topic, held.age_seconds)
                assert len(held) == 3
            time.sleep(0.02)
        for topic in FAR:
            held = mm.hosts(topic)
            assert held.is_stale
            assert len(held) == 3
            assert "Consul cannot be asked" in str(mm.explain(topic)["state"])
        bring_back()
        for topic in FAR:
            until(lambda topic=topic: not mm.hosts(topic).is_stale, TTL_SECONDS)  # type: ignore[misc]
            assert len(mm.hosts(topic)) == 3


def test_service_mode_spills_over_to_the_next_datacenter() -> None:
    """What a datacenter has is found there; when it has none, in the next one, and when it has one
    again, there; an instance says where it is."""
    with contextlib.ExitStack() as stack:
        near, far = stack.enter_context(two_datacenters())
        agent = near.nodes["agent1"]

        def joined(where: str, extra: str = "") -> Matchmaker:
            url = f"consul+service://{where}?{extra}"
            return stack.enter_context(Matchmaker.from_url(url))

        at_home = joined(agent.http).register("web", "10.0.0.1:80")
        at_home.wait_until_published(timeout_seconds=10)
        abroad = joined(far.nodes["server1"].http).register("web", "10.0.0.2:80")
        abroad.wait_until_published(timeout_seconds=10)
        often = "ttl_seconds=0.5&empty_ttl_seconds=0.5"
        home_first = joined(agent.http, f"datacenters=dc1,dc2&{often}")
        far_first = joined(agent.http, f"datacenters=dc2,dc1&{often}&confirm_empty_seconds=2")

        def found(reader: Matchmaker) -> list[tuple[str, str | None]]:
            return [(str(each.host), each.datacenter) for each in reader.hosts("web").instances]

        assert found(home_first) == [("10.0.0.1:80", "dc1")]
        assert found(far_first) == [("10.0.0.2:80", "dc2")]
        at_home.unregister()
        until(lambda: found(home_first) == [("10.0.0.2:80", "dc2")], 5, "abroad")
        joined(agent.http).register("web", "10.0.0.3:80")
        until(lambda: found(home_first) == [("10.0.0.3:80", "dc1")], 5, "at home again")
        far.kill("server1")
        killed_at = time.monotonic()
        until(lambda: found(far_first) == [("10.0.0.3:80", "dc1")], 10, "it cannot be asked")
        assert time.monotonic() - killed_at >= 2, "a moment's outage moves nobody"
        assert found(home_first) == [("10.0.0.3:80", "dc1")]
