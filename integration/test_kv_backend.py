"""kv mode's backend and its watcher against a real Consul, also while agents and servers fail."""

import base64
import json
import time
import uuid
from collections.abc import Callable
from typing import Any

import pytest

from consul_matchmaker import Matchmaker
from consul_matchmaker.backends.kv.keys import Key
from consul_matchmaker.backends.kv.orphans import NOT_OURS, find_orphans, remove_orphans
from consul_matchmaker.backends.kv.store import Kv
from consul_matchmaker.errors import Denied, LeaseLost, TimedOut, Unavailable
from consul_matchmaker.model import Host, Registration
from consul_matchmaker.testing.consul_probe import Node
from integration.access_rules import guarded_cluster, new_token
from integration.cluster import Cluster, ask, tell
from tests.contract import ONE, TWO, RegistrarContract, eventually

MakeKv = Callable[..., Kv]
ELECTION_SECONDS = 30.0  # an election takes about 6 s, on a loaded machine more


class TestContract(RegistrarContract):
    """Everything a backend has to do, done by the real one."""

    @pytest.fixture
    def backend(self, kv: Kv) -> Kv:
        return kv

    @pytest.fixture
    def topic(self) -> str:
        return "scheduler"  # the prefix is of this test's own

    @pytest.fixture
    def away(self, make_kv: MakeKv) -> Kv:
        return make_kv("127.0.0.1:1")


def last_raft_index(agent: Node) -> int:
    return int(ask(agent, "/v1/agent/self")["Stats"]["raft"]["last_log_index"])


# -- sessions and keys ----------------------------------------------------------------------------


def test_the_session_is_what_we_meant(kv: Kv, agent: Node) -> None:
    """Consul stored a session without checks, without lock-delay, that deletes its keys."""
    lease = kv.open()
    (session,) = ask(agent, f"/v1/session/info/{lease.id}")
    assert (session["Behavior"], session["LockDelay"], session["TTL"]) == ("delete", 0, "10s")
    assert not session.get("NodeChecks") and not session.get("ServiceChecks")
    kv.release(lease)


def test_liveness_node_hangs_on_the_node(make_kv: MakeKv, agent: Node) -> None:
    """With liveness=node the session has the serfHealth check and no other."""
    kv = make_kv(liveness="node")
    lease = kv.open()
    (session,) = ask(agent, f"/v1/session/info/{lease.id}")
    assert session["NodeChecks"] == ["serfHealth"]
    kv.release(lease)


def test_a_ttl_below_the_servers_floor_is_explained(make_kv: MakeKv) -> None:
    """Where Consul refuses a short TTL, the error names the server setting."""
    kv = make_kv(session_ttl_seconds=1.5)
    try:
        lease = kv.open()
    except Unavailable as error:
        assert "session_ttl_min" in str(error)
    else:  # this cluster's servers allow it
        kv.release(lease)


def test_every_key_is_held_by_its_session(kv: Kv, agent: Node, prefix: str, topic: str) -> None:
    """What is published bears the session that its name says, so it leaves with it."""
    lease = kv.open()
    registration = Registration(topic, ONE, "node7")
    kv.publish(lease, registration)
    text = Key.of(registration, lease.id).under(prefix)
    (entry,) = ask(agent, f"/v1/kv/{text}")
    assert entry["Session"] == lease.id
    assert find_orphans(kv) == {}
    kv.release(lease)
    assert ask(agent, f"/v1/kv/{text}") is None


def test_a_destroyed_session_is_lost(kv: Kv, agent: Node, topic: str) -> None:
    """Destroyed by somebody else, the lease is gone, with its keys; publishing shows nothing."""
    lease = kv.open()
    kv.publish(lease, Registration(topic, ONE))
    tell(agent, "PUT", f"/v1/session/destroy/{lease.id}")
    assert kv.lookup(topic, timeout_seconds=5).hosts == ()
    with pytest.raises(Unavailable):
        kv.publish(lease, Registration(topic, ONE))
    with pytest.raises(LeaseLost):
        kv.renew(lease)


def test_a_deleted_key_is_missed_by_the_next_renewal(
    kv: Kv, agent: Node, prefix: str, topic: str
) -> None:
    """Renewing proves each key, of many, not only the session."""
    lease = kv.open()
    mine = [Registration(topic, Host("10.0.0.1", port)) for port in range(1, 101)]
    for registration in mine:
        kv.publish(lease, registration)
    assert set(kv.renew(lease)) == set(mine)
    for gone in (mine[0], mine[70]):
        text = Key.of(gone, lease.id).under(prefix)
        tell(agent, "DELETE", f"/v1/kv/{text}")
    assert set(kv.renew(lease)) == set(mine) - {mine[0], mine[70]}
    kv.release(lease)


def test_a_key_without_a_session_is_an_orphan(kv: Kv, agent: Node, prefix: str, topic: str) -> None:
    """What nobody will remove is found: a lock that was given back, and a foreign key."""
    lease = kv.open()
    registration = Registration(topic, ONE)
    kv.publish(lease, registration)
    text = Key.of(registration, lease.id).under(prefix)
    tell(agent, "PUT", f"/v1/kv/{text}?release={lease.id}")
    tell(agent, "PUT", f"/v1/kv/{prefix}/rubbish", "x")
    found = {key: orphan.reason for key, orphan in find_orphans(kv).items()}
    assert found == {text: "held by no session", f"{prefix}/rubbish": NOT_OURS}
    assert set(kv.renew(lease)) == set()
    kv.release(lease)


@pytest.mark.finding("B1")
@pytest.mark.finding("E6")
@pytest.mark.finding("E7")
def test_sweep_says_what_it_did(kv: Kv, agent: Node, prefix: str, topic: str) -> None:
    """Of keys of every kind those are gone that it names, and no other, however large they are."""
    lease = kv.open()
    kv.publish(lease, Registration(topic, ONE))
    lost = [Key(topic, TWO, str(uuid.uuid4())).under(prefix) for _ in range(70)]
    strange = ["..", "./x", "a%2fb", "a b", "q?x=1", "h#x", "eu/_", "ü", "a/b/c", "a/b/c/d/e"]
    # By transactions: keys in paths are tidied up by Consul.
    put_all(agent, lost[:60])
    put_all(agent, [*lost[60:], *(f"{prefix}/{each}" for each in strange)])
    for number in range(180):  # 70 MB of values: more than any answer may have
        put_all(agent, [f"{prefix}/big/{number}"], b"x" * 390_000)
    before = set(ask(agent, f"/v1/kv/{prefix}/?keys"))
    found = find_orphans(kv)
    assert {key for key, orphan in found.items() if orphan.is_ours} == set(lost)
    assert remove_orphans(kv, found) == sorted(lost)
    assert before - set(ask(agent, f"/v1/kv/{prefix}/?keys")) == set(lost)
    kv.release(lease)


def put_all(agent: Node, keys: list[str], value: bytes = b"x") -> None:
    said = base64.b64encode(value).decode()
    wanted = [{"KV": {"Verb": "set", "Key": key, "Value": said}} for key in keys]
    tell(agent, "PUT", "/v1/txn", json.dumps(wanted))


def test_renewing_writes_nothing_to_raft(kv: Kv, agent: Node, cluster: Cluster, topic: str) -> None:
    """100 renewals of 100 registrations move the Raft index no more than the idle cluster does."""
    lease = kv.open()
    for port in range(1, 101):
        kv.publish(lease, Registration(topic, Host("10.0.0.1", port)))
    server = cluster.nodes[cluster.leader()]
    before = last_raft_index(server)
    for _ in range(100):
        assert len(kv.renew(lease)) == 100
    # The idle cluster writes a few entries by itself: coordinates, autopilot.
    assert last_raft_index(server) - before <= 5
    kv.release(lease)


def test_a_restarted_process_and_its_predecessor_do_not_meet(
    kv: Kv, make_kv: MakeKv, topic: str
) -> None:
    """The successor at the same host:port is seen at once and stays when the dead one expires."""
    registration = Registration(topic, ONE)
    dead = make_kv()
    dead_lease = dead.open()
    dead.publish(dead_lease, registration)
    lease = kv.open()
    kv.publish(lease, registration)
    assert kv.lookup(topic, timeout_seconds=5).hosts == (ONE,)
    dead.release(dead_lease)
    assert kv.lookup(topic, timeout_seconds=5).hosts == (ONE,)
    assert set(kv.renew(lease)) == {registration}
    kv.release(lease)


# -- agents and servers that fail -----------------------------------------------------------------


def test_a_killed_agent_is_unavailable_and_then_back(kv: Kv, cluster: Cluster, topic: str) -> None:
    """Without its agent every verb is Unavailable at once; with it back, the lease still lives."""
    lease = kv.open()
    registration = Registration(topic, ONE)
    kv.publish(lease, registration)
    cluster.kill("agent1")
    started = time.monotonic()
    verbs: list[Callable[[], object]] = [
        lambda: kv.lookup(topic, timeout_seconds=5),
        lambda: kv.renew(lease),
        kv.topics,
        kv.open,
    ]
    for verb in verbs:
        with pytest.raises(Unavailable):
            verb()
    assert time.monotonic() - started < 10
    cluster.start("agent1")
    held = eventually(lambda: _renewed(kv, lease), bool, ELECTION_SECONDS)
    assert held == {registration}
    assert kv.lookup(topic, timeout_seconds=5).hosts == (ONE,)
    kv.release(lease)


def _renewed(kv: Kv, lease: Any) -> set[Registration]:
    try:
        return set(kv.renew(lease))
    except Unavailable:
        return set()


def test_a_paused_agent_times_out(make_kv: MakeKv, cluster: Cluster, topic: str) -> None:
    """An agent that accepts and says nothing holds a call no longer than its timeout."""
    kv = make_kv(request_timeout_seconds=1)
    kv.lookup(topic, timeout_seconds=5)
    cluster.pause("agent1")
    started = time.monotonic()
    with pytest.raises(TimedOut):
        kv.lookup(topic, timeout_seconds=5)
    assert time.monotonic() - started < 5
    cluster.resume("agent1")
    assert eventually(lambda: _looked_up(kv, topic), bool)


def _looked_up(kv: Kv, topic: str) -> bool:
    try:
        kv.lookup(topic, timeout_seconds=5)
    except Unavailable:
        return False
    return True


def test_a_second_address_takes_over(
    make_kv: MakeKv, agent: Node, cluster: Cluster, topic: str
) -> None:
    """The agent killed, the next call goes to the other address, under the same lease."""
    other = cluster.nodes["server1"]
    kv = make_kv(agent.http, other.http)
    lease = kv.open()
    registration = Registration(topic, ONE)
    kv.publish(lease, registration)
    cluster.kill("agent1")
    assert set(kv.renew(lease)) == {registration}
    assert kv.lookup(topic, timeout_seconds=5).hosts == (ONE,)
    assert kv.status()["agent"] == other.http
    kv.release(lease)


def test_a_paused_agent_costs_one_timeout(
    make_kv: MakeKv, agent: Node, cluster: Cluster, topic: str
) -> None:
    """With another address at hand, one call waits, and none after it."""
    kv = make_kv(agent.http, cluster.nodes["server1"].http, request_timeout_seconds=2)
    kv.lookup(topic, timeout_seconds=5)
    cluster.pause("agent1")
    kv.lookup(topic, timeout_seconds=5)
    started = time.monotonic()
    for _ in range(10):
        kv.lookup(topic, timeout_seconds=5)
    assert time.monotonic() - started < 2  # one that waited would have taken as long
    assert kv.status()["agents_away"] == [agent.http]


def test_a_lost_leader_never_looks_like_a_lost_lease(kv: Kv, cluster: Cluster, topic: str) -> None:
    """While a leader is elected renewals may fail, but none says that the lease is gone."""
    lease = kv.open()
    registration = Registration(topic, ONE)
    kv.publish(lease, registration)
    cluster.kill(cluster.leader())
    failures = 0
    deadline = time.monotonic() + ELECTION_SECONDS
    while time.monotonic() < deadline:
        try:
            held = kv.renew(lease)  # LeaseLost would fail the test
        except Unavailable:
            failures += 1
        else:
            assert set(held) == {registration}
            break
    else:
        pytest.fail(f"no renewal succeeded after {failures} failures")
    assert kv.lookup(topic, timeout_seconds=5).hosts == (ONE,)
    kv.release(lease)


def test_what_people_see_in_the_ui(kv: Kv, agent: Node, prefix: str, topic: str) -> None:
    """A key's value says in JSON who registered what, where and when."""
    lease = kv.open()
    registration = Registration(topic, ONE, "node7")
    kv.publish(lease, registration)
    text = Key.of(registration, lease.id).under(prefix)
    assert ask(agent, f"/v1/kv/{text}?raw")["server"] == "node7"
    kv.release(lease)


@pytest.mark.finding("D13")
def test_where_the_servers_ask_for_list_a_reader_needs_it() -> None:
    """With `acl.enable_key_list_policy` a token that may only read is refused, which is not taken
    for a topic without hosts; one that may list looks up, as docs/kv-mode.md says."""
    with guarded_cluster(enable_key_list_policy=True) as cluster:
        node = cluster.nodes["server1"]
        with _reader(node, "read") as reader, pytest.raises(Denied):
            reader.hosts("scheduler")
        with _reader(node, "list") as reader:
            assert list(reader.hosts("scheduler")) == []


def _reader(node: Node, policy: str) -> Matchmaker:
    _, token = new_token(node, f'key_prefix "listed/" {{ policy = "{policy}" }}')
    return Matchmaker.from_url(f"consul+kv://:{token}@{node.http}/listed?watch=no")
