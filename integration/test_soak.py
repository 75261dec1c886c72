"""The soak finds what is planted in a run of its own: one that cannot fail would prove nothing."""

import re
import subprocess
import sys

import pytest

PLANTED = {
    "phantom": "a host that nobody ever served",
    "silent": "a registration is lost",
    "understate": "an age understates",
    "orphan": "no orphan",
    "traceback": "an unexpected error is logged",
}
"""What is planted, and the promise that it breaks.  Growth takes longer than this run."""
SOAK_SECONDS = 300.0


@pytest.mark.long
def test_everything_planted_is_reported(cluster_kind: str) -> None:
    """Each planted fault is a violation of its promise, with the events around it, and exit 1."""
    command = [sys.executable, "-m", "integration.soak", "--seed", "3", "--minutes", "0.8"]
    command += ["--cluster", cluster_kind]
    for name in PLANTED:
        command += ["--plant", name]
    done = subprocess.run(command, capture_output=True, text=True, timeout=SOAK_SECONDS)
    assert done.returncode == 1, done.stdout + done.stderr
    found = set(re.findall(r"^VIOLATION at \S+: ([^:]+):", done.stdout, re.MULTILINE))
    counted = set(re.findall(r"^  ([^:\n]+): \d+$", done.stdout, re.MULTILINE))
    assert set(PLANTED.values()) <= counted, done.stdout
    assert found
    assert re.search(r"^ +\d+\.\d+  (kill|start|suspend) m\d\d ", done.stdout, re.MULTILINE)
