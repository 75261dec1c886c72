"""Every public name, used as a user would: `mypy --strict` reads this, nothing runs it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence

from consul_matchmaker import Host, Matchmaker, Registration, Settings, Snapshot, errors
from consul_matchmaker.backends import Registrar, Resolver
from consul_matchmaker.backends.memory import Memory


def look_up(mm: Matchmaker) -> list[str]:
    snapshot: Snapshot = mm.hosts("scheduler")
    one: Snapshot = mm.hosts("scheduler", server="node7")
    hosts: Sequence[Host] = snapshot
    several: tuple[Host, ...] = snapshot[:2] + snapshot.hosts
    first: Host = one[0]
    age: float = snapshot.age_seconds
    marks: tuple[bool, bool] = (snapshot.is_stale, snapshot.is_complete)
    where: str = f"{first.address} {first.port} {snapshot.topic} {snapshot.source} {age} {marks}"
    return [where, *map(str, hosts), *map(str, several)]


def pick(mm: Matchmaker) -> Host:
    try:
        mm.pick("scheduler", server="node7")
        mm.pick("scheduler", key=b"tenant-42")
        return mm.pick("scheduler", key="tenant-42")
    except errors.NoLiveHosts:
        return mm.wait_for_hosts("scheduler", timeout_seconds=20, server=None)[0]
    except (errors.Unavailable, errors.Denied, errors.MatchmakerError) as error:
        raise SystemExit(str(error)) from error


def register(mm: Matchmaker) -> Registration:
    with mm.register("scheduler", Host.parse("[::1]:9501")) as other:
        other.wait_until_published(timeout_seconds=5)
    registration: Registration = mm.register("scheduler", "10.0.0.5:9501", server="node7")
    named: tuple[str, Host, str | None] = (
        registration.topic,
        registration.host,
        registration.server,
    )
    registration.unregister()
    mm.register(named[0], Host.opaque("identity"))
    mm.unregister("scheduler", "10.0.0.5:9501")
    return registration


def feed_back(mm: Matchmaker, host: Host) -> int:
    mm.acknowledge("scheduler", host)
    mm.reject("scheduler", "10.0.0.5:9501")
    alive: bool = mm.is_alive("scheduler", host)
    count: int = mm.expire("scheduler", host)
    return count + alive


def watch(mm: Matchmaker) -> Iterator[Snapshot]:
    for snapshot in mm.watch("scheduler"):
        print(snapshot, *snapshot)
    yield from mm.watch("scheduler", server="node7")


def about(mm: Matchmaker) -> str:
    topics: list[str] = mm.topics()
    settings: Settings = mm.settings
    return json.dumps({"topics": topics, "prefix": settings.prefix, **mm.status()})


def make() -> None:
    with Matchmaker.from_url("consul+catalog://127.0.0.1:8600") as mm:
        look_up(mm)
    settings = Settings(mode="kv", session_ttl_seconds=10, watch=False)
    memory = Memory(session_ttl_seconds=10)
    both: tuple[Resolver, Registrar] = (memory, memory)
    matchmaker = Matchmaker(settings, backend=both[0])
    matchmaker.close(timeout_seconds=5)
    Matchmaker(Settings.from_env()).close()
    Matchmaker(Settings.from_mapping({"mode": "catalog"})).close()
    Matchmaker(Settings.from_url("consul+kv://127.0.0.1:8500/matchmaker")).close()
    Matchmaker.from_env().close()


EXCEPTIONS: tuple[type[errors.MatchmakerError], ...] = (
    errors.Closed,
    errors.ConfigurationError,
    errors.Denied,
    errors.InvalidTopic,
    errors.LeaseLost,
    errors.NoLiveHosts,
    errors.TimedOut,
    errors.Unavailable,
)
