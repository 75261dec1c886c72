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
        yield self._counter(
            "lookups", "Lookups, by what they found.", cache["lookups_that_found"], "found"
        )
        yield self._counter(
            "questions", "Answers of Consul and failures to get one.", cache["questions"], "outcome"
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
        yield self._gauge("topics", "Topics in memory.", cache["states"], "state")
        yield self._gauge(
            "doubted_topics", "Topics whose newest answer is not believed yet.", cache["doubted"]
        )
        yield from self._backend(status["backend"] or {})
        for name, text in WIRE.items():
            values = {transport: counts[name] for transport, counts in status["wire"].items()}
            yield self._counter(name, text, values, "transport")
        yield self._counter("quarantines", "Rejections that counted.", status["quarantines"])
        quarantined = {topic: len(hosts) for topic, hosts in status["quarantine"].items()}
        yield self._gauge("quarantined_hosts", "Hosts that pick avoids now.", quarantined, "topic")
        watcher = status["watcher"]
        if watcher is not None:
            yield self._gauge("watching", "1 while a watch is held.", watcher["is_watching"])
            yield self._counter("watch_answers", "Answers to the watch.", watcher["answers"])
        keeper = status["keeper"]
        if keeper is not None:
            yield self._counter(
                "lease_events", "What became of the lease.", keeper["counts"], "event"
            )
            standings = Counter(each["standing"] for each in keeper["registrations"])
            yield self._gauge(
                "registrations", "What this process registers.", standings, "standing"
            )

    def _backend(self, backend: Mapping[str, Any]) -> Iterator[Metric]:
        if "agents_away" in backend:
            away = len(backend["agents_away"])
            yield self._gauge("agents_away", "Agents that are left alone for now.", away)
        if "unknown_keys" in backend:
            keys = backend["unknown_keys"]
            yield self._gauge("unknown_keys", "Keys under the prefix that are not ours.", keys)

    def _counter(
        self, name: str, text: str, value: float | Mapping[str, float], by: str = ""
    ) -> Metric:
        return self._filled(CounterMetricFamily, name, text, value, by)

    def _gauge(
        self, name: str, text: str, value: float | Mapping[str, float], by: str = ""
    ) -> Metric:
        return self._filled(GaugeMetricFamily, name, text, value, by)

    def _filled(
        self, kind: Any, name: str, text: str, value: float | Mapping[str, float], by: str
    ) -> Metric:
        """One figure, or with *by* one for each value of that label."""
        family = kind(PREFIX + name, text, labels=[*self._labels, *([by] if by else [])])
        for key, figure in value.items() if isinstance(value, Mapping) else [(None, value)]:
            family.add_metric([*self._labels.values(), *([key] if by else [])], figure)
        filled: Metric = family
        return filled
