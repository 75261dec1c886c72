"""What an application asks to register, checked before anything is done about it."""

from __future__ import annotations

import socket
from dataclasses import replace

from ..backends.kv.keys import checked_registration
from ..backends.service_names import namer
from ..errors import ConfigurationError
from ..model import MOST_META_BYTES, ZONE, Host, Registration, ServiceOptions, host_of, warning_of
from ..settings import Settings

FAR_AWAY = ("192.0.2.1", 9)
"""TEST-NET-1 (RFC 5737): no packet is sent there; it only says which way out is the default."""


def wanted_registration(
    settings: Settings,
    topic: str,
    host: str | Host | None,
    server: str | None,
    port: int | None,
    options: ServiceOptions,
) -> Registration:
    """The registration that is meant.

    Raises ConfigurationError for what could not be published, or not be told by any reader.
    """
    if (host is None) == (port is None):
        raise ConfigurationError(
            "register needs a host, or port=... for an address of this machine"
        )
    if host is None:
        where = Host.parse(_bracketed(own_address(settings.addresses[0]), port))
    else:
        where = host_of(host)
    if settings.mode == "kv" and options != ServiceOptions():
        raise ConfigurationError(
            "tags, meta, weight and check need service mode: consul+service://"
        )
    if settings.zone is not None and ZONE not in options.meta:
        options = replace(options, meta={**options.meta, ZONE: settings.zone})
    wanted = checked_registration(Registration(topic, where, server or None, service=options))
    if settings.mode == "service":
        _check_service(settings, wanted)
    return wanted


def _check_service(settings: Settings, wanted: Registration) -> None:
    if wanted.host.port is None:
        raise ConfigurationError(
            f"a service has an address and a port: {wanted.host} is not host:port"
        )
    namer(settings)(wanted.topic)
    for name, text in (("topic", wanted.topic), ("server", wanted.server or "")):
        if len(text.encode("utf-8")) > MOST_META_BYTES:
            raise ConfigurationError(
                f"{name} {text[:60]}...: Consul's Meta has room for {MOST_META_BYTES} bytes"
            )


def own_address(agent: Host) -> str:
    """The address of this machine that peers can reach: the one it has on the way to *agent*, or,
    where that is this machine, on the way out by default.

    Raises ConfigurationError where there is none.
    """
    for place in ((agent.address, agent.port or 1), FAR_AWAY):
        try:
            found = socket.getaddrinfo(*place, type=socket.SOCK_DGRAM)
            with socket.socket(found[0][0], socket.SOCK_DGRAM) as way:
                way.connect(found[0][4])  # which sends nothing
                address = str(way.getsockname()[0])
        except OSError:
            continue
        if warning_of(Host(address, 1)) is None:
            return address
    raise ConfigurationError("this machine has no address that others could reach: give a host")


def _bracketed(address: str, port: int | None) -> str:
    return f"[{address}]:{port}" if ":" in address else f"{address}:{port}"
