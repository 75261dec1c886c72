"""Every knob, defined once: name, meaning, unit, default, bounds, and where a value may come from.

A value given explicitly (argument, mapping, URL) wins over ``CONSUL_MATCHMAKER_<NAME>``, that over
Consul's own variables (``CONSUL_HTTP_ADDR`` and its kin), and those over the default.
"""

from __future__ import annotations

import difflib
import math
import os
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any
from urllib.parse import SplitResult, parse_qsl, unquote, urlsplit

from .errors import ConfigurationError
from .model import Host

ENVIRONMENT_PREFIX = "CONSUL_MATCHMAKER_"
URL_VARIABLE = "CONSUL_MATCHMAKER_URL"
MODES = ("catalog", "kv")
DEFAULT_PORTS = {"catalog": 8600, "kv": 8500}  # Consul's own defaults for DNS and HTTP
REQUEST_TIMEOUT_SECONDS = {
    "catalog": 2.0,
    # Above Consul's rpc_hold_timeout of 7 s: without a leader a call takes 7.2 s (fact C8).
    "kv": 10.0,
}

_YES = frozenset({"1", "true", "yes", "on"})
_NO = frozenset({"0", "false", "no", "off"})


class _Refused(Exception):
    """Why a value cannot be taken; becomes a ConfigurationError that names the setting."""


def _text(value: Any) -> str:
    if not isinstance(value, str) or not value:
        raise _Refused("must be a text of at least one character")
    return value


def _yes_or_no(value: Any) -> bool:
    if isinstance(value, bool):
        return value
    if isinstance(value, str) and value.strip().lower() in _YES | _NO:
        return value.strip().lower() in _YES
    raise _Refused("must be true or false")


def _number(low: float, high: float, unit: str) -> Callable[[Any], float]:
    def parse(value: Any) -> float:
        # bool is an int in Python: True must not become 1 second (tooz had that bug).
        if isinstance(value, bool) or not isinstance(value, (int, float, str)):
            raise _Refused(f"must be a number of {unit}")
        try:
            number = float(value)
        except ValueError:
            raise _Refused(f"must be a number of {unit}") from None
        if not (math.isfinite(number) and low <= number <= high):
            raise _Refused(f"must be from {low:g} to {high:g} {unit}")
        return number

    return parse


def _seconds(low: float, high: float) -> Callable[[Any], float]:
    return _number(low, high, "seconds")


def _one_of(*choices: str) -> Callable[[Any], str]:
    def parse(value: Any) -> str:
        if value not in choices:
            raise _Refused(f"must be one of {', '.join(choices)}")
        return str(value)

    return parse


def _items(value: Any) -> tuple[Any, ...]:
    if isinstance(value, str):
        return tuple(item.strip() for item in value.split(",") if item.strip())
    if isinstance(value, Iterable):
        return tuple(value)
    raise _Refused("must be a list, or a text with commas")


def _names(value: Any) -> tuple[str, ...]:
    return tuple(_text(item) for item in _items(value))


def _pairs(value: Any) -> Mapping[str, str]:
    if isinstance(value, Mapping):
        pairs = list(value.items())
    else:
        pairs = [item.partition("=")[::2] for item in _names(value)]
    if not all(isinstance(k, str) and isinstance(v, str) and k and v for k, v in pairs):
        raise _Refused("must be pairs: topic=service,topic2=service2")
    return dict(pairs)


_SEGMENTS = re.compile(r"[A-Za-z0-9_-]+(/[A-Za-z0-9_-]+)*\Z")


def _key_prefix(value: Any) -> str:
    prefix = _text(value).strip("/")
    if not _SEGMENTS.match(prefix):
        # The alphabet that every Consul version accepts in keys (fact B13).
        raise _Refused("may hold only letters, digits, '_', '-' and single '/' between them")
    return prefix


def _template(value: Any) -> str:
    if "{topic}" not in _text(value):
        raise _Refused("must hold {topic} where the topic goes")
    return str(value)


def _knob(parse: Callable[[Any], Any], doc: str, default: Any, **extra: Any) -> Any:
    """A dataclass field that knows how to read itself; *extra* may be secret, variables."""
    return field(default=default, metadata={"parse": parse, "doc": doc, **extra})


@dataclass(frozen=True, repr=False)
class Settings:
    """What a Matchmaker is told.  Immutable, checked when made; raises ConfigurationError.

    Every value may be given as its type or as text.  The constructor uses exactly what it is given;
    `from_url`, `from_env` and `from_mapping` also look at the environment.
    """

    mode: str = _knob(_one_of(*MODES), "catalog (Consul DNS) or kv (sessions and keys)", "")
    addresses: tuple[Host, ...] = _knob(
        _names,
        "agents as host:port, tried in order; default 127.0.0.1:8600 (catalog), :8500 (kv)",
        (),
        variables=("CONSUL_HTTP_ADDR",),
    )
    ttl_seconds: float = _knob(_seconds(0, 86400), "how long an answer is fresh", 5.0)
    ttl_min_seconds: float = _knob(_seconds(0, 86400), "a DNS TTL below it is raised to it", 1.0)
    ttl_max_seconds: float = _knob(_seconds(0, 86400), "a DNS TTL above it is cut to it", 60.0)
    empty_ttl_seconds: float = _knob(
        _seconds(0, 86400), "how long an answer without hosts is fresh", 1.0
    )
    max_stale_seconds: float = _knob(
        _seconds(0, 31536000),
        "how long the last good answer is served while Consul cannot be asked",
        3600.0,
    )
    confirm_empty_seconds: float = _knob(
        # A restarted Consul server denies live services for 4.0-4.9 s (fact A9); 6 leaves a margin.
        _seconds(0, 3600),
        "how long an empty or much smaller DNS answer must repeat before it replaces a good one",
        6.0,
    )
    request_timeout_seconds: float = _knob(
        _seconds(0.05, 600), "one exchange; default 2 (catalog), 10 (kv)", 0.0
    )
    domain: str = _knob(_text, "Consul's DNS domain", "consul")
    datacenters: tuple[str, ...] = _knob(
        _names, "datacenters in order of preference; empty is the agent's own", ()
    )
    tag: str | None = _knob(_text, "only instances that have this Consul tag", None)
    service_template: str = _knob(
        _template, "the Consul service of a topic; {topic} stands for it", "{topic}"
    )
    service_map: Mapping[str, str] = _knob(
        _pairs, "services that the template does not give: topic=service,...", None
    )
    prefix: str = _knob(_key_prefix, "root of the KV keys", "matchmaker")
    session_ttl_seconds: float = _knob(
        # Consul's floor is 10 unless the servers' session_ttl_min lowers it; its roof is 24 h (B1).
        _seconds(1, 86400),
        "lease TTL; a crashed process's keys leave after 2 x this at the latest; "
        "below 10 the servers' session_ttl_min must allow it",
        10.0,
    )
    liveness: str = _knob(
        _one_of("session", "node", "check"),
        "what ends a lease beside its TTL: session (nothing), node (its agent's node dies), "
        "check (the process stops beating)",
        "session",
    )
    watch: bool = _knob(
        _yes_or_no, "keep topics fresh by blocking queries; default on for kv", None
    )
    consistency: str = _knob(
        _one_of("default", "stale", "consistent"), "Consul's read consistency", "default"
    )
    quarantine_seconds: float = _knob(
        _seconds(0, 3600), "how long a rejected host is avoided the first time", 1.0
    )
    quarantine_max_seconds: float = _knob(
        _seconds(0, 86400), "the most that doubling may reach", 30.0
    )
    panic_fraction: float = _knob(
        _number(0, 1, "(a fraction)"),
        "rejections are ignored when this fraction of a topic's hosts or more is rejected",
        0.5,
    )
    state_path: str | None = _knob(
        _text, "folder for last-known-good answers, read at a cold start", None
    )
    token: str | None = _knob(
        _text, "Consul ACL token", None, secret=True, variables=("CONSUL_HTTP_TOKEN",)
    )
    token_file: str | None = _knob(
        _text,
        "file that holds the token; read again when it changes",
        None,
        variables=("CONSUL_HTTP_TOKEN_FILE",),
    )
    tls: bool = _knob(
        _yes_or_no, "speak HTTPS to the agents", False, variables=("CONSUL_HTTP_SSL",)
    )
    ca_cert: str | None = _knob(
        _text, "file of the CA that signs Consul", None, variables=("CONSUL_CACERT",)
    )
    client_cert: str | None = _knob(
        _text, "our certificate for Consul", None, variables=("CONSUL_CLIENT_CERT",)
    )
    client_key: str | None = _knob(_text, "its key", None, variables=("CONSUL_CLIENT_KEY",))
    verify: bool = _knob(
        _yes_or_no,
        "check Consul's certificate",
        True,
        variables=("CONSUL_HTTP_SSL_VERIFY",),
    )

    def __post_init__(self) -> None:
        if not self.mode:
            raise ConfigurationError(f"mode is needed: one of {', '.join(MODES)}")
        for knob in fields(self):
            value = getattr(self, knob.name)
            if value is knob.default or (value is None and knob.default is None):
                continue
            try:
                object.__setattr__(self, knob.name, knob.metadata["parse"](value))
            except _Refused as refused:
                shown = "" if knob.metadata.get("secret") else f" (it is {value!r})"
                raise ConfigurationError(f"{knob.name} {refused}{shown}") from None
        self._fill_in_what_depends_on_the_mode()
        self._check_together()

    def _fill_in_what_depends_on_the_mode(self) -> None:
        def fill(name: str, value: Any) -> None:
            object.__setattr__(self, name, value)

        port = DEFAULT_PORTS[self.mode]
        addresses = tuple(_agent(item, port) for item in self.addresses)
        fill("addresses", addresses or (Host("127.0.0.1", port),))
        fill("service_map", dict(self.service_map or {}))
        if not self.request_timeout_seconds:
            fill("request_timeout_seconds", REQUEST_TIMEOUT_SECONDS[self.mode])
        if self.watch is None:
            fill("watch", self.mode == "kv")

    def _check_together(self) -> None:
        def ordered(lower: str, upper: str) -> None:
            low, high = getattr(self, lower), getattr(self, upper)
            if low > high:
                raise ConfigurationError(f"{lower} ({low:g}) must not exceed {upper} ({high:g})")

        ordered("ttl_min_seconds", "ttl_max_seconds")
        ordered("quarantine_seconds", "quarantine_max_seconds")
        if (self.client_cert is None) != (self.client_key is None):
            raise ConfigurationError("client_cert and client_key go together: give both or neither")
        if self.watch and self.mode == "catalog":
            raise ConfigurationError("watch needs kv mode: Consul DNS has no blocking queries")

    @classmethod
    def from_mapping(
        cls, values: Mapping[str, Any], environ: Mapping[str, str] | None = None
    ) -> Settings:
        """Settings of *values*, completed from the environment (*environ*, else the process's)."""
        _refuse_unknown(values, "setting")
        explicit = {name: value for name, value in values.items() if value is not None}
        found = _from_environment(os.environ if environ is None else environ, explicit)
        return cls(**{**found, **explicit})

    @classmethod
    def from_url(cls, url: str, environ: Mapping[str, str] | None = None) -> Settings:
        """Settings of ``consul+MODE://[:TOKEN@]HOST:PORT[,HOST:PORT...][/PREFIX][?name=value&...]``.

        The path is the KV prefix (kv mode only); what the URL leaves open comes from the
        environment.  The URL is never repeated in an error, as it may hold a token.
        """
        return cls.from_mapping(_values_of_url(url), environ)

    @classmethod
    def from_env(cls, environ: Mapping[str, str] | None = None) -> Settings:
        """Settings of ``CONSUL_MATCHMAKER_URL``, if it is set, and of the other variables."""
        environ = os.environ if environ is None else environ
        url = environ.get(URL_VARIABLE)
        if url:
            return cls.from_url(url, environ)
        if not environ.get(ENVIRONMENT_PREFIX + "MODE"):
            raise ConfigurationError(
                f"set {URL_VARIABLE}, for example consul+catalog://127.0.0.1:8600 "
                "or consul+kv://127.0.0.1:8500"
            )
        return cls.from_mapping({}, environ)

    def read_token(self) -> str | None:
        """The token to use now: the setting, or what ``token_file`` holds at this moment.

        Raises ConfigurationError when the file cannot be read or is empty.
        """
        if self.token_file is None or self.token is not None:
            return self.token
        try:
            token = Path(self.token_file).read_text(encoding="utf-8").strip()
        except (OSError, UnicodeError) as error:
            reason = getattr(error, "strerror", None) or "not UTF-8 text"
            raise ConfigurationError(f"token_file {self.token_file}: {reason}") from None
        if not token:
            raise ConfigurationError(f"token_file {self.token_file} is empty")
        return token

    def __repr__(self) -> str:
        shown = []
        for knob in fields(self):
            value = getattr(self, knob.name)
            if value != knob.default or knob.name == "mode":
                shown.append(f"{knob.name}={'***' if knob.metadata.get('secret') else repr(value)}")
        return f"Settings({', '.join(shown)})"


def _agent(item: Host | str, default_port: int) -> Host:
    """One agent's address; a bare name or address gets Consul's default port."""
    if isinstance(item, Host):
        return item
    bare = not item.endswith("]") and ":" not in item
    return Host.parse(f"{item}:{default_port}" if bare or item.endswith("]") else item)


def _refuse_unknown(names: Iterable[str], kind: str) -> None:
    known = [knob.name for knob in fields(Settings)]
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
            hint = f"did you mean {near[0]}?" if near else f"known are: {', '.join(known)}"
            raise ConfigurationError(f"unknown {kind} {name!r}: {hint}")


def _from_environment(environ: Mapping[str, str], explicit: Mapping[str, Any]) -> dict[str, Any]:
    """What the environment says and *explicit* does not; our own variables win over Consul's."""
    ours = {
        name[len(ENVIRONMENT_PREFIX) :].lower(): value
        for name, value in environ.items()
        if name.startswith(ENVIRONMENT_PREFIX) and name != URL_VARIABLE and value
    }
    _refuse_unknown(ours, "variable CONSUL_MATCHMAKER_...:")
    found: dict[str, Any] = {}
    if (
        explicit.get("mode") or ours.get("mode")
    ) == "kv":  # DNS knows no token, TLS or HTTP address
        found = _consul_variables(environ)
    for stronger in (ours, explicit):
        # A token of a stronger source must not lose against a weaker one's file, nor the reverse.
        if "token" in stronger or "token_file" in stronger:
            found.pop("token", None)
            found.pop("token_file", None)
        if "addresses" in stronger and "tls" not in stronger:
            found.pop("tls", None)  # it spoke of the address that is not used
        found.update({name: value for name, value in stronger.items() if name not in explicit})
    return found


def _consul_variables(environ: Mapping[str, str]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for knob in fields(Settings):
        for variable in knob.metadata.get("variables", ()):
            if environ.get(variable):
                found[knob.name] = environ[variable]
    if "token_file" in found:
        found.pop("token", None)  # the consul command prefers the file
    address = found.get("addresses")
    if address is not None:
        scheme, separator, rest = str(address).rpartition("://")
        if separator and scheme not in ("http", "https"):
            raise ConfigurationError(
                f"CONSUL_HTTP_ADDR: {scheme}:// is not spoken here; give the agent as host:port"
            )
        found["addresses"] = rest.rstrip("/")
        if scheme == "https":
            found["tls"] = True
    return found


def _values_of_url(url: str) -> dict[str, Any]:
    parts = _split(url)
    family, _, mode = parts.scheme.partition("+")
    if family != "consul" or mode not in MODES:
        raise ConfigurationError(
            "the URL must begin with consul+catalog:// or consul+kv://, "
            "for example consul+kv://127.0.0.1:8500/matchmaker"
        )
    values: dict[str, Any] = {"mode": mode}
    user, at, hosts = parts.netloc.rpartition("@")
    if at:
        name, _, token = user.partition(":")
        if name or not token:
            raise ConfigurationError("before the @ of the URL stands :TOKEN and nothing else")
        values["token"] = unquote(token)
    if hosts:
        values["addresses"] = unquote(hosts)
    path = unquote(parts.path).strip("/")
    if path and mode != "kv":
        raise ConfigurationError("a path in the URL is the KV prefix: catalog mode has none")
    if path:
        values["prefix"] = path
    if parts.fragment:
        raise ConfigurationError("the URL has a '#': write it as %23")
    try:
        query = parse_qsl(parts.query, keep_blank_values=True, strict_parsing=bool(parts.query))
    except ValueError:
        raise ConfigurationError(
            "after the ? of the URL stand name=value pairs with & between"
        ) from None
    _refuse_unknown((name for name, _ in query), "setting")
    for name, value in query:
        if name in values and not (name == "mode" and value == mode):
            raise ConfigurationError(f"{name} stands twice in the URL")
        values[name] = value
    return values


def _split(url: str) -> SplitResult:
    try:
        return urlsplit(url)
    except ValueError:  # its message would repeat the URL, and with it the token
        raise ConfigurationError("the URL cannot be read: check brackets and spaces") from None
