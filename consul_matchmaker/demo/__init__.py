"""What `consul-matchmaker demo` needs: a Consul program, a cluster of it, and a story."""
