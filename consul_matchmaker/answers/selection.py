"""Which host of a snapshot to use: near ones first, in turn, by weight, by load, or by key.

Pure: time and chance are handed in, nothing here asks Consul.
"""

from __future__ import annotations

import bisect
import heapq
import itertools
import math
import random
import socket
import threading
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence

from ..model import Host, Instance, Snapshot
from ..settings import Settings
from .balance import (
    SMALLEST_WEIGHT,
    draw,
    local_share,
    newcomers,
    positive,
    slow_start,
    subset,
)
from .load import Load
from .quarantine import Quarantine

MAX_TURNS = 10_000
"""Round robins remembered; beyond that all begin anew, each at a random host."""
_NOBODY: frozenset[Host] = frozenset()
_Name = tuple[str, "str | None"]
"""A topic and a server."""


class Selector:
    """Picks one host of a snapshot.  Thread-safe.

    Out of the instances of the lowest priority number that are not avoided; of those, where the
    settings say so, out of the ones in our zone, and out of the ones that are ours (a subset).
    Then by ``selection``: ``round_robin`` is in turn, beginning at a random host, in an order that
    stays fair when hosts come and go, and at random by weight where weights differ (RFC 2782);
    ``weighted`` is in turn by weight; ``least_loaded`` takes the less loaded of two random ones.
    With a key: by rendezvous hashing out of all that are not avoided, so that when a host leaves
    only its own keys move.
    """

    def __init__(
        self,
        quarantine: Quarantine,
        settings: Settings,
        load: Load,
        *,
        clock: Callable[[], float] = time.monotonic,
        chance: random.Random | None = None,
    ) -> None:
        self._quarantine = quarantine
        self._load = load
        self._clock = clock
        self._chance = chance or random.Random()
        self._selection = settings.selection
        self._zone = settings.zone
        self._subset_size = settings.subset_size
        self._client = settings.client_id or socket.gethostname()
        self._slow_start_seconds = settings.slow_start_seconds
        self._turns: dict[_Name, _Turn] = {}
        self._lock = threading.Lock()

    def pick(
        self,
        snapshot: Snapshot,
        *,
        server: str | None = None,
        key: str | bytes | None = None,
        exclude: Collection[Host] = _NOBODY,
    ) -> Host | None:
        """One host that is not in *exclude*, or None when the snapshot has none.  *server* only
        names the round robin."""
        hosts = snapshot.hosts
        if not hosts:
            return None
        topic = snapshot.topic
        avoided = self._quarantine.avoided(topic, hosts)
        if avoided is None:
            return self._pick(snapshot, server, key, _NOBODY, exclude)
        while True:
            host = self._pick(snapshot, server, key, avoided, exclude)
            if host is None or host in avoided or self._quarantine.begin_trial(topic, host):
                return host
            avoided |= {host}  # another thread rejected or tries this very host since we looked

    def explain(
        self, snapshot: Snapshot, server: str | None = None
    ) -> dict[str, dict[str, object]]:
        """By host: whether `pick` chooses it now and how, or why not, and what its calls found.
        Changes nothing."""
        if not snapshot:
            return {}
        topic, now = snapshot.topic, self._clock()
        avoided = self._quarantine.avoided(topic, snapshot.hosts) or _NOBODY
        turn = self._turn_of(snapshot, avoided)
        used = turn.pools if turn.local_share < 1 else turn.pools[:1]
        pools = {host: pool for pool in used for host in pool.hosts}
        why_not = self._why_not(turn, snapshot)
        last = self._turns.get((topic, server))
        told: dict[str, dict[str, object]] = {}
        for host in snapshot.hosts:
            pool = pools.get(host)
            if pool is None:
                why = why_not[host]
            else:
                why = self._how(turn, pool)
                since = last.since.get(host, -math.inf) if last else -math.inf
                if (share := slow_start(now - since, self._slow_start_seconds)) < 1:
                    why += f"; it is new and gets {share:.0%} of its share"
            told[str(host)] = {"is_chosen": pool is not None, "why": why}
            told[str(host)] |= self._load.explain(topic, host)
        return told

    def _why_not(self, turn: _Turn, snapshot: Snapshot) -> dict[Host, str]:
        """Why each host would be left out, if it is in no pool."""
        lowest = turn.choices[0].priority
        by_priority = sorted(snapshot.instances, key=lambda one: one.priority, reverse=True)
        why = {
            one.host: f"its priority is {one.priority}, and hosts of priority {lowest} are there"
            for one in by_priority
        }
        ours = f"it is not one of the {self._subset_size} for this client (subset_size)"
        why |= dict.fromkeys((one.host for one in turn.choices), ours)
        far = f"it is outside of zone {self._zone}, whose own hosts are enough"
        why |= {host: far for pool in turn.pools[1:] for host in pool.hosts}
        return why | dict.fromkeys(turn.avoided, "it was rejected")

    def _how(self, turn: _Turn, pool: _Pool) -> str:
        how = {
            "round_robin": "in turn" if pool.weights is None else "at random by weight",
            "weighted": "in turn by weight",
            "least_loaded": "the less loaded of two",
        }[self._selection]
        if len(turn.pools) == 1:
            return how
        is_local = pool is turn.pools[0]
        share = turn.local_share if is_local else 1 - turn.local_share
        where = f"of zone {self._zone}" if is_local else f"outside of zone {self._zone}"
        return f"{how}; {share:.0%} of the calls go to hosts {where}"

    def _pick(
        self,
        snapshot: Snapshot,
        server: str | None,
        key: str | bytes | None,
        avoided: frozenset[Host],
        exclude: Collection[Host],
    ) -> Host | None:
        name = snapshot.topic, server
        turn = self._turns.get(name)
        if turn is None or turn.instances is not snapshot.instances or turn.avoided != avoided:
            turn = self._next_turn(name, snapshot, avoided)
        if key is not None:
            host = by_key([one for one in turn.choices if one.host not in exclude], key)
        elif turn.is_plain and not exclude:
            pool = turn.pools[0]
            return pool.hosts[next(pool.counter) % len(pool.hosts)]
        else:
            host = self._chosen(turn, snapshot.topic, exclude)
        if host is None:  # what is left is avoided, or not for us: better than one that was tried
            rest = [one for one in snapshot.instances if one.host not in exclude]
            if rest:
                choices = preferred(rest, avoided)
                host = by_key(choices, key) if key is not None else self._by_weight(choices)
        return host

    def _chosen(self, turn: _Turn, topic: str, exclude: Collection[Host]) -> Host | None:
        """One of *turn* by the rules; None when all are excluded."""
        late = self._held_back(turn)
        for skipped in [{*exclude, *late}, exclude] if late else [exclude]:
            pools = turn.pools
            if len(pools) > 1 and self._chance.random() >= turn.local_share:
                pools = pools[::-1]
            for pool in pools:
                host = self._one_of(pool, topic, skipped)
                if host is not None:
                    return host
        return None

    def _one_of(self, pool: _Pool, topic: str, skipped: Collection[Host]) -> Host | None:
        if self._selection == "weighted":
            with self._lock:
                return pool.next_by_weight(skipped, self._chance)
        if self._selection == "round_robin" and pool.weights is None:
            return pool.next_in_turn(skipped)
        choices = pool.choices
        if skipped:
            choices = [one for one in choices if one.host not in skipped]
        if not choices:
            return None
        if self._selection == "round_robin":
            return self._by_weight(choices) if skipped else pool.by_weight(self._chance)
        if pool.weights is not None and self._chance.random() >= SMALLEST_WEIGHT:
            choices = [one for one in choices if one.weight] or choices
        if len(choices) == 1:
            return choices[0].host
        return self._load.lesser(topic, *self._chance.sample(choices, 2)).host

    def _by_weight(self, choices: Sequence[Instance]) -> Host:
        return self._chance.choices(
            [one.host for one in choices], [positive(one.weight) for one in choices]
        )[0]

    def _held_back(self, turn: _Turn) -> list[Host]:
        """The new hosts that do not take part this time, by their slow start."""
        now, window = self._clock(), self._slow_start_seconds
        if now >= turn.slow_until:
            return []
        return [
            host
            for host, since in turn.since.items()
            if now - since < window and self._chance.random() >= slow_start(now - since, window)
        ]

    def _next_turn(
        self,
        name: _Name,
        snapshot: Snapshot,
        avoided: frozenset[Host],
    ) -> _Turn:
        turn = self._turn_of(snapshot, avoided)
        if name[1] is None:
            self._load.hosts_are(name[0], snapshot.hosts)
        with self._lock:
            last = self._turns.get(name)
            if (
                last is not None
                and last.instances is snapshot.instances
                and last.avoided == avoided
            ):
                return last  # another thread was faster
            if self._slow_start_seconds:
                known = None if last is None else last.since
                turn.since = newcomers(snapshot.hosts, known, self._clock())
                turn.slow_until = max(turn.since.values()) + self._slow_start_seconds
                turn.is_plain = False
            for pool, before in itertools.zip_longest(turn.pools, last.pools if last else ()):
                if pool is not None:
                    pool.begin(before, self._chance)
            if len(self._turns) >= MAX_TURNS:
                self._turns.clear()
            self._turns[name] = turn
        return turn

    def _turn_of(self, snapshot: Snapshot, avoided: frozenset[Host]) -> _Turn:
        turn = _Turn(snapshot.instances, avoided)
        choices = turn.choices
        parts: list[Sequence[Instance]] = [choices]
        if self._zone is not None:
            ours = [one for one in choices if one.zone == self._zone]
            if 0 < len(ours) < len(choices):
                parts = [ours, [one for one in choices if one.zone != self._zone]]
                zones = len({one.zone for one in choices})
                turn.local_share = local_share(_weight(ours), _weight(choices), zones)
        if self._subset_size:
            parts = [subset(part, self._subset_size, self._client) for part in parts]
        turn.pools = tuple(map(_Pool, parts))
        turn.is_plain = (
            self._selection == "round_robin" and len(parts) == 1 and turn.pools[0].weights is None
        )
        return turn


class _Turn:
    """What there is to choose of one answer."""

    __slots__ = (
        "avoided",
        "choices",
        "instances",
        "is_plain",
        "local_share",
        "pools",
        "since",
        "slow_until",
    )

    def __init__(self, instances: tuple[Instance, ...], avoided: frozenset[Host]) -> None:
        self.instances = instances  # the same as long as nothing changes
        self.avoided = avoided
        self.choices = preferred(instances, avoided)
        self.pools: tuple[_Pool, ...] = ()
        """Those of our zone and the others, or all in one."""
        self.local_share = 1.0
        self.is_plain = True
        """Whether there is one pool whose hosts are chosen in turn."""
        self.since: dict[Host, float] = {}
        self.slow_until = -math.inf
        """When the slow start of the last new host ends."""


class _Pool:
    """Hosts of which one is chosen.  Its counter needs no lock."""

    __slots__ = ("_heap", "choices", "counter", "hosts", "weights")

    def __init__(self, choices: Sequence[Instance]) -> None:
        self.choices = choices
        self.hosts = tuple(instance.host for instance in choices)
        self.counter: Iterator[int] = itertools.count()
        self.weights = cumulated(instance.weight for instance in choices)
        self._heap: list[tuple[float, int]] = []

    def begin(self, before: _Pool | None, chance: random.Random) -> None:
        """Go on with the host whose turn it would have been *before*, or the next one that is still
        there; without it, with a random one."""
        if before is None:
            start = chance.randrange(len(self.hosts))
        else:
            due = before.hosts[next(before.counter) % len(before.hosts)]
            start = bisect.bisect_left(self.hosts, due)
        self.counter = itertools.count(start)
        self._begin_weights(chance)

    def _begin_weights(self, chance: random.Random) -> None:
        # Random beginnings, or all processes would send to the same hosts at the same time.
        self._heap = [
            (chance.random() / positive(one.weight), place)
            for place, one in enumerate(self.choices)
        ]
        heapq.heapify(self._heap)

    def next_in_turn(self, skipped: Collection[Host]) -> Host | None:
        """The next that is not *skipped*; None where all are."""
        for _ in self.hosts:
            host = self.hosts[next(self.counter) % len(self.hosts)]
            if host not in skipped:
                return host
        return None

    def by_weight(self, chance: random.Random) -> Host:
        """One at random, by weight."""
        assert self.weights is not None
        point = chance.random() * self.weights[-1]
        return self.hosts[bisect.bisect_right(self.weights, point)]

    def next_by_weight(self, skipped: Collection[Host], chance: random.Random) -> Host | None:
        """The next in turn by weight that is not *skipped*; the caller holds the lock.

        Earliest deadline first, as Envoy's and gRPC's schedulers have it: a host is due 1 / weight
        after its last turn, which it also has when it is skipped.
        """
        if all(host in skipped for host in self.hosts):
            return None
        if len(self._heap) < len(self.hosts):
            self._begin_weights(chance)  # an interrupt came between what follows
        passed: list[tuple[float, int]] = []
        while True:
            due, place = heapq.heappop(self._heap)
            passed.append((due + 1 / positive(self.choices[place].weight), place))
            if self.hosts[place] not in skipped:
                break
        for each in passed:
            heapq.heappush(self._heap, each)
        return self.hosts[place]


def preferred(instances: Iterable[Instance], avoided: frozenset[Host]) -> tuple[Instance, ...]:
    """The instances to choose from, one a host, sorted by host: those of the lowest priority number
    that are not avoided; those of the lowest at all when every one is avoided."""
    instances = tuple(instances)
    usable = [one for one in instances if one.host not in avoided] or instances
    lowest = min(one.priority for one in usable)
    by_host: dict[Host, Instance] = {}
    for one in usable:
        known = by_host.get(one.host)
        if one.priority == lowest and (known is None or one.weight > known.weight):
            by_host[one.host] = one
    return tuple(by_host[host] for host in sorted(by_host))


def cumulated(weights: Iterable[int]) -> tuple[float, ...] | None:
    """The running sums of *weights*, or None when all are the same and turns are fairer."""
    weights = tuple(weights)
    if len(set(weights)) == 1:
        return None
    return tuple(itertools.accumulate(map(positive, weights)))


def _weight(choices: Iterable[Instance]) -> float:
    return sum(positive(one.weight) for one in choices)


def by_key(choices: Sequence[Instance], key: str | bytes) -> Host | None:
    """The host of *key*: the same in every process, and weighted; None without choices.

    Rendezvous hashing (Thaler and Ravishankar, 1998), weighted by -weight / ln(hash) (Schindelhauer
    and Schomaker, 2005): every host draws a number from the key, the highest wins, so a host that
    leaves or comes moves no key between others.
    """
    if not choices:
        return None
    raw = key.encode("utf-8", "surrogatepass") if isinstance(key, str) else key
    best = max(choices, key=lambda one: (_score(raw, one), one.host.address, one.host.port or 0))
    return best.host


def _score(key: bytes, instance: Instance) -> float:
    return -positive(instance.weight) / math.log(draw(key, instance.host))
