"""Results on their way to a client that may be slow, or leave."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Coroutine, Sequence
from contextlib import aclosing, suppress
from typing import Any, TypeVar

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from minicache_trt.runtime.async_request import AsyncRequest
from minicache_trt.runtime.request import RequestOutput

T = TypeVar("T")

STALL_SECONDS = 60.0
"""A client that takes nothing for so long has left."""


class ClientGone(Exception):
    """Nobody waits for the response any more."""


async def merged(requests: Sequence[AsyncRequest]) -> AsyncGenerator[tuple[int, RequestOutput]]:
    """Outputs of several requests as they grow, with the request's number.

    At most one output per request waits for the reader; what comes meanwhile is in the next one.
    """
    queue: asyncio.Queue[tuple[int, RequestOutput | None]] = asyncio.Queue(maxsize=1)

    async def pump(index: int, request: AsyncRequest) -> None:
        async for output in request:
            await queue.put((index, output))
        await queue.put((index, None))

    tasks = [asyncio.create_task(pump(index, request)) for index, request in enumerate(requests)]
    try:
        unfinished = len(tasks)
        while unfinished:
            index, output = await queue.get()
            if output is None:
                unfinished -= 1
            else:
                yield index, output
    finally:
        for task in tasks:
            task.cancel()


async def until_disconnect(work: Coroutine[Any, Any, T], receive: Receive) -> T:
    """The result of ``work``, which is cancelled when the client leaves before.

    Raises
    ------
    ClientGone
        When it has left.
    """
    task, watcher = asyncio.ensure_future(work), asyncio.create_task(_disconnect(receive))
    try:
        await asyncio.wait({task, watcher}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientGone
        return task.result()
    finally:
        for pending in (task, watcher):
            pending.cancel()
            with suppress(asyncio.CancelledError, Exception):
                await pending


class EventStream(Response):
    """Server-sent events.

    A client that leaves, or takes nothing for `STALL_SECONDS`, ends the requests. One that is slow holds up the
    events, and nothing else: the connection buffers a bounded number of bytes, `merged` one output per request.

    Parameters
    ----------
    events : async generator of bytes
        Complete events.
    requests : list of AsyncRequest
        Where they come from.
    """

    media_type = "text/event-stream"

    def __init__(self, events: AsyncGenerator[bytes], requests: Sequence[AsyncRequest]) -> None:
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._events = events
        self._requests = requests

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            with suppress(ClientGone):
                await until_disconnect(self._write(send), receive)
        finally:
            for request in self._requests:
                request.abort()

    async def _write(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        async with aclosing(self._events) as events:
            async for event in events:
                await self._send(send, event, True)
        await self._send(send, b"", False)

    async def _send(self, send: Send, body: bytes, more: bool) -> None:
        try:
            async with asyncio.timeout(STALL_SECONDS):
                await send({"type": "http.response.body", "body": body, "more_body": more})
        except TimeoutError as error:
            raise ClientGone from error


async def collected(requests: Sequence[AsyncRequest]) -> list[RequestOutput]:
    """All finished outputs; cancelled, it ends the requests."""
    return list(await asyncio.gather(*(_result(request) for request in requests)))


async def _result(request: AsyncRequest) -> RequestOutput:
    return await request


async def _disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
