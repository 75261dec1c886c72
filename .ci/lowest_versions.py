"""Install the lowest version of each package that pyproject.toml declares the package needs, and
extras of it, whose names are the arguments."""

import importlib.metadata
import re
import subprocess
import sys

needed = [line for line in importlib.metadata.requires("consul-matchmaker") or [] if line]
pins = sorted(
    {
        line.partition(";")[0].strip().replace(">=", "==")
        for line in needed
        if "extra ==" not in line or re.search(rf"extra == .({'|'.join(sys.argv[1:])})\b", line)
    }
)
print("lowest:", *pins, flush=True)
subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", *pins], check=True)
