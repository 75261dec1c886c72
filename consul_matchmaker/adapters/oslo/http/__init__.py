"""The transport ``consul+http``: RPC of oslo.messaging over HTTP, servers found in Consul."""
