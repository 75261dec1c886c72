"""The figures of status(), as Prometheus reads them."""

from __future__ import annotations

import pytest
from prometheus_client import CollectorRegistry, generate_latest

from consul_matchmaker import Matchmaker, errors
from consul_matchmaker.adapters.prometheus import MatchmakerCollector
from consul_matchmaker.backends.memory import Memory

from .contract import ONE, TWO
from .doubles import DEADLINE_SECONDS, FakeResolver, catalog, kv


def test_the_figures_of_status() -> None:
    """Lookups, questions, quarantines, the lease and registrations, each with its labels."""
    memory = Memory()
    memory.declare("scheduler", [ONE, TWO, "10.0.0.3:5000"])
    registry = CollectorRegistry()
    with Matchmaker(kv(), backend=memory) as mm:
        registry.register(MatchmakerCollector(mm, {"name": "rpc"}))
        mm.register("mails", TWO).wait_until_published(timeout_seconds=DEADLINE_SECONDS)
        for _ in range(3):
            mm.hosts("scheduler")
        mm.reject("scheduler", ONE)
        memory.is_available = False
        with pytest.raises(errors.Unavailable):
            mm.hosts("jobs")
        memory.is_available = True  # so that closing need not wait for it

        def value(name: str, **labels: str) -> float | None:
            return registry.get_sample_value(f"consul_matchmaker_{name}", {"name": "rpc", **labels})

        assert value("lookups_total") == 4
        assert value("lookups_not_fresh_total", found="asked") == 2
        assert value("questions_total", outcome="answered") == 1
        assert value("questions_total", outcome="failed") == 1
        assert value("topics", state="fresh") == 1
        assert value("quarantines_total") == 1
        assert value("quarantined_hosts", topic="scheduler") == 1
        assert value("lease_events_total", event="published") == 1
        assert value("registrations", standing="published") == 1


def test_two_matchmakers_in_one_registry() -> None:
    """Labels tell them apart; catalog mode has no lease to speak of."""
    registry = CollectorRegistry()
    with (
        Matchmaker(catalog(), backend=FakeResolver("dns")) as one,
        Matchmaker(catalog(), backend=FakeResolver("dns")) as other,
    ):
        registry.register(MatchmakerCollector(one, {"name": "one"}))
        registry.register(MatchmakerCollector(other, {"name": "other"}))
        one.hosts("scheduler")
        text = generate_latest(registry).decode()
        assert 'consul_matchmaker_lookups_total{name="one"} 1.0' in text
        assert 'consul_matchmaker_lookups_total{name="other"} 0.0' in text
        assert "lease_events" not in text
