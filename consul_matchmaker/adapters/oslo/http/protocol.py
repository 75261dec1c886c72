"""What client and server agree on beside the JSON of messages: needs nothing but Python."""

from __future__ import annotations

PATH = "/rpc"
HEALTH_PATH = "/health"
HEARTBEAT = b"\n"
