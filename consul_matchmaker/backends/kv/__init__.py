"""Registrations as keys of Consul's KV store that one session holds."""
