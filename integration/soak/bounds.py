"""What is promised, in seconds: how long each thing may take, with the document that says so.

The ledger knows no other tolerance.  A row that is not here is not excused.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Liveness = Literal["session", "node", "check", "catalog"]
EVERY: tuple[Liveness, ...] = ("session", "node", "check")

SESSION_TTL_SECONDS = 10.0
"""What the registering processes ask for: the default, and the shortest Consul grants by itself."""
RENEWAL_SECONDS = SESSION_TTL_SECONDS / 3
TTL_SECONDS = 5.0
"""``ttl_seconds`` of every reader: the default."""
MACHINE_SECONDS = 1.0
"""Added to every bound: two busy cores, and what lies between an event and its time in the ledger.
It is the soak's own, and no promise of the library."""
START_SECONDS = 10.0
"""From starting a process to its call of `register`: an interpreter on a busy machine.  Also its
own."""


@dataclass(frozen=True)
class Bound:
    """So many seconds, and the document and heading that promise them."""

    seconds: float
    document: str
    heading: str


KV_GONE = ("docs/kv-mode.md", "When does a dead process disappear?")
KV_CHECK = ("docs/kv-mode.md", "Within a second")
OUTAGE = ("docs/operations.md", "When Consul goes away")
LEAVING = ("docs/operations.md", "When hosts leave")
CERTAIN = ("docs/operations.md", "How certain an answer is")

GONE: dict[tuple[str, Liveness], Bound] = {
    ("killed", "session"): Bound(2 * SESSION_TTL_SECONDS, *KV_GONE),
    ("killed", "node"): Bound(2 * SESSION_TTL_SECONDS, *KV_GONE),
    ("killed", "check"): Bound(1.5, *KV_CHECK),
    **{("left", liveness): Bound(0.5, *KV_GONE) for liveness in EVERY},
    ("failed", "catalog"): Bound(0.5, "docs/catalog-mode.md", "A service definition"),
}
"""How soon Consul no longer lists a host: by how its process ended, and its liveness.  A suspended
process counts as killed."""

LISTED: dict[tuple[str, Liveness], Bound] = {
    **{("started", liveness): Bound(RENEWAL_SECONDS, *OUTAGE) for liveness in EVERY},
    **{("resumed", liveness): Bound(RENEWAL_SECONDS, *OUTAGE) for liveness in EVERY},
    ("passed", "catalog"): Bound(0.5, "docs/catalog-mode.md", "A service definition"),
}
"""How soon Consul lists a host that is wanted, while Consul is well."""

FRESH: dict[str, Bound] = {
    "consul": Bound(0.0, *CERTAIN),
    "kv": Bound(TTL_SECONDS * (1 + 1 / 16) + 3, *CERTAIN),
    "kv, no watch": Bound(TTL_SECONDS, *CERTAIN),
    "kv, stale": Bound(TTL_SECONDS * (1 + 1 / 16) + 3, *CERTAIN),
    "asyncio": Bound(TTL_SECONDS * (1 + 1 / 16) + 3, *CERTAIN),
    "catalog": Bound(TTL_SECONDS, *CERTAIN),
}
"""How far an answer that calls itself fresh may be behind Consul, by the reader's mode."""

STALE_MODES = frozenset({"kv, stale", "catalog"})
"""They are answered by any server, also one that lags."""


@dataclass(frozen=True)
class Excuse:
    """While something is disturbed, and *after* it for so long, a live host may be missing.

    Not when it was disturbed for *survived* seconds at most.
    """

    after: Bound
    survived: float = 0.0
    may_empty: bool = True
    """Whether a topic whose last hosts they are may be answered empty.  Not where readers hold a
    mass departure back until it is over ("When hosts leave")."""


# A lease outlives what is shorter than 2 x TTL, counted from its last renewal; and the request
# that finds Consul well again comes within one more renewal interval.
OUTLIVED = 2 * SESSION_TTL_SECONDS - 2 * RENEWAL_SECONDS

_AFTERWARDS = Bound(RENEWAL_SECONDS, *OUTAGE)

MISSING: dict[tuple[str, Liveness], Excuse] = {
    ("agent killed", "session"): Excuse(_AFTERWARDS, OUTLIVED),
    ("agent killed", "node"): Excuse(_AFTERWARDS),
    ("agent killed", "check"): Excuse(_AFTERWARDS),
    ("agent paused", "session"): Excuse(_AFTERWARDS, OUTLIVED),
    ("agent paused", "node"): Excuse(_AFTERWARDS),
    ("agent paused", "check"): Excuse(_AFTERWARDS),
    **{("agent left", liveness): Excuse(_AFTERWARDS) for liveness in EVERY},
    **{("session destroyed", liveness): Excuse(_AFTERWARDS) for liveness in EVERY},
    **{("key deleted", liveness): Excuse(_AFTERWARDS) for liveness in EVERY},
    ("no leader", "check"): Excuse(Bound(1.7, *LEAVING), may_empty=False),
    ("server back", "check"): Excuse(Bound(1.7, *OUTAGE), may_empty=False),
    **{("late invalidation", liveness): Excuse(_AFTERWARDS, may_empty=False) for liveness in EVERY},
    ("machine starved", "check"): Excuse(Bound(RENEWAL_SECONDS, *KV_CHECK)),
}
"""When a live host may be missing in Consul, by disturbance and its liveness."""

LATE_INVALIDATIONS = (0.0, 10.0, 30.0, 70.0, 150.0, 310.0)
"""So long after a frozen leader goes on it may end sessions that it believes to have expired, if it
leads again at that moment: Consul tries that six times (docs/facts/consul.md, B15)."""

FOR_ITSELF = 3.0  # "an agent may report the end of a process up to 3 s later (Consul's own rule)"

ELECTING = {"no leader", "server back"}
"""Disturbances during which servers elect; agents hold requests until one can be asked."""
AGENT_AWAY = {f"agent {what}" for what in ("killed", "paused", "left")}

LATER: dict[tuple[str, Liveness], Bound] = {
    # A server that comes back causes an election too, and each new term gives every session its
    # time anew (docs/facts/consul.md, B16).
    **{(what, liveness): Bound(0.0, *KV_GONE) for what in ELECTING for liveness in EVERY},
    **{(what, "check"): Bound(FOR_ITSELF, *KV_CHECK) for what in ELECTING | AGENT_AWAY},
    # A renewal that waits in a suspended agent or server is done when that goes on.
    ("agent paused", "session"): Bound(0.0, *KV_GONE),
    ("agent paused", "node"): Bound(0.0, *KV_GONE),
    ("server paused", "session"): Bound(0.0, *KV_GONE),
    ("server paused", "node"): Bound(0.0, *KV_GONE),
}
"""Disturbances from whose end the bound of `GONE` counts anew, with what they add to it."""

HELD = Bound(7.0, "docs/facts/consul.md", "C. Blocking queries")
"""A renewal may be done so much later (`rpc_hold_timeout`): by then its process may be dead."""

UNHEARD = AGENT_AWAY | {
    "no leader",
    "server paused",  # it holds the requests of agents that are connected to it
    "server gone",  # an agent asks its address for 10 s, where nothing refuses
}
"""Who leaves meanwhile cannot say so, and is gone as if killed; who comes is listed only later: the
time of `LISTED` counts from its end."""

LAGS = {
    what: Bound(5.0, "docs/catalog-mode.md", "What Consul's DNS cannot say") for what in ELECTING
}
"""Disturbances during which, and so long after, a reader of `STALE_MODES` may be behind."""

KNOWN_TOPIC_SECONDS = Bound(1.0, "docs/operations.md", "Metrics")
"""A lookup of a known topic takes no longer: it reads memory, or breaks off after 0.1 s."""
GROWTH_KIB = 6 * 1024
GROWTH_THREADS = 2
GROWTH_DESCRIPTORS = 4
"""What a process may grow by after its first `WARM_UP_SECONDS`."""
WARM_UP_SECONDS = 45.0
