"""What kv mode says to Consul and how it reads the answers; against a Consul made of two dicts.

That the real one behaves like this is shown in integration/test_kv_backend.py.
"""

import contextlib
import json
import logging
import time
import tracemalloc
import uuid
from urllib.parse import unquote

import pytest
from hypothesis import given
from hypothesis import strategies as st

from consul_matchmaker.backends.http.api import Answer, TooLarge
from consul_matchmaker.backends.http.exchange import MAX_ANSWER_BYTES
from consul_matchmaker.backends.kv.keys import Key
from consul_matchmaker.backends.kv.orphans import NOT_OURS, find_orphans, remove_orphans
from consul_matchmaker.backends.kv.poll import PIECE_BYTES, PROOF_SECONDS, Polled
from consul_matchmaker.backends.kv.reader import REMEMBERED_KEYS, REMEMBERED_LENGTH
from consul_matchmaker.backends.kv.session_checks import CHECKS_PER_REQUEST
from consul_matchmaker.backends.kv.store import Kv
from consul_matchmaker.backends.watching import Route
from consul_matchmaker.errors import Denied, LeaseLost, TimedOut, Unavailable
from consul_matchmaker.model import Host, Instance, Lease, Registration
from consul_matchmaker.settings import Settings

from .contract import ONE, TWO, RegistrarContract
from .doubles import ManualClock

PREFIX = "matchmaker"
SENTINEL = "matchmaker/_"
FAKE = Host("fake", 8500)


class FakeConsul:
    """Plays ConsulApi: the part of Consul that kv mode uses, as measured on 1.8.7."""

    def __init__(self):
        self.clock = time.monotonic
        self.token_changes = 0
        self.sessions = {}
        self.services = {}  # id -> what was registered
        self.passes = []  # when each beat came is the clock's affair
        self.hows = []  # the rest of each call: at, timeout_seconds
        self.keys = {}  # key -> [value, session]
        self.indexes = {}  # key -> its ModifyIndex, where that matters
        self.index = 10
        self.calls = []  # (method, path, params)
        self.bodies = []
        self.failures = {}  # (method, beginning of the path) -> error
        self.hidden = ()  # beginnings of keys that ACLs hide
        self.says_filtered = False
        self.leader = "10.0.0.2:8300"
        self.closes = self.interrupts = 0

    def call(self, method, path, params=None, body=b"", *, accept=(), line=None, **how):
        params, asked_at = dict(params or {}), self.clock()
        assert line in (None, self)
        self.calls.append((method, path, params))
        self.bodies.append(body)
        self.hows.append(how)
        for (verb, start), error in self.failures.items():
            if method == verb and path.startswith(start):
                raise error
        status, said = self._do(method, path, params, body)
        where = f"{method} {path} at fake:8500"
        if status == 403:
            raise Denied(where)
        if status != 200 and status not in accept:
            raise Unavailable(f"{where}: status {status}")
        raw = said if isinstance(said, bytes) else json.dumps(said).encode()
        return Answer(status, raw, self.index, self.says_filtered, where, FAKE, asked_at=asked_at)

    def line(self):
        return self

    def interrupt(self):
        self.interrupts += 1

    def status(self):
        return {"agent": "fake:8500"}

    def close(self):
        self.closes += 1

    def _do(self, method, path, params, body):
        verb, _, rest = path.removeprefix("/v1/").partition("/")
        if verb == "session":
            return self._session(*rest.split("/"), body=body)
        if verb == "agent":
            return self._agent(*rest.split("/"), body=body)
        if verb == "status":
            return 200, self.leader
        if verb == "txn":
            return self._txn(json.loads(body))
        if method == "PUT":
            return self._put(rest, params, body)
        if method == "DELETE":
            return self._delete(unquote(rest), params)
        return self._get(rest, params)

    def _agent(self, kind, verb, service_id=None, body=b""):
        if verb == "register":
            service = json.loads(body)
            self.services[service["ID"]] = service
        elif verb == "deregister":
            self.services.pop(service_id, None)
        elif service_id in self.services:
            self.passes.append(service_id)
        else:
            return 500, b"CheckID does not have associated TTL"
        return 200, b""

    def _session(self, verb, session_id=None, body=b""):
        if verb == "create":
            session_id = str(uuid.uuid4())
            self.sessions[session_id] = json.loads(body)
            return 200, {"ID": session_id}
        if verb == "destroy":
            self.end(session_id)
            return 200, True
        if session_id not in self.sessions:
            return 404, b"Session id not found"
        return 200, [self.sessions[session_id]]

    def end(self, session_id):
        self.sessions.pop(session_id, None)
        for key in [key for key, (_, holder) in self.keys.items() if holder == session_id]:
            del self.keys[key]
        self.index += 1

    def _txn(self, operations):
        assert len(operations) <= 64
        errors = [
            {"OpIndex": number, "What": "Permission denied"}
            for number, operation in enumerate(operations)
            if self.hidden and operation["KV"]["Key"].startswith(self.hidden)
        ]
        if errors:  # and none of the others is done
            return 409, {"Errors": errors}
        for number, operation in enumerate(operations):
            check = operation["KV"]
            assert check["Verb"] == "check-session"
            if self.keys.get(check["Key"], [None, None])[1] != check["Session"]:
                errors.append({"OpIndex": number, "What": "some text"})
        return (409, {"Errors": errors}) if errors else (200, {"Results": [], "Errors": None})

    def _put(self, key, params, body):
        self.index += 1
        if "cas" in params:
            if key in self.keys:
                return 200, False
            self.keys[key] = [body, None]
            return 200, True
        session = params["acquire"]
        if session not in self.sessions:
            return 500, b"invalid session"
        if self.keys.get(key, [None, session])[1] != session:
            return 200, False
        self.keys[key] = [body, session]
        return 200, True

    def _delete(self, key, params):
        self.index += 1
        if "cas" in params and params["cas"] != str(self.indexes.get(key, 1)):
            return 200, False
        for each in list(self.keys):
            if each == key or ("recurse" in params and each.startswith(key)):
                del self.keys[each]
        return 200, True

    def _get(self, key, params):
        def is_hidden(each):
            return bool(self.hidden) and each.startswith(self.hidden)

        if not set(params) - {"stale", "consistent"}:
            if is_hidden(key):
                return 403, b"Permission denied"
            if key not in self.keys:
                return 404, b""
            entry = {"Key": key, "Value": None, "ModifyIndex": self.indexes.get(key, 1)}
            holder = self.keys[key][1]
            return 200, [entry | ({"Session": holder} if holder else {})]
        found = sorted(each for each in self.keys if each.startswith(key) and not is_hidden(each))
        if "recurse" in params:
            entries = [self._get(each, {})[1][0] for each in found]
            return (200, entries) if entries else (404, b"")
        return (200, found) if found else (404, b"")


@pytest.fixture
def consul():
    return FakeConsul()


def kv_over(consul, **settings):
    consul.clock = clock = settings.pop("clock", None) or ManualClock()
    return Kv(consul, Settings(mode="kv", **settings), clock=clock)


@pytest.fixture
def kv(consul):
    return kv_over(consul)


class TestContract(RegistrarContract):
    """Everything a backend has to do."""

    @pytest.fixture
    def backend(self, kv):
        return kv

    @pytest.fixture
    def topic(self):
        return "scheduler"

    @pytest.fixture
    def away(self, consul):
        consul = FakeConsul()
        consul.failures["GET", "/"] = Unavailable("nobody there")
        return kv_over(consul)


# -- leases ---------------------------------------------------------------------------------------


def test_a_session_takes_its_keys_along_and_hangs_on_its_ttl_alone(consul, kv):
    """Deleted at once when it ends, no lock-delay, no serfHealth, and the TTL as Go writes it."""
    lease = kv.open()
    assert consul.sessions[lease.id] == {
        "Name": "consul-matchmaker",
        "TTL": "10s",
        "Behavior": "delete",
        "LockDelay": "0s",
        "Checks": [],
        "NodeChecks": [],
    }
    assert lease.ttl_seconds == 10


def test_liveness_node_adds_the_node_check(consul):
    """A dead node then ends the session without waiting for the TTL."""
    lease = kv_over(consul, liveness="node").open()
    assert consul.sessions[lease.id]["NodeChecks"] == ["serfHealth"]


def test_liveness_check_hangs_on_a_service_of_ours(consul):
    """The session is made where the service with its TTL check is, and bound to both checks."""
    kv = kv_over(consul, liveness="check")
    lease = kv.open()
    ((service_id, service),) = consul.services.items()
    assert service["Check"]["TTL"] == "1s"
    assert service["Check"]["Status"] == "passing"
    assert service["Check"]["DeregisterCriticalServiceAfter"] == "1m"
    session = consul.sessions[lease.id]
    assert session["NodeChecks"] == ["serfHealth"]
    assert session["ServiceChecks"] == [{"ID": service_id}]
    assert consul.hows[-1]["at"] == FAKE
    kv.release(lease)
    assert consul.services == {}
    kv.close()


def test_other_leases_need_no_service(consul, kv):
    """session and node: nothing but renewals is ever sent."""
    kv.open()
    assert consul.services == {}


def test_a_short_ttl_that_consul_refuses_is_explained(consul):
    """Below 10 s the error names the server setting that has to allow it."""
    consul.failures["PUT", "/v1/session/create"] = Unavailable("status 500")
    with pytest.raises(Unavailable, match="session_ttl_min"):
        kv_over(consul, session_ttl_seconds=5).open()
    with pytest.raises(Unavailable) as caught:
        kv_over(consul).open()
    assert "session_ttl_min" not in str(caught.value)


def test_a_fractional_ttl_is_written_in_milliseconds(consul):
    """1.5 seconds are 1500ms for Consul."""
    lease = kv_over(consul, session_ttl_seconds=1.5).open()
    assert consul.sessions[lease.id]["TTL"] == "1500ms"


@pytest.mark.parametrize("error", [Unavailable("500"), TimedOut("late"), Denied("403")])
def test_only_a_404_says_that_the_lease_is_gone(consul, kv, error):
    """5xx, timeouts and refusals of a renewal leave the lease in doubt, not lost."""
    lease = kv.open()
    consul.failures["PUT", "/v1/session/renew"] = error
    with pytest.raises(type(error)):
        kv.renew(lease)
    consul.failures.clear()
    kv.renew(lease)
    consul.end(lease.id)
    with pytest.raises(LeaseLost):
        kv.renew(lease)


@pytest.mark.parametrize("body", [b"", b"[]", b"null", b'{"ID": 5}', b'{"ID": ""}', b"<html>"])
def test_an_answer_without_a_session_is_no_lease(kv, consul, body):
    """What does not name a session is Unavailable."""
    consul._session = lambda *path, body: (200, answer)
    answer = body
    with pytest.raises(Unavailable):
        kv.open()


# -- publishing -----------------------------------------------------------------------------------


def test_the_key_says_all_and_the_value_is_for_people(consul, kv):
    """Topic, host, lease and server are in the key; the value is JSON nobody reads back."""
    lease = kv.open()
    registration = Registration("scheduler", ONE, "node7")
    kv.publish(lease, registration)
    (text,) = consul.keys
    assert Key.parse(PREFIX, text) == Key("scheduler", ONE, lease.id, "node7")
    value = json.loads(consul.keys[text][0])
    assert set(value) == {"topic", "host", "server", "pid", "hostname", "registered_at"}
    assert (value["topic"], value["host"], value["server"]) == ("scheduler", str(ONE), "node7")


def test_nothing_is_ever_written_without_a_session(consul, kv):
    """Every registration's key is written by acquire, so that it leaves with its lease."""
    lease = kv.open()
    kv.publish(lease, Registration("scheduler", ONE))
    puts = [params for method, path, params in consul.calls if path.startswith("/v1/kv")]
    assert puts == [{"acquire": lease.id}]


def test_a_key_held_by_somebody_else_is_not_published(consul, kv):
    """Consul's `false`, which comes with status 200, is a failure."""
    lease = kv.open()
    key = Key("scheduler", ONE, lease.id).under(PREFIX)
    consul.keys[key] = [b"", "another session"]
    with pytest.raises(Unavailable, match="held"):
        kv.publish(lease, Registration("scheduler", ONE))


def test_verification_finds_a_deleted_key(consul, kv):
    """A key that was deleted behind our back is not reported as held, though the session lives."""
    lease = kv.open()
    mine = [Registration("scheduler", ONE), Registration("worker", ONE), Registration("x", TWO)]
    for registration in mine:
        kv.publish(lease, registration)
    assert set(kv.renew(lease)) == set(mine)
    del consul.keys[Key.of(mine[1], lease.id).under(PREFIX)]
    assert set(kv.renew(lease)) == {mine[0], mine[2]}


def test_verification_finds_a_key_that_lost_its_session(consul, kv):
    """A key that is there but held by nobody would outlive us: it does not count as held."""
    lease = kv.open()
    registration = Registration("scheduler", ONE)
    kv.publish(lease, registration)
    consul.keys[Key.of(registration, lease.id).under(PREFIX)][1] = None
    assert set(kv.renew(lease)) == set()


@pytest.mark.parametrize(
    ("count", "requests"), [(0, 0), (1, 1), (CHECKS_PER_REQUEST, 1), (CHECKS_PER_REQUEST + 1, 2)]
)
def test_verification_takes_one_request_for_64_keys(consul, kv, count, requests):
    """However many others registered, a renewal asks for our own keys only, 64 at a time."""
    lease, other = kv.open(), kv_over(consul)
    mine = {Registration(f"t{number}", ONE) for number in range(count)}
    for registration in mine:
        kv.publish(lease, registration)
    other_lease = other.open()
    for number in range(50):
        other.publish(other_lease, Registration(f"t{number}", TWO))
    consul.calls.clear()
    assert set(kv.renew(lease)) == mine
    assert [path for _, path, _ in consul.calls] == [f"/v1/session/renew/{lease.id}"] + [
        "/v1/txn"
    ] * requests


def test_a_publication_of_unknown_outcome_is_verified_too(consul, kv):
    """A PUT whose answer was lost may have worked: renew() says whether it did."""
    lease = kv.open()
    registration = Registration("scheduler", ONE)
    consul.failures["PUT", "/v1/kv"] = TimedOut("no answer")
    with pytest.raises(TimedOut):
        kv.publish(lease, registration)
    assert set(kv.renew(lease)) == set()
    consul.keys[Key.of(registration, lease.id).under(PREFIX)] = [b"", lease.id]
    assert set(kv.renew(lease)) == {registration}


@pytest.mark.parametrize("body", [b"", b"null", b'{"Errors": null}', b'{"Errors": [{}]}', b"[1]"])
def test_a_strange_verification_proves_nothing(consul, kv, body):
    """A 409 that does not say which keys failed is no answer: neither held nor lost."""
    lease = kv.open()
    registration = Registration("scheduler", ONE)
    kv.publish(lease, registration)
    consul._txn = lambda operations: (409, body)
    found = kv.renew(lease)
    assert (set(found), found.unchecked) == (set(), {registration})


@pytest.mark.finding("E2")
@pytest.mark.parametrize("error", [Unavailable("status 413"), TimedOut("late"), Denied("403")])
def test_a_failed_check_after_a_good_renewal_is_no_failed_renewal(consul, kv, error, caplog):
    """The lease is renewed, of the keys nothing is known; said once until checks work again."""
    lease = kv.open()
    mine = {Registration(f"t{number}", ONE) for number in range(CHECKS_PER_REQUEST + 1)}
    for registration in mine:
        kv.publish(lease, registration)
    consul.failures["PUT", "/v1/txn"] = error
    for _ in range(2):
        found = kv.renew(lease)
        assert (set(found), found.unchecked) == (set(), mine)
    assert len(caplog.records) == 1
    consul.failures.clear()
    assert set(kv.renew(lease)) == mine


@pytest.mark.finding("E2")
def test_checks_are_split_by_their_bytes(consul, kv):
    """No transaction is larger than the 512 KiB that Consul takes, however long the keys are."""
    lease = kv.open()
    mine = {
        Registration(f"{number:03}" + "x" * 20_000, ONE) for number in range(CHECKS_PER_REQUEST)
    }
    for registration in mine:
        kv.publish(lease, registration)
    consul.bodies.clear()
    assert set(kv.renew(lease)) == mine
    assert max(map(len, consul.bodies)) <= 512 * 1024
    assert len(consul.bodies) <= 5


@pytest.mark.finding("E2", "E7")
def test_long_keys_of_others_do_not_stop_a_sweep(consul, kv):
    """Its checks are split by their bytes too; keys longer than we write are left alone."""
    lease = "11111111-1111-1111-1111-111111111111"
    long = [f"{PREFIX}/{number:03}{'x' * 7_000}/10-0-0-1_3a9501/{lease}" for number in range(200)]
    consul.keys.update({key: [b"", None] for key in long})
    consul.keys[f"{PREFIX}/{'x' * 600_000}/10-0-0-1_3a9501/{lease}"] = [b"", None]
    consul.bodies.clear()
    found = orphans_of(kv)
    assert max(map(len, consul.bodies)) <= 512 * 1024
    assert len(found) == 201
    assert list(found.values()).count(NOT_OURS) == 1


@pytest.mark.finding("E1")
def test_a_check_beside_one_that_may_not_be_made_is_asked_again(consul, kv):
    """Consul names only what the token may not read and looks at nothing else: a key that was
    deleted beside it is found all the same."""
    lease = kv.open()
    forbidden, deleted, well = (Registration(topic, ONE) for topic in ("a", "b", "c"))
    for registration in (forbidden, deleted, well):
        kv.publish(lease, registration)
    consul.hidden = (f"{PREFIX}/a/",)
    del consul.keys[Key.of(deleted, lease.id).under(PREFIX)]
    assert set(kv.renew(lease)) == {well}


# -- reading --------------------------------------------------------------------------------------


def test_a_lookup_is_one_request_for_keys(consul, kv):
    """No value is fetched, and no more than the topic's own folder."""
    lease = kv.open()
    kv.publish(lease, Registration("scheduler", ONE))
    consul.calls.clear()
    kv.lookup("scheduler", timeout_seconds=5)
    assert consul.calls == [("GET", "/v1/kv/matchmaker/scheduler/", {"keys": ""})]


@pytest.mark.parametrize("consistency", ["stale", "consistent"])
def test_the_consistency_is_asked_for(consul, consistency):
    """Other than the default it is said at each read."""
    kv_over(consul, consistency=consistency).lookup("scheduler", timeout_seconds=5)
    assert consul.calls[0][2] == {"keys": "", consistency: ""}


def test_two_incarnations_are_one_instance(consul, kv):
    """While the predecessor's session lives, a restarted process is still one host."""
    for _ in range(2):
        kv.publish(kv.open(), Registration("scheduler", ONE, "node7"))
    assert kv.lookup("scheduler", timeout_seconds=5).instances == (Instance(ONE, "node7"),)


def test_answers_carry_time_and_source(consul):
    """A snapshot's age runs on the injected clock."""
    clock = ManualClock()
    snapshot = kv_over(consul, clock=clock).lookup("scheduler", timeout_seconds=5)
    clock.advance(3)
    assert (snapshot.age_seconds, snapshot.source) == (3, "kv")


class SlowConsul(FakeConsul):
    """Every call takes its time, by the clock of whoever asks."""

    def call(self, method, path, *rest, **how):
        answer = super().call(method, path, *rest, **how)
        self.clock.advance(6)
        return answer


@pytest.mark.finding("A1")
@pytest.mark.parametrize("topics", [("scheduler",), ()])
def test_an_answer_is_as_old_as_its_question(topics):
    """What Consul took to answer counts, and so does every request that was needed besides: to
    prove that nothing is hidden, and to write the sentinel."""
    consul, clock = SlowConsul(), ManualClock()
    kv = kv_over(consul, clock=clock)
    for topic in topics:
        kv.publish(kv.open(), Registration(topic, ONE))
    asked_at = clock()
    assert kv.lookup("scheduler", timeout_seconds=5).taken_at == asked_at
    asked_at = clock()
    _, snapshots = polled(kv.watch(None), *topics)
    assert clock() == asked_at + 18
    assert [each.age_seconds for each in snapshots.values()] == [18] * len(topics)


@pytest.mark.finding("A7")
def test_a_stale_read_of_an_empty_topic_asks_nothing_of_the_leader(consul):
    """The proof that nothing is hidden is read as the answer was."""
    assert kv_over(consul, consistency="stale").lookup("scheduler", timeout_seconds=5).hosts == ()
    assert [params for _, _, params in consul.calls] == [{"keys": "", "stale": ""}, {"stale": ""}]


@pytest.mark.finding("D9")
def test_a_reader_proves_its_rights_once_in_a_while(consul):
    """Without a sentinel, a poll that lacks nothing of the last one costs no second request; what
    is missing, another token and a minute do."""
    clock = ManualClock()
    kv = kv_over(consul, clock=clock)
    consul.failures["PUT", "/v1/kv/matchmaker/_"] = Denied("read only")
    lease = kv.open()
    kv.publish(lease, Registration("scheduler", ONE))
    poll = kv.watch(None)

    def proofs(polls):
        consul.calls.clear()
        for _ in range(polls):
            poll.poll(0, 1, FAKE)
        return sum(
            (method, path) == ("GET", f"/v1/kv/{SENTINEL}") for method, path, _ in consul.calls
        )

    assert proofs(10) == 1
    kv.publish(lease, Registration("scheduler", TWO))
    assert proofs(10) == 0
    kv.withdraw(lease, Registration("scheduler", TWO))
    assert proofs(10) == 1
    consul.token_changes += 1
    assert proofs(10) == 1
    clock.advance(PROOF_SECONDS)
    assert proofs(10) == 1
    consul.hidden = ("matchmaker/",)
    for _ in range(3):
        with pytest.raises(Denied):
            poll.poll(0, 1, FAKE)


@pytest.mark.finding("E9")
def test_long_foreign_keys_are_not_kept_in_memory(consul, kv, caplog):
    """Whoever rewrites long keys under the prefix fills neither our memory nor our log."""
    tracemalloc.start()
    try:
        poll = kv.watch(None)
        for number in range(20):
            consul.keys = {
                f"matchmaker/scheduler/{number}-{each}-{'x' * 20_000}": [b"", None]
                for each in range(10)
            }
            assert polled(poll, "scheduler")[1]["scheduler"].hosts == ()
            assert kv.lookup("scheduler", timeout_seconds=5).hosts == ()
        consul.keys.clear()
        consul.calls.clear()
        consul.bodies.clear()
        assert tracemalloc.get_traced_memory()[0] < 500_000
    finally:
        tracemalloc.stop()
    assert caplog.records
    assert len(caplog.text) < 500


def test_foreign_keys_are_ignored_counted_and_said_once(consul, kv, caplog):
    """Somebody else's key under the prefix is no host, and no flood of log lines."""
    kv.publish(kv.open(), Registration("scheduler", ONE))
    consul.keys["matchmaker/scheduler/rubbish"] = [b"", None]
    consul.keys["matchmaker/scheduler/10.0.0.1:5/x"] = [b"", None]
    for _ in range(3):
        assert kv.lookup("scheduler", timeout_seconds=5).hosts == (ONE,)
    assert len(caplog.records) == 1
    assert caplog.records[0].levelno == logging.WARNING
    assert kv.status() == {"agent": "fake:8500", "unknown_keys": 2}


@pytest.mark.finding("E9")
def test_a_long_foreign_key_is_shortened_in_the_log(consul, kv, caplog):
    """A stranger's key of half a megabyte is no log line."""
    consul.keys["matchmaker/scheduler/" + "x" * 500_000] = [b"", None]
    kv.lookup("scheduler", timeout_seconds=5)
    assert len(caplog.text) < 1000


@pytest.mark.parametrize("body", [b"", b"{}", b"null", b"[1]", b'["a", null]', b'"text"', b"<ht"])
def test_an_answer_that_is_no_list_of_keys_is_unavailable(consul, kv, body):
    """A foreign answer is never taken for "no hosts"."""
    consul._get = lambda key, params: (200, body)
    for ask in (
        lambda: kv.lookup("t", timeout_seconds=5),
        kv.topics,
        lambda: polled(kv.watch(None), "t"),
        lambda: find_orphans(kv),
    ):
        with pytest.raises(Unavailable):
            ask()


def test_what_acls_hide_is_denied_not_empty(consul, kv):
    """Consul answers 404 where the token may not list: asking for one key tells the difference."""
    kv.publish(kv.open(), Registration("scheduler", ONE))
    consul.hidden = ("matchmaker/",)
    for ask in (
        lambda: kv.lookup("scheduler", timeout_seconds=5),
        kv.topics,
        lambda: polled(kv.watch(None), "t"),
        lambda: find_orphans(kv),
    ):
        with pytest.raises(Denied):
            ask()


def test_what_newer_consul_says_it_hid_is_denied(consul, kv):
    """Since 1.11 an answer says that ACLs removed something: an empty one then proves nothing."""
    consul.says_filtered = True
    with pytest.raises(Denied, match="key_prefix"):
        kv.lookup("scheduler", timeout_seconds=5)


def test_a_poll_that_sees_only_some_topics_is_denied(consul, kv):
    """A topic hidden by ACLs must not look as if nobody served it."""
    lease = kv.open()
    kv.publish(lease, Registration("scheduler", ONE))
    kv.publish(lease, Registration("secret", ONE))
    poll = kv.watch(None)
    consul.hidden = ("matchmaker/secret/", SENTINEL)
    with pytest.raises(Denied):
        polled(poll)
    consul.hidden, consul.says_filtered = (), True
    with pytest.raises(Denied):
        polled(poll)


def test_a_watch_of_a_topic_one_may_read_needs_no_other_right(consul, kv):
    """Also when it is empty; one that may not be read is denied, not empty."""
    consul.hidden = ("matchmaker/secret/", SENTINEL)
    assert polled(kv.watch("scheduler"), "scheduler")[1]["scheduler"].hosts == ()
    assert kv.confirmer().confirm("scheduler", 3) == Route(FAKE, consul.leader)
    kv.publish(kv.open(), Registration("secret", ONE))
    for ask in (lambda: polled(kv.watch("secret")), lambda: kv.confirmer().confirm("secret", 3)):
        with pytest.raises(Denied):
            ask()


def test_a_topic_one_may_read_is_empty_though_others_are_hidden(consul, kv):
    """Rights are looked at where the question was asked."""
    consul.hidden = ("matchmaker/secret/", "matchmaker/_")
    assert kv.lookup("scheduler", timeout_seconds=5).hosts == ()


class Counting(Kv):
    """Counts how many keys it takes apart."""

    parses = 0

    def _parse(self, text):
        self.parses += 1
        return super()._parse(text)


@pytest.mark.finding("C2")
def test_one_key_more_than_are_remembered_costs_about_one_key_more():
    """An answer that lists a few keys too many still finds nearly all others remembered."""
    lease, extra = str(uuid.uuid4()), 100
    keys = [
        Key("scheduler", Host("10.0.0.1", number % 60000 + 1), lease, f"s{number}").under(PREFIX)
        for number in range(REMEMBERED_KEYS + extra)
    ]
    consul = FakeConsul()
    consul._get = lambda key, params: (200, keys)
    kv = Counting(consul, Settings(mode="kv"))
    kv.lookup("scheduler", timeout_seconds=5)
    assert kv.parses == REMEMBERED_KEYS + extra
    kv.lookup("scheduler", timeout_seconds=5)
    assert kv.parses - len(keys) < 10 * extra


@pytest.mark.finding("E9")
def test_long_keys_of_strangers_are_not_remembered(consul):
    """Whoever rewrites keys of half a megabyte must not fill our memory, nor our log."""
    kv = Counting(consul, Settings(mode="kv"))
    long = "matchmaker/scheduler/" + "x" * REMEMBERED_LENGTH
    consul.keys[long] = [b"", None]
    for n_lookups in (1, 2):
        kv.lookup("scheduler", timeout_seconds=5)
        assert kv.parses == n_lookups


# -- polling --------------------------------------------------------------------------------------


def polled(poll, *topics, index=0):
    """One poll of all of these topics: its index, and a snapshot of each."""
    answer = poll.poll(index, 20, FAKE)
    found = {topic: answer.snapshot(topic, folder) for topic, folder in answer.folders(topics)}
    return answer.index, found


def test_a_poll_of_the_prefix_brings_every_topic_that_is_asked_for(consul, kv):
    """One answer for all topics, of which only these are taken apart; one without hosts too."""
    lease = kv.open()
    for topic, host in (("scheduler", ONE), ("scheduler", TWO), ("scheduler2", ONE), ("w", TWO)):
        kv.publish(lease, Registration(topic, host))
    index, snapshots = polled(kv.watch(None), "scheduler", "w", "nobody", index=7)
    assert index == consul.index - 1  # the sentinel was written after the answer
    assert {topic: snapshot.hosts for topic, snapshot in snapshots.items()} == {
        "scheduler": (ONE, TWO),
        "w": (TWO,),
        "nobody": (),
    }
    assert {snapshot.version for snapshot in snapshots.values()} == {index}
    number = next(n for n, how in enumerate(consul.hows) if "wait_seconds" in how)
    assert consul.calls[number] == ("GET", "/v1/kv/matchmaker/", {"keys": "", "index": "7"})
    assert consul.hows[number] == {"at": FAKE, "wait_seconds": 20}


def test_a_poll_of_a_topic_asks_for_its_folder(consul, kv):
    """And leaves no sentinel there."""
    kv.publish(kv.open(), Registration("a b", ONE))
    consul.calls.clear()
    assert polled(kv.watch("a b"), "a b")[1]["a b"].hosts == (ONE,)
    assert [(method, path) for method, path, _ in consul.calls] == [
        ("GET", "/v1/kv/matchmaker/a_20b/")
    ]


def test_a_poll_from_zero_has_no_index(consul, kv):
    """Without an index Consul answers at once."""
    polled(kv.watch(None))
    assert "index" not in consul.calls[0][2]


@given(st.sets(st.text('ab_-9A"\\<é,/\n', max_size=6), max_size=12), st.booleans())
def test_whatever_strangers_call_their_keys_a_topic_is_found(names, is_ascii):
    """Consul lists keys in the order of their bytes, and writes some of them as escapes."""
    keys = sorted((f"x/{name}" for name in names), key=str.encode)
    topics = ("a", "b", "9-", "A", "ab", "a-b")
    for spaces in ((",", ":"), None):  # in development mode Consul writes a key a line
        body = json.dumps(
            keys, ensure_ascii=is_ascii, separators=spaces, indent=None if spaces else 4
        )
        answer = Polled(Keys(), Answer(200, body.encode(), 1, False, "here"))
        for topic, folder in answer.folders(topics):
            assert answer.snapshot(topic, folder) == [
                k for k in keys if k.startswith(f"x/{topic}/")
            ]


class Keys:
    """Makes of keys what they are."""

    prefix = "x"

    def snapshot_of(self, topic, keys, answer):
        return keys


def test_a_long_folder_is_taken_apart_in_pieces():
    """So that no call holds up other threads for long."""
    keys = [f"x/t/{number:06}" for number in range(3 * PIECE_BYTES // 14)]
    body = json.dumps(keys, separators=(",", ":")).encode()
    answer = Polled(Keys(), Answer(200, body, 1, False, "here"))
    ((topic, folder),) = answer.folders(["t"])
    assert len(folder) > 2 * PIECE_BYTES
    assert answer.snapshot(topic, folder) == keys


def test_a_poll_on_an_empty_prefix_leaves_a_sentinel_once(consul, kv):
    """An empty prefix would wake on every write in the cluster: one key without session cures."""
    poll = kv.watch(None)
    assert polled(poll, "t")[1]["t"].hosts == ()
    assert list(consul.keys) == [SENTINEL]
    consul.calls.clear()
    assert polled(poll, "t")[1]["t"].hosts == ()
    assert [method for method, _, _ in consul.calls] == ["GET"]
    assert kv.lookup("_", timeout_seconds=5).hosts == ()
    assert kv.topics() == []
    assert orphans_of(kv) == {}
    assert kv.status()["unknown_keys"] == 0


def test_the_sentinel_is_written_only_where_there_is_none(consul, kv):
    """By check-and-set, so that nobody's key is overwritten and no watcher wakes."""
    polled(kv.watch(None))
    puts = [(path, params) for method, path, params in consul.calls if method == "PUT"]
    assert puts == [("/v1/kv/matchmaker/_", {"cas": "0"})]


def test_a_reader_without_write_permission_goes_on_without_sentinel(consul, kv):
    """Denied once, it is not tried again."""
    consul.failures["PUT", "/v1/kv/matchmaker/_"] = Denied("no")
    for _ in range(3):
        polled(kv.watch(None))
    assert len([1 for method, _, _ in consul.calls if method == "PUT"]) == 1


def test_a_sentinel_that_could_not_be_written_is_tried_again(consul, kv):
    """An outage between answer and sentinel does not spoil the answer."""
    poll = kv.watch(None)
    consul.failures["PUT", "/v1/kv/matchmaker/_"] = Unavailable("away")
    polled(poll)
    consul.failures.clear()
    polled(poll)
    assert list(consul.keys) == [SENTINEL]


def test_a_poll_without_an_index_is_no_answer(consul, kv):
    """With nothing to wait on, the next poll would come back at once, for ever."""
    consul.index = 0
    with pytest.raises(Unavailable):
        polled(kv.watch(None))


def test_a_poll_says_how_much_it_received(consul, kv):
    """Also one that failed for its size; nothing where nothing came."""
    poll = kv.watch("t")
    kv.publish(kv.open(), Registration("t", ONE))
    for error, received in (
        (None, len(json.dumps(list(consul.keys)))),
        (TooLarge("too much"), MAX_ANSWER_BYTES),
        (Unavailable("away"), 0),
    ):
        consul.failures = {} if error is None else {("GET", "/v1/kv/matchmaker/t/"): error}
        with contextlib.suppress(Unavailable):
            polled(poll)
        assert poll.received_bytes == received


def test_a_confirmation_reads_through_the_leader_and_then_asks_who_that_is(consul):
    """Of the agent that read; in this order, and with the consistency of lookups."""
    kv = kv_over(consul, consistency="consistent")
    confirmer = kv.confirmer()
    assert confirmer.confirm(None, 3) == Route(FAKE, "10.0.0.2:8300")
    assert confirmer.confirm("t", 3) == Route(FAKE, "10.0.0.2:8300")
    assert [(path, params) for _, path, params in consul.calls] == [
        ("/v1/kv/matchmaker/_", {"consistent": ""}),
        ("/v1/status/leader", {}),
        ("/v1/kv/matchmaker/t/_", {"consistent": ""}),
        ("/v1/status/leader", {}),
    ]
    assert [how["timeout_seconds"] for how in consul.hows] == [3] * 4
    assert [how.get("at") for how in consul.hows] == [None, FAKE] * 2


@pytest.mark.parametrize("leader", ["", None, {}, ["10.0.0.2:8300"]])
def test_without_a_leader_nothing_is_confirmed(consul, kv, leader):
    """Nor by what is no answer."""
    consul.leader = leader
    with pytest.raises(Unavailable):
        kv.confirmer().confirm(None, 3)


def test_polls_can_be_interrupted_and_connections_closed(consul, kv):
    """By whoever made them."""
    poll = kv.watch(None)
    poll.interrupt()
    poll.close()
    kv.confirmer().close()
    kv.close()
    assert (consul.interrupts, consul.closes) == (1, 3)
    assert "matchmaker" in repr(kv) and "matchmaker" in repr(poll)


# -- listing and removing -------------------------------------------------------------------------


def test_topics_are_listed_once_each(consul, kv):
    """One request, whatever is registered; foreign folders are left out."""
    lease = kv.open()
    for topic in ("b", "a/b", "a"):
        for host in (ONE, TWO):
            kv.publish(lease, Registration(topic, host))
    consul.keys["matchmaker/Bad Folder/x"] = [b"", None]
    consul.calls.clear()
    assert kv.topics() == ["a", "a/b", "b"]
    assert len(consul.calls) == 1


@pytest.mark.finding("A5")
def test_only_topics_with_a_registration_are_listed(consul, kv):
    """Keys of other programs under the prefix are no topics, however they are called."""
    kv.publish(kv.open(), Registration("scheduler", ONE))
    for key in ("foo", "foo/bar/baz", "scheduler", "mails/10.0.0.1:5/x"):
        consul.keys[f"matchmaker/{key}"] = [b"", None]
    assert kv.topics() == ["scheduler"]


def orphans_of(kv):
    """Each with its reason."""
    return {key: orphan.reason for key, orphan in find_orphans(kv).items()}


def test_orphans_are_keys_that_nobody_will_remove(consul, kv):
    """Keys without a session, and keys that are not ours, each with its reason."""
    lease = kv.open()
    kv.publish(lease, Registration("scheduler", ONE))
    lost = Key("scheduler", TWO, str(uuid.uuid4())).under(PREFIX)
    consul.keys[lost] = [b"", None]
    consul.keys["matchmaker/rubbish"] = [b"", None]
    assert orphans_of(kv) == {lost: "held by no session", "matchmaker/rubbish": NOT_OURS}


@pytest.mark.finding("B1")
def test_sweep_removes_only_keys_of_ours_that_nobody_holds(consul, kv):
    """Never a key that is not named as ours are, never one that a session holds."""
    lease = kv.open()
    kv.publish(lease, Registration("scheduler", ONE))
    lost = Key("scheduler", TWO, str(uuid.uuid4())).under(PREFIX)
    taken = Key("scheduler", TWO, str(uuid.uuid4())).under(PREFIX)
    consul.keys |= {
        SENTINEL: [b"", None],
        "matchmaker/config": [b"", None],
        "matchmaker/rubbish?x": [b"", None],
        "matchmaker/foreign": [b"", lease.id],
        "matchmaker/scheduler/10.0.0.1:9501/x": [b"", None],
        lost: [b"", None],
        taken: [b"", lease.id],  # by another session than its name says
    }
    before = set(consul.keys)
    assert remove_orphans(kv, find_orphans(kv)) == [lost]
    assert before - set(consul.keys) == {lost}


@pytest.mark.finding("B1")
def test_a_mistyped_prefix_costs_another_program_nothing(consul):
    """Its tree is listed, and stays to the last key."""
    consul.keys |= {f"app/config/{name}": [b"", None] for name in ("a", "b/c", "d/e/f")}
    before = dict(consul.keys)
    kv = kv_over(consul, prefix="app")
    assert orphans_of(kv) == dict.fromkeys(before, NOT_OURS)
    assert remove_orphans(kv, find_orphans(kv)) == []
    assert consul.keys == before


def test_a_key_that_changed_since_it_was_looked_at_stays(consul, kv):
    """Its owner is back."""
    lost = Key("scheduler", TWO, str(uuid.uuid4())).under(PREFIX)
    consul.keys[lost] = [b"", None]
    call = consul.call

    def acquired_meanwhile(method, path, *args, **how):
        if method == "DELETE":
            consul.indexes[lost] = 2
        return call(method, path, *args, **how)

    consul.call = acquired_meanwhile
    assert remove_orphans(kv, find_orphans(kv)) == []
    assert lost in consul.keys


@pytest.mark.finding("E6")
def test_what_sweep_says_it_removed_is_read_back(consul, kv):
    """Consul says true of a deletion that found nothing, or that somebody undid at once."""
    lost = Key("scheduler", TWO, str(uuid.uuid4())).under(PREFIX)
    consul.keys[lost] = [b"", None]
    call = consul.call

    def written_again(method, path, *args, **how):
        answer = call(method, path, *args, **how)
        if method == "DELETE":
            consul.keys[lost] = [b"", None]
        return answer

    consul.call = written_again
    assert remove_orphans(kv, find_orphans(kv)) == []


@pytest.mark.finding("E6")
def test_strange_keys_do_not_stop_a_sweep_and_nested_prefixes_keep_their_mark(consul, kv):
    """Such keys are never asked for: only keys in our own alphabet are."""
    lost = Key("scheduler", TWO, str(uuid.uuid4())).under(PREFIX)
    strange = ["matchmaker/..", "matchmaker//x", "matchmaker/a%2fb", "matchmaker/\x1b[31m"]
    consul.keys |= {each: [b"", None] for each in [*strange, "matchmaker/eu/_", lost]}
    assert remove_orphans(kv, find_orphans(kv)) == [lost]
    assert "matchmaker/eu/_" not in orphans_of(kv)
    assert set(consul.keys) == {*strange, "matchmaker/eu/_"}


@pytest.mark.finding("E7")
def test_orphans_are_found_by_their_keys(consul, kv):
    """Values, which strangers may make as large as Consul allows, are read of suspects alone."""
    lease = kv.open()
    for port in range(1, 2 * CHECKS_PER_REQUEST):
        kv.publish(lease, Registration("scheduler", Host("10.0.0.1", port)))
    consul.keys |= {f"matchmaker/big/{number}": [b"", None] for number in range(97)}
    lost = Key("scheduler", TWO, str(uuid.uuid4())).under(PREFIX)
    consul.keys[lost] = [b"", None]
    consul.calls.clear()
    assert orphans_of(kv)[lost] == "held by no session"
    assert [path for method, path, params in consul.calls if method == "GET" and not params] == [
        f"/v1/kv/{lost}"
    ]
    assert not any("recurse" in params for _, _, params in consul.calls)


def test_a_check_that_was_not_made_proves_nothing(consul, kv):
    """Consul names some operations as failed and makes none of the others: they are asked again."""
    lost = [Key("scheduler", TWO, str(uuid.uuid4())).under(PREFIX) for _ in range(3)]
    consul.keys |= {key: [b"", None] for key in lost}
    txn = consul._txn

    def naming_one(operations):
        status, said = txn(operations)
        return status, {"Errors": (said["Errors"] or [])[:1]}

    consul._txn = naming_one
    assert set(orphans_of(kv)) == set(lost)


@pytest.mark.parametrize(
    "body", [b"[]", b"{}", b'{"Errors": []}', b'{"Errors": [{"OpIndex": 9}]}', b"x"]
)
def test_a_refusal_that_names_nothing_we_asked_is_unavailable(consul, kv, body):
    """So no answer makes it ask for ever."""
    consul.keys[Key("scheduler", TWO, str(uuid.uuid4())).under(PREFIX)] = [b"", None]
    consul._txn = lambda operations: (409, body)
    with pytest.raises(Unavailable):
        orphans_of(kv)


def test_no_keys_no_orphans(kv):
    """An empty prefix has none."""
    assert orphans_of(kv) == {}


def test_expire_leaves_other_hosts_that_begin_the_same(consul, kv):
    """10.0.0.1:5 is not 10.0.0.1:50."""
    lease = kv.open()
    short, long = Host("10.0.0.1", 5), Host("10.0.0.1", 50)
    kv.publish(lease, Registration("scheduler", short))
    kv.publish(lease, Registration("scheduler", long))
    assert kv.expire("scheduler", short) == 1
    assert kv.lookup("scheduler", timeout_seconds=5).hosts == (long,)


def test_expiring_nothing_writes_nothing(consul, kv):
    """Without such a key there is no DELETE, which would be a Raft entry."""
    assert kv.expire("scheduler", ONE) == 0
    assert "DELETE" not in [method for method, _, _ in consul.calls]


def test_a_publish_that_arrives_after_its_withdrawal_is_found(consul):
    """Consul was silent, the caller gave up, and then the old request came through: the next
    renewals tell, for a minute, so that it can be withdrawn."""
    clock = ManualClock()
    kv = kv_over(consul, clock=clock)
    lease = kv.open()
    registration = Registration("scheduler", ONE)
    key = Key.of(registration, lease.id).under(PREFIX)
    consul.failures["PUT", "/v1/kv/"] = TimedOut("no answer")
    with pytest.raises(TimedOut):
        kv.publish(lease, registration)
    del consul.failures["PUT", "/v1/kv/"]
    kv.withdraw(lease, registration)
    assert set(kv.renew(lease)) == set()
    consul.keys[key] = [b"", lease.id]
    assert set(kv.renew(lease)) == {registration}
    kv.withdraw(lease, registration)
    assert set(kv.renew(lease)) == set()
    kv.withdraw(lease, registration)
    clock.advance(61)
    calls = len(consul.calls)
    assert set(kv.renew(lease)) == set()
    assert len(consul.calls) == calls + 1, "the renewal alone: nothing is looked for any more"


def test_a_lease_of_another_process_cannot_be_withdrawn_from(consul, kv):
    """The key that is deleted bears our lease's id: no other."""
    theirs, ours = kv.open(), kv.open()
    registration = Registration("scheduler", ONE)
    kv.publish(theirs, registration)
    kv.withdraw(ours, registration)
    kv.withdraw(Lease("unknown", 10), registration)
    assert kv.lookup("scheduler", timeout_seconds=5).hosts == (ONE,)


@pytest.mark.finding("C1")
def test_a_watch_of_one_topic_reads_nothing_of_others(consul, kv):
    """What a poll brings does not depend on how much is registered under other topics."""
    lease = kv.open()
    kv.publish(lease, Registration("scheduler", ONE))
    poll = kv.watch("scheduler")
    polled(poll)
    alone = poll.received_bytes
    for number in range(100):
        kv.publish(lease, Registration(f"other{number}", TWO))
    polled(poll)
    assert poll.received_bytes == alone
