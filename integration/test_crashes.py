"""A thousand processes killed, fifty at a time: each leaves in time, and no survivor with it."""

import contextlib
import time

import pytest

from consul_matchmaker import Matchmaker
from consul_matchmaker.testing.consul_probe import Node, NotReady, read_json
from integration.cluster import keys
from integration.crowd import Crowd
from integration.registrations import CRASH_SECONDS, SOON, TTL, Sampler
from integration.repeated import Repeated
from integration.waiting import until

pytestmark = pytest.mark.long

ROUNDS = 20
CROWD = 50
SURVIVORS = 10


class Departures:
    """Looks at the keys all the time, and notes how long each killed round was seen there."""

    def __init__(self, agent: Node, prefix: str) -> None:
        self._agent, self._prefix = agent, prefix
        self.killed_at: dict[str, float] = {}
        self.seen_after: dict[str, float] = {}
        self.have_left: set[str] = set()
        self._looks = Repeated("departures", 0.1, self._look)

    def _look(self) -> None:
        killed_at, asked_at = dict(self.killed_at), time.monotonic()
        try:
            found = read_json(self._agent, f"/v1/kv/{self._prefix}/?keys")
        except NotReady:  # on a busy machine; no answer says nothing
            return
        there = killed_at.keys() & {key.split("/")[1] for key in found}
        self.seen_after.update((topic, asked_at - killed_at[topic]) for topic in there)
        self.have_left |= killed_at.keys() - there

    def __enter__(self) -> "Departures":
        self._looks.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._looks.stop()


def test_fifty_processes_killed_twenty_times(agent: Node, prefix: str) -> None:
    """No key is left of any round 2 x TTL + 1 s after its kill, and each survivor is shown at every
    moment.  The rounds overlap: while one expires, the next is started and killed."""
    url = f"consul+kv://{agent.http}/{prefix}?session_ttl_seconds={TTL:g}"
    with contextlib.ExitStack() as stack:
        reader = stack.enter_context(Matchmaker.from_url(url))
        survivors = stack.enter_context(Crowd(url, "survivors", SURVIVORS))
        until(lambda: len(reader.hosts("survivors")) == SURVIVORS, SOON, "survivors are there")
        sampler = stack.enter_context(Sampler({"watching": reader}, "survivors"))
        departures = stack.enter_context(Departures(agent, prefix))
        for number in range(ROUNDS):
            topic = f"round{number}"
            with Crowd(url, topic, CROWD) as crowd:
                assert sum(f"/{topic}/" in key for key in keys(agent, prefix)) == CROWD
                departures.killed_at[topic] = [crowd.kill(host) for host in crowd.pids][-1]
        until(
            lambda: len(departures.have_left) == ROUNDS, CRASH_SECONDS + 2, "all rounds have left"
        )
        took = departures.seen_after.values()
        print(f"seen until {min(took):.1f} to {max(took):.1f} s after their end")
        assert max(took) <= CRASH_SECONDS
        assert len(keys(agent, prefix)) == SURVIVORS
        assert all(sampler.always(host) for host in survivors.pids)
