"""The network cut between Consul's nodes, with readers and registrations on both sides of it."""

import contextlib
from collections.abc import Callable, Iterator

import pytest

from consul_matchmaker import Matchmaker
from integration.cluster import Cluster
from integration.registrations import CRASH_SECONDS, INTERVAL, SLACK, SOON, TTL, answers
from integration.waiting import until

pytestmark = pytest.mark.docker

BACK_SECONDS = 30.0  # until a cut-off node is a member again and knows the leader
STALE_SECONDS = 45.0  # a connection that has gone silent is noticed when its poll is overdue
ON_MAJORITY, ON_CUT_OFF = "10.0.0.1:9501", "10.0.0.2:9501"
BOTH = [ON_MAJORITY, ON_CUT_OFF]
Join = Callable[[str], Matchmaker]


@pytest.fixture
def join(cluster: Cluster, prefix: str) -> Iterator[Join]:
    """A matchmaker over the node of that name."""
    with contextlib.ExitStack() as stack:

        def make(node: str) -> Matchmaker:
            url = f"consul+kv://{cluster.nodes[node].http}/{prefix}"
            query = f"session_ttl_seconds={TTL:g}&request_timeout_seconds=3"
            return stack.enter_context(Matchmaker.from_url(f"{url}?{query}"))

        yield make


def hosts(reader: Matchmaker) -> list[str]:
    return [str(host) for host in reader.hosts("scheduler")]


@pytest.mark.parametrize("victim", ["agent", "leader", "follower"])
def test_a_node_cut_off_and_back(cluster: Cluster, join: Join, victim: str) -> None:
    """Readers on the majority lose the host beyond the cut within 2 x TTL (a new leader gives every
    lease another 2 x TTL) and get it back; readers on the cut-off node keep both hosts and say
    that they are stale; afterwards everybody sees each host once."""
    leader = cluster.leader()
    servers = [name for name in cluster.nodes if name.startswith("server")]
    cut_off = {
        "agent": "agent1",
        "leader": leader,
        "follower": next(name for name in servers if name != leader),
    }[victim]
    majority = next(name for name in servers if name not in (cut_off, leader))
    near, far = join(majority), join(cut_off)
    far_reader, near_reader = join(cut_off), join(majority)
    for owner, host in ((near, ON_MAJORITY), (far, ON_CUT_OFF)):
        owner.register("scheduler", host).wait_until_published(timeout_seconds=5)
    for reader in (near_reader, far_reader):
        until(lambda reader=reader: hosts(reader) == BOTH, SOON, "all see both")  # type: ignore[misc]

    cluster.partition(cut_off)
    lives_seconds = CRASH_SECONDS * (2 if victim == "leader" else 1) + 10
    gone = until(lambda: hosts(near_reader) == [ON_MAJORITY], lives_seconds, "the majority sees it")
    stale = until(lambda: far_reader.hosts("scheduler").is_stale, STALE_SECONDS, "said to be stale")
    assert hosts(far_reader) == BOTH
    assert not near_reader.hosts("scheduler").is_stale

    cluster.heal(cut_off)
    until(lambda: answers(cluster.nodes[cut_off]), BACK_SECONDS, "the node is back")
    back = until(lambda: hosts(near_reader) == BOTH, INTERVAL + SLACK + 1, "the host is back")
    until(
        lambda: hosts(far_reader) == BOTH and not far_reader.hosts("scheduler").is_stale,
        BACK_SECONDS,
        "the reader beyond the cut is fresh again",
    )
    print(
        f"{victim}: gone after {gone:.1f} s, stale {stale:.1f} s later, "
        f"back {back:.1f} s after its node"
    )
    assert hosts(near_reader) == BOTH
