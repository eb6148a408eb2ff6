"""Replicas of our OpenAI-compatible server on Ray Serve.

    serve run minicache_trt.serving.ray_app:app engine=/models/engine replicas=4

An ingress takes HTTP requests and hands each to a replica: the whole application of `minicache_trt.serving.app` around
one engine. Requests that begin alike go to the same replica, see `minicache_trt.serving.ray_router`. When a replica
dies, the ingress gives requests of which nothing has been sent to the client yet to another one.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError
from ray import serve
from ray.exceptions import RayError
from ray.serve.config import RequestRouterConfig
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse

from minicache_trt.config import KvCacheConfig
from minicache_trt.errors import UserError
from minicache_trt.serving.asgi_call import HttpHead, HttpRequest, call
from minicache_trt.serving.prefix_key import prefix_key
from minicache_trt.serving.ray_router import PrefixRouter

REPLICA_HEADER = "x-minicache-replica"
ATTEMPTS = 6
"""Replicas a request is given to before its client hears of it."""

logger = logging.getLogger("ray.serve")


@dataclass(frozen=True)
class RayConfig:
    """Arguments of `app`.

    Parameters
    ----------
    engine : Path
        Engine directory, where every node finds it.
    replicas : int
    model_name : str, optional
        Default: the directory's.
    max_queue_size : int
        Requests that may wait in a replica beside its batch.
    kv_cache_memory : int, optional
        Bytes for each replica's cache.
    backend : str, optional
        Another one than the engine was built for.
    num_threads : int, optional
        Of each replica.
    num_cpus, num_gpus : float
        What Ray reserves for a replica.
    imbalance : int
        Requests a replica may have beyond the least loaded one before equal beginnings go elsewhere.
    """

    engine: Path
    replicas: int = 1
    model_name: str | None = None
    max_queue_size: int = 64
    kv_cache_memory: int | None = None
    backend: str | None = None
    num_threads: int | None = None
    num_cpus: float = 1
    num_gpus: float = 0
    imbalance: int = 8

    def __post_init__(self) -> None:
        for name, least in (("replicas", 1), ("max_queue_size", 0), ("imbalance", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}: expected a number of at least {least}, got {getattr(self, name)}")

    @property
    def name(self) -> str:
        return self.model_name or self.engine.resolve().name


class EngineReplica:
    """One engine and the application around it."""

    def __init__(self, config: RayConfig) -> None:
        from minicache_trt.build import load_engine
        from minicache_trt.engine_directory import CHECKPOINT
        from minicache_trt.runtime.llm import LLM
        from minicache_trt.serving.app import HttpConfig, create_app
        from minicache_trt.serving.history import History
        from minicache_trt.serving.service import Service

        engine = load_engine(config.engine, config.num_threads, config.backend)
        cache = KvCacheConfig(max_bytes=config.kv_cache_memory)
        llm = LLM.from_engine(engine, tokenizer=config.engine / CHECKPOINT, kv_cache_config=cache)
        self._service = Service(llm, (config.name,), config.max_queue_size)
        self._app = create_app(self._service, HttpConfig(), History(self._service))
        self._headers = {REPLICA_HEADER: serve.get_replica_context().replica_id.unique_id}

    async def handle(self, request: HttpRequest, *, key: str) -> AsyncGenerator[HttpHead | bytes]:
        """Answer a request; ``key`` has brought it here."""
        async with aclosing(call(self._app, request, self._headers)) as pieces:
            async for piece in pieces:
                yield piece

    def check_health(self) -> None:
        """Raises when the engine has ended by itself; Ray Serve replaces the replica then."""
        if self._service.failed:
            raise RuntimeError("the engine has ended")


class Ingress:
    """Hands requests to replicas, and again when one dies before it has said anything."""

    def __init__(self, replicas: Any) -> None:
        self._replicas = replicas.options(stream=True)

    async def __call__(self, request: Request) -> Response:
        """Forward a request."""
        try:
            body = await request.body()
        except ClientDisconnect:
            return Response(status_code=499)
        query = request.url.query.encode()
        asked = HttpRequest(request.method, request.url.path, query, request.headers.raw, body)
        pieces = self._forward(asked)
        try:
            head = await anext(pieces)
        except RayError as error:
            logger.error("no replica answers: %s", error)
            message = "no replica could answer; try again later"
            return JSONResponse({"error": {"message": message, "type": "service_unavailable"}}, 503)
        assert isinstance(head, HttpHead)
        response = StreamingResponse(pieces, head.status)
        response.raw_headers = head.headers
        return response

    async def _forward(self, request: HttpRequest) -> AsyncGenerator[Any]:
        """The head is kept until there is a body: until then another replica may begin anew."""
        key = prefix_key(request.body)
        for attempt in range(ATTEMPTS):
            begun, head = False, None
            pieces = self._replicas.handle.remote(request, key=key)
            try:
                async for piece in pieces:
                    if head is None:
                        head = piece
                        continue
                    if not begun:
                        begun = True
                        yield head
                    yield piece
                if not begun:
                    yield head
                return
            except RayError:
                if begun or attempt == ATTEMPTS - 1:
                    raise
                await asyncio.sleep(0.1 * 2**attempt)
            finally:
                pieces.cancel()


def app(args: dict[str, Any]) -> Any:
    """Builds the application, for ``serve run`` and for configuration files.

    Parameters
    ----------
    args : dict
        Fields of `RayConfig`; text is converted.

    Raises
    ------
    UserError
        Naming the argument that cannot be used.
    """
    names = [field.name for field in fields(RayConfig)]
    unknown = sorted(args.keys() - set(names))
    if unknown:
        raise UserError(f"unknown argument {unknown[0]!r}", f"there are: {', '.join(names)}")
    try:
        config = TypeAdapter(RayConfig).validate_python(args)
    except ValidationError as error:
        first = error.errors()[0]
        raise UserError(": ".join([*map(str, first["loc"]), first["msg"]])) from error
    from minicache_trt.engine_directory import read_engine

    batch = read_engine(config.engine).build.max_batch_size
    router = RequestRouterConfig(
        request_router_class=PrefixRouter, request_router_kwargs={"imbalance": config.imbalance}
    )
    replica = serve.deployment(
        EngineReplica,
        name="engine",
        num_replicas=config.replicas,
        max_ongoing_requests=batch + config.max_queue_size,
        request_router_config=router,
        ray_actor_options={"num_cpus": config.num_cpus, "num_gpus": config.num_gpus},
        graceful_shutdown_timeout_s=120,
    )
    ingress = serve.deployment(
        Ingress,
        name="ingress",
        num_replicas=1,
        max_ongoing_requests=config.replicas * (batch + config.max_queue_size),
        ray_actor_options={"num_cpus": 0},
    )
    return ingress.bind(replica.bind(config))
