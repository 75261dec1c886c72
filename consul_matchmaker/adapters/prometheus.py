"""Hand the figures of `Matchmaker.status()` to Prometheus; needs the extra ``metrics``.

prometheus_client.REGISTRY.register(MatchmakerCollector(mm))
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

from ..matchmaker import Matchmaker
from .extras import extra

with extra("metrics"):
    from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
    from prometheus_client.registry import Collector

PREFIX = "consul_matchmaker_"
WIRE = {
    "queries": "Queries sent to agents.",
    "retries": "Queries sent once more.",
    "replies": "Replies of agents.",
    "error_replies": "Replies by which an agent refused, or could not help.",
    "sent_bytes": "DNS or HTTP messages sent to agents.",
    "received_bytes": "DNS or HTTP messages received from agents.",
}


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
        yield self._counters(
            "lookups", "Lookups, by what they found.", "found", cache["lookups_that_found"]
        )
        yield self._counters(
            "questions", "Answers of Consul and failures to get one.", "outcome", cache["questions"]
        )
        yield self._counter(
            "question_seconds", "Time spent waiting for answers.", cache["seconds_asking"]
        )
        yield self._gauge(
            "longest_question_seconds",
            "The longest time that one answer took.",
            cache["longest_question_seconds"],
        )
        yield self._counter("evictions", "Topics that made room for others.", cache["evictions"])
        yield self._gauges("topics", "Topics in memory.", "state", cache["states"])
        yield self._gauge(
            "doubted_topics", "Topics whose newest answer is not believed yet.", cache["doubted"]
        )
        yield from self._backend(status["backend"] or {})
        yield from self._wire(status["wire"])
        yield self._counter("quarantines", "Rejections that counted.", status["quarantines"])
        yield self._gauges(
            "quarantined_hosts",
            "Hosts that pick avoids now.",
            "topic",
            {topic: len(hosts) for topic, hosts in status["quarantine"].items()},
        )
        watcher = status["watcher"]
        if watcher is not None:
            yield self._gauge("watching", "1 while a watch is held.", watcher["is_watching"])
            yield self._counter("watch_answers", "Answers to the watch.", watcher["answers"])
        keeper = status["keeper"]
        if keeper is not None:
            yield self._counters(
                "lease_events", "What became of the lease.", "event", keeper["counts"]
            )
            standings = Counter(each["standing"] for each in keeper["registrations"])
            yield self._gauges(
                "registrations", "What this process registers.", "standing", standings
            )

    def _backend(self, backend: Mapping[str, Any]) -> Iterator[Metric]:
        if "agents_away" in backend:
            away = len(backend["agents_away"])
            yield self._gauge("agents_away", "Agents that are left alone for now.", away)
        if "unknown_keys" in backend:
            keys = backend["unknown_keys"]
            yield self._gauge("unknown_keys", "Keys under the prefix that are not ours.", keys)

    def _wire(self, wire: Mapping[str, Mapping[str, int]]) -> Iterator[Metric]:
        for name, text in WIRE.items():
            values = {transport: counts[name] for transport, counts in wire.items()}
            yield self._counters(name, text, "transport", values)

    def _counter(self, name: str, text: str, value: float) -> Metric:
        family = CounterMetricFamily(PREFIX + name, text, labels=list(self._labels))
        family.add_metric(list(self._labels.values()), value)
        return family

    def _gauge(self, name: str, text: str, value: float) -> Metric:
        family = GaugeMetricFamily(PREFIX + name, text, labels=list(self._labels))
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
