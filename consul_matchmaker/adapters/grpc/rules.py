"""What both kinds of channel decide alike: what a status says of the host, what may be repeated."""

from __future__ import annotations

import time
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any
from urllib.parse import quote

import grpc

from ...errors import ConfigurationError, MatchmakerError
from ...model import Host

GRACE_SECONDS = 5.0
"""So long the connection to a host that left its topic is kept at least: it may come back."""
SETTLING_SECONDS = 0.5
"""A grace is not shorter: for 0.2 s gRPC goes on watching a channel that it is told to watch no
more, on a thread that raises if the channel is closed meanwhile."""

_NEVER_CONNECTED = ("failed to connect to all addresses", "DNS resolution failed")
"""How the details begin of a call for which there was no connection (gRPC 1.49 to 1.85)."""
_SAYS_NOTHING = frozenset({grpc.StatusCode.CANCELLED, grpc.StatusCode.INTERNAL})
"""Given up by the caller; or broken on our side, such as a message that is none."""

clock = time.monotonic


def judgement(code: grpc.StatusCode, *, is_late: bool) -> bool | None:
    """Whether the host is good by the *code* of a call that ended, or None: it says nothing.

    The host failed when it was UNAVAILABLE, and when the time that the caller gave is over
    (*is_late*).  Another error is an answer of the application, also a DEADLINE_EXCEEDED that came
    in time: it is of something behind the host.
    """
    if code in _SAYS_NOTHING:
        return None
    if code is grpc.StatusCode.DEADLINE_EXCEEDED:
        return not is_late
    return code is not grpc.StatusCode.UNAVAILABLE


def was_not_sent(details: str | None, state: grpc.ChannelConnectivity | None) -> bool:
    """Whether a call that was UNAVAILABLE has never left this process.

    gRPC says so in *details* only, and a server can answer with the same words, as a proxy may: it
    is believed where the connection is not there now (*state*).
    """
    is_gone = state is not None and state is not grpc.ChannelConnectivity.READY
    return is_gone and (details or "").startswith(_NEVER_CONNECTED)


def deadline_of(timeout: float | None) -> float | None:
    """When a call that begins now must have ended."""
    return None if timeout is None else clock() + timeout


def left_until(deadline: float | None) -> float | None:
    """The timeout of an attempt that begins now."""
    return None if deadline is None else max(0.0, deadline - clock())


def is_past(deadline: float | None) -> bool:
    """Whether the time that the caller gave is over."""
    # gRPC's own timer may be early by a millisecond.
    return deadline is not None and clock() >= deadline - 0.002


class Idempotence:
    """Which methods may be executed twice."""

    def __init__(self, declared: bool | Collection[str]) -> None:
        """*declared*: True for all, or full names, such as ``/package.Service/Method``."""
        if isinstance(declared, str) or not isinstance(declared, bool | Collection):
            raise ConfigurationError(
                "idempotent is True, or a collection of full names of methods such as "
                f"'/package.Service/Method', not {declared!r}"
            )
        self._all = declared is True
        self._names = frozenset(() if isinstance(declared, bool) else declared)
        for name in self._names:
            if not (isinstance(name, str) and name.startswith("/") and name.count("/") == 2):
                raise ConfigurationError(
                    f"{name!r} is not the full name of a method: write '/package.Service/Method'"
                )

    def includes(self, method: str | bytes) -> bool:
        name = method.decode() if isinstance(method, bytes) else method
        return self._all or name in self._names


def options_for(name: str, options: Sequence[tuple[str, Any]]) -> tuple[tuple[str, Any], ...]:
    """The options of the channel to one host: calls and certificates are for *name*, not for its
    address; but *options* count first."""
    authority = quote(name, safe="-._~:[]")
    # Each implies the other one, unless *options* have that.
    ours: Mapping[str, str] = {
        "grpc.default_authority": authority,
        "grpc.ssl_target_name_override": authority,
    }
    given = {key for key, _ in options}
    return (*options, *((key, value) for key, value in ours.items() if key not in given))


def target_of(host: Host) -> str:
    """How gRPC is told about *host*; with the scheme it need not ask DNS for an address.  Raises
    ConfigurationError for one without a port."""
    if host.port is None:
        raise ConfigurationError(f"{host} has no port: gRPC cannot connect to it")
    if ":" in host.address:
        return "ipv6:" + str(host).replace("%", "%25")
    is_ipv4 = host.address.replace(".", "").isdigit()
    return f"ipv4:{host}" if is_ipv4 else f"dns:///{host}"


def because_of(error: MatchmakerError) -> str:
    """The details of a call for which there is no host."""
    return f"{type(error).__name__}: {error}"


def best(states: Iterable[grpc.ChannelConnectivity | None]) -> grpc.ChannelConnectivity:
    """The connectivity of a channel whose hosts have *states*, as round robin has it (gRPC's
    connectivity semantics): the best one; IDLE where no host was connected yet."""
    found = set(states)
    return next((state for state in _BEST_FIRST if state in found), grpc.ChannelConnectivity.IDLE)


_BEST_FIRST = (
    grpc.ChannelConnectivity.READY,
    grpc.ChannelConnectivity.CONNECTING,
    grpc.ChannelConnectivity.IDLE,
    grpc.ChannelConnectivity.TRANSIENT_FAILURE,
)
