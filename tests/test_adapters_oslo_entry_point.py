"""Which driver a transport URL gets, and what it says where oslo.messaging is of another release.

Releases are small folders here: as much of each as the way to the driver asks for.  What the real
8.1.4 does is in `integration/oslo`.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from consul_matchmaker.adapters.oslo.entry_point import driver
from consul_matchmaker.errors import ConfigurationError

TOKEN = "7d1f93ce-a85b-4e0d-bc6f-3be9d4ca5b7f"

OSLO_CONFIG = """
class Opt:
    def __init__(self, name, **words):
        self.name = name
BoolOpt = FloatOpt = IntOpt = ListOpt = StrOpt = Opt
"""
ZMQ_DRIVER = """
class ZmqDriver:
    def __init__(self, *given, **named):
        self.given = given, named
    def send(self, target, ctxt, message):
        pass
    def send_notification(self, target, ctxt, message, version):
        pass
"""
RELEASES = {
    "none": {},
    "8.1.4": {
        "oslo_config/__init__.py": "",
        "oslo_config/cfg.py": OSLO_CONFIG,
        "oslo_messaging/__init__.py": "",
        "oslo_messaging/_drivers/__init__.py": "",
        "oslo_messaging/_drivers/impl_zmq.py": ZMQ_DRIVER,
    },
    "14": {
        "oslo_config/__init__.py": "",
        "oslo_config/cfg.py": OSLO_CONFIG,
        "oslo_messaging/__init__.py": "class TransportOptions: pass",
        "oslo_messaging/_drivers/__init__.py": "",
    },
}
PROGRAM = """
import sys, types
if {is_missing}:
    sys.modules["oslo_config"] = sys.modules["oslo_messaging"] = None
class HttpDriver:
    def __init__(self, *given, **named):
        self.given = given, named
http = "consul_matchmaker.adapters.oslo.http.driver"
sys.modules[http] = types.SimpleNamespace(HttpDriver=HttpDriver)

from consul_matchmaker.adapters.oslo.entry_point import driver
conf = types.SimpleNamespace(register_opts=lambda *options, **words: None)
url = types.SimpleNamespace(transport={transport!r}, query={{}})
named = dict(default_exchange="exchange", allowed_remote_exmods=["module"])
made = driver(conf, url, **named)
assert made.given == ((conf, url), named)
print(type(made).__name__)
"""


def run(folder: Path, release: str, transport: str) -> tuple[str, str]:
    """What was made, and the last line of what was said, with *release* installed."""
    for name, text in RELEASES[release].items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM.format(transport=transport, is_missing=release == "none")],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(folder), *sys.path])},
    )
    return done.stdout.strip(), (done.stderr.splitlines() or [""])[-1]


@pytest.mark.system
@pytest.mark.parametrize(
    ("release", "transport", "made"),
    [("8.1.4", "consul+zmq", "ConsulDriver"), ("14", "consul+http", "HttpDriver")],
)
def test_the_scheme_chooses_the_driver(
    tmp_path: Path, release: str, transport: str, made: str
) -> None:
    """It gets all that oslo.messaging hands to a driver."""
    assert run(tmp_path, release, transport) == (made, "")


@pytest.mark.system
@pytest.mark.parametrize("release", ["14", "none"])
def test_zmq_asks_for_the_last_release_with_zeromq(tmp_path: Path, release: str) -> None:
    """Where a later one is installed, and where none is."""
    made, said = run(tmp_path, release, "consul+zmq")
    assert made == ""
    assert said.startswith("ImportError: ")
    assert said.endswith("install it by `pip install 'consul-matchmaker[oslo]'`")
    assert ("oslo.messaging 8.1.4 is needed" in said) == (release == "14")


@pytest.mark.system
@pytest.mark.parametrize("release", ["8.1.4", "none"])
def test_http_asks_for_a_later_release(tmp_path: Path, release: str) -> None:
    """Where the last one with ZeroMQ is installed, and where none is."""
    made, said = run(tmp_path, release, "consul+http")
    assert made == ""
    assert said.startswith("ImportError: ")
    assert "oslo.messaging 14 or later is needed" in said
    assert said.endswith("install it by `pip install 'consul-matchmaker[oslo-http]'`")


@pytest.mark.parametrize("transport", ["consul", "consul+", "consul+kv", f"consul+{TOKEN}"])
def test_another_scheme_is_refused(transport: str) -> None:
    """The error names both that there are, and nothing of the URL."""
    with pytest.raises(ConfigurationError) as caught:
        driver(None, SimpleNamespace(transport=transport))
    said = str(caught.value)
    assert "consul+zmq://" in said
    assert "consul+http://" in said
    assert TOKEN not in said
