"""The watch against a real Consul, also while agents and servers fail."""

import contextlib
import json
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from consul_matchmaker import Matchmaker
from consul_matchmaker.answers.freshness import Freshness
from consul_matchmaker.answers.watch_plan import FIT_SECONDS
from consul_matchmaker.answers.watcher import LATEST_ANSWER_SECONDS, Watcher
from consul_matchmaker.backends.http.api import ConsulApi
from consul_matchmaker.backends.kv.keys import SENTINEL
from consul_matchmaker.backends.kv.store import Kv
from consul_matchmaker.backends.service.store import Services
from consul_matchmaker.errors import Denied, Unavailable
from consul_matchmaker.model import Host, Registration, Snapshot
from consul_matchmaker.settings import Settings
from consul_matchmaker.testing.consul_probe import Node
from integration.access_rules import guarded_cluster, new_token
from integration.cluster import Cluster, ask, tell
from integration.waiting import threads_since
from tests.contract import ONE, TWO, eventually

ELECTION_SECONDS = 30.0  # an election takes about 6 s, on a loaded machine more
FRESH_SECONDS = Settings(mode="kv").ttl_seconds + LATEST_ANSWER_SECONDS
SERVERS = ("server1", "server2", "server3")


class Told:
    """Stands in for the cache: has topics in use, and keeps what the watcher tells."""

    def __init__(self, *topics: str) -> None:
        self.in_use = topics
        self.held: dict[str, tuple[Snapshot, Freshness]] = {}
        self.seen: list[tuple[str, tuple[Host, ...]]] = []
        self._changed = threading.Condition()

    def topics_in_use(self) -> tuple[str, ...]:
        return self.in_use

    def known_version(self, topic: str) -> int:
        return self.held[topic][0].version if topic in self.held else 0

    def offer(self, topic: str, snapshot: Snapshot, freshness: Freshness) -> None:
        with self._changed:
            self.held[topic] = snapshot, freshness
            self.seen.append((topic, snapshot.hosts))
            self._changed.notify_all()

    def wait_for(self, is_right: Callable[[], bool], seconds: float = 10.0) -> None:
        with self._changed:
            assert self._changed.wait_for(is_right, seconds)

    def hosts(self, topic: str) -> tuple[Host, ...]:
        return self.held[topic][0].hosts if topic in self.held else ()

    def is_fresh(self, topic: str) -> bool:
        return topic in self.held and time.monotonic() < self.held[topic][1].fresh_until


MakeKv = Callable[..., Kv]
Watch = Callable[..., tuple[Watcher, Told]]


@pytest.fixture
def watch(make_kv: MakeKv, agent: Node) -> Iterator[Watch]:
    """Have topics watched; returns when the first is fresh."""
    made: list[Watcher] = []
    before = set(threading.enumerate())  # of other tests in this process

    def start(
        *topics: str, addresses: tuple[str, ...] = (), mode: str = "kv", **values: Any
    ) -> tuple[Watcher, Told]:
        told = Told(*topics)
        backend: Kv | Services
        if mode == "kv":
            backend = make_kv(*addresses, **values)
            settings = backend._settings
        else:
            settings = Settings.from_mapping({"mode": mode, "addresses": (agent.http,)}, {})
            backend = stack.enter_context(
                contextlib.closing(Services(ConsulApi(settings), settings))
            )
        made.append(Watcher(backend, told, settings))
        made[-1].watch_more()
        if topics:
            eventually(lambda: told.is_fresh(topics[0]), bool, 10)
        return made[-1], told

    with contextlib.ExitStack() as stack:
        yield start
        for watcher in made:
            assert watcher.close(5)
    assert [one for one in threads_since(before) if "poll" in one] == []


class Counting:
    """Publishes host after host under topics, and says which a reader must know by when."""

    def __init__(self, kv: Kv, *topics: str) -> None:
        self._kv, self._topics = kv, topics
        self._lease = kv.open()
        self.published: dict[str, list[tuple[float, int]]] = {topic: [] for topic in topics}

    def publish(self, topic: str, seconds: float = ELECTION_SECONDS) -> int:
        """Publish the next host; as often as it takes."""
        port = len(self.published[topic]) + 1
        registration = Registration(topic, Host("10.0.0.1", port))

        def is_published() -> bool:
            with contextlib.suppress(Unavailable):
                self._kv.publish(self._lease, registration)
                return True
            return False

        eventually(is_published, bool, seconds)
        self.published[topic].append((time.monotonic(), port))
        return port

    def missed(self, told: Told) -> list[tuple[str, int, float]]:
        """What *told* calls fresh and does not know, though it was so at `taken_at`."""
        found = []
        for topic, published in self.published.items():
            if topic not in told.held:
                continue
            taken_at, fresh_until = told.held[topic][1].span
            known = len(told.hosts(topic))  # after it: what is told meanwhile is no fault
            if time.monotonic() >= fresh_until:
                continue
            must = max((port for at, port in list(published) if at < taken_at), default=0)
            if known < must:
                found.append((topic, must, time.monotonic() - taken_at))
        return found

    @contextlib.contextmanager
    def watched(self, told: Told) -> Iterator[None]:
        """Look all the time, and fail for what was missed."""
        missed: list[object] = []
        is_over = threading.Event()

        def look() -> None:
            while not is_over.wait(0.001):
                missed.extend(self.missed(told))

        thread = threading.Thread(target=look)
        thread.start()
        try:
            yield
        finally:
            is_over.set()
            thread.join()
        assert missed == []


# -- polls ----------------------------------------------------------------------------------------


def test_a_poll_wakes_for_a_change_and_not_without(
    kv: Kv, make_kv: MakeKv, agent: Node, prefix: str, topic: str
) -> None:
    """It comes back soon after a registration, else when its wait ends, whoever else writes."""
    poll = kv.watch(None)
    poll.poll(0, 1, None)  # leaves the sentinel
    assert ask(agent, f"/v1/kv/{prefix}/{SENTINEL}") is not None
    index = poll.poll(0, 1, None).index
    neighbours = f"{prefix}-neighbour"
    timer = threading.Timer(0.3, tell, (agent, "PUT", f"/v1/kv/{neighbours}/x", "x"))
    timer.start()
    started = time.monotonic()
    same_index = poll.poll(index, 1, None).index
    assert time.monotonic() - started >= 1
    assert same_index == index
    timer.join()
    tell(agent, "DELETE", f"/v1/kv/{neighbours}/?recurse")

    writer = make_kv()
    lease = writer.open()
    timer = threading.Timer(0.3, writer.publish, (lease, Registration(topic, ONE)))
    timer.start()
    started = time.monotonic()
    answer = poll.poll(index, 20, None)
    assert time.monotonic() - started < 5
    assert answer.index > index
    ((_, folder),) = answer.folders([topic])
    assert answer.snapshot(topic, folder).hosts == (ONE,)
    timer.join()
    writer.release(lease)
    poll.close()


def test_consul_lists_keys_in_the_order_of_their_bytes(kv: Kv, agent: Node, prefix: str) -> None:
    """Whatever strangers call them: so that a topic's keys are found by halves."""
    lease = kv.open()
    topics = ["a", "b", "ab", "a-b", "A", "9", "a b", "ä"]
    for topic in topics:
        kv.publish(lease, Registration(topic, ONE))
    for name in ("~", "a%22,", "b<x>", "%C3%A9", "Z!", "a/%5C", "a$"):
        tell(agent, "PUT", f"/v1/kv/{prefix}/{name}", "x")
    keys = [key.encode() for key in ask(agent, f"/v1/kv/{prefix}/?keys")]
    assert len(keys) == len(topics) + 7 and keys == sorted(keys)
    poll = kv.watch(None)
    answer = poll.poll(0, 1, None)
    for topic, folder in answer.folders([*topics, "nobody"]):
        hosts = (ONE,) if topic in topics else ()
        assert answer.snapshot(topic, folder).hosts == hosts
    kv.release(lease)
    poll.close()


# -- what is told ---------------------------------------------------------------------------------


@pytest.mark.parametrize("max_watches", [0, 4])
def test_a_watcher_sees_hosts_come_and_go(
    kv: Kv, watch: Watch, topic: str, max_watches: int
) -> None:
    """Registrations, withdrawals and the end of a session are told, by either plan.

    How fast is the bench's to say: `python -m integration.bench kv seen`.
    """
    _, told = watch(topic, max_watches=max_watches)
    lease = kv.open()
    kv.publish(lease, Registration(topic, ONE))
    told.wait_for(lambda: told.hosts(topic) == (ONE,))
    kv.publish(lease, Registration(topic, TWO))
    told.wait_for(lambda: told.hosts(topic) == (ONE, TWO))
    kv.withdraw(lease, Registration(topic, ONE))
    told.wait_for(lambda: told.hosts(topic) == (TWO,))
    kv.release(lease)
    told.wait_for(lambda: told.hosts(topic) == ())


@pytest.mark.parametrize("max_watches", [0, 4])
def test_each_registration_is_told(
    make_kv: MakeKv, watch: Watch, topic: str, max_watches: int
) -> None:
    """A hundred one after another, each seen by a watching reader before the next is made."""
    _, told = watch(topic, max_watches=max_watches)
    counting = Counting(make_kv(), topic)
    with counting.watched(told):
        for _ in range(100):
            port = counting.publish(topic)
            told.wait_for(lambda port=port: len(told.hosts(topic)) == port)  # type: ignore[misc]


def test_topics_come_into_use_and_leave_it_and_no_change_is_lost(
    make_kv: MakeKv, watch: Watch, topic: str
) -> None:
    """Four topics, six, four: while the plan changes, and changes back, hosts come all the time."""
    topics = tuple(f"{topic}{number}" for number in range(6))
    watcher, told = watch(*topics[:4])
    counting = Counting(make_kv(session_ttl_seconds=120), *topics)

    def publish_until(is_right: Callable[[], bool], seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while not is_right():
            assert time.monotonic() < deadline
            for each in topics:
                counting.publish(each)
        for each in topics:
            counting.publish(each)

    def is_all_known() -> bool:
        return all(len(told.hosts(t)) == len(counting.published[t]) for t in told.in_use)

    with counting.watched(told):
        publish_until(lambda: watcher.status()["watches"] == 4, 5)
        told.wait_for(is_all_known)
        told.in_use = topics
        watcher.watch_more()
        publish_until(lambda: watcher.status()["plan"] == "prefix", 10)
        publish_until(lambda: watcher.status()["watches"] == 1, 10)
        told.wait_for(is_all_known)
        told.in_use = topics[:4]
        publish_until(lambda: watcher.status()["plan"] == "folders", FIT_SECONDS + 15)
        publish_until(lambda: watcher.status()["watches"] == 4, 10)
        told.wait_for(is_all_known)
        assert all(told.is_fresh(each) for each in told.in_use)


def test_a_topic_one_may_read_is_watched_whatever_else_is_hidden(topic: str) -> None:
    """A token for one topic's folder watches that; another topic beside it is denied."""
    with guarded_cluster() as guarded:
        node = guarded.nodes["server1"]
        rules = f'key_prefix "matchmaker/{topic}/" {{ policy = "read" }}'
        _, token = new_token(node, rules)
        settings = Settings.from_mapping(
            {"mode": "kv", "addresses": (node.http,), "token": token}, {}
        )
        kv, told = Kv(ConsulApi(settings), settings), Told("hidden", topic)
        watcher = Watcher(kv, told, settings)
        watcher.watch_more()
        eventually(lambda: told.is_fresh(topic), bool, 20)
        assert "hidden" not in told.held
        with pytest.raises(Denied):
            kv.watch("hidden").poll(0, 1, None)
        assert watcher.close(5)
        kv.close()


# -- when something fails -------------------------------------------------------------------------


def test_closing_a_watcher_does_not_wait_for_its_polls(
    watch: Watch, cluster: Cluster, topic: str
) -> None:
    """close() ends polls that would wait for long, also at an agent that is frozen, and leaves no
    thread."""
    before = set(threading.enumerate())
    watcher, _ = watch(topic, f"{topic}2")
    cluster.pause("agent1")
    time.sleep(FRESH_SECONDS)  # a confirmation hangs too, perhaps
    started = time.monotonic()
    assert watcher.close(5)
    assert time.monotonic() - started < 2
    assert threads_since(before) == []


def test_a_frozen_agent_makes_answers_stale_in_time(
    watch: Watch, cluster: Cluster, topic: str
) -> None:
    """An open connection on which nothing comes proves nothing; when it goes on, so does the
    watch, and knows what happened meanwhile."""
    _, told = watch(topic)
    counting = Counting(make_writer(cluster), topic)
    port = counting.publish(topic)
    told.wait_for(lambda: len(told.hosts(topic)) == port)
    with counting.watched(told):
        cluster.pause("agent1")
        time.sleep(FRESH_SECONDS)
        assert not told.is_fresh(topic)
        port = counting.publish(topic)
        cluster.resume("agent1")
        eventually(lambda: told.is_fresh(topic), bool, ELECTION_SECONDS)
        told.wait_for(lambda: len(told.hosts(topic)) == port, 5)


def make_writer(cluster: Cluster) -> Kv:
    """A Kv over servers that nothing is done to: any but the leader."""
    leader = cluster.leader()
    addresses = [cluster.nodes[name].http for name in SERVERS if name != leader]
    values = {"mode": "kv", "addresses": addresses, "request_timeout_seconds": 2}
    values["session_ttl_seconds"] = 120  # which nobody renews
    prefix = _prefix[0]
    settings = Settings.from_mapping({**values, "prefix": prefix}, {})
    return Kv(ConsulApi(settings), settings)


_prefix: list[str] = [""]


@pytest.fixture(autouse=True)
def note_prefix(prefix: str) -> None:
    _prefix[0] = prefix


@pytest.mark.parametrize("max_watches", [0, 4])
@pytest.mark.parametrize("is_frozen", [True, False])
def test_changes_are_told_though_the_leader_is_gone(
    watch: Watch, cluster: Cluster, topic: str, is_frozen: bool, max_watches: int
) -> None:
    """Polls hang at a leader that is frozen: nothing is fresh for longer than promised that another
    leader has seen to change, and when that one confirms, polls wait there."""
    _, told = watch(topic, max_watches=max_watches)
    counting = Counting(make_writer(cluster), topic)
    port = counting.publish(topic)
    told.wait_for(lambda: len(told.hosts(topic)) == port)
    leader = cluster.leader()
    with counting.watched(told):
        (cluster.pause if is_frozen else cluster.kill)(leader)
        port = counting.publish(topic)  # another leads by now
        began = time.monotonic()
        told.wait_for(lambda: len(told.hosts(topic)) == port, FRESH_SECONDS + 10)
        print(f"told {time.monotonic() - began:.2f} s after it could be written")
        eventually(lambda: told.is_fresh(topic), bool, 10)
        port = counting.publish(topic)
        told.wait_for(lambda: len(told.hosts(topic)) == port, 2)
        if is_frozen:  # when it comes back it believes for a moment that it leads
            cluster.resume(leader)
            for _ in range(20):
                port = counting.publish(topic)
                time.sleep(0.2)
            told.wait_for(lambda: len(told.hosts(topic)) == port, FRESH_SECONDS)


def follower_between(kv: Kv, cluster: Cluster) -> str:
    """The follower by which the agent asks the leader.  An agent chooses when it starts."""
    for _ in range(20):
        for name in SERVERS:
            if name == cluster.leader():
                continue
            cluster.pause(name)
            hangs = False
            try:
                kv.lookup("nobody", timeout_seconds=1)
            except Unavailable:
                hangs = True
            finally:
                cluster.resume(name)
            cluster.wait_ready()
            if hangs and cluster.leader() != name:
                return name
        cluster.restart("agent1")
        cluster.wait_ready()
    pytest.fail("the agent asks the leader itself, always")


@pytest.mark.parametrize("mode", ["kv", "service"])
def test_a_frozen_follower_makes_answers_stale_in_time(
    watch: Watch, kv: Kv, cluster: Cluster, prefix: str, topic: str, mode: str
) -> None:
    """Where the agent asks by it, polls hang there while the leader goes on, and confirms by
    another: nothing is called fresh for longer than promised that is not so any more."""
    victim = follower_between(kv, cluster)
    _, told = watch(topic, mode=mode)
    url = f"consul+{mode}://{cluster.nodes[cluster.leader()].http}" + (
        f"/{prefix}" if mode == "kv" else ""
    )
    with Matchmaker.from_url(url) as writer:
        writer.register(topic, ONE)
        told.wait_for(lambda: told.hosts(topic) == (ONE,))
        time.sleep(0.5)  # the next poll was sent, by the server that confirmations take
        cluster.pause(victim)
        writer.register(topic, TWO).wait_until_published(timeout_seconds=5)
        began, wrong_seconds = time.monotonic(), 0.0
        while told.hosts(topic) != (ONE, TWO):
            if told.is_fresh(topic):
                wrong_seconds = time.monotonic() - began
            assert wrong_seconds < FRESH_SECONDS + 1
            assert time.monotonic() - began < ELECTION_SECONDS
            time.sleep(0.02)
        seconds = time.monotonic() - began
        print(f"told {seconds:.2f} s after the change, fresh and wrong until {wrong_seconds:.2f} s")
        eventually(lambda: told.is_fresh(topic), bool, FRESH_SECONDS)


def test_a_watcher_rides_out_an_agent_restart(
    kv: Kv, watch: Watch, cluster: Cluster, topic: str
) -> None:
    """The loss is known at once; back, the watcher tells the truth, and never an empty one."""
    _, told = watch(topic)
    lease = kv.open()
    kv.publish(lease, Registration(topic, ONE))
    told.wait_for(lambda: told.hosts(topic) == (ONE,))
    told.seen.clear()
    cluster.kill("agent1")
    eventually(lambda: told.is_fresh(topic), lambda fresh: not fresh, 1)
    cluster.start("agent1")
    eventually(lambda: told.is_fresh(topic), bool, ELECTION_SECONDS)
    eventually(lambda: _renewed(kv, lease), bool, ELECTION_SECONDS)
    assert {hosts for _, hosts in told.seen} == {(ONE,)}
    kv.publish(lease, Registration(topic, TWO))
    told.wait_for(lambda: told.hosts(topic) == (ONE, TWO))
    kv.release(lease)


def _renewed(kv: Kv, lease: Any) -> bool:
    with contextlib.suppress(Unavailable):
        kv.renew(lease)
        return True
    return False


def test_a_watcher_rides_out_the_loss_of_quorum(
    kv: Kv, watch: Watch, cluster: Cluster, topic: str
) -> None:
    """Two of three servers killed and restarted: answers turn stale in time, and none in between
    says that nobody is there.

    A server that has just restarted denies what it knows, for some seconds.
    """
    _, told = watch(topic)
    lease = kv.open()
    kv.publish(lease, Registration(topic, ONE))
    told.wait_for(lambda: told.hosts(topic) == (ONE,))
    told.seen.clear()
    victims = ("server1", "server2")
    for name in victims:
        cluster.kill(name)
    eventually(lambda: told.is_fresh(topic), lambda fresh: not fresh, FRESH_SECONDS + 1)
    for name in victims:
        cluster.start(name)
    cluster.wait_ready()
    kv.publish(lease, Registration(topic, TWO))
    told.wait_for(lambda: told.hosts(topic) == (ONE, TWO), 60)
    assert () not in {hosts for _, hosts in told.seen}
    with contextlib.suppress(Unavailable):
        kv.release(lease)


def test_a_restarted_server_that_denies_everything_is_not_believed(
    kv: Kv, watch: Watch, cluster: Cluster, topic: str
) -> None:
    """Read with consistency=stale, a server may say for seconds after its restart that there is
    nothing, with index 1 (fact A9): the watcher never passes that on."""
    follower = next(name for name in SERVERS if name != cluster.leader())
    lease = kv.open()
    kv.publish(lease, Registration(topic, ONE))
    _, told = watch(topic, addresses=(cluster.nodes[follower].http,), consistency="stale")
    told.wait_for(lambda: told.hosts(topic) == (ONE,))
    told.seen.clear()
    cluster.kill(follower)
    eventually(lambda: told.is_fresh(topic), lambda fresh: not fresh, 1)
    cluster.start(follower)
    eventually(lambda: told.is_fresh(topic), bool, ELECTION_SECONDS)

    def is_published() -> bool:  # the agent may ask the very server that is not ready yet
        with contextlib.suppress(Unavailable):
            kv.publish(lease, Registration(topic, TWO))
            return True
        return False

    eventually(is_published, bool, ELECTION_SECONDS)
    told.wait_for(lambda: told.hosts(topic) == (ONE, TWO), ELECTION_SECONDS)
    assert () not in {hosts for _, hosts in told.seen}
    kv.release(lease)


# -- what it costs --------------------------------------------------------------------------------


def test_at_rest_it_costs_the_same_however_much_others_register(
    make_kv: MakeKv, watch: Watch, agent: Node, prefix: str, topic: str
) -> None:
    """One topic of one host in use, below a kilobyte a second, with 2,000 keys of others; and a
    change of theirs is not read at all."""
    kv = make_kv()
    lease = kv.open()
    kv.publish(lease, Registration(topic, ONE))
    for number in range(0, 2000, 50):
        keys = [f"{prefix}/other{number + each}/x" for each in range(50)]
        ops = [{"KV": {"Verb": "set", "Key": key, "Value": "eA=="}} for key in keys]
        tell(agent, "PUT", "/v1/txn", json.dumps(ops))
    watcher, told = watch(topic)
    reader = watcher.backend
    time.sleep(1)
    before, began = reader.wire()["http"], time.monotonic()  # type: ignore[attr-defined]
    time.sleep(30)
    answers = watcher.status()["answers"]
    after, seconds = reader.wire()["http"], time.monotonic() - began  # type: ignore[attr-defined]
    cost = {name: (after[name] - before[name]) / seconds for name in after}
    print(cost)
    assert cost["received_bytes"] + cost["sent_bytes"] <= 1000
    tell(agent, "PUT", f"/v1/kv/{prefix}/other7/y", "x")
    time.sleep(1)
    assert watcher.status()["answers"] == answers
    assert told.is_fresh(topic)
    kv.release(lease)
