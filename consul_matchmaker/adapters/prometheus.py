"""Hand the figures of `Matchmaker.status()` to Prometheus; needs the extra ``metrics``.

prometheus_client.REGISTRY.register(MatchmakerCollector(mm))
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from ..matchmaker import Matchmaker

PREFIX = "consul_matchmaker_"


class MatchmakerCollector(Collector):
    """The figures of one matchmaker, read when Prometheus asks; asks nobody else.  Thread-safe.

    *labels* tell several matchmakers of one process apart; every figure carries them.
    """

    def __init__(self, matchmaker: Matchmaker, labels: Mapping[str, str] | None = None) -> None:
        self._matchmaker = matchmaker
        self._labels = dict(labels or {})

    def describe(self) -> list[Metric]:
        """Nothing: registering must not ask."""
        return []

    def collect(self) -> Iterator[Metric]:
        """Every figure, as it is now."""
        status: dict[str, Any] = self._matchmaker.status()
        cache = status["cache"]
        yield self._counter("lookups", "Lookups, all of them.", cache["lookups"])
        yield self._counters(
            "lookups_not_fresh",
            "Lookups that found no fresh answer; at most one a second a topic is counted.",
            "found",
            cache["lookups_that_found"],
        )
        yield self._counters(
            "questions", "Answers of Consul and failures to get one.", "outcome", cache["questions"]
        )
        yield self._counter(
            "question_seconds", "Time spent waiting for answers.", cache["seconds_asking"]
        )
        yield self._counter("evictions", "Topics that made room for others.", cache["evictions"])
        yield self._gauges("topics", "Topics in memory.", "state", cache["states"])
        yield self._counter("quarantines", "Rejections that counted.", status["quarantines"])
        yield self._gauges(
            "quarantined_hosts",
            "Hosts that pick avoids now.",
            "topic",
            {topic: len(hosts) for topic, hosts in status["quarantine"].items()},
        )
        keeper = status["keeper"]
        if keeper is not None:
            yield self._counters(
                "lease_events", "What became of the lease.", "event", keeper["counts"]
            )
            standings = Counter(each["standing"] for each in keeper["registrations"])
            yield self._gauges(
                "registrations", "What this process registers.", "standing", standings
            )

    def _counter(self, name: str, text: str, value: float) -> Metric:
        family = CounterMetricFamily(PREFIX + name, text, labels=list(self._labels))
        family.add_metric(list(self._labels.values()), value)
        return family

    def _counters(self, name: str, text: str, by: str, values: Mapping[str, float]) -> Metric:
        family = CounterMetricFamily(PREFIX + name, text, labels=[*self._labels, by])
        for key, value in values.items():
            family.add_metric([*self._labels.values(), key], value)
        return family

    def _gauges(self, name: str, text: str, by: str, values: Mapping[str, float]) -> Metric:
        family = GaugeMetricFamily(PREFIX + name, text, labels=[*self._labels, by])
        for key, value in values.items():
            family.add_metric([*self._labels.values(), key], value)
        return family
