"""gRPC channels to a topic: generated stubs take them, and each call goes to a live host.

    with Matchmaker.from_env() as mm, channel(mm, "web") as to_web:
        stub = EchoStub(to_web)
        print(stub.Echo(EchoRequest(text="hello"), timeout=1.0))

With asyncio: `aio_channel`, of an `aio.Matchmaker`.  Needs the extra ``grpc``.

Make a channel in the process that uses it, after it has forked: gRPC's connections do not survive a
fork.  A channel of asyncio belongs to the event loop on which it is first used.
"""

from ..extras import extra

with extra("grpc"):
    import grpc  # noqa: F401  # the modules below need it

from .awaited import aio_channel
from .blocking import channel

__all__ = ["aio_channel", "channel"]
