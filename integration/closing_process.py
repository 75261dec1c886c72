"""A process whose signal handler closes the Matchmaker, whatever the main thread is just calling.

It answers each SIGUSR1 by one byte on standard output: ``r`` when close() refused to interrupt a
call, ``c`` when it closed.  It ends by SIGTERM, whose handler sets a flag.
"""

import os
import signal
import sys
from contextlib import suppress
from types import FrameType

from consul_matchmaker import Matchmaker, errors


def main(url: str) -> None:
    mm = Matchmaker.from_url(url)
    is_over = False

    def close(_number: int, _frame: FrameType | None) -> None:
        try:
            mm.close(timeout_seconds=2)
        except RuntimeError:
            os.write(1, b"r")
        else:
            os.write(1, b"c")

    def end(_number: int, _frame: FrameType | None) -> None:
        nonlocal is_over
        is_over = True

    registration = mm.register("scheduler", "10.0.0.1:9501")
    registration.wait_until_published(timeout_seconds=10)
    signal.signal(signal.SIGTERM, end)
    signal.signal(signal.SIGUSR1, close)
    os.write(1, b"+")
    while not is_over:
        try:
            mm.acknowledge("scheduler", "10.0.0.1:9501")
            mm.register("conductor", "10.0.0.1:9501")
            mm.status()
            mm.hosts("scheduler")
            mm.topics()
            mm.unregister("conductor", "10.0.0.1:9501")
        except errors.Closed:
            mm = Matchmaker.from_url(url)
            mm.register("scheduler", "10.0.0.1:9501")
        except errors.Unavailable:  # the one that was closed in the middle of nothing
            with suppress(errors.Closed):
                mm.status()
    mm.close()


if __name__ == "__main__":
    main(sys.argv[1])
