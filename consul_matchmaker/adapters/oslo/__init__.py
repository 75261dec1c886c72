"""oslo.messaging with Consul as its matchmaker: what each kind of release needs, in its folder."""
