"""Run a command in a copy of this project that lacks the package: FOLDER COMMAND...

What is imported there is what is installed.
"""

import shutil
import subprocess
import sys
from pathlib import Path

PACKAGE = "consul_matchmaker"
HERE = Path(__file__).resolve().parent.parent

folder = Path(sys.argv[1])
shutil.rmtree(folder, ignore_errors=True)
left = shutil.ignore_patterns(
    PACKAGE, "*.egg-info", ".git", ".tox", ".venv", "build", "__pycache__"
)
shutil.copytree(HERE, folder, ignore=left)
where = f"import pathlib, {PACKAGE} as p; print(pathlib.Path(p.__file__).resolve())"
command = [sys.executable, "-c", where]
found = subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True).stdout
if "site-packages" not in found:
    sys.exit(f"{PACKAGE} is imported from {found}")
print(f"with {found}", end="", flush=True)
program = Path(sys.executable).parent / sys.argv[2]
sys.exit(subprocess.run([program, *sys.argv[3:]], cwd=folder).returncode)
