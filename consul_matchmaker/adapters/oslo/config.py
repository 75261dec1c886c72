"""Say the settings as oslo.config options, and read them back from a configuration and a URL."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from ...errors import ConfigurationError
from ...settings import ENVIRONMENT_PREFIX, URL_VARIABLE, Settings
from ..extras import extra

with extra("oslo"):
    from oslo_config import cfg

GROUP = "matchmaker_consul"
DEFAULT_MODE = "kv"  # oslo.messaging's servers register themselves
WAIT_TIMEOUT = "wait_timeout"

_TYPES = {
    "bool": cfg.BoolOpt,
    "int": cfg.IntOpt,
    "float": cfg.FloatOpt,
    "tuple": cfg.ListOpt,
}


def options() -> list[Any]:
    """Every setting as an option of the group ``[matchmaker_consul]``, and ``wait_timeout``.

    None has a default: what is left out comes from the environment, else from `Settings`.
    """
    return [
        *(_option(setting) for setting in fields(Settings)),
        cfg.FloatOpt(
            WAIT_TIMEOUT,
            default=5.0,
            min=0.0,
            max=60.0,  # refuses milliseconds, which [matchmaker_redis] counts in
            help="in seconds: how long the first message to a topic waits for a host to send it "
            "to, and a server that starts for Consul to confirm it",
        ),
    ]


def list_opts() -> list[tuple[str, list[Any]]]:
    """What ``oslo-config-generator --namespace consul_matchmaker`` prints."""
    return [(GROUP, options())]


def read_settings(
    conf: Any, url: Any = None, *, default_mode: str = DEFAULT_MODE
) -> tuple[Settings, float]:
    """The settings of *conf* and *url* (a TransportURL, or None), and ``wait_timeout``.

    What stands in the URL wins over the group, that over the environment.  Raises
    ConfigurationError, which never repeats a token.
    """
    conf.register_opts(options(), group=GROUP)
    group = getattr(conf, GROUP)
    values = {opt.name: getattr(group, opt.name) for opt in options()}
    values.update(_values_of_url(url))
    wait_timeout = float(values.pop(WAIT_TIMEOUT))
    values = {name: value for name, value in values.items() if value is not None}
    if not values and os.environ.get(URL_VARIABLE):
        return Settings.from_env(), wait_timeout
    if "mode" not in values and not os.environ.get(ENVIRONMENT_PREFIX + "MODE"):
        values["mode"] = default_mode
    return Settings.from_mapping(values), wait_timeout


def is_ours(name: str) -> bool:
    """Whether *name*, out of a URL's query, is one of these options."""
    return any(opt.name == name for opt in options())


def _option(setting: Any) -> Any:
    kind = setting.type.partition("[")[0]  # annotations are texts, such as tuple[Host, ...]
    has_default = isinstance(setting.default, bool) or setting.default not in (None, "", (), 0)
    return _TYPES.get(kind, cfg.StrOpt)(
        setting.name,
        secret=bool(setting.metadata.get("secret")),
        sample_default=setting.default if has_default else None,
        help=setting.metadata["doc"],
    )


def _values_of_url(url: Any) -> Mapping[str, Any]:
    """Addresses, token and prefix of a TransportURL, and what of its query is ours."""
    if url is None:
        return {}
    query = getattr(url, "query", {})  # oslo.messaging 4.6 and before refuse one
    values: dict[str, Any] = {name: text for name, text in query.items() if is_ours(name)}
    hosts = [host for host in url.hosts if host.hostname]
    if hosts:
        values["addresses"] = [_agent(host) for host in hosts]
    tokens = {host.password for host in hosts if host.password}
    if len(tokens) > 1 or any(host.username for host in hosts):
        raise ConfigurationError(
            "only :TOKEN may precede an @ of the transport URL, the same for all hosts"
        )
    if tokens:
        values["token"] = tokens.pop()
    if url.virtual_host:
        values["prefix"] = url.virtual_host
    return values


def _agent(host: Any) -> str:
    name = f"[{host.hostname}]" if ":" in host.hostname else host.hostname
    return f"{name}:{host.port}" if host.port else name
