"""Run a real Consul cluster as processes of this machine, each on its own loopback address.

    with LocalCluster(servers=3, clients=1) as cluster:
        cluster.nodes["agent1"].http        # "127.83.12.4:8500"
        cluster.nodes["agent1"].dns         # "127.83.12.4:8600"
        cluster.kill(cluster.leader())      # SIGKILL; start(name) brings it back
        cluster.wait_ready()

The nodes run Consul's normal configuration, not its development mode: servers are `server1..n`,
client agents `agent1..n`.  They end with the cluster, and with this process however it dies.
"""

import atexit
import contextlib
import errno
import json
import logging
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

from ..errors import MatchmakerError
from .consul_binary import consul_version, find_consul
from .consul_probe import Node, NotReady, agreed_leader, check_ready, wait_until

logger = logging.getLogger(__name__)

READY_SECONDS = 60.0  # measured: 2-4 s on two cores; the rest is for busy machines
LEADER_SECONDS = 30.0
EXIT_SECONDS = 15.0  # a client agent says goodbye to the cluster within 5 s
LOG_TAIL_LINES = 8

DEFAULT_PORTS = {"http": 8500, "dns": 8600, "server": 8300, "serf_lan": 8301}
GRPC_TLS_SINCE = (1, 14)  # a port older versions do not know, and refuse to be told about

# Kills what it was told to when its input ends, which is when our process ends, even by SIGKILL.
# Linux could do this by itself (PR_SET_PDEATHSIG), but only for the life of the starting thread.
_WATCHDOG = """
import os, signal, sys
groups = set()
for line in sys.stdin:
    (groups.add if line[0] == "+" else groups.discard)(int(line[1:]))
for group in groups:
    try:
        os.killpg(group, signal.SIGKILL)
    except OSError:
        pass
"""


T = TypeVar("T")


class ClusterError(MatchmakerError):
    """The local cluster cannot be started or asked; the message says why and where the logs are."""


class LocalCluster:
    """A Consul cluster of local processes.  Not thread-safe; a context manager.

    `config` is merged into every node's configuration, `node_config["server1"]` into that node's
    alone; both are plain dicts in Consul's own words, such as `{"ports": {"http": -1}}`.  `token`
    is used to find out whether the cluster is ready, where access rules are on.
    """

    def __init__(
        self,
        servers: int = 3,
        clients: int = 1,
        *,
        program: Path | None = None,
        config: Mapping[str, Any] | None = None,
        node_config: Mapping[str, Mapping[str, Any]] | None = None,
        token: str = "",
    ) -> None:
        self._server_count = servers
        self._client_count = clients
        self._program = program
        self._config = config or {}
        self._node_config = node_config or {}
        self._token = token
        self._nodes: dict[str, Node] = {}
        self._configs: dict[str, dict[str, Any]] = {}
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        self._paused: set[str] = set()
        self._addresses: list[str] = []
        self._join_addresses: list[str] = []
        self._folder: Path | None = None
        self._watchdog: subprocess.Popen[str] | None = None
        self._has_grpc_tls = False
        self._owner_pid = os.getpid()

    def __repr__(self) -> str:
        running = ", ".join(sorted(self.running)) or "nothing runs"
        return f"<LocalCluster {self._folder}: {running}>"

    def __enter__(self) -> "LocalCluster":
        """Start every node and wait until the cluster is ready.  Raises ClusterError."""
        self._program = self._program or find_consul()
        self._has_grpc_tls = consul_version(self._program) >= GRPC_TLS_SINCE
        self._folder = Path(tempfile.mkdtemp(prefix="consul-matchmaker-"))
        self._owner_pid = os.getpid()
        atexit.register(self.close)
        try:
            self._start_watchdog()
            self._addresses = _loopback_addresses()
            for number in range(self._server_count):
                self._prepare(f"server{number + 1}", {}, is_server=True)
            for number in range(self._client_count):
                self._prepare(f"agent{number + 1}", {}, is_server=False)
            for name in self._nodes:
                self.start(name)
            self.wait_ready()
        except BaseException as error:
            self.close(keep_logs=_explains(error))
            raise
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close(keep_logs=exc is not None and _explains(exc))

    def close(self, *, keep_logs: bool = False) -> None:
        """Kill every node and remove every file, except when the logs are wanted.  Idempotent."""
        if os.getpid() != self._owner_pid:  # a forked child must not end its parent's cluster
            return
        atexit.unregister(self.close)
        for name in list(self._processes):
            self.kill(name)
        if self._watchdog is not None:
            assert self._watchdog.stdin is not None
            self._watchdog.stdin.close()
            self._watchdog.wait()
            self._watchdog = None
        if self._folder is not None:
            if keep_logs:
                logger.warning("the logs of the local Consul cluster are kept in %s", self._folder)
            else:
                shutil.rmtree(self._folder, ignore_errors=True)
            self._folder = None

    # --- what there is -----------------------------------------------------------------------

    @property
    def nodes(self) -> Mapping[str, Node]:
        """Every node by its name, running or not."""
        return self._nodes

    @property
    def running(self) -> set[str]:
        """The names of the nodes whose process runs and is not paused."""
        alive = {name for name, process in self._processes.items() if process.poll() is None}
        return alive - self._paused

    @property
    def folder(self) -> Path:
        """Where the nodes' configurations, data and logs (`<name>/consul.log`) are."""
        if self._folder is None:
            raise ClusterError("the local Consul cluster is not running: use it in a `with` block")
        return self._folder

    def leader(self, timeout_seconds: float = LEADER_SECONDS) -> str:
        """The name of the running server that a majority of all servers follows."""

        def find() -> str:
            name = agreed_leader(self._up(servers_only=True), self._server_count // 2 + 1)
            if name not in self.running:  # the others have not noticed yet that it is gone
                raise NotReady(f"{name} is still followed, but does not run")
            return name

        return self._wait(find, timeout_seconds)

    def wait_ready(self, timeout_seconds: float = READY_SECONDS) -> None:
        """Until a leader is known and every running node reads, writes and answers DNS.

        Raises ClusterError at once when a node's process ended by itself, with the end of its log.
        """

        def check() -> None:
            self._check_processes()
            agreed_leader(self._up(servers_only=True), self._server_count // 2 + 1)
            check_ready(self._up(), token=self._token)

        self._wait(check, timeout_seconds)

    # --- what can happen to a node -----------------------------------------------------------

    def kill(self, name: str) -> None:
        """End a node at once (SIGKILL), as a crash would.  Nothing if it does not run."""
        self._end(name, signal.SIGKILL)

    def stop(self, name: str) -> None:
        """End a node as a service manager would (SIGTERM) and wait until it has ended.

        By Consul's own defaults a client agent leaves the cluster then, and a server does not.
        """
        self.resume(name)
        self._end(name, signal.SIGTERM)

    def pause(self, name: str) -> None:
        """Freeze a node (SIGSTOP): its connections stay open, and nothing answers."""
        self._signal(name, signal.SIGSTOP)
        self._paused.add(name)
        if hasattr(os, "waitid"):  # not in every Python on macOS
            # The signal only starts it: a thread on another core may answer a moment longer.
            pid = self._processes[name].pid
            os.waitid(os.P_PID, pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)

    def resume(self, name: str) -> None:
        """Let a paused node go on."""
        if name in self._paused:
            self._signal(name, signal.SIGCONT)
            self._paused.discard(name)

    def start(self, name: str) -> None:
        """Start a node that does not run; it finds its data as it left it.  Does not wait."""
        if name in self._processes:
            return
        folder = self._node_folder(name)
        config = json.dumps(self._configs[name], indent=2)
        (folder / "config.json").write_text(config, encoding="utf-8")
        with (folder / "consul.log").open("ab") as log:
            process = subprocess.Popen(
                [str(self._program), "agent", f"-config-file={folder}/config.json"],
                cwd=folder,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                # Consul takes addresses and tokens from CONSUL_*; the tests' own are not for it.
                env={k: v for k, v in os.environ.items() if not k.startswith("CONSUL_")},
                start_new_session=True,
            )
        self._processes[name] = process
        self._tell_watchdog(f"+{process.pid}\n")

    def restart(self, name: str, *, graceful: bool = True) -> None:
        """`stop` (or `kill`) and `start`.  Does not wait until the node is ready."""
        if graceful:
            self.stop(name)
        else:
            self.kill(name)
        self.start(name)

    def add_agent(self, name: str, config: Mapping[str, Any] | None = None) -> Node:
        """A further client agent, with configuration of its own, once it is ready."""
        if name in self._nodes:
            raise ValueError(f"there is a node named {name!r} already")
        self._prepare(name, config or {}, is_server=False)
        self.start(name)
        self.wait_ready()
        return self._nodes[name]

    # --- inside ------------------------------------------------------------------------------

    def _prepare(self, name: str, own_config: Mapping[str, Any], *, is_server: bool) -> None:
        """Give a node its folder, address, ports and configuration."""
        address, ports = self._addresses[len(self._nodes)], dict(DEFAULT_PORTS)
        if self._addresses[0] == self._addresses[-1]:
            ports = dict(zip(ports, free_ports(address, len(ports)), strict=True))
        if is_server and self._has_grpc_tls:
            ports["grpc_tls"] = -1  # nobody here speaks it, and on one address they would collide

        folder = self.folder / name
        folder.mkdir()
        advertised = self._advertised(name, address, ports)
        config: dict[str, Any] = {
            "node_name": name,
            "data_dir": str(folder / "data"),
            "bind_addr": address,
            "advertise_addr": advertised,
            "client_addr": address,
            "ports": {**ports, "serf_wan": -1},
            "retry_join": self._join_addresses,  # the list itself: it is still growing
            "retry_interval": "1s",  # all start at once: the first attempt finds nobody
            "disable_update_check": True,
            "performance": {"raft_multiplier": 1},  # elections in about a second, as in production
        }
        if is_server:
            config["server"] = True
            config["bootstrap_expect"] = self._server_count
            # Else a server down for 10 s is struck off, and has no vote for 10 s after it is back.
            config["autopilot"] = {"cleanup_dead_servers": False}
        for extra in (self._config, self._node_config.get(name, {}), own_config):
            config = merged(config, extra)
        self._configs[name] = config

        ports = config["ports"]
        if is_server:
            self._join_addresses.append(f"{advertised}:{ports['serf_lan']}")
        self._nodes[name] = Node(
            name=name,
            is_server=is_server,
            http=f"{address}:{max(ports['http'], 0) or DEFAULT_PORTS['http']}",
            dns=f"{address}:{max(ports['dns'], 0) or DEFAULT_PORTS['dns']}",
            rpc=f"{advertised}:{ports['server']}",
            serves_http=ports["http"] > 0,
            serves_dns=ports["dns"] > 0,
        )

    def _advertised(self, name: str, address: str, ports: Mapping[str, int]) -> str:
        """The address at which the other nodes reach a node: its own."""
        return address

    def _node_folder(self, name: str) -> Path:
        if name not in self._nodes:
            raise ValueError(f"no node is named {name!r}; there are {', '.join(self._nodes)}")
        return self.folder / name

    def _up(self, *, servers_only: bool = False) -> list[Node]:
        running = self.running
        return [
            node
            for node in self._nodes.values()
            if node.name in running and (node.is_server or not servers_only)
        ]

    def _wait(self, check: Callable[[], T], timeout_seconds: float) -> T:
        try:
            return wait_until(check, timeout_seconds)
        except TimeoutError as error:
            raise ClusterError(f"{error}; logs: {self.folder}/*/consul.log") from error

    def _check_processes(self) -> None:
        for name, process in self._processes.items():
            if process.poll() is not None:
                log = self._node_folder(name) / "consul.log"
                lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
                tail = "\n  ".join(lines[-LOG_TAIL_LINES:])
                ended = f"{name} ended by itself (exit {process.returncode}); the end of {log}:"
                raise ClusterError(f"{ended}\n  {tail}")

    def _signal(self, name: str, number: signal.Signals) -> None:
        process = self._processes.get(name)
        if process is None or process.poll() is not None:
            raise ClusterError(f"{name} does not run")
        os.killpg(process.pid, number)

    def _end(self, name: str, number: signal.Signals) -> None:
        process = self._processes.pop(name, None)
        if process is None:
            return
        self._paused.discard(name)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        try:
            process.wait(EXIT_SECONDS)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            logger.warning("%s ignored %s for %s s and was killed", name, number.name, EXIT_SECONDS)
        self._tell_watchdog(f"-{process.pid}\n")

    def _start_watchdog(self) -> None:
        self._watchdog = subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", _WATCHDOG],
            stdin=subprocess.PIPE,
            text=True,
            start_new_session=True,  # Ctrl-C in the terminal is for us, not for it
        )

    def _tell_watchdog(self, line: str) -> None:
        if self._watchdog is not None and self._watchdog.stdin is not None:
            with contextlib.suppress(BrokenPipeError):
                self._watchdog.stdin.write(line)
                self._watchdog.stdin.flush()


def _explains(error: BaseException) -> bool:
    """Whether the logs may say why: not when somebody just ended us."""
    return not isinstance(error, (KeyboardInterrupt, SystemExit))


def merged(config: Mapping[str, Any], extra: Mapping[str, Any]) -> dict[str, Any]:
    """*config* with *extra* laid over it; dicts within are merged, anything else is replaced."""
    result = dict(config)
    for key, value in extra.items():
        inner = result.get(key)
        both = isinstance(inner, Mapping) and isinstance(value, Mapping)
        result[key] = merged(inner, value) if both else value  # type: ignore[arg-type]
    return result


def _loopback_addresses() -> list[str]:
    """An address for each of 254 nodes, out of a /24 of 127/8 that nobody else listens in.

    Where the machine has one loopback address only (macOS), the same one again and again.
    """
    for _ in range(20):
        network = f"127.{random.randint(1, 254)}.{random.randint(0, 254)}"
        try:
            _try_bind(f"{network}.1", DEFAULT_PORTS.values())
        except OSError as error:
            if error.errno == errno.EADDRNOTAVAIL:
                return ["127.0.0.1"] * 254
            continue
        return [f"{network}.{number}" for number in range(1, 255)]
    raise ClusterError("no free loopback network found: are the ports 8300-8600 taken everywhere?")


def _try_bind(address: str, ports: Iterable[int]) -> None:
    for port in ports:
        with socket.socket() as listener:
            listener.bind((address, port))


def free_ports(address: str, count: int) -> list[int]:
    """Ports of *address* that nothing listens on now."""
    with contextlib.ExitStack() as open_until_all_are_chosen:
        listeners = [open_until_all_are_chosen.enter_context(socket.socket()) for _ in range(count)]
        for listener in listeners:
            listener.bind((address, 0))
        return [listener.getsockname()[1] for listener in listeners]
