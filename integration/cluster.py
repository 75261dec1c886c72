"""A real Consul cluster whose nodes a test can kill, pause, cut off and bring back by name.

`Cluster` is what tests see.  It has two kinds: containers (`DockerCluster`) and processes of this
machine (`LocalTestCluster`).  In both the nodes are `server1`, `server2`, `server3` and `agent1`.
"""

import contextlib
import json
import random
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar

import pytest

from consul_matchmaker.backends.kv.keys import SENTINEL
from consul_matchmaker.testing.consul_binary import ConsulNotFound
from consul_matchmaker.testing.consul_probe import (
    Node,
    NotReady,
    agreed_leader,
    check_ready,
    request,
    wait_until,
)
from consul_matchmaker.testing.local_consul import (
    LEADER_SECONDS,
    READY_SECONDS,
    ClusterError,
    LocalCluster,
)
from integration.access_rules import SHORT_LEASES

TELL_SECONDS = 20.0  # an election takes two or three; the rest is for busy machines
DOCKER_SECONDS = 60.0  # one docker command; a stop may take the 10 s the engine grants
CLUSTER_PORTS = "8300:8302"  # RPC and gossip: what nodes say to each other, and nobody else

T = TypeVar("T")


class Cluster(Protocol):
    """Three servers and client agents.  All waits have a deadline and raise ClusterError."""

    @property
    def nodes(self) -> Mapping[str, Node]:
        """Every node by name; `.http` and `.dns` are the "host:port" a test reaches it at."""

    @property
    def running(self) -> set[str]:
        """The names of the nodes that run and are not paused."""

    @property
    def is_disturbed(self) -> bool:
        """Whether anything was done to a node since the last `mend`."""

    def leader(self, timeout_seconds: float = LEADER_SECONDS) -> str:
        """The name of the running server that a majority of all servers follows."""

    def wait_ready(self, timeout_seconds: float = READY_SECONDS) -> None:
        """Until a leader is known and every running node reads, writes and answers DNS."""

    def kill(self, name: str) -> None:
        """End a node at once (SIGKILL)."""

    def stop(self, name: str) -> None:
        """End a node with SIGTERM: a client agent leaves the cluster, a server does not."""

    def pause(self, name: str) -> None:
        """Freeze a node: its connections stay open, and nothing answers."""

    def resume(self, name: str) -> None:
        """Let a paused node go on."""

    def start(self, name: str) -> None:
        """Start a node that does not run, with the data it had.  Does not wait."""

    def restart(self, name: str, *, graceful: bool = True) -> None:
        """`stop` (or `kill`) and `start`."""

    def partition(self, name: str) -> None:
        """Cut a node off from all other nodes.  In Docker tests cannot reach it either."""

    def heal(self, name: str) -> None:
        """End a node's partition; it has the address it had."""

    def add_agent(self, name: str, config: Mapping[str, Any] | None = None) -> Node:
        """A further client agent with configuration of its own, once it is ready."""

    def mend(self) -> None:
        """Bring back whatever does not run, is paused or cut off, and wait until all is ready."""


def tell(node: Node, method: str, path: str, body: str | None = None, *, token: str = "") -> str:
    """Have Consul do, for a test's own sake, what may be done twice; return the text of its 200.

    Asked again while no answer comes or a 5xx: on a busy machine the servers may elect a new
    leader at any time.  Raises TimeoutError when that lasts, RuntimeError for any other answer.
    """
    return _answered(node, method, path, body, token, (200,))[1]


def ask(node: Node, path: str, *, token: str = "") -> Any:
    """What Consul says in JSON to a GET, None for a 404; asked again and raises as `tell`."""
    status, text = _answered(node, "GET", path, None, token, (200, 404))
    return json.loads(text) if status == 200 else None


def keys(node: Node, prefix: str, *, token: str = "") -> list[str]:
    """Every key under *prefix* but the sentinel."""
    found = ask(node, f"/v1/kv/{prefix}/?keys", token=token) or []
    return [key for key in found if key != f"{prefix}/{SENTINEL}"]


def _answered(
    node: Node, method: str, path: str, body: str | None, token: str, accept: Sequence[int]
) -> tuple[int, str]:
    def exchange() -> tuple[int, str]:
        status, text = request(node, method, path, body, token=token)
        if status >= 500:
            raise NotReady(f"{method} {path}: {status} {text.strip()[:300]}")
        return status, text

    status, text = wait_until(exchange, TELL_SECONDS)
    if status not in accept:
        raise RuntimeError(f"{method} {path}: {status} {text.strip()[:300]}")
    return status, text


def join_again(cluster: Cluster, name: str) -> None:
    """Have another node look for *name* now: by itself gossip may take 30 s to try again."""
    address = cluster.nodes[name].rpc.rpartition(":")[0]
    for node in cluster.nodes.values():
        if node.name != name and node.name in cluster.running and node.serves_http:
            with contextlib.suppress(NotReady):
                request(node, "PUT", f"/v1/agent/join/{address}")
                return


# --- processes of this machine -------------------------------------------------------------------


class LocalTestCluster(LocalCluster):
    """A LocalCluster that can also cut a node off (Linux): a relay process joins the nodes."""

    def __init__(self, **options: Any) -> None:
        self.is_disturbed = False
        self._relay = NodeRelay() if sys.platform == "linux" else None
        self._cut_off: set[str] = set()
        super().__init__(**options)

    def close(self, *, keep_logs: bool = False) -> None:
        super().close(keep_logs=keep_logs)
        if self._relay is not None:
            self._relay.close()

    def _advertised(self, name: str, address: str, ports: Mapping[str, int]) -> str:
        if self._relay is None:
            return address
        return self._relay.add(name, address, self.folder / name, ports)

    def kill(self, name: str) -> None:
        self.is_disturbed = True
        super().kill(name)

    def stop(self, name: str) -> None:
        self.is_disturbed = True
        super().stop(name)

    def pause(self, name: str) -> None:
        self.is_disturbed = True
        super().pause(name)

    def partition(self, name: str) -> None:
        if self._relay is None:
            raise ClusterError("cutting off a local node needs Linux: use --cluster=docker")
        self.is_disturbed = True
        self._cut_off.add(name)
        self._relay.tell(f"cut {name}")

    def heal(self, name: str) -> None:
        if self._relay is not None and name in self._cut_off:
            self._cut_off.discard(name)
            self._relay.tell(f"heal {name}")
            join_again(self, name)

    def mend(self) -> None:
        for name in self.nodes:
            self.heal(name)
            if name in self._paused:
                self.resume(name)
                join_again(self, name)
            self.start(name)
        self.wait_ready()
        self.is_disturbed = False


class NodeRelay:
    """The process of `relay.py`, for nodes of one cluster; it ends with ours."""

    ADDRESSES_APART = 100  # 127.x.y.1 is reached at 127.x.y.101

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-S", str(Path(__file__).with_name("relay.py"))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,  # Ctrl-C in the terminal is for us, not for it
        )

    def add(self, name: str, address: str, folder: Path, ports: Mapping[str, int]) -> str:
        """Relay to the node at *address*, whose files are in *folder*; return where."""
        network, _, number = address.rpartition(".")
        relayed = f"{network}.{int(number) + self.ADDRESSES_APART}"
        server, serf = ports["server"], ports["serf_lan"]
        self.tell(f"node {name} {address} {relayed} {folder} {server},{serf} {serf}")
        return relayed

    def tell(self, command: str) -> None:
        """Have *command* carried out.  Raises ClusterError when the relay has ended."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(f"{command}\n")
        self._process.stdin.flush()
        if self._process.stdout.readline() != "done\n":
            raise ClusterError(f"the relay between the nodes ended at `{command}`")

    def close(self) -> None:
        """Idempotent."""
        self._process.kill()
        self._process.communicate()


# --- containers ----------------------------------------------------------------------------------


class DockerCluster:
    """The containers of one compose project, driven by the docker command."""

    _quorum = 2  # of the three servers the compose file names

    def __init__(self, project: str) -> None:
        self._project = project
        self._containers: dict[str, str] = {}
        self._nodes: dict[str, Node] = {}
        self._added: list[str] = []
        self._cut_off: set[str] = set()
        self.is_disturbed = False
        label = f"label=com.docker.compose.project={project}"
        ids = _docker("ps", "--all", "--quiet", "--filter", label).split()
        if not ids:
            raise ClusterError(f"the compose project {project} has no containers")
        for container in ids:
            self._take_in(container)

    def __repr__(self) -> str:
        return f"<DockerCluster {self._project}: {', '.join(sorted(self.running))}>"

    def close(self) -> None:
        """Remove the agents added to the project; the rest is compose's to remove."""
        for container in self._added:
            _docker("rm", "--force", "--volumes", container)
        self._added.clear()

    @property
    def nodes(self) -> Mapping[str, Node]:
        return self._nodes

    @property
    def running(self) -> set[str]:
        return {name for name, state in self._states().items() if state == "running"}

    def leader(self, timeout_seconds: float = LEADER_SECONDS) -> str:
        def find() -> str:
            reachable = self._reachable()
            name = agreed_leader([node for node in reachable if node.is_server], self._quorum)
            if name not in {node.name for node in reachable}:
                raise NotReady(f"{name} is still followed, but does not run")
            return name

        return self._wait(find, timeout_seconds)

    def wait_ready(self, timeout_seconds: float = READY_SECONDS) -> None:
        def check() -> None:
            reachable = self._reachable()
            agreed_leader([node for node in reachable if node.is_server], self._quorum)
            check_ready(reachable)

        self._wait(check, timeout_seconds)

    def kill(self, name: str) -> None:
        self.is_disturbed = True
        if self._states()[name] in ("running", "paused"):
            _docker("kill", "--signal=KILL", self._containers[name])

    def stop(self, name: str) -> None:
        self.is_disturbed = True
        self.resume(name)
        _docker("stop", self._containers[name])

    def pause(self, name: str) -> None:
        self.is_disturbed = True
        _docker("pause", self._containers[name])

    def resume(self, name: str) -> None:
        if self._states()[name] == "paused":
            _docker("unpause", self._containers[name])

    def start(self, name: str) -> None:
        _docker("start", self._containers[name])

    def restart(self, name: str, *, graceful: bool = True) -> None:
        if graceful:
            self.stop(name)
        else:
            self.kill(name)
        self.start(name)

    def partition(self, name: str) -> None:
        self.is_disturbed = True
        if name not in self._cut_off:
            _docker("network", "disconnect", self._network, self._containers[name])
            self._cut_off.add(name)

    def heal(self, name: str) -> None:
        if name in self._cut_off:
            address = self._nodes[name].rpc.rpartition(":")[0]
            container = self._containers[name]
            _docker("network", "connect", "--ip", address, self._network, container)
            self._cut_off.discard(name)
            join_again(self, name)

    def add_agent(self, name: str, config: Mapping[str, Any] | None = None) -> Node:
        if name in self._nodes:
            raise ValueError(f"there is a node named {name!r} already")
        (like,) = json.loads(_docker("inspect", self._containers["agent1"]))
        command = [*like["Config"]["Entrypoint"][1:], *like["Config"]["Cmd"]]
        http_port, dns_port = free_ports(2)
        options = [
            f"--name={self._project}-{name}",
            f"--hostname={name}",
            f"--network={self._network}",
            f"--entrypoint={like['Config']['Entrypoint'][0]}",
            f"--publish=127.0.0.1:{http_port}:8500",
            f"--publish=127.0.0.1:{dns_port}:8600/tcp",
            f"--publish=127.0.0.1:{dns_port}:8600/udp",
        ]
        own = [f"-hcl={json.dumps(config)}"] if config else []
        image = like["Config"]["Image"]
        container = _docker("run", "--detach", *options, image, *command, *own).strip()
        self._added.append(container)
        ports = (config or {}).get("ports", {})
        self._take_in(container, serves_http=ports.get("http", 1) > 0)
        self.wait_ready()
        return self._nodes[name]

    def mend(self) -> None:
        for name, state in self._states().items():
            self.heal(name)
            if state == "paused":
                self.resume(name)
                join_again(self, name)
            elif state != "running":
                self.start(name)
        self.wait_ready()
        self.is_disturbed = False

    def _take_in(self, container: str, *, serves_http: bool = True) -> None:
        (details,) = json.loads(_docker("inspect", container))
        name = details["Config"]["Hostname"]
        ((self._network, network),) = details["NetworkSettings"]["Networks"].items()
        published = details["NetworkSettings"]["Ports"]
        self._containers[name] = container
        self._nodes[name] = Node(
            name=name,
            is_server="-server" in details["Config"]["Cmd"],
            http=_endpoint(published["8500/tcp"]),
            dns=_endpoint(published["8600/udp"]),
            rpc=f"{network['IPAddress']}:8300",
            serves_http=serves_http,
        )

    def _reachable(self) -> list[Node]:
        names = self.running - self._cut_off
        return [node for node in self._nodes.values() if node.name in names]

    def _states(self) -> dict[str, str]:
        details = json.loads(_docker("inspect", *self._containers.values()))
        return {each["Config"]["Hostname"]: each["State"]["Status"] for each in details}

    def _wait(self, check: Callable[[], T], timeout_seconds: float) -> T:
        try:
            return wait_until(check, timeout_seconds)
        except TimeoutError as error:
            raise ClusterError(f"{error}; logs: {self._logs()}") from error

    def _logs(self) -> str:
        return "\n".join(
            f"--- {name}\n{_docker('logs', '--tail', '5', container)}"
            for name, container in self._containers.items()
        )


def _endpoint(published: list[dict[str, str]]) -> str:
    return f"{published[0]['HostIp']}:{published[0]['HostPort']}"


def free_ports(count: int) -> list[int]:
    """Ports of 127.0.0.1 that are free for TCP and UDP both, as DNS needs them.

    Below those that the system itself gives to connections (Linux: from 32768), so that none takes
    one while its owner, such as a killed container, does not hold it.
    """
    with contextlib.ExitStack() as open_until_all_are_chosen:
        ports: list[int] = []
        while len(ports) < count:
            port = random.randint(20_000, 32_000)
            with contextlib.suppress(OSError):  # taken for either: another one
                for kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM):
                    opened = socket.socket(socket.AF_INET, kind)
                    open_until_all_are_chosen.enter_context(opened)
                    opened.bind(("127.0.0.1", port))
                ports.append(port)
    return ports


def compose_command() -> str | None:
    """`docker compose` or `docker-compose`, where a Docker engine answers; else None."""
    try:
        _docker("version", "--format", "{{.Server.Version}}")
    except ClusterError:
        return None
    for command in (["docker", "compose"], ["docker-compose"]):
        with contextlib.suppress(ClusterError):
            _run([*command, "version"])
            return " ".join(command)
    return None


def _docker(*words: str) -> str:
    return _run(["docker", *words])


def _run(command: list[str]) -> str:
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=DOCKER_SECONDS,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ClusterError(f"`{' '.join(command[:3])}` cannot be run: {error}") from error
    if done.returncode != 0:
        raise ClusterError(f"`{' '.join(command)}` failed: {done.stderr.strip()}")
    return done.stdout


@contextlib.contextmanager
def cluster_of_the_run(request: pytest.FixtureRequest, servers: int = 3) -> Iterator[Cluster]:
    """Local processes, for all tests of a worker; their logs are kept if one failed."""
    try:
        made = LocalTestCluster(servers=servers, config=SHORT_LEASES)
        made.__enter__()
    except ConsulNotFound as error:
        pytest.fail(str(error))
    yield made
    made.close(keep_logs=request.session.testsfailed > 0)
