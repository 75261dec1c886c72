"""A certificate authority of our own, with one certificate that clients and servers both show."""

import shutil
import socket
import subprocess
from dataclasses import dataclass
from pathlib import Path

DAYS = 2
CURVE = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]


class NoOpenssl(Exception):
    """There is no openssl here; the message says what to do."""


@dataclass(frozen=True)
class Certificates:
    """Files in PEM, as both transports are told about them."""

    authority: Path
    certificate: Path
    key: Path


def make(folder: Path, *others: str) -> Certificates:
    """For 127.0.0.1, localhost, this machine's name and address, and the names *others*.

    Raises NoOpenssl.
    """
    if shutil.which("openssl") is None:
        raise NoOpenssl("openssl is needed to make certificates: apt-get install openssl")
    folder.mkdir(parents=True, exist_ok=True)
    own = f"DNS:{socket.gethostname()},IP:{_own_address()}"
    names = ",".join(["IP:127.0.0.1", "DNS:localhost", own, *(f"DNS:{name}" for name in others)])
    (folder / "names").write_text(
        f"subjectAltName={names}\nextendedKeyUsage=serverAuth,clientAuth\n"
    )
    _openssl(
        folder,
        *("req", "-x509", *CURVE, "-days", str(DAYS), "-subj", "/CN=own authority"),
        *("-addext", "keyUsage=critical,keyCertSign,cRLSign"),
        *("-keyout", "ca.key", "-out", "ca.pem"),
    )
    _openssl(folder, "req", *CURVE, "-subj", "/CN=rpc", "-keyout", "key.pem", "-out", "request")
    _openssl(
        folder,
        *("x509", "-req", "-in", "request", "-CA", "ca.pem", "-CAkey", "ca.key"),
        *("-CAcreateserial", "-days", str(DAYS), "-extfile", "names", "-out", "cert.pem"),
    )
    return Certificates(folder / "ca.pem", folder / "cert.pem", folder / "key.pem")


def _own_address() -> str:
    """The one that connections to elsewhere leave from, by which servers may be found."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asking:
        try:
            asking.connect(("192.0.2.1", 9))  # of the documentation's network; sends nothing
        except OSError:  # this machine has no way out
            return "127.0.0.1"
        return str(asking.getsockname()[0])


def _openssl(folder: Path, *words: str) -> None:
    done = subprocess.run(
        ["openssl", *words], cwd=folder, capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        raise RuntimeError(f"openssl {words[0]}: {done.stderr.strip()}")
