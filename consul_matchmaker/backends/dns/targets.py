"""The addresses of an SRV record's target: in its name, beside it, from Consul, from the system."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from ...model import Host, ipv6_text
from ..host_names import HostNames
from .wire import REFUSED, BadReply, ErrorReply, Reply


class Targets:
    """The addresses of targets, for one lookup: whatever has to be asked for is asked once."""

    def __init__(self, domain: str, names: HostNames) -> None:
        self._domain = domain
        self._names = names
        self._asked: dict[str, list[str]] = {}

    def addresses(
        self,
        target: str,
        additional: Mapping[str, set[bytes]],
        ask: Callable[[str, str], Reply],
        until: float,
    ) -> list[str]:
        """The addresses of *target*: IPv4, or IPv6 where there are none; [] when it has none.

        *additional* is what came beside the record; *ask* is Consul's reply for a name and a type.
        Raises OSError and BadReply when nobody can tell by *until*, an instant of
        `time.monotonic`, and ConfigurationError for what is no host name.
        """
        found = _decoded(target) or _printed(additional, target)
        if found is None and self._is_consuls(target):
            found = self._from_consul(target, ask)
        return self._from_system(target, until) if found is None else found

    def _is_consuls(self, target: str) -> bool:
        """Whether *target* is a name that only Consul can resolve, and not the system."""
        target = target.lower()
        return target.endswith("." + self._domain) or ".node." in target

    def _from_consul(self, target: str, ask: Callable[[str, str], Reply]) -> list[str] | None:
        """What Consul says; None if it is no name of Consul's at all."""
        name = target.lower()
        if name not in self._asked:
            addresses: list[str] = []
            for kind in ("A", "AAAA"):
                try:
                    reply = ask(target, kind)
                except ErrorReply as error:
                    if error.rcode == REFUSED:
                        return None
                    raise
                addresses = _printed(reply.addresses, target) or []
                if reply.answers and not addresses:
                    raise BadReply("answered with records that were not asked for")
                if addresses:
                    break
            self._asked[name] = addresses
        return self._asked[name]

    def _from_system(self, target: str, until: float) -> list[str]:
        name = Host.parse(f"{target.rstrip('.').lower()}:1").address
        addresses = self._names.addresses(name, until)
        return sorted(each for each in addresses if (":" in each) == (":" in addresses[0]))


def node_of(target: str) -> str | None:
    """The node's name in ``<node>.node.<datacenter>.<domain>.``; it may have dots itself."""
    node, separator, _ = target.rpartition(".node.")
    return node if separator else None


def _decoded(target: str) -> list[str] | None:
    """The address in ``0a090905.addr.<datacenter>.<domain>.``, None for other names."""
    if target[8:14].lower() != ".addr." and target[32:38].lower() != ".addr.":
        return None
    try:
        return [_address(bytes.fromhex(target.partition(".")[0]))]
    except ValueError:  # no hex digits, or too few of them
        return None


def _printed(addresses: Mapping[str, set[bytes]], target: str) -> list[str] | None:
    """The addresses of *target*: IPv4, or IPv6 where there are none; one way to reach a node."""
    packed = addresses.get(target.lower())
    if not packed:
        return None
    return [_address(each) for each in sorted(packed) if len(each) == min(map(len, packed))]


def _address(packed: bytes) -> str:
    return ".".join(map(str, packed)) if len(packed) == 4 else ipv6_text(packed)
