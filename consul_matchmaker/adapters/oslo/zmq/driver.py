"""Be a transport driver of our own name, ``consul+zmq://``, that changes nothing of upstream's."""

from __future__ import annotations

from typing import Any

from ...extras import extra
from .enable import NAME, NEEDED, enable, register_our_query, sending, upstream_imports

with extra("oslo", NEEDED), upstream_imports():
    from oslo_messaging._drivers import impl_zmq


class ConsulDriver(impl_zmq.ZmqDriver):
    """Upstream's ZeroMQ driver with the ``consul`` matchmaker."""

    def __init__(self, conf: Any, url: Any, *args: Any, **kwargs: Any) -> None:
        register_our_query(conf, url)
        super().__init__(conf, url, *args, **kwargs)

    @staticmethod
    def get_matchmaker_backend(*conf_and_url: Any) -> str:
        """The name of our entry point, whatever the rest of the URL's scheme."""
        return NAME

    send = sending(impl_zmq.ZmqDriver.send)
    send_notification = sending(impl_zmq.ZmqDriver.send_notification)


def run_proxy() -> None:
    """Upstream's ``oslo-messaging-zmq-proxy``, which then knows ``zmq+consul://`` as well."""
    enable()
    from oslo_messaging._cmd import zmq_proxy

    zmq_proxy.main()
