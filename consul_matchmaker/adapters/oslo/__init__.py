"""oslo.messaging: a matchmaker for its ZeroMQ driver, and RPC over HTTP without a broker."""
