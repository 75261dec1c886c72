"""Count what a backend says to Consul's agents and hears from them."""

from __future__ import annotations

import threading


class Traffic:
    """Counters of one transport, which only grow.  Thread-safe; no increment is lost.

    ``queries``: sent, each time anew.  ``retries``: of them, sent once more because nothing came
    (UDP), or because the agent had closed the connection.  ``replies``: whole replies that could be
    read; ``error_replies``: of them, those by which the agent refuses, or says that it cannot help
    (HTTP 401, 403, 429 and 5xx; DNS anything but NOERROR and NXDOMAIN).  Queries without a reply
    are what is left: on their way (such as a waiting poll), or lost.

    ``sent_bytes`` and ``received_bytes`` are those of DNS messages (by TCP with the two bytes of
    length before each) and of HTTP messages (start line, headers and body): what TLS, TCP, UDP and
    IP add is not counted.  Nor is what the system's resolver asks.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts = {
            "queries": 0,
            "retries": 0,
            "replies": 0,
            "error_replies": 0,
            "sent_bytes": 0,
            "received_bytes": 0,
        }

    def add(self, **counts: int) -> None:
        """Add to the counters of these names."""
        with self._lock:
            for name, count in counts.items():
                self._counts[name] += count

    def counts(self) -> dict[str, int]:
        """Every counter, all of one moment."""
        with self._lock:
            return dict(self._counts)
