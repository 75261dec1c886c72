"""Every public name, used as a user would: `mypy --strict` reads this, nothing runs it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence

from consul_matchmaker import (
    Host,
    Matchmaker,
    Registration,
    Settings,
    Snapshot,
    __version__,
    aio,
    errors,
)
from consul_matchmaker.backends import Registrar, Resolver
from consul_matchmaker.backends.memory import Memory
from consul_matchmaker.model import Instance


def look_up(mm: Matchmaker) -> list[str]:
    snapshot: Snapshot = mm.hosts("scheduler")
    one: Snapshot = mm.hosts("scheduler", server="node7")
    hosts: Sequence[Host] = snapshot
    several: tuple[Host, ...] = snapshot[:2] + snapshot.hosts
    first: Host = one[0]
    age: float = snapshot.age_seconds + snapshot.version
    marks: tuple[bool, bool, bool] = (
        snapshot.is_stale,
        snapshot.is_complete,
        snapshot.confirmed,
    )
    where: str = f"{first.address} {first.port} {snapshot.topic} {snapshot.source} {age} {marks}"
    instance: Instance = snapshot.instances[0]
    described: tuple[str, int] = str(instance.tags), instance.weight
    placed: list[str | None] = [instance.server, instance.node, instance.datacenter]
    placed += [f"{key}={value}" for key, value in (instance.meta or {}).items()]
    return [where, *map(str, hosts), *map(str, several), str(described), str(placed)]


def pick(mm: Matchmaker) -> Host:
    try:
        mm.pick("scheduler", server="node7")
        mm.pick("scheduler", key=b"tenant-42")
        mm.pick("scheduler", exclude={Host.parse("10.0.0.5:9501"), "10.0.0.6:9501"})
        mm.judge("scheduler", mm.picked(mm.hosts("scheduler"), None, key="t"), is_good=True)
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
    state: str = registration.state
    margin: float = registration.margin_seconds
    registration.unregister()

    def told(which: Registration, change: str) -> None:
        print(which, change, state, margin)

    beaten = mm.register("scheduler", "10.0.0.5:9502", on_change=told, beat_seconds=2)
    beaten.beat()
    beaten.drain(seconds=1.5)
    mm.register(named[0], Host.opaque("identity"))
    mm.register("web", port=8080, tags=["blue"], meta={"version": "7"}, weight=5)
    mm.register("web", "10.0.0.5:8080", check="http://10.0.0.5:8080/health").drain(2)
    mm.register("web", "10.0.0.5:8081", check="tcp://10.0.0.5:8081", is_up=True)
    mm.unregister("scheduler", "10.0.0.5:9501")
    return registration


def feed_back(mm: Matchmaker, host: Host) -> int:
    mm.acknowledge("scheduler", host)
    mm.reject("scheduler", "10.0.0.5:9501")
    alive: bool = mm.is_alive("scheduler", host)
    count: int = mm.expire("scheduler", host)
    return count + alive


def call(mm: Matchmaker) -> float:
    def sent(host: Host) -> float:
        return float(host.port or 0)

    tries = mm.attempts("scheduler", attempts=2, key="tenant-42")
    while True:
        attempt = tries.begin(mm.hosts("scheduler"))
        attempt.judge(is_good=sent(attempt.host) > 0)
        attempt.end()
        if not tries.may_retry():
            break
    mm.call("scheduler", sent, attempts=2, key=b"k", retry_on=(OSError,), timeout_seconds=3)
    return mm.call("scheduler", sent)


def watch(mm: Matchmaker) -> Iterator[Snapshot]:
    for snapshot in mm.watch("scheduler"):
        print(snapshot, *snapshot)
    yield from mm.watch("scheduler", server="node7")


def use(mm: Matchmaker) -> str:
    with mm.using("scheduler", server=None, key="tenant-42") as host:
        used: Host = host
    changed: Snapshot | None = mm.next_change(mm.hosts("scheduler"), timeout_seconds=1)
    held: Snapshot | None = mm.cached_hosts("scheduler")
    why: dict[str, object] = mm.explain("scheduler", server="node7")
    return json.dumps({"why": why, "used": str(used), "seen": [str(changed), str(held)]})


async def awaited() -> None:
    async with aio.Matchmaker.from_url("consul+kv://127.0.0.1:8500") as mm:
        snapshot: Snapshot = await mm.hosts("scheduler")
        host: Host = await mm.pick("scheduler", key="tenant-42")
        registration: aio.Registration = await mm.register("scheduler", host)
        web = await mm.register("web", port=8080, tags=["blue"], meta={"version": "7"}, weight=5)
        await web.unregister()
        async with registration:
            await registration.wait_until_published(timeout_seconds=5)

        async def sent(host: Host) -> float:
            return float(host.port or 0)

        answer: float = await mm.call("scheduler", sent, attempts=2, timeout_seconds=3)
        print(answer, await mm.pick("scheduler", exclude=[host]))
        async with mm.using("scheduler") as used:
            print(used.port, snapshot)
        async for each in mm.watch("scheduler"):
            print(each.confirmed)
        count: int = await mm.expire("scheduler", host)
        print(count, mm.sync.status(), await mm.topics())


def about(mm: Matchmaker) -> str:
    topics: list[str] = mm.topics()
    settings: Settings = mm.settings
    return json.dumps({"topics": topics, "prefix": settings.prefix, **mm.status()})


def make() -> None:
    with Matchmaker.from_url("consul+catalog://127.0.0.1:8600") as mm:
        look_up(mm)
    with Matchmaker.from_url("consul+service://127.0.0.1:8500") as mm:
        register(mm)
    settings = Settings(mode="kv", session_ttl_seconds=10, watch=False)
    memory = Memory(session_ttl_seconds=10)
    both: tuple[Resolver, Registrar] = (memory, memory)
    matchmaker = Matchmaker(settings, backend=both[0])
    matchmaker.close(timeout_seconds=5)
    Matchmaker(Settings.from_env()).close()
    Matchmaker(Settings.from_mapping({"mode": "catalog"})).close()
    Matchmaker(Settings.from_url("consul+kv://127.0.0.1:8500/matchmaker")).close()
    Matchmaker.from_env().close()


VERSION: str = __version__

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
