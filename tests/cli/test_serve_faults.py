"""Servers in processes of their own that are told to stop, or killed, while clients wait."""

from __future__ import annotations

import asyncio
import signal
import socket
import subprocess
import sys
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

import httpx
import pytest

from minicache_trt.load.apis import APIS, Sampling
from minicache_trt.load.exchange import Endpoint
from minicache_trt.load.generator import open_client, send_all
from minicache_trt.load.record import Record
from minicache_trt.load.requests import Request

WAIT = 120
PROMPT = {"model": "engine", "prompt": "the cat sat", "max_tokens": 30, "temperature": 0, "ignore_eos": True}
Start = Callable[[int], subprocess.Popen[str]]


@pytest.fixture
def port() -> int:
    """Free a moment ago; kept over restarts."""
    with socket.create_server(("127.0.0.1", 0)) as found:
        number: int = found.getsockname()[1]
    return number


@pytest.fixture
def start(engine: Path) -> Iterator[Start]:
    """``start(port)``: the command, once it listens."""
    processes = []

    def run(number: int) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", "from minicache_trt.cli import main; main()", "serve", str(engine)]
        process = subprocess.Popen(
            [*command, "--port", str(number), "--threads", "1"], stdout=subprocess.PIPE, text=True
        )
        processes.append(process)
        assert process.stdout is not None and "is served at" in process.stdout.readline()
        return process

    yield run
    for process in processes:
        if process.poll() is None:
            process.kill()
        process.communicate()


async def under_load(
    url: str, act: Callable[[], None], during: Callable[[httpx.AsyncClient], Awaitable[None]]
) -> list[Record]:
    """Streams, more than run at a time; ``act`` when some run and all have come, then ``during``; what became of it."""
    endpoint = Endpoint(url, APIS["openai"], "engine", Sampling(ignore_eos=True), timeout=WAIT)
    requests = [Request(f"the dog {index} sat on", 150) for index in range(24)]
    async with open_client() as client:

        async def load() -> dict[str, float]:
            return _load((await client.get(f"{url}/metrics", timeout=WAIT)).text)

        before = sum((await load()).values())
        streams = asyncio.create_task(send_all(client, endpoint, requests, [0.0] * len(requests)))
        while True:
            now = await load()
            if now["running"] > 0 and sum(now.values()) == before + len(requests):
                break
            assert not streams.done(), "all ended before they were seen together"
            await asyncio.sleep(0.01)
        act()
        await during(client)
        return await streams


def _load(metrics: str) -> dict[str, float]:
    """Requests by what became of them so far."""
    found = {"running": 0.0, "waiting": 0.0, "finished": 0.0}
    for line in metrics.splitlines():
        for name in found:
            if line.startswith((f"minicache_requests_{name}{{", f"minicache_requests_{name}_total{{")):
                found[name] += float(line.split()[-1])
    return found


def test_stopping_under_load_loses_nothing(start: Start, port: int) -> None:
    process, url = start(port), f"http://127.0.0.1:{port}"

    async def refused(client: httpx.AsyncClient) -> None:
        while True:
            response = await client.post(f"{url}/v1/completions", json=PROMPT, timeout=WAIT)
            if response.status_code == 503:
                assert (await client.get(f"{url}/ready", timeout=WAIT)).status_code == 503
                return
            assert response.status_code == 200, response.text

    records = asyncio.run(under_load(url, lambda: process.send_signal(signal.SIGTERM), refused))
    assert [record.error for record in records] == [None] * 24, [x.message for x in records]
    assert {record.output_tokens for record in records} == {150}
    assert process.wait(WAIT) == 0


def test_killed_and_started_again(start: Start, port: int) -> None:
    process, url = start(port), f"http://127.0.0.1:{port}"
    before = httpx.post(f"{url}/v1/completions", json=PROMPT, timeout=WAIT).json()["choices"]

    async def dead(client: httpx.AsyncClient) -> None:
        assert await asyncio.to_thread(process.wait, WAIT) == -signal.SIGKILL
        with pytest.raises(httpx.TransportError):
            await client.get(f"{url}/health")

    records = asyncio.run(under_load(url, process.kill, dead))
    errors = {record.error for record in records}
    assert errors & {"disconnect", "connect"} and errors <= {"disconnect", "connect", None}, "nobody waits for the dead"
    start(port)
    assert httpx.post(f"{url}/v1/completions", json=PROMPT, timeout=WAIT).json()["choices"] == before
