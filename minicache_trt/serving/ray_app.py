"""Replicas of our OpenAI-compatible server on Ray Serve.

    serve run minicache_trt.serving.ray_app:app engine=/models/engine replicas=4

An ingress takes HTTP requests and hands each to a replica: the whole application of `minicache_trt.serving.app` around
one engine. Requests that begin alike go to the same replica, see `minicache_trt.serving.ray_router`. When a replica
dies, the ingress gives requests of which nothing has been sent to the client yet to another one.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from ray import serve
from ray.exceptions import RayError
from ray.serve.config import RequestRouterConfig
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse

from minicache_trt.config import KvCacheConfig
from minicache_trt.parallel.engine import TensorParallelEngine
from minicache_trt.serving.asgi_call import HttpHead, HttpRequest, call
from minicache_trt.serving.prefix_key import prefix_key
from minicache_trt.serving.ray_config import RayConfig, read_config
from minicache_trt.serving.ray_router import PrefixRouter

REPLICA_HEADER = "x-minicache-replica"
ATTEMPTS = 6
"""Replicas a request is given to before its client hears of it."""
HEALTH_SECONDS = 2.0
"""How often Ray asks a replica for its health: how long the loss of an idle one's rank goes unnoticed."""

logger = logging.getLogger("ray.serve")


class EngineReplica:
    """One engine and the application around it; the engine's ranks are processes of this replica's own."""

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
        self._llm = llm
        self._service = Service(llm, (config.name,), config.max_queue_size)
        self._app = create_app(self._service, HttpConfig(), History(self._service))
        self._headers = {REPLICA_HEADER: serve.get_replica_context().replica_id.unique_id}

    async def handle(self, request: HttpRequest, *, key: str) -> AsyncGenerator[HttpHead | bytes]:
        """Answer a request; ``key`` has brought it here."""
        async with aclosing(call(self._app, request, self._headers)) as pieces:
            async for piece in pieces:
                self.check_health()  # rather than an error of its own, requests get another replica
                yield piece

    def check_health(self) -> None:
        """End the process when the engine has ended by itself: Ray notices that at once and starts another replica."""
        failure = self._llm.failure
        if failure is None:
            return
        logger.error("%s: this replica ends, Ray Serve starts another", failure)
        if isinstance(self._llm.engine, TensorParallelEngine):
            self._llm.engine.close()  # ranks that wait for the lost one
        os._exit(1)


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
    config = read_config(args)
    from minicache_trt.engine_directory import read_engine

    build = read_engine(config.engine).build
    batch = build.max_batch_size
    router = RequestRouterConfig(
        request_router_class=PrefixRouter, request_router_kwargs={"imbalance": config.imbalance}
    )
    replica = serve.deployment(
        EngineReplica,
        name="engine",
        num_replicas=config.replicas,
        max_ongoing_requests=batch + config.max_queue_size,
        request_router_config=router,
        ray_actor_options=config.resources(build),
        health_check_period_s=HEALTH_SECONDS,
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
