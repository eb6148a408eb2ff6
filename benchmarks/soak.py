"""Does a server that runs for long stay as it was?

A server of its own gets a steady, mixed load: streams that are read to the end, clients that leave in the middle,
prompts that share a beginning, and bodies that are no requests. Its resident memory, threads and open files are read
every few seconds; growth is the slope of a line through the last two thirds, when caches have filled.
"""

from __future__ import annotations

import asyncio
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import httpx
import numpy as np
import typer
from common import CACHE_DIR, REPOSITORY, CacheDir, engine_directory, run
from reporting import JsonFile, write_report

from minicache_trt.cli.console import stderr
from minicache_trt.config import BuildConfig
from minicache_trt.errors import UserError
from minicache_trt.load.apis import APIS, Sampling
from minicache_trt.load.exchange import Endpoint
from minicache_trt.load.generator import open_client, send_all
from minicache_trt.load.loads import Load
from minicache_trt.load.sources import SourceOptions, open_source
from minicache_trt.load.text import MeasuredText

DEMO = REPOSITORY / "examples" / "demo_model" / "checkpoint"
MIB = 2**20
START_SECONDS = 120.0
COUNT = re.compile(
    r"minicache_(requests|kv_cache|prefix_cache|preemptions|generation_tokens|prompt_tokens)_(?!created)"
)


@dataclass(frozen=True)
class Sample:
    """The server at one moment."""

    seconds: float
    resident_bytes: int
    threads: int
    open_files: int


class ServerProcess:
    """``minicache-trt serve`` on a free port of 127.0.0.1."""

    def __init__(self, engine: Path, threads: int) -> None:
        command = [sys.executable, "-c", "from minicache_trt.cli import main; main()", "serve", str(engine)]
        options = ["--port", "0", "--threads", str(threads)]
        self.process = subprocess.Popen(
            [*command, *options], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        match = re.search(r"http://127\.0\.0\.1:\d+", line)
        if match is None:
            raise UserError(f"the server did not start: {line.strip()}")
        self.url = match[0]

    def wait_until_ready(self) -> None:
        end = time.monotonic() + START_SECONDS
        while time.monotonic() < end:
            try:
                if httpx.get(f"{self.url}/ready").status_code == 200:
                    return
            except httpx.HTTPError:
                pass
            time.sleep(0.5)
        raise UserError(f"the server was not ready within {START_SECONDS:g} seconds")

    def sample(self, start: float) -> Sample:
        folder = Path("/proc", str(self.process.pid))
        status = dict(line.split(":", 1) for line in (folder / "status").read_text().splitlines())
        resident, threads = int(status["VmRSS"].split()[0]) * 1024, int(status["Threads"])
        return Sample(time.monotonic() - start, resident, threads, len(list((folder / "fd").iterdir())))

    def stop(self) -> int:
        """SIGTERM; the exit code."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(60)


async def vanish(client: httpx.AsyncClient, endpoint: Endpoint, pieces: int) -> None:
    """Ask for a long answer, and leave after a few pieces."""
    body = {"model": endpoint.model, "prompt": "def main(", "max_tokens": 400, "stream": True, "ignore_eos": True}
    async with client.stream("POST", endpoint.target, json=body) as response:
        async for line in response.aiter_lines():
            pieces -= line.startswith("data:")
            if pieces <= 0:
                return


async def nonsense(client: httpx.AsyncClient, endpoint: Endpoint) -> int:
    """A body that is no request; the status it gets."""
    return (await client.post(endpoint.target, content=b'{"prompt": [', timeout=60)).status_code


async def load(server: ServerProcess, minutes: float, rate: float, slice_seconds: float) -> dict[str, Any]:
    """Slices of load, a sample after each."""
    endpoint = Endpoint(server.url, APIS["openai"], "soak", Sampling(ignore_eos=True), timeout=120.0)
    rng, text = np.random.default_rng(0), MeasuredText(2.0)
    mixed = open_source(SourceOptions(input_len=120, output_len=60, max_input_len=600, max_output_len=300), text, 0)
    shared = open_source(
        SourceOptions("shared-prefix", input_len=30, output_len=30, prefix_len=300, num_prefixes=4), text, 0
    )
    outcomes: Counter[str] = Counter()
    start = time.monotonic()
    samples = [server.sample(start)]
    async with open_client() as client:
        endpoint_name = (await client.get(f"{server.url}/v1/models")).json()["data"][0]["id"]
        endpoint = Endpoint(server.url, endpoint.api, endpoint_name, endpoint.sampling, endpoint.timeout)
        while samples[-1].seconds < 60 * minutes:
            began = time.monotonic()
            count = max(2, round(rate * slice_seconds))
            requests = [*mixed.draw(rng, count - count // 3), *shared.draw(rng, count // 3)]
            arrivals = Load(rate).arrivals(rng, count)
            gone = [vanish(client, endpoint, int(rng.integers(1, 9))) for _ in range(2)]
            records, status, *_ = await asyncio.gather(
                send_all(client, endpoint, requests, arrivals), nonsense(client, endpoint), *gone
            )
            outcomes.update(record.error or "completed" for record in records)
            outcomes[f"nonsense: http_{status}"] += 1
            outcomes["left"] += len(gone)
            await asyncio.sleep(max(0.0, slice_seconds - (time.monotonic() - began)))
            samples.append(server.sample(start))
            if len(samples) % 10 == 0:
                now = samples[-1]
                stderr.print(f"{now.seconds:.0f} s: {now.resident_bytes / MIB:.1f} MiB, {dict(outcomes)}")
        await asyncio.sleep(2)
        metrics = (await client.get(f"{server.url}/metrics")).text
    return {"samples": samples, "outcomes": dict(outcomes), "metrics": metrics}


def slope(samples: list[Sample]) -> float:
    """Bytes per hour over the last two thirds."""
    late = samples[len(samples) // 3 :]
    seconds, sizes = [sample.seconds for sample in late], [sample.resident_bytes for sample in late]
    return 3600 * float(np.polyfit(seconds, sizes, 1)[0])


def main(
    minutes: Annotated[float, typer.Option(help="How long.")] = 30.0,
    rate: Annotated[float, typer.Option(help="Requests per second.")] = 1.0,
    slice_seconds: Annotated[float, typer.Option(help="Between samples.")] = 10.0,
    checkpoint: Annotated[Path, typer.Option(help="Served with the default method.")] = DEMO,
    threads: Annotated[int, typer.Option(help="CPU threads of the server.")] = 1,
    cache_dir: CacheDir = CACHE_DIR,
    json: JsonFile = None,
) -> None:
    """Print memory, threads and open files at the beginning, in the middle and at the end."""
    engine = engine_directory(cache_dir / "soak", checkpoint, "kivi4", BuildConfig(16, 2048, 1024))
    server = ServerProcess(engine, threads)
    try:
        server.wait_until_ready()
        result = asyncio.run(load(server, minutes, rate, slice_seconds))
        code = server.stop()
    finally:
        server.process.kill()
        server.process.wait()
    samples: list[Sample] = result["samples"]
    chosen = [samples[0], samples[len(samples) // 3], samples[2 * len(samples) // 3], samples[-1]]
    rows = [
        [f"{item.seconds:.0f} s", f"{item.resident_bytes / MIB:.1f} MiB", item.threads, item.open_files]
        for item in chosen
    ]
    growth = slope(samples)
    rows.append(["growth of the last two thirds", f"{growth / MIB:.2f} MiB/hour", "", f"exit code {code}"])
    stderr.print(str(result["outcomes"]))
    results = {
        "samples": [asdict(sample) for sample in samples],
        "outcomes": result["outcomes"],
        "growth_bytes_per_hour": growth,
        "exit_code": code,
        "metrics": [line for line in result["metrics"].splitlines() if COUNT.match(line)],
    }
    title = f"A server over {minutes:g} minutes at {rate:g} requests/s"
    write_report(title, ("when", "resident", "threads", "open files"), rows, results, json)


if __name__ == "__main__":
    run(main)
