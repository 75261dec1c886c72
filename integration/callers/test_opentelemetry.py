"""The figures of status() as OpenTelemetry collects them, and the host of a call on its span."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import threading
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.trace import SpanKind
from prometheus_client import Metric

from consul_matchmaker import Host, Matchmaker, Settings, errors
from consul_matchmaker.adapters.opentelemetry import instrument
from consul_matchmaker.adapters.prometheus import MatchmakerCollector
from consul_matchmaker.adapters.tracing import name_host
from consul_matchmaker.backends.memory import Memory

SECONDS = 10.0


class Counting(Matchmaker):
    """Counts how often it was asked for its status."""

    asked = 0

    def status(self) -> dict[str, object]:
        self.asked += 1
        return super().status()


class Collected:
    """One meter, and what a reader of it collects."""

    def __init__(self) -> None:
        self.reader = InMemoryMetricReader()
        self.other_reader = InMemoryMetricReader()
        self.provider = MeterProvider([self.reader, self.other_reader])
        self.meter = self.provider.get_meter("test")

    def metrics(self, reader: InMemoryMetricReader | None = None) -> dict[str, Any]:
        """Each by its name; fails where two have the same."""
        data = (reader or self.reader).get_metrics_data()
        found = [
            metric
            for resource in (data.resource_metrics if data else ())
            for scope in resource.scope_metrics
            for metric in scope.metrics
        ]
        metrics = {metric.name: metric for metric in found}
        assert len(metrics) == len(found)
        return metrics

    def values(self, name: str, *labels: str) -> dict[Any, Any]:
        """The figure of that name, by the values of those attributes."""
        metric = self.metrics().get(f"consul_matchmaker.{name}")
        points = metric.data.data_points if metric else ()
        return {tuple(point.attributes[label] for label in labels): point.value for point in points}


@pytest.fixture
def collected() -> Iterator[Collected]:
    made = Collected()
    yield made
    made.provider.shutdown()


@pytest.fixture
def memory() -> Memory:
    memory = Memory()
    memory.declare("web", ["10.0.0.1:80", "10.0.0.2:80"])
    return memory


def kv(**values: Any) -> Settings:
    return Settings(mode="kv", **values)


# --- metrics -------------------------------------------------------------------------------------


def test_the_figures_of_status(collected: Collected, memory: Memory) -> None:
    """Lookups, questions, quarantines, the lease and registrations, with their attributes."""
    with Matchmaker(kv(quarantine_seconds=30), backend=memory) as mm:
        instrument(mm, collected.meter, {"name": "rpc"})
        mm.register("mails", "10.0.0.3:25").wait_until_published(timeout_seconds=SECONDS)
        for _ in range(3):
            mm.hosts("web")
        mm.reject("web", "10.0.0.1:80")
        memory.is_available = False
        with pytest.raises(errors.Unavailable):
            mm.hosts("jobs")
        memory.is_available = True
        lookups = collected.values("lookups", "name", "found")
        assert lookups["rpc", "memory"] == 2
        assert lookups["rpc", "asked"] == 2
        assert collected.values("questions", "outcome")["failed",] == 1
        assert collected.values("topics", "name", "state")["rpc", "fresh"] == 1
        assert collected.values("quarantines", "name") == {("rpc",): 1}
        assert collected.values("quarantined_hosts", "topic") == {("web",): 1}
        assert collected.values("lease_events", "event")["published",] == 1
        assert collected.values("registrations", "name", "standing") == {("rpc", "published"): 1}
        assert collected.values("queries") == {}  # a backend in memory has no wire


@pytest.mark.parametrize("mode", ["kv", "catalog", "service"])
def test_a_prometheus_exporter_shows_the_names_that_our_own_has(
    mode: Any, collected: Collected
) -> None:
    """By its rules: dots become underscores, the unit of seconds and bytes follows the name."""
    with Matchmaker(Settings(mode=mode)) as mm:
        instrument(mm, collected.meter)
        theirs = {
            name.replace(".", "_") + {"s": "_seconds", "By": "_bytes"}.get(metric.unit, ""): metric
            for name, metric in collected.metrics().items()
        }
        ours: dict[str, Metric] = {
            family.name: family for family in MatchmakerCollector(mm).collect() if family.samples
        }
        assert sorted(theirs) == sorted(ours)
        for name, family in ours.items():
            metric = theirs[name]
            is_counter = getattr(metric.data, "is_monotonic", False)
            assert is_counter is (family.type == "counter"), name
            assert metric.description == family.documentation
            assert len(metric.data.data_points) == len(family.samples)
            assert metric.unit


def test_a_collection_asks_for_the_status_once(collected: Collected, memory: Memory) -> None:
    """Whichever reader collects, and every time anew."""
    with Counting(kv(), backend=memory) as mm:
        instrument(mm, collected.meter)
        assert mm.asked == 0
        for count, reader in enumerate(
            [collected.reader, collected.other_reader, collected.reader], start=1
        ):
            mm.hosts("web")
            found = collected.metrics(reader)
            assert mm.asked == count
            lookups = found["consul_matchmaker.lookups"].data.data_points
            assert sum(point.value for point in lookups) == count


def test_two_readers_may_collect_at_the_same_time(collected: Collected, memory: Memory) -> None:
    """Each collection sees every figure, of one status of its own."""
    with Counting(kv(), backend=memory) as mm:
        instrument(mm, collected.meter)
        mm.hosts("web")
        names = collected.metrics().keys()
        seen: list[Any] = []

        def collect(reader: InMemoryMetricReader) -> None:
            for _ in range(50):
                seen.append(collected.metrics(reader).keys())

        readers = (collected.reader, collected.other_reader)
        threads = [threading.Thread(target=collect, args=(reader,)) for reader in readers]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert seen == [names] * 100
        assert mm.asked == 101


def test_two_matchmakers_share_the_instruments_of_a_meter(
    collected: Collected, memory: Memory, caplog: pytest.LogCaptureFixture
) -> None:
    """Attributes tell them apart; nothing is registered twice, also not for the same one again."""
    with Matchmaker(kv(), backend=memory) as one, Matchmaker(kv(), backend=memory) as other:
        instrument(one, collected.meter, {"name": "first"})
        instrument(other, collected.meter, {"name": "other"})
        instrument(one, collected.meter, {"name": "one"})
        one.hosts("web")
        lookups = collected.values("lookups", "name", "found")
        assert lookups["one", "asked"] == 1
        assert lookups["other", "asked"] == 0
        assert {name for name, _ in lookups} == {"one", "other"}
    assert not caplog.records


def test_what_is_closed_or_forgotten_has_no_figures(collected: Collected, memory: Memory) -> None:
    """And is not kept by the meter, which lives as long as the program."""
    closed, forgotten = Matchmaker(kv(), backend=memory), Matchmaker(kv(), backend=memory)
    instrument(closed, collected.meter, {"name": "closed"})
    instrument(forgotten, collected.meter, {"name": "forgotten"})
    assert len(collected.values("evictions", "name")) == 2
    closed.close()
    assert collected.values("evictions", "name") == {("forgotten",): 0}
    watched = [weakref.ref(closed), weakref.ref(forgotten)]
    del closed, forgotten
    gc.collect()
    assert [one() for one in watched] == [None, None]
    assert collected.values("evictions", "name") == {}


def test_a_forked_child_has_figures_of_its_own(collected: Collected, memory: Memory) -> None:
    """They begin at 0, as its matchmaker has asked nothing yet."""
    with Matchmaker(kv(), backend=memory) as mm:
        instrument(mm, collected.meter)
        mm.hosts("web")
        assert collected.values("questions", "outcome")["answered",] == 1
        child = os.fork()
        if child == 0:
            try:
                asked = collected.values("questions", "outcome")["answered",]
                os._exit(10 + asked)
            finally:
                os._exit(1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 10


GLOBAL = """
from consul_matchmaker import Matchmaker, Settings, __version__
from consul_matchmaker.adapters.opentelemetry import instrument
from consul_matchmaker.backends.memory import Memory
from opentelemetry import metrics
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
early, late = (Matchmaker(Settings(mode="kv"), backend=Memory()) for _ in range(2))
instrument(early, attributes={"name": "early"})
reader = InMemoryMetricReader()
metrics.set_meter_provider(MeterProvider([reader]))
instrument(late, attributes={"name": "late"})
(resource,) = reader.get_metrics_data().resource_metrics
(scope,) = resource.scope_metrics
assert (scope.scope.name, scope.scope.version) == ("consul_matchmaker", __version__)
(evictions,) = [one for one in scope.metrics if one.name == "consul_matchmaker.evictions"]
print(sorted(point.attributes["name"] for point in evictions.data.data_points))
"""


def test_the_global_provider_may_be_set_before_or_after() -> None:
    """Both matchmakers are seen, by one meter of our name."""
    assert said_by(GLOBAL) == "['early', 'late']"


def said_by(program: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout.strip()


# --- the host on a span --------------------------------------------------------------------------


def test_the_host_is_on_the_span_of_the_call() -> None:
    """The last one, where there were several; a host without a port has none."""
    tracer = TracerProvider().get_tracer("test")
    with tracer.start_as_current_span("call", kind=SpanKind.CLIENT) as span:
        name_host(Host("10.0.0.1", 80))
        name_host(Host("fd00::2", 8080))
    found: Any = span
    assert dict(found.attributes) == {"server.address": "fd00::2", "server.port": 8080}
    with tracer.start_as_current_span("call") as span:
        name_host(Host.opaque("identity"))
    found = span
    assert dict(found.attributes) == {"server.address": "identity"}


@pytest.mark.parametrize("kind", [SpanKind.SERVER, SpanKind.CONSUMER])
def test_the_span_of_a_request_that_is_served_stays_as_it_is(kind: SpanKind) -> None:
    """There server.address is the address of this process."""
    tracer = TracerProvider().get_tracer("test")
    with tracer.start_as_current_span("serve", kind=kind) as span:
        name_host(Host("10.0.0.1", 80))
    found: Any = span
    assert dict(found.attributes) == {}


def test_without_a_span_or_without_opentelemetry_nothing_is_named() -> None:
    """And nothing fails; without it nothing is imported either."""
    name_host(Host("10.0.0.1", 80))
    program = """
import sys
sys.modules["opentelemetry"] = None  # as if it were not installed
from consul_matchmaker import Host
from consul_matchmaker.adapters.tracing import name_host
name_host(Host("10.0.0.1", 80))
print(sorted(name for name in sys.modules if name.startswith("opentelemetry")))
"""
    assert said_by(program) == "['opentelemetry']"
