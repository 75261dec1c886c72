"""Who answered calls, and how soon things are promised."""

from typing import Any

from integration.oslo.conftest import QUICK

CRASH_SECONDS = 2 * 10 + 1  # the lease's bound, fact B1
LOOK_SECONDS = QUICK["zmq_target_update"]
SOON_SECONDS = 15  # what takes a moment, on a machine that is busy with something else


def answers(calls: list[Any]) -> list[str]:
    return [who for _, _, who in calls]


def answered(calls: list[Any], executor: str) -> set[str]:
    """Who answered.  With real threads upstream loses a call at times, when the reply comes before
    its sender waits for it: as often with Redis, which test_beside_redis.py shows.
    """
    return set(answers(calls)) - ({"!MessagingTimeout"} if executor == "threading" else set())
