"""What completions and chats do alike: start requests, wait for them or stream them, count tokens."""

from __future__ import annotations

import asyncio
import json
import time
import uuid
from collections.abc import AsyncGenerator, Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from dataclasses import dataclass

from pydantic import BaseModel
from starlette.requests import Request
from starlette.responses import Response

from minicache_trt.runtime.async_request import AsyncRequest
from minicache_trt.runtime.request import CompletionOutput, RequestOutput
from minicache_trt.serving.errors import ApiError
from minicache_trt.serving.protocol import PromptTokensDetails, SamplingFields, Usage
from minicache_trt.serving.service import Prompts, Service
from minicache_trt.serving.streaming import EventStream, collected, merged, until_disconnect


@dataclass(frozen=True)
class Answer:
    """Name and time of a response."""

    id: str
    created: int
    model: str

    @classmethod
    def new(cls, prefix: str, model: str) -> Answer:
        return cls(f"{prefix}-{uuid.uuid4().hex}", int(time.time()), model)


Chunks = Callable[[int, RequestOutput], Iterable[BaseModel]]
"""From a request's number and its latest output to chunks of the stream."""


class Answering:
    """Runs calls of both APIs on a service.

    Parameters
    ----------
    service : Service
    """

    def __init__(self, service: Service) -> None:
        self.service = service
        self._threads = ThreadPoolExecutor(2, thread_name_prefix="minicache-trt-prepare")

    async def prepare(self, function: Callable[[], list[AsyncRequest]]) -> list[AsyncRequest]:
        """Run what tokenizes or compiles outside of the event loop; if the caller is cancelled, so are its requests."""
        future = asyncio.get_running_loop().run_in_executor(self._threads, function)
        try:
            return await asyncio.shield(future)
        except asyncio.CancelledError:
            future.add_done_callback(_abort_all)
            raise

    async def start(
        self, request: Request, num_sequences: int, make: Callable[[], Prompts], arrival: float
    ) -> list[AsyncRequest]:
        """Admit ``num_sequences``, then make the prompts and submit them.

        Raises
        ------
        ApiError, ClientGone
        """
        service = self.service
        service.admit(num_sequences)

        def submit() -> list[AsyncRequest]:
            try:
                wanted = make()
            except BaseException:
                service.admission.release(num_sequences)
                raise
            return service.submit(wanted, arrival)

        return await until_disconnect(self.prepare(submit), request.receive)

    async def answer(
        self, request: Request, requests: list[AsyncRequest], build: Callable[[list[RequestOutput]], BaseModel]
    ) -> Response:
        """One JSON response, when everything is there.

        Raises
        ------
        ApiError
            When a request ended with an error, or the server gave it up.
        ClientGone
        """
        outputs = await until_disconnect(collected(requests), request.receive)
        for output in outputs:
            check(output.outputs[0])
        return Response(dump(build(outputs)), media_type="application/json")

    def stream(
        self,
        requests: list[AsyncRequest],
        chunks: Chunks,
        last: Callable[[Usage], BaseModel] | None,
        prompts: int,
    ) -> EventStream:
        """Chunks as they come, a chunk with the usage if ``last`` makes one, and the end mark."""
        return EventStream(_events(requests, chunks, last, prompts), requests)

    def check_model(self, fields: SamplingFields) -> str:
        """Name of the model that was asked for.

        Raises
        ------
        ApiError
            404 when there is no such model.
        """
        return check_model(fields.model, self.service.model_names)


def check_model(name: str | None, names: tuple[str, ...]) -> str:
    """A served name; the first one when none is asked for."""
    if name is not None and name not in names:
        message = f"model: there is no model {name!r} here, only {', '.join(names)}"
        raise ApiError(404, message, "invalid_request_error", "model_not_found", "model")
    return name or names[0]


def check(completion: CompletionOutput) -> None:
    """Raises `ApiError` when a request did not end as its caller could expect."""
    if completion.finish_reason == "error" and str(completion.stop_reason).startswith("guided_decoding: "):
        raise ApiError(400, str(completion.stop_reason), param="guided_decoding")  # the grammar grew too complex
    if completion.finish_reason == "error":
        raise ApiError(500, f"the request ended early: {completion.stop_reason}", "server_error", "engine_error")
    if completion.finish_reason == "abort":
        raise ApiError(503, "the server stopped before the request was finished", "service_unavailable", "aborted")


def usage(outputs: Sequence[RequestOutput], prompts: int) -> Usage:
    """Tokens of all requests; every prompt counts once, however many completions it has."""
    n = max(1, len(outputs) // prompts)
    prompt_tokens = sum(len(output.prompt_token_ids) for output in outputs[::n])
    cached = sum(output.num_cached_tokens for output in outputs[::n])
    completion_tokens = sum(len(output.outputs[0].token_ids) for output in outputs)
    return Usage(
        prompt_tokens=prompt_tokens,
        completion_tokens=completion_tokens,
        total_tokens=prompt_tokens + completion_tokens,
        prompt_tokens_details=PromptTokensDetails(cached_tokens=cached),
    )


def dump(model: BaseModel) -> bytes:
    """JSON in ASCII, so that no text of a model can make it invalid."""
    return json.dumps(model.model_dump(), separators=(",", ":")).encode()


async def _events(
    requests: list[AsyncRequest], chunks: Chunks, last: Callable[[Usage], BaseModel] | None, prompts: int
) -> AsyncGenerator[bytes]:
    latest: dict[int, RequestOutput] = {}
    try:
        async with aclosing(merged(requests)) as outputs:
            async for index, output in outputs:
                latest[index] = output
                if output.finished:
                    check(output.outputs[0])
                for chunk in chunks(index, output):
                    yield _event(dump(chunk))
        if last is not None:
            yield _event(dump(last(usage([latest[index] for index in sorted(latest)], prompts))))
    except ApiError as error:  # the status has been sent
        yield _event(json.dumps(error.body, separators=(",", ":")).encode())
    yield _event(b"[DONE]")


def _event(data: bytes) -> bytes:
    return b"data: " + data + b"\n\n"


def _abort_all(future: asyncio.Future[list[AsyncRequest]]) -> None:
    if not future.cancelled() and future.exception() is None:
        for request in future.result():
            request.abort()
