"""Build the source distribution, unpack it elsewhere, and run its own tests on it, installed.

`tox -e sdist`.  The tests run as whoever unpacked it would run them: in a new environment, with
nothing but what the extra `test` brings.
"""

from __future__ import annotations

import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent


def run(*command: str | Path, at: Path) -> None:
    print("$", *command, flush=True)
    subprocess.run(command, cwd=at, check=True)


def main(folder: Path) -> None:
    run(sys.executable, "-m", "build", "--sdist", "--outdir", folder, ROOT, at=folder)
    (archive,) = folder.glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        tar.extractall(folder, filter="data")
    source = folder / archive.name.removesuffix(".tar.gz")
    run(sys.executable, "-m", "venv", folder / "venv", at=folder)
    python = folder / "venv" / "bin" / "python"
    run(python, "-m", "pip", "install", "--quiet", ".[test]", at=source)
    run(python, "-m", "pytest", "tests", *sys.argv[1:], at=source)
    # Of the others only that nothing they import is missing: they need a Consul.
    run(python, "-m", "pytest", "integration", "--ignore=integration/oslo", "--collect-only", "-q",
        at=source)  # fmt: skip


if __name__ == "__main__":
    with tempfile.TemporaryDirectory(prefix="consul-matchmaker-sdist.") as name:
        main(Path(name))
