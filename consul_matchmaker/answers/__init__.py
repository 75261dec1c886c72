"""Topic to hosts: what is known, how fresh it is, and when Consul is asked again."""
