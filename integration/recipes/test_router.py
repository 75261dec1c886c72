"""docs/recipes/router.md: its programs, run by `watch`, and a router on a socket."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

import pytest

from integration.command_line import running, said
from integration.recipes.pages import LONG_SECONDS, Running
from integration.waiting import until

FIRST, SECOND = "10.0.0.5:8000", "10.0.0.6:8000"


class Router:
    """Has workers by id, and both APIs; answers 503 while it is `broken`."""

    def __init__(self) -> None:
        self.workers: dict[str, str] = {}
        self.is_broken = False
        self.refused = 0
        router = self

        class Handler(_Handler):
            owner = router

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,))
        self._thread.start()

    def add(self, url: str) -> None:
        self.workers[f"worker/{url}"] = url  # an id that has to be quoted

    def has(self, *hosts: str) -> bool:
        return sorted(self.workers.values()) == sorted(f"http://{host}" for host in hosts)

    def stop(self) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


class _Handler(BaseHTTPRequestHandler):
    owner: Router

    def _answer(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        url = urlsplit(self.path)
        if self.owner.is_broken:
            self.owner.refused += 1
            self._say(503, {})
        elif (self.command, url.path) == ("GET", "/workers"):
            workers = [{"id": name, "url": at} for name, at in self.owner.workers.items()]
            self._say(200, {"workers": workers})
        elif (self.command, url.path) == ("POST", "/workers"):
            self.owner.add(json.loads(body)["url"])
            self._say(202, {"status": "accepted"})
        elif self.command == "DELETE" and url.path.startswith("/workers/"):
            gone = self.owner.workers.pop(unquote(url.path.removeprefix("/workers/")), None)
            self._say(404 if gone is None else 202, {})
        elif (self.command, url.path) == ("POST", "/add_worker"):
            self.owner.add(parse_qs(url.query)["url"][0])
            self._say(200, {})
        elif (self.command, url.path) == ("POST", "/remove_worker"):
            self.owner.workers.pop(f"worker/{parse_qs(url.query)['url'][0]}", None)
            self._say(200, {})
        else:
            self._say(404, {})

    do_GET = do_POST = do_DELETE = _answer

    def _say(self, status: int, value: object) -> None:
        content = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *args: object) -> None:
        """Nothing."""


@pytest.fixture
def router() -> Iterator[Router]:
    made = Router()
    yield made
    made.stop()


@pytest.mark.parametrize("program", [["python", "workers.py"], ["sh", "workers.sh"]])
def test_the_router_has_the_workers_that_live(
    program: list[str], start: Callable[..., Running], url: str, topic: str, router: Router
) -> None:
    """One that registers is added and one that is killed removed; a router that fails for a while
    is told again, without another change."""
    with running("register", topic, FIRST, "--url", url) as first:
        said(first, "registered")
        watch = ["consul-matchmaker", "--url", url, "watch", topic, "--", *program]
        start("router.md", *watch, ROUTER=router.url)
        until(lambda: router.has(FIRST), LONG_SECONDS, "the first is a worker")
        with running("register", topic, SECOND, "--url", url) as second:
            until(lambda: router.has(FIRST, SECOND), LONG_SECONDS, "the second is a worker")
            router.is_broken = True
            second.kill()
            until(lambda: router.refused > 0, LONG_SECONDS, "the router was asked in vain")
            router.is_broken = False
            until(lambda: router.has(FIRST), LONG_SECONDS, "the killed one is none")


def test_a_router_that_was_restarted_is_filled_by_a_new_watch(
    start: Callable[..., Running], url: str, topic: str, router: Router
) -> None:
    """The list becomes what Consul has, whatever was in it."""
    router.add(f"http://{SECOND}")
    with running("register", topic, FIRST, "--url", url) as first:
        said(first, "registered")
        watch = ["consul-matchmaker", "--url", url, "watch", topic, "--", "python", "workers.py"]
        start("router.md", *watch, ROUTER=router.url)
        until(lambda: router.has(FIRST), LONG_SECONDS, "only the first is a worker")
