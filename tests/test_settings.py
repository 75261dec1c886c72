"""Every setting from every source, their order, and errors that help and hide the token."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote, urlencode

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from consul_matchmaker.errors import ConfigurationError
from consul_matchmaker.model import Host
from consul_matchmaker.settings import Settings

SECRET = "5ecre7-0f-th3-t0ken"


class Case(NamedTuple):
    """One setting: a text for it, what it means, another such pair, and texts it refuses."""

    text: str
    value: Any
    other_text: str
    other_value: Any
    refused: tuple[str, ...]
    mode: str = "kv"


def hosts(*texts: str) -> tuple[Host, ...]:
    return tuple(map(Host.parse, texts))


def seconds(low: str, high: str, below: str, above: str) -> Case:
    return Case(low, float(low), high, float(high), (below, above, "", "x", "nan", "inf", "True"))


def file(name: str) -> Case:
    return Case(f"/etc/{name}", f"/etc/{name}", name, name, ("",))


FRACTION = Case("0", 0.0, "1", 1.0, ("-0.1", "1.1", "half"))
YES_OR_NO = Case("yes", True, "0", False, ("", "maybe", "2"))
PAIR = {"client_cert": "client_key", "client_key": "client_cert"}
CASES: dict[str, Case] = {
    "mode": Case("kv", "kv", "kv", "kv", ("dns", "KV")),
    "addresses": Case(
        "10.0.0.1:1,[::1]:2,name:3",
        hosts("10.0.0.1:1", "[::1]:2", "name:3"),
        "10.0.0.2",
        hosts("10.0.0.2:8500"),
        ("", ",", "a:0", "a:65536", "a:x", "::1", "a b", "https://a:1", "a:1/x", "a:1,,b:-1"),
    ),
    "ttl_seconds": seconds("0", "86400", "-1", "86401"),
    "ttl_min_seconds": seconds("0", "60", "-1", "86401"),
    "ttl_max_seconds": seconds("1", "86400", "-1", "86401"),
    "empty_ttl_seconds": seconds("0", "86400", "-0.1", "86401"),
    "max_stale_seconds": seconds("0", "31536000", "-1", "31536001"),
    "stale_while_revalidate_seconds": seconds("0", "31536000", "-1", "31536001"),
    "confirm_empty_seconds": seconds("0", "3600", "-1", "3601"),
    "request_timeout_seconds": seconds("0.05", "600", "0", "601"),
    "domain": Case(
        "Example.org.", "Example.org", "x", "x", ("", ".", "a..b", "a b", "é"), "catalog"
    ),
    "datacenters": Case("dc1, dc2", ("dc1", "dc2"), "dc3", ("dc3",), ("d.c", "a b"), "catalog"),
    "tag": Case("v2", "v2", "a_b", "a_b", ("", "a.b", "tcp", "x" * 63, "a b"), "catalog"),
    "service_template": Case(
        "mm-{topic}",
        "mm-{topic}",
        "{topic}-rpc",
        "{topic}-rpc",
        ("", "mm", "{topic}{x}"),
        "catalog",
    ),
    "service_map": Case(
        "a=b, c = d",
        {"a": "b", "c": "d"},
        "a=x",
        {"a": "x"},
        ("a", "a=", "=b", "a=b,a=c"),
        "catalog",
    ),
    "strict_names": Case("yes", True, "off", False, ("", "maybe"), "catalog"),
    "near": Case("_agent", "_agent", "node-1", "node-1", ("", "a b"), "service"),
    "accept_warning": Case("yes", True, "no", False, ("", "maybe"), "service"),
    "shards": Case("100", 100, "0", 0, ("-1", "101", "1.5", "x", ""), "catalog"),
    "prefix": Case("a/b_c-d", "a/b_c-d", "/x/", "x", ("", "/", "a//b", "a.b", "a b", "é")),
    "session_ttl_seconds": seconds("1", "86400", "0.9", "86401"),
    "check_ttl_seconds": seconds("0.5", "60", "0.4", "61"),
    "liveness": Case("check", "check", "node", "node", ("", "serf")),
    "watch": Case("off", False, "TRUE", True, ("", "maybe")),
    "max_watches": Case("0", 0, "100", 100, ("-1", "101", "1.5", "x", "")),
    "consistency": Case("stale", "stale", "consistent", "consistent", ("", "strong")),
    "quarantine_seconds": seconds("0", "30", "-1", "3601"),
    "quarantine_max_seconds": seconds("1", "86400", "-1", "86401"),
    "panic_fraction": FRACTION,
    "selection": Case("weighted", "weighted", "least_loaded", "least_loaded", ("", "random")),
    "slow_start_seconds": seconds("0", "3600", "-1", "3601"),
    "zone": Case("a", "a", "eu-1_b", "eu-1_b", ("", "a b", "a.b"), "service"),
    "subset_size": Case("0", 0, "65535", 65535, ("-1", "65536", "1.5", "x", "")),
    "client_id": Case("worker 7", "worker 7", "x", "x", ("",)),
    "ejection_failure_rate": FRACTION,
    "ejection_max_fraction": FRACTION,
    "retry_fraction": FRACTION,
    "retry_floor_per_second": Case("0", 0.0, "1000", 1000.0, ("-1", "1001", "x")),
    "max_topics": Case("1", 1, "1000000", 1_000_000, ("0", "1000001", "1.5", "x", "")),
    "state_path": file("state"),
    "token": Case("abc", "abc", " x\n", "x", ("", " ", "a b", "a\nb", "é", "a\0")),
    "token_file": file("token"),
    "tls": YES_OR_NO,
    "ca_cert": file("ca.pem"),
    "client_cert": file("cert.pem"),
    "client_key": file("key.pem"),
    "verify": Case("no", False, "t", True, ("", "maybe", "2")),
}
VARIABLES = {
    "CONSUL_HTTP_ADDR": "addresses",
    "CONSUL_HTTP_TOKEN": "token",
    "CONSUL_HTTP_TOKEN_FILE": "token_file",
    "CONSUL_HTTP_SSL": "tls",
    "CONSUL_HTTP_SSL_VERIFY": "verify",
    "CONSUL_CACERT": "ca_cert",
    "CONSUL_CLIENT_CERT": "client_cert",
    "CONSUL_CLIENT_KEY": "client_key",
}
EVERY = pytest.mark.parametrize("name", CASES)


def beside(name: str) -> dict[str, str]:
    """What must stand beside setting *name* for it to be allowed."""
    mode = {} if name == "mode" else {"mode": CASES[name].mode}
    return {**mode, **({PAIR[name]: "x"} if name in PAIR else {})}


def in_environment(values: Mapping[str, str]) -> dict[str, str]:
    return {f"CONSUL_MATCHMAKER_{name.upper()}": text for name, text in values.items()}


def url(values: Mapping[str, str]) -> str:
    rest = {name: text for name, text in values.items() if name != "mode"}
    return f"consul+{values['mode']}://?{urlencode(rest)}".removesuffix("?")


def test_every_setting_is_tested_and_described() -> None:
    """The table above names each, and every variable it is read from; it has a sentence for the
    table of the documentation."""
    assert {*CASES} == {setting.name for setting in fields(Settings)}
    assert {
        variable: setting.name
        for setting in fields(Settings)
        for variable in setting.metadata.get("variables", ())
    } == VARIABLES
    assert all(setting.metadata["doc"] for setting in fields(Settings))


# Settings of the same texts from each source; oslo.config's mapping has None for what is not given.
SOURCES: dict[str, Callable[[dict[str, str]], Settings]] = {
    "constructor": lambda texts: Settings(**texts),  # type: ignore[arg-type]
    "mapping": lambda texts: Settings.from_mapping({**dict.fromkeys(CASES), **texts}, {}),
    "URL": lambda texts: Settings.from_url(url(texts), {}),
    "environment": lambda texts: Settings.from_env(in_environment(texts)),
}


@pytest.mark.parametrize("source", SOURCES)
@EVERY
def test_a_setting_is_read_from_every_source(name: str, source: str) -> None:
    """As text or as its own type, and what came out goes in again."""
    case = CASES[name]
    found = SOURCES[source]({**beside(name), name: case.text})
    assert getattr(found, name) == case.value
    assert found == Settings(**{**beside(name), name: case.value}) == replace(found)


@pytest.mark.parametrize(("variable", "name"), VARIABLES.items())
def test_a_setting_is_read_from_consuls_environment(variable: str, name: str) -> None:
    """The consul command's own variables count in kv mode, and mean nothing to DNS."""
    case = CASES[name]
    partner = {v: "x" for v, read in VARIABLES.items() if read == PAIR.get(name)}
    environ = {variable: case.text, **partner}
    assert getattr(Settings.from_url("consul+kv://", environ), name) == case.value
    catalog = Settings.from_url("consul+catalog://", environ)
    assert catalog == Settings(mode="catalog")


@EVERY
def test_a_stronger_source_wins(name: str) -> None:
    """Explicit > CONSUL_MATCHMAKER_* > Consul's own variables > default."""
    case, near = CASES[name], beside(name)
    ours = in_environment({name: case.other_text})
    consuls = {v: case.text for v, read in VARIABLES.items() if read == name}
    explicit = Settings.from_mapping({**near, name: case.text}, {**ours, **consuls})
    assert getattr(explicit, name) == case.value
    by_url = Settings.from_url(url({**near, name: case.text}), {**ours, **consuls})
    assert getattr(by_url, name) == case.value
    by_ours = Settings.from_mapping(near, {**ours, **consuls})
    assert getattr(by_ours, name) == case.other_value


@pytest.mark.parametrize(
    ("name", "text"), [(name, text) for name, case in CASES.items() for text in case.refused]
)
def test_a_bad_value_names_its_setting(name: str, text: str) -> None:
    """The message begins with the setting, or with the variable that one has to correct, and says
    what it must be."""
    with pytest.raises(ConfigurationError, match=rf"\A{name} (must|is needed)"):
        Settings(**{**beside(name), name: text})
    if text:  # an empty variable counts as not set, as in every shell
        with pytest.raises(ConfigurationError, match=rf"\ACONSUL_MATCHMAKER_{name.upper()} must"):
            Settings.from_env(in_environment({**beside(name), name: text}))


@pytest.mark.parametrize(
    ("variable", "text"),
    [
        ("CONSUL_HTTP_SSL", "maybe"),
        ("CONSUL_HTTP_SSL_VERIFY", "maybe"),
        ("CONSUL_HTTP_ADDR", "127.0.0.1:65536"),
        ("CONSUL_HTTP_ADDR", "unix:///run/consul.sock"),
        ("CONSUL_HTTP_ADDR", "http://127.0.0.1:8500/path"),
        ("CONSUL_HTTP_ADDR", "http://"),
        ("CONSUL_HTTP_TOKEN", "a b"),
    ],
)
def test_a_bad_variable_of_consuls_is_named_itself(variable: str, text: str) -> None:
    """The same for the consul command's variables."""
    with pytest.raises(ConfigurationError, match=rf"\A{variable}\b.* (must|only)"):
        Settings.from_url("consul+kv://", {variable: text})


@pytest.mark.parametrize("value", [True, None, 10**400, "1" * 5000, object(), [], b"5"])
def test_a_number_is_a_number(value: object) -> None:
    """True is not one second (trap T8), and no value gets past the check by its type or size."""
    with pytest.raises(ConfigurationError, match="ttl_seconds must be a number"):
        Settings(mode="kv", ttl_seconds=value)  # type: ignore[arg-type]


@pytest.mark.parametrize("value", [5, object(), [7], [None], b"a", [Host.opaque("x")]])
def test_addresses_are_hosts_or_texts(value: object) -> None:
    """Another type is refused by name."""
    with pytest.raises(ConfigurationError, match="addresses must"):
        Settings(mode="kv", addresses=value)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "value",
    [
        "10.0.0.1:1",
        Host("10.0.0.1", 1),
        (Host("10.0.0.1", 1),),
        ["10.0.0.1:1"],
        iter(["10.0.0.1:1"]),
    ],
)
def test_one_agent_may_be_given_in_many_ways(value: object) -> None:
    """A text, a host, or a collection of either."""
    assert Settings(mode="kv", addresses=value).addresses == hosts("10.0.0.1:1")  # type: ignore[arg-type]


def test_defaults_depend_on_the_mode() -> None:
    """Agents, timeout and watch are Consul's own defaults for DNS and for HTTP; a process that does
    not beat counts as dead sooner in kv mode, as a lease is checked there beside its session."""
    kv, catalog, service = (Settings(mode=mode) for mode in ("kv", "catalog", "service"))
    assert (service.addresses, service.request_timeout_seconds) == (kv.addresses, 10.0)
    assert (service.watch, service.check_ttl_seconds, kv.check_ttl_seconds) == (True, 3.0, 1.0)
    assert not Settings(mode="service", datacenters=("dc1", "dc2")).watch
    assert not Settings(mode="service", consistency="cached").watch
    assert Settings(mode="kv", datacenters=("dc1", "dc2")).watch, "it never asks others"
    assert Settings(mode="kv", datacenters=("dc1", "dc2"), watch=True).watch
    assert (kv.addresses, catalog.addresses) == (hosts("127.0.0.1:8500"), hosts("127.0.0.1:8600"))
    assert (kv.request_timeout_seconds, catalog.request_timeout_seconds) == (10.0, 2.0)
    assert (kv.watch, catalog.watch) == (True, False)


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"ttl_min_seconds": 5, "ttl_max_seconds": 4}, ("ttl_min_seconds", "ttl_max_seconds")),
        ({"quarantine_seconds": 31}, ("quarantine_seconds", "quarantine_max_seconds")),
        ({"client_cert": "x"}, ("client_cert", "client_key")),
        ({"client_key": "x"}, ("client_cert", "client_key")),
        ({"token": "x", "token_file": "y"}, ("token", "token_file")),
        ({"shards": 2, "tag": "x"}, ("shards", "tag")),
        ({"mode": "catalog", "watch": True}, ("watch", "kv")),
        ({"mode": "service", "datacenters": "a,b", "watch": True}, ("watch", "datacenter")),
        (
            {"mode": "service", "consistency": "cached", "watch": True},
            ("watch", "consistency=cached"),
        ),
        ({"mode": "service", "check_ttl_seconds": 0.9}, ("check_ttl_seconds", "service")),
        ({"mode": "service", "shards": 2}, ("shards", "catalog")),
        ({"mode": "service", "service_template": "{topic}.query"}, (".query", "catalog")),
        ({"consistency": "cached"}, ("cached", "service")),
        ({"zone": "a"}, ("zone", "service")),
    ],
)
def test_settings_that_contradict_each_other_are_both_named(
    values: dict[str, Any], named: tuple[str, ...]
) -> None:
    """The message names both, so that either can be corrected."""
    with pytest.raises(ConfigurationError) as caught:
        Settings(**{"mode": "kv", **values})
    assert all(name in str(caught.value) for name in named)


@pytest.mark.parametrize("name", ["tttl_seconds", "TTL_SECONDS", "ttlseconds", "ttl"])
def test_an_unknown_setting_is_told_the_nearest(name: str) -> None:
    """A typing error is answered with what was probably meant, in the spelling of its source."""
    with pytest.raises(ConfigurationError, match=r"unknown setting .*: .*ttl_seconds"):
        Settings.from_mapping({"mode": "kv", name: 1}, {})
    with pytest.raises(ConfigurationError, match=r"unknown setting .*: .*ttl_seconds"):
        Settings.from_url(f"consul+kv://?{name}=1", {})
    if name != "TTL_SECONDS":
        with pytest.raises(ConfigurationError, match=r"unknown CONSUL_.*: .*CONSUL_.*_TTL_SECONDS"):
            Settings.from_url("consul+kv://", {f"CONSUL_MATCHMAKER_{name.upper()}": "1"})


def test_a_setting_like_no_other_is_told_them_all() -> None:
    """With nothing near, the message lists what there is."""
    with pytest.raises(ConfigurationError, match=r"known are .*session_ttl_seconds"):
        Settings.from_mapping({"mode": "kv", "zzzzqqqq": 1}, {})


# --- the URL -------------------------------------------------------------------------------------


def test_a_url_says_it_all() -> None:
    """Mode, token, agents, prefix and settings in one line."""
    found = Settings.from_url(
        "consul+kv://:a%2Fb%40c@10.0.0.1:8500,[::1],node/matchmaker/prod?session_ttl_seconds=15", {}
    )
    assert found.mode == "kv"
    assert found.token == "a/b@c"
    assert found.addresses == hosts("10.0.0.1:8500", "[::1]:8500", "node:8500")
    assert found.prefix == "matchmaker/prod"
    assert found.session_ttl_seconds == 15


TEXT = st.text(st.characters(min_codepoint=33, max_codepoint=126), min_size=1)
PORT = st.integers(1, 65535)
HOST = st.builds(
    lambda address, port: Host.parse(
        f"[{address}]:{port}" if ":" in str(address) else f"{address}:{port}"
    ),
    st.ip_addresses(),
    PORT,
)


@given(
    token=TEXT,
    addresses=st.lists(HOST, min_size=1, max_size=4),
    prefix=st.from_regex(r"[A-Za-z0-9_-]+(/[A-Za-z0-9_-]+){0,3}", fullmatch=True),
    ttl_seconds=st.floats(0, 86400),
    ca_cert=TEXT,
    watch=st.booleans(),
)
def test_settings_survive_the_url(
    token: str,
    addresses: list[Host],
    prefix: str,
    ttl_seconds: float,
    ca_cert: str,
    watch: bool,
) -> None:
    """Whatever a URL is made of, quoted, comes out again."""
    query = urlencode({"ttl_seconds": ttl_seconds, "ca_cert": ca_cert, "watch": watch})
    agents = ",".join(map(str, addresses))
    text = f"consul+kv://:{quote(token, safe='')}@{agents}/{prefix}?{query}"
    assert Settings.from_url(text, {}) == Settings(
        mode="kv",
        token=token,
        addresses=tuple(addresses),
        prefix=prefix,
        ttl_seconds=ttl_seconds,
        ca_cert=ca_cert,
        watch=watch,
    )


@pytest.mark.parametrize(
    "text",
    [
        "",
        "consul://127.0.0.1",
        "consul+dns://127.0.0.1",
        "http://127.0.0.1:8500",
        "127.0.0.1:8500",
        "consul+kv://127.0.0.1:port",
        "consul+kv://127.0.0.1:0",
        "consul+kv://[::1",
        "consul+kv://a:1,,b:2:3",
        "consul+kv://user@a:1",
        "consul+kv://user:token@a:1",
        "consul+kv://:@a:1",
        "consul+kv://a/x y",
        "consul+kv://a#x",
        "consul+kv://a?x",
        "consul+kv://a?=1",
        "consul+kv://a?ttl_seconds=1&ttl_seconds=2",
        "consul+kv://a/x?prefix=y",
        "consul+kv://a?mode=catalog",
        "consul+catalog://a/prefix",
    ],
)
def test_a_bad_url_is_refused(text: str) -> None:
    """Each is a ConfigurationError, never another exception and never a guess."""
    with pytest.raises(ConfigurationError):
        Settings.from_url(text, {})


@pytest.mark.parametrize("value", [None, 5, b"consul+kv://a"])
def test_a_url_is_a_text(value: object) -> None:
    """Another type is refused as a bad value too."""
    with pytest.raises(ConfigurationError):
        Settings.from_url(value, {})  # type: ignore[arg-type]


@settings(max_examples=500)
@given(st.text(), st.sampled_from(["", "consul+kv://", "consul+catalog://", "consul+kv://a?"]))
def test_no_url_breaks_the_reader(text: str, start: str) -> None:
    """Whatever is written, the answer is Settings or a ConfigurationError."""
    try:
        found = Settings.from_url(start + text, {})
    except ConfigurationError:
        return
    assert all(isinstance(agent, Host) for agent in found.addresses)


# --- the environment -----------------------------------------------------------------------------


def test_the_url_may_come_from_the_environment() -> None:
    """CONSUL_MATCHMAKER_URL is enough, and the other variables complete it."""
    found = Settings.from_env(
        {
            "CONSUL_MATCHMAKER_URL": "consul+kv://a:1?ttl_seconds=7",
            "CONSUL_MATCHMAKER_TTL_SECONDS": "8",
            "CONSUL_MATCHMAKER_PREFIX": "x",
            "CONSUL_HTTP_ADDR": "b:2",
        }
    )
    assert (found.addresses, found.ttl_seconds, found.prefix) == (hosts("a:1"), 7.0, "x")


def test_an_empty_environment_says_what_to_set() -> None:
    """The remedy is in the message."""
    with pytest.raises(ConfigurationError, match=r"CONSUL_MATCHMAKER_URL, .*consul\+kv://"):
        Settings.from_env({})
    with pytest.raises(ConfigurationError, match="catalog, kv"):
        Settings.from_mapping({}, {})


def test_empty_variables_are_not_set() -> None:
    """`export X=` means the same as no X."""
    names = [f"CONSUL_MATCHMAKER_{name.upper()}" for name in CASES]
    environ = dict.fromkeys([*names, *VARIABLES, "CONSUL_MATCHMAKER_URL"], "")
    assert Settings.from_url("consul+kv://", environ) == Settings(mode="kv")


def test_the_constructor_uses_exactly_what_it_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the from_... functions look at the environment."""
    monkeypatch.setenv("CONSUL_HTTP_ADDR", "a:1")
    assert Settings(mode="kv").addresses == hosts("127.0.0.1:8500")
    assert Settings.from_mapping({"mode": "kv"}).addresses == hosts("a:1")


@pytest.mark.parametrize(
    ("address", "ssl", "agent", "tls"),
    [
        ("10.0.0.1:8500", "", "10.0.0.1:8500", False),
        ("http://10.0.0.1:8500", "", "10.0.0.1:8500", False),
        ("http://10.0.0.1:8500/", "true", "10.0.0.1:8500", True),
        ("https://10.0.0.1:8501", "", "10.0.0.1:8501", True),
        ("https://10.0.0.1:8501", "false", "10.0.0.1:8501", True),
        ("https://consul.example", "", "consul.example:443", True),
        ("consul.example", "1", "consul.example:443", True),
        ("http://consul.example", "", "consul.example:80", False),
        ("[::1]:8500", "", "[::1]:8500", False),
        ("https://[::1]", "", "[::1]:443", True),
    ],
)
def test_consuls_address_is_read_as_the_consul_command_reads_it(
    address: str, ssl: str, agent: str, tls: bool
) -> None:
    """Scheme, IPv6 and a missing port mean what they mean to `consul` (measured with 1.8.7)."""
    found = Settings.from_url("consul+kv://", {"CONSUL_HTTP_ADDR": address, "CONSUL_HTTP_SSL": ssl})
    assert (found.addresses, found.tls) == (hosts(agent), tls)


def test_the_scheme_of_an_address_that_is_not_used_does_not_count() -> None:
    """https:// in CONSUL_HTTP_ADDR speaks of that agent, CONSUL_HTTP_SSL of any."""
    https = {"CONSUL_HTTP_ADDR": "https://b:2"}
    assert not Settings.from_url("consul+kv://a:1", https).tls
    assert not Settings.from_url(
        "consul+kv://", {**https, "CONSUL_MATCHMAKER_ADDRESSES": "a:1"}
    ).tls
    assert Settings.from_url("consul+kv://a:1", {**https, "CONSUL_HTTP_SSL": "true"}).tls
    assert Settings.from_url("consul+kv://a:1", {"CONSUL_MATCHMAKER_TLS": "true"}).tls
    assert not Settings.from_url("consul+kv://", {**https, "CONSUL_MATCHMAKER_TLS": "false"}).tls


def test_a_stronger_token_silences_a_weaker_file_and_the_reverse(tmp_path: Path) -> None:
    """Of token and token_file, the stronger source counts as a whole."""
    ours = {"CONSUL_MATCHMAKER_TOKEN": "ours"}
    our_file = {"CONSUL_MATCHMAKER_TOKEN_FILE": "/ours"}
    consuls = {"CONSUL_HTTP_TOKEN": "consuls"}
    consul_file = {"CONSUL_HTTP_TOKEN_FILE": "/consuls"}

    def of(explicit: dict[str, str], *sources: dict[str, str]) -> tuple[str | None, str | None]:
        environ = {name: value for source in sources for name, value in source.items()}
        found = Settings.from_mapping({"mode": "kv", **explicit}, environ)
        return found.token, found.token_file

    assert of({"token": "x"}, our_file, consul_file) == ("x", None)
    assert of({"token_file": "/x"}, ours, consuls) == (None, "/x")
    assert of({}, ours, consul_file) == ("ours", None)
    assert of({}, our_file, consuls) == (None, "/ours")
    assert of({}, consuls, consul_file) == (None, "/consuls")  # as the consul command does
    with pytest.raises(ConfigurationError, match="token and token_file"):
        of({}, ours, our_file)


# --- the token -----------------------------------------------------------------------------------


def test_settings_never_print_the_token() -> None:
    """repr and str name what differs from the default, with stars for the token."""
    found = Settings(mode="kv", token=SECRET, ttl_seconds=7, tag=None)
    assert SECRET not in repr(found) + str(found) + f"{found}"
    assert repr(found) == (
        "Settings(mode='kv', addresses=(Host(address='127.0.0.1', port=8500),), ttl_seconds=7.0, "
        "request_timeout_seconds=10.0, check_ttl_seconds=1.0, watch=True, token=***)"
    )


def test_the_token_file_is_read_each_time(tmp_path: Path) -> None:
    """A rotated token is seen without a restart; surrounding white space is not part of it."""
    path = tmp_path / "token"
    path.write_text("one\n")
    found = Settings(mode="kv", token_file=str(path))
    assert found.read_token() == "one"
    path.write_text("two")
    assert found.read_token() == "two"
    assert Settings(mode="kv", token="three").read_token() == "three"
    assert Settings(mode="kv").read_token() is None


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"", "holds no token"),
        (b" \n", "holds no token"),
        (SECRET.encode() + b"\n\n# mine", "nothing else"),
        (SECRET.encode() + b"\xff", "UTF-8"),
        (None, "No such file"),
    ],
)
def test_a_bad_token_file_is_named(tmp_path: Path, content: bytes | None, why: str) -> None:
    """The message has the file and the reason; test_secrets looks for what the file holds."""
    path = tmp_path / "token"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigurationError, match=why) as caught:
        Settings(mode="kv", token_file=str(path)).read_token()
    assert str(path) in str(caught.value)


def test_settings_are_values() -> None:
    """They compare, copy and pickle."""
    found = Settings(mode="catalog", service_map="a=b", datacenters="dc1", tag="v2")
    assert found == copy.deepcopy(found) == pickle.loads(pickle.dumps(found))
    assert found != replace(found, tag="v3")
