"""Every setting, defined once: name, meaning, unit, default, bounds, and its sources.

A value given explicitly (argument, mapping, URL) wins over ``CONSUL_MATCHMAKER_<NAME>``, that over
Consul's own variables (``CONSUL_HTTP_ADDR`` and the others), and those over the default.
"""

from __future__ import annotations

import contextlib
import difflib
import os
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, unquote

from .errors import ConfigurationError
from .model import Host, address_and_port
from .texts import quoted

ENVIRONMENT_PREFIX = "CONSUL_MATCHMAKER_"
URL_VARIABLE = "CONSUL_MATCHMAKER_URL"
MODES = ("catalog", "kv", "service")
DEFAULT_PORTS = {"catalog": 8600, "kv": 8500, "service": 8500}  # Consul's own, DNS and HTTP
REQUEST_TIMEOUT_SECONDS = {
    "catalog": 2.0,
    # Above Consul's rpc_hold_timeout of 7 s: without a leader a call takes 7.2 s (fact C8).
    "kv": 10.0,
    "service": 10.0,
}
CHECK_TTL_SECONDS = {"catalog": 1.0, "kv": 1.0, "service": 3.0}

# Consul's own spellings (Go's ParseBool: 1, t, true) and what people write besides.
_YES = frozenset({"1", "t", "true", "yes", "on"})
_NO = frozenset({"0", "f", "false", "no", "off"})

_Parse = Callable[[Any], Any]
"""What a value given as its type or as text means; raises `_Refused`."""

_TOKEN_OF_CONSUL = re.compile(r"[0-9a-fA-F]{8}(-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}\Z")


class _Refused(Exception):
    """Why a value cannot be taken; becomes a ConfigurationError that names the setting.

    That error repeats the value unless told not to, or unless it looks as if it held a token.
    """

    def __init__(self, why: str, *, repeats_value: bool = True) -> None:
        super().__init__(why)
        self.repeats_value = repeats_value


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


def _number(low: float, high: float, unit: str = "") -> _Parse:
    allowed = f"must be a number from {low:.10g} to {high:.10g}{unit}"

    def parse(value: Any) -> float:
        # bool is an int in Python: True must not become 1 second (tooz had that bug).
        if isinstance(value, (int, float, str)) and not isinstance(value, bool):
            with contextlib.suppress(ValueError, OverflowError):
                number = float(value)
                if low <= number <= high:  # nan is in no range
                    return number
        raise _Refused(allowed)

    return parse


def _seconds(low: float, high: float) -> _Parse:
    return _number(low, high, ", in seconds")


def _whole(low: int, high: int) -> _Parse:
    parse_number = _number(low, high)

    def parse(value: Any) -> int:
        number = parse_number(value)
        if number != int(number):
            raise _Refused(f"must be a whole number from {low} to {high}")
        return int(number)

    return parse


def _one_of(*choices: str) -> _Parse:
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


def _agents(value: Any) -> tuple[Host | str, ...]:
    """Agents; a text without a port stays one until the mode, and with it the port, is known."""
    try:
        agents = tuple(map(_agent, (value,) if isinstance(value, Host) else _items(value)))
    except _Refused as refused:  # never repeated: a comma in a token has cut it to pieces
        raise _Refused(str(refused), repeats_value=False) from None
    if not agents:
        raise _Refused("must name at least one agent, as in 127.0.0.1:8500")
    return agents


def _agent(item: Any) -> Host | str:
    if isinstance(item, Host):
        if item.port is None:
            raise _Refused("must be agents as host:port")
        return item
    text = _text(item)
    if "@" in text:
        raise _Refused("must not hold a token or user: give the token as token or token_file")
    if _TOKEN_OF_CONSUL.match(text.rpartition(":")[0] or text):
        raise _Refused("must be agents as host:port: this is a token, which token takes")
    if "://" in text:
        raise _Refused("must be host:port without a scheme; for https set tls to true")
    if "/" in text:
        raise _Refused("must be host:port without a path")
    has_port = ":" in text and not text.endswith("]")
    try:
        host = Host(*address_and_port(text if has_port else f"{text}:1"))
    except ValueError as error:
        raise _Refused(f"must be agents as host:port: {error}") from None
    return host if has_port else text


def _pairs(value: Any) -> Mapping[str, str]:
    if isinstance(value, Mapping):
        pairs = list(value.items())
    else:
        pairs = [_text(item).partition("=")[::2] for item in _items(value)]
        pairs = [(topic.strip(), service.strip()) for topic, service in pairs]
    if not all(isinstance(k, str) and isinstance(v, str) and k and v for k, v in pairs):
        raise _Refused("must be pairs: topic=service,topic2=service2")
    if len(dict(pairs)) < len(pairs):
        raise _Refused("must name each topic once")
    return dict(pairs)


def _matching(pattern: str, why: str) -> _Parse:
    compiled = re.compile(pattern)

    def parse(value: Any) -> str:
        if not compiled.fullmatch(_text(value)):
            raise _Refused(why)
        return str(value)

    return parse


# What Consul DNS can find (fact A8): anything else answers NXDOMAIN, as if nobody were there.
_label = _matching(
    r"[A-Za-z0-9_-]{1,63}", "must be one DNS label: 1 to 63 letters, digits, '-' and '_'"
)
# The alphabet that every Consul version accepts in keys (fact B13).
_segments = _matching(
    r"[A-Za-z0-9_-]+(/[A-Za-z0-9_-]+)*",
    "must hold only letters, digits, '_', '-' and single '/' between them",
)
_template = _matching(
    r"[^{}]*(\{topic\}[^{}]*)+", "must hold {topic} where the topic goes, and no other braces"
)
# Anything else cannot stand in an HTTP header, and the client's error would repeat it.
_header = _matching(r"[\x21-\x7e]+", "must be a text of printable ASCII characters without spaces")


def _labels(value: Any) -> tuple[str, ...]:
    return tuple(map(_label, _items(value)))


def _tag(value: Any) -> str:
    tag: str = _label(value)
    if len(tag) > 62:
        raise _Refused("must have at most 62 characters: a '_' is put before it in the DNS name")
    if tag.lower() == "tcp":
        raise _Refused("must not be tcp: to Consul DNS that means any tag (fact A8)")
    return tag


def _domain(value: Any) -> str:
    domain = _text(value).strip(".")
    for label in domain.split("."):
        _label(label or " ")
    return domain


def _path(value: Any) -> str:
    if _TOKEN_OF_CONSUL.match(_text(value)):
        raise _Refused("must be a path, and no token; a file that holds one is token_file's")
    return str(value)


def _secret(value: Any) -> Any:
    return _header(_text(value).strip() or " ")


def _key_prefix(value: Any) -> Any:
    return _segments(_text(value).strip("/") or "/")


def _setting(parse: _Parse, doc: str, default: Any, **extra: Any) -> Any:
    """A dataclass field that knows how to read itself; *extra* may be secret, variables."""
    return field(default=default, metadata={"parse": parse, "doc": doc, **extra})


@dataclass(frozen=True, repr=False)
class Settings:
    """What a Matchmaker is told.  Immutable, checked when made; raises ConfigurationError.

    Every value may be given as its type or as text.  The constructor uses exactly what it is given;
    `from_url`, `from_env` and `from_mapping` also look at the environment.
    """

    mode: str = _setting(
        _one_of(*MODES),
        "catalog (Consul DNS), kv (sessions and keys) or service (services of the agent)",
        "",
    )
    addresses: tuple[Host, ...] = _setting(
        _agents,
        "agents as host:port, tried in order; default 127.0.0.1:8600 (catalog), else :8500",
        (),
        variables=("CONSUL_HTTP_ADDR",),
    )
    ttl_seconds: float = _setting(_seconds(0, 86400), "how long an answer is fresh", 5.0)
    ttl_min_seconds: float = _setting(_seconds(0, 86400), "a DNS TTL below it is raised to it", 1.0)
    ttl_max_seconds: float = _setting(_seconds(0, 86400), "a DNS TTL above it is cut to it", 60.0)
    empty_ttl_seconds: float = _setting(
        _seconds(0, 86400), "how long an answer without hosts is fresh", 1.0
    )
    max_stale_seconds: float = _setting(
        _seconds(0, 31536000),
        "how long the last good answer is served while Consul cannot be asked",
        3600.0,
    )
    stale_while_revalidate_seconds: float = _setting(
        # RFC 5861's name.  3 TTLs: a topic asked for at least so often never waits, and what a
        # caller gets without a wait is no older than a peer's answer may be while it changes.
        _seconds(0, 31536000),
        "up to this age a stale answer is returned at once; after it, Consul is asked first",
        15.0,
    )
    confirm_empty_seconds: float = _setting(
        # A restarted Consul server denies live services for 4.0-4.9 s (fact A9); 6 leaves a margin.
        _seconds(0, 3600),
        "how long an empty or much smaller DNS answer, or another that may be outdated, must "
        "repeat before it replaces a good one",
        6.0,
    )
    request_timeout_seconds: float = _setting(
        _seconds(0.05, 600), "one exchange; default 2 (catalog), else 10", 0.0
    )
    domain: str = _setting(_domain, "Consul's DNS domain", "consul")
    datacenters: tuple[str, ...] = _setting(
        _labels, "datacenters in order of preference; empty is the agent's own", ()
    )
    tag: str | None = _setting(_tag, "only instances that have this Consul tag", None)
    service_template: str = _setting(
        _template, "the Consul service of a topic; {topic} stands for it", "{topic}"
    )
    service_map: Mapping[str, str] = _setting(
        _pairs, "services that the template does not give: topic=service,...", None
    )
    strict_names: bool = _setting(
        _yes_or_no,
        "refuse a topic that cannot be the name of a Consul service (such as one with a dot, in "
        "service mode also with a _); off: its service has '-' in place of each such character",
        False,
    )
    shards: int = _setting(
        _whole(0, 100),
        "catalog mode, for topics of thousands of hosts: how many tags s00, s01... to ask for; "
        "0: none",
        0,
    )
    near: str | None = _setting(
        _label,
        "service mode: Snapshot.instances in order of distance from this node (_agent is ours); "
        "hosts, iteration and pick go by address as always",
        None,
    )
    accept_warning: bool = _setting(
        _yes_or_no, "service mode: hosts whose checks warn are hosts too", False
    )
    prefix: str = _setting(_key_prefix, "root of the KV keys", "matchmaker")
    session_ttl_seconds: float = _setting(
        # Consul's floor is 10 unless the servers' session_ttl_min lowers it; its roof is 24 h (B1).
        _seconds(1, 86400),
        "kv mode: TTL of the lease; the keys of a crashed process are removed after 2 x this at "
        "the latest; below 10 the servers' session_ttl_min must allow it",
        10.0,
    )
    liveness: str = _setting(
        _one_of("session", "node", "check"),
        "kv mode: what ends a lease beside its TTL: session (nothing), node (the agent's node "
        "dies), check (also the death of the process, within about check_ttl_seconds)",
        "session",
    )
    check_ttl_seconds: float = _setting(
        _seconds(0.5, 60),
        "service mode, and kv mode with liveness=check: a process that has not beaten for this "
        "long counts as dead; default 3 (service, at least 1), 1 (kv), where 5 keeps its "
        "registrations through an ordinary election",
        0.0,
    )
    watch: bool = _setting(
        _yes_or_no,
        "keep topics fresh by blocking queries; default on in kv and service mode, but off in "
        "service mode with several datacenters or consistency=cached; off in catalog mode",
        None,
    )
    max_watches: int = _setting(
        _whole(0, 100),
        "up to this many topics in use are each watched over a connection of their own, so that "
        "changes of other topics cost nothing; with more, one query watches all topics (kv mode), "
        "or the others are asked for when their answers run out (service mode)",
        4,
    )
    consistency: str = _setting(
        _one_of("default", "stale", "consistent", "cached"),
        "Consul's read consistency; cached (service mode): from the agent's own cache",
        "default",
    )
    quarantine_seconds: float = _setting(
        _seconds(0, 3600), "how long a rejected host is avoided the first time", 1.0
    )
    quarantine_max_seconds: float = _setting(
        _seconds(0, 86400), "the most that doubling may reach", 30.0
    )
    panic_fraction: float = _setting(
        _number(0, 1),
        "in a topic of 10 hosts or more, rejections are ignored when at least this fraction of "
        "them is rejected, as the others would be overloaded; in a smaller one when all are",
        0.5,
    )
    selection: str = _setting(
        _one_of("round_robin", "least_loaded", "weighted"),
        "which host pick takes: round_robin is in turn, and at random by weight where weights "
        "differ; weighted is in turn by weight; least_loaded is the one of two random hosts that "
        "has less to do, by the calls in flight and the latency that this process measured",
        "round_robin",
    )
    slow_start_seconds: float = _setting(
        _seconds(0, 3600),
        "a host that is new in a topic gets a part of its share that grows for so long; 0: at "
        "once all of it",
        0.0,
    )
    zone: str | None = _setting(
        _label,
        "service mode: where this process runs; hosts whose zone is the same are used first, and "
        "others as far as those are too few; what it registers says its zone",
        None,
    )
    subset_size: int = _setting(
        _whole(0, 65535),
        "this process uses at most so many hosts of a topic (of its zone), always the same ones "
        "while they live; 0: all",
        0,
    )
    client_id: str | None = _setting(
        _text,
        "the name that subset_size draws by, to be another one for each process or machine; "
        "default the name of the machine",
        None,
    )
    ejection_failure_rate: float = _setting(
        # Envoy's failure_percentage_threshold, gRPC A50's failure_percentage_ejection.
        _number(0, 1),
        "a host that fails this part of its last 20 or more calls, within about 10 s, is avoided "
        "for quarantine_max_seconds, whatever it answers meanwhile; 0: never",
        0.0,
    )
    ejection_max_fraction: float = _setting(
        _number(0, 1),
        "at most this fraction of a topic's hosts is ejected at a time; one of two or more always "
        "may be",
        0.2,
    )
    retry_fraction: float = _setting(
        _number(0, 1),
        "retries of a topic (Matchmaker.call and the adapters) are at most this fraction of its "
        "calls, and retry_floor_per_second more, over about 10 s",
        0.2,
    )
    retry_floor_per_second: float = _setting(
        _number(0, 1000), "retries that a topic may have however few calls it has", 1.0
    )
    max_topics: int = _setting(
        _whole(1, 1_000_000),
        "topics kept in memory; beyond it, topics that nobody asked for lately are dropped",
        10_000,
    )
    state_path: str | None = _setting(
        _path,
        "folder for the last good answers, read at a start while Consul is away; "
        "only this program's user may have write access to it",
        None,
    )
    token: str | None = _setting(
        _secret, "Consul ACL token", None, secret=True, variables=("CONSUL_HTTP_TOKEN",)
    )
    token_file: str | None = _setting(
        _path,
        "file that holds the token; read again when it changes",
        None,
        variables=("CONSUL_HTTP_TOKEN_FILE",),
    )
    tls: bool = _setting(
        _yes_or_no, "speak HTTPS to the agents", False, variables=("CONSUL_HTTP_SSL",)
    )
    ca_cert: str | None = _setting(
        _path,
        "file of the CA that signs Consul's certificate; default: the CAs of the system",
        None,
        variables=("CONSUL_CACERT",),
    )
    client_cert: str | None = _setting(
        _path, "our certificate for Consul", None, variables=("CONSUL_CLIENT_CERT",)
    )
    client_key: str | None = _setting(_path, "its key", None, variables=("CONSUL_CLIENT_KEY",))
    verify: bool = _setting(
        _yes_or_no,
        "check Consul's certificate",
        True,
        variables=("CONSUL_HTTP_SSL_VERIFY",),
    )

    def __post_init__(self) -> None:
        if not self.mode:
            raise ConfigurationError(f"mode is needed: one of {', '.join(MODES)}")
        for setting in fields(self):
            value = getattr(self, setting.name)
            if value is setting.default or (value is None and setting.default is None):
                continue
            object.__setattr__(self, setting.name, _checked(setting, value, setting.name))
        self._fill_in_what_depends_on_the_mode()
        self._check_together()

    def _fill_in_what_depends_on_the_mode(self) -> None:
        def fill(name: str, value: Any) -> None:
            object.__setattr__(self, name, value)

        port = DEFAULT_PORTS[self.mode]
        agents: tuple[Host | str, ...] = self.addresses or ("127.0.0.1",)
        fill("addresses", tuple(a if isinstance(a, Host) else _with_port(a, port) for a in agents))
        fill("service_map", dict(self.service_map or {}))
        if not self.request_timeout_seconds:
            fill("request_timeout_seconds", REQUEST_TIMEOUT_SECONDS[self.mode])
        if self.watch is None:
            fill("watch", self.mode == "kv" or (self.mode == "service" and not self._unwatchable()))
        if not self.check_ttl_seconds:
            fill("check_ttl_seconds", CHECK_TTL_SECONDS[self.mode])

    def _unwatchable(self) -> str:
        """Why service mode cannot watch; "" where it can."""
        if len(self.datacenters) > 1:
            return "watch needs one datacenter, and datacenters has more"
        if self.consistency == "cached":
            # With an index an agent's cache answers 500 while its servers are away.
            return (
                "watch and consistency=cached exclude each other, as the agent's cache follows "
                "changes by itself"
            )
        return ""

    def _check_together(self) -> None:
        def ordered(lower: str, upper: str) -> None:
            low, high = getattr(self, lower), getattr(self, upper)
            if low > high:
                raise ConfigurationError(f"{lower} ({low:g}) must not exceed {upper} ({high:g})")

        ordered("ttl_min_seconds", "ttl_max_seconds")
        ordered("quarantine_seconds", "quarantine_max_seconds")
        if (self.client_cert is None) != (self.client_key is None):
            raise ConfigurationError("client_cert and client_key go together: give both or neither")
        if self.token is not None and self.token_file is not None:
            raise ConfigurationError("token and token_file exclude each other: give one")
        if self.shards and self.tag is not None:
            raise ConfigurationError(
                "shards and tag exclude each other: DNS can ask for one tag only"
            )
        if self.watch and self.mode == "catalog":
            raise ConfigurationError(
                "watch needs kv or service mode: Consul DNS has no blocking queries"
            )
        if self.watch and self.mode == "service" and (why := self._unwatchable()):
            raise ConfigurationError(f"{why}: set watch to false")
        names = (self.service_template, *self.service_map.values())
        if self.mode == "service" and (self.shards or any(n.endswith(".query") for n in names)):
            raise ConfigurationError(
                "shards and prepared queries (names that end in .query) are for catalog mode"
            )
        if self.mode == "service" and self.check_ttl_seconds < 1:
            # The beats are 0.3 of it apart, and a busy machine holds one up for longer than that.
            raise ConfigurationError("check_ttl_seconds must be at least 1 in service mode")
        if self.zone is not None and self.mode != "service":
            raise ConfigurationError("zone needs service mode: only services say where they run")
        if self.consistency == "cached" and self.mode != "service":
            raise ConfigurationError("consistency=cached needs service mode")

    @classmethod
    def from_mapping(
        cls, values: Mapping[str, Any], environ: Mapping[str, str] | None = None
    ) -> Settings:
        """Settings of *values*, completed from the environment (*environ*, else the process's)."""
        _refuse_unknown(values)
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
                f"set {URL_VARIABLE}, for example consul+catalog://127.0.0.1:8600, "
                "consul+kv://127.0.0.1:8500 or consul+service://127.0.0.1:8500"
            )
        return cls.from_mapping({}, environ)

    @property
    def reads_may_lag(self) -> bool:
        """Whether another than the leader may answer: any server, or the agent's own cache."""
        return self.consistency in ("stale", "cached")

    @property
    def lease_ttl_seconds(self) -> float:
        """How long a lease lives without a renewal."""
        return self.check_ttl_seconds if self.mode == "service" else self.session_ttl_seconds

    def read_token(self) -> str | None:
        """The token to use now: the setting, or what ``token_file`` holds at this moment.

        Raises ConfigurationError when the file cannot be read or is empty.
        """
        if self.token_file is None:
            return self.token
        # Nothing is raised inside `except`: an error's context could hold what the file holds.
        token, reason = "", ""
        try:
            token = Path(self.token_file).read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or "not UTF-8 text"
        if not reason:
            with contextlib.suppress(_Refused):
                found: str = _secret(token)
                return found
            reason = "holds no token" if not token.strip() else "must hold a token and nothing else"
        raise ConfigurationError(f"token_file {_shown_path(self.token_file)}: {reason}")

    def __repr__(self) -> str:
        shown = []
        for setting in fields(self):
            value = getattr(self, setting.name)
            if value != (setting.default or type(value)()) or setting.name == "mode":
                shown.append(
                    f"{setting.name}={'***' if setting.metadata.get('secret') else repr(value)}"
                )
        return f"Settings({', '.join(shown)})"


def _shown_path(path: str) -> str:
    """A token given in the place of the file that holds it has no folder."""
    return path if "/" in path else quoted(path)


def _checked(setting: Any, value: Any, called: str) -> Any:
    """What *value* means; the ConfigurationError otherwise names what is *called*."""
    try:
        return setting.metadata["parse"](value)
    except _Refused as refused:
        shown = refused.repeats_value and not setting.metadata.get("secret")
        problem = f"{called} {refused}" + (f" (it is {quoted(value)})" if shown else "")
    raise ConfigurationError(problem)


def _with_port(agent: str, port: int) -> Host:
    return Host.parse(f"{agent}:{port}")


_NAME = re.compile(r"[A-Za-z_]{1,40}\Z")


def _refuse_unknown(
    names: Iterable[str], spelled: Callable[[str], str] = "setting {}".format
) -> None:
    known = [setting.name for setting in fields(Settings)]
    for name in names:
        if name in known:
            continue
        begun = [full for full in known if full.startswith(f"{name}_".lower())]  # `ttl`
        near = begun or difflib.get_close_matches(str(name).lower(), known, n=1, cutoff=0.5)
        hint = f"did you mean {spelled(near[0])}?" if near else ""
        hint = hint or f"known are {', '.join(map(spelled, known))}"
        # Letters only: a token that came to the place of a name has more.
        shown = spelled(name) if _NAME.match(str(name)) else "name"
        raise ConfigurationError(f"unknown {shown}: {hint}")


def _variable(name: str) -> str:
    return ENVIRONMENT_PREFIX + name.upper()


def _from_environment(environ: Mapping[str, str], explicit: Mapping[str, Any]) -> dict[str, Any]:
    """What the environment says and *explicit* does not; our own variables win over Consul's."""
    ours = {
        name[len(ENVIRONMENT_PREFIX) :].lower(): value
        for name, value in environ.items()
        if name.startswith(ENVIRONMENT_PREFIX) and name != URL_VARIABLE and value
    }
    _refuse_unknown(ours, _variable)
    ours = {
        setting.name: _checked(setting, ours[setting.name], _variable(setting.name))
        for setting in fields(Settings)
        if setting.name in ours and setting.name not in explicit
    }
    found: dict[str, Any] = {}
    # DNS knows no token, no TLS and no HTTP address: catalog mode leaves Consul's variables alone.
    if (explicit.get("mode") or ours.get("mode")) in ("kv", "service"):
        found = _consul_variables(environ, wants_address="addresses" not in {**ours, **explicit})
    return _without_weaker_token({**_without_weaker_token(found, ours), **ours}, explicit)


def _without_weaker_token(found: dict[str, Any], stronger: Mapping[str, Any]) -> dict[str, Any]:
    """A token of a stronger source must not lose against a weaker one's file, nor the reverse."""
    if "token" not in stronger and "token_file" not in stronger:
        return found
    return {name: value for name, value in found.items() if name not in ("token", "token_file")}


def _consul_variables(environ: Mapping[str, str], *, wants_address: bool) -> dict[str, Any]:
    """What the variables of the `consul` command say, read as it reads them."""
    found: dict[str, Any] = {}
    for setting in fields(Settings):
        for variable in setting.metadata.get("variables", ()):
            value = environ.get(variable)
            if not value or (setting.name == "addresses" and not wants_address):
                continue
            if setting.name == "addresses":
                value, is_https = _address_of_consul(value, environ)
                if is_https:
                    found["tls"] = True
            found.setdefault(setting.name, _checked(setting, value, variable))
    if "token_file" in found:
        found.pop("token", None)  # the consul command prefers the file
    return found


def _address_of_consul(value: str, environ: Mapping[str, str]) -> tuple[str, bool]:
    """CONSUL_HTTP_ADDR as (host:port, whether it says https).

    Measured with the consul command: https:// turns TLS on, http:// never turns it off, and
    without a port it calls 443 or 80, not 8500.
    """
    scheme, separator, rest = value.rpartition("://")
    if separator and scheme not in ("http", "https"):
        raise ConfigurationError(
            "CONSUL_HTTP_ADDR: only http:// and https:// are supported, not unix sockets: "
            "set it, or the setting addresses, to host:port"
        )
    rest = rest.rstrip("/")
    is_https = scheme == "https" or environ.get("CONSUL_HTTP_SSL", "").strip().lower() in _YES
    if rest and (":" not in rest or rest.endswith("]")):
        rest += ":443" if is_https else ":80"
    return rest, scheme == "https"


def _values_of_url(url: str) -> dict[str, Any]:
    """What the URL says; nothing of it is repeated in an error until it cannot be the token."""
    if not isinstance(url, str):
        raise ConfigurationError(f"the URL must be a text, not {type(url).__name__}")
    # Not urlsplit: it knows one host a URL, and its errors repeat the URL.
    before_query, _, query = url.strip().partition("?")
    scheme, _, rest = before_query.partition("://")
    authority, _, path = rest.partition("/")
    family, _, mode = scheme.lower().partition("+")
    if family != "consul" or mode not in MODES:
        raise ConfigurationError(
            "the URL must begin with consul+catalog://, consul+kv:// or consul+service://, "
            "for example consul+kv://127.0.0.1:8500/matchmaker"
        )
    user, at, hosts = authority.rpartition("@")
    if "#" in url or "@" in path + query:
        raise ConfigurationError(
            "the URL has a character that must be written with %: "
            "'#' is %23, '@' after the hosts is %40, and in a token '/' is %2F and '?' is %3F"
        )
    values: dict[str, Any] = {"mode": mode}
    if at:
        name, _, token = user.partition(":")
        if name or not token:
            raise ConfigurationError("only :TOKEN may precede the @ of the URL")
        values["token"] = unquote(token)
    if hosts.startswith(":"):
        raise ConfigurationError("the URL names no host: write :TOKEN@HOST:PORT, or HOST:PORT")
    if hosts:
        values["addresses"] = unquote(hosts)
    prefix = unquote(path).strip("/")
    if prefix and mode != "kv":
        raise ConfigurationError(f"a path in the URL is the KV prefix: {mode} mode has none")
    if prefix:
        values["prefix"] = prefix
    return _with_query(values, query)


def _with_query(values: dict[str, Any], query: str) -> dict[str, Any]:
    pairs: list[tuple[str, str]] | None = None
    with contextlib.suppress(ValueError):  # its message repeats the query, and perhaps a token
        pairs = parse_qsl(query, keep_blank_values=True, strict_parsing=bool(query))
    if pairs is None:
        raise ConfigurationError("after the ? of the URL stand name=value pairs with & between")
    _refuse_unknown(name for name, _ in pairs)
    for name, value in pairs:
        if name in values and not (name == "mode" and value == values["mode"]):
            raise ConfigurationError(f"{name} stands twice in the URL: give it once")
        values[name] = value
    return values
