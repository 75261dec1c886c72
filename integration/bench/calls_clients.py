"""Clients as people use them, and the same ones with the adapters: each asks who answers it.

A plain one is told by *choose* which host to ask; the other one chooses by itself.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager as awaited
from contextlib import contextmanager as blocking
from dataclasses import dataclass
from typing import Any

import aiohttp
import grpc
import httpx
import requests

from consul_matchmaker import Matchmaker, aio
from consul_matchmaker.adapters.aiohttp import matchmaker_middleware
from consul_matchmaker.adapters.grpc import aio_channel, channel
from consul_matchmaker.adapters.httpx import AsyncMatchmakerTransport, MatchmakerTransport
from consul_matchmaker.adapters.requests import MatchmakerAdapter
from integration.callers.echo_process import HOST

Ask = Callable[[], str]
AwaitedAsk = Callable[[], Awaitable[str]]
TIMEOUT_SECONDS = 5.0


def url_of(topic: str) -> str:
    return f"http://{topic}.service.consul/"


@dataclass(frozen=True)
class Client:
    """One of *kind* http or grpc, that blocks or is awaited; its makers return contexts of what
    asks, once, who answers: an `Ask`, or an `AwaitedAsk`."""

    name: str
    kind: str
    is_awaited: bool
    plain: Callable[[Callable[[], str]], Any]
    ours: Callable[[Any, str], Any]


# -- httpx -----------------------------------------------------------------------------------------


@blocking
def plain_httpx(choose: Callable[[], str]) -> Iterator[Ask]:
    with httpx.Client(timeout=TIMEOUT_SECONDS) as client:
        yield lambda: client.get(f"http://{choose()}/").text


@blocking
def our_httpx(mm: Matchmaker, topic: str) -> Iterator[Ask]:
    url = url_of(topic)
    with httpx.Client(transport=MatchmakerTransport(mm), timeout=TIMEOUT_SECONDS) as client:
        yield lambda: client.get(url).text


@awaited
async def plain_async_httpx(choose: Callable[[], str]) -> AsyncIterator[AwaitedAsk]:
    async with httpx.AsyncClient(timeout=TIMEOUT_SECONDS) as client:

        async def ask() -> str:
            return (await client.get(f"http://{choose()}/")).text

        yield ask


@awaited
async def our_async_httpx(amm: aio.Matchmaker, topic: str) -> AsyncIterator[AwaitedAsk]:
    url, transport = url_of(topic), AsyncMatchmakerTransport(amm)
    async with httpx.AsyncClient(transport=transport, timeout=TIMEOUT_SECONDS) as client:

        async def ask() -> str:
            return (await client.get(url)).text

        yield ask


# -- aiohttp ---------------------------------------------------------------------------------------


@awaited
async def plain_aiohttp(choose: Callable[[], str]) -> AsyncIterator[AwaitedAsk]:
    timeout = aiohttp.ClientTimeout(TIMEOUT_SECONDS)
    async with aiohttp.ClientSession(timeout=timeout) as session:

        async def ask() -> str:
            async with session.get(f"http://{choose()}/") as answer:
                return await answer.text()

        yield ask


@awaited
async def our_aiohttp(amm: aio.Matchmaker, topic: str) -> AsyncIterator[AwaitedAsk]:
    url, timeout = url_of(topic), aiohttp.ClientTimeout(TIMEOUT_SECONDS)
    middlewares = (matchmaker_middleware(amm),)
    async with aiohttp.ClientSession(timeout=timeout, middlewares=middlewares) as session:

        async def ask() -> str:
            async with session.get(url) as answer:
                return await answer.text()

        yield ask


# -- requests --------------------------------------------------------------------------------------


@blocking
def plain_requests(choose: Callable[[], str]) -> Iterator[Ask]:
    with requests.Session() as session:
        yield lambda: session.get(f"http://{choose()}/", timeout=TIMEOUT_SECONDS).text


@blocking
def our_requests(mm: Matchmaker, topic: str) -> Iterator[Ask]:
    url = url_of(topic)
    with requests.Session() as session:
        session.mount("http://", MatchmakerAdapter(mm))
        yield lambda: session.get(url, timeout=TIMEOUT_SECONDS).text


# -- gRPC ------------------------------------------------------------------------------------------


@blocking
def plain_grpc(choose: Callable[[], str]) -> Iterator[Ask]:
    channels: dict[str, grpc.Channel] = {}
    methods: dict[str, Callable[..., bytes]] = {}

    def ask() -> str:
        host = choose()
        if host not in methods:
            channels[host] = grpc.insecure_channel(host)
            methods[host] = channels[host].unary_unary(HOST)
        return methods[host](b"", timeout=TIMEOUT_SECONDS).decode()

    try:
        yield ask
    finally:
        for each in channels.values():
            each.close()


@blocking
def our_grpc(mm: Matchmaker, topic: str) -> Iterator[Ask]:
    with channel(mm, topic, idempotent=True) as to_topic:
        method = to_topic.unary_unary(HOST)
        yield lambda: method(b"", timeout=TIMEOUT_SECONDS).decode()


@awaited
async def plain_aio_grpc(choose: Callable[[], str]) -> AsyncIterator[AwaitedAsk]:
    channels: dict[str, grpc.aio.Channel] = {}
    methods: dict[str, Callable[..., Awaitable[bytes]]] = {}

    async def ask() -> str:
        host = choose()
        if host not in methods:
            channels[host] = grpc.aio.insecure_channel(host)
            methods[host] = channels[host].unary_unary(HOST)
        return (await methods[host](b"", timeout=TIMEOUT_SECONDS)).decode()

    try:
        yield ask
    finally:
        for each in channels.values():
            await each.close()


@awaited
async def our_aio_grpc(amm: aio.Matchmaker, topic: str) -> AsyncIterator[AwaitedAsk]:
    async with aio_channel(amm, topic, idempotent=True) as to_topic:
        method = to_topic.unary_unary(HOST)

        async def ask() -> str:
            return (await method(b"", timeout=TIMEOUT_SECONDS)).decode()

        yield ask


CLIENTS = (
    Client("httpx", "http", False, plain_httpx, our_httpx),
    Client("httpx, asyncio", "http", True, plain_async_httpx, our_async_httpx),
    Client("aiohttp", "http", True, plain_aiohttp, our_aiohttp),
    Client("requests", "http", False, plain_requests, our_requests),
    Client("gRPC", "grpc", False, plain_grpc, our_grpc),
    Client("gRPC, asyncio", "grpc", True, plain_aio_grpc, our_aio_grpc),
)
