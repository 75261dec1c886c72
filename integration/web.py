"""An application of a few lines for `test_prefork`: as users write them.

``uvicorn integration.web:app --workers 4``, or gunicorn with ``integration/web.py`` as its
configuration too, whose hooks are here.
"""

import os

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.routing import Route

from consul_matchmaker.adapters.asgi import lifespan
from consul_matchmaker.adapters.gunicorn import hooks

HOST, TOPIC = os.environ["WEB_HOST"], os.environ["WEB_TOPIC"]


async def pid(request: Request) -> PlainTextResponse:
    return PlainTextResponse(str(os.getpid()))


app = Starlette(routes=[Route("/", pid)], lifespan=lifespan(TOPIC, HOST, drain_seconds=0.5))


def wsgi(environ, start_response):  # type: ignore[no-untyped-def]
    start_response("200 OK", [("Content-Type", "text/plain")])
    return [str(os.getpid()).encode()]


when_ready, on_exit = hooks(TOPIC, HOST, drain_seconds=2.0)
