"""One method of a topic's servers: its multi-callables, and when a call of it is repeated."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Protocol, cast

import grpc

from ...calls import Attempts
from . import rules
from .rules import Idempotence
from .sub_channels import SubChannel, SubChannels, Use


class Owner(Protocol):
    """What both kinds of channel have."""

    subs: SubChannels
    idempotence: Idempotence


class Stubs:
    """What generated stubs call of a channel: each kind of method is made in the same way."""

    _kinds: ClassVar[Mapping[str, type[Method]]]

    def unary_unary(
        self,
        method: str,
        request_serializer: Any = None,
        response_deserializer: Any = None,
        _registered_method: bool | None = False,
    ) -> Any:
        given = request_serializer, response_deserializer, _registered_method
        return self._multi_callable("unary_unary", method, *given)

    def unary_stream(
        self,
        method: str,
        request_serializer: Any = None,
        response_deserializer: Any = None,
        _registered_method: bool | None = False,
    ) -> Any:
        given = request_serializer, response_deserializer, _registered_method
        return self._multi_callable("unary_stream", method, *given)

    def stream_unary(
        self,
        method: str,
        request_serializer: Any = None,
        response_deserializer: Any = None,
        _registered_method: bool | None = False,
    ) -> Any:
        given = request_serializer, response_deserializer, _registered_method
        return self._multi_callable("stream_unary", method, *given)

    def stream_stream(
        self,
        method: str,
        request_serializer: Any = None,
        response_deserializer: Any = None,
        _registered_method: bool | None = False,
    ) -> Any:
        given = request_serializer, response_deserializer, _registered_method
        return self._multi_callable("stream_stream", method, *given)

    def _multi_callable(self, kind: str, method: str, *given: Any) -> Method:
        return self._kinds[kind](cast(Owner, self), kind, method, *given)


class Method:
    """One method, and its multi-callables on the channels to the hosts."""

    is_stream_sent = False
    """Whether its requests are a stream: gRPC takes the first one before it has connected, so that
    no other attempt can have it."""

    def __init__(self, owner: Owner, kind: str, method: str | bytes, *given: Any) -> None:
        self.owner: Any = owner
        self._kind, self._method = kind, method
        self._given = given if given[-1] else given[:-1]  # which older releases do not know
        self._is_idempotent = owner.idempotence.includes(method)
        self._made: dict[SubChannel, Any] = {}
        self._generation = owner.subs.generation

    def of(self, sub: SubChannel) -> Any:
        """The multi-callable on *sub*."""
        if self._generation is not self.owner.subs.generation:
            self._made, self._generation = {}, self.owner.subs.generation
        made = self._made.get(sub)
        if made is None:
            made = self._made[sub] = getattr(sub.channel, self._kind)(self._method, *self._given)
        return made

    def judge(self, use: Use, code: grpc.StatusCode, deadline: float | None) -> None:
        """Say what *code*, with which a call ended, means for the host of *use*."""
        is_good = rules.judgement(code, is_late=rules.is_past(deadline))
        if is_good is not None:
            use.attempt.judge(is_good=is_good)

    def may_move(
        self,
        use: Use,
        tries: Attempts,
        code: grpc.StatusCode,
        details: str | None,
    ) -> bool:
        """Whether a call that ended so may go to another host, which is taken from the budget."""
        if code is not grpc.StatusCode.UNAVAILABLE or self.is_stream_sent:
            return False
        if not self._is_idempotent:
            state = self.owner.subs.state(use.sub.channel)
            if not rules.was_not_sent(details, state):
                return False
        return tries.may_retry()
