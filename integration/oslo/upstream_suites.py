"""Run upstream's own tests, as released, with the consul matchmaker and with redis, and count.

    python -m integration.oslo.upstream_suites FOLDER [--only NAME]

FOLDER gets the releases that hold them: the functional tests come with 8.1.4, the tests of
matchmakers came with 6.0.0 and 1.8.3 and run against what 8.1.4 has.  Nothing of them is copied or
changed; what Python took away since (names in unittest and threading) is given back first.
Exits 1 when consul fails a test that redis passes.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tarfile
import threading
import unittest
import uuid
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from integration.oslo.redis_server import NoRedis, Redis

SUITES = ("functional-8.1.4", "matchmaker-6.0.0", "matchmaker-1.8.3")
SUITE_SECONDS = 400.0
REDIS_PORT = 6379  # upstream's tests of matchmakers know no other


def fetch(folder: Path) -> None:
    """Download and unpack what is not there yet."""
    for version in ("6.0.0", "1.8.3"):
        place = folder / version
        if place.exists():
            continue
        words = ["download", "--quiet", "--no-deps", "--dest", str(folder)]
        pip = [sys.executable, "-m", "pip"]
        subprocess.run([*pip, *words, f"oslo.messaging=={version}"], check=True)
        (archive,) = folder.glob(f"oslo?messaging-{version}[.-]*")
        if archive.suffix == ".whl":
            with zipfile.ZipFile(archive) as wheel:
                wheel.extractall(place)
        else:
            with tarfile.open(archive) as source:
                source.extractall(folder / "unpacked", filter="data")
            (unpacked,) = (folder / "unpacked").glob(f"*{version}")
            unpacked.rename(place)


def prepare(folder: Path) -> None:
    """Import upstream patched by eventlet, as its tests have it, with older releases behind it."""
    for owner, old, new in (
        (threading.Thread, "isAlive", "is_alive"),
        (unittest.TestCase, "assertItemsEqual", "assertCountEqual"),
    ):
        if not hasattr(owner, old):
            setattr(owner, old, getattr(owner, new))
    from oslo_messaging import _drivers
    from oslo_messaging.tests import drivers

    from consul_matchmaker.adapters.oslo_zmq import enable

    for version in ("6.0.0", "1.8.3"):
        root = folder / version / "oslo_messaging"
        drivers.__path__.append(str(root / "tests" / "drivers"))
        _drivers.__path__.append(str(root / "_drivers"))
    enable()


def suite(name: str, matchmaker: str) -> unittest.TestSuite:
    """The tests of one suite for one matchmaker."""
    loader = unittest.TestLoader()
    if name == "functional-8.1.4":
        from oslo_messaging.tests import functional

        folder = Path(str(functional.__file__)).parent
        top = folder.parent.parent.parent
        return loader.discover(str(folder), top_level_dir=str(top))
    if name == "matchmaker-6.0.0":
        from oslo_messaging.tests.drivers.zmq.matchmaker import test_impl_matchmaker as six

        case = six.TestImplMatchmaker
        case.scenarios = [(matchmaker, {"rpc_zmq_matchmaker": matchmaker})]
        if matchmaker == "consul":
            case.setUp = _with_own_prefix(case.setUp)
        return loader.loadTestsFromModule(six)
    from oslo_messaging._drivers.zmq_driver.matchmaker import zmq_matchmaker_redis
    from oslo_messaging.tests.drivers import test_matchmaker_redis as one

    # 8.1.4's fixture registers options of the same names as Kilo's module, in the same group.
    zmq_matchmaker_redis.matchmaker_redis_opts = []

    if matchmaker == "consul":
        one.RedisMatchMakerTest.setUp = _with_own_prefix(one.RedisMatchMakerTest.setUp)
        one.matchmaker_redis.MatchMakerRedis = _with_sets()
    else:
        # Kilo's tests compare texts, and on Python 3 a Redis client answers bytes.
        one.matchmaker_redis.redis = _TextRedis(one.matchmaker_redis.redis)
    return loader.loadTestsFromModule(one)


def _with_own_prefix(set_up: Any) -> Any:
    """What flushing the database is to the tests of redis."""

    def set_up_apart(self: Any) -> None:
        os.environ["CONSUL_MATCHMAKER_PREFIX"] = f"suite-{uuid.uuid4().hex}"
        set_up(self)

    return set_up_apart


class _TextRedis:
    def __init__(self, redis: Any) -> None:
        self._redis = redis

    def StrictRedis(self, **words: Any) -> Any:
        return self._redis.StrictRedis(decode_responses=True, **words)


def _with_sets() -> Any:
    """Our classic matchmaker; Kilo's tests look into the sets behind redis', so it shows some."""
    from consul_matchmaker.adapters.matchmaker_consul import MatchMakerConsul

    class WithSets(MatchMakerConsul):
        @property
        def redis(self) -> Any:
            return self

        def smembers(self, topic: str) -> set[str]:
            return {key for key, _ in self.queues(f"fanout~{topic}")}

    return WithSets


def run_one(folder: Path, name: str, matchmaker: str) -> None:
    prepare(folder)
    result = unittest.TextTestRunner(verbosity=1).run(suite(name, matchmaker))
    bad = [test.id() for test, _ in (*result.failures, *result.errors)]
    counts = {"ran": result.testsRun, "skipped": len(result.skipped), "bad": sorted(bad)}
    print("\n" + json.dumps(counts), flush=True)
    os._exit(0)  # upstream leaves threads behind that are not daemons


def run_all(folder: Path, only: str | None) -> int:
    from consul_matchmaker.testing.local_consul import LocalCluster

    folder.mkdir(parents=True, exist_ok=True)
    fetch(folder)
    worse = 0
    with Redis(folder, REDIS_PORT), LocalCluster() as cluster:
        agent = cluster.nodes["agent1"].http
        for name in SUITES if only is None else (only,):
            with ThreadPoolExecutor() as side_by_side:  # the most of it is waiting
                running = {
                    matchmaker: side_by_side.submit(_counts, folder, name, matchmaker, agent)
                    for matchmaker in ("consul", "redis")
                }
            found = {matchmaker: counts.result() for matchmaker, counts in running.items()}
            for matchmaker, counts in found.items():
                passed = counts["ran"] - counts["skipped"] - len(counts["bad"])
                print(
                    f"{name:18} {matchmaker:7} {passed} passed, "
                    f"{counts['skipped']} skipped, failed: {counts['bad'] or 'none'}"
                )
            worse += len(set(found["consul"]["bad"]) - set(found["redis"]["bad"]))
    return 1 if worse else 0


def _counts(folder: Path, name: str, matchmaker: str, agent: str) -> Any:
    urls = {"consul": f"zmq+consul://{agent}/", "redis": f"zmq+redis://127.0.0.1:{REDIS_PORT}/"}
    environment = {
        **os.environ,
        "TRANSPORT_URL": urls[matchmaker],
        "CONSUL_MATCHMAKER_MODE": "kv",
        "CONSUL_MATCHMAKER_ADDRESSES": agent,
        "CONSUL_MATCHMAKER_PREFIX": f"suite-{uuid.uuid4().hex}",
        "CONSUL_MATCHMAKER_WATCH": "true",
    }
    if name.startswith("functional"):
        environment.pop("CONSUL_MATCHMAKER_ADDRESSES")
    command = [sys.executable, "-W", "ignore", "-m", "integration.oslo.upstream_suites"]
    log = folder / f"{name}-{matchmaker}.log"
    with log.open("w") as errors:
        done = subprocess.run(
            [*command, str(folder), "--run", name, matchmaker],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            timeout=SUITE_SECONDS,
            check=False,
        )
    try:
        return json.loads(done.stdout.splitlines()[-1])
    except (IndexError, ValueError):
        raise SystemExit(f"{name} with {matchmaker} did not run: see {log}") from None


def main() -> None:
    folder = Path(sys.argv[1]).absolute()
    if sys.argv[2:3] == ["--run"]:
        run_one(folder, *sys.argv[3:5])
    try:
        raise SystemExit(run_all(folder, sys.argv[3] if sys.argv[2:3] == ["--only"] else None))
    except NoRedis as error:
        raise SystemExit(str(error)) from None


if __name__ == "__main__":
    main()
