"""Have an unchanged oslo.messaging 8.1.4 take ``consul`` where its list is closed; undo it."""

from __future__ import annotations

import collections
import collections.abc
import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator
from typing import Any

from ...extras import extra
from ..config import options
from .names import DIRECT

NAME = "consul"
NEEDED = "oslo.messaging 8.1.4"
"""The last release with ZeroMQ, and the one that the extra `oslo` brings."""
ZMQ_GROUP = "oslo_messaging_zmq"
_undo: list[Callable[[], None]] = []


def enable() -> None:
    """Let ``zmq+consul://`` and ``rpc_zmq_matchmaker = consul`` be used; idempotent.

    In memory only: the name joins upstream's two lists of matchmakers, its URLs may carry our
    settings, and its driver's ``send`` takes the argument that its own transport gives it.
    Call it after ``eventlet.monkey_patch()``, if that is called: importing upstream's driver
    decides between green and plain ZeroMQ.  Raises ImportError without oslo.messaging and pyzmq.
    """
    if _undo:
        return
    with extra("oslo", NEEDED), upstream_imports():
        from oslo_messaging._drivers import impl_zmq

        try:
            from oslo_messaging._drivers.zmq_driver import zmq_options
        except ImportError:  # 4.6 and before keep them in the driver, and take no query
            zmq_options = impl_zmq
        else:
            _replace(zmq_options, "register_opts", _taking_our_query(zmq_options.register_opts))
    _add_name(zmq_options)
    for name in ("send", "send_notification"):
        _replace(impl_zmq.ZmqDriver, name, sending(getattr(impl_zmq.ZmqDriver, name)))


def disable() -> None:
    """Undo `enable`; idempotent.  Transports that exist keep the matchmaker they have."""
    while _undo:
        _undo.pop()()


@contextlib.contextmanager
def upstream_imports() -> Iterator[None]:
    """While it lasts, upstream can be imported on Python 3.10 and later.

    8.1.4 says ``collections.Mapping``, at import only, which left Python with 3.10.  The name is
    gone again afterwards, and never touched where Python still has it.
    """
    needs_name = not hasattr(collections, "Mapping")
    if needs_name:
        collections.Mapping = collections.abc.Mapping  # type: ignore[attr-defined]
    try:
        yield
    finally:
        if needs_name:
            del collections.Mapping  # type: ignore[attr-defined]


def register_our_query(conf: Any, url: Any) -> None:
    """Make known to upstream those of our options that stand in *url*: it refuses others."""
    query = getattr(url, "query", {})  # 4.6 and before have none
    used = [option for option in options() if option.name in query]
    conf.register_opts(used, group=ZMQ_GROUP)


def sending(upstream_send: Callable[..., Any]) -> Callable[..., Any]:
    """``ZmqDriver.send`` (or its other one) with what 8.1.4's lacks, and asking before it."""
    upstream_send = inspect.unwrap(upstream_send)  # not twice, after both `enable` and our driver
    takes = inspect.signature(upstream_send).parameters

    @functools.wraps(upstream_send)
    def send(self: Any, target: Any, *args: Any, **kwargs: Any) -> Any:
        if "call_monitor_timeout" not in takes:
            kwargs.pop("call_monitor_timeout", None)  # 8.1.4's own transport passes it
        ask = getattr(self.matchmaker, "ask_before_send", None)
        if ask is not None:
            ask(
                target,
                _listener_type(self.conf),
                timeout_seconds=kwargs.get("timeout"),
                # A fanout reaches whoever is there, and so does every notification.
                wait="wait_for_reply" in takes and not target.fanout,
            )
        return upstream_send(self, target, *args, **kwargs)

    return send


def _listener_type(conf: Any) -> str:
    group = getattr(conf, ZMQ_GROUP, None)  # 4.6 and before have neither it nor proxies
    return "DEALER" if getattr(group, "use_router_proxy", False) else DIRECT


def _taking_our_query(register_opts: Callable[..., Any]) -> Callable[..., Any]:
    def register(conf: Any, *url: Any) -> Any:
        for each in url:  # 5.17 and before give none
            register_our_query(conf, each)
        return register_opts(conf, *url)

    return register


def _add_name(zmq_options: Any) -> None:
    for name in ("MATCHMAKER_BACKENDS", "_MATCHMAKER_BACKENDS"):  # 2.6 has no list
        if hasattr(zmq_options, name):
            _replace(zmq_options, name, (*getattr(zmq_options, name), NAME))
    (option,) = (each for each in zmq_options.zmq_opts if each.name == "rpc_zmq_matchmaker")
    choices = option.type.choices  # what was read off the tuple when the option was made
    if choices and NAME not in choices:
        is_mapping = hasattr(choices, "items")
        more = [*choices.items(), (NAME, None)] if is_mapping else [*choices, NAME]
        _replace(option.type, "choices", type(choices)(more))


def _replace(owner: Any, name: str, value: Any) -> None:
    before = getattr(owner, name)
    setattr(owner, name, value)
    _undo.append(lambda: setattr(owner, name, before))
