"""Consul's HTTP API: `exchange` carries out one call, `api` knows agents, tokens and errors."""
