"""Which hosts serve this topic, right now?  A matchmaker over Consul."""
