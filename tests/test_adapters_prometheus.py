"""The figures of status(), as Prometheus reads them."""

from __future__ import annotations

from typing import Any

import pytest
from prometheus_client import CollectorRegistry, generate_latest

from consul_matchmaker import Matchmaker, errors
from consul_matchmaker.adapters.prometheus import MatchmakerCollector
from consul_matchmaker.backends.memory import Memory

from .contract import ONE, TWO
from .dns_servers import DnsServer, FakeConsul, FakeInstance
from .doubles import DEADLINE_SECONDS, FakeResolver, catalog, kv


def test_the_figures_of_status() -> None:
    """Lookups, questions, quarantines, the lease and registrations, each with its labels."""
    memory = Memory()
    memory.declare("scheduler", [ONE, TWO, "10.0.0.3:5000"])
    registry = CollectorRegistry()
    with Matchmaker(kv(quarantine_seconds=30), backend=memory) as mm:
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

        assert value("lookups_total", found="memory") == 2
        assert value("lookups_total", found="asked") == 2
        assert value("lookups_total", found="away") == 0
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
        assert 'consul_matchmaker_lookups_total{found="asked",name="one"} 1.0' in text
        assert 'consul_matchmaker_lookups_total{found="asked",name="other"} 0.0' in text
        assert "lease_events" not in text
        assert "watch" not in text


@pytest.mark.system
def test_the_figures_of_the_wire() -> None:
    """Queries, replies and bytes by transport, each as status() has it."""
    registry = CollectorRegistry()
    consul = FakeConsul({("scheduler", ""): [FakeInstance("10.0.0.1", 80)]})
    settings = {"request_timeout_seconds": 60}  # nothing is sent again for a tenth of it
    with (
        DnsServer(consul) as server,
        Matchmaker(catalog(addresses=server.address, **settings)) as mm,
    ):
        registry.register(MatchmakerCollector(mm))
        mm.hosts("scheduler")
        wire: Any = mm.status()["wire"]
        assert wire["udp"]["sent_bytes"] == len(server.asked[0].wire)
        for transport, counts in wire.items():
            for name, count in counts.items():
                metric = f"consul_matchmaker_{name}_total"
                assert registry.get_sample_value(metric, {"transport": transport}) == count
        assert set(wire) == {"udp", "tcp"}
        assert len(wire["udp"]) == 6
        assert registry.get_sample_value("consul_matchmaker_agents_away") == 0
        assert registry.get_sample_value("consul_matchmaker_doubted_topics") == 0
        longest = registry.get_sample_value("consul_matchmaker_longest_question_seconds")
        assert longest is not None and longest > 0
        text = generate_latest(registry).decode()
        assert "# TYPE consul_matchmaker_received_bytes_total counter" in text


def test_the_figures_of_a_watch() -> None:
    """Whether it is held, how often it was answered, and keys that are not ours."""
    registry = CollectorRegistry()
    with Matchmaker(kv(addresses="127.0.0.1:1")) as mm:
        registry.register(MatchmakerCollector(mm))
        assert registry.get_sample_value("consul_matchmaker_watching") == 0
        assert registry.get_sample_value("consul_matchmaker_watch_answers_total") == 0
        assert registry.get_sample_value("consul_matchmaker_unknown_keys") == 0
        http = {"transport": "http"}
        assert registry.get_sample_value("consul_matchmaker_queries_total", http) == 0


def test_a_backend_that_speaks_to_nobody_has_no_wire() -> None:
    """No series of it, and nothing fails."""
    registry = CollectorRegistry()
    with Matchmaker(kv(), backend=Memory()) as mm:
        registry.register(MatchmakerCollector(mm))
        assert mm.status()["wire"] == {}
        assert "transport=" not in generate_latest(registry).decode()
