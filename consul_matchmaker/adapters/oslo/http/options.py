"""The options of ``[consul_http]``, defined once, and read from a configuration and a URL."""

from __future__ import annotations

import difflib
import os
import re
from dataclasses import dataclass, field
from typing import Any

from ....errors import ConfigurationError
from ....settings import Settings
from ...extras import extra
from ..config import is_ours, read_settings

with extra("oslo-http"):
    from oslo_config import cfg

GROUP = "consul_http"
DEFAULT_MODE = "service"

OPTIONS = [
    cfg.StrOpt(
        "host",
        help="address of this machine that clients connect to; default: the one on the way to the "
        "Consul agent, or on the way out",
    ),
    cfg.StrOpt("listen_address", help="address to listen on, such as 0.0.0.0; default: host"),
    cfg.StrOpt(
        "port_range",
        help="first and last port to listen on, as in 9500-9599: each process takes the first free "
        "one; default: any free port of the system",
    ),
    cfg.StrOpt("tls_cert", help="file with the certificate of this machine: servers speak HTTPS"),
    cfg.StrOpt("tls_key", help="file with the private key of tls_cert"),
    cfg.StrOpt(
        "tls_ca",
        help="file with the CA that signs the certificates of servers and clients: clients speak "
        "HTTPS, and servers refuse clients without a certificate of it",
    ),
    cfg.StrOpt(
        "rpc_token",
        secret=True,
        help="secret that every client sends and every server asks for",
    ),
    cfg.StrOpt(
        "rpc_token_file",
        help="file with that secret, read again when it changes; clients send its first line, "
        "servers accept each of its lines",
    ),
    cfg.BoolOpt(
        "health_check",
        default=True,
        help="have Consul probe /health of each server, beside the beats of its process; not where "
        "tls_ca is set, as Consul has no certificate to show",
    ),
    cfg.IntOpt(
        "max_body_bytes",
        default=16 * 1024 * 1024,
        min=1024,
        help="the longest message that is sent or taken",
    ),
    cfg.IntOpt(
        "max_connections",
        default=10_000,
        min=1,
        help="connections that a process takes at a time; never more than three quarters of the "
        "files that the system allows it",
    ),
    cfg.IntOpt(
        "max_messages",
        default=0,
        min=0,
        help="messages that a server has taken and not finished; beyond it clients go to another "
        "one; 0: twice executor_thread_pool_size",
    ),
    cfg.FloatOpt(
        "delivery_timeout",
        default=60.0,
        min=0.1,
        help="in seconds: how long a cast, a fanout or a notification may take to be delivered",
    ),
    cfg.FloatOpt(
        "drain_seconds",
        default=1.0,
        min=0.0,
        help="how long a server that stops goes on taking messages after its withdrawal",
    ),
    cfg.IntOpt(
        "fanout_connections", default=16, min=1, help="servers that a fanout is sent to at a time"
    ),
    cfg.IntOpt(
        "broadcaster_threshold",
        default=100,
        min=0,
        help="a fanout to so many hosts or more is given to a consul-matchmaker-broadcaster, if "
        "one runs; 0: never",
    ),
]


@dataclass(frozen=True)
class Options:
    """What ``[consul_http]`` says.  Immutable; checked by `read_options`."""

    host: str | None = None
    listen_address: str | None = None
    port_range: tuple[int, int] | None = None
    tls_cert: str | None = None
    tls_key: str | None = None
    tls_ca: str | None = None
    rpc_token: str | None = field(default=None, repr=False)
    rpc_token_file: str | None = None
    health_check: bool = True
    max_body_bytes: int = 16 * 1024 * 1024
    max_connections: int = 10_000
    max_messages: int = 0
    delivery_timeout: float = 60.0
    drain_seconds: float = 1.0
    fanout_connections: int = 16
    broadcaster_threshold: int = 100
    wait_timeout: float = 5.0
    """How long a server that starts waits for Consul to show it."""

    @property
    def uses_tls(self) -> bool:
        return bool(self.tls_cert or self.tls_ca)


def list_opts() -> list[tuple[str, list[Any]]]:
    """What ``oslo-config-generator --namespace consul_matchmaker.http`` prints."""
    return [(GROUP, OPTIONS)]


def read_options(conf: Any, url: Any) -> tuple[Settings, Options]:
    """The settings of the matchmaker and the options of the driver, of *conf* and *url*.

    What stands in the URL wins over the configuration.  Raises ConfigurationError, which never
    repeats a secret.
    """
    conf.register_opts(OPTIONS, group=GROUP)
    query = dict(getattr(url, "query", None) or {})
    names = {option.name for option in OPTIONS}
    for name in query.keys() - names:
        _refuse_unknown(name, names)
    given = {option.name: getattr(conf[GROUP], option.name) for option in OPTIONS}
    for option in OPTIONS:
        if option.name in query:
            if option.secret:
                raise ConfigurationError(f"{option.name} may not stand in the URL: use [{GROUP}]")
            try:
                given[option.name] = option.type(query[option.name])
            except ValueError as error:
                raise ConfigurationError(f"{option.name} in the URL: {error}") from None
    settings, wait_timeout = read_settings(conf, url, default_mode=DEFAULT_MODE)
    given["port_range"] = _port_range(given["port_range"])
    options = Options(**given, wait_timeout=wait_timeout)
    _check(options)
    return settings, options


def _refuse_unknown(name: str, names: set[str]) -> None:
    if is_ours(name):
        return
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    hint = (
        f": did you mean {near[0]}?" if near else f": known are those of [{GROUP}] and the settings"
    )
    raise ConfigurationError(f"unknown {name if name.isidentifier() else 'name'} in the URL{hint}")


def _port_range(text: str | None) -> tuple[int, int] | None:
    if not text:
        return None
    found = re.fullmatch(r"\s*([0-9]{1,5})\s*[-:]\s*([0-9]{1,5})\s*", text)
    if found is not None:
        first, last = int(found[1]), int(found[2])
        if 0 < first <= last < 65536:
            return first, last
    raise ConfigurationError(f"port_range must be two ports, as in 9500-9599, not {text!r}")


def _check(options: Options) -> None:
    if (options.tls_cert is None) != (options.tls_key is None):
        raise ConfigurationError("tls_cert and tls_key go together: give both or neither")
    if options.rpc_token is not None and options.rpc_token_file is not None:
        raise ConfigurationError("rpc_token and rpc_token_file exclude each other: give one")
    if options.rpc_token is not None and not re.fullmatch(r"[\x21-\x7e]+", options.rpc_token):
        raise ConfigurationError("rpc_token must be printable ASCII without spaces")
    for name in ("tls_cert", "tls_key", "tls_ca", "rpc_token_file"):
        path = getattr(options, name)
        if path is not None and not os.access(path, os.R_OK):
            raise ConfigurationError(f"{name}: this file cannot be read: {path}")
