"""A server of scripted answers over real sockets, in a thread, which records what it was asked and when.

It speaks as much HTTP as a client needs, and breaks off where a script says so.
"""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

REASONS = {200: "OK", 401: "Unauthorized", 404: "Not Found", 429: "Too Many Requests", 500: "Internal Server Error"}


@dataclass(frozen=True)
class Answer:
    """What to say to one request.

    Parameters
    ----------
    events : tuple of str
        Data of server-sent events; without any, ``body`` is the whole answer.
    status : int
    body : object
        JSON.
    pause : float
        Seconds before each event.
    cut : bool
        Close the connection after the events, in the middle of the response.
    """

    events: tuple[str, ...] = ()
    status: int = 200
    body: Any = None
    pause: float = 0.0
    cut: bool = False


@dataclass
class Seen:
    """A request, and the monotonic times at which it came and each event left."""

    path: str
    headers: dict[str, str]
    body: Any
    came: float
    left: list[float] = field(default_factory=list)


@dataclass
class FakeServer:
    """``answer`` decides by path, body and number of the request."""

    answer: Callable[[str, Any, int], Answer]
    url: str = ""
    seen: list[Seen] = field(default_factory=list)

    async def handle(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while head := await reader.readuntil(b"\r\n\r\n"):
                lines = head.decode().split("\r\n")
                headers = {name.lower(): value.strip() for name, _, value in (x.partition(":") for x in lines[1:] if x)}
                content = await reader.readexactly(int(headers.get("content-length", 0)))
                seen = Seen(lines[0].split()[1], headers, json.loads(content or "null"), time.monotonic())
                self.seen.append(seen)
                await self._reply(writer, seen, self.answer(seen.path, seen.body, len(self.seen) - 1))
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()

    async def _reply(self, writer: asyncio.StreamWriter, seen: Seen, answer: Answer) -> None:
        status = f"HTTP/1.1 {answer.status} {REASONS[answer.status]}\r\n".encode()
        if not answer.events:
            content = json.dumps(answer.body).encode()
            writer.write(status + f"Content-Length: {len(content)}\r\n\r\n".encode() + content)
            await writer.drain()
            return
        writer.write(status + b"Content-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n")
        for data in answer.events:
            await asyncio.sleep(answer.pause)
            event = f"data: {data}\n\n".encode()
            seen.left.append(time.monotonic())
            writer.write(f"{len(event):x}\r\n".encode() + event + b"\r\n")
            await writer.drain()
        if answer.cut:
            raise ConnectionError
        writer.write(b"0\r\n\r\n")
        await writer.drain()


@contextmanager
def fake_server(answer: Callable[[str, Any, int], Answer]) -> Iterator[FakeServer]:
    """Listens on a free port of 127.0.0.1 until the block ends."""
    server, started, stop = FakeServer(answer), threading.Event(), threading.Event()

    async def main() -> None:
        listener = await asyncio.start_server(server.handle, "127.0.0.1", 0)
        server.url = f"http://127.0.0.1:{listener.sockets[0].getsockname()[1]}"
        started.set()
        while not stop.is_set():
            await asyncio.sleep(0.01)
        listener.close()

    thread = threading.Thread(target=asyncio.run, args=(main(),))
    thread.start()
    assert started.wait(10)
    try:
        yield server
    finally:
        stop.set()
        thread.join()


def completion_events(tokens: int, prompt: str) -> tuple[str, ...]:
    """A stream of ``/v1/completions``; it counts three tokens a word of the prompt, and five more."""
    pieces = [json.dumps({"choices": [{"text": f" word{index}"}]}) for index in range(tokens)]
    usage = {"prompt_tokens": 3 * len(prompt.split()) + 5, "completion_tokens": tokens}
    return (*pieces, json.dumps({"choices": [], "usage": usage}), "[DONE]")
