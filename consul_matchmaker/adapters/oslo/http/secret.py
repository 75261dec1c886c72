"""The secret that clients send and servers ask for, which a file may hold and change."""

from __future__ import annotations

import hmac
import logging
from pathlib import Path

from ....errors import ConfigurationError
from ....files import stamp_of

logger = logging.getLogger(__name__)


class Secret:
    """Thread-safe.  *token*, or the lines of the file *path*; without either nothing is asked."""

    def __init__(self, token: str | None, path: str | None) -> None:
        self._path = None if path is None else Path(path)
        self._tokens: tuple[bytes, ...] = () if token is None else (token.encode(),)
        self._stamp: tuple[int, int, int] | None = None
        self._is_told = False
        if self._path is not None:
            self._look()
            if not self._tokens:
                raise ConfigurationError(f"rpc_token_file {path}: holds no secret")

    def header(self) -> dict[str, str]:
        """What a client says of itself."""
        self._look()
        return {"Authorization": f"Bearer {self._tokens[0].decode()}"} if self._tokens else {}

    def accepts(self, header: str | None) -> bool:
        """Whether a server lets in who says *header*; takes as long for any wrong one."""
        self._look()
        if not self._tokens:
            return True
        kind, _, token = (header or "").partition(" ")
        said = token.strip().encode("utf-8", "replace")
        found = [hmac.compare_digest(said, each) for each in self._tokens]
        return kind.lower() == "bearer" and any(found)

    def _look(self) -> None:
        """Read the file if it has changed; what cannot be read changes nothing."""
        if self._path is None:
            return
        try:
            stamp = stamp_of(self._path)
            if stamp == self._stamp:
                return
            lines = self._path.read_text(encoding="ascii").split("\n")
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or "it is not ASCII text"
            if not self._is_told:  # once: this is looked at with every request, of whomever
                self._is_told = True
                logger.warning(
                    "rpc_token_file %s: %s; keeping the secret it held", self._path, reason
                )
            return
        found = tuple(line.strip().encode() for line in lines if line.strip())
        if found:
            self._tokens, self._stamp, self._is_told = found, stamp, False
