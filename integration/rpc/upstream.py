"""Run the functional tests of the oslo.messaging that is installed, unchanged, and count.

    python -m integration.rpc.upstream [--url URL|rabbitmq|consul]
        [--executor threading|eventlet|both] [--only WORD]

`rabbitmq`, the default, and `consul` start what they need; RabbitMQ passes all 30 tests.  A URL has
to say all by itself, as upstream's tests read no configuration file.  Left out is MetricsTestCase,
which takes port 3000 of the machine.  Two tests, which upstream reserves to `rabbit://`, run for
every URL.  `both` runs four processes side by side, a module with an executor each, as the
most of the time is waiting.  Exits 1 when a test failed or was skipped, or when none passed.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib
import os
import subprocess
import sys
import tempfile
import unittest
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

from consul_matchmaker.errors import MatchmakerError
from integration.rpc.certificates import NoOpenssl
from integration.rpc.rabbitmq import NoRabbitMQ
from integration.rpc.transports import named

MODULES = ("functional.test_functional", "functional.notify.test_logger")
LEFT_OUT = ("MetricsTestCase",)
RESERVED = ("test_mandatory_call", "test_monitor_long_call")
"""They skip unless the URL starts with `rabbit://`."""
EXECUTORS = ("threading", "eventlet")
SUITE_SECONDS = 600.0  # three minutes are usual
TEST_SECONDS = 120  # the longest waits 15 s; one that hangs fails and the rest runs


class Unreserved(str):
    """A URL that says of itself that it is RabbitMQ's, whatever it is."""

    def startswith(self, prefix: Any, *where: Any) -> bool:
        return prefix == "rabbit://" or super().startswith(prefix, *where)


def unreserve(case: Any) -> None:
    """Have the reserved tests of *case* run, with the transport that the URL names."""
    set_up = case.setUp

    def set_up_unreserved(self: Any) -> None:
        set_up(self)
        if self._testMethodName in RESERVED:
            self.rpc_url = Unreserved(self.rpc_url)

    case.setUp = set_up_unreserved


def use_threads() -> None:
    """Upstream's tests patch all of Python by eventlet when they are imported, and their fixtures
    name `eventlet`: they find it patched already, and whatever they make gets `threading`."""
    import eventlet
    import oslo_messaging

    with mock.patch.object(eventlet, "monkey_patch"):
        importlib.import_module("oslo_messaging.tests")

    def threaded(make: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(make)
        def made(*values: Any, **words: Any) -> Any:
            values = tuple("threading" if each == "eventlet" else each for each in values)
            if words.get("executor") == "eventlet":
                words["executor"] = "threading"
            return make(*values, **words)

        return made

    for name in (
        "get_rpc_server",
        "get_notification_listener",
        "get_batch_notification_listener",
    ):
        setattr(oslo_messaging, name, threaded(getattr(oslo_messaging, name)))


def stay_local() -> None:
    """Have servers listen on 127.0.0.1; upstream's tests refuse a URL that says so."""
    from oslo_config import cfg

    from consul_matchmaker.adapters.oslo.http.options import OPTIONS

    cfg.set_defaults(OPTIONS, host="127.0.0.1")


def each_test(suite: Any) -> Iterator[unittest.TestCase]:
    for test in suite:
        if isinstance(test, unittest.TestSuite):
            yield from each_test(test)
        else:
            yield test


def tests(only: str) -> unittest.TestSuite:
    """Those whose names have *only* in them."""
    from oslo_messaging.tests.functional import test_functional

    unreserve(test_functional.CallTestCase)
    loader = unittest.TestLoader()
    found = loader.loadTestsFromNames([f"oslo_messaging.tests.{name}" for name in MODULES])
    if loader.errors:
        raise SystemExit("\n".join(map(str, loader.errors)))
    return unittest.TestSuite(
        test
        for test in each_test(found)
        if type(test).__name__ not in LEFT_OUT and only in test.id()
    )


class Result(unittest.TextTestResult):
    """Keeps also the names of those that passed."""

    def __init__(self, *values: Any, **words: Any) -> None:
        super().__init__(*values, **words)
        self.passed: list[str] = []

    def addSuccess(self, test: unittest.TestCase) -> None:
        super().addSuccess(test)
        self.passed.append(test.id())


def run(url: str, executor: str, only: str = "") -> int:
    """Print what passed, failed and was skipped; return the exit code."""
    os.environ.update(RPC_TRANSPORT_URL=url, NOTIFY_TRANSPORT_URL=url)
    os.environ.setdefault("OS_TEST_TIMEOUT", str(TEST_SECONDS))
    os.environ.setdefault("OS_LOG_CAPTURE", "1")  # what a test logged is shown where it failed
    if executor == "threading":
        use_threads()
    if url.startswith("consul"):
        stay_local()
    runner = unittest.TextTestRunner(verbosity=2, resultclass=Result)
    result = runner.run(tests(only))
    assert isinstance(result, Result)
    from eventlet.patcher import is_monkey_patched

    if is_monkey_patched("socket") != (executor == "eventlet"):
        raise SystemExit(f"the tests did not run with {executor}: something patched Python")
    failed = [test.id() for test, _ in (*result.failures, *result.errors)]
    groups = {
        "passed": result.passed,
        "failed": failed,
        "skipped": [f"{test.id()}: {why}" for test, why in result.skipped],
    }
    print(f"\n{release()}, {executor}, {url.partition(':')[0]}")
    for name, ids in groups.items():
        print(f"{len(ids):3} {name}")
        for each in sorted(ids):
            print(f"      {each.removeprefix('oslo_messaging.tests.functional.')}")
    return 1 if failed or result.skipped or not result.passed else 0


def release() -> str:
    from importlib.metadata import version

    return f"oslo.messaging {version('oslo.messaging')}"


def run_patched() -> None:
    """Start this program again under eventlet, unless it is."""
    from eventlet.patcher import is_monkey_patched

    if not is_monkey_patched("socket"):
        flags = [f"-W{each}" for each in sys.warnoptions]
        modules = ["-m", "integration.rpc.patched", "integration.rpc.upstream"]
        os.execv(sys.executable, [sys.executable, *flags, *modules, *sys.argv[1:]])


def run_both(what: str, words: list[str]) -> int:
    """Each executor, which has a transport of its own, and each of *words* in a process of its own;
    say what one said after what another did."""
    with contextlib.ExitStack() as stack:
        running = []
        for executor in EXECUTORS:
            url = stack.enter_context(named(what))[False].url
            for only in words:
                log = stack.enter_context(tempfile.TemporaryFile())
                process = subprocess.Popen(
                    [
                        *(sys.executable, "-W", "ignore", "-m", "integration.rpc.upstream"),
                        *("--url", url, "--executor", executor, "--only", only),
                    ],
                    stdout=log,
                    stderr=subprocess.STDOUT,
                )
                stack.callback(process.kill)
                running.append((process, log))
        code = 0
        for process, log in running:
            code |= abs(process.wait(SUITE_SECONDS))
            log.seek(0)
            print(log.read().decode(errors="replace"))
        return code


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m integration.rpc.upstream", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--url", default="rabbitmq", help="rabbitmq, consul, or a transport's URL")
    parser.add_argument("--executor", choices=(*EXECUTORS, "both"), default="threading")
    parser.add_argument("--only", default="", metavar="WORD", help="tests that have it in the name")
    options = parser.parse_args()
    if options.executor == "eventlet":
        run_patched()
    try:
        if options.executor == "both":
            return run_both(options.url, [options.only] if options.only else list(MODULES))
        with named(options.url) as transports:
            return run(transports[False].url, options.executor, options.only)
    except (NoRabbitMQ, NoOpenssl, MatchmakerError) as error:
        print(error)
        return 2


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # a test that hung leaves threads behind that are not daemons
