"""Which URL means a topic, and which request may be sent again."""

from __future__ import annotations

import pytest

from consul_matchmaker import Settings
from consul_matchmaker.adapters.http_rules import (
    FAILED_STATUSES,
    checked_suffix,
    default_suffix,
    may_repeat,
    topic_of,
)
from consul_matchmaker.errors import ConfigurationError

SUFFIX = ".service.consul"


@pytest.mark.parametrize(
    ("host", "topic"),
    [
        ("web.service.consul", "web"),
        ("WEB.Service.Consul", "web"),
        ("web.service.consul.", "web"),
        ("my_web-2.service.consul", "my_web-2"),
        ("node7.web.service.consul", "node7.web"),
        ("service.consul.service.consul", "service.consul"),
    ],
)
def test_a_name_that_ends_with_the_suffix_means_a_topic(host: str, topic: str) -> None:
    """What is before the suffix, in lower case; a dot at the end changes nothing."""
    assert topic_of(host, SUFFIX) == topic


@pytest.mark.parametrize(
    "host",
    [
        "",
        ".",
        "service.consul",
        ".service.consul",
        "webservice.consul",
        "web.service.dc2.consul",
        "web.service.consul.example",
        "web.service.consul:80",
        "10.0.0.5",
        "[::1]",
        "localhost",
    ],
)
def test_any_other_name_is_an_ordinary_one(host: str) -> None:
    """Also the suffix alone, the suffix inside of a name, and a part of a label before it."""
    assert topic_of(host, SUFFIX) is None


def test_the_suffix_is_what_consul_itself_answers_to() -> None:
    """It has Consul's domain, so a URL means the same with and without this library."""
    assert default_suffix(Settings(mode="kv")) == SUFFIX
    assert default_suffix(Settings(mode="kv", domain="Corp.Example")) == ".service.corp.example"


def test_a_suffix_is_taken_as_names_are() -> None:
    """Capitals and a dot at the end do not matter, as in the names that it is compared with."""
    settings = Settings(mode="kv")
    assert checked_suffix(None, settings) == SUFFIX
    assert topic_of("web.internal", checked_suffix(".Internal.", settings)) == "web"


@pytest.mark.parametrize("suffix", ["", ".", "..", "service.consul", "consul."])
def test_a_suffix_that_no_name_can_be_meant_by_is_refused(suffix: str) -> None:
    """Without a dot before it a part of a label would be a topic; without a name, every host."""
    with pytest.raises(ConfigurationError, match="suffix must begin with a dot"):
        checked_suffix(suffix, Settings(mode="kv"))


@pytest.mark.parametrize("method", ["GET", "HEAD", "OPTIONS", "TRACE", "PUT", "DELETE", "get"])
def test_an_idempotent_request_may_be_repeated(method: str) -> None:
    """Whether or not it was sent, as long as it can be sent again."""
    assert may_repeat(method, was_sent=True, is_kept=True)
    assert may_repeat(method, was_sent=False, is_kept=True)
    assert not may_repeat(method, was_sent=True, is_kept=False)
    assert not may_repeat(method, was_sent=False, is_kept=False)


@pytest.mark.parametrize("method", ["POST", "PATCH", "CONNECT", "", "GETS"])
def test_any_other_request_may_be_repeated_if_it_was_not_sent(method: str) -> None:
    """It may have been executed otherwise."""
    assert may_repeat(method, was_sent=False, is_kept=True)
    assert not may_repeat(method, was_sent=True, is_kept=True)
    assert not may_repeat(method, was_sent=False, is_kept=False)


def test_the_statuses_of_a_host_that_cannot_serve_mean_failure() -> None:
    """An error of the program, or of the request, is an answer."""
    assert {502, 503, 504} == FAILED_STATUSES
