"""A request under way, seen by its caller."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Generator
from typing import Any

from minicache_trt.runtime.generation import Generation
from minicache_trt.runtime.job import Update
from minicache_trt.runtime.request import RequestOutput
from minicache_trt.runtime.wakeups import Wakeups


class AsyncRequest:
    """Awaitable: the finished `RequestOutput`. Asynchronously iterable: the output so far, whenever it has grown.

    A reader that is slower than the model gets several tokens at once; nothing queues up for it. ``text`` and
    ``token_ids`` are everything so far, ``text_diff`` and ``token_ids_diff`` what is new. A request that fails, is
    aborted or runs out of time has a last output with ``finish_reason`` ``error``, ``abort`` or ``timeout``. When the
    task that waits is cancelled, so is the request.

    Parameters
    ----------
    generation : Generation
        What runs.
    cancel : callable
        Ends it soon.
    wakeups : Wakeups
        Tells those who wait for it.
    """

    def __init__(self, generation: Generation, cancel: Callable[[Generation], None], wakeups: Wakeups) -> None:
        self.request_id = generation.request_id
        self._generation = generation
        self._cancel = cancel
        self._wakeups = wakeups
        self._lock = threading.Lock()  # guards what follows
        self._ended = threading.Event()
        self._num_tokens = self._num_read = self._text_read = 0
        self._text = ""
        self._exhausted = False
        self._waiting: list[tuple[asyncio.AbstractEventLoop, asyncio.Future[None]]] = []

    @property
    def finished(self) -> bool:
        """Whether the last output is there."""
        return self._ended.is_set()

    def abort(self) -> None:
        """End the request soon, with what it has; does nothing when it has ended. Any thread may call this."""
        self._cancel(self._generation)

    cancel = abort

    def result(self, timeout: float | None = None) -> RequestOutput:
        """Wait, without asyncio, for the finished output.

        Raises
        ------
        TimeoutError
            After ``timeout`` seconds; the request goes on.
        """
        if not self._ended.wait(timeout):
            raise TimeoutError(f"request {self.request_id} did not end within {timeout} seconds")
        return self._generation.output()

    def update(self, update: Update) -> None:
        """The engine thread reports a step."""
        with self._lock:
            if update.event is not None:
                self._num_tokens += update.event.token_id is not None
                self._text += update.event.text
            if update.finished:
                self._ended.set()
            if update.event is None and not update.finished:
                return
            waiting, self._waiting = self._waiting, []
        for loop, future in waiting:
            self._wakeups.add(loop, future, self.abort)

    def __await__(self) -> Generator[Any, None, RequestOutput]:
        return self._wait_for_end().__await__()

    def __aiter__(self) -> AsyncRequest:
        return self

    async def __anext__(self) -> RequestOutput:
        while True:
            with self._lock:
                finished = self._ended.is_set()
                if self._num_tokens > self._num_read or (finished and not self._exhausted):
                    return self._take(finished)
                if finished:
                    raise StopAsyncIteration
                future = self._future()
            await self._wait(future)

    async def _wait_for_end(self) -> RequestOutput:
        while True:
            with self._lock:
                if self._ended.is_set():
                    return self._generation.output()
                future = self._future()
            await self._wait(future)

    def _take(self, finished: bool) -> RequestOutput:
        read = self._num_read, self._text_read
        self._num_read, self._text_read, self._exhausted = self._num_tokens, len(self._text), finished
        return self._generation.snapshot(self._num_tokens, self._text, finished, *read)

    def _future(self) -> asyncio.Future[None]:
        loop = asyncio.get_running_loop()
        future = loop.create_future()
        self._waiting.append((loop, future))
        return future

    async def _wait(self, future: asyncio.Future[None]) -> None:
        try:
            await future
        except asyncio.CancelledError:
            self.abort()
            raise
