"""Faults under load: clients that leave in crowds, steps that fail, caches that are too small for everybody."""

from __future__ import annotations

import asyncio

import httpx
import pytest

from minicache_trt.backends.base import EngineLost
from minicache_trt.build import load_engine
from minicache_trt.config import KvCacheConfig
from minicache_trt.engine_directory import CHECKPOINT
from minicache_trt.load.apis import APIS, Sampling
from minicache_trt.load.exchange import Endpoint
from minicache_trt.load.generator import open_client, send_all
from minicache_trt.load.requests import Request
from minicache_trt.runtime.llm import LLM
from minicache_trt.runtime.sampling_params import SamplingParams
from tests.serving.live import MODEL

WORDS = ["def", "class", "import os", "for i in", "return self", "while True", "try", "with open("]


def requests(count, tokens):
    """Different prompts, some of which begin alike."""
    return [Request(f"{WORDS[index % 8]} x{index // 3} = ", tokens + index % 5) for index in range(count)]


def endpoint(live):
    return Endpoint(live.url, APIS["openai"], MODEL, Sampling(ignore_eos=True), timeout=60.0)


async def send(live, wanted):
    async with open_client() as client:
        return await send_all(client, endpoint(live), wanted, [0.0] * len(wanted))


@pytest.fixture(scope="module")
def expected(demo_llm):
    """``expected(request)``: the text of a request that runs alone, on an engine of its own."""
    llm, known = demo_llm("kivi2"), {}

    def text(request):
        if request not in known:
            params = SamplingParams(max_tokens=request.output_len, temperature=0, ignore_eos=True)
            known[request] = llm.generate([request.prompt], params)[0].outputs[0].text
        return known[request]

    return text


def check_complete(record, request, expected):
    assert record.error is None, record
    assert (record.text, record.output_tokens) == (expected(request), request.output_len)


def test_a_crowd_that_leaves_disturbs_nobody(serve, demo_llm, expected):
    live = serve(demo_llm("kivi2"))
    stay, leave = requests(6, 24), requests(16, 300)

    async def gone(client, request, pieces):
        body = {"model": MODEL, "prompt": request.prompt, "max_tokens": request.output_len, "stream": True}
        async with client.stream("POST", f"{live.url}/v1/completions", json=body | {"ignore_eos": True}) as response:
            assert response.status_code == 200
            async for line in response.aiter_lines():
                pieces -= line.startswith("data:")
                if pieces <= 0:
                    return

    async def main():
        async with httpx.AsyncClient(timeout=60, limits=httpx.Limits(max_connections=None)) as client:
            crowd = [gone(client, request, index % 6) for index, request in enumerate(leave)]
            records, *_ = await asyncio.gather(send(live, stay), *crowd)
            return records

    for record, request in zip(asyncio.run(main()), stay, strict=True):
        check_complete(record, request, expected)
    assert live.http.get("/health").status_code == 200


@pytest.mark.parametrize("operation", ["decode", "compress"])
def test_steps_that_fail_take_their_batch_and_nobody_else(serve, demo_llm, expected, operation):
    live = serve(demo_llm("kivi2"))
    engine, calls = live.llm.engine, 0
    call = getattr(engine, operation)
    broken = {"decode": {5, 30}, "compress": {1, 3}}[operation]

    def failing(*arguments):
        nonlocal calls
        calls += 1
        if calls in broken:
            raise RuntimeError(f"call {calls} failed")
        return call(*arguments)

    setattr(engine, operation, failing)
    wanted = requests(8, 132) if operation == "compress" else requests(16, 12)
    records = asyncio.run(send(live, wanted))
    failed = [record for record in records if record.error is not None]
    assert 1 <= len(failed) <= 2 * live.llm.engine.build.max_batch_size
    assert all("failed" in record.message for record in failed), failed
    assert {record.error for record in failed} <= {"stream_error", "http_500"}
    for record, request in zip(records, wanted, strict=True):
        if record.error is None:
            check_complete(record, request, expected)
    again = asyncio.run(send(live, wanted[:2]))
    for record, request in zip(again, wanted, strict=False):
        check_complete(record, request, expected)


def test_a_lost_engine_is_told_to_whoever_watches(serve, demo_llm):
    live = serve(demo_llm("kivi2"))

    def lose(*_):
        raise EngineLost("the engine's ranks have ended (rank 1: its process ended)")

    assert live.http.get("/health").status_code == 200
    live.llm.engine.decode = lose
    records = asyncio.run(send(live, requests(4, 4)))
    assert all("rank 1" in record.message for record in records), records
    assert live.http.get("/health").status_code == 503
    assert live.http.get("/status.json").json()["state"] == "failed"


def test_a_cache_for_one_serves_many(serve, demo_engines, expected):
    """The smallest cache there is: others wait, or give way and come again; nothing is lost."""
    directory = demo_engines["kivi2"]
    with pytest.raises(Exception, match="needs") as refusal:
        LLM.from_engine(load_engine(directory, 1), kv_cache_config=KvCacheConfig(1))
    least = int(str(refusal.value).split("which needs ")[1].split()[0])
    llm = LLM.from_engine(
        load_engine(directory, 1), tokenizer=directory / CHECKPOINT, kv_cache_config=KvCacheConfig(least)
    )
    live = serve(llm)
    wanted = requests(12, 200)
    for record, request in zip(asyncio.run(send(live, wanted)), wanted, strict=True):
        check_complete(record, request, expected)
    assert live.metrics()["preemptions_total", ()] > 0
