"""This process serves a topic: what should be registered, and the thread that keeps it so."""
