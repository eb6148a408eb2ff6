"""An ASGI application, called without a socket."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Mapping
from contextlib import suppress
from dataclasses import dataclass

from starlette.types import ASGIApp, Message

Headers = list[tuple[bytes, bytes]]


@dataclass(frozen=True)
class HttpRequest:
    """A whole request; ``path`` as in the URL, without the query."""

    method: str
    path: str
    query: bytes
    headers: Headers
    body: bytes


@dataclass(frozen=True)
class HttpHead:
    """How a response begins."""

    status: int
    headers: Headers


async def call(app: ASGIApp, request: HttpRequest, extra: Mapping[str, str]) -> AsyncGenerator[HttpHead | bytes]:
    """The head of the response, then its body piece by piece; closing the generator is the client's leaving.

    ``extra`` headers are added to the response's.
    """
    messages: asyncio.Queue[Message | None] = asyncio.Queue(maxsize=1)
    left = asyncio.Event()
    body = [request.body]

    async def receive() -> Message:
        if body:
            return {"type": "http.request", "body": body.pop(), "more_body": False}
        await left.wait()
        return {"type": "http.disconnect"}

    async def run() -> None:
        try:
            await app(_scope(request), receive, messages.put)
        finally:
            if not left.is_set():
                await messages.put(None)

    task = asyncio.create_task(run())
    try:
        while (message := await messages.get()) is not None:
            if message["type"] == "http.response.start":
                added = [(name.encode(), value.encode()) for name, value in extra.items()]
                yield HttpHead(message["status"], [*message.get("headers", []), *added])
            elif message.get("body"):
                yield message["body"]
        await task
    finally:
        left.set()
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task


def _scope(request: HttpRequest) -> dict[str, object]:
    return {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": request.method,
        "scheme": "http",
        "path": request.path,
        "raw_path": request.path.encode(),
        "query_string": request.query,
        "root_path": "",
        "headers": request.headers,
        "client": None,
        "server": None,
    }
