"""An event loop whose clock jumps to whatever is due next, and a scripted endpoint that runs in it.

Nothing waits and nothing is measured: what the load generator reports can be computed from the script.
"""

from __future__ import annotations

import asyncio
import json
import selectors
from collections.abc import AsyncIterator, Coroutine, Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx


class _Selector(selectors.DefaultSelector):
    """Instead of waiting, moves the clock."""

    loop: VirtualLoop

    def select(self, timeout: float | None = None) -> list[Any]:
        events = super().select(0)
        if not events:
            assert timeout is not None, "nothing is due: everybody waits for somebody"
            self.loop.now += timeout
        return events


class VirtualLoop(asyncio.SelectorEventLoop):
    """``time()`` is what its timers add up to."""

    def __init__(self) -> None:
        self.now = 1000.0
        selector = _Selector()
        selector.loop = self
        super().__init__(selector)

    def time(self) -> float:
        return self.now


def run(coroutine: Coroutine[Any, Any, Any]) -> Any:
    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        return runner.run(coroutine)


@dataclass(frozen=True)
class Script:
    """An answer: ``(seconds since the last one, data of an event)``, then the end.

    ``end`` is how the response stops: ``close`` (normally) or ``reset``, or ``hang`` (never).
    """

    events: Sequence[tuple[float, str]]
    status: int = 200
    end: str = "close"
    body: bytes | None = None


@dataclass
class Log:
    """What the endpoint saw and did: when a request came, each event left, and the response ended."""

    body: dict[str, Any]
    path: str
    headers: dict[str, str]
    came: float
    events: list[tuple[float, str]] = field(default_factory=list)
    ended: float | None = None


class _Stream(httpx.AsyncByteStream):
    def __init__(self, script: Script, log: Log) -> None:
        self.script, self.log = script, log

    async def __aiter__(self) -> AsyncIterator[bytes]:
        loop = asyncio.get_running_loop()
        if self.script.body is not None:
            yield self.script.body
        for delay, data in self.script.events:
            await asyncio.sleep(delay)
            self.log.events.append((loop.time(), data))
            yield f"data: {data}\n\n".encode()
        if self.script.end == "reset":
            raise httpx.ReadError("connection reset by peer")
        if self.script.end == "hang":
            await asyncio.Event().wait()
        self.log.ended = loop.time()


class Endpoint(httpx.AsyncBaseTransport):
    """Answers requests by scripts, in the order they come; ``refuse``: indices of those that find nobody."""

    def __init__(self, scripts: Sequence[Script], refuse: Sequence[int] = ()) -> None:
        self.scripts, self.refuse = list(scripts), set(refuse)
        self.logs: list[Log] = []

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        index = len(self.logs)
        body = json.loads(request.content)
        now = asyncio.get_running_loop().time()
        self.logs.append(Log(body, request.url.path, dict(request.headers), now))
        if index in self.refuse:
            raise httpx.ConnectError("connection refused")
        script = self.scripts[index]
        return httpx.Response(script.status, stream=_Stream(script, self.logs[index]))

    def client(self) -> httpx.AsyncClient:
        return httpx.AsyncClient(transport=self, timeout=None)


def completion(text: str) -> str:
    return json.dumps({"choices": [{"text": text}]})


def usage(prompt: int, generated: int) -> str:
    return json.dumps({"choices": [], "usage": {"prompt_tokens": prompt, "completion_tokens": generated}})


def chat(**delta: str) -> str:
    return json.dumps({"choices": [{"delta": delta}]})
