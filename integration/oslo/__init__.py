"""oslo.messaging 8.1.4 itself, with real ZeroMQ sockets, on a real Consul and a real Redis."""
