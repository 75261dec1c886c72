"""Hand the figures of `Matchmaker.status()` to OpenTelemetry; needs the extra ``opentelemetry``.

instrument(mm)
instrument(other, attributes={"name": "other"})

An exporter to Prometheus gives them the names that `adapters.prometheus` has.
"""

from __future__ import annotations

import functools
import threading
import weakref
from collections.abc import Iterator, Mapping

from .. import __version__
from ..fork import ProcessLock
from ..matchmaker import Matchmaker
from .extras import extra
from .figures import FIGURES, Figure

with extra("opentelemetry"):
    from opentelemetry.metrics import CallbackOptions, Meter, Observation, get_meter

PREFIX = "consul_matchmaker."


def instrument(
    mm: Matchmaker, meter: Meter | None = None, attributes: Mapping[str, str] | None = None
) -> None:
    """Have the figures of *mm* observed by *meter* (None: that of this package, of the global
    provider), as long as *mm* lives and is not closed; asks nobody.  Thread-safe.

    *attributes* tell several matchmakers of one process apart; every figure carries them.  Again
    for the same matchmaker and meter, they are replaced.
    """
    with _lock:
        meter = _own_meter() if meter is None else meter
        observed = _observed.get(meter)
        if observed is None:
            observed = _observed[meter] = _Observed()
            observed.observe_with(meter)
        observed.matchmakers[mm] = _Reading(attributes or {})


class _Observed:
    """The matchmakers whose figures one meter observes, by one set of instruments: a second one of
    the same name would be refused, or exported as a conflict."""

    def __init__(self) -> None:
        self.matchmakers: weakref.WeakKeyDictionary[Matchmaker, _Reading] = (
            weakref.WeakKeyDictionary()
        )

    def observe_with(self, meter: Meter) -> None:
        make = {
            "counter": meter.create_observable_counter,
            "amount": meter.create_observable_up_down_counter,
            "gauge": meter.create_observable_gauge,
        }
        for figure in FIGURES:
            callback = functools.partial(self._observations, figure)
            make[figure.kind](PREFIX + figure.name, [callback], figure.unit, figure.text)

    def _observations(self, figure: Figure, options: CallbackOptions) -> Iterator[Observation]:
        with _lock:
            matchmakers = list(self.matchmakers.items())
        for mm, reading in matchmakers:
            if not mm.is_closed:
                yield from reading.observations(mm, figure)


class _Reading:
    """What `status` of one matchmaker said, for all the figures of one collection."""

    def __init__(self, attributes: Mapping[str, str]) -> None:
        self._attributes = dict(attributes)
        # A collection takes one figure after the other, each once, on one thread.
        self._read = threading.local()

    def observations(self, mm: Matchmaker, figure: Figure) -> Iterator[Observation]:
        taken = getattr(self._read, "taken", None)
        if taken is None or figure.name in taken:  # this is another collection
            self._read.status, self._read.taken = mm.status(), (taken := set[str]())
        taken.add(figure.name)
        value = figure.of(self._read.status)
        if isinstance(value, Mapping):
            for key, number in value.items():
                yield Observation(number, {**self._attributes, figure.by: key})
        elif value is not None:
            yield Observation(value, self._attributes)


@functools.cache
def _own_meter() -> Meter:
    """One for good: another one before a provider is set would observe everything twice after."""
    return get_meter("consul_matchmaker", __version__)


_lock = ProcessLock()
_observed: weakref.WeakKeyDictionary[Meter, _Observed] = weakref.WeakKeyDictionary()
