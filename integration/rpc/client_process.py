"""A process of its own that calls and casts, as it is told on standard input.

`ClientProcess` is the test's handle.
"""

from __future__ import annotations

import argparse
import itertools
import logging
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import IO, Any

from integration.rpc.service_process import configured, end_with_parent
from integration.rpc.transports import Transport
from integration.told import ToldProcess, obey

TEXT = "x" * 250
CALL_SECONDS = 30.0  # where no fault is made, none of them is reached


class ClientProcess(ToldProcess):
    """Starts one."""

    failure = RuntimeError

    def __init__(self, transport: Transport, log: IO[str] | None = None) -> None:
        super().__init__("integration.rpc.client_process", *transport.words, log=log)


def side_by_side(work: Callable[[int], None], threads: int) -> None:
    """Run *work* in so many threads; it is told which it is.  Raises what one of them raised."""
    with ThreadPoolExecutor(threads) as pool:
        for done in [pool.submit(work, number) for number in range(threads)]:
            done.result()


class Program:
    """Does what it is told."""

    def __init__(self, url: str, config_files: list[str]) -> None:
        import oslo_messaging

        self._oslo = oslo_messaging
        self._transport = oslo_messaging.get_rpc_transport(configured(config_files), url=url)

    def _client(self, topic: str, timeout: float = CALL_SECONDS, **words: Any) -> Any:
        target = self._oslo.Target(topic=topic, **words)
        return self._oslo.get_rpc_client(self._transport, target, timeout=timeout)

    def calls(self, topic: str, threads: int, seconds: float) -> dict[str, Any]:
        """Echoes for so long: how many were answered, and the seconds of each."""
        client = self._client(topic)
        took: list[list[float]] = [[] for _ in range(threads)]
        side_by_side(lambda _: client.call({}, "echo", text=TEXT), threads)  # connects
        end = time.monotonic() + seconds

        def work(number: int) -> None:
            now = time.monotonic()
            while now < end:
                if client.call({}, "echo", text=TEXT) != TEXT:
                    raise RuntimeError("another answer than was asked for")
                began, now = now, time.monotonic()
                took[number].append(now - began)

        began = time.monotonic()
        side_by_side(work, threads)
        passed = time.monotonic() - began
        return {"seconds": passed, "took": [each for some in took for each in some]}

    def casts(self, topic: str, first: int, seconds: float) -> dict[str, Any]:
        """`record` of numbers from *first* on, by one thread: when, and how many were taken."""
        client, number = self._client(topic), first
        began = time.monotonic()
        while time.monotonic() < began + seconds:
            client.cast({}, "record", number=number)
            number += 1
        seconds = time.monotonic() - began
        return {"began": began, "seconds": seconds, "count": number - first}

    def fanout(self, topic: str, number: int) -> dict[str, float]:
        """When the cast began, and how long it took to return."""
        client = self._client(topic, fanout=True)
        began = time.monotonic()
        client.cast({}, "record", number=number)
        return {"began": began, "seconds": time.monotonic() - began}

    def numbered(self, topic: str, count: int, threads: int) -> dict[str, Any]:
        """`record` of 0 to *count*, every other one as a call; those that were not taken."""
        client = self._client(topic)
        failed: list[tuple[int, str]] = []

        def work(which: int) -> None:
            for number in range(which, count, threads):
                try:
                    if (number // threads) % 2:
                        client.cast({}, "record", number=number)
                    else:
                        client.call({}, "record", number=number)
                except Exception as error:
                    failed.append((number, type(error).__name__))

        began = time.monotonic()
        side_by_side(work, threads)
        return {"seconds": time.monotonic() - began, "failed": failed}

    def load(
        self,
        topic: str,
        seconds: float,
        pause: float,
        timeout: float,
        call_threads: int,
        cast_threads: int,
    ) -> list[tuple[int, bool, float, float, str]]:
        """`record` for so long, each thread with that pause between two messages.

        Of each message: its number, whether it was a call, when it began, how long it took, and
        the class of the exception, if any.
        """
        client, numbers = self._client(topic, timeout), itertools.count()
        made: list[tuple[int, bool, float, float, str]] = []
        end = time.monotonic() + seconds

        def work(which: int) -> None:
            is_call = which < call_threads
            send = client.call if is_call else client.cast
            while time.monotonic() < end:
                number, began, error = next(numbers), time.monotonic(), ""
                try:
                    send({}, "record", number=number)
                except Exception as failure:
                    error = type(failure).__name__
                made.append((number, is_call, began, time.monotonic() - began, error))
                time.sleep(pause)

        side_by_side(work, call_threads + cast_threads)
        return made


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m integration.rpc.client_process")
    parser.add_argument("--url", required=True)
    parser.add_argument("--config-file", action="append", default=[], help="for oslo.config")
    options = parser.parse_args()
    logging.basicConfig(
        level=logging.WARNING, format="%(asctime)s client %(process)d %(name)s %(message)s"
    )
    end_with_parent()  # a call to a broker that is gone would keep us
    obey(Program(options.url, options.config_file))


if __name__ == "__main__":
    main()
