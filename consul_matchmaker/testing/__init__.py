"""A real Consul for tests, yours and ours: a program, a cluster of it, and what to ask it."""
