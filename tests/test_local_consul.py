"""Finding a Consul program, and laying out a local cluster, without network or real programs."""

import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest

from consul_matchmaker.testing import consul_binary, local_consul
from consul_matchmaker.testing.consul_binary import (
    ConsulNotFound,
    apt_options,
    consul_version,
    debian_mirrors,
    find_consul,
)
from consul_matchmaker.testing.consul_probe import Node, NotReady, agreed_leader, wait_until
from consul_matchmaker.testing.local_consul import LocalCluster, merged

pytestmark = pytest.mark.system

MakeProgram = Callable[..., Path]


@pytest.fixture
def make_program(tmp_path: Path) -> MakeProgram:
    """Put a small Python program named *name* on the PATH of this test."""

    def make(name: str, code: str, folder: str = "bin") -> Path:
        program = tmp_path / folder / name
        program.parent.mkdir(parents=True, exist_ok=True)
        program.write_text(f"#!{sys.executable} -IS\nimport sys\n{code}\n", encoding="utf-8")
        program.chmod(0o755)
        return program

    return make


@pytest.fixture
def environ(tmp_path: Path) -> dict[str, str]:
    """A machine with nothing on PATH and an empty cache."""
    return {"PATH": str(tmp_path / "bin"), "XDG_CACHE_HOME": str(tmp_path / "cache")}


FAKE_CONSUL = "print('Consul v1.22.3')"


class TestFinding:
    def test_the_one_asked_for_wins(self, make_program, environ) -> None:
        """CONSUL_BIN is taken, whatever is on PATH."""
        make_program("consul", FAKE_CONSUL)
        chosen = make_program("my-consul", FAKE_CONSUL, folder="elsewhere")
        assert find_consul({**environ, "CONSUL_BIN": str(chosen)}) == chosen

    @pytest.mark.parametrize("code", ["print('hello')", "sys.exit(1)"])
    def test_an_unusable_one_asked_for_is_an_error(self, make_program, environ, code) -> None:
        """A wrong CONSUL_BIN is not replaced silently by what is on PATH."""
        make_program("consul", FAKE_CONSUL)
        broken = make_program("broken", code, folder="elsewhere")
        with pytest.raises(ConsulNotFound, match=r"CONSUL_BIN is set, but .*correct or unset it"):
            find_consul({**environ, "CONSUL_BIN": str(broken)})

    def test_a_missing_one_asked_for_is_an_error(self, environ) -> None:
        """So is a CONSUL_BIN that names no file."""
        with pytest.raises(ConsulNotFound, match="cannot be run"):
            find_consul({**environ, "CONSUL_BIN": "/nowhere/consul"})

    def test_path_comes_next(self, make_program, environ) -> None:
        """Without CONSUL_BIN, `consul` on PATH is taken."""
        program = make_program("consul", FAKE_CONSUL)
        assert find_consul(environ) == program

    def test_what_was_fetched_before_is_kept(self, make_program, environ) -> None:
        """A package unpacked earlier is found in the cache, with no apt and no Docker."""
        fetched = make_program(
            "consul", FAKE_CONSUL, folder="cache/consul-matchmaker/debian-bullseye"
        )
        assert find_consul(environ) == fetched

    def test_docker_gives_its_program(self, make_program, environ) -> None:
        """The program is copied out of the image into the cache, and the container removed."""
        program = make_program("inside", FAKE_CONSUL, folder="image")
        log = program.with_name("log")
        make_program(
            "docker",
            f"import shutil; open({str(log)!r}, 'a').write(' '.join(sys.argv[1:]) + '\\n')\n"
            "verb = sys.argv[1]\n"
            "if verb == 'create': print('container-1')\n"
            f"if verb == 'cp': shutil.copy({str(program)!r}, sys.argv[-1])",
        )
        found = find_consul({**environ, "CONSUL_IMAGE": "registry/consul:1"})
        assert found == Path(environ["XDG_CACHE_HOME"], "consul-matchmaker").joinpath(
            "image-registry_consul_1", "consul"
        )
        assert consul_version(found) == (1, 22, 3)
        assert log.read_text().splitlines()[-1] == "rm --force container-1"

    def test_docker_without_an_engine_is_passed_over(self, make_program, environ) -> None:
        """A docker command whose engine does not answer is one more reason, not an error."""
        make_program("docker", "sys.exit(1)")
        with pytest.raises(ConsulNotFound, match="no Docker engine answers"):
            find_consul(environ)

    def test_nothing_found_names_the_remedies(self, environ) -> None:
        """The error says what was tried and what to do."""
        with pytest.raises(ConsulNotFound, match=r"PATH has no `consul`.*set CONSUL_BIN"):
            find_consul(environ)

    def test_the_package_comes_from_the_machines_own_mirror(
        self, make_program, environ, tmp_path, monkeypatch
    ) -> None:
        """apt works in a folder of ours, on the mirror its sources name; nothing is installed."""
        keyring = tmp_path / "keyring.gpg"
        keyring.touch()
        monkeypatch.setattr(consul_binary, "DEBIAN_KEYRINGS", (keyring,))
        log = tmp_path / "apt.json"
        make_program(
            "apt-get",
            "import json, pathlib\n"
            "if sys.argv[1] == 'indextargets':\n"
            "    print('main http://mirror.invalid/debian-security/')\n"
            "    print('main http://mirror.invalid/debian/')\n"
            "elif sys.argv[-1] == 'consul':\n"
            "    source = pathlib.Path('sources.list').read_text()\n"
            f"    open({str(log)!r}, 'w').write(json.dumps([source, sys.argv]))\n"
            "    open('consul_1.8.7_amd64.deb', 'w')",
        )
        make_program(
            "dpkg-deb",
            "import os\n"
            "folder = sys.argv[-1] + '/usr/bin'\n"
            "os.makedirs(folder)\n"
            f"text = '#!{sys.executable} -IS\\nprint(\"Consul v1.8.7\")\\n'\n"
            "open(folder + '/consul', 'w').write(text)\n"
            "os.chmod(folder + '/consul', 0o755)",
        )
        found = find_consul(environ)
        assert consul_version(found) == (1, 8, 7)
        source, arguments = json.loads(log.read_text())
        assert source == f"deb [signed-by={keyring}] http://mirror.invalid/debian/ bullseye main\n"
        assert arguments[-2:] == ["download", "consul"]
        assert [path.name for path in found.parent.iterdir()] == ["consul"]  # no scratch left


def test_one_default_image() -> None:
    """The compose file and the finder mean the same image."""
    compose_file = Path(__file__).parent.parent / "docker-compose.yml"
    assert f"${{CONSUL_IMAGE:-{consul_binary.DEFAULT_IMAGE}}}" in compose_file.read_text()


def test_mirrors_are_asked_likeliest_first() -> None:
    """Security and foreign components are left out; a folder named debian goes first."""
    listing = "main http://b/vendor/\nmain http://a/debian/\nmain http://a/debian/\n"
    listing += "contrib http://c/debian/\nmain http://a/debian-security/\n"
    assert debian_mirrors(listing) == ["http://a/debian/", "http://b/vendor/"]


def test_apt_touches_only_its_folder(tmp_path) -> None:
    """Lists, cache and sources are all redirected."""
    options = apt_options(tmp_path)
    for name in ("Dir::Etc::SourceList", "Dir::State::Lists", "Dir::Cache"):
        assert any(option.startswith(f"{name}={tmp_path}/") for option in options)


CLOSED = {"agent1": {"ports": {"http": -1}}}


@pytest.fixture
def kept_logs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The logs a cluster leaves behind when it fails go where pytest cleans up."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))


@pytest.mark.usefixtures("kept_logs")
class TestCluster:
    def test_configuration_is_merged_inwards(self) -> None:
        """A node's own port leaves the other ports as they are."""
        base = {"ports": {"http": 8500, "dns": 8600}, "server": True}
        extra = {"ports": {"http": -1}, "session_ttl_min": "1s"}
        assert merged(base, extra) == {
            "ports": {"http": -1, "dns": 8600},
            "server": True,
            "session_ttl_min": "1s",
        }
        assert base["ports"] == {"http": 8500, "dns": 8600}

    def test_a_node_that_ends_by_itself_is_shown_at_once(self, make_program, caplog) -> None:
        """A configuration Consul refuses is an error with the end of its log, not a timeout."""
        program = make_program(
            "consul",
            "print('Consul v1.8.7' if sys.argv[1] == 'version' else 'bad config: nonsense')",
        )
        with (
            pytest.raises(local_consul.ClusterError, match=r"ended by itself.*\n.*bad config"),
            LocalCluster(program=program),
        ):
            pass
        assert "logs of the local Consul cluster are kept" in caplog.text

    def test_each_node_has_an_address_of_its_own(self, make_program, tmp_path) -> None:
        """The command names one file; in it are the node's address and the servers to join."""
        program = make_program(
            "consul",
            "if sys.argv[1] == 'version': sys.exit(print('Consul v1.22.0'))\n"
            "import json, signal; path = sys.argv[2].removeprefix('-config-file=')\n"
            "if 'server1' not in path: signal.pause()\n"  # one node ends, whatever the scheduler
            "print(sys.argv[1], json.dumps(json.load(open(path))))",
        )
        cluster = LocalCluster(servers=2, clients=1, program=program, node_config=CLOSED)
        with pytest.raises(local_consul.ClusterError) as caught:
            cluster.__enter__()
        nodes = cluster.nodes
        assert list(nodes) == ["server1", "server2", "agent1"]
        assert len({node.dns for node in nodes.values()}) == 3
        assert [node.serves_http for node in nodes.values()] == [True, True, False]
        assert "agent {" in str(caught.value)
        printed = json.loads(str(caught.value).partition("agent ")[2])
        assert len(printed["retry_join"]) == 2
        assert printed["ports"]["grpc_tls"] == -1  # known to 1.22, refused by 1.8


class TestLeader:
    servers = (
        Node("server1", True, "127.0.0.1:1", "127.0.0.1:2", rpc="10.0.0.1:8300"),
        Node("server2", True, "127.0.0.1:1", "127.0.0.1:2", rpc="10.0.0.2:8300"),
    )

    def test_a_majority_decides(self, monkeypatch) -> None:
        """Two servers that name the same one have a leader; one that names itself has none."""
        named = {"server1": "10.0.0.2:8300", "server2": "10.0.0.2:8300"}
        monkeypatch.setattr(
            "consul_matchmaker.testing.consul_probe.read_json", lambda node, path: named[node.name]
        )
        assert agreed_leader(self.servers, 2) == "server2"
        named["server1"] = "10.0.0.1:8300"
        with pytest.raises(NotReady, match="no leader is agreed on"):
            agreed_leader(self.servers, 2)

    def test_waiting_ends_with_the_reason(self) -> None:
        """At the deadline the last reason is in the error."""

        def never() -> None:
            raise NotReady("the moon is no cheese")

        with pytest.raises(TimeoutError, match="the moon is no cheese"):
            wait_until(never, 0)
