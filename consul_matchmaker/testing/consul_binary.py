"""Find a Consul program that this machine can run; fetch one into the user's cache if needed.

`find_consul()` tries, in this order: `$CONSUL_BIN`, `consul` on PATH, a Docker image
(`$CONSUL_IMAGE`, else hashicorp/consul) and, on Debian-like machines, the distribution's package,
which is verified and unpacked but never installed.  `python -m
consul_matchmaker.testing.consul_binary` prints the path.
"""

import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from ..errors import MatchmakerError

DEFAULT_IMAGE = "hashicorp/consul:1.22"
DEBIAN_SUITE = "bullseye"  # the last Debian release that carries Consul
DEBIAN_KEYRINGS = (
    Path("/usr/share/keyrings/debian-archive-keyring.gpg"),
    Path("/usr/share/keyrings/debian-archive-keyring.pgp"),
)
PATHS_IN_IMAGES = ("/bin/consul", "/usr/local/bin/consul", "/usr/bin/consul")

VERSION_SECONDS = 20  # a cold start of a 100 MB program on a busy machine
DOCKER_SECONDS = 10  # an engine that does not answer by then is taken as absent
PULL_SECONDS = 90
COPY_SECONDS = 60
APT_SECONDS = 180

REMEDIES = (
    "set CONSUL_BIN to a consul program, or put one on PATH, "
    "or start a Docker engine that has or can pull the image named by CONSUL_IMAGE"
)


class ConsulNotFound(MatchmakerError):
    """No Consul program could be found or fetched; the message names every way tried."""


class _NotHere(Exception):
    """Why one way of finding Consul failed."""


def find_consul(environ: Mapping[str, str] | None = None) -> Path:
    """The path of a Consul program that was seen to run.

    Fetching one takes up to a few minutes the first time; afterwards it comes from the cache.
    Raises ConsulNotFound, also when `$CONSUL_BIN` is set but unusable: an explicit choice is never
    replaced silently.
    """
    environ = os.environ if environ is None else environ
    if chosen := environ.get("CONSUL_BIN"):
        try:
            return _verified(Path(chosen))
        except _NotHere as reason:
            raise ConsulNotFound(
                f"CONSUL_BIN is set, but {reason}: correct or unset it"
            ) from reason

    # An image named explicitly goes before a package fetched earlier; the default one does not,
    # or every call on a machine without a registry would wait for a pull to fail.
    ways = [_from_path, _from_docker_cache, _from_debian_cache, _from_docker, _from_debian]
    if environ.get("CONSUL_IMAGE"):
        ways = [_from_path, _from_docker_cache, _from_docker, _from_debian_cache, _from_debian]
    reasons = []
    for way in ways:
        try:
            return way(environ)
        except _NotHere as reason:
            reasons.append(str(reason))
    tried = "; ".join(filter(None, reasons))
    raise ConsulNotFound(f"no Consul program found ({tried}): {REMEDIES}")


def consul_version(program: Path) -> tuple[int, ...]:
    """The version *program* prints, as numbers: (1, 8, 7).  Raises ConsulNotFound."""
    try:
        return _version(program)
    except _NotHere as reason:
        raise ConsulNotFound(f"{reason}: {REMEDIES}") from reason


def _version(program: Path) -> tuple[int, ...]:
    printed = _run([str(program), "version"], VERSION_SECONDS)
    match = re.match(r"Consul v(\d+)\.(\d+)\.(\d+)", printed)
    if match is None:
        raise _NotHere(f"`{program} version` does not print a Consul version")
    return tuple(int(number) for number in match.groups())


def _verified(program: Path) -> Path:
    _version(program)
    return program.absolute()


def _from_path(environ: Mapping[str, str]) -> Path:
    found = shutil.which("consul", path=environ.get("PATH"))
    if found is None:
        raise _NotHere("PATH has no `consul`")
    return _verified(Path(found))


# --- the cache -----------------------------------------------------------------------------------


def _cached(environ: Mapping[str, str], source: str) -> Path:
    """Where the program out of *source* is kept: in the user's cache folder, by the XDG rules."""
    home = Path(environ["HOME"]) if environ.get("HOME") else Path.home()
    root = Path(environ.get("XDG_CACHE_HOME") or home / ".cache")
    return root / "consul-matchmaker" / source / "consul"


def _from_cache(program: Path) -> Path:
    if not program.exists():
        raise _NotHere("")
    return _verified(program)


def _scratch(target: Path) -> "tempfile.TemporaryDirectory[str]":
    """A scratch folder on the file system of *target*, so that a file can be renamed to it."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        return tempfile.TemporaryDirectory(prefix="fetch-", dir=target.parent)
    except OSError as error:
        raise _NotHere(f"cannot write to {target.parent} ({error.strerror})") from error


def _keep(program: Path, target: Path) -> Path:
    """Move *program*, if it runs, to *target* in one step: others may fetch it at the same time."""
    return _verified(program).replace(target)


# --- out of a Docker image -----------------------------------------------------------------------


def _image(environ: Mapping[str, str]) -> str:
    return environ.get("CONSUL_IMAGE") or DEFAULT_IMAGE


def _docker_cached(environ: Mapping[str, str]) -> Path:
    return _cached(environ, "image-" + re.sub(r"[^A-Za-z0-9_.-]+", "_", _image(environ)))


def _from_docker_cache(environ: Mapping[str, str]) -> Path:
    return _from_cache(_docker_cached(environ))


def _from_docker(environ: Mapping[str, str]) -> Path:
    image = _image(environ)
    if shutil.which("docker", path=environ.get("PATH")) is None:
        raise _NotHere("PATH has no `docker`")

    def docker(*words: str, timeout_seconds: float = DOCKER_SECONDS) -> str:
        return _run(["docker", *words], timeout_seconds, environ)

    try:
        docker("version", "--format", "{{.Server.Version}}")
    except _NotHere as reason:
        raise _NotHere("no Docker engine answers") from reason
    try:
        docker("image", "inspect", image)
    except _NotHere:
        docker("pull", "--quiet", image, timeout_seconds=PULL_SECONDS)

    target = _docker_cached(environ)
    last_reason = _NotHere("")
    # A command is named so that an image without one can be created too; it never runs.
    container = docker("create", image, "consul").strip()
    try:
        with _scratch(target) as scratch:
            for inside in PATHS_IN_IMAGES:
                copy = f"{scratch}/consul"
                try:
                    docker("cp", "-L", f"{container}:{inside}", copy, timeout_seconds=COPY_SECONDS)
                    return _keep(Path(copy), target)
                except _NotHere as reason:
                    last_reason = reason
        raise last_reason
    finally:
        docker("rm", "--force", container)


# --- out of Debian's package ---------------------------------------------------------------------


def _debian_cached(environ: Mapping[str, str]) -> Path:
    return _cached(environ, f"debian-{DEBIAN_SUITE}")


def _from_debian_cache(environ: Mapping[str, str]) -> Path:
    return _from_cache(_debian_cached(environ))


def _from_debian(environ: Mapping[str, str]) -> Path:
    path = environ.get("PATH")
    if any(shutil.which(tool, path=path) is None for tool in ("apt-get", "dpkg-deb")):
        raise _NotHere("this is not a Debian-like machine with apt")
    keyring = next(filter(Path.exists, DEBIAN_KEYRINGS), None)
    if keyring is None:
        raise _NotHere("the Debian archive keyring is not installed (debian-archive-keyring)")
    listing = ["apt-get", "indextargets", "--format", "$(COMPONENT) $(REPO_URI)"]
    last_reason = _NotHere("apt's sources name no Debian mirror")
    for mirror in debian_mirrors(_run(listing, APT_SECONDS, environ)):
        try:
            return _fetch_package(mirror, keyring, environ)
        except _NotHere as reason:
            last_reason = reason
    raise last_reason


def debian_mirrors(index_targets: str) -> list[str]:
    """The mirrors worth asking, out of lines `component uri`: no duplicates, likeliest first."""
    uris = []
    for line in index_targets.splitlines():
        component, _, uri = line.strip().partition(" ")
        if component == "main" and uri and "security" not in uri and uri not in uris:
            uris.append(uri)
    # A mirror keeps the distribution in a folder of its name; a vendor's own repository does not.
    return sorted(uris, key=lambda uri: not uri.rstrip("/").endswith("/debian"))


def _fetch_package(mirror: str, keyring: Path, environ: Mapping[str, str]) -> Path:
    target = _debian_cached(environ)
    with _scratch(target) as scratch:
        folder = Path(scratch)
        for name in ("lists/partial", "cache/archives/partial"):
            (folder / name).mkdir(parents=True)
        source = f"deb [signed-by={keyring}] {mirror} {DEBIAN_SUITE} main\n"
        (folder / "sources.list").write_text(source, encoding="utf-8")
        apt = ["apt-get", "-q", *apt_options(folder)]
        # Error-Mode=any: a mirror without the suite is an error, not a warning over empty lists.
        _run([*apt, "-o", "APT::Update::Error-Mode=any", "update"], APT_SECONDS, environ, folder)
        _run([*apt, "download", "consul"], APT_SECONDS, environ, folder)
        package = next(folder.glob("consul_*.deb"))
        _run(["dpkg-deb", "-x", str(package), str(folder / "unpacked")], APT_SECONDS, environ)
        return _keep(folder / "unpacked" / "usr" / "bin" / "consul", target)


def apt_options(folder: Path) -> list[str]:
    """Options that make apt-get work inside *folder* only, and leave the machine's state alone."""
    options = {
        "Dir::Etc::SourceList": f"{folder}/sources.list",
        "Dir::Etc::SourceParts": "/dev/null",
        "Dir::State::Lists": f"{folder}/lists",
        "Dir::Cache": f"{folder}/cache",
        "Acquire::Languages": "none",
        "Acquire::Retries": "2",
        "Acquire::http::Timeout": "20",
        "Acquire::https::Timeout": "20",
        # As root, apt would drop to a user who cannot read our private folder.
        "APT::Sandbox::User": "root",
    }
    return [word for key, value in options.items() for word in ("-o", f"{key}={value}")]


# --- running programs ----------------------------------------------------------------------------


def _run(
    command: Sequence[str],
    timeout_seconds: float,
    environ: Mapping[str, str] | None = None,
    cwd: Path | None = None,
) -> str:
    """What *command* prints.  Raises _NotHere when it fails in whatever way."""
    words = [word for word in command[1:] if not word.startswith("-") and "=" not in word]
    shown = " ".join([command[0], *words[:3]])  # enough to know what failed
    try:
        done = subprocess.run(
            command,
            cwd=cwd,
            env=environ,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=timeout_seconds,
            check=False,
            text=True,
            errors="replace",
        )
    except subprocess.TimeoutExpired as error:
        raise _NotHere(f"`{shown}` took over {timeout_seconds:.0f} s") from error
    except OSError as error:
        raise _NotHere(f"`{shown}` cannot be run ({error.strerror})") from error
    if done.returncode != 0:
        said = (done.stderr.strip() or done.stdout.strip()).splitlines()
        why = f" ({said[-1]})" if said else ""
        raise _NotHere(f"`{shown}` exits {done.returncode}{why}")
    return done.stdout


if __name__ == "__main__":
    try:
        print(find_consul())
    except ConsulNotFound as error:
        sys.exit(str(error))
