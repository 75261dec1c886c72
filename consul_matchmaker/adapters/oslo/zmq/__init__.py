"""The ZeroMQ driver of oslo.messaging, to release 8.1.4: a matchmaker, a transport, both APIs."""
