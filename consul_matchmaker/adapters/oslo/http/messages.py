"""What goes over the connection: requests and replies as JSON.  Pure.

A request is ``POST /rpc``.  202: taken (cast).  200: the reply of a call, ``{"result": ...}`` or
``{"failure": ...}``; where the caller watches the call, blank lines come before it while it runs.
404: nobody here listens for that.  503: too much to do.  Both mean that nothing was taken.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from oslo_serialization import jsonutils


class Malformed(Exception):
    """What came is no request; the text says why, and repeats nothing of it."""


@dataclass(slots=True)
class Request:
    """One message, and to whom it is addressed."""

    exchange: str
    topic: str
    ctxt: dict[str, Any]
    message: dict[str, Any]
    server: str | None = None
    fanout: bool = False
    """For every listener of exchange and topic, in this process."""
    pool: str | None = None
    """For one of the listeners of this pool (notifications)."""
    wait: bool = False
    """Whether the sender waits for a reply."""
    monitor: float | None = None
    """The sender gives up when it has heard nothing for so many seconds."""
    id: str | None = None


_TYPES: dict[str, tuple[type, ...]] = {
    "exchange": (str,),
    "topic": (str,),
    "ctxt": (dict,),
    "message": (dict,),
    "server": (str, type(None)),
    "fanout": (bool,),
    "pool": (str, type(None)),
    "wait": (bool,),
    "monitor": (int, float, type(None)),
    "id": (str, type(None)),
}
LONGEST_MONITOR_SECONDS = 10 * 365 * 86400.0
"""No event can be waited for as long as JSON can say."""
_NEEDED = {"exchange", "topic", "ctxt", "message"}
_OPTIONAL = tuple(name for name in _TYPES if name not in _NEEDED)


def body_of(request: Request) -> bytes:
    """*request* as bytes; raises TypeError and ValueError for what JSON cannot say."""
    said: dict[str, Any] = {
        "exchange": request.exchange,
        "topic": request.topic,
        "ctxt": request.ctxt,
        "message": request.message,
    }
    for name in _OPTIONAL:
        if value := getattr(request, name):
            said[name] = value
    body: bytes = jsonutils.dump_as_bytes(said)
    return body


def read_request(body: bytes) -> Request:
    """The request that *body* says; raises Malformed."""
    try:
        found = json.loads(body.decode())
    except (ValueError, RecursionError):
        raise Malformed("the body is not JSON") from None
    if not isinstance(found, dict):
        raise Malformed("the body is not an object")
    for name, value in found.items():
        types = _TYPES.get(name)
        if types is None:
            raise Malformed("the body has an unknown name")
        is_number = isinstance(value, bool) and float in types  # which a bool is to Python
        if not isinstance(value, types) or is_number:
            raise Malformed(f"{name} has the wrong type")
    if not found.keys() >= _NEEDED:
        raise Malformed("exchange, topic, ctxt and message are needed")
    monitor = found.get("monitor")
    if monitor is not None and not 0 <= monitor <= LONGEST_MONITOR_SECONDS:  # or it is no number
        raise Malformed("monitor is no time")
    return Request(**found)


def reply_of(result: Any) -> bytes:
    """Raises TypeError and ValueError for what JSON cannot say."""
    body: bytes = jsonutils.dump_as_bytes({"result": result})
    return body


def failure_of(text: str) -> bytes:
    body: bytes = jsonutils.dump_as_bytes({"failure": text})
    return body


def read_reply(body: bytes) -> tuple[Any, str | None]:
    """The result, and the failure as oslo.messaging writes one, of which one is None; raises
    Malformed."""
    try:
        found = json.loads(body.decode())
        failure = found.get("failure")
        return found.get("result"), None if failure is None else str(failure)
    except (ValueError, RecursionError, AttributeError):
        raise Malformed("the reply is not what a server of this driver says") from None
