"""The HTTP application: routes, middleware, error bodies."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Sequence
from dataclasses import dataclass

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException

from minicache_trt.errors import UserError
from minicache_trt.serving.answering import Answering
from minicache_trt.serving.chat_template import ChatTemplate
from minicache_trt.serving.errors import ApiError
from minicache_trt.serving.history import History
from minicache_trt.serving.middleware import ApiKeys, BodyLimit
from minicache_trt.serving.operations import operations_router
from minicache_trt.serving.routes import openai_router
from minicache_trt.serving.service import Service
from minicache_trt.serving.streaming import ClientGone


@dataclass(frozen=True)
class HttpConfig:
    """What the application needs beside the service.

    Parameters
    ----------
    api_keys : tuple of str
        One of them must come with every request; without any, all are answered.
    max_body_bytes : int
        Largest body of a request.
    chat_template : str, optional
        A Jinja template to use instead of the tokenizer's.
    """

    api_keys: tuple[str, ...] = ()
    max_body_bytes: int = 8 << 20
    chat_template: str | None = None

    def __post_init__(self) -> None:
        if "" in self.api_keys:
            raise ValueError("api_keys: expected keys that are not empty, got ''")
        if self.max_body_bytes < 1:
            raise ValueError(f"max_body_bytes: expected a positive number, got {self.max_body_bytes}")


def create_app(service: Service, config: HttpConfig, history: History) -> FastAPI:
    """An ASGI application over a service; `history` is what the status page shows."""
    app = FastAPI(
        title="minicache-trt",
        version=importlib.metadata.version("minicache-trt"),
        docs_url=None,  # these pages load scripts from elsewhere
        redoc_url=None,
    )
    template = ChatTemplate(service.llm.tokenizer, config.chat_template)
    app.include_router(openai_router(Answering(service), template))
    app.include_router(operations_router(service, history))
    app.add_middleware(BodyLimit, max_bytes=config.max_body_bytes)
    app.add_middleware(ApiKeys, keys=config.api_keys)
    app.add_exception_handler(ApiError, _api_error)
    app.add_exception_handler(UserError, _user_error)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(ClientGone, _gone)
    app.add_exception_handler(Exception, _defect)
    return app


def _respond(error: ApiError) -> Response:
    return JSONResponse(error.body, error.status, error.headers)


async def _api_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return _respond(error)


async def _user_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, UserError)
    return _respond(ApiError.of(error))


async def _invalid(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    return _respond(invalid(error.errors()))


def invalid(errors: Sequence[dict[str, object]]) -> ApiError:
    """One line about a body that does not fit its model: the first wrong field, and what may stand there."""
    first = _path(errors[0])
    messages = dict.fromkeys(str(error["msg"]) for error in errors if _path(error)[:1] == first[:1])
    name = ".".join(first[:1])
    text = " or ".join(list(messages)[:4])
    return ApiError(400, f"{name}: {text}" if name else text, param=name or None)


def _path(error: dict[str, object]) -> list[str]:
    location = error["loc"]
    assert isinstance(location, tuple)
    return [str(part) for part in location[1:] if not isinstance(part, int) or len(location) > 2]


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    message = str(error.detail)
    if error.status_code in (404, 405):
        message = f"{request.method} {request.url.path}: {message}; see /openapi.json for what there is"
    response = _respond(ApiError(error.status_code, message))
    response.headers.update(error.headers or {})
    return response


async def _gone(request: Request, error: Exception) -> Response:
    return Response(status_code=499)  # nobody reads it


async def _defect(request: Request, error: Exception) -> Response:
    return _respond(ApiError(500, f"the server failed: {type(error).__name__}", "server_error", "internal_error"))
