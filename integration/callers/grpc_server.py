"""A small gRPC server that says what it was sent, in threads of the test or in a process.

``python -m integration.callers.grpc_server TOPIC CONSUL_URL`` registers itself too, and prints the
host where it listens, once registered.

Its methods are named by kind, such as ``/test.Echo/unary_stream``.  Requests and answers are JSON.
An answer has host (of the server), metadata, peer, and texts (of the requests so far).  What a
request may have: text; seconds, which it takes; waits, for `GrpcServer.go_on`; code and details,
with which it fails; answers, how many a stream of them has; fails_after, so many answers before
that failure.
"""

from __future__ import annotations

import json
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from concurrent import futures
from typing import Any

import grpc

from consul_matchmaker import Matchmaker
from consul_matchmaker.model import Host

SERVICE = "test.Echo"
UNARY, ANSWERS = f"/{SERVICE}/unary_unary", f"/{SERVICE}/unary_stream"
REQUESTS, BOTH = f"/{SERVICE}/stream_unary", f"/{SERVICE}/stream_stream"


class GrpcServer:
    """Listens from its making; a context manager that ends it, and its connections."""

    def __init__(
        self,
        port: int = 0,
        *,
        threads: int = 16,
        credentials: grpc.ServerCredentials | None = None,
    ) -> None:
        self.calls: Counter[str] = Counter()
        """How many it was sent, by method."""
        self.go_on = threading.Event()
        self._is_over = threading.Event()
        self._lock = threading.Lock()
        # A port that was given may be kept by a socket of the test's, which shares it.
        options = [("grpc.so_reuseport", int(port != 0))]
        self._server = grpc.server(futures.ThreadPoolExecutor(threads), options=options)
        handlers = {
            "unary_unary": grpc.unary_unary_rpc_method_handler(self._unary_unary),
            "unary_stream": grpc.unary_stream_rpc_method_handler(self._unary_stream),
            "stream_unary": grpc.stream_unary_rpc_method_handler(self._stream_unary),
            "stream_stream": grpc.stream_stream_rpc_method_handler(self._stream_stream),
        }
        generic = grpc.method_handlers_generic_handler(SERVICE, handlers)
        self._server.add_generic_rpc_handlers((generic,))
        address = f"127.0.0.1:{port}"
        if credentials is None:
            port = self._server.add_insecure_port(address)
        else:
            port = self._server.add_secure_port(address, credentials)
        self.host = Host("127.0.0.1", port)
        self._server.start()

    def stop(self, grace: float | None = None) -> threading.Event:
        """Listen no more; calls that run may go on for *grace* seconds.  Set when it has ended."""
        ended: threading.Event = self._server.stop(grace)
        if grace is None:
            self._is_over.set()
            self.go_on.set()
        return ended

    def __enter__(self) -> GrpcServer:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.stop().wait(10)

    def _did(self, method: str) -> None:
        with self._lock:
            self.calls[method] += 1

    def _said(self, context: Any, *requests: dict[str, Any]) -> bytes:
        request = requests[-1] if requests else {}
        if "seconds" in request:
            self._is_over.wait(request["seconds"])
        if "waits" in request:
            self.go_on.wait()
        if "code" in request and "fails_after" not in request:
            context.abort(grpc.StatusCode[request["code"]], request.get("details", "told to"))
        said = {
            "host": str(self.host),
            "metadata": {name: str(value) for name, value in context.invocation_metadata()},
            "texts": [one.get("text") for one in requests],
        }
        return json.dumps(said).encode()

    def _unary_unary(self, request: bytes, context: Any) -> bytes:
        self._did("unary_unary")
        return self._said(context, json.loads(request))

    def _unary_stream(self, request: bytes, context: Any) -> Iterator[bytes]:
        self._did("unary_stream")
        asked = json.loads(request)
        for number in range(asked.get("answers", 1)):
            if asked.get("fails_after") == number:
                context.abort(grpc.StatusCode[asked["code"]], "told to")
            yield self._said(context, asked)

    def _stream_unary(self, requests: Iterator[bytes], context: Any) -> bytes:
        self._did("stream_unary")
        return self._said(context, *map(json.loads, requests))

    def _stream_stream(self, requests: Iterator[bytes], context: Any) -> Iterator[bytes]:
        self._did("stream_stream")
        for request in requests:
            yield self._said(context, json.loads(request))


def main(topic: str, url: str) -> None:
    with GrpcServer() as server, Matchmaker.from_url(url) as matchmaker:
        registration = matchmaker.register(topic, server.host)
        registration.wait_until_published(timeout_seconds=10)
        print(server.host, flush=True)
        sys.stdin.read()


if __name__ == "__main__":
    main(*sys.argv[1:])
