"""``consul-matchmaker-broadcaster``: a process that sends fanouts to every server, for clients."""

from __future__ import annotations

import argparse
import logging
import signal
import socket
import sys
import threading
from concurrent import futures
from typing import Any

from ....errors import ConfigurationError
from ...extras import extra
from .driver import HttpDriver
from .listeners import Incoming
from .messages import Request
from .names import BROADCASTER

with extra("oslo-http"):
    import oslo_messaging
    from oslo_config import cfg

logger = logging.getLogger(__name__)

AT_A_TIME = 8
"""Fanouts that are being multiplied; each has connections of its own to wait for."""


class Broadcaster:
    """Takes fanouts from `start` to `stop`, and gives each to every server of its topic."""

    def __init__(self, driver: HttpDriver) -> None:
        self._driver = driver
        self._threads = futures.ThreadPoolExecutor(
            AT_A_TIME, thread_name_prefix="consul-matchmaker-broadcaster"
        )
        target = oslo_messaging.Target(
            exchange=BROADCASTER.exchange, topic=BROADCASTER.topic, server=socket.gethostname()
        )
        self._listener = driver.listen(target, 1, None)

    def start(self) -> None:
        """Be found.  Raises nothing that waits for Consul: it is found once Consul shows it."""
        self._listener.start(self._on_incoming)

    def stop(self) -> None:
        """Be found no more, and finish what was taken."""
        self._listener.stop()
        self._threads.shutdown(wait=True)
        self._listener.cleanup()

    def _on_incoming(self, incoming: list[Incoming]) -> None:
        for message in incoming:
            self._threads.submit(self._multiply, message)

    def _multiply(self, incoming: Incoming) -> None:
        try:
            self._driver.multiply(_request_of(incoming.message))
        except Exception:
            logger.exception("a fanout was not sent")
        finally:
            incoming.reply()


def _request_of(message: Any) -> Request:
    fields = {name: message[name] for name in ("exchange", "topic", "ctxt", "message")}
    return Request(**fields, fanout=True)


def main(arguments: list[str] | None = None) -> int:
    """Run until SIGTERM or SIGINT; 0, or 2 with one line for what cannot be meant."""
    parser = argparse.ArgumentParser(
        prog="consul-matchmaker-broadcaster", description=(__doc__ or "").partition(": ")[2]
    )
    parser.add_argument("--url", help="consul+http://...; default: transport_url of the file")
    parser.add_argument("--config-file", action="append", default=[], help="of oslo.config")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    ended = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: ended.set())
    conf = cfg.ConfigOpts()
    try:
        files = [word for path in options.config_file for word in ("--config-file", path)]
        conf(files, project="consul-matchmaker-broadcaster")
        url = oslo_messaging.TransportURL.parse(conf, options.url)
        if url.transport != "consul+http":
            raise ConfigurationError("the transport URL must begin with consul+http://")
        driver = HttpDriver(conf, url)
        broadcaster = Broadcaster(driver)
    except (ConfigurationError, cfg.Error, oslo_messaging.MessagingException) as error:
        print(f"consul-matchmaker-broadcaster: {error}", file=sys.stderr)
        return 2
    broadcaster.start()
    logger.info("broadcasting fanouts: %s", BROADCASTER)
    ended.wait()
    broadcaster.stop()
    driver.cleanup()
    return 0
