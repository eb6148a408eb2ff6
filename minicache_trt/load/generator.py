"""Sends requests when they are due, as many at a time as allowed."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from contextlib import nullcontext

import httpx

from minicache_trt.load.exchange import Endpoint, exchange
from minicache_trt.load.record import Record
from minicache_trt.load.requests import Request


async def send_all(
    client: httpx.AsyncClient,
    endpoint: Endpoint,
    requests: Sequence[Request],
    arrivals: Sequence[float],
    max_concurrency: int | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[Record]:
    """Send every request at its time and wait for all answers.

    A request whose time comes while ``max_concurrency`` others are under way waits in the generator; its latencies
    count from when it is sent. Times are those of the running event loop.

    Parameters
    ----------
    client : httpx.AsyncClient
    endpoint : Endpoint
    requests : sequence of Request
    arrivals : sequence of float
        Seconds from now, ascending, one per request.
    max_concurrency : int, optional
        Default: no limit.
    progress : callable
        Called with the requests that have ended and how many there are.

    Returns
    -------
    list of Record
        In the order of the requests.
    """
    loop = asyncio.get_running_loop()
    start = loop.time()
    places = nullcontext() if max_concurrency is None else asyncio.Semaphore(max_concurrency)
    ended = 0

    def clock() -> float:
        return loop.time() - start

    async def one(request: Request, due: float) -> Record:
        nonlocal ended
        async with places:
            record = await exchange(client, endpoint, request, due, clock)
        ended += 1
        progress(ended, len(requests))
        return record

    tasks = []
    async with asyncio.TaskGroup() as group:
        for request, due in zip(requests, arrivals, strict=True):
            wait = due - clock()
            if wait > 0:
                await asyncio.sleep(wait)
            tasks.append(group.create_task(one(request, due)))
    return [task.result() for task in tasks]


def open_client(max_connections: int | None = None) -> httpx.AsyncClient:
    """A client that limits nothing by itself; every request has its own limit of time."""
    limits = httpx.Limits(max_connections=max_connections, max_keepalive_connections=None)
    return httpx.AsyncClient(limits=limits, timeout=None)
