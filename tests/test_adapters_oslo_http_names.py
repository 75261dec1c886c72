"""Which Consul service stands for an exchange and a topic of oslo.messaging."""

from __future__ import annotations

import re
import string

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from consul_matchmaker.adapters.oslo.http.names import (
    BROADCASTER,
    MOST_CHARACTERS,
    POOL,
    Place,
    pool_of,
    service_of,
)
from consul_matchmaker.backends.service_names import namer
from consul_matchmaker.settings import Settings

DIGEST = "-[0-9a-f]{10}"
# Few characters, so that different places are near each other; and any text at all.
NEAR = st.text(st.sampled_from("ab-_."), max_size=6)
LONG = st.text(st.sampled_from(string.ascii_lowercase + "-"), min_size=25, max_size=80)
NAMES = st.one_of(NEAR, LONG, st.text(st.characters(exclude_categories=["Cs"]), max_size=80))
PLACES = st.tuples(NAMES, NAMES)


@pytest.mark.parametrize(
    ("exchange", "topic", "service"),
    [
        ("nova", "compute", "nova-compute"),
        ("openstack", "adder", "openstack-adder"),
        ("neutron", "q-agent-notifier-port-update", "neutron-q-agent-notifier-port-update"),
        ("a", "b" * 60, f"a-{'b' * 60}"),
    ],
)
def test_plain_names_are_as_they_are(exchange: str, topic: str, service: str) -> None:
    """An exchange of letters and digits, and a topic that has `-` inside, up to 62 characters."""
    assert service_of(exchange, topic) == service


@pytest.mark.parametrize(
    ("exchange", "topic", "readable"),
    [
        ("nova", "compute.host_1", "nova-compute-host-1"),
        ("Nova", "compute", "nova-compute"),
        ("my-exchange", "t", "my-exchange-t"),
        ("nova", "-compute", "nova-compute"),
        ("nova", "compute-", "nova-compute"),
        ("nova", "compute\n", "nova-compute"),
        ("nova\n", "compute", "nova-compute"),
        ("", "t", "t"),
        ("nova", "", "nova"),
        ("a", "b" * 61, f"a-{'b' * 49}"),
        ("openstack", f"{'b' * 40}-{'c' * 30}", f"openstack-{'b' * 40}"),
        ("", "", "x"),
        ("é", "ü", "x"),
    ],
)
def test_others_can_be_read_and_have_a_digest(exchange: str, topic: str, readable: str) -> None:
    """What DNS cannot carry becomes one `-`, and what is too long is cut."""
    assert re.fullmatch(re.escape(readable) + DIGEST, service_of(exchange, topic))


def test_a_name_stays_what_it_is() -> None:
    """Processes of different releases meet under it."""
    assert service_of("nova", "compute.host_1") == "nova-compute-host-1-d7f67e16e5"


@given(PLACES)
@example(("a", "b" * 61))
@example(("é", "ü"))
def test_each_is_a_dns_label(place: tuple[str, str]) -> None:
    """Of at most 62 characters, and Consul's service name is the same."""
    service = service_of(*place)
    assert re.fullmatch(r"[a-z0-9]([a-z0-9-]*[a-z0-9])?", service)
    assert len(service) <= MOST_CHARACTERS == 62
    assert namer(Settings(mode="service"))(service) == service


@given(PLACES, PLACES)
@example(("a", "b-c"), ("a-b", "c"))
@example(("a-b", "c"), ("a", "b-c"))
@example(("a-b", "-c"), ("a-b-", "c"))
@example(("a_b", "c"), ("a.b", "c"))
@example(("A", "b"), ("a", "b"))
@example(("a" * 40, "b" * 40), ("a" * 40, "b" * 41))
def test_no_two_places_have_the_same(one: tuple[str, str], two: tuple[str, str]) -> None:
    """A message never meets the listeners of another exchange or topic by its service."""
    assert (service_of(*one) == service_of(*two)) == (one == two)


@given(PLACES)
@example(("", "t.u"))
def test_a_topic_that_looks_like_the_service_of_another_is_another(place: tuple[str, str]) -> None:
    """Who names an exchange and a topic after a service that has a digest gets one more."""
    service = service_of(*place)
    exchange, _, topic = service.partition("-")
    assert (service_of(exchange, topic) == service) == ((exchange, topic) == place)


def test_a_place_says_itself() -> None:
    """For logs and errors; the server, if one is meant, behind it."""
    assert str(Place("nova", "compute")) == "nova/compute"
    assert str(Place("nova", "compute", "node7")) == "nova/compute as node7"
    assert Place("nova", "compute", "node7").service == "nova-compute"


def test_the_broadcaster_has_a_readable_service() -> None:
    """Operators give rights to it by name."""
    assert BROADCASTER.service == "consulmatchmaker-broadcaster"


def test_a_pool_is_told_from_a_server() -> None:
    """By what stands before its name; a listener may be in none."""
    assert pool_of(f"{POOL}audit") == "audit"
    assert pool_of(f"{POOL}{POOL}a") == f"{POOL}a"
    assert pool_of("node7") is None
    assert pool_of(None) is None
