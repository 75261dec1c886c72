"""A RabbitMQ node of the machine's own program, which is what RPC over Consul is compared with."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path

from integration.cluster import free_ports
from integration.rpc.certificates import Certificates

READY_SECONDS = 60.0  # measured: 4-6 s on two cores; the rest is for busy machines
STOP_SECONDS = 30.0
SECONDS_BETWEEN_KNOCKS = 0.05
DEBIAN = "/usr/lib/rabbitmq/bin/rabbitmq-server"
"""What Debian's command calls, after it has become the user and gone to the folder of the
system's own node."""
_ENDS_WITH_US = ("setpriv", "--pdeathsig", "KILL") if shutil.which("setpriv") else ()
"""Of util-linux.  A node whose owner is killed would run on for ever."""


class NoRabbitMQ(Exception):
    """There is no rabbitmq-server here, or it does not start; the message says what to do."""


class RabbitMQ:
    """Starts one on 127.0.0.1 with all its files in *folder*; a context manager that kills it.

    With certificates it has a second port, where it wants a client's certificate, too.
    """

    def __init__(self, folder: Path, certificates: Certificates | None = None) -> None:
        program, epmd = shutil.which(DEBIAN) or shutil.which("rabbitmq-server"), _epmd()
        if program is None or epmd is None:
            raise NoRabbitMQ("rabbitmq-server is needed: apt-get install rabbitmq-server")
        self._port, self._tls_port, distribution, names = free_ports(4)
        self._log, self._command = folder / "output", [*_ENDS_WITH_US, program]
        self._epmd_command = [*_ENDS_WITH_US, epmd, "-port", str(names), "-address", "127.0.0.1"]
        self._epmd: subprocess.Popen[bytes] | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self.url = f"rabbit://guest:guest@127.0.0.1:{self._port}//"
        self.tls_url = f"rabbit://guest:guest@127.0.0.1:{self._tls_port}//"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "rabbitmq.conf").write_text(self._configuration(certificates))
        (folder / "plugins").write_text("[].\n")
        self.tls_config_file = folder / "client.conf"
        """What oslo.config is told for `tls_url`."""
        if certificates is not None:
            self.tls_config_file.write_text(_client_configuration(certificates))
        self._environment = {
            **{name: each for name, each in os.environ.items() if not name.startswith("RABBITMQ_")},
            "HOME": str(folder),  # where the Erlang cookie is made
            "ERL_EPMD_PORT": str(names),
            "RABBITMQ_NODENAME": "bench@localhost",
            "RABBITMQ_DIST_PORT": str(distribution),
            "RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS": (
                "-kernel inet_dist_use_interface {127,0,0,1} -start_epmd false"
            ),
            "RABBITMQ_CONF_ENV_FILE": str(folder / "none"),
            "RABBITMQ_CONFIG_FILE": str(folder / "rabbitmq.conf"),
            "RABBITMQ_ADVANCED_CONFIG_FILE": str(folder / "none.config"),
            "RABBITMQ_ENABLED_PLUGINS_FILE": str(folder / "plugins"),
            "RABBITMQ_GENERATED_CONFIG_DIR": str(folder / "generated"),
            "RABBITMQ_MNESIA_BASE": str(folder / "mnesia"),
            "RABBITMQ_LOG_BASE": str(folder / "log"),
            "RABBITMQ_PID_FILE": str(folder / "pid"),
            # Else a shell stays in between, and our child is not the node.
            "RUNNING_UNDER_SYSTEMD": "true",
        }

    def start(self) -> None:
        """Returns once it speaks AMQP.  Raises NoRabbitMQ."""
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                self._command,
                env=self._environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C in the terminal is for us, not for it
            )
        deadline = time.monotonic() + READY_SECONDS
        while self._process.poll() is None and time.monotonic() < deadline:
            if self._speaks():
                return
            time.sleep(SECONDS_BETWEEN_KNOCKS)
        self.kill()
        tail = self._log.read_text(errors="replace").splitlines()[-12:]
        raise NoRabbitMQ("\n  ".join(["rabbitmq-server does not take connections:", *tail]))

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def kill(self) -> None:
        """SIGKILL; nothing where it does not run."""
        self._end(signal.SIGKILL)

    def stop(self) -> None:
        """SIGTERM, and wait until it has ended."""
        self._end(signal.SIGTERM)

    def pause(self) -> None:
        os.kill(self.pid, signal.SIGSTOP)

    def resume(self) -> None:
        os.kill(self.pid, signal.SIGCONT)

    def __enter__(self) -> RabbitMQ:
        self._epmd = subprocess.Popen(self._epmd_command, stdin=subprocess.DEVNULL)
        try:
            self.start()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def close(self) -> None:
        """Kill the node, and the list of names that it is in.  Idempotent."""
        self.kill()
        if self._epmd is not None:
            self._epmd.kill()
            self._epmd.wait()

    def _end(self, number: signal.Signals) -> None:
        if self._process is None:
            return
        with contextlib.suppress(ProcessLookupError):
            self._process.send_signal(number)
        try:
            self._process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process = None

    def _speaks(self) -> bool:
        with (
            contextlib.suppress(OSError),
            socket.create_connection(("127.0.0.1", self._port), timeout=2) as connection,
        ):
            connection.sendall(b"AMQP\x00\x00\x09\x01")
            return connection.recv(1) == b"\x01"  # a frame: connection.start
        return False

    def _configuration(self, certificates: Certificates | None) -> str:
        lines = [
            f"listeners.tcp.1 = 127.0.0.1:{self._port}",
            "disk_free_limit.absolute = 10MB",
            "log.file.level = warning",
        ]
        if certificates is not None:
            lines += [
                f"listeners.ssl.1 = 127.0.0.1:{self._tls_port}",
                f"ssl_options.cacertfile = {certificates.authority}",
                f"ssl_options.certfile = {certificates.certificate}",
                f"ssl_options.keyfile = {certificates.key}",
                "ssl_options.verify = verify_peer",
                "ssl_options.fail_if_no_peer_cert = true",
            ]
        return "\n".join([*lines, ""])


def _epmd() -> str | None:
    found = shutil.which("epmd") or next(Path("/usr/lib/erlang").glob("erts-*/bin/epmd"), None)
    return None if found is None else str(found)


def _client_configuration(certificates: Certificates) -> str:
    return "\n".join(
        [
            "[oslo_messaging_rabbit]",
            "ssl = true",
            f"ssl_ca_file = {certificates.authority}",
            f"ssl_cert_file = {certificates.certificate}",
            f"ssl_key_file = {certificates.key}",
            "",
        ]
    )
