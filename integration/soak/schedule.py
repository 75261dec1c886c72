"""What will be done to whom and when: all of it decided by the seed, before anything is started."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from .bounds import Liveness

TOPICS: dict[str, tuple[Liveness, ...]] = {
    "only-check": ("check",) * 4,
    "only-session": ("session",) * 4,
    "only-node": ("node",) * 4,
    "mixed-1": ("session", "node", "check", "check"),
    "mixed-2": ("session", "session", "node", "check"),
    "mixed-3": ("session", "node", "check", "check"),
}
AGENTS = ("agent1", "agent2", "agent3")
SERVICES = {f"service-{number}": 3 for number in (1, 2)}
MEMBER_GAP = (1.0, 3.0)
CLUSTER_GAP = (6.0, 12.0)
WRITE_GAP = (3.0, 7.0)
QUIET_SECONDS = 10.0
"""Nothing new happens in the last ones, so that what is suspended or down is back at the end."""


@dataclass(frozen=True)
class MemberPlan:
    """A process that registers one host for one topic."""

    name: str
    topic: str
    liveness: Liveness
    agent: str
    by_command: bool
    """By ``consul-matchmaker register ... -- COMMAND``, and not by the library."""


@dataclass(frozen=True, order=True)
class Event:
    """At so many seconds do *kind* to *target*; for *hold* seconds where it ends by itself."""

    at: float
    kind: str
    target: str
    hold: float = 0.0

    @property
    def name(self) -> str:
        """What it is counted as: of nodes also which sort, such as ``kill leader``."""
        return f"{self.kind} {self.target.rstrip('0123456789')}" if self.hold else self.kind

    def __str__(self) -> str:
        hold = f" for {self.hold:.1f} s" if self.hold else ""
        return f"{self.at:8.1f}  {self.kind} {self.target}{hold}"


def members() -> list[MemberPlan]:
    """All that register: each topic on every agent, each third by the command line."""
    plans: list[MemberPlan] = []
    for topic, kinds in TOPICS.items():
        for place, liveness in enumerate(kinds):
            number = len(plans)
            agent = AGENTS[(place + number // 4) % len(AGENTS)]
            plans.append(MemberPlan(f"m{number:02d}", topic, liveness, agent, number % 3 == 1))
    return plans


def instances() -> list[str]:
    """Every instance of the catalog's services, as ``service/number``."""
    return [f"{service}/{number}" for service, count in SERVICES.items() for number in range(count)]


def plan(seed: int, seconds: float) -> list[Event]:
    """Every event of a soak of so long, in order."""
    chance = random.Random(seed)
    until = max(0.0, seconds - QUIET_SECONDS)
    events = [
        *_member_events(random.Random(chance.random()), until),
        *_cluster_events(random.Random(chance.random()), until),
        *_write_events(random.Random(chance.random()), until),
    ]
    return sorted(events)


def _deck(chance: random.Random, cards: dict[str, int]) -> Iterator[str]:
    """One card after the other: all have come before one comes more often than it is in there."""
    while True:
        pile = [card for card, count in cards.items() for _ in range(count)]
        chance.shuffle(pile)
        yield from pile


MEMBER_DECK = {
    "kill": 4,
    "suspend": 3,
    "suspend long": 1,
    "restart": 3,
    "fork": 2,
    "withdraw": 2,
    "kill command": 2,
}
ONLY_LIBRARY = {"fork", "withdraw"}


def _member_events(chance: random.Random, until: float) -> Iterator[Event]:
    plans = members()
    free_at = dict.fromkeys((each.name for each in plans), 0.0)
    deck = _deck(chance, MEMBER_DECK)
    now = chance.uniform(*MEMBER_GAP)
    while now < until:
        kind = next(deck)
        able = [each for each in plans if _may(kind, each, plans, free_at, now)]
        if able:
            member = chance.choice(able)
            away = _away(chance, kind)
            first, second = STEPS[kind]
            yield Event(round(now, 2), first, member.name)
            if second:
                yield Event(round(now + away, 2), second, member.name)
            free_at[member.name] = now + away + 8  # it has to be seen again before it goes again
        now += chance.uniform(*MEMBER_GAP)


STEPS = {
    "kill": ("kill", "start"),
    "suspend": ("suspend", "resume"),
    "suspend long": ("suspend", "resume"),
    "restart": ("end", "start"),
    "fork": ("fork", ""),
    "withdraw": ("withdraw", "publish"),
    "kill command": ("kill command", "start"),
}


def _away(chance: random.Random, kind: str) -> float:
    if kind == "suspend long":
        return chance.uniform(21, 26)  # longer than 2 x TTL
    return chance.uniform(5, 9) if kind == "suspend" else chance.uniform(1, 8)


def _may(
    kind: str,
    member: MemberPlan,
    plans: Sequence[MemberPlan],
    free_at: dict[str, float],
    now: float,
) -> bool:
    """Whether it is there, of the right sort, and leaves two others of its topic."""
    if free_at[member.name] > now or (kind in ONLY_LIBRARY and member.by_command):
        return False
    if kind == "kill command" and not member.by_command:
        return False
    away = sum(each.topic == member.topic and free_at[each.name] > now for each in plans)
    return away <= 1


CLUSTER_DECK = {
    "kill leader": 2,
    "pause leader": 1,
    "stop leader": 1,
    "kill follower": 1,
    "pause follower": 1,
    "stop follower": 1,
    "kill agent": 1,
    "pause agent": 2,
    "stop agent": 1,
}
QUORUM_AT = 0.55  # of the whole: once in a soak
QUORUM_SECONDS = (12.0, 20.0)
BACK_SECONDS = 10.0  # until all is as before, usually


def _cluster_events(chance: random.Random, until: float) -> Iterator[Event]:
    deck = _deck(chance, CLUSTER_DECK)
    is_lost = False
    now = chance.uniform(*CLUSTER_GAP)
    while now < until - BACK_SECONDS:
        if not is_lost and now > until * QUORUM_AT:
            is_lost = True
            hold = chance.uniform(*QUORUM_SECONDS)
            event = Event(round(now, 2), "lose quorum", "two servers", round(hold, 2))
        else:
            what, _, whom = next(deck).partition(" ")
            target = chance.choice(AGENTS) if whom == "agent" else whom
            hold = chance.uniform(3, 10)
            event = Event(round(now, 2), what, target, round(hold, 2))
        yield event
        now += event.hold + BACK_SECONDS + chance.uniform(*CLUSTER_GAP)


WRITE_DECK = {"destroy session": 2, "delete key": 2, "fail": 3}


def _write_events(chance: random.Random, until: float) -> Iterator[Event]:
    names = [each.name for each in members()]
    failing_until = dict.fromkeys(instances(), 0.0)
    deck = _deck(chance, WRITE_DECK)
    now = chance.uniform(*WRITE_GAP)
    while now < until:
        kind = next(deck)
        if kind != "fail":
            yield Event(round(now, 2), kind, chance.choice(names))
        elif able := list(_passing(failing_until, now)):
            target = chance.choice(able)
            away = chance.uniform(4, 15)
            yield Event(round(now, 2), "fail", target)
            yield Event(round(now + away, 2), "pass", target)
            failing_until[target] = now + away + 3
        now += chance.uniform(*WRITE_GAP)


def _passing(failing_until: dict[str, float], now: float) -> Iterator[str]:
    """Those whose failing leaves their service two others."""
    for target, until in failing_until.items():
        service = target.partition("/")[0]
        failing = sum(each.startswith(service) and end > now for each, end in failing_until.items())
        if until <= now and not failing:
            yield target
