"""The routes operators use: health, metrics, status."""

from __future__ import annotations

import importlib.metadata
from functools import cache
from pathlib import Path
from typing import Any

from fastapi import APIRouter
from fastapi.responses import HTMLResponse, JSONResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST

from minicache_trt.serving.errors import ApiError, draining
from minicache_trt.serving.history import History
from minicache_trt.serving.service import Service

STATUS_PAGE = Path(__file__).with_name("status.html")


def operations_router(service: Service, history: History) -> APIRouter:
    """Routes without API key."""
    router = APIRouter()

    @router.get("/health")
    async def health() -> dict[str, str]:
        if service.failed:
            raise ApiError(503, "the engine has failed; restart the server", "service_unavailable", "engine_failed")
        return {"status": "ok"}

    @router.get("/ready")
    async def ready() -> dict[str, str]:
        if service.admission.draining:
            raise draining()
        return await health()

    @router.get("/version")
    async def version() -> dict[str, str]:
        return {"version": importlib.metadata.version("minicache-trt")}

    @router.get("/metrics")
    def metrics() -> Response:
        return Response(service.metrics.text(), media_type=CONTENT_TYPE_LATEST)

    @router.get("/status.json")
    async def report() -> JSONResponse:
        content: dict[str, Any] = history.report()
        return JSONResponse(content, headers={"Cache-Control": "no-store"})

    @router.get("/", include_in_schema=False)
    @router.get("/status")
    async def status() -> HTMLResponse:
        # The page's own script and style are all it may use.
        policy = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; connect-src 'self'"
        return HTMLResponse(_page(), headers={"Content-Security-Policy": policy})

    return router


@cache
def _page() -> str:
    return STATUS_PAGE.read_text(encoding="utf-8")
