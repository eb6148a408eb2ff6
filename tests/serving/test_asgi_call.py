"""An application called without a socket says what it says on one, and hears its caller leave."""

from __future__ import annotations

import asyncio

import pytest
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse

from minicache_trt.serving.asgi_call import HttpHead, HttpRequest, call

POST = HttpRequest("POST", "/x", b"a=1", [(b"content-type", b"text/plain")], b"hello")


async def collect(app, request=POST):
    return [piece async for piece in call(app, request, {"x-extra": "e"})]


def test_requests_arrive_whole_and_responses_come_back() -> None:
    async def app(scope, receive, send) -> None:
        request = Request(scope, receive)
        body = (await request.body()).decode()
        told = [request.method, request.url.path, dict(request.query_params), request.headers["content-type"], body]
        await JSONResponse(told, 201)(scope, receive, send)

    head, body = asyncio.run(collect(app))
    assert isinstance(head, HttpHead) and head.status == 201
    assert (b"x-extra", b"e") in head.headers
    assert body == b'["POST","/x",{"a":"1"},"text/plain","hello"]'


def test_pieces_come_one_by_one() -> None:
    sent = []

    async def app(scope, receive, send) -> None:
        async def pieces():
            for i in range(5):
                sent.append(i)
                yield f"{i}"

        await StreamingResponse(pieces())(scope, receive, send)

    async def first_two():
        generator = call(app, POST, {})
        got = [await anext(generator) for _ in range(2)]
        await generator.aclose()
        return got

    _, first = asyncio.run(first_two())
    assert first == b"0" and len(sent) <= 3
    assert asyncio.run(collect(app))[1:] == [b"0", b"1", b"2", b"3", b"4"]


def test_the_application_hears_its_caller_leave() -> None:
    heard = []

    async def app(scope, receive, send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await receive()
        try:
            heard.append((await receive())["type"])
        except asyncio.CancelledError:
            heard.append("cancelled")
            raise

    async def leave() -> None:
        generator = call(app, POST, {})
        await anext(generator)
        await asyncio.sleep(0)
        await generator.aclose()

    asyncio.run(leave())
    assert heard in (["http.disconnect"], ["cancelled"])


def test_an_application_that_fails_fails_its_caller() -> None:
    async def app(scope, receive, send) -> None:
        await Response("part")(scope, receive, send)
        raise RuntimeError("boom")

    with pytest.raises(RuntimeError, match="boom"):
        asyncio.run(collect(app))
