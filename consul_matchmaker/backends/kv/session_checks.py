"""Ask Consul which keys are held by the session that should hold them, many in one request."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping

from ..http.api import Answer, ConsulApi

CHECKS_PER_REQUEST = 64
"""Operations that Consul takes in one transaction: 64 until 1.14, 128 since (fact B12)."""
CHECK_BYTES_PER_REQUEST = 500_000
"""Bytes of such a transaction: Consul refuses more than 512 KiB (fact B12)."""

Check = tuple[str, str]
"""A key, and the session that should hold it."""


def in_requests(checks: Iterable[Check]) -> Iterator[list[Check]]:
    """*checks* in as few requests as Consul's limits allow."""
    some: list[Check] = []
    size = 0
    for check in checks:
        bytes_of_it = len(json.dumps(_operation(check))) + len(", ")
        if len(some) == CHECKS_PER_REQUEST or (
            some and size + bytes_of_it > CHECK_BYTES_PER_REQUEST
        ):
            yield some
            some, size = [], 0
        some.append(check)
        size += bytes_of_it
    if some:
        yield some


def held_keys(api: ConsulApi, checks: list[Check]) -> set[str]:
    """The keys of *checks*, all of one request, that their sessions hold.  Writes nothing.

    One that fails makes the transaction fail, and Consul need not have made the others: where the
    token may not read a key it names that key and looks at no other.  So they are asked again
    without those that failed, until what is left all holds.
    """
    while checks:
        body = json.dumps([_operation(check) for check in checks]).encode("ascii")
        answer = api.call("PUT", "/v1/txn", body=body, accept=(409,))
        if answer.status == 200:
            break
        failed = _failed_operations(answer, len(checks))
        checks = [check for number, check in enumerate(checks) if number not in failed]
    return {key for key, _ in checks}


def _operation(check: Check) -> Mapping[str, object]:
    key, session = check
    return {"KV": {"Verb": "check-session", "Key": key, "Session": session}}


def _failed_operations(answer: Answer, count: int) -> set[int]:
    """Which of *count* operations of a transaction Consul names as failed; at least one."""
    try:
        failed = {int(error["OpIndex"]) for error in answer.json()["Errors"]}
    except (TypeError, KeyError, ValueError):
        raise answer.unexpected() from None
    if not failed or not failed <= set(range(count)):
        raise answer.unexpected()
    return failed
