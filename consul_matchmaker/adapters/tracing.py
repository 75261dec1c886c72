"""Name the host of a call on its OpenTelemetry span; nothing where opentelemetry is not installed.

name_host(attempt.host)
"""

from __future__ import annotations

from ..model import Host

try:
    from opentelemetry.trace import SpanKind, get_current_span
except ImportError:

    def name_host(host: Host) -> None:
        """Nothing, as there are no spans."""

else:
    # On these, server.address is the address of this process.
    OF_SERVERS = (SpanKind.SERVER, SpanKind.CONSUMER)

    def name_host(host: Host) -> None:
        """Set ``server.address`` and ``server.port`` of *host* on the current span, if it records
        and is not the span of a request that this process serves."""
        span = get_current_span()
        if span.is_recording() and getattr(span, "kind", None) not in OF_SERVERS:
            span.set_attribute("server.address", host.address)
            if host.port is not None:
                span.set_attribute("server.port", host.port)
