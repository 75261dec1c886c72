"""Build a Docker image from a Consul program of this machine, for where no registry is reachable.

Usage: python integration/build_image.py [NAME]; then run with CONSUL_IMAGE=NAME.
"""

import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from consul_matchmaker.testing.consul_binary import find_consul

DEFAULT_NAME = "consul-matchmaker/consul:local"
DOCKERFILE = Path(__file__).parent / "image" / "Dockerfile"


def linked_files(ldd_output: str) -> list[Path]:
    """The libraries, and the loader, that `ldd` names; none for a static program."""
    return [Path(path) for path in re.findall(r"(?:=>\s+|^\s+)(/\S+)", ldd_output, re.MULTILINE)]


def lay_out(program: Path, root: Path) -> None:
    """Copy *program* and what it is linked to into *root*, each to where it will be looked for."""
    # `ldd` fails for a static program, which needs nothing.
    ldd = subprocess.run(["ldd", str(program)], capture_output=True, text=True, check=False)
    for library in linked_files(ldd.stdout):
        target = root / library.relative_to("/")
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(library, target)  # follows links: the file itself, under the name asked for
    for folder in ("bin", "tmp", "consul/data"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    shutil.copy(program, root / "bin" / "consul")


def build(name: str = DEFAULT_NAME) -> None:
    """Build the image and see it print its version.  Raises ConsulNotFound, CalledProcessError."""
    with tempfile.TemporaryDirectory(prefix="consul-image-") as scratch:
        lay_out(find_consul(), Path(scratch) / "root")
        shutil.copy(DOCKERFILE, scratch)
        subprocess.run(["docker", "build", "--quiet", "--tag", name, scratch], check=True)
    subprocess.run(["docker", "run", "--rm", "--network=none", name, "version"], check=True)


if __name__ == "__main__":
    build(*sys.argv[1:2])
