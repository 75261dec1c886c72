"""The values everything else passes around: Host, Instance, Registration, Lease and Snapshot.

They parse and print themselves, never change, and hold no socket, lock or thread.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, Literal, Protocol, TypeVar, overload

from .errors import ConfigurationError, InvalidTopic
from .texts import quoted

# RFC 1123 labels; the underscore is allowed because Consul names have it (fact A8).
_HOST_NAME = re.compile(
    r"(?=.{1,253}\Z)[A-Za-z0-9_]([A-Za-z0-9_-]{0,61}[A-Za-z0-9_])?"
    r"(\.[A-Za-z0-9_]([A-Za-z0-9_-]{0,61}[A-Za-z0-9_])?)*\.?\Z"
)
_PORT = re.compile(r"[1-9][0-9]{0,4}\Z")  # no leading zeros: one host has one text, and one key
_IPV6 = re.compile(
    r"[0-9A-Fa-f:.]+(%[A-Za-z0-9_.-]+)?\Z"
)  # ipaddress takes any zone, even a newline

Source = Literal["dns", "kv", "service", "memory", "disk"]
Standing = Literal[
    "pending",  # wanted, not confirmed yet
    "published",
    "suspect",  # published, but Consul does not answer renewals now
    "lost",  # was published; being published again
    "refused",  # Consul refuses the token
    "silent",  # taken back because the application stopped beating; back with its next beat
    "withdrawing",
    "withdrawn",
]
"""What has become of a registration."""


def checked_topic(topic: str) -> str:
    """Return *topic* unchanged; raise InvalidTopic when it is empty or not text."""
    if not isinstance(topic, str) or not topic:
        raise InvalidTopic(f"a topic is a text of at least one character, not {topic!r}")
    return topic


def address_and_port(text: str) -> tuple[str, int]:
    """What a `Host` of *text* is made of; raises ValueError, which never repeats *text*."""
    if "://" in text:
        raise ValueError("write ADDRESS:PORT without a scheme, as in 10.0.0.5:9501")
    address, colon, digits = text.rpartition(":")
    if not colon or not address:
        raise ValueError(
            "this is not a host: write ADDRESS:PORT, as in 10.0.0.5:9501 or [::1]:9501"
        )
    if not (_PORT.match(digits) and int(digits) < 65536):
        raise ValueError("the port must be a number from 1 to 65535")
    if address.startswith("[") and address.endswith("]"):
        if not _IPV6.match(address[1:-1]):
            raise ValueError("what is in the brackets is no IPv6 address")
        try:
            return ipv6_text(address[1:-1]), int(digits)
        except ValueError:
            raise ValueError("what is in the brackets is no IPv6 address") from None
    if ":" in address:
        raise ValueError("put an IPv6 address in brackets, as in [::1]:9501")
    if re.fullmatch(r"[0-9.]+", address):
        try:
            return str(ipaddress.IPv4Address(address)), int(digits)
        except ValueError:
            raise ValueError("what is before the port is no IPv4 address") from None
    if not _HOST_NAME.match(address):
        raise ValueError("what is before the port is neither an IP address nor a host name")
    return address, int(digits)


def ipv6_text(given: str | bytes) -> str:
    """The one spelling of an IPv6 address, on every Python; raises ValueError."""
    address = ipaddress.IPv6Address(given)
    if address.ipv4_mapped is None:
        return str(address)
    # RFC 5952, section 5.  Python says so itself since 3.13, and ::ffff:a00:5 before.
    zone = f"%{address.scope_id}" if address.scope_id else ""
    return f"::ffff:{address.ipv4_mapped}{zone}"


def warning_of(host: Host) -> str | None:
    """Why others may not reach *host*, if its address alone says so; None when it does not."""
    if host.port is None:
        return None
    if host.address.rstrip(".").lower() == "localhost":
        return "localhost leads everybody to their own machine"
    try:
        address = ipaddress.ip_address(host.address)
    except ValueError:
        return None
    mapped = getattr(address, "ipv4_mapped", None)
    address = mapped or address
    if address.is_unspecified:
        return f"{host.address} is what a server listens on, and nobody can connect to it"
    if address.is_loopback:
        return f"{host.address} leads everybody to their own machine"
    return None


@dataclass(frozen=True, slots=True)
class Host:
    """Where a topic is served: an address and a port.  Two hosts are the same when both agree.

    ``port`` is None for what is not host:port (a ZeroMQ socket identity, a bare name); such a host
    is made by `opaque` only, and its text is kept to the byte.
    """

    address: str
    port: int | None

    def __post_init__(self) -> None:
        # Cheap, because every answer makes hosts; what texts may say is checked by `parse`.
        if not self.address:
            raise ConfigurationError("a host needs an address, as in 10.0.0.5:9501")
        if self.port is not None and not 0 < self.port < 65536:
            raise ConfigurationError(
                f"{self.address}: the port must be a number from 1 to 65535, not {self.port}"
            )

    @classmethod
    def parse(cls, text: str) -> Host:
        """Read ``10.0.0.5:9501``, ``[::1]:9501`` or ``name.example:9501``.

        Raises ConfigurationError for anything else, so that a typing error is never taken for a
        socket identity: use `opaque` for those.  The error repeats *text* unless that looks like a
        token in the wrong place.
        """
        if not isinstance(text, str):
            raise ConfigurationError(
                f"a host is a text such as '10.0.0.5:9501', not a {type(text).__name__}"
            )
        try:
            return cls(*address_and_port(text))
        except ValueError as error:
            reason = str(error)
        raise ConfigurationError(f"{quoted(text)}: {reason}")

    @classmethod
    def opaque(cls, text: str) -> Host:
        """A host that is only a text, kept to the byte.  Raises ConfigurationError when empty."""
        if not isinstance(text, str) or not text:
            raise ConfigurationError(
                f"an opaque host is a text of at least one character, not {text!r}"
            )
        return cls(text, None)

    def __str__(self) -> str:
        if self.port is None:
            return self.address
        # The only place that knows that IPv6 needs brackets.
        return (
            f"[{self.address}]:{self.port}"
            if ":" in self.address
            else f"{self.address}:{self.port}"
        )

    def __lt__(self, other: Host) -> bool:
        if not isinstance(other, Host):
            return NotImplemented
        return (self.address, self.port or 0) < (other.address, other.port or 0)


def host_of(given: str | Host) -> Host:
    """That host; a text is read by `Host.parse`."""
    return given if isinstance(given, Host) else Host.parse(given)


ZONE = "zone"
"""The key of metadata that says where an instance runs."""
_NOTHING: Mapping[str, str] = {}  # one for all that have none


def _nothing() -> Mapping[str, str]:
    return _NOTHING


@dataclass(frozen=True, slots=True)
class Instance:
    """One entry of an answer: a host, the server name it goes by, its RFC 2782 preference, and what
    its service says of itself (service mode)."""

    host: Host
    server: str | None = None
    priority: int = 1
    weight: int = 1
    tags: tuple[str, ...] = ()
    meta: Mapping[str, str] = field(default_factory=_nothing, hash=False)
    node: str | None = None
    datacenter: str | None = None

    @property
    def zone(self) -> str | None:
        """Where it runs, as its service, or else its node, says (``zone`` in ``meta``)."""
        return self.meta.get(ZONE)


class RegistrationOwner(Protocol):
    """What keeps a registration true; see `Registration`."""

    def wait_until_published(self, registration: Registration, timeout_seconds: float) -> None: ...
    def wait_until_withdrawn(self, registration: Registration, timeout_seconds: float) -> None: ...
    def unregister(self, registration: Registration) -> None: ...
    def drain(self, registration: Registration, seconds: float) -> None: ...
    def beat(self, registration: Registration) -> None: ...
    def standing(self, registration: Registration) -> Standing: ...
    def margin_seconds(self, registration: Registration) -> float: ...


@dataclass(frozen=True, slots=True)
class ServiceOptions:
    """What a registration of service mode has beside its host.  Immutable, checked when made."""

    tags: tuple[str, ...] = ()
    meta: Mapping[str, str] = field(default_factory=_nothing, hash=False)
    weight: int = 1
    check: str | None = None
    """A URL that Consul probes: http, https, tcp or grpc."""
    is_up: bool = False
    """Whether it counts as up until the first probe."""

    @classmethod
    def of(
        cls,
        tags: Iterable[str],
        meta: Mapping[str, str] | None,
        weight: int,
        check: str | None,
        is_up: bool = False,
    ) -> ServiceOptions:
        """Those; raises ConfigurationError for what Consul would refuse."""
        if isinstance(tags, str):
            raise ConfigurationError("tags must be a list of texts, not one text")
        tags, meta = tuple(tags), dict(meta or {})
        if not all(isinstance(tag, str) and tag for tag in tags):
            raise ConfigurationError("tags must be texts of at least one character")
        for key, value in meta.items():
            if not (isinstance(key, str) and _META_KEY.match(key)):
                raise ConfigurationError(
                    f"meta: a key has 1 to 128 letters, digits, '_' and '-', not {quoted(key)}"
                )
            if not (isinstance(value, str) and len(value.encode()) <= MOST_META_BYTES):
                raise ConfigurationError(
                    f"meta: {key} must be a text of at most {MOST_META_BYTES} bytes"
                )
            if key.startswith(RESERVED_META):
                raise ConfigurationError(f"meta: {key} is this library's: choose another name")
        if len(meta) > MOST_META:
            raise ConfigurationError(f"meta: at most {MOST_META} keys, as Consul takes 64")
        if type(weight) is not int or not 1 <= weight <= 65535:
            raise ConfigurationError("weight must be a whole number from 1 to 65535")
        if check is not None and not (isinstance(check, str) and _CHECK.match(check)):
            raise ConfigurationError(
                "check must be a URL that begins with http://, https://, tcp:// or grpc://, "
                f"not {quoted(check)}"
            )
        return cls(tags, meta, weight, check, bool(is_up))


_META_KEY = re.compile(r"[A-Za-z0-9_-]{1,128}\Z")
_CHECK = re.compile(r"(https?|tcp|grpc)://[^\s]+\Z")
RESERVED_META = "matchmaker_"
MOST_META, MOST_META_BYTES = 61, 512
"""Consul takes 64 keys, of which three are ours, and 512 bytes in each value."""
_NO_OPTIONS = ServiceOptions()


def _no_options() -> ServiceOptions:
    return _NO_OPTIONS


@dataclass(frozen=True, slots=True)
class Registration:
    """The wish that *host* serves *topic*, under the name *server* if it has one.

    `Matchmaker.register` returns one that knows its owner, so that it can be waited for and works
    as a context manager that unregisters.  Thread-safe; equal when topic, host and server are.
    """

    topic: str
    host: Host
    server: str | None = None
    owner: RegistrationOwner | None = field(default=None, compare=False, repr=False)
    service: ServiceOptions = field(default_factory=_no_options, compare=False, repr=False)
    """What Consul's catalog shows of it; of effect in service mode only."""

    def wait_until_published(self, *, timeout_seconds: float) -> None:
        """Return once Consul has confirmed it.  Raises TimedOut after *timeout_seconds*,
        Denied when Consul refuses the token, Closed when the owner was closed meanwhile."""
        self._owned().wait_until_published(self, timeout_seconds)

    def wait_until_withdrawn(self, *, timeout_seconds: float) -> None:
        """After `unregister`, return once Consul cannot be showing it any more.  Raises TimedOut
        after *timeout_seconds*."""
        self._owned().wait_until_withdrawn(self, timeout_seconds)

    def unregister(self) -> None:
        """Take the wish back; only this one, whatever else the process registered."""
        self._owned().unregister(self)

    def drain(self, seconds: float) -> None:
        """Take it back, then go on serving for *seconds* before this returns: peers that hold an
        older answer still send here meanwhile.  Stop serving after it, and no message is lost.

        *seconds*: 1 when all peers watch, else their ``ttl_seconds`` and a little.  Raises TimedOut
        when Consul does not confirm the withdrawal within *seconds*: peers may still send here.
        `Matchmaker.close` ends the wait.
        """
        self._owned().drain(self, seconds)

    def beat(self) -> None:
        """Say that the loop which serves this still runs; cheap, asks nobody.

        For a registration made with ``beat_seconds``; raises ConfigurationError for another.
        """
        self._owned().beat(self)

    @property
    def state(self) -> Standing:
        """What has become of it, as far as this process knows; asks nobody."""
        return self._owned().standing(self)

    @property
    def margin_seconds(self) -> float:
        """How long Consul surely goes on showing it if nothing is heard from us any more.

        0 while it is not published.  Not counted: somebody deleting it, the end of its agent, and
        with ``liveness=check`` a second without a beat.
        """
        return self._owned().margin_seconds(self)

    def _owned(self) -> RegistrationOwner:
        if self.owner is None:
            raise ConfigurationError(f"{self} was not made by Matchmaker.register")
        return self.owner

    def __enter__(self) -> Registration:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.unregister()

    def __str__(self) -> str:
        return f"{self.topic} at {self.host}" + (f" as {self.server}" if self.server else "")


@dataclass(frozen=True, slots=True)
class Lease:
    """What Consul granted: everything published under it leaves with it (a Consul session)."""

    id: str
    ttl_seconds: float

    def __str__(self) -> str:
        return self.id


class Held(frozenset["Registration"]):
    """What a renewal found Consul to hold; nothing was found out about those in `unchecked`."""

    unchecked: frozenset[Registration] = frozenset()
    cause: str = ""
    """Why others are missing, if that is known."""

    @classmethod
    def of(
        cls,
        held: Iterable[Registration],
        unchecked: Iterable[Registration] = (),
        *,
        cause: str = "",
    ) -> Held:
        found = cls(held)
        found.unchecked, found.cause = frozenset(unchecked), cause
        return found


def _no_clock() -> float:
    return 0.0


T = TypeVar("T")


class _computed_once(Generic[T]):
    """`functools.cached_property` without its lock.

    Until Python 3.12 it holds one, the same for every snapshot, while it computes: a child that was
    forked just then by another thread would wait for it for ever.
    """

    def __init__(self, compute: Callable[[Any], T]) -> None:
        self.__doc__ = compute.__doc__
        self._compute = compute

    def __get__(self, snapshot: Any, owner: type) -> T:
        if snapshot is None:
            return self  # type: ignore[return-value]
        # From now on found there, before this is: two threads may both compute the same once.
        value = snapshot.__dict__[self._compute.__name__] = self._compute(snapshot)
        return value


@dataclass(frozen=True)
class Snapshot(Sequence[Host]):
    """An answer: every live host of *topic* at one moment.

    A sequence of Host, sorted and without duplicates; instances keep the server names and weights.
    An empty one means "no hosts"; an outage is never an empty snapshot but an exception.
    ``age_seconds`` and ``is_stale`` are live: they go on counting while you hold it.
    """

    topic: str
    instances: tuple[Instance, ...]
    source: Source
    is_complete: bool = True
    ttl_seconds: float | None = None
    """What the answer itself says of its life (a DNS TTL above 0); None when it says nothing."""
    taken_at: float = field(default=0.0, compare=False)
    """When the question that it answers was sent, on *clock*: it is no older than that."""
    fresh_until: float = field(default=float("inf"), compare=False)
    """When it becomes stale, on *clock*; set by the cache."""
    clock: Callable[[], float] = field(default=_no_clock, compare=False, repr=False)
    confirmed: bool = field(default=True, compare=False)
    """False for an answer that may well be wrong: read from disk; kept although Consul's newest
    answer denies most of it; or empty and not repeated yet, for ``confirm_empty_seconds`` from a
    source that has denied live services before (DNS, stale and cached reads), else in kv mode for
    2 s after the last host left.  Another empty answer is confirmed at once, as in service mode."""
    details: Mapping[str, object] = field(default_factory=dict, compare=False, repr=False)
    """How the backend got it, fit for json; `Matchmaker.explain` shows it."""
    version: int = field(default=0, compare=False, repr=False)
    """A number that only grows while Consul keeps its data: its index; of a denial by DNS, a second
    of its clock (the SOA's serial).  0 where there is none."""

    @_computed_once
    def hosts(self) -> tuple[Host, ...]:
        """Every host once, sorted."""
        # By what makes them equal and sorts them: a tenth of what `set` and `<` of Host cost.
        places = {(one.host.address, one.host.port or 0): one.host for one in self.instances}
        return tuple(places[place] for place in sorted(places))

    @_computed_once
    def _by_server(self) -> Mapping[str, tuple[Instance, ...]]:
        found: dict[str, list[Instance]] = {}
        for instance in self.instances:
            if instance.server is not None:
                found.setdefault(instance.server, []).append(instance)
        return {server: tuple(instances) for server, instances in found.items()}

    @property
    def age_seconds(self) -> float:
        """Seconds since Consul was asked for this answer: what it says is no older."""
        return max(0.0, self.clock() - self.taken_at)

    @property
    def is_stale(self) -> bool:
        """Whether it is past its time: Consul was not, or could not be, asked since."""
        return self.clock() >= self.fresh_until

    def for_server(self, server: str) -> Snapshot:
        """The same answer, narrowed to the instances that go by the name *server*."""
        return self.with_instances(self._by_server.get(server, ()))

    def with_instances(self, instances: Iterable[Instance]) -> Snapshot:
        """The same answer with other instances; keeps age, source and completeness."""
        rest = {name: self.__dict__[name] for name in self.__dict__.keys() - _COMPUTED}
        return _made_of(rest, {"instances": tuple(instances)})

    def stamped(
        self, *, taken_at: float, fresh_until: float, clock: Callable[[], float], confirmed: bool
    ) -> Snapshot:
        """The same answer as of another moment; what was computed of its instances is kept."""
        stamp = {"taken_at": taken_at, "fresh_until": fresh_until}
        return _made_of(self.__dict__, stamp, {"clock": clock, "confirmed": confirmed})

    def sharing(self, other: Snapshot) -> Snapshot:
        """The same answer, with the equal instances of *other* and what was computed of them."""
        return _made_of(other.__dict__, self.__dict__, {"instances": other.instances})

    def __len__(self) -> int:
        return len(self.hosts)

    def __iter__(self) -> Iterator[Host]:
        return iter(self.hosts)

    def __contains__(self, host: object) -> bool:
        return host in self.hosts

    @overload
    def __getitem__(self, index: int) -> Host: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[Host, ...]: ...
    def __getitem__(self, index: int | slice) -> Host | tuple[Host, ...]:
        return self.hosts[index]

    def __str__(self) -> str:
        marks = [f"{len(self)} hosts", self.source, f"{self.age_seconds:.1f}s old"]
        if self.is_stale:
            marks.append("stale")
        if not self.is_complete:
            marks.append("incomplete")
        if not self.confirmed:
            marks.append("unconfirmed")
        return f"<{self.topic}: {', '.join(marks)}>"


_COMPUTED = {name for name, value in vars(Snapshot).items() if isinstance(value, _computed_once)}


def _made_of(*fields: Mapping[str, object]) -> Snapshot:
    made = object.__new__(Snapshot)
    for some in fields:
        made.__dict__.update(some)
    return made
