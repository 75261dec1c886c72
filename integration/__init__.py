"""Tests against a real Consul cluster, in Docker or as local processes."""
