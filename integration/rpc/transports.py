"""What two processes need to know to speak to each other: a transport's URL, and its settings."""

from __future__ import annotations

import contextlib
import secrets
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from consul_matchmaker.testing.local_consul import LocalCluster
from integration.rpc.certificates import Certificates, make
from integration.rpc.rabbitmq import RabbitMQ


@dataclass(frozen=True)
class Transport:
    """A transport as the processes of this package are told about it."""

    name: str
    url: str
    config_file: Path | None = None
    """For oslo.config; None where the URL says all."""

    @property
    def words(self) -> list[str]:
        """The arguments of a command line."""
        config = [] if self.config_file is None else ["--config-file", str(self.config_file)]
        return ["--url", self.url, *config]


class Brokerless:
    """A Consul cluster of local processes, and transports that find their servers there.

    A context manager.  What clients and servers say to each other does not pass through Consul.
    """

    def __init__(self, folder: Path, certificates: Certificates | None = None) -> None:
        self.cluster = LocalCluster(servers=3, clients=1)
        folder.mkdir(parents=True, exist_ok=True)
        self._folder, self._certificates = folder, certificates
        self._token = folder / "token"
        self._token.write_text(secrets.token_urlsafe(32))
        self._token.chmod(0o600)

    def __enter__(self) -> Brokerless:
        self.cluster.__enter__()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.cluster.close()

    def transport(self, address: str = "", *, with_tls: bool = False, query: str = "") -> Transport:
        """By the Consul agent at *address*; by default the cluster's own."""
        lines = ["[consul_http]", f"rpc_token_file = {self._token}"]
        if with_tls:
            if self._certificates is None:
                raise ValueError("TLS needs certificates")
            lines += [
                f"tls_cert = {self._certificates.certificate}",
                f"tls_key = {self._certificates.key}",
                f"tls_ca = {self._certificates.authority}",
            ]
        file = self._folder / ("tls.conf" if with_tls else "plain.conf")
        file.write_text("\n".join([*lines, ""]))
        address = address or self.cluster.nodes["agent1"].http
        return Transport("consul", f"consul+http://{address}/{query}", file)


@contextlib.contextmanager
def named(what: str) -> Iterator[dict[bool, Transport]]:
    """The transport without and with TLS: `rabbitmq`, `consul`, or a URL, which has one only."""
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        if what == "rabbitmq":
            node = stack.enter_context(RabbitMQ(folder / "node", make(folder)))
            yield {
                False: Transport("RabbitMQ", node.url),
                True: Transport("RabbitMQ", node.tls_url, node.tls_config_file),
            }
        elif what == "consul":
            brokerless = stack.enter_context(Brokerless(folder, make(folder)))
            yield {with_tls: brokerless.transport(with_tls=with_tls) for with_tls in (False, True)}
        else:
            yield {False: Transport(what.partition(":")[0], what)}
