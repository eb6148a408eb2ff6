"""What every HTTP request passes through before it reaches a route."""

from __future__ import annotations

import asyncio
import hmac
import json
from collections.abc import Sequence

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from minicache_trt.serving.errors import ApiError

BODY_SECONDS = 60.0
"""A body that is not complete after so long is given up."""

PROTECTED = ("/v1/", "/tokenize", "/detokenize")


class ApiKeys:
    """Refuses requests for `PROTECTED` paths without one of the keys, compared in constant time.

    Parameters
    ----------
    app : ASGI application
    keys : list of str
        None of them empty; without any, everything passes.
    """

    def __init__(self, app: ASGIApp, keys: Sequence[str]) -> None:
        self._app = app
        self._keys = [key.encode() for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        guarded = scope["type"] == "http" and scope["path"].startswith(PROTECTED)
        if self._keys and guarded and not self._has_key(Headers(scope=scope).get("authorization", "")):
            error = ApiError(
                401, "the API key is missing or wrong; send it as Authorization: Bearer KEY", code="invalid_api_key"
            )
            await refuse(error, send, {"WWW-Authenticate": "Bearer"})
        else:
            await self._app(scope, receive, send)

    def _has_key(self, header: str) -> bool:
        scheme, _, key = header.partition(" ")
        given = key.strip().encode("latin-1", "replace")
        # Every key is compared, so that time does not tell which one was nearly right.
        matches = [hmac.compare_digest(given, key) for key in self._keys]
        return scheme.lower() == "bearer" and any(matches)


class BodyLimit:
    """Reads bodies, up to a size and within a time, before the application sees the request.

    Parameters
    ----------
    app : ASGI application
    max_bytes : int
        Larger bodies are refused.
    """

    def __init__(self, app: ASGIApp, max_bytes: int) -> None:
        self._app = app
        self._max_bytes = max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        try:
            body = await self._read(Headers(scope=scope), receive)
        except ApiError as error:
            await refuse(error, send, {"Connection": "close"})
            return
        if body is not None:
            await self._app(scope, _replay(body, receive), send)

    async def _read(self, headers: Headers, receive: Receive) -> bytes | None:
        """The whole body; None when the client left."""
        declared = headers.get("content-length", "0")
        if declared.isdecimal() and int(declared) > self._max_bytes:
            raise self._too_large()
        body = bytearray()
        try:
            async with asyncio.timeout(BODY_SECONDS):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        return None
                    body += message.get("body", b"")
                    if len(body) > self._max_bytes:
                        raise self._too_large()
                    if not message.get("more_body", False):
                        return bytes(body)
        except TimeoutError as error:
            raise ApiError(408, f"the request's body was not complete after {BODY_SECONDS:.0f} seconds") from error

    def _too_large(self) -> ApiError:
        return ApiError(413, f"the request's body has more than {self._max_bytes} bytes; shorten it", code="too_large")


def _replay(body: bytes, receive: Receive) -> Receive:
    pending: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def replayed() -> Message:
        return pending.pop() if pending else await receive()

    return replayed


async def refuse(error: ApiError, send: Send, headers: dict[str, str]) -> None:
    """Send an error as the whole response."""
    body = json.dumps(error.body).encode()
    fields = {"Content-Type": "application/json", "Content-Length": str(len(body)), **error.headers, **headers}
    raw = [(name.lower().encode("latin-1"), value.encode("latin-1")) for name, value in fields.items()]
    await send({"type": "http.response.start", "status": error.status, "headers": raw})
    await send({"type": "http.response.body", "body": body, "more_body": False})
