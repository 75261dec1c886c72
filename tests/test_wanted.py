"""What may be registered, and at which address."""

from __future__ import annotations

import socket
from typing import Any

import pytest

from consul_matchmaker import Matchmaker, Settings
from consul_matchmaker.backends.memory import Memory
from consul_matchmaker.errors import ConfigurationError, InvalidTopic
from consul_matchmaker.model import Host, ServiceOptions
from consul_matchmaker.registrations.wanted import own_address, wanted_registration

SERVICE, KV = Settings(mode="service"), Settings(mode="kv")


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"tags": "blue"}, "tags"),
        ({"tags": [""]}, "tags"),
        ({"tags": [7]}, "tags"),
        ({"meta": {"a b": "x"}}, "meta"),
        ({"meta": {"a": 7}}, "meta"),
        ({"meta": {"a": "x" * 513}}, "meta"),
        ({"meta": {"matchmaker_topic": "x"}}, "this library's"),
        ({"meta": {f"k{number}": "" for number in range(62)}}, "64"),
        ({"weight": 0}, "weight"),
        ({"weight": 65536}, "weight"),
        ({"weight": True}, "weight"),
        ({"check": "ftp://x"}, "http://"),
        ({"check": "http://a b"}, "http://"),
        ({"check": ""}, "http://"),
    ],
)
def test_what_consul_would_refuse_is_refused_at_once(options: dict[str, Any], word: str) -> None:
    """With what to do, before anything is said to Consul."""
    with (
        Matchmaker(SERVICE, backend=Memory()) as mm,
        pytest.raises(ConfigurationError, match=word),
    ):
        mm.register("web", "10.0.0.1:80", **options)


@pytest.mark.parametrize(
    "options",
    [{"tags": ["a"]}, {"meta": {"a": "b"}}, {"weight": 2}, {"check": "tcp://10.0.0.1:80"}],
)
def test_a_key_has_no_tags(options: dict[str, Any]) -> None:
    """kv mode says so, and where they are."""
    with (
        Matchmaker(KV, backend=Memory()) as mm,
        pytest.raises(ConfigurationError, match=r"consul\+service"),
    ):
        mm.register("web", "10.0.0.1:80", **options)


def test_a_service_has_a_port() -> None:
    """What is no address and port cannot be one."""
    with pytest.raises(ConfigurationError, match="port"):
        wanted_registration(SERVICE, "web", Host.opaque("x"), None, None, ServiceOptions())


@pytest.mark.parametrize("topic", ["größe", "x" * 63])
def test_a_topic_that_cannot_be_a_service_is_refused_at_once(topic: str) -> None:
    """Not later on a thread where nobody sees it."""
    with (
        Matchmaker(SERVICE, backend=Memory()) as mm,
        pytest.raises(InvalidTopic, match="service_map"),
    ):
        mm.register(topic, "10.0.0.1:80")
    mapped = Settings(mode="service", service_map={topic: "web"})
    assert wanted_registration(mapped, topic, "10.0.0.1:80", None, None, ServiceOptions())
    with pytest.raises(ConfigurationError, match="512"):
        wanted_registration(SERVICE, "web", "10.0.0.1:80", "n" * 513, None, ServiceOptions())


@pytest.mark.parametrize(
    "values",
    [{"shards": 2}, {"service_template": "{topic}.query"}, {"service_map": {"a": "b.query"}}],
)
def test_what_only_dns_has_is_refused(values: dict[str, Any]) -> None:
    """Shards and prepared queries."""
    with pytest.raises(ConfigurationError, match="catalog mode"):
        Settings(mode="service", **values)


@pytest.mark.parametrize("where", [(None, None), ("10.0.0.1:80", 80)])
def test_a_host_or_a_port(where: tuple[Any, Any]) -> None:
    """One of both."""
    host, port = where
    with pytest.raises(ConfigurationError, match="port"):
        wanted_registration(SERVICE, "web", host, None, port, ServiceOptions())


def test_a_registration_says_its_zone() -> None:
    """That of the settings, unless it is given one of its own."""
    settings = Settings(mode="service", zone="a")
    for meta, said in (({}, {"zone": "a"}), ({"zone": "b"}, {"zone": "b"})):
        options = ServiceOptions.of((), meta, 1, None)
        wanted = wanted_registration(settings, "web", "10.0.0.1:80", None, None, options)
        assert wanted.service.meta == said
    assert (
        wanted_registration(SERVICE, "web", "10.0.0.1:80", None, None, options).service is options
    )


@pytest.mark.system
def test_the_address_that_peers_reach() -> None:
    """On the way to an agent elsewhere; never a loopback address because the agent is here."""
    try:
        found = own_address(Host("127.0.0.1", 8500))
    except ConfigurationError as error:
        assert "give a host" in str(error)  # a machine without a network
        return
    assert not found.startswith("127.")
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as way:
        way.bind((found, 0))  # it is one of ours
    registration = wanted_registration(SERVICE, "web", None, None, 8080, ServiceOptions())
    assert registration.host == Host(found, 8080)


def test_registered_again_with_other_options_it_is_published_again() -> None:
    """The same registration, which Consul is to show otherwise; with the same ones it is left."""
    published: list[tuple[str, ...]] = []

    class Noting(Memory):
        def publish(self, lease: Any, registration: Any) -> None:
            published.append(registration.service.tags)
            super().publish(lease, registration)

    with Matchmaker(SERVICE, backend=Noting()) as mm:
        for tags in (["blue"], ["blue"], ["green"]):
            mm.register("web", "10.0.0.1:80", tags=tags).wait_until_published(timeout_seconds=10)
    assert published == [("blue",), ("green",)]
