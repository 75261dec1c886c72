"""Hand the figures of `Matchmaker.status()` to Prometheus; needs the extra ``metrics``.

prometheus_client.REGISTRY.register(MatchmakerCollector(mm))
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from ..matchmaker import Matchmaker
from .extras import extra
from .figures import FIGURES, Figure, Value

with extra("metrics"):
    from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
    from prometheus_client.registry import Collector

PREFIX = "consul_matchmaker_"
UNITS = {"s": "_seconds", "By": "_bytes"}


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
        status = self._matchmaker.status()
        for figure in FIGURES:
            value = figure.of(status)
            if value is not None:
                yield self._filled(figure, value)

    def _filled(self, figure: Figure, value: Value) -> Metric:
        kind = CounterMetricFamily if figure.kind == "counter" else GaugeMetricFamily
        labels = [*self._labels, *([figure.by] if figure.by else [])]
        name = PREFIX + figure.name + UNITS.get(figure.unit, "")
        family = kind(name, figure.text, labels=labels)
        for key, number in value.items() if isinstance(value, Mapping) else [("", value)]:
            family.add_metric([*self._labels.values(), *([key] if figure.by else [])], number)
        return family
