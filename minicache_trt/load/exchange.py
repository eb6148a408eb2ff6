"""One request to an endpoint, timed."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass, field

import httpx

from minicache_trt.load.apis import Api, Sampling
from minicache_trt.load.record import Record
from minicache_trt.load.requests import Request

MESSAGE_LENGTH = 300


@dataclass(frozen=True)
class Endpoint:
    """Where requests go, and in what form.

    Parameters
    ----------
    url : str
        Root, without ``/v1`` or ``/v2``.
    api : Api
    model : str
        The name requests ask for.
    sampling : Sampling
    timeout : float
        Seconds a request may take from being sent to its end.
    headers : mapping
        Of every request, the key among them.
    path : str, optional
        Instead of the protocol's own.
    """

    url: str
    api: Api
    model: str
    sampling: Sampling = field(default_factory=Sampling)
    timeout: float = 600.0
    headers: Mapping[str, str] = field(default_factory=dict)
    path: str | None = None

    @property
    def target(self) -> str:
        return self.url + (self.path or self.api.path(self.model))


class _Failure(Exception):
    """The request did not end well: the kind, and what was said."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind, self.message = kind, message


@dataclass
class _Answer:
    """What has arrived so far."""

    chunks: list[float] = field(default_factory=list)
    text: list[str] = field(default_factory=list)
    input_tokens: int | None = None
    output_tokens: int | None = None


async def exchange(
    client: httpx.AsyncClient, endpoint: Endpoint, request: Request, due: float, clock: Callable[[], float]
) -> Record:
    """Send a request and read its stream to the end.

    Parameters
    ----------
    client : httpx.AsyncClient
    endpoint : Endpoint
    request : Request
    due : float
        When its turn came, in seconds of ``clock``.
    clock : callable
        Seconds since the point began.

    Returns
    -------
    Record
        Failures are recorded, not raised.
    """
    answer, kind, message = _Answer(), None, ""
    sent = clock()
    try:
        async with asyncio.timeout(endpoint.timeout):
            await _converse(client, endpoint, request, answer, clock)
    except (TimeoutError, httpx.TimeoutException):
        kind, message = "timeout", f"no end within {endpoint.timeout:g} s"
    except _Failure as failure:
        kind, message = failure.kind, failure.message
    except httpx.ConnectError as error:
        kind, message = "connect", str(error)
    except httpx.TransportError as error:
        kind, message = "disconnect", str(error) or type(error).__name__
    except httpx.HTTPError as error:
        kind, message = "malformed", str(error) or type(error).__name__
    tokens = len(answer.chunks) if answer.output_tokens is None else answer.output_tokens
    times, text = tuple(answer.chunks), "".join(answer.text)
    message = " ".join(message.split())[:MESSAGE_LENGTH]
    return Record(due, sent, times, clock(), answer.input_tokens, tokens, kind, message, text)


async def _converse(
    client: httpx.AsyncClient, endpoint: Endpoint, request: Request, answer: _Answer, clock: Callable[[], float]
) -> None:
    body = endpoint.api.body(endpoint.model, request, endpoint.sampling)
    headers = {**endpoint.headers, "Accept": "text/event-stream"}
    async with client.stream("POST", endpoint.target, json=body, headers=headers) as response:
        if response.status_code != 200:
            raise _Failure(f"http_{response.status_code}", error_message(await response.aread()))
        done = False
        async for data in _events(response):
            if data == "[DONE]":
                done = True
                break
            _take(endpoint.api, data, answer, clock)
        if not done and endpoint.api.ends_with_done:
            raise _Failure("disconnect", "the stream ended before [DONE]")


async def _events(response: httpx.Response) -> AsyncIterator[str]:
    """Data of server-sent events; every event of these protocols is one line."""
    async for line in response.aiter_lines():
        field_name, _, value = line.partition(":")
        if field_name == "data":
            yield value.strip()


def _take(api: Api, data: str, answer: _Answer, clock: Callable[[], float]) -> None:
    try:
        piece = api.piece(json.loads(data))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise _Failure("malformed", f"an event that is not of this protocol: {data}") from error
    if piece.error is not None:
        raise _Failure("stream_error", piece.error)
    if piece.text:
        answer.chunks.append(clock())
        answer.text.append(piece.text)
    if piece.input_tokens is not None:
        answer.input_tokens = piece.input_tokens
    if piece.output_tokens is not None:
        answer.output_tokens = piece.output_tokens


def error_message(content: bytes) -> str:
    """What an error response says, in whatever form it says it."""
    text = content.decode(errors="replace")
    try:
        data = json.loads(text)
    except ValueError:
        return text
    error = data.get("error", data.get("detail", data)) if isinstance(data, dict) else data
    return str(error.get("message", error) if isinstance(error, dict) else error)
