"""Every point of a sweep, one after the other."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable

import httpx

from minicache_trt.load.exchange import Endpoint
from minicache_trt.load.generator import send_all
from minicache_trt.load.loads import WARM_UP, Sweep
from minicache_trt.load.metrics import Point, evaluate
from minicache_trt.load.requests import Source
from minicache_trt.load.slo import Slo


async def run_sweep(
    client: httpx.AsyncClient,
    endpoint: Endpoint,
    source: Source,
    sweep: Sweep,
    slo: Slo | None = None,
    progress: Callable[[str, int, int], None] = lambda stage, done, total: None,
) -> AsyncIterator[Point]:
    """Measure the points in turn.

    Parameters
    ----------
    client : httpx.AsyncClient
    endpoint : Endpoint
    source : Source
    sweep : Sweep
    slo : Slo, optional
    progress : callable
        Takes the point's name, the requests that have ended and how many there are.
    """
    if sweep.num_warmups:
        requests = source.draw(sweep.generator(WARM_UP), sweep.num_warmups)
        await send_all(client, endpoint, requests, [0.0] * len(requests), sweep.loads[0].max_concurrency)
    for index, load in enumerate(sweep.loads):
        rng = sweep.generator(index)
        requests = source.draw(rng, sweep.num_prompts)
        arrivals = load.arrivals(rng, len(requests))
        report = _stage(progress, load.label)
        yield evaluate(load, await send_all(client, endpoint, requests, arrivals, load.max_concurrency, report), slo)


def _stage(progress: Callable[[str, int, int], None], name: str) -> Callable[[int, int], None]:
    return lambda done, total: progress(name, done, total)
