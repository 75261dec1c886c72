"""A small HTTP server for the tests: it says what it is told to, and notes what it was asked."""

import contextlib
import json
import socket
import threading
from urllib.parse import unquote


def reply(status=200, body=b"true", headers=()):
    """A whole HTTP answer."""
    lines = [f"HTTP/1.1 {status} Said", f"Content-Length: {len(body)}", *headers]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


class Request:
    def __init__(self, head, body):
        self.head = head
        lines = head.decode("latin-1").split("\r\n")
        self.method, self.target, _ = lines[0].split(" ")
        self.path = self.target.partition("?")[0]
        self.headers = {k.lower(): v for k, _, v in (line.partition(": ") for line in lines[1:])}
        self.body = body

    @property
    def size(self):
        return len(self.head) + len("\r\n\r\n") + len(self.body)

    @property
    def token(self):
        return self.headers.get("x-consul-token")


LOST = "matchmaker/scheduler/10_2e0_2e0_2e1_3a9501/00000000-0000-0000-0000-000000000000"
"""A key of ours; no session has that id."""


def agent_of_keys(*keys):
    """How an agent behaves that has *keys*, none of which a session holds."""
    left = list(keys)

    def behave(request):
        if request.path == "/v1/txn":
            return reply(409, b'{"Errors": [{"OpIndex": 0}]}')
        if request.target.endswith("/?keys="):
            return reply(body=json.dumps(left).encode())
        key = unquote(request.path.removeprefix("/v1/kv/"))
        if key in left and request.method == "DELETE":
            left.remove(key)
            return reply()
        if request.path.startswith("/v1/kv/") and request.method == "GET":
            return reply(body=b'[{"ModifyIndex": 5}]') if key in left else reply(404, b"")
        return reply(body=b'{"ID": "1"}')

    return behave


class Server:
    """An HTTP server that does as told: *behave* gets a Request and returns bytes to send, None to
    close without a word, or a function that is handed the socket."""

    def __init__(self, behave=lambda request: reply(), *, family=socket.AF_INET, tls=None):
        self.behave = behave
        self.requests = []
        self.connections = 0
        self.stopping = threading.Event()
        self._tls = tls
        self._listener = socket.create_server(
            ("::1" if family == socket.AF_INET6 else "127.0.0.1", 0), family=family, backlog=64
        )
        self.port = self._listener.getsockname()[1]
        self.address = f"127.0.0.1:{self.port}"
        self._open = set()
        threading.Thread(target=self._accept, daemon=True).start()

    def __enter__(self):
        return self

    def __exit__(self, *exc_info):
        self.stopping.set()
        # close() alone would leave accept() waiting, and with it the port open.
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self.close_connections()

    def close_connections(self):
        for sock in list(self._open):
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
            sock.close()
            self._open.discard(sock)

    @property
    def is_connected(self):
        return bool(self._open)

    def _accept(self):
        while True:
            try:
                sock, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(sock,), daemon=True).start()

    def _serve(self, sock):
        with contextlib.suppress(OSError):
            if self._tls is not None:
                sock = self._tls.wrap_socket(sock, server_side=True)
            self.connections += 1
            self._open.add(sock)
            with sock.makefile("rb") as reader:
                while self._serve_one(sock, reader):
                    pass
        self._open.discard(sock)
        sock.close()

    def _serve_one(self, sock, reader):
        head = b""
        while not head.endswith(b"\r\n\r\n"):
            line = reader.readline()
            if not line:
                return False
            head += line
        request = Request(head[:-4], b"")
        request.body = reader.read(int(request.headers.get("content-length", 0)))
        self.requests.append(request)
        answer = self.behave(request)
        if answer is None:
            return False
        if callable(answer):
            answer(sock)
            return False
        sock.sendall(answer)
        return True
