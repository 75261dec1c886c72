"""Measurements against a real Consul cluster: `python -m integration.bench dns`."""
