"""Topics to services, and services to the DNS names that are asked for."""

from __future__ import annotations

import dns.message
import pytest

from consul_matchmaker.backends.dns.names import (
    Names,
    address_of,
    node_of,
    query_for,
)
from consul_matchmaker.backends.service_names import service_of
from consul_matchmaker.errors import InvalidTopic
from tests.doubles import catalog


@pytest.mark.parametrize(
    ("topic", "service"),
    [
        ("q-plugin", "q-plugin"),
        ("cinder-volume", "cinder-volume"),
        ("scheduler", "scheduler"),
        ("notifications.info", "notifications-info"),
        ("neutron-vo-Port-1.4", "neutron-vo-port-1-4"),
        ("reply_" + "0a" * 16, "reply_" + "0a" * 16),
        ("cinder-volume.node@lvm#pool", "cinder-volume-node-lvm-pool"),
        ("a b", "a-b"),
        ("a/b:c", "a-b-c"),
        ("x" * 62, "x" * 62),
    ],
)
def test_topics_as_openstack_has_them(topic: str, service: str) -> None:
    """Small letters, digits, '_' and '-' stay; capitals shrink; other ASCII characters are '-'."""
    assert service_of(topic, "{topic}", {}) == service


@pytest.mark.parametrize("topic", ["x" * 63, "t" * 80, "größe", "日本", "a\nb", "a\0b", "tab\t"])
def test_what_dns_cannot_carry_is_an_error_that_names_service_map(topic: str) -> None:
    """Nothing is cut short in silence: too long and not ASCII are errors with the remedy."""
    with pytest.raises(InvalidTopic, match="service_map"):
        service_of(topic, "{topic}", {})
    with pytest.raises(InvalidTopic):
        service_of("", "{topic}", {})


def test_service_map_wins_over_the_template() -> None:
    """What is mapped is taken by its own name, for topics DNS could not carry too."""
    assert service_of("t" * 80, "mm-{topic}", {"t" * 80: "Volumes"}) == "volumes"
    assert service_of("other", "mm-{topic}", {"t": "volumes"}) == "mm-other"


@pytest.mark.parametrize("service", ["a.b", "x" * 63, "ü", "a b", ".query", "a..b.query"])
def test_a_mapped_name_is_not_mended(service: str) -> None:
    """service_map says exactly one service: a typing error there is an error."""
    with pytest.raises(InvalidTopic, match="service_map"):
        service_of("t", "{topic}", {"t": service})


def test_the_error_says_whether_topic_or_map_is_to_be_mended() -> None:
    """It names the mapped service where there is one, and shows what to write where not."""
    with pytest.raises(InvalidTopic, match=r"^service_map: 'a\.b', for topic 't', .*another name$"):
        service_of("t", "{topic}", {"t": "a.b"})
    with pytest.raises(InvalidTopic, match=r"^topic 'ü' .*service_map=\{'ü': 'its-service'\}$"):
        service_of("ü", "{topic}", {})


@pytest.mark.parametrize(
    ("topic", "template", "is_other"),
    [
        ("scheduler", "{topic}", False),
        ("Scheduler_7-a", "{topic}", False),
        ("my.dotted", "{topic}", True),
        ("plain", "{topic}.query", False),
        ("my.dotted", "{topic}.query", True),
        ("plain", "a.{topic}", True),
    ],
)
def test_which_topics_are_translated(topic: str, template: str, is_other: bool) -> None:
    """Those with characters that a service cannot have; with strict names they are refused."""
    if is_other:
        with pytest.raises(InvalidTopic, match="strict_names"):
            service_of(topic, template, {}, strict=True)
        assert service_of(topic, template, {topic: "volumes"}, strict=True) == "volumes"
    else:
        plain = service_of(topic, template, {})
        assert service_of(topic, template, {}, strict=True) == plain


def test_prepared_queries() -> None:
    """A name ending in .query is a prepared query, whether mapped or by the template."""
    assert service_of("t", "{topic}", {"t": "near.by.query"}) == "near.by.query"
    assert service_of("T.1", "{topic}.query", {}) == "t-1.query"
    assert service_of("t.query", "{topic}", {}) == "t-query"


def names(**settings: object) -> Names:
    return Names(catalog(**settings))


@pytest.mark.parametrize(
    ("settings", "service", "datacenter", "asked"),
    [
        ({}, "cron", "", "_cron._tcp.service.consul."),
        ({"tag": "Gold"}, "cron", "dc2", "_cron._Gold.service.dc2.consul."),
        ({"domain": ".Corp.Example."}, "cron", "", "_cron._tcp.service.corp.example."),
        ({"shards": 2}, "cron", "d", "_cron._s00.service.d.consul. _cron._s01.service.d.consul."),
        ({"tag": "gold"}, "near.by.query", "", "near.by.query.consul."),
        ({"shards": 3}, "cron.query", "dc2", "cron.query.dc2.consul."),
    ],
)
def test_the_names_of_a_topic(
    settings: dict[str, object], service: str, datacenter: str, asked: str
) -> None:
    """RFC 2782's form, which every version answers alike, with the tag in place of the protocol, or
    one name for each shard; a prepared query by its own name, which has neither tags nor shards."""
    assert names(**settings).of_topic(service, datacenter) == asked.split()


def test_a_server_is_asked_for_by_its_tag() -> None:
    """Where a tag can have its name, and is not taken for no tag at all."""
    assert names(tag="gold").of_server("cron", "Node-7", "") == "_cron._Node-7.service.consul."
    assert names().of_server("cron", "node7", "dc2") == "_cron._node7.service.dc2.consul."
    for server in ("TCP", "10.0.0.1:80", "node.example", "", "x" * 63):
        assert names().of_server("cron", server, "") is None
    assert names().of_server("cron.query", "node7", "") is None


def test_a_query_says_how_much_room_its_reply_has() -> None:
    """One question of class IN, and EDNS with that size; what does not fit DNS is InvalidTopic."""
    message = dns.message.from_wire(query_for("_cron._tcp.service.consul.", "SRV"))
    assert [str(each) for each in message.question] == ["_cron._tcp.service.consul. IN SRV"]
    assert (message.edns, message.payload) == (0, 1232)
    with pytest.raises(InvalidTopic, match="cannot be asked for over DNS"):
        query_for("x" * 64 + ".consul.", "SRV")


@pytest.mark.parametrize(
    ("target", "node", "address"),
    [
        ("0a090905.addr.dc1.consul.", None, b"\x0a\x09\x09\x05"),
        ("0A090905.Addr.consul.", None, b"\x0a\x09\x09\x05"),
        ("20010db8" + "0" * 24 + ".addr.dc1.consul.", None, b"\x20\x01\x0d\xb8" + bytes(12)),
        ("n.with.node.dots.node.dc1.consul.", "n.with.node.dots", None),
        ("zzzzzzzz.addr.dc1.consul.", None, None),
        ("0a0001.addr.dc1.consul.", None, None),
        ("0a000001ff.addr.dc1.consul.", None, None),
        ("0a090905.example.", None, None),
    ],
)
def test_what_a_targets_name_says(target: str, node: str | None, address: bytes | None) -> None:
    """Of a node its name, of a service's address the address itself, if it is one."""
    assert (node_of(target), address_of(target)) == (node, address)
