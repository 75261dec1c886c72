"""Answer lookups by SRV records over Consul DNS: read `resolver` first."""
